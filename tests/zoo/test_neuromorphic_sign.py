"""The card of the neuromorphic sign reader: its counts, its arcs, where it looks, what it learns, and the chip."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from trainers.data.events import draw_glyphs
from zoo.registry import variable_shapes
from zoo.tasks import classification
from zoo.vision.neuromorphic_sign import (
    Attention,
    Config,
    Hardware,
    arcs,
    focal_errors,
    hardware_counts,
    look,
    read_region,
    region_of,
)

KEY = jax.random.key(5)
PAPER = zoo.paper("neuromorphic_sign")
SMALL = Attention(height=60, width=76, region=40, magnify=1)
OFFICIAL = {"orientations_as_time": True, "stretch": True}


def waves(hidden, classes):
    """The card's weights, in the official layout."""
    return {
        name: scale * np.sin(rate * np.arange(np.prod(shape)) + 0.5).reshape(shape)
        for name, shape, scale, rate in (
            ("conv1.weight", (4, 1, 5, 5), 0.5, 0.71),
            ("fc1.weight", (hidden, 256), 0.35, 1.913),
            ("readout.weight", (classes, hidden), 0.6, 2.377),
        )
    }


def card_events(steps):
    t, b, d = np.ogrid[:steps, :2, :2304]
    return ((131 * t + 17 * b + 7919 * d) % 89 < 7).astype(np.float64)


def loop(weights, x):
    """Step by step and in float64: spikes of the three layers, each (T, B, N)."""
    decay, found = 0.92, []
    v = [0.0, 0.0, 0.0]
    for events in x:
        image, spikes = events.reshape(-1, 48, 48), []
        kernel = weights["conv1.weight"][:, 0]
        patches = np.stack([[image[:, 6 * r : 6 * r + 5, 6 * c : 6 * c + 5] for c in range(8)] for r in range(8)])
        below = np.einsum("rcbij,kij->bkrc", patches, kernel).reshape(len(image), -1)
        for layer, name in enumerate((None, "fc1.weight", "readout.weight")):
            current = below if name is None else below @ weights[name].T
            v[layer] = decay * v[layer] + current - (v[layer] > 1)
            below = (v[layer] > 1).astype(np.float64)
            spikes.append(below)
        found.append(spikes)
    return [np.stack(layer) for layer in zip(*found, strict=True)]


def test_spikes_are_the_cards_and_those_of_a_loop():  # Acceptance 1
    expected = (
        [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0],
        [2, 0, 0, 3, 1, 0, 2, 1, 0, 1, 1, 0, 0, 3, 0, 0, 2, 1, 0, 1, 1, 0, 0, 2],
    )
    weights, x = waves(512, 24), card_events(35)
    assert x.sum() == 12_683
    by_loop = loop(weights, x)
    assert [int(layer.sum()) for layer in by_loop] == [575, 604, 28]
    np.testing.assert_array_equal(by_loop[2].sum(0), expected)
    tensors = {name: np.float32(w) for name, w in weights.items()}
    for neuron in ("lif1", "lif_fc1", "lif_out"):
        tensors |= {f"{neuron}.beta": np.float32(0.92), f"{neuron}.threshold": np.float32(1)}
        tensors |= {f"{neuron}.graded_spikes_factor": np.float32(1), f"{neuron}.reset_mechanism_val": np.int64(0)}
    model, variables = zoo.from_official("neuromorphic_sign", {}, tensors)
    batch = {"x": jnp.asarray(np.swapaxes(x, 0, 1).reshape(2, 35, 48, 48), jnp.float32)}
    outputs, inside = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(variables, batch)
    np.testing.assert_array_equal(outputs["logits"], expected)
    for name, layer in zip(("conv_spikes", "fc_spikes"), by_loop, strict=False):
        found = inside["intermediates"][name][0]
        np.testing.assert_array_equal(np.swapaxes(found, 0, 1), layer)
    assert [int(layer.sum()) for layer in loop(waves(32, 8), card_events(12))] == [235, 18, 0]


def test_the_decay_is_the_checkpoints():
    model = zoo.create("neuromorphic_sign", decay=0.85)
    shapes = variable_shapes(PAPER, model)
    weights = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    tensors = zoo.to_official("neuromorphic_sign", model, weights)
    sizes = {"n_classes": 8, "fc_hidden": 64}
    again, _ = zoo.from_official("neuromorphic_sign", sizes, tensors)
    assert np.float32(again.config.decay) == np.float32(0.85)
    with pytest.raises(zoo.UserError, match=r"the neurons of a network share one beta, not \[0\.5, 0\.85"):
        zoo.from_official("neuromorphic_sign", sizes, tensors | {"lif1.beta": np.float32(0.5)})


def test_the_arcs_are_the_cards():  # Acceptance 3
    found = np.asarray(arcs(Attention(), jnp.arange(8) * jnp.pi / 4), np.float64)
    np.testing.assert_allclose(found.max((1, 2)), [176_894.03, 185_102.92] * 4, rtol=1e-5)
    places = [tuple(map(int, np.unravel_index(f.argmax(), f.shape))) for f in found]
    assert places == [(6, 7), (6, 7), (6, 6), (6, 6), (6, 6), (7, 6), (7, 6), (7, 7)]
    minima = [333.49, 103.40, 1002.46, 213.09, 1002.46, 103.40, 333.49, 55.95]
    np.testing.assert_allclose(found.min((1, 2)), minima, rtol=1e-4)
    turned = np.corrcoef(np.rot90(found[0]).ravel(), found[2].ravel())[0, 1]
    assert turned == pytest.approx(0.85, abs=0.005)


def blob(row, column, config=SMALL):
    window = np.zeros((1, config.height, config.width), np.float32)
    window[0, row - 3 : row + 4, column - 3 : column + 4] = 1
    return jnp.asarray(window)


@pytest.mark.parametrize("official", [False, True])
def test_spikes_count_what_one_filter_sums(official):  # Acceptance 4
    config = replace(SMALL, **(OFFICIAL if official else {}))
    window = blob(25, 30)
    spikes, filtered = look(window, config=config), look(window, config=replace(config, spiking=False))
    np.testing.assert_allclose(spikes.saliency, filtered.saliency, atol=255e-6)
    chex.assert_trees_all_equal(spikes.peak, filtered.peak)
    assert filtered.membrane is None
    weak = replace(config, gain=1e-5)  # where single spikes count
    assert np.abs(look(window, config=weak).saliency - filtered.saliency).max() > 1


def test_windows_that_are_alike_differ_by_what_the_membranes_keep():  # Acceptance 4
    config, window = replace(SMALL, gain=1e-5), blob(25, 30)
    first = look(window, config=config)
    second = look(window, config=config, membrane=first.membrane)
    assert np.abs(second.saliency - first.saliency).max() > 1
    chex.assert_trees_all_equal(look(window, config=config, membrane=jnp.zeros_like(first.membrane)), first)


def test_the_peak_is_on_the_blob_and_moves_with_it():  # Acceptance 4
    config = replace(SMALL, spiking=False)
    places = [(30, 38), (30, 30), (24, 45)]
    peaks = [np.asarray(look(blob(*place), config=config).peak[0]) for place in places]
    for place, peak in zip(places, peaks, strict=True):
        assert np.abs(peak - place).max() <= 2
    moved = np.diff(peaks, axis=0)
    assert np.abs(moved - np.diff(places, axis=0)).max() <= 1
    assert look(jnp.zeros((1, 60, 76)), config=config).saliency.max() == 0
    with pytest.raises(ValueError, match="a frame of 10 x 76 is smaller than the filters of 13"):
        look(jnp.zeros((1, 10, 76)), config=config)


def test_the_official_map_points_too_far_out():
    full = Attention(spiking=False)
    stretched = jax.jit(functools.partial(look, config=replace(full, stretch=True)))
    for place, expected in {(115, 220): (110, 225), (60, 75): (47, 61), (200, 275): (212, 283)}.items():
        peak = stretched(blob(*place, full)).peak[0]
        assert np.abs(np.asarray(peak) - expected).max() <= 3


def test_a_region_is_read_event_by_event():
    rng = np.random.default_rng(0)
    x = (rng.random((3, 4, 60, 76)) < 0.05).astype(np.float32)
    peaks = np.array([[30, 38], [2, 70], [59, 0]])  # within, and over two corners
    expected = np.zeros((3, 4, 12, 10))
    for b, (row, column) in enumerate(peaks):
        low = max(row - 20, 0), max(column - 20, 0)
        size = min(row + 20, 60) - low[0], min(column + 20, 76) - low[1]
        for t, r, c in np.argwhere(x[b]):
            place = r - low[0], c - low[1]
            if 0 <= place[0] < size[0] and 0 <= place[1] < size[1]:
                expected[b, t, place[0] * 12 // size[0], place[1] * 10 // size[1]] = 1
    found = read_region(jnp.asarray(x), jnp.asarray(peaks), region=40, height=12, width=10)
    np.testing.assert_array_equal(found, expected)


def test_attention_holds_what_it_looks_for():  # Acceptance 5
    camera = Attention(spiking=False)
    rng = np.random.Generator(np.random.PCG64(3))
    events, _ = draw_glyphs(
        rng, 24, num_classes=8, steps=12, height=camera.height, width=camera.width, size=21, anywhere=True
    )
    windows = np.zeros((len(events), camera.height, camera.width), np.float32)
    for window, recording in zip(windows, events, strict=True):
        window[recording[:, 1], recording[:, 2]] = 1
    peaks = np.asarray(look(jnp.asarray(windows), config=camera).peak)

    def held(peaks, region):
        """Share of recordings of whose glyph's events the region holds nine in ten."""
        shares = [
            np.mean(np.all(np.abs(recording[recording[:, 3] == 1][:, 1:3] - peak) < region // 2, axis=1))
            for recording, peak in zip(events, peaks, strict=True)
        ]
        return np.mean(np.array(shares) >= 0.9)

    assert held(peaks, camera.region) >= 0.95
    middle = np.broadcast_to([camera.height // 2, camera.width // 2], peaks.shape)
    assert held(middle, 120) < 0.5
    assert held(peaks, 120) > 0.8  # nor is that because of the region's size


def test_the_loss_is_its_formula():
    counts = np.array([[3.0, 0.0, 1.0], [0.0, 9.0, 0.0]])
    label, share = np.array([2, 1]), np.array([0.5, 0.25, 0.25])
    for double in (False, True):
        p = np.exp(counts) / np.exp(counts).sum(1, keepdims=True)
        q = np.exp(p) / np.exp(p).sum(1, keepdims=True) if double else p
        total = 0.0
        for i, k in enumerate(label):
            y = 0.9 * np.eye(3)[k] + 0.1 / 3
            hard = 2 if q[i, k] < 0.65 else 1
            total += hard / (3 * share[k]) * -np.sum(y * (1 - q[i]) ** 2 * np.log(q[i])) / 2
        errors = focal_errors(jnp.asarray(counts, jnp.float32), Config(double_softmax=double))
        batch = {"label": jnp.asarray(label), "prior": jnp.log(jnp.broadcast_to(jnp.asarray(share), (2, 3)))}
        assert PAPER.compute_loss({"errors": errors}, batch)[0] == pytest.approx(total, rel=1e-5)
    # Certain or not: a second softmax leaves no class more than e / (e + K - 1), and all are hard.
    certain = focal_errors(jnp.array([[50.0] + [0.0] * 23]), Config(double_softmax=True, label_smoothing=0.0))
    assert certain[0, 0] == pytest.approx(-2 * (1 - np.e / (np.e + 23)) ** 2 * np.log(np.e / (np.e + 23)), rel=1e-4)
    assert focal_errors(jnp.array([[50.0] + [0.0] * 23]), Config(label_smoothing=0.0))[0, 0] == pytest.approx(0)
    steep = jax.grad(lambda x: jnp.sum(focal_errors(x, Config())))(jnp.array([[200.0, 0.0, 0.0]]))
    assert np.isfinite(steep).all()


def pictures(rng, count, steps):
    size = {"num_classes": 8, "height": 48, "width": 48, "size": 21, "anywhere": False}
    found, label = draw_glyphs(rng, count, steps=steps, **size)
    x = np.zeros((count, steps, 48, 48), np.float32)
    for picture, recording in zip(x, found, strict=True):
        picture[tuple(recording[:, :3].T)] = 1
    return jnp.asarray(x), jnp.asarray(label)


@pytest.fixture(scope="module")
def learned():
    """(tiny, its variables after five epochs, a generator of recordings)."""
    rng, size = np.random.Generator(np.random.PCG64(0)), 16
    x, label = pictures(rng, 1_600, 12)
    model = zoo.create("neuromorphic_sign")
    optimizer = optax.adamw(optax.cosine_decay_schedule(6e-3, 5 * 100), weight_decay=1e-4)
    prior = jnp.full((size, 8), -jnp.log(8.0))

    @jax.jit
    def trained(params, order):
        def loss(params, rows):
            outputs = model.apply({"params": params}, {"x": x[rows]}, train=True)
            return PAPER.compute_loss(outputs, {"label": label[rows], "prior": prior})[0]

        def step(i, carry):
            params, state = carry
            gradients = jax.grad(loss)(params, jax.lax.dynamic_slice_in_dim(order, size * i, size))
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, len(order) // size, step, (params, optimizer.init(params)))[0]

    order = jnp.asarray(np.concatenate([rng.permutation(1_600) for _ in range(5)]))
    params = jax.jit(model.init)(KEY, {"x": x[:1]})["params"]
    return model, {"params": trained(params, order)}, rng


def test_it_learns_in_five_epochs(learned):  # Acceptance 6
    model, variables, rng = learned
    x, label = pictures(rng, 400, 12)
    right = classification.metrics(jax.jit(model.apply)(variables, {"x": x}), {"label": label})["accuracy"]
    assert right.mean() >= 0.95, right.mean()


def test_the_chip_mostly_agrees(learned):  # Acceptance 7
    model, variables, rng = learned
    x, _ = pictures(rng, 100, 35)  # its synapses are slow: in twelve steps no letter fires
    counts = jax.jit(model.apply)(variables, {"x": x})["logits"]
    chip = hardware_counts(variables, x, config=model.config)
    agree = np.mean(np.argmax(chip, -1) == np.argmax(counts, -1))
    assert agree >= 0.8, agree
    # Without the letters' hold on each other more of them fire; without weights none does.
    free = hardware_counts(variables, x, config=model.config, hardware=Hardware(lateral=0.0))
    assert free.sum() > chip.sum() > 0
    silent = hardware_counts(variables, x, config=model.config, hardware=Hardware(smallest=(9.0, 9.0, 9.0)))
    assert silent.sum() == 0


def test_with_attention_the_network_reads_the_region():
    config = PAPER.config("tiny_attended", hidden=16, attention=replace(SMALL, spiking=False))
    model, region = PAPER.model(config), PAPER.model(replace(config, attend=False))
    batch = PAPER.example(config, batch_size=2, key=KEY)
    assert batch["x"].shape == (2, 12, 60, 76)
    variables = region.init(KEY, {"x": jnp.zeros((1, 12, 48, 48))})
    variables = jax.tree.map(lambda w: 3 * w, variables)
    read = region_of(batch["x"], config)
    outputs = model.apply(variables, batch)
    chex.assert_trees_all_equal(outputs, region.apply(variables, {"x": read}))
    assert outputs["logits"].sum() > 0
