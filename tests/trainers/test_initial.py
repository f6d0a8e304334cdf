"""`--init-from`: weights that fit are taken, the others start afresh, and a report says which."""

import dataclasses
import json
import os
import re
import shutil
import signal

import chex
import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from rich.console import Console
from safetensors.numpy import load_file

import zoo
from trainers import cli
from trainers.checkpoints import RunCheckpoints, stored_steps
from trainers.faults import Interrupted
from trainers.initial import initial_state
from trainers.loop import prepare, train
from trainers.recipe import Evaluation, Optimizer, recipe_for

QUIET = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("compiled_once")

SHORT = dataclasses.replace(
    recipe_for("ister"), steps=20, mesh="data=1", evaluation=Evaluation(every=10), log_every=10, data="standin"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "run"
    train(SHORT, epath.Path(workdir), console=QUIET)
    return workdir


def flat(variables):
    return {k: np.asarray(v) for k, v in flatten_dict(dict(variables), sep="/").items()}


def program_of(**changes):
    return prepare(dataclasses.replace(SHORT, model=dataclasses.replace(SHORT.model, **changes))).program


@pytest.mark.parametrize("kind", ["run folder", "safetensors", "npz", "orbax", "unfinished run", "checkpoints", "step"])
def test_every_kind_of_source(source, tmp_path, kind):
    model, variables = zoo.load(source)
    paths = {"run folder": source, "step": source / "checkpoints" / "20", "checkpoints": source / "checkpoints"}
    if kind in ("safetensors", "npz", "orbax"):
        paths[kind] = tmp_path / ("saved" if kind == "orbax" else f"saved.{kind}")
        zoo.save(paths[kind], model, variables)
    if kind == "unfinished run":
        paths[kind] = tmp_path / "run"
        shutil.copytree(source, paths[kind])
        (paths[kind] / "model.safetensors").unlink()
    program = program_of()
    state, report = initial_state(program, str(paths[kind]))
    # The weights of the source's last step are its best.
    chex.assert_trees_all_equal(flat({"params": state.params}), flat(variables))
    assert len(report.matched) == len(flat(variables))
    assert not report.missing + report.unexpected + report.misshapen
    assert int(state.step) == 0
    jax.tree.map(lambda a, s: chex.assert_equal(a.sharding, s), state, program.state_shardings)


def test_what_fits_is_taken_and_the_rest_is_fresh(source):
    theirs = flat(zoo.load(source)[1])
    program = program_of(horizon=12, num_layers=2)
    fresh = flat({"params": program.init().params})
    state, report = initial_state(program, str(source))
    ours = flat({"params": state.params})
    heads = {f"params/{name}_head/{part}" for name in ("season", "trend") for part in ("kernel", "bias")}
    assert {line.partition(":")[0] for line in report.misshapen} == heads
    assert "params/trend_head/kernel: (16, 24) instead of (16, 12)" in report.misshapen
    assert report.missing
    assert all(name.startswith("params/layers_1/") for name in report.missing)
    assert report.unexpected == []
    assert set(report.matched) == set(theirs) - heads
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name] if name in report.matched else fresh[name], err_msg=name)


def test_arrays_the_model_does_not_have_are_named(source, tmp_path):
    deeper = program_of(num_layers=2)
    variables = {"params": deeper.init().params}
    zoo.save(tmp_path / "deep.safetensors", zoo.create("ister", "tiny", num_layers=2), variables)
    _, report = initial_state(program_of(), str(tmp_path / "deep.safetensors"))
    assert report.unexpected
    assert all(name.startswith("params/layers_1/") for name in report.unexpected)
    assert not report.missing + report.misshapen


def test_on_several_devices_too(source):
    recipe = dataclasses.replace(SHORT, mesh="fsdp=4,tensor=2")
    state, _ = initial_state(prepare(recipe).program, str(source))
    kernel = state.params["layers_0"]["ffn_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16 // 4, 32 // 2)
    chex.assert_trees_all_equal(flat({"params": state.params}), flat(zoo.load(source)[1]))


def test_the_moving_average_starts_there_too(source):
    recipe = dataclasses.replace(SHORT, optimizer=Optimizer(average_decay=0.9))
    state, _ = initial_state(prepare(recipe).program, str(source))
    chex.assert_trees_all_equal(flat(state.variables), flat(zoo.load(source)[1]))


def test_a_run_reports_and_does_not_read_the_source_again(source, tmp_path, monkeypatch):
    origin, workdir = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(source, origin)
    model = dataclasses.replace(SHORT.model, horizon=12)
    recipe = dataclasses.replace(SHORT, model=model, init_from=str(origin))
    whole = tmp_path / "whole"
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    train(recipe, epath.Path(whole), console=console)
    report, printed = (whole / "init_report.txt").read_text(), console.export_text()
    for text in (report, printed):
        assert f"initial weights from {origin}" in text
        for count, kind in ((30, "matched"), (0, "missing"), (4, "misshapen"), (0, "unexpected")):
            assert re.search(rf"^ +{count} {kind} ", text, re.MULTILINE), (kind, text)
        assert "params/season_head/bias: (24,) instead of (12,)" in text
    assert "        params/encoder_norm/bias" in report
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    untrained = tmp_path / "untrained"
    train(dataclasses.replace(recipe, init_from=None), epath.Path(untrained), console=QUIET)
    assert first != json.loads((untrained / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    assert not (untrained / "init_report.txt").exists()

    save = RunCheckpoints.save

    def stop_after(self, step, *arguments):
        save(self, step, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", stop_after)
        with pytest.raises(Interrupted):
            train(recipe, epath.Path(workdir), console=QUIET)
    assert stored_steps(workdir / "checkpoints") == [10]
    shutil.rmtree(origin)
    train(recipe, epath.Path(workdir), console=QUIET)
    chex.assert_trees_all_equal(*(load_file(w / "model.safetensors") for w in (workdir, whole)))


BAD = {
    "nothing there": ("nowhere", "nowhere does not exist"),
    "an empty folder": (".", "--init-from . holds no weights: give a run folder"),
    "official weights": ("official.safetensors", "was not written by the zoo; for official weights use `zoo convert`"),
    "damaged": ("damaged.safetensors", "is damaged or not a safetensors file"),
    "damaged checkpoint": ("broken", r"20 is damaged or not a checkpoint of the zoo"),
    "another model": ("other.safetensors", r"has nothing that fits this model \(\d+ arrays of another shape, 0 of"),
}


@pytest.mark.parametrize("name", BAD)
def test_sources_that_do_not_serve(source, tmp_path, monkeypatch, capsys, name):
    model, variables = zoo.load(source)
    empty = tmp_path / "empty"
    empty.mkdir()
    zoo.weights.io.save_official(empty.parent / "official.safetensors", model, variables)
    (tmp_path / "damaged.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:500])
    shutil.copytree(source / "checkpoints", tmp_path / "broken")
    for file in (tmp_path / "broken" / "20" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    sizes = {"d_model": 24, "d_ff": 40, "horizon": 12}
    other = {"params": program_of(**sizes).init().params}
    zoo.save(tmp_path / "other.safetensors", zoo.create("ister", "tiny", **sizes), other)
    path, message = BAD[name]
    monkeypatch.chdir(empty if path == "." else tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "ister", "--steps", "2", "--mesh", "data=1", "--init-from", path, "--workdir", "new"])
    assert stop.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "new").exists()
    assert not list(empty.iterdir())
