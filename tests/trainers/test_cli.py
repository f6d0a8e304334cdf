"""The command line: help a newcomer understands, and bad input answered in one line with nothing touched."""

import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from trainers import cli
from zoo.weights.io import save_official

TINY = ["--steps", "2", "--mesh", "data=1", "--log-every", "2"]


def run(*arguments: str) -> int:
    """The exit code of `zoo ARGUMENTS`."""
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cli") / "run"
    assert run("train", "ister", *TINY, "--workdir", str(workdir)) == 0
    return workdir


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(captured) -> str:
    lines = [line for line in captured.err.splitlines() if line.startswith("zoo: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_says_what_it_can_do(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for command in ("list", "show", "train", "eval", "predict", "convert"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)
    assert "zoo train ister" in out
    assert run() == 2


@pytest.mark.parametrize("command", ["list", "show", "eval", "predict", "convert"])
def test_every_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: zoo {command}" in out
    assert "-h, --help" in out


def test_help_of_train_shows_every_field_with_its_default(capsys):
    assert run("train", "ister", "--config", "etth1", "--help") == 0
    out = capsys.readouterr().out
    for words in (
        "--batch-size INT",
        "(default: 256)",
        "--model.d-model INT",
        "--optimizer.learning-rate",
        "--workdir",
    ):
        assert words in out


def test_lists_and_shows(capsys):
    assert run("list", "--room", "theory") == 0
    assert "8 of 109 papers" in capsys.readouterr().out
    assert run("list", "--data") == 0
    assert "ett_h1" in capsys.readouterr().out
    assert run("show", "ister") == 0
    out = capsys.readouterr().out
    assert "https://arxiv.org/abs/2412.18798" in out
    assert "1,269,248" in out
    assert run("show", "gatp") == 0
    assert "planned" in capsys.readouterr().out


def test_evaluates_and_predicts(trained, tmp_path, capsys):
    assert run("eval", "ister", "--workdir", str(trained)) == 0
    assert "repeat last" in capsys.readouterr().out
    assert run("predict", "ister", "--workdir", str(trained), "--output", str(tmp_path / "p.csv")) == 0
    assert (tmp_path / "p.csv").exists()
    assert (tmp_path / "p.png").exists()


def test_converts_between_the_hub_and_ours(tmp_path, capsys):
    model = zoo.create("backbone_llama", "tiny")
    variables = model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    zoo.save(tmp_path / "hub", model, variables, layout="hf")
    for source, target, *options in (
        ("hub", "ours.safetensors"),
        ("ours.safetensors", "orbax"),
        ("orbax", "again", "--to", "hf"),
        ("orbax", "low", "--to", "hf", "--dtype", "bfloat16"),
        ("hub", "official.safetensors", "--to", "official"),
        ("official.safetensors", "back.safetensors", "--paper", "backbone_llama"),
    ):
        assert run("convert", str(tmp_path / source), str(tmp_path / target), *options) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    assert {str(x.dtype) for x in jax.tree.leaves(zoo.load(tmp_path / "low")[1])} == {"bfloat16"}
    assert run("convert", str(tmp_path / "hub"), str(tmp_path / "low"), "--to", "hf") == 1
    assert "exists already" in capsys.readouterr().err
    assert run("convert", str(tmp_path / "hub"), str(tmp_path / "x"), "--dtype", "int4") == 1
    assert "--dtype int4 is not one of float32" in capsys.readouterr().err


def test_converts_there_and_back(trained, tmp_path, capsys):
    official, ours = tmp_path / "official.safetensors", tmp_path / "ours"
    assert run("convert", str(trained), str(official), "--to", "official") == 0
    assert "Linear_Trend.weight" in load_file(official)
    assert run("convert", str(official), str(ours), "--paper", "ister") == 0
    assert run("convert", str(ours), str(tmp_path / "again.safetensors")) == 0
    first, last = load_file(trained / "model.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[name], last[name]) for name in first)
    # Without stored hparams the sizes come from --config or a json file.
    save_file(load_file(official), tmp_path / "bare.safetensors")
    (tmp_path / "hparams.json").write_text(json.dumps(zoo.paper("ister").bridge().hparams(zoo.load(ours)[0].config)))
    for i, options in enumerate((["--config", "tiny"], ["--hparams", str(tmp_path / "hparams.json")])):
        target = tmp_path / f"bare{i}.npz"
        assert run("convert", str(tmp_path / "bare.safetensors"), str(target), "--paper", "ister", *options) == 0
    capsys.readouterr()


USAGE = {
    "unknown command": (["trian"], "zoo has no command 'trian'; did you mean 'train'?"),
    "no paper": (["train"], "needs the name of a paper"),
    "unknown field": (
        ["train", "ister", "--model.d-modle", "8"],
        r"has no option --model.d-modle; did you mean --model.d-model\?",
    ),
    "unknown flag": (["train", "ister", "--stps", "3"], r"has no option --stps; did you mean --steps\?"),
    "unknown flag of eval": (["eval", "ister", "--wrkdir", "x"], "zoo eval has no option --wrkdir"),
    "wrong type": (["train", "ister", "--steps", "many"], "--steps wants INT, not 'many'"),
    "wrong type in the model": (["train", "ister", "--model.d-model", "wide"], "--model.d-model wants INT, not 'wide'"),
    "wrong choice": (["train", "ister", "--precision", "float8"], "'float8'.*'float32', 'bfloat16'"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_exits_with_two(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = USAGE[name]
    assert run(*arguments) == 2
    assert re.search(message, one_line(capsys.readouterr()))
    assert not list(tmp_path.iterdir())


BAD = {
    "unknown paper": (["istr"], "no paper is called 'istr'; did you mean 'ister'"),
    "planned paper": (["gatp"], "gatp .* is planned but not implemented yet"),
    "unknown config": (["ister", "--config", "eth1"], "ister has no recipe for config 'eth1'; did you mean 'etth1'"),
    "unknown data": (["ister", "--data", "ett_h3"], "no forecasting data set is called 'ett_h3'; did you mean 'ett_h"),
    "missing csv": (["ister", "--data", "ett_h1", "--data-dir", "."], "holds none of ETTh1.csv, ETTh1.csv.gz"),
    "missing folder": (["ister", "--data", "ett_h1", "--data-dir", "nowhere"], "--data-dir nowhere is not a folder"),
    "window longer than the series": (["ister", "--model.horizon", "3000"], r"a window of 96 \+ 3000 rows is longer"),
    "batch larger than the data": (["ister", "--batch-size", "100000"], "100000 is larger than the training split"),
    "no batch at all": (["ister", "--batch-size", "0"], "batch-size must be at least 1, not 0"),
    "no parts for a learned optimiser": (
        ["ister", "--optimizer.name", "meta_adamw", "--batch-size", "3"],
        "meta_adamw learns from four parts of a batch: batch-size 3 is below 4",
    ),
    "even window": (["ister", "--model.moving-average", "24"], "window 24 is not a positive odd number"),
    "unknown activation": (["ister", "--model.activation", "swich"], "activation 'swich' is unknown"),
    "unknown axis": (["ister", "--mesh", "dta=8"], "mesh 'dta=8' names an unknown axis 'dta'; did you mean 'data'"),
    "axis without a size": (["ister", "--mesh", "data=x"], "the size of data must be a positive number or -1, not 'x'"),
    "two free axes": (["ister", "--mesh", "data=-1,fsdp=-1"], "only one axis can be -1"),
    "devices": (["ister", "--mesh", "data=3"], "mesh 'data=3' needs 3 devices, which does not divide the 8 there are"),
    "batch": (["ister", "--mesh", "data=8", "--batch-size", "30"], "data x fsdp = 8 .* 24 or 32"),
    "unwritable folder": (["ister", "--workdir", "/proc/nowhere/run"], "cannot be written .* choose another --workdir"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_one(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    assert run("train", *arguments) == 1
    assert re.search(message, one_line(capsys.readouterr()))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_of_another_recipe_is_left_alone(trained, tmp_path, capsys):
    before = snapshot(trained)
    assert run("train", "ister", *TINY, "--workdir", str(trained), "--optimizer.learning-rate", "0.5") == 1
    assert re.search(
        r"holds a run of another recipe \(optimizer.learning_rate: 0.003 -> 0.5\)", one_line(capsys.readouterr())
    )
    (tmp_path / "notes.txt").write_text("mine")
    assert run("train", "ister", *TINY, "--workdir", str(tmp_path)) == 1
    assert "is not empty and not a run folder" in one_line(capsys.readouterr())
    assert snapshot(trained) == before
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_not_a_run_folder(trained, tmp_path, capsys):
    for command in ("eval", "predict"):
        assert run(command, "ister", "--workdir", str(tmp_path)) == 1
        assert "is not a run folder: it holds no recipe.yaml" in one_line(capsys.readouterr())
    (tmp_path / "recipe.yaml").write_text("paper: [unclosed")
    assert run("eval", "ister", "--workdir", str(tmp_path)) == 1
    assert "recipe.yaml is not a recipe" in one_line(capsys.readouterr())
    text = (trained / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace("batch_size: 64", "batch_sise: 64"))
    assert run("eval", "ister", "--workdir", str(tmp_path)) == 1
    assert "unknown field 'batch_sise'; did you mean 'batch_size'" in one_line(capsys.readouterr())
    (tmp_path / "recipe.yaml").write_text(text)
    assert run("eval", "ister", "--workdir", str(tmp_path)) == 1
    assert "not a finished run" in one_line(capsys.readouterr())


def test_checkpoints_of_another_model(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run("train", "ister", *TINY, "--model.d-ff", "48", "--workdir", str(workdir)) == 0
    (workdir / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    capsys.readouterr()
    assert run("train", "ister", *TINY, "--workdir", str(workdir)) == 1
    assert "is damaged or belongs to another model" in one_line(capsys.readouterr())
    assert run("eval", "ister", "--workdir", str(workdir)) == 1
    assert "was made by another configuration" in one_line(capsys.readouterr())


def test_weights_that_do_not_fit(trained, tmp_path, capsys):
    model, variables = zoo.load(trained)
    save_official(tmp_path / "official.safetensors", model, variables)
    whole = load_file(tmp_path / "official.safetensors")
    missing = {k: v for k, v in whole.items() if k != "Linear_Trend.bias"}
    cases = {
        "missing": (missing, "Linear_Trend.bias is missing"),
        "extra": (whole | {"more": np.zeros(2, np.float32)}, "more is not part of this model"),
        "misshapen": (whole | {"Linear_Trend.bias": np.zeros(5, np.float32)}, r"has shape \(5,\) instead of \(24,\)"),
    }
    for name, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        target = tmp_path / f"{name}.out.safetensors"
        assert run("convert", str(tmp_path / f"{name}.safetensors"), str(target), "--paper", "ister") == 1
        assert re.search(message, one_line(capsys.readouterr()))
        assert not target.exists()
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"x": 1}))
    assert run("convert", str(tmp_path / "pickle.safetensors"), str(tmp_path / "o.npz"), "--paper", "ister") == 1
    assert "is a pickle in spite of its name" in one_line(capsys.readouterr())
    assert run("convert", str(trained), str(tmp_path / "official.safetensors"), "--to", "official") == 1
    assert "exists already; choose another name" in one_line(capsys.readouterr())
