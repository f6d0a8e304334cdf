"""Checkpoints: which stay, what is inside, other meshes, and what happens to those that cannot be read."""

import dataclasses
import json
import os
import shutil
import signal

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file

import zoo
from trainers.checkpoints import FORMAT, RunCheckpoints, stored_steps
from trainers.faults import Interrupted
from trainers.logs import TIMES
from trainers.loop import prepare, train
from trainers.recipe import Checkpoints, Evaluation, Recipe, recipe_for

pytestmark = pytest.mark.usefixtures("compiled_once")

SHORT = dataclasses.replace(
    recipe_for("ister"), steps=60, mesh="data=1", evaluation=Evaluation(every=20), log_every=10, data="standin"
)


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def losses(workdir):
    return [row["train/loss"] for row in metrics(workdir) if "train/loss" in row]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recorder():
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    return console, lambda: console.export_text(clear=False)


@pytest.fixture(scope="module")
def program():
    return prepare(SHORT).program


@pytest.fixture(scope="module")
def states(program):
    """States that tell their step: every number differs from step to step."""
    first = program.init()
    return lambda step: jax.tree.map(lambda x: x + np.asarray(step, x.dtype), first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(SHORT, epath.Path(workdir), console=Console(quiet=True))
    return workdir


def opened(folder, **options) -> RunCheckpoints:
    options = {"keep_best": 1, "lower_is_better": True} | options
    return RunCheckpoints(epath.Path(folder), **options)


def fill(folder, states, scores, **options):
    """Saves of the steps 10, 20, ... with these validation scores (None: without an evaluation)."""
    checkpoints = opened(folder, **options)
    for i, score in enumerate(scores):
        step = 10 * (i + 1)
        checkpoints.save(step, states(step), {"best_step": step, "losses": []}, score)
    checkpoints.close()


# --- which stay, and what is inside ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [20, 70, 80]),
        ({"keep_best": 2}, [20, 40, 70, 80]),
        ({"keep_best": 2, "lower_is_better": False}, [30, 60, 70, 80]),
        ({"keep_every": 30}, [20, 30, 60, 70, 80]),
        ({"keep_every": 40}, [20, 40, 70, 80]),
    ],
)
def test_the_newest_two_the_best_and_every_nth_stay(states, tmp_path, options, kept):
    fill(tmp_path / "c", states, [0.5, 0.1, 0.9, 0.2, 0.4, 0.8, None, 0.3], **options)
    assert stored_steps(tmp_path / "c") == kept


def test_every_nth_step_is_saved_even_between_evaluations(finished, tmp_path):
    recipe = dataclasses.replace(SHORT, checkpoints=Checkpoints(keep_every=15))
    train(recipe, epath.Path(tmp_path / "run"), console=Console(quiet=True))
    assert {15, 30, 45, 60} <= set(stored_steps(tmp_path / "run" / "checkpoints"))
    np.testing.assert_array_equal(losses(tmp_path / "run")[-1:], losses(finished)[-1:])


def test_keep_every_must_be_positive():
    with pytest.raises(zoo.UserError, match=r"checkpoints.keep-every must be at least 1, not 0"):
        dataclasses.replace(SHORT, checkpoints=Checkpoints(keep_every=0))


def test_format_and_recipe_are_inside(finished):
    for step in stored_steps(finished / "checkpoints"):
        inside = json.loads((finished / "checkpoints" / str(step) / "progress" / "metadata").read_text())
        assert inside["format"] == FORMAT == 1
        assert Recipe.from_yaml(inside["recipe"], source="checkpoint") == SHORT


# --- other meshes ---------------------------------------------------------------------------------------------------


def test_from_eight_devices_to_one_to_four(tmp_path):
    programs = {mesh: prepare(dataclasses.replace(SHORT, mesh=mesh)).program for mesh in ("data=8", "data=1", "fsdp=4")}
    state = programs["data=8"].init()
    expected = jax.device_get(state)
    for i, program in enumerate(programs.values()):
        checkpoints = opened(tmp_path / str(i))
        checkpoints.save(10, state, {}, 0.5)
        checkpoints.close()
        state, _ = opened(tmp_path / str(i)).restore(10, program.state_shapes, program.state_shardings)
        chex.assert_trees_all_equal(jax.device_get(state), expected)
        jax.tree.map(lambda a, s: chex.assert_equal(a.sharding, s), state, program.state_shardings)
    kernel = state.params["layers_0"]["ffn_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16 // 4, 32)
    assert len(kernel.sharding.device_set) == 4


def test_a_run_that_moves_from_eight_devices_to_one_to_four(finished, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path / "run")
    save = RunCheckpoints.save

    def stop_after(self, step, *arguments):
        save(self, step, *arguments)
        if step < 60:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunCheckpoints, "save", stop_after)
    for mesh, restored in (("data=8", None), ("data=1", 20), ("fsdp=4", 40)):
        console, text = recorder()
        with pytest.raises(Interrupted) if mesh != "fsdp=4" else pytest.MonkeyPatch.context():
            train(dataclasses.replace(SHORT, mesh=mesh), workdir, console=console)
        assert restored is None or f"restored step {restored} of 60" in text()
    # Longer than this the rounding of another order of summation grows with training itself.
    np.testing.assert_allclose(losses(workdir)[:4], losses(finished)[:4], atol=1e-5)
    np.testing.assert_allclose(losses(workdir), losses(finished), rtol=0.02)


# --- other formats --------------------------------------------------------------------------------------------------


def save_as_before(folder, step, state, progress):
    """As the first version wrote checkpoints, with neither format nor recipe."""
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(best_fn=lambda m: m["decisive"])
    ) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        manager.save(step, args=args, metrics={"decisive": 0.5})


def test_a_checkpoint_without_a_version_is_read(program, states, tmp_path):
    progress = {"best_step": 30, "best": 0.5, "bad_evaluations": 0, "stopped": False, "losses": [1.0]}
    save_as_before(tmp_path / "c", 30, states(30), progress)
    step, state, stored, skipped = opened(tmp_path / "c").restore_newest(program.state_shapes, program.state_shardings)
    assert (step, stored, skipped) == (30, progress, [])
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(states(30)))


def test_a_checkpoint_of_a_newer_format_is_refused(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    file = workdir / "checkpoints" / "60" / "progress" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    before = snapshot(workdir)
    with pytest.raises(zoo.UserError, match=r"60 has format 2, this version reads 1: update attention-zoo"):
        train(SHORT, epath.Path(workdir), console=Console(quiet=True))
    assert snapshot(workdir) == before


# --- damage ---------------------------------------------------------------------------------------------------------


def garbage_in(part):
    def damage(path):
        files = [file for file in (path / part).rglob("*") if file.is_file()]
        assert files
        for file in files:
            file.write_bytes(b"garbage")

    return damage


def cut(path):
    for file in path.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-500])


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


DAMAGE = {
    "state": garbage_in("state"),
    "progress": garbage_in("progress"),
    "everything": garbage_in("."),
    "cut": cut,
    "state missing": lambda path: shutil.rmtree(path / "state"),
    "progress missing": lambda path: shutil.rmtree(path / "progress"),
    "emptied": emptied,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(program, states, tmp_path, kind):
    folder = tmp_path / "c"
    fill(folder, states, [0.3, 0.2, 0.1])
    DAMAGE[kind](folder / "30")
    was = snapshot(folder / "30")
    checkpoints = opened(folder)
    step, state, _, skipped = checkpoints.restore_newest(program.state_shapes, program.state_shardings)
    assert step == 20
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(states(20)))
    assert len(skipped) == 1
    assert skipped[0].startswith("skipped checkpoint 30, damaged (")
    assert skipped[0].endswith("renamed it 30.damaged")
    assert [p.read_bytes() for p in sorted((folder / "30.damaged").rglob("*")) if p.is_file()] == [
        was[p] for p in sorted(was)
    ]
    # The same step can be saved again, and be damaged again.
    checkpoints.save(30, states(30), {}, 0.1)
    checkpoints.close()
    DAMAGE[kind](folder / "30")
    opened(folder).restore_newest(program.state_shapes, program.state_shardings)
    assert stored_steps(folder) == [20]
    assert (folder / "30.damaged.2").exists()


def test_a_damaged_metric_of_an_older_checkpoint_is_not_in_the_way(program, states, tmp_path):
    folder = tmp_path / "c"
    fill(folder, states, [0.1, 0.3, 0.2])
    garbage_in("metrics")(folder / "10")
    checkpoints = opened(folder)
    step, *_, skipped = checkpoints.restore_newest(program.state_shapes, program.state_shardings)
    assert step == 30
    assert len(skipped) == 1
    checkpoints.save(40, states(40), {}, 0.2)
    checkpoints.close()
    assert stored_steps(folder) == [30, 40]


def test_if_all_are_damaged_nothing_is_touched(program, states, tmp_path):
    folder = tmp_path / "c"
    fill(folder, states, [0.3, 0.2])
    for step in (10, 20):
        garbage_in("state")(folder / str(step))
    before = snapshot(folder)
    with pytest.raises(zoo.UserError, match=r"checkpoint .*20 is damaged or belongs to another model .*remove that"):
        opened(folder).restore_newest(program.state_shapes, program.state_shardings)
    assert snapshot(folder) == before


def test_a_checkpoint_of_another_model_is_not_damage(program, states, tmp_path):
    folder = tmp_path / "c"
    fill(folder, states, [0.3, 0.2])
    wider = dataclasses.replace(SHORT, model=dataclasses.replace(SHORT.model, d_ff=48))
    other = prepare(wider).program
    before = snapshot(folder)
    with pytest.raises(zoo.UserError, match="its parameters differ, first in layers_0/ffn_in/bias"):
        opened(folder).restore_newest(other.state_shapes, other.state_shardings)
    assert snapshot(folder) == before


def test_a_run_goes_on_before_the_damage_and_ends_the_same(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    garbage_in("state")(workdir / "checkpoints" / "60")
    console, text = recorder()
    train(SHORT, epath.Path(workdir), console=console)
    assert "skipped checkpoint 60, damaged" in text()
    assert "restored step 40 of 60" in text()
    assert metrics(workdir) == metrics(finished)
    chex.assert_trees_all_equal(*(load_file(w / "model.safetensors") for w in (workdir, finished)))
    assert stored_steps(workdir / "checkpoints") == [40, 60]
