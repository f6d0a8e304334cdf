"""ControlNet: a trained copy of a U-Net's encoder that reads an image and corrects what the U-Net's decoder is handed.

Official code: huggingface/diffusers@v0.42.1 (Apache-2.0), models/controlnets, ControlNetModel. Paper: arXiv:2302.05543.
Everything it gives goes through linear maps that start at zero, so that training starts from the U-Net as it is:

    residuals = controlnet.apply(weights, latents, timestep, context, image)
    sample = unet.apply(unet_weights, latents, timestep, context, residuals=residuals).sample

Differs from the official code: images and latents are (B, height, width, channels).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

import layers
from zoo.backbone import Backbone
from zoo.backbones import sd_unet
from zoo.backbones.adaptive import zero_linear
from zoo.backbones.hooks import AttentionHook, plain_attention
from zoo.backbones.residual import convolution
from zoo.backbones.sd_unet import Residuals
from zoo.paper import Official
from zoo.weights.table import Table, conv, conv1x1

__all__ = ["BACKBONES", "Config", "Model"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    unet: sd_unet.Config = field(default_factory=sd_unet.Config)  # whose encoder it copies
    image_channels: int = 3
    image_widths: tuple[int, ...] = (3, 4, 5)  # of the image's convolutions; each but the first halves it
    reversed_channels: bool = False  # images come as red, green, blue and are read the other way round
    pooled: bool = False  # residuals are means over all pixels


class ImageEmbedding(nn.Module):
    """Convolutions from the image's size to that of the latents."""

    config: Config

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        c = self.config
        x = jax.nn.silu(convolution(c.image_widths[0], "first")(image))
        for i, (before, after) in enumerate(zip(c.image_widths, c.image_widths[1:], strict=False)):
            x = jax.nn.silu(convolution(before, f"block{i}_conv1")(x))
            x = jax.nn.silu(convolution(after, f"block{i}_conv2", stride=2)(x))
        zeros = nn.initializers.zeros
        return nn.Conv(c.unet.channels[0], (3, 3), padding=1, kernel_init=zeros, name="last")(x)


class Model(nn.Module):
    """What a U-Net takes, and an image, to what is added to the U-Net's skips and middle."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timestep: Real[Array, " B"],
        context: Float[Array, "B L E"],
        image: Float[Array, "B H W I"],
        pooled: Float[Array, "B P"] | None = None,
        numbers: Real[Array, "B N"] | None = None,
        context_mask: Bool[Array, "B L"] | None = None,
        scale: Float[Array, ""] | float = 1.0,
        guess: bool = False,
    ) -> Residuals:
        """Residuals times `scale`. To `guess` without a text, the finest ones count a tenth and the middle fully."""
        c, unet = self.config, self.config.unet
        time = sd_unet.conditions(unet, timestep, pooled, numbers, latents.dtype)
        mask = None if context_mask is None else layers.KeyMask(context_mask)
        image = image[..., ::-1] if c.reversed_channels else image
        x = convolution(unet.channels[0], "first")(latents) + ImageEmbedding(c, name="image")(image)
        x, skips = sd_unet.encode(self, unet, x, time, context, mask)
        mapped = [zero_linear(y.shape[-1], name=f"skip{i}")(y) for i, y in enumerate(skips)]
        mapped.append(zero_linear(x.shape[-1], name="middle")(x))
        shares = jnp.ones(len(mapped), x.dtype)
        if guess and not c.pooled:
            shares = jnp.logspace(-1, 0, len(mapped), dtype=x.dtype)
        mapped = [y * (share * scale).astype(y.dtype) for y, share in zip(mapped, shares, strict=True)]
        if c.pooled:
            mapped = [jnp.mean(y, axis=(1, 2), keepdims=True) for y in mapped]
        return Residuals(tuple(mapped[:-1]), mapped[-1])


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int | None = None) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    given = sd_unet.example(config.unet, batch_size=batch_size, key=keys[0], image_size=image_size)
    scale = 2 ** (len(config.image_widths) - 1)
    size = tuple(scale * n for n in given["latents"].shape[1:3])
    return given | {"image": jax.random.normal(keys[1], (batch_size, *size, config.image_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_OWN = {  # theirs -> ours, their default
    "conditioning_channels": ("image_channels", 3),
    "conditioning_embedding_out_channels": ("image_widths", (16, 32, 96, 256)),
    "global_pool_conditions": ("pooled", False),
}
_ORDER = "controlnet_conditioning_channel_order"
_UNET_ONLY = ("out_channels", "up_block_types", "sample_size")


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    own = {ours: hparams.get(theirs, default) for theirs, (ours, default) in _OWN.items()}
    own["image_widths"] = tuple(own["image_widths"])
    of_unet = {name: value for name, value in hparams.items() if name not in _OWN and name != _ORDER}
    return Config(
        unet=sd_unet.config_from_official(of_unet, "ControlNetModel"),
        reversed_channels={"rgb": False, "bgr": True}[hparams.get(_ORDER, "rgb")],
        **own,
    )


def config_to_official(c: Config) -> dict[str, Any]:
    of_unet = {name: v for name, v in sd_unet.config_to_official(c.unet).items() if name not in _UNET_ONLY}
    own = {theirs: getattr(c, ours) for theirs, (ours, _) in _OWN.items()}
    return of_unet | own | {_ORDER: "bgr" if c.reversed_channels else "rgb"}


def official_table(c: Config) -> Table:
    yield from sd_unet.encoder_table(c.unet)
    theirs = "controlnet_cond_embedding"
    yield from conv(f"{theirs}.conv_in", "image/first")
    for i in range(2 * (len(c.image_widths) - 1)):
        yield from conv(f"{theirs}.blocks.{i}", f"image/block{i // 2}_conv{i % 2 + 1}")
    yield from conv(f"{theirs}.conv_out", "image/last")
    for i in range(len(sd_unet.skip_channels(c.unet))):
        yield from conv1x1(f"controlnet_down_blocks.{i}", f"skip{i}", axes=2)
    yield from conv1x1("controlnet_mid_block", "middle", axes=2)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    mask = inputs.get("encoder_attention_mask")
    output = model.apply(
        variables,
        inputs["sample"].transpose(0, 2, 3, 1),
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        inputs["controlnet_cond"].transpose(0, 2, 3, 1),
        inputs.get("text_embeds"),
        inputs.get("time_ids"),
        None if mask is None else mask.astype(bool),
        scale=inputs.get("conditioning_scale", 1.0),
        guess=inputs.get("guess_mode", False),
    )
    named = {f"down_{i}": x for i, x in enumerate(output.down)} | {"mid": output.middle}
    return {name: x.transpose(0, 3, 1, 2) for name, x in named.items()}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _of(family: str, name: str) -> Config:
    unet = sd_unet.BACKBONES[family].configs[name]
    arguments = {k: v for k, v in sd_unet.config_to_official(unet).items() if k not in _UNET_ONLY}
    return config_from_official(arguments)


BACKBONES = {
    "controlnet": Backbone(
        name="controlnet",
        model=Model,
        configs={
            "tiny": Config(),
            "sd-controlnet-canny": _of("sd_unet", "stable-diffusion-v1-5"),
            "controlnet-sd21": _of("sd_unet", "stable-diffusion-2-1"),
            "controlnet-canny-sdxl-1.0": _of("sdxl_unet", "stable-diffusion-xl-base-1.0"),
        },
        example=example,
        officials=(
            Official(
                module="models/controlnets/controlnet.py:ControlNetModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts={"sd-controlnet-canny": 361_279_120},
    )
}
