"""Counting by density: a map of how many things there are in each cell of an image, whose sum is their number.

Batch: `x` (B, H, W, C) image; `density` (B, h, w, 1) things a cell; `count` (B,) their number; `expected` (B,), the
same in every row: the mean number in the training images. Output: (B, h, w, 1).
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BINS", "TASK", "counted", "even_spread", "example", "loss", "metrics", "picture", "summarise"]

BINS = (0, 40, 100, 400)  # lower ends of the ranges of counts that errors are given for


def counted(density: Float[Array, "B h w 1"]) -> Float[Array, " B"]:
    """The number of things in each map."""
    return jnp.sum(density.astype(jnp.float32), axis=(1, 2, 3))


def loss(density: Float[Array, "B h w 1"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of a cell. (Codes of the field take the sum over a map, with learning rates as small.)"""
    return jnp.mean(jnp.square(density.astype(jnp.float32) - batch["density"].astype(jnp.float32))), {}


def metrics(density: Float[Array, "B h w 1"], batch: Batch) -> dict[str, Float[Array, "B *_"]]:
    """Of each image: error and squared error of its count, and both the error and 1 in the range of its true count."""
    error = jnp.abs(counted(density) - batch["count"])
    low = jnp.asarray(BINS, jnp.float32)
    high = jnp.append(low[1:], jnp.inf)
    within = ((batch["count"][:, None] >= low) & (batch["count"][:, None] < high)).astype(jnp.float32)
    return {"mae": error, "squared": jnp.square(error), "by_range": jnp.stack([within * error[:, None], within], -1)}


def summarise(totals: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, float]:
    """Mean absolute and root mean squared error, and the former for each range of true counts that there is."""
    result = {name: float(totals[name] / totals["examples"]) for name in ("mae", "squared")}
    result["rmse"] = result.pop("squared") ** 0.5
    for low, high, (error, size) in zip(BINS, (*BINS[1:], None), totals["by_range"], strict=True):
        if size:
            result[f"mae_from_{low}" if high is None else f"mae_{low}_to_{high - 1}"] = float(error / size)
    return result


def even_spread(batch: Batch) -> Float[Array, "B h w 1"]:
    """As many things as in a training image on average, the same in each cell."""
    target = batch["density"]
    cells = target.shape[1] * target.shape[2]
    return jnp.broadcast_to(batch["expected"][:, None, None, None] / cells, target.shape)


def example(*, height: int, width: int, cell: int, batch_size: int, key: jax.Array, channels: int = 3) -> Batch:
    """Noise, and maps of one thing in every tenth cell on average."""
    keys = jax.random.split(key)
    density = jax.random.bernoulli(keys[1], 0.1, (batch_size, height // cell, width // cell, 1)).astype(jnp.float32)
    count = jnp.sum(density, axis=(1, 2, 3))
    return {
        "x": jax.random.normal(keys[0], (batch_size, height, width, channels)),
        "density": density,
        "count": count,
        "expected": jnp.broadcast_to(jnp.mean(count), count.shape),
    }


def picture(batch: Batch, density: Float[Array, "B h w 1"]) -> "Figure":
    """The first image, its true map and the model's, with their sums."""
    from matplotlib.figure import Figure

    x, true, guess = (jax.device_get(a)[0].astype("float32") for a in (batch["x"], batch["density"], density))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    low, high = float(x.min()), float(x.max())
    panels[0].imshow((x - low) / max(high - low, 1e-12))
    panels[0].set_title(f"{float(jax.device_get(batch['count'])[0]):.0f} there")
    for axes, values, name in ((panels[1], true, "target"), (panels[2], guess, "model")):
        axes.imshow(values[..., 0], vmin=0, vmax=max(float(true.max()), 1e-12))
        axes.set_title(f"{name}: {values.sum():.1f}")
    for axes in panels:
        axes.set_axis_off()
    return figure


TASK = Task(
    name="density_regression",
    loss=loss,
    metrics=metrics,
    metric="mae",
    baselines={"even_spread": even_spread},
    summarise=summarise,
    picture=picture,
    picture_name="density.png",
)
