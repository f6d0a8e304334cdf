"""Crowds: heads where their points are, targets that keep the number, quarters of photographs, what is refused."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from PIL import Image

import zoo
from trainers.data import crowds
from trainers.data.crowds import adaptive_sigma, cell_density, draw_crowds, load_crowds


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_a_point_stands_on_a_dark_disc_with_a_bright_rim():
    images, points, there = draw_crowds(rng(), 12, height=96, width=80)
    assert images.shape == (12, 96, 80, 3)
    assert 1 <= there.sum(1).min() < there.sum(1).max() <= 60
    for image, place, present in zip(images, points, there, strict=True):
        found = place[present]
        assert (found >= 6).all()
        assert (found[:, 0] < 74).all()
        x, y = found[-1]  # the last is in front of all others
        assert image[int(y), int(x)].max() < -0.8
        rows, columns = np.mgrid[:96, :80]
        ring = np.abs(np.hypot(columns - x, rows - y) - 3.5) < 1.7
        assert image[ring].max() > 1.2
    assert not np.allclose(images[0], draw_crowds(rng(1), 1, height=96, width=80)[0][0])
    np.testing.assert_array_equal(images, draw_crowds(rng(), 12, height=96, width=80)[0])


def test_targets_keep_the_number_of_points():  # card csrnet_attention, Acceptance 6
    points, there = rng().uniform(12, 52, (3, 9, 2)).astype(np.float32), np.arange(9) < np.array([[9], [4], [0]])
    density = cell_density(points, there, height=64, width=64, sigma=3.0)
    assert density.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(density.sum((1, 2, 3)), [9, 4, 0], atol=1e-2)
    one = cell_density(np.array([[[44.0, 20.0]]], np.float32), np.ones((1, 1), bool), height=64, width=64, sigma=0.5)
    assert np.argwhere(np.asarray(one[0, ..., 0]) > 0.9).tolist() == [[2, 5]]  # row 20, column 44


def test_gaussians_are_as_wide_as_neighbours_are_far():
    points = np.array([[0, 0], [3, 0], [0, 4], [0, 10], [50, 0]], np.float32)
    found = adaptive_sigma(points, height=60, width=100)
    assert found[0] == pytest.approx(0.1 * (3 + 4 + 10))
    assert found[4] == pytest.approx(0.1 * (47 + 50 + np.hypot(50, 4)))
    np.testing.assert_allclose(adaptive_sigma(points[:2], height=60, width=100), 0.9, rtol=1e-6)
    np.testing.assert_allclose(adaptive_sigma(points[:1], height=60, width=100), 20)
    assert adaptive_sigma(points[:0], height=60, width=100).shape == (0,)


def test_the_parts_differ_and_know_what_to_expect(monkeypatch):
    monkeypatch.setattr(crowds, "_COUNTS", {"train": 8, "valid": 3, "test": 3})
    data = load_crowds("standin", data_dir=None, height=64, width=48)
    batch = data.test.batch(jnp.array([2, 0]))
    assert batch["x"].shape == (2, 64, 48, 3)
    assert batch["density"].shape == (2, 8, 6, 1)
    np.testing.assert_allclose(batch["expected"], data.train.count.mean(), rtol=1e-6)
    np.testing.assert_allclose(batch["density"].sum((1, 2, 3)), batch["count"], rtol=0.05)
    assert not np.allclose(data.train.image[:3], data.test.image)
    same = load_crowds("standin", data_dir=None, height=64, width=48)
    np.testing.assert_array_equal(same.train.image, data.train.image)


@pytest.fixture
def photographs(tmp_path):
    """Ten training and two test photographs, 96 x 64 with the colour of their number and heads at known places."""
    for part, count in (("train", 10), ("test", 2)):
        folder = tmp_path / "files" / "part_A" / f"{part}_data"
        for name in ("images", "ground-truth"):
            (folder / name).mkdir(parents=True)
        for i in range(1, count + 1):
            raw, info = io.BytesIO(), np.empty((1, 1), object)
            points = np.array([[10.0, 20.0], [50.0, 20.0], [50.0, 70.0]])[: 1 + i % 3]
            info[0, 0] = {"location": points, "number": float(len(points))}
            scipy.io.savemat(raw, {"image_info": info})
            (folder / "ground-truth" / f"GT_IMG_{i}.mat").write_bytes(raw.getvalue())
            Image.fromarray(np.full((96, 64, 3), 20 * i, np.uint8)).save(folder / "images" / f"IMG_{i}.jpg")
    return str(tmp_path / "files")


def test_photographs_are_framed_and_trained_on_in_quarters(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path / "cache"))
    data = load_crowds("shanghaitech/part_A", data_dir=photographs, height=96, width=96)
    assert (len(data.train), len(data.valid), len(data.test)) == (8 * 8, 2, 2)
    np.testing.assert_array_equal(data.test.count, [2, 3])
    np.testing.assert_array_equal(data.valid.count, [3, 2])  # photographs 5 and 10
    whole = data.test.batch(jnp.array([1]))
    assert whole["x"].shape == (1, 96, 96, 3)
    np.testing.assert_allclose(whole["x"][0, :, 64:], 0, atol=0.01)  # the frame beside the photograph
    np.testing.assert_allclose(whole["x"][0, 5, 5], (40 / 255 - 0.45) / 0.226, atol=0.3)
    parts = jax.jit(data.train.batch)(jnp.arange(8))  # of photograph 1: two heads above, one of them right of the cut
    assert parts["x"].shape == (8, 48, 48, 3)
    assert parts["density"].shape == (8, 6, 6, 1)
    total = np.asarray(data.train.density[0].sum())
    np.testing.assert_allclose(parts["count"][:4].sum(), total, rtol=1e-5)
    np.testing.assert_allclose(parts["count"][:4], parts["count"][4:], rtol=1e-5)
    np.testing.assert_allclose(parts["density"][4:], parts["density"][:4, :, ::-1], rtol=1e-5)
    np.testing.assert_array_equal(parts["density"][1], data.train.density[0, :6, 6:])
    small = load_crowds("shanghaitech/part_A", data_dir=photographs, height=48, width=48)
    np.testing.assert_array_equal(small.test.count, data.test.count)
    np.testing.assert_allclose(small.test.batch(jnp.array([0]))["x"][0, :, 32:], 0, atol=0.01)


@pytest.mark.parametrize(
    ("name", "data_dir", "height", "message"),
    [
        ("shanghaitec/part_A", None, 64, "no set of crowds is called 'shanghaitec/part_A'; did you mean 'shang"),
        ("standin", "x", 64, "is generated and takes no --data-dir"),
        ("standin", None, 60, "frames of 60 x 64 are no multiples of 8 pixels"),
        ("shanghaitech/part_B", "x", 72, "frames of 72 x 64 are no multiples of 16 pixels"),
        ("shanghaitech/part_B", None, 64, "shanghaitech/part_B is not downloaded: fetch it from"),
    ],
)
def test_what_cannot_be_loaded(name, data_dir, height, message):
    with pytest.raises(zoo.UserError, match=message):
        load_crowds(name, data_dir=data_dir, height=height, width=64)
