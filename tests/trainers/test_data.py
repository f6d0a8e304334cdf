"""Forecasting data: the protocol's numbers, the original files, and what is wrong with a bad one."""

import csv
import gzip
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data import DATASETS, load_forecasting
from trainers.data.forecasting import calendar_marks, load_series, split_borders
from trainers.data.standins import forecasting_standin

ETT = DATASETS["ett_h1"]
ROWS = 14_400  # the least that the protocol needs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path / "cache"))


def ett_rows(rows: int) -> list[list[str]]:
    rng = np.random.default_rng(0)
    hours = np.datetime64("2016-07-01T00:00:00") + np.arange(rows) * np.timedelta64(1, "h")
    numbers = rng.normal(5, 2, (rows, 7))
    header = ["date", *ETT.columns]
    return [
        header,
        *([str(t).replace("T", " "), *(f"{x:.6f}" for x in row)] for t, row in zip(hours, numbers, strict=True)),
    ]


def write(path, rows) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def whole() -> list[list[str]]:
    return ett_rows(17_420)


@pytest.mark.parametrize("name", ["ETTh1.csv", "ETTh1.csv.gz"])
def test_ett_follows_the_protocol(whole, tmp_path, name):
    write(tmp_path / name, whole)
    data = load_forecasting("ett_h1", data_dir=str(tmp_path), lookback=96, horizon=96)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [8449, 2785, 2785]
    values = np.array([[float(x) for x in row[1:]] for row in whole[1:]])
    train = values[:8640]
    scaled = ((values - train.mean(0)) / train.std(0)).astype(np.float32)
    first_valid = data.valid.batch(jnp.array([0]))
    chex.assert_trees_all_close(first_valid["y"][0], scaled[8640 : 8640 + 96], atol=1e-6)
    chex.assert_trees_all_close(first_valid["x"][0], scaled[8640 - 96 : 8640], atol=1e-6)
    last_test = data.test.batch(jnp.array([len(data.test) - 1]))
    chex.assert_trees_all_close(last_test["y"][0], scaled[14_400 - 96 : 14_400], atol=1e-6)
    chex.assert_trees_all_close(data.unscale(scaled[:3]), values[:3], atol=1e-5)
    assert str(data.future_times()[0]) == "2018-06-26T20:00:00"


def test_an_edited_file_is_read_again(whole, tmp_path):
    write(tmp_path / "ETTh1.csv", whole)
    before = load_series("ett_h1", str(tmp_path))
    edited = [whole[0], [whole[1][0], "123.5", *whole[1][2:]], *whole[2:]]
    write(tmp_path / "ETTh1.csv", edited)
    after = load_series("ett_h1", str(tmp_path))
    assert after.values[0, 0] == 123.5
    assert before.values[0, 0] != 123.5
    chex.assert_trees_all_equal(before.values[1:], after.values[1:])


def test_other_sets_are_split_by_shares(tmp_path):
    rng = np.random.default_rng(1)
    write(tmp_path / "exchange_rate.txt.gz", [[f"{x:.6f}" for x in row] for row in rng.normal(size=(1003, 8))])
    data = load_forecasting("exchange_rate", data_dir=str(tmp_path), lookback=20, horizon=10)
    # 702 training rows, 200 test rows, 101 between.
    assert [len(s) for s in (data.train, data.valid, data.test)] == [702 - 29, 101 - 9, 200 - 9]
    assert data.train.marks is None
    assert "x_mark" not in data.train.batch(jnp.arange(2))
    chex.assert_trees_all_equal(data.future_times()[:2], np.array([1003, 1004]))


def test_weekly_set_with_its_own_columns(tmp_path):
    facts = DATASETS["illness"]
    weeks = np.datetime64("2002-01-01T00:00:00") + np.arange(200) * np.timedelta64(7, "D")
    rows = [[str(t).replace("T", " "), *(str(i + j) for j in range(7))] for i, t in enumerate(weeks)]
    write(tmp_path / "national_illness.csv", [["date", *facts.columns], *rows])
    data = load_forecasting("illness", data_dir=str(tmp_path), lookback=12, horizon=6)
    assert data.train.marks.shape == (200, 2)


def test_calendar_features_of_known_moments():
    times = np.array(["2016-07-01T00:00:00", "2017-12-31T23:45:00", "2020-02-29T12:30:00"], "datetime64[s]")
    # A Friday, a Sunday, and the Saturday of a leap day.
    expected = np.array(
        [
            [0 / 59, 0 / 23, 4 / 6, 0 / 30, 182 / 365],
            [45 / 59, 23 / 23, 6 / 6, 30 / 30, 364 / 365],
            [30 / 59, 12 / 23, 5 / 6, 28 / 30, 59 / 365],
        ]
    )
    chex.assert_trees_all_close(calendar_marks(times, "quarter_hour"), (expected - 0.5).astype(np.float32), atol=1e-6)
    chex.assert_trees_all_close(calendar_marks(times, "hour"), (expected[:, 1:] - 0.5).astype(np.float32), atol=1e-6)
    weeks = np.array([26, 52, 9])  # ISO
    found = calendar_marks(times, "week")[:, 1]
    chex.assert_trees_all_close(found, ((weeks - 1) / 52 - 0.5).astype(np.float32), atol=1e-6)


def test_iso_weeks_around_new_year_agree_with_the_standard_library():
    days = np.arange(np.datetime64("2014-12-20"), np.datetime64("2022-01-20"))
    expected = [(day.isocalendar().week - 1) / 52 - 0.5 for day in days.tolist()]
    found = calendar_marks(days.astype("datetime64[s]"), "week")[:, 1]
    chex.assert_trees_all_close(found, np.asarray(expected, np.float32), atol=1e-6)


def test_batches_are_the_windows():
    data = load_forecasting("standin", data_dir=None, lookback=10, horizon=4)
    indices = jnp.array([3, 0, len(data.valid) - 1])
    batch = jax.jit(lambda split, i: split.batch(i))(data.valid, indices)
    for row, index in enumerate(np.asarray(indices)):
        start = int(data.valid.starts[index])
        chex.assert_trees_all_equal(batch["x"][row], data.valid.values[start : start + 10])
        chex.assert_trees_all_equal(batch["y"][row], data.valid.values[start + 10 : start + 14])
        chex.assert_trees_all_equal(batch["x_mark"][row], data.valid.marks[start : start + 10])


def test_the_standin_is_the_same_everywhere():
    values = forecasting_standin(0).values
    assert values.shape == (2000, 7)
    chex.assert_trees_all_close(values[[0, 1, 1999], [0, 3, 6]], np.array(STANDIN_NUMBERS), atol=1e-12)
    assert not np.array_equal(values, forecasting_standin(1).values)


STANDIN_NUMBERS = [-1.0329163289278265, -0.43479570719284744, -1.2708413772193132]


def test_the_standin_can_be_learnt_and_its_lags_are_there():
    series = forecasting_standin(3)
    change = series.values[24:] - series.values[:-24]
    daily = np.mean(np.square(change))  # what repeating the value of a day ago is wrong by
    naive = np.mean(np.square(series.values[12:] - series.values[:-12]))  # half a day ahead, repeating the last
    assert daily < 0.2 * naive
    for copy, (source, lag) in {5: (0, 3), 6: (1, 7)}.items():
        difference = series.values[lag:, copy] - series.values[:-lag, source]
        assert np.std(difference) == pytest.approx(0.1 * np.sqrt(2), rel=0.1)


def test_a_constant_column_stays_finite(tmp_path):
    rows = [[f"{x:.3f}" for x in row] for row in np.random.default_rng(0).normal(size=(300, 8))]
    write(tmp_path / "exchange_rate.txt", [["1.0", *row[1:]] for row in rows])
    data = load_forecasting("exchange_rate", data_dir=str(tmp_path), lookback=10, horizon=5)
    chex.assert_tree_all_finite(data.train.values)


def test_windows_longer_than_a_part_are_refused():
    with pytest.raises(zoo.UserError, match=r"a window of 96 \+ 720 rows is longer than the valid part of standin"):
        load_forecasting("standin", data_dir=None, lookback=96, horizon=720)


def test_too_few_rows_for_the_protocol():
    with pytest.raises(zoo.UserError, match=r"ETTh1\.csv has 100 rows, its protocol needs 14400"):
        split_borders(100, ETT, 96)


def changed(rows, line, column, cell):
    copy = [list(row) for row in rows]
    copy[line][column] = cell
    return copy


SMALL = ett_rows(6)
BAD_FILES = {
    "a missing column": ([row[:3] + row[4:] for row in SMALL], r"has no column 'MUFL'; its columns are date, HUFL"),
    "an unknown column": ([[*row, "x"] for row in SMALL], r"columns that the set does not have: 'x'"),
    "a column twice": ([[*row, row[1]] for row in SMALL], r"has a column twice"),
    "no rows": (SMALL[:1], r"holds no rows"),
    "nothing at all": ([], r"has no column 'date'"),
    "a short row": ([*SMALL[:3], SMALL[3][:5], *SMALL[4:]], r"line 4: 5 cells instead of 8"),
    "a word": (changed(SMALL, 2, 3, "n/a"), r"line 3, column 'MUFL': 'n/a' is not a number"),
    "an empty cell": (changed(SMALL, 2, 7, ""), r"line 3, column 'OT': '' is not a number"),
    "a NaN": (changed(SMALL, 5, 1, "nan"), r"line 6, column 'HUFL': 'nan' is not a number; fill or remove"),
    "an infinity": (changed(SMALL, 5, 1, "inf"), r"line 6, column 'HUFL'"),
    "no date": (changed(SMALL, 4, 0, "yesterday"), r"line 5: 'yesterday' is not a date like"),
    "time going back": (changed(SMALL, 4, 0, "2016-07-01 01:00:00"), r"line 5: the date .* does not come after"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(name, tmp_path):
    rows, message = BAD_FILES[name]
    write(tmp_path / "ETTh1.csv", rows)
    with pytest.raises(zoo.UserError, match=message) as caught:
        load_series("ett_h1", str(tmp_path))
    assert "ETTh1.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_archive(tmp_path):
    write(tmp_path / "ETTh1.csv.gz", SMALL)
    path = tmp_path / "ETTh1.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(zoo.UserError, match="is damaged, it cannot be unpacked"):
        load_series("ett_h1", str(tmp_path))


def test_a_folder_without_the_file(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(zoo.UserError, match=r"holds none of ETTh1\.csv, ETTh1\.csv\.gz .*; it holds notes\.txt"):
        load_series("ett_h1", str(tmp_path))
    with pytest.raises(zoo.UserError, match=r"is not a folder: give the one that holds ETTh1\.csv"):
        load_series("ett_h1", str(tmp_path / "nowhere"))


def test_without_a_network_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(zoo.UserError, match=r"cannot be downloaded from https://.*ETTm2\.csv .*--data-dir"):
        load_series("ett_m2", None)


def test_downloads_from_the_original_home_and_keeps_the_copy(whole, monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    write(tmp_path / "fetched.csv", whole)
    asked = []
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download", lambda _, url: asked.append(url) or tmp_path / "fetched.csv"
    )
    first = load_series("ett_h1", None)
    (tmp_path / "fetched.csv").unlink()
    again = load_series("ett_h1", None)
    assert asked == [*ETT.urls]
    assert ETT.urls[0].startswith("https://raw.githubusercontent.com/zhouhaoyi/ETDataset/")
    chex.assert_trees_all_equal(first.values, again.values)
    chex.assert_trees_all_equal(first.times, again.times)


def test_names_are_answered_by_the_closest():
    with pytest.raises(zoo.UserError, match=r"no forecasting data set is called 'ett_h3'; did you mean 'ett_h"):
        load_forecasting("ett_h3", data_dir=None, lookback=9, horizon=9)
    with pytest.raises(zoo.UserError, match="takes no --data-dir"):
        load_forecasting("standin", data_dir="somewhere", lookback=9, horizon=9)
