"""The autoencoder of latent diffusion: images to a Gaussian over latents an eighth as high and wide, and back.

Official code: huggingface/diffusers@v0.42.1 (Apache-2.0), models/autoencoders, AutoencoderKL. Paper: arXiv:2112.10752.
Residual convolutions on a pyramid; in its middle the pixels attend to one another, with one head.
Differs from the official code: images and latents are (B, height, width, channels); no tiling, no slicing. As there,
`encode` and `decode` know nothing of the scale that diffusion models want: that is `scale_latents`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from zoo.backbone import Backbone
from zoo.backbones.diffusers import supported_arguments
from zoo.backbones.encoder import Attention, LayerConfig, projections
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention
from zoo.backbones.residual import ResidualBlock, convolution, enlarged, group_norm, residual_table
from zoo.blocks import Linear, stack
from zoo.paper import Official
from zoo.weights.table import Row, Table, conv, conv1x1, layer_norm

__all__ = ["BACKBONES", "Config", "Model", "Output", "Posterior", "scale_latents", "unscale_latents"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (8, 16)  # of each level, the finest first; every level but the last is halved
    num_layers: int = 1  # residual blocks of a level in the encoder; the decoder has one more
    latent_channels: int = 4
    num_groups: int = 4  # of the group norms
    norm_epsilon: float = 1e-6
    map_posterior: bool = True  # a linear map of mean and log variance after the encoder,
    map_latents: bool = True  # and one of latents before the decoder
    middle_attention: bool = True
    sample_size: int | tuple[int, ...] = 32  # pixels of the images that it was trained on; any others do
    scaling_factor: float = 0.18215  # what diffusion models see is (latents - shift) times this
    shift_factor: float | None = None


class Posterior(NamedTuple):
    mean: Float[Array, "B h w Z"]
    logvar: Float[Array, "B h w Z"]  # the variance's logarithm, between -30 and 20


class Output(NamedTuple):
    mean: Float[Array, "B h w Z"]
    logvar: Float[Array, "B h w Z"]
    decoded: Float[Array, "B H W C"]


def scale_latents(config: Config, latents: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """(latents - shift) times scale: of about unit variance, as diffusion models take them."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(config: Config, scaled: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The inverse of `scale_latents`, for the decoder."""
    return scaled / config.scaling_factor + (config.shift_factor or 0.0)


class PixelAttention(nn.Module):
    """x + attention(norm(x)) over all pixels, with one head."""

    config: Config
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        c, width = self.config, x.shape[-1]
        y = group_norm(c.num_groups, c.norm_epsilon, "norm")(x).reshape(x.shape[0], -1, width)
        attention = Attention(LayerConfig(width, num_heads=1), self.hook, self.layer, name="attention")
        return x + attention(y, None).reshape(x.shape)


def _blocks(parent: nn.Module, c: Config, x: Array, name: str, channels: int, count: int, first: int = 0) -> Array:
    for i in range(first, first + count):
        x = stack(parent, partial(ResidualBlock, channels, c.num_groups, c.norm_epsilon), 1, x, name=name, first=i)
    return x


def _middle(parent: nn.Module, c: Config, hook: AttentionHook, x: Array, path: str, index: int) -> Array:
    x = _blocks(parent, c, x, "middle_block", c.channels[-1], 1)
    if c.middle_attention:
        layer = Layer(index, f"{path}/middle_attention_0/attention")
        x = stack(parent, partial(PixelAttention, c, hook, layer), 1, x, name="middle_attention")
    return _blocks(parent, c, x, "middle_block", c.channels[-1], 1, first=1)


class Encoder(nn.Module):
    """Images to mean and log variance, still to be mapped."""

    config: Config
    hook: AttentionHook

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        c = self.config
        x = convolution(c.channels[0], "first")(images)
        for level, channels in enumerate(c.channels):
            x = _blocks(self, c, x, f"down{level}_block", channels, c.num_layers)
            if level + 1 < len(c.channels):
                # The last row and column are seen less often than the first ones.
                ends = ((0, 1), (0, 1))
                x = nn.Conv(
                    channels, (3, 3), strides=2, padding=ends, name=f"down{level}_halve",
                    conv_general_dilated=layers.conv_general_dilated,
                )(x)  # fmt: skip
        x = _middle(self, c, self.hook, x, "encoder", 0)
        x = jax.nn.silu(group_norm(c.num_groups, c.norm_epsilon, "norm")(x))
        return convolution(2 * c.latent_channels, "last")(x)


class Decoder(nn.Module):
    """Latents to images."""

    config: Config
    hook: AttentionHook

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        c = self.config
        x = convolution(c.channels[-1], "first")(latents)
        x = _middle(self, c, self.hook, x, "decoder", 1)
        for level, channels in enumerate(reversed(c.channels)):
            x = _blocks(self, c, x, f"up{level}_block", channels, c.num_layers + 1)
            if level + 1 < len(c.channels):
                x = enlarged(x, (2 * x.shape[1], 2 * x.shape[2]), f"up{level}_double")
        x = jax.nn.silu(group_norm(c.num_groups, c.norm_epsilon, "norm")(x))
        return convolution(c.out_channels, "last")(x)


class Model(nn.Module):
    """Images to the posterior of their latents, and to what is decoded from given latents or else from its mean.

    `model.apply(variables, images, method="encode")` and `method="decode"` do one of the two.
    """

    config: Config
    attention: AttentionHook = plain_attention

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.attention)
        self.decoder = Decoder(c, self.attention)
        if c.map_posterior:
            self.posterior = Linear(2 * c.latent_channels)
        if c.map_latents:
            self.latents = Linear(c.latent_channels)

    def __call__(self, images: Float[Array, "B H W C"], latents: Float[Array, "B h w Z"] | None = None) -> Output:
        posterior = self.encode(images)
        return Output(*posterior, self.decode(posterior.mean if latents is None else latents))

    def encode(self, images: Float[Array, "B H W C"]) -> Posterior:
        moments = self.encoder(images)
        if self.config.map_posterior:
            moments = self.posterior(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        return self.decoder(self.latents(latents) if self.config.map_latents else latents)


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int | None = None) -> dict[str, jax.Array]:
    size = 2 ** (len(config.channels) + 1) if image_size is None else image_size
    return {"images": jax.random.normal(key, (batch_size, size, size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "in_channels": ("in_channels", 3), "out_channels": ("out_channels", 3), "block_out_channels": ("channels", (64,)),
    "layers_per_block": ("num_layers", 1), "latent_channels": ("latent_channels", 4),
    "norm_num_groups": ("num_groups", 32), "sample_size": ("sample_size", 32),
    "scaling_factor": ("scaling_factor", 0.18215), "shift_factor": ("shift_factor", None),
    "use_quant_conv": ("map_posterior", True), "use_post_quant_conv": ("map_latents", True),
    "mid_block_add_attention": ("middle_attention", True),
}  # fmt: skip
_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    levels = len(hparams.get("block_out_channels", (64,)))
    h = supported_arguments(
        hparams,
        "AutoencoderKL",
        {theirs: default for theirs, (_, default) in _SAME.items()},
        fixed={"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}
        | {name: ((kind,) * levels,) for name, kind in _TYPES.items()},
        ignored=("force_upcast",),
    )
    return Config(**{ours: h[theirs] for theirs, (ours, _) in _SAME.items()})


def config_to_official(c: Config) -> dict[str, Any]:
    types = {name: (kind,) * len(c.channels) for name, kind in _TYPES.items()}
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()} | types


_NAMES = ("to_q", "to_k", "to_v", "to_out.0")
_OLD_NAMES = ("query", "key", "value", "proj_attn")


def official_table(c: Config, names: tuple[str, str, str, str] = _NAMES) -> Table:
    if c.map_posterior:
        yield from conv1x1("quant_conv", "posterior", axes=2)
    if c.map_latents:
        yield from conv1x1("post_quant_conv", "latents", axes=2)
    for part, direction, resize, count, channels in (
        ("encoder", "down", ("downsamplers", "halve"), c.num_layers, c.channels),
        ("decoder", "up", ("upsamplers", "double"), c.num_layers + 1, c.channels[::-1]),
    ):
        yield from conv(f"{part}.conv_in", f"{part}/first")
        entering = channels[0]
        for level, width in enumerate(channels):
            theirs, ours = f"{part}.{direction}_blocks.{level}", f"{part}/{direction}{level}"
            for i in range(count):
                yield from residual_table(f"{theirs}.resnets.{i}", f"{ours}_block_{i}", entering, width)
                entering = width
            if level + 1 < len(channels):
                yield from conv(f"{theirs}.{resize[0]}.0.conv", f"{ours}_{resize[1]}")
        yield from _middle_table(c, part, names)
        yield from layer_norm(f"{part}.conv_norm_out", f"{part}/norm")
        yield from conv(f"{part}.conv_out", f"{part}/last")


def _middle_table(c: Config, part: str, names: tuple[str, str, str, str]) -> Iterator[Row]:
    theirs, ours, width = f"{part}.mid_block", f"{part}/middle", c.channels[-1]
    for i in range(2):
        yield from residual_table(f"{theirs}.resnets.{i}", f"{ours}_block_{i}", width, width)
    if c.middle_attention:
        yield from layer_norm(f"{theirs}.attentions.0.group_norm", f"{ours}_attention_0/norm")
        yield from projections(f"{theirs}.attentions.0", f"{ours}_attention_0/attention", names, bias=True)


def older_table(c: Config) -> Table:
    """The names in files of diffusers before 0.13, such as Stable Diffusion 1's."""
    return official_table(c, _OLD_NAMES)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    images, latents = (inputs[name].transpose(0, 2, 3, 1) for name in ("sample", "z"))
    output = model.apply(variables, images, latents)
    return {name: value.transpose(0, 3, 1, 2) for name, value in output._asdict().items()}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(**changes: Any) -> Config:
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    return config_from_official(sizes | changes)


_PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "sample_size": 1024}

BACKBONES = {
    "vae_kl": Backbone(
        name="vae_kl",
        model=Model,
        configs={
            "tiny": Config(),
            "sd-vae-ft-mse": _named(sample_size=256),
            "stable-diffusion-v1-5": _named(sample_size=512),
            "stable-diffusion-2-1": _named(sample_size=768),
            "sdxl-vae": _named(sample_size=1024, scaling_factor=0.13025),
            "stable-diffusion-3": _named(**_PLAIN, scaling_factor=1.5305, shift_factor=0.0609),
            "flux.1": _named(**_PLAIN, scaling_factor=0.3611, shift_factor=0.1159),
        },
        example=example,
        officials=(
            Official(
                module="models/autoencoders/autoencoder_kl.py:AutoencoderKL",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                saved=(official_table, older_table),
                call=official_call,
            ),
        ),
        parameter_counts={"sdxl-vae": 83_653_863, "flux.1": 83_819_683},
    )
}
