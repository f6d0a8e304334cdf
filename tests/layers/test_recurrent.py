"""Recurrent mixers: every implementation against loops in numpy, gradients against the plain scan, steps too."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

KEYS = jax.random.split(jax.random.key(0), 12)
B, L, H, K, V = 2, 21, 2, 4, 3
normal = jax.random.normal


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def exact(x):
    return np.asarray(x, np.float64)


# Decays of 0 (forget all) and 1 (keep all) among ordinary ones.
LOG_DECAY = jax.nn.log_sigmoid(normal(KEYS[3], (B, L, H))).at[0, 3].set(-jnp.inf).at[1, 5].set(0.0)
LOG_DECAY_PER_KEY = jax.nn.log_sigmoid(normal(KEYS[4], (B, L, H, K))).at[0, 3, 0].set(-jnp.inf).at[1, 5].set(0.0)
BETA = jax.nn.sigmoid(normal(KEYS[5], (B, L, H))).at[:, 5].set(0.0).at[:, 6].set(1.0)
QUERY, KEY_, VALUE = normal(KEYS[0], (B, L, H, K)), unit(normal(KEYS[1], (B, L, H, K))), normal(KEYS[2], (B, L, H, V))
STATE = normal(KEYS[6], (B, H, K, V))


def gla_loop(q, k, v, g, state, *, scale):
    q, k, v, g, state = map(exact, (q, k, v, g, state))
    g = g if g.ndim == 4 else g[..., None]
    outputs = []
    for t in range(q.shape[1]):
        state = np.exp(g[:, t])[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    return np.stack(outputs, 1), state


def delta_loop(q, k, v, beta, g, state, *, scale):
    q, k, v, beta, g, state = map(exact, (q, k, v, beta, g, state))
    outputs = []
    for t in range(q.shape[1]):
        state = np.exp(g[:, t])[..., None, None] * state
        wrong = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + np.einsum("bhk,bhv,bh->bhkv", k[:, t], wrong, beta[:, t])
        outputs.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    return np.stack(outputs, 1), state


def titans_loop(q, k, v, log_keep, log_momentum, step, state, *, chunk):
    q, k, v, log_keep, log_momentum, step, memory = map(exact, (q, k, v, log_keep, log_momentum, step, state))
    momentum, outputs = np.zeros_like(memory), []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            anchor = memory
        error = np.einsum("bhkv,bhk->bhv", anchor, k[:, t]) - v[:, t]
        gradient = np.einsum("bhk,bhv->bhkv", k[:, t], error)
        momentum = np.exp(log_momentum[:, t])[..., None, None] * momentum - step[:, t][..., None, None] * gradient
        memory = np.exp(log_keep[:, t])[..., None, None] * memory + momentum
        outputs.append(np.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return np.stack(outputs, 1), memory, momentum


def scan_loop(x, step, rates, b, c, skip, state):
    x, step, rates, b, c, skip, state = map(exact, (x, step, rates, b, c, skip, state))
    repeats, outputs = x.shape[2] // b.shape[2], []
    for t in range(x.shape[1]):
        b_t, c_t = (np.repeat(v[:, t], repeats, axis=1) for v in (b, c))
        state = np.exp(step[:, t, :, None] * rates) * state + (step[:, t] * x[:, t])[..., None] * b_t
        outputs.append((state * c_t).sum(-1) + skip * x[:, t])
    return np.stack(outputs, 1), state


def gradients(function, arguments):
    """Of a loss in which every output counts differently."""

    def loss(*arguments):
        return sum(jnp.sum(jnp.sin(x + 0.1 * i)) for i, x in enumerate(jax.tree.leaves(function(*arguments))))

    return jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


# ---- gated linear attention ------------------------------------------------------------------------------------------


def gla(q, k, v, g, state, **options):
    return layers.gated_linear_attention(q, k, v, g, initial_state=state, return_state=True, **options)


@pytest.mark.parametrize("log_decay", [LOG_DECAY, LOG_DECAY_PER_KEY], ids=["head", "key"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gated_linear_attention_is_its_loop(log_decay, implementation):
    arguments = QUERY, KEY_, VALUE, log_decay, STATE
    close(
        gla(*arguments, implementation=implementation, chunk=8),
        gla_loop(*arguments, scale=K**-0.5),
    )


@pytest.mark.parametrize("log_decay", [LOG_DECAY, LOG_DECAY_PER_KEY], ids=["head", "key"])
def test_gradients_of_gated_linear_attention(log_decay):
    arguments = QUERY, KEY_, VALUE, log_decay, STATE
    close(
        gradients(partial(gla, chunk=8), arguments),
        gradients(partial(gla, implementation="reference"), arguments),
    )


def test_long_sequences_are_cut_into_spans(monkeypatch):
    monkeypatch.setattr("layers.recurrence._SPAN", 8)
    arguments = QUERY, KEY_, VALUE, LOG_DECAY, STATE
    # 7 is in no other test: the jitted function would otherwise have been compiled with whole spans.
    close(gla(*arguments, chunk=7, scale=0.3), gla_loop(*arguments, scale=0.3))
    close(
        gradients(partial(gla, chunk=7, scale=0.3), arguments),
        gradients(partial(gla, implementation="reference", scale=0.3), arguments),
    )


def test_without_decay_it_is_unnormalised_causal_linear_attention():
    scores = jnp.einsum("bqhk,bshk->bhqs", QUERY, KEY_) * K**-0.5
    expected = jnp.einsum("bhqs,bshv->bqhv", jnp.tril(scores), VALUE)
    close(layers.gated_linear_attention(QUERY, KEY_, VALUE), expected)


def test_gated_linear_attention_step_by_step():
    expected, final = gla(QUERY, KEY_, VALUE, LOG_DECAY, STATE)
    state, outputs = STATE, []
    for t in range(L):
        output, state = layers.gated_linear_attention_step(QUERY[:, t], KEY_[:, t], VALUE[:, t], state, LOG_DECAY[:, t])
        outputs.append(output)
    close((jnp.stack(outputs, 1), state), (expected, final))
    one, _ = layers.gated_linear_attention_step(QUERY[:, 0], KEY_[:, 0], VALUE[:, 0], STATE)
    close(one, layers.gated_linear_attention(QUERY[:, :1], KEY_[:, :1], VALUE[:, :1], initial_state=STATE)[:, 0])


def test_retention_decays():
    np.testing.assert_allclose(
        jnp.exp(layers.retention_log_decays(3)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], rtol=1e-6
    )


def test_gated_linear_attention_names_what_is_wrong():
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, chunked"):
        layers.gated_linear_attention(QUERY, KEY_, VALUE, implementation="fast")
    with pytest.raises(ValueError, match="log_decay has 3 channels, the keys have 4"):
        layers.gated_linear_attention(QUERY, KEY_, VALUE, jnp.zeros((B, L, H, 3)))


# ---- delta rule ------------------------------------------------------------------------------------------------------


def delta(q, k, v, beta, g, state, **options):
    return layers.delta_rule(q, k, v, beta, g, initial_state=state, return_state=True, **options)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_delta_rule_is_its_loop(implementation):
    arguments = QUERY, KEY_, VALUE, BETA, LOG_DECAY, STATE
    close(delta(*arguments, implementation=implementation, chunk=8), delta_loop(*arguments, scale=K**-0.5))


def test_gradients_of_the_delta_rule():
    arguments = QUERY, KEY_, VALUE, BETA, LOG_DECAY, STATE
    close(
        gradients(partial(delta, chunk=8), arguments), gradients(partial(delta, implementation="reference"), arguments)
    )


def test_the_delta_rule_answers_what_was_written_last():
    """Orthonormal keys and beta = 1: the state is a dictionary."""
    key = jnp.eye(4)[jnp.array([0, 1, 0, 2])][None, :, None]
    value = normal(KEYS[7], (1, 4, 1, V))
    _, state = layers.delta_rule(key, key, value, jnp.ones((1, 4, 1)), return_state=True)
    close(state[0, 0, :3], value[0, jnp.array([2, 1, 3]), 0])


def test_delta_rule_step_by_step():
    expected, final = delta(QUERY, KEY_, VALUE, BETA, LOG_DECAY, STATE)
    state, outputs = STATE, []
    for t in range(L):
        output, state = layers.delta_rule_step(QUERY[:, t], KEY_[:, t], VALUE[:, t], BETA[:, t], state, LOG_DECAY[:, t])
        outputs.append(output)
    close((jnp.stack(outputs, 1), state), (expected, final))
    one, _ = layers.delta_rule_step(QUERY[:, 0], KEY_[:, 0], VALUE[:, 0], BETA[:, 0], STATE)
    first = layers.delta_rule(QUERY[:, :1], KEY_[:, :1], VALUE[:, :1], BETA[:, :1], initial_state=STATE)
    close(one, first[:, 0])


def test_delta_rule_names_a_wrong_implementation():
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, chunked"):
        layers.delta_rule(QUERY, KEY_, VALUE, BETA, implementation="fast")


# ---- neural memory ---------------------------------------------------------------------------------------------------

MOMENTUM = jax.nn.log_sigmoid(normal(KEYS[8], (B, L, H))).at[0, 4].set(-jnp.inf)
STEP_SIZE = jax.nn.sigmoid(normal(KEYS[9], (B, L, H)))
MEMORY = layers.NeuralMemoryState(STATE, jnp.zeros_like(STATE), STATE, jnp.zeros(()))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("chunk", [1, 8, 32])
def test_neural_memory_is_its_token_loop(chunk, implementation):
    rows = QUERY, KEY_, VALUE, LOG_DECAY, MOMENTUM, STEP_SIZE
    output, state = layers.neural_memory(
        *rows, chunk=chunk, initial_state=MEMORY, return_state=True, implementation=implementation
    )
    close((output, state.memory, state.momentum), titans_loop(*rows, STATE, chunk=chunk))


def test_gradients_of_neural_memory():
    def run(*rows, implementation):
        *rows, memory = rows
        state = layers.NeuralMemoryState(memory, jnp.zeros_like(memory), memory, jnp.zeros(()))
        return layers.neural_memory(
            *rows, chunk=8, initial_state=state, return_state=True, implementation=implementation
        )[0]

    arguments = QUERY, KEY_, VALUE, LOG_DECAY, MOMENTUM, STEP_SIZE, STATE
    close(
        gradients(partial(run, implementation="chunked"), arguments),
        gradients(partial(run, implementation="reference"), arguments),
    )


def test_neural_memory_goes_on_from_a_state():
    """Chunked up to a chunk's end, chunked or token by token from there, even from inside a chunk."""
    rows = QUERY, KEY_, VALUE, LOG_DECAY, MOMENTUM, STEP_SIZE
    expected, final = layers.neural_memory(*rows, chunk=8, return_state=True)
    first, state = layers.neural_memory(*(x[:, :16] for x in rows), chunk=8, return_state=True)
    second, end = layers.neural_memory(*(x[:, 16:] for x in rows), chunk=8, initial_state=state, return_state=True)
    close((jnp.concatenate([first, second], 1), end.memory), (expected, final.memory))
    first, state = layers.neural_memory(*(x[:, :19] for x in rows), chunk=8, return_state=True)
    outputs = [first]
    for t in range(19, L):
        output, state = layers.neural_memory_step(*(x[:, t] for x in rows), state, chunk=8)
        outputs.append(output[:, None])
    close((jnp.concatenate(outputs, 1), state.memory, state.momentum), (expected, final.memory, final.momentum))


def test_no_steps_and_no_forgetting_leave_the_memory_alone():
    zeros = jnp.zeros((B, L, H))
    output = layers.neural_memory(QUERY, KEY_, VALUE, zeros, zeros, zeros, initial_state=MEMORY)
    close(output, jnp.einsum("blhk,bhkv->blhv", QUERY, STATE))


def test_neural_memory_names_what_is_wrong():
    rows = QUERY, KEY_, VALUE, LOG_DECAY, MOMENTUM, STEP_SIZE
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, chunked"):
        layers.neural_memory(*rows, implementation="fast")
    with pytest.raises(ValueError, match="chunk 0 is not a positive number"):
        layers.neural_memory(*rows, chunk=0)


# ---- selective scan --------------------------------------------------------------------------------------------------

D, N, G = 6, 4, 2
X, STEP = normal(KEYS[0], (B, 70, D)), jax.nn.softplus(normal(KEYS[1], (B, 70, D))).at[0, 7].set(0.0)
RATES, SKIP = -jnp.exp(normal(KEYS[2], (D, N))), normal(KEYS[3], (D,))
MAPS = normal(KEYS[4], (B, 70, G, N)), normal(KEYS[5], (B, 70, G, N))
SCAN_STATE = normal(KEYS[6], (B, D, N))


def scan(x, step, rates, b, c, skip, state, implementation=None):
    return layers.selective_scan(
        x, step, rates, b, c, skip=skip, initial_state=state, return_state=True, implementation=implementation
    )


SCAN = X, STEP, RATES, *MAPS, SKIP, SCAN_STATE


@pytest.mark.parametrize("implementation", ["reference", "chunked", "associative", None])
def test_selective_scan_is_its_loop(implementation):
    close(scan(*SCAN, implementation), scan_loop(*SCAN))


@pytest.mark.parametrize("implementation", ["chunked", "associative"])
def test_gradients_of_the_selective_scan(implementation):
    expected = gradients(partial(scan, implementation="reference"), SCAN)
    close(gradients(partial(scan, implementation=implementation), SCAN), expected, rtol=1e-4, atol=1e-4)


def test_associative_scan_goes_on_across_chunks(monkeypatch):
    monkeypatch.setattr("layers.ssm._ASSOCIATIVE_CHUNK", 16)
    short = X[:, :50], STEP[:, :50], RATES, MAPS[0][:, :50], MAPS[1][:, :50], SKIP, SCAN_STATE
    close(scan(*short, "associative"), scan_loop(*short))


def test_one_map_for_all_channels_and_no_options():
    zeros = jnp.zeros_like
    expected, _ = scan_loop(X, STEP, RATES, *(m[:, :, :1] for m in MAPS), zeros(SKIP), zeros(SCAN_STATE))
    close(layers.selective_scan(X, STEP, RATES, *(m[:, :, 0] for m in MAPS)), expected)


def test_selective_scan_step_by_step():
    expected, final = scan(*SCAN)
    state, outputs = SCAN_STATE, []
    for t in range(X.shape[1]):
        output, state = layers.selective_scan_step(
            X[:, t], STEP[:, t], RATES, MAPS[0][:, t], MAPS[1][:, t], state, skip=SKIP
        )
        outputs.append(output)
    close((jnp.stack(outputs, 1), state), (expected, final))


def test_selective_scan_does_not_see_the_future():
    changed = X.at[:, 40:].add(1.0)
    before, after = (layers.selective_scan(x, STEP, RATES, *MAPS) for x in (X, changed))
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert float(jnp.abs(before[:, 40:] - after[:, 40:]).min()) > 0


def test_selective_scan_names_what_is_wrong():
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, chunked, associative"):
        scan(*SCAN, "fast")
    with pytest.raises(ValueError, match="5 channels cannot be shared among 2 groups"):
        layers.selective_scan(X[..., :5], STEP[..., :5], RATES[:5], *MAPS)


# ---- state-space dual ------------------------------------------------------------------------------------------------

DUAL_X, DUAL_STEP = normal(KEYS[0], (B, L, 4, V)), jax.nn.softplus(normal(KEYS[1], (B, L, 4)))
DUAL_RATES, DUAL_SKIP = -jnp.exp(normal(KEYS[2], (4,))), normal(KEYS[3], (4,))
DUAL_MAPS = normal(KEYS[4], (B, L, 2, N)), normal(KEYS[5], (B, L, 2, N))


def test_state_space_dual_is_a_selective_scan_with_one_rate_a_head():
    """The same numbers with channels instead of heads: every channel of a head has the head's rate and step."""
    wide_step = jnp.repeat(DUAL_STEP, V, axis=2)
    rates = jnp.broadcast_to(jnp.repeat(DUAL_RATES, V)[:, None], (4 * V, N))
    expected, state = layers.selective_scan(
        DUAL_X.reshape(B, L, 4 * V), wide_step, rates, *DUAL_MAPS, skip=jnp.repeat(DUAL_SKIP, V), return_state=True
    )
    for implementation in ("reference", "chunked"):
        ours, ours_state = layers.state_space_dual(
            DUAL_X, DUAL_STEP, DUAL_RATES, *DUAL_MAPS, skip=DUAL_SKIP, return_state=True, chunk=8,
            implementation=implementation,
        )  # fmt: skip
        close(ours.reshape(B, L, 4 * V), expected)
        close(jnp.moveaxis(ours_state, 2, 3).reshape(B, 4 * V, N), state)


def test_state_space_dual_step_by_step():
    expected, final = layers.state_space_dual(
        DUAL_X, DUAL_STEP, DUAL_RATES, *DUAL_MAPS, skip=DUAL_SKIP, return_state=True
    )
    state, outputs = jnp.zeros((B, 4, N, V)), []
    for t in range(L):
        output, state = layers.state_space_dual_step(
            DUAL_X[:, t], DUAL_STEP[:, t], DUAL_RATES, DUAL_MAPS[0][:, t], DUAL_MAPS[1][:, t], state, skip=DUAL_SKIP
        )
        outputs.append(output)
    close((jnp.stack(outputs, 1), state), (expected, final))
    without, _ = layers.state_space_dual_step(
        DUAL_X[:, 0], DUAL_STEP[:, 0], DUAL_RATES, DUAL_MAPS[0][:, 0], DUAL_MAPS[1][:, 0], jnp.zeros((B, 4, N, V))
    )
    close(without, expected[:, 0] - DUAL_SKIP[:, None] * DUAL_X[:, 0])


def test_state_space_dual_names_groups_that_do_not_divide_the_heads():
    with pytest.raises(ValueError, match="3 heads cannot be shared among 2 groups"):
        layers.state_space_dual(DUAL_X[:, :, :3], DUAL_STEP[:, :, :3], DUAL_RATES[:3], *DUAL_MAPS)


# ---- linear recurrence, moving average, convolution ------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", "sequential", "associative", None])
@pytest.mark.parametrize("is_complex", [False, True])
def test_linear_recurrence_is_its_loop(implementation, is_complex):
    x, decay = normal(KEYS[0], (B, 9, 3)), jax.nn.log_sigmoid(normal(KEYS[1], (B, 9, 3)))
    if is_complex:
        decay = decay + 1j * normal(KEYS[2], decay.shape)
    start = normal(KEYS[3], (B, 3))
    state, expected = np.asarray(start), []
    for t in range(9):
        state = np.exp(np.asarray(decay[:, t])) * state + np.asarray(x[:, t])
        expected.append(state)
    ours, final = layers.linear_recurrence(
        x, decay, initial_state=start, return_state=True, implementation=implementation
    )
    close((ours, final), (np.stack(expected, 1), state))


def test_gradients_of_the_linear_recurrence():
    arguments = normal(KEYS[0], (B, 9, 3)), jax.nn.log_sigmoid(normal(KEYS[1], (3,))), normal(KEYS[3], (B, 3))

    def run(x, decay, start, implementation):
        return layers.linear_recurrence(x, decay, initial_state=start, return_state=True, implementation=implementation)

    expected = gradients(partial(run, implementation="reference"), arguments)
    for implementation in ("sequential", "associative"):
        close(gradients(partial(run, implementation=implementation), arguments), expected)
    with pytest.raises(ValueError, match="implementation 'fast' is not one of"):
        run(*arguments, "fast")


def test_pairwise_decay_is_the_product_between():
    decay = LOG_DECAY[0, :, 0]
    expected = np.array([[np.prod(np.exp(exact(decay)[s + 1 : t + 1])) * (s <= t) for s in range(L)] for t in range(L)])
    close(layers.pairwise_decay(decay), expected)


def test_damped_ema_is_a_convolution_with_its_kernel():
    x, alpha, amount = normal(KEYS[0], (B, L, 3)), jnp.array([0.0, 0.3, 1.0]), jnp.array([0.5, 0.7, 1.0])
    ages = np.arange(L)[:, None] - np.arange(L)[None, :]
    kernel = np.where(ages[..., None] >= 0, alpha * (1 - alpha * amount) ** np.maximum(ages, 0)[..., None], 0.0)
    expected = np.einsum("tsd,bsd->btd", kernel, x)
    close(layers.damped_ema(x, alpha, amount), expected)
    state, outputs = jnp.zeros((B, 3)), []
    for t in range(L):
        output, state = layers.damped_ema_step(x[:, t], alpha, amount, state)
        outputs.append(output)
    close(jnp.stack(outputs, 1), expected)
    _, kept = layers.damped_ema(x, alpha, amount, initial_state=jnp.ones((B, 3)), return_state=True)
    close(kept[:, 0], jnp.ones(B))
    np.testing.assert_allclose(kept[:, 2], x[:, -1, 2], rtol=1e-6)


def test_causal_convolution_equals_the_libraries():
    x, kernel, bias = normal(KEYS[0], (B, L, 3)), normal(KEYS[1], (4, 3)), normal(KEYS[2], (3,))
    expected = jax.lax.conv_general_dilated(
        x, kernel[:, None], (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=3
    )
    close(layers.causal_depthwise_conv(x, kernel, bias=bias), expected + bias)
    first, state = layers.causal_depthwise_conv(x[:, :9], kernel, bias=bias, return_state=True)
    outputs = [first]
    for t in range(9, L):
        output, state = layers.causal_depthwise_conv_step(x[:, t], state, kernel, bias=bias)
        outputs.append(output[:, None])
    close(jnp.concatenate(outputs, 1), expected + bias)
    _, ragged = layers.causal_depthwise_conv(x, kernel, lengths=jnp.asarray([9, 1]), return_state=True)
    close(ragged[0], x[0, 6:9])
    close(ragged[1], jnp.concatenate([jnp.zeros((2, 3)), x[1, :1]]))
    with pytest.raises(ValueError, match="initial_state has 2 inputs, a kernel of 4 needs 3"):
        layers.causal_depthwise_conv(x, kernel, initial_state=x[:, :2])


# ---- what holds for all ----------------------------------------------------------------------------------------------

MIXERS = {
    "gated_linear_attention": (layers.gated_linear_attention, (QUERY, KEY_, VALUE, LOG_DECAY)),
    "delta_rule": (layers.delta_rule, (QUERY, KEY_, VALUE, BETA, LOG_DECAY)),
    "neural_memory": (layers.neural_memory, (QUERY, KEY_, VALUE, LOG_DECAY, MOMENTUM, STEP_SIZE)),
    "selective_scan": (lambda x, s, b, c: layers.selective_scan(x, s, RATES, b, c), (X, STEP, *MAPS)),
    "state_space_dual": (
        lambda x, s, b, c: layers.state_space_dual(x, s, DUAL_RATES, b, c), (DUAL_X, DUAL_STEP, *DUAL_MAPS)
    ),
    "linear_recurrence": (layers.linear_recurrence, (X, -STEP)),
    "damped_ema": (lambda x: layers.damped_ema(x, jax.nn.sigmoid(SKIP), jax.nn.sigmoid(-SKIP)), (X,)),
    "causal_depthwise_conv": (lambda x: layers.causal_depthwise_conv(x, SCAN_STATE[0].T), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_batch_jit_vmap_and_bfloat16(name):
    function, arguments = MIXERS[name]
    expected = function(*arguments)
    alone = function(*(x[1:] for x in arguments))
    close(alone, expected[1:])
    mapped = jax.vmap(lambda *rows: function(*(x[None] for x in rows))[0])(*arguments)
    close(mapped, expected)
    with jax.disable_jit():
        short = [x[:1, :3] for x in arguments]
        close(function(*short), expected[:1, :3])
    narrow = [x.astype(jnp.bfloat16) for x in arguments]
    output = function(*narrow)
    assert output.dtype == jnp.bfloat16
    # The same rounded inputs in float32: only the output's own rounding may differ.
    wide = function(*(x.astype(jnp.float32) for x in narrow))
    np.testing.assert_allclose(output.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MIXERS)
def test_nothing_compiles_twice(name, caplog):
    function, arguments = MIXERS[name]
    again = [x + 0 for x in arguments]
    function(*arguments)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        function(*again)
    assert not [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]
