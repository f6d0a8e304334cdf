"""PVTv2: a pyramid of stages whose attention reads a reduced grid, with convolutions for positions.

Official code: huggingface/pytorch-image-models@v1.0.31 (Apache-2.0), timm/models/pvt_v2.py. Paper: arXiv:2106.13797.
Patches overlap, MLPs hold a depthwise convolution, and keys and values come from a grid made smaller by a strided
convolution, or (`linear`) by averages over 7x7 bins, so that attention is linear in the number of tokens.
Differs from the official code: images are (B, height, width, channels); no dropout and no stochastic depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.backbones.timm import timm_settings
from zoo.blocks import Linear, stack
from zoo.blocks.basic import DepthwiseConv
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, conv, fused_linear, layer_norm, linear

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants. The tuples have an entry for each stage."""

    in_channels: int = 3
    num_classes: int = 10  # 0: the pooled features themselves are the output
    widths: tuple[int, ...] = (8, 12, 16, 24)  # of a token
    depths: tuple[int, ...] = (1, 1, 1, 1)  # layers
    num_heads: tuple[int, ...] = (1, 2, 2, 4)
    reductions: tuple[int, ...] = (4, 2, 2, 1)  # of the grid that keys and values come from, along each axis
    mlp_ratios: tuple[float | int, ...] = (2.0, 2.0, 2.0, 2.0)  # of the MLPs' widths to the tokens'
    linear: bool = False  # that grid is 7x7, whatever the image
    query_bias: bool = True  # biases of the projections to query, key and value
    norm_epsilon: float = 1e-6  # of norms before the blocks and after the stages
    embedding_norm_epsilon: float = 1e-5  # of norms after patches and reduced grids

    def __post_init__(self):
        for name in ("widths", "num_heads", "reductions", "mlp_ratios"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(f"{name} {getattr(self, name)} has not {len(self.depths)} entries, one a stage")


class Output(NamedTuple):
    logits: Float[Array, "B K"]
    stages: tuple[Float[Array, "B h w D"], ...]  # after each stage; the last are the features that are pooled


def _norm(epsilon: float, name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Tokens of the grid attend to those of a smaller one."""

    config: Config
    stage: int
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        c, width, heads = self.config, x.shape[-1], self.config.num_heads[self.stage]
        reduction = c.reductions[self.stage]

        def projected(name: str, y: Float[Array, "B h w D"]) -> Float[Array, "B L H Dh"]:
            return Linear(width, use_bias=c.query_bias, name=name)(y).reshape(len(y), -1, heads, width // heads)

        reduced = x
        if c.linear:
            reduced = nn.Conv(width, (1, 1), name="reduce")(layers.adaptive_avg_pool(x, 7))
            reduced = layers.gelu(_norm(c.embedding_norm_epsilon, "reduced_norm")(reduced))
        elif reduction > 1:
            kernel = (reduction, reduction)
            reduced = nn.Conv(width, kernel, strides=kernel, padding="VALID", name="reduce")(x)
            reduced = _norm(c.embedding_norm_epsilon, "reduced_norm")(reduced)
        query, key, value = projected("query", x), projected("key", reduced), projected("value", reduced)
        mixed = attend(self, self.hook, self.layer, query, key, value)
        return Linear(width, name="out")(mixed.reshape(x.shape))


class PyramidLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with a depthwise 3x3 convolution inside the MLP."""

    config: Config
    stage: int
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        c, width = self.config, x.shape[-1]
        show(self, "hidden_states", "input", x)
        attention = Attention(c, self.stage, self.hook, self.layer, name="attention")
        x = x + attention(_norm(c.norm_epsilon, "attention_norm")(x))
        hidden = int(width * c.mlp_ratios[self.stage])
        y = Linear(hidden, name="fc1")(_norm(c.norm_epsilon, "mlp_norm")(x))
        y = jax.nn.relu(y) if c.linear else y
        y = DepthwiseConv(3, name="depthwise")(y)
        return x + Linear(width, name="fc2")(layers.gelu(y))


class Model(nn.Module):
    """Images to logits and the features of every stage."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Output:
        c = self.config
        x, stages, index = images, [], 0
        for stage, width in enumerate(c.widths):
            kernel, stride = (3, 2) if stage else (7, 4)
            embedding = nn.Conv(
                width, (kernel, kernel), strides=stride, padding=kernel // 2, name=f"stage{stage}_embedding",
                conv_general_dilated=layers.conv_general_dilated,
            )  # fmt: skip
            x = _norm(c.embedding_norm_epsilon, f"stage{stage}_embedding_norm")(embedding(x))
            for first, number in causal.runs(c.depths[stage], lambda i: None, self.attention):
                layer = Layer(index + first, f"stage{stage}_layer_{first}/attention")
                make = partial(PyramidLayer, c, stage, self.attention, layer)
                x = stack(self, make, number, x, name=f"stage{stage}_layer", first=first)
            index += c.depths[stage]
            x = _norm(c.norm_epsilon, f"stage{stage}_norm")(x)
            stages.append(x)
        pooled = jnp.mean(x, axis=(1, 2))
        return Output(Linear(c.num_classes, name="head")(pooled) if c.num_classes else pooled, tuple(stages))


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int = 64) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, image_size, image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_DEFAULTS: dict[str, Any] = {
    "in_chans": 3, "num_classes": 1000, "global_pool": "avg", "depths": (3, 4, 6, 3),
    "embed_dims": (64, 128, 256, 512), "num_heads": (1, 2, 4, 8), "sr_ratios": (8, 4, 2, 1),
    "mlp_ratios": (8.0, 8.0, 4.0, 4.0), "qkv_bias": True, "linear": False,
}  # fmt: skip
_NOT_IN_EVAL = {"drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    given = {name for name, value in hparams.items() if value is not None}
    if unknown := sorted(given - _DEFAULTS.keys() - _NOT_IN_EVAL):
        raise UserError(f"these arguments of a timm PVTv2 are not supported: {', '.join(unknown)}")
    h = _DEFAULTS | dict(hparams)
    if h["global_pool"] != "avg":
        raise UserError(f"global_pool {h['global_pool']!r} of a timm PVTv2 is not supported: only avg is")
    count = len(h["depths"])

    def each(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, list | tuple) else (value,) * count

    return Config(
        in_channels=h["in_chans"],
        num_classes=h["num_classes"],
        widths=tuple(h["embed_dims"]),
        depths=tuple(h["depths"]),
        num_heads=each(h["num_heads"]),
        reductions=each(h["sr_ratios"]),
        mlp_ratios=each(h["mlp_ratios"]),
        linear=h["linear"],
        query_bias=h["qkv_bias"],
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {
        "in_chans": c.in_channels,
        "num_classes": c.num_classes,
        "global_pool": "avg",
        "depths": c.depths,
        "embed_dims": c.widths,
        "num_heads": c.num_heads,
        "sr_ratios": c.reductions,
        "mlp_ratios": c.mlp_ratios,
        "qkv_bias": c.query_bias,
        "linear": c.linear,
    }


def official_table(c: Config) -> Table:
    for stage, depth in enumerate(c.depths):
        theirs, ours = f"stages.{stage}", f"stage{stage}"
        embedding = f"{theirs}.downsample" if stage else "patch_embed"
        yield from conv(f"{embedding}.proj", f"{ours}_embedding")
        yield from layer_norm(f"{embedding}.norm", f"{ours}_embedding_norm")
        for i in range(depth):
            block, own = f"{theirs}.blocks.{i}", f"{ours}_layer_{i}"
            yield from layer_norm(f"{block}.norm1", f"{own}/attention_norm")
            yield from layer_norm(f"{block}.norm2", f"{own}/mlp_norm")
            yield from linear(f"{block}.attn.q", f"{own}/attention/query", bias=c.query_bias)
            names = f"{own}/attention/key", f"{own}/attention/value"
            yield from fused_linear(f"{block}.attn.kv", names, c.widths[stage], bias=c.query_bias)
            yield from linear(f"{block}.attn.proj", f"{own}/attention/out")
            if c.linear or c.reductions[stage] > 1:
                yield from conv(f"{block}.attn.sr", f"{own}/attention/reduce")
                yield from layer_norm(f"{block}.attn.norm", f"{own}/attention/reduced_norm")
            yield from linear(f"{block}.mlp.fc1", f"{own}/fc1")
            yield from conv(f"{block}.mlp.dwconv", f"{own}/depthwise")
            yield from linear(f"{block}.mlp.fc2", f"{own}/fc2")
        yield from layer_norm(f"{theirs}.norm", f"{ours}_norm")
    if c.num_classes:
        yield from linear("head", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(variables, inputs["x"].transpose(0, 2, 3, 1))
    stages = [x.transpose(0, 3, 1, 2) for x in output.stages]
    return {"logits": output.logits, "features": stages[-1], **{f"stage_{i}": x for i, x in enumerate(stages)}}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(depths: tuple[int, ...], widths: tuple[int, ...] = (64, 128, 320, 512), **changes: Any) -> Config:
    return config_from_official({"depths": depths, "embed_dims": widths, "num_heads": (1, 2, 5, 8), **changes})


_CONFIGS: dict[str, Config] = {
    "tiny": Config(),
    "pvt_v2_b0": _named((2, 2, 2, 2), (32, 64, 160, 256)),
    "pvt_v2_b1": _named((2, 2, 2, 2)),
    "pvt_v2_b2": _named((3, 4, 6, 3)),
    "pvt_v2_b2_li": _named((3, 4, 6, 3), linear=True),
    "pvt_v2_b3": _named((3, 4, 18, 3)),
    "pvt_v2_b4": _named((3, 8, 27, 3)),
    "pvt_v2_b5": _named((3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}

BACKBONES = {
    "pvt_v2": Backbone(
        name="pvt_v2",
        model=Model,
        configs=_CONFIGS,
        example=example,
        settings=timm_settings(lambda: _CONFIGS, config_to_official, lambda arguments: "pvt_v2_b2", sized=False),
        officials=(
            Official(
                module="timm/models/pvt_v2.py:PyramidVisionTransformerV2",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts={"pvt_v2_b0": 3_666_760, "pvt_v2_b2": 25_362_856, "pvt_v2_b2_li": 22_553_512},
    )
}
