"""The U-Nets of Stable Diffusion 1, 2 and XL: residual convolutions, and transformers that attend to a text.

Official code: huggingface/diffusers@v0.42.1 (Apache-2.0), models/unets, UNet2DConditionModel. Papers: arXiv:2112.10752,
XL arXiv:2307.01952. What differs between them is a field of `Config`: which levels have transformers and how deep ones,
heads of each level, and XL's second embedding (a text as a whole, sizes and crops). ControlNet copies the encoder.
Differs from the official code: latents are (B, height, width, channels); latents of odd sizes need no flag.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

import layers
from layers import Mask
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.adaptive import NAMES, Embedding, TimeEmbedding, embedding_table
from zoo.backbones.diffusers import hashable, supported_arguments
from zoo.backbones.encoder import MLP, LayerConfig, make_norm, projections
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.backbones.residual import ResidualBlock, convolution, enlarged, group_norm, residual_table
from zoo.blocks import Linear, stack
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Row, Table, conv, conv1x1, fused_linear, layer_norm, linear

__all__ = [
    "BACKBONES",
    "Config",
    "Model",
    "Output",
    "Residuals",
    "conditions",
    "config_from_official",
    "config_to_official",
    "encode",
    "encoder_table",
    "skip_channels",
]

Skips = tuple[Float[Array, "B _ _ _"], ...]  # what the encoder hands to the decoder, the finest first


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str = "sd_unet"  # sd_unet | sdxl_unet: whose names the configurations have
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (8, 16)  # of each level, the finest first; every level but the last is halved
    num_layers: int = 1  # residual blocks of a level on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, False)  # levels in which a transformer follows each of them
    transformer_layers: tuple[int, ...] = (1, 1)  # layers of a transformer; the last are also the middle's
    num_heads: tuple[int, ...] = (2, 4)
    context_width: int = 12  # of the text's tokens
    num_groups: int = 4  # of the group norms
    norm_epsilon: float = 1e-5  # of those in residual blocks; 1e-6 before transformers
    cosine_first: bool = True  # in the codes of time
    time_shift: float = 0.0  # see `layers.sinusoidal_encoding`
    added_width: int | None = None  # of the second embedding: the pooled text, and
    added_time_dim: int | None = None  # cosines and sines of each of some numbers (sizes and crops)
    linear_projection: bool = False  # in files, transformers start and end with a linear map, not a 1x1 convolution
    sample_size: int | tuple[int, ...] | None = None  # of the latents that it was trained on; any others do

    def __post_init__(self):
        per_level = (self.attention, self.transformer_layers, self.num_heads)
        if any(len(values) != len(self.channels) for values in per_level):
            raise ValueError(f"attention, transformer_layers and num_heads are not one for each of {self.channels}")

    def layer(self, level: int) -> LayerConfig:
        width = self.channels[level]
        return LayerConfig(width, self.num_heads[level], hidden=4 * width, gated=True, query_bias=False)

    @property
    def levels_up(self) -> range:
        return range(len(self.channels) - 1, -1, -1)


class Residuals(NamedTuple):
    """What a ControlNet adds to the skips and to the middle."""

    down: Skips
    middle: Float[Array, "B h w C"]


class Output(NamedTuple):
    sample: Float[Array, "B H W O"]  # the noise, or the velocity where a checkpoint was trained so


class CrossAttention(nn.Module):
    """Tokens attend to others, of another width; with the tokens themselves it is self-attention."""

    config: LayerConfig
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], others: Float[Array, "B T E"], mask: Mask | None
    ) -> Float[Array, "B L D"]:
        c, batch = self.config, x.shape[0]
        entering = {"query": x, "key": others, "value": others}
        query, key, value = (
            Linear(c.width, use_bias=c.query_bias, name=name)(y).reshape(batch, y.shape[1], c.num_heads, -1)
            for name, y in entering.items()
        )
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=mask).reshape(x.shape)
        return Linear(c.width, name="out")(mixed)


class TransformerLayer(nn.Module):
    """Attention to the pixels, attention to the text and a gated MLP, each added to what it is given normed."""

    config: LayerConfig
    hook: AttentionHook
    layer: Layer  # of the first attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], *, context: Float[Array, "B T E"], mask: Mask | None
    ) -> Float[Array, "B L D"]:
        c, first = self.config, self.layer
        show(self, "hidden_states", "input", x)
        second = Layer(first.index + 1, f"{first.name.removesuffix('attention')}cross_attention", kind="cross")
        norms = {name: make_norm("layer", 1e-5, f"{name}_norm") for name in ("attention", "cross_attention", "mlp")}
        y = norms["attention"](x)
        x = x + CrossAttention(c, self.hook, first, name="attention")(y, y, None)
        y = norms["cross_attention"](x)
        x = x + CrossAttention(c, self.hook, second, name="cross_attention")(y, context, mask)
        return x + MLP(c, name="mlp")(norms["mlp"](x))


class Transformer(nn.Module):
    """x + the pixels of x, normed and mapped, through some layers and mapped back."""

    config: Config
    level: int
    hook: AttentionHook
    layer: Layer  # the place of this module, and the number of attentions before it

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, context: Float[Array, "B T E"], mask: Mask | None
    ) -> Float[Array, "B H W C"]:
        c, layer = self.config, self.config.layer(self.level)
        y = group_norm(c.num_groups, 1e-6, "norm")(x).reshape(x.shape[0], -1, layer.width)
        y = Linear(layer.width, name="in")(y)
        for first, number in causal.runs(c.transformer_layers[self.level], lambda i: None, self.hook):
            place = Layer(self.layer.index + 2 * first, f"{self.layer.name}/layers_{first}/attention")
            make = partial(TransformerLayer, layer, self.hook, place)
            y = stack(self, make, number, y, first=first, context=context, mask=mask)
        return x + Linear(layer.width, name="out")(y).reshape(x.shape)


def transformers(c: Config) -> dict[str, tuple[int, int]]:
    """Level of every transformer and number of attentions before it, by name, in the order of computation."""
    down = [(f"down{n}_transformer_{i}", n) for n in range(len(c.channels)) for i in range(c.num_layers)]
    up = [(f"up{n}_transformer_{i}", n) for n in c.levels_up for i in range(c.num_layers + 1)]
    middle = ("middle_transformer_0", len(c.channels) - 1)
    found, count = {}, 0
    for name, level in [*down, middle, *up]:
        if c.attention[level] or name.startswith("middle"):
            found[name] = (level, count)
            count += 2 * c.transformer_layers[level]
    return found


class _Blocks:
    """Residual blocks and transformers of one call, made inside the compact method of `parent`."""

    def __init__(self, parent: nn.Module, c: Config, time: Array, context: Array, mask: Mask | None):
        self.parent, self.config, self.time = parent, c, time
        self.given = {"context": context, "mask": mask}
        self.transformers = transformers(c)

    def residual(self, name: str, number: int, channels: int, x: Array) -> Array:
        make = partial(ResidualBlock, channels, self.config.num_groups, self.config.norm_epsilon)
        return stack(self.parent, make, 1, x, name=f"{name}_block", first=number, time=self.time)

    def transformer(self, name: str, number: int, x: Array) -> Array:
        """x as it is, where the level has no transformers."""
        full = f"{name}_transformer_{number}"
        if full not in self.transformers:
            return x
        level, index = self.transformers[full]
        make = partial(Transformer, self.config, level, self.parent.attention, Layer(index, full))
        return stack(self.parent, make, 1, x, name=f"{name}_transformer", first=number, **self.given)


def conditions(
    c: Config,
    timestep: Real[Array, " B"],
    pooled: Float[Array, "B P"] | None,
    numbers: Real[Array, "B N"] | None,
    dtype: Any,
) -> Float[Array, "B T"]:
    """The embedding of time, plus that of XL's pooled text and numbers; called inside a compact method."""
    width, code = 4 * c.channels[0], {"cosine_first": c.cosine_first, "shift": c.time_shift}
    time = TimeEmbedding(width, c.channels[0], **code, name="time")(timestep, dtype)
    if c.added_width is None:
        return time
    if pooled is None or numbers is None:
        raise ValueError("pooled and numbers are not given, which this configuration adds to the time")
    codes = layers.sinusoidal_encoding(
        numbers, dim=c.added_time_dim, interleaved=False, float32_exponents=True, **code
    ).reshape(numbers.shape[0], -1)
    added = jnp.concatenate([pooled, codes.astype(dtype)], axis=-1)
    return time + Embedding(width, name="added")(added)


def encode(
    parent: nn.Module,
    c: Config,
    x: Float[Array, "B H W C"],
    time: Float[Array, "B T"],
    context: Float[Array, "B L E"],
    mask: Mask | None,
) -> tuple[Float[Array, "B h w D"], Skips]:
    """(the middle's output, what the decoder is handed) of x after the first convolution; called inside the compact
    method of `parent`, which has a field `attention`."""
    blocks = _Blocks(parent, c, time, context, mask)
    skips = [x]
    for level, channels in enumerate(c.channels):
        for i in range(c.num_layers):
            x = blocks.residual(f"down{level}", i, channels, x)
            x = blocks.transformer(f"down{level}", i, x)
            skips.append(x)
        if level + 1 < len(c.channels):
            x = convolution(channels, f"down{level}_halve", stride=2)(x)
            skips.append(x)
    x = blocks.residual("middle", 0, c.channels[-1], x)
    x = blocks.transformer("middle", 0, x)
    return blocks.residual("middle", 1, c.channels[-1], x), tuple(skips)


class Model(nn.Module):
    """Noisy latents, the training steps they are at, and a text's tokens to what is predicted of the latents."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B H W C"],
        timestep: Real[Array, " B"],
        context: Float[Array, "B L E"],
        pooled: Float[Array, "B P"] | None = None,
        numbers: Real[Array, "B N"] | None = None,
        context_mask: Bool[Array, "B L"] | None = None,
        residuals: Residuals | None = None,
    ) -> Output:
        """XL also takes the pooled text and six numbers: the original size, the crop's corner, the wanted size.

        `context_mask` says which of the text's tokens are there; `residuals` are a ControlNet's.
        """
        c = self.config
        time = conditions(c, timestep, pooled, numbers, latents.dtype)
        mask = None if context_mask is None else layers.KeyMask(context_mask)
        x = convolution(c.channels[0], "first")(latents)
        x, skips = encode(self, c, x, time, context, mask)
        if residuals is not None:
            x = x + residuals.middle
            skips = tuple(skip + more for skip, more in zip(skips, residuals.down, strict=True))
        blocks, remaining = _Blocks(self, c, time, context, mask), list(skips)
        for level in c.levels_up:
            for i in range(c.num_layers + 1):
                x = jnp.concatenate([x, remaining.pop()], axis=-1)
                x = blocks.residual(f"up{level}", i, c.channels[level], x)
                x = blocks.transformer(f"up{level}", i, x)
            if level:
                x = enlarged(x, remaining[-1].shape[1:3], f"up{level}_double")
        x = jax.nn.silu(group_norm(c.num_groups, c.norm_epsilon, "norm")(x))
        return Output(convolution(c.out_channels, "last")(x))


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int | None = None) -> dict[str, jax.Array]:
    """Latents have an eighth of the picture's pixels along each side."""
    keys = jax.random.split(key, 4)
    size = (2 ** len(config.channels) if image_size is None else image_size // 8,) * 2
    given = {
        "latents": jax.random.normal(keys[0], (batch_size, *size, config.in_channels)),
        "timestep": jax.random.randint(keys[1], (batch_size,), 0, 1000),
        "context": jax.random.normal(keys[2], (batch_size, 5, config.context_width)),
    }
    if config.added_width is None:
        return given
    numbers = jnp.tile(jnp.array([1024, 768, 0, 64, 1024, 1024]), (batch_size, 1))
    pooled = (batch_size, config.added_width - 6 * config.added_time_dim)
    return given | {"pooled": jax.random.normal(keys[3], pooled), "numbers": numbers}


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "in_channels": ("in_channels", 4), "out_channels": ("out_channels", 4),
    "block_out_channels": ("channels", (320, 640, 1280, 1280)), "layers_per_block": ("num_layers", 2),
    "cross_attention_dim": ("context_width", 1280), "norm_num_groups": ("num_groups", 32),
    "norm_eps": ("norm_epsilon", 1e-5), "flip_sin_to_cos": ("cosine_first", True), "freq_shift": ("time_shift", 0.0),
    "projection_class_embeddings_input_dim": ("added_width", None), "addition_time_embed_dim": ("added_time_dim", None),
    "use_linear_projection": ("linear_projection", False), "sample_size": ("sample_size", None),
}  # fmt: skip
_PER_LEVEL = {"transformer_layers_per_block": 1, "attention_head_dim": 8, "num_attention_heads": None,
              "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"), "up_block_types": None,
              "addition_embed_type": None}  # fmt: skip
_FIXED = {
    "act_fn": ("silu", "swish"), "addition_embed_type": (None, "text_time"), "attention_type": ("default",),
    "center_input_sample": (False,), "class_embed_type": (None,), "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,), "downsample_padding": (1,),
    "dual_cross_attention": (False,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False), "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "num_class_embeds": (None,), "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,), "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,), "time_embedding_type": ("positional",), "timestep_post_act": (None,),
}  # fmt: skip
_IGNORED = ("dropout", "upcast_attention", "addition_embed_type_num_heads")


def config_from_official(hparams: Mapping[str, Any], kind: str = "UNet2DConditionModel") -> Config:
    defaults = {theirs: default for theirs, (_, default) in _SAME.items()} | _PER_LEVEL
    h = supported_arguments(hparams, kind, defaults, fixed=_FIXED, ignored=_IGNORED)
    levels = len(h["block_out_channels"])
    attention = tuple(name == "CrossAttnDownBlock2D" for name in h["down_block_types"])
    up = tuple("CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention))
    if not set(h["down_block_types"]) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or h["up_block_types"] not in (
        None,
        up,
    ):
        raise UserError(f"a {kind} of {h['down_block_types']} and {h['up_block_types']} is not supported")
    for name in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(h[name], int):
            raise UserError(f"a {kind} with {name} {h[name]!r} is not supported: levels may not differ in it")
    if h["addition_embed_type"] is None:
        h |= {"projection_class_embeddings_input_dim": None, "addition_time_embed_dim": None}
    h["freq_shift"] = float(h["freq_shift"])
    # What is called a width of heads is their number, unless that is given too.
    heads = h["attention_head_dim"] if h["num_attention_heads"] is None else h["num_attention_heads"]
    return Config(
        family="sd_unet" if h["addition_embed_type"] is None else "sdxl_unet",
        attention=attention,
        transformer_layers=_per_level(h["transformer_layers_per_block"], levels),
        num_heads=_per_level(heads, levels),
        **{ours: h[theirs] for theirs, (ours, _) in _SAME.items()},
    )


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return hashable(value) if isinstance(value, list | tuple) else (value,) * levels


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()} | {
        "transformer_layers_per_block": c.transformer_layers,
        "attention_head_dim": c.num_heads,
        "down_block_types": tuple("CrossAttnDownBlock2D" if there else "DownBlock2D" for there in c.attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(c.attention)),
        "addition_embed_type": None if c.added_width is None else "text_time",
    }


def skip_channels(c: Config) -> list[int]:
    """Channels of what the decoder is handed."""
    last = len(c.channels) - 1
    per_level = ([width] * (c.num_layers + (level < last)) for level, width in enumerate(c.channels))
    return [c.channels[0], *(width for widths in per_level for width in widths)]


def encoder_table(c: Config) -> Table:
    """First convolution, embeddings, the way down and the middle."""
    yield from conv("conv_in", "first")
    yield from embedding_table("time_embedding", "time")
    if c.added_width is not None:
        yield from embedding_table("add_embedding", "added")
    entering = c.channels[0]
    for level, width in enumerate(c.channels):
        theirs, ours = f"down_blocks.{level}", f"down{level}"
        for i in range(c.num_layers):
            yield from residual_table(f"{theirs}.resnets.{i}", f"{ours}_block_{i}", entering, width, time=True)
            if c.attention[level]:
                yield from _transformer_table(c, f"{theirs}.attentions.{i}", f"{ours}_transformer_{i}", level)
            entering = width
        if level + 1 < len(c.channels):
            yield from conv(f"{theirs}.downsamplers.0.conv", f"{ours}_halve")
    for i in range(2):
        yield from residual_table(f"mid_block.resnets.{i}", f"middle_block_{i}", entering, entering, time=True)
    yield from _transformer_table(c, "mid_block.attentions.0", "middle_transformer_0", len(c.channels) - 1)


def official_table(c: Config) -> Table:
    yield from encoder_table(c)
    remaining, entering = skip_channels(c), c.channels[-1]
    for step, level in enumerate(c.levels_up):
        theirs, ours, width = f"up_blocks.{step}", f"up{level}", c.channels[level]
        for i in range(c.num_layers + 1):
            both = entering + remaining.pop()
            yield from residual_table(f"{theirs}.resnets.{i}", f"{ours}_block_{i}", both, width, time=True)
            if c.attention[level]:
                yield from _transformer_table(c, f"{theirs}.attentions.{i}", f"{ours}_transformer_{i}", level)
            entering = width
        if level:
            yield from conv(f"{theirs}.upsamplers.0.conv", f"{ours}_double")
    yield from layer_norm("conv_norm_out", "norm")
    yield from conv("conv_out", "last")


def _transformer_table(c: Config, theirs: str, ours: str, level: int) -> Iterator[Row]:
    yield from layer_norm(f"{theirs}.norm", f"{ours}/norm")
    for name in ("in", "out"):
        if c.linear_projection:
            yield from linear(f"{theirs}.proj_{name}", f"{ours}/{name}")
        else:
            yield from conv1x1(f"{theirs}.proj_{name}", f"{ours}/{name}", axes=2)
    for i in range(c.transformer_layers[level]):
        block, own = f"{theirs}.transformer_blocks.{i}", f"{ours}/layers_{i}"
        for number, name in enumerate(("attention", "cross_attention", "mlp"), start=1):
            yield from layer_norm(f"{block}.norm{number}", f"{own}/{name}_norm")
            if name != "mlp":
                yield from projections(f"{block}.attn{number}", f"{own}/{name}", NAMES, bias=False)
        hidden = c.layer(level).hidden
        yield from fused_linear(f"{block}.ff.net.0.proj", (f"{own}/mlp/fc1", f"{own}/mlp/gate"), hidden)
        yield from linear(f"{block}.ff.net.2", f"{own}/mlp/fc2")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    residuals = None
    if "mid_residual" in inputs:
        named = (inputs[f"down_residual_{i}"] for i in range(len(skip_channels(model.config))))
        residuals = Residuals(
            tuple(x.transpose(0, 2, 3, 1) for x in named), inputs["mid_residual"].transpose(0, 2, 3, 1)
        )
    mask = inputs.get("encoder_attention_mask")
    output = model.apply(
        variables,
        inputs["sample"].transpose(0, 2, 3, 1),
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        inputs.get("text_embeds"),
        inputs.get("time_ids"),
        None if mask is None else mask.astype(bool),
        residuals,
    )
    return {"sample": output.sample.transpose(0, 3, 1, 2)}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_THREE = {"block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2)}
_XL = {"addition_embed_type": "text_time", "use_linear_projection": True, "addition_time_embed_dim": 256}

_CONFIGS: dict[str, dict[str, Config]] = {
    "sd_unet": {
        "tiny": Config(),
        "stable-diffusion-v1-5": config_from_official({"sample_size": 64, "cross_attention_dim": 768}),
        "stable-diffusion-inpainting": config_from_official(
            {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 9}
        ),
        "stable-diffusion-2-1": config_from_official(
            {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
             "use_linear_projection": True}
        ),
    },
    "sdxl_unet": {
        "tiny": Config(
            family="sdxl_unet", attention=(False, True), transformer_layers=(1, 2), added_width=30, added_time_dim=4,
            linear_projection=True,
        ),
        "stable-diffusion-xl-base-1.0": config_from_official(
            _XL | _THREE
            | {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
               "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816}
        ),
        "stable-diffusion-xl-refiner-1.0": config_from_official(
            _XL
            | {"sample_size": 128, "block_out_channels": (384, 768, 1536, 1536), "attention_head_dim": (6, 12, 24, 24),
               "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
               "transformer_layers_per_block": 4, "projection_class_embeddings_input_dim": 2560}
        ),
    },
}  # fmt: skip
_COUNTS = {
    "sd_unet": {"stable-diffusion-v1-5": 859_520_964},
    "sdxl_unet": {"stable-diffusion-xl-base-1.0": 2_567_463_684},
}

BACKBONES = {
    name: Backbone(
        name=name,
        model=Model,
        configs=configs,
        example=example,
        officials=(
            Official(
                module="models/unets/unet_2d_condition.py:UNet2DConditionModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts=_COUNTS[name],
    )
    for name, configs in _CONFIGS.items()
}
