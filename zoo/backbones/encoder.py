"""What image encoders share: patches as tokens, tables of positions, pre-norm layers (ViT arXiv:2010.11929).

Images are (B, height, width, channels). The layers serve ViT, DeiT, DINOv2, SigLIP, CLIP (its text too) and InternVL.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import layers
from layers import Mask
from zoo.backbones import causal
from zoo.backbones.hooks import AttentionHook, Layer, attend, show
from zoo.blocks import Linear, RMSNorm, stack
from zoo.blocks.basic import activation_function
from zoo.weights.table import Row, layer_norm, linear

__all__ = [
    "MLP",
    "Attention",
    "EncoderLayer",
    "LayerConfig",
    "embed_patches",
    "embed_tokens",
    "encode",
    "fitting_positions",
    "layers_table",
    "make_norm",
    "norm_table",
    "pair",
    "pair_outputs",
    "projections",
    "unit_length",
]


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and constants of an encoder's layers."""

    width: int = 24  # of a token
    num_heads: int = 3
    hidden: int = 48  # width inside the MLP
    activation: str = "gelu"  # of the MLP, or of its gate
    gated: bool = False  # the MLP is W_out (activation(W_gate x) * W_in x)
    norm: str = "layer"  # layer | rms
    norm_epsilon: float = 1e-6  # added to the variance (layer) or the mean square (rms) under the root
    query_bias: bool = True  # biases of the projections to query, key and value
    output_bias: bool = True  # of the projection out of attention
    mlp_bias: bool = True
    query_key_norm: str | None = None  # head: queries and keys are normalised head by head; width: all heads together
    query_key_epsilon: float = 1e-6
    attention_norm: bool = False  # what attention gives is normalised before its projection
    hidden_norm: bool = False  # what is inside the MLP is normalised
    layer_scale: float | None = None  # what the learned factors on the blocks' outputs start from; None: no factors

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"norm {self.norm!r} is neither layer nor rms")
        if self.query_key_norm not in (None, "head", "width"):
            raise ValueError(f"query_key_norm {self.query_key_norm!r} is not None, head or width")


def pair(size: Any) -> tuple[int, int]:
    """(height, width) from one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def make_norm(kind: str, epsilon: float, name: str) -> nn.Module:
    if kind == "rms":
        return RMSNorm(epsilon, name=name)
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


class MLP(nn.Module):
    config: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        c = self.config
        activation = activation_function(c.activation)
        hidden = Linear(c.hidden, use_bias=c.mlp_bias, name="fc1")(x)
        if c.gated:
            hidden = activation(Linear(c.hidden, use_bias=c.mlp_bias, name="gate")(x)) * hidden
        else:
            hidden = activation(hidden)
        if c.hidden_norm:
            hidden = make_norm(c.norm, c.norm_epsilon, "norm")(hidden)
        return Linear(c.width, use_bias=c.mlp_bias, name="fc2")(hidden)


class Attention(nn.Module):
    config: LayerConfig
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], mask: Mask | None, angles: Float[Array, "*B L F"] | None = None
    ) -> Float[Array, "B L D"]:
        c = self.config
        heads = (*x.shape[:-1], c.num_heads, c.width // c.num_heads)
        query, key, value = (Linear(c.width, use_bias=c.query_bias, name=n)(x) for n in ("query", "key", "value"))
        if c.query_key_norm == "width":
            query = RMSNorm(c.query_key_epsilon, name="query_norm")(query)
            key = RMSNorm(c.query_key_epsilon, name="key_norm")(key)
        query, key, value = (y.reshape(heads) for y in (query, key, value))
        if c.query_key_norm == "head":
            query = make_norm(c.norm, c.query_key_epsilon, "query_norm")(query)
            key = make_norm(c.norm, c.query_key_epsilon, "key_norm")(key)
        if angles is not None:
            query, key = (layers.apply_rope(y, angles) for y in (query, key))
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=mask).reshape(x.shape)
        if c.attention_norm:
            mixed = make_norm(c.norm, c.norm_epsilon, "norm")(mixed)
        return Linear(c.width, use_bias=c.output_bias, name="out")(mixed)


class EncoderLayer(nn.Module):
    """x + s_1 attention(norm(x)), then x + s_2 MLP(norm(x)), with the factors s where there is a layer scale.

    `angles` rotate queries and keys.
    """

    config: LayerConfig
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], *, mask: Mask | None, angles: Float[Array, "*B L F"] | None = None
    ) -> Float[Array, "B L D"]:
        c = self.config
        show(self, "hidden_states", "input", x)

        def scaled(name: str, y: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
            if c.layer_scale is None:
                return y
            return y * self.param(name, nn.initializers.constant(c.layer_scale), (c.width,)).astype(y.dtype)

        attention = Attention(c, self.hook, self.layer, name="attention")
        norms = [make_norm(c.norm, c.norm_epsilon, f"{block}_norm") for block in ("attention", "mlp")]
        x = x + scaled("attention_scale", attention(norms[0](x), mask, angles))
        return x + scaled("mlp_scale", MLP(c, name="mlp")(norms[1](x)))


def encode(
    parent: nn.Module,
    config: LayerConfig,
    count: int,
    hook: AttentionHook,
    x: Float[Array, "B L D"],
    *,
    mask: Mask | None = None,
    path: str = "",
    index: int = 0,
    start: int = 0,
) -> Float[Array, "B L D"]:
    """x after `count` layers from layer `start` on, inside `parent`'s compact method.

    `path` is parent's own, ending in a slash, and `index` the number of attentions before its first in the network.
    """
    for first, number in causal.runs(count, lambda i: None, hook):
        first += start
        make = partial(EncoderLayer, config, hook, Layer(index + first, f"{path}layers_{first}/attention"))
        x = stack(parent, make, number, x, first=first, mask=mask)
    show(parent, "hidden_states", "last", x)
    return x


def embed_patches(
    images: Float[Array, "B H W C"], width: int, patch: tuple[int, int], *, use_bias: bool = True
) -> Float[Array, "B h w D"]:
    """A linear map of every whole patch, called inside a compact method; what is left at the end of an axis is cut."""
    convolution = nn.Conv(width, patch, strides=patch, padding="VALID", use_bias=use_bias, name="patch_embedding")
    return convolution(images)


def embed_tokens(
    input_ids: Int[Array, "B L"], positions: Int[Array, "B L"] | None, width: int, vocab_size: int, max_positions: int
) -> Float[Array, "B L D"]:
    """Tables of words and of positions (0, 1, ... if None), called inside a compact method."""
    if input_ids.shape[1] > max_positions:
        raise ValueError(f"texts of {input_ids.shape[1]} tokens are longer than max_positions {max_positions}")
    start = nn.initializers.normal(0.02)
    positions = jnp.arange(input_ids.shape[1])[None] if positions is None else positions
    x = nn.Embed(vocab_size, width, embedding_init=start, name="embedding")(input_ids)
    return x + nn.Embed(max_positions, width, embedding_init=start, name="positions")(positions)


def fitting_positions(
    table: Float[Array, "N D"],
    trained: tuple[int, int],
    wanted: tuple[int, int],
    *,
    prefix: int,
    resample: bool,
    antialias: bool = False,
) -> Float[Array, "M D"]:
    """The table of positions for a grid of `wanted` patches: `prefix` rows for other tokens, then the grid.

    Another grid than the trained one is an error, unless `resample` asks for cubic interpolation.
    """
    if trained == wanted:
        return table
    if not resample:
        raise ValueError(
            f"images of {wanted} patches do not fit positions for {trained}: give images of the configured size, or set"
            " resample_positions"
        )
    grid = table[prefix:].reshape(1, *trained, -1)
    grid = layers.resize(grid, wanted, method="cubic", antialias=antialias)
    return jnp.concatenate([table[:prefix], grid.reshape(-1, table.shape[-1])])


def unit_length(x: Float[Array, "B P"]) -> Float[Array, "B P"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# --- rows of official tables ---------------------------------------------------------------------------------------


def norm_table(official: str, ours: str, kind: str) -> Iterator[Row]:
    yield from layer_norm(official, ours, bias=kind == "layer")


def projections(official: str, ours: str, names: tuple[str, str, str, str], *, bias: bool, output_bias: bool = True):
    """Query, key, value and output projections that are apart, under these official names."""
    for theirs, own in zip(names, ("query", "key", "value", "out"), strict=True):
        yield from linear(f"{official}.{theirs}", f"{ours}/{own}", bias=output_bias if own == "out" else bias)


def layers_table(theirs: str, ours: str, count: int) -> Iterator[Row]:
    """Pre-norm layers under the names that CLIP and SigLIP share; `ours` ends in a slash, or is empty."""
    for i in range(count):
        layer, own = f"{theirs}.{i}", f"{ours}layers_{i}"
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        yield from projections(f"{layer}.self_attn", f"{own}/attention", names, bias=True)
        yield from layer_norm(f"{layer}.layer_norm1", f"{own}/attention_norm")
        yield from layer_norm(f"{layer}.layer_norm2", f"{own}/mlp_norm")
        for name in ("fc1", "fc2"):
            yield from linear(f"{layer}.mlp.{name}", f"{own}/mlp/{name}")


def pair_outputs(output: Any) -> dict[str, Array]:
    """What an image and a text encoder give together, under the official names."""
    return {
        "text_embeds": output.text_embeds,
        "image_embeds": output.image_embeds,
        "logits_per_image": output.logits_per_image,
        "logits_per_text": output.logits_per_image.T,
        "text_last_hidden_state": output.text.last_hidden_state,
        "vision_last_hidden_state": output.image.last_hidden_state,
        "text_pooler_output": output.text.pooled,
        "vision_pooler_output": output.image.pooled,
    }
