"""Weights for tests, drawn without compiling a model's initialisers: no symmetric or zero values hide a path."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from zoo.backbone import Backbone
from zoo.paper import Paper
from zoo.registry import variable_shapes

__all__ = ["drawn"]


def drawn(paper: Paper | Backbone, model: nn.Module, seed: int = 0) -> Any:
    """Kernels that keep the scale of what passes through them, norms and decays near their usual beginnings."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, noise = path[-1].key, rng.normal(size=shape.shape)
        if name == "kernel":
            value = noise * np.prod(shape.shape[:-1]) ** -0.5
        elif name in ("scale", "var", "variance", "D"):
            value = 1 + 0.1 * np.abs(noise)
        elif name == "A_log":
            value = np.log(np.arange(1, shape.shape[-1] + 1)) + 0.1 * noise
        else:
            value = 0.1 * noise
        return jax.numpy.asarray(value, shape.dtype)

    return jax.tree_util.tree_map_with_path(one, variable_shapes(paper, model))
