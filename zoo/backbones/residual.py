"""What the U-Nets and autoencoders of latent diffusion share: residual convolutions and sizes (arXiv:2112.10752)."""

from collections.abc import Iterator

import flax.linen as nn
import jax
from jaxtyping import Array, Float

import layers
from zoo.backbones.hooks import show
from zoo.blocks import Linear
from zoo.weights.table import Row, conv, conv1x1, layer_norm, linear

__all__ = ["ResidualBlock", "convolution", "enlarged", "group_norm", "residual_table"]


def convolution(channels: int, name: str, *, kernel: int = 3, stride: int = 1) -> nn.Conv:
    """Every pixel stays in the middle of its kernel."""
    return nn.Conv(
        channels, (kernel, kernel), strides=stride, padding=kernel // 2,
        conv_general_dilated=layers.conv_general_dilated, name=name,
    )  # fmt: skip


def group_norm(groups: int, epsilon: float, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, name=name)


def enlarged(x: Float[Array, "B h w C"], size: tuple[int, int], name: str) -> Float[Array, "B H W C"]:
    """Pixels repeated up to this size, then convolved; called inside a compact method."""
    return convolution(x.shape[-1], name)(layers.resize(x, size, method="nearest"))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + W silu(time)))), x mapped linearly where the channels change."""

    channels: int
    num_groups: int
    norm_epsilon: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, time: Float[Array, "B T"] | None = None
    ) -> Float[Array, "B H W D"]:
        show(self, "hidden_states", "input", x)
        y = jax.nn.silu(group_norm(self.num_groups, self.norm_epsilon, "norm1")(x))
        y = convolution(self.channels, "conv1")(y)
        if time is not None:
            y = y + Linear(self.channels, name="time")(jax.nn.silu(time))[:, None, None]
        y = jax.nn.silu(group_norm(self.num_groups, self.norm_epsilon, "norm2")(y))
        y = convolution(self.channels, "conv2")(y)
        return y + (x if x.shape[-1] == self.channels else Linear(self.channels, name="shortcut")(x))


def residual_table(official: str, ours: str, entering: int, channels: int, *, time: bool = False) -> Iterator[Row]:
    for i in (1, 2):
        yield from layer_norm(f"{official}.norm{i}", f"{ours}/norm{i}")
        yield from conv(f"{official}.conv{i}", f"{ours}/conv{i}")
    if time:
        yield from linear(f"{official}.time_emb_proj", f"{ours}/time")
    if entering != channels:
        yield from conv1x1(f"{official}.conv_shortcut", f"{ours}/shortcut", axes=2)
