"""The rest of a surface of which one side was scanned, as a set of points.

Batch: `x` (B, N, 3) points seen, in the unit of the shape (data sets scale it to the unit sphere); `point_mask` (B, N)
is True where there is a point, and the absent ones come last; `y` (B, M, 3) points all over the surface. Output: a
dictionary with `points` (B, D, 3) all over the surface; where a model has them also `coarse` (B, S, 3), fewer of them,
`penalty` (B,), what else its loss is to count, `weights` (B, 2), of the coarse and the fine distance in it, and
`points_mask` (B, D), which of the points count.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import layers
from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "as_seen", "example", "loss", "metrics", "pad", "picture"]

_NEAR = 0.01  # of a point that the F-score takes for found


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Chamfer distance (the mean of both ways) of all clouds that a model gives, plus its penalty."""
    count = batch["y"].shape[0]
    weights = outputs.get("weights", jnp.ones((count, 2))).astype(jnp.float32)
    total = weights[:, 1] * layers.chamfer_distance(outputs["points"], batch["y"])
    if "coarse" in outputs:
        total = total + weights[:, 0] * layers.chamfer_distance(outputs["coarse"], batch["y"])
    if "penalty" in outputs:
        total = total + outputs["penalty"].astype(jnp.float32)
    return jnp.mean(total), {}


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each shape: a thousand times its Chamfer distances L1 (mean of both ways' mean distances) and L2 (sum of both
    ways' mean squares), as tables have them, and the F-score at a hundredth of the unit."""
    points, mask = outputs["points"], outputs.get("points_mask")
    there = layers.nearest_points(points, batch["y"], 1)[1][..., 0]
    back = layers.nearest_points(batch["y"], points, 1, mask=mask)[1][..., 0]
    counted = jnp.ones(there.shape, bool) if mask is None else mask

    def over_points(values):
        return jnp.sum(jnp.where(counted, values, 0.0), axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1)

    precision = over_points((there < _NEAR**2).astype(jnp.float32))
    recall = jnp.mean((back < _NEAR**2).astype(jnp.float32), axis=1)
    return {
        "cd_l1": 500 * (over_points(jnp.sqrt(there)) + jnp.mean(jnp.sqrt(back), axis=1)),
        "cd_l2": 1000 * (over_points(there) + jnp.mean(back, axis=1)),
        "f_score": 2 * precision * recall / jnp.maximum(precision + recall, 1e-6),
    }


def as_seen(batch: Batch) -> dict[str, Array]:
    """Nothing is added to what was seen."""
    return {"points": batch["x"], "points_mask": batch["point_mask"]}


def example(*, num_points: int, num_targets: int, batch_size: int, key: jax.Array) -> Batch:
    """Points on ellipsoids, the upper half unseen; every other example lacks its last points."""
    keys = jax.random.split(key, 4)
    radii = jax.random.uniform(keys[0], (batch_size, 1, 3), minval=0.3, maxval=1.0)

    def surface(key, count):
        direction = jax.random.normal(key, (batch_size, count, 3))
        return radii * direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)

    seen = surface(keys[1], num_points)
    seen = seen.at[..., 2].set(-jnp.abs(seen[..., 2]))
    count = jax.random.randint(keys[3], (batch_size,), num_points // 2, num_points + 1)
    present = jnp.arange(num_points) < jnp.where(jnp.arange(batch_size) % 2 == 0, num_points, count)[:, None]
    return {
        "x": jnp.where(present[..., None], seen, 0.0),
        "point_mask": present,
        "y": surface(keys[2], num_targets),
    }


def pad(batch: Batch):
    """Three more places for points, with none there."""
    noise = jax.random.normal(jax.random.key(0), (batch["x"].shape[0], 3, 3)).astype(batch["x"].dtype)
    nobody = jnp.zeros(noise.shape[:2], bool)
    padded = {
        "x": jnp.concatenate([batch["x"], noise], axis=1),
        "point_mask": jnp.concatenate([batch["point_mask"], nobody], axis=1),
    }
    return {**batch, **padded}, lambda outputs: outputs


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """The first shapes, in rows: what was seen, what the model makes of it, and the truth; shades are heights."""
    from matplotlib.figure import Figure

    seen, present, truth, made = (np.asarray(v) for v in (batch["x"], batch["point_mask"], batch["y"],
                                                          outputs["points"]))  # fmt: skip
    shown = min(4, len(seen))
    figure = Figure(figsize=(8.4, 2.7 * shown), layout="constrained")
    for row in range(shown):
        clouds = {"seen": seen[row, present[row]], "completed": made[row].astype(np.float32), "truth": truth[row]}
        reach = np.abs(clouds["truth"]).max()
        for column, (name, cloud) in enumerate(clouds.items()):
            axes = figure.add_subplot(shown, 3, 3 * row + column + 1, projection="3d")
            axes.scatter(*cloud.T, s=2500 / (300 + len(cloud)), c=cloud[:, 2], cmap="viridis", linewidths=0)
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
            axes.set_box_aspect((1, 1, 1))
            axes.view_init(elev=25, azim=-60)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(name)
    return figure


TASK = Task(
    name="point_completion",
    loss=loss,
    metrics=metrics,
    metric="cd_l1",
    baselines={"as_seen": as_seen},
    pad=pad,
    picture=picture,
    picture_name="completions.png",
)
