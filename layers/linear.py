"""Attention without a query-by-key matrix: cost linear in the number of tokens."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from layers.activations import gelu
from layers.gated_linear import gated_linear_attention

__all__ = [
    "LinearAttentionState",
    "dot_attention",
    "favor_features",
    "linear_attention",
    "linear_attention_step",
    "orthogonal_projection",
]

_FEATURE_MAPS = {
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "identity": lambda x: x,
}


class LinearAttentionState(NamedTuple):
    """sum_s phi(k_s) v_s^T and sum_s phi(k_s) over the tokens so far, in float32."""

    memory: Float[Array, "B H K V"]
    normalizer: Float[Array, "B H K"]


def _features(x, feature_map):
    if isinstance(feature_map, str):
        if feature_map not in _FEATURE_MAPS:
            choices = ", ".join(_FEATURE_MAPS)
            raise ValueError(f"linear_attention: feature_map {feature_map!r} is not a function nor one of {choices}")
        feature_map = _FEATURE_MAPS[feature_map]
    return feature_map(x.astype(jnp.float32))


@partial(
    jax.jit,
    static_argnames=(
        "feature_map", "causal", "normalize", "epsilon", "return_state", "chunk", "implementation",
    ),
)  # fmt: skip
def linear_attention(
    query: Float[Array, "B Lq H K"],
    key: Float[Array, "B Lk H K"],
    value: Float[Array, "B Lk H V"],
    *,
    feature_map: str | Callable = "elu",
    causal: bool = False,
    token_mask: Bool[Array, "B Lk"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-6,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    chunk: int = 64,
    implementation: str | None = None,
) -> Float[Array, "B Lq H V"] | tuple[Float[Array, "B Lq H V"], LinearAttentionState]:
    """o_q = phi(q)^T sum_k phi(k) v_k^T / (phi(q)^T sum_k phi(k) + epsilon): attention with a factorised kernel.

    `feature_map` phi is "elu" (elu + 1), "relu", "exp", "identity", or a function of the last axis (pass the same
    object again, not a new lambda). `causal` sums over k <= q only and needs Lq = Lk. `token_mask` (True = present)
    leaves keys out; without any key the output is 0. `normalize=False` drops the denominator. The state is the two
    sums; with `initial_state` they go on from there. Computed in float32; o has the values' dtype.

    implementation: "reference" writes out the query-by-key table, O(Lq Lk); "chunked" (the default) is
    O((Lq + Lk) K V). Source: arXiv:2006.16236, equations 5-9.
    """
    if implementation not in (None, "reference", "chunked"):
        raise ValueError(f"linear_attention: implementation {implementation!r} is not one of reference, chunked")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"linear_attention: causal attention of {query.shape[1]} queries to {key.shape[1]} keys is not defined"
        )
    q, k = (_features(x, feature_map) for x in (query, key))
    v = value.astype(jnp.float32)
    if token_mask is not None:
        k = jnp.where(token_mask[:, :, None, None], k, 0.0)
    # A column of ones beside the values makes the denominator one more output.
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    initial = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    if initial_state is not None:
        initial = jnp.concatenate([initial_state.memory, initial_state.normalizer[..., None]], axis=-1)
    if implementation == "reference":
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k)
        scores = jnp.tril(scores) if causal else scores
        output = jnp.einsum("bhqs,bshv->bqhv", scores, v) + jnp.einsum("bqhk,bhkv->bqhv", q, initial)
        state = initial + jnp.einsum("bshk,bshv->bhkv", k, v)
    elif causal:
        output, state = gated_linear_attention(
            q, k, v, scale=1.0, initial_state=initial, return_state=True, chunk=chunk
        )
    else:
        state = initial + jnp.einsum("bshk,bshv->bhkv", k, v)
        output = jnp.einsum("bqhk,bhkv->bqhv", q, state)
    if normalize:
        output = output[..., :-1] / (output[..., -1:] + epsilon)
    else:
        output = output[..., :-1]
    output = output.astype(value.dtype)
    return (output, LinearAttentionState(state[..., :-1], state[..., -1])) if return_state else output


@partial(jax.jit, static_argnames=("feature_map", "normalize", "epsilon"))
def linear_attention_step(
    query: Float[Array, "B H K"],
    key: Float[Array, "B H K"],
    value: Float[Array, "B H V"],
    state: LinearAttentionState,
    *,
    feature_map: str | Callable = "elu",
    normalize: bool = True,
    epsilon: float = 1e-6,
) -> tuple[Float[Array, "B H V"], LinearAttentionState]:
    """One token of causal `linear_attention`: (o_t, state). Source: arXiv:2006.16236, equations 16-20."""
    output, state = linear_attention(
        query[:, None], key[:, None], value[:, None], feature_map=feature_map, causal=True, normalize=normalize,
        epsilon=epsilon, initial_state=state, return_state=True, implementation="reference",
    )  # fmt: skip
    return output[:, 0], state


def orthogonal_projection(key: PRNGKeyArray, num_features: int, dim: int) -> Float[Array, "M D"]:
    """Rows of Gaussian length and, within each block of `dim`, orthogonal directions: W of FAVOR+.

    Every row is distributed as N(0, I); orthogonality lowers the variance of the kernel estimate. Source:
    arXiv:2009.14794, section 2.4.
    """
    direction_key, length_key = jax.random.split(key)
    blocks = -(-num_features // dim)
    directions, triangle = jnp.linalg.qr(jax.random.normal(direction_key, (blocks, dim, dim)))
    # The factorisation's own choice of signs is not uniform; those of its diagonal make it so.
    directions = directions * jnp.sign(jnp.diagonal(triangle, axis1=1, axis2=2))[:, None, :]
    lengths = jnp.linalg.norm(jax.random.normal(length_key, (blocks * dim, dim)), axis=-1, keepdims=True)
    # QR returns each block's vectors as columns.
    return (jnp.swapaxes(directions, 1, 2).reshape(-1, dim) * lengths)[:num_features]


@partial(jax.jit, static_argnames=("is_query", "scale", "epsilon"))
def favor_features(
    x: Float[Array, "B L H D"],
    projection: Float[Array, "M D"],
    *,
    is_query: bool,
    scale: float | None = None,
    epsilon: float = 1e-6,
    token_mask: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B L H M"]:
    """phi(x) = M^-1/2 (exp(W x' - |x'|^2 / 2 - c) + epsilon), x' = sqrt(scale) x: E phi(q).phi(k) ~ exp(scale q.k).

    `scale` defaults to 1/sqrt(D). The stabiliser c is the largest W x' of the row for queries, of all tokens of the
    head for keys (`token_mask` leaves absent ones out of it); the normalisation of `linear_attention`, to be called on
    these features with `feature_map="identity"`, cancels it. Float32. O(L D M). Source: arXiv:2009.14794, section 2.3;
    card relflexformer, Mechanism 1.
    """
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    wide = x.astype(jnp.float32) * scale**0.5
    logits = jnp.einsum("blhd,md->blhm", wide, projection.astype(jnp.float32))
    if is_query:
        top = jnp.max(logits, axis=-1, keepdims=True)
    else:
        there = None if token_mask is None else token_mask[:, :, None, None]
        top = jnp.max(logits, axis=(1, 3), keepdims=True, where=there, initial=-1e30)
    # The stabiliser cancels in the quotient; without its gradient it does so exactly in the backward pass too.
    logits = logits - jax.lax.stop_gradient(top) - jnp.sum(jnp.square(wide), axis=-1, keepdims=True) / 2
    if token_mask is not None:
        logits = jnp.where(token_mask[:, :, None, None], logits, 0.0)
    return (jnp.exp(logits) + epsilon) * projection.shape[0] ** -0.5


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
    gated = gelu(weights * key.astype(jnp.float32), approximate=approximate_gelu)
    # A product with ones: XLA for CPU sums the rows of what it has just computed up to 250 times slower.
    gates = jnp.einsum("l,blc->bc", jnp.ones(gated.shape[1]), gated, precision="highest")
    output = value.astype(jnp.float32) * gates[:, None]
    if token_mask is not None:
        output = jnp.where(token_mask[:, :, None], output, 0.0)
    output = output.astype(value.dtype)
    return (output, weights) if return_weights else output
