"""Next-item recommendation: which of some candidates does a user take next?

Batch: `user` (B,) numbers from 0; `items` (B, L) the user's last items in the order of time, numbered from 1, with 0 in
front where the user has fewer; `contexts` (B, L, C) when that was (see `CONTEXTS`), zeros where an item is 0 or a data
set has no dates; `candidates` (B, M) the item that came next, then M - 1 others, 0 where there are fewer;
`candidate_contexts` (B, M, C) of the moment to predict. Items are numbered by falling frequency, which is what the
popularity baseline goes by. Output: scores (B, M), or a mapping with such `scores` among others.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CONTEXTS", "TASK", "example", "loss", "metrics", "pad", "picture", "popularity", "scores_of"]

CONTEXTS = ("year", "month", "day", "weekday", "day of year", "week")  # each scaled to about [0, 1]
_CUTOFF = 10


def scores_of(outputs: Any) -> Float[Array, "B M"]:
    """The scores in a model's outputs."""
    return outputs["scores"] if isinstance(outputs, Mapping) else outputs


def _present(batch: Batch) -> Bool[Array, "B M"]:
    return batch["candidates"] > 0


def loss(outputs: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the item that came next among the candidates."""
    scores = jnp.where(_present(batch), scores_of(outputs).astype(jnp.float32), -jnp.inf)
    return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - scores[:, 0]), {}


def metrics(outputs: Any, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of the true item's rank, ties against it: hits within 1 and 10, 1 / log2(1 + rank) within 10, 1 / rank."""
    scores = jnp.where(_present(batch), scores_of(outputs).astype(jnp.float32), -jnp.inf)
    others = jnp.sum((scores[:, 1:] >= scores[:, :1]) & _present(batch)[:, 1:], axis=-1)
    # Nothing ranks behind what is not a number.
    rank = 1.0 + jnp.where(jnp.isfinite(scores[:, 0]), others, scores.shape[1] - 1)
    within = rank <= _CUTOFF
    return {
        "ndcg10": jnp.where(within, 1 / jnp.log2(1 + rank), 0.0),
        "hr10": within.astype(jnp.float32),
        "hr1": (rank == 1).astype(jnp.float32),
        "mrr": 1 / rank,
    }


def popularity(batch: Batch) -> Float[Array, "B M"]:
    """The most frequent items first, whoever asks."""
    return -batch["candidates"].astype(jnp.float32)


def example(
    *,
    history: int,
    num_items: int,
    batch_size: int,
    key: jax.Array,
    num_users: int = 1,
    num_contexts: int = len(CONTEXTS),
    num_candidates: int = 11,
) -> Batch:
    """A random batch of the right shapes; histories of all lengths from one to full."""
    keys = jax.random.split(key, 6)

    def items(key: jax.Array, count: int) -> Int[Array, "B N"]:
        return jax.random.randint(key, (batch_size, count), 1, num_items + 1)

    lengths = jax.random.randint(keys[0], (batch_size, 1), 1, history + 1)
    present = jnp.arange(history) >= history - lengths
    contexts = jax.random.uniform(keys[1], (batch_size, history, num_contexts))
    moment = jax.random.uniform(keys[2], (batch_size, 1, num_contexts))
    return {
        "user": jax.random.randint(keys[3], (batch_size,), 0, num_users),
        "items": jnp.where(present, items(keys[4], history), 0),
        "contexts": jnp.where(present[..., None], contexts, 0.0),
        "candidates": items(keys[5], num_candidates),
        "candidate_contexts": jnp.broadcast_to(moment, (batch_size, num_candidates, num_contexts)),
    }


def pad(batch: Batch) -> tuple[Batch, Any]:
    """(the batch with three empty candidates, how to take their scores out again)."""
    many = batch["candidates"].shape[1]
    padded = dict(batch)
    for name in ("candidates", "candidate_contexts"):
        padded[name] = jnp.pad(batch[name], ((0, 0), (0, 3)) + ((0, 0),) * (batch[name].ndim - 2))

    def unpad(outputs: Any) -> Any:
        return jax.tree.map(lambda x: x[:, :many] if x.ndim > 1 and x.shape[1] == many + 3 else x, outputs)

    return padded, unpad


def picture(batch: Batch, outputs: Any) -> "Figure":
    """The best fifteen candidates of the first example by their scores, the true one in red."""
    from matplotlib.figure import Figure

    scores, candidates, items = (
        jax.device_get(a)[0] for a in (scores_of(outputs), batch["candidates"], batch["items"])
    )
    shown = [i for i in (-scores).argsort() if candidates[i] > 0][:15][::-1]
    figure = Figure(figsize=(7, 0.28 * len(shown) + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        range(len(shown)), scores[shown] - scores[shown].min(), color=["tab:red" if i == 0 else "0.6" for i in shown]
    )
    axes.set_yticks(range(len(shown)), [f"item {candidates[i]}" for i in shown])
    axes.set_xlabel("score above the last one shown; red: what came next")
    recent = ", ".join(str(item) for item in items[items > 0][-8:])
    axes.set_title(f"after items {recent}", fontsize=10)
    return figure


TASK = Task(
    name="recommendation",
    loss=loss,
    metrics=metrics,
    metric="ndcg10",
    lower_is_better=False,
    baselines={"popularity": popularity},
    pad=pad,
    picture=picture,
    picture_name="ranking.png",
)
