"""XCTFormer: token-to-token attention across channels and time (azencot-group, arXiv:2605.18534).

Official code: azencot-group/XCTFormer@55eabaf (no licence). Fidelity: exact.
New: every patch of every variate is a token, and all attend to all (CRAB): scores are multiplied by a learned relation
mask and divided by the sum of their absolute values, so that weights are signed. For wide data keys and values are
compressed to a few slots (DeCoP). Forecasts, fills gaps, or rebuilds its input to find anomalies.
Differs: scores are shifted by the least one of their own window (`min_scope`; officially of the whole batch, so that an
answer depends on what else was asked). A channel without any value seen is filled with 0, officially with NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks import BatchNorm, Dropout, Linear, stack
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import forecasting, imputation, reconstruction
from zoo.tasks.task import Batch, Task
from zoo.weights.table import Table, batch_norm, linear, parameter

Mode = Literal["forecast", "imputation", "anomaly"]
MinScope = Literal["sample", "batch", "row"]
ValueLayout = Literal["code", "transpose"]
Scope = Literal["all", "variate"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in time steps."""

    mode: Mode = "forecast"  # what comes out: the future, the input without its gaps, or the input again
    lookback: int = 96  # L, the past seen
    horizon: int = 96  # P, the future forecast; of no meaning in the other modes
    variates: int = 7  # V; weights depend on it, so it must be the data's
    hidden_share: float = 0.25  # of the values that imputation is trained to fill
    patch_length: int = 16  # steps of a token
    stride: int = 8  # steps from one token to the next
    d_model: int = 8  # D, width of a token
    d_ff: int = 16  # hidden width of the feed-forward layers
    num_layers: int = 1  # attention and feed-forward blocks
    num_heads: int = 1  # of every attention
    slots: int | None = None  # k, keys and values after compression (DeCoP); None: none, every token is one
    value_layout: ValueLayout = "code"  # how (D, k) compressed values become k of width D: read on, or transposed
    min_scope: MinScope = "sample"  # whose least score becomes 0: the window's, the whole batch's (official), the row's
    attention_scope: Scope = "all"  # variate: tokens see their own variate only, the ablation without cross-channel
    dropout_rate: float = 0.1  # of embedded patches
    attention_dropout_rate: float = 0.5  # of attention weights
    ffn_dropout_rate: float = 0.05  # of attention outputs and inside the feed-forward layers
    head_dropout_rate: float = 0.0  # of outputs
    score_shift: float = 1e-4  # added to every score before they are normalised
    score_epsilon: float = 1e-8  # added to the sum of their absolute values
    batch_norm_epsilon: float = 1e-5  # added to the variance under the root
    instance_norm_epsilon: float = 1e-5  # likewise, of each series of a window

    def __post_init__(self):
        choices = {"mode": Mode, "min_scope": MinScope, "value_layout": ValueLayout, "attention_scope": Scope}
        for name, kind in choices.items():
            if getattr(self, name) not in kind.__args__:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(kind.__args__)}")
        if self.attention_scope == "variate" and (self.slots is not None or self.min_scope != "row"):
            raise ValueError(
                "attention_scope 'variate' goes with slots None and min_scope 'row' alone: others mix variates"
            )
        if self.lookback < self.patch_length:
            raise ValueError(f"a lookback of {self.lookback} steps holds no patch of {self.patch_length}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")

    @property
    def patches(self) -> int:
        """S, tokens of a variate: the series is prolonged by a stride of its last value."""
        return (self.lookback - self.patch_length) // self.stride + 2


def signed_weights(scores: Float[Array, "*B K"], *, shift: float, epsilon: float) -> Float[Array, "*B K"]:
    """a = (s + shift) / (sum |s + shift| + epsilon): rows of unit L1 norm whose entries may be negative (AbsAct)."""
    scores = scores + shift
    return scores / (jnp.sum(jnp.abs(scores), axis=-1, keepdims=True) + epsilon)


def relation_scores(
    raw: Float[Array, "B H T T"],
    relations: Float[Array, "H T T"],
    min_scope: MinScope,
    allowed: Bool[Array, "T T"] | None = None,
) -> Float[Array, "B H T T"]:
    """(s - min s) M, the minimum over each window, the whole batch, or each row; a gradient flows through it."""
    axes = {"sample": (1, 2, 3), "batch": None, "row": -1}[min_scope]
    among = raw if allowed is None else jnp.where(allowed, raw, jnp.inf)
    return (raw - jnp.min(among, axis=axes, keepdims=True)) * relations


def _same_variate(tokens: int, variates: int) -> Bool[Array, "T T"]:
    variate = jnp.arange(tokens) % variates
    return variate[:, None] == variate


class CrossRelationalAttention(nn.Module):
    """CRAB: out = W_o (a v), a = AbsAct((q k^T - min) M) with a learned M for every head. O(T^2 D)."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        c, (batch, tokens, width) = self.config, x.shape
        heads = (batch, tokens, c.num_heads, width // c.num_heads)
        query, key, value = (Linear(width, name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        start = nn.initializers.normal((2 / tokens) ** 0.5)
        relations = jnp.asarray(self.param("relation_table", start, (c.num_heads, tokens, tokens)), jnp.float32)
        raw = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
        own = _same_variate(tokens, c.variates) if c.attention_scope == "variate" else None
        scores = relation_scores(raw, relations, c.min_scope, own)
        if own is not None:
            scores = jnp.where(own, scores, -c.score_shift)  # which the shift makes exactly no weight
        weights = signed_weights(scores, shift=c.score_shift, epsilon=c.score_epsilon)
        self.sow("intermediates", "weights", weights)
        weights = Dropout(c.attention_dropout_rate)(weights.astype(x.dtype), train=train)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return Linear(width, name="out")(mixed.reshape(x.shape))


def _relations_init(key, shape, dtype=jnp.float32):
    """He-uniform as torch takes the fan of a (T, H, k) tensor: H k."""
    bound = (6 / (shape[1] * shape[2])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class CompressedAttention(nn.Module):
    """DeCoP: k slots instead of T keys: out = W_o (AbsAct(q (k^T R)) (W x)), neither shift nor mask. O(T k D)."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        c, (batch, tokens, width) = self.config, x.shape
        head_dim = width // c.num_heads
        query, key = (
            Linear(width, name=name)(x).reshape(batch, tokens, c.num_heads, head_dim) for name in ("query", "key")
        )
        relations = self.param("relation_table", _relations_init, (tokens, c.num_heads, c.slots))
        compressed = jnp.einsum("bshe,shr->bher", key, jnp.asarray(relations))
        scores = jnp.einsum("blhe,bher->bhlr", query, compressed).astype(jnp.float32)
        weights = signed_weights(scores, shift=c.score_shift, epsilon=c.score_epsilon)
        self.sow("intermediates", "weights", weights)
        weights = Dropout(c.attention_dropout_rate)(weights.astype(x.dtype), train=train)
        value = Linear(c.slots, name="value")(jnp.swapaxes(x, 1, 2))  # (B, D, k)
        if c.value_layout == "transpose":
            value = jnp.swapaxes(value, 1, 2)
        # "code": the (D, k) numbers of a window are read on as k rows of D, which mixes slots and channels.
        value = value.reshape(batch, c.slots, c.num_heads, head_dim)
        mixed = jnp.einsum("bhlr,brhd->blhd", weights, value)
        return Linear(width, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """x = x + drop(Attn(x)); BN(x + FFN(BN(x))): what is added to is not what is normalised."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        c = self.config
        attention = CrossRelationalAttention if c.slots is None else CompressedAttention
        mixed = attention(c, name="attention")(x, train=train)
        x = x + Dropout(c.ffn_dropout_rate)(mixed, train=train)
        hidden = BatchNorm(c.batch_norm_epsilon, name="norm1")(x, train=train)
        hidden = layers.gelu(Linear(c.d_ff, name="ffn_in")(hidden))
        hidden = Dropout(c.ffn_dropout_rate)(hidden, train=train)
        x = x + Linear(c.d_model, name="ffn_out")(hidden)
        return BatchNorm(c.batch_norm_epsilon, name="norm2")(x, train=train)


def normalize_observed(
    x: Float[Array, "B L V"], mask: Bool[Array, "B L V"], *, epsilon: float
) -> tuple[Float[Array, "B L V"], layers.InstanceStatistics]:
    """Instance normalisation by the values seen; hidden ones become 0. No gradient flows through the statistics."""
    wide, seen = x.astype(jnp.float32), mask.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(seen, axis=1, keepdims=True), 1.0)
    mean = jax.lax.stop_gradient(jnp.sum(wide * seen, axis=1, keepdims=True) / count)
    centred = (wide - mean) * seen
    square = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count
    scale = jax.lax.stop_gradient(jnp.sqrt(square + epsilon))
    return (centred / scale).astype(x.dtype), layers.InstanceStatistics(mean, scale)


class Model(nn.Module):
    """Normalise, cut into patches, attend over all patches of all variates, read each variate's tokens off."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B P V"]:
        c, x = self.config, batch["x"]
        if x.shape[1:] != (c.lookback, c.variates):
            raise UserError(
                f"xctformer is built for {c.variates} variates of {c.lookback} steps, the data has {x.shape[2]} of "
                f"{x.shape[1]}: set --model.variates {x.shape[2]} and --model.lookback {x.shape[1]}"
            )
        if c.mode == "imputation":
            series, statistics = normalize_observed(x, batch["mask"], epsilon=c.instance_norm_epsilon)
        else:
            series, statistics = layers.instance_normalize(x, epsilon=c.instance_norm_epsilon)

        longer = jnp.pad(series, ((0, 0), (0, c.stride), (0, 0)), mode="edge")
        patches = layers.unfold(longer, c.patch_length, stride=c.stride)  # (B, S, patch, V)
        tokens = Linear(c.d_model, name="patch_embedding")(jnp.swapaxes(patches, 2, 3))
        start = lambda key, shape: jax.random.uniform(key, shape, minval=-0.02, maxval=0.02)  # noqa: E731
        tokens = tokens + self.param("position", start, (c.patches, c.d_model))[:, None]
        tokens = Dropout(c.dropout_rate)(tokens, train=train)

        # Patch by patch, within a patch variate by variate.
        flat = tokens.reshape(len(x), c.patches * c.variates, c.d_model)
        flat = stack(self, partial(Block, c), c.num_layers, flat, train=train)
        tokens = jnp.swapaxes(flat.reshape(tokens.shape), 1, 2).reshape(len(x), c.variates, -1)
        length = c.horizon if c.mode == "forecast" else c.lookback
        output = Dropout(c.head_dropout_rate)(Linear(length, name="head")(tokens), train=train)
        return layers.instance_denormalize(jnp.swapaxes(output, 1, 2), statistics)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    sizes = {"lookback": config.lookback, "variates": config.variates, "batch_size": batch_size, "key": key}
    if config.mode == "imputation":
        return imputation.example(**sizes)
    if config.mode == "anomaly":
        return reconstruction.example(**sizes)
    return forecasting.example(horizon=config.horizon, marks=0, **sizes)


def task_of(config: Config) -> Task:
    tasks = {"forecast": forecasting.TASK, "imputation": imputation.TASK, "anomaly": reconstruction.TASK}
    return tasks[config.mode]


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "seq_len": "lookback",
    "pred_len": "horizon",
    "enc_in": "variates",
    "patch_len": "patch_length",
    "stride": "stride",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "e_layers": "num_layers",
    "n_heads": "num_heads",
    "dropout": "dropout_rate",
    "attn_dropout": "attention_dropout_rate",
    "fc_dropout": "ffn_dropout_rate",
    "head_dropout": "head_dropout_rate",
}
_TASK_NAMES = {"forecast": "long_term_forecast", "imputation": "imputation", "anomaly": "anomaly_detection"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    names = {name: mode for mode, name in _TASK_NAMES.items()}
    ours["mode"] = names.get(hparams.get("task_name"), "forecast")  # the short-term forecast is the same model
    ours["slots"] = hparams["k"] if hparams.get("include_decop") else None
    return Config(**ours, min_scope="batch")


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    compressed = {"include_decop": config.slots is not None, "k": config.slots or 0}
    return {"task_name": _TASK_NAMES[config.mode], **named, **compressed}


def official_table(config: Config) -> Table:
    yield from parameter("W_pos", "position")
    yield from linear("W_P", "patch_embedding")
    for i in range(config.num_layers):
        theirs, ours = f"encoder.transformer_layers.{i}", f"layers_{i}"
        for name in ("query", "key", "value", "out"):
            yield from linear(f"{theirs}.attention.{name}_projection", f"{ours}/attention/{name}")
        relations = "mask_layer.mask" if config.slots is None else "relations"
        yield from parameter(f"{theirs}.attention.{relations}", f"{ours}/attention/relation_table")
        yield from linear(f"{theirs}.feed_forward.0", f"{ours}/ffn_in")
        yield from linear(f"{theirs}.feed_forward.3", f"{ours}/ffn_out")
        for name in ("norm1", "norm2"):
            yield from batch_norm(f"{theirs}.{name}.1", f"{ours}/{name}")
    yield from linear("head.0", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    batch = {"x": inputs["x_enc"]}
    if inputs.get("mask") is not None:
        batch["mask"] = inputs["mask"] != 0
    return {"y": model.apply(variables, batch)}


# --- named configurations: the paper's own, from the shipped scripts --------------------------------------------------


def _sizes(heads: int, blocks: int, width: int, hidden: int, attention_dropout: float, **others: Any) -> dict[str, Any]:
    sizes = {"num_heads": heads, "num_layers": blocks, "d_model": width, "d_ff": hidden}
    return {**sizes, "attention_dropout_rate": attention_dropout, **others}


_ETTH1 = _sizes(1, 1, 8, 16, 0.6, dropout_rate=0.2, ffn_dropout_rate=0.3)
_FORECAST = {
    "etth1": _ETTH1,
    "etth2": _sizes(1, 3, 30, 60, 0.8, ffn_dropout_rate=0.2),
    "ettm1": _sizes(4, 2, 32, 64, 0.8),
    "ettm2": _sizes(1, 1, 224, 448, 0.8),
    "weather": _sizes(2, 3, 248, 496, 0.8, variates=21),
    "ecl": _sizes(1, 3, 248, 496, 0.5, variates=321, slots=64),
    "traffic": _sizes(4, 3, 248, 496, 0.6, variates=862, slots=192),
    "cross_channel": _sizes(4, 2, 32, 64, 0.8),  # the official synthetic data
    # Not in the paper: two small sets of the same protocol, with the sizes that the paper gives its smallest.
    "exchange": _ETTH1 | {"variates": 8},
}
_HORIZONS = ("etth1", "etth2", "ettm1", "ettm2", "exchange")  # of which there are the longer ones too
_IMPUTATION = {
    "etth1": _sizes(1, 2, 64, 128, 0.5),
    "etth2": _sizes(1, 3, 160, 320, 0.3, patch_length=64, stride=32),
    "ettm1": _sizes(4, 3, 96, 192, 0.1),
    "ettm2": _sizes(1, 2, 128, 256, 0.5),
    "weather": _sizes(1, 3, 192, 384, 0.8, variates=21),
    "ecl": _sizes(2, 2, 192, 384, 0.7, variates=321, slots=128, patch_length=64, stride=32),
}
_ANOMALY = {
    "msl": _sizes(4, 2, 256, 512, 0.7, variates=55),
    "psm": _sizes(1, 2, 256, 512, 0.8, variates=25),
    "smap": _sizes(1, 3, 256, 128, 0.3, variates=25),
    "smd": _sizes(1, 2, 168, 336, 0.3, variates=38),
    "swat": _sizes(2, 1, 216, 432, 0.4, variates=51),
}
_SMALL = _sizes(1, 1, 32, 64, 0.3)
_TINY = _sizes(2, 1, 8, 16, 0.1, patch_length=8, stride=4)


def _per_horizon(name: str, config: dict[str, Any]) -> dict[str, Config]:
    """The four horizons of the literature: `name` is 96 steps, `name_192` and so on the longer ones."""
    names = {96: name, 192: f"{name}_192", 336: f"{name}_336", 720: f"{name}_720"}
    return {name: Config(horizon=horizon, **config) for horizon, name in names.items()}


PAPER = Paper(
    slug="xctformer",
    task=forecasting.TASK,
    task_of=task_of,
    model=Model,
    example=example,
    configs={
        "tiny": Config(lookback=48, horizon=24, **_TINY),
        "tiny_imputation": Config(mode="imputation", lookback=48, horizon=0, **_TINY),
        "tiny_anomaly": Config(mode="anomaly", lookback=48, horizon=0, **_TINY),
        **{name: Config(**config) for name, config in _FORECAST.items() if name not in _HORIZONS},
        **{k: v for name in _HORIZONS for k, v in _per_horizon(name, _FORECAST[name]).items()},
        "illness": Config(lookback=36, horizon=24, **_ETTH1),
        **{f"{k}_imputation": Config(mode="imputation", lookback=1024, horizon=0, **v) for k, v in _IMPUTATION.items()},
        **{k: Config(mode="anomaly", lookback=100, horizon=0, **v) for k, v in _ANOMALY.items()},
        # Not in the paper: a size for CPUs.
        **{f"{k}_small": Config(mode="anomaly", lookback=100, horizon=0, **v | _SMALL) for k, v in _ANOMALY.items()},
    },
    officials=(
        Official(
            module="models/XCTFormer.py:Model",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"etth1": 17_200, "ettm1": 111_424, "weather": 2_158_288, "ecl": 3_071_368},
    quirks=(
        "officially the scores' minimum is that of the batch: set min_scope to batch",
        "compressed values are read on across channels and slots; value_layout transpose does not",
        "officially a channel of which nothing is seen becomes NaN in imputation; ours becomes 0",
    ),
)
