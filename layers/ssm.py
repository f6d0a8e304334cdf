"""Selective state spaces: the S6 scan of Mamba and the state-space dual form of Mamba-2."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.gated_linear import gated_linear_attention, gated_linear_attention_step

__all__ = [
    "selective_scan",
    "selective_scan_step",
    "state_space_dual",
    "state_space_dual_step",
]

# Time steps whose states are kept at once: they fit a core's cache, and the states at the chunks' starts are few.
_CHUNK = 16
_ASSOCIATIVE_CHUNK = 256
_IMPLEMENTATIONS = ("reference", "chunked", "associative")


def _advance(log_rates, state, row):
    """One step of the scan: state (B, G, N, P), inputs (B, G, P), input and output maps (B, G, N)."""
    x, step, b, c = row
    state = jnp.exp(step[..., None, :] * log_rates) * state + b[..., None] * (step * x)[..., None, :]
    return state, jnp.sum(state * c[..., None], axis=-2)


def _cut(x, chunk: int):
    """(B, L, ...) as (L / chunk, chunk, B, ...); a shorter sequence is one chunk."""
    return jnp.moveaxis(x, 1, 0).reshape(-1, min(chunk, x.shape[1]), x.shape[0], *x.shape[2:])


def _join(x):
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, 1)


@jax.custom_vjp
def _chunked(x, step, log_rates, b, c, initial):
    return _chunked_forward(x, step, log_rates, b, c, initial)[0]


def _chunked_forward(x, step, log_rates, b, c, initial):
    def chunk(start, rows):
        x, step, b, c = rows
        decay = jnp.exp(step[..., None, :] * log_rates)

        def advance(state, row):
            decay, drive, b = row
            state = decay * state + b[..., None] * drive[..., None, :]
            return state, state

        final, states = jax.lax.scan(advance, start, (decay, step * x, b))
        return final, (jnp.einsum("tbgnp,tbgn->tbgp", states, c), start)

    final, (y, starts) = jax.lax.scan(chunk, initial, tuple(_cut(v, _CHUNK) for v in (x, step, b, c)))
    return (_join(y), final), (x, step, log_rates, b, c, starts)


def _chunked_backward(saved, gradients):
    """Chunks from the last to the first: states once more from the chunk's start, then the adjoint recurrence.

    Only the two recurrences run step by step; all that can be done for a whole chunk at once is.
    """
    x, step, log_rates, b, c, starts = saved
    d_y, d_final = gradients

    def chunk(carry, rows):
        (x, step, b, c, d_y), start = rows
        decay = jnp.exp(step[..., None, :] * log_rates)
        drive = step * x

        def forward(state, row):
            decay, drive, b = row
            kept = decay * state
            return kept + b[..., None] * drive[..., None, :], kept

        def backward(carry, row):
            d_state, d_rates = carry
            decay, kept, step, c, d_y = row
            d_state = d_state + c[..., None] * d_y[..., None, :]
            d_log_decay = d_state * kept
            d_rates = d_rates + d_log_decay * step[..., None, :]
            return (decay * d_state, d_rates), (d_state, d_log_decay * log_rates)

        kept = jax.lax.scan(forward, start, (decay, drive, b))[1]
        carry, (d_states, d_steps) = jax.lax.scan(backward, carry, (decay, kept, step, c, d_y), reverse=True)
        # Sums as products: XLA's own reductions of fused operands are several times slower on a CPU.
        d_drive = jnp.einsum("tbgnp,tbgn->tbgp", d_states, b)
        d_step = jnp.einsum("tbgnp,tbgn->tbgp", d_steps, jnp.ones_like(b)) + d_drive * x
        d_b = jnp.einsum("tbgnp,tbgp->tbgn", d_states, drive)
        d_c = jnp.einsum("tbgnp,tbgp->tbgn", kept, d_y) + jnp.einsum("tbgp,tbgp->tbg", drive, d_y)[..., None] * b
        return carry, (d_drive * step, d_step, d_b, d_c)

    rows = tuple(_cut(v, _CHUNK) for v in (x, step, b, c, d_y)), starts
    no_rates = jnp.zeros((x.shape[0], *log_rates.shape), log_rates.dtype)
    (d_initial, d_rates), outputs = jax.lax.scan(chunk, (d_final, no_rates), rows, reverse=True)
    d_x, d_step, d_b, d_c = map(_join, outputs)
    return d_x, d_step, jnp.sum(d_rates, axis=0), d_b, d_c, d_initial


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _reference(x, step, log_rates, b, c, initial):
    rows = tuple(jnp.moveaxis(v, 1, 0) for v in (x, step, b, c))
    final, y = jax.lax.scan(partial(_advance, log_rates), initial, rows)
    return jnp.moveaxis(y, 0, 1), final


def _associative(x, step, log_rates, b, c, initial):
    """Parallel within chunks, so that depth is logarithmic and memory linear in one chunk."""

    @jax.checkpoint
    def chunk(state, rows):
        x, step, b, c = rows
        log_decay = step[..., None, :] * log_rates
        drive = b[..., None] * (step * x)[..., None, :]

        def combine(first, second):
            return first[0] + second[0], jnp.exp(second[0]) * first[1] + second[1]

        total, own = jax.lax.associative_scan(combine, (log_decay, drive), axis=0)
        states = own + jnp.exp(total) * state
        return states[-1], jnp.einsum("tbgnp,tbgn->tbgp", states, c)

    final, y = jax.lax.scan(chunk, initial, tuple(_cut(v, _ASSOCIATIVE_CHUNK) for v in (x, step, b, c)))
    return _join(y), final


def _grouped(x, groups: int):
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _map_groups(maps):
    """(B, [L,] N) or (B, [L,] G, N) with the group axis."""
    return maps if maps.ndim == 4 else maps[:, :, None]


@partial(jax.jit, static_argnames=("return_state", "implementation"))
def selective_scan(
    x: Float[Array, "B L D"],
    step: Float[Array, "B L D"],
    rates: Float[Array, "D N"],
    input_map: Float[Array, "B L *G N"],
    output_map: Float[Array, "B L *G N"],
    *,
    skip: Float[Array, " D"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """S6: h_t = exp(step_t A) h_{t-1} + step_t x_t B_t,  y_t = C_t . h_t + skip x_t, every channel with N states.

    `rates` is A (negative: it is -exp(A_log)), `step` is Delta after its softplus (0 leaves the state as it is),
    `input_map` and `output_map` are B and C: one for all channels, or (B, L, G, N) for G groups of D / G neighbouring
    channels. The gate SiLU(z) stays outside. Computed in float32; y has x's dtype.

    implementation: "reference" steps through time; "chunked" too, but keeps only the states between chunks of 16 steps
    and has its own backward pass (fast on CPU, memory linear in L D rather than L D N); "associative" is a parallel
    prefix scan inside chunks of 256 (accelerators). O(L D N). Source: arXiv:2312.00752, equation 2 and algorithm 2.
    """
    batch, length, channels = x.shape
    input_map, output_map = _map_groups(input_map), _map_groups(output_map)
    groups, size = input_map.shape[2], rates.shape[1]
    if channels % groups:
        raise ValueError(f"selective_scan: {channels} channels cannot be shared among {groups} groups")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"selective_scan: implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}"
        )
    # States lie as (N, P): the sum over the N states of a channel then adds whole rows.
    log_rates = jnp.moveaxis(rates.astype(jnp.float32).reshape(groups, -1, size), 1, 2)
    arguments = [_grouped(v.astype(jnp.float32), groups) for v in (x, step)]
    arguments += [v.astype(jnp.float32) for v in (input_map, output_map)]
    initial = jnp.zeros((batch, groups, size, channels // groups), jnp.float32)
    if initial_state is not None:
        initial = initial_state.astype(jnp.float32).reshape(batch, groups, -1, size).swapaxes(2, 3)

    def run(scan, chunk):
        def scanned(x, step, b, c, log_rates, initial):
            # Steps of size 0 keep the state, so the sequence can be filled up to whole chunks.
            fill = -length % min(chunk, length)
            x, step, b, c = (jnp.pad(v, ((0, 0), (0, fill), (0, 0), (0, 0))) for v in (x, step, b, c))
            y, final = scan(x, step, log_rates, b, c, initial)
            return y[:, :length], final

        return scanned

    runs = {
        "reference": run(_reference, 1),
        "chunked": run(_chunked, _CHUNK),
        "associative": run(_associative, _ASSOCIATIVE_CHUNK),
    }
    if implementation is None:
        y, final = jax.lax.platform_dependent(
            *arguments, log_rates, initial, cpu=runs["chunked"], default=runs["associative"]
        )
    else:
        y, final = runs[implementation](*arguments, log_rates, initial)
    y = y.reshape(batch, length, channels)
    if skip is not None:
        y = y + skip.astype(jnp.float32) * x.astype(jnp.float32)
    y = y.astype(x.dtype)
    return (y, final.swapaxes(2, 3).reshape(batch, channels, size)) if return_state else y


@jax.jit
def selective_scan_step(
    x: Float[Array, "B D"],
    step: Float[Array, "B D"],
    rates: Float[Array, "D N"],
    input_map: Float[Array, "B *G N"],
    output_map: Float[Array, "B *G N"],
    state: Float[Array, "B D N"],
    *,
    skip: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B D N"]]:
    """One time step of `selective_scan`: (y_t, h_t) from x_t and h_{t-1}. Source: arXiv:2312.00752, equation 2."""
    y, state = selective_scan(
        x[:, None], step[:, None], rates, input_map[:, None], output_map[:, None], skip=skip, initial_state=state,
        return_state=True, implementation="reference",
    )  # fmt: skip
    return y[:, 0], state


def _dual_inputs(x, step, rates, input_map, output_map):
    """(query, key, value, log_decay) of the linear attention that the state-space model is."""
    repeats = x.shape[2] // input_map.shape[2]
    query, key = (jnp.repeat(v, repeats, axis=2) for v in (output_map, input_map))
    value = x.astype(jnp.float32) * step[..., None].astype(jnp.float32)
    return query, key, value, step.astype(jnp.float32) * rates.astype(jnp.float32)


@partial(jax.jit, static_argnames=("chunk", "return_state", "implementation"))
def state_space_dual(
    x: Float[Array, "B L H P"],
    step: Float[Array, "B L H"],
    rates: Float[Array, " H"],
    input_map: Float[Array, "B L G N"],
    output_map: Float[Array, "B L G N"],
    *,
    skip: Float[Array, " H"] | None = None,
    initial_state: Float[Array, "B H N P"] | None = None,
    return_state: bool = False,
    chunk: int = 64,
    implementation: str | None = None,
) -> Float[Array, "B L H P"] | tuple[Float[Array, "B L H P"], Float[Array, "B H N P"]]:
    """SSD (Mamba-2): H_t = exp(step_t a_h) H_{t-1} + B_t (step_t x_t)^T,  y_t = H_t^T C_t + skip_h x_t, per head.

    One decay a head and step, so a chunk is a few matrix products: linear attention with queries C, keys B, values
    step x (`gated_linear_attention`, whose implementations these are). G groups of heads share B and C. O(L (chunk + N)
    P). Source: arXiv:2405.21060, sections 3 and 6.
    """
    if x.shape[2] % input_map.shape[2]:
        raise ValueError(f"state_space_dual: {x.shape[2]} heads cannot be shared among {input_map.shape[2]} groups")
    query, key, value, log_decay = _dual_inputs(x, step, rates, input_map, output_map)
    y, final = gated_linear_attention(
        query, key, value, log_decay, scale=1.0, initial_state=initial_state, return_state=True, chunk=chunk,
        implementation=implementation,
    )  # fmt: skip
    if skip is not None:
        y = y + skip.astype(jnp.float32)[:, None] * x.astype(jnp.float32)
    y = y.astype(x.dtype)
    return (y, final) if return_state else y


@jax.jit
def state_space_dual_step(
    x: Float[Array, "B H P"],
    step: Float[Array, "B H"],
    rates: Float[Array, " H"],
    input_map: Float[Array, "B G N"],
    output_map: Float[Array, "B G N"],
    state: Float[Array, "B H N P"],
    *,
    skip: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H N P"]]:
    """One time step of `state_space_dual`. Source: arXiv:2405.21060, section 3."""
    rows = _dual_inputs(x[:, None], step[:, None], rates, input_map[:, None], output_map[:, None])
    query, key, value, log_decay = (v[:, 0] for v in rows)
    y, state = gated_linear_attention_step(query, key, value, state, log_decay, scale=1.0)
    if skip is not None:
        y = y + skip.astype(jnp.float32)[:, None] * x.astype(jnp.float32)
    return y.astype(x.dtype), state
