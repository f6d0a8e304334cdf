"""The delta rule: linear attention whose state is corrected towards what it should have answered."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.recurrence import pairwise_decay, scan_spans
from layers.triangular import solve_lower

__all__ = ["delta_rule", "delta_rule_step"]

_IMPLEMENTATIONS = ("reference", "chunked")


@partial(jax.jit, static_argnames=("scale", "return_state", "chunk", "implementation"))
def delta_rule(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L H K"],
    value: Float[Array, "B L H V"],
    beta: Float[Array, "B L H"],
    log_decay: Float[Array, "B L H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    return_state: bool = False,
    chunk: int = 64,
    implementation: str | None = None,
) -> Float[Array, "B L H V"] | tuple[Float[Array, "B L H V"], Float[Array, "B H K V"]]:
    """S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,  o_t = scale S_t^T q_t,  a_t = exp(log_decay_t).

    DeltaNet without `log_decay`, Gated DeltaNet with it. Keys are taken as given: normalise them to unit length, or the
    state may grow without bound. `beta` is a writing strength in [0, 1] (0 writes nothing, 1 replaces). `scale` is
    1/sqrt(K) if not given. Computed in float32; o has the values' dtype.

    implementation: "reference" steps through time; "chunked" (the default) solves one triangular system a chunk.
    O(L (chunk + K) (K + V)). Source: arXiv:2406.06484, section 3; arXiv:2412.06464, section 3.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"delta_rule: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}")
    batch, length, heads, key_size = query.shape
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), jnp.float32)
    scale = key_size**-0.5 if scale is None else scale
    initial = jnp.zeros((batch, heads, key_size, value.shape[-1]), jnp.float32)
    if initial_state is not None:
        initial = initial_state.astype(jnp.float32)
    rows = tuple(jnp.moveaxis(x.astype(jnp.float32), 2, 1) for x in (query * scale, key, value, beta, log_decay))
    if implementation == "reference":
        final, output = _reference(initial, rows)
    else:
        chunk = min(chunk, length)
        final, output = scan_spans(partial(_span, chunk=chunk), initial, rows, chunk=chunk)
    output = jnp.moveaxis(output, 1, 2).astype(value.dtype)
    return (output, final) if return_state else output


def _step(state, row):
    q, k, v, beta, g = row
    state = jnp.exp(g)[..., None, None] * state
    error = v - jnp.sum(state * k[..., :, None], axis=-2)
    state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
    return state, jnp.sum(state * q[..., :, None], axis=-2)


def _reference(initial, rows):
    final, output = jax.lax.scan(_step, initial, tuple(jnp.moveaxis(x, 2, 0) for x in rows))
    return final, jnp.moveaxis(output, 0, 2)


def _span(initial, rows, *, chunk: int):
    """What a chunk writes, w_t = beta_t (v_t - what the state says), solves a unit lower-triangular system.

    w_t needs the writes before it in the chunk and the state at the chunk's start; it is linear in that state, so the
    system is solved for all chunks at once and only small products remain in the loop over chunks.
    """
    q, k, v, beta, g = (x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]) for x in rows)
    left = pairwise_decay(g)
    since_start = jnp.exp(jnp.cumsum(g, axis=-1))[..., None]
    # What is on the diagonal is not read: the system's own is 1.
    system = beta[..., None] * left * (k @ k.swapaxes(-1, -2))
    sides = beta[..., None] * jnp.concatenate([v, since_start * k], axis=-1)
    solved = solve_lower(system, sides, unit_diagonal=True)
    own, of_state = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    scores = (q @ k.swapaxes(-1, -2)) * left
    to_end = (k * left[..., -1, :, None]).swapaxes(-1, -2)
    kept = jnp.exp(jnp.sum(g, axis=-1))[..., None, None]

    def step(state, row):
        own, of_state, scores, to_end, kept, q_decayed = row
        written = own - of_state @ state
        return kept * state + to_end @ written, scores @ written + q_decayed @ state

    rows = (own, of_state, scores, to_end, kept, q * since_start)
    final, output = jax.lax.scan(step, initial, tuple(jnp.moveaxis(x, 2, 0) for x in rows))
    output = jnp.moveaxis(output, 0, 2)
    return final, output.reshape(*output.shape[:2], -1, output.shape[-1])


@partial(jax.jit, static_argnames=("scale",))
def delta_rule_step(
    query: Float[Array, "B H K"],
    key: Float[Array, "B H K"],
    value: Float[Array, "B H V"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H K V"],
    log_decay: Float[Array, "B H"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One time step of `delta_rule`: (o_t, S_t). Source: arXiv:2412.06464, section 3."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    g = jnp.zeros_like(beta) if log_decay is None else log_decay
    state, output = _step(
        state.astype(jnp.float32), [x.astype(jnp.float32) for x in (query * scale, key, value, beta, g)]
    )
    return output.astype(value.dtype), state
