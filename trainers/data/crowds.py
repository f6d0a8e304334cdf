"""Crowds with a point on each head: the photographs of ShanghaiTech, and a stand-in.

The target is a Gaussian of unit mass on each point, summed over the cells of a model's map. (The official code resizes
it by bicubic interpolation, which keeps the number only where Gaussians are wide: card csrnet_attention, Training.)
Photographs have ImageNet's normalisation and lie in the upper left corner of a frame, those that are larger shrunk to
it. Training examples are their quarters, each also mirrored; every fifth training photograph is for validation.
Gaussians: part_B 15 pixels; part_A 0.3 times the mean distance to the three nearest heads.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped
from PIL import Image

import layers
from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["CrowdData", "CrowdSplit", "adaptive_sigma", "cell_density", "draw_crowds", "load_crowds"]

_CELL = 8  # pixels
_COUNTS = {"train": 600, "valid": 100, "test": 100}
_MARGIN = 6  # pixels between heads and the border, of the stand-in
_MOST = 60  # heads in one of its images
_SIGMA = {"standin": 3.0, "shanghaitech/part_A": None, "shanghaitech/part_B": 15.0}  # pixels; None: adaptive
_MEAN, _DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrowdSplit:
    """Images of one part on the device, normalised when they are drawn if they are pixels (uint8)."""

    image: Shaped[Array, "N H W 3"]
    density: Float[Array, "N h w 1"]
    count: Float[Array, " N"]
    expected: Float[Array, ""]  # mean count of the training examples
    quarters: bool = field(default=False, metadata={"static": True})  # examples are quarters, and those mirrored

    def __len__(self) -> int:
        return len(self.image) * (8 if self.quarters else 1)

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The images of these numbers as a batch of density regression; traceable."""
        indices = jnp.asarray(indices)
        if self.quarters:
            which, kind = jnp.divmod(indices, 8)
            x, density = (_quarter(a, which, kind) for a in (self.image, self.density))
            count = jnp.sum(density, axis=(1, 2, 3))
        else:
            x, density, count = self.image[indices], self.density[indices], self.count[indices]
        if x.dtype == jnp.uint8:
            x = (x.astype(jnp.float32) / 255 - _MEAN) / _DEVIATION
        return {"x": x, "density": density, "count": count, "expected": jnp.broadcast_to(self.expected, count.shape)}


def _quarter(images: Array, which: Int[Array, " B"], kind: Int[Array, " B"]) -> Shaped[Array, "B h w C"]:
    """Of each of these images the quarter kind % 4, mirrored from kind 4 on."""
    _, height, width, channels = images.shape
    size = (1, height // 2, width // 2, channels)

    def one(which, kind):
        start = (which, kind // 2 % 2 * size[1], kind % 2 * size[2], 0)
        part = jax.lax.dynamic_slice(images, start, size)[0]
        return jnp.where(kind < 4, part, part[:, ::-1])

    return jax.vmap(one)(which, kind)


@dataclass(frozen=True)
class CrowdData:
    """The three parts of a set."""

    train: CrowdSplit
    valid: CrowdSplit
    test: CrowdSplit


def adaptive_sigma(points: Float[np.ndarray, "P 2"], *, height: int, width: int) -> Float[np.ndarray, " P"]:
    """0.1 (d_1 + d_2 + d_3), the distances to the three nearest other points; a single one: a quarter of the mean side.

    Fewer than three others count as many times as it takes. Source: card csrnet_attention, Data.
    """
    if len(points) < 2:
        return np.full(len(points), (height + width) / 8, np.float32)
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.sort(np.partition(distance, min(2, len(points) - 2), axis=1)[:, : min(3, len(points) - 1)], axis=1)
    return (0.3 * nearest.mean(axis=1)).astype(np.float32)


def cell_density(
    points: Float[np.ndarray, "N P 2"],
    there: Bool[np.ndarray, "N P"],
    *,
    height: int,
    width: int,
    sigma: float | Float[np.ndarray, "N P"],
) -> Float[Array, "N h w 1"]:
    """Points (x, y) that are there, in pixels, as the number of them in each cell of 8 x 8."""
    sigmas = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), there.shape)
    maps = layers.gaussian_density_map(jnp.asarray(points), sigmas, (height, width), mask=jnp.asarray(there))
    cells = maps.reshape(len(points), height // _CELL, _CELL, width // _CELL, _CELL)
    return jnp.sum(cells, axis=(2, 4))[..., None]


def draw_crowds(
    rng: np.random.Generator, count: int, *, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images (N, H, W, 3) around zero, head points (N, 60, 2) as (x, y), which of them are there (N, 60)).

    1 to 60 heads, dark discs of radius 2 to 4 with a bright rim, in front of each other where they meet, over a slope
    of brightness with rectangles and dark discs without a rim, which are none. Source: card csrnet_attention, Data.
    """
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    images = np.empty((count, height, width, 3), np.float32)
    points = np.zeros((count, _MOST, 2), np.float32)
    numbers = rng.integers(1, _MOST + 1, count)
    for image, place, number in zip(images, points, numbers, strict=True):
        slope = rng.uniform(-0.3, 0.3, 2)
        image[:] = (0.5 + slope[0] * rows / height + slope[1] * columns / width)[..., None]
        for _ in range(rng.integers(4, 9)):
            low = rng.integers(0, (height - 4, width - 4))
            high = low + rng.integers(3, (height // 3, width // 3))
            image[low[0] : high[0], low[1] : high[1]] = rng.uniform(0.2, 0.8, 3)
        for x, y, radius in rng.uniform((0, 0, 2), (width, height, 4), (rng.integers(0, 12), 3)):
            image[np.hypot(columns - x, rows - y) < radius] = rng.uniform(0, 0.25, 3)
        place[:number] = rng.uniform(_MARGIN, (width - _MARGIN, height - _MARGIN), (number, 2))
        for (x, y), radius in zip(place[:number], rng.uniform(2, 4, number), strict=True):
            top, left = max(int(y) - 6, 0), max(int(x) - 6, 0)
            near = np.s_[top : int(y) + 7, left : int(x) + 7]
            distance = np.hypot(columns[near] - x, rows[near] - y)
            image[near][distance < radius + 1] = 0.95
            image[near][distance < radius] = rng.uniform(0.0, 0.2)
    images += 0.03 * rng.normal(size=images.shape).astype(np.float32)
    return (images - 0.5) / 0.25, points, np.arange(_MOST) < numbers[:, None]


def load_crowds(name: str, *, data_dir: str | None, height: int, width: int, seed: int = 0) -> CrowdData:
    """The set of that name, "standin" (drawn by `seed`) or a part of ShanghaiTech, in frames of this size."""
    if name not in _SIGMA:
        raise UserError(f"no set of crowds is called {name!r}{closest(name, _SIGMA)}")
    least = 2 * _CELL if name != "standin" else _CELL
    if height % least or width % least or min(height, width) < 32:
        raise UserError(
            f"frames of {height} x {width} are no multiples of {least} pixels, or smaller than 32: set --model.height "
            "and --model.width"
        )
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in of crowds is generated and takes no --data-dir; name a set with --data")
        rng = np.random.Generator(np.random.PCG64(seed))
        drawn = {part: draw_crowds(rng, count, height=height, width=width) for part, count in _COUNTS.items()}
        targets = {
            part: cell_density(points, there, height=height, width=width, sigma=_SIGMA[name])
            for part, (_, points, there) in drawn.items()
        }
        parts = {part: (drawn[part][0], targets[part], drawn[part][2].sum(axis=1)) for part in drawn}
    else:
        sources = load_dataset(name, data_dir)
        whole, test = (_photographs(sources[part], height, width, _SIGMA[name]) for part in ("train", "test"))
        held = np.arange(len(whole[0])) % 5 == 4
        parts = {"train": tuple(a[~held] for a in whole), "valid": tuple(a[held] for a in whole), "test": test}
    quarters = name != "standin"
    expected = jnp.float32(np.mean(parts["train"][2]) / (4 if quarters else 1))

    def split(part: str) -> CrowdSplit:
        image, density, count = map(jnp.asarray, parts[part])
        return CrowdSplit(image, density, count.astype(jnp.float32), expected, quarters and part == "train")

    return CrowdData(**{part: split(part) for part in parts})


def _photographs(source, height: int, width: int, sigma: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels, targets, counts) of all examples of a source, in frames whose empty part is grey after normalisation."""
    images = np.empty((len(source), height, width, 3), np.uint8)
    images[:] = np.round(255 * _MEAN)
    targets, counts = [], np.array([len(source[i]["points"]) for i in range(len(source))])
    for i, image in enumerate(images):
        pixels, points = (np.asarray(source[i][name]) for name in ("image", "points"))
        size = pixels.shape[:2]
        scale = min(1.0, height / size[0], width / size[1])
        if scale < 1:
            shrunk = tuple(max(int(n * scale), 1) for n in size)
            pixels = np.asarray(Image.fromarray(pixels).resize(shrunk[::-1], Image.Resampling.BILINEAR))
            points = points * scale
        image[: pixels.shape[0], : pixels.shape[1]] = pixels
        size = pixels.shape[:2]
        spread = adaptive_sigma(points, height=size[0], width=size[1]) if sigma is None else sigma
        # As many points for every image of about the same number: few programs are compiled.
        room = 1 << max(len(points) - 1, 0).bit_length()
        filled = np.zeros((1, room, 2), np.float32)
        filled[0, : len(points)] = points
        sigmas = np.ones((1, room), np.float32)
        sigmas[0, : len(points)] = spread
        there = np.arange(room)[None] < len(points)
        targets.append(np.asarray(cell_density(filled, there, height=height, width=width, sigma=sigmas))[0])
    return images, np.stack(targets), counts
