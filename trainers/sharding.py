"""The device mesh, and which axis of which parameter lies on which of its axes: rules outside the models."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = [
    "AXES",
    "BATCH",
    "DEFAULT_RULES",
    "Placement",
    "Rule",
    "batch_sharding",
    "make_mesh",
    "placement_summary",
    "placement_table",
    "placements",
    "recipe_rules",
    "replicated",
    "rule_for",
    "tree_shardings",
]

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = PartitionSpec(("data", "fsdp"))  # the leading axis of every array of a batch


@dataclass(frozen=True)
class Rule:
    """Where a family of parameters lies: `spec` names a mesh axis, or None, for each of the parameter's last axes."""

    family: str
    pattern: str
    """A regular expression, searched for in the parameter's path such as /layers_0/attention/query/kernel."""
    spec: tuple[str | None, ...]


# The first rule that fits decides. Parameters of one axis or none always stay whole: they are small.
DEFAULT_RULES: tuple[Rule, ...] = (
    Rule("embedding", r"/embedding$", ("tensor", "fsdp")),
    Rule("experts", r"/experts?(_[^/]*)?/.*kernel$", ("tensor", "fsdp", None)),
    # Back from the width that is split: one sum over the tensor axis a block. x_proj: a state space's maps and steps.
    Rule("projection out", r"/(out|out_proj|o_proj|x_proj|ffn_out|fc2|down|down_proj)/kernel$", ("tensor", "fsdp")),
    Rule("state space", r"/(A_log|log_rates|rates)$", ("tensor", None)),
    # Dense, convolutional (..., in, out) and depthwise kernels alike.
    Rule("projection in", r"/kernel$", ("fsdp", "tensor")),
    # Of norms over several axes; skips of several state spaces.
    Rule("norm", r"/(scale|bias|D)$", ()),
    Rule("table", r"/([^/]*(positions?|pos_embed|tokens?|queries|latents?|codebook|table)[^/]*)$", (None, "fsdp")),
)
_WHOLE = Rule("vector", r"", ())


def make_mesh(spec: str, *, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that "data=2,fsdp=4" describes: axes left out have size 1, one axis may take all the rest with -1.

    Fewer devices than there are may be asked for if their number divides it. The batch must divide over data x fsdp.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if name not in AXES:
            raise UserError(f"mesh {spec!r} names an unknown axis {name!r}{closest(name, AXES)}")
        if not re.fullmatch(r"-1|[1-9][0-9]*", value):
            raise UserError(f"mesh {spec!r}: the size of {name} must be a positive number or -1, not {value!r}")
        sizes[name] = int(value)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh {spec!r}: only one axis can be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed:
        raise UserError(f"mesh {spec!r} needs {fixed} devices, which does not divide the {len(devices)} there are")
    for name in free:
        sizes[name] = len(devices) // fixed
    replicas = sizes["data"] * sizes["fsdp"]
    if batch_size % replicas:
        below, above = batch_size // replicas * replicas, -(-batch_size // replicas) * replicas
        raise UserError(
            f"batch size {batch_size} does not divide over data x fsdp = {replicas} devices of mesh {spec!r}: "
            f"use a batch size of {below or above} or {above}, or another mesh"
        )
    count = math.prod(sizes.values())
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(f"mesh {spec!r} uses {count} of {len(devices)} devices; with several processes it must use all")
    return Mesh(np.asarray(devices[:count]).reshape([sizes[a] for a in AXES]), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of an array of a batch: examples over data and fsdp, and its second axis (time, tokens, rows of an image) over
    the sequence axis if that divides it."""
    sizes = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]
    names = *BATCH, "sequence"
    # What the devices do not divide stays whole.
    return NamedSharding(mesh, PartitionSpec(*(a if n % k == 0 else None for a, n, k in zip(names, shape, sizes))))  # noqa: B905


def rule_for(path: str, shape: tuple[int, ...], rules: Sequence[Rule] = DEFAULT_RULES) -> Rule:
    """The rule that decides on a parameter; UserError if none does."""
    if len(shape) < 2:
        return _WHOLE
    for rule in rules:
        if re.search(rule.pattern, path):
            return rule
    raise UserError(
        f"no sharding rule fits parameter {path} of shape {shape}: add one to the recipe, "
        f"e.g. rules={{'{path.rpartition('/')[2]}$': 'fsdp,-'}}"
    )


def recipe_rules(extra: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules of a recipe, {pattern: "fsdp,tensor"} with "-" for an axis that stays whole, before the default ones."""
    rules = []
    for pattern, text in extra.items():
        axes = tuple(None if axis == "-" else axis for axis in text.replace(" ", "").split(","))
        for axis in axes:
            if axis is not None and axis not in AXES:
                raise UserError(f"rules: {pattern!r} names an unknown mesh axis {axis!r}{closest(axis, AXES)}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"rules: {pattern!r} is not a regular expression: {error}") from error
        rules.append(Rule("recipe", pattern, axes))
    return (*rules, *DEFAULT_RULES)


def _spec(rule: Rule, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    # E.g. the factored second moments of adafactor have fewer axes than their parameter.
    names = rule.spec[-len(shape) :] if len(rule.spec) <= len(shape) else ()
    aligned = [None] * (len(shape) - len(names)) + list(names)
    # An axis that the devices do not divide stays whole: small models on big meshes are legal, only not split.
    return PartitionSpec(*(a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(aligned)))


def _path(path) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> Any:
    """A sharding for every leaf of parameters, optimiser state or a whole train state, by the leaf's path.

    Optimiser states repeat the parameters' paths, so that the same rules place moments beside their parameters.
    """

    def one(path, leaf):
        return NamedSharding(mesh, _spec(rule_for(_path(path), leaf.shape, rules), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


@dataclass(frozen=True)
class Placement:
    """Where one parameter lies."""

    path: str
    shape: tuple[int, ...]
    family: str
    spec: str
    bytes: int
    bytes_per_device: int


def placements(params: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> list[Placement]:
    """Every parameter with the rule that placed it and what each device holds of it."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        rule = rule_for(_path(path), leaf.shape, rules)
        spec = _spec(rule, leaf.shape, mesh)
        size = leaf.dtype.itemsize * math.prod(leaf.shape)
        share = leaf.dtype.itemsize * math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        text = ",".join(axis or "-" for axis in spec) or "whole"
        rows.append(Placement(_path(path), leaf.shape, rule.family, text, size, share))
    return rows


def placement_table(rows: Sequence[Placement]) -> str:
    """One line a parameter, for the run folder."""
    width = max(len(row.path) for row in rows)
    lines = [f"{'parameter':<{width}}  {'shape':<20}{'rule':<18}{'axes':<20}{'bytes':>14}{'a device':>14}"]
    for r in rows:
        shape = "x".join(map(str, r.shape))
        lines.append(f"{r.path:<{width}}  {shape:<20}{r.family:<18}{r.spec:<20}{r.bytes:>14,}{r.bytes_per_device:>14,}")
    total, share = sum(r.bytes for r in rows), sum(r.bytes_per_device for r in rows)
    lines.append(f"{'all':<{width}}  {'':<58}{total:>14,}{share:>14,}")
    return "\n".join(lines) + "\n"


def placement_summary(rows: Sequence[Placement]) -> str:
    """One line a rule and way of splitting, for the console."""
    groups: dict[tuple[str, str], list[Placement]] = {}
    for row in rows:
        groups.setdefault((row.family, row.spec), []).append(row)
    lines = [
        f"  {family:<16}{spec:<18}{len(group):>5} parameters{sum(r.bytes for r in group) / 2**20:>10.2f} MiB, "
        f"{sum(r.bytes_per_device for r in group) / 2**20:.2f} on each device"
        for (family, spec), group in groups.items()
    ]
    return "\n".join(["how parameters lie on the devices:", *lines])
