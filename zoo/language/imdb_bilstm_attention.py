"""A Comparative Analysis of Classical Machine Learning and Deep Learning Approaches: sentiment of IMDb reviews, by a
BiLSTM with attention among others (arXiv:2605.07811).

Official code: Ermadaniarsafitri061/pba2026-kelompok-3@1c16349 (no licence). Fidelity: exact.
New: nothing but the comparison. A bidirectional LSTM reads a review to its true length; one number a place, squashed by
tanh, is the score of a softmax over places, and the states' weighted mean is classified. Linear models on TF-IDF win.
Differs: attention weights have the batch's length, not that of its longest review; the official vocabulary is counted
on test reviews too, ours on the training part alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.blocks import Dropout, Linear
from zoo.blocks.basic import torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch
from zoo.weights.table import TRANSPOSE, Table, linear, parameter

PADDING = 0  # the token of no word


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    length: int = 80  # T, words of a review that are read
    vocabulary: int = 5_000  # V, words that are known; 0 is none, 1 an unknown one
    num_classes: int = 2  # K, classes to tell apart
    embed_dim: int = 64  # E, width of a word
    hidden_dim: int = 64  # U, width of a state in each direction
    num_layers: int = 1  # of the LSTM
    pooling: Literal["attention", "last"] = "attention"  # last: the states at the ends, one from each direction
    dropout_rate: float = 0.3  # of words, between layers and before the head


def _scan(step: Callable, carry: Any, rows: Any, *, reverse: bool) -> tuple[Any, Any]:
    """jax.lax.scan in which the next row waits in the carry.

    On CPUs XLA otherwise fuses the row's address into the step's arithmetic, element by element, which then runs three
    to four times slower.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    begin, onward = (length - 1, -1) if reverse else (0, 1)

    def row(t: Int[Array, ""] | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, keepdims=False), rows)

    def one(state, t):
        carry, out = step(*state)
        return (carry, row(jnp.clip(t + onward, 0, length - 1))), out

    (carry, _), outs = jax.lax.scan(one, (carry, row(begin)), jnp.arange(length), reverse=reverse)
    return carry, outs


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def recurrence(
    inputs: Float[Array, "T B G"], kernel: Float[Array, "U G"], present: Bool[Array, "T B"], reverse: bool
) -> tuple[Float[Array, "T B U"], Float[Array, "B U"]]:
    """(h_t, 0 where nothing is present; the last one) of i, f, o = sigmoid(.), g = tanh(.) of the four quarters of
    x_t + h_(t-1) W, c_t = f c_(t-1) + i g, h_t = o tanh(c_t). The cell is float32.

    Its gradient adds up the kernel's in one product after the steps back, not step by step.
    """
    return _forward(inputs, kernel, present, reverse)[0]


def _forward(inputs, kernel, present, reverse):
    def step(carry, row):
        (cell, hidden), (x, here) = carry, row
        i, f, g, o = jnp.split((x + hidden @ kernel).astype(jnp.float32), 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        new_cell = f * cell + i * g
        squashed, here = jnp.tanh(new_cell), here[:, None]
        new_hidden = (o * squashed).astype(hidden.dtype)
        # Behind the end the state stays, so that the way back begins at the end.
        after = jnp.where(here, new_cell, cell), jnp.where(here, new_hidden, hidden)
        return after, (jnp.where(here, new_hidden, 0), (i, f, g, o, cell, squashed), hidden)

    first = jnp.zeros((inputs.shape[1], kernel.shape[0]), jnp.float32)
    carry = first, first.astype(inputs.dtype)
    (_, last), (states, kept, before) = _scan(step, carry, (inputs, present), reverse=reverse)
    return (states, last), (kept, before, kernel, present)


def _backward(reverse, saved, slopes):
    kept, before, kernel, present = saved
    d_states, d_last = slopes
    back = kernel.T.astype(jnp.float32)

    def step(carry, row):
        (d_cell, d_hidden), (i, f, g, o, cell, squashed, here, d_state) = carry, row
        here = here[:, None]
        d_new = jnp.where(here, d_hidden + d_state, 0)
        d_new_cell = jnp.where(here, d_cell, 0) + d_new * o * (1 - jnp.square(squashed))
        d_inputs = jnp.concatenate(
            [
                d_new_cell * g * i * (1 - i),
                d_new_cell * cell * f * (1 - f),
                d_new_cell * i * (1 - jnp.square(g)),
                d_new * squashed * o * (1 - o),
            ],
            axis=-1,
        )
        carry = jnp.where(here, d_new_cell * f, d_cell), jnp.where(here, 0, d_hidden) + d_inputs @ back
        return carry, d_inputs

    carry = jnp.zeros(d_last.shape, jnp.float32), d_last.astype(jnp.float32)
    _, d_inputs = _scan(step, carry, (*kept, present, d_states.astype(jnp.float32)), reverse=not reverse)
    flat = before.reshape(-1, before.shape[-1]).astype(jnp.float32), d_inputs.reshape(-1, d_inputs.shape[-1])
    return d_inputs.astype(d_states.dtype), (flat[0].T @ flat[1]).astype(kernel.dtype), None


recurrence.defvjp(_forward, _backward)


class LSTM(nn.Module):
    """torch.nn.LSTM in one direction over what is present: (states, 0 elsewhere; the state where it ends)."""

    features: int
    reverse: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], present: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T U"], Float[Array, "B U"]]:
        start, gates = torch_uniform(self.features), 4 * self.features
        inputs = Linear(gates, kernel_init=start, bias_init=start, name="input")(jnp.swapaxes(x, 0, 1))
        kernel = self.param("kernel", start, (self.features, gates))
        inputs = inputs + self.param("bias", start, (gates,))
        states, last = recurrence(inputs, jnp.asarray(kernel), present.T, self.reverse)
        return jnp.swapaxes(states, 0, 1), last


class Attention(nn.Module):
    """(sum_t a_t h_t, a) with a = softmax_t(tanh(w.h_t + b)) over what is present.

    The scores lie between -1 and 1, so that no place weighs more than e^2 times another.
    """

    @nn.compact
    def __call__(
        self, states: Float[Array, "B T D"], present: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B T"]]:
        scores = jnp.tanh(Linear(1, name="score")(states)[..., 0].astype(jnp.float32))
        weights = jax.nn.softmax(jnp.where(present, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bt,btd->bd", weights.astype(states.dtype), states), weights


def _embedding_init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype).at[PADDING].set(0.0)


class Model(nn.Module):
    """`logits` of a review, and with attention its weights over places."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B _"]]:
        c, tokens = self.config, batch["x"]
        present = batch["mask"] if "mask" in batch else jnp.ones(tokens.shape, bool)
        table = jnp.asarray(self.param("embedding", _embedding_init, (c.vocabulary, c.embed_dim)))
        words = table[tokens]
        # The row of no word is never trained.
        words = jnp.where((tokens == PADDING)[..., None], jax.lax.stop_gradient(words), words)
        states = Dropout(c.dropout_rate)(words, train=train)
        for layer in range(c.num_layers):
            if layer:
                states = Dropout(c.dropout_rate)(states, train=train)
            ways = [
                LSTM(c.hidden_dim, reverse=way == "backward", name=f"{way}_{layer}")(states, present)
                for way in ("forward", "backward")
            ]
            states, last = (jnp.concatenate(both, axis=-1) for both in zip(*ways, strict=True))
        outputs = {}
        if c.pooling == "attention":
            last, outputs["attention"] = Attention(name="attention")(states, present)
        last = Dropout(c.dropout_rate)(last, train=train)
        return outputs | {"logits": Linear(c.num_classes, name="head")(last)}


def tf_idf(tokens: Int[Array, "N T"], document_frequency: Float[Array, " V"], documents: int) -> Float[Array, "N V"]:
    """Counts of each word times log((1 + N) / (1 + df)) + 1, rows of length one; none and unknown words are left out.

    `document_frequency` is of the `documents` training texts. Source: card imdb_bilstm_attention, Model ("Classical
    side"); scikit-learn's convention.
    """
    size = document_frequency.shape[0]
    counts = jax.vmap(lambda row: jnp.zeros(size).at[row].add(1.0))(tokens)
    weight = jnp.log((1.0 + documents) / (1.0 + document_frequency)) + 1.0
    weighted = (counts * weight).at[:, :2].set(0.0)
    return weighted / jnp.maximum(jnp.linalg.norm(weighted, axis=-1, keepdims=True), 1e-12)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return classification.example(
        shape=(config.length,),
        num_classes=config.num_classes,
        batch_size=batch_size,
        key=key,
        vocabulary=config.vocabulary,
        masked=True,
    )


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "vocab_size": "vocabulary",
    "embed_dim": "embed_dim",
    "hidden_dim": "hidden_dim",
    "num_layers": "num_layers",
    "num_classes": "num_classes",
    "dropout": "dropout_rate",
}


def config_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}


def official_table(config: Config) -> Table:
    yield from parameter("embedding.weight", "embedding")
    for layer in range(config.num_layers):
        for way, suffix in (("forward", ""), ("backward", "_reverse")):
            for theirs, ours in (("ih", "input/"), ("hh", "")):
                name = f"lstm.{{}}_{theirs}_l{layer}{suffix}"
                yield from parameter(name.format("weight"), f"{way}_{layer}/{ours}kernel", TRANSPOSE)
                yield from parameter(name.format("bias"), f"{way}_{layer}/{ours}bias")
    if config.pooling == "attention":
        yield from linear("attention", "attention/score")
    yield from linear("fc", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    tokens, lengths = inputs["x"], inputs["lengths"]
    outputs = model.apply(variables, {"x": tokens, "mask": jnp.arange(tokens.shape[1]) < lengths[:, None]})
    found = {"logits": outputs["logits"]}
    if "attention" in outputs:  # officially as wide as the longest review
        found["attention_weights"] = outputs["attention"][:, : int(np.max(np.asarray(lengths)))]
    return found


def _official(module: str, pooling: Literal["attention", "last"]) -> Official:
    def config(hparams: Mapping[str, Any]) -> Config:
        return Config(
            **{ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}, pooling=pooling
        )

    return Official(
        module=f"DL/models.py:{module}",
        config=config,
        hparams=config_to_official,
        table=official_table,
        call=official_call,
    )


PAPER = Paper(
    slug="imdb_bilstm_attention",
    task=classification.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(length=40, vocabulary=50, embed_dim=16, hidden_dim=16, dropout_rate=0.0),
        "tiny_last": Config(length=40, vocabulary=50, embed_dim=16, hidden_dim=16, dropout_rate=0.0, pooling="last"),
        "imdb": Config(),
        "imdb_last": Config(pooling="last"),
    },
    officials=(
        _official("BiLSTMAttentionClassifier", "attention"),
        _official("BiLSTMClassifier", "last"),
    ),
    parameter_counts={"imdb": 386_947, "imdb_last": 386_818},
    reported={"imdb": {"accuracy": 0.7056}, "imdb_last": {"accuracy": 0.6257}, "linear_svm": {"accuracy": 0.853}},
    quirks=(
        "tanh of the scalar score: no place weighs more than e^2 times another",
        "the returned weights are as wide as the longest review of the batch; ours as wide as the batch",
        "the official vocabulary counts words of validation and test reviews too; ours does not",
        "the test is run with the weights of the last epoch; ours with the best on validation",
    ),
)
