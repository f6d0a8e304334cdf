"""MMDiT, the transformer of Stable Diffusion 3: patches and text in two streams that attend to one another.

Official code: huggingface/diffusers@v0.42.1 (Apache-2.0), models/transformers, SD3Transformer2DModel. Paper:
arXiv:2403.03206; normed queries and keys and the image's second attention are of Stable Diffusion 3.5.
Differs from the official code: latents are (B, height, width, channels); no layers are skipped and no adapters added.
The table of positions is part of the weights but not learned: it lies in the collection `constants`.
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
    zero_linear,
)
from zoo.backbones.diffusers import supported_arguments
from zoo.backbones.encoder import LayerConfig, embed_patches, pair
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention, show
from zoo.blocks import Linear, stack
from zoo.paper import Official
from zoo.weights.table import Table, conv, linear, parameter, squeezed

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    in_channels: int = 4
    out_channels: int = 4
    num_layers: int = 2
    num_heads: int = 2
    head_dim: int = 12
    context_width: int = 10  # of the text's tokens
    pooled_width: int = 8  # of the text as a whole
    sample_size: int = 8  # height and width of the latents whose patches are one position apart
    patch_size: int = 2
    max_positions: int = 6  # patches on a side of the table of positions; images take its middle
    query_key_norm: bool = True
    dual_layers: tuple[int, ...] = (0,)  # in which the image also attends to itself alone

    @property
    def layer(self) -> LayerConfig:
        width = self.num_heads * self.head_dim
        norm = "head" if self.query_key_norm else None
        return LayerConfig(
            width, self.num_heads, hidden=4 * width, activation="gelu_tanh", norm="rms", query_key_norm=norm
        )


class Output(NamedTuple):
    sample: Float[Array, "B H W O"]  # the velocity, noise - data


class Model(nn.Module):
    """Noisy latents, their noise in thousandths and two codes of a text to the velocity."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B H W C"],
        timestep: Real[Array, " B"],
        context: Float[Array, "B T E"],
        pooled: Float[Array, "B P"],
    ) -> Output:
        c, width = self.config, self.config.layer.width
        x = embed_patches(latents, width, pair(c.patch_size))
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], -1, width) + self.positions(grid).astype(x.dtype)
        condition = TimeEmbedding(width, name="time")(timestep, x.dtype) + Embedding(width, name="pooled")(pooled)
        streams = (x, Linear(width, name="context_embedding")(context))
        for first, number in causal.runs(c.num_layers, self.kind, self.attention):
            index = first + sum(i < first for i in c.dual_layers)
            dual, last = self.kind(first)
            make = partial(
                JointLayer, c.layer, self.attention, Layer(index, f"layers_{first}/attention"), dual=dual, last=last
            )
            streams = stack(self, make, number, streams, first=first, condition=condition)
        x = streams[0]
        show(self, "hidden_states", "last", x)
        scale, shift = modulation(condition, width, 2, "modulation")
        x = zero_linear(c.patch_size**2 * c.out_channels, name="head")(modulated(x, shift, scale))
        size = (grid[0] * c.patch_size, grid[1] * c.patch_size)
        return Output(layers.unpatchify(x, size, c.patch_size))

    def kind(self, index: int) -> tuple[bool, bool]:
        """(dual, last)."""
        return index in self.config.dual_layers, index == self.config.num_layers - 1

    def positions(self, grid: tuple[int, int]) -> Float[Array, "L D"]:
        """The middle of the table; called inside the compact method."""
        c, width, most = self.config, self.config.layer.width, self.config.max_positions

        def table() -> Float[Array, "N D"]:
            places = layers.grid_coordinates((most, most), scale=c.sample_size / c.patch_size / most)
            return layers.axial_sinusoidal_encoding(places[:, ::-1], dim=width, interleaved=False)

        value = jnp.asarray(self.variable("constants", "positions", table).value).reshape(most, most, width)
        if max(grid) > most:
            raise ValueError(f"latents of {grid} patches are larger than max_positions {most}")
        top, left = ((most - n) // 2 for n in grid)
        return value[top : top + grid[0], left : left + grid[1]].reshape(-1, width)


def example(config: Config, *, batch_size: int, key: jax.Array, image_size: int | None = None) -> dict[str, jax.Array]:
    """Latents have an eighth of the picture's pixels along each side."""
    keys = jax.random.split(key, 4)
    size = min(config.sample_size, config.max_positions * config.patch_size) if image_size is None else image_size // 8
    size = (size, size)
    return {
        "latents": jax.random.normal(keys[0], (batch_size, *size, config.in_channels)),
        "timestep": jax.random.randint(keys[1], (batch_size,), 0, 1000),
        "context": jax.random.normal(keys[2], (batch_size, 5, config.context_width)),
        "pooled": jax.random.normal(keys[3], (batch_size, config.pooled_width)),
    }


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "sample_size": ("sample_size", 128), "patch_size": ("patch_size", 2), "in_channels": ("in_channels", 16),
    "out_channels": ("out_channels", 16), "num_layers": ("num_layers", 18), "attention_head_dim": ("head_dim", 64),
    "num_attention_heads": ("num_heads", 18), "joint_attention_dim": ("context_width", 4096),
    "pooled_projection_dim": ("pooled_width", 2048), "pos_embed_max_size": ("max_positions", 96),
    "dual_attention_layers": ("dual_layers", ()),
}  # fmt: skip


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    width = hparams.get("num_attention_heads", 18) * hparams.get("attention_head_dim", 64)
    h = supported_arguments(
        hparams,
        "SD3Transformer2DModel",
        {theirs: default for theirs, (_, default) in _SAME.items()} | {"qk_norm": None},
        # What the text is mapped to meets the image in one attention.
        fixed={"caption_projection_dim": (width,), "qk_norm": (None, "rms_norm")},
    )
    h["out_channels"] = h["out_channels"] or h["in_channels"]
    return Config(query_key_norm=h["qk_norm"] is not None, **{ours: h[theirs] for theirs, (ours, _) in _SAME.items()})


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()} | {
        "caption_projection_dim": c.layer.width,
        "qk_norm": "rms_norm" if c.query_key_norm else None,
    }


def official_table(c: Config) -> Table:
    yield from parameter("pos_embed.pos_embed", "positions", squeezed(1), collection="constants")
    yield from conv("pos_embed.proj", "patch_embedding")
    yield from embedding_table("time_text_embed.timestep_embedder", "time")
    yield from embedding_table("time_text_embed.text_embedder", "pooled")
    yield from linear("context_embedder", "context_embedding")
    for i in range(c.num_layers):
        kind = {"dual": i in c.dual_layers, "last": i == c.num_layers - 1}
        yield from joint_layer_table(f"transformer_blocks.{i}", f"layers_{i}", c.layer, **kind)
    yield from linear("norm_out.linear", "modulation")
    yield from linear("proj_out", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    latents = inputs["hidden_states"].transpose(0, 2, 3, 1)
    given = (inputs[name] for name in ("timestep", "encoder_hidden_states", "pooled_projections"))
    return {"sample": model.apply(variables, latents, *given).sample.transpose(0, 3, 1, 2)}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(count: int, **changes: Any) -> Config:
    sizes = {"num_layers": count, "num_attention_heads": count, "caption_projection_dim": 64 * count}
    return config_from_official(sizes | changes)


BACKBONES = {
    "mmdit": Backbone(
        name="mmdit",
        model=Model,
        configs={
            "tiny": Config(),
            "stable-diffusion-3-medium": _named(24, pos_embed_max_size=192),
            "stable-diffusion-3.5-medium": _named(
                24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
            ),
            "stable-diffusion-3.5-large": _named(38, pos_embed_max_size=192, qk_norm="rms_norm"),
        },
        example=example,
        officials=(
            Official(
                module="models/transformers/transformer_sd3.py:SD3Transformer2DModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
        # Nothing reads the text after the last layer, and so nothing there asks for it.
        idle=(r"^layers_1/attention/context_query",),
        parameter_counts={"stable-diffusion-3-medium": 2_028_328_000, "stable-diffusion-3.5-medium": 2_243_171_520},
    )
}
