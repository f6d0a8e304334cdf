"""Swin-UNETR: a Swin encoder of volumes (or images) and a decoder of residual convolutions that joins its stages.

Official code: Project-MONAI/MONAI@1.6.1 (Apache-2.0), monai/networks/nets/swin_unetr.py. Papers: arXiv:2201.01266, its
pretrained encoder arXiv:2111.14791, version 2 arXiv:2402.10301.
Two quirks are kept, since weights are trained with them: where a grid is smaller than the window, biases are the
leading part of the whole window's table, which are those of other offsets; and "merging" in three dimensions takes the
eight tokens of a block in an order of its own ("mergingv2": the product order).
Differs from the official code: volumes are (B, depth, height, width, channels); no dropout, no stochastic depth, no
Hyena stages.
"""

import itertools
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
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention, show
from zoo.backbones.windows import WindowAttention, WindowLayer
from zoo.blocks import Linear, stack
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Row, Table, constant, conv, conv_transpose, fused_linear, layer_norm, linear, parameter

__all__ = ["BACKBONES", "Config", "Model", "Output"]

# Which of a block's tokens come first, in depth, height and width.
_MERGING = (
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)
)  # fmt: skip
_MERGING_2D = ((0, 0), (1, 0), (0, 1), (1, 1))


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    decoder: bool = True  # the whole network; else the encoder alone
    axes: int = 3  # 2 for images, 3 for volumes
    in_channels: int = 1
    out_channels: int = 3  # of the decoder
    width: int = 12  # of a token in the first stage; each of the four doubles it, and so does the end
    patch_size: tuple[int, ...] = (2, 2, 2)
    window: tuple[int, ...] = (7, 7, 7)  # in tokens
    depths: tuple[int, ...] = (2, 2, 2, 2)  # layers of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratio: float | int = 4.0  # of the MLPs' widths to the tokens'
    query_bias: bool = True  # biases of the projections to query, key and value
    patch_norm: bool = False  # patches are normalised
    merging: str = "merging"  # merging | mergingv2: in which order a stage's end takes the tokens of a block
    residual_stages: bool = False  # version 2: each stage begins with a block of convolutions
    normalize: bool = True  # what the encoder gives is normalised, without learned factors
    instance_affine: bool = False  # norms of the decoder have learned factors
    norm_epsilon: float = 1e-5  # added to the variance under the root, everywhere

    def __post_init__(self):
        if self.axes not in (2, 3) or len(self.patch_size) != self.axes or len(self.window) != self.axes:
            raise ValueError(f"patch_size {self.patch_size} and window {self.window} are not for axes {self.axes}")
        if len(self.depths) != 4 or len(self.num_heads) != 4:
            raise ValueError(f"depths {self.depths} and num_heads {self.num_heads} are not of four stages")
        if self.merging not in ("merging", "mergingv2"):
            raise ValueError(f"merging {self.merging!r} is neither merging nor mergingv2")

    def stage_width(self, stage: int) -> int:
        return self.width * 2**stage

    @property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Of a block's tokens, in the order in which they are merged."""
        if self.axes == 2:
            return _MERGING_2D
        return _MERGING if self.merging == "merging" else tuple(itertools.product((0, 1), repeat=3))


class Output(NamedTuple):
    logits: Float[Array, "B *S K"] | None  # None without a decoder
    stages: tuple[Float[Array, "B *s D"], ...]  # of the encoder: patches, then what each stage gives


def _norm(c: Config, name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=c.norm_epsilon, use_fast_variance=False, name=name)


def _standardised(x: Float[Array, "B *S C"], axes: tuple[int, ...], epsilon: float) -> Float[Array, "B *S C"]:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + epsilon)).astype(x.dtype)


class InstanceNorm(nn.Module):
    """Every channel of every example has mean 0 and variance 1."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        y = _standardised(x, tuple(range(1, x.ndim - 1)), self.config.norm_epsilon)
        if not self.config.instance_affine:
            return y
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(y.dtype)
        return y * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(y.dtype)


class ResidualBlock(nn.Module):
    """activation(two 3x3 convolutions of x + x), with a 1x1 convolution where the number of channels changes."""

    config: Config
    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S D"]:
        c = self.config

        def part(number: int, y: Float[Array, "B *S C"], kernel: int = 3) -> Float[Array, "B *S D"]:
            convolution = nn.Conv(
                self.channels,
                (kernel,) * c.axes,
                padding=kernel // 2,
                use_bias=False,
                conv_general_dilated=layers.conv_general_dilated,
                name=f"conv{number}",
            )
            return InstanceNorm(c, name=f"norm{number}")(convolution(y))

        y = part(2, jax.nn.leaky_relu(part(1, x)))
        return jax.nn.leaky_relu(y + (x if x.shape[-1] == self.channels else part(3, x, kernel=1)))


class UpBlock(nn.Module):
    """The grid twice as fine, joined with what the encoder had there."""

    config: Config
    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B *s C"], skip: Float[Array, "B *S D"]) -> Float[Array, "B *S D"]:
        c = self.config
        twice = (2,) * c.axes
        finer = nn.ConvTranspose(self.channels, twice, strides=twice, padding="VALID", use_bias=False, name="up")(x)
        return ResidualBlock(c, self.channels, name="block")(jnp.concatenate([finer, skip], axis=-1))


class Encoder(nn.Module):
    """Patches and the output of each of the four stages."""

    config: Config
    attention: AttentionHook

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> list[Float[Array, "B *s D"]]:
        c = self.config
        rest = [(0, -n % p) for n, p in zip(x.shape[1:-1], c.patch_size, strict=True)]
        x = jnp.pad(x, [(0, 0), *rest, (0, 0)])
        patches = nn.Conv(c.width, c.patch_size, strides=c.patch_size, padding="VALID", name="patch_embedding")
        x = patches(x)
        x = _norm(c, "patch_norm")(x) if c.patch_norm else x
        stages, index = [x], 0
        for stage, depth in enumerate(c.depths):
            if c.residual_stages:
                x = ResidualBlock(c, c.stage_width(stage), name=f"stage{stage}_block")(x)
            for i in range(depth):
                shift = tuple(w // 2 for w in c.window) if i % 2 else 0
                window, shift = layers.fit_window(x.shape[1:-1], c.window, shift)
                heads, name = c.num_heads[stage], f"stage{stage}_layer"
                attention = partial(
                    WindowAttention, heads, c.stage_width(stage) // heads, window, shift, c.window, self.attention,
                    Layer(index, f"encoder/{name}_{i}/attention"), c.query_bias, pad_first=True,
                )  # fmt: skip
                hidden = int(c.stage_width(stage) * c.mlp_ratio)
                make = partial(WindowLayer, attention, hidden, c.norm_epsilon)
                x = stack(self, make, 1, x, name=name, first=i)
                index += 1
            x = _norm(c, f"stage{stage}_merge_norm")(_merged(x, c.offsets))
            x = Linear(c.stage_width(stage + 1), use_bias=False, name=f"stage{stage}_merge")(x)
            stages.append(x)
        show(self, "hidden_states", "last", x)
        return [_standardised(x, (-1,), c.norm_epsilon) for x in stages] if c.normalize else stages


def _merged(x: Float[Array, "B *s C"], offsets: tuple[tuple[int, ...], ...]) -> Float[Array, "B *t D"]:
    x = jnp.pad(x, [(0, 0), *((0, n % 2) for n in x.shape[1:-1]), (0, 0)])
    return jnp.concatenate([x[(slice(None), *(slice(o, None, 2) for o in offset))] for offset in offsets], axis=-1)


class Model(nn.Module):
    """Volumes to logits of the same size, or to the stages of the encoder alone."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(self, images: Float[Array, "B *S C"]) -> Output:
        c = self.config
        if images.ndim != c.axes + 2:
            raise ValueError(f"images of shape {images.shape} have not {c.axes} axes between batch and channels")
        if c.decoder and any(n % p**5 for n, p in zip(images.shape[1:-1], c.patch_size, strict=True)):
            raise ValueError(f"images of {images.shape[1:-1]} are not a multiple of patch_size^5 along every axis")
        stages = Encoder(c, self.attention, name="encoder")(images)
        if not c.decoder:
            return Output(None, tuple(stages))
        entering = [images, *stages[:3]]
        widths = [c.width, c.width, 2 * c.width, 4 * c.width]
        skips = [ResidualBlock(c, w, name=f"skip{i}")(x) for i, (w, x) in enumerate(zip(widths, entering, strict=True))]
        x = ResidualBlock(c, 16 * c.width, name="bottom")(stages[4])
        for level, skip in zip((4, 3, 2, 1, 0), (stages[3], *reversed(skips)), strict=True):
            x = UpBlock(c, skip.shape[-1], name=f"up{level}")(x, skip)
        return Output(nn.Conv(c.out_channels, (1,) * c.axes, name="head")(x), tuple(stages))


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int | None = None) -> dict[str, jax.Array]:
    size = tuple(2 * p**5 for p in config.patch_size) if config.decoder else (16,) * config.axes
    if image_size is not None:
        size = (image_size,) * config.axes
    return {"images": jax.random.normal(key, (batch_size, *size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_NOT_IN_EVAL = {"class", "drop_rate", "attn_drop_rate", "drop_path_rate", "dropout_path_rate", "use_checkpoint",
                "use_flash_attention", "img_size"}  # fmt: skip
_KNOWN = {"in_channels", "in_chans", "out_channels", "patch_size", "depths", "num_heads", "window_size", "qkv_bias",
          "mlp_ratio", "feature_size", "embed_dim", "norm_name", "normalize", "patch_norm", "spatial_dims",
          "downsample", "use_v2"}  # fmt: skip


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    h = {k: v for k, v in hparams.items() if v or not k.startswith(("use_hyena", "hyena_"))}
    if unknown := sorted(h.keys() - _KNOWN - _NOT_IN_EVAL):
        raise UserError(f"these arguments of MONAI's Swin-UNETR are not supported: {', '.join(unknown)}")
    axes, decoder = h.get("spatial_dims", 3), h.get("class", "SwinUNETR") == "SwinUNETR"
    norm, options = h.get("norm_name", "instance"), {}
    if not isinstance(norm, str):
        norm, options = norm
    if norm.lower() != "instance" or options.keys() - {"affine"}:
        raise UserError(f"norm_name {h['norm_name']!r} of MONAI's Swin-UNETR is not supported: only instance is")

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * axes if isinstance(value, int) else tuple(value)

    return Config(
        decoder=decoder,
        axes=axes,
        in_channels=h["in_channels" if decoder else "in_chans"],
        out_channels=h.get("out_channels", 0),
        width=h.get("feature_size", 24) if decoder else h["embed_dim"],
        patch_size=each(h.get("patch_size", 2)),
        window=each(h.get("window_size", 7)),
        depths=tuple(h.get("depths", (2, 2, 2, 2))),
        num_heads=tuple(h.get("num_heads", (3, 6, 12, 24))),
        mlp_ratio=h.get("mlp_ratio", 4.0),
        query_bias=h.get("qkv_bias", True),
        patch_norm=h.get("patch_norm", False),
        merging=h.get("downsample", "merging"),
        residual_stages=h.get("use_v2", False),
        normalize=h.get("normalize", True),
        instance_affine=options.get("affine", False),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    shared = {
        "window_size": c.window,
        "depths": c.depths,
        "num_heads": c.num_heads,
        "mlp_ratio": c.mlp_ratio,
        "qkv_bias": c.query_bias,
        "patch_norm": c.patch_norm,
        "spatial_dims": c.axes,
        "downsample": c.merging,
        "use_v2": c.residual_stages,
    }
    if not c.decoder:
        own = {"in_chans": c.in_channels, "embed_dim": c.width, "patch_size": c.patch_size}
        return {"class": "SwinTransformer", **own, **shared}
    return {
        "class": "SwinUNETR",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "feature_size": c.width,
        "patch_size": c.patch_size[0],
        "normalize": c.normalize,
        "norm_name": ("instance", {"affine": True}) if c.instance_affine else "instance",
        **shared,
    }


def _read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {key: value for key, value in settings.items() if key != "_class_name"}
    return {"class": settings.get("_class_name", "SwinUNETR"), **arguments}


def _write_settings(hparams: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": hparams["class"], **{k: v for k, v in hparams.items() if k != "class"}}


def official_table(c: Config) -> Table:
    prefix = "swinViT." if c.decoder else ""
    yield from conv(f"{prefix}patch_embed.proj", "encoder/patch_embedding", axes=c.axes)
    if c.patch_norm:
        yield from layer_norm(f"{prefix}patch_embed.norm", "encoder/patch_norm")
    for stage, depth in enumerate(c.depths):
        theirs, ours, width = f"{prefix}layers{stage + 1}", f"encoder/stage{stage}", c.stage_width(stage)
        if c.residual_stages:
            yield from _block_table(c, f"{theirs}c.0.layer", f"{ours}_block", width, width, affine=False)
        for i in range(depth):
            block, own = f"{theirs}.0.blocks.{i}", f"{ours}_layer_{i}"
            yield from layer_norm(f"{block}.norm1", f"{own}/attention_norm")
            yield from layer_norm(f"{block}.norm2", f"{own}/mlp_norm")
            names = tuple(f"{own}/attention/{name}" for name in ("query", "key", "value"))
            yield from fused_linear(f"{block}.attn.qkv", names, width, bias=c.query_bias)
            yield from parameter(f"{block}.attn.relative_position_bias_table", f"{own}/attention/bias_table")
            index = layers.window_relative_index(c.window).astype("int64")
            yield from constant(f"{block}.attn.relative_position_index", index)
            yield from linear(f"{block}.attn.proj", f"{own}/attention/out")
            for theirs_name, name in (("linear1", "fc1"), ("linear2", "fc2")):
                yield from linear(f"{block}.mlp.{theirs_name}", f"{own}/{name}")
        yield from layer_norm(f"{theirs}.0.downsample.norm", f"{ours}_merge_norm")
        yield from linear(f"{theirs}.0.downsample.reduction", f"{ours}_merge", bias=False)
    if c.decoder:
        yield from _decoder_table(c)


def _decoder_table(c: Config) -> Table:
    widths = ((c.in_channels, c.width), (c.width, c.width), (2 * c.width, 2 * c.width), (4 * c.width, 4 * c.width))
    for i, (entering, width) in enumerate(widths):
        yield from _block_table(c, f"encoder{i + 1}.layer", f"skip{i}", entering, width, affine=c.instance_affine)
    deepest = 16 * c.width
    yield from _block_table(c, "encoder10.layer", "bottom", deepest, deepest, affine=c.instance_affine)
    for level, width in zip((4, 3, 2, 1, 0), (8, 4, 2, 1, 1), strict=True):
        theirs, ours, channels = f"decoder{level + 1}", f"up{level}", width * c.width
        yield from conv_transpose(f"{theirs}.transp_conv.conv", f"{ours}/up", axes=c.axes, bias=False)
        block = f"{theirs}.conv_block", f"{ours}/block"
        yield from _block_table(c, *block, 2 * channels, channels, affine=c.instance_affine)
    yield from conv("out.conv.conv", "head", axes=c.axes)


def _block_table(c: Config, theirs: str, ours: str, entering: int, width: int, *, affine: bool) -> Iterator[Row]:
    for i in range(1, 4 if entering != width else 3):
        yield from conv(f"{theirs}.conv{i}.conv", f"{ours}/conv{i}", axes=c.axes, bias=False)
        if affine:
            yield from layer_norm(f"{theirs}.norm{i}", f"{ours}/norm{i}")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(variables, jnp.moveaxis(inputs["x"], 1, -1))
    if output.logits is not None:
        return {"logits": jnp.moveaxis(output.logits, -1, 1)}
    return {f"x{i}": jnp.moveaxis(x, -1, 1) for i, x in enumerate(output.stages)}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

BACKBONES = {
    "swin_unetr": Backbone(
        name="swin_unetr",
        model=Model,
        configs={
            "tiny": Config(
                axes=2, width=4, patch_size=(2, 2), window=(4, 4), depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4),
                mlp_ratio=2.0,
            ),
            # Brain tumours: four contrasts to three nested regions.
            "brats": Config(in_channels=4, out_channels=3, width=48),
            # Thirteen abdominal organs and the background, in CT.
            "btcv": Config(in_channels=1, out_channels=14, width=48),
            "btcv_encoder": Config(decoder=False, out_channels=0, in_channels=1, width=48),
        },
        example=example,
        settings=(_read_settings, _write_settings),
        officials=(
            Official(
                module="monai/networks/nets/swin_unetr.py:SwinTransformer (open_a, held_a) and SwinUNETR (open_b, "
                "held_b); hparams.class names it",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts={"brats": 62_191_941, "btcv": 62_187_296},
    )
}  # fmt: skip
