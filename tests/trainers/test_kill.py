"""kill -9 at random moments, again and again: nothing corrupt, nothing saved is lost, the same end bit for bit.

ZOO_KILL_ROUNDS=50 python -m pytest tests/trainers/test_kill.py -s
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from trainers.checkpoints import read_variables, stored_steps
from trainers.logs import TIMES

ROUNDS = int(os.environ.get("ZOO_KILL_ROUNDS", "3"))
EVERY = 8  # steps between saves
STEPS = 200 + 40 * ROUNDS  # at most 40 a round on average, some to be left at the end


class Runs:
    """Starts the same `zoo train` in processes that share what is compiled, so that a round is short."""

    def __init__(self, folder: Path):
        self.environment = os.environ | {
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir: Path) -> subprocess.Popen:
        flags = {"steps": STEPS, "evaluation.every": EVERY, "log-every": 4, "mesh": "data=1", "seed": 3}
        # Two further checkpoints stay from round to round, so that removal is interrupted as well.
        flags |= {"checkpoints.keep-best": 3, "checkpoints.keep-every": 1000, "workdir": workdir}
        command = [sys.executable, "-m", "trainers.cli", "train", "ister"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        output = open(workdir.with_suffix(".log"), "w")  # noqa: SIM115
        with output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=self.environment)

    def said(self, workdir: Path) -> str:
        return workdir.with_suffix(".log").read_text()

    def finish(self, workdir: Path) -> None:
        process = self.start(workdir)
        try:
            assert process.wait(timeout=600 + 20 * ROUNDS) == 0, self.said(workdir)
        finally:
            process.kill()  # does nothing to one that has ended


def rows(workdir: Path) -> list[dict]:
    """All lines but the last must be whole; the last may be cut off."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    found = [json.loads(line) for line in lines[:-1]]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory):
    """The finished run, and the seconds a step took in it, saving included."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(workdir)
    times = [(workdir / name).stat().st_mtime for name in ("sharding.txt", "curves.png")]
    return workdir, (times[1] - times[0]) / STEPS


def wait_for(condition, process) -> None:
    deadline = time.time() + 300
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)


def test_killed_again_and_again_it_ends_with_the_same_bits(runs, uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    seed = int(os.environ.get("ZOO_KILL_SEED", random.randrange(10**6)))
    generator = random.Random(seed)
    print(f"seed {seed}, {ROUNDS} rounds, {STEPS} steps of {1000 * seconds:.1f} ms")
    workdir = tmp_path / "run"
    saved, resumed, during, done = [], [], {"start": 0, "training": 0}, False
    for number in range(ROUNDS):
        process = runs.start(workdir)
        if generator.random() < 0.1:
            during["start"] += 1
            time.sleep(4 * generator.random())
        else:
            during["training"] += 1
            wait_for(lambda: "training examples" in runs.said(workdir), process)
            begins = int(re.search(r"restored step (\d+)|$", runs.said(workdir))[1] or 0)
            target = begins + generator.randrange(1, 60)
            wait_for(lambda target=target: last_step(workdir) >= target, process)
            time.sleep(EVERY * seconds * generator.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = "run folder:" in runs.said(workdir)

        said = runs.said(workdir)
        assert "Traceback" not in said
        assert "damaged" not in said, said
        if saved and "training examples" in said:
            # It went on from the newest save that was complete when the process before was killed.
            resumed.append(int(re.search(rf"restored step (\d+) of {STEPS}", said)[1]))
            assert resumed[-1] == saved[-1], said
        # A save is complete before the next but one is begun, so no more than two intervals can be on their way.
        reached, steps = last_step(workdir), stored_steps(workdir / "checkpoints")
        assert (steps[-1] if steps else 0) >= reached // EVERY * EVERY - 2 * EVERY
        assert all(step % EVERY == 0 for step in steps)
        assert (steps[-1:] or [0]) >= (saved[-1:] or [0])
        for step in steps[-2:]:
            chex.assert_tree_all_finite(read_variables(workdir / "checkpoints" / str(step)))
        saved += steps[-1:]
        print(f"round {number + 1}: step {reached}, saved {steps}", flush=True)
    assert not done, "the rounds were too long: the run was over before the last"
    runs.finish(workdir)
    print(f"killed {during}; resumed from {resumed}")
    assert [r for r in rows(workdir) if r["step"] <= STEPS] == rows(whole)
    chex.assert_trees_all_equal(*(load_file(w / "model.safetensors") for w in (workdir, whole)))
    assert stored_steps(workdir / "checkpoints") == stored_steps(whole / "checkpoints")
    for step in stored_steps(whole / "checkpoints"):
        ours, theirs = (whole_state(w / "checkpoints" / str(step)) for w in (workdir, whole))
        chex.assert_trees_all_equal(ours, theirs)


def whole_state(path: Path):
    """Everything in a checkpoint, optimiser state included, read by other means than the trainer's."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path / "state").item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path / "state", args=ocp.args.PyTreeRestore(restore_args=how))
