"""`zoo bench PAPER`: rows, csv, and what it says of bad input."""

import csv

import pytest

from tests.trainers.test_cli import one_line, run
from trainers.compile import model_flops
from trainers.recipe import recipe_for


def test_a_line_a_pass_in_the_csv(tmp_path, capsys):
    command = ["bench", "ister", "--mesh", "data=2", "--batch-size", "64", "--output", str(tmp_path)]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    (table,) = tmp_path.glob("ister-tiny-*.csv")
    assert "training step" in printed
    assert str(table) in printed
    forward, step = csv.DictReader(table.open())
    assert (forward["pass"], step["pass"]) == ("forward", "training step")
    for row in (forward, step):
        assert (row["paper"], row["devices"], row["mesh"], row["batch_size"]) == ("ister", "2", "data=2", "64")
        milliseconds = float(row["median_ms"])
        assert float(row["examples_per_second"]) == pytest.approx(64 / milliseconds * 1e3, rel=1e-2)
        assert float(row["gflop_per_s"]) == pytest.approx(float(row["gflop"]) / milliseconds * 1e3, rel=2e-2)
        assert float(row["peak_mib"]) > 0
        assert row["mfu"] == ""
    assert float(step["gflop"]) == pytest.approx(model_flops(recipe_for("ister")).count / 1e9, rel=1e-4)
    # The backward pass is two products for each of the forward's, but for the input's own gradient.
    assert 2 < float(step["gflop"]) / float(forward["gflop"]) <= 3
    assert run(*command) == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["istr"], "no paper is called 'istr'; did you mean 'ister'", 1),
        ([], "zoo bench needs the name of a paper, for example: zoo bench ister", 2),
        (["ister", "--sizes", "8"], "zoo bench ister has no option --sizes", 2),
        (["layers", "--batch-size", "8"], "zoo bench has no option --batch-size", 2),
        (["ister", "--mesh", "data=3"], "needs 3 devices, which does not divide the 8 there are", 1),
        (["ister", "--output", "file"], "--output file cannot be written (File exists): choose another folder", 1),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert run("bench", *arguments) == code
    assert sentence in one_line(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
