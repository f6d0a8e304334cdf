"""Cohorts of patients some of whom lack whole kinds of measurements; and the stand-in for them.

A part holds the whole cohort: all patients are encoded, and the part decides who is linked and who is scored. Links
between a test patient and others do not exist, nor do those between training and validation patients.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.catalogue import DATASETS
from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.graphs.magnet import Config, patient_graph

__all__ = ["Cohort", "CohortData", "CohortSplit", "cohort_standin", "load_cohort"]

PARTS = ("train", "valid", "test")
_NOISE = (0.1, 0.5, 2.0)


@dataclass(frozen=True)
class Cohort:
    """Patients as recorded: zeros where a block is missing; `part` is the number of each in `PARTS`."""

    x: Float[np.ndarray, "N F"]
    block_mask: Bool[np.ndarray, "N M"]
    label: Int[np.ndarray, " N"]
    part: Int[np.ndarray, " N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CohortSplit:
    """One part of one cohort, which is its only example."""

    cohort: dict[str, Array]  # a batch of patient classification without its first axis

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The cohort as often as there are indices; traceable."""
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (jnp.shape(indices)[0], *a.shape)), self.cohort)


@dataclass(frozen=True)
class CohortData:
    """The three parts of a cohort."""

    train: CohortSplit
    valid: CohortSplit
    test: CohortSplit


def cohort_standin(
    seed: int, *, block_widths: tuple[int, ...], num_classes: int, num_patients: int = 500, missing: float = 0.3
) -> Cohort:
    """Patients of the class whose prototype their hidden four numbers are nearest to in angle.

    Every block shows those numbers through a random matrix, squashed to [0, 1], with noise of deviation 0.1 in the
    first, 0.5 in the second and 2 in others; each is missing in 30 % of patients, and one is always there.
    """
    random = np.random.default_rng(seed)
    hidden, prototypes = random.normal(size=(num_patients, 4)), random.normal(size=(num_classes, 4))
    label = np.argmax(hidden @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T, axis=1)
    blocks = []
    for m, width in enumerate(block_widths):
        shown = hidden @ random.normal(size=(4, width))
        blocks.append(1 / (1 + np.exp(-shown - _NOISE[min(m, 2)] * random.normal(size=shown.shape))))
    mask = random.random((num_patients, len(block_widths))) >= missing
    mask[np.arange(num_patients), random.integers(len(block_widths), size=num_patients)] = True
    x = np.concatenate(blocks, axis=1) * np.repeat(mask, block_widths, axis=1)
    part = np.zeros(num_patients, np.int32)
    strata = 2 * label + mask.all(axis=1)  # of each class the complete and the incomplete patients
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        order = random.permutation(members)
        part[order[: len(order) * 3 // 10]] = 2
        part[order[: len(order) // 10]] = 1
    return Cohort(x.astype(np.float32), mask, label.astype(np.int32), part)


def _recorded(name: str, data_dir: str | None) -> tuple[Cohort, tuple[int, ...]]:
    """(cohort, widths of its blocks)."""
    splits = load_dataset(name, data_dir)
    rows = [(number, example) for number, part in enumerate(PARTS) for example in splits[part]]
    blocks = [np.stack([example[key] for _, example in rows]) for key in ("mrna", "mirna")]
    mask = np.stack([~np.isnan(block).all(axis=1) for block in blocks], axis=1)
    cohort = Cohort(
        x=np.nan_to_num(np.concatenate(blocks, axis=1)),
        block_mask=mask,
        label=np.array([example["label"] for _, example in rows], np.int32),
        part=np.array([number for number, _ in rows], np.int32),
    )
    return cohort, tuple(block.shape[1] for block in blocks)


def load_cohort(name: str, *, data_dir: str | None, config: Any, seed: int = 0) -> CohortData:
    """The cohort of that name: "standin", or "ov_omics/<split>". `seed` matters to the stand-in alone.

    `config` is the model's: its blocks and classes must be those of the cohort, and the graph is made as it says.
    """
    known = [f"ov_omics/{member}" for member in DATASETS["ov_omics"].members]
    if name == "standin":
        if data_dir is not None:
            raise UserError(f"the stand-in is generated and takes no --data-dir; name a set with --data {known[0]}")
        cohort = cohort_standin(seed, block_widths=config.block_widths, num_classes=config.num_classes)
    elif name in known:
        cohort, widths = _recorded(name, data_dir)
        classes = int(cohort.label.max()) + 1
        if (widths, classes) != (config.block_widths, config.num_classes):
            raise UserError(
                f"{name} has blocks of {widths} features and {classes} classes, the model wants "
                f"{config.block_widths} and {config.num_classes}: use --config ov_rna"
            )
    else:
        raise UserError(f"no set of cohorts is called {name!r}{closest(name, ['standin', *known])}")
    return CohortData(*(CohortSplit(_part(cohort, number, config)) for number in range(len(PARTS))))


def _part(cohort: Cohort, number: int, config: Any) -> dict[str, Array]:
    chosen = cohort.part == number
    if not chosen.any():
        raise UserError(f"the cohort has no patient in the {PARTS[number]} part: it is too small")
    sizes = {"sparsity": config.sparsity} if hasattr(config, "sparsity") else {}
    graph = patient_graph(
        jnp.asarray(cohort.x),
        jnp.asarray(cohort.block_mask),
        jnp.where(chosen, 0, -1),
        Config(block_widths=config.block_widths, **sizes),
    )
    arrays = {"x": cohort.x, "block_mask": cohort.block_mask, "label": cohort.label, "scored_mask": chosen}
    return {"graph": graph, **jax.tree.map(jnp.asarray, arrays)}
