"""Whether a window of sensor readings holds a falsified one.

Batch: `x` (B, L, C) scaled readings; `received` (B, C) the last of them in physical units and `change` (B, C) its
difference to the one before, for rules on what a body can do; `y` (B,) 1 where any reading of the window was falsified;
`positive_weight` (B,) the number of genuine training windows for every falsified one, the same everywhere. Output:
`logits` (B,), and `plausible` (B,) True where rules forbid an alarm.

An alarm is a probability at or above a threshold, 0.5 where the validation split is scored and elsewhere the one of
0.10, 0.15, ... 0.90 that has the best F1 there. `filtered_...` are the scores of what the rules leave of the alarms;
auroc and auprc rank windows by probability, whatever the rules say. Source: card dstan_med, "Training".
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

__all__ = ["TASK", "always_alarm", "example", "largest_deviation", "loss", "metrics", "picture", "summarise"]

Outputs = dict[str, Array]
_THRESHOLDS = np.arange(10, 91, 5) / 100
_LOGITS = np.log(_THRESHOLDS / (1 - _THRESHOLDS)).astype(np.float32)
# Bins of the logit, with a border exactly at every threshold.
_BORDERS = np.unique(np.concatenate([_LOGITS, np.linspace(-12, 12, 601, dtype=np.float32)]))


def loss(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean binary cross-entropy, falsified windows weighed by `positive_weight`."""
    logits, y = outputs["logits"].astype(jnp.float32), batch["y"].astype(jnp.float32)
    weight = batch["positive_weight"].astype(jnp.float32)
    alarm, silent = jax.nn.softplus(-logits), jax.nn.softplus(logits)
    return jnp.mean(weight * y * alarm + (1 - y) * silent), {}


def metrics(outputs: Outputs, batch: Batch) -> dict[str, Float[Array, "B *_"]]:
    """How many windows of each kind (genuine, falsified) and verdict of the rules lie in each bin of the logit."""
    place = jnp.searchsorted(jnp.asarray(_BORDERS), outputs["logits"].astype(jnp.float32), side="right")
    counts = jnp.zeros((len(place), 2, 2, len(_BORDERS) + 1))
    kind, verdict = (value.astype(jnp.int32) for value in (batch["y"] > 0.5, outputs["plausible"]))
    return {"counts": counts.at[jnp.arange(len(place)), kind, verdict, place].set(1.0)}


def _bin(threshold: float) -> int:
    """The first bin of alarms."""
    logit = np.float32(np.log(threshold / (1 - threshold)))
    return int(np.searchsorted(_BORDERS, logit, side="left")) + 1


def summarise(totals: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, float]:
    """F1, precision, sensitivity and accuracy without and with rules, the areas under two curves, the threshold."""
    counts = np.asarray(totals["counts"], np.float64)
    threshold = 0.5
    if tuning is not None:
        both = np.asarray(tuning["counts"], np.float64).sum(axis=1)
        f1 = [thresholds.scores(*thresholds.confusion(*both, _bin(t)))["f1"] for t in _THRESHOLDS]
        threshold = float(_THRESHOLDS[int(np.argmax(f1))])
    negative, positive = counts.sum(axis=1)
    result = thresholds.scores(*thresholds.confusion(negative, positive, _bin(threshold)))
    true, false, _, _ = thresholds.confusion(counts[0, 0], counts[1, 0], _bin(threshold))
    filtered = thresholds.scores(true, false, positive.sum() - true, negative.sum() - false)
    result |= {f"filtered_{name}": value for name, value in filtered.items()}
    curves = {"auroc": thresholds.auroc(negative, positive), "auprc": thresholds.auprc(negative, positive)}
    return result | curves | {"threshold": threshold}


def _without_rules(logits: Float[Array, " B"]) -> Outputs:
    return {"logits": logits, "plausible": jnp.zeros(logits.shape, bool)}


def always_alarm(batch: Batch) -> Outputs:
    """Every window raises an alarm: what an F1 is worth where falsified windows are many."""
    return _without_rules(jnp.full(len(batch["x"]), 3.0))


def largest_deviation(batch: Batch) -> Outputs:
    """The largest scaled reading of the window, less 2, as logit."""
    return _without_rules(jnp.max(jnp.abs(batch["x"].astype(jnp.float32)), axis=(1, 2)) - 2.0)


def example(*, lookback: int, channels: int, batch_size: int, key: jax.Array) -> Batch:
    """Unit noise in which every other window is falsified; physical units are those of a resting adult."""
    keys = jax.random.split(key)
    rest = jnp.resize(jnp.array([75.0, 97.0, 120.0, 72.0, 15.0, 37.0]), channels)
    change = 3.0 * jax.random.normal(keys[1], (batch_size, channels))
    return {
        "x": jax.random.normal(keys[0], (batch_size, lookback, channels)),
        "received": rest + change,
        "change": jnp.where(jnp.arange(batch_size)[:, None] % 3 == 0, 0.01 * change, change),
        "y": (jnp.arange(batch_size) % 2).astype(jnp.float32),
        "positive_weight": jnp.full(batch_size, 1.5),
    }


def picture(batch: Batch, outputs: Outputs) -> "Figure":
    """The first window's readings, scaled, and what was made of them."""
    from matplotlib.figure import Figure

    x, y = (jax.device_get(batch[name])[0] for name in ("x", "y"))
    probability = float(jax.nn.sigmoid(outputs["logits"][0].astype(jnp.float32)))
    figure = Figure(figsize=(9, 1.3 * x.shape[1] + 0.8), layout="constrained")
    for channel, axes in enumerate(figure.subplots(x.shape[1], 1, sharex=True, squeeze=False)[:, 0]):
        axes.plot(x[:, channel], color="black", linewidth=1.2, marker="o", markersize=3)
        axes.set_ylabel(f"channel {channel}")
    axes.set_xlabel("sample")
    rules = ", plausible by the rules" if bool(outputs["plausible"][0]) else ""
    figure.suptitle(f"{'falsified' if y > 0.5 else 'genuine'}; probability of an attack {probability:.2f}{rules}")
    return figure


TASK = Task(
    name="anomaly_detection",
    loss=loss,
    metrics=metrics,
    metric="f1",
    lower_is_better=False,
    baselines={"always_alarm": always_alarm, "largest_deviation": largest_deviation},
    summarise=summarise,
    picture=picture,
    picture_name="attack.png",
)
