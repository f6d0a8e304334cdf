"""Rows of relational databases and what is around them before a moment; and the stand-in for such a database.

Around a seed row are the rows it is linked to and those that these are linked to, as far as they are dated before the
moment of prediction (undated ones always count). They are taken nearest first, in a random order that only the seed of
the run decides, until a model's places are full: rows one link away, then the neighbours of each of them in turn.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.graphs.gelgt import Columns

__all__ = ["RelationalData", "RelationalSplit", "SeedRows", "StoredTable", "load_rows", "relational_standin", "sample"]

_MOST_NEAR, _MOST_FAR = 5_000, 1_000  # the most recent rows one link away, and around each of them


@dataclass(frozen=True)
class StoredTable:
    """A table: cells by kind, (R, columns) or for times (R, columns, 7); NaN and -1 are missing."""

    name: str
    cells: dict[str, np.ndarray]
    days: Float[np.ndarray, " R"]  # since 1970; NaN: undated
    links: dict[str, Int[np.ndarray, " R"]] = field(default_factory=dict)  # to other tables' rows; -1: to none
    values: tuple[int, ...] = ()  # of each categorical column

    def __len__(self) -> int:
        return len(self.days)

    @property
    def columns(self) -> Columns:
        counts = {kind: self.cells[kind].shape[1] for kind in ("numerical", "timestamp") if kind in self.cells}
        return Columns(self.name, rows=len(self), categorical=self.values, **counts)

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """Of numerical columns mean and deviation; of times the first year and the middle one."""
        found = {}
        if "numerical" in self.cells:
            known = np.where(np.isfinite(self.cells["numerical"]), self.cells["numerical"], np.nan)
            found |= {"mean": np.nanmean(known, axis=0), "std": np.nanstd(known, axis=0)}
        if "timestamp" in self.cells:
            times = self.cells["timestamp"]
            rows = [column[(column >= 0).all(axis=1)] for column in times.transpose(1, 0, 2)]
            found["first_year"] = np.array([column[:, 0].min() for column in rows])
            found["median_table"] = np.stack([column[np.lexsort(column.T[::-1])][len(column) // 2] for column in rows])
        return found


@dataclass(frozen=True)
class SeedRows:
    """What is asked: about which rows of one table, on which day, and the answer."""

    row: Int[np.ndarray, " S"]
    day: Float[np.ndarray, " S"]
    label: np.ndarray  # whole numbers 0 and 1, or amounts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RelationalSplit:
    """One part, as batches of row prediction want it; whole numbers are narrow while they are stored."""

    arrays: dict[str, Array]
    typical: float = field(metadata={"static": True})
    limits: tuple[float, float] = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.arrays["label"].shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The seeds of these numbers; traceable."""
        chosen = {name: array[indices] for name, array in self.arrays.items()}
        chosen["edges"] = chosen["edges"].astype(jnp.int32)
        count = chosen["label"].shape[0]
        limits = jnp.tile(jnp.array(self.limits, jnp.float32), (count, 1))
        return {**chosen, "typical": jnp.full(count, self.typical, jnp.float32), "limits": limits}


@dataclass(frozen=True)
class RelationalData:
    """The three parts, and for each table its cells and the statistics of its columns."""

    train: RelationalSplit
    valid: RelationalSplit
    test: RelationalSplit
    tables: tuple[tuple[dict[str, np.ndarray], dict[str, np.ndarray]], ...]


class _Links:
    """All rows of all tables under one numbering, and who is linked to whom, the most recent first."""

    def __init__(self, tables: Sequence[StoredTable]):
        names = [table.name for table in tables]
        self.start = np.cumsum([0, *map(len, tables)])
        self.days = np.concatenate([table.days for table in tables])
        self.table = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        parents = []
        for number, table in enumerate(tables):
            for name, target in table.links.items():
                linked = np.full(len(self.days), -1)
                there = target >= 0
                linked[self.start[number] : self.start[number + 1]][there] = (
                    target[there] + self.start[names.index(name)]
                )
                parents.append(linked)
        self.parents = np.stack(parents, axis=1)
        child, column = np.nonzero(self.parents >= 0)
        ends = np.stack([child, self.parents[child, column]])
        ends = np.concatenate([ends, ends[::-1]], axis=1)
        recency = np.nan_to_num(self.days[ends[1]], nan=np.inf)
        self.ends = ends[:, np.lexsort((-recency, ends[0]))]
        self.first = np.searchsorted(self.ends[0], np.arange(len(self.days) + 1))

    def around(self, row: int, day: float, strict: bool, most: int) -> np.ndarray:
        linked = self.ends[1, self.first[row] : self.first[row + 1]]
        known = self.days[linked]
        # Not later than, turned round: what is undated is never later.
        later = known >= day if strict else known > day
        return linked[~later][:most]


def sample(
    tables: Sequence[StoredTable], seed_table: str, seeds: SeedRows, *, num_tokens: int, strict: bool, seed: int
) -> dict[str, np.ndarray]:
    """The surroundings of each seed row; `seed` decides in which order they are taken."""
    random, links, count = np.random.default_rng(seed), _Links(tables), len(seeds.row)
    home = int(links.start[[table.name for table in tables].index(seed_table)])
    tokens = np.full((count, num_tokens), -1)
    hop = np.zeros((count, num_tokens), np.int32)
    ends: list[np.ndarray] = []
    place = np.full(len(links.days), -1)
    for number, (row, day) in enumerate(zip((seeds.row + home).tolist(), seeds.day.tolist(), strict=True)):
        near = random.permutation(links.around(row, day, strict, _MOST_NEAR))[: num_tokens - 1].tolist()
        taken, seen = [row, *near], {row, *near}
        for middle in near:
            if len(taken) >= num_tokens:
                break
            for far in links.around(middle, day, strict, _MOST_FAR).tolist():
                if far not in seen:
                    seen.add(far)
                    taken.append(far)
        found = np.array(taken[:num_tokens])
        found[1:] = random.permutation(found[1:])
        tokens[number, : len(found)] = found
        hop[number, : len(found)] = np.where(np.isin(found, near), 1, 2)
        hop[number, 0] = 0
        place[found] = np.arange(len(found))
        parents = links.parents[found]
        to = np.where(parents >= 0, place[parents], -1)
        child, column = np.nonzero(to >= 0)
        ends.append(np.stack([child, to[child, column]], axis=1))
        place[found] = -1
    most = max(1, max(map(len, ends), default=1))
    edges, edge_mask = np.zeros((count, most, 2), np.int16), np.zeros((count, most), bool)
    for number, pairs in enumerate(ends):
        edges[number, : len(pairs)] = pairs
        edge_mask[number, : len(pairs)] = True
    there = tokens >= 0
    table = np.where(there, links.table[tokens], 0)
    lag = np.nan_to_num(seeds.day[:, None] - links.days[tokens], nan=0.0)
    lag[:, 0] = 0.0
    return {
        "table": table.astype(np.int32),
        "row": np.where(there, tokens - links.start[table], 0).astype(np.int32),
        "hop": hop,
        "lag": np.where(there, lag, 0.0).astype(np.float32),
        "token_mask": there,
        "edges": np.concatenate([edges, edges[..., ::-1]], axis=1),
        "edge_mask": np.concatenate([edge_mask, edge_mask], axis=1),
        "label": seeds.label,
    }


def _calendar(days: np.ndarray) -> np.ndarray:
    """(R, 7): year, month, day, weekday, hour, minute, second; -1 throughout where there is no date."""
    known = ~np.isnan(days)
    seconds = np.round(np.where(known, days, 0.0) * 86_400).astype("datetime64[s]")
    date, month = seconds.astype("datetime64[D]"), seconds.astype("datetime64[M]")
    number, rest = date.astype(np.int64), (seconds - date).astype(np.int64)
    fields = (
        seconds.astype("datetime64[Y]").astype(np.int64) + 1970,
        month.astype(np.int64) % 12,
        (date - month.astype("datetime64[D]")).astype(np.int64),
        (number + 3) % 7,  # 1970-01-01 was a Thursday
        rest // 3600,
        rest // 60 % 60,
        rest % 60,
    )
    return np.where(known[:, None], np.stack(fields, axis=1), -1).astype(np.int32)


def relational_standin(
    seed: int, *, users: int = 400, events_each: int = 30, items: int = 50, questions: int = 2_000
) -> tuple[list[StoredTable], SeedRows]:
    """Users, their events and the events' items. Does the worth of a user's events of five to ten days ago exceed the
    usual? An event's worth is its value times the quality of its item, about 1."""
    random = np.random.default_rng(seed)
    events = users * events_each
    day = 20_000 + 60 * random.random(events)
    user, item = np.repeat(np.arange(users), events_each), random.integers(items, size=events)
    value, quality = random.normal(size=events), 1 + 0.2 * random.normal(size=items)
    undated = {"user": np.full(users, np.nan), "item": np.full(items, np.nan)}
    tables = [
        StoredTable("user", {"numerical": random.normal(size=(users, 2)).astype(np.float32)}, undated["user"]),
        StoredTable(
            "event",
            {"numerical": value[:, None].astype(np.float32), "timestamp": _calendar(day)[:, None]},
            day,
            {"user": user, "item": item},
        ),
        StoredTable(
            "item",
            {
                "numerical": quality[:, None].astype(np.float32),
                "categorical": random.integers(5, size=(items, 1)).astype(np.int32),
            },
            undated["item"],
            values=(5,),
        ),
    ]
    asked, moment = random.integers(users, size=questions), 20_030 + 30 * random.random(questions)
    lag = moment[:, None] - day.reshape(users, events_each)[asked]
    worth = (value * quality[item]).reshape(users, events_each)[asked]
    total = np.sum(np.where((lag >= 5) & (lag <= 10), worth, 0.0), axis=1)
    return tables, SeedRows(asked, moment, (total > np.median(total)).astype(np.int32))


_F1 = {  # columns: numbers, and words or codes; other texts are left out; links by the name of the key
    "circuits": (("lat", "lng", "alt"), ("country",)),
    "constructor_results": (("points",), ()),
    "constructor_standings": (("points", "position", "wins"), ()),
    "constructors": ((), ("nationality",)),
    "driver_standings": (("points", "position", "wins"), ()),
    "drivers": ((), ("nationality",)),
    "qualifying": (("number", "position"), ()),
    "races": (("year", "round"), ()),
    "results": (
        ("number", "grid", "position", "positionOrder", "points", "laps", "milliseconds", "fastestLap", "rank"),
        ("statusId",),
    ),
}
_F1_KEYS = {"raceId": "races", "driverId": "drivers", "constructorId": "constructors", "circuitId": "circuits"}


def _f1_tables(data_dir: str | None) -> tuple[list[StoredTable], dict[str, int]]:
    """(the tables, row of each driver by its key)."""
    raw = {}
    for example in load_dataset("f1_relational/tables", data_dir)["tables"]:
        columns = [name.decode() for name in example["columns"]]
        cells = np.array([cell.decode() for cell in example["cells"]], object).reshape(-1, len(columns))
        raw[example["name"].decode()] = dict(zip(columns, cells.T, strict=True))
    numbers = {  # key -> row, for each table that is linked to
        key: {value: row for row, value in enumerate(raw[table][key])} for key, table in _F1_KEYS.items()
    }
    races = raw["races"]
    clock = [time if time != r"\N" else "00:00:00" for time in races["time"]]
    moments = np.array([f"{date}T{time}" for date, time in zip(races["date"], clock, strict=True)], "datetime64[s]")
    race_days = moments.astype(np.int64) / 86_400
    tables = []
    for name, (numerical, categorical) in _F1.items():
        table = raw[name]
        count = len(next(iter(table.values())))
        links = {
            target: np.array([numbers[key].get(value, -1) for value in table[key]])
            for key, target in _F1_KEYS.items()
            if key in table and target != name
        }
        cells: dict[str, np.ndarray] = {}
        if numerical:
            texts = [[np.nan if text == r"\N" else float(text) for text in table[column]] for column in numerical]
            cells["numerical"] = np.array(texts, np.float32).T
        codes = [np.unique(table[column].astype(str), return_inverse=True) for column in categorical]
        if codes:
            cells["categorical"] = np.stack([code for _, code in codes], axis=1).astype(np.int32)
        days = np.full(count, np.nan)
        if name == "races":
            days = race_days
        elif "races" in links:
            days = race_days[links["races"]] - (name == "qualifying")
        born = np.array(list(table["dob"]), "datetime64[D]").astype(float) if name == "drivers" else days
        if not np.isnan(born).all():
            cells["timestamp"] = _calendar(born)[:, None]
        tables.append(StoredTable(name, cells, days, links, tuple(len(values) for values, _ in codes)))
    return tables, numbers["driverId"]


def _f1_seeds(part: Any, drivers: dict[str, int]) -> SeedRows:
    rows = [(drivers[str(int(e["driver"]))], float(e["day"]), float(e["position"])) for e in part]
    row, day, label = (np.array(column) for column in zip(*rows, strict=True))
    return SeedRows(row, day, label.astype(np.float32))


def load_rows(name: str, *, data_dir: str | None, config: Any, seed: int = 0) -> RelationalData:
    """The task of that name: "standin", or "f1_relational/driver_position". `seed` decides what is sampled, too.

    `config` is the model's: it says how many rows it sees around a seed, and its tables must be the data's.
    """
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in takes no --data-dir; name a set with --data f1_relational/driver_position")
        tables, seeds = relational_standin(seed)
        home, borders = "user", np.cumsum([0, *(len(seeds.row) * np.array([8, 1, 1]) // 10)])
        parts = [
            SeedRows(*(array[a:b] for array in (seeds.row, seeds.day, seeds.label)))
            for a, b in itertools.pairwise(borders)
        ]
    elif name == "f1_relational/driver_position":
        (tables, drivers), home = _f1_tables(data_dir), "drivers"
        splits = load_dataset(name, data_dir)
        parts = [_f1_seeds(splits[part], drivers) for part in ("train", "valid", "test")]
    else:
        known = ["standin", "f1_relational/driver_position"]
        raise UserError(f"no relational task is called {name!r}{closest(name, known)}")
    columns = tuple(table.columns for table in tables)
    if columns != tuple(config.tables):
        raise UserError(f"the tables of {name} are {columns}, the model's are {config.tables}: choose its --config")
    label = parts[0].label
    whole = np.issubdtype(label.dtype, np.integer)
    typical = float(label.mean() if whole else np.median(label))
    limits = (0.0, 1.0) if whole else tuple(float(value) for value in np.percentile(label, (2, 98)))
    strict = getattr(config, "strict_past", True)
    sampled = [sample(tables, home, p, num_tokens=config.num_tokens, strict=strict, seed=seed) for p in parts]
    splits = (RelationalSplit(jax.tree.map(jnp.asarray, arrays), typical, limits) for arrays in sampled)
    return RelationalData(*splits, tables=tuple((table.cells, table.statistics) for table in tables))
