"""Poses: the recorded skeleton, the camera, clips of one's own, and the stand-in."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.poses import load_poses, pose_standin, recorded_poses, seen
from zoo.tasks.pose_lifting import LEFT, PARENTS, RIGHT, flat


def lengths(places):
    return np.linalg.norm(places[..., 1:, :] - places[..., list(PARENTS[1:]), :], axis=-1)


def test_the_recorded_skeleton_at_rest_is_a_person():
    rest = recorded_poses(np.zeros((1, 117)), np.zeros(1))[0, 0]
    chex.assert_trees_all_equal(rest[0], np.zeros(3))
    assert rest[10, 1] < rest[9, 1] < rest[8, 1] < -0.2 < 0.8 < rest[[3, 6], 1].min()  # y grows downwards
    left, right = (lengths(rest)[np.array(side) - 1] for side in (LEFT, RIGHT))
    chex.assert_trees_all_close(left, right, rtol=0.06)
    assert rest[4, 0] > 0 > rest[1, 0]
    behind = recorded_poses(np.zeros((1, 117)), np.array([np.pi]))[0, 0]
    chex.assert_trees_all_close(behind[4, 0], -rest[4, 0], atol=1e-5)


def test_a_recorded_knee_bends_the_shin_alone():
    angles = np.zeros((2, 117))
    angles[1, 3 + 3 * 9] = np.pi / 2  # joint 9, the right knee, about x
    rest, bent = recorded_poses(angles, np.zeros(1))[0]
    moved = np.linalg.norm(rest - bent, axis=-1) > 1e-4
    assert np.flatnonzero(moved).tolist() == [3]
    chex.assert_trees_all_close(lengths(bent), lengths(rest), rtol=1e-5)


def test_a_camera_sees_near_things_larger():
    places = np.zeros((1, 1, 17, 3))
    places[0, 0, 1:, 0] = 1.0
    places[0, 0, 2:, 2] = 2.5
    rng = np.random.Generator(np.random.PCG64(0))
    split = seen(rng, places, np.array([5.0]))
    across = np.asarray(flat({"x": split.keypoints})[0, 0, :, 0])
    assert across[1] == pytest.approx(2.3 / 5, abs=0.2)
    assert across[2:].mean() < 0.8 * across[1]
    chex.assert_trees_all_close(split.pose[0, 0, 2], jnp.array([0.46, 0.0, 1.15]), rtol=1e-5)


def test_the_standin_has_rigid_bones_and_doubtful_joints():
    places = pose_standin(0, 40, frames=6)
    spread = lengths(places).std(axis=1)
    assert spread.max() < 1e-5
    assert lengths(places)[:, 0].std(axis=0).min() > 0.005  # of everyone's own
    assert not np.allclose(places, pose_standin(1, 40, frames=6))
    chex.assert_trees_all_equal(places, pose_standin(0, 40, frames=6))
    data = load_poses("standin", data_dir=None, frames=6)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [2400, 300, 300]
    batch = data.train.batch(np.arange(300))
    error = jnp.linalg.norm(flat(batch)[..., :2] - batch["y"][..., :2], axis=-1).mean(axis=1)
    doubt = batch["x"][:, 0, :, 2] < 0.7
    assert 0.02 < float(doubt.mean()) < 0.1
    assert float(error[doubt].mean()) > 2 * float(error[~doubt].mean())
    firsts = np.concatenate([np.asarray(p.pose[:, 0].reshape(len(p), -1)) for p in (data.train, data.valid, data.test)])
    assert len(np.unique(firsts, axis=0)) == 3000


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mocap")
    rng = np.random.default_rng(0)
    frames = {"train/walking_1": 41, "train/walking_2": 42, "train/walking_3": 43, "test/walking_1": 30}
    tracks = {name: rng.normal(0, 0.2, (count, 117)).astype(np.float32) for name, count in frames.items()}
    np.savez(folder / "walking.npz", **tracks)
    return str(folder)


def test_sequences_are_parted_and_every_second_frame_is_kept(motions):
    data = load_poses("cmu_mocap/walking", data_dir=motions, frames=8)
    # 20 or 21 frames, clips of 8 every second frame: 7 starts, twice by phase, in two sequences, from eight sides.
    assert len(data.train) == 2 * 2 * 7 * 8
    assert (len(data.valid), len(data.test)) == (2 * 4, 1 * 4)
    chex.assert_trees_all_close(data.test.pose[:, :, 0], jnp.zeros((4, 8, 3)), atol=1e-6)


def test_clips_of_ones_own(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(2, 20, 5, 17, 3)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=x[:3], y=y[:3])
    data = load_poses("clips", data_dir=str(tmp_path), frames=5)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [18, 2, 3]
    chex.assert_trees_all_equal(data.valid.keypoints, jnp.asarray(x[18:]))
    chex.assert_trees_all_equal(data.test.pose, jnp.asarray(y[:3] - y[:3, :, :1]))
    with pytest.raises(
        zoo.UserError, match=r"train.npz has .* instead of keypoints x and poses y of \(clips, 7, 17, 3\)"
    ):
        load_poses("clips", data_dir=str(tmp_path), frames=7)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cmu_mocap/wlking", {}, "no set of poses is called 'cmu_mocap/wlking'; did you mean 'cmu_mocap/walking'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("clips", {}, "clips are your own: give the folder"),
        ("cmu_mocap/walking", {"frames": 16}, "no test sequence of walking has 16 frames: use shorter clips"),
    ],
)
def test_what_cannot_be_loaded(motions, name, arguments, message):
    arguments = {"data_dir": motions if name.startswith("cmu") else None, "frames": 5} | arguments
    with pytest.raises(zoo.UserError, match=message):
        load_poses(name, **arguments)


def test_splits_are_pytrees():
    data = load_poses("standin", data_dir=None, frames=2)
    assert len(jax.tree.leaves(data.test)) == 2
