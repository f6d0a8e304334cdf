"""A target in flight, seen by a camera and by radio: the stand-in for recordings that need a registration.

Each flight is a smooth curve in azimuth, elevation and distance, a sum of three sinusoids each. The camera is a
pin-hole that looks at the middle of the range; its detector gives the box with an error of two of 640 by 480 pixels,
and the frame is black but for a bright spot there, as wide as the box. Echoes have an error of 0.3 degrees and 2 m,
and one in ten is lost. The parts are different flights. Source: card camera_isac, "Data".
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.errors import UserError
from zoo.tasks.beam_tracking import OFFSET, SPAN

__all__ = ["FlightSplit", "TrackingData", "flight_standin", "load_beam_tracking", "project"]

_FLIGHTS = {"train": 48, "valid": 6, "test": 6}
_FRAMES = 80  # a flight
_PIXELS = np.array([640.0, 480.0])
_LOST = 0.1  # share of the echoes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlightSplit:
    """Frames of all flights after one another, and where windows begin; frames are painted when a batch is drawn."""

    box: Float[Array, "F 4"]
    echo: Float[Array, "F E"]
    truth: Float[Array, "F 3"]
    start: Int[Array, " S"]
    lookback: int = field(metadata={"static": True})
    image_size: tuple[int, int] = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.start.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a batch of beam tracking; traceable."""
        frames = self.start[indices][:, None] + jnp.arange(self.lookback)
        box = self.box[frames]
        return {
            "image": paint(box, self.image_size),
            "box": box,
            "echo": self.echo[frames].at[:, -1].set(0.0),
            "y": self.truth[frames],
        }


@dataclass(frozen=True)
class TrackingData:
    """The three parts of a set."""

    train: FlightSplit
    valid: FlightSplit
    test: FlightSplit


def paint(box: Float[Array, "*B 4"], size: tuple[int, int]) -> Float[Array, "*B H W 3"]:
    """Black frames with a reddish spot in each box."""
    height, width = size

    def profile(centre, spread, count):
        places = (jnp.arange(count) + 0.5) / count
        # Never narrower than a pixel, so that it is seen wherever it is.
        return jnp.exp(-0.5 * jnp.square((places - centre[..., None]) / jnp.maximum(spread, 1 / count)[..., None]))

    x, y, w, h = jnp.moveaxis(box, -1, 0)
    spot = profile(y, h, height)[..., :, None] * profile(x, w, width)[..., None, :]
    return spot[..., None] * jnp.array([1.0, 0.8, 0.6])


def project(place: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) of a target at azimuth, elevation (degrees) and distance (m), of a camera in the same place."""
    middle = np.radians(OFFSET[:2] + SPAN[:2] / 2)
    azimuth, elevation = np.moveaxis(np.radians(place[..., :2]), -1, 0)
    across = np.cos(elevation) * np.sin(azimuth - middle[0])
    level = np.cos(elevation) * np.cos(azimuth - middle[0])
    ahead = level * np.cos(middle[1]) + np.sin(elevation) * np.sin(middle[1])
    up = np.sin(elevation) * np.cos(middle[1]) - level * np.sin(middle[1])
    side = 8.0 / place[..., 2]  # the target's width is 8 % of the frame's in 100 m
    centre = np.stack([0.5 + 0.6 * across / ahead, 0.5 - 0.6 * up / ahead], axis=-1)
    return np.concatenate([centre, np.stack([side, 0.6 * side], axis=-1)], axis=-1)


def flight_standin(seed: int, flights: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes (N, F, 4), echoes (N, F, 3), true places (N, F, 3), both normalised) of N flights of F frames."""
    rng = np.random.Generator(np.random.PCG64(seed))
    share = rng.dirichlet(np.ones(3), (flights, 3))  # of three sinusoids, for each of three coordinates
    phase = rng.uniform(0, 2 * np.pi, (flights, 3, 3, 1))
    period = rng.uniform(40, 120, (flights, 3, 3, 1))
    waves = np.sin(2 * np.pi * np.arange(_FRAMES) / period + phase)
    truth = 0.5 + 0.5 * np.einsum("nqs,nqsf->nfq", share, waves)
    box = project(OFFSET + SPAN * truth)
    box[..., :2] += rng.normal(size=box[..., :2].shape) * 2 / _PIXELS
    echo = truth + rng.normal(size=truth.shape) * np.array([0.3, 0.3, 2.0]) / SPAN
    echo[rng.random(echo.shape[:2]) < _LOST] = 0.0
    return box.astype(np.float32), echo.astype(np.float32), truth.astype(np.float32)


def load_beam_tracking(
    name: str,
    *,
    data_dir: str | None,
    lookback: int,
    image_size: tuple[int, int],
    echo_channels: int = 3,
    seed: int = 0,
) -> TrackingData:
    """The set of that name: "standin", windows of `lookback` frames of flights."""
    if name != "standin":
        raise UserError(f"no set of tracked flights is called {name!r}: there is only the stand-in")
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; leave it out")
    if not 2 <= lookback <= _FRAMES:
        raise UserError(
            f"a flight of the stand-in has {_FRAMES} frames: lookback must be from 2 to that, not {lookback}"
        )
    box, echo, truth = flight_standin(seed, sum(_FLIGHTS.values()))
    echo, parts, first = echo[..., :echo_channels], {}, 0
    for part, count in _FLIGHTS.items():
        columns = (jnp.asarray(a[first : first + count].reshape(-1, a.shape[-1])) for a in (box, echo, truth))
        starts = np.add.outer(np.arange(count) * _FRAMES, np.arange(_FRAMES - lookback + 1)).ravel()
        parts[part] = FlightSplit(*columns, jnp.asarray(starts, jnp.int32), lookback, image_size)
        first += count
    return TrackingData(**parts)
