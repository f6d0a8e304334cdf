"""Whole runs: what they leave behind, going on after any interruption, and the same numbers on eight devices."""

import dataclasses
import json
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

import zoo
from trainers.feed import epoch_order
from trainers.logs import TIMES
from trainers.loop import evaluate_run, read_recipe, train
from trainers.predict import predict_run
from trainers.recipe import Evaluation, Optimizer, Recipe, named_recipes, recipe_for

QUIET = Console(quiet=True)
SHORT = dataclasses.replace(
    recipe_for("ister"), steps=60, mesh="data=1", evaluation=Evaluation(every=20), log_every=10, data="standin"
)


def metrics(workdir, *, timing=False):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return rows if timing else [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("runs")) / "ister"
    return workdir, train(SHORT, workdir, console=QUIET)


def test_learns_the_standin(finished):
    _, scores = finished
    assert scores["test/mse"] < 0.5 * scores["test/repeat_last/mse"]
    assert scores["test/mae"] < 0.5 * scores["test/repeat_last/mae"]


def test_leaves_what_the_plan_names(finished):
    workdir, scores = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "recipe.yaml", "metrics.jsonl", "checkpoints", "curves.png", "forecast.png", "model.safetensors", "tensorboard",
        "sharding.txt",
    }  # fmt: skip
    rows = metrics(workdir, timing=True)
    assert [row["step"] for row in rows if "train/loss" in row] == [10, 20, 30, 40, 50, 60]
    assert [row["step"] for row in rows if "valid/mse" in row] == [20, 40, 60]
    assert all(row["examples_per_second"] > 0 for row in rows if "train/loss" in row and row["step"] > 10)
    assert {k: v for k, v in rows[-1].items() if k.startswith("test/")} == scores
    for picture in ("curves.png", "forecast.png"):
        assert (workdir / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_model_that_cannot_see_does_not_learn(tmp_path):
    # The stand-in tells a broken model from a sound one: without its embedding's input nothing is left to learn from.
    blind = dataclasses.replace(SHORT, optimizer=Optimizer(name="sgd", learning_rate=0.0), steps=20)
    scores = train(blind, epath.Path(tmp_path) / "run", console=QUIET)
    assert scores["test/mse"] > 0.5 * scores["test/repeat_last/mse"]


def test_the_recipe_in_the_folder_is_the_one_that_ran(finished):
    assert read_recipe(finished[0]) == SHORT


def test_evaluation_of_the_folder_gives_the_same_metrics(finished):
    workdir, scores = finished
    assert evaluate_run(workdir, console=QUIET) == pytest.approx(scores, rel=1e-6)


def test_the_folder_loads_as_a_model(finished):
    model, variables = zoo.load(finished[0])
    assert model.config == SHORT.model
    batch = zoo.paper("ister").example(model.config, batch_size=1, key=jax.random.key(0))
    chex.assert_tree_all_finite(model.apply(variables, batch))


def test_predicts_beyond_the_data(finished, tmp_path):
    output = predict_run(finished[0], data_dir=None, output=tmp_path / "future.csv", console=QUIET)
    lines = output.read_text().splitlines()
    assert len(lines) == 1 + SHORT.model.horizon
    assert lines[0].startswith("date,series 0")
    assert lines[1].startswith("2016-09-22 08:00:00,")  # the stand-in ends an hour before
    assert (tmp_path / "future.png").exists()


def test_running_again_only_repeats_the_result(finished):
    workdir, scores = finished
    before = metrics(workdir)
    assert train(SHORT, workdir, console=QUIET) == scores
    assert metrics(workdir) == before


def test_eight_devices_give_the_losses_of_one(finished, tmp_path):
    recipe = dataclasses.replace(SHORT, mesh="data=2,fsdp=2,tensor=2")
    workdir = epath.Path(tmp_path) / "run"
    train(recipe, workdir, console=QUIET)
    ours, theirs = ([row["train/loss"] for row in metrics(w) if "train/loss" in row] for w in (workdir, finished[0]))
    np.testing.assert_allclose(ours[:2], theirs[:2], atol=1e-5)


def test_parameters_are_split_over_the_devices():
    from trainers.loop import prepare

    run = prepare(dataclasses.replace(SHORT, mesh="fsdp=4,tensor=2"))
    kernel = run.program.init().params["layers_0"]["ffn_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16 // 4, 32 // 2)
    moments = run.program.init().opt_state[0].mu["layers_0"]["ffn_in"]["kernel"]
    assert moments.sharding.shard_shape(kernel.shape) == (16 // 4, 32 // 2)


def test_a_run_goes_on_on_another_mesh(finished, tmp_path):
    recipe = dataclasses.replace(SHORT, steps=40, mesh="fsdp=2,data=2")
    workdir = epath.Path(tmp_path) / "run"
    train(recipe, workdir, console=QUIET)
    scores = train(dataclasses.replace(recipe, mesh="data=1"), workdir, console=QUIET)
    assert np.isfinite(scores["test/mse"])


def test_stops_early_and_keeps_the_best(tmp_path):
    recipe = dataclasses.replace(
        SHORT,
        steps=400,
        evaluation=Evaluation(every=20, patience=2),
        optimizer=Optimizer(name="sgd", learning_rate=3.0, b1=0.0, schedule="constant", clip_norm=1.0),
    )
    workdir = epath.Path(tmp_path) / "run"
    train(recipe, workdir, console=QUIET)
    rows = metrics(workdir)
    valid = {row["step"]: row["valid/mse"] for row in rows if "valid/mse" in row}
    best = min(valid, key=valid.get)
    assert rows[-1]["best_step"] == best
    assert max(valid) == best + 2 * 20 < 400
    # Its checkpoint is still there, and so are the last two.
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {best, max(valid) - 20, max(valid)}
    again = train(recipe, workdir, console=QUIET)
    assert again["test/mse"] == rows[-1]["test/mse"]


def test_the_order_of_the_data_is_a_permutation_by_seed_and_epoch():
    orders = {(s, e): np.asarray(epoch_order(s, e, 50)) for s in (0, 1) for e in (0, 1)}
    for order in orders.values():
        chex.assert_trees_all_equal(np.sort(order), np.arange(50, dtype=np.int32))
    assert len({order.tobytes() for order in orders.values()}) == 4
    chex.assert_trees_all_equal(np.asarray(epoch_order(0, 1, 50)), orders[0, 1])


# --- interruption ---------------------------------------------------------------------------------------------------

COMMAND = [
    sys.executable, "-m", "trainers.cli", "train", "ister", "--steps", "24", "--evaluation.every", "8",
    "--log-every", "4", "--mesh", "data=1", "--seed", "3",
]  # fmt: skip


def finish(workdir) -> str:
    done = subprocess.run(
        [*COMMAND, "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    return workdir


def test_a_save_cut_off_half_way_is_ignored_and_said(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    checkpoints = workdir / "checkpoints"
    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    half = checkpoints / f"{last}.orbax-checkpoint-tmp-12"
    (checkpoints / str(last)).rename(half)
    for path in sorted(half.rglob("*")):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    output = finish(workdir)
    assert f"ignored an interrupted save of step {last}" in output
    assert not half.exists()
    assert metrics(workdir) == metrics(uninterrupted)


def test_a_recipe_is_the_same_after_yaml():
    for name, recipe in named_recipes("ister").items():
        assert Recipe.from_yaml(recipe.to_yaml(), source="x") == recipe, name
