"""What pose a body has in space, from its joints in a picture, in every frame of a clip.

Batch: `x` (B, T, 17, 3) keypoints x, y and the detector's confidence, x from -1 to 1 over the picture's width; `y`
(B, T, 17, 3) the pose: places relative to the root (joint 0), in the same unit at the root's distance, y downwards
and z away from the camera. Joints and tree are those of Human3.6M. Output: a pose, or a dictionary with `pose`.
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

__all__ = ["LEFT", "PARENTS", "RIGHT", "TASK", "at_root", "example", "flat", "loss", "metrics", "mirror", "picture"]

# Pelvis; right hip, knee, ankle; left ones; spine, thorax, neck, head; left shoulder, elbow, wrist; right ones.
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
LEFT, RIGHT = (4, 5, 6, 11, 12, 13), (1, 2, 3, 14, 15, 16)


def mirror(x: Float[Array, "*B 17 3"]) -> Float[Array, "*B 17 3"]:
    """Seen in a mirror: x changes its sign, and left joints are right ones."""
    order = np.arange(len(PARENTS))
    order[[*LEFT, *RIGHT]] = [*RIGHT, *LEFT]
    return x[..., order, :] * jnp.array([-1.0, 1.0, 1.0], x.dtype)


def _pose(outputs: Array | Mapping[str, Array]) -> Float[Array, "B T 17 3"]:
    return (outputs["pose"] if isinstance(outputs, Mapping) else outputs).astype(jnp.float32)


def _length(x: Float[Array, "*B 3"]) -> Float[Array, "*B"]:
    squared = jnp.sum(jnp.square(x), axis=-1)
    # A perfect joint has the gradient 0, not the NaN of a root at 0.
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def loss(outputs, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean distance of joints from where they are."""
    return jnp.mean(_length(_pose(outputs) - batch["y"])), {}


def metrics(outputs, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each clip, in the unit of the pose: mean distance of joints, roots laid on one another (mpjpe) and each frame
    turned, scaled and moved to fit best (pa_mpjpe); that of their steps from frame to frame (mpjve); and how far bone
    lengths, which do not change, stray from their means over the clip (bone_drift)."""
    found, truth = _pose(outputs), batch["y"].astype(jnp.float32)
    found, truth = (pose - pose[..., :1, :] for pose in (found, truth))
    fitted = layers.apply_similarity(found, *layers.similarity_alignment(found, truth))
    steps = jnp.diff(found, axis=1) - jnp.diff(truth, axis=1)
    bones = _length(layers.bone_offsets(found, parents=PARENTS)[..., 1:, :])
    return {
        "mpjpe": jnp.mean(_length(found - truth), axis=(1, 2)),
        "pa_mpjpe": jnp.mean(_length(fitted - truth), axis=(1, 2)),
        "mpjve": jnp.mean(_length(steps), axis=(1, 2)),
        "bone_drift": jnp.mean(jnp.std(bones, axis=1), axis=-1),
    }


def at_root(batch: Batch) -> Float[Array, "B T 17 3"]:
    """All joints in the root: its error is the mean distance of joints from the root."""
    return jnp.zeros_like(batch["y"])


def flat(batch: Batch) -> Float[Array, "B T 17 3"]:
    """The keypoints about the root's, all as far away as the root."""
    keypoints = batch["x"][..., :2] - batch["x"][..., :1, :2]
    return jnp.concatenate([keypoints, jnp.zeros_like(keypoints[..., :1])], axis=-1)


def example(*, frames: int, batch_size: int, key: jax.Array) -> Batch:
    """Random places and keypoints, rightly shaped."""
    places, noise, sure = jax.random.split(key, 3)
    shape = (batch_size, frames, len(PARENTS))
    pose = 0.3 * jax.random.normal(places, (*shape, 3))
    keypoints = pose[..., :2] + 0.05 * jax.random.normal(noise, (*shape, 2))
    confidence = jax.random.uniform(sure, (*shape, 1))
    return {"x": jnp.concatenate([keypoints, confidence], axis=-1), "y": pose - pose[:, :, :1]}


def picture(batch: Batch, outputs) -> "Figure":
    """Three frames of the first clip: the keypoints, and the pose found beside the true one from the front and from
    the side."""
    from matplotlib.figure import Figure

    seen, truth, found = (np.asarray(jax.device_get(a))[0] for a in (batch["x"], batch["y"], _pose(outputs)))
    truth, found = (pose - pose[:, :1] for pose in (truth, found))
    frames = np.linspace(0, len(seen) - 1, 3).astype(int)
    figure = Figure(figsize=(9, 9), layout="constrained")
    grid = figure.subplots(len(frames), 3, squeeze=False)
    for row, frame in zip(grid, frames, strict=True):
        shown = (([(seen, "0.4", "keypoints")], 0), *(([(truth, "black", "truth"), (found, "tab:red", "found")], a)
                                                       for a in (0, 2)))  # fmt: skip
        for axes, (poses, across) in zip(row, shown, strict=True):
            for pose, color, label in poses:
                for child, parent in enumerate(PARENTS):
                    if parent >= 0:
                        ends = pose[frame, [parent, child]]
                        name = label if child == 1 else None
                        axes.plot(ends[:, across], ends[:, 1], color=color, linewidth=1.6, label=name)
            axes.set_aspect("equal", adjustable="datalim")
            axes.invert_yaxis()
        row[0].set_ylabel(f"frame {frame}")
    for axes, title in zip(grid[0], ("seen", "from the front", "from the side"), strict=True):
        axes.set_title(title)
        axes.legend(loc="best", frameon=False)
    return figure


TASK = Task(
    name="pose_lifting",
    loss=loss,
    metrics=metrics,
    metric="mpjpe",
    baselines={"at_root": at_root, "flat": flat},
    picture=picture,
    picture_name="poses.png",
)
