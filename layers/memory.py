"""Titans: a matrix memory that is trained, by gradient descent with momentum and forgetting, while it is read."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.recurrence import pairwise_decay

__all__ = ["NeuralMemoryState", "neural_memory", "neural_memory_step"]


class NeuralMemoryState(NamedTuple):
    """The memory, its momentum, and the memory at the start of the present chunk with the steps done since then."""

    memory: Float[Array, "B H K V"]
    momentum: Float[Array, "B H K V"]
    anchor: Float[Array, "B H K V"]
    steps: Float[Array, ""]


def _start(query, value, initial):
    if initial is not None:
        return NeuralMemoryState(*(x.astype(jnp.float32) for x in initial))
    zeros = jnp.zeros((query.shape[0], query.shape[2], query.shape[3], value.shape[3]), jnp.float32)
    return NeuralMemoryState(zeros, zeros, zeros, jnp.zeros((), jnp.float32))


def _advance(state: NeuralMemoryState, row, chunk: int):
    q, k, v, log_keep, log_momentum, step_size = row
    anchor = jnp.where(state.steps % chunk == 0, state.memory, state.anchor)
    error = jnp.einsum("bhkv,bhk->bhv", anchor, k) - v
    momentum = jnp.exp(log_momentum)[..., None, None] * state.momentum
    momentum = momentum - k[..., :, None] * (step_size[..., None] * error)[..., None, :]
    memory = jnp.exp(log_keep)[..., None, None] * state.memory + momentum
    return NeuralMemoryState(memory, momentum, anchor, state.steps + 1), jnp.einsum("bhkv,bhk->bhv", memory, q)


def _one_chunk(carry, rows):
    """A chunk's steps written out: memory and momentum are linear in their starts and in the chunk's gradients."""
    memory, momentum = carry
    q, k, v, log_keep, log_momentum, step_size = rows
    keep, carried = pairwise_decay(log_keep), pairwise_decay(log_momentum)
    kept, momentum_kept = (jnp.exp(jnp.cumsum(g, axis=-1)) for g in (log_keep, log_momentum))
    error = k @ memory - v
    # A gradient enters the momentum once and the memory at every later step, as much of it as the momentum still holds.
    reach = (keep @ carried) * step_size[..., None, :]
    momentum_reach = jnp.einsum("bhtj,bhj->bht", keep, momentum_kept)
    output = kept[..., None] * (q @ memory) + momentum_reach[..., None] * (q @ momentum)
    output = output - ((q @ k.swapaxes(-1, -2)) * reach) @ error

    def written(weights):
        return (k * weights[..., None]).swapaxes(-1, -2) @ error

    last = (..., -1, None, None)
    new_memory = kept[last[:2]][..., None, None] * memory + momentum_reach[last[:2]][..., None, None] * momentum
    new_momentum = momentum_kept[last[:2]][..., None, None] * momentum
    new_memory = new_memory - written(reach[..., -1, :])
    new_momentum = new_momentum - written(carried[..., -1, :] * step_size)
    return (new_memory, new_momentum), output


@partial(jax.jit, static_argnames=("chunk", "return_state", "implementation"))
def neural_memory(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L H K"],
    value: Float[Array, "B L H V"],
    log_keep: Float[Array, "B L H"],
    log_momentum: Float[Array, "B L H"],
    step_size: Float[Array, "B L H"],
    *,
    chunk: int = 32,
    initial_state: NeuralMemoryState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L H V"] | tuple[Float[Array, "B L H V"], NeuralMemoryState]:
    """S_t = eta_t S_{t-1} - theta_t k_t (M'^T k_t - v_t)^T,  M_t = omega_t M_{t-1} + S_t,  y_t = M_t^T q_t.

    Titans' long-term memory with a linear memory: each token is a step on 1/2 |M^T k - v|^2 with step size theta,
    momentum eta = exp(log_momentum) and forgetting omega = exp(log_keep) (1 minus the paper's alpha); both lie in
    [0, 1]. The gradient is taken at M', the memory at the start of the token's chunk: `chunk` belongs to the
    definition, 1 is the exact online rule. A token reads its own write. Computed in float32; y has the values' dtype.

    implementation: "reference" steps through time; "chunked" (the default) makes a chunk a few matrix products, and
    takes an `initial_state` for the start of a new chunk: give it states after a multiple of `chunk` tokens.
    O(L (chunk + K) V). Source: card chronovae_hope, "Titans memory"; arXiv:2501.00663, section 3.2.
    """
    if implementation not in (None, "reference", "chunked"):
        raise ValueError(f"neural_memory: implementation {implementation!r} is not one of reference, chunked")
    if chunk < 1:
        raise ValueError(f"neural_memory: chunk {chunk} is not a positive number of tokens")
    rows = [jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (query, key, value, log_keep, log_momentum, step_size)]
    state = _start(query, value, initial_state)
    if implementation == "reference":
        state, output = jax.lax.scan(partial(_advance, chunk=chunk), state, tuple(rows))
    else:
        state, output = _chunked(state, rows, chunk)
    output = jnp.moveaxis(output, 0, 1).astype(value.dtype)
    return (output, state) if return_state else output


def _chunked(state: NeuralMemoryState, rows, chunk: int):
    length = rows[0].shape[0]
    whole = length - length % chunk
    carry, anchor, outputs = (state.memory, state.momentum), state.anchor, []

    def heads_first(x, size):
        """(N, B, H, size, ...) from the time-first rows."""
        return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 3)

    # The last, shorter chunk stands alone: there are no steps that leave memory and momentum both as they are.
    for start, stop, size in ((0, whole, chunk), (whole, length, length - whole)):
        if stop > start:
            parts = tuple(heads_first(x[start:stop], size) for x in rows)

            def step(carry, row):
                (memory, momentum), _ = carry
                after, output = jax.checkpoint(_one_chunk)((memory, momentum), row)
                return (after, memory), output

            (carry, anchor), output = jax.lax.scan(step, (carry, anchor), parts)
            outputs.append(jnp.moveaxis(output, 3, 1).reshape(stop - start, *output.shape[1:3], -1))
    return NeuralMemoryState(*carry, anchor, state.steps + length), jnp.concatenate(outputs)


@partial(jax.jit, static_argnames=("chunk",))
def neural_memory_step(
    query: Float[Array, "B H K"],
    key: Float[Array, "B H K"],
    value: Float[Array, "B H V"],
    log_keep: Float[Array, "B H"],
    log_momentum: Float[Array, "B H"],
    step_size: Float[Array, "B H"],
    state: NeuralMemoryState,
    *,
    chunk: int = 32,
) -> tuple[Float[Array, "B H V"], NeuralMemoryState]:
    """One token of `neural_memory`: (y_t, state). Source: arXiv:2501.00663, section 3.2."""
    rows = tuple(x.astype(jnp.float32) for x in (query, key, value, log_keep, log_momentum, step_size))
    state, output = _advance(state, rows, chunk)
    return output.astype(value.dtype), state
