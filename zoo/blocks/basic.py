"""The smallest blocks: a linear layer and dropout that start and behave as PyTorch's do."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import layers

__all__ = [
    "ActivationDropout",
    "BatchNorm",
    "CausalConv",
    "DepthwiseConv",
    "Dropout",
    "Linear",
    "RMSNorm",
    "activation_function",
    "flat_draw",
    "he_normal_out",
    "product_of_patches",
    "torch_uniform",
]

_ACTIVATIONS: dict[str, Callable] = {
    "gelu": layers.gelu,
    "gelu_tanh": partial(layers.gelu, approximate=True),
    "identity": lambda x: x,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.numpy.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}


def activation_function(name: str) -> Callable:
    """The activation of that name, in torch's conventions: "gelu" is the exact (erf) form, "gelu_tanh" the other."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch's Linear and Conv draw weights and biases from by default."""

    def init(key, shape, dtype=jax.numpy.float32):
        bound = fan_in**-0.5
        return flat_draw(jax.random.uniform, key, shape, dtype, -bound, bound)

    return init


def flat_draw(draw: Callable, key: jax.Array, shape: Sequence[int], *arguments) -> jax.Array:
    """`draw(key, shape, ...)`, number by number the same, but kernels of convolutions drawn as one row: over five axes
    XLA's compiler for CPUs takes ten times as long. Matrices are not, since of a row each device would draw it all."""
    return draw(key, (math.prod(shape),), *arguments).reshape(shape) if len(shape) > 2 else draw(key, shape, *arguments)


def he_normal_out(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """N(0, 2 / (outputs times places of a kernel)): torch's Kaiming initialiser by fan_out, of convolutions."""
    return (2 / math.prod(shape[:-2]) / shape[-1]) ** 0.5 * flat_draw(jax.random.normal, key, shape, dtype)


@jax.custom_vjp
def matmul(x: Float[Array, "T D"], kernel: Float[Array, "D F"]) -> Float[Array, "T F"]:
    """x W of flat tokens, in the forms that XLA's CPU matrix products are fast at.

    The same product of a three-axis array takes up to twice as long, and so does the gradient of a tall kernel unless
    it is computed lying down.
    """
    return x @ kernel


def _matmul_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_bwd(residuals, dy):
    x, kernel = residuals
    tall = kernel.shape[0] > kernel.shape[1]
    # The barrier keeps XLA from turning (dy^T x)^T back into x^T dy.
    dkernel = jax.lax.optimization_barrier(dy.T @ x).T if tall else x.T @ dy
    return dy @ kernel.T, dkernel


matmul.defvjp(_matmul_fwd, _matmul_bwd)


class Linear(nn.Module):
    """y = x W + b over the last axis; starts as torch.nn.Linear does unless initialisers say otherwise."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        start = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or start, (x.shape[-1], self.features))
        y = matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], self.features)
        return y + self.param("bias", self.bias_init or start, (self.features,)) if self.use_bias else y


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) times a learned scale, in float32; `unit_offset` stores the scale less one.

    The mean is over all channels, or over each of several `groups` of neighbouring ones.
    """

    epsilon: float = 1e-6
    unit_offset: bool = False
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],)).astype(jax.numpy.float32) + float(self.unit_offset)
        wide = x.astype(jax.numpy.float32).reshape(*x.shape[:-1], self.groups, -1)
        inverse = jax.lax.rsqrt(jax.numpy.mean(jax.numpy.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return ((wide * inverse).reshape(x.shape) * scale).astype(x.dtype)


class CausalConv(nn.Module):
    """activation(causal depthwise convolution of x), and its state: the last inputs.

    Where `present` is False, x counts as 0. Such places at the end leave the state as it was.
    """

    width: int  # taps
    activation: str = "silu"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None  # None: torch's

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], state: Float[Array, "B P D"] | None, present: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B P D"]]:
        start, lengths = torch_uniform(self.width), None
        kernel = self.param("kernel", self.kernel_init or start, (self.width, 1, x.shape[-1]))
        bias = self.param("bias", start, (x.shape[-1],)) if self.use_bias else None
        if present is not None:
            x = jnp.where(present[..., None], x, 0)
            lengths = jnp.max(jnp.where(present, jnp.arange(x.shape[1]) + 1, 0), axis=-1)
        y, grown = layers.causal_depthwise_conv(
            x, kernel[:, 0], bias=bias, initial_state=state, lengths=lengths, return_state=True
        )
        return activation_function(self.activation)(y), grown if state is None else grown.astype(state.dtype)


def product_of_patches(
    x: Float[Array, "B *size C"], kernel: Float[Array, "*window C F"], strides: Any, padding: Any, *, rhs_dilation: Any,
    **options: Any,
) -> Float[Array, "B *places F"]:  # fmt: skip
    """A convolution as one matrix product, for `nn.Conv(conv_general_dilated=...)`, as many zeros before as behind.

    For few channels this is faster on CPUs than XLA's convolution, and in loops, where that is slow.
    """
    around = (0,) * len(strides) if padding == "VALID" else tuple(before for before, _ in padding)
    window, dilation = kernel.shape[:-2], tuple(rhs_dilation)
    patches = layers.unfold(x, window, stride=tuple(strides), dilation=dilation, padding=around)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return matmul(patches.reshape(-1, len(flat)), flat).reshape(*patches.shape[: x.ndim - 1], -1)


class DepthwiseConv(nn.Module):
    """A convolution of every channel with a square kernel of its own, zeros around the image.

    As a sum of shifted products, which XLA fuses; its convolutions of many groups are slow on a CPU.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        start = torch_uniform(self.width**2)
        kernel = self.param("kernel", start, (self.width, self.width, 1, x.shape[-1]))
        bias = self.param("bias", start, (x.shape[-1],))
        height, width = x.shape[1:3]
        room = ((self.width - 1) // 2, self.width // 2)
        padded = jnp.pad(x, ((0, 0), room, room, (0, 0)))
        shifts = [(i, j) for i in range(self.width) for j in range(self.width)]
        return sum(padded[:, i : i + height, j : j + width] * kernel[i, j] for i, j in shifts) + bias


class BatchNorm(nn.Module):
    """torch.nn.BatchNorm over all axes but the last: scale (x - mean) / sqrt(var + epsilon) + bias in float32.

    Training normalises by the batch and moves the running statistics of `batch_stats` a share `momentum` towards it,
    its variance unbiased there; otherwise the running ones serve. `count` is the number of such moves. Where `present`
    is False, x does not count.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B C"], *, train: bool, present: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B C"]:
        size = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, size)
        var = self.variable("batch_stats", "var", jnp.ones, size)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", self.scale_init, size)
        bias = self.param("bias", nn.initializers.zeros, size)
        wide = x.astype(jnp.float32)
        if not train:
            center, spread = mean.value, var.value
        else:
            axes = tuple(range(x.ndim - 1))
            if present is None:
                center, spread = jnp.mean(wide, axis=axes), jnp.var(wide, axis=axes)
                number = x.size // x.shape[-1]
                correction = number / max(number - 1, 1)
            else:
                number, where = jnp.maximum(jnp.sum(present), 1), present[..., None]
                correction = number / jnp.maximum(number - 1, 1)
                center = jnp.sum(wide, axis=axes, where=where) / number
                spread = jnp.sum(jnp.square(wide - center), axis=axes, where=where) / number
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                unbiased = spread * correction
                mean.value += self.momentum * (center - mean.value)
                var.value += self.momentum * (unbiased - var.value)
                count.value += 1
        inverse = jax.lax.rsqrt(spread.astype(jnp.float32) + self.epsilon)
        return ((wide - center) * inverse * scale + bias).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a share `rate` of x while training and rescales the rest; draws from the `dropout` RNG stream."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, train: bool) -> Float[Array, "*shape"]:
        if not train or self.rate == 0.0:
            return x
        return layers.dropout(x, self.make_rng("dropout"), rate=self.rate)


class ActivationDropout(nn.Module):
    """drop(activation(x)), computed again in the backward pass instead of kept: the widest arrays of a transformer
    are cheaper to make twice than to write to memory and read back."""

    activation: str
    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, train: bool) -> Float[Array, "*shape"]:
        function = activation_function(self.activation)
        if not train or self.rate == 0.0:
            return jax.checkpoint(function)(x)
        return jax.checkpoint(lambda x, key: layers.dropout(function(x), key, rate=self.rate))(
            x, self.make_rng("dropout")
        )
