"""A stand-in for manipulation: a hand carries one object to a place on another, seen as points with features.

On a table lies the passive object, one of three outlines that look the same when turned by half; one of its two ends is
the slot. The hand holds the active object, one of three plates, by its handle, and has to bring the plate's tip to the
slot: where the hand goes depends on both objects. As a foundation model would, features say how near a point is to
the handle and to the tip of the active object, and to the slot and to the other end of the passive one, which are alike
without them. A demonstration goes straight there at constant speed and stays. Training has every window of every
demonstration; validation and test their beginnings, when where to go cannot be told from how the hand moves. `roll_out`
acts until the end. Source: card heterogenmanip, Data (stand-in).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.errors import UserError

__all__ = ["SceneData", "SceneSplit", "draw_scenes", "load_scenes", "roll_out"]

_SCENES = {"train": 4_000, "valid": 200, "test": 200}
_STEP = 0.1  # the hand's way in a step; the table is 2 wide
_STILL = 6  # steps at the goal
_SIGHT = 0.04  # a feature's width
_SIZE = 0.25  # of the passive object: how far its ends are from its middle
_LENGTH = 0.3  # of the active one, from handle to tip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SceneSplit:
    """Demonstrations of one part and the windows into them; `way` is the hand's, its last place repeated."""

    active: Float[Array, "D N 3"]  # as it is held at first
    active_features: Float[Array, "D N 2"]
    passive: Float[Array, "D N 3"]
    passive_features: Float[Array, "D N 2"]
    table: Float[Array, "D N 3"]
    way: Float[Array, "D L 3"]
    demonstration: Int[Array, " S"]
    first: Int[Array, " S"]  # of the moments seen; below 0 before the first, which is then repeated
    moments: int = field(metadata={"static": True})
    horizon: int = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.first.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a batch of manipulation; traceable."""
        number, first = self.demonstration[indices], self.first[indices]
        steps = first[:, None] + np.arange(max(self.moments, self.horizon + 1))
        places = self.way[number[:, None], jnp.clip(steps, 0, self.way.shape[1] - 1)]
        # What is done first follows the first moment seen, also where that is the beginning repeated.
        done = self.way[number[:, None], jnp.clip(steps[:, : self.horizon] + 1, 0, self.way.shape[1] - 1)]
        return self.seen(number, places[:, : self.moments]) | {"y": done}

    def seen(self, number: Int[Array, " B"], state: Float[Array, "B T 3"]) -> dict[str, Array]:
        """What is seen of these demonstrations' scenes when the hand, and with it the object, is at these places."""
        moved = state - self.way[number, :1]
        active = self.active[number][:, None] + moved[:, :, None]
        still = {
            name: jnp.repeat(getattr(self, name)[number][:, None], state.shape[1], axis=1)
            for name in ("active_features", "passive", "passive_features", "table")
        }
        quarter, table = active.shape[2] // 4, still.pop("table")
        scene = [still["passive"][:, :, :quarter], active[:, :, :quarter], table[:, :, 2 * quarter :]]
        return {"environment": jnp.concatenate(scene, axis=2), "active": active, "state": state, **still}


@dataclass(frozen=True)
class SceneData:
    """The three parts of a set."""

    train: SceneSplit
    valid: SceneSplit
    test: SceneSplit


def _outline(rng: np.random.Generator, kind: int, count: int) -> np.ndarray:
    """Points of a shape that reaches from -1 to 1 along x and looks the same turned by half."""
    t = rng.uniform(0, 1, count)
    if kind == 0:  # an ellipse
        return np.stack([np.cos(2 * np.pi * t), 0.6 * np.sin(2 * np.pi * t)], axis=-1)
    if kind == 1:  # the sides of a rectangle
        side = rng.integers(0, 4, count)
        along = 2 * t - 1
        x = np.where(side < 2, along, np.where(side == 2, 1.0, -1.0))
        return np.stack([x, 0.5 * np.where(side < 2, np.where(side == 0, 1.0, -1.0), along)], axis=-1)
    angle = np.pi * (t - 0.5)  # an eight
    turn = np.where(rng.random(count) < 0.5, 1.0, -1.0)
    return turn[:, None] * np.stack([0.5 + 0.5 * np.cos(2 * angle), 0.5 * np.sin(2 * angle)], axis=-1)


def _plate(rng: np.random.Generator, kind: int, count: int) -> np.ndarray:
    """Points of a plate with its handle at the origin and its tip at x = 1."""
    u, v = rng.uniform(0, 1, count), rng.uniform(-1, 1, count)
    if kind == 0:  # a disc
        radius, angle = np.sqrt(u), np.pi * v
        return np.stack([0.5 + 0.5 * radius * np.cos(angle), 0.5 * radius * np.sin(angle)], axis=-1)
    if kind == 1:  # a wedge
        return np.stack([np.sqrt(u), 0.5 * v * np.sqrt(u)], axis=-1)
    return np.stack([u, 0.12 * v], axis=-1)  # a bar


def _near(points: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """(N, K) how like each mark the points of an object are, stretched to [0, 1]."""
    like = np.exp(-np.square(np.linalg.norm(points[:, None] - marks, axis=-1) / _SIGHT) / 2)
    return (like - like.min(axis=0)) / (like.max(axis=0) - like.min(axis=0) + 1e-8)


def draw_scenes(seed: int, scenes: int, *, num_points: int) -> dict[str, np.ndarray]:
    """The arrays of `SceneSplit` up to `way`, and `length`, the steps of each way until the hand stays."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows: dict[str, list[np.ndarray]] = {}
    longest = int(np.ceil(np.linalg.norm([2.3, 2.3, 0.3]) / _STEP)) + 1 + _STILL
    for _ in range(scenes):
        kind, shape = rng.integers(0, 3, 2).tolist()
        middle, turn, lean = rng.uniform(-0.7, 0.7, 2), *rng.uniform(-np.pi, np.pi, 2)
        spin, tilt = (np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in (turn, lean))
        ends = _SIZE * np.array([[1.0, 0.0], [-1.0, 0.0]]) @ spin + middle
        passive = _SIZE * _outline(rng, shape, num_points) @ spin + middle
        goal = np.append(ends[0] - _LENGTH * tilt[0], 0.0)
        while True:
            start = np.append(rng.uniform(-1, 1, 2), 0.3)
            if np.linalg.norm(start - goal) > 0.8:
                break
        plate = _LENGTH * _plate(rng, kind, num_points) @ tilt
        plate[:2], passive[:2] = [np.zeros(2), _LENGTH * tilt[0]], ends  # what is marked is among the points
        active = np.concatenate([plate, np.zeros((num_points, 1))], axis=-1) + start
        marks = np.stack([start, start + np.append(_LENGTH * tilt[0], 0.0)])
        distance = np.linalg.norm(goal - start)
        travelled = np.minimum(_STEP * np.arange(longest) / distance, 1.0)[:, None]
        flat = np.concatenate([rng.uniform(-1, 1, (num_points, 2)), np.zeros((num_points, 1))], axis=-1)
        passive = np.concatenate([passive, np.zeros((num_points, 1))], axis=-1)
        row = {
            "active": active,
            "active_features": _near(active, marks),
            "passive": passive,
            "passive_features": _near(passive, np.concatenate([ends, np.zeros((2, 1))], axis=-1)),
            "table": flat,
            "way": start + travelled * (goal - start),
            "length": np.array(int(np.ceil(distance / _STEP))),
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {name: np.stack(values) for name, values in rows.items()}


def load_scenes(name: str, *, data_dir: str | None, config: Any, seed: int = 0) -> SceneData:
    """The stand-in; a paper's own sets are recorded in a simulator that is not part of this."""
    if name != "standin":
        raise UserError(f"no set of demonstrations is called {name!r}: there is only the stand-in")
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; leave it out")
    there = {"state_dim": 3, "action_dim": 3, "environment_channels": 3, "active_features": 2, "passive_features": 2}
    wrong = [f"{field} {getattr(config, field)}" for field, size in there.items() if getattr(config, field) != size]
    if wrong:
        raise UserError(f"the stand-in has {there}: it does not suit a model of {', '.join(wrong)}")
    drawn = draw_scenes(seed, sum(_SCENES.values()), num_points=config.num_points)
    length, parts = drawn.pop("length"), {}
    borders = np.cumsum([0, *_SCENES.values()])
    for part, (low, high) in zip(_SCENES, itertools.pairwise(borders), strict=True):
        first = 1 - config.num_observations
        windows = [
            (i, s)
            for i in range(high - low)
            for s in (range(first, length[low + i] + _STILL - config.horizon + 1) if part == "train" else (first,))
        ]
        demonstration, start = (jnp.asarray(column, jnp.int32) for column in np.array(windows).T)
        arrays = {n: jnp.asarray(a[low:high], jnp.float32) for n, a in drawn.items()}
        parts[part] = SceneSplit(
            **arrays,
            demonstration=demonstration,
            first=start,
            moments=config.num_observations,
            horizon=config.horizon,
        )
    return SceneData(**parts)


def roll_out(
    policy: Callable[[dict[str, Array]], Float[Array, "B p 3"]], split: SceneSplit, *, rounds: int = 8
) -> tuple[Float[Array, "D 3"], Float[Array, "D 3"]]:
    """(where the hand ends, where it should) after so many rounds in which `policy` sees and its actions are done."""
    number = jnp.arange(split.way.shape[0])
    state = jnp.repeat(split.way[:, :1], split.moments, axis=1)
    for _ in range(rounds):
        done = policy(split.seen(number, state[:, -split.moments :]))
        state = jnp.concatenate([state, done.astype(state.dtype)], axis=1)
    return state[:, -1], split.way[:, -1]
