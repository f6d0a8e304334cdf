"""DINOv2: a self-supervised image encoder, and what it takes for a patch that is hidden.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/dinov2, Dinov2Model. Paper: arXiv:2304.07193.
Differs from the official code: images are (B, height, width, channels); there is no dropout and no stochastic depth;
positions are resampled for images of another size only if `resample_positions` is set, as it is for the named ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.backbone import Backbone
from zoo.backbones.encoder import (
    LayerConfig,
    embed_patches,
    encode,
    fitting_positions,
    make_norm,
    pair,
    projections,
)
from zoo.backbones.hooks import AttentionHook, plain_attention
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.paper import Official
from zoo.weights.table import Table, conv, fused_linear, layer_norm, linear, parameter, squeezed

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    image_size: tuple[int, int] = (28, 28)  # height and width that the table of positions is for
    patch_size: tuple[int, int] = (7, 7)
    in_channels: int = 3
    num_layers: int = 2
    layer: LayerConfig = field(default_factory=lambda: LayerConfig(num_heads=4, layer_scale=1.0))
    mlp_ratio: float | int = 2  # of the MLP's width to layer.width; a gated one has two thirds of that, in whole eights
    mask_token: bool = True  # a token stands in for patches that are hidden
    resample_positions: bool = True  # images of any size: positions are interpolated (cubic)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


class Output(NamedTuple):
    last_hidden_state: Float[Array, "B L D"]  # after the last norm: the class token, then the patches
    pooled: Float[Array, "B D"]  # the class token


class Model(nn.Module):
    """Images to tokens. Patches that `hidden` names are not seen."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, hidden: Bool[Array, "B N"] | None = None) -> Output:
        c, width, start = self.config, self.config.layer.width, nn.initializers.normal(0.02)
        patches = embed_patches(images, width, c.patch_size)
        x = patches.reshape(len(patches), -1, width)
        if c.mask_token:
            mask_token = self.param("mask_token", start, (width,)).astype(x.dtype)
            x = x if hidden is None else jnp.where(hidden[..., None], mask_token, x)
        class_token = self.param("class_token", start, (width,)).astype(x.dtype)
        table = jnp.asarray(self.param("positions", start, (1 + c.grid[0] * c.grid[1], width)), x.dtype)
        table = fitting_positions(table, c.grid, patches.shape[1:3], prefix=1, resample=c.resample_positions)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, width)), x], axis=1) + table
        x = encode(self, c.layer, c.num_layers, self.attention, x)
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x)
        return Output(x, x[:, 0])


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    images = jax.random.normal(key, (batch_size, *config.image_size, config.in_channels))
    if not config.mask_token:
        return {"images": images}
    return {"images": images, "hidden": jax.random.bernoulli(key, 0.3, (batch_size, config.grid[0] * config.grid[1]))}


# --- the official code ---------------------------------------------------------------------------------------------


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    width, ratio, gated = hparams.get("hidden_size", 768), hparams.get("mlp_ratio", 4), hparams.get("use_swiglu_ffn")
    hidden = int(width * ratio)
    layer = LayerConfig(
        width=width,
        num_heads=hparams.get("num_attention_heads", 12),
        hidden=-(-int(hidden * 2 / 3) // 8) * 8 if gated else hidden,
        activation="silu" if gated else activation_from_hub(hparams.get("hidden_act", "gelu")),
        gated=bool(gated),
        norm_epsilon=hparams.get("layer_norm_eps", 1e-6),
        query_bias=hparams.get("qkv_bias", True),
        layer_scale=hparams.get("layerscale_value", 1.0),
    )
    return Config(
        image_size=pair(hparams.get("image_size", 224)),
        patch_size=pair(hparams.get("patch_size", 14)),
        in_channels=hparams.get("num_channels", 3),
        num_layers=hparams.get("num_hidden_layers", 12),
        layer=layer,
        mlp_ratio=ratio,
        mask_token=hparams.get("use_mask_token", True),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    image, patch = (size[0] if size[0] == size[1] else list(size) for size in (c.image_size, c.patch_size))
    return {
        "hidden_size": c.layer.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.layer.num_heads,
        "mlp_ratio": c.mlp_ratio,
        "hidden_act": "gelu" if c.layer.gated else activation_to_hub(c.layer.activation),
        "layer_norm_eps": c.layer.norm_epsilon,
        "image_size": image,
        "patch_size": patch,
        "num_channels": c.in_channels,
        "qkv_bias": c.layer.query_bias,
        "layerscale_value": c.layer.layer_scale,
        "use_swiglu_ffn": c.layer.gated,
        "use_mask_token": c.mask_token,
    }


def official_table(c: Config) -> Table:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    yield from _embedding_table(c)
    for i in range(c.num_layers):
        theirs, ours = f"encoder.layer.{i}", f"layers_{i}"
        yield from _scale_table(theirs, ours)
        yield from projections(f"{theirs}.attention", f"{ours}/attention", names, bias=c.layer.query_bias)
        parts = {"gate_proj": "gate", "up_proj": "fc1", "down_proj": "fc2"} if c.layer.gated else _PLAIN
        for name, own in parts.items():
            yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{own}")


def saved_table(c: Config) -> Table:
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    yield from _embedding_table(c)
    for i in range(c.num_layers):
        theirs, ours = f"encoder.layer.{i}", f"layers_{i}"
        yield from _scale_table(theirs, ours)
        yield from projections(f"{theirs}.attention", f"{ours}/attention", names, bias=c.layer.query_bias)
        if c.layer.gated:
            inner = f"{ours}/mlp/gate", f"{ours}/mlp/fc1"
            yield from fused_linear(f"{theirs}.mlp.weights_in", inner, c.layer.hidden)
            yield from linear(f"{theirs}.mlp.weights_out", f"{ours}/mlp/fc2")
        else:
            for name, own in _PLAIN.items():
                yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{own}")


_PLAIN = {"fc1": "fc1", "fc2": "fc2"}


def _embedding_table(c: Config) -> Table:
    yield from parameter("embeddings.cls_token", "class_token", squeezed(2))
    if c.mask_token:
        yield from parameter("embeddings.mask_token", "mask_token", squeezed(1))
    yield from parameter("embeddings.position_embeddings", "positions", squeezed(1))
    yield from conv("embeddings.patch_embeddings.projection", "patch_embedding")
    yield from layer_norm("layernorm", "norm")


def _scale_table(theirs: str, ours: str) -> Table:
    yield from layer_norm(f"{theirs}.norm1", f"{ours}/attention_norm")
    yield from layer_norm(f"{theirs}.norm2", f"{ours}/mlp_norm")
    yield from parameter(f"{theirs}.layer_scale1.lambda1", f"{ours}/attention_scale")
    yield from parameter(f"{theirs}.layer_scale2.lambda1", f"{ours}/mlp_scale")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    hidden = inputs.get("bool_masked_pos")
    images = inputs["pixel_values"].transpose(0, 2, 3, 1)
    output = model.apply(variables, images, hidden=None if hidden is None else hidden.astype(bool))
    return {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooled}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(width: int, depth: int, heads: int, *, gated: bool = False) -> Config:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "use_swiglu_ffn": gated}
    return config_from_official(sizes | {"image_size": 518})


BACKBONES = {
    "dinov2": Backbone(
        name="dinov2",
        model=Model,
        configs={
            "tiny": Config(),
            "dinov2-small": _named(384, 12, 6),
            "dinov2-base": _named(768, 12, 12),
            "dinov2-large": _named(1024, 24, 16),
            "dinov2-giant": _named(1536, 40, 24, gated=True),
        },
        example=example,
        officials=(
            Official(
                module="models/dinov2/modeling_dinov2.py:Dinov2Model",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                saved=(saved_table,),
                call=official_call,
            ),
        ),
        parameter_counts={"dinov2-base": 86_580_480},
    )
}
