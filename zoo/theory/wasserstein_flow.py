"""Multi-head attention as a time-dependent Wasserstein gradient flow (arXiv:2605.18870).

Official code: alexmassucco/Transformers_as_time_dependent_gradient_flows@693474c (MIT). Fidelity: exact.
New: tokens on a sphere descend an interaction energy whose heads D_h(t) move while they do. An identity balances
energy, dissipation and what the moving weights bring in; for Ornstein-Uhlenbeck weights the speed of the tokens fades
as 1/H with the number of heads, for oscillating ones it does not.
Differs: the official flow averages the heads' normalised drifts, which is the energy's gradient only for one head, so
that its dissipation G2 does not balance for more; `exact_dissipation` does, and is computed beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.demo import Check, Demo, Findings, exponent
from zoo.paper import Official, Paper
from zoo.weights.table import Table

__all__ = ["PAPER", "Config", "Flow", "energy", "measure", "oscillating_target", "simulate"]

Drift = Literal["oscillating", "ou", "frozen"]


def oscillating_target(time: Float[Array, ""], num_heads: int, dimension: int) -> Float[Array, "H D D"]:
    """The matrices that oscillating weights run after, one period 2 pi, the heads a phase apart."""
    tau = time + 2 * jnp.pi * jnp.arange(num_heads) / num_heads
    if dimension == 2:
        diagonal = [2 + 1.5 * jnp.cos(tau), 2 - 1.5 * jnp.cos(tau)]
        above = [jnp.sin(2 * tau)]
    elif dimension == 3:
        diagonal = [2 + 1.5 * wave for wave in (jnp.cos(tau), jnp.sin(tau), jnp.cos(tau + jnp.pi / 4))]
        above = [jnp.sin(2 * tau), jnp.sin(tau), jnp.cos(2 * tau)]
    else:
        pairs = dimension * (dimension - 1) // 2
        diagonal = [2 + 1.5 * jnp.cos(tau + 2 * jnp.pi * i / dimension) for i in range(dimension)]
        above = [jnp.sin(2 * tau + 2 * jnp.pi * q / pairs) for q in range(pairs)]
    rows, columns = np.triu_indices(dimension, 1)
    upper = jnp.zeros((num_heads, dimension, dimension)).at[:, rows, columns].set(jnp.stack(above, axis=-1))
    return upper + jnp.swapaxes(upper, 1, 2) + jnp.eye(dimension) * jnp.stack(diagonal, axis=-1)[:, None]


def weight_drift(kind: Drift, weights: Float[Array, "H D D"], time: Float[Array, ""]) -> Float[Array, "H D D"]:
    """f in dD = f(D, t) dt + g dW."""
    if kind == "frozen":
        return jnp.zeros_like(weights)
    if kind == "ou":
        return jnp.eye(weights.shape[-1]) - weights
    return oscillating_target(time, *weights.shape[:2]) - weights


class Measured(NamedTuple):
    """Of one configuration of tokens and heads."""

    energy: Float[Array, ""]
    energy_rate: Float[Array, ""]  # by the weights' motion, at fixed tokens
    slope: Float[Array, ""]  # G2: the official metric slope
    exact_dissipation: Float[Array, ""]  # what the energy really loses by the tokens' motion
    velocity: Float[Array, "N D"]
    kernel: Float[Array, "H N N"]


def energy(x: Float[Array, "N D"], weights: Float[Array, "H D D"]) -> Float[Array, ""]:
    """(1 / 2 H n^2) sum_h,i,j exp(<x_i, D_h x_j>)."""
    return jnp.mean(jnp.exp(jnp.einsum("id,hde,je->hij", x, weights, x))) / 2


def measure(
    x: Float[Array, "N D"], weights: Float[Array, "H D D"], drift: Float[Array, "H D D"], noise_var: float = 0.0
) -> Measured:
    """Energy, its rate, slope and the tokens' velocity v = mean_h P(sum_j A_h D_h x_j), P tangent to the sphere."""
    moved = jnp.einsum("hde,je->hjd", weights, x)
    kernel = jnp.exp(jnp.einsum("id,hjd->hij", x, moved))
    total = jnp.sum(kernel, axis=-1)  # N_h
    pulls = jnp.einsum("hij,hjd->hid", kernel, moved)

    def tangent(w):
        return w - jnp.sum(w * x, axis=-1, keepdims=True) * x

    velocity = jnp.mean(tangent(pulls / total[..., None]), axis=0)
    gradient = jnp.sum(pulls, axis=0) / (len(weights) * len(x) ** 2)
    mobility = 1 / jnp.mean(len(x) / total, axis=0)
    products = jnp.einsum("id,hde,je->hij", x, drift, x)
    spread = noise_var / 4 * (jnp.square(x @ x.T) + 1)  # Ito's term of symmetric noise
    return Measured(
        energy=jnp.mean(kernel) / 2,
        energy_rate=jnp.mean(kernel * (products + spread)) / 2,
        slope=jnp.mean(jnp.sum(jnp.square(velocity), axis=-1) * mobility),
        exact_dissipation=jnp.sum(tangent(gradient) * velocity),
        velocity=velocity,
        kernel=kernel,
    )


class Course(NamedTuple):
    """Records along time; the integrals up to each."""

    t: Float[Array, " R"]
    energy: Float[Array, " R"]
    slope: Float[Array, " R"]
    rate_integral: Float[Array, " R"]
    slope_integral: Float[Array, " R"]
    martingale: Float[Array, " R"]
    exact_integral: Float[Array, " R"]
    tokens: Float[Array, "R N D"]


@partial(jax.jit, static_argnames=("drift", "noise_var", "steps", "dt", "every"))
def simulate(
    x: Float[Array, "N D"],
    weights: Float[Array, "H D D"],
    noise: Float[Array, "S H D D"] | None = None,
    *,
    drift: Drift,
    steps: int,
    dt: float,
    every: int,
    noise_var: float = 0.0,
) -> Course:
    """x <- normalise(x - dt v), D <- D + f dt + g dW, dW = sqrt(dt) (Z + Z') / 2 for the standard normal Z of `noise`.

    Tokens move by the old weights. Records lie before every `every`-th step, without that step's share of the
    integrals, and at the end. The martingale part takes the kernel before the step and the tokens after it.
    """
    root = np.sqrt(noise_var * dt)

    def one(carry, inputs):
        x, weights, sums = carry
        number, z = inputs
        time = number * dt
        rate = weight_drift(drift, weights, time)
        m = measure(x, weights, rate, noise_var)
        record = (m.energy, m.slope, *sums, x)
        after = x - dt * m.velocity
        after = after / jnp.linalg.norm(after, axis=-1, keepdims=True)
        kick = jnp.zeros_like(weights) if z is None else root * (z + jnp.swapaxes(z, 1, 2)) / 2
        noisy = jnp.mean(m.kernel * jnp.einsum("id,hde,je->hij", after, kick, after)) / 2
        gains = (m.energy_rate * dt, m.slope * dt, noisy, m.exact_dissipation * dt)
        sums = tuple(s + g for s, g in zip(sums, gains, strict=True))
        return (after, weights + rate * dt + kick, sums), record

    start = (x, weights, (jnp.zeros((), x.dtype),) * 4)
    (last, weights, sums), history = jax.lax.scan(one, start, (jnp.arange(steps), noise), length=steps)
    m = measure(last, weights, jnp.zeros_like(weights))
    rows = [
        jnp.concatenate([h[::every], value[None]])
        for h, value in zip(history, (m.energy, m.slope, *sums, last), strict=True)
    ]
    return Course(jnp.append(jnp.arange(0, steps, every), steps) * dt, *rows)


# --- the official code ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowConfig:
    """The arguments of the official simulation."""

    drift: Drift = "oscillating"
    noise_var: float = 0.0
    duration: float = 1.0
    dt: float = 0.005
    every: int = 20
    num_paths: int = 1
    seed: int = 0  # of the official generator, whose numbers come in as `noise`


class Flow(nn.Module):
    """`simulate` on every path, as a module without parameters."""

    config: FlowConfig

    def __call__(self, start: Mapping[str, Array]) -> Course:
        """From `x` (N, D), `weights` (H, D, D) and, where they are moved by it, `noise` (S, P, H, D, D)."""
        c = self.config
        options = {
            "drift": c.drift,
            "steps": round(c.duration / c.dt),
            "dt": c.dt,
            "every": c.every,
            "noise_var": c.noise_var,
        }
        noise = start.get("noise")
        paths = [None if noise is None else noise[:, p] for p in range(c.num_paths)]
        courses = [simulate(start["x"], start["weights"], z, **options) for z in paths]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *courses)


_HPARAMS = {
    "drift": "drift",
    "noise_var": "noise_var",
    "T": "duration",
    "dt": "dt",
    "rec": "every",
    "n_paths": "num_paths",
    "seed": "seed",
}


def config_from_official(hparams: Mapping[str, Any]) -> FlowConfig:
    return FlowConfig(**{ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams})


def config_to_official(config: FlowConfig) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}


def no_table(config: FlowConfig) -> Table:
    yield from ()


def flow_example(config: FlowConfig, *, batch_size: int, key: jax.Array) -> dict[str, Array]:
    return {"x": jnp.eye(2), "weights": jnp.ones((1, 2, 2))}


def official_call(model: Flow, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c = model.config
    x, weights = inputs["x0_np"], inputs["Ds_init"]
    course = model.apply(variables, {"x": x, "weights": weights, "noise": inputs.get("Z")})
    rate = weight_drift(c.drift, weights, jnp.zeros(()))
    first = measure(x, weights, rate, c.noise_var)

    def paths(value):
        return jnp.broadcast_to(value, (c.num_paths, *value.shape))

    return {
        "t": course.t[0],
        "E": course.energy,
        "G2": course.slope,
        "dE_int": course.rate_integral,
        "G2_int": course.slope_integral,
        "add_int": course.martingale,
        "traj": course.tokens,
        "balance_lhs": course.energy - course.energy[:, :1],
        "balance_rhs": course.rate_integral - course.slope_integral + course.martingale,
        "m0_f": paths(rate),
        "m0_E": paths(first.energy),
        "m0_dEdt": paths(first.energy_rate),
        "m0_G2": paths(first.slope),
        "m0_v": paths(first.velocity),
    }


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of the experiments; times are in the units of the flow."""

    num_tokens: int = 24
    dimension: int = 3
    duration: float = 1.0
    dt: float = 0.01  # the coarsest of the steps that are halved
    heads: tuple[int, ...] = (1, 4, 16, 64)  # of the decay of the slope
    paths: int = 4
    slope_duration: float = 8.0


def _tokens(key: jax.Array, count: int, dimension: int) -> Float[Array, "N D"]:
    """Around the corners of the cross-polytope, as in the official experiments."""
    corners = jnp.concatenate([jnp.eye(dimension), -jnp.eye(dimension)])
    x = corners[jnp.arange(count) % len(corners)] + 0.05**0.5 * jax.random.normal(key, (count, dimension))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _weights(key: jax.Array, heads: int, dimension: int) -> Float[Array, "H D D"]:
    z = jax.random.normal(key, (heads, dimension, dimension))
    return z + jnp.swapaxes(z, 1, 2)


def _residuals(c: Config, x, weights, drift: Drift, which: Callable[[Course], Array]) -> list[float]:
    """|E(T) - E(0) - (rate - dissipation)| for dt, dt / 2, dt / 4."""
    found = []
    for halvings in range(3):
        dt = c.dt / 2**halvings
        steps = round(c.duration / dt)
        course = simulate(x, weights, drift=drift, steps=steps, dt=dt, every=steps)
        balance = course.energy[-1] - course.energy[0] - course.rate_integral[-1] + which(course)[-1]
        found.append(abs(float(balance)))
    return found


def _mean_slopes(c: Config, key: jax.Array, drift: Drift, noise_var: float) -> list[float]:
    """The slope's mean over the second half of the time and over paths, for every number of heads."""
    dt, found = 2 * c.dt, []
    steps = round(c.slope_duration / dt)
    for heads in c.heads:

        def path(key, heads=heads):
            keys = jax.random.split(key, 3)
            x, weights = _tokens(keys[0], c.num_tokens, c.dimension), _weights(keys[1], heads, c.dimension)
            noise = jax.random.normal(keys[2], (steps, *weights.shape)) if noise_var else None
            course = simulate(x, weights, noise, drift=drift, steps=steps, dt=dt, every=4, noise_var=noise_var)
            return jnp.mean(course.slope[len(course.slope) // 2 :])

        found.append(float(jnp.mean(jax.lax.map(path, jax.random.split(key, c.paths)))))
    return found


def run(config: Config, key: jax.Array) -> Findings:
    """The energy balance, and how the slope depends on the number of heads."""
    c, keys = config, jax.random.split(key, 5)
    x = _tokens(keys[0], c.num_tokens, c.dimension)
    one, four = (_weights(k, h, c.dimension) for k, h in zip(keys[1:3], (1, 4), strict=True))
    steps = tuple(c.dt / 2**i for i in range(3))

    alone = _residuals(c, x, one, "frozen", lambda course: course.slope_integral)
    exact = _residuals(c, x, four, "oscillating", lambda course: course.exact_integral)
    official = _residuals(c, x, four, "oscillating", lambda course: course.slope_integral)
    frozen = simulate(x, one, drift="frozen", steps=round(c.duration / c.dt), dt=c.dt, every=1)
    rises = float(jnp.max(jnp.diff(frozen.energy)))

    ou = _mean_slopes(c, keys[3], "ou", 2.0)
    oscillating = _mean_slopes(c, keys[4], "oscillating", 0.0)

    def ratios(residuals: list[float]) -> list[float]:
        return [residuals[i] / residuals[i + 1] for i in range(2)]

    checks = (
        Check("frozen weights, one head: the energy's largest rise in a step", rises, high=1e-12),
        Check("frozen weights, one head: the balance's error falls by two as dt halves", ratios(alone), 1.7, 2.3, 2.0),
        Check("four heads: the exact dissipation's error falls by two as dt halves", ratios(exact), 1.7, 2.3, 2.0),
        Check(
            "four heads: the official slope leaves a gap that dt does not close (against the exact error)",
            official[-1] / exact[-1], low=5.0, over=None,
        ),
        Check("four heads: error of the exact balance", exact, 0.0, 2.0 * exact[0], over=("dt", steps)),
        Check(
            "Ornstein-Uhlenbeck weights: the slope fades with the heads, exponent",
            exponent(c.heads, ou), -1.4, -0.6, -1.0,
        ),
        Check(
            "Ornstein-Uhlenbeck weights: mean slope of the second half",
            ou, 0.0, 2 * ou[0], [ou[0] / h for h in c.heads], ("heads", c.heads),
        ),
        Check(
            "oscillating weights: the slope does not fade, exponent from four heads on",
            exponent(c.heads[1:], oscillating[1:]), -0.35, 0.1, 0.0,
        ),
        Check(
            "oscillating weights: mean slope of the second half",
            oscillating, 0.0, 4 * oscillating[0], over=("heads", c.heads),
        ),
    )  # fmt: skip
    return Findings(checks)


PAPER = Paper(
    slug="wasserstein_flow",
    demo=Demo(run, configs={"tiny": Config(), "paper": Config(num_tokens=200, paths=32, slope_duration=20.0)}),
    officials=(
        Official(
            module="attn_sphere/engine.py:simulate_batch (output t..traj) and engine.py:_forward_metrics at t=0 "
            "(output/m0_*)",
            config=config_from_official,
            hparams=config_to_official,
            table=no_table,
            call=official_call,
            model=Flow,
            example=flow_example,
        ),
    ),
    quirks=(
        "G2 balances the energy for one head only: the flow averages normalised drifts, not the energy's gradient",
        "the martingale part takes the kernel before a step and the tokens after it",
    ),
)
