"""RoBERTa and BERT: a bidirectional encoder with norms after its blocks, and the head that fills in masked tokens.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/{roberta,bert}. Papers: RoBERTa arXiv:1907.11692,
BERT arXiv:1810.04805.
RoBERTa's learned positions begin after the number of the padding token and count real tokens only, so that padding may
stand anywhere; BERT's are places in the row, and its padding stands at the end.
Differs from the official code: there is no dropout, and its use as a decoder with cross-attention is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from layers import Mask
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.blocks import Linear, stack
from zoo.blocks.basic import activation_function
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, layer_norm, linear, parameter, shared

__all__ = ["BACKBONES", "Config", "Model", "Output"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str = "roberta"  # roberta | bert: whose names and settings the weights have
    vocab_size: int = 60
    hidden_size: int = 24  # width of a token
    intermediate_size: int = 40  # width inside the MLP
    num_layers: int = 2
    num_heads: int = 4
    activation: str = "gelu"  # of the MLP
    head_activation: str = "gelu"  # of the output head
    norm_epsilon: float = 1e-5  # added to the variance under the root
    max_positions: int = 24  # rows of the table of positions
    real_positions: bool = True  # positions count real tokens, from pad_token_id + 1 on; else all tokens, from 0 on
    num_token_types: int = 1
    causal: bool = False  # tokens see none that come later
    tie_embeddings: bool = True  # the output layer is the embedding
    pad_token_id: int = 1  # its embeddings get no gradient, as in torch
    bos_token_id: int | None = 0
    eos_token_id: tuple[int, ...] = (2,)

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


class Output(NamedTuple):
    logits: Float[Array, "B L V"]
    last_hidden_state: Float[Array, "B L D"]


def _norm(c: Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.norm_epsilon, use_fast_variance=False, name=name)


class Attention(nn.Module):
    config: Config
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Mask | None) -> Float[Array, "B L D"]:
        c = self.config
        shape = (*x.shape[:-1], c.num_heads, c.hidden_size // c.num_heads)
        query, key, value = (Linear(c.hidden_size, name=name)(x).reshape(shape) for name in ("query", "key", "value"))
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=mask)
        return Linear(c.hidden_size, name="out")(mixed.reshape(x.shape))


class EncoderLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + MLP(x))."""

    config: Config
    hook: AttentionHook
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, mask: Mask | None) -> Float[Array, "B L D"]:
        c = self.config
        show(self, "hidden_states", "input", x)
        attention = Attention(c, self.hook, Layer(self.index, f"layers_{self.index}/attention"), name="attention")
        x = _norm(c, "attention_norm")(x + attention(x, mask))
        hidden = activation_function(c.activation)(Linear(c.intermediate_size, name="fc1")(x))
        return _norm(c, "mlp_norm")(x + Linear(c.hidden_size, name="fc2")(hidden))


class Model(nn.Module):
    """Tokens to logits of the tokens that should stand in their places."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
    ) -> Output:
        """`attention_mask` is 1 at real tokens; `positions` are rows of the table of positions."""
        c = self.config
        embedding = nn.Embed(c.vocab_size, c.hidden_size, name="embedding")
        real = input_ids != c.pad_token_id
        longest = c.max_positions - (c.pad_token_id + 1 if c.real_positions else 0)
        if positions is None and input_ids.shape[1] > longest:
            raise ValueError(f"texts of {input_ids.shape[1]} tokens are longer than the {longest} positions")
        if positions is None and c.real_positions:
            positions = jnp.cumsum(real, axis=-1) * real + c.pad_token_id
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        token_types = jnp.zeros_like(input_ids) if token_types is None else token_types
        x = _learning(embedding(input_ids), real)
        x = x + nn.Embed(c.num_token_types, c.hidden_size, name="token_types")(token_types)
        table = nn.Embed(c.max_positions, c.hidden_size, name="positions")
        places = table(positions)
        if c.real_positions:
            places = _learning(places, positions != c.pad_token_id)
        x = _norm(c, "embedding_norm")(x + places)
        mask = None if attention_mask is None else layers.KeyMask(attention_mask.astype(bool))
        if c.causal:
            mask = layers.CausalMask() if mask is None else layers.CausalMask() & mask
        for first, count in causal.runs(c.num_layers, lambda index: None, self.attention):
            x = stack(self, partial(EncoderLayer, c, self.attention, first), count, x, first=first, mask=mask)
        show(self, "hidden_states", "last", x)
        hidden = activation_function(c.head_activation)(Linear(c.hidden_size, name="head_in")(x))
        hidden = _norm(c, "head_norm")(hidden)
        if c.tie_embeddings:
            logits = embedding.attend(hidden)
        else:
            logits = Linear(c.vocab_size, use_bias=False, name="head")(hidden)
            # The official model then has a second bias, which nothing reads.
            self.param("unread_bias", nn.initializers.zeros, (c.vocab_size,))
        bias = self.param("head_bias", nn.initializers.zeros, (c.vocab_size,))
        return Output(logits + bias.astype(logits.dtype), x)


def _learning(x: Float[Array, "B L D"], where: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
    return jnp.where(where[..., None], x, jax.lax.stop_gradient(x))


def example(config: Config, *, batch_size: int, key: jax.Array, length: int = 8) -> dict[str, jax.Array]:
    return {"input_ids": jax.random.randint(key, (batch_size, length), config.pad_token_id + 1, config.vocab_size)}


# --- the official code ---------------------------------------------------------------------------------------------

_SIZES = {  # theirs -> (ours, RoBERTa's default, BERT's)
    "vocab_size": ("vocab_size", 50265, 30522),
    "hidden_size": ("hidden_size", 768, 768),
    "num_hidden_layers": ("num_layers", 12, 12),
    "num_attention_heads": ("num_heads", 12, 12),
    "intermediate_size": ("intermediate_size", 3072, 3072),
    "max_position_embeddings": ("max_positions", 512, 512),
    "type_vocab_size": ("num_token_types", 2, 2),
    "layer_norm_eps": ("norm_epsilon", 1e-12, 1e-12),
    "pad_token_id": ("pad_token_id", 1, 0),
    "bos_token_id": ("bos_token_id", 0, None),
    "is_decoder": ("causal", False, False),
    "tie_word_embeddings": ("tie_embeddings", True, True),
}


def config_from_official(family: str, hparams: Mapping[str, Any]) -> Config:
    if hparams.get("add_cross_attention"):
        raise UserError(f"{family} with add_cross_attention is not supported: only encoders by themselves are")
    if hparams.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{family} with relative positions is not supported: position_embedding_type must be absolute")
    is_bert = family == "bert"
    eos = hparams.get("eos_token_id", None if is_bert else 2)
    activation = activation_from_hub(hparams.get("hidden_act", "gelu"))
    return Config(
        family=family,
        **{ours: hparams.get(theirs, defaults[is_bert]) for theirs, (ours, *defaults) in _SIZES.items()},
        activation=activation,
        head_activation=activation if is_bert else "gelu",
        real_positions=not is_bert,
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )


def config_to_official(c: Config) -> dict[str, Any]:
    eos = c.eos_token_id
    return {theirs: getattr(c, ours) for theirs, (ours, *_) in _SIZES.items()} | {
        "hidden_act": activation_to_hub(c.activation),
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
    }


def official_table(c: Config) -> Table:
    base, head, dense, norm = "roberta", "lm_head", "dense", "layer_norm"
    if c.family == "bert":
        base, head, dense, norm = "bert", "cls.predictions", "transform.dense", "transform.LayerNorm"
    embeddings = f"{base}.embeddings"
    word = f"{embeddings}.word_embeddings.weight"
    if c.tie_embeddings:
        yield from shared((word, f"{head}.decoder.weight"), "embedding/embedding")
        yield from shared((f"{head}.bias", f"{head}.decoder.bias"), "head_bias")
    else:
        yield from parameter(word, "embedding/embedding")
        yield from linear(f"{head}.decoder", "head", bias=False)
        yield from parameter(f"{head}.decoder.bias", "head_bias")
        yield from parameter(f"{head}.bias", "unread_bias")
    yield from parameter(f"{embeddings}.token_type_embeddings.weight", "token_types/embedding")
    yield from parameter(f"{embeddings}.position_embeddings.weight", "positions/embedding")
    yield from layer_norm(f"{embeddings}.LayerNorm", "embedding_norm")
    for i in range(c.num_layers):
        theirs, ours = f"{base}.encoder.layer.{i}", f"layers_{i}"
        for name in ("query", "key", "value"):
            yield from linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
        yield from linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out")
        yield from layer_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm")
        yield from linear(f"{theirs}.intermediate.dense", f"{ours}/fc1")
        yield from linear(f"{theirs}.output.dense", f"{ours}/fc2")
        yield from layer_norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp_norm")
    yield from linear(f"{head}.{dense}", "head_in")
    yield from layer_norm(f"{head}.{norm}", "head_norm")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(
        variables,
        inputs["input_ids"],
        attention_mask=inputs.get("attention_mask"),
        token_types=inputs.get("token_type_ids"),
        positions=inputs.get("position_ids"),
    )
    return {"logits": output.logits, "last_hidden_state": output.last_hidden_state}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_PUBLISHED = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

_CONFIGS = {
    "roberta": {
        "tiny": Config(),
        "distilroberta-base": config_from_official("roberta", _PUBLISHED | {"num_hidden_layers": 6}),
        "roberta-base": config_from_official("roberta", _PUBLISHED),
        "roberta-large": config_from_official("roberta", _PUBLISHED | _LARGE),
    },
    "bert": {
        "tiny": Config(
            "bert", real_positions=False, num_token_types=2, pad_token_id=0, bos_token_id=None, eos_token_id=()
        ),
        "bert-base-uncased": config_from_official("bert", {}),
        "bert-base-cased": config_from_official("bert", {"vocab_size": 28996}),
        "bert-large-uncased": config_from_official("bert", _LARGE),
    },
}

_COUNTS = {"roberta": {"roberta-base": 124_697_433}, "bert": {"bert-base-uncased": 109_514_298}}

BACKBONES = {
    family: Backbone(
        name=family,
        model=Model,
        configs=_CONFIGS[family],
        example=example,
        parameter_counts=_COUNTS[family],
        officials=(
            Official(
                module=f"models/{family}/modeling_{family}.py:{prefix}ForMaskedLM",
                config=partial(config_from_official, family),
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                prefix=f"{family}.",
                ignored=(r"embeddings\.position_ids$", r"^(roberta|bert)\.pooler\.", r"^cls\.seq_relationship\."),
            ),
        ),
    )
    for family, prefix in (("roberta", "Roberta"), ("bert", "Bert"))
}
