"""What will be true of a row of a relational database at some time, seen from the rows around it?

Batch, K tokens a seed row, each token a row: `table` and `row` (B, K) which row it is, token 0 the seed; `hop` (B, K)
links away from the seed; `lag` (B, K) days before the moment of prediction, 0 for what is undated; `token_mask` (B, K);
`edges` (B, E, 2) links among the tokens, from the first to the second, each in both directions, and `edge_mask` (B, E).
`label` (B,): whole numbers 0 and 1 where something happens or not, and the output is a logit; else an amount, and so is
the output. `typical` (B,) the training labels' mean where they are 0 and 1, else their median; `limits` (B, 2) the
amounts below and above which 2 % of them lie. Output: (B, C), of which the first channel counts.

What the rows hold is not in the batch: a model takes the tables as constants (`zoo.Paper.constants`).
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "example", "loss", "metrics", "pad", "picture", "typical"]


def _happens(batch: Batch) -> bool:
    return jnp.issubdtype(batch["label"].dtype, jnp.integer)


def _cross_entropy(logit: Float[Array, " B"], label: Array) -> Float[Array, " B"]:
    return jax.nn.softplus(logit) - logit * label


def loss(outputs: Float[Array, "B C"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of what happens or not, or mean absolute error of an amount."""
    guess, label = outputs[:, 0].astype(jnp.float32), batch["label"]
    return jnp.mean(_cross_entropy(guess, label) if _happens(batch) else jnp.abs(guess - label)), {}


def metrics(outputs: Float[Array, "B C"], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """`mae` of amounts, which are first brought within the limits; or of the probability, with accuracy and entropy."""
    guess, label = outputs[:, 0].astype(jnp.float32), batch["label"]
    if not _happens(batch):
        return {"mae": jnp.abs(jnp.clip(guess, *batch["limits"].T) - label)}
    return {
        "mae": jnp.abs(jax.nn.sigmoid(guess) - label),
        "accuracy": ((guess > 0) == (label > 0)).astype(jnp.float32),
        "cross_entropy": _cross_entropy(guess, label),
    }


def typical(batch: Batch) -> Float[Array, "B 1"]:
    """The training labels' typical value for everybody."""
    value = batch["typical"][:, None]
    return jnp.log(value) - jnp.log1p(-value) if _happens(batch) else value


def example(*, rows: tuple[int, ...], num_tokens: int, batch_size: int, key: jax.Array, num_edges: int = 24) -> Batch:
    """Random tokens of tables with so many rows, and random links among them; every other seed lacks its last ones."""
    keys = jax.random.split(key, 7)
    tokens = (batch_size, num_tokens)
    table = jax.random.randint(keys[0], tokens, 0, len(rows))
    count = jnp.where(jnp.arange(batch_size) % 2 == 0, num_tokens, max(num_tokens - 3, 1))
    present = jnp.arange(num_tokens) < count[:, None]
    hop = jax.random.randint(keys[1], tokens, 1, 3).at[:, 0].set(0)
    lag = (30 * jax.random.uniform(keys[2], tokens) - 2).at[:, 0].set(0)  # some lie in the future
    pairs = jax.random.randint(keys[3], (batch_size, num_edges // 2, 2), 0, count[:, None, None])
    label = jax.random.randint(keys[4], (batch_size,), 0, 2)
    return {
        "table": jnp.where(present, table, 0),
        "row": jnp.where(present, jax.random.randint(keys[5], tokens, 0, jnp.array(rows)[table]), 0),
        "hop": jnp.where(present, hop, 0),
        "lag": jnp.where(present, lag, 0.0),
        "token_mask": present,
        "edges": jnp.concatenate([pairs, pairs[..., ::-1]], axis=1),
        "edge_mask": jnp.tile(jax.random.uniform(keys[6], (batch_size, num_edges // 2)) < 0.9, (1, 2)),
        "label": label,
        "typical": jnp.full(batch_size, 0.5),
        "limits": jnp.tile(jnp.array([0.0, 1.0]), (batch_size, 1)),
    }


def pad(batch: Batch):
    """Three more places for tokens and two for links, with nothing there."""
    padded = dict(batch)
    for name in ("table", "row", "hop", "lag", "token_mask"):
        padded[name] = jnp.pad(batch[name], ((0, 0), (0, 3)))
    padded["lag"] = padded["lag"].at[:, -3:].set(7.0)
    padded["edges"] = jnp.pad(batch["edges"], ((0, 0), (0, 2), (0, 0)))
    padded["edge_mask"] = jnp.pad(batch["edge_mask"], ((0, 0), (0, 2)))
    return padded, lambda outputs: outputs


def picture(batch: Batch, outputs: Float[Array, "B C"]) -> "Figure":
    """The first seed's neighbours in time, by table, and what is predicted."""
    from matplotlib.figure import Figure

    table, lag, hop, there = (jax.device_get(batch[k])[0] for k in ("table", "lag", "hop", "token_mask"))
    guess, label = float(outputs[0, 0]), float(batch["label"][0])
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for distance, colour in ((1, "tab:red"), (2, "0.6")):
        chosen = there & (hop == distance)
        axes.scatter(-lag[chosen], table[chosen], s=18, color=colour, label=f"{distance} link{'s' * (distance > 1)}")
    axes.set_xlabel("days before the moment of prediction")
    axes.set_ylabel("table")
    axes.set_yticks(sorted(set(table[there].tolist())))
    axes.legend(loc="best", frameon=False)
    said = f"probability {1 / (1 + jnp.exp(-guess)):.2f}" if _happens(batch) else f"{guess:.2f}"
    axes.set_title(f"predicted {said}, true {label:g}", fontsize=10)
    return figure


TASK = Task(
    name="row_prediction",
    loss=loss,
    metrics=metrics,
    metric="mae",
    baselines={"typical": typical},
    pad=pad,
    picture=picture,
    picture_name="neighbours.png",
)
