"""From arrays on the host, which may be views into files, to the devices: each shard is read by itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

__all__ = ["Placing", "place", "placed_shapes"]

Placing = Mesh | Sharding | Callable[[Any], Any] | None
"""Where weights go: all on the default device (None); every tensor by one `Sharding`; the largest axis that divides
split over all devices of a `Mesh`; or a function from the tree of shapes to a tree of shardings, such as
`lambda shapes: trainers.sharding.tree_shardings(shapes, mesh)`."""


def place(variables: Any, *, dtype: Any = None, sharding: Placing = None) -> Any:
    """The tree of host arrays as device arrays; floating ones become `dtype` (None: stay as they are).

    Of an array that is split, only the part that a device gets is read and converted, one device after the other.
    """
    return jax.tree.map(_place, variables, placed_shapes(variables, dtype=dtype, sharding=sharding))


def _place(value: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    if target.sharding is None:
        return jnp.array(np.asarray(value, target.dtype))
    return jax.make_array_from_callback(
        value.shape, target.sharding, lambda index: np.array(value[index], dtype=target.dtype, order="C")
    )


def placed_shapes(variables: Any, *, dtype: Any = None, sharding: Placing = None) -> Any:
    """Shape, type and sharding of every leaf once it is placed."""

    def kind(leaf):
        wanted = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(wanted))

    shapes = jax.tree.map(kind, variables)
    if sharding is None:
        return shapes
    if isinstance(sharding, Mesh):
        shardings = jax.tree.map(lambda leaf: _split_largest(leaf.shape, sharding), shapes)
    elif isinstance(sharding, Sharding):
        shardings = jax.tree.map(lambda leaf: sharding, shapes)
    else:
        shardings = sharding(shapes)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def _split_largest(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    count = math.prod(mesh.devices.shape)
    axes = [axis for axis in range(len(shape)) if shape[axis] % count == 0]
    names: list[Any] = [None] * len(shape)
    if axes:
        names[max(axes, key=shape.__getitem__)] = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(*names))
