"""Labelled images of one size: the customary small sets, and a stand-in that is solved by finding what is far apart.

Of each set the customary test part is kept; every tenth training image is for validation. Pixels have mean 0 and
deviation 1 over the training part's images.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.classification import class_prior

__all__ = [
    "COLOURS",
    "MARKS",
    "SETS",
    "ImageData",
    "ImageSplit",
    "check_sizes",
    "cued_patches",
    "load_images",
    "read_images",
]

SETS = ("digits8x8", "mnist", "cifar10_sample")
_COUNTS = {"train": 4_444, "test": 1_000}  # of the stand-in; validation takes its tenth
COLOURS = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
_CELL = 4  # pixels
_ROW, _COLUMN = np.mgrid[:_CELL, :_CELL]
_EDGE = (_ROW % 3 == 0) | (_COLUMN % 3 == 0)
MARKS = np.float32([
    _ROW % 2 == 0, _COLUMN % 2 == 0, (_ROW + _COLUMN) % 2 == 0, _EDGE, ~_EDGE, _ROW < 2, _COLUMN < 2, _ROW <= _COLUMN,
])  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageSplit:
    """Images of one part."""

    image: Float[Array, "N H W C"]
    label: Int[Array, " N"]
    prior: Float[Array, " K"]  # of the training part

    def __len__(self) -> int:
        return self.image.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The images of these numbers as a batch of classification; traceable."""
        label = self.label[indices]
        prior = jnp.broadcast_to(self.prior, (*label.shape, *self.prior.shape))
        return {"x": self.image[indices], "label": label, "prior": prior}


@dataclass(frozen=True)
class ImageData:
    """The three parts of a set."""

    train: ImageSplit
    valid: ImageSplit
    test: ImageSplit


def read_images(name: str, data_dir: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(images (N, H, W, C), classes (N,)) of the training and the test part of one of `SETS`."""
    sources = load_dataset(name, data_dir)

    def whole(source) -> tuple[np.ndarray, np.ndarray]:
        rows = [source[i] for i in range(len(source))]
        image = np.stack([np.asarray(row["image"], np.float32) for row in rows])
        return image.reshape(*image.shape[:3], -1), np.array([row["label"] for row in rows], np.int32)

    if name == "digits8x8":
        image, label = whole(sources["digits"])
        half = len(label) // 2  # customary: the first half trains
        found = {"train": (image[:half], label[:half]), "test": (image[half:], label[half:])}
    else:
        found = {part: whole(sources[part]) for part in ("train", "test")}
    mean, deviation = found["train"][0].mean(), found["train"][0].std()
    return {part: ((image - mean) / deviation, label) for part, (image, label) in found.items()}


def check_sizes(
    name: str, image: np.ndarray, label: np.ndarray, *, image_size: int, channels: int, num_classes: int
) -> None:
    """Raises `UserError` where a set is not of the model's sizes."""
    if image.shape[1:] != (image_size, image_size, channels):
        raise UserError(
            f"images of {name} are {'x'.join(map(str, image.shape[1:]))}: set --model.image-size {image.shape[1]} "
            f"and --model.channels {image.shape[-1]}"
        )
    if label.max() >= num_classes:
        raise UserError(f"{name} has {label.max() + 1} classes: set --model.num-classes to that")


def cued_patches(rng: np.random.Generator, count: int, *, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, S, S, 3), classes (N,)): noise of deviation 0.1 with five patches of 4 x 4 pixels, anywhere.

    One is plain; the others have different colours of six, one of them the plain one's, and one of eight marks. The
    class is the mark of the patch that has the plain one's colour: no patch tells it, nor does a linear map of any sum
    over patches, as one must be found by what another shows. After card rpattention, Data, whose class is the colour
    that occurs twice, which such sums do tell.
    """
    if size % _CELL or size < 3 * _CELL:
        raise UserError(f"the stand-in's images have a side that is a multiple of {_CELL} from 12 on, not {size}")
    side = size // _CELL
    label = rng.integers(0, len(MARKS), count)
    others = rng.integers(0, len(MARKS), (count, 3))
    marks = np.concatenate([MARKS[label[:, None]], MARKS[others]], axis=1)
    patch = np.concatenate([np.ones_like(marks[:, :1]), marks], axis=1)[..., None]
    colours = rng.permuted(np.tile(np.arange(len(COLOURS)), (count, 1)), axis=1)[:, [0, 0, 1, 2, 3]]
    place = rng.permuted(np.tile(np.arange(side * side), (count, 1)), axis=1)[:, :5]
    cells = rng.normal(0.0, 0.1, (count, side * side, _CELL, _CELL, 3)).astype(np.float32)
    cells[np.arange(count)[:, None], place] += patch * COLOURS[colours][:, :, None, None]
    image = cells.reshape(count, side, side, _CELL, _CELL, 3).swapaxes(2, 3).reshape(count, size, size, 3)
    return image, label.astype(np.int32)


def load_images(
    name: str, *, data_dir: str | None, image_size: int, channels: int, num_classes: int, seed: int = 0
) -> ImageData:
    """The set of that name: "standin" (drawn by `seed`) or one of `SETS`."""
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; name a set with --data mnist")
        rng = np.random.Generator(np.random.PCG64(seed))
        parts = {part: cued_patches(rng, count, size=image_size) for part, count in _COUNTS.items()}
    elif name in SETS:
        parts = read_images(name, data_dir)
    else:
        raise UserError(f"no set of images is called {name!r}{closest(name, ('standin', *SETS))}")
    image, label = parts["train"]
    check_sizes(name, image, label, image_size=image_size, channels=channels, num_classes=num_classes)
    held = np.arange(len(label)) % 10 == 9
    prior = jnp.asarray(class_prior(label[~held], num_classes))

    def split(image: np.ndarray, label: np.ndarray) -> ImageSplit:
        return ImageSplit(jnp.asarray(image), jnp.asarray(label), prior)

    return ImageData(split(image[~held], label[~held]), split(image[held], label[held]), split(*parts["test"]))
