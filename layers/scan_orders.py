"""Orders in which a scan walks over a grid: every one a permutation, as index tables made once for a grid's size.

A grid's cells are numbered in raster order, cell (y, x) of a height x width grid being y * width + x. `order[t]` is the
cell visited at step t, so `x[:, order]` is the sequence, and `inverse_order` leads back.
"""

from functools import lru_cache, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

__all__ = [
    "cross_scan_orders",
    "interleaved_order",
    "inverse_order",
    "local_scan_orders",
    "merge_scans",
    "polygon_scan_orders",
    "raster_order",
    "ring_order",
    "scan_sequences",
    "snake_order",
    "window_order",
]

Order = Int[np.ndarray, " L"]
Orders = Int[np.ndarray, "K L"]


def _table(function):
    """Remember the tables and forbid writing to them, for all callers share them."""

    @lru_cache(maxsize=256)
    def make(*arguments, **options):
        table = np.ascontiguousarray(function(*arguments, **options), dtype=np.int32)
        table.setflags(write=False)
        return table

    return wraps(function)(lambda *arguments, **options: make(*arguments, **options))


def _cells(height: int, width: int) -> np.ndarray:
    if height < 1 or width < 1:
        raise ValueError(f"scan order: grid {height} x {width} is not at least 1 x 1")
    return np.arange(height * width).reshape(height, width)


@_table
def raster_order(height: int, width: int, *, column: bool = False) -> Order:
    """Row after row, every row from the left; `column`: column after column, every column from the top.

    The column order of a frames x agents grid is agent-major. Reversed: `order[::-1]`. Source: card attention_mamba,
    Mechanism "SS2D" 2; card social_mamba, Mechanism 7.
    """
    cells = _cells(height, width)
    return (cells.T if column else cells).ravel()


@_table
def snake_order(height: int, width: int, *, column: bool = False) -> Order:
    """Row after row, every other row backwards (zig-zag), so that consecutive cells touch; `column`: columns so.

    Source: the continuous scan of arXiv:2403.17695, section 3.
    """
    cells = _cells(height, width)
    cells = (cells.T if column else cells).copy()
    cells[1::2] = cells[1::2, ::-1].copy()
    return cells.ravel()


@_table
def ring_order(height: int, width: int, *, alternate: bool = True) -> Order:
    """Ring after ring from the border inwards, each clockwise from its top left corner.

    `alternate` walks every other ring anticlockwise, from the same corner: then all consecutive cells touch, also from
    ring to ring. Without it the order is a plain spiral of closed rings. Source: card polygon_mamba, Mechanism "Polygon
    scan order".
    """
    cells, path = _cells(height, width), []
    for ring in range((min(height, width) + 1) // 2):
        inner = cells[ring : height - ring, ring : width - ring]
        if min(inner.shape) == 1:
            walk = inner.ravel()
        else:
            walk = np.concatenate([inner[0], inner[1:, -1], inner[-1, -2::-1], inner[-2:0:-1, 0]])
            # A single row or column is no ring: from its first cell there is only one way.
            if alternate and ring % 2:
                walk = np.concatenate([walk[:1], walk[:0:-1]])
        path.append(walk)
    return np.concatenate(path)


@_table
def window_order(height: int, width: int, window: int | tuple[int, int], *, column: bool = False) -> Order:
    """Window after window in raster order, the cells of each in raster order; `column`: both column-major.

    `window` is its height and width, in cells; those at the right and the bottom are cut off where it does not divide
    the grid. Source: card issm_depth_sr, Mechanism 2; arXiv:2403.09338.
    """
    rows, columns = (window, window) if isinstance(window, int) else window
    if rows < 1 or columns < 1:
        raise ValueError(f"window_order: window {window!r} is not at least 1 cell")
    cells = _cells(height, width)
    corners = [(y, x) for y in range(0, height, rows) for x in range(0, width, columns)]
    if column:
        corners.sort(key=lambda corner: corner[::-1])
    windows = [cells[y : y + rows, x : x + columns] for y, x in corners]
    return np.concatenate([(part.T if column else part).ravel() for part in windows])


@_table
def cross_scan_orders(height: int, width: int) -> Orders:
    """The four directions of SS2D: row-major, column-major, and both backwards.

    Source: card attention_mamba, Mechanism "SS2D" 2; arXiv:2401.10166.
    """
    both = np.stack([raster_order(height, width), raster_order(height, width, column=True)])
    return np.concatenate([both, both[:, ::-1]])


@_table
def local_scan_orders(height: int, width: int, window: int | tuple[int, int]) -> Orders:
    """Four directions of a local scan: windows row-major, column-major, and both backwards.

    Source: card issm_depth_sr, Mechanism 2.
    """
    both = np.stack([window_order(height, width, window), window_order(height, width, window, column=True)])
    return np.concatenate([both, both[:, ::-1]])


@_table
def polygon_scan_orders(height: int, width: int, *, alternate: bool = True) -> Orders:
    """Rings inwards, the same outwards, rings inwards on the grid turned by 180 degrees, and those outwards.

    Source: card polygon_mamba, Mechanism "Four directions".
    """
    path = ring_order(height, width, alternate=alternate)
    turned = height * width - 1 - path
    return np.stack([path, path[::-1], turned, turned[::-1]])


def inverse_order(order: Int[np.ndarray, "*K L"]) -> Int[np.ndarray, "*K L"]:
    """inverse[order[t]] = t, along the last axis. Source: card polygon_mamba, Mechanism "Four directions"."""
    return np.argsort(order, axis=-1).astype(np.int32)


def interleaved_order(order: Int[np.ndarray, "*K L"], num_streams: int) -> Int[np.ndarray, "*K ML"]:
    """Cell by cell, the tokens of M streams after each other: S = [a_o(1), b_o(1), a_o(2), b_o(2), ...].

    The permutation is of the streams concatenated, stream m's cell c being number m L + c. Its reverse also walks the
    streams of a cell backwards; the interleaved reversed order does not. Source: card issm_depth_sr, Mechanism 2.
    """
    if num_streams < 1:
        raise ValueError(f"interleaved_order: num_streams {num_streams} is not at least 1")
    streams = order.shape[-1] * np.arange(num_streams, dtype=np.int32)
    return (order[..., None] + streams).reshape(*order.shape[:-1], -1)


@jax.jit
def scan_sequences(x: Shaped[Array, "B L *C"], orders: Int[Array | np.ndarray, "K L"]) -> Shaped[Array, "B K L *C"]:
    """s_k[t] = x[orders_k[t]]: the tokens of a grid as K sequences.

    Source: card attention_mamba, Mechanism "SS2D" 2 (cross-scan).
    """
    return jnp.stack([_permute(x, order) for order in orders], axis=1)


def merge_scans(y: Shaped[Array, "B K L *C"], orders: Int[Array | np.ndarray, "K L"]) -> Shaped[Array, "B L *C"]:
    """x[orders_k[t]] = sum over k of y_k[t]: K sequences back onto the grid; float sums are in float32.

    `merge_scans(scan_sequences(x, orders), orders)` is K x. Source: card attention_mamba, Mechanism "SS2D" 5
    (cross-merge).
    """
    # Tables are inverted here and now; a traced order has to be sorted each time.
    return _sum_back(y, inverse_order(orders) if isinstance(orders, np.ndarray) else jnp.argsort(orders, axis=-1))


@jax.jit
def _sum_back(y: Shaped[Array, "B K L *C"], inverses: Int[Array | np.ndarray, "K L"]) -> Shaped[Array, "B L *C"]:
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32)) if jnp.issubdtype(y.dtype, jnp.floating) else y
    parts = [_permute(wide[:, k], inverse) for k, inverse in enumerate(inverses)]
    return sum(parts[1:], parts[0]).astype(y.dtype)


def _permute(x, order):
    # The promise that no cell occurs twice spares the backward pass sums in a certain order.
    return x.at[:, jnp.asarray(order)].get(unique_indices=True, mode="promise_in_bounds")
