"""What every point of a scene belongs to.

Batch: `coord` (B, N, 3) places, in metres, the scene's middle at the origin; `feat` (B, N, C) features, the places and
three colours in [-1, 1] to begin with; `cell` (B, N, 3) the voxel of each point, at most one point in each, from 0 on;
`point_mask` (B, N) is True where there is a point, and the absent ones come last; `label` (B, N) the class, -1 where
it is unknown; `prior` (B, K) the share of each class in the training part. Output: a dictionary with `logits`
(B, N, K), and whatever else a model's loss needs.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK", "commonest", "example", "loss", "lovasz_softmax", "metrics", "pad", "picture", "segmentation_loss",
    "summarise",
]  # fmt: skip


def lovasz_softmax(
    probabilities: Float[Array, "P K"], label: Int[Array, " P"], known: Bool[Array, " P"]
) -> Float[Array, ""]:
    """Mean over the classes there are of sum_i e_i (J_i - J_{i-1}), J the Jaccard loss of the i largest errors e.

    e_i is |1 [label = k] - p_ik|; the sum extends the Jaccard loss to probabilities. O(K P log P). Source:
    arXiv:1705.08790, equation 8 and algorithm 1.
    """

    def of_class(k):
        there = (label == k) & known
        error = jnp.where(known, jnp.abs(there - probabilities[:, k]), -1.0)
        order = jnp.argsort(-jax.lax.stop_gradient(error))
        error, there = error[order], there[order].astype(jnp.float32)
        count = jnp.sum(there)
        left, union = count - jnp.cumsum(there), count + jnp.cumsum(1 - there)
        jaccard = 1 - left / jnp.maximum(union, 1.0)
        step = jnp.diff(jaccard, prepend=0.0)
        # The unknown come last.
        return jnp.sum(jnp.where(error >= 0, error * jax.lax.stop_gradient(step), 0.0)), count > 0

    losses, present = jax.vmap(of_class)(jnp.arange(probabilities.shape[1]))
    return jnp.sum(jnp.where(present, losses, 0.0)) / jnp.maximum(jnp.sum(present), 1)


def segmentation_loss(
    logits: Float[Array, "P K"], label: Int[Array, " P"], known: Bool[Array, " P"]
) -> Float[Array, ""]:
    """Cross-entropy plus Lovasz's softmax loss, over all known points at once."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_q, jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
    entropy = -jnp.sum(jnp.where(known, chosen, 0.0)) / jnp.maximum(jnp.sum(known), 1)
    return entropy + lovasz_softmax(jnp.exp(log_q), label, known)


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`segmentation_loss` of the whole batch."""
    known = (batch["label"] >= 0) & batch["point_mask"]
    logits = outputs["logits"].reshape(-1, outputs["logits"].shape[-1])
    return segmentation_loss(logits, batch["label"].reshape(-1), known.reshape(-1)), {}


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, "B K K"]]:
    """How many points of each class (rows) were taken for which (columns)."""
    classes = outputs["logits"].shape[-1]
    known = (batch["label"] >= 0) & batch["point_mask"]
    guess = jnp.argmax(outputs["logits"], axis=-1)
    rows = jnp.arange(guess.shape[0])[:, None]
    counts = jnp.zeros((guess.shape[0], classes, classes))
    return {"counts": counts.at[rows, jnp.maximum(batch["label"], 0), guess].add(known.astype(jnp.float32))}


def summarise(totals: dict[str, Any], _tuning: dict[str, Any] | None) -> dict[str, float]:
    """Of the whole set: intersection over union, mean over the classes there are and of each, and accuracy."""
    counts = np.asarray(totals["counts"], np.float64)
    hits, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    there = counts.sum(1) > 0
    shares = hits / np.maximum(union, 1)
    each = {f"iou_{k}": float(share) for k, share in enumerate(shares)}
    return {"miou": float(shares[there].mean()), "accuracy": float(hits.sum() / max(counts.sum(), 1)), **each}


def commonest(batch: Batch) -> dict[str, Array]:
    """Every point belongs to the class that has most points of the training part."""
    prior = batch["prior"].astype(jnp.float32)
    return {"logits": jnp.broadcast_to(prior[:, None], (*batch["label"].shape, prior.shape[-1]))}


def example(*, num_points: int, num_classes: int, cell: float, depth: int, batch_size: int, key: jax.Array) -> Batch:
    """Points in random voxels of a lower corner; every other example lacks its last ones, some labels are unknown."""
    keys = jax.random.split(key, 5)
    side = min(1 << depth, 2 * int(np.ceil(num_points ** (1 / 3))))
    if side**3 < num_points:
        raise ValueError(f"point_segmentation: {num_points} points do not fit in {side}^3 voxels")

    def places(key):
        return jax.random.permutation(key, side**3)[:num_points]

    number = jax.vmap(places)(jax.random.split(keys[0], batch_size))
    cells = jnp.stack([number // side**2, number // side % side, number % side], axis=-1).astype(jnp.int32)
    coord = cell * (cells + jax.random.uniform(keys[1], cells.shape) - side / 2)
    count = jax.random.randint(keys[2], (batch_size,), num_points // 2, num_points + 1)
    present = jnp.arange(num_points) < jnp.where(jnp.arange(batch_size) % 2 == 0, num_points, count)[:, None]
    color = jax.random.uniform(keys[3], coord.shape, minval=-1.0)
    label = jax.random.randint(keys[4], present.shape, -1, num_classes)
    return {
        "coord": jnp.where(present[..., None], coord, 0.0),
        "feat": jnp.where(present[..., None], jnp.concatenate([coord, color], axis=-1), 0.0),
        "cell": jnp.where(present[..., None], cells, 0),
        "point_mask": present,
        "label": jnp.where(present, label, -1),
        "prior": jnp.full((batch_size, num_classes), 1 / num_classes),
    }


def pad(batch: Batch):
    """Three more places for points, with none there."""
    size = batch["label"].shape[1]

    def more(name, values):
        tail = (values.shape[0], 3, *values.shape[2:])
        noise = jax.random.normal(jax.random.key(0), tail) if name in ("coord", "feat") else jnp.zeros(tail)
        return jnp.concatenate([values, noise.astype(values.dtype)], axis=1)

    def unpad(outputs):
        return {k: v[:, :size] if v.ndim > 1 else v for k, v in outputs.items()}

    return {k: v if k == "prior" else more(k, v) for k, v in batch.items()}, unpad


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """The first scenes from above: the classes, what they were taken for, and where a model has one, its first order
    of the points."""
    from matplotlib.figure import Figure

    coord, present, label = (np.asarray(batch[k]) for k in ("coord", "point_mask", "label"))
    guess = np.argmax(np.asarray(outputs["logits"], np.float32), axis=-1)
    shown, columns = min(3, len(coord)), 3 if "scores" in outputs else 2
    figure = Figure(figsize=(3.6 * columns, 3.5 * shown), layout="constrained")
    for row, axes in enumerate(figure.subplots(shown, columns, squeeze=False)):
        chosen = np.flatnonzero(present[row])
        chosen = chosen[np.argsort(coord[row, chosen, 2])]
        x, y, _ = coord[row, chosen].T
        panels = [("class", label[row, chosen], "tab10"), ("taken for", guess[row, chosen], "tab10")]
        if columns == 3:
            score = np.asarray(outputs["scores"], np.float32)[row, chosen, 0]
            panels.append(("place in the first order", np.argsort(np.argsort(score)), "viridis"))
        for axis, (name, values, colors) in zip(axes, panels, strict=True):
            limits = {"vmin": 0, "vmax": 9} if colors == "tab10" else {}
            axis.scatter(x, y, s=7, c=values, cmap=colors, linewidths=0, **limits)
            axis.set_aspect("equal")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name)
    return figure


TASK = Task(
    name="point_segmentation",
    loss=loss,
    metrics=metrics,
    metric="miou",
    lower_is_better=False,
    baselines={"commonest": commonest},
    summarise=summarise,
    pad=pad,
    picture=picture,
    picture_name="segments.png",
)
