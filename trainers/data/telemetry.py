"""Recordings of machines and spacecraft with labelled anomalies, cut into windows; and a stand-in.

The protocol of the literature (arXiv:1802.03903): a model sees the training rows, which have no labels, and every row
of the test part is scored. Columns are z-scored with training statistics; windows do not overlap in the test part, and
its last rows that fill no window are left out. Officially the whole test part serves for early stopping; ours holds
back the last fifth of the training rows. All recordings of a spacecraft, or one machine, make a set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["TelemetryData", "TelemetrySplit", "load_telemetry", "telemetry_standin"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TelemetrySplit:
    """Windows of one part; its recordings lie one after another on the device, and no window is of two of them."""

    values: Float[Array, "T N"]
    segment: Int[Array, " T"]  # number of each row's anomaly, 0: none
    starts: Int[Array, " W"]
    lookback: int = field(metadata={"static": True})
    anomalies: int = field(metadata={"static": True})  # how many there are

    def __len__(self) -> int:
        return self.starts.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a reconstruction batch; traceable."""
        first = self.starts[indices]
        cut = lambda rows: jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(rows, s, self.lookback))(first)  # noqa: E731
        segment = cut(self.segment)
        touched = (segment[:, :, None] == jnp.arange(1, self.anomalies + 1)).any(axis=1)
        return {"x": cut(self.values), "segment": segment, "touched": touched}


@dataclass(frozen=True)
class TelemetryData:
    """The three parts of a set."""

    train: TelemetrySplit
    valid: TelemetrySplit
    test: TelemetrySplit


def telemetry_standin(seed: int, *, rows: int = 4_000, sensors: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(training rows, test rows, which of these are anomalous): sensors that follow three hidden waves, plus noise.

    In an anomaly of 8 to 40 rows one sensor stops following: it repeats an other moment of its own, a shift by half of
    its slowest period. No value is out of range, so that only what belongs together tells.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    time = np.arange(2 * rows)
    periods = np.array([24.0, 37.0, 90.0])
    waves = np.sin(2 * np.pi * time[:, None] / periods + rng.uniform(0, 2 * np.pi, 3))
    mixing = rng.normal(0, 1, (3, sensors))
    clean = waves @ mixing
    values = clean + rng.normal(0, 0.05, clean.shape)
    train, test = values[:rows], values[rows:].copy()
    anomaly = np.zeros(rows, bool)
    first = 60
    while first + 40 < rows:
        length, sensor = rng.integers(8, 41), rng.integers(sensors)
        shifted = np.sin(2 * np.pi * (time[rows + first : rows + first + length, None] + 45) / periods) @ mixing
        test[first : first + length, sensor] = shifted[:, sensor] + rng.normal(0, 0.05, length)
        anomaly[first : first + length] = True
        first += length + rng.integers(150, 350)
    return train, test, anomaly


def _segments(anomaly: np.ndarray) -> np.ndarray:
    """Each row's run of anomalous rows, numbered from 1; 0 outside."""
    begins = anomaly & ~np.r_[False, anomaly[:-1]]
    return np.where(anomaly, np.cumsum(begins), 0)


def _recordings(name: str, data_dir: str | None, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    dataset, _, member = name.partition("/")
    if name == "standin":
        if data_dir is not None:
            raise UserError(
                "the stand-in is generated and takes no --data-dir; name a set with --data, e.g. smap_msl/SMAP"
            )
        return [telemetry_standin(seed)]
    if dataset == "smap_msl":
        found = {}
        for row in load_dataset(dataset, data_dir)["channels"]:
            found.setdefault(row["spacecraft"].decode(), []).append((row["train"], row["test"], row["anomaly"]))
    elif dataset == "smd":
        rows = load_dataset(dataset, data_dir)["machines"]
        found = {row["machine"].decode(): [(row["train"], row["test"], row["anomaly"])] for row in rows}
    else:
        raise UserError(f"no set of telemetry is called {name!r}{closest(dataset, ['standin', 'smap_msl', 'smd'])}")
    if member not in found:
        named = [f"{dataset}/{member}" for member in found]
        raise UserError(f"{dataset} is a collection without {member!r}: choose one of {', '.join(named)}")
    return found[member]


def load_telemetry(name: str, *, data_dir: str | None, lookback: int, stride: int = 1, seed: int = 0) -> TelemetryData:
    """The set of that name: "standin", "smap_msl/SMAP", "smap_msl/MSL" or "smd/<machine>".

    Training windows begin every `stride` rows. `seed` matters to the stand-in alone.
    """
    recordings = _recordings(name, data_dir, seed)
    rows = np.concatenate([train for train, _, _ in recordings])
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    std = np.where(std == 0, 1.0, std)  # a constant column stays constant instead of becoming infinite
    borders = [4 * len(train) // 5 for train, _, _ in recordings]
    parts = {
        "train": [train[:border] for (train, _, _), border in zip(recordings, borders, strict=True)],
        "valid": [train[border:] for (train, _, _), border in zip(recordings, borders, strict=True)],
        "test": [test for _, test, _ in recordings],
    }
    labels = np.concatenate([np.r_[anomaly, False] for _, _, anomaly in recordings])
    # A row between recordings, so that two anomalies that touch there stay two.
    ends = np.cumsum([len(test) + 1 for _, test, _ in recordings]) - 1
    segment = np.delete(_segments(labels), ends)
    anomalies = int(segment.max())
    splits = {}
    for part, pieces in parts.items():
        values = jnp.asarray(((np.concatenate(pieces) - mean) / std).astype(np.float32))
        numbers = segment if part == "test" else np.zeros(len(values))
        starts = _starts([len(piece) for piece in pieces], lookback, stride if part == "train" else lookback)
        if not len(starts):
            raise UserError(
                f"no recording of {name} has {lookback} rows in its {part} part: use a smaller --model.lookback"
            )
        splits[part] = TelemetrySplit(
            values, jnp.asarray(numbers, jnp.int32), jnp.asarray(starts, jnp.int32), lookback, anomalies
        )
    return TelemetryData(**splits)


def _starts(lengths: Sequence[int], lookback: int, stride: int) -> np.ndarray:
    begins = np.cumsum([0, *lengths[:-1]])
    return np.concatenate(
        [begin + np.arange(0, length - lookback + 1, stride) for begin, length in zip(begins, lengths, strict=True)]
    )
