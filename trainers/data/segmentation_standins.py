"""Stand-ins of segmentation: generated, the same on every machine, each with what its paper's mechanism is for."""

from collections.abc import Callable

import numpy as np

from zoo.errors import UserError

__all__ = ["STANDINS", "shapes_standin", "spine_standin"]

Part = tuple[np.ndarray, np.ndarray]  # images (N, *size) float32, labels (N, *size) int8


def _smooth_noise(rng: np.random.Generator, size: tuple[int, ...], cells: int) -> np.ndarray:
    """Unit-scale noise at the corners of that many cells an axis, linear between them."""
    field = rng.normal(size=(cells + 1,) * len(size))
    for axis, length in enumerate(size):
        position = np.linspace(0, cells, length, endpoint=False)
        low = position.astype(int)
        share = (position - low).reshape(-1, *(1,) * (len(size) - axis - 1))
        field = np.take(field, low, axis) * (1 - share) + np.take(field, low + 1, axis) * share
    return field


def _split(images: np.ndarray, labels: np.ndarray, **counts: int) -> dict[str, Part]:
    ends = np.cumsum(list(counts.values()))
    return {
        part: (images[end - count : end], labels[end - count : end])
        for (part, count), end in zip(counts.items(), ends, strict=True)
    }


def shapes_standin(
    seed: int, *, size: tuple[int, ...], num_classes: int, counts: tuple[int, int, int] = (400, 50, 50)
) -> dict[str, Part]:
    """One to three ellipses or rectangles on textured noise, the brighter the higher their class; and far from all of
    them a small white satellite, whose class is that of the largest. Only what is seen elsewhere tells it.

    Source: card attention_mamba, Data.
    """
    if len(size) != 2 or not 1 <= num_classes <= 10 or min(size) < 32:
        raise UserError(
            f"the stand-in has images of at least 32 x 32 pixels and up to 10 classes, not {size} and num_classes "
            f"{num_classes}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    total, highest, unit = sum(counts), max(num_classes - 1, 1), min(size) / 64
    rows, columns = np.ogrid[: size[0], : size[1]]
    images, labels = np.empty((total, *size), np.float32), np.zeros((total, *size), np.int8)
    for image, label in zip(images, labels, strict=True):
        image[:] = 0.15 + 0.05 * _smooth_noise(rng, size, 8) + 0.05 * rng.normal(size=size)
        for _ in range(rng.integers(1, 4)):
            kind = rng.integers(1, highest + 1)
            half = rng.uniform(5, 13, 2) * unit
            middle = rng.uniform(half, np.array(size) - half)
            across, along = (rows - middle[0]) / half[0], (columns - middle[1]) / half[1]
            inside = np.maximum(abs(across), abs(along)) < 1 if rng.random() < 0.5 else across**2 + along**2 < 1
            image[inside] = 0.3 + 0.5 * kind / highest
            label[inside] = kind
        image += 0.1 * rng.normal(size=size)
        sizes = np.bincount(label.ravel(), minlength=highest + 1)[1:]
        # Of eight places the one that is farthest from everything.
        middles = rng.uniform(3 * unit, np.array(size) - 3 * unit, (8, 2))
        there = np.argwhere(label > 0)
        gap = [np.abs(there - m).max(axis=1).min() for m in middles]
        middle = middles[int(np.argmax(gap))]
        satellite = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (2.5 * unit) ** 2
        image[satellite] = 1.3
        label[satellite] = 1 + int(np.argmax(sizes))
    return _split(images, labels, train=counts[0], valid=counts[1], test=counts[2])


def spine_standin(
    seed: int, *, size: tuple[int, ...], num_classes: int, counts: tuple[int, int, int] = (64, 16, 16)
) -> dict[str, Part]:
    """Volumes with blobs of soft tissue, a winding column of four to six bright bodies with dark discs between them, to
    be found, and straight rods, as bright and as thick, that are not.

    Source: card spine_context_resunet, Data.
    """
    if len(size) != 3 or num_classes != 1 or min(size) < 16:
        raise UserError(
            f"the stand-in has volumes of at least 16 voxels an axis and one class beside the background, not {size} "
            f"and num_classes {num_classes}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    total, scale = sum(counts), np.array(size) / 32
    grid = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in size), indexing="ij"), axis=-1) / scale  # in 32nds
    images, labels = np.empty((total, *size), np.float32), np.zeros((total, *size), np.int8)
    for image, label in zip(images, labels, strict=True):
        image[:] = 0.35 + 0.03 * _smooth_noise(rng, size, 4)
        bodies, phase, reach = rng.integers(4, 7), rng.uniform(0, 2 * np.pi), rng.uniform(1, 3)
        middle, thick = rng.uniform(10, 22, 2), rng.uniform(2.5, 3.5)
        step = 32 / bodies
        for number in range(bodies):
            height = (number + 0.5) * step
            place = np.array([height, *middle])
            place[1] += reach * np.sin(2 * np.pi * height / 32 + phase)
            away = (grid - place) / (0.42 * step, thick, thick)
            inside = (np.abs(away[..., 0]) < 1) & ((away[..., 1:] ** 2).sum(axis=-1) < 1)
            disc = (np.abs(away[..., 0]) < 1.2) & ((away[..., 1:] ** 2).sum(axis=-1) < 1)
            image[disc & ~inside] = 0.2
            image[inside] = rng.uniform(0.6, 0.7)
            label[inside] = 1
        for _ in range(rng.integers(2, 5)):
            towards = rng.normal(size=3)
            towards /= np.linalg.norm(towards)
            away = grid - rng.uniform(4, 28, 3)
            along = away @ towards
            distance = np.linalg.norm(away - along[..., None] * towards, axis=-1)
            rod = (distance < rng.uniform(1.8, 3)) & (np.abs(along) < rng.uniform(8, 16)) & (label == 0)
            image[rod] = rng.uniform(0.6, 0.7)
        image += 0.03 * rng.normal(size=size)
    return _split(images, labels, train=counts[0], valid=counts[1], test=counts[2])


STANDINS: dict[str, Callable[..., dict[str, Part]]] = {
    "attention_mamba": shapes_standin,
    "spine_context_resunet": spine_standin,
}
