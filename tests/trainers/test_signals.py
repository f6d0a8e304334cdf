"""Signals: archives as they are divided, few labels, lengths that differ; the stand-ins and what they hide."""

import csv
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.console import Console

import zoo
from tests.splits import Rows
from trainers import datasets, predict
from trainers.compare import contenders
from trainers.data.signal_standins import STANDINS, ecg_records, eeg_windows, imu_standin
from trainers.data.signals import load_signals
from trainers.feed import split_report
from trainers.loop import prepare
from trainers.predict import predict_run
from trainers.recipe import recipe_for

QUIET = Console(quiet=True)
SIZES = {
    "genhar": {"length": 40, "channels": 6, "num_classes": 4},
    "eeg_spectral_priors": {"length": 64, "channels": 3, "num_classes": 2},
    "ecg_nat": {"length": 128, "channels": 2, "num_classes": 5},
}


def case(values, label):
    return ":".join(",".join(f"{v:g}" for v in channel) for channel in np.asarray(values).T) + f":{label}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive")
    header = "@problemName Toy\n@dimensions 2\n@classLabel true walk run\n@data\n"
    rng = np.random.default_rng(0)
    for part, count, lengths in (("TRAIN", 12, (5, 7)), ("TEST", 4, (4, 6))):
        lines = [case(rng.normal(size=(lengths[i % 2], 2)), ("walk", "run")[i % 3 == 0]) for i in range(count)]
        (path / f"Toy_{part}.ts").write_text(header + "\n".join(lines) + "\n")
    return str(path)


def load(folder, name="uea/Toy", **changes):
    sizes = {"length": 8, "channels": 2, "num_classes": 2, **changes}
    return load_signals(name, paper="genhar", data_dir=folder, **sizes)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_an_archive_keeps_its_test_cases_and_gives_a_fifth_of_each_class_to_validation(folder):
    data = load(folder)
    assert data.classes == ("run", "walk")
    # Of 4 runs the fifth is missing, so one is held out; of 8 walks the fifth.
    assert [len(part) for part in (data.train, data.valid, data.test)] == [10, 2, 4]
    assert sorted(np.asarray(data.valid.label)) == [0, 1]
    np.testing.assert_allclose(np.exp(data.train.prior), np.array([3.5, 7.5]) / 11, rtol=1e-6)
    assert data.test.label.tolist() == [0, 1, 1, 0]


def test_subjects_are_in_one_part_each(tmp_path):
    for subject in range(1, 24):
        np.save(tmp_path / f"feature_{subject:02}.npy", np.full((2, 6, 3), subject, np.float64))
    np.save(tmp_path / "label.npy", np.stack([np.arange(23) % 2, np.arange(1, 24)], axis=1))
    data = load(str(tmp_path), "apava", length=6, channels=3)
    found = {part: set(np.unique(getattr(data, part).x).astype(int)) for part in ("train", "valid", "test")}
    assert (found["valid"], found["test"]) == ({15, 16, 19, 20}, {1, 2, 17, 18})
    assert found["train"] == set(range(1, 24)) - found["valid"] - found["test"]
    assert len(data.train) == 30
    assert data.test.label.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    with pytest.raises(zoo.UserError, match=r"apava does not fit the model's length 5, .*: set --model\.length 6"):
        load(str(tmp_path), "apava", length=5, channels=3)


def test_lengths_that_differ_are_filled_up_and_masked(folder):
    batch = load(folder).test.batch(jnp.array([1, 0]))
    assert batch["mask"].sum(1).tolist() == [6, 4]
    assert batch["x"].shape == (2, 8, 2)
    assert not np.asarray(batch["x"])[~np.asarray(batch["mask"])].any()
    assert np.asarray(batch["x"])[np.asarray(batch["mask"])].all()
    assert "mask" not in load_signals("standin", paper="genhar", data_dir=None, **SIZES["genhar"]).test.batch(
        jnp.arange(2)
    )


def test_few_labels_keep_the_first_of_each_class(folder):
    whole, few = load(folder), load(folder, "uea/Toy@2")
    assert sorted(np.asarray(few.train.label)) == [0, 0, 1, 1]
    assert (len(few.valid), len(few.test)) == (2, 4)
    first = [np.flatnonzero(np.asarray(whole.train.label) == k)[:2] for k in (0, 1)]
    chex.assert_trees_all_equal(few.train.x, whole.train.x[np.sort(np.concatenate(first))])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("uea/Toy", {"length": 6}, "uea/Toy does not fit .*: set --model.length 7 --model.channels 2"),
        ("uea/Toy", {"num_classes": 3}, "does not fit the model's length 8, channels 2, num_classes 3"),
        ("uae/Toy", {}, "no set of signals is called 'uae/Toy'"),
        ("uea/Toy@0", {}, "--data uea/Toy@0 is no name of a set with a number of cases"),
        ("standin", {}, "the stand-in is generated and takes no --data-dir"),
    ],
)
def test_what_cannot_be_loaded(folder, name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load(folder, name, **changes)


def test_standins_say_what_they_have():
    with pytest.raises(zoo.UserError, match=r"stand-in of genhar has 4 num classes, not 3: set --model\.num-classes"):
        load_signals("standin", paper="genhar", data_dir=None, length=40, channels=6, num_classes=3)
    with pytest.raises(zoo.UserError, match="no stand-in of signals is of a paper 'genhra'; did you mean 'genhar'"):
        load_signals("standin/genhra", paper="genhar", data_dir=None, length=40, channels=6, num_classes=3)


@pytest.mark.parametrize("slug", STANDINS)
def test_a_standin_is_the_same_everywhere_and_its_parts_are_disjoint(slug):
    parts, again, other = (STANDINS[slug](seed, **SIZES[slug]) for seed in (0, 0, 1))
    assert parts.keys() == {"train", "valid", "test"}
    seen = set()
    for part, (x, label) in parts.items():
        assert x.shape[1:] == (SIZES[slug]["length"], SIZES[slug]["channels"])
        assert x.dtype == np.float32
        assert set(label) == set(range(SIZES[slug]["num_classes"]))
        assert np.bincount(label).min() >= 0.9 * np.bincount(label).max()
        chex.assert_trees_all_equal(parts[part], again[part])
        assert not np.allclose(x, other[part][0])
        rows = {row.tobytes() for row in x}
        assert len(rows) == len(x)
        assert not rows & seen
        seen |= rows


def test_the_other_domain_of_motion_is_turned_and_louder():
    parts = imu_standin(0, length=120, channels=6, num_classes=4)
    pull = {part: x[..., :3].mean(axis=(0, 1)) for part, (x, _) in parts.items()}
    assert np.linalg.norm(pull["train"]) == pytest.approx(9.8, rel=0.02)
    assert np.linalg.norm(pull["test"]) == pytest.approx(1.3 * 9.8, rel=0.02)
    cosine = pull["train"] @ pull["test"] / np.linalg.norm(pull["train"]) / np.linalg.norm(pull["test"])
    assert cosine < 0.9
    np.testing.assert_allclose(pull["valid"], pull["train"], atol=0.1)


def test_a_slowed_rhythm_moves_power_to_theta_and_phases_tell_nothing():
    x, label, subject = eeg_windows(np.random.default_rng(0), subjects=8, windows=60, length=256, channels=4)
    assert [set(label[subject == s]) for s in range(4)] == [{0}, {1}, {0}, {1}]
    power = np.abs(np.fft.rfft(x, axis=1)) ** 2
    theta = power[:, 4:8].sum((1, 2)) / power[:, 1:45].sum((1, 2))
    assert theta[label == 1].mean() > 1.5 * theta[label == 0].mean()
    means = np.abs([x[subject == s].mean(axis=0).std() / x[subject == s].std() for s in range(8)])
    assert means.max() < 0.25  # 60 windows of random phase average out


def test_hearts_differ_in_rhythm_and_shape():
    x, label = ecg_records(np.random.default_rng(0), 50, length=1000, leads=3)
    np.testing.assert_allclose(x.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=1), 1, rtol=1e-4)
    lead = x[..., 0] * np.sign(np.abs(x[..., 0]).max(axis=1, keepdims=True))
    peaks = (lead[:, 1:-1] > 2.5) & (lead[:, 1:-1] >= lead[:, :-2]) & (lead[:, 1:-1] > lead[:, 2:])
    beats = peaks.sum(axis=1)
    assert beats[label == 2].mean() < 0.75 * beats[label == 0].mean()


def test_a_comparison_is_on_the_stand_in_of_the_first():
    chosen = contenders(["genhar:tiny", "genhar:rotated"])
    assert {c.recipe.data for c in chosen} == {"standin/genhar"}
    assert datasets.data_of_all(zoo.paper("ister"), "standin") == "standin"
    assert datasets.data_of_all(zoo.paper("genhar"), "uea/BasicMotions") == "uea/BasicMotions"


def test_a_run_reports_what_is_no_mean_over_examples():
    run = prepare(recipe_for("genhar"))
    state = run.program.init()
    scores = split_report(run.program, state.variables, run.splits.test)
    assert {"accuracy", "macro_f1", "auroc", "prior/accuracy", "prior/macro_f1"} <= scores.keys()
    batch = run.splits.test.batch(jnp.arange(800))
    outputs = jax.jit(run.model.apply)(state.variables, batch)
    for name, value in run.paper.task.report(outputs, batch).items():
        assert scores[name] == pytest.approx(value, abs=1e-3)
    assert scores["prior/macro_f1"] == pytest.approx(0.1)  # one of four classes, always


def test_predictions_of_the_test_examples_are_written(tmp_path):
    recipe = recipe_for("genhar")
    paper = zoo.paper("genhar")
    model = paper.model(recipe.model)
    variables = jax.jit(model.init)(jax.random.key(0), paper.example(model.config, batch_size=1, key=jax.random.key(0)))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    zoo.save(tmp_path / "model.safetensors", model, variables)
    output = predict_run(epath.Path(tmp_path), data_dir=None, output=tmp_path / "out" / "classes.csv", console=QUIET)
    rows = list(csv.DictReader(output.read_text().splitlines()))
    label = np.asarray(datasets.load(paper, recipe).test.label)
    assert [int(row["class"]) for row in rows] == label.tolist()
    shares = np.array([[float(row[f"p({k})"]) for k in range(4)] for row in rows])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-3)
    assert [int(row["predicted"]) for row in rows[:50]] == shares[:50].argmax(1).tolist()
    assert output.with_suffix(".png").stat().st_size > 1000


def test_several_classes_of_an_example_are_all_written(tmp_path):
    label = jnp.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    rows = Rows({"x": 2.0 * label - 1.0, "label": label})
    data = types.SimpleNamespace(test=rows, classes=("a", "b", "c"))
    model = types.SimpleNamespace(apply=lambda variables, batch: batch["x"].at[2, 0].set(3.0))
    output = predict._classes(model, {}, data, tmp_path / "classes.csv", 8, QUIET)
    lines = [line.split(",")[:3] for line in output.read_text().splitlines()]
    assert lines == [["example", "class", "predicted"], ["0", "a c", "a c"], ["1", "b", "b"], ["2", "", "a"]]
    assert output.with_suffix(".png").stat().st_size > 1000
