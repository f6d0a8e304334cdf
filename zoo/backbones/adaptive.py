"""What diffusion transformers share: embedded times, norms that a condition shifts and scales, two joined streams.

Norms have no parameters of their own: y = norm(x) (1 + scale) + shift, with shift and scale linear in silu(condition),
and what a block adds is multiplied by a gate of the same kind (DiT arXiv:2212.09748). In joint layers, image and text
have weights of their own and attend to one sequence of both (MMDiT arXiv:2403.03206). Sizes: `LayerConfig`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

import layers
from zoo.backbones.encoder import MLP, Attention, LayerConfig, make_norm
from zoo.backbones.hooks import AttentionHook, Layer, attend, show
from zoo.blocks import Linear
from zoo.weights.table import Row, linear, parameter

__all__ = [
    "NAMES",
    "Embedding",
    "JointLayer",
    "TimeEmbedding",
    "embedding_table",
    "joint_layer_table",
    "mlp_table",
    "modulated",
    "modulation",
    "normed_heads",
    "queries_table",
    "zero_linear",
]

NAMES = ("to_q", "to_k", "to_v", "to_out.0")
CONTEXT_NAMES = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
NORMS = {"norm_q": "query_norm", "norm_k": "key_norm"}
CONTEXT_NORMS = {"norm_added_q": "context_query_norm", "norm_added_k": "context_key_norm"}

zero_linear = partial(Linear, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.zeros)
"""Layers start as the identity, and the model at zero."""


class Embedding(nn.Module):
    """W silu(W x + b) + b."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B D"]:
        return Linear(self.features, name="fc2")(jax.nn.silu(Linear(self.features, name="fc1")(x)))


class TimeEmbedding(nn.Module):
    """Such a map of cosines and sines of times, which are counted in training steps."""

    features: int
    dim: int = 256  # number of cosines and sines
    cosine_first: bool = True
    shift: float = 0.0  # see `layers.sinusoidal_encoding`

    @nn.compact
    def __call__(self, time: Real[Array, " B"], dtype: Any) -> Float[Array, "B D"]:
        code = layers.sinusoidal_encoding(
            time, dim=self.dim, interleaved=False, cosine_first=self.cosine_first, shift=self.shift,
            float32_exponents=True,
        )  # fmt: skip
        fc1, fc2 = Linear(self.features, name="fc1"), Linear(self.features, name="fc2")
        return fc2(jax.nn.silu(fc1(code.astype(dtype))))


def modulation(condition: Float[Array, "B C"], width: int, count: int, name: str) -> list[Float[Array, "B 1 D"]]:
    """`count` shifts, scales and gates, called inside a compact method."""
    return jnp.split(zero_linear(count * width, name=name)(jax.nn.silu(condition))[:, None], count, axis=-1)


def modulated(
    x: Float[Array, "B L D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"], epsilon: float = 1e-6
) -> Float[Array, "B L D"]:
    """norm(x) (1 + scale) + shift, called inside a compact method."""
    norm = nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False, use_fast_variance=False)
    return norm(x) * (1 + scale) + shift


def normed_heads(
    x: Float[Array, "B L D"], c: LayerConfig, prefix: str = ""
) -> tuple[Float[Array, "B L H d"], Float[Array, "B L H d"], Float[Array, "B L H d"]]:
    """Queries, keys and values of all heads, the first two normed where the configuration says so; called inside a
    compact method."""
    heads = (*x.shape[:-1], c.num_heads, c.width // c.num_heads)
    query, key, value = (
        Linear(c.width, use_bias=c.query_bias, name=f"{prefix}{name}")(x).reshape(heads)
        for name in ("query", "key", "value")
    )
    if c.query_key_norm is not None:
        query = make_norm(c.norm, c.query_key_epsilon, f"{prefix}query_norm")(query)
        key = make_norm(c.norm, c.query_key_epsilon, f"{prefix}key_norm")(key)
    return query, key, value


class JointAttention(nn.Module):
    """Each stream has projections of its own; both attend to all tokens of both."""

    config: LayerConfig
    hook: AttentionHook
    layer: Layer
    context_first: bool  # in the sequence that they make
    last: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], context: Float[Array, "B T D"], angles: Float[Array, "S F"] | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B T D"] | None]:
        c = self.config
        streams = [normed_heads(x, c), normed_heads(context, c, "context_")]
        order = slice(None, None, -1 if self.context_first else 1)
        query, key, value = (jnp.concatenate(parts[order], axis=1) for parts in zip(*streams, strict=True))
        if angles is not None:
            query, key = (layers.apply_rope(y, angles, interleaved=True) for y in (query, key))
        mixed = attend(self, self.hook, self.layer, query, key, value)
        mixed = mixed.reshape(*mixed.shape[:2], c.width)
        first = context.shape[1] if self.context_first else x.shape[1]
        own, other = (mixed[:, :first], mixed[:, first:])[order]
        other = None if self.last else Linear(c.width, name="context_out")(other)
        return Linear(c.width, name="out")(own), other


class JointLayer(nn.Module):
    """(image, text) after joint attention and an MLP for each.

    `dual`: the image also attends to itself alone, by a second attention with a norm of its own. `last`: nothing reads
    the text any more, which therefore is only normalised and attended to.
    """

    config: LayerConfig
    hook: AttentionHook
    layer: Layer
    context_first: bool = False
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "B L D"], Float[Array, "B T D"]],
        *,
        condition: Float[Array, "B D"],
        angles: Float[Array, "S F"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B T D"]]:
        c = self.config
        x, context = streams
        show(self, "hidden_states", "input", x)
        shift, scale, gate, *of_mlp = modulation(condition, c.width, 9 if self.dual else 6, "modulation")
        if self.last:
            context_scale, context_shift = modulation(condition, c.width, 2, "context_modulation")
        else:
            context_shift, context_scale, context_gate, *of_context_mlp = modulation(
                condition, c.width, 6, "context_modulation"
            )
        attention = JointAttention(c, self.hook, self.layer, self.context_first, self.last, name="attention")
        mixed, mixed_context = attention(
            modulated(x, shift, scale), modulated(context, context_shift, context_scale), angles
        )
        entering, x = x, x + gate * mixed
        if self.dual:
            shift, scale, gate = of_mlp[3:]
            path = self.layer.name.removesuffix("attention") + "second_attention"
            second = Attention(c, self.hook, Layer(self.layer.index + 1, path), name="second_attention")
            x = x + gate * second(modulated(entering, shift, scale), None)
        shift, scale, gate = of_mlp[:3]
        x = x + gate * MLP(c, name="mlp")(modulated(x, shift, scale))
        if self.last:
            return x, context
        context = context + context_gate * mixed_context
        shift, scale, gate = of_context_mlp
        return x, context + gate * MLP(c, name="context_mlp")(modulated(context, shift, scale))


# --- rows of official tables ---------------------------------------------------------------------------------------


def embedding_table(official: str, ours: str) -> Iterator[Row]:
    for i in (1, 2):
        yield from linear(f"{official}.linear_{i}", f"{ours}/fc{i}")


def mlp_table(official: str, ours: str) -> Iterator[Row]:
    yield from linear(f"{official}.net.0.proj", f"{ours}/fc1")
    yield from linear(f"{official}.net.2", f"{ours}/fc2")


def queries_table(official: str, ours: str, c: LayerConfig) -> Iterator[Row]:
    """Projections to queries, keys and values, and norms of the first two."""
    for theirs, name in zip(NAMES[:3], ("query", "key", "value"), strict=True):
        yield from linear(f"{official}.{theirs}", f"{ours}/{name}", bias=c.query_bias)
    for theirs, name in NORMS.items() if c.query_key_norm else ():
        yield from parameter(f"{official}.{theirs}.weight", f"{ours}/{name}/scale")


def joint_layer_table(official: str, ours: str, c: LayerConfig, *, dual: bool = False, last: bool = False):
    yield from linear(f"{official}.norm1.linear", f"{ours}/modulation")
    yield from linear(f"{official}.norm1_context.linear", f"{ours}/context_modulation")
    theirs, own = f"{official}.attn", f"{ours}/attention"
    yield from queries_table(theirs, own, c)
    yield from linear(f"{theirs}.to_out.0", f"{own}/out")
    for name, part in zip(CONTEXT_NAMES, ("query", "key", "value", "out"), strict=True):
        if not (last and part == "out"):
            yield from linear(f"{theirs}.{name}", f"{own}/context_{part}")
    for name, part in CONTEXT_NORMS.items() if c.query_key_norm else ():
        yield from parameter(f"{theirs}.{name}.weight", f"{own}/{part}/scale")
    if dual:
        yield from queries_table(f"{official}.attn2", f"{ours}/second_attention", c)
        yield from linear(f"{official}.attn2.to_out.0", f"{ours}/second_attention/out")
    yield from mlp_table(f"{official}.ff", f"{ours}/mlp")
    if not last:
        yield from mlp_table(f"{official}.ff_context", f"{ours}/context_mlp")
