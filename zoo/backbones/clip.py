"""CLIP: an image encoder and a text encoder whose projected outputs meet in one space.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/clip, CLIPModel. Paper: arXiv:2103.00020.
Both are pre-norm transformers. The text is causal and summarised at its end token, the image at its class token.
Differs from the official code: images are (B, height, width, channels); there is no dropout.
"""

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
from zoo.backbones.hooks import AttentionHook, plain_attention
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear
from zoo.paper import Official
from zoo.weights.table import Table, conv, layer_norm, linear, parameter

__all__ = [
    "BACKBONES",
    "Config",
    "ImageConfig",
    "ImageEncoder",
    "Model",
    "Output",
    "TextConfig",
    "TextEncoder",
    "image_config_from_official",
    "image_config_to_official",
    "image_table",
    "text_config_from_official",
    "text_config_to_official",
    "text_table",
]


@dataclass(frozen=True)
class TextConfig:
    """Sizes and constants of the text encoder."""

    vocab_size: int = 50
    max_positions: int = 16  # rows of the table of positions
    num_layers: int = 2
    layer: LayerConfig = field(
        default_factory=lambda: LayerConfig(num_heads=4, hidden=36, activation="quick_gelu", norm_epsilon=1e-5)
    )
    pad_token_id: int = 1
    bos_token_id: int = 48
    eos_token_id: int = 49  # texts are summarised at the first; 2, as in old settings, means at the largest number


@dataclass(frozen=True)
class ImageConfig:
    """Sizes and constants of the image encoder."""

    image_size: tuple[int, int] = (32, 32)  # height and width that the table of positions is for
    patch_size: tuple[int, int] = (16, 16)
    in_channels: int = 3
    num_layers: int = 2
    layer: LayerConfig = field(
        default_factory=lambda: LayerConfig(20, 4, hidden=32, activation="quick_gelu", norm_epsilon=1e-5)
    )
    resample_positions: bool = False  # images of any size: positions are interpolated (cubic)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    projection_dim: int = 16  # of the common space
    logit_scale: float = 2.6592  # what the logarithm of the similarities' factor starts from


class Encoded(NamedTuple):
    """What one of the encoders gives."""

    last_hidden_state: Float[Array, "B L D"]
    pooled: Float[Array, "B D"]


class Output(NamedTuple):
    text_embeds: Float[Array, "T P"] | None  # of length one
    image_embeds: Float[Array, "I P"] | None  # of length one
    logits_per_image: Float[Array, "I T"] | None  # exp(logit scale) times their products
    text: Encoded | None  # the last hidden state is after the last norm
    image: Encoded | None  # the last hidden state is before the last norm, which pooling applies


class TextEncoder(nn.Module):
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
        mask = layers.CausalMask()
        if attention_mask is not None:
            mask = mask & layers.KeyMask(attention_mask.astype(bool))
        x = encode(self, c.layer, c.num_layers, self.attention, x, mask=mask, path=self.path, index=self.index)
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x)
        ends = input_ids if c.eos_token_id == 2 else input_ids == c.eos_token_id
        return Encoded(x, x[jnp.arange(len(x)), jnp.argmax(ends, axis=1)])


class ImageEncoder(nn.Module):
    config: ImageConfig
    attention: AttentionHook = plain_attention
    path: str = ""  # of this module, ending in a slash
    index: int = 0  # attentions before its first in the network

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W C"], *, states: tuple[int, ...] | None = None
    ) -> Encoded | list[Float[Array, "B L D"]]:
        """`states` asks for what there is after so many layers, in this order, instead of what there is at the end."""
        c, width, start = self.config, self.config.layer.width, nn.initializers.normal(0.02)
        patches = embed_patches(images, width, c.patch_size, use_bias=False)
        class_token = self.param("class_token", start, (width,)).astype(patches.dtype)
        table = jnp.asarray(self.param("positions", start, (1 + c.grid[0] * c.grid[1], width)), patches.dtype)
        table = fitting_positions(table, c.grid, patches.shape[1:3], prefix=1, resample=c.resample_positions)
        x = patches.reshape(len(patches), -1, width)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, width)), x], axis=1) + table
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "first_norm")(x)
        # Layers after the last wanted one exist, but only initialisation runs them.
        stops = sorted({*(states or ()), *((c.num_layers,) if states is None or self.is_initializing() else ())})
        reached, done = {}, 0
        for stop in stops:
            x = encode(self, c.layer, stop - done, self.attention, x, path=self.path, index=self.index, start=done)
            reached[stop], done = x, stop
        if states is not None and not self.is_initializing():
            return [reached[number] for number in states]
        pooled = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x[:, 0])
        return Encoded(x, pooled) if states is None else [reached[number] for number in states]


class Model(nn.Module):
    """Texts and images to their places in the common space, and how well each text fits each image."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "T L"] | None = None,
        images: Float[Array, "I H W C"] | None = None,
        *,
        attention_mask: Int[Array, "T L"] | Bool[Array, "T L"] | None = None,
        positions: Int[Array, "T L"] | None = None,
    ) -> Output:
        """With texts or images alone, what depends on the others is None. `attention_mask` is 1 at real tokens."""
        c = self.config
        text = image = text_embeds = image_embeds = logits = None
        if input_ids is not None:
            encoder = TextEncoder(c.text, self.attention, "text/", name="text")
            text = encoder(input_ids, attention_mask=attention_mask, positions=positions)
            text_embeds = unit_length(Linear(c.projection_dim, use_bias=False, name="text_projection")(text.pooled))
        if images is not None:
            image = ImageEncoder(c.image, self.attention, "image/", c.text.num_layers, name="image")(images)
            image_embeds = unit_length(Linear(c.projection_dim, use_bias=False, name="image_projection")(image.pooled))
        if text_embeds is not None and image_embeds is not None:
            scale = self.param("logit_scale", nn.initializers.constant(c.logit_scale), ())
            logits = image_embeds @ text_embeds.T * jnp.exp(scale).astype(text_embeds.dtype)
        return Output(text_embeds, image_embeds, logits, text, image)


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    special = min(config.text.pad_token_id, config.text.bos_token_id, config.text.eos_token_id)
    # Every image meets every text, so that the texts are no part of the batch.
    ids = jax.random.randint(key, (2, 8), special + 1, config.text.vocab_size - 2)
    images = jax.random.normal(key, (batch_size, *config.image.image_size, config.image.in_channels))
    return {"input_ids": ids.at[:, -2].set(config.text.eos_token_id), "images": images}


# --- the official code ---------------------------------------------------------------------------------------------

_LAYER_SIZES = {
    "hidden_size": ("width", 512),
    "num_attention_heads": ("num_heads", 8),
    "intermediate_size": ("hidden", 2048),
    "layer_norm_eps": ("norm_epsilon", 1e-5),
}


def _layer_from_official(hparams: Mapping[str, Any], defaults: Mapping[str, int] | None = None) -> LayerConfig:
    sizes = {ours: hparams.get(n, (defaults or {}).get(n, d)) for n, (ours, d) in _LAYER_SIZES.items()}
    return LayerConfig(**sizes, activation=activation_from_hub(hparams.get("hidden_act", "quick_gelu")))


def _layer_to_official(c: LayerConfig) -> dict[str, Any]:
    sizes = {theirs: getattr(c, ours) for theirs, (ours, _) in _LAYER_SIZES.items()}
    return sizes | {"hidden_act": activation_to_hub(c.activation)}


def text_config_from_official(hparams: Mapping[str, Any]) -> TextConfig:
    return TextConfig(
        vocab_size=hparams.get("vocab_size", 49408),
        max_positions=hparams.get("max_position_embeddings", 77),
        num_layers=hparams.get("num_hidden_layers", 12),
        layer=_layer_from_official(hparams),
        pad_token_id=hparams.get("pad_token_id", 1),
        bos_token_id=hparams.get("bos_token_id", 49406),
        eos_token_id=hparams.get("eos_token_id", 49407),
    )


def image_config_from_official(hparams: Mapping[str, Any]) -> ImageConfig:
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    return ImageConfig(
        image_size=pair(hparams.get("image_size", 224)),
        patch_size=pair(hparams.get("patch_size", 32)),
        in_channels=hparams.get("num_channels", 3),
        num_layers=hparams.get("num_hidden_layers", 12),
        layer=_layer_from_official(hparams, base),
    )


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    return Config(
        text=text_config_from_official(hparams.get("text_config") or {}),
        image=image_config_from_official(hparams.get("vision_config") or {}),
        projection_dim=hparams.get("projection_dim", 512),
        logit_scale=hparams.get("logit_scale_init_value", 2.6592),
    )


def text_config_to_official(c: TextConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_positions,
        "num_hidden_layers": c.num_layers,
        "pad_token_id": c.pad_token_id,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        **_layer_to_official(c.layer),
    }


def image_config_to_official(c: ImageConfig) -> dict[str, Any]:
    image, patch = (size[0] if size[0] == size[1] else list(size) for size in (c.image_size, c.patch_size))
    return {
        "model_type": "clip_vision_model",
        "image_size": image,
        "patch_size": patch,
        "num_channels": c.in_channels,
        "num_hidden_layers": c.num_layers,
        **_layer_to_official(c.layer),
    }


def config_to_official(c: Config) -> dict[str, Any]:
    return {
        "text_config": text_config_to_official(c.text) | {"projection_dim": c.projection_dim},
        "vision_config": image_config_to_official(c.image) | {"projection_dim": c.projection_dim},
        "projection_dim": c.projection_dim,
        "logit_scale_init_value": c.logit_scale,
    }


def text_table(c: TextConfig, theirs: str = "text_model", ours: str = "") -> Table:
    """`theirs` is the official name of the encoder, `ours` the path of ours, ending in a slash."""
    yield from parameter(f"{theirs}.embeddings.token_embedding.weight", f"{ours}embedding/embedding")
    yield from parameter(f"{theirs}.embeddings.position_embedding.weight", f"{ours}positions/embedding")
    yield from layers_table(f"{theirs}.encoder.layers", ours, c.num_layers)
    yield from layer_norm(f"{theirs}.final_layer_norm", f"{ours}norm")


def image_table(c: ImageConfig, theirs: str = "vision_model", ours: str = "") -> Table:
    """`theirs` is the official name of the encoder, `ours` the path of ours, ending in a slash."""
    yield from parameter(f"{theirs}.embeddings.class_embedding", f"{ours}class_token")
    yield from conv(f"{theirs}.embeddings.patch_embedding", f"{ours}patch_embedding", bias=False)
    yield from parameter(f"{theirs}.embeddings.position_embedding.weight", f"{ours}positions")
    yield from layer_norm(f"{theirs}.pre_layrnorm", f"{ours}first_norm")  # misspelt there
    yield from layers_table(f"{theirs}.encoder.layers", ours, c.num_layers)
    yield from layer_norm(f"{theirs}.post_layernorm", f"{ours}norm")


def official_table(c: Config) -> Table:
    yield from parameter("logit_scale", "logit_scale")
    yield from text_table(c.text, ours="text/")
    yield from image_table(c.image, ours="image/")
    yield from linear("text_projection", "text_projection", bias=False)
    yield from linear("visual_projection", "image_projection", bias=False)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
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

_OLD = {"eos_token_id": 2, "bos_token_id": 0}
_LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_LARGE_IMAGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                "patch_size": 14}  # fmt: skip
_LARGE = {"text_config": _OLD | _LARGE_TEXT, "projection_dim": 768}

BACKBONES = {
    "clip": Backbone(
        name="clip",
        model=Model,
        configs={
            "tiny": Config(),
            "clip-vit-base-patch32": config_from_official({"text_config": _OLD}),
            "clip-vit-base-patch16": config_from_official({"text_config": _OLD, "vision_config": {"patch_size": 16}}),
            "clip-vit-large-patch14": config_from_official(_LARGE | {"vision_config": _LARGE_IMAGE}),
            "clip-vit-large-patch14-336": config_from_official(
                _LARGE | {"vision_config": _LARGE_IMAGE | {"image_size": 336}}
            ),
        },
        example=example,
        officials=(
            Official(
                module="models/clip/modeling_clip.py:CLIPModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                ignored=(r"embeddings\.position_ids$",),
            ),
        ),
        parameter_counts={"clip-vit-base-patch32": 151_277_313, "clip-vit-large-patch14": 427_616_513},
    )
}
