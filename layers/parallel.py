"""Sequences longer than a device: attention around a ring of devices, states handed along a line of them.

These functions run inside `jax.shard_map`, where every device holds its part of the time axis.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["preceding_state", "ring_attention"]


def _merge(first, second):
    """Two attentions of the same queries to different keys, as (output, log of the sum) each, as one."""
    (output_1, log_1), (output_2, log_2) = first, second
    top = jnp.maximum(log_1, log_2)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weight_1, weight_2 = jnp.exp(log_1 - top), jnp.exp(log_2 - top)
    total = weight_1 + weight_2
    safe = jnp.where(total > 0, total, 1.0)
    output = (weight_1[..., None] * output_1 + weight_2[..., None] * output_2) / safe[..., None]
    return output, jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


def _part(query, key, value, allowed, scale: float):
    """Attention to one part of the keys, and the logarithm of each row's sum; (B, K, G, Lq, ...)."""
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key, preferred_element_type=jnp.float32) * scale
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    safe = jnp.where(total > 0, total, 1.0)
    output = jnp.einsum("bkgqs,bskd->bkgqd", weights, value.astype(jnp.float32)) / safe[..., None]
    return output, jnp.where(total > 0, top[..., 0] + jnp.log(safe), -jnp.inf)


@partial(jax.jit, static_argnames=("axis_name", "causal", "scale"))
def ring_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    *,
    axis_name: str,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B Lq H Dv"]:
    """o_q = sum_k softmax_k(scale q.k) v_k over the keys of all devices: `dot_product_attention` on a split sequence.

    Call it inside `jax.shard_map` on the parts that the devices along `axis_name` hold, in order. Keys and values go
    around the ring while each device attends to those it has; no device ever holds more than two parts, and the
    backward pass computes the weights again. `causal` needs as many queries as keys. O(Lq n Lk) time a device with n
    devices. Source: arXiv:2310.01889, algorithm 1.
    """
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"ring_attention: causal with {query.shape[1]} queries and {key.shape[1]} keys a device")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    devices, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    batch, length, heads, _ = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], -1)
    later = jnp.arange(length)[:, None] >= jnp.arange(key.shape[1])[None, :]

    @jax.checkpoint
    def attend_to(key, value, source):
        # Parts before this device's own are seen whole, parts after it not at all.
        allowed = (source < index) | ((source == index) & later) if causal else None
        return _part(grouped, key, value, allowed, scale)

    def step(carry, turn):
        key, value, so_far = carry
        so_far = _merge(so_far, attend_to(key, value, (index - turn) % devices))
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        return (*(jax.lax.ppermute(x, axis_name, ring) for x in (key, value)), so_far), None

    so_far = attend_to(key, value, index)
    if devices > 1:
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        key, value = (jax.lax.ppermute(x, axis_name, ring) for x in (key, value))
        (_, _, so_far), _ = jax.lax.scan(step, (key, value, so_far), jnp.arange(1, devices))
    output = jnp.moveaxis(so_far[0], 3, 1).reshape(batch, length, heads, -1)
    return output.astype(value.dtype)


@partial(jax.jit, static_argnames=("axis_name",))
def preceding_state(
    final_state: Float[Array, "*S"], total_log_decay: Float[Array, "*broadcastable"], *, axis_name: str
) -> Float[Array, "*S"]:
    """h0_i = sum_{j < i} exp(sum_{j < k < i} g_k) f_j: the state in which the time before device i's part ends.

    For recurrences h_t = exp(g_t) h_{t-1} + x_t whose time axis is split over the devices along `axis_name`: run a
    device's own part from a zero state, give the final state f and the sum g of its log decays (broadcastable to f),
    and run the part again from what this returns. Call it inside `jax.shard_map`. Communicates one state a device.
    Source: arXiv:1709.04057, section 3 (the block form of the parallel scan).
    """
    states = jax.lax.all_gather(final_state, axis_name)
    decays = jax.lax.all_gather(jnp.broadcast_to(jnp.exp(total_log_decay), final_state.shape), axis_name)

    def step(state, row):
        own, decay = row
        return decay * state + own, state

    before = jax.lax.scan(step, jnp.zeros_like(final_state), (states, decays))[1]
    return before[jax.lax.axis_index(axis_name)]
