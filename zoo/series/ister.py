"""Ister: inverted seasonal-trend transformer with linear dot-attention (Cao et al., arXiv:2412.18798).

Official code: macovaseas/Ister@3853254 (no licence). Fidelity: exact.
New: attention over variates without a token-by-token matrix: each channel gates its values by one sum over all tokens;
only the seasonal part of the series is attended, the trend passes through one MLP; calendar features are extra tokens.
Differs: `num_heads` is accepted and has no effect, as in the official code (the head split is undone before use);
calendar tokens, whose outputs the official code computes and drops, are left out where nobody reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from zoo.blocks import ActivationDropout, Dropout, Linear, stack
from zoo.paper import Official, Paper
from zoo.tasks import forecasting
from zoo.tasks.task import Batch
from zoo.weights.table import Table, conv1x1, layer_norm, linear


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in time steps."""

    lookback: int = 96  # L, the past seen
    horizon: int = 96  # P, the future forecast
    d_model: int = 128  # D, the width of a token; a token is a whole series
    d_ff: int = 2048  # hidden width of the feed-forward layers
    num_layers: int = 2  # encoder layers of the seasonal branch
    num_heads: int = 8  # no effect, see the module's docstring
    moving_average: int = 25  # K, odd: the window of the trend
    dropout_rate: float = 0.1  # of tokens, attention outputs and feed-forward layers
    trend_dropout_rate: float = 0.1  # of the trend MLP, fixed in the official code
    activation: str = "gelu"  # of the feed-forward layers only: gelu | relu
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    instance_norm_epsilon: float = 1e-5  # likewise, of each series of a window


class DotAttentionBlock(nn.Module):
    """Dot-attention between projections: o = W_o drop(v s), s = sum_t GELU(softmax_t(q) k)."""

    dropout_rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        query, key, value = (Linear(width, name=name)(x) for name in ("query", "key", "value"))
        mixed, weights = layers.dot_attention(query, key, value, return_weights=True)
        self.sow("intermediates", "weights", weights)
        return Linear(width, name="out")(Dropout(self.dropout_rate)(mixed, train=train))


class EncoderLayer(nn.Module):
    """Post-norm: x = LN(x + Attn(x)); x = LN(x + FFN(x)). Only the first `keep` tokens come out (None: all)."""

    config: Config
    keep: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B _ D"]:
        c = self.config
        mixed = DotAttentionBlock(c.dropout_rate, name="attention")(x, train=train)
        x = (x + Dropout(c.dropout_rate)(mixed, train=train))[:, : self.keep]
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm1")(x)
        hidden = ActivationDropout(c.activation, c.dropout_rate)(Linear(c.d_ff, name="ffn_in")(x), train=train)
        hidden = Linear(c.d_model, name="ffn_out")(hidden)
        x = x + Dropout(c.dropout_rate)(hidden, train=train)
        return nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm2")(x)


class TrendMLP(nn.Module):
    """z + LN(drop(W_2 GELU(W_1 z)) + W_3 z), hidden width D / 2."""

    config: Config

    @nn.compact
    def __call__(self, z: Float[Array, "B N D"], *, train: bool) -> Float[Array, "B N D"]:
        c = self.config
        hidden = layers.gelu(Linear(c.d_model // 2, name="fc1")(z))
        hidden = Dropout(c.trend_dropout_rate)(Linear(c.d_model, name="fc2")(hidden), train=train)
        skip = Linear(c.d_model, name="fc3")(z)
        return z + nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(hidden + skip)


class Model(nn.Module):
    """Normalise, decompose, forecast the seasonal part with attention over variates and the trend without, add."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B P N"]:
        c = self.config
        series, statistics = layers.instance_normalize(batch["x"], epsilon=c.instance_norm_epsilon)
        seasonal, trend = layers.series_decomposition(series, window=c.moving_average)
        variates = series.shape[-1]

        seasonal = jnp.swapaxes(seasonal, 1, 2)  # one token per variate: (B, N, L)
        if "x_mark" in batch:
            marks = jnp.swapaxes(batch["x_mark"], 1, 2).astype(seasonal.dtype)
            seasonal = jnp.concatenate([seasonal, marks], axis=1)  # and one per calendar feature: (B, N + F, L)
        tokens = Dropout(c.dropout_rate)(Linear(c.d_model, name="season_embedding")(seasonal), train=train)
        tokens = stack(self, partial(EncoderLayer, c), c.num_layers - 1, tokens, train=train)
        # Calendar tokens inform the variates through attention; after the last layer's they have no reader.
        last = partial(EncoderLayer, c, variates)
        tokens = stack(self, last, 1, tokens, first=c.num_layers - 1, train=train)
        tokens = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="encoder_norm")(tokens[:, :variates])

        trend = Linear(c.d_model, name="trend_embedding")(jnp.swapaxes(trend, 1, 2))
        trend = TrendMLP(c, name="trend_mlp")(Dropout(c.dropout_rate)(trend, train=train), train=train)

        averaging = nn.initializers.constant(1 / c.d_model)  # a head starts as the mean of its token's channels
        forecast = Linear(c.horizon, kernel_init=averaging, name="season_head")(tokens)
        forecast = forecast + Linear(c.horizon, kernel_init=averaging, name="trend_head")(trend)
        return layers.instance_denormalize(jnp.swapaxes(forecast, 1, 2), statistics)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return forecasting.example(lookback=config.lookback, horizon=config.horizon, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "seq_len": "lookback",
    "pred_len": "horizon",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "e_layers": "num_layers",
    "n_heads": "num_heads",
    "moving_avg": "moving_average",
    "dropout": "dropout_rate",
    "activation": "activation",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    # The official code takes every activation but "relu" for GELU.
    return Config(**ours | {"activation": "relu" if ours.get("activation") == "relu" else "gelu"})


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    return {"task_name": "long_term_forecast", "output_attention": False, "embed": "timeF", "freq": "h", **named}


def official_table(config: Config) -> Table:
    yield from linear("season_embedding.value_embedding", "season_embedding")
    yield from linear("trend_embedding.value_embedding", "trend_embedding")
    for i in range(config.num_layers):
        theirs, ours = f"backbone.encoder.attn_layers.{i}", f"layers_{i}"
        for name in ("query", "key", "value", "out"):
            yield from linear(f"{theirs}.attention.{name}_projection", f"{ours}/attention/{name}")
        yield from conv1x1(f"{theirs}.conv1", f"{ours}/ffn_in")
        yield from conv1x1(f"{theirs}.conv2", f"{ours}/ffn_out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from layer_norm("backbone.encoder.norm", "encoder_norm")
    for name in ("fc1", "fc2", "fc3"):
        yield from linear(f"backbone.mlp.{name}", f"trend_mlp/{name}")
    yield from layer_norm("backbone.mlp.ln", "trend_mlp/norm")
    yield from linear("Linear_Seasonal", "season_head")
    yield from linear("Linear_Trend", "trend_head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    batch = {"x": inputs["x_enc"]}
    if inputs.get("x_mark_enc") is not None:
        batch["x_mark"] = inputs["x_mark_enc"]
    return {"y": model.apply(variables, batch)}


# --- named configurations: the paper's own, from the shipped scripts --------------------------------------------------


def _per_horizon(name: str, config: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Config]:
    """The four horizons of the literature: `name` is 96 steps, `name_192` and so on the longer ones."""
    return {
        name if horizon == 96 else f"{name}_{horizon}": Config(
            horizon=horizon, **(config | changes.get(f"h{horizon}", {}))
        )
        for horizon in (96, 192, 336, 720)
    }


PAPER = Paper(
    slug="ister",
    task=forecasting.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(horizon=24, d_model=16, d_ff=32, num_layers=1, num_heads=2),
        **_per_horizon("etth1", {}, h192={"num_layers": 1}, h720={"num_layers": 1}),
        **_per_horizon("etth2", {}),
        **_per_horizon("ettm1", {"num_layers": 1, "d_model": 32}),
        **_per_horizon("ettm2", {"num_layers": 1}, h336={"d_model": 32}),
        **_per_horizon("ecl", {"num_layers": 3, "d_model": 512, "d_ff": 512}),
        **_per_horizon("traffic", {"num_layers": 3, "d_model": 512}),
        **_per_horizon("weather", {"d_model": 512}),
        **_per_horizon("exchange", {"d_model": 512}, h192={"d_model": 128}, h336={"d_model": 128}),
        "illness": Config(lookback=36, horizon=24),  # not in the paper: the usual lengths of that set
    },
    officials=(
        Official(
            module="models/Ister.py:Model",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"tiny": 6_760, "etth1": 1_269_248, "ettm1": 152_304, "ecl": 5_459_392},
    reported={  # averages over the four horizons, from the paper's tables
        "ett_h1": {"mse": 0.438},
        "ett_h2": {"mse": 0.349},
        "ett_m1": {"mse": 0.386},
        "ett_m2": {"mse": 0.279},
        "weather": {"mse": 0.243},
        "traffic": {"mse": 0.399},
        "ecl": {"mae": 0.260},
    },
    quirks=(
        "num_heads has no effect: the official code undoes the head split before using it",
        "no gradient flows through the instance mean, one does through the scale",
        "the official in-place division forbids gradients with respect to the input; ours has them",
    ),
)
