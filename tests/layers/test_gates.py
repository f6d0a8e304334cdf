"""Gates against loops over channels and places, their limits at 0 and 1, and what they may depend on."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import gates

RNG = np.random.default_rng(8)
SHAPES = [(2, 4, 5, 6), (1, 1, 1, 6), (2, 7, 6), (2, 2, 3, 4, 6)]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def as_places(x):
    """(B, N, C) in float64."""
    return np.asarray(x, np.float64).reshape(x.shape[0], -1, x.shape[-1])


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("sigmoid", sigmoid),
        ("silu", lambda x: x * sigmoid(x)),
        ("gelu", lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("tanh", np.tanh),
        ("identity", lambda x: x),
    ],
)
def test_linear_units_gate_by_their_activation(activation, function):
    value, gate = normal(3, 5), normal(3, 5) * 2
    got = gates.gated_linear_unit(value, gate, activation=activation)
    np.testing.assert_allclose(got, np.asarray(value, np.float64) * function(np.asarray(gate, np.float64)), atol=1e-5)


def test_open_and_closed_gates_are_exact():
    value = normal(4)
    np.testing.assert_array_equal(gates.gated_linear_unit(value, jnp.full(4, jnp.inf)), value)
    np.testing.assert_array_equal(gates.gated_linear_unit(value, jnp.full(4, -jnp.inf)), 0)
    x, kernel = normal(1, 3, 3, 2), jnp.zeros((1, 1, 2, 1))
    np.testing.assert_array_equal(gates.convolutional_gate(x, kernel, jnp.asarray([200.0])), 1)
    np.testing.assert_array_equal(gates.convolutional_gate(x, kernel, jnp.asarray([-200.0])), 0)


def bottleneck(s, w1, w2, b1, b2):
    return np.maximum(s @ np.asarray(w1) + np.asarray(b1), 0) @ np.asarray(w2) + np.asarray(b2)


@pytest.mark.parametrize("shape", SHAPES)
def test_channel_gates_equal_their_formulas(shape):
    x, w1, w2, b1, b2 = normal(*shape), normal(6, 3), normal(3, 6), normal(3), normal(6)
    flat = as_places(x)
    biases = {"reduce_bias": b1, "expand_bias": b2}
    pooled = flat.mean(1), flat.max(1)
    squeezed = gates.squeeze_excitation_gate(x, w1, w2, **biases)
    assert squeezed.shape == (shape[0], *(1,) * (len(shape) - 2), 6)
    np.testing.assert_allclose(squeezed.reshape(-1, 6), sigmoid(bottleneck(pooled[0], w1, w2, b1, b2)), atol=1e-5)
    both = sum(bottleneck(p, w1, w2, b1, b2) for p in pooled)
    np.testing.assert_allclose(gates.channel_gate(x, w1, w2, **biases).reshape(-1, 6), sigmoid(both), atol=1e-5)
    plain = sum(bottleneck(p, w1, w2, 0, 0) for p in pooled)
    np.testing.assert_allclose(gates.channel_gate(x, w1, w2).reshape(-1, 6), sigmoid(plain), atol=1e-5)
    kernel = normal(3)
    expected = sigmoid(np.stack([np.convolve(m, np.asarray(kernel)[::-1], mode="same") for m in pooled[0]]))
    np.testing.assert_allclose(gates.efficient_channel_gate(x, kernel).reshape(-1, 6), expected, atol=1e-5)


def test_bottleneck_softmax_weighs_branches():
    s, w1, w2 = normal(4, 5), normal(5, 2), normal(2, 3)
    weights = gates.bottleneck_gate(s, w1, w2, normalizer="softmax")
    logits = np.exp(bottleneck(np.asarray(s), w1, w2, 0, 0))
    np.testing.assert_allclose(weights, logits / logits.sum(-1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(gates.bottleneck_gate(s, w1, jnp.zeros((2, 2)), normalizer="softmax"), 0.5)


@pytest.mark.parametrize("taps", [1, 5, 11])
def test_channel_convolution_sees_neighbouring_channels_of_its_place_only(taps):
    x, kernel = normal(2, 3, 6), normal(taps)
    got = gates.channel_convolution(x, kernel, 0.5)
    for b, p, c in np.ndindex(2, 3, 6):
        total = 0.5 + sum(
            float(kernel[t]) * float(x[b, p, c + t - taps // 2]) for t in range(taps) if 0 <= c + t - taps // 2 < 6
        )
        assert float(got[b, p, c]) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_spatial_gate_is_a_padded_convolution_of_mean_and_maximum(shape):
    x = normal(*shape)
    spatial = shape[1:-1]
    kernel, bias = normal(*(3,) * len(spatial), 2, 1), normal(1)
    got = gates.spatial_gate(x, kernel, bias)
    maps = np.stack([np.asarray(x, np.float64).mean(-1), np.asarray(x, np.float64).max(-1)], -1)
    padded = np.pad(maps, [(0, 0), *[(1, 1)] * len(spatial), (0, 0)])
    for place in np.ndindex(*spatial):
        window = padded[(slice(None), *(slice(p, p + 3) for p in place))]
        logits = np.sum(window * np.asarray(kernel)[..., 0], axis=tuple(range(1, len(shape)))) + float(bias[0])
        np.testing.assert_allclose(got[(slice(None), *place, 0)], sigmoid(logits), atol=1e-5)


def test_cbam_gates_channels_then_places_of_the_result():
    x, w1, w2, kernel = normal(2, 4, 5, 6), normal(6, 2), normal(2, 6), normal(3, 3, 2, 1)
    first = x * gates.channel_gate(x, w1, w2)
    chex.assert_trees_all_close(gates.cbam(x, w1, w2, kernel), first * gates.spatial_gate(first, kernel), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_simam_equals_its_energy_per_channel(shape):
    x = normal(*shape)
    flat = as_places(x)
    q = (flat - flat.mean(1, keepdims=True)) ** 2
    v = q.sum(1, keepdims=True) / max(flat.shape[1] - 1, 1)
    expected = sigmoid(q / (4 * (v + 1e-4)) + 0.5)
    np.testing.assert_allclose(as_places(gates.simam_gate(x)), expected, atol=1e-5)


def test_simam_has_the_numbers_of_torch():
    # x = torch.arange(6.).view(1, 1, 2, 3) ** 2; q = (x - x.mean([2, 3], keepdim=True)).pow(2)
    # torch.sigmoid(q / (4 * (q.sum([2, 3], keepdim=True) / 5 + 1e-4)) + 0.5)
    expected = [0.6728719, 0.6627499, 0.6388262, 0.6224765, 0.650883, 0.7613242]
    x = (jnp.arange(6.0) ** 2).reshape(1, 2, 3, 1)
    np.testing.assert_allclose(gates.simam_gate(x).reshape(-1), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_free_channel_gate_compares_channel_means(shape):
    x = normal(*shape)
    mean = as_places(x).mean(1)
    q = (mean - mean.mean(-1, keepdims=True)) ** 2
    v = q.sum(-1, keepdims=True) / 5
    energy = sigmoid((q + 2 * v + 2e-4) / (4 * (v + 1e-4)))
    np.testing.assert_allclose(gates.energy_channel_gate(x).reshape(-1, 6), energy, atol=1e-5)
    spread = mean.std(-1, ddof=1, keepdims=True) + 1e-4
    literal = sigmoid((q + 2 * spread) / 4 * spread)
    np.testing.assert_allclose(gates.energy_channel_gate(x, variant="literal").reshape(-1, 6), literal, atol=1e-5)


def test_equal_channels_and_constant_maps_have_the_neutral_gate():
    same = jnp.broadcast_to(normal(1, 3, 3, 1), (1, 3, 3, 4))
    half = float(sigmoid(0.5))
    np.testing.assert_allclose(gates.energy_channel_gate(same), half, rtol=1e-6)
    constant = jnp.broadcast_to(jnp.abs(normal(1, 1, 1, 4)), (1, 3, 3, 4))
    np.testing.assert_allclose(gates.simam_gate(constant), half, rtol=1e-6)
    np.testing.assert_allclose(gates.mean_map_gate(constant), 1, rtol=1e-5)
    np.testing.assert_allclose(gates.energy_channel_gate(normal(1, 2, 2, 1)), half, rtol=1e-6)


def test_mean_map_gate_is_one_on_average_and_blind_to_scale():
    x = jnp.abs(normal(2, 4, 5, 6))
    gate = gates.mean_map_gate(x)
    np.testing.assert_allclose(gate.mean((1, 2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(gates.mean_map_gate(7 * x), gate, rtol=1e-5)
    np.testing.assert_allclose(gates.mean_map_gate(x[..., ::-1]), gate, rtol=1e-5)
    literal = gates.mean_map_gate(x, normalize="sum")
    np.testing.assert_allclose(literal * 20, gate, rtol=1e-5)
    for normalize in ("mean", "sum"):
        np.testing.assert_array_equal(gates.mean_map_gate(jnp.zeros((1, 2, 2, 3)), normalize=normalize), 0)


def test_combined_attention_has_three_orders():
    x = jnp.abs(normal(2, 4, 5, 6))
    channel, spatial = (lambda z: z * gates.energy_channel_gate(z)), (lambda z: z * gates.mean_map_gate(z))
    chex.assert_trees_all_close(gates.pfcasa(x), spatial(channel(x)), rtol=1e-5)
    chex.assert_trees_all_close(gates.pfcasa(x, order="spatial_first"), channel(spatial(x)), rtol=1e-5)
    chex.assert_trees_all_close(gates.pfcasa(x, order="parallel"), (channel(x) + spatial(x)) / 2, rtol=1e-5)


def test_gated_pool_is_the_mean_over_open_places():
    x = normal(2, 3, 3, 3, 4)
    gate = jnp.zeros((2, 3, 3, 3, 1)).at[0, 1, 2, 0].set(1.0).at[0, 2, 2, 2].set(1.0)
    pooled = gates.gated_pool(x, gate)
    np.testing.assert_allclose(pooled[0], (x[0, 1, 2, 0] + x[0, 2, 2, 2]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(pooled[1], 0)
    np.testing.assert_allclose(gates.gated_pool(x, jnp.ones_like(gate)), x.mean((1, 2, 3)), atol=1e-6)


MAPS = {
    "glu": lambda x: gates.gated_linear_unit(x, x, activation="gelu"),
    "se": lambda x: gates.squeeze_excitation_gate(x, jnp.ones((4, 2)) / 4, jnp.ones((2, 4))),
    "eca": lambda x: gates.efficient_channel_gate(x, jnp.asarray([0.5, 1.0, -0.5])),
    "cbam": lambda x: gates.cbam(x, jnp.ones((4, 2)) / 4, jnp.ones((2, 4)), jnp.ones((3, 3, 2, 1)) / 9),
    "simam": gates.simam_gate,
    "pfca": gates.energy_channel_gate,
    "literal": lambda x: gates.energy_channel_gate(x, variant="literal"),
    "mean map": lambda x: gates.mean_map_gate(x + 4),
    "sum map": lambda x: gates.mean_map_gate(x + 4, normalize="sum"),
    "pool": lambda x: gates.gated_pool(x, jnp.square(x[..., :1])),
}


@pytest.mark.parametrize("name", MAPS)
def test_batched_jitted_and_differentiable(name):
    function, x = MAPS[name], normal(2, 1, 3, 3, 4)
    whole = jax.vmap(function)(x)
    chex.assert_trees_all_close(whole[1], function(x[1]), atol=1e-5)
    with jax.disable_jit():
        chex.assert_trees_all_close(function(x[0]), whole[0], atol=1e-5)
    check_grads(function, (x[0],), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    low = function(x[0].astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), whole[0], atol=5e-2, rtol=5e-2)
    flat = jax.grad(lambda x: function(x).sum().astype(jnp.float32))(jnp.zeros((1, 3, 3, 4)))
    assert np.all(np.isfinite(flat))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gates.gated_linear_unit(jnp.ones(2), jnp.ones(2), activation="swish"), "activation 'swish'"),
        (lambda: gates.bottleneck_gate(jnp.ones(2), *[jnp.ones((2, 2))] * 2, normalizer="max"), "normalizer 'max'"),
        (lambda: gates.channel_convolution(jnp.ones(4), jnp.ones(2)), "kernel of 2"),
        (lambda: gates.convolutional_gate(jnp.ones((1, 4, 4, 1)), jnp.ones((2, 3, 1, 1))), "kernel of shape"),
        (lambda: gates.energy_channel_gate(jnp.ones((1, 2, 3)), variant="x"), "variant 'x'"),
        (lambda: gates.mean_map_gate(jnp.ones((1, 2, 3)), normalize="x"), "normalize 'x'"),
        (lambda: gates.pfcasa(jnp.ones((1, 2, 3)), order="x"), "order 'x'"),
    ],
)
def test_impossible_requests_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_mean_max_maps_are_the_mean_and_the_largest_of_the_channels():
    x = np.random.default_rng(4).normal(size=(2, 3, 5, 4)).astype(np.float32)
    expected = np.stack([x.mean(-1), x.max(-1)], axis=-1)
    np.testing.assert_allclose(gates.mean_max_maps(jnp.asarray(x)), expected, rtol=1e-6)
