"""Images as patches and back: sliding windows (im2col), their adjoint (col2im), patch tokens, blended tiles."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

__all__ = ["blend_tiles", "fold", "patchify", "tile_starts", "unfold", "unpatchify"]


def _per_axis(function: str, argument: str, value, axes: int) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{function}: {argument} {value} has not one entry for each of {axes} spatial axes")
    return value


def _geometry(function, axes, kernel, stride, dilation, padding):
    named = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
    return tuple(_per_axis(function, name, value, axes) for name, value in named.items())


def _outputs(function, size, kernel, stride, dilation, padding) -> tuple[int, ...]:
    counts = []
    for n, k, s, d, p in zip(size, kernel, stride, dilation, padding, strict=True):
        reach = n + 2 * p - d * (k - 1)
        if reach < 1:
            raise ValueError(f"{function}: kernel {kernel} with dilation {dilation} is not within the padded {size}")
        counts.append((reach - 1) // s + 1)
    return tuple(counts)


def _slide(x: Array, kernel, stride, dilation, padding, counts) -> Array:
    axes = len(kernel)
    x = jnp.pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))
    for axis, (k, s, d, n) in enumerate(zip(kernel, stride, dilation, counts, strict=True)):
        # One strided slice for each place in the kernel; the new axis goes behind those of the kernel so far.
        span = s * (n - 1) + 1
        slices = [jax.lax.slice_in_dim(x, d * i, d * i + span, s, axis=axis + 1) for i in range(k)]
        x = jnp.stack(slices, axis=axes + 1 + axis)
    return x


@partial(jax.jit, static_argnames=("kernel", "stride", "dilation", "padding"))
def unfold(
    x: Shaped[Array, "B *size C"],
    kernel: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
) -> Shaped[Array, "B *windows C"]:
    """y[o, k] = x[stride o + dilation k - padding], zeros outside: (B, *outputs, *kernel, C), im2col for d axes.

    torch's `F.unfold` has the same values as rows (C, *kernel) by columns of outputs, row-major. Copies every pixel
    up to prod(kernel) times. Source: arXiv:1410.0759 (im2col); arXiv:1912.01703 (PyTorch, F.unfold); card xctformer.
    """
    geometry = _geometry("unfold", x.ndim - 2, kernel, stride, dilation, padding)
    return _slide(x, *geometry, _outputs("unfold", x.shape[1:-1], *geometry))


@partial(jax.jit, static_argnames=("size", "kernel", "stride", "dilation", "padding", "mean"))
def fold(
    windows: Float[Array, "B *windows C"],
    size: tuple[int, ...],
    kernel: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    mean: bool = False,
) -> Float[Array, "B *size C"]:
    """x_p = sum of all window entries that lie on pixel p: the adjoint of `unfold` (col2im), torch's `F.fold`.

    `mean` divides by their number, which makes it the inverse of `unfold`; pixels in no window are 0. O(inputs).
    Source: arXiv:1912.01703 (PyTorch, F.fold).
    """
    axes = len(size)
    geometry = _geometry("fold", axes, kernel, stride, dilation, padding)
    counts = _outputs("fold", size, *geometry)
    expected = (*counts, *geometry[0])
    if windows.shape[1:-1] != expected:
        raise ValueError(f"fold: windows of shape {windows.shape[1:-1]} are not {expected}, (*outputs, *kernel)")

    def adjoint(y):
        image = jax.ShapeDtypeStruct((y.shape[0], *size, y.shape[-1]), y.dtype)
        return jax.linear_transpose(lambda x: _slide(x, *geometry, counts), image)(y)[0]

    total = adjoint(windows.astype(jnp.promote_types(windows.dtype, jnp.float32)))
    if mean:
        total = total / jnp.maximum(adjoint(jnp.ones((1, *expected, 1), total.dtype)), 1)
    return total.astype(windows.dtype)


@partial(jax.jit, static_argnames=("patch",))
def patchify(x: Shaped[Array, "B *size C"], patch: int | tuple[int, ...]) -> Shaped[Array, "B N P"]:
    """Non-overlapping patches as tokens: N row-major patches of P = (*patch, C) numbers, the channel fastest.

    Source: arXiv:2010.11929, section 3.1; card geovista.
    """
    size, axes = x.shape[1:-1], x.ndim - 2
    patch = _per_axis("patchify", "patch", patch, axes)
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"patchify: size {size} is not a multiple of patch {patch}")
    blocks = x.reshape(x.shape[0], *(m for n, p in zip(size, patch, strict=True) for m in (n // p, p)), x.shape[-1])
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return blocks.transpose(order).reshape(x.shape[0], math.prod(size) // math.prod(patch), -1)


@partial(jax.jit, static_argnames=("size", "patch"))
def unpatchify(
    tokens: Shaped[Array, "B N P"], size: tuple[int, ...], patch: int | tuple[int, ...]
) -> Shaped[Array, "B *size C"]:
    """The inverse of `patchify` for an image of `size`. Source: arXiv:2010.11929, section 3.1; arXiv:2212.09748."""
    axes = len(size)
    patch = _per_axis("unpatchify", "patch", patch, axes)
    grid = tuple(n // p for n, p in zip(size, patch, strict=True))
    whole = all(n % p == 0 for n, p in zip(size, patch, strict=True))
    if not whole or tokens.shape[1] != math.prod(grid) or tokens.shape[2] % math.prod(patch):
        raise ValueError(f"unpatchify: tokens {tokens.shape[1:]} with patch {patch} are not an image of size {size}")
    blocks = tokens.reshape(tokens.shape[0], *grid, *patch, -1)
    order = (0, *(i for a in range(axes) for i in (1 + a, 1 + axes + a)), 2 * axes + 1)
    return blocks.transpose(order).reshape(tokens.shape[0], *size, -1)


def tile_starts(length: int, tile: int, stride: int) -> tuple[int, ...]:
    """0, stride, 2 stride ... while the tile fits, and one more flush with the end where something is left over.

    Source: card magicbokeh, large images; card spine_context_resunet, inference.
    """
    if not 1 <= tile <= length or stride < 1:
        raise ValueError(f"tile_starts: tile {tile} and stride {stride} are not within 1 and length {length}")
    starts = list(range(0, length - tile + 1, stride))
    return tuple(starts if starts[-1] == length - tile else [*starts, length - tile])


@partial(jax.jit, static_argnames=("starts", "size"))
def blend_tiles(
    tiles: Float[Array, "N B *tile C"],
    starts: tuple[tuple[int, ...], ...],
    size: tuple[int, ...],
    weights: Float[Array, "#N *tile"],
) -> Float[Array, "B *size C"]:
    """x_p = sum_n w_n(p) tile_n(p) / sum_n w_n(p): overlapping tiles blended by ramps or windows.

    `starts`: the first pixel of each tile; `weights` for each tile, or one for all. Pixels whose weights sum to 0 are
    0. O(N tile). Source: card magicbokeh, large images; card spine_context_resunet, inference.
    """
    if len(starts) != tiles.shape[0]:
        raise ValueError(f"blend_tiles: {len(starts)} starts are not one for each of {tiles.shape[0]} tiles")
    extent = tiles.shape[2:-1]
    wide = jnp.promote_types(tiles.dtype, jnp.float32)
    weights = jnp.broadcast_to(weights.astype(wide), (len(starts), *extent))
    total, share = jnp.zeros((tiles.shape[1], *size, tiles.shape[-1]), wide), jnp.zeros(size, wide)
    for tile, weight, start in zip(tiles.astype(wide), weights, starts, strict=True):
        place = tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))
        if any(p.start < 0 or p.stop > n for p, n in zip(place, size, strict=True)):
            raise ValueError(f"blend_tiles: a tile of {extent} at {start} is not within the image {size}")
        total = total.at[(slice(None), *place)].add(tile * weight[..., None])
        share = share.at[place].add(weight)
    present = share > 0
    return (total * jnp.where(present, 1 / jnp.where(present, share, 1), 0)[..., None]).astype(tiles.dtype)
