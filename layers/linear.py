"""Attention without a query-by-key matrix: cost linear in the number of tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.activations import gelu

__all__ = ["dot_attention"]


@partial(jax.jit, static_argnames=("approximate_gelu", "return_weights"))
def dot_attention(
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    *,
    token_mask: Bool[Array, "B L"] | None = None,
    approximate_gelu: bool = False,
    return_weights: bool = False,
) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """o_tc = v_tc sum_u GELU(softmax_u(q_uc) k_uc): every channel gates its values by one number for all tokens.

    The softmax runs over the tokens, channel by channel, without a 1/sqrt(D). All that tokens tell each other passes
    through the D sums, hence O(L D) time and memory; splitting D into heads changes nothing. `token_mask` (True =
    present) leaves tokens out of the softmax and the sum and gives them a zero output; no token at all gives zeros.
    GELU is the exact (erf) form unless `approximate_gelu` asks for the tanh form. `return_weights` also returns the
    softmax weights (over tokens, a column per channel). Softmax and sum are accumulated in float32. Source: card ister,
    "Dot-attention" (arXiv:2412.18798, official code).
    """
    logits = query.astype(jnp.float32)
    if token_mask is None:
        weights = jax.nn.softmax(logits, axis=1)
    else:
        present = token_mask[:, :, None]
        # `where` inside softmax keeps an all-absent row finite: its weights are zeros, and so are their gradients.
        weights = jax.nn.softmax(logits, axis=1, where=present)
        weights = jnp.where(present, weights, 0.0)
    gates = jnp.sum(gelu(weights * key.astype(jnp.float32), approximate=approximate_gelu), axis=1, keepdims=True)
    output = value.astype(jnp.float32) * gates
    if token_mask is not None:
        output = jnp.where(token_mask[:, :, None], output, 0.0)
    output = output.astype(value.dtype)
    return (output, weights) if return_weights else output
