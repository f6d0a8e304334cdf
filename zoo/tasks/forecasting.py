"""Multivariate forecasting: from the last L values of N series to the next P.

Batch: `x` (B, L, N) z-scored past, `y` (B, P, N) future, `x_mark` (B, L, F) calendar features of the past in
[-0.5, 0.5] (absent where a data set has no dates). Output: (B, P, N), in the units of `y`.
Where only some variates are to be forecast, they come last in `x`, and `y` holds them alone.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "example", "loss", "metrics", "picture", "repeat_last"]


def _error(forecast: Float[Array, "B P N"], batch: Batch) -> Float[Array, "B P M"]:
    return forecast[..., -batch["y"].shape[-1] :].astype(jnp.float32) - batch["y"]


def loss(forecast: Float[Array, "B P N"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error over windows, horizon and variates."""
    return jnp.mean(jnp.square(_error(forecast, batch))), {}


def metrics(forecast: Float[Array, "B P N"], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Mean squared and mean absolute error of each window, in z-scored units (the protocol of the literature)."""
    error = _error(forecast, batch)
    return {"mse": jnp.mean(jnp.square(error), axis=(1, 2)), "mae": jnp.mean(jnp.abs(error), axis=(1, 2))}


def repeat_last(batch: Batch) -> Float[Array, "B P N"]:
    """The naive forecast: every future value equals the last one seen."""
    return jnp.broadcast_to(batch["x"][:, -1:, -batch["y"].shape[-1] :], batch["y"].shape)


def example(
    *, lookback: int, horizon: int, batch_size: int, key: jax.Array, variates: int = 7, marks: int = 4
) -> Batch:
    """A random batch of the right shapes: unit noise, calendar features uniform in their range."""
    keys = jax.random.split(key, 3)
    batch = {
        "x": jax.random.normal(keys[0], (batch_size, lookback, variates)),
        "y": jax.random.normal(keys[1], (batch_size, horizon, variates)),
    }
    if marks:
        batch["x_mark"] = jax.random.uniform(keys[2], (batch_size, lookback, marks), minval=-0.5, maxval=0.5)
    return batch


def picture(batch: Batch, forecast: Float[Array, "B P N"]) -> "Figure":
    """Past, truth and forecast of the first window, one panel for each of the first four variates."""
    from matplotlib.figure import Figure

    past, truth, guess = (jax.device_get(a)[0] for a in (batch["x"], batch["y"], forecast))
    past, guess = (a[:, -truth.shape[-1] :] for a in (past, guess))
    shown = min(4, past.shape[-1])
    figure = Figure(figsize=(9, 1.9 * shown + 0.6), layout="constrained")
    for variate, axes in enumerate(figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]):
        future = range(len(past), len(past) + len(truth))
        axes.plot(range(len(past)), past[:, variate], color="0.45", linewidth=1.2, label="past")
        axes.plot(future, truth[:, variate], color="black", linewidth=1.2, label="truth")
        axes.plot(future, guess[:, variate], color="tab:red", linewidth=1.4, label="forecast")
        axes.axvline(len(past) - 0.5, color="0.8", linewidth=0.8)
        axes.set_ylabel(f"variate {variate}")
        if variate == 0:
            axes.legend(loc="upper left", ncols=3, frameon=False)
    axes.set_xlabel("time step")
    return figure


TASK = Task(
    name="forecasting",
    loss=loss,
    metrics=metrics,
    metric="mse",
    baselines={"repeat_last": repeat_last},
    picture=picture,
    picture_name="forecast.png",
)
