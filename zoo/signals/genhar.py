"""GenHAR: Generalizing Cross-domain Human Activity Recognition for Last-mile Delivery (arXiv:2605.22086).

Official code: Sensor-Foundation-Model/GenHAR@15c64f5 (no licence). Fidelity: exact.
New: the six channels of a motion sensor are the tokens, each described by its amplitude spectrum, which knows no phase;
of that, what lies far above the strongest frequency is cut off; and no token looks at another axis of the other sensor.
So attention is between six tokens, however long the window is.
Differs: three linear layers, which the official code holds and never runs, are the collection `unused`; the mask is for
any number of three-axis sensors; random rotations, officially five turned copies of the data, are drawn in each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks import BatchNorm, Dropout, Linear, MultiHeadAttention, stack
from zoo.paper import Official, Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch
from zoo.weights.table import TRANSPOSE, Table, batch_norm, layer_norm, linear, multihead_attention, parameter

_AXES = 3  # of a motion sensor


@dataclass(frozen=True)
class Config:
    """Sizes and constants; channels are x, y, z of the accelerometer, then of the gyroscope."""

    length: int = 120  # L, samples of a window (6 s at 20 Hz)
    channels: int = 6  # C, one token each
    num_classes: int = 4  # K, classes to tell apart
    d_model: int = 64  # D, width of a token
    d_ff: int = 32  # hidden width of the feed-forward layers
    num_layers: int = 1  # encoder layers
    num_heads: int = 1  # of attention
    cutoff_quarters: int = 1  # quarters of what lies above the strongest frequency that are kept (filter_pos)
    selective_mask: bool = True  # no attention between different axes of different sensors
    rotate: bool = False  # training windows are turned at random, all sensors of a window alike
    dropout_rate: float = 0.1  # of attention weights, its outputs and feed-forward layers
    batch_norm_epsilon: float = 1e-5  # added to the variance under the root
    layer_norm_epsilon: float = 1e-5  # likewise


def low_passed_amplitude(x: Float[Array, "B C L"], *, fraction: float) -> Float[Array, "B C F"]:
    """|rfft x| of the bins 1..L/2, those above f0 + trunc(fraction (F - f0)) set to 0, f0 the strongest one.

    Circular shifts and constants change nothing. Where the amplitude is 0, so is its gradient. Source: card genhar,
    Mechanism 1 and 2.
    """
    spectrum = jnp.fft.rfft(x.astype(jnp.float32))[..., 1:]
    squared = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    there = squared > 0
    amplitude = jnp.where(there, jnp.sqrt(jnp.where(there, squared, 1.0)), 0.0)
    kept = layers.adaptive_low_pass_mask(jax.lax.stop_gradient(amplitude), fraction=fraction)
    return jnp.where(kept, amplitude, 0.0).astype(x.dtype)


def selective_mask(channels: int) -> Bool[np.ndarray, "C C"]:
    """True for pairs of the same sensor, and for the same axis of different sensors. Source: card genhar, step 4."""
    if channels % _AXES:
        raise ValueError(
            f"the selective mask is for sensors of {_AXES} axes, not for {channels} channels: switch it off"
        )
    sensor, axis = np.divmod(np.arange(channels), _AXES)
    return (sensor[:, None] == sensor) | (axis[:, None] == axis)


class Unused(nn.Module):
    """The weights of a layer that the official code holds and never runs."""

    @nn.compact
    def __call__(self, width: int) -> None:
        self.variable("unused", "kernel", jnp.zeros, (width, width))
        self.variable("unused", "bias", jnp.zeros, (width,))


class EncoderLayer(nn.Module):
    """Post-norm: x = LN(x + Attn(x)); x = LN(x + W_2 drop(relu(W_1 x)))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B C D"], *, train: bool) -> Float[Array, "B C D"]:
        c = self.config
        mask = jnp.asarray(selective_mask(x.shape[1])) if c.selective_mask else None
        attention = MultiHeadAttention(c.num_heads, c.dropout_rate, packed=True, name="attention")
        x = x + Dropout(c.dropout_rate)(attention(x, mask=mask, train=train), train=train)
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm1")(x)
        hidden = Dropout(c.dropout_rate)(jax.nn.relu(Linear(c.d_ff, name="ffn_in")(x)), train=train)
        x = x + Dropout(c.dropout_rate)(Linear(c.d_model, name="ffn_out")(hidden), train=train)
        for name in ("linear_q", "linear_k", "linear_v"):
            Unused(name=name)(c.d_model)
        return nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm2")(x)


class Model(nn.Module):
    """Spectra of the channels, embedded, mixed by attention and averaged: the logits of the activities."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B K"]:
        c, x = self.config, batch["x"]
        if train and c.rotate:
            x = turned(x, self.make_rng("dropout"))
        amplitude = low_passed_amplitude(jnp.swapaxes(x, 1, 2), fraction=c.cutoff_quarters / 4)
        tokens = Linear(c.d_model, name="embedding")(amplitude)
        # The statistics are each channel's, over windows and features.
        normed = BatchNorm(c.batch_norm_epsilon, name="norm")(jnp.swapaxes(tokens, 1, 2), train=train)
        tokens = jax.nn.relu(jnp.swapaxes(normed, 1, 2))
        tokens = stack(self, partial(EncoderLayer, c), c.num_layers, tokens, train=train)
        return Linear(c.num_classes, name="head")(jnp.mean(tokens, axis=1))


def turned(x: Float[Array, "B L C"], key: jax.Array) -> Float[Array, "B L C"]:
    """Each window in a frame of its own, evenly distributed; all its sensors in the same."""
    rotation = layers.quaternion_to_matrix(jax.random.normal(key, (x.shape[0], 4))).astype(x.dtype)
    sensors = x.reshape(*x.shape[:2], -1, _AXES)
    return jnp.einsum("bij,blsj->blsi", rotation, sensors).reshape(x.shape)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    shape = (config.length, config.channels)
    return classification.example(shape=shape, num_classes=config.num_classes, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "channel_size": "channels",
    "d_model": "d_model",
    "nhead": "num_heads",
    "num_layers": "num_layers",
    "dim_feedforward": "d_ff",
    "seq_length": "length",
    "output_size": "num_classes",
    "is_mask": "selective_mask",
    "filter_pos": "cutoff_quarters",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    return Config(**{ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams})


def config_to_official(config: Config) -> dict[str, Any]:
    # is_trans_pt keeps the official model off the GPU.
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()} | {"is_trans_pt": True}


def official_table(config: Config) -> Table:
    yield from linear("embedding", "embedding")
    yield from batch_norm("bn", "norm")
    for i in range(config.num_layers):
        theirs, ours = f"layers.{i}", f"layers_{i}"
        yield from multihead_attention(f"{theirs}.self_attn", f"{ours}/attention", config.d_model)
        yield from linear(f"{theirs}.linear1", f"{ours}/ffn_in")
        yield from linear(f"{theirs}.linear2", f"{ours}/ffn_out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/norm2")
        for name in ("linear_q", "linear_k", "linear_v"):
            yield from parameter(f"{theirs}.{name}.weight", f"{ours}/{name}/kernel", TRANSPOSE, collection="unused")
            yield from parameter(f"{theirs}.{name}.bias", f"{ours}/{name}/bias", collection="unused")
    yield from linear("fc", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"logits": model.apply(variables, {"x": jnp.swapaxes(inputs["x"], 1, 2)})}


PAPER = Paper(
    slug="genhar",
    task=classification.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(),  # the paper's own sizes, which are tiny
        "rotated": Config(rotate=True),
        "basic_motions": Config(length=100),  # not in the paper: ten samples a second
    },
    officials=(
        Official(
            module="models/GenHAR.py:TimeSeriesTransformer",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"tiny": 25_264},  # and 12,480 in `unused`
    quirks=(
        "three linear layers of each encoder layer are never run: they are carried along and not trained",
        "the cut-off is found by a loop over windows and channels; here it is one comparison",
    ),
)
