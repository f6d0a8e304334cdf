"""Softmax attention in blocks of whole rows, with its own backward pass: memory linear in length, fast on CPU.

A block is some queries of one head against all the keys they may see, so that its scores stay in cache, its products
are plain matrix products and its softmax needs no running maximum. The backward pass recomputes the weights from the
logarithm of each row's sum.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.masks import Mask

# Scores of one block: four megabytes in float32, of which each of a few cores works on a part that fits its cache.
_BLOCK_ELEMENTS = 1 << 20
_MIN_QUERIES, _MAX_QUERIES = 128, 1024
_MAX_BANDS = 8
# What a block costs beside its scores, in scores.
_BLOCK_OVERHEAD = 1 << 14


class _Band(NamedTuple):
    """`count` blocks of `size` queries from `start` on; block j sees `width` keys from `key_starts[j]` on."""

    start: int
    size: int
    count: int
    width: int
    key_starts: tuple[int, ...]


def _bands(query_length: int, key_length: int, mask: Mask | None) -> list[_Band]:
    """Blocks grouped so that those of a group have the same shape and few keys that the mask is known to forbid."""
    largest = min(max(_BLOCK_ELEMENTS // max(key_length, 1), _MIN_QUERIES), _MAX_QUERIES, query_length)

    def visible(size):
        return [_visible(mask, j * size, size, query_length, key_length) for j in range(query_length // size)]

    def cost(size):
        return sum(size * (stop - start) + _BLOCK_OVERHEAD for start, stop in visible(size))

    # Under a band smaller blocks see fewer keys that are forbidden to most of their queries.
    sizes = [largest] if mask is None else [largest // d for d in (1, 2, 4, 8) if largest // d >= _MIN_QUERIES]
    size = min(sizes or [largest], key=cost)
    count = query_length // size
    ranges = visible(size)
    per_band = -(-count // min(_MAX_BANDS, len({stop - start for start, stop in ranges})))
    bands = []
    for first in range(0, count, per_band):
        part = ranges[first : first + per_band]
        width = max(stop - start for start, stop in part)
        starts = tuple(min(start, key_length - width) for start, _ in part)
        bands.append(_Band(first * size, size, len(part), width, starts))
    if rest := query_length - count * size:
        start, stop = _visible(mask, count * size, rest, query_length, key_length)
        bands.append(_Band(count * size, rest, 1, stop - start, (start,)))
    return bands


def _visible(mask, start: int, size: int, query_length: int, key_length: int) -> tuple[int, int]:
    """A range of keys outside which the queries are known to see nothing, to within 128."""

    def seen(first: int, last: int, tile: int) -> list[int]:
        """Of the tiles from `first` to `last`, the beginnings of those that are not known to be forbidden."""
        shift = key_length - query_length
        return [
            k
            for k in range(first, min(last, key_length), tile)
            if mask is None or mask.covers(start, size, k, min(tile, key_length - k), shift=shift) is not False
        ]

    # Few large tiles first, for time, then small ones at both ends, or a window would widen with the length.
    large, small = max(128, key_length // 64), 128
    tiles = seen(0, key_length, large)
    if not tiles:
        return 0, 1
    begin = [*seen(tiles[0], tiles[0] + large, small), tiles[0]][0]
    end = [tiles[-1] + large - small, *seen(tiles[-1], tiles[-1] + large, small)][-1]
    return begin, min(end + small, key_length)


def _heads_first(x: Array) -> Float[Array, "BH L D"]:
    batch, length, heads, width = x.shape
    return jnp.moveaxis(x.astype(jnp.float32), 2, 1).reshape(batch * heads, length, width)


def _heads_last(x: Float[Array, "BH L D"], batch: int, dtype) -> Float[Array, "B L H D"]:
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2).astype(dtype)


def _slice(x, starts, sizes):
    """Part of an array that broadcasts: axes of length 1 stay whole."""
    starts = [0 if n == 1 else start for start, n in zip(starts, x.shape, strict=True)]
    return jax.lax.dynamic_slice(x, starts, [min(n, size) for n, size in zip(x.shape, sizes, strict=True)])


def _scores(query, key, block, bias, mask, soft_cap, shift):
    """Scores of one block, with the biases and -inf where forbidden; also those after the soft cap alone."""
    batch, head, query_start, key_start = block
    sizes = 1, 1, query.shape[0], key.shape[0]
    scores = capped = query @ key.T
    if soft_cap is not None:
        scores = capped = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + _slice(bias, block, sizes)[0, 0]
    if mask is not None:
        allowed = mask.block(query_start, sizes[2], key_start, sizes[3], shift=shift)
        allowed = _slice(allowed, (batch, head, 0, 0), sizes)[0, 0]
        scores = jnp.where(allowed, scores, -jnp.inf)
    return scores, capped


def _take(x, start, size: int):
    return x if size == x.shape[0] else jax.lax.dynamic_slice_in_dim(x, start, size)


def _over_blocks(band: _Band, step, carry):
    """(carry, rows) of step(carry, query_start, key_start) over the blocks of a band."""
    if band.count == 1:
        return step(carry, band.start, band.key_starts[0])
    starts = band.start + band.size * jnp.arange(band.count), jnp.array(band.key_starts)
    carry, rows = jax.lax.scan(lambda c, start: step(c, *start), carry, starts)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def blocked_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    bias: Float[Array, "b h q k"] | None,
    mask: Mask | None,
    sinks: Float[Array, " H"] | None,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "B Lq H Dv"]:
    """o_q = sum_k softmax_k(cap(scale q.k) + bias)_qk v_k: the softmax case of `dot_product_attention`.

    O(Lq Lk) time and O(Lq + Lk) memory, forwards and backwards; key ranges that the mask's `covers` rules out cost
    nothing. Computed in float32. Reverse-mode differentiable only.
    """
    # Masks go through as their leaves: JAX makes trees of placeholders where it wants gradients of arguments.
    leaves, structure = jax.tree.flatten(mask)
    return _attention(query, key, value, bias, leaves, sinks, structure, scale, soft_cap)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(query, key, value, bias, mask_leaves, sinks, mask_structure, scale, soft_cap):
    return _forward(query, key, value, bias, mask_leaves, sinks, mask_structure, scale, soft_cap)[0]


def _forward(query, key, value, bias, mask_leaves, sinks, mask_structure, scale, soft_cap):
    mask = mask_structure.unflatten(mask_leaves)
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    query_length, key_length = query.shape[1], key.shape[1]
    shift = key_length - query_length
    queries, keys, values = _heads_first(query * scale), _heads_first(key), _heads_first(value)
    bands = _bands(query_length, key_length, mask)

    def one_head(i):
        q, k, v = queries[i], keys[i // groups], values[i // groups]
        sink = None if sinks is None else sinks[i % heads].astype(jnp.float32)

        def rows(band):
            def step(_, query_start, key_start):
                block = i // heads, i % heads, query_start, key_start
                keys_seen = _take(k, key_start, band.width)
                scores, _ = _scores(_take(q, query_start, band.size), keys_seen, block, bias, mask, soft_cap, shift)
                top = jnp.max(scores, axis=-1)
                if mask is not None or bias is not None:
                    top = jnp.where(top == -jnp.inf, 0.0, top)
                if sinks is not None:
                    top = jnp.maximum(top, sink)
                weights = jnp.exp(scores - top[:, None])
                total = jnp.sum(weights, axis=-1)
                if sinks is not None:
                    total = total + jnp.exp(sink - top)
                # The division comes after the product: it is then Dv numbers a row instead of Lk.
                return None, (weights @ _take(v, key_start, band.width), total, top)

            return _over_blocks(band, step, None)[1]

        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(rows, bands))

    output, total, top = jax.lax.map(one_head, jnp.arange(queries.shape[0]))
    output = output / jnp.where(total > 0, total, 1.0)[..., None]
    log_total = jnp.where(total > 0, top + jnp.log(total), jnp.inf)
    output = _heads_last(output, query.shape[0], value.dtype)
    return output, (query, key, value, bias, mask_leaves, sinks, output, log_total)


def _backward(mask_structure, scale, soft_cap, saved, d_output):
    query, key, value, bias, mask_leaves, sinks, output, log_total = saved
    mask = mask_structure.unflatten(mask_leaves)
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    query_length, key_length = query.shape[1], key.shape[1]
    shift = key_length - query_length
    queries, keys, values = _heads_first(query * scale), _heads_first(key), _heads_first(value)
    d_outputs = _heads_first(d_output)
    # What every score's gradient loses because weights sum to one: sum_k w_k dw_k = o . do.
    common = jnp.sum(d_outputs * _heads_first(output), axis=-1)
    bands = _bands(query_length, key_length, mask)

    def one_head(d_bias, i):
        q, k, v, d_o = queries[i], keys[i // groups], values[i // groups], d_outputs[i]

        def step(band, carry, query_start, key_start):
            d_bias, d_k, d_v = carry
            block = i // heads, i % heads, query_start, key_start
            q_block, d_o_block = (_take(x, query_start, band.size) for x in (q, d_o))
            k_block, v_block = (_take(x, key_start, band.width) for x in (k, v))
            scores, capped = _scores(q_block, k_block, block, bias, mask, soft_cap, shift)
            weights = jnp.exp(scores - _take(log_total[i], query_start, band.size)[:, None])
            d_scores = weights * (d_o_block @ v_block.T - _take(common[i], query_start, band.size)[:, None])
            if bias is not None:
                d_bias = _add_at(d_bias, _sum_to(d_scores, bias.shape), block)
            if soft_cap is not None:
                d_scores = d_scores * (1 - jnp.square(capped / soft_cap))
            # Transposed, because XLA's product for CPU copies a large left side that it must transpose.
            d_k = _add_at(d_k, q_block.T @ d_scores, (0, key_start))
            d_v = _add_at(d_v, d_o_block.T @ weights, (0, key_start))
            return (d_bias, d_k, d_v), d_scores @ k_block

        carry = d_bias, jnp.zeros_like(k.T), jnp.zeros_like(v.T)
        parts = []
        for band in bands:
            carry, rows = _over_blocks(band, partial(step, band), carry)
            parts.append(rows)
        d_bias, d_k, d_v = carry
        return d_bias, (jnp.concatenate(parts) * scale, d_k, d_v)

    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    d_bias, (d_q, d_k, d_v) = jax.lax.scan(one_head, d_bias, jnp.arange(queries.shape[0]))
    d_k, d_v = (jnp.sum(x.reshape(-1, groups, *x.shape[1:]), axis=1).swapaxes(1, 2) for x in (d_k, d_v))
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - log_total.reshape(-1, heads, query_length))
        d_sinks = -jnp.sum(share * common.reshape(share.shape), axis=(0, 2)).astype(sinks.dtype)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    d_q, d_k, d_v = (_heads_last(d_x, x.shape[0], x.dtype) for d_x, x in ((d_q, query), (d_k, key), (d_v, value)))
    return d_q, d_k, d_v, d_bias, None, d_sinks


def _sum_to(d_scores, shape):
    """The gradient of one head's block of scores for a bias of this shape: sums over the axes it is broadcast on."""
    for axis in (0, 1):
        if shape[2 + axis] == 1:
            d_scores = jnp.sum(d_scores, axis=axis, keepdims=True)
    return d_scores[None, None]


def _add_at(total, part, starts):
    if total.shape == part.shape:
        return total + part
    starts = [0 if n == 1 else start for start, n in zip(starts, total.shape, strict=True)]
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, starts, part.shape) + part, starts)


_attention.defvjp(_forward, _backward)
