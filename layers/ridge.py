"""Attention as regression: kernel ridge in place of the kernel average."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.masks import CausalMask, Mask, as_mask
from layers.softmax import KeyValueCache, dot_product_attention, extend_cache, masked_normalize
from layers.triangular import solve_lower

__all__ = [
    "KernelRidgeCache",
    "empty_kernel_ridge_cache",
    "kernel_ridge_attention",
    "kernel_ridge_step",
    "kernel_ridge_values",
]

_IMPLEMENTATIONS = ("reference", "blocked")


def _gram(rows, columns, allowed):
    """softmax over the allowed columns of rows . columns, (B, H, Lr, Lc)."""
    return masked_normalize(jnp.einsum("bqhd,bshd->bhqs", rows, columns), allowed)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scaled(wide, reference_scale):
    """s_h r / max(|r|, 1e-6)."""
    scaled = wide / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(wide), axis=-1, keepdims=True), 1e-12))
    return scaled if reference_scale is None else scaled * reference_scale.astype(wide.dtype)[:, None]


def _dense(reference, scaled, rhs, ridge, mask, block):
    length = reference.shape[1]
    allowed = mask.materialize(length, length)
    gram = _gram(reference, scaled, allowed)
    sees_itself = jnp.diagonal(allowed, axis1=-2, axis2=-1)[..., None]
    system, sides = _with_ridge(gram, jnp.moveaxis(rhs, 2, 1), ridge, sees_itself)
    return jnp.moveaxis(jnp.linalg.solve(system, sides), 1, 2)


def _with_ridge(gram, sides, ridge, sees_itself):
    """The square system and its right sides; a token that may not see itself gets the equation z = 0."""
    diagonal = jnp.where(sees_itself, ridge[:, None, None], 1.0) * jnp.eye(gram.shape[-1])
    return jnp.where(sees_itself, gram, 0.0) + diagonal, jnp.where(sees_itself, sides, 0.0)


def _blocked(reference, scaled, rhs, ridge, mask, block):
    """Forward substitution: a block needs the solution before it and a small triangular system of its own."""
    length = rhs.shape[1]

    def step(solution, start, size: int):
        allowed = mask.block(start, size, 0, length)
        gram = _gram(jax.lax.dynamic_slice_in_dim(reference, start, size, 1), scaled, allowed)
        own = jax.lax.dynamic_slice_in_dim(gram, start, size, 3)
        sees_itself = jnp.diagonal(jax.lax.dynamic_slice_in_dim(allowed, start, size, 3), axis1=-2, axis2=-1)[..., None]
        sides = jnp.moveaxis(jax.lax.dynamic_slice_in_dim(rhs, start, size, 1), 2, 1)
        # The solution is still zero from this block on.
        sides = sides - jnp.einsum("bhqs,bshd->bhqd", gram, solution)
        system, sides = _with_ridge(own, sides, ridge, sees_itself)
        solved = solve_lower(system, sides)
        return jax.lax.dynamic_update_slice_in_dim(solution, jnp.moveaxis(solved, 1, 2), start, 1), None

    size = min(block, length)
    whole = length - length % size
    starts = jnp.arange(0, whole, size)
    solution, _ = jax.lax.scan(jax.checkpoint(partial(step, size=size)), jnp.zeros_like(rhs), starts)
    return solution if whole == length else step(solution, whole, length - whole)[0]


@partial(jax.jit, static_argnames=("implementation", "block"))
def kernel_ridge_values(
    reference: Float[Array, "B L H D"],
    value: Float[Array, "B L H Dv"],
    *,
    ridge: Float[Array, " H"],
    reference_scale: Float[Array, " H"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable"] | None = None,
    implementation: str | None = None,
    block: int = 64,
) -> Float[Array, "B L H Dv"]:
    """z = (K + ridge I)^-1 v with K_ij = softmax_{j <= i}(r_i . s_h r_j / max(|r_j|, 1e-6)): values, de-correlated.

    K is causal, row-normalised and lower triangular with a positive diagonal. `reference_scale` is s_h (1 if not
    given). `mask` restricts K further; a token that may not see itself (padding) gets z = 0. At least float32 inside.
    References should not be short: for |r| ~ 1 the diagonal falls like 1/t and |z| grows like t.

    implementation: "reference" solves the whole system; "blocked" (the default) substitutes `block` tokens at a time,
    with O(block L) scores in memory. O(L^2 D). Source: card cubit, Mechanism 3-8.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"kernel_ridge_values: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}"
        )
    wide, sides = _wide(reference), _wide(value)
    scaled = _scaled(wide, reference_scale)
    causal = CausalMask() if mask is None else CausalMask() & as_mask(mask)
    solve = _dense if implementation == "reference" else _blocked
    return solve(wide, scaled, sides, ridge.astype(sides.dtype), causal, block).astype(value.dtype)


@partial(jax.jit, static_argnames=("scale", "implementation"))
def kernel_ridge_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L H D"],
    value: Float[Array, "B L H Dv"],
    reference: Float[Array, "B L H D"],
    *,
    ridge: Float[Array, " H"],
    reference_scale: Float[Array, " H"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """o = softmax(scale q k^T) (K + ridge I)^-1 v, causal: kernel ridge regression where attention averages.

    Softmax attention is the Nadaraya-Watson average of the values; the inverse takes out what the values share. The
    arguments are those of `kernel_ridge_values`; the same mask holds for both kernels. A huge ridge, multiplied back,
    gives plain attention. O(L^2 D). Source: card cubit, equation 13.
    """
    values = kernel_ridge_values(
        reference, value, ridge=ridge, reference_scale=reference_scale, mask=mask, implementation=implementation
    )
    causal = CausalMask() if mask is None else CausalMask() & as_mask(mask)
    return dot_product_attention(query, key, values, mask=causal, scale=scale)


class KernelRidgeCache(NamedTuple):
    """What decoding remembers of each token: its key, its scaled reference and its de-correlated value.

    The last two are float32: later tokens are solved from them. `length` counts the tokens of each row.
    """

    key: Float[Array, "B M H D"]
    reference: Float[Array, "B M H D"]
    value: Float[Array, "B M H Dv"]
    length: Int[Array, " B"]


def empty_kernel_ridge_cache(
    batch: int, capacity: int, heads: int, dim: int, *, value_dim: int | None = None, dtype: Any = jnp.float32
) -> KernelRidgeCache:
    """Room for `capacity` tokens a row; `dtype` is that of keys. Source: card cubit, Mechanism ("Decoding")."""
    key = jnp.zeros((batch, capacity, heads, dim), dtype)
    value = jnp.zeros((batch, capacity, heads, value_dim or dim), jnp.float32)
    return KernelRidgeCache(key, key.astype(jnp.float32), value, jnp.zeros(batch, jnp.int32))


@partial(jax.jit, static_argnames=("scale",))
def kernel_ridge_step(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H Dv"],
    reference: Float[Array, "B T H D"],
    cache: KernelRidgeCache,
    *,
    ridge: Float[Array, " H"],
    reference_scale: Float[Array, " H"] | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H Dv"], KernelRidgeCache]:
    """`kernel_ridge_attention` of T new tokens after the cached ones, z_t = (v_t - K_t,<t z_<t) / (K_tt + ridge); also
    the cache with them in it.

    T steps of one token equal one call with T, and the last T rows of the whole sequence at once. The new tokens must
    fit the capacity. `mask` restricts both kernels further; it sees the M places of the cache, and query 0 stands on
    place `cache.length` (its `offset`, where it has one). O(T M D + T^2 D). Source: card cubit, Mechanism ("Decoding").
    """
    count, capacity = query.shape[1], cache.key.shape[1]
    causal = CausalMask(offset=cache.length) if mask is None else CausalMask(offset=cache.length) & mask
    wide = reference.astype(jnp.float32)
    scaled = _scaled(wide, reference_scale)
    before = jnp.arange(capacity) < cache.length[:, None]
    held = extend_cache(KeyValueCache(cache.key, cache.reference, cache.length), key, scaled)
    gram = _gram(wide, held.value, causal.materialize(count, capacity))
    solved = jnp.where(before[..., None, None], cache.value, 0.0)
    sides = jnp.moveaxis(value.astype(jnp.float32), 2, 1) - jnp.einsum("bhqs,bshd->bhqd", gram, solved)
    # The new tokens' own columns stand where each row's cache ended.
    columns = jnp.minimum(cache.length[:, None] + jnp.arange(count), capacity - 1)
    own = jnp.take_along_axis(gram, columns[:, None, None, :], axis=3)
    own = own + ridge.astype(jnp.float32)[:, None, None] * jnp.eye(count)
    new = jnp.moveaxis(solve_lower(own, sides), 1, 2)
    values = extend_cache(KeyValueCache(held.value, cache.value, cache.length), scaled, new).value
    output = dot_product_attention(query, held.key, values.astype(value.dtype), mask=causal, scale=scale)
    return output, KernelRidgeCache(held.key, held.value, values, held.length)
