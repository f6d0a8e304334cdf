"""SpineContextResUNet: a computationally efficient residual U-Net for spine CT segmentation (arXiv:2605.20760).

Official code: Nithurshen/SpineContextResUNet@3b80431, its inference at 0d74eb5 (licence unknown). Fidelity: exact.
New: between encoder and decoder of a small 3-D U-Net, convolutions of four dilations side by side see 17 voxels of the
coarsest grid, 136 of the volume, along each axis: long-range context without attention or recurrence.
Differs: outputs are logits; where blended patches would all weigh nothing (the official window is 0 on one side), the
window has a floor (`window_floor`; 0 as officially). In evaluation the model also gives its Grad-CAM, as `attention`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks import BatchNorm, Linear
from zoo.blocks.basic import torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import segmentation
from zoo.tasks.segmentation import dice_errors, logits_of, pixel_errors, probabilities
from zoo.tasks.task import Batch
from zoo.weights.table import Row, Table, batch_norm, conv, conv1x1, parameter, permute


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in voxels."""

    image_size: tuple[int, int, int] = (128, 128, 64)  # of a patch, which is what is seen at once; the model takes any
    channels: int = 1  # of a volume
    num_classes: int = 1  # 1: one class beside the background; more with the background
    width: int = 16  # channels at full resolution; twice as many at each of three halvings
    dilations: tuple[int, ...] = (1, 2, 4, 8)  # of the context block; none: a residual block in its place
    norm_epsilon: float = 1e-5  # added to the variance under the root
    overlap: float = 0.5  # of the patches of a whole volume, as a share of their length
    window_floor: float = 1e-3  # least weight of a voxel in a patch; 0 in the official code
    overhang: bool = True  # of patches over the far border, where strides do not end with the volume


def _convolution(features: int, inputs: int, name: str, dilation: int = 1) -> nn.Conv:
    """3x3x3, with as many zeros around the volume as keep its size."""
    start = torch_uniform(27 * inputs)
    return nn.Conv(
        features, (3, 3, 3), padding=dilation, kernel_dilation=dilation, kernel_init=start, bias_init=start,
        conv_general_dilated=layers.conv_general_dilated, name=name,
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + x), x through a 1x1x1 convolution and BN where the width changes."""

    features: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"], *, train: bool) -> Float[Array, "B D H W F"]:
        y = _convolution(self.features, x.shape[-1], "conv1")(x)
        y = jax.nn.relu(BatchNorm(self.epsilon, name="norm1")(y, train=train))
        y = _convolution(self.features, self.features, "conv2")(y)
        y = BatchNorm(self.epsilon, name="norm2")(y, train=train)
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="shortcut")(x)
            x = BatchNorm(self.epsilon, name="shortcut_norm")(x, train=train)
        return jax.nn.relu(y + x)


class ContextBlock(nn.Module):
    """ReLU(BN(W ReLU(BN([conv_1 x, conv_2 x, conv_4 x, conv_8 x])))), conv_r a 3x3x3 convolution of dilation r."""

    features: int
    dilations: tuple[int, ...]
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"], *, train: bool) -> Float[Array, "B D H W F"]:
        inputs = x.shape[-1]
        seen = [_convolution(self.features, inputs, f"dilated_{i}", r)(x) for i, r in enumerate(self.dilations)]
        seen = jax.nn.relu(BatchNorm(self.epsilon, name="norm1")(jnp.concatenate(seen, axis=-1), train=train))
        return jax.nn.relu(BatchNorm(self.epsilon, name="norm2")(Linear(self.features, name="fuse")(seen), train=train))


class Doubling(nn.Module):
    """Eight voxels of each, with weights of their own: a transposed convolution with kernel and stride 2."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B d h w C"]) -> Float[Array, "B D H W F"]:
        batch, *size, width = x.shape
        start = torch_uniform(8 * self.features)
        kernel = self.param("kernel", start, (2, 2, 2, width, self.features))
        y = jnp.einsum("bdhwc,ijkcf->bdihjwkf", x, kernel)
        return y.reshape(batch, *(2 * n for n in size), -1) + self.param("bias", start, (self.features,))


def _beside(x: Float[Array, "B d h w C"], skip: Float[Array, "B D H W E"]) -> Float[Array, "B D H W F"]:
    """Both, the first resized to the second where a halving has lost a voxel."""
    if x.shape[1:-1] != skip.shape[1:-1]:
        x = layers.resize(x, skip.shape[1:-1])
    return jnp.concatenate([x, skip], axis=-1)


class Model(nn.Module):
    """`logits` (B, D, H, W, K); in evaluation also `attention` (B, 1, D, H, W): see `grad_cam`."""

    config: Config

    def setup(self):
        c = self.config
        block = partial(ResidualBlock, epsilon=c.norm_epsilon)
        self.encoder = [block(c.width << i) for i in range(3)]
        deepest = 8 * c.width
        if c.dilations:
            self.bottleneck = ContextBlock(deepest, c.dilations, c.norm_epsilon)
        else:
            self.bottleneck = block(deepest)
        self.doubling = [Doubling(c.width << i) for i in range(3)]
        self.decoder = [block(c.width << i) for i in range(3)]
        self.head = Linear(c.num_classes)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *_"]]:
        x = batch["x"]
        bottom, skips = self.encode(x, train=train)
        outputs = {"logits": self.decode(bottom, skips, train=train)}
        if train or self.is_initializing():
            return outputs
        # Costs nothing where nobody reads it: XLA leaves out what has no reader.
        detached = Model(self.config, parent=None)
        return outputs | {"attention": grad_cam(detached, self.variables, x)[1][:, None, ..., 0]}

    def encode(self, x: Float[Array, "B D H W C"], *, train: bool = False) -> Any:
        """What the context block makes of a volume, and what the decoder takes from before each halving."""
        skips = []
        for block in self.encoder:
            x = block(x, train=train)
            skips.append(x)
            x = layers.max_pool(x, 2)
        return self.bottleneck(x, train=train), skips

    def decode(self, x: Float[Array, "B d h w E"], skips: list, *, train: bool = False) -> Float[Array, "B D H W K"]:
        for i in (2, 1, 0):
            x = self.decoder[i](_beside(self.doubling[i](x), skips[i]), train=train)
        return self.head(x)


def grad_cam(
    model: Model, variables: Mapping[str, Any], x: Float[Array, "B D H W C"]
) -> tuple[Float[Array, "B D H W K"], Float[Array, "B D H W 1"]]:
    """(probabilities, ReLU(sum_c w_c A_c) at the volume's size), A the context block's output and w_c the mean over
    its voxels of the slope of the mean probability. Source: card spine_context_resunet, Inference."""
    bottom, skips = model.apply(variables, x, method="encode")

    def mean_probability(bottom):
        shares = probabilities(model.apply(variables, bottom, skips, method="decode").astype(jnp.float32))
        return jnp.sum(jnp.mean(shares, axis=(1, 2, 3, 4))), shares

    slopes, shares = jax.grad(mean_probability, has_aux=True)(bottom)
    weight = jnp.mean(slopes.astype(jnp.float32), axis=(1, 2, 3), keepdims=True)
    seen = jax.nn.relu(jnp.sum(weight * bottom.astype(jnp.float32), axis=-1, keepdims=True))
    return shares, layers.resize(seen, x.shape[1:-1])


def window(config: Config) -> Float[Array, "D H W"]:
    """The weight of each voxel of a patch: the product of three periodic Hann windows, not below the floor."""
    axes = [0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in config.image_size]
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return jnp.asarray(np.maximum(weight, config.window_floor), jnp.float32)


def predict_volume(
    model: Model, variables: Mapping[str, Any], volume: Float[Array, "D H W C"]
) -> tuple[Float[Array, "D H W K"], Float[Array, "D H W"]]:
    """(probabilities, Grad-CAM) of a whole volume, blended from patches."""
    c = model.config

    def look(x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W E"]:
        return jnp.concatenate(grad_cam(model, variables, x), axis=-1)

    found = segmentation.sliding_window(
        look, volume[None], tile=c.image_size, overlap=c.overlap, weights=window(c), overhang=c.overhang
    )
    return found[0, ..., :-1], found[0, ..., -1]


def largest_component(mask: Bool[np.ndarray, "D H W"]) -> Bool[np.ndarray, "D H W"]:
    """The largest part of a mask that hangs together by faces of voxels; of equals the first."""
    number, count = scipy.ndimage.label(mask)
    return mask if count == 0 else number == 1 + np.bincount(number.ravel())[1:].argmax()


def segment(model: Model, variables: Mapping[str, Any], volume: Float[Array, "D H W C"]) -> Bool[np.ndarray, "D H W"]:
    """The spine in a volume: where it is more probable than not, in the largest component."""
    return largest_component(np.asarray(predict_volume(model, variables, volume)[0][..., 0] > 0.5))


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Binary cross-entropy, its logarithms cut at -100, plus the Dice error of each volume (smooth 1)."""
    logits = logits_of(outputs)
    dice = dice_errors(logits, batch["label"], smooth=1.0)
    return dice + pixel_errors(logits, batch["label"]), {"dice_loss": dice}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return segmentation.example(
        size=config.image_size, channels=config.channels, num_classes=config.num_classes, batch_size=batch_size, key=key
    )


# --- the official code ------------------------------------------------------------------------------------------------


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    given = hparams.get("ctor", hparams)
    names = {"in_channels": "channels", "out_channels": "num_classes", "base_filters": "width"}
    return Config(**{ours: given[theirs] for theirs, ours in names.items() if theirs in given})


def config_to_official(config: Config) -> dict[str, Any]:
    sizes = {"in_channels": config.channels, "out_channels": config.num_classes, "base_filters": config.width}
    return {"ctor": sizes}


def sliding_from_official(hparams: Mapping[str, Any]) -> Config:
    patch = {"image_size": tuple(hparams["PATCH_SIZE"])} if "PATCH_SIZE" in hparams else {}
    return replace(config_from_official(hparams), window_floor=0.0, **patch)


def sliding_to_official(config: Config) -> dict[str, Any]:
    return config_to_official(config) | {"PATCH_SIZE": list(config.image_size)}


def _residual(official: str, ours: str, *, shortcut: bool = True) -> Iterator[Row]:
    for i in (1, 2):
        yield from conv(f"{official}.conv{i}", f"{ours}/conv{i}", axes=3)
        yield from batch_norm(f"{official}.bn{i}", f"{ours}/norm{i}")
    if shortcut:
        yield from conv1x1(f"{official}.shortcut.0", f"{ours}/shortcut", axes=3)
        yield from batch_norm(f"{official}.shortcut.1", f"{ours}/shortcut_norm")


def official_table(config: Config) -> Table:
    entering = (config.channels, config.width, 2 * config.width)
    for i in range(3):
        yield from _residual(f"enc{i + 1}", f"encoder_{i}", shortcut=entering[i] != config.width << i)
        yield from _residual(f"dec{i + 1}", f"decoder_{i}")
        yield from parameter(f"up{i + 1}.weight", f"doubling_{i}/kernel", permute(2, 3, 4, 0, 1))
        yield from parameter(f"up{i + 1}.bias", f"doubling_{i}/bias")
    if config.dilations:
        # Named after the paper's dilations, in the ablations of others too.
        for i, name in enumerate(("d1", "d2", "d4", "d8")[: len(config.dilations)]):
            yield from conv(f"bottleneck.{name}", f"bottleneck/dilated_{i}", axes=3)
        yield from batch_norm("bottleneck.fusion.0", "bottleneck/norm1")
        yield from conv1x1("bottleneck.fusion.2", "bottleneck/fuse", axes=3)
        yield from batch_norm("bottleneck.fusion.3", "bottleneck/norm2")
    else:
        yield from _residual("bottleneck", "bottleneck")
    yield from conv1x1("final", "head", axes=3)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    outputs = model.apply(variables, {"x": jnp.moveaxis(inputs["x"], 1, -1)})
    found = {"pred": jnp.moveaxis(jax.nn.sigmoid(outputs["logits"]), -1, 1)}
    if "target" in inputs:
        found["loss"] = loss(outputs, {"label": inputs["target"][:, 0].astype(jnp.int32)})[0]
    return found


def sliding_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    shares, seen = predict_volume(model, variables, inputs["vol"][..., None])
    return {"avg_prob": shares[..., 0], "avg_cam": seen}


PAPER = Paper(
    slug="spine_context_resunet",
    task=segmentation.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(image_size=(32, 16, 16), width=4),
        "verse": Config(),
        "verse_resunet": Config(dilations=()),  # the paper's ablation
    },
    officials=(
        Official(
            module="src/model.py:SpineResUNet",
            config=config_from_official,
            hparams=config_to_official,
            call=official_call,
            table=official_table,
        ),
        Official(
            module="inference.py:predict_and_explain_sliding_window",
            config=sliding_from_official,
            hparams=sliding_to_official,
            call=sliding_call,
            table=official_table,
        ),
    ),
    parameter_counts={"tiny": 107_337, "verse": 1_703_841, "verse_resunet": 1_424_545},
    reported={"verse2020": {"dice_per_image": 0.8813}, "ctspine1k": {"dice_per_image": 0.8817}},
    quirks=(
        "the blending window is 0 at each patch's first voxels: the volume's first ones get probability 0 (repaired)",
        "biases before batch norms have no effect in training (kept; they count)",
        "README and abstract give each data set's Dice to the other one (the README's here)",
    ),
)
