"""Molecules as SMILES with their properties: MoleculeNet, SMILES with logP, and a stand-in.

MoleculeNet is divided by scaffold as its files say, which leaves out what a chemistry toolkit cannot read; others at
random, 80/10/10. Symbols are numbered by their frequency in the training part, around the model's special tokens; what
is left over is unknown. Strings are cut to the model's length. The descriptors are counts of our own reading of the
SMILES (`zoo.tasks.smiles`), standardised by the training part, not the 200 of the official code.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.catalogue import DATASETS
from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.smiles import DESCRIPTORS, descriptors_of, symbols_of

__all__ = ["MoleculeData", "MoleculeSplit", "load_molecules", "molecule_standin", "standin_property"]

_SEED = 0  # of the division of what comes without one
_CLASSES = frozenset({"moleculenet/BBBP", "moleculenet/clintox"})
_LABELLED = 100  # molecules of standin_few whose property is known in training
_DRAWS = 8  # times that a training string's hidden symbols are drawn anew, in as many passes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoleculeSplit:
    """The molecules of one part on the device."""

    tokens: Int[Array, "N L"]
    lengths: Int[Array, " N"]
    descriptors: Float[Array, "N C"]
    targets: Float[Array, "N K"] | Int[Array, "N K"]
    known: Bool[Array, "N K"]
    unit: Float[Array, " K"]
    typical: Float[Array, " K"]
    frequency: Float[Array, " V"]
    seed: int = field(metadata={"static": True})  # of the symbols that are hidden
    draws: int = field(metadata={"static": True})
    unknown_id: int = field(metadata={"static": True})
    mask_id: int = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.tokens.shape[0] * self.draws

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The molecules of these numbers as a batch, a function of the numbers alone; traceable.

        15 % of the symbols are asked for, of which 80 % are hidden and the others stay. Source: card hyformer, Losses.
        """
        row = jnp.asarray(indices) % self.tokens.shape[0]
        tokens, ends = self.tokens[row], self.lengths[row][:, None] - 1
        place = jnp.arange(tokens.shape[1])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), jnp.asarray(indices))
        drawn = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
        symbol = (place > 0) & (place < ends) & (tokens != self.unknown_id)
        asked = symbol & (drawn < 0.15)

        def spread(values: Array) -> Array:
            return jnp.broadcast_to(values, (len(row), *values.shape))

        return {
            "tokens": tokens,
            "mask": place <= ends,
            "asked": asked,
            "corrupted": jnp.where(asked & (drawn < 0.8 * 0.15), self.mask_id, tokens),
            "scored": (place > 0) & (place <= ends) & (tokens != self.unknown_id),
            "descriptors": self.descriptors[row],
            "targets": self.targets[row],
            "known": self.known[row],
            "unit": spread(self.unit),
            "typical": spread(self.typical),
            "frequency": spread(self.frequency),
        }


@dataclass(frozen=True)
class MoleculeData:
    """The three parts, the symbol of each token, and the training strings as they are."""

    train: MoleculeSplit
    valid: MoleculeSplit
    test: MoleculeSplit
    vocabulary: tuple[str, ...]
    strings: tuple[str, ...]
    middle: Float[np.ndarray, " K"]  # of the training measurements; 0 for classes

    def text(self, tokens: Int[np.ndarray, " L"]) -> str:
        """The SMILES of a row: what stands between its beginning and its end; special tokens show as `?`."""
        symbols = [self.vocabulary[token] for token in np.asarray(tokens)[1:]]
        return "".join(symbols[: symbols.index("")] if "" in symbols else symbols)


def standin_property(smiles: str) -> float:
    """The stand-in's property: 1 a carbon, 2 a nitrogen, -1.5 an oxygen, 0.5 more if aromatic, and 3 a ring."""
    count = dict(zip(DESCRIPTORS, descriptors_of(smiles), strict=True))
    atoms = count["carbons"] + 2 * count["nitrogens"] - 1.5 * count["oxygens"] + 0.5 * count["aromatic atoms"]
    return atoms + 3.0 * count["rings"]


def molecule_standin(seed: int, count: int, *, symbols: int = 30) -> list[str]:
    """`count` different SMILES of at most `symbols` symbols out of C N O c 1 2 ( ) =, all with right valences.

    A chain of atoms, with single and double bonds, branches, and rings of three to six atoms or six aromatic ones.
    Source: card hyformer, Data ("Stand-in").
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    room = {"C": 4, "N": 3, "O": 2}

    def chain(units: int, inside: bool) -> list[str]:
        written: list[str] = []
        free = 1 if inside else 0  # bonds that the last atom can still have; inside a branch one begins it
        for unit in range(units):
            kind = rng.random()
            if kind < 0.22 and not inside and (free or not written):
                digit = str(rng.integers(1, 3))
                if rng.random() < 0.5:
                    written += ["c", digit, *"cccc", "c", digit]
                    free = 1
                else:
                    size = rng.integers(3, 7)
                    written += ["C", digit, *"C" * (size - 2), "C", digit]
                    free = 2
                continue
            atom = "CNO"[rng.choice(3, p=(0.64, 0.2, 0.16))]
            bond = 2 if written and free > 1 and rng.random() < 0.2 else 1
            written += ["=", atom] if bond == 2 else [atom]
            free = room[atom] - (bond if len(written) > 1 or inside else 0)
            if not inside and free > 1 and unit < units - 1 and rng.random() < 0.25:
                written += ["(", *chain(int(rng.integers(1, 4)), True), ")"]
                free -= 1
            if not free:
                break
        return written

    found: dict[str, None] = {}
    while len(found) < count:
        written = chain(int(rng.integers(3, 10)), False)
        if len(written) <= symbols:
            found.setdefault("".join(written))
    return list(found)


@dataclass(frozen=True)
class _Raw:
    """Strings with their properties, NaN where not known, and the part of each row."""

    strings: list[str]
    targets: np.ndarray
    part: np.ndarray
    classes: bool


def _standin(seed: int, labelled: int | None) -> _Raw:
    sizes = {"train": 4_000, "valid": 500, "test": 1_000}
    strings = molecule_standin(seed, sum(sizes.values()))
    targets = np.array([[standin_property(s)] for s in strings])
    part = np.repeat(list(sizes), list(sizes.values()))
    if labelled is not None:
        targets[labelled : sizes["train"]] = np.nan
    return _Raw(strings, targets, part, classes=False)


def _read(name: str, data_dir: str | None) -> _Raw:
    rows = list(load_dataset(name, data_dir)["molecules"])
    strings = [row["smiles"].decode().strip() for row in rows]
    if name == "smiles_logp":
        order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(rows))
        part = np.full(len(rows), "train", object)
        part[order[: len(rows) // 5]] = "valid"
        part[order[: len(rows) // 10]] = "test"
        return _Raw(strings, np.array([[row["logp"]] for row in rows], np.float64), part, classes=False)
    part = np.array([row["part"].decode() for row in rows], object)
    if not (part != "").any():
        raise UserError(f"{name} needs its split: put {name.partition('/')[2]}_scaffold_split.npz beside its csv file")
    return _Raw(strings, np.array([row["targets"] for row in rows], np.float64), part, classes=name in _CLASSES)


_GENERATED: dict[str, Callable[[int], _Raw]] = {
    "standin": lambda seed: _standin(seed, None),
    "standin_few": lambda seed: _standin(seed, _LABELLED),
}


def load_molecules(name: str, *, data_dir: str | None, config: Any, seed: int = 0) -> MoleculeData:
    """The set of that name: a stand-in, "smiles_logp" or "moleculenet/..."; `config` says how the model wants it.

    `seed` decides the stand-in and which symbols are hidden. In "standin_few" the property of 100 training molecules
    alone is known.
    """
    known = [*_GENERATED, "smiles_logp", *(f"moleculenet/{m}" for m in DATASETS["moleculenet"].members)]
    if name not in known:
        raise UserError(f"no set of molecules is called {name!r}{closest(name, known)}")
    if name in _GENERATED and data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; name the set, as in --data smiles_logp")
    raw = _GENERATED[name](seed) if name in _GENERATED else _read(name, data_dir)
    wanted = {
        "num_targets": (config.num_targets, raw.targets.shape[1]),
        "num_descriptors": (config.num_descriptors, len(DESCRIPTORS)),
        "targets": (config.targets, "classes" if raw.classes else "measurements"),
    }
    for what, (has, needs) in wanted.items():
        if has != needs and not (what in ("num_targets", "targets") and config.num_targets == 0):
            raise UserError(f"{name} has {what} {needs}, the model {has}: set --model.{what.replace('_', '-')} {needs}")
    return _number(raw, config, seed)


def _number(raw: _Raw, config: Any, seed: int) -> MoleculeData:
    written = [symbols_of(s) for s in raw.strings]
    training = np.flatnonzero(raw.part == "train")
    count = Counter(symbol for i in training for symbol in written[i])
    special = config.special
    free = [i for i in range(config.vocabulary) if i not in special.values()]
    # Of equally frequent symbols the first in the alphabet.
    ordered = sorted(count, key=lambda symbol: (-count[symbol], symbol))
    number = dict(zip(ordered, free, strict=False))
    names = {token: symbol for symbol, token in number.items()}
    vocabulary = tuple(
        names.get(i, "" if i in (special["eos"], special["pad"]) else "?") for i in range(config.vocabulary)
    )

    tokens = np.full((len(written), config.length), special["pad"], np.int32)
    lengths = np.zeros(len(written), np.int32)
    for i, symbols in enumerate(written):
        row = [special["bos"], *(number.get(s, special["unknown"]) for s in symbols), special["eos"]][: config.length]
        tokens[i, : len(row)], lengths[i] = row, len(row)

    chosen = {part: np.flatnonzero(raw.part == part) for part in ("train", "valid", "test")}
    counts = np.zeros((len(written), len(DESCRIPTORS)))
    for i in np.concatenate(list(chosen.values())):
        try:
            counts[i] = descriptors_of(raw.strings[i])
        except ValueError as error:
            raise UserError(f"row {i + 1}, {raw.strings[i]!r}, is not a SMILES: {error}") from error
    spread = counts[training].std(axis=0)
    counts = (counts - counts[training].mean(axis=0)) / np.where(spread > 0, spread, 1.0)

    targets = raw.targets[:, : config.num_targets]
    present = np.isfinite(targets)
    labels = [targets[training, k][present[training, k]] for k in range(targets.shape[1])]
    if raw.classes:
        positive = np.array([label.sum() for label in labels])
        total = np.array([len(label) for label in labels])
        typical = np.log(positive + 0.5) - np.log(total - positive + 0.5)
        middle, unit = np.zeros(len(labels)), np.ones(len(labels))
        targets = np.where(present, targets, 0).astype(np.int32)
    else:
        middle = np.array([label.mean() for label in labels])
        unit = np.array([label.std() for label in labels])
        targets = np.where(present, (targets - middle) / np.where(unit > 0, unit, 1.0), 0).astype(np.float32)
        typical = np.zeros(len(labels))
    seen = np.bincount(tokens[training][:, 1:][tokens[training][:, 1:] != special["pad"]], minlength=config.vocabulary)
    frequency = np.log((seen + 0.5) / (seen + 0.5).sum())

    def split(part: str, draws: int) -> MoleculeSplit:
        rows = chosen[part]
        return MoleculeSplit(
            tokens=jnp.asarray(tokens[rows]),
            lengths=jnp.asarray(lengths[rows]),
            descriptors=jnp.asarray(counts[rows], jnp.float32),
            targets=jnp.asarray(targets[rows]),
            known=jnp.asarray(present[rows]),
            unit=jnp.asarray(unit, jnp.float32),
            typical=jnp.asarray(typical, jnp.float32),
            frequency=jnp.asarray(frequency, jnp.float32),
            seed=seed,
            draws=draws,
            unknown_id=special["unknown"],
            mask_id=special["mask"],
        )

    return MoleculeData(
        train=split("train", _DRAWS),
        valid=split("valid", 1),
        test=split("test", 1),
        vocabulary=vocabulary,
        strings=tuple(raw.strings[i] for i in training),
        middle=middle,
    )
