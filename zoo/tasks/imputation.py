"""Filling the gaps of multivariate series.

Batch: `x` (B, L, V) z-scored values, 0 where hidden; `mask` (B, L, V) is True where a value is seen; `y` (B, L, V)
all of them. Output: (B, L, V), in the units of `y`. Only hidden values count, in loss and metrics.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "example", "interpolate", "loss", "mean_of_seen", "metrics", "picture"]


def _hidden_mean(values: Float[Array, "B L V"], batch: Batch, axes: tuple[int, ...]) -> Float[Array, "*B"]:
    hidden = ~batch["mask"]
    return jnp.sum(jnp.where(hidden, values, 0.0), axis=axes) / jnp.maximum(jnp.sum(hidden, axis=axes), 1)


def _error(filled: Float[Array, "B L V"], batch: Batch) -> Float[Array, "B L V"]:
    return filled.astype(jnp.float32) - batch["y"]


def loss(filled: Float[Array, "B L V"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of all hidden values."""
    return _hidden_mean(jnp.square(_error(filled, batch)), batch, (0, 1, 2)), {}


def metrics(filled: Float[Array, "B L V"], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Mean squared and mean absolute error of each window's hidden values, z-scored."""
    error = _error(filled, batch)
    return {
        "mse": _hidden_mean(jnp.square(error), batch, (1, 2)),
        "mae": _hidden_mean(jnp.abs(error), batch, (1, 2)),
    }


def mean_of_seen(batch: Batch) -> Float[Array, "B L V"]:
    """Every gap holds the mean of what is seen of its series in the window."""
    seen = batch["mask"]
    mean = jnp.sum(jnp.where(seen, batch["x"], 0.0), axis=1, keepdims=True) / jnp.maximum(
        jnp.sum(seen, axis=1, keepdims=True), 1
    )
    return jnp.where(seen, batch["x"], mean)


def interpolate(batch: Batch) -> Float[Array, "B L V"]:
    """Straight lines between the values seen; beyond the first and last of them their value."""

    def one(values, seen):
        time = jnp.arange(len(values), dtype=values.dtype)
        # Hidden steps move to the end, where they repeat the last value seen.
        order = jnp.argsort(~seen, stable=True)
        last = jnp.maximum(jnp.sum(seen) - 1, 0)
        known = jnp.minimum(jnp.arange(len(values)), last)
        line = jnp.interp(time, time[order][known] + 1e-4 * (jnp.arange(len(values)) - known), values[order][known])
        return jnp.where(seen, values, line)

    both = jax.vmap(jax.vmap(one, in_axes=-1, out_axes=-1))
    return both(batch["x"], batch["mask"])


def example(*, lookback: int, variates: int, batch_size: int, key: jax.Array) -> Batch:
    """Unit noise of which a quarter is hidden."""
    keys = jax.random.split(key)
    y = jax.random.normal(keys[0], (batch_size, lookback, variates))
    mask = jax.random.uniform(keys[1], y.shape) > 0.25
    return {"x": jnp.where(mask, y, 0.0), "mask": mask, "y": y}


def picture(batch: Batch, filled: Float[Array, "B L V"]) -> "Figure":
    """The first window: values seen, the truth of the hidden ones, and what was filled in; at most four variates."""
    from matplotlib.figure import Figure

    mask, truth, guess = (jax.device_get(a)[0] for a in (batch["mask"], batch["y"], filled))
    shown = min(4, truth.shape[-1])
    figure = Figure(figsize=(9, 1.9 * shown + 0.6), layout="constrained")
    for variate, axes in enumerate(figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]):
        (hidden,) = (~mask[:, variate]).nonzero()
        axes.plot(truth[:, variate], color="0.6", linewidth=1.0, label="truth")
        axes.plot(hidden, truth[hidden, variate], "o", color="black", markersize=3, label="hidden")
        axes.plot(hidden, guess[hidden, variate], "x", color="tab:red", markersize=4, label="filled in")
        axes.set_ylabel(f"variate {variate}")
        if variate == 0:
            axes.legend(loc="upper left", ncols=3, frameon=False)
    axes.set_xlabel("time step")
    return figure


TASK = Task(
    name="imputation",
    loss=loss,
    metrics=metrics,
    metric="mse",
    baselines={"mean_of_seen": mean_of_seen, "interpolate": interpolate},
    picture=picture,
    picture_name="imputation.png",
)
