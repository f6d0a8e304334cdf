"""`zoo compare`: the same data and budget for all, a table that can be recomputed from the run folders, a plot."""

import csv
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from etils import epath

import zoo
from tests.trainers.test_cli import one_line, run
from trainers import compare as comparison
from trainers.compare import contenders, flops_per_example
from trainers.loop import read_recipe
from trainers.recipe import recipe_for

pytestmark = pytest.mark.usefixtures("compiled_once")

# ettm1 as it stands forecasts 96 steps with 153,000 weights: here 24, as the first one does.
PAPERS = ["ister:tiny", "ister:ettm1"]
BUDGET = ["--steps", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare") / "all"
    assert run("compare", *PAPERS, *BUDGET, "--seeds", "2", "--workdir", str(workdir)) == 0
    return workdir


def table(workdir):
    return list(csv.DictReader((workdir / "comparison.csv").read_text().splitlines()))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_had_the_same_budget_and_data(compared):
    recipes = {path.parent.name + path.name: read_recipe(epath.Path(path)) for path in compared.glob("*/seed-*")}
    assert len(recipes) == 4
    for recipe in recipes.values():
        assert (recipe.data, recipe.steps, recipe.epochs, recipe.batch_size) == ("standin", 3, None, 8)
        assert (recipe.model.lookback, recipe.model.horizon) == (96, 24)
        assert recipe.evaluation == dataclasses.replace(recipe_for("ister").evaluation, every=1, patience=None)
    assert sorted(recipe.seed for recipe in recipes.values()) == [0, 0, 1, 1]
    # What belongs to the paper stays the paper's.
    assert recipes["ister-ettm1seed-1"].model.d_model == 32
    assert recipes["ister-ettm1seed-1"].optimizer == recipe_for("ister", "ettm1").optimizer


def test_the_table_says_what_the_runs_say(compared):
    rows = table(compared)
    assert [(row["paper"], row["config"], row["seeds"]) for row in rows] == [
        ("ister", "tiny", "2"), ("ister", "ettm1", "2"), ("repeat_last", "", "2"),
    ]  # fmt: skip
    for row in rows[:2]:
        folders = [compared / f"ister-{row['config']}" / f"seed-{seed}" for seed in range(2)]
        for metric in ("mse", "mae"):
            values = [metrics(folder)[-1][f"test/{metric}"] for folder in folders]
            assert float(row[f"{metric}_mean"]) == pytest.approx(sum(values) / 2)
            assert float(row[f"{metric}_sd"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert float(row["seconds"]) > 0
    naive = [metrics(compared / "ister-tiny" / f"seed-{seed}")[-1]["test/repeat_last/mse"] for seed in range(2)]
    assert float(rows[2]["mse_mean"]) == pytest.approx(sum(naive) / 2)
    assert rows[2]["parameters"] == rows[2]["seconds"] == rows[2]["flops_per_example"] == ""
    assert int(rows[0]["parameters"]) == 6_760
    assert int(rows[1]["parameters"]) > int(rows[0]["parameters"])
    assert float(rows[1]["flops_per_example"]) > float(rows[0]["flops_per_example"])
    assert (compared / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_plot_shows_mean_and_band(compared, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    chosen = contenders(PAPERS, steps=3, batch_size=8)
    comparison._plot(chosen, epath.Path(compared), 2, "mse")
    (axes,) = drawn[0].axes
    for contender, line, band in zip(chosen, axes.lines, axes.collections, strict=True):
        curves = [
            {row["step"]: row["valid/mse"] for row in metrics(contender.folder(compared, seed)) if "valid/mse" in row}
            for seed in range(2)
        ]
        assert list(line.get_xdata()) == [1, 2, 3]
        np.testing.assert_allclose(line.get_ydata(), [(curves[0][s] + curves[1][s]) / 2 for s in (1, 2, 3)])
        height = abs(curves[0][2] - curves[1][2]) / 2**0.5
        shown = [y for x, y in band.get_paths()[0].vertices if x == 2]
        assert max(shown) - min(shown) == pytest.approx(2 * height)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == PAPERS


def test_the_same_command_only_repeats_and_fewer_seeds_train_nothing(compared, capsys):
    before = {path: path.read_bytes() for path in compared.rglob("metrics.jsonl")}
    assert run("compare", "ister:tiny", *BUDGET, "--seeds", "1", "--workdir", str(compared)) == 0
    captured = capsys.readouterr()
    assert "ister:tiny" in captured.out
    assert "repeat last" in captured.out
    assert {path: path.read_bytes() for path in compared.rglob("metrics.jsonl")} == before
    (row, _) = table(compared)
    assert row["mse_sd"] == ""
    assert float(row["mse_mean"]) == metrics(compared / "ister-tiny" / "seed-0")[-1]["test/mse"]


def test_flops_are_those_of_the_matrix_products():
    recipe = recipe_for("ister")
    paper, c = zoo.paper("ister"), recipe.model
    model = paper.model(c)
    batch = paper.example(c, batch_size=1, key=jax.random.key(0))
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    variates, marks, d = 7, 4, c.d_model
    tokens = variates + marks
    products = 2 * (
        tokens * c.lookback * d  # season embedding
        + 3 * tokens * d * d + variates * d * d  # query, key, value; out
        + 2 * variates * d * c.d_ff
        + variates * c.lookback * d + variates * (d * d // 2 + d // 2 * d + d * d)  # the trend and its MLP
        + 2 * variates * d * c.horizon
    )  # fmt: skip
    assert flops_per_example(model, variables, batch) == pytest.approx(products, rel=0.05)


def test_what_is_not_given_is_that_of_the_first():
    first, second = contenders(["ister:etth1", "ister"], data="ett_h1", data_dir="somewhere")
    assert second.name == "ister:tiny"
    assert (second.recipe.batch_size, second.recipe.epochs, second.recipe.steps) == (256, 20, None)
    assert (second.recipe.model.horizon, second.recipe.model.d_model) == (96, 16)
    assert (second.recipe.data, second.recipe.data_dir) == ("ett_h1", "somewhere")
    assert first.recipe.evaluation == second.recipe.evaluation
    assert first.recipe.evaluation.patience is None
    assert [c.name for c in contenders(["ister:tiny", "ister"], config="ettm1")] == ["ister:tiny", "ister:ettm1"]


BAD = {
    "unknown paper": (["istr"], "no paper is called 'istr'; did you mean 'ister'"),
    "planned paper": (["ister", "pamnet"], "pamnet .* is planned but not implemented yet"),
    "unknown config of one": (["ister:etth", "ister"], "ister has no recipe for config 'etth'; did you mean 'etth"),
    "config that not all have": (
        ["ister", "--config", "imagenet"],
        "ister has no recipe for config 'imagenet': leave --config out to take each paper's tiny, or name one for this "
        "paper alone, as ister:tiny",
    ),
    "twice": (["ister", "ister:tiny"], "ister:tiny is named twice"),
    "two budgets": (["ister", "--steps", "3", "--epochs", "1"], "--steps 3 and --epochs 1 are two budgets: give one"),
    "no seeds": (["ister", "--seeds", "0"], "--seeds must be at least 1, not 0"),
    "no steps": (["ister", "--steps", "0"], "steps must be at least 1, not 0"),
    "unknown data": (["ister", "--data", "ett_h3"], "no forecasting data set is called 'ett_h3'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    assert run("compare", *arguments) == 1
    assert re.search(message, one_line(capsys.readouterr()))
    assert not list(tmp_path.iterdir())


def test_papers_of_two_tasks():
    with pytest.raises(zoo.UserError, match="ister:tiny is a paper of forecasting and genhar:tiny one of classif"):
        contenders(["ister", "genhar"])
    # Of a paper that serves several tasks, the configuration says which.
    with pytest.raises(zoo.UserError, match="of forecasting and xctformer:tiny_imputation one of imputation"):
        contenders(["ister", "xctformer:tiny_imputation"])


def test_no_paper_is_wrong_usage(capsys):
    assert run("compare") == 2
    assert "zoo compare needs the names of papers" in one_line(capsys.readouterr())


def test_another_budget_in_the_same_folder_is_refused(compared, capsys):
    assert run("compare", *PAPERS, "--steps", "4", "--batch-size", "8", "--workdir", str(compared)) == 1
    assert re.search("holds a run of another recipe .steps: 3 -> 4.", one_line(capsys.readouterr()))
