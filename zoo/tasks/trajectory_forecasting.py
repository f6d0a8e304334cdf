"""Where one agent among others goes next, as several guesses of which the best counts.

Batch: `x` (B, T, N, 2) positions seen, in metres (or the data's unit), agent 0 is the one to forecast; `agent_mask`
(B, N) is True where there is an agent, and the absent ones come last; `y` (B, P, 2) the future of agent 0. Output:
(B, K, P, 2), K futures in the frame of `x`. Nothing depends on where the origin lies; data sets put it where agent 0
is last seen, so that low precision costs nothing.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "constant_velocity", "example", "loss", "metrics", "pad", "picture"]


def _distances(futures: Float[Array, "B K P 2"], batch: Batch) -> Float[Array, "B K P"]:
    squared = jnp.sum(jnp.square(futures.astype(jnp.float32) - batch["y"][:, None]), axis=-1)
    # A perfect point has the gradient 0, not the NaN of a root at 0.
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def loss(futures: Float[Array, "B K P 2"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean over examples of the best future's mean distance: only the best of K is taught."""
    return jnp.mean(metrics(futures, batch)["min_ade"]), {}


def metrics(futures: Float[Array, "B K P 2"], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each example, in the unit of the positions: the least mean distance and the least final distance of K."""
    distances = _distances(futures, batch)
    return {
        "min_ade": jnp.min(jnp.mean(distances, axis=-1), axis=-1),
        "min_fde": jnp.min(distances[..., -1], axis=-1),
    }


def constant_velocity(batch: Batch) -> Float[Array, "B 1 P 2"]:
    """One future: the last step seen is repeated."""
    last, before = batch["x"][:, -1, 0], batch["x"][:, -2, 0]
    steps = jnp.arange(1, batch["y"].shape[1] + 1, dtype=last.dtype)[:, None]
    return (last[:, None] + steps * (last - before)[:, None])[:, None]


def example(*, lookback: int, horizon: int, num_agents: int, batch_size: int, key: jax.Array) -> Batch:
    """Random walks around random places; every other example lacks its last agents."""
    places, walks, counts = jax.random.split(key, 3)
    walk = jnp.cumsum(0.5 * jax.random.normal(walks, (batch_size, lookback + horizon, num_agents, 2)), axis=1)
    positions = walk + 3.0 * jax.random.normal(places, (batch_size, 1, num_agents, 2))
    count = jax.random.randint(counts, (batch_size,), 1, num_agents + 1)
    count = jnp.where(jnp.arange(batch_size) % 2 == 0, num_agents, count)
    present = jnp.arange(num_agents) < count[:, None]
    return {
        "x": jnp.where(present[:, None, :, None], positions[:, :lookback], 0.0),
        "agent_mask": present,
        "y": positions[:, lookback:, 0],
    }


def pad(batch: Batch):
    """Two more places for agents, with nobody there."""
    noise = 7.0 * jax.random.normal(jax.random.key(0), (*batch["x"].shape[:2], 2, 2), batch["x"].dtype)
    nobody = jnp.zeros((batch["x"].shape[0], 2), bool)
    padded = {
        "x": jnp.concatenate([batch["x"], noise], axis=2),
        "agent_mask": jnp.concatenate([batch["agent_mask"], nobody], axis=1),
    }
    return {**batch, **padded}, lambda futures: futures


def picture(batch: Batch, futures: Float[Array, "B K P 2"]) -> "Figure":
    """The first scene from above: what was seen of all agents, the truth and all guesses, the best one bold."""
    from matplotlib.figure import Figure

    past, present, truth = (jax.device_get(batch[name])[0] for name in ("x", "agent_mask", "y"))
    guesses = jax.device_get(futures)[0]
    best = int(jnp.argmin(jnp.mean(_distances(futures, batch)[0], axis=-1)))
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    for number in range(1, int(present.sum())):
        axes.plot(*past[:, number].T, color="0.6", linewidth=1.2, label="others" if number == 1 else None)
        axes.plot(*past[-1, number], "o", color="0.6", markersize=4)
    for number, guess in enumerate(guesses):
        label = "best guess" if number == best else "guesses" if number == (best == 0) else None
        axes.plot(*guess.T, color="tab:red", alpha=1.0 if number == best else 0.3, linewidth=1.4, label=label)
    axes.plot(*past[:, 0].T, color="black", linewidth=1.2, linestyle=":", label="past")
    axes.plot(*truth.T, color="black", linewidth=1.4, label="truth")
    axes.plot(*past[-1, 0], "o", color="black", markersize=5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="best", frameon=False)
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    return figure


TASK = Task(
    name="trajectory_forecasting",
    loss=loss,
    metrics=metrics,
    metric="min_ade",
    baselines={"constant_velocity": constant_velocity},
    pad=pad,
    picture=picture,
    picture_name="trajectories.png",
)
