"""Labelled signals: members of the UCR and UEA archives with their own division, EEG, and the papers' stand-ins.

APAVA is divided by subjects, as Medformer's authors do (arXiv:2405.19363, section 5). The archives give training and
test cases; every fifth training case of each class, at least one, is for validation. Shorter signals than the model's
are filled up with zeros at the end, and a mask says where they end. A name that ends in @n keeps the first n training
cases of each class: few labels, or one shot.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.prepare import load_dataset
from trainers.data.signal_standins import STANDINS
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.classification import class_prior

__all__ = ["SignalData", "SignalSplit", "load_signals"]

_ARCHIVES = ("ucr", "uea")
_HELD_OUT = {"valid": (15, 16, 19, 20), "test": (1, 2, 17, 18)}  # subjects of APAVA


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SignalSplit:
    """Signals of one part on the device."""

    x: Float[Array, "N L C"]
    label: Int[Array, " N"]
    prior: Float[Array, " K"]  # of the training part
    mask: Bool[Array, "N L"] | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The signals of these numbers as a batch of classification; traceable."""
        batch = {"x": self.x[indices], "label": self.label[indices]}
        batch["prior"] = jnp.broadcast_to(self.prior, (*batch["label"].shape, *self.prior.shape))
        return batch if self.mask is None else batch | {"mask": self.mask[indices]}


@dataclass(frozen=True)
class SignalData:
    """The three parts of a set, and what its classes are called."""

    train: SignalSplit
    valid: SignalSplit
    test: SignalSplit
    classes: tuple[str, ...]


def load_signals(
    name: str, *, paper: str, data_dir: str | None, length: int, channels: int, num_classes: int, seed: int = 0
) -> SignalData:
    """The set of that name: "standin" (that of `paper`), "standin/<paper>", "ucr/<member>", "uea/<member>" or "apava",
    each with @n for n training cases a class. `seed` matters to stand-ins alone."""
    match = re.fullmatch(r"([^@]*)(?:@([1-9]\d*))?", name)
    if not match:
        raise UserError(f"--data {name} is no name of a set with a number of cases a class behind @, as in {name}@5")
    found, shots = match[1], match[2]
    collection, _, member = found.partition("/")
    if collection == "standin":
        parts, classes = _standin(member or paper, data_dir, length, channels, num_classes, seed)
    elif collection in _ARCHIVES:
        parts, classes = _archive(found, data_dir, length, channels, num_classes)
    elif found == "apava":
        parts, classes = _apava(data_dir, length, channels, num_classes)
    else:
        known = ["standin", "apava", *(f"standin/{slug}" for slug in STANDINS), "ucr/GunPoint", "uea/BasicMotions"]
        raise UserError(f"no set of signals is called {found!r}{closest(found, known)}")
    if shots:
        label = parts["train"][1]
        kept = np.sort(np.concatenate([np.flatnonzero(label == k)[: int(shots)] for k in range(num_classes)]))
        parts = {**parts, "train": tuple(column[kept] for column in parts["train"])}
    prior = jnp.asarray(class_prior(parts["train"][1], num_classes))

    def split(x: np.ndarray, label: np.ndarray, present: np.ndarray) -> SignalSplit:
        whole = all(part[2].all() for part in parts.values())
        return SignalSplit(jnp.asarray(x), jnp.asarray(label), prior, None if whole else jnp.asarray(present))

    return SignalData(**{part: split(*columns) for part, columns in parts.items()}, classes=classes)


def _standin(paper: str, data_dir: str | None, length: int, channels: int, num_classes: int, seed: int):
    if data_dir is not None:
        raise UserError(
            "the stand-in is generated and takes no --data-dir; name the set with --data, e.g. ucr/GunPoint"
        )
    if paper not in STANDINS:
        raise UserError(f"no stand-in of signals is of a paper {paper!r}{closest(paper, STANDINS)}")
    parts = STANDINS[paper](seed, length=length, channels=channels, num_classes=num_classes)
    whole = {part: (x, label, np.ones(x.shape[:2], bool)) for part, (x, label) in parts.items()}
    return whole, tuple(str(k) for k in range(num_classes))


def _check_sizes(name: str, there: tuple[int, int, int], wanted: tuple[int, int, int]) -> None:
    """Of (length, channels, classes), the length may be less."""
    if there[0] > wanted[0] or there[1:] != wanted[1:]:
        fields = ("length", "channels", "num_classes")
        sizes = ", ".join(f"{field} {size}" for field, size in zip(fields, wanted, strict=True))
        options = " ".join(f"--model.{f.replace('_', '-')} {n}" for f, n in zip(fields, there, strict=True))
        raise UserError(f"{name} does not fit the model's {sizes}: set {options}")


def _apava(data_dir: str | None, length: int, channels: int, num_classes: int):
    subjects = list(load_dataset("apava", data_dir)["subjects"])
    _check_sizes("apava", (*subjects[0]["windows"].shape[1:], 2), (length, channels, num_classes))
    held = {number: part for part, numbers in _HELD_OUT.items() for number in numbers}
    parts: dict[str, list] = {"train": [], "valid": [], "test": []}
    for subject in subjects:
        x = np.pad(subject["windows"], ((0, 0), (0, length - subject["windows"].shape[1]), (0, 0)))
        label = np.full(len(x), subject["label"], np.int32)
        present = np.broadcast_to(np.arange(length) < subject["windows"].shape[1], x.shape[:2])
        parts[held.get(int(subject["subject"]), "train")].append((x, label, present))
    for part, found in parts.items():
        if not found:
            raise UserError(f"apava in {data_dir or 'the download'} lacks all subjects of the {part} part")
    return {
        part: tuple(np.concatenate(column) for column in zip(*found, strict=True)) for part, found in parts.items()
    }, ("healthy", "Alzheimer's")


def _archive(name: str, data_dir: str | None, length: int, channels: int, num_classes: int):
    parts: Mapping[str, list[tuple[np.ndarray, str]]] = {
        part: [(case["series"], case["label"].decode()) for case in cases]
        for part, cases in load_dataset(name, data_dir).items()
    }
    cases = [series for part in parts.values() for series, _ in part]
    classes = tuple(sorted({label for part in parts.values() for _, label in part}))
    longest = max(len(series) for series in cases)
    _check_sizes(name, (longest, cases[0].shape[1], len(classes)), (length, channels, num_classes))
    if any(np.isnan(series).any() for series in cases):
        raise UserError(f"{name} lacks values, and no model here is made for that: choose a set without gaps")

    def columns(part: str, keep) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = [case for i, case in enumerate(parts[part]) if keep(i)]
        x = np.zeros((len(chosen), length, channels), np.float32)
        present = np.zeros(x.shape[:2], bool)
        for i, (series, _) in enumerate(chosen):
            x[i, : len(series)], present[i, : len(series)] = series, True
        return x, np.array([classes.index(label) for _, label in chosen], np.int32), present

    held = set()
    for label in classes:
        numbers = [i for i, (_, other) in enumerate(parts["train"]) if other == label]
        held |= set(numbers[4::5] or numbers[1:2])
    if not held:
        raise UserError(f"{name} has a single training case of each class: nothing is left for validation")
    return {
        "train": columns("train", lambda i: i not in held),
        "valid": columns("train", lambda i: i in held),
        "test": columns("test", lambda i: True),
    }, classes
