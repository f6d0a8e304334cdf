"""Linear, latent and kernel attention against the tables they avoid; ridge, local models and coresets against numpy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

KEYS = jax.random.split(jax.random.key(1), 10)
B, L, H, D, V = 2, 13, 2, 4, 3
normal = jax.random.normal
QUERY, KEY, VALUE = (normal(KEYS[i], (B, L, H, width)) for i, width in enumerate((D, D, V)))
PRESENT = jnp.arange(L)[None, :] < jnp.array([[L], [9]])
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def gradients(function, arguments):
    def loss(*arguments):
        return sum(jnp.sum(jnp.sin(x + 0.1 * i)) for i, x in enumerate(jax.tree.leaves(function(*arguments))))

    return jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


# ---- linear attention ------------------------------------------------------------------------------------------------

MAPS = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
}


def linear_by_table(query, key, value, feature_map, causal, present=None):
    q, k = (MAPS[feature_map](np.asarray(x, np.float64)) for x in (query, key))
    table = np.einsum("bqhd,bshd->bhqs", q, k)
    table = np.tril(table) if causal else table
    if present is not None:
        table = table * np.asarray(present)[:, None, None]
    weights = table / (table.sum(-1, keepdims=True) + 1e-6)
    return np.einsum("bhqs,bshd->bqhd", weights, np.asarray(value, np.float64))


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_linear_attention_is_its_table(feature_map, causal, implementation):
    ours = layers.linear_attention(
        QUERY, KEY, VALUE, feature_map=feature_map, causal=causal, token_mask=PRESENT, implementation=implementation,
        chunk=4,
    )  # fmt: skip
    # A row of nothing but zero features (relu) divides rounding by epsilon.
    close(ours, linear_by_table(QUERY, KEY, VALUE, feature_map, causal, PRESENT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_linear_attention(causal):
    run = partial(layers.linear_attention, causal=causal, return_state=True)
    close(
        gradients(partial(run, chunk=4), (QUERY, KEY, VALUE)),
        gradients(partial(run, implementation="reference"), (QUERY, KEY, VALUE)),
    )


def test_linear_attention_goes_on_from_its_state():
    expected, final = layers.linear_attention(QUERY, KEY, VALUE, causal=True, return_state=True)
    first, state = layers.linear_attention(QUERY[:, :8], KEY[:, :8], VALUE[:, :8], causal=True, return_state=True)
    outputs = [first]
    for t in range(8, L):
        output, state = layers.linear_attention_step(QUERY[:, t], KEY[:, t], VALUE[:, t], state)
        outputs.append(output[:, None])
    close((jnp.concatenate(outputs, 1), state), (expected, final))


def test_a_function_as_feature_map_and_no_normalisation():
    ours = layers.linear_attention(QUERY, KEY, VALUE, feature_map=jnp.square, normalize=False)
    table = jnp.einsum("bqhd,bshd->bhqs", jnp.square(QUERY), jnp.square(KEY))
    close(ours, jnp.einsum("bhqs,bshd->bqhd", table, VALUE))


def test_no_key_gives_zero_with_zero_gradient():
    nobody = jnp.zeros((B, L), bool)
    run = partial(layers.linear_attention, token_mask=nobody)
    assert not jnp.any(run(QUERY, KEY, VALUE))
    chex.assert_trees_all_equal(
        jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2))(QUERY, KEY, VALUE),
        tuple(map(jnp.zeros_like, (QUERY, KEY, VALUE))),
    )


def test_linear_attention_names_what_is_wrong():
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, chunked"):
        layers.linear_attention(QUERY, KEY, VALUE, implementation="fast")
    with pytest.raises(ValueError, match="feature_map 'cos' is not a function nor one of elu, relu"):
        layers.linear_attention(QUERY, KEY, VALUE, feature_map="cos")
    with pytest.raises(ValueError, match="causal attention of 5 queries to 13 keys is not defined"):
        layers.linear_attention(QUERY[:, :5], KEY, VALUE, causal=True)


def test_the_projection_is_orthogonal_within_blocks_and_gaussian_in_length():
    projection = layers.orthogonal_projection(KEYS[5], 10, 4)
    block = projection[:4] / jnp.linalg.norm(projection[:4], axis=1, keepdims=True)
    close(block @ block.T, jnp.eye(4))
    many = layers.orthogonal_projection(KEYS[6], 4096, 4)
    np.testing.assert_allclose(jnp.mean(jnp.square(many)), 1.0, atol=0.05)
    np.testing.assert_allclose(jnp.mean(many, axis=0), np.zeros(4), atol=0.05)


def test_favor_features_estimate_softmax_attention():
    """The error falls as the number of features grows, and is small in the end."""
    query, key = QUERY / 2, KEY / 2
    exact = layers.dot_product_attention(query, key, VALUE)
    errors = []
    for count in (16, 4096):
        projection = layers.orthogonal_projection(KEYS[5], count, D)
        q = layers.favor_features(query, projection, is_query=True)
        k = layers.favor_features(key, projection, is_query=False)
        ours = layers.linear_attention(q, k, VALUE, feature_map="identity")
        errors.append(float(jnp.abs(ours - exact).max()))
    assert errors[1] < 0.1 < errors[0]


def test_favor_features_do_not_see_absent_tokens():
    projection = layers.orthogonal_projection(KEYS[5], 8, D)
    run = partial(layers.favor_features, projection=projection, is_query=False, token_mask=PRESENT)
    changed = jnp.where(PRESENT[:, :, None, None], KEY, 50.0)
    there = PRESENT[:, :, None, None]
    close(jnp.where(there, run(KEY), 0), jnp.where(there, run(changed), 0))
    assert bool(jnp.all(jnp.isfinite(run(changed))))


# ---- latent attention ------------------------------------------------------------------------------------------------


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def test_agents_gather_then_broadcast():
    agents = normal(KEYS[3], (B, 5, H, D))
    bias = normal(KEYS[4], (H, 5, L))
    q, k, v, a = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (QUERY, KEY, VALUE, agents))
    logits = a @ k.swapaxes(-1, -2) / 2 + np.asarray(bias)
    logits = np.where(np.asarray(PRESENT)[:, None, None], logits, -1e30)
    expected = softmax(q @ a.swapaxes(-1, -2) / 2) @ (softmax(logits) @ v)
    ours = layers.agent_attention(QUERY, KEY, VALUE, agents, gather_bias=bias, token_mask=PRESENT)
    close(ours, np.moveaxis(expected, 1, 2))


@pytest.mark.parametrize("normalize", [True, False])
def test_representatives_share_the_tokens(normalize):
    logits = normal(KEYS[3], (B, L, H, 5))
    keys, values, weights = layers.gather_representatives(logits, KEY, VALUE, normalize=normalize, token_mask=PRESENT)
    share = softmax(np.asarray(logits, np.float64)) * np.asarray(PRESENT)[:, :, None, None]
    close(weights, share)
    mass = share.sum(1)[:, :, :, None] + 1e-6 if normalize else 1.0
    for ours, x in ((keys, KEY), (values, VALUE)):
        close(ours, np.moveaxis(np.einsum("blhm,blhd->bhmd", share, np.asarray(x)) / mass, 1, 2))


def test_latents_read_tokens_and_themselves():
    latents, k, v = (normal(KEYS[3 + i], (B, 5, H, width)) for i, width in enumerate((D, D, V)))
    ours = layers.latent_read(latents, KEY, VALUE, k, v, token_mask=PRESENT)
    for b, count in enumerate((L, 9)):
        keys, values = jnp.concatenate([KEY[b : b + 1, :count], k[b : b + 1]], 1), VALUE[b : b + 1, :count]
        expected = layers.dot_product_attention(
            latents[b : b + 1], keys, jnp.concatenate([values, v[b : b + 1]], 1), implementation="reference"
        )
        close(ours[b : b + 1], expected)
    order = jax.random.permutation(KEYS[7], L)
    close(
        layers.latent_read(latents, KEY[:, order], VALUE[:, order], k, v), layers.latent_read(latents, KEY, VALUE, k, v)
    )


# ---- kernel ridge ----------------------------------------------------------------------------------------------------

RIDGE, SCALE = jnp.array([0.1, 1e-6]), jnp.array([1.0, 1.7])


def ridge_values_by_loop(reference, value, ridge, scale, length):
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    out = np.zeros_like(value)
    for b in range(value.shape[0]):
        for h in range(value.shape[2]):
            r = reference[b, : length[b], h]
            unit = scale[h] * r / np.maximum(np.linalg.norm(r, axis=-1, keepdims=True), 1e-6)
            gram = np.zeros((len(r), len(r)))
            for i in range(len(r)):
                gram[i, : i + 1] = softmax(r[i] @ unit[: i + 1].T)
            out[b, : length[b], h] = np.linalg.inv(gram + ridge[h] * np.eye(len(r))) @ value[b, : length[b], h]
    return out


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("length", [13, 70])
def test_ridge_values_solve_their_system(implementation, length):
    reference, value = 4 * normal(KEYS[0], (B, length, H, D)), normal(KEYS[1], (B, length, H, V))
    lengths = jnp.array([length, length - 4])
    ours = layers.kernel_ridge_values(
        reference, value, ridge=RIDGE, reference_scale=SCALE, mask=layers.LengthMask(lengths),
        implementation=implementation,
    )  # fmt: skip
    expected = ridge_values_by_loop(reference, value, np.asarray(RIDGE), np.asarray(SCALE), lengths)
    for b, n in enumerate(lengths):
        scale = np.abs(expected[b, :n]).max()
        np.testing.assert_allclose(ours[b, :n] / scale, expected[b, :n] / scale, atol=2e-4)
    present = jnp.arange(length)[None, :] < lengths[:, None]
    padded = layers.kernel_ridge_values(
        reference, value, ridge=RIDGE, reference_scale=SCALE, mask=layers.KeyMask(present),
        implementation=implementation,
    )  # fmt: skip
    assert not jnp.any(padded[1, length - 4 :])


def test_gradients_of_ridge_attention():
    run = partial(layers.kernel_ridge_attention, ridge=jnp.array([0.1, 0.5]))
    arguments = QUERY, KEY, VALUE, 3 * normal(KEYS[5], QUERY.shape)
    close(
        gradients(partial(run, implementation="blocked"), arguments),
        gradients(partial(run, implementation="reference"), arguments),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_a_huge_ridge_is_plain_causal_attention():
    reference = normal(KEYS[5], QUERY.shape)
    ours = layers.kernel_ridge_attention(QUERY, KEY, 1e6 * VALUE, reference, ridge=jnp.full(H, 1e6))
    close(ours, layers.dot_product_attention(QUERY, KEY, VALUE, mask=layers.CausalMask()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_steps_of_ridge_attention_equal_the_whole(masked):
    """In parts of several tokens and of one, over rows of different lengths."""
    length, capacity = 11, 16
    query, key, reference = (normal(k, (B, length, H, D)) for k in KEYS[:3])
    reference, value = 4 * reference, normal(KEYS[3], (B, length, H, V))
    options = {"ridge": RIDGE, "reference_scale": SCALE, "scale": 0.3}
    window = layers.WindowMask(left=4) if masked else None
    expected = layers.kernel_ridge_attention(query, key, value, reference, mask=window, **options)
    cache = layers.empty_kernel_ridge_cache(B, capacity, H, D, value_dim=V)
    found, start = [], 0
    for count in (5, 1, 3, 1, 1):
        part = [x[:, start : start + count] for x in (query, key, value, reference)]
        mask = layers.WindowMask(left=4, offset=cache.length) if masked else None
        output, cache = layers.kernel_ridge_step(*part, cache, mask=mask, **options)
        found.append(output)
        if start == 0:
            # Row 1 has two tokens fewer: what they left behind is written over.
            cache = cache._replace(length=jnp.array([5, 3]))
        start += count
    close(jnp.concatenate(found, axis=1)[0], expected[0], rtol=1e-4, atol=1e-4)
    shorter = [jnp.concatenate([x[1:, :3], x[1:, 5:]], axis=1) for x in (query, key, value, reference)]
    expected = layers.kernel_ridge_attention(*shorter, mask=window, **options)
    close(jnp.concatenate(found, axis=1)[1:, 5:], expected[:, 3:], rtol=1e-4, atol=1e-4)


def test_ridge_solutions_agree_in_double_precision():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        reference, value = (
            jnp.asarray(4 * rng.normal(size=(1, 150, H, D))),
            jnp.asarray(rng.normal(size=(1, 150, H, V))),
        )
        ridge = jnp.asarray(np.asarray(RIDGE, np.float64))
        solve = partial(layers.kernel_ridge_values, reference, value, ridge=ridge)
        dense = solve(implementation="reference")
        assert dense.dtype == jnp.float64
        for block in (16, 64):
            np.testing.assert_allclose(solve(block=block), dense, rtol=1e-10, atol=1e-10)


def test_ridge_names_a_wrong_implementation():
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, blocked"):
        layers.kernel_ridge_values(QUERY, VALUE, ridge=RIDGE, implementation="fast")


# ---- local models ----------------------------------------------------------------------------------------------------

TARGET, SOURCE, ANSWER = normal(KEYS[0], (5, 2)), normal(KEYS[1], (11, 2)), normal(KEYS[2], (11, 3))


def test_local_means_are_attention():
    log_kernel = TARGET @ SOURCE.T / np.sqrt(2)
    attention = layers.dot_product_attention(TARGET[None, :, None], SOURCE[None, :, None], ANSWER[None, :, None])
    close(layers.local_mean(log_kernel, ANSWER), attention[0, :, 0])
    # With a Gaussian kernel the query's norm cancels.
    bias = -jnp.sum(jnp.square(SOURCE), -1) / (2 * 0.7**2)
    close(
        layers.local_mean(layers.gaussian_log_kernel(TARGET, SOURCE, 0.7), ANSWER),
        layers.local_mean(TARGET @ SOURCE.T / 0.7**2 + bias, ANSWER),
    )


def test_kernels_with_compact_support():
    distance = np.linalg.norm(np.asarray(TARGET)[:, None] - np.asarray(SOURCE), axis=-1)
    expected = np.maximum(1 - (distance / 1.5) ** 2, 0)
    close(jnp.exp(layers.epanechnikov_log_kernel(TARGET, SOURCE, 1.5)), expected)
    nearest = jnp.exp(layers.nearest_log_kernel(TARGET, SOURCE, neighbors=3))
    for t in range(5):
        assert set(np.flatnonzero(nearest[t])) == set(np.argsort(distance[t])[:3])
    far = layers.epanechnikov_log_kernel(TARGET + 100, SOURCE, 1.5)
    assert not jnp.any(layers.local_mean(far, ANSWER))
    assert not jnp.any(layers.local_linear_regression(far, TARGET + 100, SOURCE, ANSWER))
    with pytest.raises(ValueError, match=r"neighbors 12 is not in 1\.\.11"):
        layers.nearest_log_kernel(TARGET, SOURCE, neighbors=12)


def test_mean_shift_climbs_the_density():
    def log_density(x):
        return jax.nn.logsumexp(layers.gaussian_log_kernel(x[None], SOURCE, 0.7)[0])

    moved = layers.mean_shift(TARGET, SOURCE, 0.7)
    close(moved - TARGET, 0.7**2 * jax.vmap(jax.grad(log_density))(TARGET))
    three = layers.mean_shift(TARGET, SOURCE, 0.7, steps=3)
    close(three, layers.mean_shift(layers.mean_shift(moved, SOURCE, 0.7), SOURCE, 0.7))
    assert bool(jnp.all(jax.vmap(log_density)(three) >= jax.vmap(log_density)(TARGET)))


def test_hopfield_energy_never_rises_and_patterns_are_found():
    def energy(x):
        return jnp.sum(jnp.square(x), -1) / 2 - jax.nn.logsumexp(3.0 * x @ SOURCE.T, axis=-1) / 3.0

    points, before = TARGET, energy(TARGET)
    for _ in range(4):
        points = layers.hopfield_retrieve(points, SOURCE, 3.0)
        assert bool(jnp.all(energy(points) <= before + 1e-6))
        before = energy(points)
    close(points, layers.hopfield_retrieve(TARGET, SOURCE, 3.0, steps=4))
    patterns = 4 * jnp.eye(6)
    close(layers.hopfield_retrieve(patterns + 0.3, patterns, 2.0), patterns, atol=1e-4)


def test_local_lines_fit_lines_exactly_and_ridge_leads_to_the_mean():
    line = SOURCE @ jnp.array([[2.0], [-1.0]]) + 3.0
    log_kernel = layers.gaussian_log_kernel(TARGET, SOURCE, 0.8)
    expected = TARGET @ jnp.array([[2.0], [-1.0]]) + 3.0
    close(layers.local_linear_regression(log_kernel, TARGET, SOURCE, line), expected, rtol=1e-3, atol=1e-3)
    close(
        layers.local_linear_regression(log_kernel, TARGET, SOURCE, ANSWER, 1e9), layers.local_mean(log_kernel, ANSWER),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_reconstruction_weights_rebuild_points_among_their_neighbours():
    neighbours = normal(KEYS[4], (5, 3, 2))
    true = jax.nn.softmax(normal(KEYS[5], (5, 3)))
    points = jnp.einsum("tk,tkd->td", true, neighbours)
    close(layers.reconstruction_weights(points, neighbours, 1e-7), true, rtol=1e-2, atol=1e-2)
    same = layers.reconstruction_weights(points, jnp.repeat(points[:, None], 3, axis=1))
    close(same, jnp.full((5, 3), 1 / 3))


# ---- coresets --------------------------------------------------------------------------------------------------------


def unit_rows(key, count, dim):
    rows = normal(key, (count, dim))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


N = 1024
CORE_KEYS, CORE_VALUES = unit_rows(KEYS[6], N, 8), unit_rows(KEYS[7], N, 8)


def keep(index):
    return jnp.zeros(N, bool).at[index].set(True)


def test_the_gram_matrix_is_that_of_explicit_features():
    gram = layers.attention_gram(CORE_KEYS[:40], CORE_VALUES[:40], 2.0)
    np.testing.assert_allclose(jnp.diagonal(gram), np.ones(40), rtol=1e-5)
    assert np.linalg.eigvalsh(np.asarray(gram, np.float64)).min() > -1e-5
    # exp(2 a.b) by its Taylor series: products of the keys, power by power.
    products = np.asarray(CORE_KEYS[:40] @ CORE_KEYS[:40].T, np.float64)
    series = sum((2 * products) ** n / float(np.prod(np.arange(1.0, n + 1))) for n in range(25)) * np.exp(-2.0)
    expected = series * (1 + np.asarray(CORE_VALUES[:40] @ CORE_VALUES[:40].T)) / 2
    close(gram, expected)


@pytest.mark.parametrize("chooser", ["greedy", "walk"])
def test_halving_keeps_one_of_every_pair(chooser):
    gram = layers.attention_gram(CORE_KEYS[:41], CORE_VALUES[:41], 1.0)
    kept = layers.halve(gram, KEYS[8], chooser=chooser)
    assert kept.shape == (20,)
    assert len(set(np.asarray(kept).tolist())) == 20


def test_a_coreset_beats_a_random_subset():
    """Card attention_coresets, acceptance 3: below sqrt(d) e^r / S, and well below uniform sampling."""
    size = N // 8
    index = layers.attention_coreset(CORE_KEYS, CORE_VALUES, KEYS[8], rounds=3)
    uniform = jax.random.permutation(KEYS[9], N)[:size]
    error, random_error = (
        float(layers.coreset_error(CORE_KEYS, CORE_VALUES, keep(i), KEYS[5], radius=1.0)) for i in (index, uniform)
    )
    assert error < np.sqrt(8) * np.e / size
    assert error < 0.6 * random_error
    nothing = layers.attention_coreset(CORE_KEYS, CORE_VALUES, KEYS[8], rounds=0)
    assert float(layers.coreset_error(CORE_KEYS, CORE_VALUES, keep(nothing), KEYS[5])) < 1e-6


def test_coresets_name_what_is_wrong():
    with pytest.raises(ValueError, match="chooser 'best' is not one of greedy, walk"):
        layers.halve(jnp.eye(4), KEYS[0], chooser="best")
    with pytest.raises(ValueError, match="1 items cannot be halved"):
        layers.halve(jnp.eye(1), KEYS[0])


# ---- what holds for all ----------------------------------------------------------------------------------------------

RUNS = {
    "linear": layers.linear_attention,
    "causal": partial(layers.linear_attention, causal=True),
    "agents": lambda q, k, v: layers.agent_attention(q, k, v, q[:, :3]),
    "ridge": lambda q, k, v: layers.kernel_ridge_attention(q, k, v, 2 * k, ridge=jnp.ones(2)),
    "representatives": lambda q, k, v: layers.gather_representatives(q, k, v)[1],
    "resampler": lambda q, k, v: layers.latent_read(q[:, :3], k, v, k[:, :3], v[:, :3]),
}


@pytest.mark.parametrize("name", RUNS)
def test_batch_jit_vmap_and_bfloat16(name):
    function, arguments = RUNS[name], (QUERY, KEY, VALUE)
    expected = function(*arguments)
    close(function(*(x[1:] for x in arguments)), expected[1:])
    close(jax.vmap(lambda *rows: function(*(x[None] for x in rows))[0])(*arguments), expected)
    with jax.disable_jit():
        close(function(*(x[:1, :5] for x in arguments)), jax.jit(function)(*(x[:1, :5] for x in arguments)))
    narrow = [x.astype(jnp.bfloat16) for x in arguments]
    output = function(*narrow)
    assert output.dtype == jnp.bfloat16
    wide = function(*(x.astype(jnp.float32) for x in narrow))
    np.testing.assert_allclose(output.astype(jnp.float32), wide, rtol=3e-2, atol=3e-2)


def test_local_models_of_double_precision_stay_in_it():
    with jax.enable_x64(True):
        x, y = (jax.random.normal(jax.random.key(i), (9, 2)) for i in (0, 1))
        kernel = layers.gaussian_log_kernel(x[:4], x, 0.7)
        weights = np.exp(np.asarray(kernel))
        mean = weights / weights.sum(axis=-1, keepdims=True) @ np.asarray(y)
        np.testing.assert_allclose(layers.local_mean(kernel, y), mean, rtol=1e-13)
        line = x @ jnp.array([[1.0], [-2.0]]) + 0.5
        fitted = layers.local_linear_regression(kernel, x[:4], x, line, ridge=1e-13)
        np.testing.assert_allclose(fitted, line[:4], rtol=1e-9)
