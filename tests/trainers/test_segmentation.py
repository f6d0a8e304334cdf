"""Labelled images: windows of photographs, what is counted in them, and the stand-ins."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from trainers.data.segmentation import load_segmentation
from trainers.data.segmentation_standins import STANDINS

SIZES = {
    "attention_mamba": {"image_size": (64, 64), "channels": 1, "num_classes": 4},
    "spine_context_resunet": {"image_size": (16, 16, 16), "channels": 1, "num_classes": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """28 small photographs, dark at the left; a vessel is a bright row, whose place tells the photograph."""
    path = tmp_path_factory.mktemp("photographs")
    for number in range(28):
        stem = f"Image_{number // 2 + 1:02}{'LR'[number % 2]}"
        image = np.full((40, 50, 3), 90, np.uint8)
        image[:, :10] = 5
        image[number] = 200
        mask = np.zeros((40, 50), np.uint8)
        mask[number] = 255
        Image.fromarray(image).save(path / f"{stem}.jpg", quality=95)
        for observer in ("1st", "2nd"):
            Image.fromarray(mask).convert("1").save(path / f"{stem}_{observer}HO.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield str(path)


def load(folder, **changes):
    options = {"paper": "attention_mamba", "image_size": (16, 24), "channels": 3, "num_classes": 1, **changes}
    return load_segmentation("chase_db1", data_dir=folder, **options)


def test_photographs_are_divided_by_children_and_tiled(folder):
    data = load(folder)
    assert [len(part.images) for part in (data.train, data.valid, data.test)] == [16, 4, 8]
    # Three rows of three tiles cover 40 x 50 with 16 x 24.
    assert [len(part) for part in (data.train, data.valid, data.test)] == [16 * 64, 4 * 9, 8 * 9]
    whole = data.test.batch(jnp.arange(len(data.test)))
    chex.assert_shape(whole["x"], (72, 16, 24, 3))
    # Each pixel of the 40 bright columns is counted once, and of the others those of the vessel.
    assert int((whole["label"] >= 0).sum()) == int((np.asarray(data.test.label) >= 0).sum())
    assert 8 * 40 * 40 <= int((whole["label"] >= 0).sum()) <= 8 * 40 * 41 + 8 * 50
    assert int((whole["label"] == 1).sum()) == 8 * 50
    assert data.classes == ("background", "vessel")
    chex.assert_trees_all_equal(data.train.prior, data.test.prior)
    share = float(np.exp(data.train.prior[0]))  # the odds of a vessel
    assert share == pytest.approx(50 / (40 * 40 - 40), rel=0.05)


def test_crops_are_the_photographs_mirrored_or_not(folder):
    data = load(folder)
    split = data.train
    numbers = np.array([0, 100, 500, 1023])
    batch = split.batch(jnp.asarray(numbers))
    for x, label, row in zip(batch["x"], batch["label"], numbers, strict=True):
        number, top, left = np.asarray(split.corner[row])
        image = (np.float32(split.images[number]) - split.offset[number]) / split.scale[number]
        piece = (
            image[top : top + 16, left : left + 24],
            np.asarray(split.label)[number][top : top + 16, left : left + 24],
        )
        axes = tuple(np.flatnonzero(np.asarray(split.mirror[row])))
        np.testing.assert_allclose(x, np.flip(piece[0], axes), rtol=1e-5)
        np.testing.assert_array_equal(label, np.flip(piece[1], axes))
    assert 0.4 < np.asarray(split.mirror).mean() < 0.6
    again, other = load(folder), load(folder, seed=1)
    chex.assert_trees_all_equal(again.train.corner, split.corner)
    assert not np.array_equal(other.train.corner, split.corner)
    # Inside the field of view, channels have mean 0 and standard deviation 1.
    inside = np.asarray(split.label[0]) >= 0
    scaled = ((np.float64(split.images[0]) - split.offset[0]) / split.scale[0])[inside]
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-4)
    assert load(folder, channels=1).test.images.shape[-1] == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chase_db", {}, "no set of labelled images is called 'chase_db'; did you mean 'chase_db1'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated and takes no --data-dir"),
        ("standin/attention_mama", {}, "of a paper 'attention_mama'; did you mean 'attention_mamba'"),
        ("standin", {"image_size": (16, 16)}, "has images of at least 32 x 32 pixels"),
        ("standin/spine_context_resunet", {}, "has volumes of at least 16 voxels an axis"),
        ("chase_db1", {"num_classes": 4}, "one class beside the background, .*: set --model.channels 3"),
    ],
)
def test_what_cannot_be_loaded(name, options, message):
    options = {"paper": "attention_mamba", "data_dir": None, **SIZES["attention_mamba"], **options}
    with pytest.raises(zoo.UserError, match=message):
        load_segmentation(name, **options)


def test_windows_larger_than_photographs_are_refused(folder):
    with pytest.raises(
        zoo.UserError, match=r"photographs of \(40, 50\) are smaller than --model\.image-size \(64, 24\)"
    ):
        load(folder, image_size=(64, 24))


@pytest.mark.parametrize("paper", STANDINS)
def test_standins_are_the_same_everywhere_and_their_parts_distinct(paper):
    size, classes = SIZES[paper]["image_size"], SIZES[paper]["num_classes"]
    make = STANDINS[paper]
    counts = (3, 2, 2)
    parts, again, other = (make(seed, size=size, num_classes=classes, counts=counts) for seed in (4, 4, 5))
    assert [len(parts[part][0]) for part in ("train", "valid", "test")] == [3, 2, 2]
    chex.assert_trees_all_equal(parts, again)
    assert not np.allclose(parts["train"][0], other["train"][0])
    assert not np.allclose(parts["valid"][0], parts["test"][0])
    for image, label in zip(*(np.concatenate([p[i] for p in parts.values()]) for i in (0, 1)), strict=True):
        assert image.dtype == np.float32
        assert 0 < (label > 0).mean() < 0.7
        assert label.max() < max(classes, 2)


def test_a_satellite_is_of_the_class_of_the_largest_object():
    images, labels = STANDINS["attention_mamba"](0, size=(64, 64), num_classes=4, counts=(30, 1, 1))["train"]
    for image, label in zip(images, labels, strict=True):
        white = image == np.float32(1.3)
        assert 10 < white.sum() < 30
        (kind,) = set(label[white])
        sizes = np.bincount(label[~white], minlength=4)[1:]
        assert sizes[kind - 1] == sizes.max()


def test_brightness_alone_does_not_find_the_spine():
    images, labels = STANDINS["spine_context_resunet"](0, size=(32, 32, 32), num_classes=1, counts=(8, 1, 1))["train"]
    bright = images > 0.5
    assert bright[labels > 0].mean() > 0.99
    assert 0.2 < labels[bright].mean() < 0.75  # the rest are rods


def test_a_loaded_standin_gives_batches():
    data = load_segmentation("standin", paper="spine_context_resunet", data_dir=None, **SIZES["spine_context_resunet"])
    assert [len(part) for part in (data.train, data.valid, data.test)] == [64, 16, 16]
    batch = jax.jit(lambda split, rows: split.batch(rows))(data.test, jnp.array([3, 1]))
    chex.assert_trees_all_equal(batch["x"][..., 0], data.test.images[jnp.array([3, 1]), ..., 0])
    chex.assert_trees_all_equal(batch["label"], data.test.label[jnp.array([3, 1])].astype(jnp.int32))
    assert batch["prior"].shape == (2, 1)
