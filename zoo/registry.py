"""Finding papers by name and property, and building their models."""

import importlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.catalogue import Entry, closest, entries, entry
from zoo.errors import UserError
from zoo.paper import Paper

__all__ = ["create", "paper", "paper_of", "papers", "variable_shapes"]


def papers(
    *,
    room: str | None = None,
    task: str | None = None,
    kind: str | None = None,
    fidelity: str | None = None,
    status: str | None = None,
) -> list[Entry]:
    """The papers with all of these properties (all 109 without any). No model is imported.

    `status` is "works" or "planned". A value that no paper has raises `UserError` with the closest ones.
    """
    wanted = {"room": room, "task": task, "kind": kind, "fidelity": fidelity, "status": status}
    chosen = list(entries())
    for name, value in wanted.items():
        if value is None:
            continue
        known = {getattr(e, name) for e in entries()} - {""}
        if value not in known | ({"exact", "partial", "reading"} if name == "fidelity" else set()):
            raise UserError(f"no paper has {name} {value!r}{closest(value, known)}")
        chosen = [e for e in chosen if getattr(e, name) == value]
    return chosen


def paper(slug: str) -> Paper:
    """The implementation of a paper; its module is imported now. Planned papers raise `UserError`."""
    row = entry(slug)
    if row.status == "planned":
        works = ", ".join(e.slug for e in papers(status="works"))
        raise UserError(f"{slug} ({row.title}) is planned but not implemented yet; these work: {works}")
    return importlib.import_module(row.module).PAPER


def create(slug: str, config: str = "tiny", /, **overrides: Any) -> nn.Module:
    """The model of a paper in one of its named configurations, some fields replaced.

    `zoo.create("ister", "etth1", d_model=64)`. The model is a Flax Linen module and holds no weights:
    `model.init(key, batch)` makes them; `zoo.paper(slug).example(model.config, batch_size=2, key=key)` makes a batch of
    the right shapes.
    """
    record = paper(slug)
    return record.model(record.config(config, **overrides))


def paper_of(model: nn.Module) -> Paper:
    """The paper that a model belongs to."""
    slug = type(model).__module__.rpartition(".")[2]
    if slug not in {e.slug for e in entries()}:
        raise UserError(f"{type(model).__name__} is not a model of the zoo")
    return paper(slug)


def variable_shapes(record: Paper, model: nn.Module) -> Any:
    """The tree of parameters (and other collections) as `jax.ShapeDtypeStruct`s, nothing computed."""
    batch = jax.eval_shape(lambda key: record.example(model.config, batch_size=1, key=key), jax.random.key(0))
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes = jax.eval_shape(model.init, keys, batch)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), shapes)
