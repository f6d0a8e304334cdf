"""Neuromorphic visual attention for Sign-language recognition on SpiNNaker (arXiv:2605.06005).

Official code: Neuro-inspired-Perception-and-Cognition/Sign-language-Recognition@48332d5 (no licence). Fidelity: exact.
New: a fixed layer of spiking neurons, whose receptive fields are arcs in eight directions at three scales, finds in the
events of 35 ms where to look; what it looks at, reduced to 48 x 48 pixels, goes to a small spiking network that counts
a spike for a letter; all of it is made for a neuromorphic chip, whose neurons `hardware_counts` simulates.
Differs: each orientation has neurons of its own, where the official layer takes the orientations for moments in time;
the map keeps its place in the frame, where the official one is stretched to it and points too far out; the loss takes
a softmax once. The official ways are `orientations_as_time`, `stretch` and `double_softmax`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import layers
from zoo.blocks import Dropout, Linear
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch
from zoo.weights.table import Table, constant, conv, linear

_XAVIER = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


@dataclass(frozen=True)
class Attention:
    """Where to look; sizes in pixels."""

    height: int = 260  # of the camera's frame
    width: int = 346
    region: int = 250  # side of the square around the most salient pixel
    filter_size: int = 13  # of the arcs as they are computed
    magnify: int = 3  # as they are used
    orientations: int = 8
    radius: float = 15.0  # of the arcs
    inset: tuple[float, float] = (1.0, 1.0)  # the middle of the arc is this much nearer than the radius, by x and y
    concentration: float = 12.15  # of an arc about its direction
    scales: int = 3  # the frame, and as seen at a half, a third, ...
    tau: float = 33.0  # time constant of the membrane, in steps
    gain: float = 255.0  # of a pixel with an event
    spiking: bool = True  # False: what the spikes count, by one filter, which takes a twentieth of the time
    orientations_as_time: bool = False  # the official code: one set of neurons sees one orientation after the other
    stretch: bool = False  # the official code: the map, smaller by a filter, is stretched to the frame


@dataclass(frozen=True)
class Config:
    """Sizes and constants; a step is a millisecond."""

    height: int = 48  # of the region that is read
    width: int = 48
    steps: int = 35  # T
    num_classes: int = 24  # K: letters, without J and Z
    channels: int = 4  # of the convolution
    kernel_size: int = 5
    stride: int = 6
    hidden: int = 512  # neurons between convolution and letters
    decay: float = 0.92  # of a membrane, a step
    threshold: float = 1.0
    slope: float = 25.0  # of the surrogate of a spike's derivative
    dropout_rate: float = 0.0  # of spikes
    focal_gamma: float = 2.0
    label_smoothing: float = 0.1
    hard_threshold: float = 0.65  # an example whose class is less probable counts double
    double_softmax: bool = False  # the official loss: probabilities are taken for logits
    attend: bool = False  # x is the whole frame, and attention finds the region
    attention: Attention = Attention()


# --- attention ------------------------------------------------------------------------------------------------------


def magnified(filters: Float[Array, "K N N"], factor: int) -> Float[Array, "K M M"]:
    """Bilinear between pixels' centres, mirrored about the outer ones (scikit-image's rescale, mode reflect)."""
    size = filters.shape[-1]
    place = np.abs((np.arange(size * factor) + 0.5) / factor - 0.5)
    place = np.minimum(place, 2 * (size - 1) - place)
    weights = np.maximum(1 - np.abs(place[:, None] - np.arange(size)), 0).astype(np.float32)
    return jnp.einsum("ai,kij,bj->kab", weights, filters, weights, precision=jax.lax.Precision.HIGHEST)


def arcs(config: Attention, orientation: Float[Array, " K"]) -> Float[Array, "K N N"]:
    """The filters as they are computed, before they are magnified."""
    c = config
    shift = (c.radius - c.inset[0], c.radius - c.inset[1])
    return layers.von_mises_filters(
        orientation, size=c.filter_size, radius=c.radius, concentration=c.concentration, shift=shift
    )


class Seen(NamedTuple):
    """What attention makes of a window."""

    saliency: Float[Array, "B H W"]  # 0 to 255
    peak: Int[Array, "B 2"]  # row and column of the most salient pixel
    membrane: Float[Array, "B *units"] | None  # after the window; None if not spiking


@partial(jax.jit, static_argnames=("config",))
def look(window: Float[Array, "B H W"], *, config: Attention, membrane: Float[Array, "B *units"] | None = None) -> Seen:
    """Spikes of arc detectors, summed over scales and orientations: window (1 where an event was) to `Seen`.

    `membrane` is what an earlier window left. Source: card neuromorphic_sign, Saliency.
    """
    c, (batch, height, width) = config, window.shape
    frame = c.gain * window.astype(jnp.float32)[..., None]
    size = [(max(height // s, 1), max(width // s, 1)) for s in range(1, c.scales + 1)]
    scaled = [layers.resize(layers.resize(frame, s), (height, width)) for s in size]
    angles = 2 * jnp.pi * jnp.arange(c.orientations, dtype=jnp.float32) / c.orientations
    filters = magnified(arcs(c, angles), c.magnify)
    decay, side = math.exp(-1 / c.tau), filters.shape[-1]
    if min(height, width) < side:
        raise ValueError(f"neuromorphic_sign: a frame of {height} x {width} is smaller than the filters of {side}")

    def filtered(x, kernels):
        return jax.lax.conv_general_dilated(
            x, jnp.moveaxis(kernels, 0, -1)[:, :, None], (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip

    if c.spiking:
        drive = jnp.moveaxis(filtered(jnp.concatenate(scaled), filters), -1, 1)  # (scales x B, K, h, w)
        drive = drive.reshape(c.scales, batch, *drive.shape[1:])
        drive = jnp.moveaxis(drive, 0, 1)  # (B, scales, K, h, w)
        # Time goes second: the orientations, or this window alone.
        drive = jnp.moveaxis(drive, 2, 1) if c.orientations_as_time else drive[:, None]
        counts, membrane = layers.integrate_and_count(drive, decay=decay, initial_state=membrane, return_state=True)
        summed = jnp.sum(counts, axis=(1, 2) if c.orientations_as_time else (1, 2, 3))
    else:
        summed = (1 - decay) * filtered(sum(scaled), jnp.sum(filters, axis=0, keepdims=True))[..., 0]
    if c.stretch:
        summed = layers.resize(summed[..., None], (height, width))[..., 0]
    low, high = (f(summed, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    saliency = 255 * (summed - low) / jnp.where(high > low, high - low, 1.0)
    if not c.stretch:
        before, after = (side - 1) // 2, side // 2
        saliency = jnp.pad(saliency, ((0, 0), (before, after), (before, after)))
    best = jnp.argmax(saliency.reshape(batch, -1), axis=-1)
    return Seen(saliency, jnp.stack(jnp.divmod(best, width), axis=-1), membrane)


def read_region(
    x: Float[Array, "B T H W"], peak: Int[Array, "B 2"], *, region: int, height: int, width: int
) -> Float[Array, "B T h w"]:
    """1 where an event falls into a cell of the region around `peak`, which borders of the frame make smaller.

    Source: card neuromorphic_sign, ROI.
    """

    def cells(centre, length, count):
        low, high = jnp.maximum(centre - region // 2, 0), jnp.minimum(centre + region // 2, length)
        place = jnp.arange(length)
        cell = (place - low[:, None]) * count // (high - low)[:, None]
        inside = (place >= low[:, None]) & (place < high[:, None])
        return (inside[:, None] & (cell[:, None] == jnp.arange(count)[:, None])).astype(x.dtype)

    down, across = cells(peak[:, 0], x.shape[2], height), cells(peak[:, 1], x.shape[3], width)
    return jnp.minimum(jnp.einsum("bih,bthw,bjw->btij", down, x, across), 1)


# --- recognition ----------------------------------------------------------------------------------------------------


def region_of(x: Float[Array, "B T H W"], config: Config) -> Float[Array, "B T h w"]:
    """What the spiking network reads of a batch's events."""
    if not config.attend:
        return x
    a = config.attention
    peak = look(jnp.max(x, axis=1), config=a).peak
    return read_region(x, peak, region=a.region, height=config.height, width=config.width)


def focal_errors(counts: Float[Array, "B K"], config: Config) -> Float[Array, "B K"]:
    """The loss of each example if its class were k: -h_k sum_c y_kc (1 - q_c)^gamma log q_c, q the softmax of counts.

    y is smoothed; h is 2 where q_k is below `hard_threshold`, else 1. Source: card neuromorphic_sign, Training.
    """
    c = config
    log_q = jax.nn.log_softmax(jax.nn.softmax(counts) if c.double_softmax else counts)
    q = jnp.exp(log_q)
    # Rounding may put q above 1, whose power has no gradient.
    terms = -(jnp.maximum(1 - q, 0.0) ** c.focal_gamma) * log_q
    smooth = (1 - c.label_smoothing) * terms + c.label_smoothing * jnp.mean(terms, axis=-1, keepdims=True)
    return jnp.where(q < c.hard_threshold, 2.0, 1.0) * smooth


def convolved(x: Float[Array, "N H W"], kernel: Float[Array, "k k 1 C"], stride: int) -> Float[Array, "N J"]:
    """Convolution of single-channel images without padding, flattened as channels, rows, columns.

    As a product of patches: XLA's own on CPUs takes four times as long, for the gradient of so small a kernel.
    """
    size = kernel.shape[0]
    rows, columns = (stride * np.arange((n - size) // stride + 1)[:, None] + np.arange(size) for n in x.shape[1:])
    patches = x[:, rows][..., columns]
    return jnp.einsum("nricj,ijk->nkrc", patches, kernel[:, :, 0]).reshape(x.shape[0], -1)


class Convolution(nn.Module):
    """`convolved` with a learned kernel."""

    channels: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W"]) -> Float[Array, "N J"]:
        return convolved(x, self.param("kernel", _XAVIER, (self.size, self.size, 1, self.channels)), self.stride)


class Model(nn.Module):
    """Events, 0 or 1, to `spikes` (B, T, K) of the letters' neurons, their `logits`, the counts, and `errors`."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *shape"]]:
        c, x = self.config, region_of(batch["x"], self.config)
        size, steps = x.shape[:2]
        fire = partial(layers.leaky_integrate_fire, decay=c.decay, threshold=c.threshold, slope=c.slope)
        drop = Dropout(c.dropout_rate)
        # Neurons see the spikes of the same step: layer by layer, all steps at once but for the membranes.
        current = Convolution(c.channels, c.kernel_size, c.stride, name="conv")(x.reshape(-1, *x.shape[2:]))
        current = current.reshape(size, steps, -1)
        spikes = fire(current)
        self.sow("intermediates", "conv_spikes", spikes)
        hidden = Linear(c.hidden, use_bias=False, kernel_init=_XAVIER, name="fc")(drop(spikes, train=train))
        spikes = fire(hidden)
        self.sow("intermediates", "fc_spikes", spikes)
        readout = Linear(c.num_classes, use_bias=False, kernel_init=_XAVIER, name="readout")
        # Twice, as in the official code.
        spikes = fire(readout(drop(drop(spikes, train=train), train=train)))
        counts = jnp.sum(spikes.astype(jnp.float32), axis=1)
        return {"logits": counts, "spikes": spikes, "errors": focal_errors(counts, c)}


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean focal error, each example weighted by the inverse of its class's share of the training examples."""
    weight = jnp.exp(-batch["prior"].astype(jnp.float32)) / batch["prior"].shape[-1]
    return weighted_error(outputs["errors"], batch["label"], weight), {}


def weighted_error(
    errors: Float[Array, "B K"], label: Int[Array, " B"], weight: Float[Array, "#B K"]
) -> Float[Array, ""]:
    return jnp.mean(jnp.take_along_axis(errors * weight, label[:, None], axis=-1))


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    """Events in two fifths of the cells, more than a camera sees: letters already fire at the first weights."""
    c = config.attention if config.attend else config
    shape = (config.steps, c.height, c.width)
    batch = classification.example(shape=shape, num_classes=config.num_classes, batch_size=batch_size, key=key)
    return batch | {"x": (batch["x"] > 0.2).astype(jnp.float32)}


# --- the chip -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """The neurons of the chip, and what the weights are multiplied by there; millisecond steps, mV, nA, nF."""

    threshold: float = 4.0  # above rest
    capacitance: float = 1.0
    excitatory_tau: float = 5.0
    inhibitory_tau: float = 3.0
    refractory: int = 1
    scales: tuple[float, float, float] = (1.0, 0.3, 2.0)  # of the weights of conv, fc, readout
    smallest: tuple[float, float, float] = (1e-16, 1e-4, 1e-4)  # weights that are smaller are left out
    lateral: float = 1.3  # each letter's spike holds back all others


@partial(jax.jit, static_argnames=("config", "hardware"))
def hardware_counts(
    variables: Mapping[str, Any],
    x: Float[Array, "B T H W"],
    *,
    config: Config,
    hardware: Hardware = Hardware(),
) -> Float[Array, "B K"]:
    """Spikes of the letters within the T steps, as current-based neurons with delays of one step count them.

    Their membranes have the time constant of `config.decay`. Source: card neuromorphic_sign, Hardware stage.
    """
    c, h, x = config, hardware, region_of(x, config)
    weights = [
        jnp.where(jnp.abs(scale * w) > smallest, scale * w, 0.0)
        for w, scale, smallest in zip(
            (variables["params"][name]["kernel"] for name in ("conv", "fc", "readout")), h.scales, h.smallest,
            strict=True,
        )
    ]  # fmt: skip
    step = partial(
        layers.current_based_step, membrane_decay=c.decay, excitatory_decay=math.exp(-1 / h.excitatory_tau),
        inhibitory_decay=math.exp(-1 / h.inhibitory_tau), resistance=-1 / math.log(c.decay) / h.capacitance,
        threshold=h.threshold, refractory=h.refractory,
    )  # fmt: skip

    products = (partial(convolved, stride=c.stride), jnp.matmul, jnp.matmul)
    signed = [(jnp.maximum(w, 0.0), jnp.maximum(-w, 0.0)) for w in weights]

    def tick(carry, events):
        states, before = carry  # before: the events and spikes of the last step, which arrive now
        arriving = [[f(s, w) for w in pair] for f, s, pair in zip(products, before[:-1], signed, strict=True)]
        others = jnp.sum(before[-1], axis=-1, keepdims=True) - before[-1]
        arriving[-1][1] += h.lateral * others
        after = [step(state, *currents) for state, currents in zip(states, arriving, strict=True)]
        states, spikes = zip(*after, strict=True)
        return (states, (events, *spikes)), spikes[-1]

    batch = x.shape[0]
    sizes = (weights[1].shape[0], c.hidden, c.num_classes)
    quiet = [jnp.zeros((batch, n)) for n in sizes]
    states = tuple(layers.CurrentBasedState(q, q, q, jnp.zeros(q.shape, jnp.int32)) for q in quiet)
    start = states, (jnp.zeros_like(x[:, 0]), *quiet)
    return jnp.sum(jax.lax.scan(tick, start, jnp.swapaxes(x, 0, 1))[1], axis=0)


# --- the official code ----------------------------------------------------------------------------------------------

_HPARAMS = {
    "H": "height",
    "W": "width",
    "n_classes": "num_classes",
    "beta": "decay",
    "num_steps": "steps",
    "dropout_p": "dropout_rate",
    "fc_hidden": "hidden",
    "loss_gamma": "focal_gamma",
    "label_smoothing": "label_smoothing",
    "mining_threshold": "hard_threshold",
}
_NEURONS = ("lif1", "lif_fc1", "lif_out")


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    return Config(**ours, double_softmax=True)


def config_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}


def with_stored_decay(config: Config, tensors: Mapping[str, Any]) -> Config:
    """The neurons' decay, which checkpoints hold and settings may lack."""
    stored = {float(tensors[f"{name}.beta"]) for name in _NEURONS if f"{name}.beta" in tensors}
    if len(stored) > 1:
        raise UserError(f"neuromorphic_sign: the neurons of a network share one beta, not {sorted(stored)}")
    same = all(np.float32(config.decay) == np.float32(beta) for beta in stored)
    return config if same else replace(config, decay=stored.pop())


def official_table(config: Config) -> Table:
    yield from conv("conv1", "conv", bias=False)
    yield from linear("fc1", "fc", bias=False)
    yield from linear("readout", "readout", bias=False)
    # A reset of kind 0 subtracts.
    fixed = {"beta": config.decay, "threshold": config.threshold, "graded_spikes_factor": 1, "reset_mechanism_val": 0}
    for name in _NEURONS:
        for what, value in fixed.items():
            dtype = np.int64 if what == "reset_mechanism_val" else np.float32
            yield from constant(f"{name}.{what}", np.array(value, dtype))


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c, x = model.config, jnp.swapaxes(inputs["x"], 0, 1)
    outputs = model.apply(variables, {"x": x.reshape(*x.shape[:2], c.height, c.width)})
    found = {"spikes": jnp.swapaxes(outputs["spikes"], 0, 1), "counts": outputs["logits"]}
    return found | {"loss": weighted_error(outputs["errors"], inputs["labels"], inputs["class_weights"][None])}


@dataclass(frozen=True)
class PartConfig:
    """Attention alone, and which of its map's pixels are shown."""

    attention: Attention = Attention(orientations_as_time=True, stretch=True)
    row_step: int = 1
    col_step: int = 1


class Part(nn.Module):
    """Attention, which has no weights."""

    config: PartConfig

    def __call__(self, window: Float[Array, "B H W"], membrane: Array | None = None) -> Seen:
        return look(window, config=self.config.attention, membrane=membrane)


def part_example(config: PartConfig, *, batch_size: int, key: jax.Array) -> Float[Array, "B H W"]:
    size = (config.attention.height, config.attention.width)
    return jax.random.bernoulli(key, 0.01, (batch_size, *size)).astype(jnp.float32)


def part_from_official(hparams: Mapping[str, Any]) -> PartConfig:
    part, found = PartConfig(), {}
    if "tau_mem" in hparams:
        found["tau"] = float(hparams["tau_mem"])
    if "size" in hparams:
        radius = float(hparams["r0"])
        found |= {"filter_size": hparams["size"], "radius": radius, "magnify": hparams["fltr_resize_perc"][0]}
        found |= {"concentration": hparams["thick"] * hparams["rho"] * radius}
        found |= {"inset": tuple(float(pixels) for pixels in hparams["offset"])}
    steps = {name: hparams[name] for name in ("row_step", "col_step") if name in hparams}
    return replace(part, attention=replace(part.attention, **found), **steps)


def lif_to_official(config: PartConfig) -> dict[str, Any]:
    return {"tau_mem": config.attention.tau}


def filters_to_official(config: PartConfig) -> dict[str, Any]:
    c = config.attention
    return {
        "size": c.filter_size,
        "r0": c.radius,
        "rho": c.concentration / (9 * c.radius),
        "thick": 9,
        "offset": list(c.inset),
        "fltr_resize_perc": [c.magnify, c.magnify],
    }


def saliency_to_official(config: PartConfig) -> dict[str, Any]:
    return {"row_step": config.row_step, "col_step": config.col_step}


def no_tensors(config: PartConfig) -> Table:
    return ()


def lif_call(model: Part, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    count = partial(layers.integrate_and_count, decay=math.exp(-1 / model.config.attention.tau), return_state=True)
    found, state = {}, None
    for i in range(1, len(inputs) + 1):
        found[f"spikes{i}"], state = count(inputs[f"u{i}"], initial_state=state)
        found[f"v_mem{i}"] = state
    return found


def filters_call(model: Part, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    filters = arcs(model.config.attention, inputs["thetas"])
    return {"filters": filters, "filters_resized": magnified(filters, model.config.attention.magnify)}


def saliency_call(model: Part, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    rows, columns = model.config.row_step, model.config.col_step
    found, membrane = {}, None
    for i in range(1, len(inputs) + 1):
        seen = model.apply(variables, inputs[f"window{i}"][None].astype(jnp.float32), membrane)
        found[f"salmap{i}"] = seen.saliency[0, rows // 2 :: rows, columns // 2 :: columns]
        found[f"peak{i}"], membrane = seen.peak[0], seen.membrane
    return found


_TINY = {"hidden": 64, "steps": 12, "num_classes": 8}
_SMALL_CAMERA = Attention(height=87, width=115, region=84, magnify=1, spiking=False)

PAPER = Paper(
    slug="neuromorphic_sign",
    task=classification.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(**_TINY),
        "tiny_attended": Config(**_TINY, attend=True, attention=_SMALL_CAMERA),  # a camera of a third of the pixels
        "letters": Config(),  # ASL-DVS and Sign-Language MNIST, windows of 35 ms
        "letters_100ms": Config(steps=100),
        "attended": Config(attend=True),
    },
    officials=(
        Official(
            module="cpu_training/snn_training.ipynb:TinyConvSNN_24_FC "
            "(+ snn_training_helper_functions.py:EnhancedFocalLoss)",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
            refine=with_stored_decay,
        ),
        *(
            Official(
                module=f"sVA_roi_selection/attention.py:{module}",
                config=part_from_official,
                hparams=hparams,
                table=no_tensors,
                call=call,
                model=Part,
                example=part_example,
            )
            for module, hparams, call in (
                ("net_def (sinabs 3.1 LIF layer)", lif_to_official, lif_call),
                ("vm_filter, VMkernels", filters_to_official, filters_call),
                ("initialise_attention, run_attention (official Config)", saliency_to_official, saliency_call),
            )
        ),
    ),
    parameter_counts={"letters": 143_460, "letters_100ms": 143_460, "attended": 143_460},
    reported={"asl_dvs": {"accuracy": 0.9227}},  # simulated; 0.831 on the chip
    quirks=(
        "the attention layer takes its eight orientations for eight moments in time",
        "its map, smaller than the frame by a filter, is stretched to it: the peak points too far out",
        "the loss takes the logarithm of a softmax of probabilities",
        "the arcs are no rotations of each other: their grid is centred on a corner of a pixel (kept)",
    ),
)
