"""Learning-rate schedules against their formulas, and the mesh's rules."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import zoo
from trainers.optimizers import averaged, learning_rate, make_optimizer
from trainers.recipe import Optimizer
from trainers.sharding import (
    Rule,
    make_mesh,
    placement_summary,
    placement_table,
    placements,
    recipe_rules,
    rule_for,
    tree_shardings,
)


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


def test_tenth_in_last_fifth():
    schedule = learning_rate(
        Optimizer(learning_rate=2.0, schedule="tenth_in_last_fifth"), total_steps=10, steps_per_epoch=2
    )
    np.testing.assert_allclose([float(schedule(step)) for step in range(10)], [2.0] * 8 + [0.2] * 2, rtol=1e-6)


def test_one_cycle_is_that_of_torch():
    # torch.optim.lr_scheduler.OneCycleLR(max_lr=2.0, total_steps=12, pct_start=0.4), torch 2.13
    np.testing.assert_allclose(rates(schedule="one_cycle"), TORCH_ONE_CYCLE, rtol=1e-4)


TORCH_ONE_CYCLE = [0.08, 0.3898097, 1.1192762, 1.7975749, 1.9961947, 1.8660259, 1.5735781, 1.1736515, 0.741186]
TORCH_ONE_CYCLE += [0.357219, 0.0936998, 8e-06]


def test_constant_and_warmup():
    np.testing.assert_allclose(rates(schedule="constant", warmup_steps=4)[:6], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    warm = rates(schedule="cosine", warmup_steps=4)
    np.testing.assert_allclose(warm[4:], 1 + np.cos(np.pi * np.arange(8) / 8), rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "adafactor", "muon", "meta_adamw"])
def test_every_optimizer_descends(name):
    optimizer = make_optimizer(
        Optimizer(name=name, learning_rate=0.05, schedule="constant", clip_norm=1.0, meta="tiny"),
        total_steps=60,
        steps_per_epoch=10,
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
    shapes = {"block": {"strange": jax.ShapeDtypeStruct((3, 3), "float32")}}
    with pytest.raises(
        zoo.UserError, match=r"no sharding rule fits parameter /block/strange of shape \(3, 3\).*'strange"
    ):
        tree_shardings(shapes, mesh)
    placed = tree_shardings(shapes, mesh, recipe_rules({"strange$": "-,fsdp"}))
    assert placed["block"]["strange"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("path", "shape", "family"),
    [
        ("/layers_0/attention/query/kernel", (16, 16), "projection in"),
        ("/layers_0/attention/out/kernel", (16, 16), "projection out"),
        ("/layers_0/ffn_out/kernel", (32, 16), "projection out"),
        ("/mixer/A_log", (64, 16), "state space"),
        ("/mixer/x_proj/kernel", (64, 36), "projection out"),
        ("/stem/conv/kernel", (3, 3, 8, 16), "projection in"),
        ("/token_embedding/embedding", (100, 16), "embedding"),
        ("/moe/experts/up/kernel", (8, 16, 32), "experts"),
        ("/position_table", (1, 50, 16), "table"),
        ("/norm/scale", (16,), "vector"),
    ],
)
def test_every_family_has_its_rule(path, shape, family):
    assert rule_for(path, shape).family == family


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"kernel": "fdsp"}, "unknown mesh axis 'fdsp'; did you mean 'fsdp'"),
        ({"(": "fsdp"}, "not a regular expression"),
    ],
)
def test_a_wrong_rule_is_one_sentence(rules, sentence):
    with pytest.raises(zoo.UserError, match=sentence):
        recipe_rules(rules)


def test_the_table_adds_up():
    mesh = make_mesh("fsdp=4,tensor=2", batch_size=8, devices=jax.devices()[:8])
    shapes = {
        "ffn_in": {"kernel": jax.ShapeDtypeStruct((16, 32), "float32"), "bias": jax.ShapeDtypeStruct((32,), "float32")}
    }
    rows = placements(shapes, mesh)
    assert {r.path: (r.spec, r.bytes, r.bytes_per_device) for r in rows} == {
        "/ffn_in/kernel": ("fsdp,tensor", 2048, 256),
        "/ffn_in/bias": ("-", 128, 128),
    }
    assert placement_table(rows).splitlines()[-1].split() == ["all", "2,176", "384"]
    assert "projection in" in placement_summary(rows)


def test_the_first_rule_that_fits_decides():
    rules = (Rule("a", "x", ("fsdp",)), Rule("b", "x", ("tensor",)))
    assert rule_for("/x", (4, 4), rules).family == "a"


def test_the_average_follows_the_weights_and_is_found():
    optimizer = make_optimizer(
        Optimizer(name="sgd", learning_rate=1.0, b1=0.0, schedule="constant", average_decay=0.5),
        total_steps=10,
        steps_per_epoch=10,
    )
    params = {"w": jax.numpy.zeros(())}
    state, expected = optimizer.init(params), 0.0
    for step in range(1, 6):
        updates, state = optimizer.update({"w": -jax.numpy.ones(())}, state, params)
        params = optax.apply_updates(params, updates)
        rate = min(0.5, step / (step + 9))
        expected = rate * expected + (1 - rate) * step
    assert float(averaged(state)["w"]) == pytest.approx(expected)
    assert averaged(optax.sgd(0.1).init(params)) is None


def test_biases_and_scales_are_not_decayed():
    optimizer = make_optimizer(
        Optimizer(name="adamw", learning_rate=0.1, schedule="constant", weight_decay=0.5),
        total_steps=10,
        steps_per_epoch=10,
    )
    params = {"dense": {"kernel": jax.numpy.ones((2, 2)), "bias": jax.numpy.ones(2)}}
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], 0.0)


def test_the_first_pattern_that_fits_scales_the_rate():
    optimizer = make_optimizer(
        Optimizer(name="sgd", learning_rate=1.0, b1=0, schedule="constant", rates={"encoder/in": 0.1, "encoder": 0.5}),
        total_steps=10,
        steps_per_epoch=10,
    )
    params = {"encoder": {"in": jax.numpy.ones(2), "out": jax.numpy.ones(2)}, "head": jax.numpy.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    found = {name: float(value[0]) for name, value in {**updates["encoder"], "head": updates["head"]}.items()}
    assert found == pytest.approx({"in": -0.1, "out": -0.5, "head": -1.0})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rates": {"(": 1.0}}, "--optimizer.rates '.' is not a regular expression"),
        ({"no_decay": "("}, "is not a regular expression"),
        ({"average_decay": 1.5}, "between 0 and 1, not 1.5"),
    ],
)
def test_wrong_options_are_one_sentence(options, sentence):
    with pytest.raises(zoo.UserError, match=sentence):
        make_optimizer(Optimizer(**options), total_steps=1, steps_per_epoch=1)


def test_one_axis_takes_the_remaining_devices():
    mesh = make_mesh("fsdp=-1,data=2", batch_size=8, devices=jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
