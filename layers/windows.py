"""Attention inside windows: rectangles of a grid (1-D, 2-D, 3-D; shifted or not), hexagons, any table of tokens."""

import itertools
import math
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from layers.masks import DenseMask, KeyMask
from layers.softmax import dot_product_attention

__all__ = [
    "TokenWindows",
    "axial_from_doubled",
    "fit_window",
    "hex_distance",
    "hex_window",
    "hex_windows",
    "merge_windows",
    "pad_to_windows",
    "partition_windows",
    "token_window_attention",
    "window_attention",
    "window_relative_bias",
    "window_relative_index",
    "window_shift_mask",
]

Sizes = tuple[int, ...]


def _sizes(function: str, name: str, value: int | Sizes, dims: int, least: int) -> Sizes:
    sizes = (value,) * dims if isinstance(value, int) else value
    if len(sizes) != dims or min(sizes) < least:
        raise ValueError(f"{function}: {name} {value!r} is not {dims} sizes of at least {least}")
    return sizes


def fit_window(spatial: Sizes, window: int | Sizes, shift: int | Sizes = 0) -> tuple[Sizes, Sizes]:
    """(window, shift) axis by axis; where the grid is no larger than the window, the grid's size and no shift.

    Source: arXiv:2103.14030, official code; card stepwise_breast, Mechanism "Encoder".
    """
    window = _sizes("fit_window", "window", window, len(spatial), 1)
    shift = _sizes("fit_window", "shift", shift, len(spatial), 0)
    covers = [size <= w for size, w in zip(spatial, window, strict=True)]
    return (
        tuple(size if covered else w for size, w, covered in zip(spatial, window, covers, strict=True)),
        tuple(0 if covered else s % w for s, w, covered in zip(shift, window, covers, strict=True)),
    )


def _padded(spatial: Sizes, window: Sizes) -> Sizes:
    return tuple(-(-size // w) * w for size, w in zip(spatial, window, strict=True))


@partial(jax.jit, static_argnames=("window",))
def pad_to_windows(x: Shaped[Array, "B *S C"], window: int | Sizes) -> Shaped[Array, "B *S2 C"]:
    """x with zeros at the end of every spatial axis up to the next multiple of the window.

    Official Swin codes pad before the projections, so that padded tokens take part as keys (their key is the bias).
    For that, pad here, project, attend, and cut; `window_attention` itself leaves padding out. Source:
    arXiv:2103.14030, official code.
    """
    spatial = x.shape[1:-1]
    padded = _padded(spatial, _sizes("pad_to_windows", "window", window, len(spatial), 1))
    return jnp.pad(x, [(0, 0), *((0, p - n) for n, p in zip(spatial, padded, strict=True)), (0, 0)])


@partial(jax.jit, static_argnames=("window",))
def partition_windows(x: Shaped[Array, "B *S C"], window: int | Sizes) -> Shaped[Array, "B n T C"]:
    """The n windows of a grid in raster order, the T tokens of each in raster order; padded at the end with zeros.

    Source: arXiv:2103.14030, section 3.2.
    """
    spatial = x.shape[1:-1]
    window = _sizes("partition_windows", "window", window, len(spatial), 1)
    x = pad_to_windows(x, window)
    split = itertools.chain.from_iterable((n // w, w) for n, w in zip(x.shape[1:-1], window, strict=True))
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    dims = len(window)
    order = (0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
    return jnp.transpose(x, order).reshape(x.shape[0], -1, math.prod(window), x.shape[-1])


@partial(jax.jit, static_argnames=("window", "spatial"))
def merge_windows(windows: Shaped[Array, "B n T C"], window: int | Sizes, spatial: Sizes) -> Shaped[Array, "B *S C"]:
    """The inverse of `partition_windows` for a grid of size `spatial`; the padding is cut off.

    Source: arXiv:2103.14030, section 3.2.
    """
    window = _sizes("merge_windows", "window", window, len(spatial), 1)
    padded = _padded(spatial, window)
    counts = tuple(n // w for n, w in zip(padded, window, strict=True))
    if windows.shape[1:3] != (math.prod(counts), math.prod(window)):
        raise ValueError(
            f"merge_windows: spatial {spatial!r} is not a grid of {windows.shape[1]} windows {window!r} of "
            f"{windows.shape[2]} tokens"
        )
    dims = len(window)
    x = windows.reshape(windows.shape[0], *counts, *window, windows.shape[-1])
    order = itertools.chain.from_iterable((1 + a, 1 + dims + a) for a in range(dims))
    x = jnp.transpose(x, (0, *order, 2 * dims + 1)).reshape(windows.shape[0], *padded, windows.shape[-1])
    return x[(slice(None), *(slice(0, n) for n in spatial))]


@lru_cache(maxsize=64)
def _window_groups(spatial: Sizes, window: Sizes, shift: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """For the tokens of a grid of whole windows, rolled by -shift: the window's number and the region's."""
    windows, regions = (np.zeros(spatial, np.int32) for _ in range(2))
    for axis, (size, w, s) in enumerate(zip(spatial, window, shift, strict=True)):
        place = np.arange(size)
        wrapped = place >= size - s if s else np.zeros(size, bool)
        shape = [-1 if a == axis else 1 for a in range(len(spatial))]
        windows = windows * (size // w) + (place // w).reshape(shape)
        regions = regions * 2 + wrapped.astype(np.int32).reshape(shape)
    return windows, regions


@lru_cache(maxsize=64)
def _shift_mask(spatial: Sizes, window: Sizes, shift: Sizes) -> np.ndarray:
    windows, regions = _window_groups(spatial, window, shift)
    # Sorted by window, tokens stay in raster order within each: the layout of `partition_windows`.
    regions = regions.ravel()[np.argsort(windows.ravel(), kind="stable")].reshape(-1, math.prod(window))
    return regions[:, :, None] == regions[:, None, :]


def window_shift_mask(spatial: Sizes, window: int | Sizes, shift: int | Sizes) -> Bool[np.ndarray, "n T T"]:
    """Which tokens of a window may meet once the grid has been rolled by -shift: those that were neighbours before.

    `spatial` is the grid's size, rounded up to whole windows; window and shift are used as they are (see `fit_window`).
    Source: arXiv:2103.14030, figure 4; in 3-D arXiv:2106.13230.
    """
    window = _sizes("window_shift_mask", "window", window, len(spatial), 1)
    return _shift_mask(_padded(spatial, window), window, _sizes("window_shift_mask", "shift", shift, len(spatial), 0))


@lru_cache(maxsize=64)
def _relative_index(window: Sizes) -> np.ndarray:
    places = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, len(window))
    index = np.zeros((len(places), len(places)), np.int32)
    for axis, w in enumerate(window):
        index = index * (2 * w - 1) + places[:, None, axis] - places[None, :, axis] + w - 1
    index.setflags(write=False)
    return index


def window_relative_index(window: int | Sizes) -> Int[np.ndarray, "T T"]:
    """Row of the table of relative positions for query token i and key token j of a window, a number for 1-D.

    Offsets query - key are numbered in raster order from the most negative on, prod(2 w - 1) of them in all. Where the
    window is cut to a small grid, MONAI's Swin-UNETR keeps the leading part [:T, :T] of the whole window's index.
    Source: arXiv:2103.14030, section 3.2, official code.
    """
    window = (window,) if isinstance(window, int) else window
    return _relative_index(_sizes("window_relative_index", "window", window, len(window), 1))


@partial(jax.jit, static_argnames=("window",))
def window_relative_bias(table: Float[Array, "R H"], window: int | Sizes) -> Float[Array, "H T T"]:
    """bias[h, i, j] = table[index(i, j), h]: Swin's relative position bias.

    Source: arXiv:2103.14030, equation 4.
    """
    window = (window,) if isinstance(window, int) else window
    if table.shape[0] != math.prod(2 * w - 1 for w in window):
        raise ValueError(f"window_relative_bias: table of {table.shape[0]} rows is not one for window {window!r}")
    return jnp.moveaxis(table[window_relative_index(window)], -1, 0)


_IMPLEMENTATIONS = ("reference", "windows")


def _check_implementation(function: str, implementation: str | None, known: tuple[str, ...]) -> None:
    if implementation is not None and implementation not in known:
        raise ValueError(f"{function}: implementation {implementation!r} is not one of {', '.join(known)}")


@partial(jax.jit, static_argnames=("window", "shift", "scale", "implementation"))
def window_attention(
    query: Float[Array, "B *S H D"],
    key: Float[Array, "B *S K D"],
    value: Float[Array, "B *S K Dv"],
    *,
    window: int | Sizes,
    shift: int | Sizes = 0,
    bias: Float[Array, "H T T"] | None = None,
    token_mask: Bool[Array, "B *S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B *S H Dv"]:
    """o_i = sum over the window of i of softmax_j(scale q_i.k_j + bias_ij) v_j, windows shifted cyclically.

    Windows and shifts are in tokens, per axis of a 1-D, 2-D or 3-D grid; `fit_window` applies. The grid is padded at
    its end to whole windows, then rolled by -shift; tokens that only meet because of the roll do not see each other,
    and padding and the tokens that `token_mask` (True = present) leaves out are seen by none. `bias` is that of the
    fitted window, T = prod(window) tokens; K key heads serve H query heads as in `dot_product_attention`. "windows"
    costs O(L T D), "reference" is masked attention over the whole grid. Source: arXiv:2103.14030, section 3.2; in 3-D
    arXiv:2201.01266; cards mambarain (Mechanism 1b), stepwise_breast.
    """
    _check_implementation("window_attention", implementation, _IMPLEMENTATIONS)
    spatial, batch = query.shape[1:-2], query.shape[0]
    window, shift = fit_window(spatial, window, shift)
    padded, tokens = _padded(spatial, window), math.prod(window)
    if bias is not None and bias.shape[-1] != tokens:
        raise ValueError(
            f"window_attention: bias for {bias.shape[-1]} tokens is not one for the fitted window {window!r}"
        )
    if implementation == "reference":
        return _dense_windows(query, key, value, bias, token_mask, window, shift, scale)
    axes = tuple(range(1, 1 + len(spatial)))

    def to_windows(x):
        x = jnp.roll(pad_to_windows(x.reshape(batch, *spatial, -1), window), [-s for s in shift], axes)
        return partition_windows(x, window)

    present = None
    if token_mask is not None or padded != spatial:
        token_mask = jnp.ones((batch, *spatial), bool) if token_mask is None else token_mask
        present = to_windows(token_mask)[..., 0]
    may_meet = None
    if any(shift):
        may_meet = DenseMask(jnp.asarray(_shift_mask(padded, window, shift))[:, None])

    def attend(q, k, v, present):
        mask = may_meet
        if present is not None:
            mask = KeyMask(present) if mask is None else mask & KeyMask(present)
        return dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)

    grids = [to_windows(x).reshape(batch, -1, tokens, *x.shape[-2:]) for x in (query, key, value)]
    output = jax.vmap(attend)(*grids, present)
    output = merge_windows(output.reshape(*output.shape[:3], -1), window, padded)
    output = jnp.roll(output, shift, axes)[(slice(None), *(slice(0, n) for n in spatial))]
    return output.reshape(*query.shape[:-1], value.shape[-1])


def _dense_windows(query, key, value, bias, token_mask, window, shift, scale):
    spatial, dims = query.shape[1:-2], len(window)
    padded = _padded(spatial, window)
    cut = tuple(slice(0, n) for n in spatial)
    windows, regions = (np.roll(x, shift, range(dims))[cut].ravel() for x in _window_groups(padded, window, shift))
    mask = (windows[:, None] == windows[None, :]) & (regions[:, None] == regions[None, :])
    mask = DenseMask(jnp.asarray(mask))
    if token_mask is not None:
        mask = mask & KeyMask(token_mask.reshape(token_mask.shape[0], -1))
    if bias is not None:
        # A token's place in its window, in the layout of the padded and rolled grid.
        places = np.zeros(padded, np.int32)
        for axis, (size, w) in enumerate(zip(padded, window, strict=True)):
            places = places * w + (np.arange(size) % w).reshape([-1 if a == axis else 1 for a in range(dims)])
        places = np.roll(places, shift, range(dims))[cut].ravel()
        bias = bias[:, places[:, None], places[None, :]]
    flat = [x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value)]
    output = dot_product_attention(*flat, bias=bias, mask=mask, scale=scale, implementation="reference")
    return output.reshape(*query.shape[:-1], value.shape[-1])


# ---- windows as tables of tokens -------------------------------------------------------------------------------------


class TokenWindows(NamedTuple):
    """n windows of up to T tokens: `table` holds token numbers, -1 where a place is empty; `place` finds tokens in it.

    `place` is window * T + slot for the slot where a token is a query, -1 for a token in no window. A token may stand
    in other slots too, where it is a key only. `count` is the number of windows that the tokens need.
    """

    table: Int[Array, "*B n T"]
    place: Int[Array, "*B L"]
    count: Int[Array, "*B"]


@partial(jax.jit, static_argnames=("scale", "implementation"))
def token_window_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L K D"],
    value: Float[Array, "B L K Dv"],
    windows: TokenWindows,
    *,
    bias: Float[Array, "H T T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """o_i = sum over the window of i of softmax_j(scale q_i.k_j + bias) v_j for windows that are tables of tokens.

    The tables have a batch axis or serve all rows. Empty places influence nothing; a token in no window gets 0. `bias`
    speaks of the slots. "windows" gathers and costs O(n T^2 D), "reference" is masked attention over all tokens.
    Source: card hexst, Mechanism "Packing"; card optnet, Mechanism "Serialised patch attention".
    """
    _check_implementation("token_window_attention", implementation, _IMPLEMENTATIONS)
    batch = query.shape[0]
    table = jnp.broadcast_to(windows.table, (batch, *windows.table.shape[-2:]))
    place = jnp.broadcast_to(windows.place, (batch, windows.place.shape[-1]))
    count, tokens = table.shape[1:]
    if implementation == "reference":
        return _dense_token_windows(query, key, value, table, place, bias, scale)
    rows = jnp.arange(batch)[:, None]
    taken = jnp.maximum(table.reshape(batch, -1), 0)

    def gather(x):
        return x[rows, taken].reshape(batch, count, tokens, *x.shape[2:])

    def attend(q, k, v, filled):
        return dot_product_attention(q, k, v, bias=bias, mask=KeyMask(filled), scale=scale)

    output = jax.vmap(attend)(gather(query), gather(key), gather(value), table >= 0)
    output = output.reshape(batch, count * tokens, *output.shape[-2:])[rows, jnp.maximum(place, 0)]
    return jnp.where((place >= 0)[..., None, None], output, 0)


def _dense_token_windows(query, key, value, table, place, bias, scale):
    batch, length, tokens = *query.shape[:2], table.shape[-1]
    own = table[jnp.arange(batch)[:, None], jnp.maximum(place, 0) // tokens]
    is_key = (own[..., None] == jnp.arange(length)) & (place >= 0)[..., None, None]
    mask = DenseMask(jnp.any(is_key, axis=2)[:, None])
    if bias is not None:
        key_slot = jnp.argmax(is_key, axis=2)
        query_slot = jnp.maximum(place, 0) % tokens
        bias = jnp.moveaxis(bias[:, query_slot[..., None], key_slot], 0, 1)
    return dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale, implementation="reference")


# ---- hexagons --------------------------------------------------------------------------------------------------------


@jax.jit
def axial_from_doubled(row: Int[Array, "*B"], column: Int[Array, "*B"]) -> Int[Array, "*B 2"]:
    """(q, r) = ((column - row) / 2, row): axial coordinates of a hexagonal lattice with doubled columns (Visium).

    Row and column have the same parity. Source: card hexst, Mechanism "Coordinates".
    """
    return jnp.stack([(column - row) // 2, row], axis=-1)


@jax.jit
def hex_distance(a: Int[Array, "*B 2"], b: Int[Array, "*#B 2"]) -> Int[Array, "*B"]:
    """max(|dq|, |dr|, |dq + dr|): steps between cells of a hexagonal lattice, in axial coordinates.

    Source: card hexst, Mechanism "Coordinates".
    """
    q, r = (a - b)[..., 0], (a - b)[..., 1]
    return jnp.maximum(jnp.maximum(jnp.abs(q), jnp.abs(r)), jnp.abs(q + r))


@lru_cache(maxsize=16)
def _hex_slots(radius: int) -> np.ndarray:
    """Slot of every offset from the centre, raster order over the cells of the hexagon; others -1."""
    q, r = np.meshgrid(*[np.arange(-radius, radius + 1)] * 2, indexing="ij")
    inside = np.abs(q + r) <= radius
    return np.where(inside, np.cumsum(inside).reshape(inside.shape) - 1, -1).astype(np.int32)


@partial(jax.jit, static_argnames=("radius", "shifted"))
def hex_window(
    coordinates: Int[Array, "*B 2"], *, radius: int, shifted: bool = False
) -> tuple[Int[Array, "*B 2"], Int[Array, "*B"]]:
    """(window, slot) of axial cells: hexagons of 3R^2 + 3R + 1 cells tile the lattice, b1 = (2R+1, -R), b2 = (R, R+1).

    Window (i, j) has its centre at i b1 + j b2; the slot numbers the cells of a hexagon. `shifted` moves the lattice by
    about b1 / 2, (ceil(R/2) + floor(R/2), -floor(R/2)), so that shifted windows join neighbours of unshifted ones.
    Source: card hexst, Mechanism "Hexagonal window" and "Shifted windows".
    """
    if radius < 1:
        raise ValueError(f"hex_window: radius {radius} is not at least 1")
    if shifted:
        coordinates = coordinates + jnp.array([radius, -(radius // 2)], coordinates.dtype)
    x, y = coordinates[..., 0], coordinates[..., 1]
    z, area, step = -x - y, 3 * radius * radius + 3 * radius + 1, 3 * radius + 2
    big_x, big_y, big_z = (y + step * x) // area, (z + step * y) // area, (x + step * z) // area
    window = jnp.stack([(1 + big_x - big_y) // 3, (1 + big_y - big_z) // 3], axis=-1)
    centre = window @ jnp.array([[2 * radius + 1, -radius], [radius, radius + 1]], window.dtype)
    local = coordinates - centre + radius
    return window, jnp.asarray(_hex_slots(radius))[local[..., 0], local[..., 1]]


@partial(jax.jit, static_argnames=("radius", "shifted", "num_windows"))
def hex_windows(
    coordinates: Int[Array, "L 2"],
    present: Bool[Array, " L"] | None = None,
    *,
    radius: int,
    shifted: bool = False,
    num_windows: int | None = None,
) -> TokenWindows:
    """The hexagonal windows of cells at axial coordinates, as tables for `token_window_attention`; for batches, vmap.

    `num_windows` (default L, always enough) is how many windows the table holds; tokens of windows beyond are in none,
    so compare it with `count`. Every token has its own cell; `present` (True = a token) marks padding. O(L log L).
    Source: card hexst, Mechanism "Packing".
    """
    length = coordinates.shape[0]
    num_windows = length if num_windows is None else num_windows
    present = jnp.ones(length, bool) if present is None else present
    tokens = 3 * radius * radius + 3 * radius + 1
    window, slot = hex_window(coordinates, radius=radius, shifted=shifted)
    order = jnp.lexsort((window[:, 1], window[:, 0], ~present))
    ordered = window[order]
    starts = jnp.concatenate([jnp.ones(1, bool), jnp.any(ordered[1:] != ordered[:-1], axis=-1)])
    number = jnp.zeros(length, jnp.int32).at[order].set(jnp.cumsum(starts & present[order], dtype=jnp.int32) - 1)
    place = jnp.where(present & (number < num_windows), number * tokens + slot, -1)
    # A place outside the table is dropped; a negative one would count from the end.
    table = jnp.full(num_windows * tokens, -1, jnp.int32)
    table = table.at[jnp.where(place >= 0, place, num_windows * tokens)].set(jnp.arange(length), mode="drop")
    return TokenWindows(table.reshape(num_windows, tokens), place, jnp.max(jnp.where(present, number, -1)) + 1)
