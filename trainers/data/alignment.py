"""Pairs of temporal knowledge graphs whose entities are to be aligned; and the stand-in for them.

Facts are (head, relation, tail, first, last point in time), 0 for no time. Both graphs share one numbering of entities,
and one of relations; the last entity of the features, of which nothing is known, is in neither graph.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["AlignmentData", "AlignmentSplit", "GraphPair", "alignment_standin", "graph_features", "load_alignment"]

_NORMALIZER_EPSILON = 0.01
_TRAIN_PAIRS, _VALID_PAIRS = 2_000, 1_000  # of a real set's seed pairs, the first and those after them


@dataclass(frozen=True)
class GraphPair:
    """Two graphs as recorded, and which entities of the first are which of the second."""

    facts: tuple[Int[np.ndarray, "F 5"], Int[np.ndarray, "G 5"]]
    train: Int[np.ndarray, "P 2"]
    valid: Int[np.ndarray, "Q 2"]
    test: Int[np.ndarray, "R 2"]

    @property
    def num_entities(self) -> int:
        """With the one of which nothing is known."""
        return 2 + max(max(int(facts[:, [0, 2]].max()) for facts in self.facts), int(self.pairs.max()))

    @property
    def num_relations(self) -> int:
        """In both directions, and one more that every fact has besides, in each."""
        return 2 * (2 + max(int(facts[:, 1].max()) for facts in self.facts))

    @property
    def pairs(self) -> Int[np.ndarray, "S 2"]:
        return np.concatenate([self.train, self.valid, self.test])


def _normalized(rows: np.ndarray, columns: np.ndarray, width: int, idle: np.ndarray) -> dict[str, np.ndarray]:
    """Places by rows, and log(1 + how often), each row over its sum + 0.01; an idle row has a 1 in column 0."""
    flat, often = np.unique(rows.astype(np.int64) * width + columns, return_counts=True)
    index, logs = np.stack([flat // width, flat % width], axis=1), np.log1p(often.astype(np.float64))
    index = np.concatenate([index, np.stack([idle, np.zeros_like(idle)], axis=1)])
    logs = np.concatenate([logs, np.ones(len(idle))])
    order = np.lexsort((index[:, 1], index[:, 0]))
    index, logs = index[order].astype(np.int32), logs[order]
    total = np.bincount(index[:, 0], logs)
    return {"index": index, "value": (logs / (total[index[:, 0]] + _NORMALIZER_EPSILON)).astype(np.float32)}


def _spans(facts: Int[np.ndarray, "F 5"]) -> Int[np.ndarray, "F 2"]:
    """(first, last) of each fact; without an end it lasts for its first point."""
    first, last = facts[:, 3], facts[:, 4]
    return np.stack([first, np.where((first != 0) & (last == 0), first, last)], axis=1)


def _common(kinds: list[np.ndarray]) -> dict[tuple[int, ...], int]:
    """Numbers of what both graphs have, "no time" first."""
    both = set(map(tuple, kinds[0].tolist())) & set(map(tuple, kinds[1].tolist()))
    nothing = (0,) * kinds[0].shape[1]
    return {kind: number for number, kind in enumerate([nothing, *sorted(both - {nothing})])}


def graph_features(pair: GraphPair) -> dict[str, np.ndarray]:
    """What is counted of each entity: `entity`, `relation`, `time` and `interval`, each as `_index` and `_value`.

    And `edges` (E, 2) between neighbours, in the order of the first; `times` and `intervals`, what columns stand for.
    """
    n, width = pair.num_entities, pair.num_relations
    half, features = width // 2, {}
    head, relation, tail = np.concatenate(pair.facts)[:, :3].T
    ends, everyone = np.concatenate([head, tail]), np.arange(n)

    def add(name: str, rows: list[np.ndarray], columns: list[np.ndarray], width: int, idle: Any = ()) -> None:
        found = _normalized(np.concatenate(rows), np.concatenate(columns), width, np.array(idle, np.int64))
        features.update({f"{name}_{key}": value for key, value in found.items()})

    # Besides its neighbours, an entity has itself, and in the last column all its facts.
    add("entity", [everyone, head, tail, ends], [everyone, tail, head, np.full(len(ends), n - 1)], n)
    every = np.full(len(head), half - 1)
    add("relation", [head, head, tail, tail], [relation, every, half + relation, half + every], width)

    spans = [_spans(facts) for facts in pair.facts]
    idle = np.setdiff1d(everyone, ends)
    for name, kinds in (("time", [span.reshape(-1, 1) for span in spans]), ("interval", spans)):
        known = _common(kinds)
        number = np.array([known.get(kind, -1) for found in kinds for kind in map(tuple, found.tolist())])
        # A fact has two points in time, one after the other, or one interval; either belongs to both its ends.
        times = len(number) // len(head)
        rows = np.concatenate([np.repeat(head, times), np.repeat(tail, times)])
        shared = np.tile(number >= 0, 2)
        add(name, [rows[shared]], [np.tile(number, 2)[shared]], len(known), idle)
        features[f"{name}s"] = np.array(list(known))
    linked = np.concatenate([np.stack([head, tail], 1), np.stack([tail, head], 1), [[n - 1, n - 1]]])
    features["edges"] = np.unique(linked, axis=0).astype(np.int32)
    return features


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AlignmentSplit:
    """Lists of pairs of one pair of graphs; each is an example, with all of both graphs."""

    graph: dict[str, Array]  # a batch of entity alignment without its first axis and without pairs
    pairs: Int[Array, "S P 2"]
    pair_mask: Array

    def __len__(self) -> int:
        return self.pairs.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The lists of these numbers; traceable."""
        count = jnp.shape(indices)[0]
        graph = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), self.graph)
        return {**graph, "pairs": self.pairs[indices], "pair_mask": self.pair_mask[indices]}


@dataclass(frozen=True)
class AlignmentData:
    """The three parts."""

    train: AlignmentSplit
    valid: AlignmentSplit
    test: AlignmentSplit


def alignment_standin(
    seed: int, *, entities: int = 200, relations: int = 8, years: int = 20, facts: int = 1_500
) -> GraphPair:
    """A random graph, and a copy with other numbers that lacks a fifth of its facts and the times of 15 % of the rest.

    Busy entities have more facts than others; a fact lasts for a year or a few.
    """
    random = np.random.default_rng(seed)
    busy = random.dirichlet(np.full(entities, 2.0))
    first = random.integers(1, years + 1, size=facts)
    last = np.minimum(first + random.choice(3, size=facts, p=(0.6, 0.3, 0.1)), years)
    head, tail = random.choice(entities, facts, p=busy), random.choice(entities, facts, p=busy)
    whole = np.stack([head, random.integers(relations, size=facts), tail, first, last], axis=1).astype(np.int32)
    numbers, names = entities + random.permutation(entities), relations + random.permutation(relations)
    copy = whole[random.random(facts) >= 0.2]
    copy = np.stack([numbers[copy[:, 0]], names[copy[:, 1]], numbers[copy[:, 2]], *copy[:, 3:].T], axis=1)
    copy[random.random(len(copy)) < 0.15, 3:] = 0
    pairs = random.permutation(np.stack([np.arange(entities), numbers], axis=1)).astype(np.int32)
    a, b = entities // 5, 2 * entities // 5
    return GraphPair((whole, copy.astype(np.int32)), pairs[:a], pairs[a:b], pairs[b:])


def _links(facts: np.ndarray, entities: np.ndarray) -> np.ndarray:
    """(L, 2): facts between entities of a list, by their places in it."""
    place = np.full(1 + max(int(facts[:, [0, 2]].max()), int(entities.max())), -1)
    place[entities] = np.arange(len(entities))
    ends = place[facts[:, [0, 2]]]
    return ends[(ends >= 0).all(axis=1)].astype(np.int32).reshape(-1, 2)


def load_alignment(
    name: str, *, data_dir: str | None, config: Any, batch_pairs: int = 512, seed: int = 0
) -> AlignmentData:
    """The pair of graphs of that name: "standin", or "beta_kg". `seed` matters to the stand-in alone.

    Training pairs come in lists of `batch_pairs`, the others all in one: they are ranked among each other.
    """
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; name a set with --data beta_kg")
        pair = alignment_standin(seed)
    elif name == "beta_kg":
        (found,) = load_dataset("beta_kg", data_dir)["graphs"]
        seeds, test = found["seed_pairs"], found["test_pairs"]
        pair = GraphPair(
            (found["triples_1"], found["triples_2"]),
            seeds[:_TRAIN_PAIRS],
            seeds[_TRAIN_PAIRS : _TRAIN_PAIRS + _VALID_PAIRS],
            test,
        )
    else:
        raise UserError(f"no pair of graphs is called {name!r}{closest(name, ['standin', 'beta_kg'])}")
    features = graph_features(pair)
    sizes = {
        "num_entities": pair.num_entities,
        "num_relations": pair.num_relations,
        "num_times": len(features.pop("times")),
        "num_intervals": len(features.pop("intervals")),
    }
    wanted = {field: getattr(config, field) for field in sizes}
    if sizes != wanted:
        raise UserError(f"{name} has {sizes}, the model {wanted}: choose the --config of this set")
    sources, targets = pair.pairs.T
    graph = {
        **features,
        "edge_mask": np.ones(len(features["edges"]), bool),
        "sources": sources,
        "targets": targets,
        "source_links": _links(pair.facts[0], sources),
        "target_links": _links(pair.facts[1], targets),
    }
    graph |= {f"{side}_links_mask": np.ones(len(graph[f"{side}_links"]), bool) for side in ("source", "target")}
    graph = jax.tree.map(jnp.asarray, graph)
    ends = np.cumsum([0, len(pair.train), len(pair.valid), len(pair.test)])
    splits = []
    for number, first in enumerate(ends[:-1]):
        places = np.arange(first, ends[number + 1])
        size = min(batch_pairs, len(places)) if number == 0 else len(places)
        lists = np.arange(-(-len(places) // size) * size).reshape(-1, size)
        rows = np.stack([places[lists % len(places)]] * 2, axis=-1).astype(np.int32)
        splits.append(AlignmentSplit(graph, jnp.asarray(rows), jnp.asarray(lists < len(places))))
    return AlignmentData(*splits)
