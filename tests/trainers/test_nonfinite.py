"""A loss that is no longer a number: the step, its batch and the first module are found, nothing ruined is saved."""

import dataclasses
import json
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from rich.console import Console

import zoo
from trainers import cli, nonfinite, step
from trainers.checkpoints import stored_steps
from trainers.feed import epoch_order
from trainers.loop import prepare, train
from trainers.recipe import Evaluation, recipe_for

pytestmark = pytest.mark.usefixtures("compiled_once")

QUIET = Console(quiet=True)
SHORT = dataclasses.replace(
    recipe_for("ister"), steps=60, mesh="data=1", evaluation=Evaluation(every=20), log_every=10, data="standin"
)
FLAGS = ["--steps", "60", "--mesh", "data=1", "--evaluation.every", "20", "--log-every", "10"]


def exploding(at):
    """The recipe's optimiser, but its update number `at` (from 0) is infinite."""
    make = step.make_optimizer

    def make_exploding(*arguments, **options):
        inner = make(*arguments, **options)

        def update(gradients, state, params):
            count, state = state
            updates, state = inner.update(gradients, state, params)
            scale = jnp.where(count == at, jnp.inf, 1.0)
            return jax.tree.map(lambda u: u * scale, updates), (count + 1, state)

        return optax.GradientTransformation(lambda params: (jnp.zeros((), jnp.int32), inner.init(params)), update)

    return make_exploding


@pytest.mark.parametrize(("at", "shows", "good"), [(3, 4, None), (39, 39, 20)])
def test_the_step_its_batch_and_the_last_good_checkpoint(tmp_path, monkeypatch, at, shows, good):
    monkeypatch.setattr(step, "make_optimizer", exploding(at))
    workdir = tmp_path / "run"
    kept = "there was no checkpoint yet" if good is None else f"the last good checkpoint is of step {good}"
    with pytest.raises(zoo.UserError, match=rf"no longer finite after step {shows};.*{kept}$") as error:
        train(SHORT, epath.Path(workdir), console=QUIET)
    assert "--optimizer.learning-rate" in str(error.value)
    # A step whose update ruins the weights still has a sound loss; only at a save is it noticed before the next one.
    first = "parameter encoder_norm/bias, which the step before" if shows == at + 1 else "the update of the parameters"
    assert first in str(error.value)
    assert stored_steps(workdir / "checkpoints") == ([good] if good else [])

    examples = prepare(SHORT)
    epoch, position = divmod(shows, examples.steps_per_epoch)
    order = epoch_order(SHORT.seed, epoch, len(examples.splits.train))
    expected = examples.splits.train.batch(order[64 * position : 64 * (position + 1)])
    with np.load(workdir / "nonfinite" / "batch.npz") as batch:
        chex.assert_trees_all_equal(dict(batch), jax.device_get(expected))
    report = (workdir / "nonfinite" / "report.txt").read_text()
    assert report.startswith(f"step {shows}: first not finite is {first}")
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] <= shows + SHORT.log_every
    assert "train/loss" in last


def test_a_learning_rate_that_is_far_too_high(tmp_path, capsys):
    flags = ["--optimizer.name", "sgd", "--optimizer.learning-rate", "1e30", "--optimizer.schedule", "constant"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "ister", *FLAGS, *flags, "--workdir", str(tmp_path / "run")])
    assert stop.value.code == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("zoo: ")]
    assert re.search(r"no longer finite after step 1; first is .*attention.*lower --optimizer.learning-rate or", line)


@pytest.fixture(scope="module")
def sample(compiled_once):
    run = prepare(SHORT)
    return run.program, run.program.init(), run.splits.train.batch(jnp.arange(64))


def with_parameter(state, path, value):
    params = jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.full_like(x, value) if jax.tree_util.keystr(p, simple=True, separator="/") == path else x,
        state.params,
    )
    return dataclasses.replace(state, params=params)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("layers_0/ffn_in/kernel", "layers_0/ffn_in"),
        ("season_head/kernel", "season_head"),
        ("layers_0/attention/value/kernel", "layers_0/attention/value"),
    ],
)
def test_the_first_module_to_overflow_is_named(sample, path, module):
    program, state, batch = sample
    finding = nonfinite.examine(program, with_parameter(state, path, 3e38), batch, parts=1)
    assert finding.where == f"module {module}"
    assert finding.modules[0] == module
    assert finding.modules[-1] == "Model"
    assert finding.parameters == finding.gradients == []


def test_what_else_may_be_first(sample):
    program, state, batch = sample
    marked = batch | {"x_mark": batch["x_mark"].at[3, 5, 1].set(jnp.inf)}
    assert nonfinite.examine(program, state, marked, parts=1).where == "the batch's x_mark"
    huge = batch | {"y": batch["y"] * 0 + 3e38}
    finding = nonfinite.examine(program, state, huge, parts=1)
    assert finding.where == "the loss itself, the model's outputs are finite"
    assert finding.modules == []
    # d sqrt(x) / dx at 0 is infinite though the loss is not.
    edge = dataclasses.replace(
        program, loss=lambda params, *_: jnp.sqrt(0.0 * params["trend_head"]["bias"][0]) + program.loss(params, *_)
    )
    finding = nonfinite.examine(edge, state, batch, parts=1)
    assert finding.gradients == ["trend_head/bias"]
    assert finding.where == "the gradient of parameter trend_head/bias"
    assert math.isfinite(finding.loss)
    sound = nonfinite.examine(program, state, batch, parts=1)
    assert sound.gradients == sound.modules == sound.parameters == []


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_looked_into_is_what_training_computes(accumulate):
    run = prepare(dataclasses.replace(SHORT, accumulate=accumulate))
    state, order = run.program.init(), epoch_order(0, 0, len(run.splits.train))
    state, _ = run.program.run(state, run.splits.train, order, 0, 7)
    batch = run.splits.train.batch(order[7 * 64 : 8 * 64])
    losses = [float(run.program.loss(state.params, state, batch, part)) for part in range(accumulate)]
    broken = batch | {"y": batch["y"].at[accumulate - 1].set(3e38)}  # in the last part only
    assert "the loss itself" in nonfinite.examine(run.program, state, broken, parts=accumulate).where
    _, history = run.program.run(state, run.splits.train, order, 7, 1)
    np.testing.assert_allclose(np.mean(losses), history["loss"][0], rtol=1e-6)


def test_the_first_bad_step():
    nan, inf = math.nan, math.inf
    cases = [([1, nan, nan], [1, 1, 1], 1), ([1, 1, nan], [1, inf, nan], 1), ([1, 1, 1], [1, 1, nan], 2)]
    for losses, norms, expected in [*cases, ([1, 1, 1], [1, 1, 1], 2)]:
        assert nonfinite.first_bad_step(np.array(losses), np.array(norms)) == expected
