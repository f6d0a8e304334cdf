"""The Mamba block against a loop over time steps, and what it promises about states and first weights."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.blocks import Mamba
from zoo.blocks.mamba import mamba
from zoo.weights.convert import backwards, forwards

KEY = jax.random.key(2)
U = jax.random.normal(KEY, (2, 37, 12))
SIZES = {
    "as in the paper": {},
    "other sizes": {"state_size": 5, "conv_width": 3, "expand": 3, "step_rank": 4, "use_bias": True},
}


@pytest.fixture(params=SIZES)
def block(request):
    model = Mamba(**SIZES[request.param])
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(model.init, KEY, U)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape).astype(np.float32)), shapes)


def softplus(x):
    return np.logaddexp(x, 0.0)


def silu(x):
    return x / (1 + np.exp(-x))


def by_steps(p, u, taps):
    """One input after the other, in float64, from the equations."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p["params"])

    def linear(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    rates, (inner, states) = -np.exp(p["A_log"]), p["A_log"].shape
    outputs = []
    for sequence in np.asarray(u, np.float64):
        hidden, window = np.zeros((inner, states)), np.zeros((taps, inner))
        for token in sequence:
            x, z = np.split(linear("in_proj", token), 2)
            window = np.concatenate([window[1:], x[None]])
            x = silu((window * p["conv1d"]["kernel"][:, 0]).sum(axis=0) + p["conv1d"]["bias"])
            step, b, c = np.split(linear("x_proj", x), (-2 * states, -states))
            step = softplus(linear("dt_proj", step))
            hidden = np.exp(step[:, None] * rates) * hidden + (step * x)[:, None] * b
            outputs.append(linear("out_proj", (hidden @ c + p["D"] * x) * silu(z)))
    return np.reshape(outputs, u.shape)


def test_equals_a_loop_over_time_steps(block):
    model, variables = block
    expected = by_steps(variables, U, model.conv_width)
    chex.assert_trees_all_close(jax.jit(model.apply)(variables, U), expected.astype(np.float32), atol=1e-5, rtol=1e-4)


def test_the_future_has_no_effect(block):
    model, variables = block
    changed = U.at[:, 20:].add(1.0)
    before, after = map(partial(jax.jit(model.apply), variables), (U, changed))
    chex.assert_trees_all_equal(after[:, :20], before[:, :20])
    assert not np.allclose(after[:, 20], before[:, 20], atol=1e-3)


def test_a_sequence_can_be_cut_anywhere(block):
    model, variables = block
    run = jax.jit(partial(model.apply, return_state=True))
    whole, end = run(variables, U)
    state, parts = None, []
    for part in jnp.split(U, (1, 19), axis=1):
        output, state = run(variables, part, state)
        parts.append(output)
    # Products of other lengths round differently: relative to outputs of about 3.
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state, end, rtol=1e-5, atol=1e-5)


def test_starts_as_the_paper_says():
    params = jax.jit(Mamba().init)(KEY, jnp.zeros((1, 3, 128)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 116_480
    chex.assert_shape(params["x_proj"]["kernel"], (256, 8 + 32))
    chex.assert_trees_all_close(-jnp.exp(params["A_log"][7]), -jnp.arange(1.0, 17.0), rtol=1e-6)
    steps = np.sort(jax.nn.softplus(params["dt_proj"]["bias"]))
    assert 1e-3 * 0.999 < steps[0] < 2e-3 < 5e-2 < steps[-1] < 0.1 * 1.001
    assert np.median(steps) == pytest.approx(1e-2, rel=0.5)  # log-uniform
    assert float(jnp.max(jnp.abs(params["dt_proj"]["kernel"]))) <= 8**-0.5
    chex.assert_trees_all_equal(params["D"], jnp.ones(256))


def test_low_precision_stays_close(block):
    model, variables = block
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (variables, U))
    output = jax.jit(model.apply)(*low)
    assert output.dtype == jnp.bfloat16
    reference = jax.jit(model.apply)(variables, U)
    assert float(jnp.max(jnp.abs(output - reference))) < 0.05 * float(jnp.max(jnp.abs(reference)))


def test_official_weights_go_there_and_back(block):
    model, variables = block
    rows = list(mamba("mixer", "mixer", bias=model.use_bias))
    ours = {"params": {"mixer": jax.device_get(variables["params"])}}
    official = backwards(rows, ours)
    assert official["mixer.conv1d.weight"].shape == (ours["params"]["mixer"]["D"].size, 1, model.conv_width)
    assert ("mixer.out_proj.bias" in official) == model.use_bias
    chex.assert_trees_all_equal(forwards(rows, official), ours)
