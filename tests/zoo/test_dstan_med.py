"""DSTAN-Med's card: what the paper's mechanisms imply."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.feed import HostSplit, epoch_order, evaluate
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.registry import variable_shapes
from zoo.series.dstan_med import AxisAttention, Block, Config, Convolutions, plausible
from zoo.tasks import anomaly_detection, thresholds

KEY = jax.random.key(8)
PAPER = zoo.paper("dstan_med")


def noisy(model, *inputs, **arguments):
    """Variables away from zeros and symmetries; nothing is compiled for them."""
    rng = np.random.default_rng(8)
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs, **arguments), KEY)
    draw = lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), s.dtype)  # noqa: E731
    return {"params": jax.tree.map(draw, shapes["params"])}


@pytest.fixture(scope="module")
def attention():
    module, x = AxisAttention(8), jax.random.normal(KEY, (2, 5, 9))
    return x, noisy(module, x), jax.jit(module.apply)


def test_attention_over_sensors_does_not_know_their_order(attention):
    x, variables, apply = attention
    order = jax.random.permutation(KEY, 5)
    chex.assert_trees_all_close(apply(variables, x[:, order]), apply(variables, x)[:, order], atol=1e-5)


def test_attention_over_time_does_not_know_its_order_and_is_the_other_one_turned():
    """A block of the time attention alone is, on the turned matrix, one of the sensor attention alone."""
    config = Config(channels=4, lookback=5, attention_width=8, use_convolution=False, bounds="none")
    x = jax.random.normal(KEY, (2, 5, 5))
    by_time = Block(dataclasses.replace(config, use_sensors=False))
    variables = noisy(by_time, x, train=False)
    # Maps along time would tell moments apart, the norm's entries places: without them nothing does.
    params = variables["params"] | {"time_out": {"kernel": jnp.eye(5)}}
    params["norm"] = {"scale": jnp.ones((5, 5)), "bias": jnp.zeros((5, 5))}
    apply = jax.jit(lambda params, x: by_time.apply({"params": params}, x, train=False))
    order = jax.random.permutation(KEY, 5)
    chex.assert_trees_all_close(apply(params, x[:, :, order]), apply(params, x)[:, :, order], atol=1e-5)

    by_sensor = Block(dataclasses.replace(config, use_time=False))
    turned = {"sensors": params["time"], "sensors_out": params["time_out"], "norm": params["norm"]}
    found = by_sensor.apply({"params": turned}, jnp.swapaxes(x, 1, 2), train=False)
    chex.assert_trees_all_close(jnp.swapaxes(found, 1, 2), apply(params, x), atol=1e-5)


def test_scores_are_divided_by_the_root_of_what_a_row_holds(attention):
    x, variables, apply = attention
    params = {name: np.asarray(v["kernel"], np.float64) for name, v in variables["params"].items()}
    query, key, value = (np.asarray(x, np.float64) @ params[name] for name in ("query", "key", "value"))
    powers = np.exp(query @ np.swapaxes(key, 1, 2) / 3.0)  # 9 features a row, a width of 8
    expected = powers / powers.sum(-1, keepdims=True) @ value @ params["out"]
    np.testing.assert_allclose(apply(variables, x), expected, atol=2e-5)


def test_convolutions_run_along_time_and_mix_the_rows():
    config = Config(channels=3, lookback=6, hidden_channels=5, bounds="none")
    module, x = Convolutions(config), jax.random.normal(KEY, (1, 4, 6))
    variables = noisy(module, x, train=False)
    params = variables["params"] | {"norm": {"scale": jnp.ones((4, 6)), "bias": jnp.zeros((4, 6))}}
    padded = np.pad(np.asarray(x[0], np.float64), ((0, 0), (1, 1)))

    def convolve(rows, kernel):
        return np.stack([np.einsum("ck,kcf->f", rows[:, t : t + 3], kernel) for t in range(6)], axis=1)

    hidden = np.maximum(convolve(padded, np.asarray(params["conv1"]["kernel"])), 0)
    summed = convolve(np.pad(hidden, ((0, 0), (1, 1))), np.asarray(params["conv2"]["kernel"])) + np.asarray(x[0])
    expected = (summed - summed.mean()) / np.sqrt(summed.var() + 1e-5)
    np.testing.assert_allclose(module.apply({"params": params}, x, train=False)[0], expected, atol=3e-5)


def test_the_class_row_is_the_last_and_the_one_that_is_read():
    model = zoo.create("dstan_med", "tiny", num_blocks=0)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = noisy(model, batch)
    params = variables["params"]
    logit = params["class_token"][0] @ params["head"]["kernel"][:, 0] + params["head"]["bias"][0]
    chex.assert_trees_all_close(model.apply(variables, batch)["logits"], jnp.full(2, logit), rtol=1e-5)


LOW, HIGH, CHANGE = jnp.array([10.0, -1.0]), jnp.array([20.0, 1.0]), jnp.array([2.0, 0.5])


@pytest.mark.parametrize(
    ("received", "change", "calm"),
    [
        ((15, 0), (1, 0.1), True),
        ((10, 1), (-2, -0.5), True),  # bounds belong to what is allowed
        ((9.9, 0), (1, 0.1), False),
        ((15, 1.1), (1, 0.1), False),
        ((15, 0), (-2.1, 0.1), False),
        ((15, 0), (1, 0.6), False),
    ],
)
def test_every_channel_must_be_within_its_rules(received, change, calm):
    found = plausible(jnp.array([received], float), jnp.array([change], float), LOW, HIGH, CHANGE)
    assert bool(found[0]) == calm


def test_rules_only_silence():
    """Through the counts: infinite bounds silence every alarm, impossible ones none, and no silence becomes alarm."""
    logits, y = jax.random.normal(KEY, (64,)), (jnp.arange(64) % 2).astype(jnp.float32)
    batch = {"y": y, "x": jnp.zeros((64, 15, 6))}
    received, change = jax.random.normal(KEY, (64, 2)), jax.random.normal(KEY, (64, 2))
    infinite = jnp.full(2, jnp.inf)
    results = {}
    for name, rules in {
        "all": (-infinite, infinite, infinite),
        "none": (HIGH, LOW, infinite),
        "some": (-infinite, infinite, jnp.array([0.7, 0.7])),
    }.items():
        calm = plausible(received, change, *rules)
        counts = anomaly_detection.metrics({"logits": logits, "plausible": calm}, batch)["counts"]
        results[name] = anomaly_detection.summarise({"counts": counts.sum(axis=0), "examples": 64}, None)
    assert results["all"]["filtered_sensitivity"] == results["all"]["filtered_f1"] == 0.0
    assert results["none"]["filtered_f1"] == results["none"]["f1"] > 0.3
    assert 0 < results["some"]["filtered_sensitivity"] < results["some"]["sensitivity"]
    assert results["some"]["auroc"] == results["none"]["auroc"]


def test_scores_are_those_of_the_examples():
    rng = np.random.default_rng(2)
    logits, y = rng.normal(0, 2, 300).astype(np.float32), rng.random(300) < 0.4
    calm = rng.random(300) < 0.3
    outputs = {"logits": jnp.asarray(logits), "plausible": jnp.asarray(calm)}
    totals = {
        "counts": anomaly_detection.metrics(outputs, {"y": jnp.asarray(y)})["counts"].sum(axis=0),
        "examples": 300,
    }
    found = anomaly_detection.summarise(totals, totals)

    def f1(alarm):
        return 2 * (alarm & y).sum() / (alarm.sum() + y.sum())

    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    grid = np.arange(10, 91, 5) / 100
    best = grid[np.argmax([f1(probability >= t) for t in grid])]
    assert found["threshold"] == best
    alarm = probability >= best
    for prefix, raised in (("", alarm), ("filtered_", alarm & ~calm)):
        assert found[f"{prefix}f1"] == pytest.approx(f1(raised))
        assert found[f"{prefix}precision"] == pytest.approx((raised & y).sum() / raised.sum())
        assert found[f"{prefix}sensitivity"] == pytest.approx((raised & y).sum() / y.sum())
        assert found[f"{prefix}accuracy"] == pytest.approx((raised == y).mean())
    pairs = logits[y][:, None] > logits[~y]
    assert found["auroc"] == pytest.approx(pairs.mean(), abs=2e-3)  # equal bins of 0.04 count half
    assert anomaly_detection.summarise(totals, None)["threshold"] == 0.5


def test_the_loss_is_the_weighed_cross_entropy():
    logits, y = jnp.array([2.0, -1.0, 0.5]), jnp.array([1.0, 1.0, 0.0])
    batch = {"y": y, "positive_weight": jnp.full(3, 2.5)}
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = -np.mean([2.5 * np.log(p[0]), 2.5 * np.log(p[1]), np.log(1 - p[2])])
    assert float(anomaly_detection.loss({"logits": logits}, batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_paired_errors_are_compared_and_corrected_for_number():
    right = np.ones(100, bool)
    assert thresholds.mcnemar(right, right) == 1.0
    worse = right.copy()
    worse[:6] = False
    assert thresholds.mcnemar(right, worse) == pytest.approx(2 / 2**6)
    worse[:40] = False
    assert thresholds.mcnemar(right, worse) == pytest.approx(6.98e-10, rel=0.01)  # chi-squared of 39^2 / 40
    corrected = thresholds.holm_bonferroni(np.array([0.01, 0.04, 0.03]))
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06])


def test_the_released_architecture_has_63185_parameters():
    shapes = variable_shapes(PAPER, zoo.create("dstan_med", "physionet"))["params"]
    assert sum(s.size for s in jax.tree.leaves(shapes)) == 63_185
    assert sum(s.size for s in jax.tree.leaves(shapes["layers_0"])) == 9_022


def test_what_makes_no_model():
    with pytest.raises(zoo.UserError, match="bounds 'physionet' are for 6 channels, not 3: set bounds to none"):
        zoo.create("dstan_med", "tiny", channels=3)
    with pytest.raises(zoo.UserError, match="kernel_size 4 is not odd"):
        zoo.create("dstan_med", "tiny", kernel_size=4)
    model = zoo.create("dstan_med", "tiny")
    batch = PAPER.example(dataclasses.replace(model.config, lookback=20), batch_size=1, key=KEY)
    with pytest.raises(zoo.UserError, match="built for 6 channels of 15 samples, the data has 6 of 20"):
        jax.eval_shape(model.init, KEY, batch)


@pytest.fixture(scope="module")
def trained():
    """(run, its variables after so many epochs) on the stand-in at the highest severity, of three configurations."""

    def train(config, epochs):
        run = prepare(dataclasses.replace(recipe_for("dstan_med", config), mesh="data=1", log_every=431))
        state = run.program.init()
        for epoch in range(epochs):
            order = epoch_order(0, epoch, len(run.splits.train))
            state, _ = run.program.run(state, run.splits.train, order, 0, run.steps_per_epoch)
        return run, state.variables

    return {
        name: train(name, epochs) for name, epochs in (("tiny", 3), ("tiny_time_only", 2), ("tiny_sensors_only", 2))
    }


def test_learns_to_find_attacks(trained):
    run, variables = trained["tiny"]
    scores = evaluate(run.program, variables, run.splits.test, tuned_on=run.splits.valid)
    assert scores["f1"] > 0.9, scores
    assert scores["f1"] > scores["always_alarm/f1"] + 0.05, scores
    # Counts are added up in the same way where the examples come from the host.
    on_host = HostSplit.of(run.splits.test, run.program.mesh)
    assert evaluate(run.program, variables, on_host, tuned_on=run.splits.valid) == pytest.approx(scores, rel=1e-4)


def test_two_axes_tell_more_than_one(trained):
    both, *single = (
        evaluate(run.program, variables, run.splits.test)["auroc"]
        for run, variables in (trained[name] for name in ("tiny", "tiny_time_only", "tiny_sensors_only"))
    )
    assert both > np.mean(single), (both, single)
