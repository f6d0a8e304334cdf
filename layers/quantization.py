"""Vector quantisation: nearest codes with a straight-through gradient, codebooks as moving averages, residual codes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = [
    "CodebookState",
    "code_perplexity",
    "commitment_loss",
    "residual_quantize",
    "update_codebook",
    "vector_quantize",
]


class CodebookState(NamedTuple):
    """K codes and the moving sums they are the quotient of, in float32."""

    codes: Float[Array, "K D"]
    counts: Float[Array, " K"]
    sums: Float[Array, "K D"]


@partial(jax.jit, static_argnames=("metric",))
def vector_quantize(
    x: Float[Array, "*B D"], codes: Float[Array, "K D"], *, metric: str = "euclidean"
) -> tuple[Float[Array, "*B D"], Int[Array, "*B"]]:
    """(e_k, k) with k = argmin |x - e_k|; the gradient of e_k goes straight through to x.

    `metric` "cosine" compares directions. Ties go to the lower index. No gradient reaches the codes: they learn by
    `update_codebook`, or by a loss on codes[k]. O(K D) a vector. Source: arXiv:1711.00937, equations 1-3.
    """
    wide, table = x.astype(jnp.float32), codes.astype(jnp.float32)
    if metric == "cosine":
        scores = wide @ (table / jnp.maximum(jnp.linalg.norm(table, axis=-1, keepdims=True), 1e-12)).T
    elif metric == "euclidean":
        # |x|^2 is the same for all codes.
        scores = wide @ table.T - jnp.sum(jnp.square(table), axis=-1) / 2
    else:
        raise ValueError(f"vector_quantize: metric {metric!r} is not one of euclidean, cosine")
    index = jnp.argmax(scores, axis=-1)
    chosen = jax.lax.stop_gradient(codes[index]).astype(x.dtype)
    return x + jax.lax.stop_gradient(chosen - x), index


@jax.jit
def commitment_loss(x: Float[Array, "*B D"], codes: Float[Array, "K D"], index: Int[Array, "*B"]) -> Float[Array, ""]:
    """mean |x - stop_gradient(e_k)|^2: keeps the encoder near its codes. Source: arXiv:1711.00937, equation 3."""
    chosen = jax.lax.stop_gradient(codes[index])
    return jnp.mean(jnp.square(x.astype(jnp.float32) - chosen.astype(jnp.float32)))


@jax.jit
def update_codebook(
    state: CodebookState,
    x: Float[Array, "*B D"],
    index: Int[Array, "*B"],
    *,
    decay: Float[Array, ""] | float = 0.99,
    epsilon: Float[Array, ""] | float = 1e-5,
    mask: Bool[Array, "*B"] | None = None,
) -> CodebookState:
    """counts, sums <- decay old + (1 - decay) of the batch; codes = sums / counts with Laplace-smoothed counts.

    `mask` (True = present) leaves vectors out. Start from codes, ones, codes. Source: arXiv:1711.00937, appendix A.1.
    """
    size = state.codes.shape[0]
    present = jnp.ones(index.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    flat, where, weight = x.reshape(-1, x.shape[-1]).astype(jnp.float32), index.reshape(-1), present.reshape(-1)
    batch_counts = jnp.zeros(size).at[where].add(weight)
    batch_sums = jnp.zeros(state.sums.shape).at[where].add(flat * weight[:, None])
    counts = decay * state.counts + (1 - decay) * batch_counts
    sums = decay * state.sums + (1 - decay) * batch_sums
    total = jnp.sum(counts)
    smooth = (counts + epsilon) / (total + size * epsilon) * total
    return CodebookState(sums / smooth[:, None], counts, sums)


@partial(jax.jit, static_argnames=("metric",))
def residual_quantize(
    x: Float[Array, "*B D"], codebooks: Float[Array, "Q K D"], *, metric: str = "euclidean"
) -> tuple[Float[Array, "*B D"], Int[Array, "*B Q"]]:
    """Q codes, each for what the ones before left over; their sum with the gradient straight through to x.

    Source: arXiv:2107.03312, section III-C; card sid_mlp.
    """
    left, indices = x, []
    for codes in codebooks:
        _, index = vector_quantize(left, codes, metric=metric)
        left = left - jax.lax.stop_gradient(codes[index]).astype(x.dtype)
        indices.append(index)
    return x - jax.lax.stop_gradient(left), jnp.stack(indices, axis=-1)


@partial(jax.jit, static_argnames=("size",))
def code_perplexity(index: Int[Array, "*B"], *, size: int) -> Float[Array, ""]:
    """exp(entropy) of how often each of `size` codes was used: 1 = one code only, `size` = all alike.

    Source: arXiv:1711.00937, section 4.
    """
    share = jnp.bincount(index.reshape(-1), length=size) / index.size
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))
