"""ResNet: residual blocks of convolutions, with the stems and shortcuts of its variants (ResNet-D, ResNeXt, wide).

Official code: huggingface/pytorch-image-models@v1.0.31 (Apache-2.0), timm/models/resnet.py; its names of parameters are
torchvision's. Papers: ResNet arXiv:1512.03385, ResNeXt arXiv:1611.05431, Wide ResNet arXiv:1605.07146, ResNet-D
arXiv:1812.01187.
Differs from the official code: images are (B, height, width, channels); no dropout of any kind, no anti-aliasing
filters and no channel attention. Batch statistics live in the collection `batch_stats`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

import layers
from zoo.backbone import Backbone
from zoo.backbones.hooks import show
from zoo.backbones.timm import activation_from_timm, timm_settings
from zoo.backbones.windows import POOLS, pooled_pixels
from zoo.blocks import BatchNorm, Linear, stack
from zoo.blocks.basic import activation_function, he_normal_out
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, batch_norm, conv, linear

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    bottleneck: bool = False  # blocks of 1x1, 3x3 and 1x1 convolutions, four times as wide outside, instead of two 3x3
    depths: tuple[int, ...] = (1, 1, 1, 1)  # blocks of each stage
    channels: tuple[int, ...] = (8, 12, 16, 20)  # width inside the blocks of each stage
    in_channels: int = 3
    num_classes: int = 10  # 0: the pooled features themselves are the output
    pool: str = "avg"  # avg | max | avgmax | catavgmax
    activation: str = "relu"
    stem: str = ""  # "": 7x7 convolution to 64 channels; deep, deep_tiered: three 3x3 ones
    stem_width: int = 64  # channels of a deep stem's first convolutions, half of what it gives
    stem_convolution: bool = False  # a 3x3 convolution with stride 2 instead of the maximum after the stem
    groups: int = 1  # of the 3x3 convolution of a bottleneck
    base_width: int = 64  # channels inside a bottleneck, in 64ths of the stage's
    first_reduction: int = 1  # what the first convolution of a block divides its width by
    shortcut_kernel: int = 1  # of the convolution in shortcuts that change the shape
    shortcut_pool: bool = False  # such shortcuts take means over 2x2 pixels instead of every second one
    output_stride: int = 32  # pixels of an image to one of the last stage; below 32 convolutions are dilated instead
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride {self.output_stride} is not 8, 16 or 32")
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is not one of {', '.join(POOLS)}")
        if len(self.depths) != len(self.channels):
            raise ValueError(f"{len(self.depths)} depths are not one for each of {len(self.channels)} channels")
        if not self.bottleneck and (self.groups, self.base_width) != (1, 64):
            raise ValueError("groups and base_width are for bottlenecks only")

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """What the stem's convolutions give."""
        if not self.stem:
            return (64,)
        first = 3 * (self.stem_width // 4) if "tiered" in self.stem else self.stem_width
        return first, self.stem_width, 2 * self.stem_width


@dataclass(frozen=True)
class BlockShape:
    """What the configuration means for one block."""

    name: str
    official: str
    inner: int  # channels inside
    first: int  # channels after the first convolution
    outer: int  # channels of the output
    stride: int
    dilation: int
    first_dilation: int
    shortcut_kernel: int | None  # None: the input itself is added

    @property
    def shortcut_dilation(self) -> int:
        return self.first_dilation if self.shortcut_kernel is not None and self.shortcut_kernel > 1 else 1


def blocks(c: Config) -> Iterator[tuple[int, BlockShape]]:
    """(stage, block) in the order of computation."""
    reached, dilation, before = 4, 1, 1
    entering = c.stem_channels[-1]
    for stage, (depth, width) in enumerate(zip(c.depths, c.channels, strict=True)):
        stride = 1 if stage == 0 else 2
        if reached >= c.output_stride:
            dilation, stride = dilation * stride, 1
        else:
            reached *= stride
        inner = int(width * (c.base_width / 64) // 1) * c.groups if c.bottleneck else width
        outer = 4 * width if c.bottleneck else width
        changes = stride != 1 or entering != outer
        kernel = 1 if stride == 1 and dilation == 1 else c.shortcut_kernel
        for number in range(depth):
            yield (
                stage,
                BlockShape(
                    name=f"stage{stage}_block_{number}",
                    official=f"layer{stage + 1}.{number}",
                    inner=inner,
                    first=inner // c.first_reduction,
                    outer=outer,
                    stride=stride if number == 0 else 1,
                    dilation=dilation,
                    first_dilation=before,
                    shortcut_kernel=kernel if number == 0 and changes else None,
                ),
            )
            before = dilation
        entering = outer


class Output(NamedTuple):
    logits: Float[Array, "B K"]
    stages: tuple[Float[Array, "B h w C"], ...]  # after each stage; the last are the features that are pooled


def _convolution(channels: int, kernel: int, name: str, *, stride: int = 1, dilation: int = 1, groups: int = 1):
    padding = (stride - 1 + dilation * (kernel - 1)) // 2
    return nn.Conv(
        channels, (kernel, kernel), strides=stride, padding=padding, kernel_dilation=dilation,
        feature_group_count=groups, use_bias=False, kernel_init=he_normal_out,
        conv_general_dilated=layers.conv_general_dilated, name=name,
    )  # fmt: skip


class Block(nn.Module):
    """activation(convolutions(x) + shortcut(x))."""

    config: Config
    shape: BlockShape

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], *, train: bool) -> Float[Array, "B H W D"]:
        c, s = self.config, self.shape
        activation = activation_function(c.activation)
        show(self, "hidden_states", "input", x)

        def norm(name: str, y: Float[Array, "B h w C"], *, last: bool = False) -> Float[Array, "B h w C"]:
            # A block starts as its shortcut alone.
            start = nn.initializers.zeros if last else nn.initializers.ones
            return BatchNorm(c.norm_epsilon, scale_init=start, name=name)(y, train=train)

        strided = {"stride": s.stride, "dilation": s.first_dilation}
        if c.bottleneck:
            y = activation(norm("norm1", _convolution(s.first, 1, "conv1")(x)))
            y = activation(norm("norm2", _convolution(s.inner, 3, "conv2", groups=c.groups, **strided)(y)))
            y = norm("norm3", _convolution(s.outer, 1, "conv3")(y), last=True)
        else:
            y = activation(norm("norm1", _convolution(s.first, 3, "conv1", **strided)(x)))
            y = norm("norm2", _convolution(s.outer, 3, "conv2", dilation=s.dilation)(y), last=True)
        if s.shortcut_kernel is None:
            return activation(y + x)
        if c.shortcut_pool:
            x = _convolution(s.outer, 1, "shortcut_conv")(_halved(x, s.stride, s.dilation))
        else:
            kernel, dilation = s.shortcut_kernel, s.shortcut_dilation
            x = _convolution(s.outer, kernel, "shortcut_conv", stride=s.stride, dilation=dilation)(x)
        return activation(y + norm("shortcut_norm", x))


def _halved(x: Float[Array, "B h w C"], stride: int, dilation: int) -> Float[Array, "B H W C"]:
    """Means over 2x2 pixels: of those inside at the border, unless nothing shrinks, where zeros outside count."""
    if stride == 1 and dilation == 1:
        return x
    if dilation > 1:
        return nn.avg_pool(x, (2, 2), (1, 1), ((0, 1), (0, 1)), count_include_pad=True)
    ends = tuple((0, size % 2) for size in x.shape[1:3])
    return nn.avg_pool(x, (2, 2), (2, 2), ends, count_include_pad=False)


class Model(nn.Module):
    """Images to logits and the features of every stage. `train` uses and updates the statistics of the batch."""

    config: Config

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> Output:
        c = self.config
        activation = activation_function(c.activation)
        x, kernel = images, 3 if c.stem else 7
        for i, channels in enumerate(c.stem_channels):
            x = _convolution(channels, kernel, f"stem_conv{i}", stride=1 if i else 2)(x)
            x = activation(BatchNorm(c.norm_epsilon, name=f"stem_norm{i}")(x, train=train))
        if c.stem_convolution:
            x = _convolution(x.shape[-1], 3, "stem_pool_conv", stride=2)(x)
            x = activation(BatchNorm(c.norm_epsilon, name="stem_pool_norm")(x, train=train))
        else:
            x = layers.max_pool(x, 3, stride=2, padding=1)
        stages = [x] * len(c.depths)
        for stage, shape in blocks(c):
            stem, _, number = shape.name.rpartition("_")
            x = stack(self, partial(Block, c, shape), 1, x, name=stem, first=int(number), train=train)
            stages[stage] = x
        pooled = pooled_pixels(x, c.pool)
        return Output(Linear(c.num_classes, name="head")(pooled) if c.num_classes else pooled, tuple(stages))


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int = 32) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, image_size, image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "num_classes": ("num_classes", 1000), "in_chans": ("in_channels", 3), "output_stride": ("output_stride", 32),
    "global_pool": ("pool", "avg"), "cardinality": ("groups", 1), "base_width": ("base_width", 64),
    "stem_width": ("stem_width", 64), "stem_type": ("stem", ""), "replace_stem_pool": ("stem_convolution", False),
    "block_reduce_first": ("first_reduction", 1), "down_kernel_size": ("shortcut_kernel", 1),
    "avg_down": ("shortcut_pool", False),
}  # fmt: skip
_NOT_IN_EVAL = {"drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last"}
_OTHERS = {"block", "layers", "channels", "act_layer"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    h = {k: v for k, v in hparams.items() if v is not None or k not in ("aa_layer", "block_args", "norm_layer")}
    if unknown := sorted(h.keys() - _SAME.keys() - _NOT_IN_EVAL - _OTHERS):
        raise UserError(f"these arguments of a timm ResNet are not supported: {', '.join(unknown)}")
    return Config(
        bottleneck={"BasicBlock": False, "Bottleneck": True}[h["block"]],
        depths=tuple(h["layers"]),
        channels=tuple(h.get("channels", (64, 128, 256, 512))),
        activation=activation_from_timm(h.get("act_layer") or "relu"),
        **{ours: h.get(theirs, default) for theirs, (ours, default) in _SAME.items()},
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()} | {
        "block": "Bottleneck" if c.bottleneck else "BasicBlock",
        "layers": c.depths,
        "channels": c.channels,
        "act_layer": c.activation,
    }


def official_table(c: Config) -> Table:
    if c.stem:
        for i, place in enumerate((0, 3, 6)):
            yield from conv(f"conv1.{place}", f"stem_conv{i}", bias=False)
            yield from batch_norm("bn1" if i == 2 else f"conv1.{place + 1}", f"stem_norm{i}")
    else:
        yield from conv("conv1", "stem_conv0", bias=False)
        yield from batch_norm("bn1", "stem_norm0")
    if c.stem_convolution:
        yield from conv("maxpool.0", "stem_pool_conv", bias=False)
        yield from batch_norm("maxpool.1", "stem_pool_norm")
    for _, shape in blocks(c):
        for i in range(1, 4 if c.bottleneck else 3):
            yield from conv(f"{shape.official}.conv{i}", f"{shape.name}/conv{i}", bias=False)
            yield from batch_norm(f"{shape.official}.bn{i}", f"{shape.name}/norm{i}")
        if shape.shortcut_kernel is not None:
            place = 1 if c.shortcut_pool else 0
            yield from conv(f"{shape.official}.downsample.{place}", f"{shape.name}/shortcut_conv", bias=False)
            yield from batch_norm(f"{shape.official}.downsample.{place + 1}", f"{shape.name}/shortcut_norm")
    if c.num_classes:
        yield from linear("fc", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(variables, inputs["x"].transpose(0, 2, 3, 1))
    stages = [x.transpose(0, 3, 1, 2) for x in output.stages]
    named = {f"layer{i + 1}": x for i, x in enumerate(stages)}
    return {"logits": output.logits, "features": stages[-1], **named}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_DEPTHS = {18: (2, 2, 2, 2), 26: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
           152: (3, 8, 36, 3)}  # fmt: skip
_D = {"stem_width": 32, "stem_type": "deep", "avg_down": True}


def _named(depth: int, **changes: Any) -> Config:
    block = "BasicBlock" if depth in (18, 34) else "Bottleneck"
    return config_from_official({"block": block, "layers": _DEPTHS[depth], **changes})


_CONFIGS: dict[str, Config] = {
    "tiny": Config(),
    **{f"resnet{depth}": _named(depth) for depth in _DEPTHS},
    **{f"resnet{depth}d": _named(depth, **_D) for depth in _DEPTHS},
    "resnext50_32x4d": _named(50, cardinality=32, base_width=4),
    "resnext101_32x8d": _named(101, cardinality=32, base_width=8),
    "wide_resnet50_2": _named(50, base_width=128),
    "wide_resnet101_2": _named(101, base_width=128),
}

BACKBONES = {
    "resnet": Backbone(
        name="resnet",
        model=Model,
        configs=_CONFIGS,
        example=example,
        settings=timm_settings(
            lambda: _CONFIGS,
            config_to_official,
            lambda arguments: "resnet50" if arguments["block"] == "Bottleneck" else "resnet18",
            sized=False,
        ),
        officials=(
            Official(
                module="timm/models/resnet.py:ResNet",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts={
            "resnet18": 11_689_512, "resnet50": 25_557_032, "resnet50d": 25_576_264, "resnet101": 44_549_160,
            "resnext50_32x4d": 25_028_904, "wide_resnet50_2": 68_883_240,
        },
    )
}  # fmt: skip
