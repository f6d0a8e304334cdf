"""DiT: a transformer over patches of noisy latents, conditioned on time and class through its norms.

Official code: huggingface/diffusers@v0.42.1 (Apache-2.0), models/transformers, DiTTransformer2DModel, whose weights are
those of facebookresearch/DiT. Paper: arXiv:2212.09748.
Differs from the official code: latents are (B, height, width, channels); labels are never dropped at random (label
`num_classes` means no class, for classifier-free guidance). As there, every layer embeds time and class by itself; the
first layer's embedding also conditions the output, so it stands beside the layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

import layers
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.adaptive import (
    NAMES,
    TimeEmbedding,
    embedding_table,
    mlp_table,
    modulated,
    modulation,
    zero_linear,
)
from zoo.backbones.diffusers import supported_arguments
from zoo.backbones.encoder import MLP, Attention, LayerConfig, embed_patches, pair, projections
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention, show
from zoo.blocks import stack
from zoo.paper import Official
from zoo.weights.table import Row, Table, conv, linear, parameter

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    in_channels: int = 4
    out_channels: int = 8  # twice the latents' where variances are predicted too
    num_layers: int = 2
    num_heads: int = 2
    head_dim: int = 12
    sample_size: int = 8  # height and width of the latents whose positions are 0, 1, 2, ...; others are scaled to them
    patch_size: int = 2
    num_classes: int = 10  # one more row of the table stands for no class
    attention_bias: bool = True
    norm_epsilon: float = 1e-5  # of the norms before the MLPs; all others have 1e-6

    @property
    def layer(self) -> LayerConfig:
        width = self.num_heads * self.head_dim
        return LayerConfig(
            width, self.num_heads, hidden=4 * width, activation="gelu_tanh", query_bias=self.attention_bias
        )


class Output(NamedTuple):
    sample: Float[Array, "B H W O"]  # the noise, and what chooses its variance where there are twice the channels


class Condition(nn.Module):
    """The time's embedding plus the label's."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, timestep: Real[Array, " B"], labels: Int[Array, " B"], dtype: Any) -> Float[Array, "B D"]:
        table = self.param("labels", nn.initializers.normal(0.02), (self.num_classes + 1, self.width))
        # The lowest frequency is 1 / 10000 exactly.
        return TimeEmbedding(self.width, shift=1.0, name="time")(timestep, dtype) + jnp.asarray(table, dtype)[labels]


class DiTLayer(nn.Module):
    """x + gate attention(modulated x), then x + gate MLP(modulated x)."""

    config: Config
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        timestep: Real[Array, " B"],
        labels: Int[Array, " B"],
        condition: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B L D"]:
        c, layer = self.config, self.config.layer
        show(self, "hidden_states", "input", x)
        if condition is None:
            condition = Condition(layer.width, c.num_classes, name="condition")(timestep, labels, x.dtype)
        shift, scale, gate, *of_mlp = modulation(condition, layer.width, 6, "modulation")
        attention = Attention(layer, self.hook, self.layer, name="attention")
        x = x + gate * attention(modulated(x, shift, scale), None)
        shift, scale, gate = of_mlp
        return x + gate * MLP(layer, name="mlp")(modulated(x, shift, scale, c.norm_epsilon))


class Model(nn.Module):
    """Noisy latents, the training steps they are at, and class labels to what is predicted of them."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B H W C"], timestep: Real[Array, " B"], labels: Int[Array, " B"]
    ) -> Output:
        c, width = self.config, self.config.layer.width
        x = embed_patches(latents, width, pair(c.patch_size))
        grid = x.shape[1:3]
        base = c.sample_size // c.patch_size
        places = layers.grid_coordinates(grid, scale=(base / grid[0], base / grid[1]))
        # The horizontal coordinate comes first.
        positions = layers.axial_sinusoidal_encoding(places[:, ::-1], dim=width, interleaved=False)
        x = x.reshape(x.shape[0], -1, width) + positions.astype(x.dtype)
        condition = Condition(width, c.num_classes, name="condition")(timestep, labels, x.dtype)
        for first, number in causal.runs(c.num_layers, lambda i: i == 0, self.attention):
            make = partial(DiTLayer, c, self.attention, Layer(first, f"layers_{first}/attention"))
            given = condition if first == 0 else None
            x = stack(self, make, number, x, first=first, timestep=timestep, labels=labels, condition=given)
        show(self, "hidden_states", "last", x)
        shift, scale = modulation(condition, width, 2, "modulation")
        x = zero_linear(c.patch_size**2 * c.out_channels, name="head")(modulated(x, shift, scale))
        size = (grid[0] * c.patch_size, grid[1] * c.patch_size)
        return Output(layers.unpatchify(x, size, c.patch_size))


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    size = (config.sample_size, config.sample_size)
    return {
        "latents": jax.random.normal(keys[0], (batch_size, *size, config.in_channels)),
        "timestep": jax.random.randint(keys[1], (batch_size,), 0, 1000),
        "labels": jax.random.randint(keys[2], (batch_size,), 0, config.num_classes + 1),
    }


# --- the official code ---------------------------------------------------------------------------------------------

_SAME = {  # theirs -> ours, their default
    "num_attention_heads": ("num_heads", 16), "attention_head_dim": ("head_dim", 72),
    "in_channels": ("in_channels", 4), "out_channels": ("out_channels", None), "num_layers": ("num_layers", 28),
    "attention_bias": ("attention_bias", True), "sample_size": ("sample_size", 32), "patch_size": ("patch_size", 2),
    "num_embeds_ada_norm": ("num_classes", 1000), "norm_eps": ("norm_epsilon", 1e-5),
}  # fmt: skip


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    h = supported_arguments(
        hparams,
        "DiTTransformer2DModel",
        {theirs: default for theirs, (_, default) in _SAME.items()},
        fixed={"activation_fn": ("gelu-approximate",), "norm_type": ("ada_norm_zero",),
               "norm_elementwise_affine": (False,), "cross_attention_dim": (None,), "num_vector_embeds": (None,),
               "only_cross_attention": (False,)},
        ignored=("dropout", "norm_num_groups", "upcast_attention", "use_linear_projection"),
    )  # fmt: skip
    h["out_channels"] = h["out_channels"] or h["in_channels"]
    return Config(**{ours: h[theirs] for theirs, (ours, _) in _SAME.items()})


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _SAME.items()} | {"norm_type": "ada_norm_zero"}


def official_table(c: Config) -> Table:
    yield from conv("pos_embed.proj", "patch_embedding")
    for i in range(c.num_layers):
        theirs, ours = f"transformer_blocks.{i}", f"layers_{i}"
        yield from _condition_table(f"{theirs}.norm1.emb", f"{ours}/condition" if i else "condition")
        yield from linear(f"{theirs}.norm1.linear", f"{ours}/modulation")
        yield from projections(f"{theirs}.attn1", f"{ours}/attention", NAMES, bias=c.attention_bias)
        yield from mlp_table(f"{theirs}.ff", f"{ours}/mlp")
    yield from linear("proj_out_1", "modulation")
    yield from linear("proj_out_2", "head")


def _condition_table(theirs: str, ours: str) -> Iterator[Row]:
    yield from embedding_table(f"{theirs}.timestep_embedder", f"{ours}/time")
    yield from parameter(f"{theirs}.class_embedder.embedding_table.weight", f"{ours}/labels")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    latents = inputs["hidden_states"].transpose(0, 2, 3, 1)
    output = model.apply(variables, latents, inputs["timestep"], inputs["class_labels"])
    return {"sample": output.sample.transpose(0, 3, 1, 2)}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}  # layers, heads, their width


def _named(size: str, patch: int, pixels: int) -> Config:
    count, heads, head_dim = _SIZES[size]
    return config_from_official(
        {"num_layers": count, "num_attention_heads": heads, "attention_head_dim": head_dim, "patch_size": patch,
         "sample_size": pixels // 8, "out_channels": 8}
    )  # fmt: skip


BACKBONES = {
    "dit": Backbone(
        name="dit",
        model=Model,
        configs={"tiny": Config()}
        | {f"DiT-{size}-{patch}-256": _named(size, patch, 256) for size in _SIZES for patch in (2, 4, 8)}
        | {"DiT-XL-2-512": _named("XL", 2, 512)},
        example=example,
        officials=(
            Official(
                module="models/transformers/dit_transformer_2d.py:DiTTransformer2DModel",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                # Positions, which follow from the sizes.
                ignored=(r"^pos_embed\.pos_embed$",),
            ),
        ),
        # The paper's 675,129,632, which count the table of positions, and 27 more embeddings of time and class.
        parameter_counts={"DiT-XL-2-256": 749_826_464},
    )
}
