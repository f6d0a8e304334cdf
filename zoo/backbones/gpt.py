"""The GPT family: GPT-2, OPT and GPT-J as configurations of one decoder with layer norms and biases.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/{gpt2,opt,gptj}.
GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. OPT: arXiv:2205.01068. GPT-J: Wang
and Komatsuzaki, 2021.
GPT-2 and OPT learn a vector for every position; GPT-J rotates neighbouring channels and computes attention and MLP side
by side from one norm. The smallest OPT but one (350m) normalises after each block and embeds into fewer channels.
Differs from the official code: positions count from the first real token of a row, so that padding on the left changes
nothing either (the bridge gives it the official positions); there is no dropout; GPT-2's optional cross-attention and
token types are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from layers import KeyValueCache, Mask
from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.backbones.naming import activation_from_hub, activation_to_hub, end_tokens_from_hub, end_tokens_to_hub
from zoo.blocks import Linear, stack
from zoo.blocks.basic import activation_function
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Row, Table, layer_norm, linear, parameter, shared, split_columns

__all__ = ["BACKBONES", "Config", "Model"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str  # gpt2 | opt | gpt_j: whose names and settings the weights have
    vocab_size: int = 64
    hidden_size: int = 24  # width of a token
    embedding_size: int = 24  # width of the embedding; projected where it is not hidden_size
    intermediate_size: int = 96  # width inside the MLP
    num_layers: int = 2
    num_heads: int = 4
    activation: str = "gelu_tanh"  # of the MLP
    norm_epsilon: float = 1e-5  # added to the variance under the root
    max_positions: int = 32  # the longest sequence; the number of learned positions
    position_offset: int | None = 0  # rows of the table of positions before that of position 0; None: no such table
    rotary_dim: int = 0  # channels of a head that are rotated, in neighbouring pairs
    parallel: bool = False  # attention and MLP read the same norm and are added together
    norm_first: bool = True  # norms before the blocks, not after the sums
    last_norm: bool = True  # a norm after the last layer
    norm_affine: bool = True  # norms learn scale and bias
    attention_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False  # of the output layer
    scale_scores: bool = True  # by 1 / sqrt(head_dim)
    scale_by_layer: bool = False  # and by 1 / (layer + 1)
    tie_embeddings: bool = True  # the output layer is the embedding
    pad_token_id: int | None = None  # its embedding gets no gradient, as in torch
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # tokens that end a generated text

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def score_scale(self, layer: int) -> float:
        scale = self.head_dim**-0.5 if self.scale_scores else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale


class Attention(nn.Module):
    config: Config
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Mask | None,
        angles: Float[Array, "B L F"] | None,
        cache: KeyValueCache | None,
    ) -> tuple[Float[Array, "B L D"], KeyValueCache | None]:
        c = self.config
        query, key, value = (
            Linear(c.hidden_size, use_bias=c.attention_bias, name=name)(x).reshape(
                *x.shape[:-1], c.num_heads, c.head_dim
            )
            for name in ("query", "key", "value")
        )
        if angles is not None:
            query, key = (layers.apply_rope(heads, angles, interleaved=True) for heads in (query, key))
        if cache is not None:
            cache = layers.extend_cache(cache, key, value)
            key, value = cache.key, cache.value
        scale = c.score_scale(self.layer.index)
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=mask, scale=scale)
        return Linear(c.hidden_size, use_bias=c.attention_bias, name="out")(mixed.reshape(x.shape)), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        hidden = activation_function(c.activation)(Linear(c.intermediate_size, use_bias=c.mlp_bias, name="fc1")(x))
        return Linear(c.hidden_size, use_bias=c.mlp_bias, name="fc2")(hidden)


def _norm(c: Config, name: str) -> nn.LayerNorm:
    affine = c.norm_affine
    return nn.LayerNorm(epsilon=c.norm_epsilon, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name)


class DecoderLayer(nn.Module):
    """Attention and MLP with residuals, one after the other or side by side; with a cache it gives back that too."""

    config: Config
    hook: AttentionHook
    index: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        mask: Mask | None,
        angles: Float[Array, "B L F"] | None,
        cache: KeyValueCache | None = None,
    ):
        c = self.config
        show(self, "hidden_states", "input", x)
        attention = Attention(c, self.hook, Layer(self.index, f"layers_{self.index}/attention"), name="attention")
        norm = _norm(c, "attention_norm")
        mixed, new_cache = attention(norm(x) if c.norm_first else x, mask, angles, cache)
        if c.parallel:
            x = x + mixed + MLP(c, name="mlp")(norm(x))
        elif c.norm_first:
            x = x + mixed
            x = x + MLP(c, name="mlp")(_norm(c, "mlp_norm")(x))
        else:
            x = norm(x + mixed)
            x = _norm(c, "mlp_norm")(x + MLP(c, name="mlp")(x))
        return x if cache is None else (x, new_cache)


class Model(nn.Module):
    """Tokens to logits. `cache` makes it a step of decoding: see `zoo.backbones.generation`."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        *,
        embeddings: Float[Array, "B L E"] | None = None,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        cache: causal.Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> causal.Output:
        """`attention_mask` is 1 at real tokens; without a cache padding may be anywhere, with one it is at the end.

        `embeddings` stand in for those of `input_ids`, `positions` for those that the mask implies. `logits_at` gives
        the logits of one place a row only, (B, 1, V).
        """
        c = self.config
        embedding = nn.Embed(c.vocab_size, c.embedding_size, name="embedding")
        x = causal.embed(embedding, input_ids, c.pad_token_id) if embeddings is None else embeddings
        if c.embedding_size != c.hidden_size:
            x = Linear(c.hidden_size, use_bias=False, name="project_in")(x)
        present = None if attention_mask is None else attention_mask.astype(bool)
        offset = None if cache is None else cache[0].length
        positions, _ = causal.padding_positions(x.shape[:2], present, positions, offset)
        if c.position_offset is not None:
            if present is None and x.shape[1] > c.max_positions:
                raise ValueError(f"texts of {x.shape[1]} tokens are longer than max_positions {c.max_positions}")
            table = nn.Embed(c.max_positions + c.position_offset, c.hidden_size, name="positions")
            x = x + table(positions + c.position_offset)
        angles = layers.rope_angles(positions, layers.rope_frequencies(c.rotary_dim)) if c.rotary_dim else None
        mask = causal.visible_keys(present, offset)
        if cache is None:
            for first, count in causal.runs(c.num_layers, c.score_scale, self.attention):
                make = partial(DecoderLayer, c, self.attention, first)
                x = stack(self, make, count, x, first=first, mask=mask, angles=angles)
        else:
            extended = []
            for index in range(c.num_layers):
                layer = DecoderLayer(c, self.attention, index, name=f"layers_{index}")
                x, grown = layer(x, mask=mask, angles=angles, cache=cache[index])
                extended.append(causal.settled(grown, cache[index], present))
            cache = tuple(extended)
        if c.last_norm:
            x = _norm(c, "norm")(x)
        if c.embedding_size != c.hidden_size:
            x = Linear(c.embedding_size, use_bias=False, name="project_out")(x)
        show(self, "hidden_states", "last", x)
        logits = causal.read_out(x, embedding if c.tie_embeddings else None, c.vocab_size, logits_at)
        if c.head_bias:
            logits = logits + self.param("head_bias", nn.initializers.zeros, (c.vocab_size,)).astype(logits.dtype)
        return causal.Output(logits, x, cache)


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> causal.Cache:
    """Room for `capacity` tokens a row."""
    return causal.empty_cache(
        config.num_layers, config.num_heads, config.head_dim, batch_size=batch_size, capacity=capacity, dtype=dtype
    )


def example(config: Config, *, batch_size: int, key: jax.Array, length: int = 8) -> dict[str, jax.Array]:
    return {"input_ids": jax.random.randint(key, (batch_size, length), 0, config.vocab_size)}


# --- the official code ---------------------------------------------------------------------------------------------

_DEFAULTS: dict[str, dict[str, Any]] = {  # of the official constructors
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
             "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "bos_token_id": 50256, "eos_token_id": 50256,
             "pad_token_id": None, "tie_word_embeddings": True},
    "gpt_j": {"vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
              "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256,
              "eos_token_id": 50256, "pad_token_id": None, "tie_word_embeddings": False},
    "opt": {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
            "max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
            "word_embed_proj_dim": None, "num_attention_heads": 12, "activation_function": "relu", "pad_token_id": 1,
            "bos_token_id": 2, "eos_token_id": 2, "enable_bias": True, "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": True},
}  # fmt: skip


def config_from_official(family: str, hparams: Mapping[str, Any]) -> Config:
    h = _DEFAULTS[family] | dict(hparams)
    if h.get("add_cross_attention"):
        raise UserError("GPT-2 with add_cross_attention is not supported: only decoders by themselves are")
    common = {
        "vocab_size": h["vocab_size"],
        "activation": activation_from_hub(h["activation_function"]),
        "tie_embeddings": h["tie_word_embeddings"],
        "bos_token_id": h["bos_token_id"],
        "eos_token_id": end_tokens_from_hub(h["eos_token_id"]),
    }
    if family == "opt":
        width = h["hidden_size"]
        embedding = width if h["word_embed_proj_dim"] is None else h["word_embed_proj_dim"]
        return Config(
            "opt", **common, hidden_size=width, embedding_size=embedding, intermediate_size=h["ffn_dim"],
            num_layers=h["num_hidden_layers"], num_heads=h["num_attention_heads"],
            max_positions=h["max_position_embeddings"], position_offset=2, norm_first=h["do_layer_norm_before"],
            last_norm=h["do_layer_norm_before"] and not h["_remove_final_layer_norm"],
            norm_affine=h["layer_norm_elementwise_affine"], attention_bias=h["enable_bias"], mlp_bias=h["enable_bias"],
            pad_token_id=h["pad_token_id"],
        )  # fmt: skip
    width = h["n_embd"]
    sizes = {
        "hidden_size": width, "embedding_size": width, "num_layers": h["n_layer"], "num_heads": h["n_head"],
        "intermediate_size": 4 * width if h["n_inner"] is None else h["n_inner"], "max_positions": h["n_positions"],
        "norm_epsilon": h["layer_norm_epsilon"],
    }  # fmt: skip
    if family == "gpt_j":
        return Config(
            "gpt_j", **common, **sizes, position_offset=None, rotary_dim=h["rotary_dim"], parallel=True,
            attention_bias=False, head_bias=True,
        )  # fmt: skip
    return Config(
        "gpt2", **common, **sizes, scale_scores=h["scale_attn_weights"],
        scale_by_layer=h["scale_attn_by_inverse_layer_idx"],
    )  # fmt: skip


def config_to_official(c: Config) -> dict[str, Any]:
    h: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "activation_function": "gelu_new" if c.activation == "gelu_tanh" else activation_to_hub(c.activation),
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": end_tokens_to_hub(c.eos_token_id),
    }
    if c.family == "opt":
        return h | {
            "hidden_size": c.hidden_size, "word_embed_proj_dim": c.embedding_size, "ffn_dim": c.intermediate_size,
            "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
            "max_position_embeddings": c.max_positions, "do_layer_norm_before": c.norm_first,
            "_remove_final_layer_norm": c.norm_first and not c.last_norm,
            "layer_norm_elementwise_affine": c.norm_affine, "enable_bias": c.mlp_bias, "pad_token_id": c.pad_token_id,
        }  # fmt: skip
    h |= {
        "n_embd": c.hidden_size, "n_layer": c.num_layers, "n_head": c.num_heads, "n_inner": c.intermediate_size,
        "n_positions": c.max_positions, "layer_norm_epsilon": c.norm_epsilon,
    }  # fmt: skip
    if c.family == "gpt_j":
        return h | {"rotary_dim": c.rotary_dim}
    return h | {"scale_attn_weights": c.scale_scores, "scale_attn_by_inverse_layer_idx": c.scale_by_layer}


def official_table(c: Config) -> Table:
    yield from {"gpt2": _gpt2_table, "gpt_j": _gpt_j_table, "opt": _opt_table}[c.family](c)


def _ends(c: Config, embedding: str) -> Table:
    if c.tie_embeddings:
        yield from shared((f"{embedding}.weight", "lm_head.weight"), "embedding/embedding")
    else:
        yield from parameter(f"{embedding}.weight", "embedding/embedding")
        yield from linear("lm_head", "head", bias=False)
    if c.head_bias:
        yield from parameter("lm_head.bias", "head_bias")


def _gpt2_table(c: Config) -> Table:
    yield from _ends(c, "transformer.wte")
    yield from parameter("transformer.wpe.weight", "positions/embedding")
    for i in range(c.num_layers):
        theirs, ours = f"transformer.h.{i}", f"layers_{i}"
        for kind, leaf in (("weight", "kernel"), ("bias", "bias")):  # stored as (in, out), as our kernels are
            parts = tuple(f"params/{ours}/attention/{name}/{leaf}" for name in ("query", "key", "value"))
            yield Row((f"{theirs}.attn.c_attn.{kind}",), parts, split_columns(*(c.hidden_size,) * 3))
            yield from parameter(f"{theirs}.attn.c_proj.{kind}", f"{ours}/attention/out/{leaf}")
            yield from parameter(f"{theirs}.mlp.c_fc.{kind}", f"{ours}/mlp/fc1/{leaf}")
            yield from parameter(f"{theirs}.mlp.c_proj.{kind}", f"{ours}/mlp/fc2/{leaf}")
        yield from layer_norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
        yield from layer_norm(f"{theirs}.ln_2", f"{ours}/mlp_norm")
    yield from layer_norm("transformer.ln_f", "norm")


def _gpt_j_table(c: Config) -> Table:
    yield from _ends(c, "transformer.wte")
    for i in range(c.num_layers):
        theirs, ours = f"transformer.h.{i}", f"layers_{i}"
        for name, own in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            yield from linear(f"{theirs}.attn.{name}", f"{ours}/attention/{own}", bias=False)
        yield from linear(f"{theirs}.mlp.fc_in", f"{ours}/mlp/fc1")
        yield from linear(f"{theirs}.mlp.fc_out", f"{ours}/mlp/fc2")
        yield from layer_norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
    yield from layer_norm("transformer.ln_f", "norm")


def _opt_table(c: Config) -> Table:
    base = "model.decoder"
    yield from _ends(c, f"{base}.embed_tokens")
    yield from parameter(f"{base}.embed_positions.weight", "positions/embedding")
    if c.embedding_size != c.hidden_size:
        yield from linear(f"{base}.project_in", "project_in", bias=False)
        yield from linear(f"{base}.project_out", "project_out", bias=False)
    norms = [(f"{base}.final_layer_norm", "norm")] if c.last_norm else []
    for i in range(c.num_layers):
        theirs, ours = f"{base}.layers.{i}", f"layers_{i}"
        for name, own in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            yield from linear(f"{theirs}.self_attn.{name}", f"{ours}/attention/{own}", bias=c.attention_bias)
        for name in ("fc1", "fc2"):
            yield from linear(f"{theirs}.{name}", f"{ours}/mlp/{name}", bias=c.mlp_bias)
        norms += [(f"{theirs}.self_attn_layer_norm", f"{ours}/attention_norm")]
        norms += [(f"{theirs}.final_layer_norm", f"{ours}/mlp_norm")]
    for name, own in norms if c.norm_affine else ():
        yield from layer_norm(name, own)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)  # the official code's, whatever the mask
    if model.config.family == "opt" and mask is not None:
        places = jnp.cumsum(mask, axis=-1) * mask - 1
    positions = inputs.get("position_ids", places)
    return {"logits": model.apply(variables, ids, attention_mask=mask, positions=positions).logits}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _gpt2(width: int, depth: int, heads: int) -> Config:
    return config_from_official("gpt2", {"n_embd": width, "n_layer": depth, "n_head": heads})


def _opt(width: int, depth: int, heads: int, **others: Any) -> Config:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "ffn_dim": 4 * width}
    return config_from_official("opt", sizes | others)


_CONFIGS: dict[str, dict[str, Config]] = {
    "gpt2": {
        "tiny": Config("gpt2", eos_token_id=(1,)),
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
    },
    "opt": {
        "tiny": Config(
            "opt",
            intermediate_size=40,
            embedding_size=16,
            activation="relu",
            position_offset=2,
            norm_first=False,
            last_norm=False,
            pad_token_id=1,
            eos_token_id=(2,),
        ),
        "opt-125m": _opt(768, 12, 12),
        "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        "opt-1.3b": _opt(2048, 24, 32),
        "opt-6.7b": _opt(4096, 32, 32),
    },
    "gpt_j": {
        "tiny": Config(
            "gpt_j",
            hidden_size=32,
            embedding_size=32,
            position_offset=None,
            rotary_dim=4,
            parallel=True,
            attention_bias=False,
            head_bias=True,
            tie_embeddings=False,
            eos_token_id=(1,),
        ),
        "gpt-j-6b": config_from_official("gpt_j", {}),
    },
}

_COUNTS = {"gpt2": {"gpt2": 124_439_808}, "opt": {"opt-125m": 125_239_296}, "gpt_j": {"gpt-j-6b": 6_050_882_784}}

_MODULES = {"gpt2": ("gpt2", "GPT2LMHeadModel"), "opt": ("opt", "OPTForCausalLM"), "gpt_j": ("gptj", "GPTJForCausalLM")}

BACKBONES = {
    family: Backbone(
        name=family,
        model=Model,
        configs=_CONFIGS[family],
        example=example,
        cache=empty_cache,
        parameter_counts=_COUNTS[family],
        officials=(
            Official(
                module=f"models/{folder}/modeling_{folder}.py:{name}",
                config=partial(config_from_official, family),
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                prefix="model." if family == "opt" else "transformer.",
                ignored=(r"\.attn\.(masked_)?bias$",),
            ),
        ),
    )
    for family, (folder, name) in _MODULES.items()
}
