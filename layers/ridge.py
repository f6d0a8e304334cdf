"""Attention as regression: kernel ridge in place of the kernel average."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.masks import CausalMask, Mask, as_mask
from layers.softmax import dot_product_attention, masked_normalize

__all__ = ["kernel_ridge_attention", "kernel_ridge_values"]

_BLOCK = 64
_IMPLEMENTATIONS = ("reference", "blocked")


def _gram(rows, columns, allowed):
    """softmax over the allowed columns of rows . columns, (B, H, Lr, Lc), in float32."""
    return masked_normalize(jnp.einsum("bqhd,bshd->bhqs", rows, columns), allowed)


def _dense(reference, scaled, rhs, ridge, mask):
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


def _blocked(reference, scaled, rhs, ridge, mask):
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
        solved = jax.scipy.linalg.solve_triangular(system, sides, lower=True)
        return jax.lax.dynamic_update_slice_in_dim(solution, jnp.moveaxis(solved, 1, 2), start, 1), None

    size = min(_BLOCK, length)
    whole = length - length % size
    starts = jnp.arange(0, whole, size)
    solution, _ = jax.lax.scan(jax.checkpoint(partial(step, size=size)), jnp.zeros_like(rhs), starts)
    return solution if whole == length else step(solution, whole, length - whole)[0]


@partial(jax.jit, static_argnames=("implementation",))
def kernel_ridge_values(
    reference: Float[Array, "B L H D"],
    value: Float[Array, "B L H Dv"],
    *,
    ridge: Float[Array, " H"],
    reference_scale: Float[Array, " H"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """z = (K + ridge I)^-1 v with K_ij = softmax_{j <= i}(r_i . s_h r_j / max(|r_j|, 1e-6)): values, de-correlated.

    K is causal, row-normalised and lower triangular with a positive diagonal. `reference_scale` is s_h (1 if not
    given). `mask` restricts K further; a token that may not see itself (padding) gets z = 0. Float32 inside. References
    should not be short: for |r| ~ 1 the diagonal falls like 1/t and |z| grows like t.

    implementation: "reference" solves the whole system; "blocked" (the default) substitutes 64 tokens at a time, with
    O(64 L) scores in memory. O(L^2 D). Source: card cubit, Mechanism 3-8.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"kernel_ridge_values: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}"
        )
    wide = reference.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(wide), axis=-1, keepdims=True), 1e-12))
    scaled = wide / norm
    if reference_scale is not None:
        scaled = scaled * reference_scale.astype(jnp.float32)[:, None]
    causal = CausalMask() if mask is None else CausalMask() & as_mask(mask)
    solve = _dense if implementation == "reference" else _blocked
    return solve(wide, scaled, value.astype(jnp.float32), ridge.astype(jnp.float32), causal).astype(value.dtype)


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
