"""Baikal-GVD: neutrino candidates from the raw hits of a telescope by three set transformers (arXiv:2605.11176).

Official code: ml-inr/Baikal-ML@c282d9c (no licence), precursors of two of the networks. Fidelity: partial, exact for
these encoders; the three final networks and the adaptation are not public and follow the card.
New: one network rejects showers on raw hits, one finds the particle's hits among noise and tells how late each is, one
decides on the hits that are left; attention over unordered hits, whose times and places are features; batch norm, and
a domain classifier behind a reversed gradient, so that what is learned from simulation holds for measured events.
Differs: padding never leaks. In the torch precursor a padded hit's logit is raised by 1 instead of being left out
(`padding="plus_one"`), in the TensorFlow one the batch statistics contain it (`masked_statistics=False`). All three
networks train in one run; the third sees the second's decisions and does not change them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.blocks import BatchNorm, Dropout, Linear, stack
from zoo.blocks.basic import activation_function
from zoo.paper import Official, Paper
from zoo.tasks import event_reconstruction
from zoo.tasks.event_reconstruction import focal_loss
from zoo.tasks.task import Batch
from zoo.weights.table import Table, batch_norm, layer_norm, linear, multihead_attention, parameter

_CHARGE, _TIME = 0, 1  # columns of a hit
_DEVIATIONS = (3.67, 1386.0, 40.1, 39.0, 154.6)


@dataclass(frozen=True)
class Encoder:
    """Of one set transformer."""

    d_model: int = 128  # D, width of tokens
    num_layers: int = 5  # of attention and feed-forward layer
    num_heads: int = 4  # of attention
    d_ff: int = 512  # hidden width of the feed-forward layers
    embedding: str = "linear"  # of a hit: linear | zeros, which fills the features up to D
    activation: str = "gelu"  # of the feed-forward layers, the exact form, or relu
    norm: str = "batch"  # batch, with statistics of the hits there are | torch_batch | layer
    masked_statistics: bool = True  # False: those of batch contain padded places too, as in the TensorFlow code
    norm_epsilon: float = 1e-3  # added to the variance
    norm_momentum: float = 0.01  # share of the batch in the running statistics
    dropout_rate: float = 0.0  # of attention, feed-forward layer and their outputs
    class_token: bool = False  # a learned token is read instead of the mean of all
    padding: str = "masked"  # masked | plus_one, see the module's docstring


@dataclass(frozen=True)
class Config:
    """The pipeline; charges are in photoelectrons, times in ns, lengths in m."""

    num_hits: int = 96  # N, places for the hits of an event
    fast: Encoder = field(default_factory=lambda: Encoder(d_model=64, num_layers=3, d_ff=256))  # N1: showers or not
    denoiser: Encoder = field(default_factory=Encoder)  # N2: signal or noise, and how late
    candidate: Encoder = field(default_factory=Encoder)  # N3: neutrino or not, on the hits that N2 keeps
    head_widths: tuple[int, int] = (128, 32)  # of the classifiers of events
    head_dropout_rate: float = 0.2  # of their hidden layers
    clean: bool = True  # N3 sees what N2 keeps and N2's residuals; False: the raw hits
    hit_threshold: float = 0.5  # of the signal's probability
    fast_threshold: float = 0.5  # of the neutrino's probability, below which the pipeline drops an event after N1
    residual_scale: float = 10.0  # ns: residuals are learned in this unit
    max_charge: float = 100.0  # charges are cut there
    additive_noise: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)  # of training hits
    charge_noise: float = 0.0  # relative, of training hits
    gamma: float = 2.0  # of the events' focal loss
    class_weights: tuple[float, float] = (1.0, 1.0)  # of background and neutrino
    hit_loss: str = "cross_entropy"  # cross_entropy | residual_penalty
    penalty: tuple[float, float] = (0.75, 0.3)  # factors of the whole and of the penalty in residual_penalty
    residual_weight: float = 1.0  # of the residuals' squared error
    adaptation: float = 0.0  # largest factor of the reversed gradient; 0: no domain classifiers
    adaptation_steps: int = 1000  # of training, until the factor is the largest
    domain_width: int = 64  # hidden width of a domain classifier


class MaskedBatchNorm(nn.Module):
    """Batch norm over the hits there are: padded places neither count nor matter. Keras's statistics: both biased."""

    epsilon: float
    momentum: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], present: Bool[Array, "B N"] | None, *, train: bool
    ) -> Float[Array, "B N D"]:
        size = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, size)
        var = self.variable("batch_stats", "var", jnp.ones, size)
        scale = self.param("scale", nn.initializers.ones, size)
        bias = self.param("bias", nn.initializers.zeros, size)
        wide, center, spread = x.astype(jnp.float32), mean.value, var.value
        if train:
            where = None if present is None else present[..., None]
            count = jnp.maximum(jnp.sum(jnp.ones(x.shape[:2]) if present is None else present), 1)
            center = jnp.sum(wide, axis=(0, 1), where=where) / count
            spread = jnp.sum(jnp.square(wide - center), axis=(0, 1), where=where) / count
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                mean.value += self.momentum * (center - mean.value)
                var.value += self.momentum * (spread - var.value)
        return ((wide - center) * jax.lax.rsqrt(spread + self.epsilon) * scale + bias).astype(x.dtype)


class EncoderLayer(nn.Module):
    """Post-norm: u = norm(x + Attn(x)); norm(u + W_2 act(W_1 u)). `tokens` are x and which of them are there."""

    config: Encoder

    @nn.compact
    def __call__(
        self, tokens: tuple[Float[Array, "B N D"], Bool[Array, "B N"]], *, train: bool
    ) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"]]:
        c = self.config
        x, present = tokens
        drop = partial(Dropout(c.dropout_rate), train=train)
        query, key, value = (
            Linear(c.d_model, name=n)(x).reshape(*x.shape[:2], c.num_heads, -1) for n in ("query", "key", "value")
        )
        if c.padding == "plus_one":
            # The class token, which comes first, is raised as padding is.
            raised = ~present if not c.class_token else (~present).at[:, 0].set(True)
            seen = {"bias": raised[:, None, None].astype(jnp.float32)}
        else:
            seen = {"mask": present[:, None, :, None] & present[:, None, None]}
        mixed = layers.dot_product_attention(query, key, value, **seen).reshape(x.shape)
        x = self._norm("norm1", x + drop(Linear(c.d_model, name="out")(mixed)), present, train)
        hidden = drop(activation_function(c.activation)(Linear(c.d_ff, name="ffn_in")(x)))
        return self._norm("norm2", x + drop(Linear(c.d_model, name="ffn_out")(hidden)), present, train), present

    def _norm(self, name: str, x: Array, present: Array, train: bool) -> Array:
        c = self.config
        if c.norm == "layer":
            return nn.LayerNorm(c.norm_epsilon, name=name)(x)
        if c.norm == "torch_batch":
            return BatchNorm(c.norm_epsilon, c.norm_momentum, name=name)(x, train=train)
        norm = MaskedBatchNorm(c.norm_epsilon, c.norm_momentum, name=name)
        return norm(x, present if c.masked_statistics else None, train=train)


class SetEncoder(nn.Module):
    """Tokens of hits, which nothing but their features orders; with a class token, it comes first."""

    config: Encoder

    @nn.compact
    def __call__(
        self, features: Float[Array, "B N F"], present: Bool[Array, "B N"], *, train: bool
    ) -> Float[Array, "B _ D"]:
        c = self.config
        if c.embedding == "zeros":
            x = jnp.pad(features, ((0, 0), (0, 0), (0, c.d_model - features.shape[-1])))
        else:
            x = Linear(c.d_model, name="embedding")(features)
        if c.class_token:
            token = self.param("class_token", nn.initializers.normal(1.0), (1, 1, c.d_model)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c.d_model)), x], axis=1)
            present = jnp.pad(present, ((0, 0), (1, 0)), constant_values=True)
        return stack(self, partial(EncoderLayer, c), c.num_layers, (x, present), train=train)[0]


def pool(tokens: Float[Array, "B _ D"], present: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    """The class token where there is one, else the mean over hits; 0 of an event without any."""
    if tokens.shape[1] > present.shape[1]:
        return tokens[:, 0]
    kept = jnp.where(present[..., None], tokens.astype(jnp.float32), 0.0)
    return (jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(present, axis=1), 1)[:, None]).astype(tokens.dtype)


class EventHead(nn.Module):
    """Logits of background and neutrino."""

    widths: tuple[int, int]
    dropout_rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, train: bool) -> Float[Array, "B 2"]:
        for i, width in enumerate(self.widths):
            hidden = jax.nn.relu(Linear(width, name=f"hidden_{i}")(x))
            x = Dropout(self.dropout_rate)(hidden, train=train)
        return Linear(2, name="out")(x)


class HitHead(nn.Module):
    """Of each hit, logits of noise and signal, and its residual in the unit it is learned in."""

    @nn.compact
    def __call__(self, tokens: Float[Array, "B N D"]) -> tuple[Float[Array, "B N 2"], Float[Array, "B N"]]:
        return Linear(2, name="classes")(tokens), Linear(1, name="residual")(tokens)[..., 0]


class DomainHead(nn.Module):
    """The logit of being measured, of what the gradient of its loss is to make undecidable."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], factor: Float[Array, ""]) -> Float[Array, " B"]:
        x = layers.reverse_gradient(x, factor)
        return Linear(1, name="out")(jax.nn.relu(Linear(self.width, name="hidden")(x)))[..., 0]


def adaptation_factor(progress: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """2 / (1 + exp(-10 p)) - 1, from 0 to 1 with the share p of training that is done."""
    return 2.0 / (1.0 + jnp.exp(-10.0 * progress)) - 1.0


def penalised_entropy(
    signal_probability: Float[Array, "*B"],
    label: Int[Array, "*B"],
    residual: Float[Array, "*B"],
    entropy: Float[Array, "*B"],
    *,
    factors: tuple[float, float],
    signal_limit: float | None = None,
) -> Float[Array, "*B"]:
    """a (entropy + b p |residual|), the second part for noise that is called signal, more the later it is.

    With a `signal_limit` (ns) also for signal that is called so and is as late as that: to be called noise.
    """
    called, late = signal_probability > 0.5, jnp.abs(residual)
    wrong = called & (label == 0)
    if signal_limit is not None:
        wrong |= called & (label == 1) & (late >= signal_limit)
    return factors[0] * (entropy + jnp.where(wrong, factors[1] * signal_probability * late, 0.0))


class Model(nn.Module):
    """Three networks one after the other; `__call__` runs all of them on all events, `pipeline` says what is kept."""

    config: Config

    def setup(self):
        c = self.config
        head = partial(EventHead, c.head_widths, c.head_dropout_rate)
        self.fast, self.fast_head = SetEncoder(c.fast), head()
        self.denoiser, self.hit_head = SetEncoder(c.denoiser), HitHead()
        self.candidate, self.candidate_head = SetEncoder(c.candidate), head()
        if c.adaptation:
            self.domain_heads = {name: DomainHead(c.domain_width) for name in ("fast", "hits", "event")}
            self.done = self.variable("progress", "steps", jnp.zeros, (), jnp.int32)
        # Of the training hits: the data's, see `constants`; until then about those of the authors' data.
        self.mean = self.variable("constants", "mean", jnp.zeros, (5,))
        self.deviation = self.variable("constants", "deviation", jnp.array, _DEVIATIONS)

    def normalize(self, hits: Float[Array, "B N 5"]) -> Float[Array, "B N 5"]:
        cut = hits.at[..., _CHARGE].min(self.config.max_charge)
        return (cut - self.mean.value.astype(hits.dtype)) / self.deviation.value.astype(hits.dtype)

    def reject(self, features, present, *, train: bool = False) -> tuple[Float[Array, "B 2"], Float[Array, "B D"]]:
        """N1: logits of background and neutrino, and what they are decided on."""
        known = pool(self.fast(features, present, train=train), present)
        return self.fast_head(known, train=train), known

    def denoise(self, features, present, *, train: bool = False):
        """N2: logits of noise and signal and the residual of each hit, and the mean of its tokens."""
        tokens = self.denoiser(features, present, train=train)
        hits = tokens[:, -present.shape[1] :]
        return *self.hit_head(hits), pool(tokens, present)

    def decide(self, features, present, logits, residual, *, train: bool = False):
        """N3: logits of background and neutrino on the hits that N2 calls signal, their residuals a sixth feature."""
        if not self.config.clean:
            kept, residual = present, jnp.zeros_like(residual)
        else:
            kept = present & (jax.nn.softmax(logits.astype(jnp.float32))[..., 1] > self.config.hit_threshold)
        features = jnp.concatenate([features, jax.lax.stop_gradient(residual)[..., None]], axis=-1)
        # What is not kept is padding: its features are nobody's business.
        known = pool(self.candidate(jnp.where(kept[..., None], features, 0), kept, train=train), kept)
        return self.candidate_head(known, train=train), known

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Any]:
        c = self.config
        hits, present, shift = batch["hits"], batch["hit_mask"], None
        if train and (c.charge_noise or any(c.additive_noise)):
            hits, shift = self._noisy(hits)
        # The scale of padding must not matter, not even as an overflow.
        features = jnp.where(present[..., None], self.normalize(hits), 0)
        fast, in_fast = self.reject(features, present, train=train)
        logits, residual, in_hits = self.denoise(features, present, train=train)
        event, in_event = self.decide(features, present, logits, residual, train=train)
        outputs = {"fast": fast, "hits": logits, "residual": residual * c.residual_scale, "event": event}
        if c.adaptation:
            factor = c.adaptation * adaptation_factor(jnp.minimum(self.done.value / c.adaptation_steps, 1.0))
            known = {"fast": in_fast, "hits": in_hits, "event": in_event}
            domains = [self.domain_heads[name](x, factor) for name, x in known.items()]
            outputs["domain"] = jnp.stack(domains, axis=-1)
            if train and not self.is_initializing() and self.is_mutable_collection("progress"):
                self.done.value += 1
        if "event" in batch:
            late = batch["residual"] if shift is None else batch["residual"] - shift
            outputs["losses"] = event_losses(c, outputs, batch | {"residual": late})
        return outputs

    def _noisy(self, hits: Float[Array, "B N 5"]) -> tuple[Float[Array, "B N 5"], Float[Array, "B N"]]:
        keys = jax.random.split(self.make_rng("dropout"))
        noise = jax.random.normal(keys[0], hits.shape, hits.dtype) * jnp.asarray(self.config.additive_noise, hits.dtype)
        relative = 1 + self.config.charge_noise * jax.random.normal(keys[1], hits.shape[:2], hits.dtype)
        return (hits + noise).at[..., _CHARGE].multiply(relative), noise[..., _TIME]


def event_losses(config: Config, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each event, the loss of each of its tasks; measured events only have that of the domain classifiers."""
    c, present, signal = config, batch["hit_mask"], batch["signal"]
    known = 1.0 - batch["domain"].astype(jnp.float32)

    def over_hits(values: Float[Array, "B N"], chosen: Bool[Array, "B N"]) -> Float[Array, " B"]:
        return jnp.sum(jnp.where(chosen, values, 0.0), axis=1) / jnp.maximum(jnp.sum(chosen, axis=1), 1)

    of_hits = focal_loss(outputs["hits"], signal, gamma=0.0)
    if c.hit_loss == "residual_penalty":
        chance = jax.nn.softmax(outputs["hits"].astype(jnp.float32))[..., 1]
        of_hits = penalised_entropy(chance, signal, batch["residual"], of_hits, factors=c.penalty)
    late = (outputs["residual"].astype(jnp.float32) - batch["residual"]) / c.residual_scale
    losses = {
        "fast": known * focal_loss(outputs["fast"], batch["event"], gamma=c.gamma, weights=c.class_weights),
        "hits": known * over_hits(of_hits, present),
        "residual": known * c.residual_weight * over_hits(jnp.square(late), present & (signal == 1)),
        "event": known * focal_loss(outputs["event"], batch["event"], gamma=c.gamma, weights=c.class_weights),
    }
    if "domain" in outputs:
        logits = outputs["domain"].astype(jnp.float32)
        measured = batch["domain"][:, None] == 1
        losses["domain"] = jnp.sum(jax.nn.softplus(jnp.where(measured, -logits, logits)), axis=-1)
    return losses


def loss(outputs: Mapping[str, Any], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of all tasks' losses: means over simulated events, of the domain classifiers over all."""
    share = jnp.mean(1.0 - batch["domain"].astype(jnp.float32))
    means = {
        f"{name}_loss": jnp.mean(values) / (1.0 if name == "domain" else jnp.maximum(share, 1e-6))
        for name, values in outputs["losses"].items()
    }
    return sum(means.values(), jnp.zeros(())), means


def constants(config: Config, data: Any) -> dict[str, Any]:
    """Mean and standard deviation of the training hits."""
    train = data.train if hasattr(data, "train") else data
    hits = np.asarray(train.hits)[np.asarray(train.present)]
    hits[:, _CHARGE] = np.minimum(hits[:, _CHARGE], config.max_charge)
    return {"mean": hits.mean(axis=0), "deviation": hits.std(axis=0)}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return event_reconstruction.example(num_hits=config.num_hits, batch_size=batch_size, key=key)


def pipeline(model: Model, variables: Mapping[str, Any], batch: Batch) -> dict[str, Array]:
    """Probabilities: of a neutrino after N1, of signal and the residual (ns) of each hit, of a neutrino after N3.

    Of an event that N1 drops the last is 0. Nothing depends on Python, so that it jits: every network sees all events.
    """
    outputs = model.apply(variables, {name: batch[name] for name in ("hits", "hit_mask")})
    fast, hits, event = (
        jax.nn.softmax(outputs[name].astype(jnp.float32))[..., 1] for name in ("fast", "hits", "event")
    )
    return {
        "p_nu_fast": fast,
        "hit_prob": jnp.where(batch["hit_mask"], hits, 0.0),
        "t_res": outputs["residual"],
        "p_nu": jnp.where(fast >= model.config.fast_threshold, event, 0.0),
    }


class DroppingPipeline:
    """The same, eagerly: events that N1 drops never reach N2 and N3. Sizes are rounded up to powers of two, so that few
    programs are compiled."""

    def __init__(self, model: Model):
        self.model = model

        def first(variables, hits, present):
            features = model.apply(variables, hits, method="normalize")
            features = jnp.where(present[..., None], features, 0)
            logits, _ = model.apply(variables, features, present, method="reject")
            return features, jax.nn.softmax(logits)[:, 1]

        def rest(variables, features, present):
            logits, residual, _ = model.apply(variables, features, present, method="denoise")
            event, _ = model.apply(variables, features, present, logits, residual, method="decide")
            scale = model.config.residual_scale
            return jax.nn.softmax(logits)[..., 1], residual * scale, jax.nn.softmax(event)[:, 1]

        self._first, self._rest = jax.jit(first), jax.jit(rest)

    def __call__(self, variables: Mapping[str, Any], batch: Batch) -> dict[str, np.ndarray]:
        present = np.asarray(batch["hit_mask"])
        features, fast = self._first(variables, batch["hits"], batch["hit_mask"])
        fast = np.asarray(fast)
        kept = np.flatnonzero(fast >= self.model.config.fast_threshold)
        found = {"p_nu_fast": fast, "hit_prob": np.zeros(present.shape, np.float32)}
        found |= {"t_res": np.zeros(present.shape, np.float32), "p_nu": np.zeros(len(fast), np.float32)}
        if len(kept):
            size = min(len(fast), 1 << (len(kept) - 1).bit_length())
            rows = np.resize(kept, size)  # filled up with repetitions
            hits, late, event = self._rest(variables, features[rows], batch["hit_mask"][rows])
            found["hit_prob"][kept] = np.where(present[kept], np.asarray(hits)[: len(kept)], 0.0)
            found["t_res"][kept], found["p_nu"][kept] = np.asarray(late)[: len(kept)], np.asarray(event)[: len(kept)]
        return found


# --- the official code: encoders of hits ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """An official encoder with its heads, and, for the TensorFlow one, the losses beside it."""

    encoder: Encoder
    in_features: int = 5
    out_size: int = 2
    second_out_size: int | None = None
    only_class_token: bool = False
    drops_padding: bool = False  # tokens of padded hits are 0 before the head, as in torch without gradients
    penalty: tuple[float, float, float, float] = (0.75, 0.3, 10.0, 0.0)  # factors, limit (ns), share of late signal
    gamma: float = 2.0


class TorchPart(nn.Module):
    """The torch encoder: a token's outputs of both heads, or those of the class token alone."""

    config: Part

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B *N F"]:
        c = self.config
        tokens = SetEncoder(c.encoder, name="encoder")(batch["x"], batch["mask"], train=train)
        if c.drops_padding:
            present = jnp.pad(batch["mask"], ((0, 0), (tokens.shape[1] - batch["mask"].shape[1], 0)), constant_values=1)
            tokens = jnp.where(present[..., None], tokens, 0.0)
        y = Linear(c.out_size, name="head")(tokens)
        if c.second_out_size is not None:
            return jnp.concatenate([y, Linear(c.second_out_size, name="second_head")(tokens)], axis=-1)
        return y[:, 0] if c.encoder.class_token and c.only_class_token else y


class TensorflowPart(nn.Module):
    """The TensorFlow encoder: probabilities of signal and noise, in this order; padded hits are noise."""

    config: Part

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B N 2"]:
        tokens = SetEncoder(self.config.encoder, name="encoder")(batch["x"], batch["mask"], train=train)
        chances = jax.nn.softmax(Linear(2, name="head")(tokens))
        return jnp.where(batch["mask"][..., None], chances, jnp.array([0.0, 1.0]))


def part_example(config: Part, *, batch_size: int, key: jax.Array) -> Batch:
    return {"x": jnp.zeros((batch_size, 6, config.in_features)), "mask": jnp.ones((batch_size, 6), bool)}


def torch_from_official(hparams: Mapping[str, Any]) -> Part:
    batched, dropping = hparams.get("use_batch_norm", False), hparams.get("no_grad", False)
    encoder = Encoder(
        d_model=hparams["hidden_size"],
        num_layers=hparams["num_layers"],
        num_heads=hparams["n_heads"],
        d_ff=hparams["dim_feedforward_size"],
        activation="relu",
        norm="torch_batch" if batched else "layer",
        norm_epsilon=1e-5,
        norm_momentum=0.1,
        dropout_rate=float(hparams.get("dropout_p", 0.0)),
        class_token=bool(hparams.get("use_cls_token", False)),
        padding="masked" if dropping else "plus_one",
    )
    return Part(
        encoder,
        in_features=hparams["in_features"],
        out_size=hparams["out_size"],
        second_out_size=hparams.get("second_head_out_size"),
        only_class_token=bool(hparams.get("return_only_cls_token", False)),
        drops_padding=dropping,
    )


def torch_to_official(part: Part) -> dict[str, Any]:
    e = part.encoder
    return {
        "in_features": part.in_features,
        "hidden_size": e.d_model,
        "num_layers": e.num_layers,
        "dim_feedforward_size": e.d_ff,
        "n_heads": e.num_heads,
        "out_size": part.out_size,
        "dropout_p": e.dropout_rate,
        "use_batch_norm": e.norm == "torch_batch",
        "use_cls_token": e.class_token,
        "return_only_cls_token": part.only_class_token,
        "second_head_out_size": part.second_out_size,
    }


def torch_table(part: Part) -> Table:
    norm = batch_norm if part.encoder.norm == "torch_batch" else layer_norm
    yield from linear("first_layer", "encoder/embedding")
    if part.encoder.class_token:
        yield from parameter("class_token", "encoder/class_token")
    for i in range(part.encoder.num_layers):
        theirs, ours = f"enc.layers.{i}", f"encoder/layers_{i}"
        yield from multihead_attention(f"{theirs}.self_attn", ours, part.encoder.d_model)
        yield from linear(f"{theirs}.linear1", f"{ours}/ffn_in")
        yield from linear(f"{theirs}.linear2", f"{ours}/ffn_out")
        yield from norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from linear("head", "head")
    if part.second_out_size is not None:
        yield from linear("second_head", "second_head")


def torch_call(model: TorchPart, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"y": model.apply(variables, {"x": inputs["x"], "mask": jnp.asarray(inputs["mask"], bool)})}


def tensorflow_from_official(hparams: Mapping[str, Any]) -> Part:
    losses = hparams.get("losses", {})
    late, focal = losses.get("tres", {}), losses.get("focal", {})
    names = ("loss_norm_coeff", "pen_coeff", "t_res_lim", "mark_big_tres_as_noise")
    encoder = Encoder(
        d_model=hparams["d_model"],
        num_layers=hparams["num_layers"],
        num_heads=hparams["num_heads"],
        d_ff=hparams["d_ff"],
        embedding="zeros",
        masked_statistics=False,
    )
    penalty = tuple(float(late.get(n, v)) for n, v in zip(names, Part(encoder).penalty, strict=True))
    return Part(encoder, penalty=penalty, gamma=float(focal.get("gamma", 2.0)))


def tensorflow_to_official(part: Part) -> dict[str, Any]:
    return {n: getattr(part.encoder, n) for n in ("num_layers", "num_heads", "d_model", "d_ff")}


def tensorflow_table(part: Part) -> Table:
    for i in range(part.encoder.num_layers):
        theirs, ours = f"enc_layers.{i}", f"encoder/layers_{i}"
        for letter, name in (("Q", "query"), ("K", "key"), ("V", "value")):
            yield from parameter(f"{theirs}.mha.proj_layer.proj_matrix_{letter}", f"{ours}/{name}/kernel")
            yield from parameter(f"{theirs}.mha.proj_layer.bias_{letter}", f"{ours}/{name}/bias")
        yield from parameter(f"{theirs}.mha.matrix_out", f"{ours}/out/kernel")
        yield from parameter(f"{theirs}.mha.bias", f"{ours}/out/bias")
        for number, name in ((1, "ffn_in"), (2, "ffn_out")):
            for leaf in ("kernel", "bias"):
                yield from parameter(f"{theirs}.ffn.dense{number}.{leaf}", f"{ours}/{name}/{leaf}")
            norm = f"{theirs}.layernorm{number}", f"{ours}/norm{number}"
            for old, new in (("gamma", "scale"), ("beta", "bias")):
                yield from parameter(f"{norm[0]}.{old}", f"{norm[1]}/{new}")
            for old, new in (("moving_mean", "mean"), ("moving_variance", "var")):
                yield from parameter(f"{norm[0]}.{old}", f"{norm[1]}/{new}", collection="batch_stats")
    for leaf in ("kernel", "bias"):
        yield from parameter(f"predict_layer.dense.{leaf}", f"head/{leaf}")


def keras_entropy(truth: Float[Array, "*B C"], chance: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """Binary cross-entropy averaged over classes, probabilities kept 1e-7 away from 0 and 1 and logarithms from 0."""
    tiny = 1e-7
    chance = jnp.clip(chance, tiny, 1 - tiny)
    return -jnp.mean(truth * jnp.log(chance + tiny) + (1 - truth) * jnp.log(1 - chance + tiny), axis=-1)


def tensorflow_call(model: TensorflowPart, variables: Mapping[str, Any], inputs: Mapping[str, Any]):
    chances = model.apply(variables, {"x": inputs["x"], "mask": inputs["mask"][..., 0] > 0})
    outputs = {"preds": chances}
    if "y_true" not in inputs:
        return outputs
    truth, late = inputs["y_true"][..., :2], inputs["y_true"][..., 2]
    whole, factor, limit, share = model.config.penalty
    entropy, label = keras_entropy(truth, chances), 1 - jnp.argmax(truth, axis=-1)
    penalised = [
        penalised_entropy(chances[..., 0], label, late, entropy, factors=(whole, factor), signal_limit=bound)
        for bound in (None, limit)
    ]
    penalised = penalised[0] + share * (penalised[1] - penalised[0])
    focal = entropy * jnp.sum(truth * (1 - chances) ** model.config.gamma, axis=-1)
    outputs |= {"loss_entropy": jnp.mean(entropy), "loss_focal": jnp.mean(focal)}
    outputs["loss_tres_unweighted"] = jnp.mean(penalised)
    if "sample_weight" in inputs:
        outputs["loss_tres"] = jnp.mean(penalised * inputs["sample_weight"] * (jnp.abs(late) < 9e4))
    return outputs


# Statistics of a batch of hits are precise, and runs of these sizes short: the running ones follow ten times as fast.
_SMALL = Encoder(d_model=32, num_layers=2, num_heads=2, d_ff=64, norm_momentum=0.1)
_TINY = Config(
    num_hits=64,
    fast=replace(_SMALL, d_model=16, num_layers=1, d_ff=32),
    denoiser=_SMALL,
    candidate=_SMALL,
    head_widths=(32, 16),
)

PAPER = Paper(
    slug="baikal_gvd",
    task=event_reconstruction.TASK,
    model=Model,
    example=example,
    loss=loss,
    constants=constants,
    configs={
        "tiny": _TINY,
        "raw": replace(_TINY, clean=False),
        "adapted": replace(_TINY, adaptation=1.0),
        "pipeline": Config(num_hits=256, additive_noise=(0.5, 2.0, 0.15, 0.15, 0.01), charge_noise=0.1),
    },
    officials=(
        Official(
            module="pytorch_training/models/encoder.py:Encoder",
            config=torch_from_official,
            hparams=torch_to_official,
            table=torch_table,
            call=torch_call,
            model=TorchPart,
            example=part_example,
        ),
        Official(
            module="neural_networks/hits_signal-noise_separation/sig_noise_nn_arch_encoder.py:Encoder "
            "(+ sig_noise_loss_metrics.py)",
            config=tensorflow_from_official,
            hparams=tensorflow_to_official,
            table=tensorflow_table,
            call=tensorflow_call,
            model=TensorflowPart,
            example=part_example,
        ),
    ),
    quirks=(
        "padding=plus_one: the torch encoder adds its padding mask to the logits as numbers; without gradients torch "
        "takes a fast path that leaves padded hits out, and the outputs differ",
        "plus_one raises the class token's logit too",
        "masked_statistics=False: the TensorFlow encoder's batch norm counts padded places",
        "the official collation calls a hit real if any of its normalised features is above 0: ours has a mask",
        "the official probability is a sigmoid of the second logit, trained with two: ours is the softmax",
    ),
)
