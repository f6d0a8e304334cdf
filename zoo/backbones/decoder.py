"""The Llama family: Llama, Mistral, Qwen2, Qwen3, Phi-3 and Gemma 3 as configurations of one decoder.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/{llama,mistral,qwen2,qwen3,phi3,gemma3}.
Papers: Llama arXiv:2302.13971, Mistral arXiv:2310.06825, Qwen2 arXiv:2407.10671, Qwen3 arXiv:2505.09388, Phi-3
arXiv:2404.14219, Gemma 3 arXiv:2503.19786.
What they share: RMS norm before each block, rotary positions, grouped queries, a gated MLP, no dropout. What differs is
a field of `Config`. Differs from the official code: positions count from the first real token of a row, so that padding
on the left changes nothing either (the bridge gives it the official positions); the scalings of rotary positions that
depend on the length count each row by itself; Gemma's attention soft cap, which its code reads and never applies, is
left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
from zoo.backbones.rope import Rope, rope_from_hub, rope_to_hub, rotary_angles
from zoo.blocks import Linear, RMSNorm, stack
from zoo.blocks.basic import activation_function
from zoo.paper import Official
from zoo.weights.table import Row, Table, layer_norm, linear, parameter, shared, split_rows

__all__ = ["BACKBONES", "Config", "Model", "config_from_official", "config_to_official", "official_table"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str  # llama | mistral | qwen2 | qwen3 | phi3 | gemma3: whose names and settings the weights have
    vocab_size: int = 64
    hidden_size: int = 32  # width of a token
    intermediate_size: int = 48  # width inside the MLP
    num_layers: int = 2
    num_heads: int = 4  # of queries
    num_key_heads: int = 2  # of keys and values, a divisor of num_heads
    head_dim: int = 8
    activation: str = "silu"  # of the MLP's gate
    norm_epsilon: float = 1e-6  # added to the mean square under the root
    max_positions: int = 64  # the longest sequence the weights are meant for; no limit of the code
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None  # of the layers with a window, where theirs differ
    window: int | None = None  # keys that a query of a windowed layer sees, itself among them
    windowed: tuple[bool, ...] = ()  # which layers have the window; () stands for none
    query_bias: bool = False  # biases of the projections to query, key and value
    output_bias: bool = False  # of the projection out of attention
    mlp_bias: bool = False
    query_key_norm: bool = False  # RMS norm of every query and key head before the rotation
    query_scale: float | None = None  # of the scores; None is 1 / sqrt(head_dim)
    output_norms: bool = False  # each block's output is normalised too, before it is added
    unit_offset: bool = False  # norms store their scale less one
    scale_embeddings: bool = False  # tokens enter multiplied by sqrt(hidden_size)
    tie_embeddings: bool = False  # the output layer is the embedding
    logit_soft_cap: float | None = None  # c: logits are c tanh(logits / c)
    bidirectional: bool = False  # every token sees every other, inside the window on both sides where there is one
    pad_token_id: int | None = None  # its embedding gets no gradient, as in torch
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # tokens that end a generated text

    def __post_init__(self):
        if self.num_heads % self.num_key_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_key_heads {self.num_key_heads}")
        if self.windowed and len(self.windowed) != self.num_layers:
            raise ValueError(f"windowed names {len(self.windowed)} layers of {self.num_layers}")
        if any(self.windowed) and self.window is None:
            raise ValueError("windowed layers need a window")

    def is_windowed(self, layer: int) -> bool:
        return bool(self.windowed) and self.windowed[layer]


class _View(NamedTuple):
    """What a layer needs to know of positions and padding."""

    angles: Float[Array, "*B L F"]
    mask: Mask | None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: Config
    hook: AttentionHook
    layer: Layer
    rope: Rope

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], view: _View, cache: KeyValueCache | None
    ) -> tuple[Float[Array, "B L D"], KeyValueCache | None]:
        c = self.config

        def heads(name: str, count: int) -> Float[Array, "B L _ Dh"]:
            projected = Linear(count * c.head_dim, use_bias=c.query_bias, name=name)(x)
            return projected.reshape(*x.shape[:-1], count, c.head_dim)

        query, key, value = (
            heads("query", c.num_heads), heads("key", c.num_key_heads), heads("value", c.num_key_heads)
        )  # fmt: skip
        if c.query_key_norm:
            query = RMSNorm(c.norm_epsilon, c.unit_offset, name="query_norm")(query)
            key = RMSNorm(c.norm_epsilon, c.unit_offset, name="key_norm")(key)
        query, key = (
            layers.apply_rope(head, view.angles, attention_factor=self.rope.attention_factor) for head in (query, key)
        )
        if cache is not None:
            cache = layers.extend_cache(cache, key, value)
            key, value = cache.key, cache.value
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=view.mask, scale=c.query_scale)
        return Linear(c.hidden_size, use_bias=c.output_bias, name="out")(mixed.reshape(*x.shape[:-1], -1)), cache


class GatedMLP(nn.Module):
    """W_down (activation(W_gate x) * W_up x)."""

    hidden: int  # width inside
    activation: str = "silu"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        gate, up = (Linear(self.hidden, use_bias=self.use_bias, name=name)(x) for name in ("gate", "up"))
        inside = activation_function(self.activation)(gate) * up
        return Linear(x.shape[-1], use_bias=self.use_bias, name="down")(inside)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); with a cache it gives back the cache as well."""

    config: Config
    hook: AttentionHook
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, views: Mapping[bool, _View], cache: KeyValueCache | None = None):
        c, windowed = self.config, self.config.is_windowed(self.index)
        show(self, "hidden_states", "input", x)

        def norm(name: str, y: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
            return RMSNorm(c.norm_epsilon, c.unit_offset, name=name)(y)

        layer = Layer(self.index, f"layers_{self.index}/attention")
        rope = c.local_rope if windowed and c.local_rope is not None else c.rope
        attention = Attention(c, self.hook, layer, rope, name="attention")
        mixed, new_cache = attention(norm("attention_norm", x), views[windowed], cache)
        x = x + (norm("attention_output_norm", mixed) if c.output_norms else mixed)
        hidden = GatedMLP(c.intermediate_size, c.activation, c.mlp_bias, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("mlp_output_norm", hidden) if c.output_norms else hidden)
        return x if cache is None else (x, new_cache)


class Model(nn.Module):
    """Tokens to logits. `cache` makes it a step of decoding: see `zoo.backbones.generation`."""

    config: Config
    attention: AttentionHook = plain_attention

    def setup(self):
        self.embedding = nn.Embed(self.config.vocab_size, self.config.hidden_size)

    def embed(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """What enters the first layer, for callers that put other things (images) between the tokens."""
        c = self.config
        x = causal.embed(self.embedding, input_ids, c.pad_token_id)
        return x * jnp.asarray(c.hidden_size**0.5, x.dtype) if c.scale_embeddings else x

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        *,
        embeddings: Float[Array, "B L D"] | None = None,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        angles: Float[Array, "B L F"] | None = None,
        cache: causal.Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> causal.Output:
        """`attention_mask` is 1 at real tokens; without a cache padding may be anywhere, with one it is at the end.

        `embeddings` stand in for `input_ids`, `positions` for those that the mask implies, `angles` for the rotation
        that positions imply. `logits_at` gives the logits of one place a row only, (B, 1, V).
        """
        c = self.config
        x = self.embed(input_ids) if embeddings is None else embeddings
        present = None if attention_mask is None else attention_mask.astype(bool)
        offset = None if cache is None else cache[0].length
        views = self.views(x.shape[:2], present, positions, angles, offset)
        if cache is None:
            for first, count in causal.runs(c.num_layers, c.is_windowed, self.attention):
                make = partial(DecoderLayer, c, self.attention, first)
                x = stack(self, make, count, x, first=first, views=views)
        else:
            extended = []
            for index in range(c.num_layers):
                layer = DecoderLayer(c, self.attention, index, name=f"layers_{index}")
                x, grown = layer(x, views=views, cache=cache[index])
                extended.append(causal.settled(grown, cache[index], present))
            cache = tuple(extended)
        x = RMSNorm(c.norm_epsilon, c.unit_offset, name="norm")(x)
        show(self, "hidden_states", "last", x)
        logits = causal.read_out(x, self.embedding if c.tie_embeddings else None, c.vocab_size, logits_at)
        if c.logit_soft_cap is not None:
            logits = c.logit_soft_cap * jnp.tanh(logits / c.logit_soft_cap)
        return causal.Output(logits, x, cache)

    def views(self, shape, present, positions, angles, offset) -> dict[bool, _View]:
        """What layers without (False) and with (True) a window see."""
        c = self.config
        positions, lengths = causal.padding_positions(shape, present, positions, offset)
        views = {}
        for windowed in {c.is_windowed(i) for i in range(c.num_layers)}:
            rope = c.local_rope if windowed and c.local_rope is not None else c.rope
            turned = rotary_angles(rope, c.head_dim, positions, lengths) if angles is None else angles
            window = c.window if windowed else None
            mask = causal.visible_keys(present, offset, window=window, bidirectional=c.bidirectional)
            views[windowed] = _View(turned, mask)
        return views


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> causal.Cache:
    """Room for `capacity` tokens a row."""
    return causal.empty_cache(
        config.num_layers, config.num_key_heads, config.head_dim, batch_size=batch_size, capacity=capacity, dtype=dtype
    )


def example(config: Config, *, batch_size: int, key: jax.Array, length: int = 8) -> dict[str, jax.Array]:
    return {"input_ids": jax.random.randint(key, (batch_size, length), 0, config.vocab_size)}


# --- the official code ---------------------------------------------------------------------------------------------

_SIZES = {  # theirs -> (ours, their default), the same in all families
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
}

_DEFAULTS: dict[str, dict[str, Any]] = {  # of the official constructors
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
                "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "hidden_act": "silu",
              "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_sliding_window": False,
              "sliding_window": 4096, "max_window_layers": 28, "layer_types": None},
    "phi3": {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
             "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
             "tie_word_embeddings": False, "pad_token_id": 32000, "bos_token_id": 1, "eos_token_id": 32000,
             "sliding_window": None},
    "gemma3": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
               "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
               "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
               "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
               "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
               "sliding_window_pattern": 6, "final_logit_softcapping": None, "use_bidirectional_attention": False},
}  # fmt: skip
_DEFAULTS["qwen3"] = _DEFAULTS["qwen2"] | {"head_dim": 128, "attention_bias": False}


def config_from_official(family: str, hparams: Mapping[str, Any]) -> Config:
    h = _DEFAULTS[family] | dict(hparams)
    values: dict[str, Any] = {ours: h[theirs] for theirs, ours in _SIZES.items()}
    heads = h["num_attention_heads"]
    values["num_key_heads"] = heads if h["num_key_value_heads"] is None else h["num_key_value_heads"]
    values["head_dim"] = h["hidden_size"] // heads if h["head_dim"] is None else h["head_dim"]
    values["activation"] = activation_from_hub(h["hidden_activation" if family == "gemma3" else "hidden_act"])
    values["eos_token_id"] = end_tokens_from_hub(h["eos_token_id"])
    bias = bool(h.get("attention_bias", family == "qwen2"))
    values |= {"query_bias": bias, "output_bias": bias and family != "qwen2", "mlp_bias": bool(h.get("mlp_bias"))}
    values["query_key_norm"] = family in ("qwen3", "gemma3")
    if family == "gemma3":
        values |= {
            "query_scale": h["query_pre_attn_scalar"] ** -0.5, "output_norms": True, "unit_offset": True,
            "scale_embeddings": True, "logit_soft_cap": h["final_logit_softcapping"],
            "bidirectional": bool(h["use_bidirectional_attention"]),
        }  # fmt: skip
    return Config(family=family, **values, **_window(family, h), **_ropes(family, h))


def _window(family: str, h: Mapping[str, Any]) -> dict[str, Any]:
    count, window = h["num_hidden_layers"], h.get("sliding_window")
    if family in ("qwen2", "qwen3"):
        if not h["use_sliding_window"] or window is None:
            return {}
        types = h["layer_types"]
        windowed = [
            i >= h["max_window_layers"] if types is None else types[i] == "sliding_attention" for i in range(count)
        ]
    elif family == "gemma3":
        pattern, types = h["sliding_window_pattern"], h["layer_types"]
        windowed = [bool((i + 1) % pattern) if types is None else types[i] == "sliding_attention" for i in range(count)]
        if h["use_bidirectional_attention"]:
            window = window // 2 + 1
    else:
        windowed = [window is not None] * count
    return {"window": window, "windowed": tuple(windowed)} if any(windowed) else {}


def _ropes(family: str, h: Mapping[str, Any]) -> dict[str, Rope]:
    parameters = dict(h.get("rope_scaling") or h.get("rope_parameters") or {})
    read = partial(rope_from_hub, max_positions=h["max_position_embeddings"])
    theta = h.get("rope_theta") or (1_000_000.0 if family == "gemma3" else 10_000.0)
    if family == "gemma3":
        nested = "full_attention" in parameters or "sliding_attention" in parameters
        everywhere = (parameters.get("full_attention") if nested else parameters) or {}
        local = (parameters.get("sliding_attention") if nested else None) or {}
        local_theta = h.get("rope_local_base_freq") or 10_000.0
        return {"rope": read(everywhere, theta=theta), "local_rope": read(local, theta=local_theta)}
    if family == "phi3":
        if parameters.get("rope_type", parameters.get("type")) in ("su", "yarn"):  # what longrope was called before
            parameters |= {"rope_type": "longrope"}
        parameters["original_max_position_embeddings"] = h["original_max_position_embeddings"]
        return {"rope": read(parameters, theta=theta, partial=h.get("partial_rotary_factor"))}
    rope = read(parameters, theta=theta, partial=h.get("partial_rotary_factor"))
    # Only Phi-3 rotates part of a head when nothing is scaled.
    return {"rope": Rope(rope_theta=rope.rope_theta) if rope.rope_type == "default" else rope}


def config_to_official(c: Config) -> dict[str, Any]:
    family = c.family
    h: dict[str, Any] = {theirs: getattr(c, ours) for theirs, ours in _SIZES.items()}
    h |= {"num_key_value_heads": c.num_key_heads, "head_dim": c.head_dim, "rope_parameters": rope_to_hub(c.rope)}
    h["hidden_activation" if family == "gemma3" else "hidden_act"] = activation_to_hub(c.activation)
    h["eos_token_id"] = end_tokens_to_hub(c.eos_token_id)
    if "attention_bias" in _DEFAULTS[family]:
        h["attention_bias"] = c.query_bias
    if family == "llama":
        h["mlp_bias"] = c.mlp_bias
    else:
        h["sliding_window"] = c.window
    if "layer_types" in _DEFAULTS[family]:
        windowed = c.windowed or (False,) * c.num_layers
        h["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windowed]
    if family in ("qwen2", "qwen3"):
        h["use_sliding_window"] = c.window is not None
    if family == "phi3":
        h["original_max_position_embeddings"] = c.rope.original_max_position_embeddings or c.max_positions
        h["partial_rotary_factor"] = c.rope.partial_rotary_factor
    if family == "gemma3":
        h |= {
            "query_pre_attn_scalar": _whole(round((c.query_scale or c.head_dim**-0.5) ** -2, 6)),
            "final_logit_softcapping": c.logit_soft_cap,
            "use_bidirectional_attention": c.bidirectional,
            "rope_parameters": {
                "full_attention": rope_to_hub(c.rope),
                "sliding_attention": rope_to_hub(c.local_rope or c.rope),
            },
        }
        if c.bidirectional and c.window is not None:
            h["sliding_window"] = 2 * (c.window - 1)
    return h


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def official_table(c: Config, prefix: str = "model", head: str = "lm_head", ours: str = "") -> Table:
    """`prefix` and `head` are the official names of the decoder and of its output layer, `ours` is the path of ours,
    ending in a slash: for models that have this one inside."""
    heads, keys = c.num_heads * c.head_dim, c.num_key_heads * c.head_dim
    embedding = f"{prefix}.embed_tokens.weight", f"{ours}embedding/embedding"
    if c.tie_embeddings:
        yield from shared((embedding[0], f"{head}.weight"), embedding[1])
    else:
        yield from parameter(*embedding)
        yield from linear(head, f"{ours}head", bias=False)
    for i in range(c.num_layers):
        theirs, layer = f"{prefix}.layers.{i}", f"{ours}layers_{i}"
        attention = f"{layer}/attention"
        if c.family == "phi3":
            fused = f"{theirs}.self_attn.qkv_proj.weight", f"{theirs}.mlp.gate_up_proj.weight"
            parts = tuple(f"params/{attention}/{name}/kernel" for name in ("query", "key", "value"))
            yield Row((fused[0],), parts, split_rows(heads, keys, keys))
            halves = tuple(f"params/{layer}/mlp/{name}/kernel" for name in ("gate", "up"))
            yield Row((fused[1],), halves, split_rows(c.intermediate_size, c.intermediate_size))
        else:
            for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
                yield from linear(f"{theirs}.self_attn.{letter}_proj", f"{attention}/{name}", bias=c.query_bias)
            for name in ("gate", "up"):
                yield from linear(f"{theirs}.mlp.{name}_proj", f"{layer}/mlp/{name}", bias=c.mlp_bias)
        yield from linear(f"{theirs}.self_attn.o_proj", f"{attention}/out", bias=c.output_bias)
        yield from linear(f"{theirs}.mlp.down_proj", f"{layer}/mlp/down", bias=c.mlp_bias)
        if c.query_key_norm:
            yield from layer_norm(f"{theirs}.self_attn.q_norm", f"{attention}/query_norm", bias=False)
            yield from layer_norm(f"{theirs}.self_attn.k_norm", f"{attention}/key_norm", bias=False)
        norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
        if c.output_norms:
            norms = {
                "input_layernorm": "attention_norm", "post_attention_layernorm": "attention_output_norm",
                "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_output_norm",
            }  # fmt: skip
        for name, own in norms.items():
            yield from layer_norm(f"{theirs}.{name}", f"{layer}/{own}", bias=False)
    yield from layer_norm(f"{prefix}.norm", f"{ours}norm", bias=False)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    ids = inputs["input_ids"]
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)  # the official code's, whatever the mask
    positions = inputs.get("position_ids", places)
    output = model.apply(variables, ids, attention_mask=inputs.get("attention_mask"), positions=positions)
    return {"logits": output.logits}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(family: str, **sizes: Any) -> Config:
    return config_from_official(family, sizes)


def _llama3(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
           "bos_token_id": 128000, "eos_token_id": 128001}  # fmt: skip
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "bos_token_id": 151643, "eos_token_id": 151645,
         "rope_theta": 1e6}  # fmt: skip
_GEMMA = {"vocab_size": 262144, "max_position_embeddings": 32768, "head_dim": 256, "rope_theta": 1e6}

_CONFIGS: dict[str, dict[str, Config]] = {
    "llama": {
        "tiny": Config("llama", eos_token_id=(2,)),
        "llama-2-7b": _named("llama", max_position_embeddings=4096, rms_norm_eps=1e-5),
        "llama-3-8b": _named("llama", **_LLAMA3 | {"max_position_embeddings": 8192}, hidden_size=4096,
                             intermediate_size=14336, rope_theta=500000.0),
        "llama-3.1-8b": _named("llama", **_LLAMA3, hidden_size=4096, intermediate_size=14336,
                               rope_scaling=_llama3(8.0)),
        "llama-3.2-1b": _named("llama", **_LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                               head_dim=64, tie_word_embeddings=True, rope_scaling=_llama3(32.0)),
        "llama-3.2-3b": _named("llama", **_LLAMA3, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                               num_attention_heads=24, head_dim=128, tie_word_embeddings=True,
                               rope_scaling=_llama3(32.0)),
        "tinyllama-1.1b": _named("llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                                 num_key_value_heads=4, rms_norm_eps=1e-5),
        "smollm2-135m": _named("llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                               num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                               max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0,
                               tie_word_embeddings=True, bos_token_id=0, eos_token_id=0),
    },
    "mistral": {
        "tiny": Config("mistral", window=4, windowed=(True, True), eos_token_id=(2,)),
        "mistral-7b-v0.1": _named("mistral", max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096),
        "mistral-7b-v0.3": _named("mistral", vocab_size=32768, max_position_embeddings=32768, rms_norm_eps=1e-5,
                                  sliding_window=None, rope_theta=1e6),
    },
    "qwen2": {
        "tiny": Config("qwen2", query_bias=True, tie_embeddings=True, eos_token_id=(2,)),
        "qwen2-0.5b": _named("qwen2", **_QWEN | {"max_position_embeddings": 131072, "eos_token_id": 151643},
                             hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                             num_key_value_heads=2, tie_word_embeddings=True),
        "qwen2-1.5b": _named("qwen2", **_QWEN | {"max_position_embeddings": 131072, "eos_token_id": 151643},
                             hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                             num_key_value_heads=2, tie_word_embeddings=True),
        "qwen2-7b": _named("qwen2", **_QWEN | {"max_position_embeddings": 131072, "eos_token_id": 151643},
                           vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                           num_attention_heads=28, num_key_value_heads=4),
        "qwen2.5-0.5b-instruct": _named("qwen2", **_QWEN, hidden_size=896, intermediate_size=4864,
                                        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                                        tie_word_embeddings=True),
    },
    "qwen3": {
        "tiny": Config("qwen3", head_dim=12, query_key_norm=True, tie_embeddings=True, eos_token_id=(2,)),
        "qwen3-0.6b": _named("qwen3", **_QWEN | {"max_position_embeddings": 40960}, hidden_size=1024,
                             intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                             num_key_value_heads=8, tie_word_embeddings=True),
        "qwen3-1.7b": _named("qwen3", **_QWEN | {"max_position_embeddings": 40960}, hidden_size=2048,
                             intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                             num_key_value_heads=8, tie_word_embeddings=True),
        "qwen3-8b": _named("qwen3", **_QWEN | {"max_position_embeddings": 40960}, hidden_size=4096,
                           intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                           num_key_value_heads=8),
    },
    "phi3": {
        "tiny": Config("phi3", rope=Rope(partial_rotary_factor=0.5), eos_token_id=(2,)),
        "phi-3-mini-4k-instruct": _named("phi3", sliding_window=2047),
        "phi-4-mini-instruct": _named("phi3", vocab_size=200064, hidden_size=3072, num_attention_heads=24,
                                      num_key_value_heads=8, tie_word_embeddings=True, partial_rotary_factor=0.75,
                                      bos_token_id=199999, eos_token_id=199999, pad_token_id=199999),
    },
    "gemma3": {
        "tiny": Config("gemma3", num_layers=3, activation="gelu_tanh", query_key_norm=True, query_scale=8**-0.5,
                       output_norms=True, unit_offset=True, scale_embeddings=True, tie_embeddings=True, window=4,
                       windowed=(True, True, False), rope=Rope(rope_theta=1e6), local_rope=Rope(), pad_token_id=0,
                       eos_token_id=(1,)),
        "gemma-3-270m": _named("gemma3", **_GEMMA, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
                               num_attention_heads=4, num_key_value_heads=1, sliding_window=512),
        "gemma-3-1b-pt": _named("gemma3", **_GEMMA, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
                                num_attention_heads=4, num_key_value_heads=1, sliding_window=512),
    },
}  # fmt: skip

_COUNTS = {  # of the published checkpoints
    "llama": {"llama-3.2-1b": 1_235_814_400},
    "mistral": {"mistral-7b-v0.1": 7_241_732_096},
    "qwen2": {"qwen2-0.5b": 494_032_768},
    "qwen3": {"qwen3-0.6b": 596_049_920},
    "phi3": {"phi-3-mini-4k-instruct": 3_821_079_552},
    "gemma3": {"gemma-3-270m": 268_098_176},
}

_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma3": "Gemma3",
}

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
                module=f"models/{family}/modeling_{family}.py:{prefix}ForCausalLM",
                config=partial(config_from_official, family),
                hparams=config_to_official,
                table=official_table,
                call=official_call,
                ignored=(r"rotary_emb\.inv_freq$",),
            ),
        ),
    )
    for family, prefix in _CLASSES.items()
}
