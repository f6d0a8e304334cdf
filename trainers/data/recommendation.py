"""Sequential recommendation data: the protocol of the literature in one place.

A user's last item is the test target, the one before it the validation target (arXiv:1808.09781, section IV), each
ranked among items drawn once and for all; whoever has fewer than three items only trains. A training example is a user
cut at a random place, the last item left being the target, among items drawn at random (arXiv:2605.04723). An epoch
holds every user many times, each time with a draw of its own, so that no randomness is left to the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.catalogue import DATASETS
from trainers.data.prepare import load_dataset
from trainers.data.standins import Interactions, recommendation_standin
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["NextItemSplit", "RecommendationData", "calendar_contexts", "load_interactions", "load_recommendation"]

NEGATIVES = 100  # items among which the true one is ranked
_EPOCH = 4_096  # training examples, at least


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NextItemSplit:
    """What each user took, on the device once; a batch is cut from it, and its other candidates drawn, there."""

    items: Int[Array, "U T"]  # in the order of time from the left, 0 after a user's last
    contexts: Float[Array, "U T C"] | None
    known: Int[Array, "U K"]  # the different items that are never drawn, ascending, then a number above all items
    users: Int[Array, " W"]  # who is in this split
    lengths: Int[Array, " W"]  # of their history, targets included
    seed: int = field(metadata={"static": True})  # of the draws
    history: int = field(metadata={"static": True})
    num_items: int = field(metadata={"static": True})
    num_contexts: int = field(metadata={"static": True})
    negatives: int = field(metadata={"static": True})
    passes: int = field(metadata={"static": True})  # times that every user comes, each at another cut
    cut: bool = field(metadata={"static": True})  # anywhere, for training; else the target is the last item
    returns: bool = field(metadata={"static": True})  # users take items again: only the target is not drawn

    def __len__(self) -> int:
        return self.users.shape[0] * self.passes

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The examples of these numbers as a recommendation batch; traceable, and a function of the numbers alone."""
        return jax.vmap(self._example)(jnp.asarray(indices))

    def _example(self, index: Int[Array, ""]) -> dict[str, Array]:
        row = index % self.users.shape[0]
        user, target = self.users[row], self.lengths[row] - 1
        cut_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), index))
        if self.cut:
            target = jax.random.randint(cut_key, (), 1, jnp.maximum(target, 1) + 1)
        positions = target - self.history + jnp.arange(self.history)
        present = positions >= 0
        items = jnp.where(present, self.items[user, positions], 0)
        true = self.items[user, target]
        candidates = jnp.concatenate([true[None], self._drawn(draw_key, user, true)])
        if self.contexts is None:
            contexts, moment = jnp.zeros((self.history, self.num_contexts)), jnp.zeros(self.num_contexts)
        else:
            contexts = jnp.where(present[:, None], self.contexts[user, positions], 0.0)
            moment = self.contexts[user, target]
        return {
            "user": user,
            "items": items,
            "contexts": contexts,
            "candidates": candidates,
            "candidate_contexts": jnp.broadcast_to(moment, (len(candidates), self.num_contexts)),
        }

    def _drawn(self, key: jax.Array, user: Int[Array, ""], true: Int[Array, ""]) -> Int[Array, " N"]:
        """Items that the user does not know, each equally likely, with replacement."""
        known = true[None] if self.returns else self.known[user]
        # The j-th unknown item lies behind as many known ones as have fewer than j + 1 unknown ones before them.
        unknown_before = known - 1 - jnp.arange(known.shape[0])
        count = self.num_items - jnp.sum(known <= self.num_items)
        j = jax.random.randint(key, (self.negatives,), 0, jnp.maximum(count, 1))
        return (j + jnp.searchsorted(unknown_before, j, side="right") + 1).astype(true.dtype)


@dataclass(frozen=True)
class RecommendationData:
    """The three splits and what is known of the whole."""

    train: NextItemSplit
    valid: NextItemSplit
    test: NextItemSplit
    attributes: np.ndarray  # (I + 1, F) of the items by their numbers; row 0 is no item
    sequences: tuple[np.ndarray, ...]  # each user's training items
    times: tuple[np.ndarray, ...] | None  # datetime64[s], likewise

    @property
    def num_items(self) -> int:
        return len(self.attributes) - 1


def calendar_contexts(times: np.ndarray, years: tuple[int, int]) -> np.ndarray:
    """(T, 6): year between the data's first and last, month, day, weekday, day of year and week, each over its range.

    The official code divides the week by 4, which takes it to 13; here it stays within [0, 1] as the others do.
    """
    days = times.astype("datetime64[D]")
    months, starts = days.astype("datetime64[M]"), days.astype("datetime64[Y]")
    year, month = starts.astype(np.int64) + 1970, months.astype(np.int64) % 12 + 1
    day_of_year = (days - starts.astype("datetime64[D]")).astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    columns = [
        (year - years[0]) / max(years[1] - years[0], 1),
        month / 12,
        ((days - months.astype("datetime64[D]")).astype(np.int64) + 1) / 31,
        weekday / 7,
        (day_of_year + 1) / 366,
        (day_of_year // 7 + 1) / 53,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def load_interactions(name: str, data_dir: str | None) -> Interactions:
    """Who took what and when, and the items' attributes, numbered as in the original files."""
    if name == "movielens100k":
        films = {int(e["film"]): e["genres"] for e in load_dataset("movielens100k/films", data_dir)["films"]}
        users = load_dataset("movielens100k/users", data_dir)["users"]
        taken = [(e["films"], e["times"].astype("datetime64[s]")) for e in users]
        sequences, times = zip(*taken, strict=True)
        return Interactions(sequences, times, _table(films), returns=False)
    users = load_dataset(name, data_dir)["users"]
    items = load_dataset(f"{name}_attributes", data_dir)["items"]
    found = {int(e["item"]): e["attributes"] for e in items}
    width = 1 + max((int(a.max()) for a in found.values() if a.size), default=0)
    has = {item: np.isin(np.arange(1, width), attributes) for item, attributes in found.items()}
    return Interactions(tuple(e["items"] for e in users), None, _table(has), returns=False)


def _table(attributes: dict[int, np.ndarray]) -> np.ndarray:
    """(I + 1, F) of numbered rows."""
    width = len(next(iter(attributes.values())))
    table = np.zeros((max(attributes) + 1, width), np.float32)
    for item, row in attributes.items():
        table[item] = row
    return table


def load_recommendation(
    name: str, *, data_dir: str | None, history: int, num_items: int, seed: int = 0
) -> RecommendationData:
    """The data set of that name. `seed` decides the stand-in, the training draws and the candidates of evaluation."""
    known = ["standin", "movielens100k", *(f"sequential_rec/{m}" for m in DATASETS["sequential_rec"].members)]
    known = [key for key in known if not key.endswith("_attributes")]
    if name not in known:
        raise UserError(f"no recommendation data set is called {name!r}{closest(name, known)}")
    if name == "standin":
        if data_dir is not None:
            raise UserError(
                "the stand-in is generated and takes no --data-dir; name the set with --data, e.g. movielens100k"
            )
        raw, negatives = recommendation_standin(seed), 30
    else:
        raw, negatives = load_interactions(name, data_dir), NEGATIVES
    sequences, attributes = _by_frequency(raw)
    if len(attributes) - 1 != num_items:
        raise UserError(
            f"{name} has {len(attributes) - 1} items, the model is made for {num_items}: set --model.num-items"
        )
    return _split(sequences, raw, attributes, history=history, negatives=negatives, seed=seed)


def _held_out(sequence: np.ndarray) -> int:
    return 2 if len(sequence) >= 3 else 0


def _by_frequency(raw: Interactions) -> tuple[list[np.ndarray], np.ndarray]:
    """Items numbered anew from 1, the most frequent of the training items first."""
    counts = np.zeros(len(raw.attributes), np.int64)
    for sequence in raw.sequences:
        np.add.at(counts, sequence[: len(sequence) - _held_out(sequence)], 1)
    counts[0] = np.iinfo(np.int64).max  # no item stays 0
    order = np.argsort(-counts, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return [number[s].astype(np.int32) for s in raw.sequences], raw.attributes[order]


def _rows(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Arrays of any length as the rows of one, with `fill` after their ends."""
    out = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, values in zip(out, arrays, strict=True):
        row[: len(values)] = values
    return out


def _split(
    sequences: list[np.ndarray],
    raw: Interactions,
    attributes: np.ndarray,
    *,
    history: int,
    negatives: int,
    seed: int,
) -> RecommendationData:
    held_out = np.array([_held_out(s) for s in sequences])
    lengths = np.array([len(s) for s in sequences])
    training = [s[: n - h] for s, n, h in zip(sequences, lengths, held_out, strict=True)]
    times = contexts = None
    if raw.times is not None:
        times = tuple(t[: n - h] for t, n, h in zip(raw.times, lengths, held_out, strict=True))
        years = [t.astype("datetime64[Y]").astype(int) + 1970 for t in raw.times]
        span = int(min(y.min() for y in years)), int(max(y.max() for y in years))
        contexts = jnp.asarray(_rows([calendar_contexts(t, span) for t in raw.times], 0))
    items, num_items = jnp.asarray(_rows(sequences, 0)), len(attributes) - 1

    def known(parts: list[np.ndarray]) -> Array:
        # Behind the last known item come numbers that no draw reaches, ever higher to stay in order.
        distinct = [np.unique(p) for p in parts]
        rows = _rows(distinct, 0)
        beyond = num_items + 1 + 2 * np.arange(rows.shape[1], dtype=rows.dtype)
        return jnp.asarray(np.where(rows > 0, rows, num_items + beyond))

    def part(number: int, users: np.ndarray, ends: np.ndarray, parts: list[np.ndarray], cut: bool) -> NextItemSplit:
        return NextItemSplit(
            items=items,
            contexts=contexts,
            known=known(parts),
            users=jnp.asarray(users, jnp.int32),
            lengths=jnp.asarray(ends[users], jnp.int32),
            seed=3 * seed + number,
            history=history,
            num_items=num_items,
            num_contexts=6,
            negatives=negatives,
            passes=-(-_EPOCH // len(users)) if cut else 1,
            cut=cut,
            returns=raw.returns,
        )

    trains, tests = np.flatnonzero(lengths - held_out >= 2), np.flatnonzero(held_out > 0)
    return RecommendationData(
        # What is held out may be drawn while training: that it never is would tell it from other items.
        train=part(0, trains, lengths - held_out, training, True),
        valid=part(1, tests, lengths - 1, sequences, False),
        test=part(2, tests, lengths, sequences, False),
        attributes=attributes,
        sequences=tuple(training),
        times=times,
    )
