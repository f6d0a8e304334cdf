"""Point clouds as sequences: attention in patches of consecutive points along a curve, and pooling by their codes.

Also convolution among the points alone, by a table of who is where.

Clouds are rows of a padded batch; orders come from `layers.curves.sort_by_code` or from learned scores. Padding is at
the end of every order.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from layers.curves import sort_by_code
from layers.masks import DenseMask
from layers.softmax import dot_product_attention
from layers.windows import TokenWindows, token_window_attention

__all__ = [
    "CodeClusters",
    "cluster_by_code",
    "pool_clusters",
    "serialized_attention",
    "serialized_patches",
    "submanifold_convolution",
    "unpool_clusters",
    "voxel_neighbors",
]


def _lengths(order, present):
    if present is None:
        return jnp.full(order.shape[0], order.shape[1], jnp.int32)
    return jnp.sum(present, axis=1, dtype=jnp.int32)


@partial(jax.jit, static_argnames=("patch_size",))
def serialized_patches(
    order: Int[Array, "B L"], present: Bool[Array, "B L"] | None = None, *, patch_size: int
) -> TokenWindows:
    """Patches of K = `patch_size` consecutive points of an order, as tables for `token_window_attention`.

    The last patch of a cloud that is longer than K is filled up with points of the patch before it, those in the same
    slots; they are keys there and stay queries in their own patch. A cloud of at most K points is one patch, in part
    empty. `present` (True = a point) marks padding, which is in no patch. Source: card optnet, Mechanism "Serialised
    patch attention".
    """
    if patch_size < 1:
        raise ValueError(f"serialized_patches: patch_size {patch_size} is not at least 1")
    batch, length = order.shape
    lengths = _lengths(order, present)[:, None]
    ranks = jnp.arange(-(-length // patch_size) * patch_size)
    borrowed = (ranks >= lengths) & (ranks - ranks % patch_size < lengths) & (lengths > patch_size)
    source = jnp.where(borrowed, ranks - patch_size, ranks)
    table = jnp.take_along_axis(order, jnp.minimum(source, length - 1), axis=1)
    table = jnp.where(source < lengths, table, -1).astype(jnp.int32)
    place = jnp.argsort(order, axis=1)
    place = jnp.where(place < lengths, place, -1).astype(jnp.int32)
    return TokenWindows(table.reshape(batch, -1, patch_size), place, -(-lengths[:, 0] // patch_size))


@partial(jax.jit, static_argnames=("patch_size", "scale", "implementation"))
def serialized_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L K D"],
    value: Float[Array, "B L K Dv"],
    order: Int[Array, "B L"],
    present: Bool[Array, "B L"] | None = None,
    *,
    patch_size: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """o_i = sum over the patch of i of softmax_j(scale q_i.k_j) v_j, patches being those of `serialized_patches`.

    Inputs and output are in the points' own order. With patch_size >= L it is full attention, whatever the order;
    padding influences nothing and gets 0. "windows" (the default) costs O(L patch_size D), "reference" is masked
    attention over all points. Source: card optnet, Mechanism "Serialised patch attention"; cards relflexformer,
    zorder_splat.
    """
    if implementation == "reference":
        rank, lengths = jnp.argsort(order, axis=1), _lengths(order, present)[:, None]
        start = rank - rank % patch_size
        stop = jnp.minimum(start + patch_size, lengths)
        start = jnp.where((stop - start < patch_size) & (lengths > patch_size), lengths - patch_size, start)
        key_rank = rank[:, None, :]
        mask = (key_rank >= start[..., None]) & (key_rank < stop[..., None]) & (rank < lengths)[..., None]
        return dot_product_attention(
            query, key, value, mask=DenseMask(mask[:, None]), scale=scale, implementation="reference"
        )
    windows = serialized_patches(order, present, patch_size=patch_size)
    return token_window_attention(query, key, value, windows, scale=scale, implementation=implementation)


class CodeClusters(NamedTuple):
    """Points that share a cell: `index` is the cluster of every point (-1 for padding), in ascending order of codes.

    `code` is the cell's code, 0 beyond the first `count` clusters.
    """

    index: Int[Array, "B L"]
    code: UInt32[Array, "B S"]
    count: Int[Array, " B"]

    @property
    def present(self) -> Bool[Array, "B S"]:
        return jnp.arange(self.code.shape[1]) < self.count[:, None]


@partial(jax.jit, static_argnames=("bits", "size"))
def cluster_by_code(
    codes: UInt32[Array, "B L"], present: Bool[Array, "B L"] | None = None, *, bits: int, size: int | None = None
) -> CodeClusters:
    """Clusters of equal code >> bits; 3 bits halve the resolution of a 3-D curve, and 2 that of a 2-D curve.

    `size` (default L, always enough) is the static number of clusters kept; points of clusters beyond are in none, so
    compare it with `count`. Source: card optnet, Model "SerializedPooling"; card zorder_splat, Mechanism 3.
    """
    length = codes.shape[1]
    size = length if size is None else size
    if not 0 <= bits <= 32:
        raise ValueError(f"cluster_by_code: bits {bits} is not in 0..32")
    cells = codes >> bits if bits < 32 else jnp.zeros_like(codes)
    present = jnp.ones(codes.shape, bool) if present is None else present
    order, inverse = sort_by_code(cells, present)
    ordered = jnp.take_along_axis(cells, order, axis=1)
    starts = jnp.concatenate([jnp.ones_like(present[:, :1]), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    number = jnp.cumsum(starts & jnp.take_along_axis(present, order, axis=1), axis=1, dtype=jnp.int32) - 1
    number = jnp.take_along_axis(number, inverse, axis=1)
    index = jnp.where(present & (number < size), number, -1)
    code = jnp.zeros((codes.shape[0], size), jnp.uint32)
    code = code.at[jnp.arange(codes.shape[0])[:, None], jnp.where(index < 0, size, index)].set(cells, mode="drop")
    return CodeClusters(index, code, jnp.max(jnp.where(present, number, -1), axis=1, initial=-1) + 1)


@partial(jax.jit, static_argnames=("reduction",))
def pool_clusters(
    x: Float[Array, "B L C"], clusters: CodeClusters, *, reduction: str = "mean"
) -> Float[Array, "B S C"]:
    """Sum, mean or max of the points of each cluster, 0 where there is none; sums are float32.

    Equal maxima share the gradient. O(L C). Source: card optnet, Model "SerializedPooling" (max of features, mean of
    coordinates); card zorder_splat, Mechanism 3 (mean).
    """
    size = clusters.code.shape[1]
    # A negative number would count from the end; one too large is dropped.
    index = jnp.where(clusters.index < 0, size, clusters.index)
    by_cloud = partial(jax.vmap, in_axes=(0, 0))
    if reduction == "max":
        pooled = by_cloud(lambda x, i: jax.ops.segment_max(x, i, size))(x, index)
        return jnp.where(clusters.present[..., None], pooled, 0)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"pool_clusters: reduction {reduction!r} is not one of sum, mean, max")
    total = by_cloud(lambda x, i: jax.ops.segment_sum(x, i, size))(x.astype(jnp.float32), index)
    if reduction == "mean":
        members = by_cloud(lambda x, i: jax.ops.segment_sum(x, i, size))(jnp.ones(index.shape), index)
        total = total / jnp.maximum(members, 1)[..., None]
    return total.astype(x.dtype)


@jax.jit
def unpool_clusters(x: Float[Array, "B S C"], clusters: CodeClusters) -> Float[Array, "B L C"]:
    """Every point's copy of its cluster's features; 0 for padding.

    Source: card optnet, Model "SerializedUnpooling".
    """
    copies = jnp.take_along_axis(x, jnp.maximum(clusters.index, 0)[..., None], axis=1)
    return jnp.where((clusters.index >= 0)[..., None], copies, 0)


@partial(jax.jit, static_argnames=("kernel_size", "depth"))
def voxel_neighbors(
    cells: Int[Array, "B L 3"], present: Bool[Array, "B L"] | None = None, *, kernel_size: int, depth: int
) -> Int[Array, "B L K"]:
    """The point in the cell at each of the K = `kernel_size`^3 offsets of a cell, and -1 where there is none.

    Offsets run from -(k - 1) / 2 to (k - 1) / 2, the last axis fastest. A cell holds at most one point, its
    coordinates are in 0 .. 2^`depth` - 1. O(L K log L). Source: card optnet, Model ("For JAX: ... SubMConv").
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"voxel_neighbors: kernel_size {kernel_size} is not odd, so it has no centre")
    if not 1 <= depth <= 10:
        raise ValueError(f"voxel_neighbors: depth {depth} is not in 1..10, what 3 axes fit in 32 bits")
    length = cells.shape[1]
    present = jnp.ones(cells.shape[:2], bool) if present is None else present
    reach = kernel_size // 2
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    weights = np.array([1 << 2 * depth, 1 << depth, 1])

    def number(places):
        inside = jnp.all((places >= 0) & (places < 1 << depth), axis=-1)
        return jnp.where(inside, jnp.sum(places * weights, axis=-1), 1 << 3 * depth)

    def find(cells, present):
        own = jnp.where(present, number(cells), (1 << 3 * depth) + 1)
        order = jnp.argsort(own)
        sought = number(cells[:, None] + offsets)
        place = jnp.minimum(jnp.searchsorted(own[order], sought), length - 1)
        return jnp.where((own[order][place] == sought) & present[:, None], order[place], -1)

    return jax.vmap(find)(cells, present)


def _around(x, neighbors):
    """(B, L, K, C): features at the neighbours, 0 where there is none."""
    batch, length, count = neighbors.shape
    index = jnp.maximum(neighbors, 0).reshape(batch, length * count, 1)
    found = jnp.take_along_axis(x, index, axis=1).reshape(batch, length, count, x.shape[-1])
    return jnp.where((neighbors >= 0)[..., None], found, 0)


def _products(x, kernel, neighbors):
    batch, length, count = neighbors.shape
    rows = _around(x, neighbors).reshape(batch * length, count * x.shape[-1])
    return rows, (rows @ kernel.reshape(-1, kernel.shape[-1])).reshape(batch, length, -1)


@jax.custom_vjp
def _convolve(x, kernel, neighbors):
    return _products(x, kernel, neighbors)[1]


def _convolve_forward(x, kernel, neighbors):
    return _convolve(x, kernel, neighbors), (x, kernel, neighbors)


def _convolve_backward(saved, dy):
    """Who is at offset k of a point has the point at -k: the slope is a convolution too, and needs no scattering."""
    x, kernel, neighbors = saved
    rows, _ = _products(x, kernel, neighbors)
    dkernel = (rows.T @ dy.reshape(-1, dy.shape[-1])).reshape(kernel.shape)
    back = jnp.swapaxes(kernel, 1, 2)
    return _products(dy, back, neighbors[..., ::-1])[1], dkernel, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


@partial(jax.jit, static_argnames=("implementation",))
def submanifold_convolution(
    x: Float[Array, "B L C"],
    kernel: Float[Array, "*k C F"],
    neighbors: Int[Array, "B L K"],
    *,
    bias: Float[Array, " F"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L F"]:
    """y_i = sum_k W_k^T x_n(i, k) + bias over the points n(i, k) of a `voxel_neighbors` table; its shape is W's first.

    Points stay where they are and none come into being, unlike a dense convolution. "gather" (the default) has a
    backward pass that gathers too and relies on the table's symmetry; "reference" adds offset by offset.
    O(L K C F), memory O(L K C). Source: arXiv:1706.01307 (submanifold sparse convolution); card optnet, Model.
    """
    kernel = kernel.reshape(-1, *kernel.shape[-2:])
    if kernel.shape[0] != neighbors.shape[-1]:
        raise ValueError(
            f"submanifold_convolution: {kernel.shape[0]} offsets of the kernel are not the {neighbors.shape[-1]} of "
            "the neighbours"
        )
    if implementation not in (None, "gather", "reference"):
        raise ValueError(f"submanifold_convolution: implementation {implementation!r} is not gather or reference")
    if implementation == "reference":
        around = _around(x, neighbors)
        y = sum(around[:, :, k] @ kernel[k] for k in range(kernel.shape[0]))
    else:
        y = _convolve(x, kernel, neighbors)
    return y if bias is None else y + bias
