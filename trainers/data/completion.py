"""Shapes of which one side was seen: a stand-in of random bodies, and the partial scans of PCN's demonstration.

A view point is drawn on the unit sphere, and the points nearest to it, a quarter to three quarters of all, are what is
missing (the training crop of ShapeNet-55). What is left is resampled to as many points as the model takes: a random
part of them, or all and places without a point, as PCN does. Source: card mamba_complete_3d, Data.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["CloudData", "CloudSplit", "crop", "draw_body", "load_completion", "resampled"]

_COUNTS = {"train": 2_000, "valid": 200, "test": 400}
# View points of the test crops of real scans: the corners of a cube.
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / np.sqrt(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CloudSplit:
    """Shapes of one part."""

    seen: Float[Array, "S N 3"]
    present: Bool[Array, "S N"]
    complete: Float[Array, "S M 3"]

    def __len__(self) -> int:
        return self.seen.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The shapes of these numbers as a batch of point completion; traceable."""
        return {"x": self.seen[indices], "point_mask": self.present[indices], "y": self.complete[indices]}


@dataclass(frozen=True)
class CloudData:
    """The three parts of a set."""

    train: CloudSplit
    valid: CloudSplit
    test: CloudSplit


def _on_box(rng: np.random.Generator, count: int, size: np.ndarray, middle: np.ndarray) -> np.ndarray:
    area = np.prod(size) / size
    axis = rng.choice(3, count, p=area / area.sum())
    points = rng.uniform(-0.5, 0.5, (count, 3))
    points[np.arange(count), axis] = np.where(rng.random(count) < 0.5, -0.5, 0.5)
    return points * size + middle


def _box(rng: np.random.Generator, count: int) -> np.ndarray:
    return _on_box(rng, count, rng.uniform(0.3, 1, 3), np.zeros(3))


def _angle(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two boxes, as a seat and its back."""
    width, depth, thick, high, back = rng.uniform([0.5, 0.5, 0.15, 0.4, 0.1], [1, 1, 0.4, 0.9, 0.25])
    seat, upright = np.array([width, depth, thick]), np.array([width, back, high])
    areas = [s[0] * s[1] + s[1] * s[2] + s[0] * s[2] for s in (seat, upright)]
    first = round(count * areas[0] / sum(areas))
    place = np.array([0, (depth - back) / 2, (thick + high) / 2])
    return np.concatenate([_on_box(rng, first, seat, np.zeros(3)), _on_box(rng, count - first, upright, place)])


def _cylinder(rng: np.random.Generator, count: int) -> np.ndarray:
    radius, height = rng.uniform([0.2, 0.5], [0.6, 1.5])
    turn, up = rng.uniform(0, 2 * np.pi, count), rng.uniform(-0.5, 0.5, count) * height
    cap = rng.random(count) < radius / (radius + height)  # both caps, of side and caps
    up = np.where(cap, np.sign(up) * height / 2, up)
    out = radius * np.where(cap, np.sqrt(rng.random(count)), 1.0)
    return np.stack([out * np.cos(turn), out * np.sin(turn), up], axis=-1)


def _ellipsoid(rng: np.random.Generator, count: int) -> np.ndarray:
    direction = rng.normal(size=(count, 3))
    return rng.uniform(0.3, 1, 3) * direction / np.linalg.norm(direction, axis=-1, keepdims=True)


def draw_body(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) points on a box, a cylinder, an ellipsoid or two boxes at an angle, upright, turned about the
    vertical, centred and scaled to the unit sphere. Source: card mamba_complete_3d, Data ("Stand-in")."""
    kind = (_box, _angle, _cylinder, _ellipsoid)[rng.integers(4)]
    turn = rng.uniform(0, 2 * np.pi)
    spin = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return _to_unit_sphere(rng.permutation(kind(rng, count)) @ spin.T)


def _to_unit_sphere(points: np.ndarray) -> np.ndarray:
    centred = points - points.mean(axis=0)
    return centred / np.linalg.norm(centred, axis=1).max()


def crop(points: np.ndarray, view: np.ndarray, removed: int) -> np.ndarray:
    """The points but for the `removed` ones nearest to the view point, in their order."""
    nearest = np.argsort(np.sum((points - view) ** 2, axis=1), kind="stable")
    return points[np.sort(nearest[removed:])]


def resampled(rng: np.random.Generator, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(points (count, 3), whether there is one): a random part of them, or all and zeros after them."""
    kept = rng.permutation(len(points))[:count]
    padded = np.zeros((count, 3), np.float32)
    padded[: len(kept)] = points[kept]
    return padded, np.arange(count) < len(kept)


def _split(rows: list[tuple]) -> CloudSplit:
    return CloudSplit(*(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)))


def _bodies(rng: np.random.Generator, shapes: int, num_points: int, num_targets: int) -> CloudSplit:
    rows, total = [], 4 * num_points
    for _ in range(shapes):
        body = draw_body(rng, total + num_targets)
        view = rng.normal(size=3)
        left = crop(body[:total], view / np.linalg.norm(view), int(rng.integers(total // 4, 3 * total // 4 + 1)))
        rows.append((*resampled(rng, left, num_points), body[total:].astype(np.float32)))
    return _split(rows)


def _scans(rng: np.random.Generator, data_dir: str | None, num_points: int, num_targets: int) -> CloudSplit:
    """Real scans, each without the quarter that is nearest to one of eight view points; what they lack themselves
    nobody knows, so that the scan is the target."""
    rows = []
    for cloud in load_dataset("pcn_demo_clouds", data_dir)["clouds"]:
        scan = _to_unit_sphere(np.asarray(cloud["points"], np.float64))
        for view in _CORNERS:
            target = scan[rng.permutation(np.arange(num_targets) % len(scan))]
            left = crop(scan, view, len(scan) // 4)
            rows.append((*resampled(rng, left, num_points), target.astype(np.float32)))
    return _split(rows)


def load_completion(name: str, *, data_dir: str | None, num_points: int, num_targets: int, seed: int = 0) -> CloudData:
    """The set of that name: "standin", or "pcn_demo_clouds", trained on the stand-in and tested on real scans."""
    if name not in ("standin", "pcn_demo_clouds"):
        known = ("standin", "pcn_demo_clouds")
        raise UserError(f"no set of point clouds is called {name!r}{closest(name, known)}")
    if name == "standin" and data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; name the scans with --data pcn_demo_clouds")
    sizes = {"num_points": num_points, "num_targets": num_targets}
    parts = {}
    for number, (part, shapes) in enumerate(_COUNTS.items()):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        if part == "test" and name != "standin":
            parts[part] = _scans(rng, data_dir, **sizes)
        else:
            parts[part] = _bodies(rng, shapes, **sizes)
    return CloudData(**parts)
