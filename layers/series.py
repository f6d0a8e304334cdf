"""Time-series primitives: moving averages, seasonal-trend decomposition, instance normalisation."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "InstanceStatistics",
    "SeasonalTrend",
    "instance_denormalize",
    "instance_normalize",
    "moving_average",
    "series_decomposition",
]


class SeasonalTrend(NamedTuple):
    """The two parts of a decomposed series; they add up to it."""

    seasonal: Float[Array, "B L N"]
    trend: Float[Array, "B L N"]


class InstanceStatistics(NamedTuple):
    """Per-series location and scale, in the units of the series."""

    mean: Float[Array, "B 1 N"]
    scale: Float[Array, "B 1 N"]


@partial(jax.jit, static_argnames=("window",))
def moving_average(x: Float[Array, "B L N"], *, window: int) -> Float[Array, "B L N"]:
    """Centred mean over time: y_t = (1/K) sum_{|j| <= (K-1)/2} x_{t+j}, edge values replicated beyond both ends.

    `window` K is a number of time steps and must be odd, so that the mean has a centre. Summed in float32. Source:
    card ister, "Series decomposition" (Autoformer, arXiv:2106.13008, section 3.1).
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"moving_average: window {window} is not a positive odd number of time steps")
    half = (window - 1) // 2
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (half, half), (0, 0)), mode="edge")
    summed = jax.lax.reduce_window(wide, 0.0, jax.lax.add, (1, window, 1), (1, 1, 1), "valid")
    return (summed / window).astype(x.dtype)


@partial(jax.jit, static_argnames=("window",))
def series_decomposition(x: Float[Array, "B L N"], *, window: int) -> SeasonalTrend:
    """x = seasonal + trend with trend = moving_average(x), seasonal = x - trend.

    `window` is a number of time steps (odd). Source: card ister, "Series decomposition".
    """
    trend = moving_average(x, window=window)
    return SeasonalTrend(x - trend, trend)


@partial(jax.jit, static_argnames=("epsilon",))
def instance_normalize(
    x: Float[Array, "B L N"], *, epsilon: float = 1e-5
) -> tuple[Float[Array, "B L N"], InstanceStatistics]:
    """z = (x - m) / s with m = mean_t x, s = sqrt(var_t x + epsilon) (biased variance), per series and channel.

    No gradient flows through m, one does through s; `instance_denormalize` undoes it. `epsilon` is in squared units of
    x. Source: card ister, Model step 1 (non-stationary transformers, arXiv:2205.14415, equation 1).
    """
    wide = x.astype(jnp.float32)
    mean = jax.lax.stop_gradient(jnp.mean(wide, axis=1, keepdims=True))
    centred = wide - mean
    # The variance is taken of the centred values around *their* mean: zero up to rounding in the forward pass, but it
    # is what makes the gradient that of a variance although the mean itself is held constant.
    scale = jnp.sqrt(jnp.var(centred, axis=1, keepdims=True) + epsilon)
    return (centred / scale).astype(x.dtype), InstanceStatistics(mean, scale)


@jax.jit
def instance_denormalize(z: Float[Array, "B P N"], statistics: InstanceStatistics) -> Float[Array, "B P N"]:
    """y = z s + m: back to the units of the series that the statistics were taken from (its length may differ).

    Source: card ister, Model step 7.
    """
    return (z.astype(jnp.float32) * statistics.scale + statistics.mean).astype(z.dtype)
