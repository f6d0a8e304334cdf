"""Gates: factors, mostly between 0 and 1, that a feature map computes for its own channels, places or both.

A function called `..._gate` returns the factor, shaped to multiply the map: `x * channel_gate(x, ...)`. Maps are
channels-last with any number of spatial axes, (B, ..., C).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.activations import gelu

__all__ = [
    "bottleneck_gate",
    "cbam",
    "channel_convolution",
    "channel_gate",
    "convolutional_gate",
    "efficient_channel_gate",
    "energy_channel_gate",
    "gated_linear_unit",
    "gated_pool",
    "mean_map_gate",
    "mean_max_maps",
    "pfcasa",
    "simam_gate",
    "spatial_gate",
    "squeeze_excitation_gate",
]

_ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}


@partial(jax.jit, static_argnames=("activation",))
def gated_linear_unit(
    value: Float[Array, "*shape"], gate: Float[Array, "*shape"], *, activation: str = "sigmoid"
) -> Float[Array, "*shape"]:
    """y = value * activation(gate), both linear maps of the same input.

    `activation` is "sigmoid" (GLU), "silu" (SwiGLU), "gelu" (GEGLU, erf), "gelu_tanh", "relu" (ReGLU), "tanh" or
    "identity" (bilinear). Float32 inside. Source: arXiv:2002.05202, equations 4-6; cards gated_cnn_fall, r_dmesh,
    hyformer.
    """
    if activation not in _ACTIVATIONS:
        choices = ", ".join(_ACTIVATIONS)
        raise ValueError(f"gated_linear_unit: activation {activation!r} is not one of {choices}")
    return (value.astype(jnp.float32) * _ACTIVATIONS[activation](gate.astype(jnp.float32))).astype(value.dtype)


def _spatial_axes(x):
    return tuple(range(1, x.ndim - 1))


@partial(jax.jit, static_argnames=("normalizer",))
def bottleneck_gate(
    descriptor: Float[Array, "*batch C"],
    reduce: Float[Array, "C R"],
    expand: Float[Array, "R K"],
    *,
    reduce_bias: Float[Array, " R"] | None = None,
    expand_bias: Float[Array, " K"] | None = None,
    normalizer: str = "sigmoid",
) -> Float[Array, "*batch K"]:
    """g = sigmoid(relu(s W_1 + b_1) W_2 + b_2) of a pooled descriptor s; "softmax" instead weighs K branches.

    Source: arXiv:1709.01507, equation 3; cards attention_mamba (channel path), wd_fqdet (scene gate).
    """
    if normalizer not in ("sigmoid", "softmax"):
        raise ValueError(f"bottleneck_gate: normalizer {normalizer!r} is not sigmoid or softmax")
    logits = _bottleneck(descriptor.astype(jnp.float32), reduce, expand, reduce_bias, expand_bias)
    return (jax.nn.sigmoid(logits) if normalizer == "sigmoid" else jax.nn.softmax(logits)).astype(descriptor.dtype)


def _bottleneck(descriptor, reduce, expand, reduce_bias, expand_bias):
    hidden = descriptor @ reduce.astype(jnp.float32)
    hidden = jax.nn.relu(hidden if reduce_bias is None else hidden + reduce_bias)
    logits = hidden @ expand.astype(jnp.float32)
    return logits if expand_bias is None else logits + expand_bias


@jax.jit
def squeeze_excitation_gate(
    x: Float[Array, "B *spatial C"],
    reduce: Float[Array, "C R"],
    expand: Float[Array, "R C"],
    *,
    reduce_bias: Float[Array, " R"] | None = None,
    expand_bias: Float[Array, " C"] | None = None,
) -> Float[Array, "B *ones C"]:
    """The `bottleneck_gate` of the mean over space: one factor per channel.

    Source: arXiv:1709.01507, equations 2-4; card csrnet_attention.
    """
    mean = jnp.mean(x.astype(jnp.float32), axis=_spatial_axes(x), keepdims=True)
    gate = bottleneck_gate(mean, reduce, expand, reduce_bias=reduce_bias, expand_bias=expand_bias)
    return gate.astype(x.dtype)


@jax.jit
def channel_convolution(
    x: Float[Array, "*batch C"], kernel: Float[Array, " k"], bias: Float[Array, ""] | float = 0.0
) -> Float[Array, "*batch C"]:
    """z_c = sum_t kernel[t] x_{c + t - k//2} + bias: one filter along the channels of every place, zeros beyond them.

    k must be odd. O(C k) a place. Source: card msam, Mechanism 1; arXiv:1910.03151, equation 9.
    """
    taps = kernel.shape[0]
    if taps % 2 == 0:
        raise ValueError(f"channel_convolution: kernel of {taps} taps is not odd")
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(taps // 2, taps // 2)])
    width = x.shape[-1]
    total = sum(kernel[t] * padded[..., t : t + width] for t in range(taps))
    return (total + bias).astype(x.dtype)


@jax.jit
def efficient_channel_gate(x: Float[Array, "B *spatial C"], kernel: Float[Array, " k"]) -> Float[Array, "B *ones C"]:
    """sigmoid(channel_convolution(mean over space)): neighbouring channels decide, k weights in all (ECA).

    Source: arXiv:1910.03151, equation 9; card csrnet_attention.
    """
    mean = jnp.mean(x.astype(jnp.float32), axis=_spatial_axes(x), keepdims=True)
    return jax.nn.sigmoid(channel_convolution(mean, kernel)).astype(x.dtype)


@jax.jit
def channel_gate(
    x: Float[Array, "B *spatial C"],
    reduce: Float[Array, "C R"],
    expand: Float[Array, "R C"],
    *,
    reduce_bias: Float[Array, " R"] | None = None,
    expand_bias: Float[Array, " C"] | None = None,
) -> Float[Array, "B *ones C"]:
    """sigmoid(m(mean over space) + m(max over space)), m the shared bottleneck relu(s W_1 + b_1) W_2 + b_2 (CBAM).

    Source: arXiv:1807.06521, equation 2; card polygon_mamba, SFCAM.
    """
    wide, axes = x.astype(jnp.float32), _spatial_axes(x)
    pooled = (jnp.mean(wide, axis=axes, keepdims=True), jnp.max(wide, axis=axes, keepdims=True))
    logits = sum(_bottleneck(p, reduce, expand, reduce_bias, expand_bias) for p in pooled)
    return jax.nn.sigmoid(logits).astype(x.dtype)


@jax.jit
def mean_max_maps(x: Float[Array, "B *spatial C"]) -> Float[Array, "B *spatial 2"]:
    """[mean over channels, max over channels] of every place.

    Source: arXiv:1807.06521, equation 3; cards attention_mamba, wd_fqdet.
    """
    wide = x.astype(jnp.float32)
    return jnp.stack([jnp.mean(wide, axis=-1), jnp.max(wide, axis=-1)], axis=-1).astype(x.dtype)


@jax.jit
def convolutional_gate(
    x: Float[Array, "B *spatial C"], kernel: Float[Array, "*taps C G"], bias: Float[Array, " G"] | None = None
) -> Float[Array, "B *spatial G"]:
    """sigmoid(conv(x, kernel) + bias), zero padding that keeps the size: G maps of factors, one as a rule.

    Odd kernels of any number of axes. Source: card stepwise_breast, Attention module (3x3x3); arXiv:1807.06521.
    """
    if kernel.ndim != x.ndim or any(taps % 2 == 0 for taps in kernel.shape[:-2]):
        raise ValueError(
            f"convolutional_gate: kernel of shape {kernel.shape} does not have {x.ndim - 2} odd sides, for {x.shape}"
        )
    axes = "DHW"[-(x.ndim - 2) :]
    logits = jax.lax.conv_general_dilated(
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
        window_strides=(1,) * len(axes),
        padding=[(taps // 2, taps // 2) for taps in kernel.shape[:-2]],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    return jax.nn.sigmoid(logits if bias is None else logits + bias).astype(x.dtype)


@jax.jit
def spatial_gate(
    x: Float[Array, "B *spatial C"], kernel: Float[Array, "*taps 2 1"], bias: Float[Array, " 1"] | None = None
) -> Float[Array, "B *spatial 1"]:
    """sigmoid(conv([mean over channels, max over channels])): one factor per place (CBAM, 7x7).

    Source: arXiv:1807.06521, equation 3; cards polygon_mamba, wd_fqdet.
    """
    return convolutional_gate(mean_max_maps(x), kernel, bias)


@jax.jit
def cbam(
    x: Float[Array, "B *spatial C"],
    reduce: Float[Array, "C R"],
    expand: Float[Array, "R C"],
    kernel: Float[Array, "*taps 2 1"],
    *,
    reduce_bias: Float[Array, " R"] | None = None,
    expand_bias: Float[Array, " C"] | None = None,
) -> Float[Array, "B *spatial C"]:
    """y = x' spatial_gate(x') with x' = x channel_gate(x).

    Source: arXiv:1807.06521, equation 1; cards csrnet_attention, polygon_mamba.
    """
    x = x * channel_gate(x, reduce, expand, reduce_bias=reduce_bias, expand_bias=expand_bias)
    return x * spatial_gate(x, kernel)


@jax.jit
def simam_gate(
    x: Float[Array, "B *spatial C"], *, ridge: Float[Array, ""] | float = 1e-4
) -> Float[Array, "B *spatial C"]:
    """sigmoid(q / (4 (v + ridge)) + 1/2), q = (x - mean)^2 and v its sum / (N - 1) over the N places of a channel.

    No parameters; a constant channel has gate sigmoid(1/2). `ridge` is in squared units of x. Source: card
    csrnet_attention, SimAM (Yang et al. 2021, equation 5).
    """
    wide, axes = x.astype(jnp.float32), _spatial_axes(x)
    return _energy_gate(wide, axes, ridge).astype(x.dtype)


def _energy_gate(x, axes, ridge):
    deviation = jnp.square(x - jnp.mean(x, axis=axes, keepdims=True))
    count = math.prod(x.shape[axis] for axis in axes)
    variance = jnp.sum(deviation, axis=axes, keepdims=True) / max(count - 1, 1)
    return jax.nn.sigmoid(deviation / (4 * (variance + ridge)) + 0.5)


@partial(jax.jit, static_argnames=("variant",))
def energy_channel_gate(
    x: Float[Array, "B *spatial C"], *, ridge: Float[Array, ""] | float = 1e-4, variant: str = "energy"
) -> Float[Array, "B *ones C"]:
    """`simam_gate` of the channel means among themselves: channels that stand out count more (PFCA), no parameters.

    variant "literal" is sigmoid((q + 2 s) s / 4), s = std + ridge, as a public reimplementation has it. Source: card
    csrnet_attention, PFCA.
    """
    if variant not in ("energy", "literal"):
        raise ValueError(f"energy_channel_gate: variant {variant!r} is not energy or literal")
    mean = jnp.mean(x.astype(jnp.float32), axis=_spatial_axes(x), keepdims=True)
    if variant == "energy":
        return _energy_gate(mean, (-1,), ridge).astype(x.dtype)
    deviation = jnp.square(mean - jnp.mean(mean, axis=-1, keepdims=True))
    variance = jnp.sum(deviation, axis=-1, keepdims=True) / max(x.shape[-1] - 1, 1)
    there = variance > 0
    spread = jnp.where(there, jnp.sqrt(jnp.where(there, variance, 1.0)), 0.0) + ridge
    return jax.nn.sigmoid((deviation + 2 * spread) * spread / 4).astype(x.dtype)


@partial(jax.jit, static_argnames=("normalize", "epsilon"))
def mean_map_gate(
    x: Float[Array, "B *spatial C"], *, normalize: str = "mean", epsilon: float = 1e-6
) -> Float[Array, "B *spatial 1"]:
    """m / (mean over space of m + epsilon), m the mean over channels: brighter places count more, one on average.

    For non-negative features; no parameters. normalize "sum" divides by the sum instead (0 where that is 0), as the
    original before global pooling. Source: card csrnet_attention, SA.
    """
    if normalize not in ("mean", "sum"):
        raise ValueError(f"mean_map_gate: normalize {normalize!r} is not mean or sum")
    brightness = jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
    if normalize == "mean":
        gate = brightness / (jnp.mean(brightness, axis=_spatial_axes(x), keepdims=True) + epsilon)
    else:
        total = jnp.sum(brightness, axis=_spatial_axes(x), keepdims=True)
        gate = jnp.where(total == 0, 0.0, brightness / jnp.where(total == 0, 1.0, total))
    return gate.astype(x.dtype)


@partial(jax.jit, static_argnames=("order", "variant", "normalize", "epsilon"))
def pfcasa(
    x: Float[Array, "B *spatial C"],
    *,
    order: str = "channel_first",
    ridge: Float[Array, ""] | float = 1e-4,
    variant: str = "energy",
    normalize: str = "mean",
    epsilon: float = 1e-6,
) -> Float[Array, "B *spatial C"]:
    """x gated by `energy_channel_gate`, then by `mean_map_gate` of the result: attention without parameters.

    order "spatial_first" swaps the two, "parallel" takes the mean of both gated maps. Source: card csrnet_attention,
    PFCASA.
    """
    if order not in ("channel_first", "spatial_first", "parallel"):
        raise ValueError(f"pfcasa: order {order!r} is not channel_first, spatial_first or parallel")

    def channel(x):
        return x * energy_channel_gate(x, ridge=ridge, variant=variant)

    def spatial(x):
        return x * mean_map_gate(x, normalize=normalize, epsilon=epsilon)

    if order == "parallel":
        return (channel(x) + spatial(x)) / 2
    return spatial(channel(x)) if order == "channel_first" else channel(spatial(x))


@partial(jax.jit, static_argnames=("epsilon",))
def gated_pool(
    x: Float[Array, "B *spatial C"], gate: Float[Array, "B *spatial 1"], *, epsilon: float = 1e-6
) -> Float[Array, "B C"]:
    """sum_p g_p x_p / (sum_p g_p + epsilon): the mean over the places that a gate lets through; 0 if it lets none.

    Source: card stepwise_breast, Attention module (pooling); card soft_attention_mask, SAME 1.
    """
    axes = _spatial_axes(x)
    weights = gate.astype(jnp.float32)
    total = jnp.sum(weights * x.astype(jnp.float32), axis=axes)
    return (total / (jnp.sum(weights, axis=axes) + epsilon)).astype(x.dtype)
