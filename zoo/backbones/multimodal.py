"""Images as tokens of a language model: their features in the places of the text that were kept for them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.backbones import decoder
from zoo.errors import UserError

__all__ = ["place_features", "text_config_from_official", "text_config_to_official"]


def place_features(
    embeddings: Float[Array, "B L D"], places: Bool[Array, "B L"], features: Float[Array, "N T D"]
) -> Float[Array, "B L D"]:
    """The features, image after image, in the chosen places, row after row; there should be as many of both."""
    flat = features.reshape(-1, features.shape[-1]).astype(embeddings.dtype)
    order = jnp.cumsum(places.reshape(-1)) - 1
    chosen = jnp.take(flat, jnp.clip(order, 0, len(flat) - 1), axis=0).reshape(embeddings.shape)
    return jnp.where(places[..., None], chosen, embeddings)


def text_config_from_official(hparams: Mapping[str, Any], *, family: str, tied: bool) -> decoder.Config:
    """The language model of a text_config; `tied` is what the settings of the whole say of its output layer."""
    family = hparams.get("model_type", family)
    if family not in decoder.BACKBONES:
        raise UserError(f"text_config of type {family!r} is not supported: one of {', '.join(decoder.BACKBONES)} is")
    config = decoder.BACKBONES[family].bridge().config({k: v for k, v in hparams.items() if k != "model_type"})
    return replace(config, tie_embeddings=tied)


def text_config_to_official(config: decoder.Config) -> dict[str, Any]:
    return {"model_type": config.family, **decoder.config_to_official(config)}
