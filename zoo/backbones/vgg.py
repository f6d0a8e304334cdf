"""VGG: stages of 3x3 convolutions, each halved by its largest values, under two wide layers.

Official code: huggingface/pytorch-image-models@v1.0.31 (Apache-2.0), timm/models/vgg.py. Paper: arXiv:1409.1556.
The wide layers are convolutions, so that larger images have logits at several places, which are pooled; maps smaller
than their kernel are first spread to its size.
Differs from the official code: images are (B, height, width, channels). Batch statistics live in the collection
`batch_stats`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

import layers
from zoo.backbone import Backbone
from zoo.backbones.hooks import show
from zoo.backbones.timm import activation_from_timm, timm_settings
from zoo.backbones.windows import POOLS, pooled_pixels
from zoo.blocks import BatchNorm, Linear
from zoo.blocks.basic import activation_function, he_normal_out
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, batch_norm, conv, conv1x1, linear

__all__ = ["BACKBONES", "Config", "Model", "Output"]

_HIDDEN, _KERNEL = 4096, 7  # of the wide layers: channels of the second, kernel of the first


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    channels: tuple[tuple[int, ...], ...] = ((4,), (6,), (8, 8))  # of the convolutions of each stage
    in_channels: int = 3
    num_classes: int = 10  # 0: the pooled features themselves are the output
    batch_norm: bool = True  # after each convolution
    activation: str = "relu"
    mlp_ratio: float = 0.002  # channels of the first wide layer, in those of the second, of which there are 4096
    pool: str = "avg"  # avg | max | avgmax | catavgmax
    dropout_rate: float = 0.0  # after the first wide layer and before the logits
    norm_epsilon: float = 1e-5  # added to the variance under the root

    def __post_init__(self):
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is not one of {', '.join(POOLS)}")
        if not all(self.channels):
            raise ValueError(f"channels {self.channels} has a stage without convolutions")


class Output(NamedTuple):
    logits: Float[Array, "B K"]
    features: Float[Array, "B h w C"]  # after the last stage, halved
    stages: tuple[Float[Array, "B h w C"], ...]  # after each stage, before it is halved


class Model(nn.Module):
    """Images to logits and the features of every stage. `train` uses and updates the statistics of the batch."""

    config: Config

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> Output:
        c = self.config
        activation = activation_function(c.activation)
        dropout = nn.Dropout(c.dropout_rate, deterministic=not train)
        x, stages = images, []
        for i, channels in enumerate(c.channels):
            for j, width in enumerate(channels):
                show(self, "hidden_states", f"stage{i}_{j}", x)
                x = _convolution(width, 3, f"stage{i}_conv{j}")(x)
                if c.batch_norm:
                    x = BatchNorm(c.norm_epsilon, name=f"stage{i}_norm{j}")(x, train=train)
                x = activation(x)
            stages.append(x)
            x = layers.max_pool(x, 2, stride=2)
        features = x
        if min(x.shape[1:3]) < _KERNEL:
            x = layers.adaptive_avg_pool(x, tuple(max(_KERNEL, size) for size in x.shape[1:3]))
        x = activation(_convolution(int(_HIDDEN * c.mlp_ratio), _KERNEL, "fc1", padding="VALID")(x))
        x = activation(Linear(_HIDDEN, name="fc2")(dropout(x)))
        pooled = pooled_pixels(x, c.pool)
        if not c.num_classes:
            return Output(pooled, features, tuple(stages))
        start = nn.initializers.normal(0.01)
        return Output(Linear(c.num_classes, kernel_init=start, name="head")(dropout(pooled)), features, tuple(stages))


def _convolution(channels: int, kernel: int, name: str, padding: str = "SAME") -> nn.Conv:
    return nn.Conv(
        channels, (kernel, kernel), padding=padding, kernel_init=he_normal_out,
        conv_general_dilated=layers.conv_general_dilated, name=name,
    )  # fmt: skip


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int = 32) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, image_size, image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "num_classes": ("num_classes", 1000), "in_chans": ("in_channels", 3), "mlp_ratio": ("mlp_ratio", 1.0),
    "global_pool": ("pool", "avg"), "drop_rate": ("dropout_rate", 0.0),
}  # fmt: skip
_OTHERS = {"cfg", "norm_layer", "act_layer", "output_stride"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    if unknown := sorted(hparams.keys() - _SAME.keys() - _OTHERS):
        raise UserError(f"these arguments of a timm VGG are not supported: {', '.join(unknown)}")
    norm = hparams.get("norm_layer")
    if norm is not None and "batchnorm" not in str(norm).lower():
        raise UserError(f"norm_layer {norm!r} of a timm VGG is not supported: it may be BatchNorm2d, or nothing")
    stages: list[list[int]] = [[]]
    for entry in hparams["cfg"]:
        if entry == "M":
            stages.append([])
        else:
            stages[-1].append(int(entry))
    if stages.pop():
        raise UserError("cfg of a timm VGG has to end with 'M' here")
    return Config(
        channels=tuple(map(tuple, stages)),
        batch_norm=norm is not None,
        activation=activation_from_timm(hparams.get("act_layer") or "relu"),
        **{ours: hparams.get(theirs, default) for theirs, (ours, default) in _SAME.items()},
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()} | {
        "cfg": [entry for stage in c.channels for entry in (*stage, "M")],
        "norm_layer": "BatchNorm2d" if c.batch_norm else None,
        "act_layer": c.activation,
    }


def official_table(c: Config) -> Table:
    place = 0  # in the row of convolutions, norms, activations and poolings
    for i, channels in enumerate(c.channels):
        for j in range(len(channels)):
            yield from conv(f"features.{place}", f"stage{i}_conv{j}")
            if c.batch_norm:
                yield from batch_norm(f"features.{place + 1}", f"stage{i}_norm{j}")
            place += 3 if c.batch_norm else 2
        place += 1
    yield from conv("pre_logits.fc1", "fc1")
    yield from conv1x1("pre_logits.fc2", "fc2", axes=2)
    if c.num_classes:
        yield from linear("head.fc", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(variables, inputs["x"].transpose(0, 2, 3, 1))
    named = {f"stage{i}": x.transpose(0, 3, 1, 2) for i, x in enumerate(output.stages)}
    return {"logits": output.logits, "features": output.features.transpose(0, 3, 1, 2), **named}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # of each stage
_WIDTHS = (64, 128, 256, 512, 512)


def _named(depth: int, *, batch_norm: bool) -> Config:
    channels = tuple((width,) * count for width, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True))
    return Config(channels, num_classes=1000, batch_norm=batch_norm, mlp_ratio=1.0)


_CONFIGS: dict[str, Config] = {
    "tiny": Config(),
    **{f"vgg{depth}": _named(depth, batch_norm=False) for depth in _CONVOLUTIONS},
    **{f"vgg{depth}_bn": _named(depth, batch_norm=True) for depth in _CONVOLUTIONS},
}

BACKBONES = {
    "vgg": Backbone(
        name="vgg",
        model=Model,
        configs=_CONFIGS,
        example=example,
        settings=timm_settings(
            lambda: _CONFIGS,
            config_to_official,
            lambda arguments: "vgg16" if arguments["norm_layer"] is None else "vgg16_bn",
            sized=False,
        ),
        officials=(
            Official(
                module="timm/models/vgg.py:VGG",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts={"vgg11": 132_863_336, "vgg16": 138_357_544, "vgg16_bn": 138_365_992, "vgg19_bn": 143_678_248},
    ),
}
