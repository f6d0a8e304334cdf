"""GenHAR's card: what the paper's mechanism implies."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.weights import drawn
from trainers.data.signal_standins import imu_standin
from zoo.blocks.learners import fit
from zoo.registry import variable_shapes
from zoo.signals.genhar import low_passed_amplitude, selective_mask, turned
from zoo.tasks import classification

KEY = jax.random.key(5)
PAPER = zoo.paper("genhar")


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("genhar", length=32, d_model=16, num_layers=2)
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    variables = drawn(PAPER, model)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(KEY, len(leaves))
    params = tree.unflatten([v + 0.2 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])
    return model, batch, variables | {"params": params}, jax.jit(model.apply)


def test_shifts_in_time_and_constants_change_nothing(setting):  # Acceptance 1
    _, batch, variables, apply = setting
    shifted = jnp.roll(batch["x"], 7, axis=1) + jnp.arange(6.0)
    logits = apply(variables, batch)
    chex.assert_trees_all_close(apply(variables, batch | {"x": shifted}), logits, atol=1e-4)
    reversed_ = apply(variables, batch | {"x": batch["x"] * jnp.linspace(0, 2, 32)[:, None]})
    assert not np.allclose(reversed_, logits, atol=1e-2)


def test_what_lies_above_the_cut_off_has_no_effect(setting):  # Acceptance 2
    _, batch, variables, apply = setting
    time = jnp.arange(32) / 32
    slow = batch | {"x": 0.01 * batch["x"] + jnp.sin(2 * jnp.pi * 3 * time)[:, None]}
    # Bin 3 is number 2 of 16: numbers up to 2 + trunc(14 / 4) = 5 stay, which is bin 6.
    inside, beyond = (slow | {"x": slow["x"] + 0.5 * jnp.sin(2 * jnp.pi * f * time)[:, None]} for f in (6, 7))
    logits = apply(variables, slow)
    chex.assert_trees_all_close(apply(variables, beyond), logits, atol=1e-4)
    assert not np.allclose(apply(variables, inside), logits, atol=1e-2)


def test_the_cut_off_equals_the_loop_of_its_definition():
    x = np.asarray(jax.random.normal(KEY, (3, 6, 35)))
    amplitude = np.abs(np.fft.rfft(x))[..., 1:]
    for quarters in (1, 2):
        expected = amplitude.copy()
        for row in expected.reshape(-1, 17):
            strongest = row.argmax()
            row[strongest + int(quarters * (17 - strongest) / 4) + 1 :] = 0
        np.testing.assert_allclose(low_passed_amplitude(jnp.asarray(x), fraction=quarters / 4), expected, atol=1e-4)


def test_silence_has_a_zero_gradient():
    x = jnp.zeros((1, 6, 8)).at[0, 0].set(1.0)
    gradient = jax.grad(lambda x: jnp.sum(low_passed_amplitude(x, fraction=0.25)))(x)
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(x))


def test_axes_of_different_sensors_do_not_see_each_other(setting):  # Acceptance 3
    model, batch, variables, _ = setting
    blocked = {(0, 4), (0, 5), (1, 3), (1, 5), (2, 3), (2, 4)}
    blocked |= {(j, i) for i, j in blocked}
    assert {tuple(pair) for pair in np.argwhere(~selective_mask(6))} == blocked
    _, found = model.apply(variables, batch, mutable=["intermediates"])
    for layer in range(2):
        weights = found["intermediates"][f"layers_{layer}"]["attention"]["weights"][0]
        assert not np.asarray(weights)[:, :, *np.transpose(list(blocked))].any()
        assert np.asarray(weights)[:, :, selective_mask(6)].all()
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_the_mask_wants_sensors_of_three_axes():
    assert selective_mask(9).sum() == 9 * 5
    with pytest.raises(ValueError, match="sensors of 3 axes, not for 4 channels: switch it off"):
        selective_mask(4)


def test_dead_layers_are_carried_along():  # Acceptance 5
    shapes = variable_shapes(PAPER, zoo.create("genhar"))
    counts = {kind: sum(s.size for s in jax.tree.leaves(shapes[kind])) for kind in ("params", "unused")}
    assert counts == {"params": 25_264, "unused": 12_480}


def test_rotations_turn_all_sensors_of_a_window_alike():
    x = jax.random.normal(KEY, (4, 10, 6))
    y = jax.jit(turned)(x, KEY)
    sensors, images = (v.reshape(4, 20, 3) for v in (x, y))
    products = [jnp.einsum("bni,bmi->bnm", v, v) for v in (sensors, images)]
    chex.assert_trees_all_close(*products, atol=1e-4)  # lengths and angles, between the two sensors too
    assert np.linalg.norm(y - x, axis=(1, 2)).min() > 0.5
    triple = [np.linalg.det(np.asarray(v[:, :3])) for v in (sensors, images)]
    np.testing.assert_allclose(*triple, rtol=1e-3, atol=1e-4)  # not mirrored


def test_learns_gaits_and_recognises_them_in_another_domain():  # Acceptance 6
    parts = {k: tuple(map(jnp.asarray, v)) for k, v in imu_standin(0, length=120, channels=6, num_classes=4).items()}
    x, label = parts["train"]
    model = zoo.create("genhar", dropout_rate=0.0)
    variables = jax.jit(model.init)(KEY, {"x": x[:2]})
    optimizer = optax.adam(5e-3)

    @jax.jit
    def trained(variables):
        def loss(params, stats, rows):
            given = variables | {"params": params, "batch_stats": stats}
            logits, changed = model.apply(given, {"x": x[rows]}, train=True, mutable=["batch_stats"])
            return classification.loss(logits, {"label": label[rows]})[0], dict(changed["batch_stats"])

        def step(i, carry):
            params, stats, state = carry
            rows = jax.random.randint(jax.random.fold_in(KEY, i), (32,), 0, len(x))
            gradients, stats = jax.grad(loss, has_aux=True)(params, stats, rows)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), stats, state

        params, stats = variables["params"], variables["batch_stats"]
        params, stats, _ = jax.lax.fori_loop(0, 150, step, (params, stats, optimizer.init(params)))
        return variables | {"params": params, "batch_stats": stats}

    variables = trained(variables)
    # The other reads raw samples, with more parameters.
    mlp = fit("mlp", x.reshape(len(x), -1), label, num_classes=4, steps=25)
    models = {"genhar": lambda x: model.apply(variables, {"x": x}), "mlp": lambda x: mlp(x.reshape(len(x), -1))}
    accuracy = {
        (name, part): float(jnp.mean(jnp.argmax(jax.jit(predict)(parts[part][0]), axis=-1) == parts[part][1]))
        for name, predict in models.items()
        for part in ("valid", "test")
    }
    assert accuracy["genhar", "valid"] > 0.95, accuracy
    assert accuracy["mlp", "valid"] > 0.9, accuracy
    assert accuracy["genhar", "test"] > accuracy["mlp", "test"] + 0.3, accuracy
