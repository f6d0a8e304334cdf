"""SigLIP: an image encoder and a text encoder whose pooled outputs meet in one space, trained with a sigmoid loss.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/siglip, SiglipVisionModel and SiglipModel. Paper:
arXiv:2303.15343. The image encoder (`siglip`) is a ViT without class token whose output a learned query gathers; the
text encoder of both together (`siglip_dual`) reads in both directions and is summarised at its last token, so that
texts are padded to its full length, and padding is not masked.
Differs from the official code: images are (B, height, width, channels); there is no dropout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.backbone import Backbone
from zoo.backbones.encoder import (
    MLP,
    LayerConfig,
    embed_patches,
    embed_tokens,
    encode,
    fitting_positions,
    layers_table,
    make_norm,
    pair,
    pair_outputs,
    unit_length,
)
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear
from zoo.paper import Official
from zoo.weights.table import Table, conv, layer_norm, linear, multihead_attention, parameter, squeezed

__all__ = [
    "BACKBONES",
    "Config",
    "DualConfig",
    "DualModel",
    "DualOutput",
    "Encoded",
    "Model",
    "Output",
    "TextConfig",
    "TextEncoder",
]


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


@dataclass(frozen=True)
class TextConfig:
    """Sizes and constants of the text encoder."""

    vocab_size: int = 50
    max_positions: int = 8  # rows of the table of positions: the length that texts are padded to
    num_layers: int = 2
    layer: LayerConfig = field(default_factory=lambda: LayerConfig(num_heads=4, hidden=36, activation="gelu_tanh"))
    projection_dim: int = 24  # of the common space: the width of the image encoder


@dataclass(frozen=True)
class DualConfig:
    """Sizes and constants of both encoders."""

    text: TextConfig = field(default_factory=TextConfig)
    image: Config = field(default_factory=Config)

    def __post_init__(self):
        if not self.image.pool:
            raise ValueError("images meet texts at the learned query's output: image.pool must be true")
        if self.text.projection_dim != self.image.layer.width:
            raise ValueError(
                f"text.projection_dim {self.text.projection_dim} is not the width {self.image.layer.width} of the image"
                " encoder, which is that of the common space"
            )


class Output(NamedTuple):
    last_hidden_state: Float[Array, "B L D"]  # after the last norm
    pooled: Float[Array, "B D"] | None


class Encoded(NamedTuple):
    """What the text encoder gives."""

    last_hidden_state: Float[Array, "B L D"]  # after the last norm
    pooled: Float[Array, "B P"]


class DualOutput(NamedTuple):
    text_embeds: Float[Array, "T P"] | None  # of length one
    image_embeds: Float[Array, "I P"] | None  # of length one
    logits_per_image: Float[Array, "I T"] | None  # exp(logit scale) times their products, plus the logit bias
    text: Encoded | None
    image: Output | None


# What training begins with: few of all pairs belong together (section 3.2 of the paper).
_LOGIT_SCALE, _LOGIT_BIAS = math.log(10.0), -10.0


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
    path: str = ""  # of this module, ending in a slash
    index: int = 0  # attentions before its first in the network

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Output:
        c, width = self.config, self.config.layer.width
        patches = embed_patches(images, width, c.patch_size)
        table = self.param("positions", nn.initializers.normal(width**-0.5), (c.grid[0] * c.grid[1], width))
        table = fitting_positions(
            jnp.asarray(table, patches.dtype), c.grid, patches.shape[1:3], prefix=0, resample=c.resample_positions
        )
        x = patches.reshape(len(patches), -1, width) + table
        x = encode(self, c.layer, c.num_layers, self.attention, x, path=self.path, index=self.index)
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x)
        if not c.pool:
            return Output(x, None)
        last = Layer(self.index + c.num_layers, f"{self.path}pool", kind="cross")
        return Output(x, Pool(c.layer, self.attention, last, name="pool")(x))


class TextEncoder(nn.Module):
    """Texts to tokens, and the last of them in the common space."""

    config: TextConfig
    attention: AttentionHook = plain_attention
    path: str = ""  # of this module, ending in a slash
    index: int = 0  # attentions before its first in the network

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
    ) -> Encoded:
        c = self.config
        x = embed_tokens(input_ids, positions, c.layer.width, c.vocab_size, c.max_positions)
        mask = None if attention_mask is None else layers.KeyMask(attention_mask.astype(bool))
        x = encode(self, c.layer, c.num_layers, self.attention, x, mask=mask, path=self.path, index=self.index)
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x)
        return Encoded(x, Linear(c.projection_dim, name="head")(x[:, -1]))


class DualModel(nn.Module):
    """Texts and images to their places in the common space, and how well each text fits each image.

    The sigmoid of a logit is how likely a text and an image belong together. The published weights were trained with
    texts padded to `max_positions` and no mask.
    """

    config: DualConfig
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "T L"] | None = None,
        images: Float[Array, "I H W C"] | None = None,
        *,
        attention_mask: Int[Array, "T L"] | Bool[Array, "T L"] | None = None,
        positions: Int[Array, "T L"] | None = None,
    ) -> DualOutput:
        """With texts or images alone, what depends on the others is None. `attention_mask` is 1 at real tokens."""
        c = self.config
        text = image = text_embeds = image_embeds = logits = None
        if input_ids is not None:
            encoder = TextEncoder(c.text, self.attention, "text/", name="text")
            text = encoder(input_ids, attention_mask=attention_mask, positions=positions)
            text_embeds = unit_length(text.pooled)
        if images is not None:
            image = Model(c.image, self.attention, "image/", c.text.num_layers, name="image")(images)
            image_embeds = unit_length(image.pooled)
        if text_embeds is not None and image_embeds is not None:
            scale = self.param("logit_scale", nn.initializers.constant(_LOGIT_SCALE), ())
            bias = self.param("logit_bias", nn.initializers.constant(_LOGIT_BIAS), ())
            kind = text_embeds.dtype
            logits = image_embeds @ text_embeds.T * jnp.exp(scale).astype(kind) + bias.astype(kind)
        return DualOutput(text_embeds, image_embeds, logits, text, image)


def example_pair(config: DualConfig, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    # Every image meets every text, so that the texts are no part of the batch.
    ids = jax.random.randint(key, (2, config.text.max_positions), 0, config.text.vocab_size)
    return {"input_ids": ids, **example(config.image, batch_size=batch_size, key=key)}


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, *config.image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------


def _layer_from_official(hparams: Mapping[str, Any]) -> LayerConfig:
    return LayerConfig(
        width=hparams.get("hidden_size", 768),
        num_heads=hparams.get("num_attention_heads", 12),
        hidden=hparams.get("intermediate_size", 3072),
        activation=activation_from_hub(hparams.get("hidden_act", "gelu_pytorch_tanh")),
        norm_epsilon=hparams.get("layer_norm_eps", 1e-6),
    )


def _layer_to_official(c: LayerConfig) -> dict[str, Any]:
    return {
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_attention_heads": c.num_heads,
        "hidden_act": activation_to_hub(c.activation),
        "layer_norm_eps": c.norm_epsilon,
    }


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    return Config(
        image_size=pair(hparams.get("image_size", 224)),
        patch_size=pair(hparams.get("patch_size", 16)),
        in_channels=hparams.get("num_channels", 3),
        num_layers=hparams.get("num_hidden_layers", 12),
        layer=_layer_from_official(hparams),
        pool=hparams.get("vision_use_head", True),
    )


def dual_config_from_official(hparams: Mapping[str, Any]) -> DualConfig:
    text = hparams.get("text_config") or {}
    return DualConfig(
        text=TextConfig(
            vocab_size=text.get("vocab_size", 32000),
            max_positions=text.get("max_position_embeddings", 64),
            num_layers=text.get("num_hidden_layers", 12),
            layer=_layer_from_official(text),
            projection_dim=text.get("projection_size", text.get("hidden_size", 768)),
        ),
        image=config_from_official(hparams.get("vision_config") or {}),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    image, patch = (size[0] if size[0] == size[1] else list(size) for size in (c.image_size, c.patch_size))
    return {
        "num_hidden_layers": c.num_layers,
        "num_channels": c.in_channels,
        "image_size": image,
        "patch_size": patch,
        "vision_use_head": c.pool,
        **_layer_to_official(c.layer),
    }


def dual_config_to_official(c: DualConfig) -> dict[str, Any]:
    text = {
        "model_type": "siglip_text_model",
        "vocab_size": c.text.vocab_size,
        "max_position_embeddings": c.text.max_positions,
        "num_hidden_layers": c.text.num_layers,
        "projection_size": c.text.projection_dim,
        **_layer_to_official(c.text.layer),
    }
    return {
        "text_config": text,
        "vision_config": config_to_official(c.image) | {"model_type": "siglip_vision_model"},
    }


def official_table(c: Config, theirs: str = "", ours: str = "") -> Table:
    """`theirs` stands before every official name and ends in a dot, `ours` before every one of ours, in a slash."""
    yield from conv(f"{theirs}embeddings.patch_embedding", f"{ours}patch_embedding")
    yield from parameter(f"{theirs}embeddings.position_embedding.weight", f"{ours}positions")
    yield from layers_table(f"{theirs}encoder.layers", ours, c.num_layers)
    yield from layer_norm(f"{theirs}post_layernorm", f"{ours}norm")
    if c.pool:
        head = f"{theirs}head"
        yield from parameter(f"{head}.probe", f"{ours}pool/probe", squeezed(2))
        yield from multihead_attention(f"{head}.attention", f"{ours}pool", c.layer.width)
        yield from layer_norm(f"{head}.layernorm", f"{ours}pool/norm")
        for name in ("fc1", "fc2"):
            yield from linear(f"{head}.mlp.{name}", f"{ours}pool/mlp/{name}")


def dual_table(c: DualConfig) -> Table:
    for name in ("logit_scale", "logit_bias"):
        yield from parameter(name, name, squeezed(1))
    yield from parameter("text_model.embeddings.token_embedding.weight", "text/embedding/embedding")
    yield from parameter("text_model.embeddings.position_embedding.weight", "text/positions/embedding")
    yield from layers_table("text_model.encoder.layers", "text/", c.text.num_layers)
    yield from layer_norm("text_model.final_layer_norm", "text/norm")
    yield from linear("text_model.head", "text/head")
    yield from official_table(c.image, "vision_model.", "image/")


def saved_table(c: Config) -> Table:
    return official_table(c, "vision_model.")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # The official forward pass has an argument for resampling, ours a field of the configuration.
    model = model.clone(config=replace(model.config, resample_positions=True))
    output = model.apply(variables, inputs["pixel_values"].transpose(0, 2, 3, 1))
    named = {"last_hidden_state": output.last_hidden_state}
    return named if output.pooled is None else named | {"pooler_output": output.pooled}


def dual_call(model: DualModel, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # The official forward pass has an argument for resampling, ours a field of the configuration.
    image = replace(model.config.image, resample_positions=True)
    output = model.clone(config=replace(model.config, image=image)).apply(
        variables,
        inputs["input_ids"],
        inputs["pixel_values"].transpose(0, 2, 3, 1),
        attention_mask=inputs.get("attention_mask"),
        positions=inputs.get("position_ids"),
    )
    return pair_outputs(output)


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(**sizes: Any) -> Config:
    return config_from_official(sizes)


def _named_pair(text: Mapping[str, Any], **sizes: Any) -> DualConfig:
    return dual_config_from_official({"text_config": text, "vision_config": sizes})


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SO400M_TEXT = _SO400M | {"projection_size": 1152}

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
    ),
    "siglip_dual": Backbone(
        name="siglip_dual",
        model=DualModel,
        configs={"tiny": DualConfig()}
        | {f"siglip-base-patch16-{pixels}": _named_pair({}, image_size=pixels) for pixels in (224, 256, 384, 512)}
        | {f"siglip-large-patch16-{pixels}": _named_pair(_LARGE, image_size=pixels, **_LARGE) for pixels in (256, 384)}
        | {
            f"siglip-so400m-patch14-{pixels}": _named_pair(
                _SO400M_TEXT | {"max_position_embeddings": tokens}, image_size=pixels, patch_size=14, **_SO400M
            )
            for pixels, tokens in ((224, 16), (384, 64))
        },
        example=example_pair,
        officials=(
            Official(
                module="models/siglip/modeling_siglip.py:SiglipModel",
                config=dual_config_from_official,
                hparams=dual_config_to_official,
                table=dual_table,
                call=dual_call,
                ignored=(r"embeddings\.position_ids$",),
            ),
        ),
        parameter_counts={"siglip-base-patch16-224": 203_155_970},
    ),
}
