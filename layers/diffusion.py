"""Diffusion and flow matching: schedules, noising, single solver steps, guidance. Models stay outside.

Diffusion functions speak of abar, the share of signal variance left at a level (1 = clean, 0 = noise); levels broadcast
against the samples' leading axes. Flow functions speak of time t from 0 (noise) to 1 (data).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

__all__ = [
    "add_noise",
    "classifier_free_guidance",
    "ddim_step",
    "ddpm_step",
    "diffusion_schedule",
    "diffusion_timesteps",
    "flow_pair",
    "integrate_flow",
    "logit_normal_times",
    "prediction_target",
    "renoise",
    "shift_times",
    "split_prediction",
]

Level = Float[Array, "*b"] | float

_SCHEDULES = ("linear", "scaled_linear", "squaredcos")
_PREDICTIONS = ("noise", "sample", "velocity")
_METHODS = ("euler", "heun", "midpoint")


def diffusion_schedule(
    steps: int, *, kind: str = "linear", first: float = 1e-4, last: float = 0.02, largest: float = 0.999
) -> Float[Array, " T"]:
    """abar_t = prod_{s <= t} (1 - beta_s) for t = 0..T-1, in float32 from float64 sums.

    `kind`: "linear" betas from `first` to `last` (DDPM), "scaled_linear" square roots of betas linear (latent
    diffusion), "squaredcos" abar = cos^2((t/T + 0.008) / 1.008 * pi/2) with betas of at most `largest`. Source:
    arXiv:2006.11239; arXiv:2102.09672, equation 17; card heterogenmanip, "Diffusion".
    """
    if kind not in _SCHEDULES:
        raise ValueError(f"diffusion_schedule: kind {kind!r} is not one of {', '.join(_SCHEDULES)}")
    if kind == "linear":
        betas = np.linspace(first, last, steps)
    elif kind == "scaled_linear":
        betas = np.square(np.linspace(np.sqrt(first), np.sqrt(last), steps))
    else:
        signal = np.square(np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2))
        betas = np.minimum(1 - signal[1:] / signal[:-1], largest)
    return jnp.asarray(np.cumprod(1 - betas), jnp.float32)


def diffusion_timesteps(train_steps: int, steps: int, *, spacing: str = "leading", offset: int = 0) -> Int[Array, " N"]:
    """N of the T training steps, from noisy to clean: t = T-1..0 thinned out.

    `spacing`: "leading" 0, r, 2r, ... + offset with r = T // N; "trailing" T - 1, T - 1 - T/N, ...; "linspace" both
    ends included. Source: arXiv:2305.08891, table 2.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"diffusion_timesteps: steps {steps} is not in 1..{train_steps}, the training steps")
    chosen = {
        "leading": lambda: (np.arange(steps) * (train_steps // steps))[::-1] + offset,
        "trailing": lambda: np.round(np.arange(train_steps, 0, -train_steps / steps)) - 1,
        "linspace": lambda: np.round(np.linspace(0, train_steps - 1, steps))[::-1],
    }
    if spacing not in chosen:
        raise ValueError(f"diffusion_timesteps: spacing {spacing!r} is not one of {', '.join(chosen)}")
    return jnp.asarray(chosen[spacing](), jnp.int32)


def _along(level, x):
    """A level per sample (or one for all) against the samples' axes."""
    level = jnp.asarray(level, jnp.float32)
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))


@jax.jit
def add_noise(sample: Float[Array, "*B"], noise: Float[Array, "*B"], abar: Level) -> Float[Array, "*B"]:
    """x = sqrt(abar) x0 + sqrt(1 - abar) noise. Source: arXiv:2006.11239, equation 4."""
    level = _along(abar, sample)
    return (jnp.sqrt(level) * sample + jnp.sqrt(1 - level) * noise).astype(sample.dtype)


@jax.jit
def renoise(x: Float[Array, "*B"], noise: Float[Array, "*B"], abar: Level, new_abar: Level) -> Float[Array, "*B"]:
    """sqrt(abar'/abar) x + sqrt(1 - abar'/abar) noise: on to a noisier level. Source: card sow, Mechanism C."""
    return add_noise(x, noise, jnp.asarray(new_abar) / jnp.asarray(abar))


def _check_prediction(name: str, kind: str):
    if kind not in _PREDICTIONS:
        raise ValueError(f"{name}: prediction {kind!r} is not one of {', '.join(_PREDICTIONS)}")


@partial(jax.jit, static_argnames=("prediction",))
def prediction_target(
    sample: Float[Array, "*B"], noise: Float[Array, "*B"], abar: Level, *, prediction: str = "noise"
) -> Float[Array, "*B"]:
    """What the model shall say: the "noise", the clean "sample", or the "velocity" sqrt(abar) noise - sqrt(1-abar) x0.

    Source: arXiv:2202.00512, appendix D.
    """
    _check_prediction("prediction_target", prediction)
    level = _along(abar, sample)
    targets = {
        "noise": lambda: noise,
        "sample": lambda: sample,
        "velocity": lambda: jnp.sqrt(level) * noise - jnp.sqrt(1 - level) * sample,
    }
    return targets[prediction]().astype(sample.dtype)


@partial(jax.jit, static_argnames=("prediction",))
def split_prediction(
    x: Float[Array, "*B"], output: Float[Array, "*B"], abar: Level, *, prediction: str = "noise"
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(x0, noise) that the model's output means at x: the inverse of `prediction_target` and `add_noise`.

    abar must lie strictly between 0 and 1 for "noise" (above 0) and "sample" (below 1). Source: arXiv:2202.00512.
    """
    _check_prediction("split_prediction", prediction)
    level = _along(abar, x)
    signal, spread = jnp.sqrt(level), jnp.sqrt(1 - level)
    if prediction == "noise":
        return (x - spread * output) / signal, output
    if prediction == "sample":
        return output, (x - signal * output) / spread
    return signal * x - spread * output, signal * output + spread * x


@partial(jax.jit, static_argnames=("prediction", "clip", "direction"))
def ddim_step(
    x: Float[Array, "*B"],
    output: Float[Array, "*B"],
    abar: Level,
    next_abar: Level,
    *,
    prediction: str = "noise",
    eta: Float[Array, ""] | float = 0.0,
    noise: Float[Array, "*B"] | None = None,
    clip: float | None = None,
    direction: str = "consistent",
) -> Float[Array, "*B"]:
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s noise, s = eta sqrt((1-abar')/(1-abar) (1 - abar/abar')).

    abar' > abar denoises; abar' < abar with eta = 0 is DDIM inversion, the same formula the other way. `eta` 0 is
    deterministic, 1 has DDPM's variance and needs `noise`. `clip` holds x0 in [-clip, clip]. `direction` says what eps
    is: "consistent" what the model's output means before clipping, "clipped" what the clipped x0 leaves of x, "raw" the
    output itself whatever it predicts (as some released samplers have it). Source: arXiv:2010.02502, equation 12; card
    heterogenmanip, "Sampler quirk".
    """
    if direction not in ("consistent", "clipped", "raw"):
        raise ValueError(f"ddim_step: direction {direction!r} is not one of consistent, clipped, raw")
    sample, eps = split_prediction(x, output, abar, prediction=prediction)
    level, next_level = _along(abar, x), _along(next_abar, x)
    if clip is not None:
        sample = jnp.clip(sample, -clip, clip)
    if direction == "clipped":
        eps = (x - jnp.sqrt(level) * sample) / jnp.sqrt(1 - level)
    elif direction == "raw":
        eps = output
    variance = jnp.square(eta) * jnp.maximum((1 - next_level) / (1 - level) * (1 - level / next_level), 0.0)
    result = jnp.sqrt(next_level) * sample + jnp.sqrt(jnp.maximum(1 - next_level - variance, 0.0)) * eps
    if noise is not None:
        result = result + jnp.sqrt(variance) * noise
    return result.astype(x.dtype)


@partial(jax.jit, static_argnames=("prediction", "clip", "variance"))
def ddpm_step(
    x: Float[Array, "*B"],
    output: Float[Array, "*B"],
    abar: Level,
    next_abar: Level,
    noise: Float[Array, "*B"],
    *,
    prediction: str = "noise",
    clip: float | None = None,
    variance: str = "small",
) -> Float[Array, "*B"]:
    """A sample of q(x' | x, x0) with the model's x0: ancestral sampling from abar to abar' > abar.

    `variance`: "small" that of the posterior, beta (1 - abar') / (1 - abar); "large" beta = 1 - abar / abar'. At
    abar' = 1 it is x0 without noise. Source: arXiv:2006.11239, equations 6-7.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm_step: variance {variance!r} is not one of small, large")
    sample, _ = split_prediction(x, output, abar, prediction=prediction)
    if clip is not None:
        sample = jnp.clip(sample, -clip, clip)
    level, next_level = _along(abar, x), _along(next_abar, x)
    beta = 1 - level / next_level
    mean = jnp.sqrt(next_level) * beta / (1 - level) * sample
    mean = mean + jnp.sqrt(level / next_level) * (1 - next_level) / (1 - level) * x
    spread = jnp.sqrt(beta * (1 - next_level) / (1 - level) if variance == "small" else beta)
    return (mean + jnp.where(next_level < 1, spread, 0.0) * noise).astype(x.dtype)


@jax.jit
def flow_pair(
    data: Float[Array, "*B"], noise: Float[Array, "*B"], time: Level
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(x_t, v) with x_t = (1 - t) noise + t data and v = data - noise: what rectified flow trains on.

    Models in terms of sigma = 1 - t and noise - data are the same with the sign of v turned. Source: arXiv:2209.03003,
    equation 1; arXiv:2210.02747.
    """
    level = _along(time, data)
    return ((1 - level) * noise + level * data).astype(data.dtype), data - noise


@partial(jax.jit, static_argnames=("shape", "mean", "deviation"))
def logit_normal_times(
    key: PRNGKeyArray, *, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0
) -> Float[Array, "..."]:
    """t = sigmoid(mean + deviation z), z normal: training times that favour the middle. Source: arXiv:2403.03206."""
    return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, shape))


@jax.jit
def shift_times(time: Float[Array, "*T"], shift: Float[Array, ""] | float) -> Float[Array, "*T"]:
    """t' = t / (s - (s - 1) t), which is sigma' = s sigma / (1 + (s - 1) sigma) for sigma = 1 - t: longer at the noise.

    Source: arXiv:2403.03206, equation 23; card tie, "Sampler".
    """
    return time / (shift - (shift - 1) * time)


@partial(jax.jit, static_argnames=("interval",))
def classifier_free_guidance(
    conditional: Float[Array, "*B"],
    unconditional: Float[Array, "*B"],
    scale: Float[Array, ""] | float,
    *,
    time: Level | None = None,
    interval: tuple[float, float] | None = None,
) -> Float[Array, "*B"]:
    """u + w (c - u); with `time` and `interval` only where low <= time <= high, and c elsewhere.

    w = 1 is the conditional model, 0 the unconditional one. Source: arXiv:2207.12598; interval arXiv:2404.07724.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if interval is None:
        return guided
    if time is None:
        raise ValueError("classifier_free_guidance: an interval needs the time that it is compared with")
    level = _along(time, conditional)
    return jnp.where((level >= interval[0]) & (level <= interval[1]), guided, conditional)


def integrate_flow(
    velocity: Callable[[Float[Array, "*B"], Float[Array, ""]], Float[Array, "*B"]],
    x: Float[Array, "*B"],
    times: Float[Array, " N"],
    *,
    method: str = "euler",
    return_path: bool = False,
) -> Float[Array, "*B"] | tuple[Float[Array, "*B"], Float[Array, "..."]]:
    """Solves dx/dt = velocity(x, t) along `times`, which may run either way; the path has the N states, x first.

    `method`: "euler" one call a step, error O(h); "heun" (trapezoid) and "midpoint" two calls, error O(h^2). Jit what
    calls it. Source: arXiv:2206.00364, algorithm 1; card hyperdit, "Sampling".
    """
    if method not in _METHODS:
        raise ValueError(f"integrate_flow: method {method!r} is not one of {', '.join(_METHODS)}")

    def step(x, interval):
        start, stop = interval
        size = stop - start
        slope = velocity(x, start)
        if method == "heun":
            slope = (slope + velocity((x + size * slope).astype(x.dtype), stop)) / 2
        elif method == "midpoint":
            slope = velocity((x + size / 2 * slope).astype(x.dtype), start + size / 2)
        x = (x + size * slope).astype(x.dtype)
        return x, x if return_path else None

    final, path = jax.lax.scan(step, x, (times[:-1], times[1:]))
    return (final, jnp.concatenate([x[None], path])) if return_path else final
