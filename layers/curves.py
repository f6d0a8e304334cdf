"""Space-filling curves: integer grid coordinates to positions on a Morton (Z-order) or Hilbert curve, and back.

Codes are unsigned 32-bit integers, so `depth` bits an axis fit up to 16 in 2-D and 10 in 3-D. Axis 0 is the most
significant; for the opposite convention reverse the last axis of the coordinates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

__all__ = [
    "hilbert_decode",
    "hilbert_encode",
    "morton_decode",
    "morton_encode",
    "quantize_coordinates",
    "sort_by_code",
]


def _check_depth(function: str, depth: int, dims: int) -> None:
    if not 1 <= depth * dims <= 32 or depth < 1:
        raise ValueError(
            f"{function}: depth {depth} is not in 1..{32 // max(dims, 1)}, what {dims} axes fit in 32 bits"
        )


def _interleave(axes: list[UInt32[Array, "*B"]], depth: int) -> UInt32[Array, "*B"]:
    code = jnp.zeros_like(axes[0])
    for bit in reversed(range(depth)):
        for x in axes:
            code = (code << 1) | ((x >> bit) & 1)
    return code


def _separate(code: UInt32[Array, "*B"], depth: int, dims: int) -> list[UInt32[Array, "*B"]]:
    axes = []
    for axis in range(dims):
        x = jnp.zeros_like(code)
        for bit in reversed(range(depth)):
            x = (x << 1) | ((code >> (bit * dims + dims - 1 - axis)) & 1)
        axes.append(x)
    return axes


def _axes(coordinates: Array, depth: int) -> list[Array]:
    low_bits = jnp.uint32((1 << depth) - 1)
    return [coordinates[..., axis].astype(jnp.uint32) & low_bits for axis in range(coordinates.shape[-1])]


@partial(jax.jit, static_argnames=("depth",))
def quantize_coordinates(
    points: Float[Array, "*B N A"],
    lower: Float[Array, "*broadcastable"] | float,
    cell: Float[Array, "*broadcastable2"] | float,
    *,
    depth: int,
) -> Int[Array, "*B N A"]:
    """floor((points - lower) / cell), clipped to 0..2^depth - 1: the grid cell of each point.

    `lower` is the corner of the scene and `cell` the size of a cell, in the points' unit; both broadcast. For a scene
    box, cell = (upper - lower) / 2^depth. Source: card zorder_splat, Mechanism 1; card optnet, Model "Codes".
    """
    _check_depth("quantize_coordinates", depth, max(points.shape[-1], 2))
    cells = jnp.floor((points.astype(jnp.float32) - lower) / cell)
    return jnp.clip(cells, 0, (1 << depth) - 1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("depth",))
def morton_encode(coordinates: Int[Array, "*B A"], *, depth: int) -> UInt32[Array, "*B"]:
    """sum_i sum_a bit_i(x_a) 2^(A i + A - 1 - a): the bits of all axes, interleaved.

    Only the lowest `depth` bits of each of the A axes count; code >> A is the code of the coordinates >> 1. Too many
    bits for 32 raise ValueError. Source: card optnet, Model "Codes"; card zorder_splat, Mechanism 1 (its axes run the
    other way: reverse the last axis).
    """
    _check_depth("morton_encode", depth, coordinates.shape[-1])
    return _interleave(_axes(coordinates, depth), depth)


@partial(jax.jit, static_argnames=("depth", "dims"))
def morton_decode(code: UInt32[Array, "*B"], *, depth: int, dims: int) -> Int[Array, "*B A"]:
    """The coordinates of a Morton code of `dims` axes: the inverse of `morton_encode`.

    Source: card zorder_splat, Mechanism 3 (cell of a pooled code).
    """
    _check_depth("morton_decode", depth, dims)
    return jnp.stack(_separate(code, depth, dims), axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("depth",))
def hilbert_encode(coordinates: Int[Array, "*B A"], *, depth: int) -> UInt32[Array, "*B"]:
    """Position on the Hilbert curve through the grid of 2^depth cells an axis; neighbours on it are one step apart.

    Skilling's transform: from the coarsest bit down, rotations and reflections of the finer bits, then a Gray code.
    Only the lowest `depth` bits of each axis count; code >> A is the code of the coordinates >> 1 at depth - 1 up to
    a symmetry of the cube. Too many bits for 32 raise ValueError. Source: card optnet, Model "Codes"; J. Skilling,
    "Programming the Hilbert curve", 2004.
    """
    dims = coordinates.shape[-1]
    _check_depth("hilbert_encode", depth, dims)
    x = _axes(coordinates, depth)
    for bit in reversed(range(1, depth)):
        x = _turn(x, bit)
    for axis in range(1, dims):
        x[axis] = x[axis] ^ x[axis - 1]
    return _interleave(_flip_below(x, depth), depth)


def _turn(x: list[Array], bit: int, *, undo: bool = False) -> list[Array]:
    """At one level: reflect axis 0 where the axis' bit is set, else exchange the finer bits of axis 0 and the axis."""
    low = jnp.uint32((1 << bit) - 1)
    x = list(x)
    for axis in reversed(range(len(x))) if undo else range(len(x)):
        is_set = (x[axis] >> bit) & 1 == 1
        differing = (x[0] ^ x[axis]) & low
        x[0], other = jnp.where(is_set, x[0] ^ low, x[0] ^ differing), jnp.where(is_set, x[axis], x[axis] ^ differing)
        if axis > 0:
            x[axis] = other
    return x


def _flip_below(x: list[Array], depth: int) -> list[Array]:
    """Flip, on all axes, the bits below every set bit of the last axis (the end of Skilling's Gray code)."""
    flips = jnp.zeros_like(x[0])
    for bit in range(1, depth):
        flips = jnp.where((x[-1] >> bit) & 1 == 1, flips ^ jnp.uint32((1 << bit) - 1), flips)
    return [axis ^ flips for axis in x]


@partial(jax.jit, static_argnames=("depth", "dims"))
def hilbert_decode(code: UInt32[Array, "*B"], *, depth: int, dims: int) -> Int[Array, "*B A"]:
    """The coordinates of a Hilbert code of `dims` axes: the inverse of `hilbert_encode`.

    Source: card optnet, Model "Codes"; J. Skilling, "Programming the Hilbert curve", 2004.
    """
    _check_depth("hilbert_decode", depth, dims)
    x = _separate(code, depth, dims)
    last = x[-1] >> 1
    for axis in reversed(range(1, dims)):
        x[axis] = x[axis] ^ x[axis - 1]
    x[0] = x[0] ^ last
    for bit in range(1, depth):
        x = _turn(x, bit, undo=True)
    return jnp.stack(x, axis=-1).astype(jnp.int32)


@jax.jit
def sort_by_code(
    codes: Num[Array, "*B L"], present: Bool[Array, "*B L"] | None = None
) -> tuple[Int[Array, "*B L"], Int[Array, "*B L"]]:
    """(order, inverse): order lists the tokens by ascending code, inverse gives each token's place in that list.

    Equal codes keep their order; tokens that `present` leaves out come last. Codes may be any numbers, learned scores
    too; no gradient passes. O(L log L). Source: card optnet, Mechanism 3 and 4.
    """
    keys = [codes] if present is None else [codes, ~present]
    order = jnp.lexsort(keys, axis=-1)
    return order, jnp.argsort(order, axis=-1)
