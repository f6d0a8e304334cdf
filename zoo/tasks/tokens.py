"""What tasks of tokens share: errors of those that a model was to name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["masked_mean", "token_errors"]


def token_errors(logits: Float[Array, "B L V"], tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """-log p of each token, float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def masked_mean(values: Float[Array, "*shape"], counted: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The mean of what counts, 0 if nothing does."""
    return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
