"""SigLIP's image encoder: a ViT without class token whose output a learned query gathers.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/siglip, SiglipVisionModel. Paper: arXiv:2303.15343.
Differs from the official code: images are (B, height, width, channels); there is no dropout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.backbone import Backbone
from zoo.backbones.encoder import (
    MLP,
    LayerConfig,
    embed_patches,
    encode,
    fitting_positions,
    make_norm,
    pair,
    projections,
)
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear
from zoo.paper import Official
from zoo.weights.table import Table, conv, layer_norm, linear, multihead_attention, parameter, squeezed

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    image_size: tuple[int, int] = (32, 32)  # height and width that the table of positions is for
    patch_size: tuple[int, int] = (16, 16)
    in_channels: int = 3
    num_layers: int = 2
    layer: LayerConfig = field(default_factory=lambda: LayerConfig(num_heads=4, hidden=36, activation="gelu_tanh"))
    pool: bool = True  # there is a learned query that gathers the output
    resample_positions: bool = False  # images of any size: positions are interpolated (cubic)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


class Output(NamedTuple):
    last_hidden_state: Float[Array, "B L D"]  # after the last norm
    pooled: Float[Array, "B D"] | None


class Pool(nn.Module):
    """A learned query attends to all patches; an MLP with a residual follows."""

    config: LayerConfig
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        c, batch = self.config, x.shape[0]
        probe = self.param("probe", nn.initializers.normal(1.0), (c.width,)).astype(x.dtype)
        entering = {"query": jnp.broadcast_to(probe, (batch, 1, c.width)), "key": x, "value": x}
        query, key, value = (
            Linear(c.width, name=name)(y).reshape(batch, y.shape[1], c.num_heads, -1) for name, y in entering.items()
        )
        mixed = attend(self, self.hook, self.layer, query, key, value).reshape(batch, c.width)
        y = Linear(c.width, name="out")(mixed)
        return y + MLP(c, name="mlp")(make_norm(c.norm, c.norm_epsilon, "norm")(y))


class Model(nn.Module):
    """Images to tokens and a pooled vector."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Output:
        c, width = self.config, self.config.layer.width
        patches = embed_patches(images, width, c.patch_size)
        table = self.param("positions", nn.initializers.normal(width**-0.5), (c.grid[0] * c.grid[1], width))
        table = fitting_positions(
            jnp.asarray(table, patches.dtype), c.grid, patches.shape[1:3], prefix=0, resample=c.resample_positions
        )
        x = encode(self, c.layer, c.num_layers, self.attention, patches.reshape(len(patches), -1, width) + table)
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x)
        if not c.pool:
            return Output(x, None)
        return Output(x, Pool(c.layer, self.attention, Layer(c.num_layers, "pool", kind="cross"), name="pool")(x))


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, *config.image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    layer = LayerConfig(
        width=hparams.get("hidden_size", 768),
        num_heads=hparams.get("num_attention_heads", 12),
        hidden=hparams.get("intermediate_size", 3072),
        activation=activation_from_hub(hparams.get("hidden_act", "gelu_pytorch_tanh")),
        norm_epsilon=hparams.get("layer_norm_eps", 1e-6),
    )
    return Config(
        image_size=pair(hparams.get("image_size", 224)),
        patch_size=pair(hparams.get("patch_size", 16)),
        in_channels=hparams.get("num_channels", 3),
        num_layers=hparams.get("num_hidden_layers", 12),
        layer=layer,
        pool=hparams.get("vision_use_head", True),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    image, patch = (size[0] if size[0] == size[1] else list(size) for size in (c.image_size, c.patch_size))
    return {
        "hidden_size": c.layer.width,
        "intermediate_size": c.layer.hidden,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.layer.num_heads,
        "num_channels": c.in_channels,
        "image_size": image,
        "patch_size": patch,
        "hidden_act": activation_to_hub(c.layer.activation),
        "layer_norm_eps": c.layer.norm_epsilon,
        "vision_use_head": c.pool,
    }


def official_table(c: Config, prefix: str = "") -> Table:
    """`prefix` stands before every official name, ending in a dot."""
    yield from conv(f"{prefix}embeddings.patch_embedding", "patch_embedding")
    yield from parameter(f"{prefix}embeddings.position_embedding.weight", "positions")
    for i in range(c.num_layers):
        theirs, ours = f"{prefix}encoder.layers.{i}", f"layers_{i}"
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        yield from projections(f"{theirs}.self_attn", f"{ours}/attention", names, bias=True)
        yield from layer_norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm")
        yield from layer_norm(f"{theirs}.layer_norm2", f"{ours}/mlp_norm")
        for name in ("fc1", "fc2"):
            yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{name}")
    yield from layer_norm(f"{prefix}post_layernorm", "norm")
    if c.pool:
        head = f"{prefix}head"
        yield from parameter(f"{head}.probe", "pool/probe", squeezed(2))
        yield from multihead_attention(f"{head}.attention", "pool", c.layer.width)
        yield from layer_norm(f"{head}.layernorm", "pool/norm")
        for name in ("fc1", "fc2"):
            yield from linear(f"{head}.mlp.{name}", f"pool/mlp/{name}")


def saved_table(c: Config) -> Table:
    return official_table(c, "vision_model.")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # The official forward pass has an argument for resampling, ours a field of the configuration.
    model = model.clone(config=replace(model.config, resample_positions=True))
    output = model.apply(variables, inputs["pixel_values"].transpose(0, 2, 3, 1))
    named = {"last_hidden_state": output.last_hidden_state}
    return named if output.pooled is None else named | {"pooler_output": output.pooled}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(**sizes: Any) -> Config:
    return config_from_official(sizes)


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}

BACKBONES = {
    "siglip": Backbone(
        name="siglip",
        model=Model,
        configs={"tiny": Config()}
        | {f"siglip-base-patch16-{pixels}": _named(image_size=pixels) for pixels in (224, 256, 384, 512)}
        | {f"siglip-large-patch16-{pixels}": _named(image_size=pixels, **_LARGE) for pixels in (256, 384)}
        | {f"siglip-so400m-patch14-{n}": _named(image_size=n, patch_size=14, **_SO400M) for n in (224, 384)},
        example=example,
        officials=(
            Official(
                module="models/siglip/modeling_siglip.py:SiglipVisionModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                saved=(saved_table,),
                call=official_call,
                ignored=(r"embeddings\.position_ids$",),
            ),
        ),
        parameter_counts={"siglip-base-patch16-224": 92_884_224},
    )
}
