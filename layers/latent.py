"""Attention through a few latent tokens: many tokens write into them, they read and answer. Linear in the tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.masks import KeyMask
from layers.softmax import dot_product_attention

__all__ = ["agent_attention", "gather_representatives", "latent_read"]


def _present(token_mask):
    return None if token_mask is None else KeyMask(token_mask)


@partial(jax.jit, static_argnames=("scale",))
def agent_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk H D"],
    value: Float[Array, "B Lk H Dv"],
    agents: Float[Array, "B M H D"],
    *,
    scale: float | None = None,
    gather_bias: Float[Array, "*broadcastable"] | None = None,
    broadcast_bias: Float[Array, "*broadcastable2"] | None = None,
    token_mask: Bool[Array, "B Lk"] | None = None,
) -> Float[Array, "B Lq H Dv"]:
    """o = softmax(q a^T) [softmax(a k^T) v]: M agents gather from all tokens, tokens read from the agents.

    The biases broadcast to (B, H, M, Lk) and (B, H, Lq, M); `scale` (default 1/sqrt(D)) is that of both products.
    `token_mask` (True = present) leaves keys out. O((Lq + Lk) M D). Source: arXiv:2312.08874, equation 4.
    """
    gathered = dot_product_attention(agents, key, value, bias=gather_bias, mask=_present(token_mask), scale=scale)
    return dot_product_attention(query, agents, gathered, bias=broadcast_bias, scale=scale)


@partial(jax.jit, static_argnames=("normalize", "epsilon"))
def gather_representatives(
    logits: Float[Array, "B L H M"],
    key: Float[Array, "B L H D"],
    value: Float[Array, "B L H Dv"],
    *,
    normalize: bool = True,
    epsilon: float = 1e-6,
    token_mask: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H Dv"], Float[Array, "B L H M"]]:
    """A = softmax_m(logits); k'_m = sum_t A_tm k_t / (sum_t A_tm + epsilon), v' alike: (k', v', A).

    Tokens distribute one unit each over M representatives, so it is those that compete (Gather). Let v' interact by
    attention among themselves, then read with `dot_product_attention(query, k', v')` (Distribute): linear in L.
    `normalize=False` gives the plain sums. `token_mask` (True = present) leaves tokens out. A is float32. O(L M D).
    Source: card rpattention, Mechanism 2-3.
    """
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if token_mask is not None:
        weights = jnp.where(token_mask[:, :, None, None], weights, 0.0)
    shares = weights
    if normalize:
        shares = weights / (jnp.sum(weights, axis=1, keepdims=True) + epsilon)
    keys, values = (jnp.einsum("blhm,blhd->bmhd", shares, x.astype(jnp.float32)).astype(x.dtype) for x in (key, value))
    return keys, values, weights


@partial(jax.jit, static_argnames=("scale",))
def latent_read(
    latents: Float[Array, "B M H D"],
    key: Float[Array, "B Lk H D"],
    value: Float[Array, "B Lk H Dv"],
    latent_key: Float[Array, "B M H D"],
    latent_value: Float[Array, "B M H Dv"],
    *,
    scale: float | None = None,
    token_mask: Bool[Array, "B Lk"] | None = None,
) -> Float[Array, "B M H Dv"]:
    """Attention of M latent queries to [tokens; latents]: the read of a Perceiver resampler.

    Latents see themselves beside the tokens, so a latent can keep what it has; with no token present it attends to
    latents alone. Processing is self-attention among the latents; writing back is `dot_product_attention` with tokens
    as queries. `token_mask` (True = present) is over the Lk tokens. O(M (Lk + M) D). Source: arXiv:2204.14198, figure
    5; cards dgad, modality_mutual_attention.
    """
    mask = None
    if token_mask is not None:
        mask = KeyMask(jnp.concatenate([token_mask, jnp.ones(latent_key.shape[:2], bool)], axis=1))
    keys, values = jnp.concatenate([key, latent_key], axis=1), jnp.concatenate([value, latent_value], axis=1)
    return dot_product_attention(latents, keys, values, mask=mask, scale=scale)
