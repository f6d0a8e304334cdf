"""Events of a water Cherenkov telescope: the stand-in for simulations that are not public.

Eight strings, one in the middle and seven around it at 60 m, of 36 modules each, 15 m apart. A straight muon crosses
them, going up (from a neutrino) or down (background); a module fires with probability 0.9 exp(-s / 25 m), s its
distance from the way, when the Cherenkov light arrives, with an error of 3 ns and a charge that falls with s. Forty
noise hits an event, on average, are uniform in time. Events with fewer than 5 hits on 2 strings are not recorded.
In "standin_shifted" every other event is measured by a detector that is not as simulated: 1.3 times the charge, half as
much noise again, strings that lean by up to 20 m and clocks that are 0.2 ns off. Source: card baikal_gvd, "Data".
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.event_reconstruction import cherenkov_time

__all__ = ["EventData", "EventSplit", "event_standin", "load_events", "module_places", "padded_events"]

_EVENTS = 6000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EventSplit:
    """Events of one part, padded to the same number of hits."""

    hits: Float[Array, "S N 5"]
    present: Bool[Array, "S N"]
    signal: Int[Array, "S N"]
    residual: Float[Array, "S N"]
    event: Int[Array, " S"]
    domain: Int[Array, " S"]

    def __len__(self) -> int:
        return self.hits.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The events of these numbers as a batch of event reconstruction; traceable."""
        return {
            "hits": self.hits[indices],
            "hit_mask": self.present[indices],
            "signal": self.signal[indices],
            "residual": self.residual[indices],
            "event": self.event[indices],
            "domain": self.domain[indices],
        }


@dataclass(frozen=True)
class EventData:
    """The three parts of a set."""

    train: EventSplit
    valid: EventSplit
    test: EventSplit


def module_places() -> np.ndarray:
    """(8, 36, 3): where the optical modules hang, in metres."""
    angle = 2 * np.pi * np.arange(7) / 7
    across = np.concatenate([[[0.0, 0.0]], 60 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)])
    height = 15.0 * (np.arange(36) - 17.5)
    return np.concatenate(
        [np.repeat(across[:, None], 36, axis=1), np.broadcast_to(height[:, None], (8, 36, 1))], axis=-1
    )


def event_standin(seed: int, events: int = _EVENTS, *, shifted: bool = False) -> list[dict[str, Any]]:
    """Events as they were recorded: hits (n, 5) in the order of time, signal and residual of each, event and domain."""
    rng = np.random.Generator(np.random.PCG64([seed, shifted]))
    as_drawn = module_places().reshape(-1, 3)
    string = np.repeat(np.arange(8), 36)
    recorded: list[dict[str, Any]] = []
    while len(recorded) < events:
        upward, azimuth = rng.random() < 0.5, rng.uniform(0, 2 * np.pi)
        cosine = rng.uniform(0.1, 1) * (1 if upward else -1)
        sine = np.sqrt(1 - cosine**2)
        direction = np.array([sine * np.cos(azimuth), sine * np.sin(azimuth), cosine])
        point = rng.uniform(-1, 1, 3) * np.array([60.0, 60.0, 180.0])
        place = as_drawn
        if shifted:
            lean = rng.uniform(-20, 20, (8, 2))[string] * place[:, 2:] / 270
            place = place + np.concatenate([lean, np.zeros((len(place), 1))], axis=1)
        expected = cherenkov_time(place, point, direction)
        along = (place - point) @ direction
        beside = np.sqrt(np.maximum(np.sum((place - point) ** 2, axis=1) - along**2, 0))
        fired = np.flatnonzero(rng.random(len(place)) < 0.9 * np.exp(-beside / 25))
        light = np.stack(
            [
                rng.gamma(2, 2 * np.exp(-beside[fired] / 40) + 0.3),
                expected[fired] + rng.normal(0, 3, len(fired)) + (rng.normal(0, 0.2, len(fired)) if shifted else 0),
            ],
            axis=-1,
        )
        where = rng.integers(0, len(place), rng.poisson(60 if shifted else 40))
        noise = np.stack([0.3 + rng.exponential(0.7, len(where)), rng.uniform(-1500, 1500, len(where))], axis=-1)
        module = np.concatenate([fired, where])
        if len(module) < 5 or len(np.unique(string[module])) < 2:
            continue
        seen = np.concatenate([light, noise])
        seen[:, 0] *= 1.3 if shifted else 1.0
        order = np.argsort(seen[:, 1], kind="stable")
        recorded.append({
            # Hits are reported where their modules were drawn, wherever they are.
            "hits": np.concatenate([seen, as_drawn[module]], axis=1)[order],
            "signal": (np.arange(len(module)) < len(fired))[order].astype(np.int32),
            "residual": (cherenkov_time(as_drawn[module], point, direction) - seen[:, 1])[order],
            "event": int(upward),
            "domain": int(shifted),
        })  # fmt: skip
    return recorded


def padded_events(events: list[dict[str, Any]], num_hits: int) -> EventSplit:
    """Events as one array; of those with too many hits, the ones of least charge go."""
    shape = (len(events), num_hits)
    hits, present = np.zeros((*shape, 5), np.float32), np.zeros(shape, bool)
    signal, residual = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, event in enumerate(events):
        kept = np.sort(np.argsort(-event["hits"][:, 0], kind="stable")[:num_hits])
        hits[i, : len(kept)], present[i, : len(kept)] = event["hits"][kept], True
        signal[i, : len(kept)], residual[i, : len(kept)] = event["signal"][kept], event["residual"][kept]
    kinds = [np.array([event[name] for event in events], np.int32) for name in ("event", "domain")]
    return EventSplit(*map(jnp.asarray, (hits, present, signal, residual, *kinds)))


def load_events(name: str, *, data_dir: str | None, num_hits: int, seed: int = 0) -> EventData:
    """The set of that name: "standin", or "standin_shifted", of which every other event is measured."""
    known = ["standin", "standin_shifted"]
    if name not in known:
        raise UserError(f"no set of events is called {name!r}{closest(name, known)}")
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; leave it out")
    if num_hits < 5:
        raise UserError(f"events have at least 5 hits: num_hits is at least that, not {num_hits}")
    if name == "standin":
        events = event_standin(seed)
    else:
        pairs = zip(*(event_standin(seed, _EVENTS // 2, shifted=shifted) for shifted in (False, True)), strict=True)
        events = list(itertools.chain.from_iterable(pairs))
    whole = padded_events(events, num_hits)
    borders = np.cumsum([0, *(len(whole) * np.array([8, 1, 1]) // 10)])
    parts = (slice(*pair) for pair in itertools.pairwise(borders))
    return EventData(*(jax.tree.map(lambda a, part=part: a[part], whole) for part in parts))
