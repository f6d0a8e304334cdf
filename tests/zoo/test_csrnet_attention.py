"""The card of CSRNet with attention: what each gate looks at, that most have no weights, that the network counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layers
import zoo
from trainers.data.crowds import cell_density, draw_crowds
from zoo.registry import variable_shapes
from zoo.tasks import density_regression
from zoo.vision.csrnet_attention import Config, Gate, with_vgg_front

KEY = jax.random.key(3)
PAPER = zoo.paper("csrnet_attention")
FREE = ("simam", "pfca", "sa", "pfcasa")
FEATURES = jax.nn.relu(jax.random.normal(KEY, (2, 5, 6, 32)) + 0.5) + 0.1


def gated(x, **options):
    gate = Gate(Config(**options))
    return gate.apply(gate.init(KEY, x, train=False), x, train=False)


def gate_of(x, attention, **options):
    return np.asarray(gated(x, attention=attention, **options) / x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sizes(config="csrnet", **options):
    shapes = variable_shapes(PAPER, zoo.create("csrnet_attention", config, height=32, width=32, **options))
    return {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"])}


def test_attention_without_weights_has_none_and_the_others_stay_within_a_hundredth():  # Acceptance 1
    plain = sizes()
    total = sum(map(np.prod, plain.values()))
    assert total == 16_263_489
    for attention in FREE:
        assert sizes(attention=attention) == plain
    for attention, extra in {"se": 32_768, "eca": 5, "cbam": 33_410, "coordinate": 25_648}.items():
        assert sum(map(np.prod, sizes(attention=attention).values())) - total == extra <= total / 100


@pytest.mark.parametrize("place", ["front", "back", "both", "every_block"])
def test_attention_stands_where_it_is_said_to(place):
    model = zoo.create("csrnet_attention", attention="se", attention_at=place, height=32, width=32, reduction=4)
    names = {name for name in variable_shapes(PAPER, model)["params"] if name.startswith("attention")}
    ends, blocks = {"attention_front", "attention_back"}, {f"attention_block_{i}" for i in (2, 5, 8)}
    expected = {"front": {"attention_front"}, "back": {"attention_back"}, "both": ends, "every_block": ends | blocks}
    assert names == expected[place]


def test_channels_are_weighed_by_their_means_alone():  # Acceptance 3 and 4
    x = FEATURES
    shuffled = jax.random.permutation(KEY, x.reshape(2, 30, 32), axis=1).reshape(x.shape)
    np.testing.assert_allclose(gate_of(x, "pfca")[:, 0, 0], gate_of(shuffled, "pfca")[:, 0, 0], rtol=1e-5)
    even = x / jnp.mean(x, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(gate_of(even, "pfca"), sigmoid(0.5), rtol=1e-3)
    mean = np.asarray(x, np.float64).mean((1, 2))
    deviation = (mean - mean.mean(1, keepdims=True)) ** 2
    variance = deviation.sum(1, keepdims=True) / 31
    expected = sigmoid((deviation + 2 * variance + 2e-4) / (4 * (variance + 1e-4)))
    np.testing.assert_allclose(gate_of(x, "pfca")[:, 0, 0], expected, rtol=1e-5)
    spread = np.sqrt(variance) + 1e-4
    literal = sigmoid((deviation + 2 * spread) / 4 * spread)
    np.testing.assert_allclose(gate_of(x, "pfca", channel_variant="literal")[:, 0, 0], literal, rtol=1e-5)
    assert (gate_of(x, "pfca") >= 0.622).all()


def test_places_are_weighed_by_their_brightness_alone():  # Acceptance 3, 4 and 5
    x = FEATURES
    gate = gate_of(x, "sa")
    np.testing.assert_allclose(gate, gate_of(x[..., ::-1], "sa"), rtol=1e-5)
    np.testing.assert_allclose(gate[..., 0].mean((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(gate, gate_of(7 * x, "sa"), rtol=1e-4)
    even = jnp.broadcast_to(x[:, :1, :1], x.shape)
    np.testing.assert_allclose(gate_of(even, "sa"), 1, rtol=1e-5)
    total = np.asarray(x, np.float64).mean(-1)
    expected = total / total.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(gate_of(x, "sa", spatial_normalize="sum")[..., 0], expected, rtol=1e-4)


def test_simam_weighs_each_channel_by_itself():  # Acceptance 3 and 4
    x = FEATURES
    changed = x.at[..., 1:].multiply(3.0)
    np.testing.assert_allclose(gate_of(x, "simam")[..., 0], gate_of(changed, "simam")[..., 0], rtol=1e-5)
    even = jnp.broadcast_to(x[:, :1, :1], x.shape)
    np.testing.assert_allclose(gate_of(even, "simam"), sigmoid(0.5), rtol=1e-4)
    deviation = (np.asarray(x, np.float64) - np.asarray(x, np.float64).mean((1, 2), keepdims=True)) ** 2
    energy = deviation / (4 * (deviation.sum((1, 2), keepdims=True) / 29 + 1e-4)) + 0.5
    np.testing.assert_allclose(gate_of(x, "simam"), sigmoid(energy), rtol=1e-5)


def test_pfcasa_is_both_in_the_chosen_order():
    first, second = (lambda x: gated(x, attention="pfca")), (lambda x: gated(x, attention="sa"))
    orders = {
        "channel_first": second(first(FEATURES)),
        "spatial_first": first(second(FEATURES)),
        "parallel": (first(FEATURES) + second(FEATURES)) / 2,
    }
    for order, expected in orders.items():
        chex.assert_trees_all_close(gated(FEATURES, attention="pfcasa", order=order), expected, rtol=1e-5)
    assert not np.allclose(orders["channel_first"], orders["spatial_first"], rtol=1e-3)


@pytest.mark.parametrize("attention", ["se", "cbam", "eca"])
def test_learned_gates_are_those_of_the_layers(attention):
    gate = Gate(Config(attention=attention))
    variables = gate.init(KEY, FEATURES, train=False)
    found, p = gate.apply(variables, FEATURES, train=False), variables["params"]
    expected = {
        "se": lambda: FEATURES * layers.squeeze_excitation_gate(FEATURES, p["reduce"], p["expand"]),
        "eca": lambda: FEATURES * layers.efficient_channel_gate(FEATURES, p["taps"]),
        "cbam": lambda: layers.cbam(
            FEATURES, p["reduce"], p["expand"], p["kernel"], reduce_bias=p["reduce_bias"], expand_bias=p["expand_bias"]
        ),
    }[attention]()
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_coordinate_gate_is_a_product_of_one_for_rows_and_one_for_columns():
    gate = np.asarray(gate_of(FEATURES, "coordinate"), np.float64)
    np.testing.assert_allclose(gate * gate[:, :1, :1], gate[:, :, :1] * gate[:, :1], rtol=1e-4)
    assert gate.std(axis=1).min() > 0
    assert gate.std(axis=2).min() > 0
    order = jnp.array([0, 1, 2, 3, 5, 4])  # columns change places, and so do their gates
    np.testing.assert_allclose(gate_of(FEATURES[:, :, order], "coordinate"), gate[:, :, order], rtol=1e-5)


def test_sides_that_are_no_multiples_of_eight_are_cut():
    model = zoo.create("csrnet_attention", "tiny", front=(4, 0, 4, 0, 4, 0, 4), back=(4,))
    x = jax.random.normal(KEY, (1, 27, 33, 3))
    assert jax.eval_shape(lambda: model.init_with_output(KEY, {"x": x})[0]).shape == (1, 3, 4, 1)


def test_the_front_end_starts_from_vgg():
    model = zoo.create("csrnet_attention", "tiny", height=32, width=32)
    shapes = variable_shapes(PAPER, model)
    variables = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    rng = np.random.default_rng(0)
    places = dict(zip((0, 2, 5, 7, 10, 12, 15), (8, 8, 16, 16, 32, 32, 64), strict=True))  # numbers of torch's layers
    vgg, below = {"classifier.0.weight": np.zeros((2, 2))}, 3
    for place, channels in places.items():
        vgg[f"features.{place}.weight"] = rng.normal(size=(channels, below, 3, 3)).astype(np.float32)
        vgg[f"features.{place}.bias"] = rng.normal(size=channels).astype(np.float32)
        below = channels
    found = with_vgg_front(model.config, variables, vgg)
    chex.assert_trees_all_equal_shapes(found, variables)
    official = zoo.to_official("csrnet_attention", model, found)
    for place in places:
        np.testing.assert_array_equal(official[f"frontend.{place}.weight"], vgg[f"features.{place}.weight"])
    assert not np.any(official["backend.0.weight"])
    assert not np.any(variables["params"]["front_0"]["kernel"])


def test_learns_to_count():  # Acceptance 7
    model = zoo.create("csrnet_attention", "tiny", front=(8, 0, 16, 0, 16, 0, 32), back=(16,))
    images, points, there = draw_crowds(np.random.Generator(np.random.PCG64(0)), 160, height=48, width=48)
    target = cell_density(points, there, height=48, width=48, sigma=3.0)
    batch = {"x": jnp.asarray(images), "density": target, "count": jnp.asarray(there.sum(1), jnp.float32)}
    optimizer = optax.adam(optax.cosine_decay_schedule(8e-3, 120))

    def loss(params, part):
        return density_regression.loss(model.apply({"params": params}, part, train=True), part)[0]

    @jax.jit  # a step at a time: XLA's convolutions are slow inside a loop on CPUs
    def step(params, state, part):
        updates, state = optimizer.update(jax.grad(loss)(params, part), state)
        return optax.apply_updates(params, updates), state

    params = model.init(KEY, {"x": batch["x"][:1]})["params"]
    state = optimizer.init(params)
    for i in range(120):
        rows = slice(16 * (i % 8), 16 * (i % 8) + 16)
        params, state = step(params, state, jax.tree.map(lambda a, rows=rows: a[rows], batch))
    rest = jax.tree.map(lambda a: a[128:], batch)
    errors = density_regression.metrics(model.apply({"params": params}, rest), rest)["mae"]
    spread = np.abs(there[128:].sum(1) - there[:128].sum(1).mean())
    assert np.mean(errors) < 0.5 * np.mean(spread)
