"""A mesh in any pose, made to move as a video shows.

Batch: `base` (B, N, 3) vertices of the mesh, in the unit of its largest coordinate; `vertex_mask` (B, N) is True where
there is a vertex, and the absent ones come last; `edges` (B, E, 2) pairs of joined vertices, each pair once, -1 where
there is none; `video` (B, L, C) features of the driving video; `frames` (B, T, N, 3) where the vertices are in its
frames. Output: a dictionary with `first` (B, N, 3), the mesh in the video's first frame, and `motion` (B, T, N, 3),
what moves from there: frame t is first + motion_t. Autoencoders see `frames` too; models that animate without them and
also restore them give that as `reconstructed_first` and `reconstructed_motion`. What is trained are the sums of
`loss_*` (B,), or without them the distance of vertices.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK",
    "as_given",
    "distance",
    "example",
    "loss",
    "mean_over_vertices",
    "metrics",
    "pad",
    "picture",
    "still",
]

_ABNORMAL = 2.0  # an edge that is longer or shorter than the true one by more than this factor


def distance(x: Float[Array, "*B 3"], y: Float[Array, "*B 3"]) -> Float[Array, "*B"]:
    """|x - y|, with the gradient 0 at 0."""
    squared = jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def mean_over_vertices(
    values: Float[Array, "B *T N"], mask: Bool[Array, "B N"], *, per_instance: bool = True
) -> Float[Array, " B"]:
    """Of each mesh, the mean over vertices that are there and frames; or, for means over batches that give each vertex
    the same weight, the sum over the number that the batch has on average."""
    present = jnp.reshape(mask, (mask.shape[0], *(1,) * (values.ndim - 2), mask.shape[1]))
    axes = tuple(range(1, values.ndim))
    total = jnp.sum(jnp.where(present, values, 0.0), axis=axes)
    count = jnp.sum(jnp.broadcast_to(present, values.shape), axis=axes).astype(jnp.float32)
    return total / jnp.maximum(count if per_instance else jnp.mean(count), 1.0)


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the means of all that the model calls a loss; without any, the mean distance of vertices."""
    parts = {name: jnp.mean(value) for name, value in outputs.items() if name.startswith("loss_")}
    return (sum(parts.values()), parts) if parts else (jnp.mean(metrics(outputs, batch)["error"]), {})


def _errors(first: Array, motion: Array, batch: Batch, prefix: str = "") -> dict[str, Float[Array, " B"]]:
    truth, mask = batch["frames"], batch["vertex_mask"]
    errors = {
        "error": distance(first[:, None] + motion, truth),
        "first_error": distance(first, truth[:, 0]),
        "motion_error": distance(motion, truth - truth[:, :1]),
    }
    return {prefix + name: mean_over_vertices(value, mask) for name, value in errors.items()}


def _edge_lengths(positions: Float[Array, "B T N 3"], batch: Batch) -> Float[Array, "B T E"]:
    ends = jnp.maximum(batch["edges"], 0)
    start, stop = (jnp.take_along_axis(positions, ends[:, None, :, i, None], axis=2) for i in (0, 1))
    return distance(start, stop)


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each mesh, in its unit: the mean distance of vertices from where they are (error), of the first frame and of
    the motion from it; the share of edges, in all frames, of less than half or more than twice their length; and the
    same errors of what was restored from `frames`, where that is something else."""
    first, motion = outputs["first"].astype(jnp.float32), outputs["motion"].astype(jnp.float32)
    found, true = (_edge_lengths(p, batch) for p in (first[:, None] + motion, batch["frames"]))
    ratio = found / (true + 1e-8)
    abnormal = ((ratio > _ABNORMAL) | (ratio < 1 / _ABNORMAL)).astype(jnp.float32)
    scores = _errors(first, motion, batch)
    scores["abnormal_edges"] = mean_over_vertices(abnormal, batch["edges"][..., 0] >= 0)
    restored = (outputs.get(f"reconstructed_{name}", outputs[name]) for name in ("first", "motion"))
    return scores | _errors(*restored, batch, "reconstruction_")


def as_given(batch: Batch) -> dict[str, Array]:
    """The mesh stays as it was given."""
    return {"first": batch["base"], "motion": jnp.zeros_like(batch["frames"])}


def still(batch: Batch) -> dict[str, Array]:
    """The true first frame for ever: its error is how much moves."""
    return {"first": batch["frames"][:, 0], "motion": jnp.zeros_like(batch["frames"])}


def example(
    *, frames: int, num_vertices: int, num_edges: int, video_shape: tuple[int, int], batch_size: int, key: jax.Array
) -> Batch:
    """Random vertices, each joined to the next two, that walk at random; every other mesh lacks its last vertices."""
    keys = jax.random.split(key, 5)
    count = jax.random.randint(keys[0], (batch_size,), max(num_vertices // 2, 1), num_vertices + 1)
    count = jnp.where(jnp.arange(batch_size) % 2 == 0, num_vertices, count)
    present = jnp.arange(num_vertices) < count[:, None]
    start = jnp.arange(num_edges) // 2
    edges = jnp.stack([start, start + 1 + jnp.arange(num_edges) % 2], axis=-1)
    base = 0.5 * jax.random.normal(keys[1], (batch_size, num_vertices, 3))
    steps = 0.1 * jax.random.normal(keys[2], (batch_size, frames, num_vertices, 3))
    jump = 0.3 * jax.random.normal(keys[3], (batch_size, 1, num_vertices, 3))
    return {
        "base": jnp.where(present[..., None], base, 0.0),
        "frames": jnp.where(present[:, None, :, None], base[:, None] + jump + jnp.cumsum(steps, axis=1), 0.0),
        "vertex_mask": present,
        "edges": jnp.where(edges[None, :, 1:] < count[:, None, None], edges[None], -1),
        "video": jax.random.normal(keys[4], (batch_size, *video_shape)),
    }


def pad(batch: Batch):
    """Two more places for vertices and three for edges, with none there."""
    number = batch["base"].shape[1]

    def noise(x):
        more = jax.random.normal(jax.random.key(0), (*x.shape[:-2], 2, 3)).astype(x.dtype)
        return jnp.concatenate([x, more], axis=-2)

    padded = {
        "base": noise(batch["base"]),
        "frames": noise(batch["frames"]),
        "vertex_mask": jnp.pad(batch["vertex_mask"], ((0, 0), (0, 2))),
        "edges": jnp.pad(batch["edges"], ((0, 0), (0, 3), (0, 0)), constant_values=-1),
    }
    return {**batch, **padded}, lambda out: {n: v if v.ndim < 3 else v[..., :number, :] for n, v in out.items()}


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """The first meshes, in rows: as given, and in three frames as they are (grey) and as they were found (red), seen
    along the direction in which they are thinnest."""
    from matplotlib.figure import Figure

    base, edges, truth, first, motion = (
        np.asarray(jax.device_get(a), np.float32)
        for a in (batch["base"], batch["edges"], batch["frames"], outputs["first"], outputs["motion"])
    )
    found, shown, times = first[:, None] + motion, min(4, len(base)), np.linspace(0, truth.shape[1] - 1, 3).astype(int)
    figure = Figure(figsize=(10, 2.6 * shown), layout="constrained")
    grid = figure.subplots(shown, 4, squeeze=False)
    for row, axes in enumerate(grid):
        pairs = edges[row, edges[row, :, 0] >= 0].astype(int)
        seen = np.sort(np.argsort(np.ptp(truth[row][:, np.unique(pairs)], axis=(0, 1)))[1:])

        def draw(at, positions, color, pairs=pairs, seen=seen, **style):
            lines = np.pad(positions[pairs][..., seen], ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
            at.plot(*lines.reshape(-1, 2).T, color=color, linewidth=0.7, **style)

        draw(axes[0], base[row], "black", label="as given")
        for at, time in zip(axes[1:], times, strict=True):
            draw(at, truth[row, time], "0.6", label="truth")
            draw(at, found[row, time], "tab:red", label="found")
            at.set_title(f"frame {time + 1}")
        for at in axes:
            at.set_aspect("equal", adjustable="datalim")
            at.set_axis_off()
            if row == 0:
                at.legend(loc="best", frameon=False)
    return figure


TASK = Task(
    name="mesh_animation",
    loss=loss,
    metrics=metrics,
    metric="error",
    baselines={"as_given": as_given, "still": still},
    pad=pad,
    picture=picture,
    picture_name="animation.png",
)
