"""The record of a task family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Batch", "Task"]

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Task:
    """What is asked of a model, whichever it is.

    `loss(outputs, batch)` gives the mean training loss and further named scalars; `metrics(outputs, batch)` gives each
    metric as one number per example, so that any split into batches averages to the same result. `metric` names the
    one that decides between checkpoints. `baselines` predict without a model, from the batch alone.
    Where a score is of a set as a whole and no mean (an F1, a ROC curve), `metrics` also gives counts, arrays (B, ...),
    and `summarise(totals, tuning)` makes the set's scores of the sums over its examples and of their number,
    `examples`. `tuning` are the totals of the validation split, to choose thresholds by, where another is scored.
    `report(outputs, batch)` gives further scores of a whole split at once, for those that are no mean over examples;
    its batch is without the inputs `x`.
    `pad(batch)`, for tasks with variable sizes, gives the batch with padding that must not change the outputs of the
    real part, and a function that takes this part out of outputs.
    """

    name: str
    loss: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    metrics: Callable[[Any, Batch], dict[str, jax.Array]]
    metric: str
    lower_is_better: bool = True
    baselines: Mapping[str, Callable[[Batch], Any]] = field(default_factory=dict)
    summarise: Callable[[dict[str, Any], dict[str, Any] | None], dict[str, float]] | None = None
    report: Callable[[Any, Batch], dict[str, float]] | None = None
    pad: Callable[[Batch], tuple[Batch, Callable[[Any], Any]]] | None = None
    picture: Callable[[Batch, Any], "Figure"] | None = None
    picture_name: str = "prediction.png"
