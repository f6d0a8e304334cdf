"""Windows of telemetry with labelled anomalies, windows with gaps, and what is made of their scores."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.imputation import load_imputation
from trainers.data.telemetry import load_telemetry, telemetry_standin
from zoo.tasks import imputation, reconstruction


def write_channels(folder):
    """Two channels of one spacecraft and one of another."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        (folder / part).mkdir()
        for channel, columns in (("A-1", 3), ("B-2", 3), ("M-1", 4)):
            np.save(folder / part / f"{channel}.npy", rng.normal(5, 2, (50, columns)))
    rows = ["chan_id,spacecraft,anomaly_sequences,class,num_values"]
    rows += ['A-1,SMAP,"[[10, 14], [45, 49]]",point,50', 'B-2,SMAP,"[[0, 4]]",point,50', 'M-1,MSL,"[[3, 5]]",point,50']
    (folder / "labeled_anomalies.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


def test_channels_of_a_spacecraft_make_a_set_and_no_window_is_of_two(tmp_path):
    data = load_telemetry("smap_msl/SMAP", data_dir=write_channels(tmp_path), lookback=10)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [2 * 31, 2, 2 * 5]
    rows = np.concatenate([data.train.values, data.valid.values])
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(axis=0), 1, atol=1e-5)
    assert set(np.asarray(data.train.starts)) == {*range(31), *range(40, 71)}
    # The anomalies that meet where one channel ends and the next begins are two.
    assert data.test.anomalies == 3
    batch = data.test.batch(jnp.arange(10))
    chex.assert_trees_all_equal(batch["segment"].sum(axis=1), jnp.array([0, 5, 0, 0, 10, 15, 0, 0, 0, 0]))
    chex.assert_trees_all_equal(batch["touched"].sum(axis=0), jnp.array([1, 1, 1]))
    assert not np.any(data.train.batch(jnp.arange(62))["segment"])


def test_in_the_standin_only_togetherness_tells():
    train, test, anomaly = telemetry_standin(0)
    assert (train.shape, test.shape) == ((4000, 7), (4000, 7))
    assert 0.05 < anomaly.mean() < 0.15
    assert np.all(np.abs(test[anomaly]).max(axis=0) < np.abs(train).max(axis=0) + 0.5)
    # Three waves: what a row has beside its three main directions is noise, but in an anomaly.
    _, _, directions = np.linalg.svd(train - train.mean(0), full_matrices=False)
    rest = (test - train.mean(0)) @ directions[3:].T
    power = np.square(rest).sum(axis=1)
    assert np.median(power[anomaly]) > 10 * np.median(power[~anomaly])
    chex.assert_trees_all_equal(telemetry_standin(0)[1], test)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated and takes no --data-dir"),
        ("smap", {}, "no set of telemetry is called 'smap'; did you mean 'smap_msl'"),
        ("smap_msl", {}, "smap_msl is a collection without '': choose one of smap_msl/SMAP, smap_msl/MSL"),
        ("smap_msl/MSL", {"lookback": 60}, "no recording of smap_msl/MSL has 60 rows in its train part"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, name, arguments, message):
    with pytest.raises(zoo.UserError, match=message):
        load_telemetry(name, **{"data_dir": write_channels(tmp_path), "lookback": 10} | arguments)


def summary(scores, segment):
    """Of steps with these scores, in windows of ten."""
    x = jnp.zeros((len(scores) // 10, 10, 2))
    rebuilt = jnp.sqrt(jnp.asarray(scores, jnp.float32).reshape(-1, 10, 1)) * jnp.ones(2)
    segment = jnp.asarray(segment, jnp.int32).reshape(-1, 10)
    touched = (segment[:, :, None] == jnp.arange(1, int(segment.max()) + 1)).any(axis=1)
    found = reconstruction.metrics(rebuilt, {"x": x, "segment": segment, "touched": touched})
    totals = {name: np.asarray(value).sum(axis=0) for name, value in found.items()}
    return reconstruction.summarise(totals | {"examples": len(x)}, None)


def test_a_hit_counts_for_a_whole_anomaly_only_where_it_is_adjusted():
    rng = np.random.default_rng(0)
    scores, segment = rng.uniform(0.1, 0.2, 1000), np.zeros(1000, int)
    segment[100:120], segment[500:510] = 1, 2
    scores[105:110] = 50.0  # a quarter of the first anomaly, none of the second
    found = summary(scores, segment)
    assert found["sensitivity"] == pytest.approx(5 / 30)
    assert found["precision"] == 1.0
    assert found["adjusted_sensitivity"] == pytest.approx(20 / 30)
    assert found["adjusted_f1"] == pytest.approx(2 * 20 / (2 * 20 + 10))
    assert found["mse"] == pytest.approx(scores.mean(), rel=1e-3)
    assert 0.5 < found["auroc"] < 0.7


def test_at_most_one_step_in_a_hundred_raises_an_alarm():
    scores = np.logspace(-3, 3, 2000)
    segment = np.zeros(2000, int)
    segment[-40:] = 1
    found = summary(np.random.default_rng(1).permutation(scores[:1960]).tolist() + scores[1960:].tolist(), segment)
    alarms = found["sensitivity"] * 40 / found["precision"]
    assert 10 < alarms <= 20
    assert found["auroc"] > 0.999
    assert set(summary(scores, np.zeros(2000, int))) == {"mse"}


def test_gaps_are_the_same_in_every_epoch_and_differ_between_windows():
    data = load_imputation("standin", data_dir=None, lookback=24, hidden_share=0.375)
    batch = jax.jit(lambda i: data.train.batch(i))(jnp.arange(64))
    chex.assert_trees_all_equal(batch, data.train.batch(np.arange(64)))
    assert float(batch["mask"].mean()) == pytest.approx(1 - 0.375, abs=0.02)
    chex.assert_trees_all_equal(batch["x"], jnp.where(batch["mask"], batch["y"], 0.0))
    assert not np.array_equal(batch["mask"][0, 1:], batch["mask"][1, :-1])
    assert not np.array_equal(batch["mask"], data.test.batch(jnp.arange(64))["mask"])
    with pytest.raises(zoo.UserError, match=r"--model.hidden-share 1.0 leaves nothing to fill or to see"):
        load_imputation("standin", data_dir=None, lookback=24, hidden_share=1.0)


def test_gaps_are_filled_along_lines_and_only_they_are_scored():
    y = jnp.arange(12.0)[None, :, None] * jnp.array([1.0, -2.0])
    mask = jnp.ones(y.shape, bool).at[0, [3, 4, 8], 0].set(False).at[0, [0, 11], 1].set(False)
    batch = {"x": jnp.where(mask, y, 0.0), "mask": mask, "y": y}
    filled = imputation.interpolate(batch)
    chex.assert_trees_all_close(filled[..., 0], y[..., 0], atol=1e-3)
    chex.assert_trees_all_close(
        filled[0, [0, 11], 1], y[0, [1, 10], 1], atol=1e-3
    )  # beyond the last one seen: its value
    scores = imputation.metrics(jnp.where(mask, 99.0, y + 2.0), batch)
    assert (float(scores["mse"][0]), float(scores["mae"][0])) == (4.0, 2.0)
    mean = imputation.mean_of_seen(batch)
    assert float(mean[0, 3, 0]) == pytest.approx(float(y[0, [0, 1, 2, 5, 6, 7, 9, 10, 11], 0].mean()))
    nothing = batch | {"mask": jnp.zeros_like(mask), "x": jnp.zeros_like(y)}
    chex.assert_tree_all_finite(imputation.interpolate(nothing))
