"""Towns after a storm, seen from above as points: a stand-in for aerial surveys such as 3DAeroRelief.

Ground with a road across it, houses with flat roofs, houses whose roofs and walls have come down and lie about, and
trees. Houses of both kinds have the same colours: what tells them apart is their shape. Of each voxel one point is
kept, as Pointcept's grid sampling does. Source: card optnet, Data ("Stand-in").
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["CLASSES", "TownData", "TownSplit", "draw_town", "load_towns", "voxelised"]

CLASSES = ("background", "building, damaged", "building, not damaged", "road", "tree")
_COUNTS = {"train": 640, "valid": 100, "test": 200}
_LARGEST = 40.0  # metres along a town
_LOWEST = -0.5  # metres, where the voxels begin
_GROUND, _ROAD, _TREE = (0.45, 0.42, 0.32), (0.38, 0.38, 0.40), (0.28, 0.42, 0.24)
_COLOR_NOISE = 0.12


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TownSplit:
    """Scenes of one part, padded to the same number of points."""

    coord: Float[Array, "S N 3"]
    color: Float[Array, "S N 3"]
    cell: Int[Array, "S N 3"]
    present: Bool[Array, "S N"]
    label: Int[Array, "S N"]
    prior: Float[Array, " K"]  # of the training part

    def __len__(self) -> int:
        return self.coord.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The scenes of these numbers as a batch of point segmentation; traceable."""
        coord, cell, present, label = (v[indices] for v in (self.coord, self.cell, self.present, self.label))
        return {
            "coord": coord,
            "feat": jnp.concatenate([coord, self.color[indices]], axis=-1),
            "cell": cell.astype(jnp.int32),
            "point_mask": present,
            "label": label.astype(jnp.int32),
            "prior": jnp.broadcast_to(self.prior, (label.shape[0], *self.prior.shape)),
        }


@dataclass(frozen=True)
class TownData:
    """The three parts of a set, and what its classes are called."""

    train: TownSplit
    valid: TownSplit
    test: TownSplit
    classes: tuple[str, ...] = CLASSES


def _house(rng: np.random.Generator, middle: np.ndarray, density: float, *, damaged: bool) -> np.ndarray:
    wide, deep, high = rng.uniform([2.5, 2.5, 2.2], [4.5, 4.5, 4.5])
    walls = rng.uniform(-0.5, 0.5, (round(2 * (wide + deep) * high * density), 3))
    across = rng.random(len(walls)) < deep / (wide + deep)  # whether the wall is one across the width
    walls[across, 0] = np.sign(walls[across, 0]) / 2
    walls[~across, 1] = np.sign(walls[~across, 1]) / 2
    walls = (walls + np.array([0, 0, 0.5])) * [wide, deep, high]
    roof = rng.uniform(-0.5, 0.5, (round(wide * deep * density), 3)) * [wide, deep, 0] + [0, 0, high]
    if damaged:
        # Walls end at different heights, the roof leans, has holes and rough parts; the rest lies around.
        top = high * (0.35 + 0.3 * np.sin(3 * walls[:, 0] + rng.uniform(0, 6)) * np.sin(3 * walls[:, 1]))
        walls = walls[walls[:, 2] < top]
        lean = rng.uniform(-0.25, 0.25, 2)
        roof[:, 2] = high * rng.uniform(0.3, 0.8) + roof[:, :2] @ lean + rng.normal(0, 0.4, len(roof))
        roof = roof[rng.random(len(roof)) < 0.8]
        turn, out = rng.uniform(0, 2 * np.pi, len(roof) // 2), rng.uniform(0.5, 0.8, len(roof) // 2)
        debris = np.stack([wide * out * np.cos(turn), deep * out * np.sin(turn), rng.exponential(0.3, len(out))], -1)
        roof = np.concatenate([roof, debris])
    angle = rng.uniform(0, np.pi)
    spin = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return np.concatenate([walls, roof]) @ spin.T + [*middle, 0]


def _things(rng: np.random.Generator, side: float, density: float) -> Iterator[tuple[np.ndarray, tuple, int]]:
    """(points, colour, class) of all there is; the road is cut out of the ground afterwards."""
    ground = rng.uniform(-side / 2, side / 2, (round(side**2 * density), 3))
    ground[:, 2] = rng.normal(0, 0.05, len(ground))
    angle, shift = rng.uniform(0, np.pi), rng.uniform(-side / 6, side / 6)
    away = np.abs(ground[:, :2] @ [np.cos(angle), np.sin(angle)] - shift)
    road = away < 1.4
    yield ground[~road], _GROUND, 0
    yield ground[road], _ROAD, 3
    for number in range(max(round(side**2 / 36), 2)):
        places = rng.uniform(-side / 2 + 1.5, side / 2 - 1.5, (8, 2))
        free = np.abs(places @ [np.cos(angle), np.sin(angle)] - shift) > 2.8
        if not free.any():
            continue
        middle = places[np.argmax(free)]
        damaged = bool((number + rng.integers(2)) % 2)
        color = tuple(rng.uniform(0.35, 0.65) + rng.uniform(-0.08, 0.12, 3))
        yield _house(rng, middle, density, damaged=damaged), color, 1 if damaged else 2
    for _ in range(max(round(side**2 / 40), 2)):
        radii = rng.uniform(0.7, 1.4, 3)
        direction = rng.normal(size=(round(2 * np.pi * radii[0] ** 2 * density), 3))
        crown = radii * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        middle = rng.uniform([-side / 2, -side / 2, 1.6], [side / 2, side / 2, 3.0])
        yield crown + middle, _TREE, 4


def draw_town(rng: np.random.Generator, *, side: float, density: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places (P, 3) in metres, colours (P, 3) in 0 .. 1, classes (P,)) of a square of that side, `density` points a
    square metre. Source: card optnet, Data ("Stand-in")."""
    points, colors, labels = [], [], []
    for place, color, label in _things(rng, side, density):
        points.append(place)
        colors.append(np.asarray(color) + rng.normal(0, _COLOR_NOISE, place.shape))
        labels.append(np.full(len(place), label))
    place, color, label = (np.concatenate(v) for v in (points, colors, labels))
    inside = np.all(np.abs(place[:, :2]) < side / 2, axis=1) & (place[:, 2] > _LOWEST)
    return place[inside], np.clip(color[inside], 0, 1), label[inside]


def voxelised(rng: np.random.Generator, place: np.ndarray, *, cell: float, lower: np.ndarray) -> tuple:
    """(numbers of one random point of each voxel that has one, their voxels (V, 3)), in random order."""
    order = rng.permutation(len(place))
    cells = np.floor((place[order] - lower) / cell).astype(np.int32)
    _, first = np.unique(cells, axis=0, return_index=True)
    first = rng.permutation(first)
    return order[first], cells[first]


def load_towns(
    name: str, *, data_dir: str | None, num_points: int, num_classes: int, cell: float, depth: int, seed: int = 0
) -> TownData:
    """The set of that name, which is "standin": scenes as wide as 2^`depth` voxels of `cell` metres, 40 m at most."""
    if name != "standin":
        raise UserError(
            f"no set of point scenes is called {name!r}{closest(name, ('standin',))} (3DAeroRelief has no public copy "
            "that can be fetched)"
        )
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir")
    if num_classes != len(CLASSES):
        raise UserError(
            f"the stand-in's towns have {len(CLASSES)} classes, not {num_classes}: set --model.num-classes "
            f"{len(CLASSES)}"
        )
    side = min(cell * (1 << depth), _LARGEST)
    lower = np.array([-side / 2, -side / 2, _LOWEST])
    parts, prior = {}, None
    for number, (part, scenes) in enumerate(_COUNTS.items()):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        shape = (scenes, num_points)
        coord, color = np.zeros((*shape, 3), np.float32), np.zeros((*shape, 3), np.float32)
        cells, label, present = np.zeros((*shape, 3), np.int16), np.full(shape, -1, np.int8), np.zeros(shape, bool)
        for row in range(scenes):
            place, shade, kind = draw_town(rng, side=side, density=3 / cell**2)
            chosen, voxel = voxelised(rng, place, cell=cell, lower=lower)
            low = np.flatnonzero(voxel.max(axis=1) < 1 << depth)[:num_points]
            chosen, voxel, count = chosen[low], voxel[low], len(low)
            coord[row, :count], color[row, :count] = place[chosen], 2 * shade[chosen] - 1
            cells[row, :count], label[row, :count], present[row, :count] = voxel, kind[chosen], True
        if prior is None:
            counts = np.bincount(label[present], minlength=num_classes)
            prior = jnp.asarray(counts / counts.sum(), jnp.float32)
        parts[part] = TownSplit(*map(jnp.asarray, (coord, color, cells, present, label)), prior)
    return TownData(**parts)
