"""Bringing one object to another with a robot, learned from demonstrations.

Batch: of T moments seen, `environment` (B, T, N, E) points of the scene, x, y, z first; `active` and `passive`
(B, T, N, 3), points of the object that is moved and of the one that stays; `active_features` and `passive_features`
(B, T, N, F), what a foundation model says of each of those points; `state` (B, T, S) of the robot; and `y` (B, P, A),
the states (A <= S) that follow each moment from the first one seen on. Output: a dictionary with `actions` (B, P, A).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REACH", "TASK", "example", "extrapolate", "hold", "loss", "metrics", "picture"]

REACH = 0.05  # the last action counts as right this near, in the unit of actions


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of actions."""
    return jnp.mean(jnp.square(outputs["actions"].astype(jnp.float32) - batch["y"])), {}


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each example: the mean distance of its actions from the demonstrated ones, that of the last one, and whether
    the last one is right."""
    apart = jnp.linalg.norm(outputs["actions"].astype(jnp.float32) - batch["y"], axis=-1)
    return {
        "action_error": jnp.mean(apart, axis=-1),
        "final_error": apart[:, -1],
        "success": (apart[:, -1] < REACH).astype(jnp.float32),
    }


def hold(batch: Batch) -> dict[str, Float[Array, "B P A"]]:
    """The robot stays as it is."""
    now = batch["state"][:, -1:, : batch["y"].shape[-1]]
    return {"actions": jnp.broadcast_to(now, batch["y"].shape)}


def extrapolate(batch: Batch) -> dict[str, Float[Array, "B P A"]]:
    """The robot goes on as it last did."""
    state = batch["state"][..., : batch["y"].shape[-1]]
    now, before = state[:, -1:], state[:, -2:-1] if state.shape[1] > 1 else state[:, -1:]
    ahead = jnp.arange(batch["y"].shape[1])[:, None] + 2.0 - state.shape[1]
    return {"actions": now + ahead * (now - before)}


def example(
    *,
    horizon: int,
    moments: int,
    points: int,
    channels: int,
    features: tuple[int, int],
    state: int,
    action: int,
    batch_size: int,
    key: jax.Array,
) -> Batch:
    """Random scenes, rightly shaped: `channels` of the environment, `features` of active and passive points."""
    keys = jax.random.split(key, 7)
    seen = (batch_size, moments)
    draw = {
        "environment": (*seen, points, channels),
        "active": (*seen, points, 3),
        "passive": (*seen, points, 3),
        "active_features": (*seen, points, features[0]),
        "passive_features": (*seen, points, features[1]),
        "state": (*seen, state),
        "y": (batch_size, horizon, action),
    }
    return {
        name: jax.random.uniform(k, shape, minval=-1.0, maxval=1.0)
        for k, (name, shape) in zip(keys, draw.items(), strict=True)
    }


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """Up to six scenes from above: both objects, points darker the more the foundation model marks them, with the way
    that was demonstrated and the one that was found."""
    from matplotlib.figure import Figure

    shown = {name: np.asarray(jax.device_get(a)) for name, a in batch.items()}
    found = np.asarray(jax.device_get(outputs["actions"]))
    count = min(6, len(found))
    figure = Figure(figsize=(3.2 * min(count, 3), 3.2 * -(-count // 3)), layout="constrained")
    for i, axes in enumerate(figure.subplots(-(-count // 3), min(count, 3), squeeze=False).ravel()[:count]):
        for name, mark in (("active", "o"), ("passive", "s")):
            shade = shown[f"{name}_features"][i, -1].max(axis=-1)
            axes.scatter(*shown[name][i, -1, :, :2].T, c=shade, cmap="Blues", vmin=-0.3, vmax=1, s=8, marker=mark)
        for way, color, label in ((shown["y"][i], "black", "demonstrated"), (found[i], "tab:red", "found")):
            axes.plot(*way[:, :2].T, color=color, linewidth=1.4, marker=".", markersize=4, label=label)
        axes.set_aspect("equal", adjustable="datalim")
        if i == 0:
            axes.legend(loc="best", frameon=False)
    return figure


TASK = Task(
    name="manipulation",
    loss=loss,
    metrics=metrics,
    metric="final_error",
    baselines={"hold": hold, "extrapolate": extrapolate},
    picture=picture,
    picture_name="actions.png",
)
