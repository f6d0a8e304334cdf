"""SS2D: a selective state space over a grid, which several scans walk through in different directions (VMamba,
arXiv:2401.10166)."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from zoo.blocks.basic import DepthwiseConv, Linear, torch_uniform
from zoo.blocks.mamba import log_rates_init, step_bias_init
from zoo.weights.table import Row, conv, layer_norm, linear, parameter, permute

__all__ = ["SS2D", "ss2d"]


class PerDirection(nn.Module):
    """y_k = s_k W_k + b_k: a linear layer for each of the K sequences."""

    features: int
    bias_init: nn.initializers.Initializer | None = None  # None: no bias

    @nn.compact
    def __call__(self, s: Float[Array, "B K L D"]) -> Float[Array, "B K L F"]:
        directions, width = s.shape[1], s.shape[-1]
        kernel = self.param("kernel", torch_uniform(width), (directions, width, self.features))
        y = jnp.einsum("bkld,kdf->bklf", s, kernel)
        if self.bias_init is None:
            return y
        return y + self.param("bias", self.bias_init, (directions, self.features))[:, None]


class SS2D(nn.Module):
    """y = W_out (LN(sum_k S6_k(x in order k)) SiLU(z)), with [x, z] = W_in u and x through a depthwise convolution and
    SiLU.

    Every order has its own maps, steps and rates; the K scans run as one, of K groups of channels.
    """

    state_size: int = 16  # N, states of a channel
    conv_width: int = 3  # of the square kernel
    expand: int | float = 2  # inner width D, as a multiple of the block's
    step_rank: int | None = None  # R, width from which steps are made; None: a sixteenth of the block's, rounded up
    steps: tuple[float, float, float] = (1e-3, 0.1, 1e-4)  # smallest, largest and floor of the steps it starts with
    norm_epsilon: float = 1e-5
    orders: Callable[[int, int], Any] = layers.cross_scan_orders  # (K, H W) cell numbers of a grid (H, W)

    @nn.compact
    def __call__(self, u: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = u.shape
        inner, n = int(self.expand * channels), self.state_size
        rank = self.step_rank or -(-channels // 16)
        x, z = jnp.split(Linear(2 * inner, use_bias=False, name="in_proj")(u), 2, axis=-1)
        x = jax.nn.silu(DepthwiseConv(self.conv_width, name="conv2d")(x))

        orders = self.orders(height, width)
        directions = len(orders)
        sequences = layers.scan_sequences(x.reshape(batch, height * width, inner), orders)
        maps = jnp.split(PerDirection(rank + 2 * n, name="x_proj")(sequences), (rank, rank + n), axis=-1)
        step = PerDirection(inner, step_bias_init(*self.steps), name="dt_proj")(maps[0])
        step = jax.nn.softplus(step.astype(jnp.float32))
        log_rates = self.param("A_log", log_rates_init, (directions * inner, n))

        def joined(v: Float[Array, "B K L D"]) -> Float[Array, "B L E"]:
            return jnp.swapaxes(v, 1, 2).reshape(batch, height * width, -1)

        y = layers.selective_scan(
            joined(sequences),
            joined(step),
            -jnp.exp(log_rates.astype(jnp.float32)),
            *(jnp.swapaxes(m, 1, 2) for m in maps[1:]),
            skip=self.param("D", nn.initializers.ones, (directions * inner,)),
        )
        y = jnp.swapaxes(y.reshape(batch, height * width, directions, inner), 1, 2)
        y = layers.merge_scans(y, orders).reshape(x.shape)
        y = nn.LayerNorm(epsilon=self.norm_epsilon, name="out_norm")(y) * jax.nn.silu(z)
        return Linear(channels, use_bias=False, name="out_proj")(y)


def ss2d(official: str, ours: str) -> Iterator[Row]:
    """VMamba's SS2D to ours."""
    yield from linear(f"{official}in_proj", f"{ours}/in_proj", bias=False)
    yield from conv(f"{official}conv2d", f"{ours}/conv2d")
    yield from parameter(f"{official}x_proj_weight", f"{ours}/x_proj/kernel", permute(0, 2, 1))
    yield from parameter(f"{official}dt_projs_weight", f"{ours}/dt_proj/kernel", permute(0, 2, 1))
    yield from parameter(f"{official}dt_projs_bias", f"{ours}/dt_proj/bias")
    yield from parameter(f"{official}A_logs", f"{ours}/A_log")
    yield from parameter(f"{official}Ds", f"{ours}/D")
    yield from layer_norm(f"{official}out_norm", f"{ours}/out_norm")
    yield from linear(f"{official}out_proj", f"{ours}/out_proj", bias=False)
