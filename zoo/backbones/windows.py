"""Attention inside shifted windows of a grid as Swin's codes lay it out: padding takes part (arXiv:2103.14030)."""

import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from layers import DenseMask
from zoo.backbones.hooks import AttentionHook, Layer, attend, show
from zoo.blocks import Linear

__all__ = ["POOLS", "WindowAttention", "WindowLayer", "pooled_pixels"]

POOLS = ("avg", "max", "avgmax", "catavgmax")
"""The kinds of `pooled_pixels`."""

Sizes = tuple[int, ...]


class WindowAttention(nn.Module):
    """Every token of a grid attends to its window's, shifted cyclically by `shift`.

    The table of biases is that of `table_window`; a smaller window takes the leading part of its index, as MONAI does.
    None: there are no biases.
    """

    num_heads: int
    head_dim: int
    window: Sizes
    shift: Sizes
    table_window: Sizes | None
    hook: AttentionHook
    layer: Layer
    query_bias: bool = True
    pad_first: bool = False  # padding is added before the shift, not after

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        spatial, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
        y = layers.pad_to_windows(x, self.window) if self.pad_first else x
        y = jnp.roll(y, [-s for s in self.shift], axes)
        y = layers.pad_to_windows(y, self.window)
        padded = y.shape[1:-1]
        windows = layers.partition_windows(y, self.window)
        batch, count, tokens, width = windows.shape
        windows = windows.reshape(batch * count, tokens, width)
        heads = (batch * count, tokens, self.num_heads, self.head_dim)
        query, key, value = (
            Linear(self.num_heads * self.head_dim, use_bias=self.query_bias, name=name)(windows).reshape(heads)
            for name in ("query", "key", "value")
        )
        bias, mask = None, None
        if self.table_window is not None:
            rows = math.prod(2 * w - 1 for w in self.table_window)
            table = self.param("bias_table", nn.initializers.truncated_normal(0.02), (rows, self.num_heads))
            index = layers.window_relative_index(self.table_window)[:tokens, :tokens]
            bias = jnp.moveaxis(jnp.asarray(table, x.dtype)[index], -1, 0)
        if any(self.shift):
            may_meet = jnp.asarray(layers.window_shift_mask(padded, self.window, self.shift))
            mask = DenseMask(jnp.tile(may_meet[:, None], (batch, 1, 1, 1)))
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=mask, bias=bias)
        mixed = Linear(width, name="out")(mixed.reshape(batch, count, tokens, -1))
        y = layers.merge_windows(mixed, self.window, padded)
        cut = tuple(slice(0, n) for n in spatial)
        if self.pad_first:
            return jnp.roll(y, self.shift, axes)[(slice(None), *cut)]
        return jnp.roll(y[(slice(None), *cut)], self.shift, axes)


class WindowLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on a grid."""

    attention: partial  # a WindowAttention without its name
    hidden: int  # width inside the MLP
    norm_epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        show(self, "hidden_states", "input", x)

        def norm(name: str) -> nn.Module:
            return nn.LayerNorm(epsilon=self.norm_epsilon, use_fast_variance=False, name=name)

        x = x + self.attention(name="attention")(norm("attention_norm")(x))
        y = layers.gelu(Linear(self.hidden, name="fc1")(norm("mlp_norm")(x)))
        return x + Linear(x.shape[-1], name="fc2")(y)


def pooled_pixels(x: Float[Array, "B *S C"], kind: str) -> Float[Array, "B D"]:
    """One vector for an image: avg, max, avgmax (their mean) or catavgmax (both after one another)."""
    axes = tuple(range(1, x.ndim - 1))
    mean, largest = jnp.mean(x, axis=axes), jnp.max(x, axis=axes)
    joined = jnp.concatenate([mean, largest], axis=-1)
    return {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2, "catavgmax": joined}[kind]
