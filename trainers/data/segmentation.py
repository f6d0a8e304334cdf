"""Labelled images and volumes: the photographs of CHASE_DB1, and the papers' stand-ins.

CHASE_DB1 is divided as usual, the first 20 photographs to train and the last 8 to test (by name); the last four of the
20, both eyes of two children, are for validation. The field of view is where the red channel is above 20; what is
outside is not counted. Training examples are random crops, mirrored at random, whose centre lies in the field of view;
the others tile the whole photographs, so that their scores are those of all pixels.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from trainers.data.prepare import load_dataset
from trainers.data.segmentation_standins import STANDINS
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.segmentation import pixel_prior

__all__ = ["SegmentationData", "SegmentationSplit", "load_segmentation"]

_CROPS = 64  # of each training photograph
_FIELD_OF_VIEW = 20  # the least red inside it is more


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentationSplit:
    """Images of one part and the windows that are its examples, cut out when a batch is drawn."""

    images: Shaped[Array, "N *size C"]
    label: Int[Array, "N *size"]  # -1: not counted
    offset: Float[Array, "N C"]  # taken from an image,
    scale: Float[Array, "N C"]  # and what is left divided by
    corner: Int[Array, "S _"]  # of each window: its image, and where it begins
    mirror: Bool[Array, "S d"]  # the axes along which it is mirrored
    prior: Float[Array, " K"]  # of the training part
    tile: tuple[int, ...] = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.corner.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a batch of segmentation; traceable."""

        def cut(corner, mirror):
            number, channels = corner[0], self.images.shape[-1]
            start = tuple(corner[1:])
            x = jax.lax.dynamic_slice(self.images, (number, *start, 0), (1, *self.tile, channels))[0]
            label = jax.lax.dynamic_slice(self.label, (number, *start), (1, *self.tile))[0]
            for axis in range(len(self.tile)):
                x, label = (jnp.where(mirror[axis], jnp.flip(v, axis), v) for v in (x, label))
            return (x.astype(jnp.float32) - self.offset[number]) / self.scale[number], label.astype(jnp.int32)

        x, label = jax.vmap(cut)(self.corner[indices], self.mirror[indices])
        return {"x": x, "label": label, "prior": jnp.broadcast_to(self.prior, (len(x), *self.prior.shape))}


@dataclass(frozen=True)
class SegmentationData:
    """The three parts of a set, and what its classes are called, the background first."""

    train: SegmentationSplit
    valid: SegmentationSplit
    test: SegmentationSplit
    classes: tuple[str, ...]


def load_segmentation(
    name: str,
    *,
    paper: str,
    data_dir: str | None,
    image_size: tuple[int, ...],
    channels: int,
    num_classes: int,
    seed: int = 0,
) -> SegmentationData:
    """The set of that name: "standin" (that of `paper`), "standin/<paper>" or "chase_db1". `seed` draws stand-ins and
    crops."""
    collection, _, member = name.partition("/")
    if collection == "standin":
        return _standin(member or paper, data_dir, image_size, channels, num_classes, seed)
    if name == "chase_db1":
        return _vessels(data_dir, image_size, channels, num_classes, seed)
    known = ["standin", "chase_db1", *(f"standin/{slug}" for slug in STANDINS)]
    raise UserError(f"no set of labelled images is called {name!r}{closest(name, known)}")


def _prior(label: np.ndarray, num_classes: int) -> Array:
    counts = np.bincount(label[label >= 0].ravel().astype(np.int64), minlength=max(num_classes, 2))
    return jnp.asarray(pixel_prior(counts.astype(np.float64), num_classes))


def _standin(
    paper: str, data_dir: str | None, size: tuple[int, ...], channels: int, num_classes: int, seed: int
) -> SegmentationData:
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; name the set with --data, e.g. chase_db1")
    if paper not in STANDINS:
        raise UserError(f"no stand-in of labelled images is of a paper {paper!r}{closest(paper, STANDINS)}")
    parts = STANDINS[paper](seed, size=size, num_classes=num_classes)
    prior = _prior(parts["train"][1], num_classes)

    def split(images: np.ndarray, label: np.ndarray) -> SegmentationSplit:
        count = len(images)
        corner = np.zeros((count, len(size) + 1), np.int32)
        corner[:, 0] = np.arange(count)
        images = jnp.asarray(np.repeat(images[..., None], channels, axis=-1))
        plain = jnp.zeros((count, channels)), jnp.ones((count, channels))
        mirror = jnp.zeros((count, len(size)), bool)
        return SegmentationSplit(images, jnp.asarray(label), *plain, jnp.asarray(corner), mirror, prior, size)

    names = ("background", *(f"class {k}" for k in range(1, max(num_classes, 2))))
    return SegmentationData(**{part: split(*columns) for part, columns in parts.items()}, classes=names)


def _vessels(
    data_dir: str | None, size: tuple[int, ...], channels: int, num_classes: int, seed: int
) -> SegmentationData:
    if len(size) != 2 or channels not in (1, 3) or num_classes != 1:
        raise UserError(
            f"chase_db1 has colour photographs and one class beside the background, not images of size {size} with "
            f"{channels} channels and num_classes {num_classes}: set --model.channels 3 --model.num-classes 1"
        )
    found = {part: list(cases) for part, cases in load_dataset("chase_db1", data_dir).items()}
    found = {"train": found["train"][:-4], "valid": found["train"][-4:], "test": found["test"]}
    shapes = {case["vessels"].shape for cases in found.values() for case in cases}
    least = tuple(min(s[axis] for s in shapes) for axis in range(2))
    if any(n > m for n, m in zip(size, least, strict=True)):
        raise UserError(f"chase_db1: photographs of {least} are smaller than --model.image-size {size}")
    rng = np.random.Generator(np.random.PCG64(seed))
    # The green channel has the most contrast.
    chosen = slice(None) if channels == 3 else slice(1, 2)
    columns = {part: [(case["image"][..., chosen], _labelled(case)) for case in cases] for part, cases in found.items()}
    prior = _prior(np.concatenate([label.ravel() for _, label in columns["train"]]), num_classes)
    return SegmentationData(
        **{part: _windows(rng if part == "train" else None, cases, size, prior) for part, cases in columns.items()},
        classes=("background", "vessel"),
    )


def _labelled(case: dict) -> np.ndarray:
    inside = case["image"][..., 0] > _FIELD_OF_VIEW
    return np.where(inside, case["vessels"], -1).astype(np.int8)


def _windows(
    rng: np.random.Generator | None, cases: list[tuple[np.ndarray, np.ndarray]], size: tuple[int, ...], prior: Array
) -> SegmentationSplit:
    """Random ones with `rng`, otherwise tiles without overlap, beyond the border where they do not fit."""
    largest = np.max([label.shape for _, label in cases], axis=0)
    room = [-(-n // m) * m for n, m in zip(largest, size, strict=True)]
    channels = cases[0][0].shape[-1]
    images = np.zeros((len(cases), *room, channels), np.uint8)
    labels = np.full(images.shape[:-1], -1, np.int8)
    offset, scale = np.zeros((2, len(cases), channels), np.float32)
    corners = []
    for i, (image, label) in enumerate(cases):
        place = (i, *(slice(0, n) for n in label.shape))
        images[place], labels[place] = image, label
        inside = image[label >= 0].astype(np.float64)
        offset[i], scale[i] = inside.mean(axis=0), inside.std(axis=0)
        if rng is None:
            starts = [range(0, n, m) for n, m in zip(label.shape, size, strict=True)]
            corner = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, len(size))
        else:
            centres = np.argwhere(label >= 0)
            centre = centres[rng.integers(0, len(centres), _CROPS)]
            corner = np.clip(centre - np.array(size) // 2, 0, np.array(label.shape) - size)
        corners.append(np.column_stack([np.full(len(corner), i), corner]))
    corner = np.concatenate(corners).astype(np.int32)
    mirror = np.zeros((len(corner), len(size)), bool) if rng is None else rng.random((len(corner), len(size))) < 0.5
    arrays = map(jnp.asarray, (images, labels, offset, np.maximum(scale, 1e-6), corner, mirror))
    return SegmentationSplit(*arrays, prior, size)
