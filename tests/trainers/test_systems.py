"""Systems of a known graph: the generators' equations, windows that stay within trajectories, names and errors."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.systems import generate_lorenz96, generate_mixed_physics, generate_var, load_system


def test_an_autoregression_follows_its_graph():
    system = generate_var(0, steps=4_000)
    assert system.series.shape == (4_000, 10)
    chex.assert_trees_all_equal(system.graph.sum(axis=1), np.full(10, 3))
    assert np.all(np.diag(system.graph) == 1)
    past = np.concatenate([system.series[i : 4_000 - 3 + i] for i in range(3)], axis=1)
    fitted = np.linalg.lstsq(past, system.series[3:], rcond=None)[0].T.reshape(10, 3, 10).mean(axis=1)
    parents, others = fitted[system.graph == 1], fitted[system.graph == 0]
    assert parents.min() > others.max() + 0.03
    residual = system.series[3:] - past @ np.linalg.lstsq(past, system.series[3:], rcond=None)[0]
    assert residual.std() == pytest.approx(0.1, rel=0.05)


def test_lorenz96_follows_its_equation():
    system = generate_lorenz96(0, noise=0.0, step=0.01)
    x = system.series
    slope = (x[2:] - x[:-2]) / 0.02
    at = x[1:-1]
    expected = (np.roll(at, -1, axis=1) - np.roll(at, 2, axis=1)) * np.roll(at, 1, axis=1) - at + 10
    np.testing.assert_allclose(slope, expected, atol=0.02 * np.abs(expected).max())
    # Row 4 is the target, its columns the sources: 2, 3, itself and 5.
    chex.assert_trees_all_equal(np.flatnonzero(system.graph[4]), np.array([2, 3, 4, 5]))
    assert system.graph.sum() == 40


def test_mixed_causes_move_the_mean_or_the_variance():
    system = generate_mixed_physics(0, variance_share=0.5, steps=40_000, variance_weight=(0.2, 0.3))
    off = ~np.eye(10, dtype=bool)
    kinds = [(system.graph[off] == kind).sum() for kind in (0, 1, 2)]
    assert kinds == [63, 13, 14]
    before, now = system.series[:-3], system.series[3:]
    fitted = np.linalg.lstsq(before, now, rcond=None)[0].T
    assert np.all(np.abs(fitted[(system.graph == 1) & off]) > 0.3)
    assert np.all(np.abs(fitted[(system.graph != 1) & off]) < 0.15)
    chex.assert_trees_all_close(np.diag(fitted), np.full(10, 0.4), atol=0.15)
    all_mean = generate_mixed_physics(0, variance_share=0.0)
    assert set(all_mean.graph[off]) == {0, 1}
    assert np.abs(generate_mixed_physics(0, variance_share=1.0).series).max() == 50


def test_generated_systems_are_the_same_everywhere():
    for name, generate in (("standin", generate_var), ("standin/lorenz96", generate_lorenz96)):
        data = load_system(name, data_dir=None, lookback=3, seed=4)
        values = generate(4).series
        chex.assert_trees_all_close(data.train.values, (values - values.mean(0)) / values.std(0), atol=2e-3)
        assert data.train is data.valid is data.test
        assert len(data.train) == 497
    assert not np.allclose(generate_var(0).series, generate_var(1).series)


def test_a_batch_is_a_past_the_next_step_and_the_graph():
    data = load_system("standin", data_dir=None, lookback=3).train
    batch = data.batch(jnp.array([0, 496]))
    chex.assert_shape((batch["x"], batch["y"], batch["graph"]), ((2, 3, 10), (2, 10), (2, 10, 10)))
    chex.assert_trees_all_equal(batch["x"][1], data.values[496:499])
    chex.assert_trees_all_equal(batch["y"][1], data.values[499])


def write_systems(folder):
    rng = np.random.default_rng(0)
    np.savez(folder / "sim3_subject_0.npz", X_np=rng.normal(size=(4, 30)), Gref=np.eye(4))
    return str(folder)


def write_dream3(folder):
    series = np.random.default_rng(0).normal(size=(4 * 21, 10)).astype(np.float32)
    np.savez(folder / "Size10Ecoli1.npz", TsData=series)
    (folder / "InSilicoSize10-Ecoli1.tsv").write_text("G2\tG5\t+\n")
    return str(folder)


def test_windows_stay_within_a_trajectory_unless_joined(tmp_path):
    folder = write_dream3(tmp_path)
    data = load_system("dream3/Size10Ecoli1", data_dir=folder, lookback=5).train
    assert len(data) == 4 * 16
    assert set(np.asarray(data.starts) % 21) == set(range(16))
    assert len(load_system("dream3/Size10Ecoli1/joined", data_dir=folder, lookback=5).train) == 4 * 21 - 5
    assert int(data.graph[4, 1]) == 1  # from gene 2 to gene 5: row is the target
    assert int(data.graph.sum()) == 1


def test_gaps_are_filled_along_lines(tmp_path):
    series = np.arange(20.0)[:, None] * np.array([1.0, -2.0])
    series[[0, 7, 8, 19], 1] = np.nan
    np.save(tmp_path / "data.npy", series)
    np.save(tmp_path / "graph.npy", np.ones((2, 2)))
    values = load_system("causal_air_quality", data_dir=str(tmp_path), lookback=2).train.values
    chex.assert_trees_all_close(np.diff(values[1:19, 1]), np.full(17, values[2, 1] - values[1, 1]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("netsin/sim3", {}, "no system of a known graph is called 'netsin/sim3'"),
        ("standin", {"data_dir": "somewhere"}, "standin is generated and takes no --data-dir"),
        ("netsim/sim3_subject_9", {}, "netsim has no system 'sim3_subject_9'; did you mean 'sim3_subject_0'"),
        ("netsim", {}, "netsim has no system ''; known: sim3_subject_0"),
        ("netsim/sim3_subject_0", {"lookback": 30}, "has 30 steps: use a smaller --model.lookback than 30"),
        ("dream3/Size10Ecoli1/apart", {}, "after the network only 'joined' may stand"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, name, arguments, message):
    arguments = {"data_dir": write_systems(tmp_path), "lookback": 3} | arguments
    with pytest.raises(zoo.UserError, match=message):
        load_system(name, **arguments)
