"""The attention core: score -> bias and mask -> normaliser -> weighted sum, each step replaceable.

Projections stay outside. A paper that changes one step writes that step and leaves the rest to this module.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers import kernels
from layers.blocked import blocked_attention
from layers.masks import CausalMask, FullMask, Mask, ShiftedMask, as_mask

__all__ = [
    "KeyValueCache",
    "attend",
    "concatenate_streams",
    "decode_step",
    "dot_product_attention",
    "empty_cache",
    "extend_cache",
    "masked_normalize",
    "normalize_heads",
]

Scores = Float[Array, "B H Lq Lk"]
Allowed = Bool[Array, "b h Lq Lk"]
Normalizer = Callable[[Scores, Allowed, int], Scores]

_AXES = {"keys": -1, "queries": -2, "heads": -3}


def _softmax(scores: Scores, allowed: Allowed, axis: int, sinks: Float[Array, " H"] | None = None) -> Scores:
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    if sinks is not None:
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks)[:, None, None])
    exponentials = jnp.exp(scores - top)
    total = jnp.sum(exponentials, axis=axis, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[:, None, None] - top)
    return exponentials / jnp.where(total > 0, total, 1.0)


def _sigmoid(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    return jnp.where(allowed, jax.nn.sigmoid(scores), 0.0)


def _relu(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    return jnp.where(allowed, jax.nn.relu(scores), 0.0)


def _linear(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    return jnp.where(allowed, scores, 0.0)


def _hardmax(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    best = jnp.max(scores, axis=axis, keepdims=True, where=allowed, initial=-jnp.inf)
    winners = (scores == best) & allowed
    return winners / jnp.maximum(jnp.sum(winners, axis=axis, keepdims=True), 1)


def _signed_l1(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    kept = jnp.where(allowed, scores, 0.0)
    return kept / (jnp.sum(jnp.abs(kept), axis=axis, keepdims=True) + 1e-8)


def _descending(scores: Scores, axis: int) -> Scores:
    return jnp.moveaxis(jnp.flip(jnp.sort(scores, axis=axis), axis=axis), axis, -1)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _simplex_power(scores: Scores, power: int, axis: int) -> Scores:
    """max(scores - tau, 0)^power with the tau at which the sum over `axis` is 1; -inf scores get 0.

    tau solves a polynomial equation on the r largest scores, for the largest r at which they all lie above it.
    """
    ordered = _descending(scores, axis)
    finite = jnp.isfinite(ordered)
    # Relative to the largest score, so that the sums of squares lose no digits.
    top = jnp.where(finite[..., :1], ordered[..., :1], 0.0)
    ordered = jnp.where(finite, ordered - top, 0.0)
    rank = jnp.arange(1, ordered.shape[-1] + 1)
    mean = jnp.cumsum(ordered, axis=-1) / rank
    if power == 1:
        taus = mean - 1 / rank
    else:
        spread = jnp.cumsum(jnp.square(ordered), axis=-1) / rank - jnp.square(mean)
        taus = mean - jnp.sqrt(jnp.maximum(1 / rank - spread, 0.0))
    count = jnp.sum(finite & (ordered >= taus), axis=-1, keepdims=True)
    tau = jnp.take_along_axis(taus, jnp.maximum(count - 1, 0), axis=-1) + top
    return jax.nn.relu(scores - jnp.moveaxis(tau, -1, axis)) ** power


@_simplex_power.defjvp
def _simplex_power_jvp(power, axis, primals, tangents):
    weights = _simplex_power(primals[0], power, axis)
    positive = weights > 0
    slope = jnp.where(positive, 1.0 if power == 1 else 2 * jnp.sqrt(jnp.where(positive, weights, 1.0)), 0.0)
    change = slope * tangents[0]
    share = slope / jnp.maximum(jnp.sum(slope, axis=axis, keepdims=True), 1e-30)
    return weights, change - share * jnp.sum(change, axis=axis, keepdims=True)


def _sparsemax(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    return jnp.where(allowed, _simplex_power(jnp.where(allowed, scores, -jnp.inf), 1, axis), 0.0)


def _entmax15(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    return jnp.where(allowed, _simplex_power(jnp.where(allowed, scores / 2, -jnp.inf), 2, axis), 0.0)


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "linear": _linear,
    "hardmax": _hardmax,
    "sparsemax": _sparsemax,
    "entmax15": _entmax15,
    "signed_l1": _signed_l1,
}


def masked_normalize(
    scores: Scores, allowed: Allowed, *, normalizer: str | Normalizer = "softmax", softmax_axis: str = "keys"
) -> Scores:
    """Weights from scores: softmax | sigmoid | relu | linear | hardmax | sparsemax | entmax15 | signed_l1 | a function.

    `softmax_axis` is what the weights sum over: "keys" (the usual), "queries" or "heads". Forbidden pairs get weight 0;
    a row without any allowed pair gets zeros, with zero gradient. A function takes (scores, allowed, axis) with axis
    -1, -2 or -3. hardmax shares its unit among ties and has zero gradient; signed_l1 is s / (sum |s| + 1e-8); sigmoid,
    relu and linear do not sum. O(n log n) for sparsemax and entmax15, O(n) otherwise. Source: sparsemax
    arXiv:1602.02068, entmax arXiv:1905.05702, hardmax card hardmax_clustering, signed_l1 card xctformer.
    """
    if softmax_axis not in _AXES:
        raise ValueError(f"masked_normalize: softmax_axis {softmax_axis!r} is not one of {', '.join(_AXES)}")
    if isinstance(normalizer, str):
        if normalizer not in NORMALIZERS:
            raise ValueError(f"masked_normalize: normalizer {normalizer!r} is not one of {', '.join(NORMALIZERS)}")
        normalizer = NORMALIZERS[normalizer]
    return normalizer(scores, allowed, _AXES[softmax_axis])


@partial(jax.jit, static_argnames=("kind", "epsilon"))
def normalize_heads(
    x: Float[Array, "B L H D"],
    *,
    scale: Float[Array, "*broadcastable"] | None = None,
    kind: str = "rms",
    epsilon: float = 1e-6,
) -> Float[Array, "B L H D"]:
    """Query-key norm of every head: x / sqrt(mean x^2 + epsilon) ("rms") or x / max(|x|, epsilon) ("l2"), times scale.

    Call it on queries and keys before rotary embedding and `dot_product_attention` (whose own `scale` should be 1, or
    a temperature, after "l2"). The learned `scale` broadcasts to (B, L, H, D): (D,) shared by the heads, (H, D), or
    (H, 1) for one temperature a head. Computed in float32. Source: arXiv:2302.05442, arXiv:2010.04245.
    """
    wide = x.astype(jnp.float32)
    square = jnp.square(wide)
    if kind == "rms":
        inverse = jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + epsilon)
    elif kind == "l2":
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(square, axis=-1, keepdims=True), epsilon**2))
    else:
        raise ValueError(f"normalize_heads: kind {kind!r} is not one of rms, l2")
    normal = wide * inverse
    return (normal if scale is None else normal * scale.astype(jnp.float32)).astype(x.dtype)


def _product(subscripts: str, left: Array, right: Array) -> Array:
    """einsum of narrow inputs with float32 sums."""
    if left.dtype == right.dtype == jnp.float32:
        return jnp.einsum(subscripts, left, right)

    def narrow(left, right):
        return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)

    def wide(left, right):
        return jnp.einsum(subscripts, left.astype(jnp.float32), right.astype(jnp.float32))

    # XLA for CPU has no product of bfloat16 into float32 for every shape.
    return jax.lax.platform_dependent(left, right, cpu=wide, default=narrow)


@partial(jax.jit, static_argnames=("normalizer", "softmax_axis", "return_weights"))
def attend(
    scores: Scores,
    value: Float[Array, "B Lk K Dv"],
    *,
    bias: Float[Array, "*broadcastable"] | None = None,
    mask: Mask | Bool[Array, "*mask_shape"] | None = None,
    normalizer: str | Normalizer = "softmax",
    softmax_axis: str = "keys",
    sinks: Float[Array, " H"] | None = None,
    return_weights: bool = False,
) -> Float[Array, "B Lq H Dv"] | tuple[Float[Array, "B Lq H Dv"], Scores]:
    """o_q = sum_k w_qk v_k with w = normalise(scores + bias, mask): the attention core from any scores.

    For papers whose score is not a dot product. The options are those of `dot_product_attention`. K value heads serve
    H query heads when K divides H. The weights are float32; the sum is accumulated in float32 and has the values'
    dtype. O(Lq Lk) time and memory. Source: arXiv:1706.03762, equation 1, without its score.
    """
    batch, heads, query_length, key_length = scores.shape
    wide = scores.astype(jnp.float32)
    if bias is not None:
        wide = wide + bias.astype(jnp.float32)
    mask = FullMask() if mask is None else as_mask(mask)
    allowed = mask.materialize(query_length, key_length)
    if sinks is None:
        weights = masked_normalize(wide, allowed, normalizer=normalizer, softmax_axis=softmax_axis)
    elif normalizer == "softmax" and softmax_axis == "keys":
        weights = _softmax(wide, allowed, -1, sinks.astype(jnp.float32))
    else:
        raise ValueError(
            f"attend: sinks belong to a softmax over the keys, not to normalizer {normalizer!r} over {softmax_axis}"
        )
    grouped = weights.reshape(batch, value.shape[2], heads // value.shape[2], query_length, key_length)
    output = _product("bkgqs,bskd->bqkgd", grouped.astype(value.dtype), value)
    output = output.reshape(batch, query_length, heads, value.shape[-1]).astype(value.dtype)
    return (output, weights) if return_weights else output


# What each implementation can do beside masks, biases, scales and grouped heads.
_SERVES = {
    "reference": {"soft_cap", "score_fn", "normalizer", "softmax_axis", "sinks", "return_weights"},
    "xla": {"soft_cap", "score_fn", "normalizer", "softmax_axis", "sinks", "return_weights"},
    "blocked": {"soft_cap", "sinks"},
    **{kernel: {"soft_cap", "sinks"} for kernel in kernels.KERNELS},  # they say themselves what they lack of it
}


@partial(
    jax.jit,
    static_argnames=("scale", "soft_cap", "score_fn", "normalizer", "softmax_axis", "return_weights", "implementation"),
)
def dot_product_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    *,
    bias: Float[Array, "*broadcastable"] | None = None,
    mask: Mask | Bool[Array, "*mask_shape"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    score_fn: Callable[[Scores], Scores] | None = None,
    normalizer: str | Normalizer = "softmax",
    softmax_axis: str = "keys",
    sinks: Float[Array, " H"] | None = None,
    return_weights: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B Lq H Dv"] | tuple[Float[Array, "B Lq H Dv"], Scores]:
    """o_q = sum_k softmax_k(scale q.k + bias)_qk v_k over allowed keys, with every step replaceable.

    H query heads share K key-value heads when K divides H (grouped-query; K = 1 is multi-query). `scale` defaults to
    1/sqrt(D). The score then passes through `soft_cap` (c tanh(s / c)) and `score_fn`; `bias` broadcasts to
    (B, H, Lq, Lk) and comes after them; `mask` is a `layers.Mask` or such an array of booleans. `normalizer` and
    `softmax_axis` are those of `masked_normalize`. `sinks` adds exp(sink_h) to the softmax's denominator. A query that
    may see no key gets 0, with zero gradient. `return_weights` also gives the weights, in float32. Scores and softmax
    are float32, the output has the values' dtype. `score_fn` and a `normalizer` function are compiled in: pass the same
    object again, not a new lambda.

    `implementation`: None picks by platform and request and always works. "reference" is the plain text of the
    equation in float32; "xla" the same for any platform with the products in the inputs' dtype, O(Lq Lk) memory.
    "blocked" has O(Lq + Lk) memory and its own backward pass: the fast path on CPU. "cudnn" is the fused kernel of
    NVIDIA GPUs (float16 and bfloat16; any mask and bias). "splash_tpu" and "flash_tpu" are JAX's Pallas kernels for
    TPU, not to be called inside a jit that shards their inputs: the first takes bands, segments, lengths and key masks,
    sinks, soft caps and grouped heads, and no bias; the second biases, and lengths in multiples of 128. "tokamax" is
    that library's choice. A named one that cannot serve the request raises ValueError. Source: arXiv:1706.03762; sinks
    arXiv:2508.10925.
    """
    heads, key_heads = query.shape[2], key.shape[2]
    if heads % key_heads:
        raise ValueError(
            f"dot_product_attention: num query heads {heads} is not a multiple of num key heads {key_heads}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = as_mask(mask)
    if bias is not None:
        bias = jnp.reshape(bias, (1,) * (4 - bias.ndim) + bias.shape)
    asked = {
        "soft_cap": soft_cap is not None,
        "score_fn": score_fn is not None,
        "normalizer": normalizer != "softmax",
        "softmax_axis": softmax_axis != "keys",
        "sinks": sinks is not None,
        "return_weights": return_weights,
    }
    asked = {name for name, is_asked in asked.items() if is_asked}
    if implementation is None:
        attention = partial(
            dot_product_attention, bias=bias, mask=mask, scale=scale, soft_cap=soft_cap, score_fn=score_fn,
            normalizer=normalizer, softmax_axis=softmax_axis, sinks=sinks, return_weights=return_weights,
        )  # fmt: skip
        if asked - _SERVES["blocked"]:
            return attention(query, key, value, implementation="xla")
        return _best(attention, kernels.Request(query, key, value, bias, mask, sinks, scale, soft_cap))
    if implementation not in _SERVES:
        raise ValueError(f"dot_product_attention: implementation {implementation!r} is not one of {', '.join(_SERVES)}")
    if missing := asked - _SERVES[implementation]:
        raise ValueError(
            f"dot_product_attention: implementation {implementation!r} does not support {', '.join(sorted(missing))}"
        )
    if implementation == "blocked":
        return blocked_attention(query, key, value, bias, mask, sinks, scale, soft_cap)
    if implementation in kernels.KERNELS:
        request = kernels.Request(query, key, value, bias, mask, sinks, scale, soft_cap)
        return kernels.run(implementation, request)

    value_dtype = value.dtype
    if implementation == "reference":
        query = query.astype(jnp.float32)
        key, value = (jnp.repeat(x.astype(jnp.float32), heads // key_heads, axis=2) for x in (key, value))
    grouped = query.reshape(*query.shape[:2], key.shape[2], heads // key.shape[2], query.shape[-1])
    scores = _product("bqkgd,bskd->bkgqs", grouped, key) * scale
    scores = scores.reshape(scores.shape[0], heads, *scores.shape[-2:])
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if score_fn is not None:
        scores = score_fn(scores)
    output, weights = attend(
        scores, value, bias=bias, mask=mask, normalizer=normalizer, softmax_axis=softmax_axis, sinks=sinks,
        return_weights=True,
    )  # fmt: skip
    output = output.astype(value_dtype)
    return (output, weights) if return_weights else output


# Below this many queries times keys (per head), one product over all heads is faster on CPU than a loop over heads.
_CPU_DENSE_SCORES = 128 * 128
# Above this many scores in all (1 GiB in float32), other platforms too do without the table of scores.
_DENSE_SCORES = 1 << 28


# From so many scores a head on, a TPU's fused kernel is worth its fixed costs.
_TPU_KERNEL_SCORES = 1024 * 1024


def _best(attention: Callable, request: kernels.Request):
    """`attention` by the implementation that suits the platform it is compiled for, which need not be this machine."""
    arrays = request.query, request.key, request.value
    scores_per_head = request.query.shape[1] * request.key.shape[1]
    large = request.query.shape[0] * request.query.shape[2] * scores_per_head > _DENSE_SCORES
    on_cpu = "blocked" if large or scores_per_head > _CPU_DENSE_SCORES else "xla"
    elsewhere = "blocked" if large else "xla"
    if jax.default_backend() == "gpu" and not kernels.obstacles("cudnn", request):
        elsewhere = "cudnn"
    # Among several TPUs a Pallas kernel would have to be told how its inputs are sharded.
    one_tpu = jax.default_backend() == "tpu" and jax.device_count() == 1
    if one_tpu and scores_per_head >= _TPU_KERNEL_SCORES and not kernels.obstacles("splash_tpu", request):
        elsewhere = "splash_tpu"
    if on_cpu == elsewhere:
        return attention(*arrays, implementation=on_cpu)
    return jax.lax.platform_dependent(
        *arrays, cpu=partial(attention, implementation=on_cpu), default=partial(attention, implementation=elsewhere)
    )


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, in buffers of M tokens of which the first `length` of each row are set."""

    key: Float[Array, "B M K D"]
    value: Float[Array, "B M K Dv"]
    length: Int[Array, " B"]


def empty_cache(
    batch: int,
    capacity: int,
    key_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> KeyValueCache:
    """A cache with room for `capacity` tokens a row; `value_dim` defaults to `head_dim`. Source: arXiv:1911.02150."""
    value_dim = head_dim if value_dim is None else value_dim
    return KeyValueCache(
        jnp.zeros((batch, capacity, key_heads, head_dim), dtype),
        jnp.zeros((batch, capacity, key_heads, value_dim), dtype),
        jnp.zeros((batch,), jnp.int32),
    )


@jax.jit
def extend_cache(cache: KeyValueCache, key: Float[Array, "B T K D"], value: Float[Array, "B T K Dv"]) -> KeyValueCache:
    """The cache with T more tokens per row, written after those it holds.

    Tokens beyond the capacity are dropped, and `length` counts them all the same: compare it with the capacity where
    overflow is possible. T greater than the capacity raises ValueError. Source: arXiv:1911.02150.
    """
    capacity, count = cache.key.shape[1], key.shape[1]
    if count > capacity:
        raise ValueError(f"extend_cache: {count} tokens do not fit the cache's capacity {capacity}")
    rows = jnp.arange(key.shape[0])[:, None]
    places = cache.length[:, None] + jnp.arange(count)
    return KeyValueCache(
        cache.key.at[rows, places].set(key.astype(cache.key.dtype), mode="drop"),
        cache.value.at[rows, places].set(value.astype(cache.value.dtype), mode="drop"),
        cache.length + count,
    )


@partial(jax.jit, static_argnames=("scale", "soft_cap"))
def decode_step(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K Dv"],
    cache: KeyValueCache,
    *,
    bias: Float[Array, "*broadcastable"] | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H Dv"], KeyValueCache]:
    """Causal attention of T new tokens to the cached ones and each other; also the cache with the new tokens in it.

    T steps of one token equal one call with T tokens equal the last T rows of attention over the whole sequence. Keys
    are cached as given (after rotary embedding). `mask` restricts further; it sees the M places of the buffers, and
    query 0 stands on place `cache.length` (give it that as `offset`, where it has one). `bias` broadcasts to
    (B, H, T, M). O(T M) time. Source: arXiv:1911.02150, section 2.4.1.
    """
    causal = CausalMask(offset=cache.length)
    cache = extend_cache(cache, key, value)
    output = dot_product_attention(
        query, cache.key, cache.value, bias=bias, mask=causal if mask is None else causal & mask,
        scale=scale, soft_cap=soft_cap, sinks=sinks,
    )  # fmt: skip
    return output.astype(value.dtype), cache


def concatenate_streams(
    streams: Sequence[tuple],
) -> tuple[Float[Array, "B Lk K D"], Float[Array, "B Lk K Dv"], Mask | None]:
    """Keys, values and mask of several streams (key, value) or (key, value, mask), one after the other.

    For queries that attend at once to their own tokens and to others (image prompts, memories, prefixes). A stream's
    mask speaks of its own keys only, counted from 0; without one, every query sees the whole stream. The mask is None
    if no stream has one. Source: arXiv:2203.08913, arXiv:2308.06721.
    """
    keys, values = ([stream[i] for stream in streams] for i in (0, 1))
    masks = [as_mask(stream[2]) if len(stream) > 2 else None for stream in streams]
    total = sum(key.shape[1] for key in keys)
    joined, start = None, 0
    for key, mask in zip(keys, masks, strict=True):
        shifted = ShiftedMask(FullMask() if mask is None else mask, start, key.shape[1], total)
        joined = shifted if joined is None else joined | shifted
        start += key.shape[1]
    return (
        jnp.concatenate(keys, axis=1),
        jnp.concatenate(values, axis=1),
        None if all(mask is None for mask in masks) else joined,
    )
