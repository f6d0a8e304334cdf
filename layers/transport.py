"""Optimal transport: Sinkhorn in the log domain (balanced and unbalanced), its value, a transport loss for events."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["event_transport_loss", "sinkhorn_cost", "sinkhorn_normalize", "sinkhorn_plan"]


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _logsumexp(x, axis):
    """log sum exp along an axis; -inf, with zero gradient, where there is nothing to sum."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.exp(x - top), axis=axis, keepdims=True)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)


@partial(jax.jit, static_argnames=("num_iterations", "epsilon"))
def sinkhorn_normalize(
    scores: Float[Array, "*B N M"],
    *,
    num_iterations: int = 10,
    mask: Bool[Array, "*B N M"] | None = None,
    epsilon: float = 0.0,
) -> Float[Array, "*B N M"]:
    """K = exp(scores), then num_iterations times: K / (row sums + epsilon), K / (column sums + epsilon).

    In logarithms, so that no score is too large (as long as epsilon is small beside the sums). Multiply scores by an
    inverse temperature first. Pairs outside `mask` get 0; rows and columns without pairs stay 0.
    O(num_iterations N M). Source: card rctea, Mechanism 9 (inverse temperature 50, epsilon 1e-6); arXiv:1802.08665.
    """
    logs = _wide(scores)
    if mask is not None:
        logs = jnp.where(mask, logs, -jnp.inf)

    def share(logs, axis):
        total = _logsumexp(logs, axis)
        total = jnp.where(jnp.isfinite(total), total, 0.0)
        return logs - (jnp.logaddexp(total, jnp.log(epsilon)) if epsilon > 0 else total)

    def iterate(logs, _):
        return share(share(logs, -1), -2), None

    return jnp.exp(jax.lax.scan(iterate, logs, None, length=num_iterations)[0]).astype(scores.dtype)


def _marginal(mass, mask, count, batch, dtype):
    """(mass, log mass) with absent points at (0, 0) and a flag for them; 1/n each where no mass is given."""
    present = jnp.ones((*batch, count), bool) if mask is None else mask
    if mass is None:
        share = present / jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1)
        mass = share.astype(dtype)
    else:
        present = present & (mass > 0)
        mass = jnp.where(present, mass.astype(dtype), 0.0)
    return mass, jnp.log(jnp.where(present, mass, 1.0)), present


def _damping(relaxation, regularization):
    return 1.0 if relaxation is None else relaxation / (relaxation + regularization)


def _potentials(kernel, rows, columns, regularization, relaxation, num_iterations):
    """Potentials over epsilon after alternating updates; kernel = -cost / epsilon, -inf outside the problem."""
    damping = _damping(relaxation, regularization)

    def update(other, logs, present, axis):
        total = jnp.squeeze(_logsumexp(kernel + jnp.expand_dims(other, -3 - axis), axis), axis)
        ready = present & jnp.isfinite(total)
        return jnp.where(ready, damping * (logs - jnp.where(ready, total, 0.0)), 0.0)

    def iterate(carry, _):
        row, column = carry
        column = update(row, columns[1], columns[2], -2)
        return (update(column, rows[1], rows[2], -1), column), None

    start = (jnp.zeros_like(rows[0]), jnp.zeros_like(columns[0]))
    return jax.lax.scan(iterate, start, None, length=num_iterations)[0]


def _problem(cost, row_mass, column_mass, row_mask, column_mask, regularization):
    wide = _wide(cost)
    rows = _marginal(row_mass, row_mask, cost.shape[-2], cost.shape[:-2], wide.dtype)
    columns = _marginal(column_mass, column_mask, cost.shape[-1], cost.shape[:-2], wide.dtype)
    allowed = rows[2][..., :, None] & columns[2][..., None, :]
    kernel = jnp.where(allowed, -wide / regularization, -jnp.inf)
    return kernel, rows, columns


@partial(jax.jit, static_argnames=("num_iterations",))
def sinkhorn_plan(
    cost: Float[Array, "*B N M"],
    *,
    regularization: Float[Array, ""] | float,
    row_mass: Float[Array, "*B N"] | None = None,
    column_mass: Float[Array, "*B M"] | None = None,
    row_mask: Bool[Array, "*B N"] | None = None,
    column_mask: Bool[Array, "*B M"] | None = None,
    relaxation: Float[Array, ""] | float | None = None,
    num_iterations: int = 50,
) -> Float[Array, "*B N M"]:
    """P = argmin <P, C> + eps sum P (log P - 1) with row sums a and column sums b, by Sinkhorn in the log domain.

    Masses default to 1/n over present points (masks, True = present); points of mass 0 are absent. With `relaxation`
    rho the marginals are not held but paid for: + rho KL(P 1 | a) + rho KL(P^T 1 | b), unbalanced transport; None is
    balanced and wants equal totals. Columns first, rows last, so that rows are exact. Gradients go through the
    iterations. O(num_iterations N M). Source: arXiv:1306.0895; unbalanced arXiv:1607.05816, section 3; card piano_ot.
    """
    kernel, rows, columns = _problem(cost, row_mass, column_mass, row_mask, column_mask, regularization)
    row, column = _potentials(kernel, rows, columns, regularization, relaxation, num_iterations)
    return jnp.exp(kernel + row[..., :, None] + column[..., None, :]).astype(cost.dtype)


@partial(jax.jit, static_argnames=("num_iterations",))
def sinkhorn_cost(
    cost: Float[Array, "*B N M"],
    *,
    regularization: Float[Array, ""] | float,
    row_mass: Float[Array, "*B N"] | None = None,
    column_mass: Float[Array, "*B M"] | None = None,
    row_mask: Bool[Array, "*B N"] | None = None,
    column_mask: Bool[Array, "*B M"] | None = None,
    relaxation: Float[Array, ""] | float | None = None,
    num_iterations: int = 50,
) -> Float[Array, "*B"]:
    """The minimum that `sinkhorn_plan` attains, from the dual: sum a f + sum b g - eps sum P (balanced).

    Potentials are held fixed in the gradient (envelope theorem): dC gets P, da gets f, db gets g, at the cost of one
    pass and no memory for the iterations; right at convergence, so give enough iterations. With `relaxation` rho the
    first terms are rho sum a (1 - exp(-f / rho)). Arguments as in `sinkhorn_plan`. Source: arXiv:1306.0895;
    arXiv:1607.05816, section 3.
    """
    kernel, rows, columns = _problem(cost, row_mass, column_mass, row_mask, column_mask, regularization)
    row, column = jax.tree.map(
        jax.lax.stop_gradient,
        _potentials(*jax.lax.stop_gradient((kernel, rows, columns, regularization, relaxation)), num_iterations),
    )

    def linear(mass, potential):
        if relaxation is None:
            return jnp.sum(mass * potential * regularization, axis=-1)
        return jnp.sum(mass * relaxation * -jnp.expm1(-potential * regularization / relaxation), axis=-1)

    moved = jnp.sum(jnp.exp(kernel + row[..., :, None] + column[..., None, :]), axis=(-2, -1))
    value = linear(rows[0], row) + linear(columns[0], column) - regularization * moved
    return value.astype(cost.dtype)


@partial(jax.jit, static_argnames=("cap", "unit", "mismatch"))
def event_transport_loss(
    mass: Float[Array, "B T F"],
    events: Bool[Array, "B T F"],
    *,
    cap: float = 5.0,
    unit: float | None = None,
    mismatch: float | None = None,
    mass_weight: Float[Array, ""] | float = 1.0,
) -> Float[Array, " B"]:
    """(sum M C + mass_weight sum_n |m_n - 1|) / max(1, N): the cost of moving predicted mass to N unit events.

    Every cell (t, f) sends its mass M to the nearest event of its pitch f (ties to the earlier one) at
    C = min(|t - t_n|, cap) unit, frames; m_n is what arrives at event n. A pitch without events costs
    mismatch unit a mass. unit defaults to 1 / cap, mismatch to 10 cap. O(T F). Source: card piano_ot, Mechanism 1.
    """
    unit = 1.0 / cap if unit is None else unit
    mismatch = 10.0 * cap if mismatch is None else mismatch
    wide, length = _wide(mass), mass.shape[1]
    frame = jnp.arange(length)[None, :, None]
    far = 2 * length  # farther than any event of the pitch
    previous = jax.lax.cummax(jnp.where(events, frame, -far), axis=1)
    following = jax.lax.cummin(jnp.where(events, frame, 3 * length), axis=1, reverse=True)
    nearest = jnp.where(frame - previous <= following - frame, previous, following)
    known = jnp.any(events, axis=1, keepdims=True)
    distance = jnp.minimum(jnp.abs(frame - nearest).astype(wide.dtype), cap)
    moved = jnp.sum(wide * unit * jnp.where(known, distance, mismatch), axis=(1, 2))

    def collect(mass, nearest):
        return jax.ops.segment_sum(mass, nearest, length)

    along = jax.vmap(jax.vmap(collect, in_axes=1, out_axes=1))
    received = along(wide, jnp.where(known, nearest, length))
    missing = jnp.sum(jnp.where(events, jnp.abs(received - 1.0), 0.0), axis=(1, 2))
    count = jnp.maximum(jnp.sum(events, axis=(1, 2)), 1)
    return ((moved + mass_weight * missing) / count).astype(mass.dtype)
