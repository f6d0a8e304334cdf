"""T5: an encoder and a decoder with relative position buckets in place of positions.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/t5. Paper: arXiv:1910.10683; version 1.1 has gated
MLPs, an output layer of its own and no scaling of the decoder's output.
Scores are not divided by sqrt(head_dim); one table of biases, of the first layer, serves all layers of a stack.
Differs from the official code: there is no dropout. As there, settings do not say whether the output layer is the
embedding: the weights do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import layers
from layers import KeyValueCache, Mask
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear, RMSNorm
from zoo.blocks.basic import activation_function
from zoo.paper import Official
from zoo.weights.table import Table, layer_norm, linear, parameter, shared

__all__ = ["BACKBONES", "Cache", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    vocab_size: int = 64
    hidden_size: int = 24  # width of a token
    head_dim: int = 6
    intermediate_size: int = 40  # width inside the MLP
    num_layers: int = 2  # of the encoder
    num_decoder_layers: int = 2
    num_heads: int = 4
    num_buckets: int = 8  # of relative positions, half of them for keys after the query in the encoder
    max_distance: int = 16  # from here on all positions share a bucket
    norm_epsilon: float = 1e-6  # added to the mean square under the root
    activation: str = "relu"  # of the MLP, or of its gate
    gated: bool = False  # the MLP has a gate
    scale_outputs: bool = True  # decoder outputs times 1 / sqrt(hidden_size) before the output layer
    tie_embeddings: bool = True  # the output layer is the embedding
    pad_token_id: int | None = 0
    eos_token_id: tuple[int, ...] = (1,)  # tokens that end a generated text
    decoder_start_token_id: int | None = 0  # what the decoder reads first


class Cache(NamedTuple):
    """Of the decoder: its own keys and values, and those of the encoder's output once that is known."""

    own: causal.Cache
    cross: tuple[tuple[Float[Array, "B Le H D"], Float[Array, "B Le H D"]], ...] | None
    encoder_mask: Bool[Array, "B Le"] | None

    @property
    def length(self) -> Int[Array, " B"]:
        return self.own[0].length


class Output(NamedTuple):
    logits: Float[Array, "B L V"]
    last_hidden_state: Float[Array, "B L D"]
    encoder_last_hidden_state: Float[Array, "B Le D"] | None
    cache: Cache | None


class Attention(nn.Module):
    config: Config
    hook: AttentionHook
    layer: Layer

    def setup(self):
        c = self.config
        self.query, self.key, self.value = (Linear(c.num_heads * c.head_dim, use_bias=False) for _ in range(3))
        self.out = Linear(c.hidden_size, use_bias=False)

    def keys_and_values(self, x: Float[Array, "B L D"]) -> tuple[Array, Array]:
        shape = (*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        return self.key(x).reshape(shape), self.value(x).reshape(shape)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        key: Float[Array, "B Lk H Dh"],
        value: Float[Array, "B Lk H Dh"],
        *,
        mask: Mask | None,
        bias: Float[Array, "b H L Lk"] | None,
    ) -> Float[Array, "B L D"]:
        c = self.config
        query = self.query(x).reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=mask, bias=bias, scale=1.0)
        return self.out(mixed.reshape(*x.shape[:-1], -1))


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        hidden = Linear(c.intermediate_size, use_bias=False, name="gate" if c.gated else "up")(x)
        hidden = activation_function(c.activation)(hidden)
        if c.gated:
            hidden = hidden * Linear(c.intermediate_size, use_bias=False, name="up")(x)
        return Linear(c.hidden_size, use_bias=False, name="down")(hidden)


class EncoderLayer(nn.Module):
    config: Config
    hook: AttentionHook
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, mask: Mask | None, bias: Array) -> Float[Array, "B L D"]:
        c = self.config
        show(self, "hidden_states", "input", x)
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        layer = Layer(self.index, f"encoder/layers_{self.index}/attention")
        attention = Attention(c, self.hook, layer, name="attention")
        x = x + attention(normed, *attention.keys_and_values(normed), mask=mask, bias=bias)
        return x + MLP(c, name="mlp")(RMSNorm(c.norm_epsilon, name="mlp_norm")(x))


class DecoderLayer(nn.Module):
    """Gives back its keys and values of the encoder's output too: they are the same at every step."""

    config: Config
    hook: AttentionHook
    index: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        mask: Mask,
        bias: Array,
        encoded: Float[Array, "B Le D"] | None,
        cross: tuple[Array, Array] | None,
        cross_mask: Mask | None,
        cache: KeyValueCache | None,
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array], KeyValueCache | None]:
        c = self.config
        show(self, "hidden_states", "input", x)
        first, name = c.num_layers + 2 * self.index, f"decoder/layers_{self.index}"
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        attention = Attention(c, self.hook, Layer(first, f"{name}/attention"), name="attention")
        key, value = attention.keys_and_values(normed)
        if cache is not None:
            cache = layers.extend_cache(cache, key, value)
            key, value = cache.key, cache.value
        x = x + attention(normed, key, value, mask=mask, bias=bias)
        attention = Attention(
            c, self.hook, Layer(first + 1, f"{name}/cross_attention", "cross"), name="cross_attention"
        )
        if encoded is not None:
            cross = attention.keys_and_values(encoded)
        normed = RMSNorm(c.norm_epsilon, name="cross_attention_norm")(x)
        x = x + attention(normed, *cross, mask=cross_mask, bias=None)
        return x + MLP(c, name="mlp")(RMSNorm(c.norm_epsilon, name="mlp_norm")(x)), cross, cache


class Encoder(nn.Module):
    config: Config
    hook: AttentionHook

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], present: Bool[Array, "B L"] | None) -> Float[Array, "B L D"]:
        c = self.config
        table = self.param("relative_bias", nn.initializers.normal(), (c.num_buckets, c.num_heads))
        places = jnp.arange(x.shape[1])
        bias = layers.t5_relative_bias(table, places, places, max_distance=c.max_distance)[None]
        mask = None if present is None else layers.KeyMask(present)
        for index in range(c.num_layers):
            x = EncoderLayer(c, self.hook, index, name=f"layers_{index}")(x, mask=mask, bias=bias)
        x = RMSNorm(c.norm_epsilon, name="norm")(x)
        show(self, "hidden_states", "last", x)
        return x


class Decoder(nn.Module):
    config: Config
    hook: AttentionHook

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        present: Bool[Array, "B L"] | None,
        encoded: Float[Array, "B Le D"] | None,
        encoder_mask: Bool[Array, "B Le"] | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        c = self.config
        table = self.param("relative_bias", nn.initializers.normal(), (c.num_buckets, c.num_heads))
        offset = None if cache is None else cache.length
        queries = jnp.arange(x.shape[1]) if cache is None else offset[:, None] + jnp.arange(x.shape[1])
        keys = queries if cache is None else jnp.arange(cache.own[0].key.shape[1])
        keys = jnp.broadcast_to(keys, (*queries.shape[:-1], keys.shape[-1]))
        bias = layers.t5_relative_bias(table, queries, keys, bidirectional=False, max_distance=c.max_distance)
        bias = bias if bias.ndim == 4 else bias[None]
        mask = causal.visible_keys(present, offset)
        cross_mask = None if encoder_mask is None else layers.KeyMask(encoder_mask)
        own, crosses = [], []
        for index in range(c.num_decoder_layers):
            x, cross, grown = DecoderLayer(c, self.hook, index, name=f"layers_{index}")(
                x, mask=mask, bias=bias, encoded=encoded, cross_mask=cross_mask,
                cross=None if cache is None or cache.cross is None else cache.cross[index],
                cache=None if cache is None else cache.own[index],
            )  # fmt: skip
            crosses.append(cross)
            if cache is not None:
                own.append(causal.settled(grown, cache.own[index], present))
        x = RMSNorm(c.norm_epsilon, name="norm")(x)
        show(self, "hidden_states", "last", x)
        return x, None if cache is None else Cache(tuple(own), tuple(crosses), encoder_mask)


class Model(nn.Module):
    """Texts to logits of the text that answers them. `cache` makes it a step of decoding: see
    `zoo.backbones.generation`, whose `inputs` are the encoder's."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        encoder_input_ids: Int[Array, "B Le"] | None = None,
        encoder_attention_mask: Int[Array, "B Le"] | Bool[Array, "B Le"] | None = None,
        cache: Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> Output:
        """`input_ids` and `attention_mask` are the decoder's. The encoder's are given with the first call of a cache
        only. `logits_at` gives the logits of one place a row only, (B, 1, V)."""
        c = self.config
        embedding = nn.Embed(c.vocab_size, c.hidden_size, name="embedding")
        encoded, encoder_mask = None, None if cache is None else cache.encoder_mask
        if encoder_input_ids is not None:
            if encoder_attention_mask is not None:
                encoder_mask = encoder_attention_mask.astype(bool)
            encoded = Encoder(c, self.attention, name="encoder")(embedding(encoder_input_ids), encoder_mask)
        elif cache is None or cache.cross is None:
            raise ValueError("T5 needs encoder_input_ids, unless a cache holds what the encoder made of them")
        present = None if attention_mask is None else attention_mask.astype(bool)
        decoder = Decoder(c, self.attention, name="decoder")
        x, cache = decoder(embedding(input_ids), present, encoded, encoder_mask, cache)
        scaled = x * c.hidden_size**-0.5 if c.scale_outputs else x
        logits = causal.read_out(scaled, embedding if c.tie_embeddings else None, c.vocab_size, logits_at)
        return Output(logits, x, encoded, cache)


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> Cache:
    """Room for `capacity` tokens of the decoder a row."""
    own = causal.empty_cache(
        config.num_decoder_layers, config.num_heads, config.head_dim, batch_size=batch_size, capacity=capacity,
        dtype=dtype,
    )  # fmt: skip
    return Cache(own, None, None)


def example(config: Config, *, batch_size: int, key: jax.Array, length: int = 8) -> dict[str, jax.Array]:
    one, other = jax.random.split(key)
    return {
        "input_ids": jax.random.randint(one, (batch_size, length - 2), 0, config.vocab_size),
        "encoder_input_ids": jax.random.randint(other, (batch_size, length), 0, config.vocab_size),
    }


# --- the official code ---------------------------------------------------------------------------------------------

_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": None,
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    h = _DEFAULTS | dict(hparams)
    *gate, activation = h["feed_forward_proj"].split("-")
    if gate not in ([], ["gated"]):
        raise ValueError(f"feed_forward_proj {h['feed_forward_proj']!r} is neither an activation nor gated-activation")
    eos = h["eos_token_id"]
    return Config(
        vocab_size=h["vocab_size"],
        hidden_size=h["d_model"],
        head_dim=h["d_kv"],
        intermediate_size=h["d_ff"],
        num_layers=h["num_layers"],
        num_decoder_layers=h["num_layers"] if h["num_decoder_layers"] is None else h["num_decoder_layers"],
        num_heads=h["num_heads"],
        num_buckets=h["relative_attention_num_buckets"],
        max_distance=h["relative_attention_max_distance"],
        norm_epsilon=h["layer_norm_epsilon"],
        # A gate of "gelu" has always meant its tanh form.
        activation="gelu_tanh" if gate and activation == "gelu" else activation_from_hub(activation),
        gated=bool(gate),
        scale_outputs=h.get("scale_decoder_outputs", h["tie_word_embeddings"] is not False),
        pad_token_id=h["pad_token_id"],
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        decoder_start_token_id=h["decoder_start_token_id"],
    )


def config_to_official(c: Config) -> dict[str, Any]:
    eos = c.eos_token_id
    activation = "gelu" if c.gated and c.activation == "gelu_tanh" else activation_to_hub(c.activation)
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "d_kv": c.head_dim,
        "d_ff": c.intermediate_size,
        "num_layers": c.num_layers,
        "num_decoder_layers": c.num_decoder_layers,
        "num_heads": c.num_heads,
        "relative_attention_num_buckets": c.num_buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_epsilon,
        "feed_forward_proj": f"gated-{activation}" if c.gated else activation,
        "tie_word_embeddings": c.scale_outputs,
        "is_encoder_decoder": True,
        "pad_token_id": c.pad_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "decoder_start_token_id": c.decoder_start_token_id,
    }


def refined(config: Config, tensors: Mapping[str, Any]) -> Config:
    """Version 1.1 has an output layer of its own and the same settings as models that have not."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("shared.weight")
    if head is None or embedding is None or np.array_equal(head, embedding):
        return config
    return replace(config, tie_embeddings=False)


def official_table(c: Config) -> Table:
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    yield from shared((*names, "lm_head.weight") if c.tie_embeddings else names, "embedding/embedding")
    if not c.tie_embeddings:
        yield from linear("lm_head", "head", bias=False)
    for stack, depth in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        first = f"{stack}.block.0.layer.0.SelfAttention"
        yield from parameter(f"{first}.relative_attention_bias.weight", f"{stack}/relative_bias")
        yield from layer_norm(f"{stack}.final_layer_norm", f"{stack}/norm", bias=False)
        for i in range(depth):
            theirs, ours = f"{stack}.block.{i}.layer", f"{stack}/layers_{i}"
            parts = [("SelfAttention", "attention"), ("DenseReluDense", "mlp")]
            if stack == "decoder":
                parts.insert(1, ("EncDecAttention", "cross_attention"))
            for j, (name, own) in enumerate(parts):
                yield from layer_norm(f"{theirs}.{j}.layer_norm", f"{ours}/{own}_norm", bias=False)
                if own != "mlp":
                    for letter, projection in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                        yield from linear(f"{theirs}.{j}.{name}.{letter}", f"{ours}/{own}/{projection}", bias=False)
                    continue
                inner = (("wi_0", "gate"), ("wi_1", "up")) if c.gated else (("wi", "up"),)
                for letter, projection in (*inner, ("wo", "down")):
                    yield from linear(f"{theirs}.{j}.{name}.{letter}", f"{ours}/mlp/{projection}", bias=False)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(
        variables,
        inputs["decoder_input_ids"],
        attention_mask=inputs.get("decoder_attention_mask"),
        encoder_input_ids=inputs["input_ids"],
        encoder_attention_mask=inputs.get("attention_mask"),
    )
    return {"logits": output.logits, "encoder_last_hidden_state": output.encoder_last_hidden_state}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(width: int, depth: int, heads: int, inner: int, *, head_dim: int = 64, new: bool = False) -> Config:
    config = Config(
        vocab_size=32128, hidden_size=width, head_dim=head_dim, intermediate_size=inner, num_layers=depth,
        num_decoder_layers=depth, num_heads=heads, num_buckets=32, max_distance=128,
    )  # fmt: skip
    if not new:
        return config
    return replace(config, activation="gelu_tanh", gated=True, scale_outputs=False, tie_embeddings=False)


BACKBONES = {
    "t5": Backbone(
        name="t5",
        model=Model,
        configs={
            "tiny": Config(),
            "t5-small": _named(512, 6, 8, 2048),
            "t5-base": _named(768, 12, 12, 3072),
            "t5-large": _named(1024, 24, 16, 4096),
            "t5-3b": _named(1024, 24, 32, 16384, head_dim=128),
            "t5-v1_1-small": _named(512, 8, 6, 1024, new=True),
            "flan-t5-base": _named(768, 12, 12, 2048, new=True),
            "flan-t5-large": _named(1024, 24, 16, 2816, new=True),
            "flan-t5-xl": _named(2048, 24, 32, 5120, new=True),
        },
        example=example,
        cache=empty_cache,
        parameter_counts={"t5-small": 60_506_624},
        officials=(
            Official(
                module="models/t5/modeling_t5.py:T5ForConditionalGeneration",
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                refine=refined,
                ignored=(r"EncDecAttention\.relative_attention_bias\.weight$",),
            ),
        ),
    )
}
