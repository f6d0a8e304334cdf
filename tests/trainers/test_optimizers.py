"""Learning-rate schedules against their formulas, and the mesh's rules."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import zoo
from trainers.optimizers import learning_rate, make_optimizer
from trainers.recipe import Optimizer
from trainers.sharding import make_mesh, tree_shardings


def rates(**options):
    schedule = learning_rate(Optimizer(learning_rate=2.0, **options), total_steps=12, steps_per_epoch=3)
    return np.array([float(schedule(step)) for step in range(12)])


def test_cosine_falls_to_zero_step_by_step():
    np.testing.assert_allclose(rates(schedule="cosine"), 1 + np.cos(np.pi * np.arange(12) / 12), rtol=1e-5)


def test_cosine_per_epoch_is_the_official_staircase():
    # After epoch e of E: lr / 2 (1 + cos(pi e / E)); the first epoch runs at lr.
    expected = [1 + np.cos(np.pi * (step // 3) / 4) for step in range(12)]
    np.testing.assert_allclose(rates(schedule="cosine_per_epoch"), expected, rtol=1e-5)


def test_halve_per_epoch_is_the_official_type1_from_its_second_epoch_on():
    # Officially lr 0.5^(e - 1) is set after epoch e, so that the second epoch still runs at lr.
    expected = [2.0, 2.0, 1.0, 0.5]
    np.testing.assert_allclose(rates(schedule="halve_per_epoch")[::3], expected)


def test_constant_and_warmup():
    np.testing.assert_allclose(rates(schedule="constant", warmup_steps=4)[:6], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    warm = rates(schedule="cosine", warmup_steps=4)
    np.testing.assert_allclose(warm[4:], 1 + np.cos(np.pi * np.arange(8) / 8), rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "adafactor"])
def test_every_optimizer_descends(name):
    optimizer = make_optimizer(
        Optimizer(name=name, learning_rate=0.05, schedule="constant", clip_norm=1.0), total_steps=60, steps_per_epoch=10
    )
    params = {"w": jax.numpy.full((4, 3), 2.0)}

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(lambda p: jax.numpy.sum(p["w"] ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_rules_place_kernels_and_leave_small_things_whole():
    mesh = make_mesh("fsdp=4,tensor=2", batch_size=8, devices=jax.devices()[:8])
    shapes = {
        "ffn_in": {"kernel": jax.ShapeDtypeStruct((16, 32), "float32"), "bias": jax.ShapeDtypeStruct((32,), "float32")},
        "ffn_out": {"kernel": jax.ShapeDtypeStruct((32, 16), "float32")},
        "odd": {"kernel": jax.ShapeDtypeStruct((5, 32), "float32")},
    }
    placed = jax.tree.map(lambda s: s.spec, tree_shardings(shapes, mesh))
    assert placed["ffn_in"] == {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec(None)}
    assert placed["ffn_out"]["kernel"] == PartitionSpec("tensor", "fsdp")
    assert placed["odd"]["kernel"] == PartitionSpec(None, "tensor")  # five rows do not divide over four devices


def test_a_parameter_without_a_rule_is_an_error():
    mesh = make_mesh("data=1", batch_size=8, devices=jax.devices()[:1])
    shapes = {"strange": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(zoo.UserError, match="no sharding rule matches parameter /strange"):
        tree_shardings(shapes, mesh, rules=((r"/kernel$", PartitionSpec()),))


def test_one_axis_takes_the_remaining_devices():
    mesh = make_mesh("fsdp=-1,data=2", batch_size=8, devices=jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
