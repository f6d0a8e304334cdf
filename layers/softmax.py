"""The attention core: score -> bias and mask -> normaliser -> weighted sum, each step replaceable.

Projections stay outside. A paper that changes one step writes that step and leaves the rest to this module.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.masks import DenseMask, Mask

__all__ = ["attend", "dot_product_attention", "masked_normalize"]

Scores = Float[Array, "B H Lq Lk"]
Allowed = Bool[Array, "b h Lq Lk"]
Normalizer = Callable[[Scores, Allowed, int], Scores]

_AXES = {"keys": -1, "queries": -2, "heads": -3}


def _softmax(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    return jnp.where(allowed, jax.nn.softmax(scores, axis=axis, where=allowed), 0.0)


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
    return kept / jnp.maximum(jnp.sum(jnp.abs(kept), axis=axis, keepdims=True), 1e-9)


def _sparsemax(scores: Scores, allowed: Allowed, axis: int) -> Scores:
    # Euclidean projection onto the simplex: subtract the threshold at which the positive parts sum to one.
    ordered = jnp.flip(jnp.sort(jnp.where(allowed, scores, -jnp.inf), axis=axis), axis=axis)
    ordered = jnp.moveaxis(ordered, axis, -1)
    rank = jnp.arange(1, ordered.shape[-1] + 1)
    running = jnp.cumsum(jnp.where(jnp.isfinite(ordered), ordered, 0.0), axis=-1)
    inside = jnp.isfinite(ordered) & (1 + rank * jnp.where(jnp.isfinite(ordered), ordered, 0.0) > running)
    count = jnp.sum(inside, axis=-1, keepdims=True)
    total = jnp.sum(jnp.where(inside, ordered, 0.0), axis=-1, keepdims=True)
    threshold = jnp.moveaxis((total - 1) / jnp.maximum(count, 1), -1, axis)
    return jnp.where(allowed, jax.nn.relu(scores - threshold), 0.0)


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "linear": _linear,
    "hardmax": _hardmax,
    "sparsemax": _sparsemax,
    "signed_l1": _signed_l1,
}


def masked_normalize(
    scores: Scores, allowed: Allowed, *, normalizer: str | Normalizer = "softmax", axis: str = "keys"
) -> Scores:
    """Weights from scores: softmax | sigmoid | relu | linear | hardmax | sparsemax | signed_l1 | a function.

    `axis` is what the weights sum over: "keys" (the usual), "queries" or "heads". Forbidden pairs get weight 0; a row
    without any allowed pair gets zeros, with zero gradient. A function takes (scores, allowed, axis). Source: softmax
    and its kin as listed in the module; sparsemax arXiv:1602.02068; hardmax arXiv:2407.01602.
    """
    if axis not in _AXES:
        raise ValueError(f"masked_normalize: axis {axis!r} is not one of {', '.join(_AXES)}")
    if isinstance(normalizer, str):
        if normalizer not in NORMALIZERS:
            raise ValueError(f"masked_normalize: normalizer {normalizer!r} is not one of {', '.join(NORMALIZERS)}")
        normalizer = NORMALIZERS[normalizer]
    return normalizer(scores, allowed, _AXES[axis])


@partial(jax.jit, static_argnames=("normalizer", "axis", "return_weights"))
def attend(
    scores: Scores,
    value: Float[Array, "B Lk K Dv"],
    *,
    bias: Float[Array, "*broadcastable"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable"] | None = None,
    normalizer: str | Normalizer = "softmax",
    axis: str = "keys",
    return_weights: bool = False,
) -> Float[Array, "B Lq H Dv"] | tuple[Float[Array, "B Lq H Dv"], Scores]:
    """o_q = sum_k w_qk v_k with w = normalise(scores + bias, mask): the attention core from any scores.

    For papers whose score is not a dot product. K value heads serve H query heads when K divides H. Computed in
    float32; the output has the values' dtype. Source: arXiv:1706.03762, equation 1, without its score.
    """
    _, heads, query_length, key_length = scores.shape
    wide = scores.astype(jnp.float32)
    if bias is not None:
        wide = wide + bias.astype(jnp.float32)
    if mask is None:
        allowed = jnp.ones((1, 1, query_length, key_length), bool)
    else:
        symbolic = mask if isinstance(mask, Mask) else DenseMask(mask)
        allowed = symbolic.materialize(query_length, key_length)
    weights = masked_normalize(wide, allowed, normalizer=normalizer, axis=axis)
    grouped = weights.reshape(weights.shape[0], value.shape[2], heads // value.shape[2], query_length, key_length)
    output = jnp.einsum("bkgqs,bskd->bqkgd", grouped, value.astype(jnp.float32))
    output = output.reshape(*output.shape[:2], heads, value.shape[-1]).astype(value.dtype)
    return (output, weights) if return_weights else output


@partial(
    jax.jit,
    static_argnames=("scale", "soft_cap", "score_fn", "normalizer", "axis", "return_weights", "implementation"),
)
def dot_product_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    *,
    bias: Float[Array, "*broadcastable"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    score_fn: Callable[[Scores], Scores] | None = None,
    normalizer: str | Normalizer = "softmax",
    axis: str = "keys",
    return_weights: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B Lq H Dv"] | tuple[Float[Array, "B Lq H Dv"], Scores]:
    """o_q = sum_k softmax_k(scale q.k + bias)_qk v_k over allowed keys, with every step replaceable.

    H query heads share K key-value heads when K divides H (grouped-query; K = 1 is multi-query). `scale` defaults to
    1/sqrt(D). The score then passes through `soft_cap` (c tanh(s / c)) and `score_fn`; `bias` broadcasts to
    (B, H, Lq, Lk) and comes after them; `mask` is a `layers.Mask` or such an array of booleans. `normalizer` and `axis`
    are those of `masked_normalize`. A query that may see no key gets 0, with zero gradient. `return_weights` also gives
    the weights. Scores and weights are float32, the output has the values' dtype.

    `implementation`: None picks by platform and request and always works; "reference" is the plain text of the
    equation; "xla" is `jax.nn.dot_product_attention` on any platform; "cudnn" the fused kernel on NVIDIA GPUs (float16
    and bfloat16). A named one that cannot serve the request raises ValueError. Source: arXiv:1706.03762.
    """
    heads, key_heads = query.shape[2], key.shape[2]
    if heads % key_heads:
        raise ValueError(
            f"dot_product_attention: num query heads {heads} is not a multiple of num key heads {key_heads}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    obstacle = _obstacle_to_fusing(soft_cap, score_fn, normalizer, axis, return_weights, query, value)
    if implementation is None:
        fits = jax.default_backend() == "gpu" and query.dtype in (jnp.float16, jnp.bfloat16)
        implementation = "cudnn" if fits and not obstacle else "reference"
    if implementation in ("xla", "cudnn"):
        if obstacle:
            raise ValueError(f"dot_product_attention: implementation {implementation!r} does not support {obstacle}")
        return _jax_attention(query, key, value, bias, mask, scale, implementation)
    if implementation != "reference":
        raise ValueError(
            f"dot_product_attention: implementation {implementation!r} is not one of reference, xla, cudnn"
        )

    wide_query = query.astype(jnp.float32).reshape(*query.shape[:2], key_heads, heads // key_heads, query.shape[-1])
    scores = jnp.einsum("bqkgd,bskd->bkgqs", wide_query * scale, key.astype(jnp.float32))
    scores = scores.reshape(scores.shape[0], heads, *scores.shape[-2:])
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if score_fn is not None:
        scores = score_fn(scores)
    return attend(scores, value, bias=bias, mask=mask, normalizer=normalizer, axis=axis, return_weights=return_weights)


def _obstacle_to_fusing(soft_cap, score_fn, normalizer, axis, return_weights, query, value) -> str | None:
    """What a fused softmax kernel cannot do of this request, or None."""
    if normalizer != "softmax" or axis != "keys":
        return f"normalizer {normalizer!r} over {axis}"
    if soft_cap is not None or score_fn is not None:
        return "soft_cap and score_fn"
    if return_weights:
        return "return_weights"
    if query.shape[-1] != value.shape[-1]:
        return f"value heads of another width ({value.shape[-1]}) than query heads ({query.shape[-1]})"
    return None


def _jax_attention(query, key, value, bias, mask, scale: float, implementation: str) -> Float[Array, "B Lq H Dv"]:
    allowed = None
    if mask is not None:
        symbolic = mask if isinstance(mask, Mask) else DenseMask(mask)
        allowed = symbolic.materialize(query.shape[1], key.shape[1])
    if bias is not None:
        bias = jnp.reshape(bias, (1,) * (4 - bias.ndim) + bias.shape).astype(query.dtype)
    output = jax.nn.dot_product_attention(query, key, value, bias, allowed, scale=scale, implementation=implementation)
    if allowed is None:
        return output
    # jax.nn averages the values where nothing is allowed.
    seen = jnp.moveaxis(jnp.any(allowed, axis=-1), 1, 2)[..., None]
    return jnp.where(seen, output, jnp.zeros_like(output))
