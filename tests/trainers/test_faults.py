"""What ends a run early, and what is left of it: signals, memory, disk, a second writer."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file

import zoo
from trainers import cli, loop
from trainers.checkpoints import stored_steps
from trainers.faults import LOCK_FILE, Interrupted, Preemption, locked
from trainers.logs import TIMES
from trainers.loop import train
from trainers.recipe import Evaluation, recipe_for

pytestmark = pytest.mark.usefixtures("compiled_once")

QUIET = Console(quiet=True)
SHORT = dataclasses.replace(
    recipe_for("ister"), steps=60, mesh="data=1", evaluation=Evaluation(every=20), log_every=10, data="standin"
)
FLAGS = ["--steps", "60", "--mesh", "data=1", "--evaluation.every", "20", "--log-every", "10"]


def run(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def one_line(captured) -> str:
    lines = [line for line in captured.err.splitlines() if line.startswith("zoo: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE}


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(SHORT, epath.Path(workdir), console=QUIET)
    return workdir


def same_end(workdir, finished):
    assert metrics(workdir) == metrics(finished)
    chex.assert_trees_all_equal(*(load_file(w / "model.safetensors") for w in (workdir, finished)))


# --- signals --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signalled_at(monkeypatch, number, step):
    """The signal arrives while the dispatch that ends at `step` is under way."""
    write = loop.MetricsLog.write

    def signalling(self, at, values):
        if at == step and "train/loss" in values:
            os.kill(os.getpid(), number)
        write(self, at, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "write", signalling)
        yield


@pytest.mark.parametrize(("number", "code", "step"), [(signal.SIGTERM, 0, 30), (signal.SIGINT, 130, 40)])
def test_a_signal_saves_and_says_how_to_resume(finished, tmp_path, monkeypatch, capsys, number, code, step):
    workdir = tmp_path / "a run"
    command = ["train", "ister", *FLAGS, "--workdir", str(workdir)]
    handlers = [signal.getsignal(n) for n in Preemption.SIGNALS]
    with signalled_at(monkeypatch, number, step):
        assert run(*command) == code
    line = one_line(capsys.readouterr())
    assert f"{number.name}: stopped and saved at step {step} of 60; resume with: zoo train ister" in line
    assert stored_steps(workdir / "checkpoints") == sorted({20, step})
    assert [signal.getsignal(n) for n in Preemption.SIGNALS] == handlers
    # The printed command, as a shell would read it.
    assert run(*shlex.split(line.partition("resume with: zoo ")[2])) == 0
    assert f"restored step {step} of 60 from {workdir}" in capsys.readouterr().err
    same_end(workdir, finished)


def test_a_signal_at_the_end_lets_the_run_finish(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with signalled_at(monkeypatch, signal.SIGTERM, 60):
        assert run("train", "ister", *FLAGS, "--workdir", str(workdir)) == 0
    same_end(workdir, finished)


def test_a_second_signal_does_not_wait():
    with Preemption() as preemption, preemption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested is signal.SIGINT
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    with Preemption(), pytest.raises(Interrupted) as stop:  # before training there is nothing to save
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.exit_code == 0


def test_a_process_that_is_told_to_end_ends_well(tmp_path):
    command = ["train", "ister", "--steps", "100000", "--mesh", "data=1", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainers.cli", *command], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.time() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run"):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    found = re.search(r"zoo: SIGTERM: stopped and saved at step (\d+) of 100000; resume with: zoo (.*)", errors)
    assert shlex.split(found[2]) == command
    assert stored_steps(tmp_path / "run" / "checkpoints")[-1] == int(found[1])
    assert "Traceback" not in errors


# --- memory ---------------------------------------------------------------------------------------------------------

EVERY_KNOB = (
    "--remat full, --scan-layers, --mesh fsdp=-1, --precision bfloat16, --accumulate 2, a --batch-size below 64"
)


@pytest.mark.parametrize(
    ("flags", "knobs"),
    [
        ([], EVERY_KNOB),
        (["--remat", "full", "--accumulate", "4"], EVERY_KNOB.removeprefix("--remat full, ").replace("te 2", "te 8")),
        (["--scan-layers", "--precision", "bfloat16", "--mesh", "fsdp=8"], "--remat full, --accumulate 2, a --batch-s"),
    ],
)
def test_out_of_memory_names_what_helps(tmp_path, monkeypatch, capsys, flags, knobs):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.\nmore")

    made = loop.recipe_program
    monkeypatch.setattr(loop, "recipe_program", lambda *a, **k: dataclasses.replace(made(*a, **k), run=full))
    assert run("train", "ister", *FLAGS, *flags, "--workdir", str(tmp_path / "run")) == 1
    line = one_line(capsys.readouterr())
    assert f"out of memory (Out of memory allocating 68719476736 bytes): try {knobs}" in line


def test_memory_that_really_is_not_there(tmp_path, capsys):
    flags = ["--model.d-ff", "40000000000"]  # two kernels of 2.5 terabytes
    assert run("train", "ister", *FLAGS, *flags, "--workdir", str(tmp_path / "run")) == 1
    assert re.search(r"out of memory \(.*\): try --remat full", one_line(capsys.readouterr()))


def test_other_errors_of_the_runtime_are_not_hidden(tmp_path, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    made = loop.recipe_program
    monkeypatch.setattr(loop, "recipe_program", lambda *a, **k: dataclasses.replace(made(*a, **k), run=broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(SHORT, epath.Path(tmp_path / "run"), console=QUIET)


# --- disk -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_costs_only_itself(tmp_path):
    # No file of this process may grow beyond a size: a real error of a real write, and all that Orbax makes of it.
    command = ["train", "ister", *FLAGS, "--model.d-ff", "2000", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "trainers.cli", *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert re.search(
        r"^zoo: a checkpoint could not be written to .*checkpoints \(File too large\).* no checkpoint is complete yet$",
        lines[-1],
    )
    assert all(re.match("ister tiny: |compiled the training step in |step  ", line) for line in lines[:-1]), done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("moment", ["save", "wait_until_finished"])
def test_a_full_disk_keeps_the_last_good_checkpoint(finished, tmp_path, monkeypatch, capsys, moment):
    import orbax.checkpoint as ocp

    workdir, lost = tmp_path / "run", []
    save, wait = ocp.CheckpointManager.save, ocp.CheckpointManager.wait_until_finished
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_save(self, step, **options):
        if moment == "save" and step == 60:
            raise full
        if moment != "save" and step == 40:
            lost.append(step)  # begins well, and its writing in the background fails
            return True
        return save(self, step, **options)

    def full_wait(self):
        wait(self)
        if lost:
            raise full

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full_save)
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", full_wait)
        assert run("train", "ister", *FLAGS, "--workdir", str(workdir)) == 1
    line = one_line(capsys.readouterr())
    assert re.search(r"\(No space left on device\): make room or give access, and run the same command again", line)
    assert line.endswith(f"the last good checkpoint is of step {40 if moment == 'save' else 20}")
    assert run("train", "ister", *FLAGS, "--workdir", str(workdir)) == 0
    same_end(workdir, finished)


@pytest.mark.parametrize("place", ["lock", "metrics"])
def test_a_read_only_run_folder(finished, monkeypatch, capsys, place):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = snapshot(finished)
    target, name = {"lock": (os, "open"), "metrics": (loop, "MetricsLog")}[place]
    allowed = os.open

    def refuse_lock(path, *arguments, **options):
        return refuse() if str(path).endswith(LOCK_FILE) else allowed(path, *arguments, **options)

    monkeypatch.setattr(target, name, refuse_lock if place == "lock" else refuse)
    assert run("train", "ister", *FLAGS, "--workdir", str(finished)) == 1
    assert re.search(r"run cannot be written \(Read-only file system\): ", one_line(capsys.readouterr()))
    assert snapshot(finished) == before


# --- two writers ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from etils import epath
from trainers.faults import locked
with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_writer_at_a_time_and_a_dead_one_does_not_count(finished, capsys):
    before = snapshot(finished)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, finished], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert run("train", "ister", *FLAGS, "--workdir", str(finished)) == 1
        line = one_line(capsys.readouterr())
        assert re.search(rf"run is being written by process {holder.pid} on \S+: wait for that run, stop it, or", line)
        assert snapshot(finished) == before
        assert run("eval", "ister", "--workdir", str(finished)) == 0  # reading is free
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (finished / LOCK_FILE).exists()
    assert run("train", "ister", *FLAGS, "--workdir", str(finished)) == 0
    assert not (finished / LOCK_FILE).exists()


def test_the_lock_is_given_back(tmp_path):
    folder = epath.Path(tmp_path / "run")
    for _ in range(2):
        with locked(folder), pytest.raises(zoo.UserError, match="is being written by process"), locked(folder):
            pass
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyError), locked(folder):
        raise KeyError
    assert list(folder.iterdir()) == []


def test_what_a_process_killed_at_its_beginning_leaves_is_no_obstacle(finished, tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"pid": 1, "host": "gone"}')
    (tmp_path / ".recipe.yaml.part").write_text("paper: ist")
    train(SHORT, epath.Path(tmp_path), console=QUIET)
    same_end(tmp_path, finished)
