"""The device mesh, and which axis of which parameter lies on which of its axes: rules outside the models."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["AXES", "BATCH", "DEFAULT_RULES", "Rule", "batch_sharding", "make_mesh", "replicated", "tree_shardings"]

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = PartitionSpec(("data", "fsdp"))  # the leading axis of every array of a batch

Rule = tuple[str, PartitionSpec]

# The first pattern found in a parameter's path decides; its spec is aligned with the parameter's last axes.
DEFAULT_RULES: tuple[Rule, ...] = (
    (r"(^|/)(out|ffn_out|fc2)/kernel$", PartitionSpec("tensor", "fsdp")),  # back from the width that is split
    (r"/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"", PartitionSpec()),
)


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def _spec_for(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> PartitionSpec:
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    if spec is None:
        raise UserError(f"no sharding rule matches parameter {path}; add one to the recipe's rules")
    if len(spec) > len(shape):
        return PartitionSpec()  # e.g. the factored second moments of adafactor
    aligned = [None] * (len(shape) - len(spec)) + list(spec)
    # An axis that the devices do not divide stays whole: small models on big meshes are legal, only not split.
    return PartitionSpec(*(a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(aligned)))


def tree_shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> Any:
    """A sharding for every leaf of parameters, optimiser state or a whole train state, by the leaf's path.

    Optimiser states repeat the parameters' paths, so that the same rules place moments beside their parameters.
    """

    def one(path, leaf):
        name = "/" + "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
        return NamedSharding(mesh, _spec_for(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)
