"""Mask2Cause: causal discovery by attention under one learned adjacency (arXiv:2605.07280).

Official code: omar826/Mask2Cause@390e731 (no licence). Fidelity: exact.
New: a small transformer over variables (a token is a variable's past) forecasts one step ahead, and one matrix of edge
probabilities, shared by all layers and heads, multiplies its attention weights; after training that matrix is the
graph, nothing is extracted. With a variance head also causes of the variance are found, in a graph of their own if
wanted.
Differs: nothing in the model. The variants of an earlier version (94963df), a read-out for each variable and forecasts
relative to the last value, are `readout` and `residual`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.blocks import ActivationDropout, Dropout, Linear
from zoo.blocks.basic import torch_uniform
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import causal_discovery
from zoo.tasks.task import Batch
from zoo.weights.table import Table, constant, conv1x1, layer_norm, linear, parameter, squeezed

Variant = Literal["mse", "nll", "dual"]
Readout = Literal["shared", "decoupled"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in time steps."""

    variant: Variant = "mse"  # forecasts the mean; nll: and the variance, one graph; dual: and a graph for each
    variates: int = 10  # N; weights depend on it, so it must be the data's
    lookback: int = 3  # L, the past seen
    d_model: int = 64  # D, width of a token; a token is a variable
    num_heads: int = 4  # of every attention
    num_layers: int = 2  # attention and feed-forward layers
    expansion: int = 4  # hidden width of the feed-forward layers / D
    dropout_rate: float = 0.1  # of tokens, attention outputs and feed-forward layers; not of attention weights
    edge_init: float = -1.0  # every edge's logit at the start
    diagonal_force: float = 100.0  # added to a variable's logit for itself; 0: learned, -100: forbidden
    sparsity: float = 0.01  # lambda, weight of the mean edge probability in the loss
    sparsity_warmup: int = 0  # training steps in which that weight rises from 0
    readout: Readout = "shared"  # one head for all variables; decoupled: one for each
    residual: bool = False  # the forecast is the last value plus the head's output
    edge_floor: float = 1e-6  # added to edge probabilities under the logarithm: a closed edge's weight
    pair_epsilon: float = 1e-5  # added to the number of pairs in the penalty's mean
    variance_floor: float = 1e-6  # added to the variance
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root

    def __post_init__(self):
        for name, kind in (("variant", Variant), ("readout", Readout)):
            if getattr(self, name) not in kind.__args__:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(kind.__args__)}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")


def edge_probabilities(logits: Float[Array, "N N"], diagonal_force: float) -> Float[Array, "N N"]:
    """A = sigmoid(Theta + force I), in float32; row = target, column = source."""
    logits = jnp.asarray(logits, jnp.float32)
    return jax.nn.sigmoid(logits + diagonal_force * jnp.eye(len(logits)))


def edge_penalty(graph: Float[Array, "N N"], pair_epsilon: float) -> Float[Array, ""]:
    """Mean of the off-diagonal probabilities."""
    n = len(graph)
    return jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0.0, graph)) / (n * n - n + pair_epsilon)


class AdjacencyAttention(nn.Module):
    """W_o P v with P_ij proportional to (A_ij + floor) exp(q_i . k_j / sqrt d): a target attends to its sources."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], graph: Float[Array, "N N"]) -> Float[Array, "B N D"]:
        c, width = self.config, x.shape[-1]
        query, key, value = (
            jnp.swapaxes(Linear(width, name=name)(x).reshape(*x.shape[:2], c.num_heads, -1), 1, 2)
            for name in ("query", "key", "value")
        )
        # Not layers.dot_product_attention: its heads come second, which takes twice as long for narrow heads.
        scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
        weights = jax.nn.softmax(scores + jnp.log(graph + c.edge_floor), axis=-1)
        self.sow("intermediates", "weights", weights)
        mixed = jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights.astype(x.dtype), value), 1, 2)
        return Linear(width, name="out")(mixed.reshape(x.shape))


class EncoderLayer(nn.Module):
    """Post-norm: x = LN(x + Attn(x, A)); x = LN(x + FFN(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, graph: Float[Array, "N N"], train: bool) -> Float[Array, "B N D"]:
        c = self.config
        mixed = AdjacencyAttention(c, name="attention")(x, graph)
        x = nn.LayerNorm(c.layer_norm_epsilon, name="norm1")(x + Dropout(c.dropout_rate)(mixed, train=train))
        hidden = Linear(c.expansion * c.d_model, name="ffn_in")(x)
        hidden = Linear(c.d_model, name="ffn_out")(ActivationDropout("gelu", c.dropout_rate)(hidden, train=train))
        return nn.LayerNorm(c.layer_norm_epsilon, name="norm2")(x + Dropout(c.dropout_rate)(hidden, train=train))


class Head(nn.Module):
    """One number a token: w . t + b with the same weights for all variables, or with each variable's own."""

    decoupled: bool

    @nn.compact
    def __call__(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B N"]:
        if not self.decoupled:
            return Linear(1, name="linear")(tokens)[..., 0]
        _, n, width = tokens.shape
        kernel = self.param("kernel", torch_uniform(width), (n, width))
        return jnp.sum(tokens * kernel, axis=-1) + self.param("bias", nn.initializers.zeros, (n,))


class Model(nn.Module):
    """Embed each variable's past, mix variables through the graph, forecast the next step of each."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c, x = self.config, batch["x"]
        if x.shape[1:] != (c.lookback, c.variates):
            raise UserError(
                f"mask2cause is built for {c.variates} variates of {c.lookback} steps, the data has {x.shape[2]} of "
                f"{x.shape[1]}: set --model.variates {x.shape[2]} and --model.lookback {x.shape[1]}"
            )
        names = ("edge_table", "variance_edge_table") if c.variant == "dual" else ("edge_table",)
        start = nn.initializers.constant(c.edge_init)
        logits = [self.param(name, start, (c.variates, c.variates)) for name in names]
        graphs = [edge_probabilities(value, c.diagonal_force) for value in logits]

        tokens = Linear(c.d_model, name="embedding")(jnp.swapaxes(x, 1, 2))
        identity = self.param("identity_table", nn.initializers.normal(1.0), (c.variates, c.d_model))
        tokens = Dropout(c.dropout_rate)(tokens, train=train) + identity
        encoder = [EncoderLayer(c, name=f"layers_{i}") for i in range(c.num_layers)]

        def encode(graph: Float[Array, "N N"]) -> Float[Array, "B N D"]:
            mixed = tokens
            for layer in encoder:
                mixed = layer(mixed, graph=graph, train=train)
            return mixed

        mixed = encode(graphs[0])
        decoupled = c.readout == "decoupled"
        outputs = {"mean": Head(decoupled, name="mean_head")(mixed)}
        if c.residual:
            outputs["mean"] = outputs["mean"] + x[:, -1]
        if c.variant != "mse":
            spread = mixed if c.variant == "nll" else encode(graphs[1])  # by the same weights
            raw = Head(decoupled, name="variance_head")(spread).astype(jnp.float32)
            outputs["variance"] = jax.nn.softplus(raw) + c.variance_floor
        penalty = sum(edge_penalty(graph, c.pair_epsilon) for graph in graphs) / len(graphs)
        outputs["penalty"] = jnp.broadcast_to(c.sparsity * self._warmth(train) * penalty, len(x))
        outputs["graphs"] = jnp.broadcast_to(jnp.stack(graphs), (len(x), len(graphs), c.variates, c.variates))
        return outputs

    def _warmth(self, train: bool) -> Float[Array, ""] | float:
        """Share of the sparsity's weight by now."""
        warmup = self.config.sparsity_warmup
        if not warmup:
            return 1.0
        steps = self.variable("schedule", "steps", jnp.zeros, (), jnp.int32)
        if train and not self.is_initializing() and self.is_mutable_collection("schedule"):
            steps.value += 1
        return jnp.minimum(steps.value / warmup, 1.0)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return causal_discovery.example(lookback=config.lookback, variates=config.variates, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "enc_in": "variates",
    "seq_len": "lookback",
    "d_model": "d_model",
    "n_heads": "num_heads",
    "e_layers": "num_layers",
    "dropout": "dropout_rate",
    "adj_init": "edge_init",
    "diagonal_force": "diagonal_force",
    "lambda_l1": "sparsity",
}


def config_from_official(variant: Variant, hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    defaults = {"edge_init": -1.0 if variant == "mse" else 1.0}
    return Config(variant=variant, **defaults | ours)


def config_to_official(config: Config) -> dict[str, Any]:
    return {"model": config.variant, **{theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}}


def official_table(config: Config) -> Table:
    yield from parameter("var_embedding", "identity_table", squeezed(1))
    yield from parameter("adj_logits", "edge_table")
    if config.variant == "dual":
        yield from parameter("variance_adj_logits", "variance_edge_table")
    yield from constant("self_mask", np.eye(config.variates, dtype=np.float32))
    yield from linear("enc_embedding.value_embedding", "embedding")
    for i in range(config.num_layers):
        theirs, ours = f"encoder.{i}", f"layers_{i}"
        for name in ("query", "key", "value", "out"):
            yield from linear(f"{theirs}.attn.{name}_projection", f"{ours}/attention/{name}")
        yield from conv1x1(f"{theirs}.conv1", f"{ours}/ffn_in")
        yield from conv1x1(f"{theirs}.conv2", f"{ours}/ffn_out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/norm2")
    heads = {"mean": "readout", "variance": "sigma"} if config.variant != "mse" else {"mean": "readout"}
    for ours, theirs in heads.items():
        if config.readout == "decoupled":
            yield from parameter(f"{theirs}_weights", f"{ours}_head/kernel")
            yield from parameter(f"{theirs}_bias", f"{ours}_head/bias")
        else:
            shared = {"mean": "projector" if config.variant == "mse" else "mu_projector", "variance": "sigma_projector"}
            yield from linear(shared[ours], f"{ours}_head/linear")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c = model.config
    found = model.apply(variables, {"x": inputs["x"]})
    graphs = found["graphs"][0]
    outputs = {"adjacency": graphs[0], "penalty": sum(edge_penalty(g, c.pair_epsilon) for g in graphs) / len(graphs)}
    if c.variant == "mse":
        outputs["y_hat"] = found["mean"]
    else:
        outputs |= {"mu": found["mean"], "sigma_sq": found["variance"]}
    if c.variant == "dual":
        outputs["variance_adjacency"] = graphs[1]
    if "y" in inputs:
        outputs["loss"] = causal_discovery.loss(found, {"y": inputs["y"]})[0]
    return outputs


def _official(file: str, variant: Variant) -> Official:
    return Official(
        module=f"causalDiscovery/mask2cause_{file}.py:CausalGraphTransformer",
        config=partial(config_from_official, variant),
        hparams=config_to_official,
        table=official_table,
        call=official_call,
    )


# --- named configurations: the tuned settings of the shipped files ----------------------------------------------------


def _set(lookback: int, width: int, sparsity: float, **others: Any) -> dict[str, Any]:
    return {"lookback": lookback, "d_model": width, "sparsity": sparsity, **others}


def _variants(name: str, mse: dict[str, Any], nll: dict[str, Any] | None = None) -> dict[str, Config]:
    nll = mse if nll is None else nll
    return {
        name: Config(variant="mse", **mse),
        f"{name}_nll": Config(variant="nll", **{"edge_init": 1.0} | nll),
    }


_DREAM = {"variates": 100, "diagonal_force": -100.0}
_MIXED = _set(3, 32, 0.01)

PAPER = Paper(
    slug="mask2cause",
    task=causal_discovery.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(variates=10, lookback=3, d_model=16),
        **_variants("var", _set(3, 64, 0.01)),
        **_variants("lorenz_10_250", _set(1, 32, 0.02)),
        **_variants("lorenz_10_500", _set(1, 64, 0.02)),
        **_variants("lorenz_40_250", _set(1, 64, 0.02)),
        **_variants("lorenz_40_500", _set(1, 64, 0.02), _set(1, 32, 0.02)),
        **_variants("mixed", _MIXED),
        "mixed_dual": Config(variant="dual", edge_init=1.0, **_MIXED),
        **_variants("dream_ecoli1", _set(5, 32, 0.5, **_DREAM), _set(5, 64, 0.01, **_DREAM)),
        **_variants("dream_ecoli2", _set(5, 32, 0.005, variates=100), _set(5, 64, 1.0, variates=100)),
        **_variants("dream_yeast1", _set(5, 64, 5e-4, variates=100), _set(5, 64, 0.001, variates=100)),
        **_variants(
            "dream_yeast2", _set(5, 32, 0.001, variates=100, diagonal_force=0.0), _set(5, 64, 0.001, variates=100)
        ),
        **_variants("dream_yeast3", _set(5, 64, 0.5, **_DREAM), _set(1, 16, 0.1, **_DREAM)),
        # Not in the paper: other sets of the same kind, with the settings of the most similar.
        **_variants("netsim", _set(1, 32, 0.02, variates=15)),
        **_variants("dream_10", _set(5, 32, 0.005)),
        **_variants("air_quality", _set(3, 64, 1.0, variates=36)),
    },
    officials=(_official("MSE", "mse"), _official("NLL", "nll"), _official("dual_graph_NLL", "dual")),
    quirks=(
        "dream3's trajectories are officially read as one series: data dream3/<network>/joined does so",
        "a closed edge still carries a weight of about a millionth",
    ),
)
