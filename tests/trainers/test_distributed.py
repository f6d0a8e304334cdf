"""Real processes that train one model together, on this machine's CPU."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from trainers import distributed

ZOO = [sys.executable, "-m", "trainers.cli"]
TRAIN = ["train", "ister", "--log-every", "5", "--seed", "3"]
SHORT = ["--steps", "20", "--evaluation.every", "10"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def start(workdir, cache, *options, count=1, devices=1, words=TRAIN):
    """The processes of one run; a process has `devices` virtual devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",  # the last counts
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    coordinator = f"127.0.0.1:{free_port()}"
    processes = []
    for i in range(count):
        joined = ["--coordinator", coordinator, "--process", f"{i}/{count}"] if count > 1 else []
        command = [*ZOO, *words, "--workdir", str(workdir), *joined, *options]
        outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **outputs))
    return processes


def finish(processes, timeout=300):
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return np.array([row["train/loss"] for row in rows(workdir) if "train/loss" in row])


def agree(workdir, alone):
    np.testing.assert_allclose(losses(workdir), losses(alone), atol=1e-5)
    ours, theirs = (load_file(w / "model.safetensors") for w in (workdir, alone))
    chex.assert_trees_all_close(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    codes, outputs = finish(start(workdir, cache, *SHORT, "--mesh", "data=1"))
    assert codes == [0], outputs
    return workdir


@pytest.mark.parametrize(("count", "mesh", "data_on"), [(2, "data=-1", "device"), (4, "fsdp=-1", "host")])
def test_several_processes_train_the_model_of_one(count, mesh, data_on, alone, tmp_path, cache):
    workdir = tmp_path / "run"
    codes, outputs = finish(start(workdir, cache, *SHORT, "--mesh", mesh, "--data-on", data_on, count=count))
    assert codes == [0] * count, outputs
    agree(workdir, alone)
    # Only the first speaks.
    assert f"{count} cpu devices of {count} processes" in outputs[0]
    assert all("parameters" not in output for output in outputs[1:])


# One layer of each of its towers has all that Social-Mamba has and compiles in a third of the time.
TOWERS = [f"--model.{tower}-layers=1" for tower in ("temporal", "goal", "ego", "global")]


@pytest.mark.parametrize(
    ("slug", "mesh", "smaller"),
    [pytest.param("social_mamba", "fsdp=-1", TOWERS, marks=[pytest.mark.slow]), ("convrec", "data=-1", [])],
)
def test_two_processes_train_a_scan_and_a_convolution(slug, mesh, smaller, tmp_path, cache):
    words = ["train", slug, "--log-every", "5", *SHORT, "--batch-size", "32", *smaller]
    for name, axes, count in (("one", "data=1", 1), ("two", mesh, 2)):
        codes, outputs = finish(start(tmp_path / name, cache, "--mesh", axes, count=count, words=words), timeout=600)
        assert codes == [0] * count, outputs
    agree(tmp_path / "two", tmp_path / "one")


def test_a_lost_process_ends_the_run_and_it_goes_on_with_the_same_bits(tmp_path, cache):
    options = ["--steps", "80", "--mesh", "data=-1", "--evaluation.every", "20"]
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    codes, outputs = finish(start(whole, cache, *options, count=2))
    assert codes == [0, 0], outputs
    processes = start(workdir, cache, *options, count=2)
    deadline = time.time() + 120
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < 10:
        assert time.time() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    lost = time.time()
    output = processes[0].communicate(timeout=60)[0]
    assert time.time() - lost < 60
    assert processes[0].returncode != 0
    assert "another process of this run was lost" in output
    assert "Traceback" not in output
    processes[1].communicate()
    codes, outputs = finish(start(workdir, cache, *options, count=2))
    assert codes == [0, 0], outputs
    assert "restored step" in outputs[0]
    ours, theirs = (load_file(w / "model.safetensors") for w in (workdir, whole))
    chex.assert_trees_all_equal(ours, theirs)
    np.testing.assert_array_equal(losses(workdir), losses(whole))


def test_two_processes_compare_what_one_compares(tmp_path, cache):
    tables = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        words = ["compare", "ister:tiny", "--steps", "4", "--batch-size", "8"]
        codes, outputs = finish(start(workdir, cache, "--seeds", "1", count=count, words=words))
        assert codes == [0] * count, outputs
        with open(workdir / "comparison.csv") as file:
            tables.append(list(csv.DictReader(file)))
        assert (workdir / "comparison.png").stat().st_size > 1000
        assert all("wrote" not in output for output in outputs[1:])
    assert [row["paper"] + row["config"] for row in tables[0]] == ["istertiny", "repeat_last"]
    for one, two in zip(*tables, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name.startswith(("mse", "mae")) and one[name]:
                assert float(one[name]) == pytest.approx(float(two[name]), abs=1e-5)
    assert any(name.startswith("mse") for name in tables[0][0])


def test_sigterm_to_one_process_saves_the_run_of_all(tmp_path, cache):
    workdir = tmp_path / "run"
    processes = start(workdir, cache, "--steps", "5000", "--evaluation.every", "1000", "--mesh", "data=-1", count=2)
    deadline = time.time() + 120
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < 10:
        assert time.time() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes, timeout=120)
    assert codes == [0, 0], outputs
    assert "resume with: zoo train ister" in outputs[0]


def test_an_error_of_the_first_process_is_the_error_of_all(tmp_path, cache):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "thesis.txt").write_text("mine")
    codes, outputs = finish(
        start(workdir, cache, "--steps", "20", "--evaluation.every", "10", "--mesh", "data=-1", count=2)
    )
    assert codes == [1, 1], outputs
    assert all("is not empty and not a run folder" in output for output in outputs)
    assert [path.name for path in workdir.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("coordinator", "process", "sentence"),
    [
        ("host:1", None, "--process, e.g. 0/4 is missing"),
        (None, "0/2", "--coordinator, host:port of process 0 is missing"),
        ("host:1", "2/2", "--process '2/2' must be index/number"),
        ("host:1", "two", "--process 'two' must be index/number"),
        ("host", "0/2", "--coordinator 'host' must be host:port"),
    ],
)
def test_wrong_arguments_are_one_sentence(coordinator, process, sentence):
    with pytest.raises(zoo.UserError, match=sentence):
        distributed.connect(coordinator, process)


def test_alone_everything_is_local():
    distributed.connect(None, None)
    assert not distributed.several()
    assert distributed.is_first()
    assert distributed.on_first(lambda: (1, [2])) == (1, [2])
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
