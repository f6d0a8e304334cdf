"""Trajectories of agents among others: the protocol of the ETH/UCY pedestrians, and a stand-in.

An example is one agent (the ego) in a window of lookback + horizon frames in which it is seen throughout, with those
of its neighbours that are seen in all frames of the past; the nearest at its end come first. Positions are centred on
the ego's last one, and places where nobody is hold what an absent agent at the origin of the recording would.
Leave one scene out: the test part is every window of that scene; of every other recording the last tenth of its
frames is for validation, and no window lies across the border. Source: arXiv:1803.10892, section 4.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.prepare import load_dataset
from trainers.data.standins import trajectory_standin
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["SCENES", "SceneSplit", "TrajectoryData", "load_trajectories", "scene_windows"]

SCENES = {
    "eth": ("biwi_eth",),
    "hotel": ("biwi_hotel",),
    "univ": ("students001", "students003"),
    "zara01": ("crowds_zara01",),
    "zara02": ("crowds_zara02",),
}
_STEP = 10  # a frame number's advance in 0.4 s


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SceneSplit:
    """Windows of one part, as recorded; a batch is centred when it is drawn."""

    past: Float[Array, "S T N 2"]
    present: Bool[Array, "S N"]
    future: Float[Array, "S P 2"]

    def __len__(self) -> int:
        return self.past.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a batch of trajectory forecasting; traceable."""
        past, present, future = self.past[indices], self.present[indices], self.future[indices]
        origin = past[:, -1:, :1]
        return {"x": past - origin, "agent_mask": present, "y": future - origin[:, :, 0]}


@dataclass(frozen=True)
class TrajectoryData:
    """The three parts of a set."""

    train: SceneSplit
    valid: SceneSplit
    test: SceneSplit


def scene_windows(
    frame: np.ndarray, agent: np.ndarray, position: np.ndarray, *, lookback: int, horizon: int, num_agents: int
) -> tuple[np.ndarray, SceneSplit]:
    """(number of each window's first frame, windows) of a recording given as rows of observations."""
    number = (frame - frame.min()) // _STEP
    if np.any((frame - frame.min()) % _STEP):
        raise UserError(f"frames of a recording do not advance by {_STEP}: it is not one of ETH/UCY at 2.5 a second")
    _, agent = np.unique(agent, return_inverse=True)
    tracks = np.full((number.max() + 1, agent.max() + 1, 2), np.nan, np.float32)
    tracks[number, agent] = position
    seen = ~np.isnan(tracks[..., 0])

    def throughout(length: int) -> np.ndarray:
        """(F, A): seen in this frame and the following ones, `length` in all."""
        total = np.cumsum(np.pad(seen, ((1, length), (0, 0))), axis=0)
        return total[length : length + len(seen)] - total[: len(seen)] == length

    known, whole = throughout(lookback), throughout(lookback + horizon)
    windows = list(_windows(tracks, known, whole, lookback, horizon, num_agents))
    if not windows:
        raise UserError(f"no agent of a recording is seen for {lookback} + {horizon} frames: use shorter ones")
    first, *columns = (np.stack(column) for column in zip(*windows, strict=True))
    return first, SceneSplit(*map(jnp.asarray, columns))


def _windows(
    tracks: np.ndarray, known: np.ndarray, whole: np.ndarray, lookback: int, horizon: int, num_agents: int
) -> Iterator[tuple]:
    for first, ego in np.argwhere(whole):
        last = first + lookback - 1
        others = np.flatnonzero(known[first])
        distance = np.linalg.norm(tracks[last, others] - tracks[last, ego], axis=-1)
        distance[others == ego] = -1.0
        chosen = others[np.argsort(distance, kind="stable")][:num_agents]
        past = np.zeros((lookback, num_agents, 2), np.float32)
        past[:, : len(chosen)] = tracks[first : last + 1, chosen]
        yield first, past, np.arange(num_agents) < len(chosen), tracks[last + 1 : last + 1 + horizon, ego]


def load_trajectories(
    name: str, *, data_dir: str | None, lookback: int, horizon: int, num_agents: int, seed: int = 0
) -> TrajectoryData:
    """The set of that name: "standin", or "eth_ucy/<scene to be tested>". `seed` matters to the stand-in alone."""
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; name a scene with --data eth_ucy/eth")
        scenes = trajectory_standin(seed, lookback=lookback, horizon=horizon, num_agents=num_agents)
        whole = SceneSplit(*map(jnp.asarray, scenes))
        borders = np.cumsum([0, *(len(whole) * np.array([8, 1, 1]) // 10)])
        return TrajectoryData(*(_part(whole, slice(*pair)) for pair in itertools.pairwise(borders)))
    known = [f"eth_ucy/{scene}" for scene in SCENES]
    if name not in known:
        raise UserError(f"no set of trajectories is called {name!r}{closest(name, ['standin', *known])}")
    tested = SCENES[name.partition("/")[2]]
    parts: dict[str, list[SceneSplit]] = {"train": [], "valid": [], "test": []}
    for recording in load_dataset("eth_ucy", data_dir)["recordings"]:
        rows = (recording[key] for key in ("frame", "agent", "position"))
        first, windows = scene_windows(*rows, lookback=lookback, horizon=horizon, num_agents=num_agents)
        if recording["recording"].decode() in tested:
            parts["test"].append(windows)
            continue
        frames = 1 + np.ptp(recording["frame"]) // _STEP
        border = frames * 9 // 10
        parts["train"].append(_part(windows, first + lookback + horizon <= border))
        parts["valid"].append(_part(windows, first >= border))
    for part, found in parts.items():
        if not sum(map(len, found)):
            raise UserError(
                f"the recordings in {data_dir or 'the download'} leave nothing for the {part} part of {name}: "
                f"it is tested on {' and '.join(tested)} and trained on others"
            )
    return TrajectoryData(
        **{part: jax.tree.map(lambda *a: jnp.concatenate(a), *found) for part, found in parts.items()}
    )


def _part(windows: SceneSplit, chosen) -> SceneSplit:
    return jax.tree.map(lambda array: array[chosen], windows)
