"""InternVL: patches of a vision transformer, four of them one token, mapped by two layers, as tokens of a Qwen2.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/internvl. Papers: arXiv:2312.14238 (the encoder),
arXiv:2404.16821, arXiv:2504.10479.
Differs from the official code: images are (B, height, width, channels); positions count real tokens, so that padding on
the left changes nothing (the bridge gives the official positions).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.backbone import Backbone
from zoo.backbones import causal, decoder
from zoo.backbones.encoder import (
    LayerConfig,
    embed_patches,
    encode,
    fitting_positions,
    make_norm,
    norm_table,
    pair,
    projections,
)
from zoo.backbones.hooks import AttentionHook, plain_attention, relocated
from zoo.backbones.multimodal import place_features, text_config_from_official, text_config_to_official
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear
from zoo.blocks.basic import activation_function
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, conv, layer_norm, linear, parameter, squeezed

__all__ = ["BACKBONES", "Config", "ImageConfig", "ImageEncoder", "Model"]


@dataclass(frozen=True)
class ImageConfig:
    """Sizes and constants of the image encoder."""

    image_size: tuple[int, int] = (32, 32)  # height and width that the table of positions is for
    patch_size: tuple[int, int] = (8, 8)
    in_channels: int = 3
    num_layers: int = 2
    layer: LayerConfig = field(
        default_factory=lambda: LayerConfig(
            20, 4, hidden=32, norm="rms", query_bias=False, query_key_norm="width", layer_scale=0.1
        )
    )
    positions: bool = True  # a learned table of positions is added
    last_norm: bool = False  # after the last layer
    resample_positions: bool = True  # images of any size: positions are interpolated (cubic)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    text: decoder.Config = field(default_factory=lambda: decoder.Config("qwen2", query_bias=True, eos_token_id=(1,)))
    image: ImageConfig = field(default_factory=ImageConfig)
    image_token_id: int = 2  # stands in the text where an image's features go
    feature_layer: int = -1  # state of the image encoder that is read, 0 before its first layer, -1 at its end
    class_token: bool = False  # its token of the whole image is read too
    merge: int = 2  # patches along each axis that become one token
    activation: str = "gelu"  # between the two layers that map features to tokens
    norm_epsilon: float = 1e-5  # of the norm before them

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        return self.text.eos_token_id


class ImageEncoder(nn.Module):
    config: ImageConfig
    attention: AttentionHook = plain_attention
    path: str = ""  # of this module, ending in a slash

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, state: int = -1) -> Float[Array, "B L D"]:
        """The class token and the patches after `state` layers, -1: at the end."""
        c, width, start = self.config, self.config.layer.width, nn.initializers.normal(0.02)
        patches = embed_patches(images, width, c.patch_size)
        class_token = jnp.asarray(self.param("class_token", start, (width,)), patches.dtype)
        x = patches.reshape(len(patches), -1, width)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, width)), x], axis=1)
        if c.positions:
            table = jnp.asarray(self.param("positions", start, (1 + c.grid[0] * c.grid[1], width)), x.dtype)
            x = x + fitting_positions(table, c.grid, patches.shape[1:3], prefix=1, resample=c.resample_positions)
        reached = state % (c.num_layers + 1)
        x = wanted = encode(self, c.layer, reached, self.attention, x, path=self.path)
        if state == -1 or self.is_initializing():
            # Layers after the wanted one exist, but only initialisation runs them.
            x = encode(self, c.layer, c.num_layers - reached, self.attention, x, path=self.path, start=reached)
            x = make_norm("layer", c.layer.norm_epsilon, "norm")(x) if c.last_norm else x
        return x if state == -1 else wanted


class Model(nn.Module):
    """Tokens and images to logits. `cache` makes it a step of decoding: see `zoo.backbones.generation`."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        images: Float[Array, "N H W C"] | None = None,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        cache: causal.Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> causal.Output:
        """The images' features go where `input_ids` have the image token, in order; the other arguments are the
        decoder's."""
        c = self.config
        language = decoder.Model(c.text, relocated(self.attention, c.image.num_layers, "language/"), name="language")
        embeddings = language.embed(input_ids)
        if images is not None:
            x = ImageEncoder(c.image, self.attention, "image/", name="image")(images, state=c.feature_layer)
            x = x if c.class_token else x[:, 1:]
            side = round(x.shape[1] ** 0.5)
            if side**2 != x.shape[1] or side % c.merge:
                raise ValueError(f"{x.shape[1]} patches are not a square that splits into blocks of {c.merge}")
            merged = layers.patchify(x.reshape(len(x), side, side, -1), c.merge)
            merged = nn.LayerNorm(epsilon=c.norm_epsilon, use_fast_variance=False, name="projector_norm")(merged)
            hidden = activation_function(c.activation)(Linear(c.text.hidden_size, name="projector_in")(merged))
            features = Linear(c.text.hidden_size, name="projector_out")(hidden)
            embeddings = place_features(embeddings, input_ids == c.image_token_id, features)
        return language(
            embeddings=embeddings,
            attention_mask=attention_mask,
            positions=positions,
            cache=cache,
            logits_at=logits_at,
        )


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> causal.Cache:
    """Room for `capacity` tokens a row."""
    return decoder.empty_cache(config.text, batch_size, capacity, dtype)


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    size, patches = config.image.image_size, config.image.grid[0] * config.image.grid[1] // config.merge**2
    text = jax.random.randint(key, (batch_size, 4), 3, config.vocab_size)
    places = jnp.full((batch_size, patches), config.image_token_id)
    ids = jnp.concatenate([text[:, :1], places, text[:, 1:]], axis=1)
    return {"input_ids": ids, "images": jax.random.normal(key, (batch_size, *size, config.image.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------


def image_config_from_official(hparams: Mapping[str, Any]) -> ImageConfig:
    if hparams.get("use_mask_token"):
        raise UserError("use_mask_token of InternVL's vision_config is not supported")
    norm = hparams.get("norm_type", "layer_norm")
    if norm not in ("layer_norm", "rms_norm"):
        raise UserError(f"norm_type {norm!r} is neither layer_norm nor rms_norm")
    layer = LayerConfig(
        width=hparams.get("hidden_size", 1024),
        num_heads=hparams.get("num_attention_heads", 16),
        hidden=hparams.get("intermediate_size", 4096),
        activation=activation_from_hub(hparams.get("hidden_act", "gelu")),
        norm=norm.removesuffix("_norm"),
        norm_epsilon=hparams.get("layer_norm_eps", 1e-6),
        query_bias=hparams.get("attention_bias", False),
        query_key_norm="width" if hparams.get("use_qk_norm", False) else None,
        layer_scale=hparams.get("layer_scale_init_value", 0.1),
    )
    return ImageConfig(
        image_size=pair(hparams.get("image_size", 448)),
        patch_size=pair(hparams.get("patch_size", 14)),
        in_channels=hparams.get("num_channels", 3),
        num_layers=hparams.get("num_hidden_layers", 24),
        layer=layer,
        positions=hparams.get("use_absolute_position_embeddings", True),
        last_norm=not hparams.get("use_mean_pooling", True),
    )


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    text = dict(hparams.get("text_config") or {})
    tied, strategy = hparams.get("tie_word_embeddings", True), hparams.get("vision_feature_select_strategy", "default")
    return Config(
        text=text_config_from_official(text, family="qwen2", tied=tied),
        image=image_config_from_official(hparams.get("vision_config") or {}),
        image_token_id=hparams.get("image_token_id", 151667),
        feature_layer=hparams.get("vision_feature_layer", -1),
        class_token=strategy != "default",
        merge=int(1 / hparams.get("downsample_ratio", 0.5)),
        activation=activation_from_hub(hparams.get("projector_hidden_act", "gelu")),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    layer = c.image.layer
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": layer.width,
        "num_attention_heads": layer.num_heads,
        "num_hidden_layers": c.image.num_layers,
        "intermediate_size": layer.hidden,
        "hidden_act": activation_to_hub(layer.activation),
        "norm_type": f"{layer.norm}_norm",
        "layer_norm_eps": layer.norm_epsilon,
        "attention_bias": layer.query_bias,
        "use_qk_norm": layer.query_key_norm is not None,
        "layer_scale_init_value": layer.layer_scale,
        "image_size": list(c.image.image_size),
        "patch_size": list(c.image.patch_size),
        "num_channels": c.image.in_channels,
        "use_absolute_position_embeddings": c.image.positions,
        "use_mean_pooling": not c.image.last_norm,
    }
    return {
        "text_config": text_config_to_official(c.text),
        "vision_config": vision,
        "image_token_id": c.image_token_id,
        "vision_feature_layer": c.feature_layer,
        "vision_feature_select_strategy": "full" if c.class_token else "default",
        "downsample_ratio": 1 / c.merge,
        "projector_hidden_act": activation_to_hub(c.activation),
        "tie_word_embeddings": c.text.tie_embeddings,
    }


def _table(c: Config, prefix: str, language: str, head: str) -> Table:
    vision, layer = f"{prefix}vision_tower", c.image.layer
    yield from parameter(f"{vision}.embeddings.cls_token", "image/class_token", squeezed(2))
    if c.image.positions:
        yield from parameter(f"{vision}.embeddings.position_embeddings", "image/positions", squeezed(1))
    yield from conv(f"{vision}.embeddings.patch_embeddings.projection", "image/patch_embedding")
    for i in range(c.image.num_layers):
        theirs, ours = f"{vision}.encoder.layer.{i}", f"image/layers_{i}"
        names = ("q_proj", "k_proj", "v_proj", "projection_layer")
        yield from projections(f"{theirs}.attention", f"{ours}/attention", names, bias=layer.query_bias)
        if layer.query_key_norm:
            yield from norm_table(f"{theirs}.attention.q_norm", f"{ours}/attention/query_norm", "rms")
            yield from norm_table(f"{theirs}.attention.k_norm", f"{ours}/attention/key_norm", "rms")
        yield from norm_table(f"{theirs}.layernorm_before", f"{ours}/attention_norm", layer.norm)
        yield from norm_table(f"{theirs}.layernorm_after", f"{ours}/mlp_norm", layer.norm)
        yield from parameter(f"{theirs}.lambda_1", f"{ours}/attention_scale")
        yield from parameter(f"{theirs}.lambda_2", f"{ours}/mlp_scale")
        for name in ("fc1", "fc2"):
            yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{name}")
    if c.image.last_norm:
        yield from layer_norm(f"{vision}.layernorm", "image/norm")
    yield from layer_norm(f"{prefix}multi_modal_projector.layer_norm", "projector_norm")
    yield from linear(f"{prefix}multi_modal_projector.linear_1", "projector_in")
    yield from linear(f"{prefix}multi_modal_projector.linear_2", "projector_out")
    yield from decoder.official_table(c.text, language, head, "language/")


def official_table(c: Config) -> Table:
    return _table(c, "model.", "model.language_model", "lm_head")


def saved_table(c: Config) -> Table:
    return _table(c, "", "language_model.model", "language_model.lm_head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    ids = inputs["input_ids"]
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)  # the official code's, whatever the mask
    images = inputs.get("pixel_values")
    output = model.apply(
        variables,
        ids,
        images=None if images is None else images.transpose(0, 2, 3, 1),
        attention_mask=inputs.get("attention_mask"),
        positions=inputs.get("position_ids", places),
    )
    return {"logits": output.logits}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(hidden: int, inner: int, depth: int, heads: int, keys: int, vocab: int) -> Config:
    text = {
        "model_type": "qwen2", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": keys,
        "max_position_embeddings": 32768, "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"attention_bias": True}
    return config_from_official({"text_config": text, "vision_config": vision, "tie_word_embeddings": False})


BACKBONES = {
    "internvl": Backbone(
        name="internvl",
        model=Model,
        configs={
            "tiny": Config(),
            "InternVL3-1B-hf": _named(896, 4864, 24, 14, 2, 151674),
            "InternVL3-2B-hf": _named(1536, 8960, 28, 12, 2, 151674),
            "InternVL3-8B-hf": _named(3584, 18944, 28, 28, 4, 151674),
        },
        example=example,
        cache=empty_cache,
        officials=(
            Official(
                module="models/internvl/modeling_internvl.py:InternVLForConditionalGeneration",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                saved=(saved_table,),
                call=official_call,
                ignored=(r"rotary_emb\.inv_freq$",),
            ),
        ),
    )
}
