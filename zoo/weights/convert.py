"""Official state dicts to our variables and back, with strict accounting."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.backbone import Backbone
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.registry import record as find_record
from zoo.registry import variable_shapes
from zoo.weights.table import Row

__all__ = [
    "backwards",
    "check_tensors",
    "describe",
    "forwards",
    "from_official",
    "official_model",
    "official_shapes",
    "recognise",
    "to_official",
]


def from_official(
    slug: str, hparams: Mapping[str, Any], state_dict: Mapping[str, Any], *, module: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and variables of a paper or backbone from the official constructor arguments and state dict.

    Every official tensor must be used and every one of ours filled, each with the expected shape; otherwise one
    `UserError` names all that differ. `module` chooses a part of the official code where goldens exist for it.
    """
    record = find_record(slug)
    bridge = record.bridge(module)
    model = official_model(record, bridge, hparams, state_dict)
    expected = official_shapes(record, bridge, model)
    rows = list(bridge.table(model.config))
    tensors = recognise(state_dict, expected, rows, bridge)
    check_tensors(tensors, expected, what=f"the official weights of {slug}")
    check_shared(rows, tensors)
    return model, jax.tree.map(jnp.array, forwards(rows, tensors))


def to_official(
    slug: str, model: nn.Module, variables: Mapping[str, Any], *, module: str | None = None
) -> dict[str, np.ndarray]:
    """The official state dict that holds these variables: the exact inverse of `from_official`."""
    bridge = find_record(slug).bridge(module)
    return backwards(bridge.table(model.config), jax.device_get(dict(variables)))


def official_model(
    record: Paper | Backbone, bridge: Official, hparams: Mapping[str, Any], tensors: Mapping[str, Any]
) -> nn.Module:
    """Our model for these official constructor arguments and weights."""
    try:
        config = bridge.config(hparams)
        if bridge.refine is not None:
            config = bridge.refine(config, tensors)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{record.slug}: these official hparams do not describe a model of this kind: {reason}"
        ) from error
    return (bridge.model or record.model)(config)


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


def official_shapes(record: Paper | Backbone, bridge: Official, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and type of every tensor that the official state dict of this model must have."""
    shapes = variable_shapes(record, model, bridge.example)
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), shapes)
    rows = list(bridge.table(model.config))
    covered, ours = {name for row in rows for name in row.ours}, set(flatten_dict(zeros, sep="/"))
    # What a model takes from its data set need not be part of the official weights.
    ours = {name for name in ours if name in covered or not name.startswith("constants/")}
    if covered != ours:
        raise AssertionError(f"{record.slug}: table and model disagree on {sorted(covered ^ ours)}")
    return {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in backwards(rows, zeros).items()}


def recognise(
    found: Mapping[str, Any], expected: Mapping[str, Any], rows: Iterable[Row], bridge: Official
) -> dict[str, Any]:
    """The found tensors under the names this model knows: prefix added where a file leaves it out, tensors that hold
    nothing learned dropped, names of shared tensors filled in."""
    tensors = {}
    for name, value in found.items():
        if name not in expected:
            name = next((n for n in (bridge.prefix + name, *_as_written_now(name)) if n in expected), name)
        if name in expected or not any(re.search(pattern, name) for pattern in bridge.ignored):
            tensors[name] = value
    for row in rows:
        if row.shared and (present := [name for name in row.official if name in tensors]):
            tensors.update({name: tensors[present[0]] for name in row.official if name not in tensors})
    return tensors


def _as_written_now(name: str) -> list[str]:
    """The hub's oldest files call scale and bias of a norm gamma and beta."""
    return [
        name.removesuffix(old) + new for old, new in ((".gamma", ".weight"), (".beta", ".bias")) if name.endswith(old)
    ]


def check_shared(rows: Iterable[Row], tensors: Mapping[str, Any]) -> None:
    """Raises `UserError` where names of one tensor hold different numbers."""
    for row in rows:
        for name in row.official[1:] if row.shared else ():
            first = tensors[row.official[0]]
            if tensors[name] is not first and not np.array_equal(tensors[name], first):
                raise UserError(
                    f"{row.official[0]} and {name} are one tensor in this model but differ in these weights: "
                    "is tie_word_embeddings (or its like) right?"
                )


def check_tensors(found: Mapping[str, Any], expected: Mapping[str, Any], *, what: str) -> None:
    """Raises one `UserError` that names every missing, unexpected, misshapen and mistyped tensor."""
    missing = sorted(expected.keys() - found.keys())
    faults = [f"{name} is missing" for name in missing]
    faults += [
        f"{name} is not part of this model{_nearest(name, missing or expected)}"
        for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(found.keys() & expected.keys()):
        have, want = describe(found[name]), describe(expected[name])
        if have.shape != want.shape:
            faults.append(f"{name} has shape {have.shape} instead of {want.shape}")
        elif _kind(have.dtype) != _kind(want.dtype):
            faults.append(f"{name} has type {have.dtype} instead of {want.dtype}")
    if faults:
        raise UserError(f"{what} do not fit: {'; '.join(faults)}. Check the config (or hparams) they belong to")


def describe(value: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of whatever holds a tensor."""
    dtype = getattr(value, "dtype", None)
    return jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype if dtype is None else dtype)


def _kind(dtype: Any) -> str:
    kinds = {"floating": jnp.floating, "integer": jnp.integer, "boolean": jnp.bool_, "complex": jnp.complexfloating}
    return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
