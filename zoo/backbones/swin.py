"""Swin: attention inside windows that every second layer shifts; stages merge 2x2 tokens.

Official code: huggingface/pytorch-image-models@v1.0.31 (Apache-2.0), timm/models/swin_transformer.py. Paper:
arXiv:2103.14030.
Grids that are no whole number of windows are padded before the projections, so that padding takes part with the biases
as its keys and values, as in the official code.
Differs from the official code: images are (B, height, width, channels); no dropout and no stochastic depth.
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
from zoo.backbones.encoder import embed_patches, pair
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention, show
from zoo.backbones.timm import timm_settings
from zoo.backbones.windows import WindowAttention, WindowLayer, pooled_pixels
from zoo.blocks import Linear, stack
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, conv, fused_linear, layer_norm, linear, parameter

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    image_size: tuple[int, int] = (32, 32)  # height and width; windows are fitted to them
    patch_size: tuple[int, int] = (4, 4)
    in_channels: int = 3
    num_classes: int = 10  # 0: the pooled features themselves are the output
    width: int = 12  # of a token in the first stage; each stage doubles it
    depths: tuple[int, ...] = (2, 2)  # layers of each stage
    num_heads: tuple[int, ...] = (2, 4)
    head_dims: tuple[int | None, ...] = (None, None)  # None: width / num_heads
    windows: tuple[tuple[int, int], ...] = ((4, 4), (4, 4))  # height and width in tokens, of each stage
    always_partition: bool = False  # windows and shifts stay as they are where a grid is no larger
    any_image_size: bool = False  # images of other sizes may enter; windows stay those of image_size
    mlp_ratios: tuple[float | int, ...] = (2.0, 2.0)  # of the MLPs' widths to the tokens'
    query_bias: bool = True  # biases of the projections to query, key and value
    position_bias: tuple[bool, ...] | None = None  # stages whose scores have a table of biases; None: all of them
    pool: str = "avg"  # avg | max | avgmax | catavgmax
    norm_epsilon: float = 1e-5  # added to the variance under the root

    def __post_init__(self):
        for name in ("num_heads", "head_dims", "windows", "mlp_ratios"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(f"{name} {getattr(self, name)} has not {len(self.depths)} entries, one a stage")

    def has_bias(self, stage: int) -> bool:
        return self.position_bias is None or self.position_bias[stage]

    def grid(self, stage: int) -> tuple[int, int]:
        """Tokens of a stage, height and width."""
        height, width = (-(-(n // p) // 2**stage) for n, p in zip(self.image_size, self.patch_size, strict=True))
        return height, width

    def stage_width(self, stage: int) -> int:
        return self.width * 2**stage


@dataclass(frozen=True)
class LayerShape:
    """What the configuration means for one layer."""

    stage: int
    name: str
    official: str
    num_heads: int
    head_dim: int
    window: tuple[int, int]
    shift: tuple[int, int]
    hidden: int


def layer_shapes(c: Config) -> Iterator[LayerShape]:
    for stage, depth in enumerate(c.depths):
        width, heads = c.stage_width(stage), c.num_heads[stage]
        for i in range(depth):
            window, shift = c.windows[stage], (0, 0)
            if i % 2:
                shift = (window[0] // 2, window[1] // 2)
            if not c.always_partition:
                window, shift = layers.fit_window(c.grid(stage), window, shift)
            yield LayerShape(
                stage=stage,
                name=f"stage{stage}_layer_{i}",
                official=f"layers.{stage}.blocks.{i}",
                num_heads=heads,
                head_dim=c.head_dims[stage] or width // heads,
                window=window,
                shift=shift,
                hidden=int(width * c.mlp_ratios[stage]),
            )


class Output(NamedTuple):
    logits: Float[Array, "B K"]
    features: Float[Array, "B h w D"]  # after the last norm
    stages: tuple[Float[Array, "B h w D"], ...]  # after each stage


class Model(nn.Module):
    """Images to logits and the features of every stage."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Output:
        c = self.config
        size = images.shape[1:3]
        if size != c.image_size and not c.any_image_size:
            raise ValueError(f"images of {size} pixels are not of image_size {c.image_size}: set any_image_size")
        if any(n % p for n, p in zip(size, c.patch_size, strict=True)):
            raise ValueError(f"images of {size} pixels are not whole patches of {c.patch_size}")

        def norm(name: str) -> nn.Module:
            return nn.LayerNorm(epsilon=c.norm_epsilon, use_fast_variance=False, name=name)

        x = norm("patch_norm")(embed_patches(images, c.width, c.patch_size))
        stages: list[jax.Array] = []
        for index, shape in enumerate(layer_shapes(c)):
            if shape.stage > len(stages):
                stages.append(x)
                x = norm(f"stage{shape.stage}_merge_norm")(_merged(x))
                x = Linear(c.stage_width(shape.stage), use_bias=False, name=f"stage{shape.stage}_merge")(x)
            attention = partial(
                WindowAttention, shape.num_heads, shape.head_dim, shape.window, shape.shift,
                shape.window if c.has_bias(shape.stage) else None, self.attention,
                Layer(index, f"{shape.name}/attention"), c.query_bias,
            )  # fmt: skip
            stem, _, number = shape.name.rpartition("_")
            make = partial(WindowLayer, attention, shape.hidden, c.norm_epsilon)
            x = stack(self, make, 1, x, name=stem, first=int(number))
        stages.append(x)
        show(self, "hidden_states", "last", x)
        features = norm("norm")(x)
        pooled = pooled_pixels(features, c.pool)
        logits = Linear(c.num_classes, name="head")(pooled) if c.num_classes else pooled
        return Output(logits, features, tuple(stages))


def _merged(x: Float[Array, "B h w D"]) -> Float[Array, "B H W E"]:
    """The four tokens of 2x2 after one another, column by column; zeros where the grid is odd."""
    x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)])
    return jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, *config.image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 4, "in_chans": 3, "num_classes": 1000, "global_pool": "avg", "embed_dim": 96,
    "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "head_dim": None, "window_size": 7,
    "always_partition": False, "strict_img_size": True, "dynamic_img_size": False, "mlp_ratio": 4.0, "qkv_bias": True,
}  # fmt: skip
_NOT_IN_EVAL = {"drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    given = {name for name, value in hparams.items() if value is not None}
    if unknown := sorted(given - _DEFAULTS.keys() - _NOT_IN_EVAL):
        raise UserError(f"these arguments of a timm Swin are not supported: {', '.join(unknown)}")
    h = _DEFAULTS | dict(hparams)
    count = len(h["depths"])

    def each(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, list | tuple) else (value,) * count

    windows = h["window_size"]
    if isinstance(windows, int) or (len(windows) == 2 and isinstance(windows[0], int)):
        windows = (windows,) * count
    return Config(
        image_size=pair(h["img_size"]),
        patch_size=pair(h["patch_size"]),
        in_channels=h["in_chans"],
        num_classes=h["num_classes"],
        width=h["embed_dim"],
        depths=tuple(h["depths"]),
        num_heads=tuple(h["num_heads"][:count]),
        head_dims=each(h["head_dim"]),
        windows=tuple(pair(window) for window in windows),
        always_partition=h["always_partition"],
        any_image_size=h["dynamic_img_size"] or not h["strict_img_size"],
        mlp_ratios=each(h["mlp_ratio"]),
        query_bias=h["qkv_bias"],
        pool=h["global_pool"],
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {
        "img_size": c.image_size,
        "patch_size": c.patch_size,
        "in_chans": c.in_channels,
        "num_classes": c.num_classes,
        "global_pool": c.pool,
        "embed_dim": c.width,
        "depths": c.depths,
        "num_heads": c.num_heads,
        "head_dim": c.head_dims,
        "window_size": c.windows,
        "always_partition": c.always_partition,
        "dynamic_img_size": c.any_image_size,
        "mlp_ratio": c.mlp_ratios,
        "qkv_bias": c.query_bias,
    }


def official_table(c: Config) -> Table:
    yield from conv("patch_embed.proj", "patch_embedding")
    yield from layer_norm("patch_embed.norm", "patch_norm")
    for stage in range(1, len(c.depths)):
        yield from layer_norm(f"layers.{stage}.downsample.norm", f"stage{stage}_merge_norm")
        yield from linear(f"layers.{stage}.downsample.reduction", f"stage{stage}_merge", bias=False)
    for shape in layer_shapes(c):
        theirs, ours = shape.official, shape.name
        names = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
        yield from fused_linear(f"{theirs}.attn.qkv", names, shape.num_heads * shape.head_dim, bias=c.query_bias)
        if c.has_bias(shape.stage):
            yield from parameter(f"{theirs}.attn.relative_position_bias_table", f"{ours}/attention/bias_table")
        yield from linear(f"{theirs}.attn.proj", f"{ours}/attention/out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/attention_norm")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/mlp_norm")
        for name in ("fc1", "fc2"):
            yield from linear(f"{theirs}.mlp.{name}", f"{ours}/{name}")
    yield from layer_norm("norm", "norm")
    if c.num_classes:
        yield from linear("head.fc", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(variables, inputs["x"].transpose(0, 2, 3, 1))
    named = {f"layers.{i}": x for i, x in enumerate(output.stages)}
    return {"logits": output.logits, "features": output.features, **named}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_DEEP = (2, 2, 18, 2)
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": _DEEP},
    "base": {"depths": _DEEP, "embed_dim": 128, "num_heads": (4, 8, 16, 32)},
    "large": {"depths": _DEEP, "embed_dim": 192, "num_heads": (6, 12, 24, 48)},
}
_CONFIGS: dict[str, Config] = {
    "tiny": Config(image_size=(24, 32)),
    **{f"swin_{size}_patch4_window7_224": config_from_official(sizes) for size, sizes in _SIZES.items()},
    **{
        f"swin_{size}_patch4_window12_384": config_from_official(_SIZES[size] | {"window_size": 12, "img_size": 384})
        for size in ("base", "large")
    },
    "swin_s3_tiny_224": config_from_official({"window_size": (7, 7, 14, 7)}),
    "swin_s3_small_224": config_from_official({"window_size": (14, 14, 14, 7), "depths": _DEEP}),
    "swin_s3_base_224": config_from_official({"window_size": (7, 7, 14, 7), "depths": (2, 2, 30, 2)}),
}

BACKBONES = {
    "swin": Backbone(
        name="swin",
        model=Model,
        configs=_CONFIGS,
        example=example,
        settings=timm_settings(lambda: _CONFIGS, config_to_official, lambda arguments: "swin_tiny_patch4_window7_224"),
        officials=(
            Official(
                module="timm/models/swin_transformer.py:SwinTransformer",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                ignored=(r"attn_mask$", r"relative_position_index$"),
            ),
        ),
        parameter_counts={
            "swin_tiny_patch4_window7_224": 28_288_354,
            "swin_base_patch4_window7_224": 87_768_224,
            "swin_base_patch4_window12_384": 87_903_584,
        },
    )
}
