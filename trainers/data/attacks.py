"""Vital signs with falsified readings injected: stays in intensive care, and a stand-in.

Records are dealt to the three parts (70/15/15), then attacked, each by itself; scaling (median and interquartile range
of each channel) is fitted to the training records before the attack. A window of `lookback` samples, one begins at each
sample, is falsified if any of its readings is. Source: card dstan_med, "Data".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.builders.measurements import PARAMETERS
from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.series.dstan_med import BOUNDS

__all__ = [
    "ATTACKS",
    "AttackData",
    "AttackedWindows",
    "inject_attacks",
    "load_attacks",
    "vital_signs",
    "vitals_standin",
]

# (magnitude in standard deviations of the channel, samples) at severities L1 to L4.
ATTACKS = {
    "instant": ((0.5, 1), (1, 1), (2, 1), (4, 1)),
    "constant": ((0.5, 3), (1.5, 5), (2.5, 10), (5, 10)),
    "drift": ((1, 10), (2, 10), (2, 20), (4, 20)),
    "bias": ((0.75, 10), (1.5, 20), (3, 20), (6, 20)),
}
_RATE = 0.05  # probability that an attack begins at a sample outside attacks
_SEVERITIES = {"L1": (0,), "L2": (1,), "L3": (2,), "L4": (3,)}
_MIXED = {"standin": (1, 2, 3), "physionet2012": (0, 1, 2, 3)}
# PhysioNet's names for the channels of the paper, in its order.
_CHANNELS = ("HR", "SaO2", "NISysABP", "NIDiasABP", "RespRate", "Temp")
_HOURS, _LEAST_CHANNELS = 48, 4


def inject_attacks(
    record: Float[np.ndarray, "T C"], rng: np.random.Generator, *, severities: Sequence[int], rate: float = _RATE
) -> tuple[Float[np.ndarray, "T C"], Bool[np.ndarray, " T"]]:
    """(the record as received, which samples are falsified).

    An attack falsifies one channel at random: by one jump, one constant, a line from zero, or a bias, of a severity
    among `severities` (0 to 3). The next can begin when it is over.
    """
    received, label = record.copy(), np.zeros(len(record), bool)
    spread = record.std(axis=0) + 1e-8
    t = 0
    while t < len(record):
        if rng.random() >= rate:
            t += 1
            continue
        channel, kind = rng.integers(record.shape[1]), list(ATTACKS)[rng.integers(len(ATTACKS))]
        magnitude, duration = ATTACKS[kind][severities[rng.integers(len(severities))]]
        size, here = magnitude * spread[channel], slice(t, min(t + duration, len(record)))
        count = here.stop - t
        offset = {
            "instant": lambda size=size: rng.normal(0, size),
            "constant": lambda size=size: rng.uniform(0, size),
            "drift": lambda size=size, duration=duration, count=count: np.linspace(0, size, duration)[:count],
            "bias": lambda size=size: rng.uniform(size / 2, size),
        }[kind]()
        received[here, channel] += rng.choice([-1, 1]) * offset
        label[here] = True
        t += count
    return received, label


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttackedWindows:
    """All windows of one part; its records lie one after another on the device, and no window is of two of them."""

    scaled: Float[Array, "T C"]
    physical: Float[Array, "T C"]
    falsified: Bool[Array, " T"]
    starts: Int[Array, " W"]
    positive_weight: Float[Array, ""]
    lookback: int = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.starts.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a batch of anomaly detection; traceable."""
        first = self.starts[indices]
        cut = lambda rows: jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(rows, s, self.lookback))(first)  # noqa: E731
        last = first + self.lookback - 1
        received = self.physical[last]
        return {
            "x": cut(self.scaled),
            "received": received,
            "change": received - self.physical[last - 1],
            "y": jnp.any(cut(self.falsified), axis=1).astype(jnp.float32),
            "positive_weight": jnp.broadcast_to(self.positive_weight, first.shape),
        }


@dataclass(frozen=True)
class AttackData:
    """The three parts of a set."""

    train: AttackedWindows
    valid: AttackedWindows
    test: AttackedWindows


def vitals_standin(seed: int, *, records: int = 40, steps: int = 1_000) -> list[np.ndarray]:
    """(T, 6) records of heart rate, SpO2, systolic and diastolic pressure, breathing rate and temperature.

    HR = 75 + 10 sin + AR(1), pressures and breathing follow it, SpO2 and temperature wander slowly. Source: card
    dstan_med, "Data".
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def wander(spread: float, memory: float) -> np.ndarray:
        shocks = rng.normal(0, spread * np.sqrt(1 - memory**2), steps)
        path = np.zeros(steps)
        for t in range(1, steps):
            path[t] = memory * path[t - 1] + shocks[t]
        return path

    found = []
    for _ in range(records):
        time, period, phase = np.arange(steps), rng.uniform(150, 400), rng.uniform(0, 2 * np.pi)
        heart = 75 + 10 * np.sin(2 * np.pi * time / period + phase) + wander(1.5, 0.8)
        systolic = 1.2 * heart + 30 + wander(2.0, 0.8)
        diastolic, breathing = 0.6 * systolic + wander(1.5, 0.8), 0.2 * heart + wander(0.5, 0.8)
        found.append(
            np.stack([heart, 97 + wander(0.4, 0.8), systolic, diastolic, breathing, 37 + wander(0.15, 0.98)], axis=1)
        )
    return found


def vital_signs(minute: np.ndarray, parameter: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(48, 6) the last reading of each hour and channel of a stay, NaN where there is none within the bounds."""
    grid = np.full((_HOURS, len(_CHANNELS)), np.nan)
    for channel, (name, (low, high, _)) in enumerate(zip(_CHANNELS, BOUNDS["physionet"].values(), strict=True)):
        chosen = (parameter == PARAMETERS.index(name)) & (value >= low) & (value <= high)
        order = np.argsort(minute[chosen], kind="stable")
        hours = np.minimum(minute[chosen][order] // 60, _HOURS - 1)
        grid[hours, channel] = value[chosen][order]
    return grid


def _stays(data_dir: str | None) -> list[np.ndarray]:
    grids = [
        vital_signs(stay["minute"], stay["parameter"], stay["value"])
        for stay in load_dataset("physionet2012", data_dir)["set_a"]
    ]
    grids = [grid for grid in grids if (~np.isnan(grid)).any(axis=0).sum() >= _LEAST_CHANNELS]
    if not grids:
        raise UserError(f"no stay of physionet2012 has readings of {_LEAST_CHANNELS} of {', '.join(_CHANNELS)}")
    usual = []
    for readings, (low, high, _) in zip(np.concatenate(grids).T, BOUNDS["physionet"].values(), strict=True):
        seen = readings[~np.isnan(readings)]
        usual.append(np.median(seen) if len(seen) else (low + high) / 2)
    return [_filled(grid, np.array(usual)) for grid in grids]


def _filled(grid: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Each gap holds the reading before, the first ones the reading after, a channel without any the usual value."""
    seen, hours = ~np.isnan(grid), np.arange(len(grid))[:, None]
    before = np.maximum.accumulate(np.where(seen, hours, -1), axis=0)
    source = np.where(before >= 0, before, seen.argmax(axis=0))
    return np.where(seen.any(axis=0), np.take_along_axis(grid, source, axis=0), usual)


def load_attacks(name: str, *, data_dir: str | None, lookback: int, seed: int = 0) -> AttackData:
    """ "standin" or "physionet2012", attacked at mixed severities, or with "/L1" to "/L4" after it at that one."""
    dataset, _, severity = name.partition("/")
    if dataset not in _MIXED:
        raise UserError(f"no set of vital signs is called {name!r}{closest(dataset, _MIXED)}")
    if severity and severity not in _SEVERITIES:
        raise UserError(f"{name}: the severity of attacks is one of {', '.join(_SEVERITIES)}, not {severity!r}")
    if dataset == "standin" and data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; name a set with --data, e.g. physionet2012")
    records = vitals_standin(seed) if dataset == "standin" else _stays(data_dir)
    if len(records) < 7:
        raise UserError(f"{dataset} has {len(records)} records, of which 15 % are too few for validation and test")
    shortest = min(map(len, records))
    if shortest < lookback:
        raise UserError(f"a record of {dataset} has {shortest} samples: use a smaller --model.lookback than {lookback}")
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    records = [records[i] for i in rng.permutation(len(records))]
    borders = (7 * len(records) // 10, 17 * len(records) // 20)
    parts = {"train": records[: borders[0]], "valid": records[borders[0] : borders[1]], "test": records[borders[1] :]}
    quartiles = np.quantile(np.concatenate(parts["train"]), [0.25, 0.5, 0.75], axis=0)
    middle, width = quartiles[1], quartiles[2] - quartiles[0]
    width = np.where(width == 0, 1.0, width)  # a constant channel stays constant instead of becoming infinite
    severities = _SEVERITIES[severity] if severity else _MIXED[dataset]
    splits, weight = {}, None
    for part, members in parts.items():
        received, labels = zip(*(inject_attacks(r, rng, severities=severities) for r in members), strict=True)
        begins = np.cumsum([0, *(len(r) for r in received[:-1])])
        starts = np.concatenate(
            [begin + np.arange(len(r) - lookback + 1) for begin, r in zip(begins, received, strict=True)]
        )
        physical, label = np.concatenate(received), np.concatenate(labels)
        if weight is None:  # of the training part
            total = np.concatenate([[0], np.cumsum(label)])
            positive = int((total[starts + lookback] > total[starts]).sum())
            weight = (len(starts) - positive) / max(positive, 1)
        splits[part] = AttackedWindows(
            jnp.asarray((physical - middle) / width, jnp.float32),
            jnp.asarray(physical, jnp.float32),
            jnp.asarray(label),
            jnp.asarray(starts, jnp.int32),
            jnp.float32(weight),
            lookback,
        )
    return AttackData(**splits)
