"""Damped exponential moving averages over time."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.recurrence import linear_recurrence

__all__ = ["damped_ema", "damped_ema_step"]


@partial(jax.jit, static_argnames=("return_state", "implementation"))
def damped_ema(
    x: Float[Array, "B L *D"],
    alpha: Float[Array, "*D"],
    delta: Float[Array, "*D"],
    *,
    initial_state: Float[Array, "B *D"] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L *D"] | tuple[Float[Array, "B L *D"], Float[Array, "B *D"]]:
    """l_t = alpha x_t + (1 - alpha delta) l_{t-1} per channel, l_0 = `initial_state` or 0.

    `alpha` in [0, 1] weighs the present and `delta` in [0, 1] damps the past: delta = 1 is the plain moving average,
    alpha = 0 keeps the state for ever. Implementations are those of `linear_recurrence`. O(L D). Source: card
    demaformer, "DEMA scan"; arXiv:2209.10655, equation 2.
    """
    weight = alpha.astype(jnp.float32)
    states, final = linear_recurrence(
        weight * x.astype(jnp.float32), jnp.log1p(-weight * delta.astype(jnp.float32)), initial_state=initial_state,
        return_state=True, implementation=implementation,
    )  # fmt: skip
    output = states.astype(x.dtype)
    return (output, final) if return_state else output


@jax.jit
def damped_ema_step(
    x: Float[Array, "B *D"], alpha: Float[Array, "*D"], delta: Float[Array, "*D"], state: Float[Array, "B *D"]
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """One time step of `damped_ema`: (output, state). Source: arXiv:2209.10655, equation 2."""
    weight = alpha.astype(jnp.float32)
    state = weight * x.astype(jnp.float32) + (1 - weight * delta.astype(jnp.float32)) * state
    return state.astype(x.dtype), state
