"""Spiking neurons: a step with a surrogate slope, leaky integration with one or many spikes a step, current-based ones.

Time is axis 1 and any axes of units follow; the membrane is kept in float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = [
    "CurrentBasedState",
    "current_based_step",
    "integrate_and_count",
    "leaky_integrate_fire",
    "surrogate_spike",
]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _step(x, slope):
    return (x > 0).astype(x.dtype)


@_step.defjvp
def _step_jvp(slope, primals, tangents):
    (x,), (dx,) = primals, tangents
    return _step(x, slope), dx / jnp.square(1 + slope * jnp.abs(x))


@partial(jax.jit, static_argnames=("slope",))
def surrogate_spike(x: Float[Array, "*shape"], *, slope: float = 25.0) -> Float[Array, "*shape"]:
    """1 where x > 0, else 0, with the slope of a fast sigmoid: ds/dx = 1 / (1 + slope |x|)^2.

    Source: arXiv:1705.11146 (SuperSpike), equation 5; card neuromorphic_sign, sR network.
    """
    return _step(x, slope)


def _scan(step, current: Array, initial_state: Array | None) -> tuple[Array, Array]:
    """(outputs of `step` along axis 1, last state), both float32."""
    wide = jnp.moveaxis(current.astype(jnp.float32), 1, 0)
    start = jnp.zeros(wide.shape[1:], jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    last, outputs = jax.lax.scan(step, start, wide)
    return jnp.moveaxis(outputs, 0, 1), last


@partial(jax.jit, static_argnames=("decay", "threshold", "slope", "return_state"))
def leaky_integrate_fire(
    current: Float[Array, "B T *units"],
    *,
    decay: float,
    threshold: float = 1.0,
    slope: float = 25.0,
    initial_state: Float[Array, "B *units"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T *units"] | tuple[Float[Array, "B T *units"], Float[Array, "B *units"]]:
    """v_t = decay v_(t-1) + I_t - threshold [v_(t-1) > threshold], s_t = [v_t > threshold]: reset one step later.

    The spike has the slope of `surrogate_spike`, its reset none. The state is v, dimensionless as I is. O(T) a unit.
    Source: arXiv:2109.12894 (snntorch's Leaky); card neuromorphic_sign, sR network.
    """

    def step(v, i):
        v = decay * v + i - threshold * (v > threshold).astype(v.dtype)
        return v, _step(v - threshold, slope)

    spikes, last = _scan(step, current, initial_state)
    spikes = spikes.astype(current.dtype)
    return (spikes, last) if return_state else spikes


@partial(jax.jit, static_argnames=("decay", "threshold", "return_state"))
def integrate_and_count(
    current: Float[Array, "B T *units"],
    *,
    decay: float,
    threshold: float = 1.0,
    initial_state: Float[Array, "B *units"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T *units"] | tuple[Float[Array, "B T *units"], Float[Array, "B *units"]]:
    """v <- decay v + (1 - decay) I_t; s_t = floor(v / threshold) where v > 0; v <- v - threshold s_t.

    Several spikes a step: where the drive is large, s is (1 - decay) I to less than one spike, and so is its gradient,
    straight through the floor. O(T) a unit. Source: Sheik et al. 2023 (sinabs' LIF); card neuromorphic_sign, Saliency.
    """

    def step(v, i):
        v = decay * v + (1 - decay) * i
        exact = jnp.maximum(v, 0.0) / threshold
        spikes = exact + jax.lax.stop_gradient(jnp.floor(exact) - exact)
        return v - threshold * spikes, spikes

    spikes, last = _scan(step, current, initial_state)
    spikes = spikes.astype(current.dtype)
    return (spikes, last) if return_state else spikes


class CurrentBasedState(NamedTuple):
    """Current-based neurons between two steps."""

    voltage: Float[Array, "*units"]  # above rest
    excitatory: Float[Array, "*units"]  # synaptic currents
    inhibitory: Float[Array, "*units"]
    waiting: Int[Array, "*units"]  # refractory steps that are left


@partial(
    jax.jit,
    static_argnames=(
        "membrane_decay", "excitatory_decay", "inhibitory_decay", "resistance", "threshold", "refractory",
    ),
)  # fmt: skip
def current_based_step(
    state: CurrentBasedState,
    excitatory: Float[Array, "*units"],
    inhibitory: Float[Array, "*units"],
    *,
    membrane_decay: float,
    excitatory_decay: float,
    inhibitory_decay: float,
    resistance: float = 1.0,
    threshold: float = 1.0,
    refractory: int = 1,
) -> tuple[CurrentBasedState, Float[Array, "*units"]]:
    """One step of PyNN's IF_curr_exp: i <- decay i + arriving weights, v <- v + (1 - decay_m)(R (i_e - i_i) - v).

    v >= threshold fires: v is 0, the rest, for `refractory` further steps. Decays are exp(-step / time constant);
    currents times `resistance` are in units of the threshold. Gives (state, spikes). No gradient passes a spike.
    Source: Davison et al. 2009 (PyNN); card neuromorphic_sign, Hardware stage.
    """
    arriving = excitatory_decay * state.excitatory + excitatory, inhibitory_decay * state.inhibitory + inhibitory
    drive = resistance * (arriving[0] - arriving[1])
    ready = state.waiting == 0
    voltage = jnp.where(ready, state.voltage + (1 - membrane_decay) * (drive - state.voltage), 0.0)
    fires = ready & (voltage >= threshold)
    waiting = jnp.where(fires, refractory, jnp.maximum(state.waiting - 1, 0))
    return CurrentBasedState(jnp.where(fires, 0.0, voltage), *arriving, waiting), fires.astype(voltage.dtype)
