"""Official state dicts to our variables and back, with strict accounting."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.registry import paper as find_paper
from zoo.registry import variable_shapes
from zoo.weights.table import Row

__all__ = ["check_tensors", "forwards", "from_official", "official_shapes", "to_official"]


def from_official(
    slug: str, hparams: Mapping[str, Any], state_dict: Mapping[str, Any], *, module: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and variables of a paper from the official constructor arguments and state dict.

    Every official tensor must be used and every one of ours filled, each with the expected shape; otherwise one
    `UserError` names all that differ. `module` chooses a part of the official code where goldens exist for it.
    """
    record = find_paper(slug)
    bridge = record.bridge(module)
    try:
        config = bridge.config(hparams)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{slug}: these official hparams do not describe a model of this paper: {error}") from error
    model = (bridge.model or record.model)(config)
    check_tensors(
        {name: np.shape(value) for name, value in state_dict.items()},
        official_shapes(record, bridge, model),
        what=f"the official weights of {slug}",
    )
    return model, jax.tree.map(jnp.asarray, forwards(bridge.table(config), state_dict))


def to_official(
    slug: str, model: nn.Module, variables: Mapping[str, Any], *, module: str | None = None
) -> dict[str, np.ndarray]:
    """The official state dict that holds these variables: the exact inverse of `from_official`."""
    bridge = find_paper(slug).bridge(module)
    return backwards(bridge.table(model.config), jax.device_get(dict(variables)))


def forwards(rows: Iterable[Row], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Our variables from official tensors, unchecked and traceable by JAX."""
    flat = {}
    for row in rows:
        tensors = (state_dict[name] for name in row.official)
        flat.update(zip(row.ours, row.transform.from_official(*tensors), strict=True))
    return unflatten_dict(flat, sep="/")


def backwards(rows: Iterable[Row], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Official tensors from our variables."""
    flat = flatten_dict(variables, sep="/")
    tensors = {}
    for row in rows:
        values = (flat[name] for name in row.ours)
        tensors.update(zip(row.official, row.transform.to_official(*values), strict=True))
    return tensors


def official_shapes(record: Paper, bridge: Official, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the official state dict of this model must have."""
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), variable_shapes(record, model))
    rows = list(bridge.table(model.config))
    covered, ours = {name for row in rows for name in row.ours}, set(flatten_dict(zeros, sep="/"))
    if covered != ours:
        raise AssertionError(f"{record.slug}: table and model disagree on {sorted(covered ^ ours)}")
    return {name: np.shape(value) for name, value in backwards(rows, zeros).items()}


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Raises one `UserError` that names every missing, unexpected and misshapen tensor."""
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is not part of this model" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} has shape {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if faults:
        raise UserError(f"{what} do not fit: {'; '.join(faults)}. Check the config (or hparams) they belong to")
