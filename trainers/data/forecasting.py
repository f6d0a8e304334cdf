"""Long-term forecasting data: the protocol of the literature in one place.

Each column is z-scored with mean and standard deviation of the training rows. Windows of look-back + horizon rows slide
by one; those of validation and test reach back into the rows before, so that their first target is the first row of
their part. Source: card ister, "Data" (arXiv:2012.07436, arXiv:2310.06625).
"""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.catalogue import DATASETS, DatasetFacts
from trainers.data.cross_channel import CROSS_CHANNEL_COLUMNS, cross_channel_series
from trainers.data.csv_series import RawSeries
from trainers.data.prepare import load_dataset
from trainers.data.standins import forecasting_standin
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["ForecastingData", "WindowedSplit", "calendar_marks", "load_forecasting", "load_series", "split_borders"]

_GENERATED = {
    "standin": (forecasting_standin, tuple(f"series {i}" for i in range(7))),
    "cross_channel": (cross_channel_series, CROSS_CHANNEL_COLUMNS),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowedSplit:
    """All windows of one part of a series: the series lies on the device once, a batch is sliced from it there."""

    values: Float[Array, "T N"]
    marks: Float[Array, "T F"] | None
    starts: Int[Array, " W"]  # first row of each window
    lookback: int = field(metadata={"static": True})
    horizon: int = field(metadata={"static": True})
    targets: int | None = field(default=None, metadata={"static": True})  # how many of the last columns are forecast

    def __len__(self) -> int:
        return self.starts.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Float[Array, "B _ _"]]:
        """The windows of these numbers as a forecasting batch; traceable."""
        lookback, length = self.lookback, self.lookback + self.horizon
        first = self.starts[indices]
        window = jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(self.values, s, length))(first)
        targets = window.shape[-1] if self.targets is None else self.targets
        batch = {"x": window[:, :lookback], "y": window[:, lookback:, -targets:]}
        if self.marks is not None:
            batch["x_mark"] = jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(self.marks, s, lookback))(first)
        return batch


@dataclass(frozen=True)
class ForecastingData:
    """A scaled series cut into three parts, and what is needed to speak of it in its own units."""

    train: WindowedSplit
    valid: WindowedSplit
    test: WindowedSplit
    columns: tuple[str, ...]
    mean: np.ndarray  # (N,), of the training rows
    std: np.ndarray
    times: np.ndarray  # (T,) datetime64[s], empty where the set has no dates

    def unscale(self, values: np.ndarray) -> np.ndarray:
        """From z-scores to the units of the file."""
        return np.asarray(values, np.float64) * self.std + self.mean

    def last_window(self) -> dict[str, jax.Array]:
        """The final look-back of the whole series as a batch of one, to forecast what no file holds yet."""
        lookback = self.test.lookback
        batch = {"x": self.test.values[None, -lookback:]}
        if self.test.marks is not None:
            batch["x_mark"] = self.test.marks[None, -lookback:]
        return batch

    def future_times(self) -> np.ndarray:
        """(P,) the dates after the last row at its step, or row numbers where there are no dates."""
        steps = np.arange(1, self.test.horizon + 1)
        if self.times.size == 0:
            return len(self.test.values) - 1 + steps
        return self.times[-1] + steps * (self.times[-1] - self.times[-2])


def calendar_marks(times: np.ndarray, frequency: str) -> np.ndarray | None:
    """(T, F) calendar features in [-0.5, 0.5], those the literature uses for each sampling frequency; None undated.

    hour: hour, weekday, day of month, day of year; quarter_hour: minute first; day: without the hour; week: day of
    month and ISO week.
    """
    if times.size == 0:
        return None
    days = times.astype("datetime64[D]")
    months, years = days.astype("datetime64[M]"), days.astype("datetime64[Y]")
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday; Monday is 0
    # A week belongs to the year of its Thursday, and is numbered by it.
    thursday = days + (3 - weekday).astype("timedelta64[D]")
    week = (thursday - thursday.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) // 7
    seconds = (times - days).astype("timedelta64[s]").astype(np.int64)
    feature = {
        "minute": seconds // 60 % 60 / 59,
        "hour": seconds // 3600 / 23,
        "weekday": weekday / 6,
        "day_of_month": (days - months.astype("datetime64[D]")).astype(np.int64) / 30,
        "day_of_year": (days - years.astype("datetime64[D]")).astype(np.int64) / 365,
        "week": week / 52,
    }
    names = {
        "quarter_hour": ("minute", "hour", "weekday", "day_of_month", "day_of_year"),
        "hour": ("hour", "weekday", "day_of_month", "day_of_year"),
        "day": ("weekday", "day_of_month", "day_of_year"),
        "week": ("day_of_month", "week"),
    }[frequency]
    return np.stack([feature[name] for name in names], axis=1).astype(np.float32) - np.float32(0.5)


def split_borders(rows: int, facts: DatasetFacts, lookback: int) -> dict[str, tuple[int, int]]:
    """The rows [first, last) that each part may touch, look-back included."""
    if facts.split_rows is not None:
        train, valid, test = facts.split_rows
        if rows < train + valid + test:
            raise UserError(f"{facts.files[0]} has {rows} rows, its protocol needs {train + valid + test}")
    else:
        train, test = int(rows * 0.7), int(rows * 0.2)
        valid = rows - train - test
    end = train + valid
    return {"train": (0, train), "valid": (train - lookback, end), "test": (end - lookback, end + test)}


def load_forecasting(name: str, *, data_dir: str | None, lookback: int, horizon: int, seed: int = 0) -> ForecastingData:
    """The data set of that name, scaled and cut into windows; "ett_h1/OT" is its column OT alone. `seed` matters to
    generated sets alone; of cross_channel only the last column is to be forecast."""
    name, _, column = name.partition("/")
    known = [*_GENERATED, *(key for key, facts in DATASETS.items() if facts.columns)]
    if name not in known:
        raise UserError(f"no forecasting data set is called {name!r}{closest(name, known)}")
    facts = DATASETS["standin" if name in _GENERATED else name]
    if name in _GENERATED:
        if data_dir is not None:
            what = "the stand-in" if name == "standin" else name
            raise UserError(f"{what} is generated and takes no --data-dir; name the set with --data, e.g. ett_h1")
        generate, columns = _GENERATED[name]
        raw = generate(seed)
    else:
        raw, columns = load_series(name, data_dir), facts.columns
    if column:
        if column not in columns:
            raise UserError(f"{name} has no column {column!r}{closest(column, columns)}")
        raw, columns = dataclasses.replace(raw, values=raw.values[:, [columns.index(column)]]), (column,)

    borders = split_borders(len(raw.values), facts, lookback)
    first, last = borders["train"]
    mean, std = raw.values[first:last].mean(axis=0), raw.values[first:last].std(axis=0)
    std = np.where(std == 0, 1.0, std)  # a constant column stays constant instead of becoming infinite
    values = jnp.asarray(((raw.values - mean) / std).astype(np.float32))
    marks = calendar_marks(raw.times, facts.frequency)
    marks = None if marks is None else jnp.asarray(marks)

    targets = 1 if name == "cross_channel" and not column else None
    splits = {}
    for part, (begin, end) in borders.items():
        begin = max(begin, 0)
        if end - begin < lookback + horizon:
            raise UserError(
                f"a window of {lookback} + {horizon} rows is longer than the {part} part of {name}, "
                f"{end - begin} rows: use a smaller --model.lookback or --model.horizon"
            )
        starts = jnp.arange(begin, end - lookback - horizon + 1, dtype=jnp.int32)
        splits[part] = WindowedSplit(values, marks, starts, lookback, horizon, targets)
    return ForecastingData(**splits, columns=columns, mean=mean, std=std, times=raw.times)


def load_series(name: str, data_dir: str | None) -> RawSeries:
    """The whole series of a set, prepared once by its TFDS builder."""
    example = load_dataset(name, data_dir)["series"][0]
    return RawSeries(example["values"], example["times"].astype("datetime64[s]"))
