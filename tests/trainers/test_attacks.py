"""Vital signs and falsified readings: what is injected, how records are dealt and scaled, and the stand-in."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.attacks import ATTACKS, inject_attacks, load_attacks, vital_signs, vitals_standin
from trainers.data.builders.measurements import PARAMETERS


def record(steps=20_000):
    return np.random.default_rng(0).normal([75, 97, 120], [10, 1, 15], (steps, 3))


def test_labels_are_where_readings_changed():
    clean = record()
    received, label = inject_attacks(clean, np.random.default_rng(1), severities=(0, 1, 2, 3))
    changed = (received != clean).any(axis=1)
    assert not np.any(changed & ~label)
    # What is labelled and unchanged is where a line begins, at zero.
    assert (label & ~changed).sum() < 0.05 * label.sum()
    assert ((received != clean).sum(axis=1) <= 1).all()
    chex.assert_trees_all_equal(clean, record())


def test_attacks_begin_at_one_sample_in_twenty():
    _, label = inject_attacks(record(100_000), np.random.default_rng(2), severities=(0,))
    length = np.mean([levels[0][1] for levels in ATTACKS.values()])
    # One draw takes an attack's length with probability 0.05, one sample otherwise.
    assert label.mean() == pytest.approx(0.05 * length / (0.05 * length + 0.95), rel=0.03)


def test_severity_is_the_size_and_the_length():
    clean = record(200_000)
    sizes = {}
    for severity in (0, 3):
        received, label = inject_attacks(clean, np.random.default_rng(3), severities=(severity,), rate=0.005)
        sizes[severity] = np.abs(received - clean).max() / clean.std(axis=0).max()
        lengths = np.diff(np.flatnonzero(np.diff(np.r_[False, label, False].astype(int))))[::2]
        expected = np.mean([levels[severity][1] for levels in ATTACKS.values()])
        assert np.mean(lengths) == pytest.approx(expected, rel=0.15)
    assert sizes[0] < 2.0
    assert 10 < sizes[3] < 20


def test_windows_are_labelled_scaled_and_weighed():
    data = load_attacks("standin/L4", data_dir=None, lookback=15)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [986 * n for n in (28, 6, 6)]
    batch = data.test.batch(np.arange(0, 986, 3))
    chex.assert_shape(batch["x"], (329, 15, 6))
    falsified = np.asarray(data.test.falsified)
    expected = [falsified[s : s + 15].any() for s in range(0, 986, 3)]
    chex.assert_trees_all_equal(np.asarray(batch["y"]) > 0.5, np.array(expected))
    physical = np.asarray(data.test.physical)
    chex.assert_trees_all_close(batch["received"], physical[14:1000:3][:329], atol=1e-6)
    chex.assert_trees_all_close(batch["change"], (physical[14:1000:3] - physical[13:999:3])[:329], atol=1e-4)
    labels = np.concatenate([data.train.batch(np.arange(i, i + 3451))["y"] for i in range(0, 27_608, 3451)])
    assert float(batch["positive_weight"][0]) == pytest.approx((labels == 0).sum() / labels.sum(), rel=1e-5)
    # Median 0 and interquartile range 1, as far as the attacks leave them.
    assert np.all(np.abs(np.median(data.train.scaled, axis=0)) < 0.1)
    # No window is of two records.
    assert set(np.asarray(data.test.starts) % 1000) == set(range(986))


def test_the_standin_is_the_same_everywhere_and_follows_the_heart():
    records = vitals_standin(0)
    assert (len(records), records[0].shape) == (40, (1000, 6))
    chex.assert_trees_all_equal(records[3], vitals_standin(0)[3])
    assert not np.allclose(records[3], vitals_standin(1)[3])
    correlation = np.corrcoef(np.concatenate(records).T)
    assert correlation[0, 2] > 0.9
    assert abs(correlation[0, 1]) < 0.2
    parts = load_attacks("standin", data_dir=None, lookback=15)
    chex.assert_trees_all_equal(parts.test.scaled, load_attacks("standin", data_dir=None, lookback=15).test.scaled)


def test_readings_of_a_stay_lie_on_an_hourly_grid():
    number = {name: PARAMETERS.index(name) for name in ("HR", "SaO2", "Temp", "NISysABP", "Weight")}
    lines = [
        (5, "HR", 70), (59, "HR", 80), (60, "HR", 90), (2880, "HR", 60),  # the last reading of an hour counts
        (100, "SaO2", -1), (130, "SaO2", 98),  # -1 is no reading
        (10, "Temp", 20), (500, "NISysABP", 120), (0, "Weight", 75),  # 20 degrees are a fault
    ]  # fmt: skip
    minute, parameter, value = (
        np.array(column) for column in zip(*((m, number[p], v) for m, p, v in lines), strict=True)
    )
    grid = vital_signs(minute, parameter, value.astype(np.float32))
    assert grid.shape == (48, 6)
    np.testing.assert_equal(grid[[0, 1, 47], 0], [80, 90, 60])
    assert grid[2, 1] == 98
    assert np.isnan(grid[:2, 1]).all()
    assert np.isnan(grid[:, 5]).all()
    assert grid[8, 2] == 120


def write_stays(folder, count):
    (folder / "set-a").mkdir()
    rows = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for record in range(1, count + 1):
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{record}"]
        for hour in range(0, 48, 2):
            readings = {"HR": 70 + hour % 5, "NISysABP": 120 + record, "NIDiasABP": 70, "Temp": 37}
            lines += [f"{hour:02}:30,{name},{value}" for name, value in readings.items()]
        (folder / "set-a" / f"{record}.txt").write_text("\n".join(lines) + "\n")
        rows.append(f"{record},1,1,5,-1,0")
    (folder / "outcomes.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


def test_stays_in_intensive_care(tmp_path):
    data = load_attacks("physionet2012/L1", data_dir=write_stays(tmp_path, 8), lookback=15)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [34 * n for n in (5, 1, 2)]
    batch = data.test.batch(jnp.arange(68))
    chex.assert_tree_all_finite(batch)
    # The hour without a reading holds the one before; what nobody measured has no range and stays 0 unless attacked.
    assert float(jnp.median(batch["received"][:, 3])) == 70.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("standin/L5", {}, "standin/L5: the severity of attacks is one of L1, L2, L3, L4, not 'L5'"),
        ("physionet2021", {}, "no set of vital signs is called 'physionet2021'; did you mean 'physionet2012'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated and takes no --data-dir"),
        (
            "standin",
            {"lookback": 2000},
            "a record of standin has 1000 samples: use a smaller --model.lookback than 2000",
        ),
    ],
)
def test_what_cannot_be_loaded(name, arguments, message):
    with pytest.raises(zoo.UserError, match=message):
        load_attacks(name, **{"data_dir": None, "lookback": 15} | arguments)


def test_too_few_stays(tmp_path):
    with pytest.raises(zoo.UserError, match="physionet2012 has 3 records, of which 15 % are too few"):
        load_attacks("physionet2012", data_dir=write_stays(tmp_path, 3), lookback=15)
