"""Systems whose causal graph is known: sets of the literature, and generators of three kinds.

An example is the step x[t + L] after the L steps before it. There is no split: a model is fitted to all of a system,
and its graph is scored, so that training, validation and test part are the same windows. Every variable is z-scored
over the whole series. Graphs are as in `zoo.tasks.causal_discovery`. Source: card mask2cause, "Data".
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = [
    "System",
    "SystemData",
    "SystemWindows",
    "generate_lorenz96",
    "generate_mixed_physics",
    "generate_var",
    "load_system",
]

MEAN, VARIANCE = 1, 2  # what an edge acts on, as bits


@dataclass(frozen=True)
class System:
    """(T, N) series and its graph (N, N), row = target, column = source."""

    series: np.ndarray
    graph: np.ndarray
    trajectory: int | None = None  # length of the pieces that the series is put together of; None: it is one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SystemWindows:
    """All windows of a system's series, which lies on the device once."""

    values: Float[Array, "T N"]
    graph: Int[Array, "N N"]
    starts: Int[Array, " W"]
    lookback: int = field(metadata={"static": True})

    def __len__(self) -> int:
        return self.starts.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as a batch of causal discovery; traceable."""
        first = self.starts[indices]
        cut = jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(self.values, s, self.lookback + 1))
        window = cut(first)
        graph = jnp.broadcast_to(self.graph, (len(first), *self.graph.shape))
        return {"x": window[:, :-1], "y": window[:, -1], "graph": graph}


@dataclass(frozen=True)
class SystemData:
    """Three times the same windows."""

    train: SystemWindows
    valid: SystemWindows
    test: SystemWindows


def generate_var(
    seed: int, *, steps: int = 500, variates: int = 10, lag: int = 3, sparsity: float = 0.3, noise: float = 0.1
) -> System:
    """x_t = sum_k B x_{t-k} + noise: each variable has itself and int(sparsity N) - 1 others as parents.

    All coefficients are one number, the same at every lag: 1 times 0.95 until the system's spectral radius is at most
    0.97. The first 100 steps are dropped.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    graph = np.eye(variates, dtype=bool)
    for i in range(variates):
        others = np.delete(np.arange(variates), i)
        graph[i, rng.choice(others, max(int(sparsity * variates) - 1, 0), replace=False)] = True
    coefficients, companion = graph.astype(float), np.eye(variates * lag, k=-variates)
    while True:
        companion[:variates] = np.tile(coefficients, (1, lag))
        if np.max(np.abs(np.linalg.eigvals(companion))) <= 0.97:
            break
        coefficients *= 0.95
    shocks = rng.normal(0, noise, (steps + 100, variates))
    series = np.zeros((steps + 100, variates))
    series[:lag] = shocks[:lag]
    for t in range(lag, len(series)):
        series[t] = series[t - lag : t].sum(axis=0) @ coefficients.T + shocks[t]
    return System(series[100:], graph * MEAN)


def generate_lorenz96(
    seed: int, *, steps: int = 500, variates: int = 10, forcing: float = 10.0, noise: float = 0.1, step: float = 0.1
) -> System:
    """dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F on a circle, seen every `step` with noise; parents i-2 to i+1.

    The first 1,000 steps are dropped. Ten steps of Runge and Kutta's fourth order to one that is seen.
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def slope(x):
        return (np.roll(x, -1) - np.roll(x, 2)) * np.roll(x, 1) - x + forcing

    x, h, seen = rng.normal(0, 0.01, variates) + forcing, step / 10, []
    for t in range(steps + 1000):
        for _ in range(10):
            a = slope(x)
            b = slope(x + h / 2 * a)
            c = slope(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c))
        if t >= 1000:
            seen.append(x)
    graph = sum(np.roll(np.eye(variates, dtype=int), offset, axis=1) for offset in (-2, -1, 0, 1))
    return System(np.array(seen) + rng.normal(0, noise, (steps, variates)), (graph > 0) * MEAN)


def generate_mixed_physics(
    seed: int,
    *,
    variance_share: float,
    steps: int = 5_000,
    variates: int = 10,
    lag: int = 3,
    density: float = 0.3,
    variance_weight: tuple[float, float] = (2.0, 3.0),
) -> System:
    """x_t = x_{t-lag} M + sqrt(0.1 + x_{t-lag}^2 V) noise, cut to +-50: some causes move the mean, some the variance.

    Of all pairs a share `density` is an edge, of these a share `variance_share` acts on the variance alone, with a
    weight within `variance_weight`, the rest on the mean alone, with one of 0.4 to 0.6 and either sign; and each
    variable on its own mean with 0.4.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    pairs = np.argwhere(~np.eye(variates, dtype=bool))
    edges = pairs[rng.permutation(len(pairs))[: round(density * len(pairs))]]
    on_variance = np.arange(len(edges)) < round(variance_share * len(edges))
    mean, variance = 0.4 * np.eye(variates), np.zeros((variates, variates))
    graph = MEAN * np.eye(variates, dtype=int)
    for (target, source), spreads in zip(edges, on_variance, strict=True):
        graph[target, source] = VARIANCE if spreads else MEAN
        if spreads:
            variance[target, source] = rng.uniform(*variance_weight)
        else:
            mean[target, source] = rng.uniform(0.4, 0.6) * rng.choice([-1, 1])
    series = np.zeros((steps + 100, variates))
    series[:lag] = rng.normal(0, 0.1, (lag, variates))
    shocks = rng.normal(0, 1, series.shape)
    for t in range(lag, len(series)):
        before = series[t - lag]
        spread = np.sqrt(0.1 + variance @ np.square(before))
        series[t] = np.clip(mean @ before + spread * shocks[t], -50, 50)
    return System(series[100:], graph)


# Weights on the variance with which it stays finite. With the paper's, most values lie at the cut and say nothing.
_STABLE = (0.2, 0.3)
_GENERATORS = {
    "standin": lambda seed: generate_var(seed),
    "standin/lorenz96": lambda seed: generate_lorenz96(seed),
    **{
        f"standin/mixed_{percent}": lambda seed, share=percent / 100: generate_mixed_physics(
            seed, variance_share=share, variance_weight=_STABLE
        )
        for percent in (50, 75, 100)
    },
}
_SETS = ("var", "lorenz96", "netsim", "dream3", "causal_air_quality")
_DREAM3_POINTS = 21  # of a trajectory


def _read(name: str, data_dir: str | None) -> System:
    dataset, _, member = name.partition("/")
    if dataset not in _SETS:
        known = [*_GENERATORS, *_SETS]
        raise UserError(f"no system of a known graph is called {name!r}{closest(name, known)}")
    trajectory = None
    if dataset == "dream3":
        member, _, joined = member.partition("/")
        if joined not in ("", "joined"):
            raise UserError(f"{name}: after the network only 'joined' may stand, which reads its trajectories as one")
        trajectory = None if joined else _DREAM3_POINTS
        found = load_dataset(f"dream3/{member}" if member else "dream3", data_dir)["systems"]
    else:
        found = load_dataset(dataset, data_dir)["systems"]
        if dataset == "causal_air_quality" and not member:
            member = "air_quality"
    systems = {system["name"].decode(): system for system in found}
    if member not in systems:
        raise UserError(f"{dataset} has no system {member!r}{closest(member, systems)}")
    system = systems[member]
    return System(system["series"], (system["graph"] > 0) * MEAN, trajectory)


def _without_gaps(series: np.ndarray) -> np.ndarray:
    """NaN filled along straight lines in time, variable by variable."""
    time = np.arange(len(series))
    filled = series.copy()
    for column in filled.T:
        seen = ~np.isnan(column)
        if not seen.any():
            raise UserError("a variable of the series has no value at all")
        column[~seen] = np.interp(time[~seen], time[seen], column[seen])
    return filled


def load_system(name: str, *, data_dir: str | None, lookback: int, seed: int = 0) -> SystemData:
    """The windows of a system: "standin" (a vector autoregression), "standin/lorenz96", "standin/mixed_50", "_75" and
    "_100" (percent of edges on the variance), "var/<file>", "lorenz96/<file>", "netsim/<file>", "dream3/<network>" and
    "causal_air_quality". `seed` matters to generated ones alone; gaps are filled along straight lines.
    """
    if name in _GENERATORS:
        if data_dir is not None:
            raise UserError(
                f"{name} is generated and takes no --data-dir; name a system with --data, e.g. netsim/<file>"
            )
        system = _GENERATORS[name](seed)
    else:
        system = _read(name, data_dir)
    series = _without_gaps(system.series)
    values = (series - series.mean(axis=0)) / (series.std(axis=0) + 1e-5)
    length = system.trajectory or len(values)
    if length <= lookback:
        raise UserError(f"a series of {name} has {length} steps: use a smaller --model.lookback than {lookback}")
    begins = np.arange(0, len(values) - length + 1, length)
    starts = (begins[:, None] + np.arange(length - lookback)).ravel()
    windows = SystemWindows(
        jnp.asarray(values, jnp.float32),
        jnp.asarray(system.graph, jnp.int32),
        jnp.asarray(starts, jnp.int32),
        lookback,
    )
    return SystemData(windows, windows, windows)
