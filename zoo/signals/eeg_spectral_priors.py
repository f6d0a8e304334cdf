"""Spectral Priors vs. Attention: Investigating the Utility of Attention Mechanisms in EEG-Based Diagnosis
(arXiv:2605.15433).

The paper's own code was not found. Its attention side is Medformer (arXiv:2405.19363), whose official code,
DL4mHealth/Medformer@891f65b (MIT), ours equals. Fidelity: partial; the features' constants are the usual ones.
New: a comparison. Features of the five EEG bands and a simple learner against attention over raw windows or over
band-passed copies of them, on subjects that training has not seen; the features do as well or better.
Differs: a table of sinusoids may have an odd width; in Medformer's last layer only the routers, which alone are read,
are computed; augmentations change no array in place.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import layers
from zoo.blocks import BatchNorm, Dropout, Linear, MultiHeadAttention, stack
from zoo.blocks.basic import activation_function
from zoo.blocks.learners import fit
from zoo.paper import Official, Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch
from zoo.weights.table import Table, Transform, conv1x1, layer_norm, linear, parameter

_LOG_FLOOR = 1e-8  # added to powers before their logarithm


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in samples, frequencies in Hz."""

    length: int = 256  # T, samples of a window
    channels: int = 16  # C, electrodes
    num_classes: int = 2  # K, classes to tell apart
    sampling_rate: float = 256.0  # samples a second
    model: Literal["medformer", "transformer", "linear", "mlp"] = "medformer"  # the last two are on features
    inputs: Literal["raw", "filterbank"] = "raw"  # of attention: the window, or a copy of it for each band
    features: Literal["band_power", "stft", "wavelet"] = "band_power"  # of linear and mlp
    band_edges: tuple[float, ...] = (0.5, 4.0, 8.0, 13.0, 30.0, 45.0)  # of delta, theta, alpha, beta, gamma
    transition: float = 1.0  # width of the filters' edges
    normalize: bool = True  # z-score of each channel of each window, as the official data loader does
    patches: tuple[int, ...] = (2, 4, 8)  # Medformer's granularities: samples of a patch
    single_channel: bool = False  # Medformer: every channel is a sample of its own until the head
    inter_attention: bool = True  # Medformer: routers of the granularities attend to each other
    augmentations: tuple[str, ...] = ("none",)  # one is drawn for each granularity and batch, e.g. jitter0.2, drop0.35
    d_model: int = 128  # D, width of a token; hidden width of mlp
    d_ff: int = 256  # hidden width of the feed-forward layers
    num_layers: int = 6  # attention layers
    num_heads: int = 8  # of attention
    activation: str = "gelu"  # of the feed-forward layers
    dropout_rate: float = 0.1  # of attention weights, its outputs, feed-forward layers and the head
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    batch_norm_epsilon: float = 1e-5  # likewise, where features are standardised

    @property
    def bands(self) -> tuple[tuple[float, float], ...]:
        return tuple(itertools.pairwise(self.band_edges))


# --- spectral priors ------------------------------------------------------------------------------------------------


def _shares(power: Float[Array, "B C K"]) -> list[Float[Array, "B C K"]]:
    """Logarithm, share of the total, and its logarithm."""
    share = power / (jnp.sum(power, axis=-1, keepdims=True) + _LOG_FLOOR)
    return [jnp.log(power + _LOG_FLOOR), share, jnp.log(share + _LOG_FLOOR)]


def _columns(parts: list[Float[Array, "B C K"]]) -> Float[Array, "B F"]:
    both = jnp.concatenate(parts, axis=-1)
    return both.reshape(both.shape[0], -1)


def band_power_features(
    x: Float[Array, "B T C"],
    *,
    bands: tuple[tuple[float, float], ...],
    sampling_rate: float,
    window: str = "hann",
    segment: int | None = None,
) -> Float[Array, "B F"]:
    """Power of each channel in each band: its logarithm, its share, and the share's logarithm (F = 3 C K).

    `segment` takes the mean over half-overlapping segments of so many samples (Welch). Source: card
    eeg_spectral_priors, band_power_features.
    """
    density = layers.power_spectral_density(
        jnp.swapaxes(x, 1, 2),
        sampling_rate=sampling_rate,
        window=window,
        segment=segment,
        overlap=segment // 2 if segment else 0,
    )
    power = layers.band_power(density, bands=bands, spacing=sampling_rate / (segment or x.shape[1]))
    return _columns(_shares(power))


def stft_band_features(
    x: Float[Array, "B T C"],
    *,
    bands: tuple[tuple[float, float], ...],
    sampling_rate: float,
    frame: int = 64,
    hop: int = 32,
) -> Float[Array, "B F"]:
    """Over frames, of each channel's power in each band: mean, std, maximum and slope (F = 4 C K).

    Shorter windows than a frame are one frame. Source: card eeg_spectral_priors, stft_band_features.
    """
    frame = min(frame, x.shape[1])
    weights = layers.spectral_window(frame)
    spectrum = layers.short_time_fourier(jnp.swapaxes(x, 1, 2), weights, frame_length=frame, hop=hop, center=False)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    power = jnp.swapaxes(power, 2, 3) / (sampling_rate * jnp.sum(jnp.square(weights)))
    energy = layers.band_power(power, bands=bands, spacing=sampling_rate / frame)  # (B, C, frames, K)
    place = np.arange(energy.shape[2]) - (energy.shape[2] - 1) / 2
    slope = jnp.einsum("bcnk,n->bck", energy, (place / max(np.sum(place**2), 1.0)).astype(np.float32))
    centred = energy - jnp.mean(energy, axis=2, keepdims=True)
    # A root at 0 has no gradient; the floor is far below any power.
    std = jnp.sqrt(jnp.mean(jnp.square(centred), axis=2) + _LOG_FLOOR**2)
    return _columns([jnp.mean(energy, axis=2), std, jnp.max(energy, axis=2), slope])


def wavelet_band_features(
    x: Float[Array, "B T C"], *, wavelet: str = "db4", levels: int = 5, skip: int = 1
) -> Float[Array, "B F"]:
    """Of each octave: mean energy, its logarithm, its share, and the entropy of where it lies (F = 4 C K).

    The finest `skip` levels are left out: at 256 samples a second the first is above 64 Hz, and the others are gamma,
    beta, alpha, theta and, as what remains, delta. Source: card eeg_spectral_priors, wavelet_band_features.
    """
    found = layers.wavelet_transform(jnp.swapaxes(x, 1, 2), wavelet=wavelet, levels=levels)
    octaves = [jnp.square(d) for d in (*found.details[skip:], found.approximation)]
    energy = jnp.stack([jnp.mean(octave, axis=-1) for octave in octaves], axis=-1)
    entropies = []
    for octave in octaves:
        share = octave / (jnp.sum(octave, axis=-1, keepdims=True) + _LOG_FLOOR)
        entropies.append(-jnp.sum(share * jnp.log(share + _LOG_FLOOR), axis=-1))
    return _columns([energy, *_shares(energy)[:2], jnp.stack(entropies, axis=-1)])


def features_of(x: Float[Array, "B T C"], config: Config) -> Float[Array, "B F"]:
    """The features that the configuration names."""
    if config.features == "wavelet":
        return wavelet_band_features(x)
    function = band_power_features if config.features == "band_power" else stft_band_features
    return function(x, bands=config.bands, sampling_rate=config.sampling_rate)


def held_out_accuracy(
    x: Float[Array, "N F"],
    label: Int[Array, " N"],
    group: Int[Array, " N"],
    *,
    num_classes: int,
    learner: str = "logistic",
    strength: float = 0.1,
    steps: int = 100,
) -> Float[Array, " G"]:
    """Of each group (subject, or fold of subjects; numbered from 0): accuracy on its windows of a learner that was
    fitted, scales included, to all the others'."""

    @jax.jit
    def every(x, label, group, numbers):
        def one(held):
            out = group == held
            weight = jnp.where(out, 0.0, 1.0)
            predict = fit(learner, x, label, num_classes=num_classes, weight=weight, strength=strength, steps=steps)
            right = jnp.argmax(predict(x), axis=-1) == label
            return jnp.sum(right & out) / jnp.sum(out)

        return jax.lax.map(one, numbers)

    return every(x, label, group, jnp.arange(int(jnp.max(group)) + 1))


# --- attention ------------------------------------------------------------------------------------------------------

_AUGMENTATIONS = {"none": 0.0, "jitter": 0.1, "scale": 0.1, "drop": 0.1, "flip": 0.5, "frequency": 0.1, "mask": 0.1,
                  "channel": 0.1}  # fmt: skip


def augment(x: Float[Array, "B C T"], name: str, key: jax.Array) -> Float[Array, "B C T"]:
    """One of Medformer's augmentations, its strength behind its name: "jitter0.2" adds noise of that std.

    scale: each channel by 1 + strength N(0, 1); drop: dropout; frequency: dropout of frequencies, not rescaled; mask,
    channel: the same share of samples, of channels, is 0 in the whole batch; flip: the whole batch backwards with that
    probability. Source: card eeg_spectral_priors, Training.
    """
    kind, number = re.fullmatch(r"([a-z]+)([0-9.]*)", name).groups()
    if kind not in _AUGMENTATIONS:
        raise ValueError(f"augmentation {name!r} is not one of {', '.join(_AUGMENTATIONS)}, with a number behind")
    strength = float(number) if number else _AUGMENTATIONS[kind]
    batch, channels, length = x.shape
    if kind == "jitter":
        return x + strength * jax.random.normal(key, x.shape, x.dtype)
    if kind == "scale":
        return x * (1 + strength * jax.random.normal(key, (batch, channels, 1), x.dtype))
    if kind == "drop":
        return layers.dropout(x, key, rate=strength)
    if kind == "flip":
        return jnp.where(jax.random.uniform(key) < strength, jnp.flip(x, axis=-1), x)
    if kind == "frequency":
        spectrum = jnp.fft.rfft(x.astype(jnp.float32))
        kept = jax.random.uniform(key, spectrum.shape) > strength
        return jnp.fft.irfft(jnp.where(kept, spectrum, 0.0), n=length).astype(x.dtype)
    if kind == "mask":
        return jnp.where(jax.random.permutation(key, length) < int(length * strength), 0, x)
    if kind == "channel":
        return jnp.where((jax.random.permutation(key, channels) < int(channels * strength))[:, None], 0, x)
    return x


class PatchEmbedding(nn.Module):
    """Tokens of each granularity: patches of all channels, the end repeated to fill the last, times a kernel, plus a
    learned vector and sinusoids of the place. The last token, on what was repeated, is the router."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B C T"], *, train: bool) -> tuple[Float[Array, "B _ D"], ...]:
        c = self.config
        channels, length = x.shape[1:]
        table = layers.sinusoidal_encoding(jnp.arange(channels), dim=length).astype(x.dtype)
        tokens = []
        for i, patch in enumerate(c.patches):
            if patch > length:
                raise ValueError(f"a patch of {patch} samples is longer than the window of {length}")
            each = x
            if train and c.augmentations != ("none",):
                draw, key = jax.random.split(self.make_rng("dropout"))
                chosen = [partial(augment, name=name) for name in c.augmentations]
                choice = jax.random.randint(draw, (), 0, len(chosen))
                each = jax.lax.switch(choice, [lambda x, key, f=f: f(x, key=key) for f in chosen], x, key)
            count = length // patch + 1
            each = jnp.pad(each + table, ((0, 0), (0, 0), (0, patch)), mode="edge")[..., : count * patch]
            each = jnp.swapaxes(each.reshape(*each.shape[:2], count, patch), 1, 2)  # (B, N, C, P)
            start = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
            embed = Linear(c.d_model, use_bias=False, kernel_init=start, name=f"patch_{i}")
            learned = self.param(f"learned_token_{i}", nn.initializers.normal(1.0), (1, c.d_model))
            places = layers.sinusoidal_encoding(jnp.arange(count), dim=c.d_model).astype(x.dtype)
            tokens.append(embed(each.reshape(*each.shape[:2], -1)) + learned + places)
        return tuple(tokens)


class EncoderLayer(nn.Module):
    """Post-norm: h = LN(h + A); h = LN(h + FFN(h)), all granularities through the same norms and FFN.

    A: attention within each granularity, then among the routers, the last token of each. `routers_only` keeps nothing
    else.
    """

    config: Config
    routers_only: bool = False

    @nn.compact
    def __call__(self, tokens: tuple[Float[Array, "B _ D"], ...], *, train: bool) -> tuple[Float[Array, "B _ D"], ...]:
        c = self.config
        attend = partial(MultiHeadAttention, c.num_heads, c.dropout_rate)
        kept = [h[:, -1:] if self.routers_only else h for h in tokens]
        mixed = [
            attend(name=f"intra_{i}")(k, h, train=train) for i, (k, h) in enumerate(zip(kept, tokens, strict=True))
        ]
        if c.inter_attention and len(tokens) > 1:
            routers = jnp.concatenate([m[:, -1:] for m in mixed], axis=1)
            routers = attend(name="inter")(routers, train=train)
            mixed = [jnp.concatenate([m[:, :-1], routers[:, i : i + 1]], axis=1) for i, m in enumerate(mixed)]
        x, mixed = jnp.concatenate(kept, axis=1), jnp.concatenate(mixed, axis=1)
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm1")(x + Dropout(c.dropout_rate)(mixed, train=train))
        hidden = activation_function(c.activation)(Linear(c.d_ff, name="ffn_in")(x))
        hidden = Linear(c.d_model, name="ffn_out")(Dropout(c.dropout_rate)(hidden, train=train))
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm2")(x + Dropout(c.dropout_rate)(hidden, train=train))
        return tuple(jnp.split(x, np.cumsum([k.shape[1] for k in kept])[:-1], axis=1))


class Model(nn.Module):
    """Logits from a window, by attention or by the power of its bands."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B K"]:
        c, x = self.config, batch["x"]
        if c.normalize:
            wide = x.astype(jnp.float32)
            scale = jnp.std(wide, axis=1, keepdims=True)
            x = ((wide - jnp.mean(wide, axis=1, keepdims=True)) / jnp.where(scale > 0, scale, 1.0)).astype(x.dtype)
        if c.model in ("linear", "mlp"):
            features = BatchNorm(c.batch_norm_epsilon, name="standardize")(
                features_of(x, c).astype(x.dtype), train=train
            )
            if c.model == "mlp":
                features = jax.nn.relu(Linear(c.d_model, name="hidden")(features))
                features = Dropout(c.dropout_rate)(features, train=train)
            return Linear(c.num_classes, name="head")(features)
        x = jnp.swapaxes(x, 1, 2)
        if c.inputs == "filterbank":
            copies = layers.bandpass_filterbank(
                x, bands=c.bands, sampling_rate=c.sampling_rate, transition=c.transition
            )
            x = copies.reshape(x.shape[0], -1, x.shape[-1])
        return self._medformer(x, train) if c.model == "medformer" else self._transformer(x, train)

    def _encoded(self, tokens, routers: bool, train: bool):
        c = self.config
        tokens = stack(self, partial(EncoderLayer, c), c.num_layers - routers, tokens, train=train)
        if routers:
            last = partial(EncoderLayer, c, True)
            tokens = stack(self, last, 1, tokens, first=c.num_layers - 1, train=train)
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="encoder_norm")(jnp.concatenate(tokens, axis=1))
        return Dropout(c.dropout_rate)(layers.gelu(x), train=train)

    def _medformer(self, x: Float[Array, "B C T"], train: bool) -> Float[Array, "B K"]:
        c, batch = self.config, x.shape[0]
        if c.single_channel:
            x = x.reshape(-1, 1, x.shape[-1])
        tokens = PatchEmbedding(c, name="embedding")(x, train=train)
        routers = self._encoded(tokens, True, train)
        return Linear(c.num_classes, name="head")(routers.reshape(batch, -1))

    def _transformer(self, x: Float[Array, "B C T"], train: bool) -> Float[Array, "B K"]:
        """One token a sample: a circular convolution of three, plus sinusoids."""
        c = self.config
        x = jnp.swapaxes(x, 1, 2)
        around = jnp.concatenate([jnp.roll(x, 1, axis=1), x, jnp.roll(x, -1, axis=1)], axis=-1)
        start = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        tokens = Linear(c.d_model, use_bias=False, kernel_init=start, name="embedding")(around)
        tokens = tokens + layers.sinusoidal_encoding(jnp.arange(x.shape[1]), dim=c.d_model).astype(x.dtype)
        tokens = self._encoded((Dropout(c.dropout_rate)(tokens, train=train),), False, train)
        return Linear(c.num_classes, name="head")(tokens.reshape(x.shape[0], -1))


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    shape = (config.length, config.channels)
    return classification.example(shape=shape, num_classes=config.num_classes, batch_size=batch_size, key=key)


# --- Medformer's official code --------------------------------------------------------------------------------------

_HPARAMS = {
    "enc_in": "channels",
    "seq_len": "length",
    "num_class": "num_classes",
    "single_channel": "single_channel",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "n_heads": "num_heads",
    "e_layers": "num_layers",
    "dropout": "dropout_rate",
    "activation": "activation",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    return Config(
        **ours | {"activation": "relu" if ours.get("activation") == "relu" else "gelu"},
        patches=tuple(int(patch) for patch in hparams["patch_len_list"].split(",")),
        augmentations=tuple(hparams["augmentations"].split(",")),
        inter_attention=not hparams.get("no_inter_attn", False),
        normalize=False,  # there it is the data loader's
    )


def config_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()} | {
        "task_name": "classification",
        "pred_len": 0,
        "output_attention": False,
        "patch_len_list": ",".join(map(str, config.patches)),
        "augmentations": ",".join(config.augmentations),
        "no_inter_attn": not config.inter_attention,
    }


def _flat_kernel(channels: int, patch: int) -> Transform:
    """A convolution (D, 1, C, P) over patches that do not overlap to a kernel (C P, D)."""
    return Transform(lambda x: (x.reshape(x.shape[0], -1).T,), lambda x: (x.T.reshape(x.shape[1], 1, channels, patch),))


def official_table(config: Config) -> Table:
    channels = 1 if config.single_channel else config.channels
    for i, patch in enumerate(config.patches):
        conv = f"enc_embedding.value_embeddings.{i}.tokenConv.weight"
        yield from parameter(conv, f"embedding/patch_{i}/kernel", _flat_kernel(channels, patch))
        yield from parameter(f"enc_embedding.learnable_embeddings.{i}", f"embedding/learned_token_{i}")
    attentions = {f"intra_attentions.{i}": f"intra_{i}" for i in range(len(config.patches))}
    if config.inter_attention and len(config.patches) > 1:
        attentions["inter_attention"] = "inter"
    for i in range(config.num_layers):
        theirs, ours = f"encoder.attn_layers.{i}", f"layers_{i}"
        for attention, own in attentions.items():
            for name in ("query", "key", "value", "out"):
                yield from linear(f"{theirs}.attention.{attention}.{name}_projection", f"{ours}/{own}/{name}")
        yield from conv1x1(f"{theirs}.conv1", f"{ours}/ffn_in")
        yield from conv1x1(f"{theirs}.conv2", f"{ours}/ffn_out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from layer_norm("encoder.norm", "encoder_norm")
    yield from linear("projection", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"logits": model.apply(variables, {"x": inputs["x_enc"]})}


_TINY = Config(
    length=64, channels=4, sampling_rate=64.0, patches=(4, 8), d_model=16, d_ff=32, num_layers=2, num_heads=2
)


_APAVA = Config(patches=(2, 2, 2, 4, 4, 4, 16, 16, 16, 16, 32, 32, 32, 32, 32), augmentations=("none", "drop0.35"))

PAPER = Paper(
    slug="eeg_spectral_priors",
    task=classification.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": _TINY,
        "tiny_filterbank": replace(_TINY, inputs="filterbank"),
        "tiny_transformer": replace(_TINY, model="transformer"),
        "tiny_spectral": replace(_TINY, model="linear"),
        "tiny_stft": replace(_TINY, model="linear", features="stft"),
        "tiny_wavelet": replace(_TINY, model="linear", features="wavelet"),
        "spectral": Config(model="linear"),
        "spectral_mlp": Config(model="mlp", d_model=64),
        "transformer": Config(model="transformer"),
        "medformer": Config(),
        "apava": _APAVA,
        "apava_filterbank": replace(_APAVA, inputs="filterbank"),
        "tdbrain": Config(channels=33, patches=(8, 8, 8, 16, 16, 16), augmentations=("none", "drop0.25")),
        "adftd": Config(
            channels=19, num_classes=3, patches=(2, 4, 8, 8, *(16,) * 4, *(32,) * 8), augmentations=("drop0.5",)
        ),
    },
    officials=(
        Official(
            module="models/Medformer.py:Model",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"tiny": 9_698, "medformer": 2_013_826},
    quirks=(
        "sinusoids as wide as the window is long tell the channels, by their row",
        "the last patch of a granularity, which lies on the repeated end, is its router",
        "the activation follows the last norm, and the head sees the routers alone",
        "the official augmentations write into their input; one is drawn for a whole batch",
    ),
)
