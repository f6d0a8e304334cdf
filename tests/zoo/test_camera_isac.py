"""The card of CC-ISAC: what its two networks, its fusion and its faults imply, and that they find the target."""

import dataclasses
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.parity.harness import load_case
from tests.weights import drawn
from trainers.data.beam_tracking import load_beam_tracking
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.signals.camera_isac import (
    EncoderLayer,
    Tracker,
    VisionAngles,
    disturb_echo,
    fuse,
)
from zoo.tasks import beam_tracking

KEY = jax.random.key(3)
PAPER = zoo.paper("camera_isac")
GOLDENS = Path(__file__).parents[1] / "parity" / "goldens" / "camera_isac"


def vision(attention):
    config = PAPER.config("tiny", attention=attention)
    batch = PAPER.example(config, batch_size=2, key=KEY)
    arguments = batch["image"][:, 0], batch["box"][:, 0]
    model = VisionAngles(config)
    variables = jax.jit(partial(model.init, train=False))(KEY, *arguments)
    return model, variables, arguments


@pytest.fixture(scope="module")
def tracker():
    config = PAPER.config("tiny")
    model = Tracker(config)
    camera, echo = jax.random.uniform(KEY, (4, 7, 2)), jax.random.uniform(jax.random.key(1), (4, 7, 3))
    apply = jax.jit(partial(model.apply, train=False))
    return apply, model.init(KEY, camera, echo, train=False), camera, echo


def query_and_key(tree):
    return [tree[f"{sense}_attention"][name] for sense in ("image", "box") for name in ("query", "key")]


def test_with_one_key_queries_and_keys_have_no_effect():
    model, variables, arguments = vision("degenerate")

    def total(params):
        angles, captured = model.apply(
            {**variables, "params": params}, *arguments, train=False, mutable=["intermediates"]
        )
        return jnp.sum(angles), captured["intermediates"]["image_attention"]["weights"][0]

    (_, weights), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])
    chex.assert_trees_all_equal(weights, jnp.ones((2, 1, 1, 1)))
    assert not np.any(jax.tree.leaves(jax.tree.map(np.any, query_and_key(gradients))))
    assert np.any(gradients["box_attention"]["value"]["kernel"])


def test_cross_attention_reads_49_places_of_the_image_and_four_numbers_of_the_box():
    model, variables, arguments = vision("cross")

    def total(params):
        angles, captured = model.apply(
            {**variables, "params": params}, *arguments, train=False, mutable=["intermediates"]
        )
        return jnp.sum(angles), captured["intermediates"]

    (_, captured), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])
    for sense, keys in (("image", 49), ("box", 4)):
        weights = captured[f"{sense}_attention"]["weights"][0]
        chex.assert_shape(weights, (2, 1, 1, keys))
        chex.assert_trees_all_close(jnp.sum(weights, axis=-1), jnp.ones((2, 1, 1)), rtol=1e-5)
    # A bias of the keys shifts all scores of a query alike.
    assert all(np.any(part["kernel"]) for part in query_and_key(gradients))


@pytest.mark.parametrize("size", [(62, 77), (77, 64)])
def test_other_images_end_at_one_place_too(size):
    config = PAPER.config("tiny", image_size=size)
    batch = jax.eval_shape(partial(PAPER.example, config, batch_size=2), key=KEY)
    outputs, _ = jax.eval_shape(zoo.create("camera_isac", image_size=size).init_with_output, KEY, batch)
    assert outputs["camera"].shape == (2, 7, 2)


def test_the_fusion_is_a_mean_whose_weights_have_no_scale():
    camera, echo, weights = (jax.random.normal(k, s) for k, s in zip(
        jax.random.split(KEY, 3), ((50,), (50,), (50, 2)), strict=True))  # fmt: skip
    weights = jnp.where(jnp.abs(jnp.sum(weights, -1, keepdims=True)) < 0.1, 1.0, weights)
    chex.assert_trees_all_close(fuse(camera, camera, weights, epsilon=1e-8), camera, rtol=1e-4, atol=1e-5)
    fused = fuse(camera, echo, weights, epsilon=0.0)
    chex.assert_trees_all_close(fuse(camera, echo, -7.0 * weights, epsilon=0.0), fused, rtol=1e-4, atol=1e-5)


def test_the_last_echo_has_no_effect_and_the_last_camera_estimate_has(tracker):
    apply, variables, camera, echo = tracker
    before = apply(variables, camera, echo)
    chex.assert_trees_all_equal(apply(variables, camera, echo.at[:, -1].set(jnp.nan)), before)
    assert np.all(apply(variables, camera.at[:, -1].add(0.5), echo) != before)
    assert np.all(apply(variables, camera, echo.at[:, -2].add(0.5)) != before)


def test_windows_longer_than_the_table_of_positions_are_refused():
    with pytest.raises(ValueError, match="lookback 102 is beyond the 100 positions"):
        jax.eval_shape(
            partial(Tracker(PAPER.config("tiny")).init, train=False),
            KEY,
            jnp.zeros((1, 102, 2)),
            jnp.zeros((1, 102, 3)),
        )


def test_normalised_quantities_are_shares_of_the_ranges():
    place = jnp.array([[110.0, 10.0, 100.0], [150.0, 80.0, 300.0], [120.0, 45.0, 250.0]])
    shares = beam_tracking.normalize(place)
    chex.assert_trees_all_close(shares[:2], jnp.array([[0.0] * 3, [1.0] * 3]))
    chex.assert_trees_all_close(beam_tracking.denormalize(shares), place, rtol=1e-6)


def test_estimates_stay_inside_the_ranges(tracker):
    apply, variables, camera, echo = tracker
    huge = jax.tree.map(lambda x: 3.0 * x, variables)
    for sign in (-1, 1):
        found = apply(huge, 10 * camera, sign * 10 * echo)
        assert np.all((found >= 0) & (found <= 1))
    model, variables, (image, box) = vision("cross")
    angles = model.apply(variables, 1e3 * image, 1e3 * box, train=False)
    degrees = beam_tracking.denormalize(angles)
    assert np.all((degrees >= jnp.array([110.0, 10.0])) & (degrees <= jnp.array([150.0, 80.0])))


def test_the_encoder_layer_is_torchs():
    case = load_case(GOLDENS / "open_b.npz")
    hparams, params = case.meta["hparams"], case.group("param")
    model, variables = zoo.from_official("camera_isac", hparams, params, module=case.meta["module"])
    tracker = variables["params"]["tracker"]
    x = case.arrays["aux/hist_linear_out"]
    layer = EncoderLayer(model.config)
    out = layer.apply({"params": tracker["layers_0"]}, x + tracker["positions"][: x.shape[1]], train=False)
    chex.assert_trees_all_close(out, case.arrays["aux/encoder_out"], atol=1e-5)


def test_faults_are_what_they_are_called():
    echo, camera = jax.random.uniform(KEY, (6, 3)), jax.random.uniform(jax.random.key(1), (6, 2))
    changed = {fault: disturb_echo(echo, camera, fault, KEY) for fault in PAPER.configs["robust"].echo_faults}
    chex.assert_trees_all_equal(changed["all_camera"], echo.at[:, :2].set(camera))
    chex.assert_trees_all_equal(changed["all_stale"], echo.at[:, :2].set(echo[0, :2]))
    for fault, source in (("camera", camera), ("stale", jnp.broadcast_to(echo[0, :2], (6, 2)))):
        rows = np.flatnonzero(np.any(changed[fault] != echo, axis=-1))
        assert len(rows) <= 1
        chex.assert_trees_all_equal(changed[fault][rows, :2], source[rows])
    later, earlier = np.append(np.diff(echo, axis=0), [[0] * 3], 0), -np.insert(np.diff(echo, axis=0), 0, 0, 0)
    for fault, way, most in (("ahead", later, 0.5), ("delay", earlier, 0.25)):
        share = np.divide(changed[fault] - echo, way, where=way != 0, out=np.zeros((6, 3)))
        assert 0 <= share.min() <= share.max() <= most + 1e-5
        assert share.max() > 0.5 * most
    assert np.all(np.abs(changed["both"] - echo) <= 0.5 * np.maximum(np.abs(later), np.abs(earlier)) + 1e-6)


def test_faults_are_done_while_training_only():
    model = zoo.create("camera_isac", echo_faults=("noise",), echo_fault_rate=1.0, dropout_rate=0.0)
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    variables = drawn(PAPER, model)
    run = jax.jit(
        lambda key, train: model.apply(variables, batch, train=train, rngs={"dropout": key}, mutable=["batch_stats"])[
            0
        ],
        static_argnums=1,
    )
    first, second = (run(jax.random.key(i), True) for i in (1, 2))
    chex.assert_trees_all_equal(first["camera"], second["camera"])
    assert np.all(first["now"] != second["now"])


def test_frozen_vision_neither_learns_nor_moves_its_statistics():
    model = zoo.create("camera_isac", frozen_vision=True, quantities=("azimuth",))
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    variables = drawn(PAPER, model)

    def loss(params):
        state = {**variables, "params": params}
        outputs, changed = model.apply(state, batch, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
        return PAPER.compute_loss(outputs, batch)[0], changed

    gradients, changed = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    chex.assert_trees_all_equal(changed["batch_stats"], variables["batch_stats"])
    assert not any(np.any(g) for g in jax.tree.leaves(gradients["vision"]))
    assert np.any(gradients["azimuth"]["out_2"]["kernel"])


def test_tracks_better_than_the_last_echo_and_without_any():
    """Trackers alone, on what a camera sees that is right within a degree; half of the echoes say nothing."""
    data = load_beam_tracking("standin", data_dir=None, lookback=7, image_size=(1, 1))
    model = Tracker(PAPER.config("tiny", dropout_rate=0.0))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))

    def windows(split, rows, key):
        batch, keys = split.batch(rows), jax.random.split(key)
        seen = batch["y"][..., :2] + jax.random.normal(keys[0], (len(rows), 7, 2)) / beam_tracking.SPAN[:2]
        return batch | {"camera": seen, "noise": jax.random.uniform(keys[1], batch["echo"].shape)}

    def predict(params, camera, echo):
        return jnp.stack([model.apply(one, camera, echo, train=False) for one in params], axis=-1)

    def step(carry, key):
        params, state = carry
        which, how, deaf = jax.random.split(key, 3)
        batch = windows(data.train, jax.random.randint(which, (64,), 0, len(data.train)), how)
        echo = jnp.where(jax.random.bernoulli(deaf, 0.5, (64, 1, 1)), batch["noise"], batch["echo"])

        def loss(params):
            return beam_tracking.loss({"now": predict(params, batch["camera"], echo)}, batch)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def scores(key):
        batch = windows(data.test, jnp.arange(len(data.test)), key)
        params = [model.init(k, batch["camera"][:1], batch["echo"][:1], train=False) for k in jax.random.split(key)]
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, STEPS))
        guesses = {
            "fused": predict(params, batch["camera"], batch["echo"]),
            "deaf": predict(params, batch["camera"], batch["noise"]),
            "camera": batch["camera"][:, -1],
            "echo": beam_tracking.echo_hold(batch)["now"],
        }
        return {n: jnp.mean(beam_tracking.metrics({"now": g}, batch)["mse"]) ** 0.5 for n, g in guesses.items()}

    found = {name: float(value) for name, value in scores(KEY).items()}
    assert found["fused"] < 0.8 * found["echo"], found
    assert found["deaf"] < 1.5 * found["camera"], found


STEPS = 500


def test_learns_to_see():
    """A few steps of the recipe against the best constant guess."""
    recipe = dataclasses.replace(recipe_for("camera_isac"), mesh="data=1", batch_size=16, log_every=150)
    prepared = prepare(recipe)
    train, order = prepared.splits.train, epoch_order(0, 0, len(prepared.splits.train))
    state, _ = prepared.program.run(prepared.program.init(), train, order, 0, 150)
    scores = prepared.program.evaluate(state.variables, prepared.splits.test)
    degrees = beam_tracking.denormalize(train.truth)[:, :2]
    constant = float(jnp.mean(jnp.square(beam_tracking.denormalize(prepared.splits.test.truth)[:, :2]
                                         - jnp.mean(degrees, axis=0))))  # fmt: skip
    assert float(scores["camera_mse"]) < 0.5 * constant
    assert float(scores["mse"]) < 0.5 * constant
