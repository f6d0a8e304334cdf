"""Anomalies found by a model of what is normal: what it cannot rebuild is one.

Batch: `x` (B, L, V) scaled values; `segment` (B, L) the number of the anomaly a step belongs to, 0 for none; `touched`
(B, S) which of the S anomalies a window touches, anomaly 1 first. Output: (B, L, V), the input again. A step's score is
its squared error, averaged over variates. The threshold is the 99th percentile of the scores of validation and test
together (officially of training and test), found to a thirtieth. A hit anywhere in an anomaly counts for all of it in
`adjusted_...`: the literature's protocol (arXiv:1802.03903), which flatters; the plain scores stand beside it.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.tasks import thresholds
from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "example", "loss", "metrics", "picture", "step_scores", "summarise", "window_mean"]

_BINS, _PER_DECADE, _LOWEST = 512, 32, -8.0  # bins of log10(score): 1e-8 to 1e8
_ALARMS = 0.01  # share of all steps


def step_scores(rebuilt: Float[Array, "B L V"], batch: Batch) -> Float[Array, "B L"]:
    """Mean squared error of each step."""
    return jnp.mean(jnp.square(rebuilt.astype(jnp.float32) - batch["x"]), axis=-1)


def loss(rebuilt: Float[Array, "B L V"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error."""
    return jnp.mean(step_scores(rebuilt, batch)), {}


def metrics(rebuilt: Float[Array, "B L V"], batch: Batch) -> dict[str, Float[Array, "B *_"]]:
    """The error of each window, and how many of its steps lie in each anomaly (0: none) and bin of scores."""
    found = step_scores(rebuilt, batch)
    place = jnp.floor((jnp.log10(jnp.maximum(found, 1e-30)) - _LOWEST) * _PER_DECADE)
    place = jnp.clip(place, 0, _BINS - 1).astype(jnp.int32)
    window = jnp.arange(found.shape[0])[:, None]
    counts = jnp.zeros((found.shape[0], 1 + batch["touched"].shape[1], _BINS))
    return {"mse": jnp.mean(found, axis=1), "counts": counts.at[window, batch["segment"], place].add(1.0)}


def summarise(totals: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, float]:
    """The mean error, and where there are anomalies the scores of the detector, plain and adjusted."""
    result = {"mse": float(totals["mse"] / totals["examples"])}
    counts = np.asarray(totals["counts"], np.float64)
    normal, anomalies = counts[0], counts[1:]
    if not anomalies.sum():
        return result
    pooled = counts.sum(axis=0) + (np.asarray(tuning["counts"], np.float64).sum(axis=0) if tuning else 0.0)
    above = np.cumsum(pooled[::-1])[::-1]  # steps in this bin or a higher one
    threshold = int(np.argmax(above <= _ALARMS * pooled.sum()))
    positive = anomalies.sum(axis=0)
    result |= {"auroc": thresholds.auroc(normal, positive), "auprc": thresholds.auprc(normal, positive)}
    result |= thresholds.scores(*thresholds.confusion(normal, positive, threshold))
    hit = anomalies[:, threshold:].any(axis=1)
    sizes, (_, false, _, silent) = anomalies.sum(axis=1), thresholds.confusion(normal, positive, threshold)
    adjusted = thresholds.scores(sizes[hit].sum(), false, sizes[~hit].sum(), silent)
    return result | {f"adjusted_{name}": adjusted[name] for name in ("f1", "precision", "sensitivity")}


def window_mean(batch: Batch) -> Float[Array, "B L V"]:
    """Every step is rebuilt as the mean of its window."""
    return jnp.broadcast_to(jnp.mean(batch["x"], axis=1, keepdims=True), batch["x"].shape)


def example(*, lookback: int, variates: int, batch_size: int, key: jax.Array) -> Batch:
    """Unit noise; the first steps of a window are anomaly 1 or 2, in turn."""
    windows, steps = jnp.arange(batch_size)[:, None], jnp.arange(lookback)
    number = 1 + windows % 2
    return {
        "x": jax.random.normal(key, (batch_size, lookback, variates)),
        "segment": jnp.where(steps < lookback // 4, number, 0).astype(jnp.int32),
        "touched": jnp.arange(1, 3) == number,
    }


def picture(batch: Batch, rebuilt: Float[Array, "B L V"]) -> "Figure":
    """The first window: up to three variates as they are and as rebuilt, and the score of every step."""
    from matplotlib.figure import Figure

    x, segment, guess = (jax.device_get(a)[0] for a in (batch["x"], batch["segment"], rebuilt))
    score = jax.device_get(step_scores(rebuilt, batch))[0]
    shown = min(3, x.shape[-1])
    figure = Figure(figsize=(9, 1.7 * shown + 2.3), layout="constrained")
    panels = figure.subplots(shown + 1, 1, sharex=True)
    for variate, axes in enumerate(panels[:-1]):
        axes.plot(x[:, variate], color="black", linewidth=1.2, label="input")
        axes.plot(guess[:, variate], color="tab:red", linewidth=1.2, label="rebuilt")
        axes.set_ylabel(f"variate {variate}")
    panels[0].legend(loc="upper left", ncols=2, frameon=False)
    panels[-1].plot(score, color="tab:blue", linewidth=1.2)
    panels[-1].fill_between(range(len(score)), 0, score.max(), where=segment > 0, color="0.85", label="anomaly")
    panels[-1].set_ylabel("score")
    panels[-1].set_xlabel("time step")
    return figure


TASK = Task(
    name="reconstruction",
    loss=loss,
    metrics=metrics,
    metric="mse",
    baselines={"window_mean": window_mean},
    summarise=summarise,
    picture=picture,
    picture_name="anomalies.png",
)
