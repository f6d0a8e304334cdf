"""Linear attention with decay: retention, gated linear attention, the core of Mamba-2; state (B, H, K, V) per head."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.recurrence import linear_recurrence, pairwise_decay, scan_spans

__all__ = ["gated_linear_attention", "gated_linear_attention_step", "retention_log_decays"]

_IMPLEMENTATIONS = ("reference", "chunked")


@partial(jax.jit, static_argnames=("scale", "return_state", "chunk", "implementation"))
def gated_linear_attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L H K"],
    value: Float[Array, "B L H V"],
    log_decay: Float[Array, "B L H *K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H V"] | tuple[Float[Array, "B L H V"], Float[Array, "B H K V"]]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t: causal linear attention that forgets.

    `log_decay` g is (B, L, H): one decay a head (retention, Mamba-2), or (B, L, H, K): one for every key channel (GLA);
    0 keeps all, -inf forgets all, None is 0. `scale` defaults to 1/sqrt(K). Computed in float32; o has the values'
    dtype. implementation: "reference" steps through time; "chunked" (the default) makes a chunk a few matrix products.
    `chunk` defaults to 64 steps, or 16 with a decay per channel, where a chunk costs chunk K per pair of channels more.
    O(L (chunk + K) V). Source: arXiv:2312.06635, section 4; arXiv:2307.08621.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"gated_linear_attention: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}"
        )
    batch, length, heads, key_size = query.shape
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), jnp.float32)
    if log_decay.ndim == 4 and log_decay.shape[-1] != key_size:
        raise ValueError(
            f"gated_linear_attention: log_decay has {log_decay.shape[-1]} channels, the keys have {key_size}"
        )
    scale = key_size**-0.5 if scale is None else scale
    initial = jnp.zeros((batch, heads, key_size, value.shape[-1]), jnp.float32)
    if initial_state is not None:
        initial = initial_state.astype(jnp.float32)
    # Heads before time: a head's chunk is then one matrix.
    q, k, v, g = (jnp.moveaxis(x.astype(jnp.float32), 2, 1) for x in (query * scale, key, value, log_decay))
    if implementation == "reference":
        final, output = _reference(initial, (q, k, v, g))
    else:
        chunk = min(length, chunk or (64 if g.ndim == 3 else 16))
        final, output = scan_spans(partial(_span, chunk=chunk), initial, (q, k, v, g), chunk=chunk)
    output = jnp.moveaxis(output, 1, 2).astype(value.dtype)
    return (output, final) if return_state else output


def _step(state, row):
    q, k, v, g = row
    decay = jnp.exp(g)[..., None] if g.ndim == 3 else jnp.exp(g)[..., None, None]
    state = decay * state + k[..., :, None] * v[..., None, :]
    return state, jnp.sum(state * q[..., :, None], axis=-2)


def _reference(initial, rows):
    final, output = jax.lax.scan(_step, initial, tuple(jnp.moveaxis(x, 2, 0) for x in rows))
    return final, jnp.moveaxis(output, 0, 2)


def _span(initial, rows, *, chunk: int):
    """All chunks of a span at once: only the states at their starts depend on one another."""
    q, k, v, g = (x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]) for x in rows)
    if g.ndim == 4:
        left = pairwise_decay(g)
        scores = (q @ k.swapaxes(-1, -2)) * left
        to_end = left[..., -1, :, None]
        since_start = jnp.exp(jnp.cumsum(g, axis=-1))[..., None]
        whole = jnp.sum(g, axis=-1)[..., None, None]
    else:
        left = pairwise_decay(g.swapaxes(-1, -2))
        scores = jnp.einsum("bhntk,bhnsk,bhnkts->bhnts", q, k, left)
        to_end = left[..., -1, :].swapaxes(-1, -2)
        since_start = jnp.exp(jnp.cumsum(g, axis=-2))
        whole = jnp.sum(g, axis=-2)[..., None]
    written = (k * to_end).swapaxes(-1, -2) @ v
    states = linear_recurrence(jnp.moveaxis(written, 2, 1), jnp.moveaxis(whole, 2, 1), initial_state=initial)
    starts = jnp.moveaxis(jnp.concatenate([initial[:, None], states[:, :-1]], axis=1), 1, 2)
    output = scores @ v + (q * since_start) @ starts
    return states[:, -1], output.reshape(*output.shape[:2], -1, output.shape[-1])


@partial(jax.jit, static_argnames=("scale",))
def gated_linear_attention_step(
    query: Float[Array, "B H K"],
    key: Float[Array, "B H K"],
    value: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
    log_decay: Float[Array, "B H *K"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One time step of `gated_linear_attention`: (o_t, S_t). Source: arXiv:2312.06635, section 4."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    g = jnp.zeros(query.shape[:2], jnp.float32) if log_decay is None else log_decay
    state, output = _step(state.astype(jnp.float32), [x.astype(jnp.float32) for x in (query * scale, key, value, g)])
    return output.astype(value.dtype), state


def retention_log_decays(num_heads: int) -> Float[Array, " H"]:
    """g_h = log(1 - 2^(-5 - h)), h = 0..H-1: the constant decays of multi-scale retention. Source: arXiv:2307.08621."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads))))
