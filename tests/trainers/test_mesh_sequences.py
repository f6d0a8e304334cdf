"""Meshes that move: the stand-in's jointed bodies, and sequences of one's own."""

import chex
import numpy as np
import pytest

import zoo
from trainers.data import meshes
from trainers.data.meshes import draw_sequence, edges_of_faces, load_meshes, normalised

SIZES = {"frames": 4, "num_vertices": 64, "num_edges": 180, "video_tokens": 8, "video_channels": 5}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(meshes, "_COUNTS", {"train": 6, "valid": 2, "test": 4})


def test_bodies_bend_and_limbs_keep_their_shape():
    rng, lone = np.random.default_rng(0), 0
    for _ in range(20):
        vertices, faces, angles = draw_sequence(rng, 4, 128)
        assert vertices.shape[0] == len(angles) == 5
        assert 64 <= vertices.shape[1] <= 128
        assert vertices.shape[1] % 8 == 0
        assert set(faces.ravel()) == set(range(vertices.shape[1]))
        lone += not angles[:, 1].any()
        # The lowest ring belongs to the first limb, which nothing moves; a closed tube has as many edges as faces and
        # its two rings' eight.
        np.testing.assert_allclose(vertices[:, :8], np.broadcast_to(vertices[:1, :8], (5, 8, 3)), atol=1e-9)
        assert len(edges_of_faces(faces)) == len(faces) // 2 * 3 + 8
        last = vertices[:, -8:]
        sides = np.linalg.norm(np.roll(last, 1, axis=1) - last, axis=-1)
        np.testing.assert_allclose(sides, np.broadcast_to(sides[:1], sides.shape), rtol=0.2)
        assert np.abs(last - last[:1]).max() > 0.05
    assert 0 < lone < 20


def test_meshes_have_their_own_centre_and_unit():
    vertices = np.random.default_rng(1).normal(3.0, 2.0, (5, 7, 3))
    base, frames = normalised(vertices)
    np.testing.assert_allclose([base.mean(0), frames[0].mean(0)], 0, atol=1e-9)
    assert np.abs(base).max() == pytest.approx(1)
    size = np.abs(vertices[0] - vertices[0].mean(0)).max()
    np.testing.assert_allclose(np.diff(frames, axis=0) * size, np.diff(vertices[1:], axis=0))
    assert np.abs(normalised(1e-3 * vertices)[0]).max() < 0.1


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct(few):
    data, again = (load_meshes("standin", data_dir=None, **SIZES) for _ in range(2))
    chex.assert_trees_all_equal(data.train, again.train)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [6, 2, 4]
    batch = data.test.batch(np.array([2, 0]))
    chex.assert_shape(batch["frames"], (2, 4, 64, 3))
    chex.assert_shape([batch["edges"], batch["video"]], [(2, 180, 2), (2, 8, 5)])
    present = np.asarray(batch["vertex_mask"])
    assert not np.asarray(batch["base"])[~present].any()
    for edges, mask in zip(np.asarray(batch["edges"]), present, strict=True):
        assert edges.max() == mask.sum() - 1
        assert (edges[:, 0] >= 0).sum() > mask.sum()
    assert not np.allclose(data.valid.base[0], data.test.base[0])
    other = load_meshes("standin", data_dir=None, seed=1, **SIZES)
    assert not np.allclose(data.train.video, other.train.video)


def test_videos_tell_the_angles_frame_by_frame(few):
    """Two tokens a frame, and differences of videos in one frame lie in a plane: two joints' angles."""
    video = np.asarray(load_meshes("standin", data_dir=None, **SIZES).train.video)
    np.testing.assert_array_equal(video[:, 0::2], video[:, 1::2])
    for frame in range(4):
        spread = np.linalg.svd(video[:, 2 * frame] - video[:1, 2 * frame], compute_uv=False)
        assert spread[1] > 1e-2
        assert spread[2] < 1e-4
    assert not np.allclose(video[:, 0], video[:, 2], atol=0.1)


def write(folder, part, name, **changes):
    rng = np.random.default_rng(2)
    arrays = {
        "vertices": rng.normal(size=(5, 9, 3)),
        "faces": rng.permutation(9).reshape(3, 3),
        "video": rng.normal(size=(8, 5)),
    }
    (folder / part).mkdir(exist_ok=True)
    np.savez(folder / part / f"{name}.npz", **{**arrays, **changes})


def test_sequences_of_ones_own(tmp_path):
    for i in range(3):
        write(tmp_path, "train", f"clip{i}")
    write(tmp_path, "test", "clip")
    data = load_meshes("sequences", data_dir=str(tmp_path), **SIZES)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [2, 1, 1]
    assert np.asarray(data.test.present).sum() == 9
    assert (np.asarray(data.test.edges)[0, :, 0] >= 0).sum() == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vertices": np.zeros((4, 9, 3))}, r"vertices of shape \(4, 9, 3\) instead of \(5, N, 3\)"),
        ({"vertices": np.zeros((5, 70, 3))}, "has 70 vertices, the model places for 64: --model.num-vertices 70"),
        ({"faces": np.array([[0, 1, 9]])}, "has faces of vertices from 0 to 9, of 9 there are"),
        ({"faces": np.zeros((2, 4), int)}, r"faces of shape \(2, 4\) instead of \(F, 3\)"),
        ({"video": np.zeros((7, 5))}, r"a video of shape \(7, 5\) instead of \(8, 5\)"),
    ],
)
def test_sequences_that_do_not_fit(tmp_path, changes, message):
    write(tmp_path, "train", "clip", **changes)
    write(tmp_path, "test", "clip")
    with pytest.raises(zoo.UserError, match=message):
        load_meshes("sequences", data_dir=str(tmp_path), **SIZES)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(zoo.UserError, match="the stand-in is generated and takes no --data-dir"):
        load_meshes("standin", data_dir="somewhere", **SIZES)
    with pytest.raises(zoo.UserError, match="no set of meshes is called 'sequence'; did you mean 'sequences'"):
        load_meshes("sequence", data_dir=None, **SIZES)
    with pytest.raises(zoo.UserError, match="give the folder of train"):
        load_meshes("sequences", data_dir=None, **SIZES)
    with pytest.raises(zoo.UserError, match="have at least 32 vertices"):
        load_meshes("standin", data_dir=None, **SIZES | {"num_vertices": 16})
    write(tmp_path, "train", "clip")
    write(tmp_path, "test", "clip")
    with pytest.raises(zoo.UserError, match="holds one training sequence"):
        load_meshes("sequences", data_dir=str(tmp_path), **SIZES)
