"""ECG-NAT: A Self-supervised Neighborhood Attention Transformer for Multi-lead Electrocardiogram Classification
(arXiv:2605.13194).

Official code: Mahsagazeran/ECG-NAT@ee01174 holds a README only; the block is the published one, in one dimension:
SHI-Labs/Neighborhood-Attention-Transformer@d334f5b with SHI-Labs/NATTEN@3b54c76, tag v0.14.6 (MIT). Fidelity: partial.
New: a pyramid of neighbourhood attention over time, whose first levels see the shape of a beat and whose last ones see
the rhythm; pre-trained without labels by filling in hidden spans of all leads; fine-tuned with cross-entropy and a
supervised contrastive loss.
Differs: sizes, mask, decoder and the constants of the losses are unpublished, and ours; attention dropout, 0 in all
published NAT models, is left out; a window that does not fit is an error in ours, and padded in the official module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

import layers
from zoo.blocks import Dropout, Linear, MultiHeadAttention, stack
from zoo.blocks.basic import torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch
from zoo.weights.table import Table, fused_linear, layer_norm, linear, parameter

_NORMAL = nn.initializers.truncated_normal(0.02)
_ZEROS = nn.initializers.zeros


@dataclass(frozen=True)
class LayerConfig:
    """One neighbourhood attention layer."""

    dim: int  # D, width of a token
    num_heads: int  # H
    kernel_size: int = 7  # k, keys of a query
    dilation: int = 1  # d, from key to key
    mlp_ratio: float = 3.0  # hidden width of the MLP over D
    qkv_bias: bool = True  # of the projections
    scale: float | None = None  # of the scores; None: 1 / sqrt(D / H)
    relative_bias: bool = True  # a learned number for each head and distance
    layer_scale: float | None = None  # what the gains of both branches begin with; None: there are none
    drop_path_rate: float = 0.0  # share of examples that skip a branch in training
    dropout_rate: float = 0.0  # of projections and the MLP
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    pad_short: bool = False  # sequences shorter than k d get rows of zeros, which take part as keys


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in samples (100 a second)."""

    length: int = 1024  # L, a multiple of 4 times 2 for each level after the first
    channels: int = 12  # C, leads
    num_classes: int = 5  # K, classes to tell apart
    stage: Literal["classify", "pretrain"] = "classify"  # pretrain: fill in what is hidden; a probe learns beside it
    d_model: int = 32  # width of a token in the first level; each level doubles it
    depths: tuple[int, ...] = (2, 2, 6, 2)  # layers of each level
    num_heads: tuple[int, ...] = (1, 2, 4, 8)  # of each level
    kernel_size: int = 7  # keys of a query
    dilations: tuple[int, ...] = (1, 1, 1, 1)  # of each level
    mlp_ratio: float = 3.0  # hidden width of the MLPs over that of a token
    layer_scale: float | None = None  # what the gains of branches begin with; None: there are none
    drop_path_rate: float = 0.1  # of the last layer; grows from 0 at the first
    dropout_rate: float = 0.0  # of projections and MLPs
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    projection: int = 128  # width of what the contrastive loss compares
    temperature: float = 0.1  # t of the contrastive loss
    contrast_weight: float = 0.5  # of the contrastive loss beside cross-entropy
    hidden_share: float = 0.75  # of the units that pre-training hides
    decoder_width: int = 256  # of the decoder's tokens
    decoder_layers: int = 2  # transformer blocks
    decoder_heads: int = 4  # of their attention
    max_shift: int = 0  # training records are moved around by up to so many samples
    amplitude: float = 0.0  # and scaled by 1 +- this
    noise: float = 0.0  # and get noise of this standard deviation
    lead_dropout: float = 0.0  # and lose each lead with this probability

    @property
    def unit(self) -> int:
        """Samples under one token of the last level, which are hidden together."""
        return 4 * 2 ** (len(self.depths) - 1)


class NeighborhoodAttention(nn.Module):
    """W_o [sum_j softmax_j(scale q_i.k_j + rpb[(j - i) / d + k - 1]) v_j] over the k keys of i's neighbourhood."""

    config: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
        c, length = self.config, x.shape[1]
        if c.pad_short:
            x = jnp.pad(x, ((0, 0), (0, max(c.kernel_size * c.dilation - length, 0)), (0, 0)))
        parts = [
            Linear(c.dim, use_bias=c.qkv_bias, kernel_init=_NORMAL, bias_init=_ZEROS, name=name)(x)
            for name in ("query", "key", "value")
        ]
        bias = (
            self.param("relative_positions", _NORMAL, (c.num_heads, 2 * c.kernel_size - 1)) if c.relative_bias else None
        )
        mixed = layers.neighborhood_attention_1d(
            *(part.reshape(*x.shape[:2], c.num_heads, -1) for part in parts),
            kernel_size=c.kernel_size,
            dilation=c.dilation,
            bias=bias,
            scale=c.scale,
        )
        mixed = mixed.reshape(x.shape)[:, :length]
        return Dropout(c.dropout_rate)(
            Linear(c.dim, kernel_init=_NORMAL, bias_init=_ZEROS, name="out")(mixed), train=train
        )


class NATLayer(nn.Module):
    """u = x + DropPath(g_1 NA(LN(x))); u + DropPath(g_2 MLP(LN(u)))."""

    config: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
        c = self.config

        def joined(x: Float[Array, "B N D"], branch: Float[Array, "B N D"], name: str) -> Float[Array, "B N D"]:
            if c.layer_scale is not None:
                branch = branch * self.param(name, nn.initializers.constant(c.layer_scale), (c.dim,))
            whole = jnp.ones((x.shape[0], 1, 1), x.dtype)
            return x + branch * Dropout(c.drop_path_rate)(whole, train=train)

        normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm1")(x)
        x = joined(x, NeighborhoodAttention(c, name="attention")(normed, train=train), "gain1")
        normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm2")(x)
        start = {"kernel_init": _NORMAL, "bias_init": _ZEROS}
        hidden = layers.gelu(Linear(int(c.dim * c.mlp_ratio), **start, name="fc1")(normed))
        hidden = Linear(c.dim, **start, name="fc2")(Dropout(c.dropout_rate)(hidden, train=train))
        return joined(x, Dropout(c.dropout_rate)(hidden, train=train), "gain2")


class Halve(nn.Module):
    """A convolution of three samples that moves by two: (B, N, C) to (B, N / 2, D)."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B M D"]:
        start = torch_uniform(3 * x.shape[-1])
        convolve = nn.Conv(
            self.features, (3,), 2, [(1, 1)], use_bias=self.use_bias, kernel_init=start, bias_init=start, name="conv"
        )
        return convolve(x)


class Encoder(nn.Module):
    """Tokens of the last level. Where `hidden` units are, the samples are never looked at: they are set to 0, and
    the tokens they take part in to a learned one."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L C"], hidden: Bool[Array, "B M"] | None = None, *, train: bool
    ) -> Float[Array, "B M D"]:
        c = self.config
        if x.shape[1] % c.unit:
            raise ValueError(f"a record of {x.shape[1]} samples is not a multiple of {c.unit}")
        mask_token = self.param("mask_token", _NORMAL, (c.d_model,)) if c.stage == "pretrain" else None
        if hidden is not None:
            x = jnp.where(jnp.repeat(hidden, c.unit, axis=1)[..., None], 0, x)
        # No activation between the two, as in NAT.
        x = Halve(c.d_model, name="tokenizer_1")(Halve(c.d_model // 2, name="tokenizer_0")(x))
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="tokenizer_norm")(x)
        if hidden is not None:
            x = jnp.where(jnp.repeat(hidden, c.unit // 4, axis=1)[..., None], mask_token.astype(x.dtype), x)
        number = 0
        for level, (depth, heads, dilation) in enumerate(zip(c.depths, c.num_heads, c.dilations, strict=True)):
            for layer in range(depth):
                rate = c.drop_path_rate * number / max(sum(c.depths) - 1, 1)
                config = LayerConfig(
                    dim=x.shape[-1],
                    num_heads=heads,
                    kernel_size=c.kernel_size,
                    dilation=dilation,
                    mlp_ratio=c.mlp_ratio,
                    layer_scale=c.layer_scale,
                    drop_path_rate=rate,
                    dropout_rate=c.dropout_rate,
                    layer_norm_epsilon=c.layer_norm_epsilon,
                )
                x = stack(self, lambda name, k=config: NATLayer(k, name=name), 1, x, name=f"level_{level}", first=layer,
                          train=train)  # fmt: skip
                number += 1
            if level + 1 < len(c.depths):
                x = Halve(2 * x.shape[-1], use_bias=False, name=f"down_{level}")(x)
                x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name=f"down_norm_{level}")(x)
        return nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)


class Decoder(nn.Module):
    """The samples of each unit from the tokens of all: a small transformer with learned places."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Float[Array, "B M D"], *, train: bool) -> Float[Array, "B M U"]:
        c = self.config
        places = self.param("positions", _NORMAL, (tokens.shape[1], c.decoder_width))
        x = Linear(c.decoder_width, name="in")(tokens) + places
        for i in range(c.decoder_layers):
            normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name=f"norm1_{i}")(x)
            x = x + MultiHeadAttention(c.decoder_heads, c.dropout_rate, name=f"attention_{i}")(normed, train=train)
            normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name=f"norm2_{i}")(x)
            hidden = layers.gelu(Linear(4 * c.decoder_width, name=f"fc1_{i}")(normed))
            x = x + Linear(c.decoder_width, name=f"fc2_{i}")(hidden)
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)
        return Linear(c.unit * c.channels, name="out")(x)


def hidden_units(key: Key[Array, ""], batch: int, units: int, share: float) -> Bool[Array, "B M"]:
    """round(share M) units of each record, evenly drawn. Source: card ecg_nat, Masked signal modelling."""
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, (batch, units)), axis=-1), axis=-1)
    return rank < round(share * units)


def augmented(x: Float[Array, "B L C"], config: Config, key: Key[Array, ""]) -> Float[Array, "B L C"]:
    """Records moved around, scaled, with noise and without some leads, each its own way."""
    c, (batch, length, leads) = config, x.shape
    keys = jax.random.split(key, 4)
    if c.max_shift:
        shift = jax.random.randint(keys[0], (batch, 1), -c.max_shift, c.max_shift + 1)
        x = jnp.take_along_axis(x, ((jnp.arange(length) - shift) % length)[..., None], axis=1)
    if c.amplitude:
        x = x * (1 + jax.random.uniform(keys[1], (batch, 1, 1), x.dtype, -c.amplitude, c.amplitude))
    if c.noise:
        x = x + c.noise * jax.random.normal(keys[2], x.shape, x.dtype)
    if c.lead_dropout:
        x = jnp.where(jax.random.bernoulli(keys[3], c.lead_dropout, (batch, 1, leads)), 0, x)
    return x


class Model(nn.Module):
    """`logits` of a record, and what else the losses need; longer records are the mean of crops of `length`.

    classify: `embedding`, a point on a sphere of radius 1 / sqrt(temperature), and its weight in the loss. pretrain:
    the mean squared error of each record's hidden samples while training; the logits are those of a linear probe, from
    which no gradient reaches the encoder.
    """

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *shape"]]:
        c, x = self.config, batch["x"]
        size, crops = x.shape[0], max(x.shape[1] // c.length, 1)
        if crops > 1:
            if train:
                raise ValueError(f"a training record of {x.shape[1]} samples is longer than the model's {c.length}")
            x = x[:, : crops * c.length].reshape(size * crops, c.length, x.shape[2])
        if train and (c.max_shift or c.amplitude or c.noise or c.lead_dropout):
            x = augmented(x, c, self.make_rng("dropout"))
        encoder = Encoder(c, name="encoder")
        outputs = {}
        if c.stage == "pretrain":
            decoder = Decoder(c, name="decoder")
            if train or self.is_initializing():
                hidden = hidden_units(self.make_rng("dropout"), size, x.shape[1] // c.unit, c.hidden_share)
                filled = decoder(encoder(x, hidden, train=train), train=train).astype(jnp.float32)
                error = jnp.mean(jnp.square(filled - x.reshape(filled.shape)), axis=-1)
                outputs["hidden_error"] = jnp.sum(error * hidden, axis=-1) / jnp.sum(hidden, axis=-1)
        features = jnp.mean(encoder(x, train=train), axis=1)
        if c.stage == "pretrain":
            features = jax.lax.stop_gradient(features)
        else:
            projected = jax.nn.relu(Linear(features.shape[-1], name="projection_0")(features))
            projected = Linear(c.projection, name="projection_1")(projected).astype(jnp.float32)
            length = jnp.sqrt(jnp.sum(jnp.square(projected), axis=-1, keepdims=True) + 1e-12)
            outputs["embedding"] = (projected / length * c.temperature**-0.5).reshape(size, crops, -1)[:, 0]
            outputs["contrast_weight"] = jnp.full((size,), c.contrast_weight, jnp.float32)
        # Not named as the head is: fine-tuning with few labels must not begin with what a probe learned from all.
        name = "probe" if c.stage == "pretrain" else "head"
        logits = Linear(c.num_classes, kernel_init=_NORMAL, bias_init=_ZEROS, name=name)(features)
        return outputs | {"logits": jnp.mean(logits.reshape(size, crops, -1), axis=1)}


def supervised_contrastive_loss(embedding: Float[Array, "B D"], label: Int[Array, "B *K"]) -> Float[Array, ""]:
    """mean_i -1/|P(i)| sum_{j in P(i)} log(exp(z_i.z_j) / sum_{a != i} exp(z_i.z_a)), P(i) the others of i's class.

    With several labels P(i) are the others that share one. Rows with an empty P(i) are left out of the mean; without
    any other it is 0. Source: arXiv:2004.11362, equation 2; card ecg_nat, Dual loss.
    """
    same = (label @ label.T > 0) if label.ndim == 2 else label[:, None] == label
    others = ~jnp.eye(embedding.shape[0], dtype=bool)
    positive = same & others
    scores = embedding.astype(jnp.float32) @ embedding.astype(jnp.float32).T
    log_share = scores - jax.nn.logsumexp(jnp.where(others, scores, -1e30), axis=-1, keepdims=True)
    count = jnp.sum(positive, axis=-1)
    each = -jnp.sum(jnp.where(positive, log_share, 0.0), axis=-1) / jnp.maximum(count, 1)
    return jnp.sum(each) / jnp.maximum(jnp.sum(count > 0), 1)


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy plus weighted contrast, or the hidden samples' error plus the probe's cross-entropy."""
    cross_entropy, _ = classification.loss(outputs, batch)
    if "hidden_error" in outputs:
        error = jnp.mean(outputs["hidden_error"])
        return error + cross_entropy, {"hidden_error": error, "probe": cross_entropy}
    if "embedding" not in outputs:  # pre-training, evaluated
        return cross_entropy, {}
    contrast = supervised_contrastive_loss(outputs["embedding"], batch["label"])
    weighted = jnp.mean(outputs["contrast_weight"]) * contrast
    return cross_entropy + weighted, {"cross_entropy": cross_entropy, "contrast": contrast}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    shape = (config.length, config.channels)
    return classification.example(shape=shape, num_classes=config.num_classes, batch_size=batch_size, key=key)


# --- the published block --------------------------------------------------------------------------------------------


def part_example(config: LayerConfig, *, batch_size: int, key: jax.Array) -> Float[Array, "B N D"]:
    return jax.random.normal(key, (batch_size, 2 * config.kernel_size * config.dilation, config.dim))


_PART_HPARAMS = {
    "dim": "dim",
    "num_heads": "num_heads",
    "kernel_size": "kernel_size",
    "qkv_bias": "qkv_bias",
    "qk_scale": "scale",
    "mlp_ratio": "mlp_ratio",
    "bias": "relative_bias",
    "layer_scale": "layer_scale",
    "drop_path": "drop_path_rate",
    "drop": "dropout_rate",
    "proj_drop": "dropout_rate",
}


def part_from_official(hparams: Mapping[str, Any]) -> LayerConfig:
    ours = {ours: hparams[theirs] for theirs, ours in _PART_HPARAMS.items() if theirs in hparams}
    return LayerConfig(**ours, dilation=hparams.get("dilation") or 1, pad_short=True)


def layer_to_official(config: LayerConfig) -> dict[str, Any]:
    names = ("dim", "num_heads", "kernel_size", "qkv_bias", "qk_scale", "mlp_ratio", "layer_scale", "drop_path", "drop")
    return {name: getattr(config, _PART_HPARAMS[name]) for name in names} | {
        "dilation": config.dilation,
        "attn_drop": 0.0,
    }


def attention_to_official(config: LayerConfig) -> dict[str, Any]:
    names = ("dim", "num_heads", "kernel_size", "qkv_bias", "qk_scale", "bias", "proj_drop")
    return {name: getattr(config, _PART_HPARAMS[name]) for name in names} | {
        "dilation": config.dilation,
        "attn_drop": 0.0,
    }


def _attention_rows(config: LayerConfig, theirs: str, ours: str) -> Table:
    projections = tuple(f"{ours}{name}" for name in ("query", "key", "value"))
    yield from fused_linear(f"{theirs}qkv", projections, config.dim, bias=config.qkv_bias)
    if config.relative_bias:
        yield from parameter(f"{theirs}rpb", f"{ours}relative_positions")
    yield from linear(f"{theirs}proj", f"{ours}out")


def attention_table(config: LayerConfig) -> Table:
    yield from _attention_rows(config, "", "")


def layer_table(config: LayerConfig) -> Table:
    yield from _attention_rows(config, "attn.", "attention/")
    for name in ("norm1", "norm2"):
        yield from layer_norm(name, name)
    for name in ("fc1", "fc2"):
        yield from linear(f"mlp.{name}", name)
    if config.layer_scale is not None:
        for i in (1, 2):
            yield from parameter(f"gamma{i}", f"gain{i}")


def part_call(model: nn.Module, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"y": model.apply(variables, inputs["x"])}


_TINY = {
    "length": 256,
    "d_model": 16,
    "depths": (1, 1, 1, 1),
    "kernel_size": 5,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}
_TINY_DECODER = {"decoder_width": 64, "decoder_layers": 1}
_MINI = {"d_model": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2}
_GENTLE = {"max_shift": 64, "amplitude": 0.2, "noise": 0.01, "lead_dropout": 0.1}

PAPER = Paper(
    slug="ecg_nat",
    task=classification.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(**_TINY),
        "tiny_pretrain": Config(**_TINY, **_TINY_DECODER, stage="pretrain", max_shift=32),
        "small": Config(**_GENTLE),
        "small_pretrain": Config(stage="pretrain", max_shift=64),
        "mini": Config(**_MINI, **_GENTLE),
        "mini_pretrain": Config(**_MINI, stage="pretrain", max_shift=64),
    },
    officials=tuple(
        Official(
            module=module,
            config=part_from_official,
            hparams=hparams,
            table=table,
            call=part_call,
            model=model,
            example=part_example,
        )
        for module, hparams, table, model in (
            (
                "classification/nat.py:NATLayer (attention = NeighborhoodAttention1D)",
                layer_to_official,
                layer_table,
                NATLayer,
            ),
            (
                "src/natten/natten1d.py:NeighborhoodAttention1D",
                attention_to_official,
                attention_table,
                NeighborhoodAttention,
            ),
        )
    ),
    reported={"unnamed": {"accuracy": 0.881}},  # with 1 % of the labels, from the abstract
    quirks=(
        "no activation stands between the two convolutions of the tokenizer",
        "the official attention lengthens sequences that are too short by rows of zeros, whose biases are then keys",
    ),
)
