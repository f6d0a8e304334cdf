"""Flux: text and image in two streams, then in one sequence, with rotary positions of three axes.

Official code: huggingface/diffusers@v0.42.1 (Apache-2.0), models/transformers, FluxTransformer2DModel, whose weights
are Black Forest Labs' (2024). The joint layers are those of MMDiT (arXiv:2403.03206), the single ones compute attention
and MLP side by side (arXiv:2302.05442); image positions are (0, row, column), those of text zero.
Differs from the official code: no adapters, no residuals of a ControlNet, no clipping in float16. Latents are packed
2x2 pixels to a token by `pack_latents`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

import layers
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.adaptive import (
    Embedding,
    JointLayer,
    TimeEmbedding,
    embedding_table,
    joint_layer_table,
    modulated,
    modulation,
    normed_heads,
    queries_table,
    zero_linear,
)
from zoo.backbones.diffusers import supported_arguments
from zoo.backbones.encoder import LayerConfig
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.blocks import Linear, stack
from zoo.blocks.basic import activation_function
from zoo.paper import Official
from zoo.weights.table import Table, linear

__all__ = ["BACKBONES", "Config", "Model", "Output", "image_positions", "pack_latents", "unpack_latents"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    in_channels: int = 8  # of a token: four pixels of latents
    out_channels: int = 8
    patch_size: int = 1  # tokens come as patches already
    num_layers: int = 1  # with two streams
    num_single_layers: int = 1  # with one, after them
    num_heads: int = 2
    head_dim: int = 16
    context_width: int = 12  # of the text's tokens
    pooled_width: int = 10  # of the text as a whole
    guidance: bool = True  # the scale of guidance is an input, not two passes
    rope_dims: tuple[int, ...] = (4, 6, 6)  # channels of a head for each axis of positions

    def __post_init__(self):
        if sum(self.rope_dims) != self.head_dim:
            raise ValueError(f"rope_dims {self.rope_dims} do not add up to head_dim {self.head_dim}")

    @property
    def layer(self) -> LayerConfig:
        width = self.num_heads * self.head_dim
        return LayerConfig(
            width, self.num_heads, hidden=4 * width, activation="gelu_tanh", norm="rms", query_key_norm="head"
        )


class Output(NamedTuple):
    sample: Float[Array, "B L O"]  # the velocity, noise - data


def pack_latents(latents: Float[Array, "B H W C"]) -> Float[Array, "B L 4*C"]:
    """2x2 pixels to a token, the channel slowest."""
    return layers.pixel_unshuffle(latents, 2).reshape(latents.shape[0], -1, 4 * latents.shape[-1])


def unpack_latents(tokens: Float[Array, "B L D"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """The inverse of `pack_latents` for latents of this height and width."""
    grid = tokens.reshape(tokens.shape[0], size[0] // 2, size[1] // 2, -1)
    return layers.pixel_shuffle(grid, 2)


def image_positions(grid: tuple[int, int]) -> Float[Array, "L 3"]:
    """(0, row, column) of the tokens of an image."""
    return jnp.pad(layers.grid_coordinates(grid), ((0, 0), (1, 0)))


class SingleLayer(nn.Module):
    """x + gate W [attention, MLP's inside], both of the same modulated x."""

    config: LayerConfig
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], *, condition: Float[Array, "B D"], angles: Float[Array, "S F"]
    ) -> Float[Array, "B S D"]:
        c = self.config
        show(self, "hidden_states", "input", x)
        shift, scale, gate = modulation(condition, c.width, 3, "modulation")
        y = modulated(x, shift, scale)
        query, key, value = normed_heads(y, c)
        query, key = (layers.apply_rope(z, angles, interleaved=True) for z in (query, key))
        mixed = attend(self, self.hook, self.layer, query, key, value).reshape(x.shape)
        hidden = activation_function(c.activation)(Linear(c.hidden, name="fc1")(y))
        return x + gate * Linear(c.width, name="out")(jnp.concatenate([mixed, hidden], axis=-1))


class Model(nn.Module):
    """Packed noisy latents, their share of noise, and two codes of a text to the velocity."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B L C"],
        timestep: Float[Array, " B"],
        context: Float[Array, "B T E"],
        pooled: Float[Array, "B P"],
        positions: Real[Array, "L A"],
        context_positions: Real[Array, "T A"] | None = None,
        guidance: Float[Array, " B"] | None = None,
    ) -> Output:
        """`timestep` is the noise's share, 0 to 1; `context_positions` are zero where they are not given."""
        c, width = self.config, self.config.layer.width
        if (guidance is not None) != c.guidance:
            raise ValueError(f"guidance {guidance} where the configuration has guidance={c.guidance}")
        x = Linear(width, name="latents_embedding")(latents)
        condition = TimeEmbedding(width, name="time")(1000 * timestep, x.dtype)
        if guidance is not None:
            condition = condition + TimeEmbedding(width, name="guidance")(1000 * guidance, x.dtype)
        condition = condition + Embedding(width, name="pooled")(pooled)
        context = Linear(width, name="context_embedding")(context)
        if context_positions is None:
            context_positions = jnp.zeros((context.shape[1], positions.shape[1]), positions.dtype)
        places = jnp.concatenate([context_positions, positions])
        angles = layers.axial_rope_angles(places, tuple(layers.rope_frequencies(dim) for dim in c.rope_dims))
        given = {"condition": condition, "angles": angles}
        streams = (x, context)
        for first, number in causal.runs(c.num_layers, lambda i: None, self.attention):
            layer = Layer(first, f"layers_{first}/attention")
            make = partial(JointLayer, c.layer, self.attention, layer, context_first=True)
            streams = stack(self, make, number, streams, first=first, **given)
        x = jnp.concatenate(streams[::-1], axis=1)
        for first, number in causal.runs(c.num_single_layers, lambda i: None, self.attention):
            layer = Layer(c.num_layers + first, f"single_layers_{first}")
            make = partial(SingleLayer, c.layer, self.attention, layer)
            x = stack(self, make, number, x, name="single_layers", first=first, **given)
        show(self, "hidden_states", "last", x)
        scale, shift = modulation(condition, width, 2, "modulation")
        head = zero_linear(c.patch_size**2 * c.out_channels, name="head")
        return Output(head(modulated(x[:, context.shape[1] :], shift, scale)))


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    given = {
        "latents": jax.random.normal(keys[0], (batch_size, 8, config.in_channels)),
        "timestep": jnp.linspace(0.25, 0.75, batch_size),
        "context": jax.random.normal(keys[1], (batch_size, 5, config.context_width)),
        "pooled": jax.random.normal(keys[2], (batch_size, config.pooled_width)),
        "positions": image_positions((2, 4)),
    }
    return given | {"guidance": jnp.full(batch_size, 3.5)} if config.guidance else given


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "patch_size": ("patch_size", 1), "in_channels": ("in_channels", 64), "out_channels": ("out_channels", None),
    "num_layers": ("num_layers", 19), "num_single_layers": ("num_single_layers", 38),
    "attention_head_dim": ("head_dim", 128), "num_attention_heads": ("num_heads", 24),
    "joint_attention_dim": ("context_width", 4096), "pooled_projection_dim": ("pooled_width", 768),
    "guidance_embeds": ("guidance", False), "axes_dims_rope": ("rope_dims", (16, 56, 56)),
}  # fmt: skip


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    defaults = {theirs: default for theirs, (_, default) in _SAME.items()}
    h = supported_arguments(hparams, "FluxTransformer2DModel", defaults, fixed={})
    h["out_channels"] = h["out_channels"] or h["in_channels"]
    return Config(**{ours: h[theirs] for theirs, (ours, _) in _SAME.items()})


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()}


def official_table(c: Config) -> Table:
    yield from linear("x_embedder", "latents_embedding")
    yield from linear("context_embedder", "context_embedding")
    embedders = {"timestep_embedder": "time", "text_embedder": "pooled"}
    for theirs, ours in (embedders | ({"guidance_embedder": "guidance"} if c.guidance else {})).items():
        yield from embedding_table(f"time_text_embed.{theirs}", ours)
    for i in range(c.num_layers):
        yield from joint_layer_table(f"transformer_blocks.{i}", f"layers_{i}", c.layer)
    for i in range(c.num_single_layers):
        theirs, ours = f"single_transformer_blocks.{i}", f"single_layers_{i}"
        yield from linear(f"{theirs}.norm.linear", f"{ours}/modulation")
        yield from queries_table(f"{theirs}.attn", ours, c.layer)
        yield from linear(f"{theirs}.proj_mlp", f"{ours}/fc1")
        yield from linear(f"{theirs}.proj_out", f"{ours}/out")
    yield from linear("norm_out.linear", "modulation")
    yield from linear("proj_out", "head")


_INPUTS = {"hidden_states": "latents", "timestep": "timestep", "encoder_hidden_states": "context",
           "pooled_projections": "pooled", "img_ids": "positions", "txt_ids": "context_positions",
           "guidance": "guidance"}  # fmt: skip


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"sample": model.apply(variables, **{_INPUTS[name]: value for name, value in inputs.items()}).sample}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

BACKBONES = {
    "flux": Backbone(
        name="flux",
        model=Model,
        configs={
            "tiny": Config(),
            "FLUX.1-dev": config_from_official({"guidance_embeds": True}),
            "FLUX.1-schnell": config_from_official({}),
            "FLUX.1-Fill-dev": config_from_official({"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
        },
        example=example,
        officials=(
            Official(
                module="models/transformers/transformer_flux.py:FluxTransformer2DModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        parameter_counts={"FLUX.1-dev": 11_901_408_320},
    )
}
