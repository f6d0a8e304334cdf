"""Who influences whom in a multivariate series, found by a model that forecasts it one step ahead.

Batch: `x` (B, L, N) z-scored past, `y` (B, N) the next step, `graph` (B, N, N) the truth, the same for all of a system:
row = target, column = source, 1 for an influence on the mean (or of unknown kind), 2 for one on the variance, 3 for
both, 0 for none. Output: `mean` (B, N), if the model has one `variance` (B, N), `graphs` (B, G, N, N) edge
probabilities of the mean and, if G is 2, of the variance, and `penalty` (B,) what the loss adds. The graph found is the
larger of the two; only pairs of different variables are scored.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK",
    "PrunedForecast",
    "example",
    "graph_scores",
    "lagged_correlation",
    "loss",
    "metrics",
    "picture",
    "pruned_forecast",
    "strongest_edges",
]

Outputs = dict[str, Array]
_LEAST_VARIANCE = 1e-6


def _negative_log_likelihood(outputs: Outputs, batch: Batch) -> Float[Array, "B N"]:
    variance = jnp.maximum(outputs["variance"].astype(jnp.float32), _LEAST_VARIANCE)
    error = outputs["mean"].astype(jnp.float32) - batch["y"]
    return 0.5 * (jnp.log(variance) + jnp.square(error) / variance)


def loss(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Squared error, or Gaussian negative log-likelihood if there is a variance, and the penalty."""
    if "variance" in outputs:
        fit = jnp.mean(_negative_log_likelihood(outputs, batch))
    else:
        fit = jnp.mean(jnp.square(outputs["mean"].astype(jnp.float32) - batch["y"]))
    penalty = jnp.mean(outputs["penalty"].astype(jnp.float32))
    return fit + penalty, {"penalty": penalty}


def strongest_edges(probability: Float[Array, "N N"], count: Int[Array, ""] | int) -> Bool[Array, "N N"]:
    """The `count` likeliest off-diagonal edges."""
    n = len(probability)
    score = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, probability).ravel()
    rank = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
    return (rank < count).reshape(n, n)


def graph_scores(probability: Float[Array, "N N"], truth: Bool[Array, "N N"]) -> dict[str, Float[Array, ""]]:
    """How well off-diagonal edges are ranked and told apart.

    auroc: ties count half; auprc: trapezes, from precision 1 at recall 0; f1 and shd (edges too many and too few) at
    probability 0.5 and, `_top`, of as many edges as there truly are. NaN for a graph of all edges or none.
    """
    off = ~jnp.eye(len(truth), dtype=bool)
    real, absent = (truth & off).ravel(), (~truth & off).ravel()
    score = probability.astype(jnp.float32).ravel()
    edges, gaps = jnp.sum(real), jnp.sum(absent)

    others = jnp.sort(jnp.where(absent, score, jnp.inf))
    below, up_to = (jnp.searchsorted(others, score, side=side) for side in ("left", "right"))
    auroc = jnp.sum(jnp.where(real, 0.5 * (below + up_to), 0.0)) / (edges * gaps)

    order = jnp.argsort(jnp.where(off.ravel(), -score, jnp.inf), stable=True)
    ranked, hit = -jnp.where(off.ravel(), score, -jnp.inf)[order], jnp.cumsum(real[order])
    # Equal scores are one point of the curve: the last of them.
    last = jnp.minimum(jnp.searchsorted(ranked, ranked, side="right"), edges + gaps) - 1
    recall = jnp.concatenate([jnp.zeros(1), hit[last] / edges])
    precision = jnp.concatenate([jnp.ones(1), hit[last] / (last + 1)])
    auprc = jnp.sum(0.5 * jnp.diff(recall) * (precision[1:] + precision[:-1]))

    found = {"": (probability > 0.5) & off, "_top": strongest_edges(probability, edges)}
    scores = {"auroc": auroc, "auprc": auprc}
    for name, guess in found.items():
        true = jnp.sum(guess.ravel() & real)
        scores[f"f1{name}"] = 2 * true / jnp.maximum(jnp.sum(guess) + edges, 1)
        scores[f"shd{name}"] = (jnp.sum(guess) + edges - 2 * true).astype(jnp.float32)
    return scores


def metrics(outputs: Outputs, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Error and likelihood of the forecast, the scores of the graph, and for two graphs the share of edges of one kind
    that are likelier in the graph of that kind."""
    graphs = outputs["graphs"].astype(jnp.float32)
    scores = {"mse": jnp.mean(jnp.square(outputs["mean"].astype(jnp.float32) - batch["y"]), axis=-1)}
    if "variance" in outputs:
        scores["nll"] = jnp.mean(_negative_log_likelihood(outputs, batch), axis=-1)
    scores |= jax.vmap(graph_scores)(jnp.max(graphs, axis=1), batch["graph"] > 0)
    if graphs.shape[1] == 2:
        off = ~jnp.eye(graphs.shape[-1], dtype=bool)
        on_mean, on_variance = ((batch["graph"] == kind) & off for kind in (1, 2))
        of_variance = graphs[:, 1] > graphs[:, 0]
        right = jnp.sum(jnp.where(of_variance, on_variance, on_mean), axis=(1, 2))
        scores["edge_type_accuracy"] = right / jnp.maximum(jnp.sum(on_mean | on_variance, axis=(1, 2)), 1)
    return scores


def lagged_correlation(batch: Batch) -> Outputs:
    """Edges by the absolute correlation, over the batch, of a step with the one before; forecasts repeat the last."""
    last, following = batch["x"][:, -1].astype(jnp.float32), batch["y"].astype(jnp.float32)
    unit = [(v - v.mean(axis=0)) / (v.std(axis=0) + 1e-6) for v in (last, following)]
    correlation = jnp.abs(unit[1].T @ unit[0]) / len(last)
    n, found = last.shape[1], {"mean": last, "penalty": jnp.zeros(len(last))}
    return found | {"graphs": jnp.broadcast_to(jnp.minimum(correlation, 1.0), (len(last), 1, n, n))}


class PrunedForecast(NamedTuple):
    """A forecaster with and without the inputs of non-parents: mean squared test errors and coefficients."""

    error: float
    pruned_error: float
    coefficients: int
    pruned_coefficients: int


def pruned_forecast(series: Float[np.ndarray, "T N"], parents: Bool[np.ndarray, "N N"], *, lag: int) -> PrunedForecast:
    """What a graph is worth to a forecaster: least squares of each variable on the last `lag` steps of all variables,
    and of its parents (and itself) alone, fitted to the first four fifths of the series and tested on the rest.

    Source: card mask2cause, "Open points" (the paper prunes forecasters by more than 70 % at equal error).
    """
    n = series.shape[1]
    past = np.stack([series[i : len(series) - lag + i] for i in range(lag)], axis=2)  # (W, N, lag)
    future, border = series[lag:], 4 * (len(series) - lag) // 5

    def error(chosen: np.ndarray) -> tuple[float, int]:
        squares, coefficients = [], 0
        for target in range(n):
            inputs = past[:, chosen[target]].reshape(len(past), -1)
            inputs = np.concatenate([inputs, np.ones((len(past), 1))], axis=1)
            fitted = np.linalg.lstsq(inputs[:border], future[:border, target], rcond=None)[0]
            squares.append(np.mean(np.square(inputs[border:] @ fitted - future[border:, target])))
            coefficients += inputs.shape[1]
        return float(np.mean(squares)), coefficients

    whole, pruned = error(np.ones((n, n), bool)), error(parents | np.eye(n, dtype=bool))
    return PrunedForecast(whole[0], pruned[0], whole[1], pruned[1])


def example(*, lookback: int, variates: int, batch_size: int, key: jax.Array) -> Batch:
    """Unit noise, and one random graph with a third of the edges."""
    keys = jax.random.split(key, 3)
    graph = jax.random.bernoulli(keys[2], 1 / 3, (variates, variates)) | jnp.eye(variates, dtype=bool)
    return {
        "x": jax.random.normal(keys[0], (batch_size, lookback, variates)),
        "y": jax.random.normal(keys[1], (batch_size, variates)),
        "graph": jnp.broadcast_to(graph.astype(jnp.int32), (batch_size, variates, variates)),
    }


def picture(batch: Batch, outputs: Outputs) -> "Figure":
    """The true graph beside the one found (and beside each kind, if there are two)."""
    from matplotlib.figure import Figure

    truth, graphs = (jax.device_get(a)[0] for a in (batch["graph"], outputs["graphs"]))
    panels = {"truth": truth > 0} | dict(zip(("found", "found, variance"), graphs, strict=False))
    figure = Figure(figsize=(3.6 * len(panels) + 0.8, 3.8), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        values = np.where(np.eye(len(values), dtype=bool), np.nan, values.astype(np.float32))
        image = axes.imshow(values, vmin=0, vmax=1, cmap="magma")
        axes.set_title(title)
        axes.set_xlabel("source")
    figure.axes[0].set_ylabel("target")
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="probability")
    return figure


TASK = Task(
    name="causal_discovery",
    loss=loss,
    metrics=metrics,
    metric="mse",  # not a score of the graph: the truth must not choose the weights
    baselines={"lagged_correlation": lagged_correlation},
    picture=picture,
    picture_name="graph.png",
)
