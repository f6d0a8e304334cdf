"""Finding papers and backbones by name and property, and building their models."""

import importlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbone import PREFIX, Backbone, BackboneEntry, backbone_entries, backbone_entry
from zoo.catalogue import Entry, closest, entries, entry
from zoo.errors import UserError
from zoo.paper import Paper

__all__ = ["backbone", "backbones", "create", "paper", "papers", "record", "record_of", "variable_shapes"]


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


def backbones(*, status: str | None = None) -> list[BackboneEntry]:
    """The backbones, all or those of one status, "works" or "planned". No model is imported."""
    if status not in (None, "works", "planned"):
        raise UserError(f"no backbone has status {status!r}{closest(status, ['works', 'planned'])}")
    return [e for e in backbone_entries() if status is None or e.works == (status == "works")]


def backbone(name: str) -> Backbone:
    """The implementation of a backbone; its module is imported now. Planned backbones raise `UserError`."""
    row = backbone_entry(name)
    if not row.works:
        works = ", ".join(e.name for e in backbones(status="works"))
        raise UserError(f"{name} ({row.title}) is planned but not implemented yet; these work: {works}")
    return importlib.import_module(f"zoo.backbones.{row.module}").BACKBONES[name]


def record(slug: str) -> Paper | Backbone:
    """The paper of that slug, or for backbone_<name> the backbone of that name."""
    return backbone(slug.removeprefix(PREFIX)) if slug.startswith(PREFIX) else paper(slug)


def create(slug: str, config: str = "tiny", /, **overrides: Any) -> nn.Module:
    """The model of a paper, or of a backbone as backbone_<name>, in one of its named configurations.

    `zoo.create("ister", "etth1", d_model=64)` replaces some fields. The model is a Flax Linen module and holds no
    weights: `model.init(key, batch)` makes them; `zoo.paper(slug).example(model.config, batch_size=2, key=key)` makes a
    batch of the right shapes. For `zoo.create("backbone_llama", "llama-3.2-1b")` it is `model.init(key, **example)`
    with `zoo.backbone("llama").example(...)`.
    """
    found = record(slug)
    if found.model is None:
        raise UserError(f"{slug} has claims to compute and no model: zoo demo {slug}")
    return found.model(found.config(config, **overrides))


def record_of(model: nn.Module) -> Paper | Backbone:
    """The paper or backbone that a model belongs to."""
    package, _, module = type(model).__module__.rpartition(".")
    if package == "zoo.backbones":
        records = [backbone(e.name) for e in backbone_entries() if e.module == module]
        records = [record for record in records if type(model) is record.model]
        # Where several architectures share a class, the configuration says which one it is.
        if len(records) > 1:
            records = [record for record in records if record.name == getattr(model.config, "family", None)]
        if records:
            return records[0]
    if module not in {e.slug for e in entries()}:
        raise UserError(f"{type(model).__name__} is not a model of the zoo")
    return paper(module)


def variable_shapes(found: Paper | Backbone, model: nn.Module, example: Callable[..., Any] | None = None) -> Any:
    """The tree of parameters (and other collections) as `jax.ShapeDtypeStruct`s, nothing computed.

    `example` takes the place of the paper's where the model is a part of it with inputs of its own.
    """
    make = example or found.example
    example = jax.eval_shape(lambda key: make(model.config, batch_size=1, key=key), jax.random.key(0))
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes = jax.eval_shape(lambda example: found.initialize(model, keys, example), example)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), shapes)
