"""Recipes as files: written, read back and changed; every field explained; a run repeated from its own recipe."""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from typing import Literal

import chex
import pytest
import yaml
from safetensors.numpy import load_file

import zoo
from tests.trainers.test_cli import one_line, run
from trainers import recipe as recipes
from trainers.recipe import Recipe, named_recipes, recipe_for, recipe_from_file
from zoo.catalogue import entries

WORKING = [row.slug for row in entries() if row.status == "works" and row.kind == "model"]


def write(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe_for("ister").to_yaml()) | changes))
    return str(path)


def flags(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if cls is Recipe and field.name in ("paper", "model"):
            continue
        several = typing.get_origin(field.type) is tuple and typing.get_args(field.type)[0]
        if dataclasses.is_dataclass(field.type):
            yield from flags(field.type, f"{prefix}{field.name}.")
        elif dataclasses.is_dataclass(several):
            yield from flags(several, f"{prefix}{field.name}.0.")
        else:
            yield f"--{prefix}{field.name}".replace("_", "-")


@pytest.mark.parametrize("slug", WORKING)
def test_help_explains_every_field(slug, capsys):
    assert run("train", slug, "--help") == 0
    text = re.sub(r"[│╭╮╰╯─]+", " ", capsys.readouterr().out)
    # From one flag at the beginning of a line to the next; what is left beside names, type and default is the help.
    shown = {}
    for entry in re.split(r"\n\s+(?=-)", text)[1:]:
        name, _, rest = entry.partition(" ")
        words = re.sub(r"\(default:.*\)", "", " ".join(rest.split()))
        shown[name.rstrip(",")] = re.sub(r"^(--no-\S+|[A-Z|{}\[\]. ]|\{[^}]*\}|\bNone\b)+", "", words).strip()
    wanted = [*flags(Recipe), *flags(zoo.paper(slug).config_class, "model."), "--workdir"]
    assert len(wanted) > 30
    assert not [name for name in wanted if len(shown.get(name, "")) < 5]


def test_saves_the_recipe_and_does_not_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "7", "--model.d-ff", "48", "--optimizer.learning-rate", "0.02"]
    assert run("train", "ister", *options, "--save-config", "mine.yaml") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    tiny = recipe_for("ister")
    assert recipe_from_file("mine.yaml") == dataclasses.replace(
        tiny,
        steps=7,
        model=dataclasses.replace(tiny.model, d_ff=48),
        optimizer=dataclasses.replace(tiny.optimizer, learning_rate=0.02),
    )
    # An option on top of the file, and the file itself is not overwritten.
    assert run("train", "--config-file", "mine.yaml", "--model.d-ff", "40", "--save-config", "other.yaml") == 0
    other = recipe_from_file("other.yaml")
    assert (other.model.d_ff, other.steps, other.optimizer.learning_rate) == (40, 7, 0.02)
    capsys.readouterr()
    assert run("train", "ister", "--save-config", "mine.yaml") == 1
    assert "--save-config mine.yaml exists already" in one_line(capsys.readouterr())
    assert recipe_from_file("mine.yaml").steps == 7


def test_every_recipe_is_the_same_after_a_file(tmp_path):
    for slug in WORKING:
        for name, recipe in named_recipes(slug).items():
            path = tmp_path / f"{slug}-{name}.yaml"
            recipes.save_recipe(recipe, str(path))
            assert recipe_from_file(str(path)) == recipe


def test_a_run_is_repeated_bit_for_bit_from_its_recipe(tmp_path, capsys):
    options = ["--steps", "3", "--mesh", "data=1", "--batch-size", "8", "--seed", "5", "--model.d-ff", "24"]
    assert run("train", "ister", *options, "--workdir", str(tmp_path / "a")) == 0
    assert run("train", "--config-file", str(tmp_path / "a/recipe.yaml"), "--workdir", str(tmp_path / "b")) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    chex.assert_trees_all_equal(first, second)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    assert [json.loads(line).get("train/loss") for line in lines[0]] == [
        json.loads(line).get("train/loss") for line in lines[1]
    ]
    assert (tmp_path / "a/recipe.yaml").read_text() == (tmp_path / "b/recipe.yaml").read_text()
    capsys.readouterr()


@dataclass(frozen=True)
class Nested:
    width: int = 3


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (1, 2)
    window: tuple[float, int] = (0.5, 3)
    kind: Literal["a", "b"] | None = None
    inner: Nested = Nested()


@dataclass(frozen=True)
class FakePaper:
    config_class: type = Config


def test_tuples_choices_and_nested_configs_survive(monkeypatch):
    monkeypatch.setattr(recipes.zoo, "paper", lambda slug: FakePaper())
    config = Config(widths=(4, 5, 6), window=(1e-3, 7), kind="b", inner=Nested(9))
    recipe = Recipe(paper="fake", model=config, steps=1, rules={"head$": "-,tensor"})
    again = Recipe.from_yaml(recipe.to_yaml(), source="x")
    assert again == recipe
    assert hash(again.model) == hash(config)  # a list in it could not be hashed
    bad = {
        "widths: 3": "x: model: widths: wants tuple",
        "window: [1, 2, 3]": "x: model: window: wants tuple",
        "kind: c": "x: model: kind: wants 'a' or 'b', not 'c'",
        "inner: {width: wide}": "x: model: inner: width: wants int, not 'wide'",
    }
    for line, message in bad.items():
        with pytest.raises(zoo.UserError, match=re.escape(message)):
            Recipe.from_yaml(f"paper: fake\nsteps: 1\nmodel: {{{line}}}", source="x")


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("paper: ister\nsteps: 2\noptimizer: {learning_rate: 1e-3, epsilon: 1}\n")
    recipe = recipe_from_file(str(path))
    assert recipe.optimizer.learning_rate == 0.001
    assert recipe.model == zoo.paper("ister").config("tiny")


CONFLICTS = {
    "of another paper": (
        lambda f: ["train", "pamnet", "--config-file", write(f)],
        "r.yaml is a recipe of ister, not of pamnet",
    ),
    "and --config": (
        lambda f: ["train", "ister", "--config", "etth1", "--config-file", write(f)],
        "--config etth1 and --config-file .*r.yaml both say where to start: give one",
    ),
    "missing": (lambda f: ["train", "--config-file", str(f)], "r.yaml cannot be read .No such file or directory."),
    "a folder": (lambda f: ["train", "--config-file", str(f.parent)], "cannot be read .Is a directory."),
    "no paper": (
        lambda f: ["train", "--config-file", f.write_text("steps: 3\n") and str(f)],
        "r.yaml is not a recipe: it has no line like `paper: ister`",
    ),
    "no recipe": (lambda f: ["train", "--config-file", f.write_text("[]") and str(f)], "r.yaml is not a recipe"),
    "unknown field": (
        lambda f: ["train", "--config-file", write(f, stps=3)],
        "r.yaml: unknown field 'stps'; did you mean 'steps'",
    ),
    "unknown nested field": (
        lambda f: ["train", "--config-file", write(f, optimizer={"learning_rat": 1.0})],
        "r.yaml: optimizer: unknown field 'learning_rat'; did you mean 'learning_rate'",
    ),
    "wrong type": (
        lambda f: ["train", "--config-file", write(f, batch_size="many")],
        "r.yaml: batch_size: wants int, not 'many'",
    ),
    "wrong choice": (
        lambda f: ["train", "--config-file", write(f, precision="float8")],
        "precision: wants 'float32' or 'bfloat16', not 'float8'",
    ),
    "unwritable": (
        lambda f: ["train", "ister", "--save-config", str(f.parent / "nowhere" / "x.yaml")],
        "x.yaml cannot be written .No such file or directory.",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_bad_files_are_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = CONFLICTS[name]
    assert run(*arguments(tmp_path / "r.yaml")) == 1
    assert re.search(message, one_line(capsys.readouterr()))
    assert {path.name for path in tmp_path.iterdir()} <= {"r.yaml"}


def test_wrong_usage(capsys):
    assert run("train", "ister", "--config-file") == 2
    assert "zoo train: --config-file wants a value" in one_line(capsys.readouterr())
    assert run("train", "--steps", "3", "ister") == 2
    assert "needs the name of a paper" in one_line(capsys.readouterr())
