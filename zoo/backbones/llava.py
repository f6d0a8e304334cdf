"""LLaVA-1.5: patches of CLIP's image encoder, mapped by two layers, as tokens of a Llama.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/llava. Papers: arXiv:2304.08485, arXiv:2310.03744.
Features come from inside the image encoder, by default from before its last layer; what lies behind is kept with the
checkpoint and never computed.
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

from zoo.backbone import Backbone
from zoo.backbones import causal, clip, decoder
from zoo.backbones.hooks import AttentionHook, plain_attention, relocated
from zoo.backbones.multimodal import place_features, text_config_from_official, text_config_to_official
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear
from zoo.blocks.basic import activation_function
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, linear

__all__ = ["BACKBONES", "Config", "Model"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    text: decoder.Config = field(default_factory=lambda: decoder.Config("llama", eos_token_id=(1,)))
    image: clip.ImageConfig = field(default_factory=clip.ImageConfig)
    image_token_id: int = 2  # stands in the text where a patch's features go
    feature_layers: tuple[int, ...] = (-1,)  # states of the image encoder that are read, 0 before its first layer
    class_token: bool = False  # its token of the whole image is read too
    activation: str = "gelu"  # between the two layers that map features to tokens
    projector_bias: bool = True

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        return self.text.eos_token_id


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
        hook = relocated(self.attention, c.image.num_layers, "language/")
        language = decoder.Model(c.text, hook, name="language")
        embeddings = language.embed(input_ids)
        if images is not None:
            states = tuple(i % (c.image.num_layers + 1) for i in c.feature_layers)
            found = clip.ImageEncoder(c.image, self.attention, "image/", name="image")(images, states=states)
            features = jnp.concatenate([x if c.class_token else x[:, 1:] for x in found], axis=-1)
            hidden = Linear(c.text.hidden_size, use_bias=c.projector_bias, name="projector_in")(features)
            hidden = activation_function(c.activation)(hidden)
            features = Linear(c.text.hidden_size, use_bias=c.projector_bias, name="projector_out")(hidden)
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
    size, patches = config.image.image_size, config.image.grid[0] * config.image.grid[1] + int(config.class_token)
    text = jax.random.randint(key, (batch_size, 4), 3, config.vocab_size)
    places = jnp.full((batch_size, patches), config.image_token_id)
    ids = jnp.concatenate([text[:, :1], places, text[:, 1:]], axis=1)
    return {"input_ids": ids, "images": jax.random.normal(key, (batch_size, *size, config.image.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    vision = hparams.get("vision_config") or {
        "image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }  # fmt: skip
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"vision_config of type {vision['model_type']!r} is not supported: only clip_vision_model is")
    layers, strategy = hparams.get("vision_feature_layer", -2), hparams.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy {strategy!r} is neither default nor full")
    tied = hparams.get("tie_word_embeddings", False)
    return Config(
        text=text_config_from_official(hparams.get("text_config") or {}, family="llama", tied=tied),
        image=clip.image_config_from_official(vision),
        image_token_id=hparams.get("image_token_id", hparams.get("image_token_index", 32000)),
        feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        class_token=strategy == "full",
        activation=activation_from_hub(hparams.get("projector_hidden_act", "gelu")),
        projector_bias=hparams.get("multimodal_projector_bias", True),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {
        "text_config": text_config_to_official(c.text),
        "vision_config": clip.image_config_to_official(c.image),
        "image_token_index": c.image_token_id,
        "vision_feature_layer": c.feature_layers[0] if len(c.feature_layers) == 1 else list(c.feature_layers),
        "vision_feature_select_strategy": "full" if c.class_token else "default",
        "projector_hidden_act": activation_to_hub(c.activation),
        "multimodal_projector_bias": c.projector_bias,
        "tie_word_embeddings": c.text.tie_embeddings,
    }


def _table(c: Config, language: str, head: str, vision: str, projector: str) -> Table:
    yield from clip.image_table(c.image, vision, "image/")
    yield from linear(f"{projector}.linear_1", "projector_in", bias=c.projector_bias)
    yield from linear(f"{projector}.linear_2", "projector_out", bias=c.projector_bias)
    yield from decoder.official_table(c.text, language, head, "language/")


def official_table(c: Config) -> Table:
    return _table(c, "model.language_model", "lm_head", "model.vision_tower", "model.multi_modal_projector")


_SAVED = "language_model.model", "language_model.lm_head"


def saved_table(c: Config) -> Table:
    return _table(c, *_SAVED, "vision_tower.vision_model", "multi_modal_projector")


def other_saved_table(c: Config) -> Table:
    return _table(c, *_SAVED, "vision_tower", "multi_modal_projector")


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


def _named(hidden: int, inner: int, depth: int, heads: int) -> Config:
    text = {
        "vocab_size": 32064, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": depth,
        "num_attention_heads": heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 32001,
    }  # fmt: skip
    return config_from_official({"text_config": text})


BACKBONES = {
    "llava": Backbone(
        name="llava",
        model=Model,
        configs={
            "tiny": Config(),
            "llava-1.5-7b-hf": _named(4096, 11008, 32, 32),
            "llava-1.5-13b-hf": _named(5120, 13824, 40, 40),
        },
        example=example,
        cache=empty_cache,
        officials=(
            Official(
                module="models/llava/modeling_llava.py:LlavaForConditionalGeneration",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                saved=(saved_table, other_saved_table),
                call=official_call,
                ignored=(r"embeddings\.position_ids$", r"rotary_emb\.inv_freq$"),
            ),
        ),
        idle=(r"^image/norm/",),
        parameter_counts={"llava-1.5-7b-hf": 7_063_427_072},
    )
}
