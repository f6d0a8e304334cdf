"""Diagonal linear recurrences: what every recurrent mixer reduces to, and the causal convolution that goes before it.

One contract for all recurrent mixers of the package: time is axis 1; decays are given as logarithms (0 keeps the state,
-inf forgets it); the state is float32 (or complex64); `initial_state` is optional; the final state is returned on
request, and is what the `_step` form takes and gives.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

__all__ = [
    "causal_depthwise_conv",
    "causal_depthwise_conv_step",
    "linear_recurrence",
    "pairwise_decay",
]


@jax.jit
def pairwise_decay(log_decay: Float[Array, "*B T"]) -> Float[Array, "*B T T"]:
    """P_ts = exp(sum_{s < r <= t} g_r) for s <= t, 0 above the diagonal: what is left at t of what was written at s.

    The sums are built up, not subtracted from one another, so that a decay of -inf (forget everything) gives zeros and
    not NaN. O(T^2). Source: arXiv:2405.21060, section 6 (the "segment sum").
    """
    length = log_decay.shape[-1]
    later, earlier = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    table = jnp.where(later > earlier, log_decay[..., :, None].astype(jnp.float32), 0.0)
    return jnp.where(later >= earlier, jnp.exp(jnp.cumsum(table, axis=-2)), 0.0)


def _combine(first, second):
    (decay_1, value_1), (decay_2, value_2) = first, second
    return decay_1 * decay_2, decay_2 * value_1 + value_2


def _scan_forward(decay, x, initial, reverse=False):
    def step(state, row):
        state = row[0] * state + row[1]
        return state, state

    return jax.lax.scan(step, initial, (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(x, 1, 0)), reverse=reverse)[1]


@jax.custom_vjp
def _sequential(decay, x, initial):
    return jnp.moveaxis(_scan_forward(decay, x, initial), 0, 1)


def _sequential_forward(decay, x, initial):
    states = _sequential(decay, x, initial)
    return states, (decay, initial, states)


def _sequential_backward(saved, d_states):
    decay, initial, states = saved
    # The same recurrence from the end: what comes back through state t+1 is multiplied by decay t+1.
    following = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    d_x = jnp.moveaxis(_scan_forward(following, d_states, jnp.zeros_like(initial), reverse=True), 0, 1)
    previous = jnp.concatenate([initial[:, None], states[:, :-1]], axis=1)
    return d_x * previous, d_x, d_x[:, 0] * decay[:, 0]


_sequential.defvjp(_sequential_forward, _sequential_backward)


@partial(jax.jit, static_argnames=("return_state", "implementation"))
def linear_recurrence(
    x: Inexact[Array, "B L *S"],
    log_decay: Inexact[Array, "*broadcastable"],
    *,
    initial_state: Inexact[Array, "B *S"] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Inexact[Array, "B L *S"] | tuple[Inexact[Array, "B L *S"], Inexact[Array, "B *S"]]:
    """h_t = exp(g_t) h_{t-1} + x_t for t = 1..L, every channel for itself.

    `log_decay` g broadcasts to x; both may be complex (diagonal state-space models). States are float32 or complex64,
    the output has x's dtype. implementation: "reference" and "sequential" step through time, the latter with its own
    backward pass (fast on CPU); "associative" is a parallel prefix scan of depth log L (accelerators). O(L).
    Source: arXiv:1709.04057.
    """
    kind = jnp.complex64 if jnp.iscomplexobj(x) or jnp.iscomplexobj(log_decay) else jnp.float32
    wide = x.astype(kind)
    decay = jnp.broadcast_to(jnp.exp(log_decay.astype(kind)), x.shape)
    initial = jnp.zeros_like(wide[:, 0]) if initial_state is None else initial_state.astype(kind)
    if implementation is None:
        states = jax.lax.platform_dependent(decay, wide, initial, cpu=_sequential, default=_associative)
    elif implementation == "sequential":
        states = _sequential(decay, wide, initial)
    elif implementation == "reference":
        states = jnp.moveaxis(_scan_forward(decay, wide, initial), 0, 1)
    elif implementation == "associative":
        states = _associative(decay, wide, initial)
    else:
        raise ValueError(
            f"linear_recurrence: implementation {implementation!r} is not one of reference, sequential, associative"
        )
    output = states.astype(jnp.result_type(x.dtype, jnp.complex64) if kind == jnp.complex64 else x.dtype)
    return (output, states[:, -1]) if return_state else output


def _associative(decay, x, initial):
    x = x.at[:, 0].add(decay[:, 0] * initial)
    return jax.lax.associative_scan(_combine, (decay, x), axis=1)[1]


# Time steps done at once by `scan_spans`: enough for parallel hardware, few enough to stay near the cores.
_SPAN = 1024


def scan_spans(body: Callable, state, rows: Sequence[Array], *, chunk: int):
    """(state, rows) after body(state, rows) over spans of whole chunks along axis 2, recomputed in the backward pass.

    Rows of zeros fill the last span; they must leave the state as it is. Working memory and what is kept for the
    backward pass do not grow with what `body` makes inside a span.
    """
    length = rows[0].shape[2]
    span = min(max(_SPAN // chunk, 1), -(-length // chunk)) * chunk
    fill = [(0, 0), (0, 0), (0, -length % span)]
    rows = tuple(jnp.pad(x, fill + [(0, 0)] * (x.ndim - 3)) for x in rows)
    if rows[0].shape[2] == span:
        state, output = body(state, rows)
        return state, output[:, :, :length]

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, span, *x.shape[3:]), 2, 0)

    state, output = jax.lax.scan(jax.checkpoint(body), state, tuple(map(cut, rows)))
    output = jnp.moveaxis(output, 0, 2)
    return state, output.reshape(*output.shape[:2], -1, *output.shape[4:])[:, :, :length]


@partial(jax.jit, static_argnames=("return_state",))
def causal_depthwise_conv(
    x: Float[Array, "B L D"],
    kernel: Float[Array, "K D"],
    *,
    bias: Float[Array, " D"] | None = None,
    initial_state: Float[Array, "B P D"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], Float[Array, "B P D"]]:
    """y_t = bias + sum_{j<K} kernel_j x_{t-K+1+j} per channel; what lies before the sequence is `initial_state` or 0.

    The state is the last P = K - 1 inputs, or those before place `lengths` of each row where padding follows. kernel
    [K-1] meets the present input, as in torch's Conv1d with left padding. O(L K D). Source: arXiv:2312.00752, section
    3.4.
    """
    taps, length = kernel.shape[0], x.shape[1]
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype)
    if initial_state.shape[1] != taps - 1:
        raise ValueError(
            f"causal_depthwise_conv: initial_state has {initial_state.shape[1]} inputs, a kernel of {taps} needs "
            f"{taps - 1}"
        )
    padded = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    # A few shifted products are one fused loop on every platform; a grouped convolution is slow on CPU.
    wide = sum(padded[:, j : j + length].astype(jnp.float32) * kernel[j].astype(jnp.float32) for j in range(taps))
    if bias is not None:
        wide = wide + bias.astype(jnp.float32)
    output = wide.astype(x.dtype)
    if not return_state:
        return output
    if lengths is None:
        return output, padded[:, length:]
    places = lengths[:, None] + jnp.arange(taps - 1)
    return output, jnp.take_along_axis(padded, places[..., None], axis=1)


@jax.jit
def causal_depthwise_conv_step(
    x: Float[Array, "B D"],
    state: Float[Array, "B P D"],
    kernel: Float[Array, "K D"],
    *,
    bias: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B P D"]]:
    """One time step of `causal_depthwise_conv`, and the state after it. Source: arXiv:2312.00752, section 3.4."""
    output, state = causal_depthwise_conv(x[:, None], kernel, bias=bias, initial_state=state, return_state=True)
    return output[:, 0], state
