"""Qwen3-Next: three layers of the gated delta rule for each one of gated attention, and a mixture of experts.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/qwen3_next. Qwen team, 2025; Gated DeltaNet
arXiv:2412.06464, the gate of attention arXiv:2505.06708.
Layers of the delta rule remember a state of fixed size, only those of attention remember keys and values. A token is
sent through a few experts, and through a shared one that has a gate of its own.
Differs from the official code: positions count from the first real token of a row, so that padding on the left changes
nothing (the bridge gives it the official positions); padding at the end leaves no trace in the cache. The layers for
predicting several tokens at once, which its files hold and its code does not read, are left out.
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
from zoo.backbones.decoder import GatedMLP
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention, show
from zoo.backbones.naming import activation_from_hub, activation_to_hub, end_tokens_from_hub, end_tokens_to_hub
from zoo.backbones.rope import Rope, rope_from_hub, rope_to_hub, rotary_angles
from zoo.blocks import CausalConv, Linear, RMSNorm, stack
from zoo.blocks.basic import activation_function
from zoo.paper import Official
from zoo.weights.table import (
    Row,
    Table,
    Transform,
    conv,
    end_to_end,
    layer_norm,
    linear,
    parameter,
    permute,
    shared,
    split_columns,
    split_heads,
    squeezed,
)

__all__ = ["BACKBONES", "Config", "DeltaState", "Model"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    vocab_size: int = 64
    hidden_size: int = 32  # width of a token
    num_layers: int = 2
    recurrent: tuple[bool, ...] = (True, False)  # layers of the delta rule; the others are attention
    sparse: tuple[bool, ...] = (False, True)  # layers with experts; the others have one MLP
    num_heads: int = 2  # of queries
    num_key_heads: int = 1  # of keys and values, a divisor of num_heads
    head_dim: int = 16
    attention_bias: bool = False  # of the projections of attention
    delta_value_heads: int = 4  # heads of the delta rule
    delta_key_heads: int = 2  # a divisor of these: neighbouring heads share queries and keys
    delta_key_dim: int = 16
    delta_value_dim: int = 8
    conv_width: int = 4  # taps of the convolution before the delta rule
    intermediate_size: int = 32  # width inside the MLP of layers without experts
    num_experts: int = 4
    experts_per_token: int = 2
    expert_size: int = 12  # width inside an expert
    shared_expert_size: int = 16  # width inside the one that every token passes
    renormalize: bool = True  # the weights of the chosen experts add up to 1
    activation: str = "silu"  # of the gates of MLPs and experts, and after the convolution
    norm_epsilon: float = 1e-6  # added to the mean square under the root
    max_positions: int = 64  # the longest sequence the weights are meant for; no limit of the code
    rope: Rope = field(default_factory=lambda: Rope(partial_rotary_factor=0.25))
    tie_embeddings: bool = False  # the output layer is the embedding
    pad_token_id: int | None = None  # its embedding gets no gradient, as in torch
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # tokens that end a generated text

    def __post_init__(self):
        for heads, keys in (("num_heads", "num_key_heads"), ("delta_value_heads", "delta_key_heads")):
            if getattr(self, heads) % getattr(self, keys):
                raise ValueError(f"{heads} {getattr(self, heads)} is not a multiple of {keys} {getattr(self, keys)}")
        for name in ("recurrent", "sparse"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"{name} names {len(getattr(self, name))} layers of {self.num_layers}")

    @property
    def delta_sizes(self) -> tuple[int, int]:
        """Widths of all keys and of all values of the delta rule."""
        return self.delta_key_heads * self.delta_key_dim, self.delta_value_heads * self.delta_value_dim


class DeltaState(NamedTuple):
    """What a layer of the delta rule remembers: the last inputs of its convolution, and a matrix a head."""

    window: Float[Array, "B P E"]
    hidden: Float[Array, "B H K V"]


class _View(NamedTuple):
    """What a layer needs to know of positions and padding."""

    present: Bool[Array, "B L"] | None
    angles: Float[Array, "*B L F"]
    mask: Mask | None


def _unit(x: Float[Array, "B L H K"], epsilon: float = 1e-6) -> Float[Array, "B L H K"]:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + epsilon)


class GatedDeltaNet(nn.Module):
    """W_out (norm(delta rule(q, k, v)) * SiLU(z)), with [q, k, v] through a causal convolution and q, k of length 1.

    The decays are exp(-exp(A) softplus(a + b)) and the writing strengths sigmoid(w), with a, w linear in x.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], view: _View, state: DeltaState | None
    ) -> tuple[Float[Array, "B L D"], DeltaState]:
        c, present = self.config, view.present
        keys, values = c.delta_sizes
        if present is not None:
            x = jnp.where(present[..., None], x, 0)
        window, hidden = state or (None, None)
        project = {name: Linear(size, use_bias=False, name=name) for name, size in (
            ("query", keys), ("key", keys), ("value", values), ("gate", values), ("write", c.delta_value_heads),
            ("decay", c.delta_value_heads),
        )}  # fmt: skip
        joined = jnp.concatenate([project[name](x) for name in ("query", "key", "value")], axis=-1)
        joined, window = CausalConv(c.conv_width, c.activation, use_bias=False, name="conv1d")(joined, window, present)
        query, key, value = jnp.split(joined, (keys, 2 * keys), axis=-1)
        query, key = (_unit(y.reshape(*y.shape[:2], c.delta_key_heads, -1)) for y in (query, key))
        query, key = (jnp.repeat(y, c.delta_value_heads // c.delta_key_heads, axis=2) for y in (query, key))
        value, gate = (y.reshape(*y.shape[:2], c.delta_value_heads, -1) for y in (value, project["gate"](x)))
        write = jax.nn.sigmoid(project["write"](x).astype(jnp.float32))
        log_rates = self.param("A_log", _log_rates, (c.delta_value_heads,)).astype(jnp.float32)
        bias = self.param("dt_bias", nn.initializers.ones, (c.delta_value_heads,)).astype(jnp.float32)
        log_decay = -jnp.exp(log_rates) * jax.nn.softplus(project["decay"](x).astype(jnp.float32) + bias)
        if present is not None and state is not None:
            # Without a state nobody reads what padding at the end leaves, and padding before writes keys of 0.
            write, log_decay = (jnp.where(present[..., None], y, 0) for y in (write, log_decay))
        mixed, hidden = layers.delta_rule(query, key, value, write, log_decay, initial_state=hidden, return_state=True)
        mixed = RMSNorm(c.norm_epsilon, name="norm")(mixed) * jax.nn.silu(gate)
        mixed = Linear(x.shape[-1], use_bias=False, name="out")(mixed.reshape(*x.shape[:2], -1))
        return mixed, DeltaState(window, hidden)


def _log_rates(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-3, 16.0))


class GatedAttention(nn.Module):
    """W_out (attention * sigmoid(gate)): grouped queries, normalised, a part of each head rotated."""

    config: Config
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], view: _View, cache: KeyValueCache | None
    ) -> tuple[Float[Array, "B L D"], KeyValueCache | None]:
        c = self.config

        def heads(name: str, count: int) -> Float[Array, "B L _ Dh"]:
            projected = Linear(count * c.head_dim, use_bias=c.attention_bias, name=name)(x)
            return projected.reshape(*x.shape[:-1], count, c.head_dim)

        query, gate = heads("query", c.num_heads), heads("gate", c.num_heads)
        key, value = heads("key", c.num_key_heads), heads("value", c.num_key_heads)
        query = RMSNorm(c.norm_epsilon, unit_offset=True, name="query_norm")(query)
        key = RMSNorm(c.norm_epsilon, unit_offset=True, name="key_norm")(key)
        query, key = (layers.apply_rope(y, view.angles, attention_factor=c.rope.attention_factor) for y in (query, key))
        if cache is not None:
            cache = layers.extend_cache(cache, key, value)
            key, value = cache.key, cache.value
        mixed = attend(self, self.hook, self.layer, query, key, value, mask=view.mask) * jax.nn.sigmoid(gate)
        mixed = Linear(x.shape[-1], use_bias=c.attention_bias, name="out")(mixed.reshape(*x.shape[:-1], -1))
        return mixed, cache


class Experts(nn.Module):
    """sum_e w_e down_e (activation(gate_e x) * up_e x) over the experts that each token is sent to.

    Tokens are sorted by their experts, so that an expert is one matrix product with as many rows as it has tokens.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "T D"], chosen: Int[Array, "T K"], weights: Float[Array, "T K"]
    ) -> Float[Array, "T D"]:
        c, width = self.config, x.shape[-1]
        start = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        shape = (c.num_experts, width, c.expert_size)
        into = [self.param(f"{name}_kernel", start, shape).astype(x.dtype) for name in ("gate", "up")]
        out = self.param("down_kernel", start, (shape[0], shape[2], shape[1])).astype(x.dtype)
        order = jnp.argsort(chosen.reshape(-1))
        token, counts = order // c.experts_per_token, jnp.bincount(chosen.reshape(-1), length=c.num_experts)
        gate, up = (jax.lax.ragged_dot(x[token], kernel, counts) for kernel in into)
        results = jax.lax.ragged_dot(activation_function(c.activation)(gate) * up, out, counts)
        weighted = results * weights.reshape(-1)[order, None].astype(x.dtype)
        return jnp.zeros_like(x).at[token].add(weighted)


class SparseMLP(nn.Module):
    """The chosen experts of each token, and the shared expert times sigmoid(g . x)."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c, flat = self.config, x.reshape(-1, x.shape[-1])
        logits = Linear(c.num_experts, use_bias=False, name="router")(flat)
        shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(shares, c.experts_per_token)
        if c.renormalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        mixed = Experts(c, name="experts")(flat, chosen, weights).reshape(x.shape)
        shared = GatedMLP(c.shared_expert_size, c.activation, name="shared_expert")(x)
        direction = self.param("shared_gate", nn.initializers.normal(0.02), (x.shape[-1],)).astype(x.dtype)
        return mixed + jax.nn.sigmoid(x @ direction)[..., None] * shared


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)); with a cache it gives back the cache as well."""

    config: Config
    hook: AttentionHook
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, view: _View, cache: Any = None):
        c = self.config
        show(self, "hidden_states", "input", x)
        if c.recurrent[self.index]:
            mixer = GatedDeltaNet(c, name="delta")
        else:
            layer = Layer(self.index, f"layers_{self.index}/attention")
            mixer = GatedAttention(c, self.hook, layer, name="attention")
        mixed, new_cache = mixer(RMSNorm(c.norm_epsilon, unit_offset=True, name="mixer_norm")(x), view, cache)
        x = x + mixed
        sparse = c.sparse[self.index]
        mlp = SparseMLP(c, name="mlp") if sparse else GatedMLP(c.intermediate_size, c.activation, name="mlp")
        x = x + mlp(RMSNorm(c.norm_epsilon, unit_offset=True, name="mlp_norm")(x))
        return x if cache is None else (x, new_cache)


class Model(nn.Module):
    """Tokens to logits. `cache` makes it a step of decoding: see `zoo.backbones.generation`."""

    config: Config
    attention: AttentionHook = plain_attention

    def setup(self):
        self.embedding = nn.Embed(self.config.vocab_size, self.config.hidden_size)

    def embed(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """What enters the first layer, for callers that put other things between the tokens."""
        return causal.embed(self.embedding, input_ids, self.config.pad_token_id)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        *,
        embeddings: Float[Array, "B L D"] | None = None,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        cache: causal.Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> causal.Output:
        """`attention_mask` is 1 at real tokens; without a cache padding may be on either side, with one it is at the
        end. `embeddings` stand in for `input_ids`, `positions` for those that the mask implies. `logits_at` gives the
        logits of one place a row only, (B, 1, V).
        """
        c = self.config
        x = self.embed(input_ids) if embeddings is None else embeddings
        present = None if attention_mask is None else attention_mask.astype(bool)
        # Only attention knows how many tokens there were; nothing else asks.
        offset = next((layer.length for layer in cache or () if isinstance(layer, KeyValueCache)), None)
        places, lengths = causal.padding_positions(x.shape[:2], present, positions, offset)
        mask = causal.visible_keys(present, offset)
        view = _View(present, rotary_angles(c.rope, c.head_dim, places, lengths), mask)
        if cache is None:
            kinds = list(zip(c.recurrent, c.sparse, strict=True))
            for first, count in causal.runs(c.num_layers, kinds.__getitem__, self.attention):
                x = stack(self, partial(DecoderLayer, c, self.attention, first), count, x, first=first, view=view)
        else:
            extended = []
            for index, before in enumerate(cache):
                layer = DecoderLayer(c, self.attention, index, name=f"layers_{index}")
                x, grown = layer(x, view=view, cache=before)
                extended.append(grown if c.recurrent[index] else causal.settled(grown, before, present))
            cache = tuple(extended)
        x = RMSNorm(c.norm_epsilon, unit_offset=True, name="norm")(x)
        show(self, "hidden_states", "last", x)
        logits = causal.read_out(x, self.embedding if c.tie_embeddings else None, c.vocab_size, logits_at)
        return causal.Output(logits, x, cache)


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> causal.Cache:
    """Room for `capacity` tokens a row in layers of attention, a state of fixed size in the others."""
    c = config
    keys, values = c.delta_sizes
    hidden = (batch_size, c.delta_value_heads, c.delta_key_dim, c.delta_value_dim)
    return tuple(
        DeltaState(jnp.zeros((batch_size, c.conv_width - 1, 2 * keys + values), dtype), jnp.zeros(hidden))
        if recurrent
        else layers.empty_cache(batch_size, capacity, c.num_key_heads, c.head_dim, dtype=jnp.dtype(dtype))
        for recurrent in c.recurrent
    )


def example(config: Config, *, batch_size: int, key: jax.Array, length: int = 8) -> dict[str, jax.Array]:
    return {"input_ids": jax.random.randint(key, (batch_size, length), 0, config.vocab_size)}


# --- the official code ---------------------------------------------------------------------------------------------

_FIELDS = {  # theirs -> (ours, their default)
    "vocab_size": ("vocab_size", 151936),
    "hidden_size": ("hidden_size", 2048),
    "intermediate_size": ("intermediate_size", 5632),
    "num_hidden_layers": ("num_layers", 48),
    "num_attention_heads": ("num_heads", 16),
    "num_key_value_heads": ("num_key_heads", 2),
    "head_dim": ("head_dim", 256),
    "attention_bias": ("attention_bias", False),
    "linear_num_value_heads": ("delta_value_heads", 32),
    "linear_num_key_heads": ("delta_key_heads", 16),
    "linear_key_head_dim": ("delta_key_dim", 128),
    "linear_value_head_dim": ("delta_value_dim", 128),
    "linear_conv_kernel_dim": ("conv_width", 4),
    "num_experts": ("num_experts", 512),
    "num_experts_per_tok": ("experts_per_token", 10),
    "moe_intermediate_size": ("expert_size", 512),
    "shared_expert_intermediate_size": ("shared_expert_size", 512),
    "norm_topk_prob": ("renormalize", True),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "max_position_embeddings": ("max_positions", 32768),
    "tie_word_embeddings": ("tie_embeddings", False),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", None),
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    h = dict(hparams)
    values = {ours: h.get(theirs, default) for theirs, (ours, default) in _FIELDS.items()}
    count = values["num_layers"]
    interval, types = h.get("full_attention_interval", 4), h.get("layer_types")
    step, dense = h.get("decoder_sparse_step", 1), h.get("mlp_only_layers") or ()
    return Config(
        recurrent=tuple(
            (i + 1) % interval > 0 if types is None else types[i] != "full_attention" for i in range(count)
        ),
        sparse=tuple(values["num_experts"] > 0 and i not in dense and (i + 1) % step == 0 for i in range(count)),
        activation=activation_from_hub(h.get("hidden_act", "silu")),
        rope=rope_from_hub(
            h.get("rope_scaling") or h.get("rope_parameters") or {},
            max_positions=values["max_positions"],
            theta=h.get("rope_theta", 10_000.0),
            partial=h.get("partial_rotary_factor", 0.25),
        ),
        eos_token_id=end_tokens_from_hub(h.get("eos_token_id")),
        **values,
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {theirs: getattr(c, ours) for theirs, (ours, _) in _FIELDS.items()} | {
        "layer_types": ["linear_attention" if recurrent else "full_attention" for recurrent in c.recurrent],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(c.sparse) if not sparse],
        "hidden_act": activation_to_hub(c.activation),
        "rope_parameters": rope_to_hub(c.rope),
        "eos_token_id": end_tokens_to_hub(c.eos_token_id),
    }


def _fused_experts(size: int) -> Transform:
    """(E, 2 F, D) to gate and up (E, D, F)."""
    turn, cut = permute(0, 2, 1), split_columns(size, size)
    return Transform(
        lambda x: cut.from_official(*turn.from_official(x)), lambda *parts: turn.to_official(*cut.to_official(*parts))
    )


def _table(c: Config, *, apart: bool) -> Table:
    """`apart`: every expert's matrices are tensors of their own, as in saved files."""
    embedding = "model.embed_tokens.weight", "embedding/embedding"
    if c.tie_embeddings:
        yield from shared((embedding[0], "lm_head.weight"), embedding[1])
    else:
        yield from parameter(*embedding)
        yield from linear("lm_head", "head", bias=False)
    ratio = c.delta_value_heads // c.delta_key_heads
    for i in range(c.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers_{i}"
        yield from layer_norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm", bias=False)
        yield from layer_norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", bias=False)
        if c.recurrent[i]:
            delta, own = f"{theirs}.linear_attn", f"{ours}/delta"
            sizes = c.delta_key_dim, c.delta_key_dim, ratio * c.delta_value_dim, ratio * c.delta_value_dim
            parts = tuple(f"params/{own}/{name}/kernel" for name in ("query", "key", "value", "gate"))
            yield Row((f"{delta}.in_proj_qkvz.weight",), parts, split_heads(c.delta_key_heads, *sizes))
            parts = tuple(f"params/{own}/{name}/kernel" for name in ("write", "decay"))
            yield Row((f"{delta}.in_proj_ba.weight",), parts, split_heads(c.delta_key_heads, ratio, ratio))
            yield from conv(f"{delta}.conv1d", f"{own}/conv1d", axes=1, bias=False)
            for name in ("A_log", "dt_bias"):
                yield from parameter(f"{delta}.{name}", f"{own}/{name}")
            yield from layer_norm(f"{delta}.norm", f"{own}/norm", bias=False)
            yield from linear(f"{delta}.out_proj", f"{own}/out", bias=False)
        else:
            attention, own = f"{theirs}.self_attn", f"{ours}/attention"
            for kind, leaf in (("weight", "kernel"), ("bias", "bias"))[: 1 + c.attention_bias]:
                parts = tuple(f"params/{own}/{name}/{leaf}" for name in ("query", "gate"))
                yield Row((f"{attention}.q_proj.{kind}",), parts, split_heads(c.num_heads, c.head_dim, c.head_dim))
            for letter, name in (("k", "key"), ("v", "value"), ("o", "out")):
                yield from linear(f"{attention}.{letter}_proj", f"{own}/{name}", bias=c.attention_bias)
            for letter, name in (("q", "query"), ("k", "key")):
                yield from layer_norm(f"{attention}.{letter}_norm", f"{own}/{name}_norm", bias=False)
        mlp, own = f"{theirs}.mlp", f"{ours}/mlp"
        if c.sparse[i]:
            yield from linear(f"{mlp}.gate", f"{own}/router", bias=False)
            yield from parameter(f"{mlp}.shared_expert_gate.weight", f"{own}/shared_gate", squeezed(1))
            yield from _experts(f"{mlp}.experts", f"params/{own}/experts", c, apart=apart)
            mlp, own = f"{mlp}.shared_expert", f"{own}/shared_expert"
        for name in ("gate", "up", "down"):
            yield from linear(f"{mlp}.{name}_proj", f"{own}/{name}", bias=False)
    yield from layer_norm("model.norm", "norm", bias=False)


def _experts(theirs: str, ours: str, c: Config, *, apart: bool) -> Table:
    if apart:
        for name in ("gate", "up", "down"):
            each = tuple(f"{theirs}.{e}.{name}_proj.weight" for e in range(c.num_experts))
            yield Row(each, (f"{ours}/{name}_kernel",), end_to_end(c.num_experts, 1, 0, stack=True))
    else:
        fused = (f"{ours}/gate_kernel", f"{ours}/up_kernel")
        yield Row((f"{theirs}.gate_up_proj",), fused, _fused_experts(c.expert_size))
        yield Row((f"{theirs}.down_proj",), (f"{ours}/down_kernel",), permute(0, 2, 1))


def official_table(c: Config) -> Table:
    return _table(c, apart=False)


def saved_table(c: Config) -> Table:
    return _table(c, apart=True)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    ids = inputs["input_ids"]
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)  # the official code's, whatever the mask
    positions = inputs.get("position_ids", places)
    output = model.apply(variables, ids, attention_mask=inputs.get("attention_mask"), positions=positions)
    return {"logits": output.logits}


_LARGE = config_from_official({
    "intermediate_size": 5120, "max_position_embeddings": 262144, "rope_theta": 1e7, "bos_token_id": 151643,
    "eos_token_id": 151645,
})  # fmt: skip

_MODULE = "models/qwen3_next/modeling_qwen3_next.py:Qwen3NextForCausalLM (torch path of the gated delta rule)"

BACKBONES = {
    "qwen3_next": Backbone(
        name="qwen3_next",
        model=Model,
        configs={"tiny": Config(eos_token_id=(2,)), "Qwen3-Next-80B-A3B-Instruct": _LARGE},
        example=example,
        cache=empty_cache,
        parameter_counts={"Qwen3-Next-80B-A3B-Instruct": 79_674_391_296},
        officials=(
            Official(
                module=_MODULE,
                config=config_from_official,
                hparams=config_to_official,
                table=official_table,
                saved=(saved_table,),
                call=official_call,
                ignored=(r"^mtp\.", r"rotary_emb\.inv_freq$"),
            ),
        ),
    )
}
