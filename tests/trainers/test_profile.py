"""`zoo train --profile`: a trace beside the run, and the run unchanged; and the share of the chip's peak in its log."""

import gzip
import json

import pytest

from tests.trainers.test_cli import run
from trainers import compile as compiling
from trainers.compile import model_flops
from trainers.devices import Accelerator
from trainers.logs import TIMES
from trainers.recipe import recipe_for

RUN = ["train", "ister", "--mesh", "data=1", "--log-every", "10", "--evaluation.every", "20"]


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    chip = Accelerator("test", bfloat16=4e9, float32=1e9, memory=2**20, bandwidth=1e8, interconnect=1e7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "accelerator", lambda devices: chip)
        assert run(*RUN, "--steps", "20", "--workdir", str(folder)) == 0
    return folder


def test_utilisation_is_logged_where_the_peak_is_known(plain):
    rows = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "examples_per_second" in row]
    assert rows
    recipe = recipe_for("ister")
    for row in rows:
        steps_per_second = row["examples_per_second"] / recipe.batch_size
        assert row["train/mfu"] == pytest.approx(model_flops(recipe).count * steps_per_second / 1e9)


def test_a_trace_of_a_few_steps_and_the_same_numbers(plain, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(*RUN, "--steps", "20", "--workdir", str(folder), "--profile") == 0
    said = capsys.readouterr().err
    assert f"traced the steps after 1: {folder / 'profile'}" in said
    assert "https://ui.perfetto.dev" in said
    assert list(folder.rglob("*.xplane.pb"))
    (trace,) = (folder / "profile").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert metrics(folder) == metrics(plain)
    assert "mfu" not in (folder / "metrics.jsonl").read_text()  # this machine's peak is not known
    # It is an option of the command and not of the recipe: the folder goes on without it.
    assert (folder / "recipe.yaml").read_text() == (plain / "recipe.yaml").read_text()


def test_without_the_option_nothing_is_traced(plain):
    assert not (plain / "profile").exists()


def test_too_few_steps_are_said_to_be_too_few(plain, tmp_path, capsys):
    assert run(*RUN, "--steps", "1", "--workdir", str(tmp_path / "run"), "--profile") == 0
    assert "--profile: no trace" in capsys.readouterr().err
    assert run(*RUN, "--steps", "20", "--workdir", str(plain), "--profile") == 0
    assert "--profile: no trace" in capsys.readouterr().err
    assert not (plain / "profile").exists()
