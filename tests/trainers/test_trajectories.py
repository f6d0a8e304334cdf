"""Windows of recordings with many agents, centred on one of them; and the stand-in for them."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.standins import trajectory_standin
from trainers.data.trajectories import load_trajectories, scene_windows

SIZES = {"lookback": 3, "horizon": 2, "num_agents": 3}


def recording(tracks):
    """Rows of observations: `tracks` has, for each agent, its first frame and its positions."""
    rows = [(10 * (first + i), 7 * name, *p) for name, (first, track) in tracks.items() for i, p in enumerate(track)]
    rows.sort()
    frame, agent, x, y = np.array(rows, np.float64).T
    return frame.astype(np.int32) + 780, agent.astype(np.int32), np.stack([x, y], axis=1).astype(np.float32)


def line(start, step, count):
    return [(start[0] + step[0] * i, start[1] + step[1] * i) for i in range(count)]


TRACKS = {
    1: (0, line((0, 0), (1, 0), 6)),  # two windows
    2: (0, line((0, 9), (1, 0), 3)),  # seen in the first past only
    3: (1, line((0, 2), (1, 0), 5)),  # one window; not in all of the first past
    4: (0, line((0, 4), (1, 0), 4)),  # in both pasts
}


def test_windows_hold_the_ego_and_those_seen_with_it():
    first, windows = scene_windows(*recording(TRACKS), **SIZES)
    chex.assert_trees_all_equal(first, np.array([0, 1, 1]))
    chex.assert_trees_all_equal(windows.present, jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 1]], bool))
    # The nearest comes first: agents 4 and 2; then 3 and 4; from agent 3, that is 1 and 4 (equally near).
    last = np.asarray(windows.past[:, -1, :, 1])
    chex.assert_trees_all_equal(last, np.array([[0.0, 4.0, 9.0], [0.0, 2.0, 4.0], [2.0, 0.0, 4.0]], np.float32))
    chex.assert_trees_all_equal(windows.future[:, :, 0], jnp.array([[3.0, 4.0], [4.0, 5.0], [3.0, 4.0]]))


def test_places_without_agents_are_masked():
    _, windows = scene_windows(*recording({1: TRACKS[1], 2: TRACKS[2]}), **SIZES)
    chex.assert_trees_all_equal(windows.present, jnp.array([[1, 1, 0], [1, 0, 0]], bool))
    chex.assert_trees_all_equal(windows.past[:, :, 2], jnp.zeros((2, 3, 2)))


def test_batches_are_centred_on_the_ego():
    _, windows = scene_windows(*recording({1: TRACKS[1], 2: TRACKS[2]}), **SIZES)
    batch = windows.batch(jnp.array([1, 0]))
    chex.assert_trees_all_equal(batch["x"][:, :, 0, 0], jnp.array([[-2.0, -1.0, 0.0]] * 2))
    chex.assert_trees_all_equal(batch["y"][:, :, 0], jnp.array([[1.0, 2.0]] * 2))
    # As officially: an absent agent stands where the recording's origin is, seen from the ego.
    chex.assert_trees_all_equal(batch["x"][0, 0, 2], jnp.array([-3.0, 0.0]))


def test_frames_of_another_rate_are_refused():
    frame, agent, position = recording(TRACKS)
    with pytest.raises(zoo.UserError, match="do not advance by 10"):
        scene_windows(frame + (frame == frame.max()), agent, position, **SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recordings; in each, one agent walks through all of it, a frame a row."""
    path = tmp_path_factory.mktemp("pedestrians")
    for name, frames in (("biwi_eth", 12), ("crowds_zara03", 40)):
        frame, agent, position = recording({1: (0, line((0, 0), (1, 0.5), frames))})
        rows = zip(frame, agent, position, strict=True)
        (path / f"{name}.txt").write_text("".join(f"{f}\t{a}\t{p[0]}\t{p[1]}\n" for f, a, p in rows))
    return str(path)


def test_one_scene_is_left_out_and_no_window_lies_across_the_border(folder):
    data = load_trajectories("eth_ucy/eth", data_dir=folder, lookback=2, horizon=1, num_agents=4)
    assert [len(part) for part in (data.test, data.train, data.valid)] == [10, 34, 2]
    assert float(data.train.future[:, -1, 0].max()) == 35.0  # the frames 36 to 39 are the last tenth
    assert float(data.valid.past[:, 0, 0, 0].min()) == 36.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eth_ucy/etf", {}, "no set of trajectories is called 'eth_ucy/etf'; did you mean 'eth_ucy/eth'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("eth_ucy/hotel", {}, "leave nothing for the test part of eth_ucy/hotel: it is tested on biwi_hotel"),
        ("eth_ucy/eth", {"horizon": 30}, "no agent of a recording is seen for 2 [+] 30 frames"),
    ],
)
def test_what_cannot_be_loaded(folder, name, arguments, message):
    arguments = {"data_dir": folder, "lookback": 2, "horizon": 1, "num_agents": 4} | arguments
    with pytest.raises(zoo.UserError, match=message):
        load_trajectories(name, **arguments)


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct():
    sizes = {"lookback": 4, "horizon": 6, "num_agents": 4}
    past, present, future = trajectory_standin(0, **sizes)
    assert past.shape == (5000, 4, 4, 2)
    chex.assert_trees_all_close(future[[0, 4999], -1], np.array(STANDIN_NUMBERS, np.float32), atol=1e-5)
    assert 0.79 < present[:, 1:].mean() < 0.81
    assert not np.allclose(future, trajectory_standin(1, **sizes)[2])
    data = load_trajectories("standin", data_dir=None, **sizes)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [4000, 500, 500]
    chex.assert_trees_all_equal(data.test.future, jnp.asarray(future[4500:]))


STANDIN_NUMBERS = [[4.8219194, -7.5280643], [6.0800405, -0.8442266]]


def test_in_the_standin_threats_are_what_makes_the_ego_swerve():
    past, present, future = trajectory_standin(2, lookback=4, horizon=6, num_agents=4)
    velocity = (past[:, -1] - past[:, 0]) / 3
    ahead = np.arange(1, 7)[:, None, None]
    apart = (past[:, -1] - past[:, -1, :1])[:, None] + ahead * (velocity - velocity[:, :1])[:, None]
    distance = np.linalg.norm(apart, axis=-1)[..., 1:]
    nearest = np.where(present[:, None, 1:], distance, np.inf).min(axis=(1, 2))
    bend = np.linalg.norm(future[:, -1] - 2 * future[:, 2] + past[:, -1, 0], axis=-1)  # 0 on a straight way
    assert 0.3 < np.mean(nearest < 1) < 0.7
    assert np.median(bend[nearest > 1.3]) < 0.1 < 0.5 < np.median(bend[nearest < 0.7])
