"""From which directions a receiver hears a transmitter, as an image of all directions, given where the transmitter is.

Batch: `tx` (B, 3) places of the transmitter, in metres; `receiver` (B, 3) and `rotation` (B, 3, 3) the receiver's pose;
`y` (B, H, W) the power from each direction, 0 to 1, elevation down and azimuth across; `mean` (B, H, W) the mean of the
training part. Output: a dictionary with `spectrum` (B, H, W), and whatever else a model's loss needs.
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

__all__ = ["TASK", "example", "loss", "mean_spectrum", "metrics", "picture"]

_SSIM_SHARE = 0.2  # of the loss


def _similarity(spectrum: Float[Array, "B H W"], truth: Float[Array, "B H W"]) -> Float[Array, " B"]:
    return layers.ssim(spectrum.astype(jnp.float32)[..., None], truth.astype(jnp.float32)[..., None])


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """0.8 times the mean absolute error plus 0.2 (1 - SSIM), as in Gaussian splatting."""
    found = metrics(outputs, batch)
    error = (1 - _SSIM_SHARE) * found["l1"] + _SSIM_SHARE * (1 - found["ssim"])
    return jnp.mean(error), {}


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each spectrum: structural similarity and mean absolute error."""
    spectrum = outputs["spectrum"].astype(jnp.float32)
    return {
        "ssim": _similarity(spectrum, batch["y"]),
        "l1": jnp.mean(jnp.abs(spectrum - batch["y"]), axis=(1, 2)),
    }


def mean_spectrum(batch: Batch) -> dict[str, Array]:
    """Wherever the transmitter is, the mean of the training part."""
    return {"spectrum": batch["mean"]}


def example(*, height: int, width: int, batch_size: int, key: jax.Array) -> Batch:
    """Random places, and spectra of a few random lobes."""
    places, lobes = jax.random.split(key)
    lobe = jax.random.uniform(lobes, (batch_size, 3, 2))
    rows, columns = jnp.arange(height) / height, jnp.arange(width) / width
    away = (rows[:, None] - lobe[..., 0, None, None]) ** 2 + (columns - lobe[..., 1, None, None]) ** 2
    y = jnp.max(jnp.exp(-away / 0.02), axis=1)
    return {
        "tx": jax.random.normal(places, (batch_size, 3)),
        "receiver": jnp.tile(jnp.array([0.3, -0.2, 0.1]), (batch_size, 1)),
        "rotation": jnp.tile(jnp.eye(3), (batch_size, 1, 1)),
        "y": y,
        "mean": jnp.broadcast_to(jnp.mean(y, axis=0), y.shape),
    }


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """The first transmitters: the spectrum received, the one rendered, and their difference."""
    from matplotlib.figure import Figure

    truth, made = np.asarray(batch["y"]), np.asarray(outputs["spectrum"], np.float32)
    shown = min(4, len(truth))
    figure = Figure(figsize=(9.5, 1.9 * shown), layout="constrained")
    for row, axes in enumerate(figure.subplots(shown, 3, squeeze=False)):
        panels = {"received": truth[row], "rendered": made[row], "difference": made[row] - truth[row]}
        for axis, (name, values) in zip(axes, panels.items(), strict=True):
            limits = (-1, 1, "coolwarm") if name == "difference" else (0, 1, "magma")
            axis.imshow(values, vmin=limits[0], vmax=limits[1], cmap=limits[2], extent=(-180, 180, 90, -90))
            if row == 0:
                axis.set_title(name)
            if row == shown - 1:
                axis.set_xlabel("azimuth (degrees)")
        axes[0].set_ylabel("elevation (degrees)")
    return figure


TASK = Task(
    name="spectrum_rendering",
    loss=loss,
    metrics=metrics,
    metric="ssim",
    lower_is_better=False,
    baselines={"mean_spectrum": mean_spectrum},
    picture=picture,
    picture_name="spectra.png",
)
