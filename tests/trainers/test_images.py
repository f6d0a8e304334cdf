"""Labelled images: the stand-in is told by what two patches share and by no sum, sets are divided as usual; errors."""

import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.images import COLOURS, MARKS, cued_patches, load_images

SIZES = {"data_dir": None, "image_size": 32, "channels": 3, "num_classes": 10}


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def decoded(image):
    """Of each image the (colour, mark) of its patches, the nearest of all there are; mark -1 is plain."""
    cells = image.reshape(len(image), 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(len(image), 64, 4, 4, 3)
    shapes = np.concatenate([np.ones((1, 4, 4)), MARKS])
    known = (shapes[None, ..., None] * COLOURS[:, None, None, None]).reshape(-1, 48)
    for picture in cells:
        shown = picture[np.abs(picture).mean((1, 2)).max(-1) > 0.2].reshape(-1, 1, 48)
        nearest = np.square(shown - known).sum(-1).argmin(1)
        yield [(int(n) // len(shapes), int(n) % len(shapes) - 1) for n in nearest]


def test_a_class_is_the_mark_of_the_patch_with_the_plain_ones_colour():
    image, label = cued_patches(rng(), 300)
    assert np.bincount(label, minlength=8).min() > 15
    places = []
    for patches, kind, picture in zip(decoded(image), label, image, strict=True):
        assert len(patches) == 5
        (plain,) = (colour for colour, mark in patches if mark < 0)
        assert [mark for colour, mark in patches if colour == plain and mark >= 0] == [kind]
        assert len({colour for colour, _ in patches}) == 4
        places.append(picture.reshape(8, 4, 8, 4, 3).mean((1, 3, 4)).argmax())
    assert len(set(places)) > 40
    again, same = cued_patches(rng(), 300)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, same)
    assert not np.array_equal(image, cued_patches(rng(1), 300)[0])
    assert cued_patches(rng(), 2, size=16)[0].shape == (2, 16, 16, 3)


def test_sums_over_patches_do_not_tell_the_class():
    image, label = cued_patches(rng(), 3000)
    counts = np.zeros((3000, 55))
    counts[:, 54] = 1
    for row, patches in zip(counts, decoded(image), strict=True):
        for colour, mark in patches:
            row[9 * colour + mark + 1] += 1
    fitted = np.linalg.lstsq(counts[:2000], np.eye(8)[label[:2000]], rcond=None)[0]
    accuracy = np.mean((counts[2000:] @ fitted).argmax(1) == label[2000:])
    assert 0.125 < accuracy < 0.5


def test_the_parts_of_the_standin():
    data = load_images("standin", **SIZES)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [4000, 444, 1000]
    batch = data.test.batch(jnp.array([3, 1]))
    assert batch["x"].shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(batch["label"], data.test.label[jnp.array([3, 1])])
    np.testing.assert_allclose(np.exp(batch["prior"]).sum(-1), 1, rtol=1e-5)
    assert not np.allclose(data.train.image[:1000], data.test.image)


def test_digits_are_divided_by_halves(tmp_path):
    generator = np.random.default_rng(0)
    rows = np.concatenate([generator.integers(0, 17, (400, 64)), np.arange(400)[:, None] % 10], axis=1)
    np.savetxt(tmp_path / "digits.csv", rows, fmt="%d", delimiter=",")
    data = load_images("digits8x8", **SIZES | {"data_dir": str(tmp_path), "image_size": 8, "channels": 1})
    assert [len(part) for part in (data.train, data.valid, data.test)] == [180, 20, 200]
    assert data.test.image.shape == (200, 8, 8, 1)
    assert abs(float(data.train.image.mean())) < 0.1
    assert np.asarray(data.test.label).tolist() == [i % 10 for i in range(200, 400)]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("digits", {}, "no set of images is called 'digits'; did you mean 'digits8x8'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("standin", {"channels": 1}, "images of standin are 32x32x3: set --model.image-size 32 and --model.channels 3"),
        ("standin", {"image_size": 30}, "a side that is a multiple of 4 from 12 on, not 30"),
        ("standin", {"num_classes": 7}, "standin has 8 classes: set --model.num-classes to that"),
    ],
)
def test_what_cannot_be_loaded(name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load_images(name, **SIZES | changes)
