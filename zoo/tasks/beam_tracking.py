"""Where a flying target is now, from a camera and from radio echoes that come a step later: the beam to point at it.

Batch: `image` (B, T, H, W, 3) frames with all but the target masked, in [0, 1]; `box` (B, T, 4) its box (centre x and
y, width, height, shares of the frame); `echo` (B, T, E) azimuth, elevation and, for E = 3, distance as the radio found
them, 0 where there was no echo, as always in the last step; `y` (B, T, 3) the truth. Angles and distance are
normalised, see `normalize`. Output: a dictionary with `now` (B, Q), the last step's first Q of azimuth, elevation and
distance, and, of models that see, `camera` (B, T, 2), the angles of every frame from that frame alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK", "beam_probes", "codebook", "denormalize", "echo_hold", "example", "kalman_filter", "loss", "metrics",
    "normalize", "picture",
]  # fmt: skip

# Azimuth in [110, 150] degrees, elevation in [10, 80] degrees, distance in [100, 300] m.
OFFSET, SPAN = np.array([110.0, 10.0, 100.0], np.float32), np.array([40.0, 70.0, 200.0], np.float32)


def normalize(values: Float[Array, "*B Q"]) -> Float[Array, "*B Q"]:
    """Azimuth (degrees), elevation (degrees) and distance (m), or the first of them, as shares of their ranges."""
    return (values - OFFSET[: values.shape[-1]]) / SPAN[: values.shape[-1]]


def denormalize(shares: Float[Array, "*B Q"]) -> Float[Array, "*B Q"]:
    """Degrees, degrees and metres of shares of their ranges."""
    return OFFSET[: shares.shape[-1]] + shares * SPAN[: shares.shape[-1]]


def codebook(azimuths: int = 16, elevations: int = 28) -> Float[Array, "K 2"]:
    """Directions in degrees of beams that tile the range, azimuth by azimuth: 2.5 by 2.5 degrees by default."""
    shares = [(jnp.arange(count) + 0.5) / count for count in (azimuths, elevations)]
    return denormalize(jnp.stack(jnp.meshgrid(*shares, indexing="ij"), axis=-1).reshape(-1, 2))


def beam_probes(
    predicted: Float[Array, "B 2"], truth: Float[Array, "B 2"], beams: Float[Array, "K 2"]
) -> Float[Array, " B"]:
    """How many beams are probed until the target's is found, the nearest to the prediction (degrees) first."""

    def squared(angles):
        return jnp.sum(jnp.square(angles[:, None] - beams), axis=-1)

    order = squared(predicted)
    right = jnp.argmin(squared(truth), axis=-1)[:, None]
    return 1.0 + jnp.sum(order < jnp.take_along_axis(order, right, axis=-1), axis=-1)


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Squared error of normalised quantities: their mean over a frame's two angles, plus their sum of the last step."""
    now = outputs["now"].astype(jnp.float32)
    tracking = jnp.sum(jnp.mean(jnp.square(now - batch["y"][:, -1, : now.shape[-1]]), axis=0))
    if "camera" not in outputs:
        return tracking, {}
    seeing = jnp.mean(jnp.square(outputs["camera"].astype(jnp.float32) - batch["y"][..., :2]))
    return seeing + tracking, {"camera_loss": seeing}


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each example: mean squared (degrees^2) and absolute error (degrees) of the two angles now, the beams probed
    until the target is found, and the mean squared error of the camera alone."""
    truth = denormalize(batch["y"][..., :2])
    now = denormalize(outputs["now"][:, :2].astype(jnp.float32))
    error = now - truth[:, -1]
    scores = {
        "mse": jnp.mean(jnp.square(error), axis=-1),
        "mae": jnp.mean(jnp.abs(error), axis=-1),
        "probes": beam_probes(now, truth[:, -1], codebook()),
    }
    if "camera" in outputs:
        seen = denormalize(outputs["camera"].astype(jnp.float32)) - truth
        scores["camera_mse"] = jnp.mean(jnp.square(seen), axis=(1, 2))
    return scores


def _received(echo: Float[Array, "B T E"]) -> Shaped[Array, "B T"]:
    return jnp.any(echo != 0, axis=-1)


def echo_hold(batch: Batch) -> dict[str, Float[Array, "B 2"]]:
    """The target is where the last echo found it (in the middle of the range if there was none)."""
    echo = batch["echo"].astype(jnp.float32)
    steps = jnp.arange(echo.shape[1])
    last = jnp.max(jnp.where(_received(echo), steps, -1), axis=1)
    held = jnp.take_along_axis(echo[..., :2], jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    return {"now": jnp.where(last[:, None] >= 0, held, 0.5)}


def kalman_filter(batch: Batch, *, acceleration: float = 0.15, noise: float = 0.3) -> dict[str, Float[Array, "B 2"]]:
    """Constant velocity with white acceleration, filtered over the echoes; `acceleration` and `noise` are standard
    deviations in degrees a step^2 and degrees."""
    echo = batch["echo"].astype(jnp.float32)
    angles, received = echo[..., :2] * SPAN[:2], _received(echo)
    move = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    disturbance = acceleration**2 * jnp.array([[0.25, 0.5], [0.5, 1.0]])

    def one(carry, step):
        state, spread = carry  # (B, 2 angles, position and velocity), (B, 2, 2)
        state, spread = state @ move.T, move @ spread @ move.T + disturbance
        found, there = step
        gain = jnp.where(there[:, None], spread[..., 0] / (spread[:, 0, :1] + noise**2), 0.0)
        state = state + gain[:, None] * (found - state[..., 0])[..., None]
        return (state, spread - gain[..., None] * spread[:, :1]), None

    count = echo.shape[0]
    start = jnp.stack([jnp.broadcast_to(0.5 * SPAN[:2], (count, 2)), jnp.zeros((count, 2))], axis=-1)
    # Nothing is known of the place at first, and of the speed that it is a few degrees a step.
    spread = jnp.broadcast_to(jnp.diag(jnp.array([1e4, 4.0])), (count, 2, 2))
    (state, _), _ = jax.lax.scan(one, (start, spread), (jnp.moveaxis(angles, 1, 0), received.T))
    return {"now": state[..., 0] / SPAN[:2]}


def example(
    *, lookback: int, image_size: tuple[int, int], echo_channels: int, batch_size: int, key: jax.Array
) -> Batch:
    """Random frames, boxes and places; every echo of the past is there."""
    keys = jax.random.split(key, 3)
    y = jax.random.uniform(keys[0], (batch_size, lookback, 3), minval=0.1, maxval=0.9)
    echo = y[..., :echo_channels] + 0.02 * jax.random.normal(keys[1], (batch_size, lookback, echo_channels))
    image, box = jnp.split(jax.random.uniform(keys[2], (batch_size, lookback, image_size[0] * image_size[1] * 3 + 4)),
                           [image_size[0] * image_size[1] * 3], axis=-1)  # fmt: skip
    return {
        "image": image.reshape(batch_size, lookback, *image_size, 3),
        "box": box,
        "echo": echo.at[:, -1].set(0.0),
        "y": y,
    }


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """The first windows in the plane of the angles: the true way, the echoes, what the camera saw, the prediction."""
    from matplotlib.figure import Figure

    truth, echo = (np.asarray(denormalize(batch[name][..., :2])) for name in ("y", "echo"))
    now = np.asarray(denormalize(outputs["now"][:, :2]))
    there = np.asarray(_received(batch["echo"]))
    shown = min(6, len(truth))
    figure = Figure(figsize=(9, 3.2 * -(-shown // 3)), layout="constrained")
    for i, axes in enumerate(figure.subplots(-(-shown // 3), min(3, shown), squeeze=False).ravel()[:shown]):
        axes.plot(*truth[i].T, color="black", linewidth=1.2, label="truth")
        axes.plot(*echo[i, there[i]].T, "x", color="tab:blue", label="echoes")
        if "camera" in outputs:
            seen = np.asarray(denormalize(outputs["camera"][i]))
            axes.plot(*seen.T, ".", color="0.6", label="camera")
        axes.plot(*truth[i, -1], "o", color="black")
        axes.plot(*now[i], "o", color="tab:red", label="prediction")
        if i == 0:
            axes.legend(frameon=False)
        axes.set_xlabel("azimuth (degrees)")
        axes.set_ylabel("elevation (degrees)")
    return figure


TASK = Task(
    name="beam_tracking",
    loss=loss,
    metrics=metrics,
    metric="mse",
    baselines={"echo_hold": echo_hold, "kalman": kalman_filter},
    picture=picture,
    picture_name="tracking.png",
)
