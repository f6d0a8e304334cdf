"""Sparse attention: choose keys, blocks, tokens or windows by a score, then attend to nothing else.

Choosing passes no gradient; what is chosen is attended to as usual.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.masks import BlockMask, CausalMask, DenseMask, KeyMask, Mask
from layers.softmax import dot_product_attention

__all__ = [
    "StridedMask",
    "TypeMask",
    "attention_received",
    "block_sparse_attention",
    "block_top_p_mask",
    "cache_deviation",
    "compact_tokens",
    "compressed_block_attention",
    "heavy_hitter_scores",
    "pool_blocks",
    "select_top_fraction",
    "select_top_k",
    "select_top_p",
    "sparse_gather_attention",
    "top_window_attention",
]


def _check_implementation(function: str, implementation: str | None, *others: str) -> None:
    known = ("reference", "gather", *others)
    if implementation is not None and implementation not in known:
        raise ValueError(f"{function}: implementation {implementation!r} is not one of {', '.join(known)}")


# ---- masks -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StridedMask(Mask):
    """(query - key) mod stride = 0, positions aligned bottom-right; with a window and causal: the Sparse Transformer.

    `CausalMask() & (WindowMask(left=c - 1) | StridedMask(c))` is its strided pattern. Source: arXiv:1904.10509; card
    musical_attention, Mechanism "Baselines".
    """

    stride: int = field(metadata={"static": True})

    def allows(self, query, key, *, shift=0):
        return ((query[:, None] + shift - key[None, :]) % self.stride == 0)[None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TypeMask(Mask):
    """A query of type t sees the keys of type u where table[t, u] is True: dependencies between kinds of tokens.

    Combine with `WindowMask` for dependencies of limited reach. Source: card musical_attention, Mechanism "Mask".
    """

    query_types: Int[Array, "B Lq"]
    key_types: Int[Array, "B Lk"]
    table: Bool[Array, "Tq Tk"]

    def allows(self, query, key, *, shift=0):
        return self.table[self.query_types[:, query, None], self.key_types[:, None, key]][:, None]


# ---- choosing --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("k",))
def select_top_k(
    scores: Float[Array, "*B N"],
    *,
    k: int,
    count: Int[Array, "*broadcastable"] | int | None = None,
    present: Bool[Array, "*broadcastable2"] | None = None,
    always: Bool[Array, "*broadcastable3"] | None = None,
) -> tuple[Int[Array, "*B k"], Bool[Array, "*B k"]]:
    """(index, valid): the k largest scores in descending order, ties to the lower index.

    `present` (True = may be chosen) leaves items out; `always` chooses items first of all, whatever their score.
    `count` limits a row to fewer than k. What a row cannot fill is not valid. Source: card sts, Mechanism 5; card
    zorder_splat, Mechanism 2c.
    """
    if not 0 <= k <= scores.shape[-1]:
        raise ValueError(f"select_top_k: k {k} is not in 0..{scores.shape[-1]}, the number of scores")
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    if always is not None:
        scores = jnp.where(always, jnp.inf, scores)
    if present is not None:
        scores = jnp.where(present, scores, -jnp.inf)
    best, index = jax.lax.top_k(scores, k)
    valid = best > -jnp.inf
    if count is not None:
        valid = valid & (jnp.arange(k) < jnp.asarray(count)[..., None])
    return index, valid


def _descending_ranks(scores):
    order = jnp.argsort(-scores, axis=-1)
    return order, jnp.argsort(order, axis=-1)


@partial(jax.jit, static_argnames=("rule",))
def select_top_p(
    weights: Float[Array, "*B N"], p: Float[Array, ""] | float, *, rule: str = "include_crossing"
) -> Bool[Array, "*B N"]:
    """True for the largest weights that together reach the share p of their sum (nucleus selection).

    With shares sorted in descending order and cumulated to c_r, "include_crossing" keeps rank r where c_r - share_r <=
    p, so also the one that crosses p; "exclude_crossing" where c_r <= p. Rank 0 is always kept; ties go to the lower
    index. Weights of 0 (padding) are kept only if p asks for everything. Source: card uniprefill, Mechanism 4.
    """
    if rule not in ("include_crossing", "exclude_crossing"):
        raise ValueError(f"select_top_p: rule {rule!r} is not one of include_crossing, exclude_crossing")
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    shares = weights / jnp.where(total > 0, total, 1.0)
    order, ranks = _descending_ranks(shares)
    ordered = jnp.take_along_axis(shares, order, axis=-1)
    reached = jnp.cumsum(ordered, axis=-1)
    if rule == "include_crossing":
        reached = reached - ordered
    # Rounded sums may end a little above 1, and p = 1 means everything.
    keep = (reached <= p) | (jnp.arange(shares.shape[-1]) == 0) | (jnp.asarray(p) >= 1)
    return jnp.take_along_axis(keep, ranks, axis=-1)


@jax.jit
def select_top_fraction(
    scores: Float[Array, "B L"],
    groups: Int[Array, "B L"],
    fractions: Float[Array, " G"],
    *,
    always: Bool[Array, "B L"] | None = None,
) -> Bool[Array, "B L"]:
    """True for the ceil(fraction_g * size_g) largest scores of every group g, and for what `always` names.

    Tokens of a group outside 0..G-1 (say -1) are no candidates. Ties go to the lower index. O(L log L). Source: card
    rcllm, Mechanism "Online" 4.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    count = fractions.shape[0]
    candidate = (groups >= 0) & (groups < count)
    groups = jnp.where(candidate, groups, count)
    order = jnp.lexsort((-scores, groups), axis=-1)
    sizes = jnp.sum(groups[..., None] == jnp.arange(count + 1), axis=1)
    first = jnp.cumsum(sizes, axis=-1) - sizes
    rank = jnp.argsort(order, axis=-1) - jnp.take_along_axis(first, groups, axis=-1)
    # 0.3 * 10 in float32 may be a little more than 3.
    quota = jnp.ceil(fractions * sizes[:, :count] - 1e-3)
    quota = jnp.concatenate([quota, jnp.zeros_like(quota[:, :1])], axis=-1)
    chosen = candidate & (rank < jnp.take_along_axis(quota, groups, axis=-1))
    return chosen if always is None else chosen | always


@jax.jit
def compact_tokens(keep: Bool[Array, "*B L"]) -> tuple[Int[Array, "*B L"], Int[Array, "*B"]]:
    """(index, count): the kept tokens' numbers first, in their order, then the others; and how many are kept.

    `jnp.take_along_axis(x, index[..., None], 1)[:, :S]` shortens a sequence to S; original positions go the same way.
    Source: card uniprefill, Mechanism 6 and "JAX note".
    """
    return jnp.argsort(~keep, axis=-1), jnp.sum(keep, axis=-1, dtype=jnp.int32)


# ---- attention to chosen keys ----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("scale", "implementation"))
def sparse_gather_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    index: Int[Array, "B H Lq S"],
    valid: Bool[Array, "B H Lq S"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Lq H Dv"]:
    """o_q = sum over s of softmax_s(scale q.k_index[s]) v_index[s]: attention of every query to its own S keys.

    The valid indices of a query differ from each other; it gets 0 if there are none. K key heads serve H query heads,
    each with its own choice. "gather" (the default) costs O(Lq S D); "reference" masks all keys. Source: card sts,
    Mechanism 6.
    """
    _check_implementation("sparse_gather_attention", implementation)
    batch, length, key_heads = key.shape[:3]
    groups = query.shape[2] // key_heads
    valid = jnp.ones(index.shape, bool) if valid is None else valid
    if implementation == "reference":
        mask = DenseMask(jnp.any((index[..., None] == jnp.arange(length)) & valid[..., None], axis=-2))
        return dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="reference")
    rows, heads = jnp.arange(batch)[:, None, None, None], (jnp.arange(query.shape[2]) // groups)[:, None, None]
    taken = jnp.where(valid, index, 0)
    # One query to its own keys is attention of length 1, with all its heads and positions as a batch.
    keys, values = (x[rows, taken, heads] for x in (key, value))
    queries = jnp.moveaxis(query, 2, 1)[..., None, None, :]

    def flat(x):
        return x.reshape(-1, *x.shape[3:])

    output = dot_product_attention(
        flat(queries), flat(keys)[:, :, None], flat(values)[:, :, None], mask=KeyMask(flat(valid)), scale=scale,
        implementation="xla",
    )  # fmt: skip
    output = output.reshape(batch, query.shape[2], query.shape[1], value.shape[-1])
    return jnp.moveaxis(output, 1, 2)


def _to_blocks(x, block: int):
    """Tokens (axis 1) as blocks, padded at the end."""
    count = -(-x.shape[1] // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], count, block, *x.shape[2:])


@partial(jax.jit, static_argnames=("block_size",))
def pool_blocks(
    x: Float[Array, "B L *C"], *, block_size: int, token_mask: Bool[Array, "B L"] | None = None
) -> Float[Array, "B n *C"]:
    """Mean over each block of consecutive tokens, over those present; 0 for a block without any.

    The last block may be partial. Source: card zorder_splat, Mechanism 2a.
    """
    present = jnp.ones(x.shape[:2], bool) if token_mask is None else token_mask
    present = _to_blocks(present, block_size)
    present = present.reshape(*present.shape, *[1] * (x.ndim - 2))
    total = jnp.sum(jnp.where(present, _to_blocks(x.astype(jnp.float32), block_size), 0.0), axis=2)
    return (total / jnp.maximum(jnp.sum(present, axis=2), 1)).astype(x.dtype)


# Copying blocks of keys for every block of queries costs as much as attending to eight times as many in place (measured
# on CPU: 4096 tokens, blocks of 32, heads of 32).
_DENSE_SHARE = 8


@partial(jax.jit, static_argnames=("query_block", "key_block", "causal", "scale", "implementation"))
def block_sparse_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    index: Int[Array, "B H Nq S"],
    valid: Bool[Array, "B H Nq S"] | None = None,
    *,
    query_block: int,
    key_block: int,
    causal: bool = False,
    token_mask: Bool[Array, "B Lk"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Lq H Dv"]:
    """Attention of every block of queries to its own S blocks of keys, those of `index` where `valid`.

    Blocks are consecutive tokens, sizes in tokens, the last one may be partial: Nq = ceil(Lq / query_block). The valid
    blocks of a row differ from each other. `causal` also forbids later keys, the last query standing on the last key;
    `token_mask` (True = present) leaves keys out. A query that sees nothing gets 0.

    "gather" costs O(Lq S key_block D) time and, for the copies of keys, O(Nq S key_block D) memory; "masked" is
    attention to all keys under a `BlockMask`, faster unless few blocks are chosen, and "reference" the plain text of
    that. None gathers where S is at most an eighth of the blocks. Source: card zorder_splat, Mechanism 2d;
    arXiv:2502.11089, section 3.3.
    """
    _check_implementation("block_sparse_attention", implementation, "masked")
    (batch, query_length, heads), key_length, key_heads = query.shape[:3], key.shape[1], key.shape[2]
    num_query_blocks, num_key_blocks = -(-query_length // query_block), -(-key_length // key_block)
    if index.shape[2] != num_query_blocks:
        raise ValueError(
            f"block_sparse_attention: index for {index.shape[2]} query blocks is not one for {num_query_blocks}"
        )
    valid = jnp.ones(index.shape, bool) if valid is None else valid
    if implementation is None:
        implementation = "gather" if index.shape[3] * _DENSE_SHARE <= num_key_blocks else "masked"
    if implementation != "gather":
        table = jnp.any((index[..., None] == jnp.arange(num_key_blocks)) & valid[..., None], axis=-2)
        mask = BlockMask(table, query_block, key_block)
        mask = mask & CausalMask() if causal else mask
        mask = mask if token_mask is None else mask & KeyMask(token_mask)
        implementation = None if implementation == "masked" else implementation
        return dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)

    rows, groups = jnp.arange(batch)[:, None, None, None], heads // key_heads
    taken = jnp.where(valid, index, 0)
    key_head = (jnp.arange(heads) // groups)[:, None, None]
    # (B, H, Nq, S, key_block, D): whole blocks are copied, so that a copy is a few long rows.
    keys, values = (jnp.moveaxis(_to_blocks(x, key_block), 3, 1)[rows, key_head, taken] for x in (key, value))
    positions = taken[..., None] * key_block + jnp.arange(key_block)
    allowed = valid[..., None] & (positions < key_length)
    if token_mask is not None:
        allowed = allowed & _to_blocks(token_mask, key_block)[rows, taken]
    allowed = allowed.reshape(*allowed.shape[:3], 1, -1)
    if causal:
        query_positions = jnp.arange(num_query_blocks * query_block).reshape(num_query_blocks, query_block, 1)
        allowed = allowed & (positions.reshape(*allowed.shape) <= query_positions + key_length - query_length)
    queries = jnp.moveaxis(_to_blocks(query, query_block), 3, 1)

    def flat(x, tokens: int):
        return x.reshape(-1, tokens, 1, x.shape[-1])

    many = index.shape[-1] * key_block
    output = dot_product_attention(
        flat(queries, query_block), flat(keys, many), flat(values, many),
        mask=DenseMask(allowed.reshape(-1, 1, *allowed.shape[3:])), scale=scale, implementation="xla",
    )  # fmt: skip
    output = output.reshape(batch, heads, -1, value.shape[-1])[:, :, :query_length]
    return jnp.moveaxis(output, 1, 2)


@partial(jax.jit, static_argnames=("block_size", "num_selected", "scale", "implementation"))
def compressed_block_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L H D"],
    value: Float[Array, "B L H Dv"],
    *,
    block_size: int,
    num_selected: int,
    token_mask: Bool[Array, "B L"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H Dv"]]:
    """(compressed, selected): A = softmax(q^ k^T) over block means, A v^; and attention to the best blocks by A.

    q^, k^, v^ are means of blocks of `block_size` consecutive tokens; every token of a query block gets the block's
    row of A v^, and attends to all tokens of the `num_selected` key blocks with the largest weights in that row. Gate
    and add them: g1 * compressed + g2 * selected. No gradient goes through the choice. `token_mask` (True = present)
    leaves tokens out; `implementation` is that of `block_sparse_attention`. O((L / block_size)^2 D + L num_selected
    block_size D). Source: card zorder_splat, Mechanism 2; arXiv:2502.11089.
    """
    length = query.shape[1]
    means = [pool_blocks(x, block_size=block_size, token_mask=token_mask) for x in (query, key, value)]
    filled = None if token_mask is None else jnp.any(_to_blocks(token_mask, block_size), axis=2)
    mask = None if filled is None else KeyMask(filled)
    coarse, weights = dot_product_attention(*means, mask=mask, scale=scale, return_weights=True)
    present = None if filled is None else filled[:, None, None]
    index, valid = select_top_k(weights, k=num_selected, present=present)
    selected = block_sparse_attention(
        query, key, value, index, valid, query_block=block_size, key_block=block_size, token_mask=token_mask,
        scale=scale, implementation=implementation,
    )  # fmt: skip
    return jnp.repeat(coarse, block_size, axis=1)[:, :length], selected


# ---- which tokens matter ---------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("last", "scale"))
def attention_received(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L K D"],
    *,
    last: int | None = None,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B L"]:
    """t_j = sum over heads and queries i of softmax_j(scale q_i.k_j), j <= i: what each token gets from causal queries.

    `last` counts only a row's last queries, those before its length; without it all count. Padding gets 0. Float32.
    O(last L H D). Source: card uniprefill, Mechanism 1-2; card rcllm, Mechanism "Online" 4.
    """
    batch, length, heads = query.shape[:3]
    last = length if last is None else min(last, length)
    lengths = jnp.full(batch, length) if lengths is None else lengths
    places = lengths[:, None] - last + jnp.arange(last)
    queries = jnp.take_along_axis(query, jnp.maximum(places, 0)[..., None, None], axis=1)
    grouped = queries.astype(jnp.float32).reshape(batch, last, key.shape[2], heads // key.shape[2], -1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key.astype(jnp.float32)) * scale
    allowed = (jnp.arange(length) <= places[..., None])[:, None, None]
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, where=allowed, initial=-jnp.inf))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - jnp.where(top > -jnp.inf, top, 0), 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.sum(weights / jnp.where(total > 0, total, 1.0), axis=(1, 2, 3))


@partial(jax.jit, static_argnames=("block_size", "sink", "tail", "rule", "level"))
def block_top_p_mask(
    token_scores: Float[Array, "B L"],
    p: Float[Array, ""] | float,
    *,
    block_size: int,
    sink: int = 0,
    tail: int = 0,
    lengths: Int[Array, " B"] | None = None,
    rule: str = "include_crossing",
    level: str = "token",
) -> Bool[Array, "B L"]:
    """True for tokens of the blocks that `select_top_p` keeps by their summed scores, and for the first and last ones.

    `sink` and `tail` are numbers of tokens always kept at the start and before a row's length; level "token" keeps just
    these, "block" rounds them up and keeps the first ceil(sink / block_size) and last ceil(tail / block_size) blocks.
    Source: card uniprefill, Mechanism 3-5 ("token" and "include_crossing" the production rule, the others the
    reference's).
    """
    if level not in ("token", "block"):
        raise ValueError(f"block_top_p_mask: level {level!r} is not one of token, block")
    batch, length = token_scores.shape
    lengths = (jnp.full(batch, length) if lengths is None else lengths)[:, None]
    place = jnp.arange(length)
    inside = place < lengths
    scores = jnp.where(inside, token_scores.astype(jnp.float32), 0.0)
    blocks = select_top_p(jnp.sum(_to_blocks(scores, block_size), axis=2), p, rule=rule)
    keep = jnp.repeat(blocks, block_size, axis=1)[:, :length]
    if level == "token":
        keep = keep | (place < sink) | (place >= lengths - tail)
    else:
        block, count = place // block_size, -(-lengths // block_size)
        keep = keep | (block < -(-sink // block_size)) | (block >= count + (-tail // block_size))
    return keep & inside


@jax.jit
def cache_deviation(
    key: Float[Array, "B L K D"],
    value: Float[Array, "B L K Dv"],
    cached_key: Float[Array, "B L K D"],
    cached_value: Float[Array, "B L K Dv"],
) -> Float[Array, "B L"]:
    """||k - k_cached||_1 + ||v - v_cached||_1 of every token: how wrong its cached keys and values are. Float32.

    Source: card rcllm, Mechanism "Online" 4.
    """
    pairs = (key, cached_key), (value, cached_value)
    return sum(jnp.sum(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(2, 3)) for a, b in pairs)


@jax.jit
def heavy_hitter_scores(
    received: Float[Array, "B L"],
    deviation: Float[Array, "B L"],
    candidates: Bool[Array, "B L"],
    *,
    balance: Float[Array, ""] | float = 0.5,
) -> Float[Array, "B L"]:
    """S = (1 - balance) received + balance deviation, both scaled to mean 1 over the candidates; 0 for the others.

    `received` is `attention_received` and `deviation` is `cache_deviation`; balance 1 is selection by deviation alone.
    Source: card rcllm, Mechanism "Online" 4.
    """
    count = jnp.maximum(jnp.sum(candidates, axis=1, keepdims=True), 1)

    def scaled(x):
        x = jnp.where(candidates, x.astype(jnp.float32), 0.0)
        mean = jnp.sum(x, axis=1, keepdims=True) / count
        return x / jnp.where(mean > 0, mean, 1.0)

    return (1 - balance) * scaled(received) + balance * scaled(deviation)


# ---- whole windows ---------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_kept", "scale", "implementation"))
def top_window_attention(
    query: Float[Array, "B n T H D"],
    key: Float[Array, "B n T H D"],
    value: Float[Array, "B n T H Dv"],
    scores: Float[Array, "B n"],
    *,
    num_kept: int,
    bias: Float[Array, "H T T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B n T H Dv"], Float[Array, "B n"]]:
    """(output, gate): attention inside the `num_kept` windows of largest score, 0 in the others.

    gate = kept + sigmoid(score) - stop_gradient(sigmoid(score)): 1 or 0 in value, with the gradient of the sigmoid.
    Multiply the residual update by it, so that the scores learn (straight-through). Windows are those of
    `partition_windows`; ties go to the first. "gather" (the default) costs O(num_kept T^2 D). Source: card
    dual_path_dun, Mechanism 4.
    """
    _check_implementation("top_window_attention", implementation)
    batch, count = scores.shape
    if not 0 <= num_kept <= count:
        raise ValueError(f"top_window_attention: num_kept {num_kept} is not in 0..{count}, the number of windows")
    index, _ = select_top_k(scores, k=num_kept)
    kept = jnp.any(index[..., None] == jnp.arange(count), axis=1)
    soft = jax.nn.sigmoid(scores.astype(jnp.float32))
    gate = (kept + (soft - jax.lax.stop_gradient(soft))).astype(scores.dtype)

    def attend(*windows, **options):
        flat = [x.reshape(-1, *x.shape[2:]) for x in windows]
        return dot_product_attention(*flat, bias=bias, scale=scale, **options).reshape(*windows[2].shape)

    if implementation == "reference":
        output = attend(query, key, value, implementation="reference")
        return jnp.where(kept[..., None, None, None], output, 0), gate
    output = jnp.zeros(value.shape, value.dtype)
    if num_kept == 0:
        return output, gate
    rows = jnp.arange(batch)[:, None]
    chosen = attend(*(x[rows, index] for x in (query, key, value)))
    return output.at[rows, index].set(chosen, unique_indices=True), gate
