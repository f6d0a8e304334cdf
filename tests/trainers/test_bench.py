"""`zoo bench layers` and `zoo bench backbones`: rows, csv, plot, and what they say of bad input."""

import csv

import jax
import numpy as np
import pytest

import zoo
from trainers.cli import main
from trainers.layer_bench import CASES
from trainers.measure import Limits, slope
from zoo.registry import variable_shapes


def test_a_line_a_measurement_in_the_csv_and_a_plot(tmp_path, capsys):
    main(["bench", "layers", "--only", "dot_attention", "--sizes", "16", "64", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "dot_attention" in printed
    assert "GFLOP/s" in printed
    (table,) = tmp_path.glob("layers-*.csv")
    (picture,) = tmp_path.glob("layers-*.png")
    assert picture.stat().st_size > 10_000
    rows = list(csv.DictReader(table.open()))
    assert [(r["primitive"], r["pass"], r["length"]) for r in rows] == [
        ("dot_attention", direction, length) for direction in ("forward", "forward+backward") for length in ("16", "64")
    ]
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert float(row["compile_s"]) > 0
        # Three inputs and one result of 4 * 64 channels at least.
        assert float(row["peak_mib"]) >= 4 * int(row["length"]) * 256 * 4 / 2**20
        assert float(row["slope"])


def test_lengths_that_would_take_too_long_are_named_and_left_out(tmp_path, capsys):
    main(
        [
            "bench",
            "layers",
            "--only",
            "dot_attention",
            "--sizes",
            "8",
            "16",
            "--seconds",
            "0",
            "--output",
            str(tmp_path),
        ]
    )
    assert "16  left out: about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "dot_atention"], "no such primitive is measured; did you mean 'dot_attention'"),
        (["--sizes", "1"], "must be lengths of at least 2 tokens"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "layers", *arguments, "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert sentence in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "layers", "--only", "dot_attention", "--output", str(path)])
    assert stop.value.code == 1
    assert "choose another folder" in capsys.readouterr().err


def test_the_slope_is_the_exponent():
    sizes = np.array([10, 100, 1000])
    assert slope(sizes, 3e-6 * sizes**1.5) == pytest.approx(1.5)


def test_the_limit_is_the_slower_of_arithmetic_and_memory():
    limits = Limits(flops=100.0, bytes=10.0)
    assert limits.seconds(flops=1000, bytes=10) == 10
    assert limits.seconds(flops=10, bytes=1000) == 100


def test_what_the_equation_costs_grows_as_the_case_says():
    for name, case in CASES.items():
        if case.flops:
            assert case.flops(2048) == case.flops(1024) * (2 if case.linear else 4), name


def test_backbones_are_timed_forward_and_with_gradients(tmp_path, capsys):
    command = ["bench", "backbones", "--only", "llama", "--length", "5", "--batch-size", "3", "--output", str(tmp_path)]
    main(command)
    (table,) = tmp_path.iterdir()
    printed = capsys.readouterr().out
    assert f"wrote {table}" in printed
    rows = list(csv.DictReader(table.open()))
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    shapes = variable_shapes(zoo.backbone("llama"), zoo.create("backbone_llama", "tiny"))
    for row in rows:
        assert (row["backbone"], row["config"], row["inputs"]) == ("llama", "tiny", "input_ids 3x5")
        assert int(row["parameters"]) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert float(row["gflop_per_s"]) == pytest.approx(
            float(row["gflop"]) / float(row["median_ms"]) * 1e3, rel=2e-2, abs=1e-2
        )
    # The backward pass is two products for each of the forward's.
    assert float(rows[1]["gflop"]) / float(rows[0]["gflop"]) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "lama"], "no backbone is called 'lama'; did you mean 'llama'"),
        (["--only", "resnet:resnet5"], "backbone_resnet has no config 'resnet5'; did you mean 'resnet50'"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--only", "bert", "--length", "99"], "bert tiny does not take these inputs: texts of 99 tokens are longer"),
        (["--length", "0"], "--length 0 must be at least 1"),
        (["--output", "file"], "--output file cannot be written (File exists): choose another folder"),
    ],
)
def test_bad_input_for_backbones_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "backbones", *arguments])
    assert stop.value.code == 1
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
