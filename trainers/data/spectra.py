"""Spectra of a transmitter that walks about a room: the stand-in for measured ones such as NeRF2's RFID set.

Four walls reflect, the receiver stands still. Each transmitter is heard directly and from its four mirror images (the
image method, first order): a lobe of 10 degrees in each direction, of power proportional to 1 / distance^2, times the
wall's share of what it reflects. Source: card ga_wireless_splat, Data ("Stand-in").
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["SpectrumData", "SpectrumSplit", "load_spectra", "room_spectra"]

_COUNTS = {"train": 200, "valid": 40, "test": 60}
_HALF_ROOM = np.array([4.0, 2.5, 3.0])  # metres from the middle to the walls; y is down
_REFLECTED = (0.7, 0.5, 0.6, 0.4)  # of the walls at -x, +x, -z, +z
_RECEIVER = np.array([0.4, 0.3, -0.5])
_LOBE = np.radians(10.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectrumSplit:
    """Places of the transmitter and what was received."""

    tx: Float[Array, "S 3"]
    spectrum: Float[Array, "S H W"]
    receiver: Float[Array, " 3"]
    rotation: Float[Array, "3 3"]
    mean: Float[Array, "H W"]  # of the training part

    def __len__(self) -> int:
        return self.tx.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The spectra of these numbers as a batch of spectrum rendering; traceable."""
        tx, y = self.tx[indices], self.spectrum[indices]
        shared = {name: getattr(self, name) for name in ("receiver", "rotation", "mean")}
        return {"tx": tx, "y": y} | {k: jnp.broadcast_to(v, (tx.shape[0], *v.shape)) for k, v in shared.items()}


@dataclass(frozen=True)
class SpectrumData:
    """The three parts of a set."""

    train: SpectrumSplit
    valid: SpectrumSplit
    test: SpectrumSplit


def room_spectra(tx: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """(S, H, W) powers, the largest of all 1, of transmitters (S, 3) in metres; elevation down, azimuth across.

    A direction (x, y, z) has azimuth atan2(x, z) and elevation asin(y / r); azimuths go around.
    """
    images, share = [tx], [1.0]
    for wall, reflected in enumerate(_REFLECTED):
        axis, side = (0, 2)[wall // 2], (-1, 1)[wall % 2]
        image = tx.copy()
        image[:, axis] = 2 * side * _HALF_ROOM[axis] - tx[:, axis]
        images.append(image)
        share.append(reflected)
    offset = np.stack(images, axis=1) - _RECEIVER
    distance = np.linalg.norm(offset, axis=-1)
    direction = offset / distance[..., None]
    elevation = np.pi * ((np.arange(height) + 0.5) / height - 0.5)[:, None]
    azimuth = 2 * np.pi * ((np.arange(width) + 0.5) / width - 0.5)
    grid = np.stack(
        np.broadcast_arrays(
            np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)
        ),
        axis=-1,
    )
    angle = np.arccos(np.clip(np.einsum("hwc,sic->sihw", grid, direction), -1, 1))
    lobes = (np.array(share) / distance**2)[..., None, None] * np.exp(-((angle / _LOBE) ** 2) / 2)
    power = lobes.sum(axis=1)
    return np.sqrt(power / power.max(axis=(1, 2), keepdims=True)).astype(np.float32)


def load_spectra(name: str, *, data_dir: str | None, height: int, width: int, seed: int = 0) -> SpectrumData:
    """The set of that name, which is "standin": 300 transmitters in a room, 200 of them to train on."""
    if name != "standin":
        raise UserError(f"no set of spectra is called {name!r}{closest(name, ('standin',))}")
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir")
    rng = np.random.Generator(np.random.PCG64(seed))
    parts, mean = {}, None
    for part, count in _COUNTS.items():
        tx = rng.uniform(-1, 1, (count, 3)) * 0.85 * _HALF_ROOM
        # Nobody stands on the receiver.
        close = np.linalg.norm(tx - _RECEIVER, axis=1) < 0.8
        tx[close, 0] += 1.6
        spectra = room_spectra(tx, height=height, width=width)
        mean = jnp.asarray(spectra.mean(axis=0)) if mean is None else mean
        pose = jnp.asarray(-_RECEIVER, jnp.float32), jnp.eye(3)
        parts[part] = SpectrumSplit(jnp.asarray(tx, jnp.float32), jnp.asarray(spectra), *pose, mean)
    return SpectrumData(**parts)
