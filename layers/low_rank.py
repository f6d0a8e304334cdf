"""Linear maps with few extra or few active directions: LoRA, mixtures of LoRA experts, gated low-rank maps."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = [
    "gated_low_rank_linear",
    "lora_linear",
    "lora_merge",
    "lora_mixture",
    "principal_subspace",
    "top_k_gates",
]


@jax.jit
def lora_linear(
    x: Float[Array, "*B Din"],
    kernel: Float[Array, "Din Dout"],
    down: Float[Array, "Din R"],
    up: Float[Array, "R Dout"],
    *,
    scale: Float[Array, ""] | float = 1.0,
    bias: Float[Array, " Dout"] | None = None,
    token_mask: Bool[Array, "*B"] | None = None,
) -> Float[Array, "*B Dout"]:
    """y = x W + bias + scale (x A) B, A = `down`, B = `up` of rank R; `scale` is alpha / R where papers say alpha.

    `token_mask` (True = adapted) leaves other tokens to W alone, as for condition tokens. B = 0 is the base model.
    O(Din Dout + R (Din + Dout)) a token. Source: arXiv:2106.09685; card dealmate, Mechanism 1.
    """
    change = (x @ down.astype(x.dtype)) @ up.astype(x.dtype) * scale
    if token_mask is not None:
        change = jnp.where(token_mask[..., None], change, 0.0)
    y = x @ kernel + change
    return (y if bias is None else y + bias).astype(x.dtype)


@jax.jit
def lora_merge(
    kernel: Float[Array, "Din Dout"],
    down: Float[Array, "Din R"],
    up: Float[Array, "R Dout"],
    *,
    scale: Float[Array, ""] | float = 1.0,
) -> Float[Array, "Din Dout"]:
    """W + scale A B in float32: the same map as `lora_linear` without extra cost. Source: arXiv:2106.09685."""
    merged = kernel.astype(jnp.float32) + scale * (down.astype(jnp.float32) @ up.astype(jnp.float32))
    return merged.astype(kernel.dtype)


@partial(jax.jit, static_argnames=("k", "straight_through"))
def top_k_gates(
    logits: Float[Array, "*B E"], *, k: int, straight_through: bool = False
) -> tuple[Float[Array, "*B E"], Float[Array, "*B E"]]:
    """(w, p): p = softmax(logits), w = p on the k largest, renormalised to sum 1, and 0 elsewhere.

    `straight_through` gives w the gradient of p, so that experts that were not chosen learn to be. Float32. Source:
    card lora_mixer, Mechanism 2.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k_gates: k {k} is not in 1..{logits.shape[-1]}, the number of experts")
    dense = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.any(jax.nn.one_hot(jax.lax.top_k(dense, k)[1], dense.shape[-1], dtype=bool), axis=-2)
    sparse = jnp.where(chosen, dense, 0.0)
    sparse = sparse / jnp.sum(sparse, axis=-1, keepdims=True)
    return (dense + jax.lax.stop_gradient(sparse - dense) if straight_through else sparse), dense


@jax.jit
def lora_mixture(
    x: Float[Array, "*B Din"],
    kernel: Float[Array, "Din Dout"],
    down: Float[Array, "E Din R"],
    up: Float[Array, "E R Dout"],
    gates: Float[Array, "*B E"],
    *,
    scale: Float[Array, ""] | float = 1.0,
) -> Float[Array, "*B Dout"]:
    """y = x W + scale sum_e gate_e (x A_e) B_e: experts on one projection, weighed token by token.

    One-hot gates are `lora_linear` with that expert. O(Din Dout + E R (Din + Dout)) a token. Source: card lora_mixer,
    Mechanism 2.
    """
    inner = jnp.einsum("...i,eir->...er", x, down.astype(x.dtype)) * gates[..., None].astype(x.dtype)
    return (x @ kernel + scale * jnp.einsum("...er,ero->...o", inner, up.astype(x.dtype))).astype(x.dtype)


@jax.jit
def gated_low_rank_linear(
    x: Float[Array, "*B Din"],
    kernel: Float[Array, "Din Dout"],
    basis: Float[Array, "Din K"],
    tolerance: Float[Array, ""] | float,
    *,
    bias: Float[Array, " Dout"] | None = None,
) -> tuple[Float[Array, "*B Dout"], Bool[Array, "*B"]]:
    """(y, fast): y = W^T (V V^T x) where |x - V V^T x| < tolerance |x| (fast), the whole W^T x elsewhere.

    `basis` V has orthonormal columns. The error of a fast token is at most |W| tolerance |x|; others are exact.
    tolerance <= 0, x = 0 and inputs that are not finite take the exact way. Both ways are computed here; kernels that
    skip work can take `fast` as their plan. Source: card gated_subspace, Mechanism 1-4.
    """
    wide, basis = x.astype(jnp.float32), basis.astype(jnp.float32)
    inside = wide @ basis
    # |x|^2 - |V^T x|^2 would cancel where it matters: the residual itself is small there.
    residual = wide - inside @ basis.T
    length = jnp.sqrt(jnp.sum(jnp.square(wide), axis=-1))
    fast = jnp.sqrt(jnp.sum(jnp.square(residual), axis=-1)) < tolerance * length
    rest = residual @ kernel.astype(jnp.float32)
    y = inside @ (basis.T @ kernel.astype(jnp.float32)) + jnp.where(fast[..., None], 0.0, rest)
    return (y if bias is None else y + bias).astype(x.dtype), fast


@partial(jax.jit, static_argnames=("iterations",))
def principal_subspace(
    samples: Float[Array, "N D"], start: Float[Array, "D K"], *, iterations: int = 4
) -> Float[Array, "D K"]:
    """Orthonormal V near the span of the K leading right singular vectors of the samples (not centred), in their order.

    Orthogonal iteration V <- qr(X^T X V) from `start`, then a Rayleigh-Ritz rotation; a layer's basis is a good start
    for the next layer's. O(iterations N D K). Source: card gated_subspace, "Basis construction".
    """
    wide = samples.astype(jnp.float32)

    def step(_, basis):
        return jnp.linalg.qr(wide.T @ (wide @ basis))[0]

    basis = jax.lax.fori_loop(0, iterations, step, jnp.linalg.qr(start.astype(jnp.float32))[0])
    values, rotation = jnp.linalg.eigh(jnp.square(jnp.linalg.norm(wide)) ** -1 * (basis.T @ (wide.T @ (wide @ basis))))
    return basis @ rotation[:, jnp.argsort(-values)]
