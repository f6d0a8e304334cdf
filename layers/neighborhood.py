"""Neighbourhood attention: every query sees the `kernel_size` keys around it; at a border the window slides inside."""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from layers.masks import DenseMask, KeyMask
from layers.softmax import dot_product_attention

__all__ = ["neighborhood_attention_1d", "neighborhood_attention_2d", "neighborhood_mask"]

_IMPLEMENTATIONS = ("reference", "blocked")


def _window(length: int, kernel_size: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """First key and the one after the last, for every query of an undilated sequence."""
    query = np.arange(length)
    if causal:
        return np.maximum(query - kernel_size + 1, 0), query + 1
    start = np.clip(query - kernel_size // 2, 0, max(length - kernel_size, 0))
    return start, start + kernel_size


def _check(function: str, length: int, kernel_size: int, dilation: int, causal: bool) -> None:
    if kernel_size < 1 or dilation < 1:
        raise ValueError(f"{function}: kernel_size {kernel_size} and dilation {dilation} are not both at least 1")
    if not causal and kernel_size * dilation > length:
        raise ValueError(
            f"{function}: kernel_size {kernel_size} times dilation {dilation} is not at most the length {length}"
        )


def neighborhood_mask(
    length: int, kernel_size: int, *, dilation: int = 1, causal: bool = False
) -> Bool[np.ndarray, "L L"]:
    """True where query i sees key j: the k nearest of every d-th token, counted from i, the window kept inside.

    Every row has exactly k keys; with an even k, one more lies before the query than after it. `causal` windows reach
    back only, and are cut off at the beginning instead. In 2-D a pair is allowed if it is along both axes. k d > L
    raises ValueError unless causal. Source: card ecg_nat, Mechanism "Neighborhood attention, 1-D".
    """
    _check("neighborhood_mask", length, kernel_size, dilation, causal)
    mask = np.zeros((length, length), bool)
    for residue in range(min(dilation, length)):
        members = np.arange(residue, length, dilation)
        start, stop = _window(len(members), kernel_size, causal)
        place = np.arange(len(members))
        mask[np.ix_(members, members)] = (place >= start[:, None]) & (place < stop[:, None])
    return mask


class _Blocks(NamedTuple):
    """Blocks of `size` queries of one residue class of an axis; a block's keys also reach `left` and `right` beyond."""

    dilation: int
    count: int
    size: int
    left: int
    right: int
    starts: np.ndarray  # first key of every query: residue, block, query
    stops: np.ndarray

    @property
    def keys(self) -> int:
        return self.left + self.size + self.right

    @property
    def offsets(self) -> np.ndarray:
        """Key minus query, in steps of the dilation, within a block."""
        return np.arange(self.keys)[None] - self.left - np.arange(self.size)[:, None]

    def allowed(self) -> Bool[Array, "n S W"]:
        """Made by comparison where it is needed: as a constant it would be most of a compiled program."""
        key = (jnp.arange(self.count) * self.size - self.left)[:, None] + jnp.arange(self.keys)
        key = key[None, :, None]
        allowed = (key >= self.starts[..., None]) & (key < self.stops[..., None])
        return allowed.reshape(-1, self.size, self.keys)


@lru_cache(maxsize=256)
def _blocks(length: int, kernel_size: int, dilation: int, causal: bool, size: int) -> _Blocks:
    classes = [(length - residue + dilation - 1) // dilation for residue in range(dilation)]
    longest = classes[0]
    # A halo must not reach beyond the next block.
    size = max(size, kernel_size)
    if longest <= size + kernel_size:
        size = longest
    count = -(-longest // size)
    starts, stops = (np.zeros((dilation, count * size), int) for _ in range(2))
    for residue, members in enumerate(classes):
        if members:
            starts[residue, :members], stops[residue, :members] = _window(members, kernel_size, causal)
    first = np.arange(count * size) // size * size
    real = stops > starts
    left = int(np.max(np.where(real, first - starts, 0)))
    right = max(int(np.max(np.where(real, stops - first - size, 0))), 0)
    starts, stops = (x.reshape(dilation, count, size) for x in (starts, stops))
    return _Blocks(dilation, count, size, left, right, starts, stops)


def _cut(x: Array, axis: int, blocks: _Blocks, *, halo: bool) -> Array:
    """An axis of tokens as three: residues, blocks, tokens of a block, with those of its neighbours in the halo."""
    total = blocks.count * blocks.size
    x = jnp.moveaxis(x, axis, 0)
    x = jnp.pad(x, [(0, total * blocks.dilation - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
    x = jnp.swapaxes(x.reshape(total, blocks.dilation, *x.shape[1:]), 0, 1)
    x = x.reshape(blocks.dilation, blocks.count, blocks.size, *x.shape[2:])
    if halo:
        parts, nothing = [x], jnp.zeros_like(x[:, :1])
        if blocks.left:
            parts.insert(0, jnp.concatenate([nothing, x[:, :-1]], axis=1)[:, :, blocks.size - blocks.left :])
        if blocks.right:
            parts.append(jnp.concatenate([x[:, 1:], nothing], axis=1)[:, :, : blocks.right])
        x = jnp.concatenate(parts, axis=2)
    return jnp.moveaxis(x, (0, 1, 2), (axis, axis + 1, axis + 2))


def _join(x: Array, axis: int, blocks: _Blocks, length: int) -> Array:
    x = jnp.moveaxis(x, (axis, axis + 1, axis + 2), (0, 1, 2))
    x = x.reshape(blocks.dilation, -1, *x.shape[3:])
    x = jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:length]
    return jnp.moveaxis(x, 0, axis)


def _attend(query, key, value, present, allowed, bias, scale):
    """Attention of (B, n, S, H, D) queries to (B, n, W, K, D) keys; allowed (n, S, W) and bias (H, S, W) are shared."""

    def one_row(q, k, v, present):
        mask = DenseMask(allowed[:, None])
        mask = mask if present is None else mask & KeyMask(present)
        # By name: the scores of a block are few, whatever their total, which is linear in the length.
        return dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, implementation="xla")

    return jax.vmap(one_row)(query, key, value, present)


def _check_request(function: str, implementation: str | None, bias, expected: tuple[int, ...]) -> None:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"{function}: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}")
    if bias is not None and bias.shape[1:] != expected:
        raise ValueError(f"{function}: bias of {bias.shape[1:]} relative positions is not one of {expected}")


@partial(jax.jit, static_argnames=("kernel_size", "dilation", "causal", "scale", "implementation"))
def neighborhood_attention_1d(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L K D"],
    value: Float[Array, "B L K Dv"],
    *,
    kernel_size: int,
    dilation: int = 1,
    causal: bool = False,
    bias: Float[Array, "H R"] | None = None,
    token_mask: Bool[Array, "B L"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """o_i = sum_j softmax_j(scale q_i.k_j + bias[(j - i) / d + k - 1]) v_j over the k keys of i's neighbourhood.

    The neighbourhood is that of `neighborhood_mask`, with kernel_size k and dilation d in tokens; `bias` is a table of
    R = 2 k - 1 relative positions. `scale` defaults to 1/sqrt(D); K key heads serve H query heads as in
    `dot_product_attention`. Keys that `token_mask` (True = present) leaves out are not seen, and not replaced by
    others; a query without keys gets 0. "blocked" (the default) attends block by block in O(L k D) time and O(L k)
    memory; "reference" is masked attention over the whole length. k d > L raises ValueError unless causal. Source: card
    ecg_nat, Mechanism "Neighborhood attention, 1-D".
    """
    length = query.shape[1]
    _check("neighborhood_attention_1d", length, kernel_size, dilation, causal)
    _check_request("neighborhood_attention_1d", implementation, bias, (2 * kernel_size - 1,))
    if implementation == "reference":
        place = np.arange(length)
        offsets = np.clip((place[None] - place[:, None]) // dilation, 1 - kernel_size, kernel_size - 1)
        mask = DenseMask(jnp.asarray(neighborhood_mask(length, kernel_size, dilation=dilation, causal=causal)))
        mask = mask if token_mask is None else mask & KeyMask(token_mask)
        bias = None if bias is None else bias[:, offsets + kernel_size - 1]
        return dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale, implementation="reference")
    blocks = _blocks(length, kernel_size, dilation, causal, max(2 * kernel_size, 32))

    def cut(x, halo):
        x = _cut(x, 1, blocks, halo=halo)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    if bias is not None:
        bias = bias[:, np.clip(blocks.offsets, 1 - kernel_size, kernel_size - 1) + kernel_size - 1]
    allowed = blocks.allowed()
    present = None if token_mask is None else cut(token_mask, True)
    output = _attend(cut(query, False), cut(key, True), cut(value, True), present, allowed, bias, scale)
    output = output.reshape(output.shape[0], dilation, blocks.count, *output.shape[2:])
    return _join(output, 1, blocks, length)


@partial(jax.jit, static_argnames=("kernel_size", "dilation", "scale", "implementation"))
def neighborhood_attention_2d(
    query: Float[Array, "B Y X H D"],
    key: Float[Array, "B Y X K D"],
    value: Float[Array, "B Y X K Dv"],
    *,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Float[Array, "H Ry Rx"] | None = None,
    token_mask: Bool[Array, "B Y X"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Y X H Dv"]:
    """o_i = sum_j softmax_j(scale q_i.k_j + bias[dy + ky - 1, dx + kx - 1]) v_j over the ky x kx keys around i.

    The neighbourhood is the product of those of the two axes; `kernel_size` and `dilation` may be given for each, (y,
    x). Everything else is as in `neighborhood_attention_1d`: O(Y X ky kx D) time, exactly ky kx keys a query, and
    ValueError where a dilated window exceeds the grid. Source: arXiv:2204.07143, section 3.1; dilation
    arXiv:2209.15001.
    """
    grid = query.shape[1:3]
    kernels = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    dilations = (dilation,) * 2 if isinstance(dilation, int) else dilation
    for axis in range(2):
        _check("neighborhood_attention_2d", grid[axis], kernels[axis], dilations[axis], False)
    _check_request("neighborhood_attention_2d", implementation, bias, tuple(2 * k - 1 for k in kernels))
    if implementation == "reference":
        return _dense_2d(query, key, value, kernels, dilations, bias, token_mask, scale)
    blocks = [_blocks(grid[axis], kernels[axis], dilations[axis], False, kernels[axis]) for axis in range(2)]

    def cut(x, halo):
        x = _cut(_cut(x, 1, blocks[0], halo=halo), 4, blocks[1], halo=halo)
        # Residues and blocks of both axes first, then a block's tokens.
        x = jnp.moveaxis(x, (3, 4, 5), (5, 3, 4))
        return x.reshape(x.shape[0], -1, x.shape[5] * x.shape[6], *x.shape[7:])

    if bias is not None:
        rows, columns = (
            np.clip(b.offsets, 1 - k, k - 1) + k - 1 for b, k in zip(blocks, kernels, strict=True)
        )  # queries x keys of a block, along each axis
        bias = bias[:, rows[:, None, :, None], columns[None, :, None, :]]
        bias = bias.reshape(bias.shape[0], blocks[0].size * blocks[1].size, -1)
    rows, columns = (b.allowed() for b in blocks)
    allowed = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    allowed = allowed.reshape(rows.shape[0] * columns.shape[0], rows.shape[1] * columns.shape[1], -1)
    present = None if token_mask is None else cut(token_mask, True)
    output = _attend(cut(query, False), cut(key, True), cut(value, True), present, allowed, bias, scale)
    by_axis = [(b.dilation, b.count) for b in blocks]
    output = output.reshape(
        output.shape[0], *by_axis[0], *by_axis[1], blocks[0].size, blocks[1].size, *output.shape[3:]
    )
    output = jnp.moveaxis(output, (3, 4, 5), (4, 5, 3))
    return _join(_join(output, 4, blocks[1], grid[1]), 1, blocks[0], grid[0])


def _dense_2d(query, key, value, kernels, dilations, bias, token_mask, scale):
    count = query.shape[1] * query.shape[2]
    rows, columns = (
        neighborhood_mask(n, k, dilation=d) for n, k, d in zip(query.shape[1:3], kernels, dilations, strict=True)
    )
    mask = DenseMask(jnp.asarray((rows[:, None, :, None] & columns[None, :, None, :]).reshape(count, count)))
    mask = mask if token_mask is None else mask & KeyMask(token_mask.reshape(-1, count))
    if bias is not None:
        y, x = (
            np.clip((np.arange(n)[None] - np.arange(n)[:, None]) // d, 1 - k, k - 1) + k - 1
            for n, k, d in zip(query.shape[1:3], kernels, dilations, strict=True)
        )
        bias = bias[:, y[:, None, :, None], x[None, :, None, :]].reshape(bias.shape[0], count, count)
    flat = [x.reshape(x.shape[0], count, *x.shape[3:]) for x in (query, key, value)]
    output = dot_product_attention(*flat, bias=bias, mask=mask, scale=scale, implementation="reference")
    return output.reshape(*query.shape[:-1], value.shape[-1])
