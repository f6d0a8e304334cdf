"""Attention-Mamba: a Mamba-enhanced multi-scale parallel inference network for medical image segmentation (Y. Zhang).

Official code: Yanhua-Zhang/Attention-Mamba@b8b9f3e (licence unknown). Fidelity: exact.
New: four scales of a feature pyramid are brought to one resolution by learned flows, and each is scored by a Mamba
branch of its own, all four in parallel; one bidirectional scan over the channels of all scales gives a gate for every
scale and class, another over all their pixels a gate for every scale and pixel; the gated scores are summed.
Differs: the four branches run as one, so that a scan has as many steps as a scale has pixels; images of other than one
or three channels are taken as they are; residual blocks start as their shortcuts (officially with ImageNet's weights).
Training and evaluation give the same mapping.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import layers
from zoo.backbones import resnet
from zoo.blocks import SS2D, BatchNorm, Linear, Mamba
from zoo.blocks.basic import torch_uniform
from zoo.blocks.mamba import mamba
from zoo.blocks.ss2d import ss2d
from zoo.paper import Official, Paper
from zoo.tasks import segmentation
from zoo.tasks.segmentation import dice_errors, logits_of, pixel_errors, probabilities
from zoo.tasks.task import Batch
from zoo.weights.table import Row, Table, batch_norm, conv, conv1x1, layer_norm, linear, stacked


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    image_size: tuple[int, int] = (224, 224)  # height and width of what is seen at once; the model takes any
    channels: int = 1  # of an image; a grey one is seen as three equal ones
    num_classes: int = 9  # K, with the background; 1: one class beside the background
    stem: tuple[int, int] = (64, 128)  # channels of the stem's first two convolutions, and of its last
    stage_channels: tuple[int, ...] = (64, 128, 256, 512)  # of the backbone at 1/4, 1/8, 1/16 and 1/32
    stage_depths: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks of each
    width: int = 128  # C, of every scale after the backbone
    branch_depths: tuple[int, ...] = (2, 2, 2, 2)  # SS2D blocks of each scale
    state_size: int = 16  # N, of all state spaces: states of a channel
    expand: int | float = 2  # of all state spaces: inner width as a multiple of the outer one
    grid_conv_width: int = 3  # of the SS2D blocks' convolutions
    sequence_conv_width: int = 4  # of the attention's: taps of the causal convolutions
    gate_reduction: int = 16  # what C is divided by inside the class gates
    batch_norm_epsilon: float = 1e-5  # added to the variance under the root, in the backbone and the pyramid
    layer_norm_epsilon: float = 1e-5  # likewise, in the branches

    def __post_init__(self):
        if not len(self.stage_channels) == len(self.stage_depths) == len(self.branch_depths) == 4:
            raise ValueError("stage_channels, stage_depths and branch_depths have one entry for each of four scales")


@dataclass(frozen=True)
class _Backbone(resnet.Config):
    """A ResNet whose stem may end with any number of channels."""

    stem_end: int = 128

    @property
    def stem_channels(self) -> tuple[int, ...]:
        return (self.stem_width, self.stem_width, self.stem_end)


def backbone(c: Config) -> _Backbone:
    """ResNet-18 with a stem of three 3x3 convolutions, without its head."""
    return _Backbone(
        depths=c.stage_depths, channels=c.stage_channels, in_channels=3 if c.channels == 1 else c.channels,
        num_classes=0, stem="deep", stem_width=c.stem[0], stem_end=c.stem[1], norm_epsilon=c.batch_norm_epsilon,
    )  # fmt: skip


def _resized(x: Float[Array, "B h w C"], size: tuple[int, ...]) -> Float[Array, "B H W C"]:
    return layers.resize(x, size, align_corners=True)


def _convolution(features: int, kernel: int, inputs: int, name: str) -> nn.Conv:
    start = torch_uniform(kernel**2 * inputs)
    return nn.Conv(
        features, (kernel, kernel), padding=kernel // 2, use_bias=False, kernel_init=start,
        conv_general_dilated=layers.conv_general_dilated, name=name,
    )  # fmt: skip


class ConvNorm(nn.Module):
    """ReLU(BN(convolution of x))."""

    features: int
    kernel: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], *, train: bool) -> Float[Array, "B h w D"]:
        x = _convolution(self.features, self.kernel, x.shape[-1], "conv")(x)
        return jax.nn.relu(BatchNorm(self.epsilon, name="norm")(x, train=train))


class FlowField(nn.Module):
    """Where each pixel of a finer map finds its like in the next coarser one: conv3x3([W_2 fine, up(W_1 coarse)]).

    As a share of the finer map's height and width on a grid that spans two: a flow of 2 is about one pixel.
    """

    middle: int  # channels in which the two are compared

    @nn.compact
    def __call__(self, fine: Float[Array, "B H W C"], coarse: Float[Array, "B h w C"]) -> Float[Array, "B H W 2"]:
        coarse = _resized(Linear(self.middle, use_bias=False, name="coarse")(coarse), fine.shape[1:3])
        pair = jnp.concatenate([Linear(self.middle, use_bias=False, name="fine")(fine), coarse], axis=-1)
        return _convolution(2, 3, 2 * self.middle, "offset")(pair)


class SS2DBlock(nn.Module):
    """x + SS2D(LN(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        c = self.config
        normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)
        options = {"expand": c.expand, "norm_epsilon": c.layer_norm_epsilon}
        return x + SS2D(c.state_size, c.grid_conv_width, **options, name="mixer")(normed)


def _each(module: type[nn.Module]) -> Any:
    """A module for each entry of the first axis, with weights of its own."""
    return nn.vmap(module, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})


class BothWays(nn.Module):
    """M_f(s) + flip(M_b(flip(s))), two Mambas along the sequence and against it."""

    config: Config

    @nn.compact
    def __call__(self, s: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        options = {"state_size": c.state_size, "conv_width": c.sequence_conv_width, "expand": c.expand}
        along, against = _each(Mamba)(**options, name="mamba")(jnp.stack([s, jnp.flip(s, axis=1)]))
        return along + jnp.flip(against, axis=1)


class CrossScaleAttention(nn.Module):
    """(gates of each scale and class, of each scale and pixel), all in (0, 1), from what the four scales hold together.

    Classes: mean plus maximum over pixels, all channels of the first scale before those of the second, scanned both
    ways, then W_2 ReLU(W_1 t). Pixels: mean and maximum over channels, likewise scale by scale.
    """

    config: Config

    @nn.compact
    def __call__(self, scales: Float[Array, "S B h w C"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S h w"]]:
        c = self.config
        count, batch, height, width, channels = scales.shape
        held = jnp.mean(scales, axis=(2, 3)) + jnp.max(scales, axis=(2, 3))
        held = jnp.swapaxes(held, 0, 1).reshape(batch, count * channels, 1)
        held = BothWays(c, name="channels")(held)[..., 0]
        hidden = jax.nn.relu(Linear(c.width // c.gate_reduction, use_bias=False, name="squeeze")(held))
        gates = jax.nn.sigmoid(Linear(count * c.num_classes, use_bias=False, name="excite")(hidden))

        seen = jnp.stack([jnp.mean(scales, axis=-1), jnp.max(scales, axis=-1)], axis=-1)
        seen = jnp.swapaxes(seen, 0, 1).reshape(batch, count * height * width, 2)
        maps = jax.nn.sigmoid(Linear(1, name="pixel_gate")(BothWays(c, name="pixels")(seen)))
        return gates.reshape(batch, count, c.num_classes), maps.reshape(batch, count, height, width)


class Model(nn.Module):
    """Backbone, pyramid both ways, alignment, four branches, gated sum.

    `logits` (B, H, W, K), the branches' own ungated `branch_logits` and those of the aligned maps before them,
    `early_logits` (B, 4, H, W, K), and the gates: `class_gates` (B, 4, K), `attention` (B, 4, H/4, W/4).
    """

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *_"]]:
        c, x = self.config, batch["x"]
        images = jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
        stages = resnet.Model(backbone(c), name="backbone")(images, train=train).stages
        lateral = [self._fused(f"lateral_{i}", stage, train, kernel=1) for i, stage in enumerate(stages)]

        down = [lateral[3]]
        for i in (2, 1, 0):
            down.insert(0, self._fused(f"top_down_{i}", _resized(down[0], lateral[i].shape[1:3]) + lateral[i], train))
        up = [lateral[0]]
        for i in (1, 2, 3):
            up.append(self._fused(f"bottom_up_{i - 1}", _resized(up[-1], lateral[i].shape[1:3]) + lateral[i], train))
        middle = [self._fused(f"fuse_{i - 1}", down[i] + up[i], train) for i in (1, 2)]
        pyramid = [down[0], *middle, up[3]]

        flows = [FlowField(c.width // 2, name=f"flow_{i}")(*pyramid[i : i + 2]) for i in range(3)]
        aligned = pyramid[3]
        for i in (2, 1, 0):  # each scale through all flows of finer ones, those that share a flow at once
            aligned = jnp.concatenate([pyramid[i], layers.flow_warp(aligned, flows[i], units="output")], axis=-1)
        aligned = jnp.stack(jnp.split(aligned, len(pyramid), axis=-1))

        scales = aligned
        for depth in range(max(c.branch_depths)):
            chosen = np.flatnonzero(np.array(c.branch_depths) > depth)
            deeper = _each(SS2DBlock)(c, name=f"branch_{depth}")(scales[chosen])
            scales = deeper if len(chosen) == len(scales) else scales.at[chosen].set(deeper)
        scores = _each(Linear)(c.num_classes, name="heads")(scales)
        gates, maps = CrossScaleAttention(c, name="attention")(scales)
        gated = jnp.einsum("sbhwk,bsk,bshw->bhwk", scores, gates, maps)

        def full(y: Float[Array, "S B h w K"]) -> Float[Array, "B S H W K"]:
            large = _resized(y.reshape(-1, *y.shape[2:]), x.shape[1:3])
            return jnp.swapaxes(large.reshape(*y.shape[:2], *large.shape[1:]), 0, 1)

        return {
            "logits": _resized(gated, x.shape[1:3]),
            "branch_logits": full(scores),
            "early_logits": full(_each(Linear)(c.num_classes, name="early_heads")(aligned)),
            "class_gates": gates,
            "attention": maps,
        }

    def _fused(self, name: str, x: Float[Array, "B h w C"], train: bool, kernel: int = 3) -> Float[Array, "B h w D"]:
        return ConvNorm(self.config.width, kernel, self.config.batch_norm_epsilon, name=name)(x, train=train)


# Of the official training: what the sum, each branch and each early head count for.
_WEIGHTS = {"logits": 1.0, "branch_logits": 1.0, "early_logits": 0.25}


def _error(logits: Float[Array, "B *size K"], label: Array) -> Float[Array, ""]:
    """Half cross-entropy, half Dice of squares over the batch; of one class, both in full, and Dice of each image."""
    if logits.shape[-1] == 1:
        return pixel_errors(logits, label) + dice_errors(logits, label, smooth=1.0)
    dice = dice_errors(logits, label, smooth=1e-5, whole_batch=True, squares=True)
    return 0.5 * pixel_errors(logits, label) + 0.5 * dice


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The error of the sum, of each branch and, at a quarter, of each early head."""
    label, main = batch["label"], _error(logits_of(outputs), batch["label"])
    total = main
    for name in ("branch_logits", "early_logits"):
        each = jnp.moveaxis(outputs[name].astype(jnp.float32), 1, 0)
        total = total + _WEIGHTS[name] * jnp.sum(jax.vmap(lambda y: _error(y, label))(each))
    return total, {"main_loss": main}


def predict_images(
    model: Model, variables: Mapping[str, Any], images: Float[Array, "B H W C"]
) -> Float[Array, "B H W K"]:
    """Probabilities in images of any size: tiles of the training size side by side, each averaged over its reflections.

    Source: card attention_mamba, Training (inference).
    """

    def look(x: Float[Array, "B h w C"]) -> Float[Array, "B h w K"]:
        return probabilities(logits_of(model.apply(variables, {"x": x})))

    return segmentation.sliding_window(
        partial(segmentation.flip_average, look), images, tile=model.config.image_size, overlap=0.0
    )


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return segmentation.example(
        size=config.image_size, channels=config.channels, num_classes=config.num_classes, batch_size=batch_size, key=key
    )


# --- the official code ------------------------------------------------------------------------------------------------

_HPARAMS = {
    "stem": "stem",
    "stage_channels": "stage_channels",
    "fea_dim": "width",
    "depths_mamba": "branch_depths",
    "d_state": "state_size",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    """Literals of the official file may come as `patched_constants`."""
    given = hparams | hparams.get("patched_constants", {})
    found = {ours: given[theirs] for theirs, ours in _HPARAMS.items() if theirs in given}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Config(channels=3, num_classes=given.get("classes", 2), **found)


def config_to_official(config: Config) -> dict[str, Any]:
    constants = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    constants = {name: list(value) if isinstance(value, tuple) else value for name, value in constants.items()}
    return {"classes": config.num_classes, "patched_constants": constants}


def _backbone_table(config: Config) -> Table:
    """timm's names, of which the official code wraps the stem and each stage once more."""
    renamed = {"conv1.": "layer0.0.", "bn1.": "layer0.1.", **{f"layer{i}.": f"layer{i}.0." for i in range(1, 5)}}
    for row in resnet.official_table(backbone(config)):
        start = next(name for name in renamed if row.official[0].startswith(name))
        official = (renamed[start] + row.official[0].removeprefix(start),)
        collection, _, path = row.ours[0].partition("/")
        yield replace(row, official=official, ours=(f"{collection}/backbone/{path}",))


def _conv_norm(official: str, ours: str) -> Iterator[Row]:
    yield from conv(f"{official}.0", f"{ours}/conv", bias=False)
    yield from batch_norm(f"{official}.1", f"{ours}/norm")


def _flow_table(official: str, ours: str) -> Iterator[Row]:
    yield from conv1x1(f"{official}channel_change1", f"{ours}/coarse", axes=2, bias=False)
    yield from conv1x1(f"{official}channel_change2", f"{ours}/fine", axes=2, bias=False)
    yield from conv(f"{official}offset_map", f"{ours}/offset", bias=False)


def _attention_table(official: str, ours: str) -> Iterator[Row]:
    for theirs, own in (("channel", "channels"), ("spatial", "pixels")):
        names = (f"{official}{theirs}_relation", f"{official}{theirs}_relation_reverse")
        yield from stacked([list(mamba(name, f"{ours}/{own}/mamba")) for name in names])
    yield from conv1x1(f"{official}fc1_channel", f"{ours}/squeeze", axes=2, bias=False)
    yield from conv1x1(f"{official}fc2_channel", f"{ours}/excite", axes=2, bias=False)
    yield from linear(f"{official}fc_spatial", f"{ours}/pixel_gate")


def _block_table(official: str, ours: str) -> Iterator[Row]:
    yield from layer_norm(f"{official}.ln_1", f"{ours}/norm")
    yield from ss2d(f"{official}.self_attention.", f"{ours}/mixer")


def official_table(config: Config) -> Table:
    yield from _backbone_table(config)
    counts = {"channel_changes": 4, "feature_fuses_up": 3, "feature_fuses_down": 3, "stage_fuses": 2}
    for (theirs, count), ours in zip(counts.items(), ("lateral", "top_down", "bottom_up", "fuse"), strict=True):
        for i in range(count):
            yield from _conv_norm(f"{theirs}.{i}", f"{ours}_{i}")
    for i in range(3):
        yield from _flow_table(f"stages_offset.{i}.", f"flow_{i}")
    for depth in range(max(config.branch_depths)):
        deep = [i for i in range(4) if config.branch_depths[i] > depth]
        names = [f"mamba_branches.{i}.blocks.{depth}" for i in deep]
        yield from stacked([list(_block_table(name, f"branch_{depth}")) for name in names])
    for theirs, ours in (("multi_loss_head", "heads"), ("in_deep_sup_heads", "early_heads")):
        yield from stacked([list(conv1x1(f"{theirs}.{i}.0", ours, axes=2)) for i in range(4)])
    yield from _attention_table("multi_scale_attentions.", "attention")


def _last(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    outputs = model.apply(variables, {"x": _last(inputs["x"])})
    found = {"logits": jnp.moveaxis(outputs["logits"], -1, 1)}
    if "label" in inputs:
        found["loss"] = loss(outputs, {"label": inputs["label"][:, 0].astype(jnp.int32)})[0]
    return found


class Part(nn.Module):
    """One of the paper's modules alone; what it takes, as one tuple."""

    config: Config
    kind: str  # ss2d | flow | attention

    @nn.compact
    def __call__(self, inputs: tuple[Float[Array, "..."], ...]) -> Any:
        c = self.config
        if self.kind == "ss2d":
            return SS2D(c.state_size, c.grid_conv_width, expand=c.expand, name="part")(*inputs)
        if self.kind == "flow":
            return FlowField(c.width // 2, name="part")(*inputs)
        return CrossScaleAttention(c, name="part")(jnp.stack(inputs))


def part_example(config: Config, *, batch_size: int, key: jax.Array, kind: str) -> tuple[jax.Array, ...]:
    sizes = {"ss2d": [(5, 7)], "flow": [(8, 6), (4, 3)], "attention": [(4, 5)] * 4}[kind]
    return tuple(jax.random.normal(key, (batch_size, *size, config.width)) for size in sizes)


def part_from_official(hparams: Mapping[str, Any]) -> Config:
    names = {"d_model": "width", "fea_dim": "width", "in_channel": "width"}
    names |= {"d_state": "state_size", "classes": "num_classes"}
    if "middle_channel" in hparams and 2 * hparams["middle_channel"] != hparams["in_channel"]:
        raise ValueError(f"middle_channel {hparams['middle_channel']} is not half of {hparams['in_channel']}")
    return Config(**{names[name]: value for name, value in hparams.items() if name in names})


def ss2d_call(model: Part, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"out": model.apply(variables, (inputs["x"],))}


def flow_call(model: Part, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    fine, coarse = _last(inputs["low_feature"]), _last(inputs["h_feature"])
    flow = model.apply(variables, (fine, coarse))
    height, width = flow.shape[1:3]
    base = np.stack(np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height)), axis=-1)
    sampled = layers.flow_warp(coarse, flow, units="output")
    return {
        "warp_grid": base.astype(np.float32) + flow / np.array([width, height], np.float32),
        "sampled": jnp.moveaxis(sampled, -1, 1),
    }


def attention_call(model: Part, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    gates, maps = model.apply(variables, tuple(_last(inputs[f"fea_{i}"]) for i in range(1, 5)))
    found = {f"CA{i + 1}": gates[:, i, :, None, None] for i in range(4)}
    return found | {f"SA{i + 1}": maps[:, i, None] for i in range(4)}


_FOLDER = "networks/network_architectures/My_Networks_2D_Attention_Mamba"


def _part(module: str, kind: str, hparams: Any, table: Any, call: Any) -> Official:
    return Official(
        module=f"{_FOLDER}/{module}",
        config=part_from_official,
        hparams=hparams,
        table=lambda config: table("", "part"),
        call=call,
        model=partial(Part, kind=kind),
        example=partial(part_example, kind=kind),
    )


PAPER = Paper(
    slug="attention_mamba",
    task=segmentation.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(
            image_size=(64, 64), num_classes=4, stem=(8, 16), stage_channels=(8, 16, 32, 64),
            stage_depths=(1, 1, 1, 1), width=32, branch_depths=(1, 1, 1, 1), state_size=4,
        ),
        "synapse": Config(),
        "acdc": Config(image_size=(192, 192), num_classes=4),
        "isic": Config(image_size=(256, 256), channels=3, num_classes=1),
        "vessels": Config(  # not in the paper: a small one, for CHASE_DB1
            image_size=(128, 128), channels=3, num_classes=1, stem=(16, 32), stage_channels=(16, 32, 64, 128),
            stage_depths=(1, 1, 1, 1), width=32, branch_depths=(1, 1, 1, 1), state_size=8,
        ),
    },
    officials=(
        Official(
            module=f"{_FOLDER}/model_My_Attention_Mamba_2D.py:Other_models",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
        _part(
            "module_Mamba/mamba_kernel_SS2D.py:SS2D", "ss2d",
            lambda c: {"d_model": c.width, "d_state": c.state_size}, ss2d, ss2d_call,
        ),
        _part(
            "module/modules.py:warp_grid", "flow",
            lambda c: {"in_channel": c.width, "middle_channel": c.width // 2}, _flow_table, flow_call,
        ),
        _part(
            "module/attention_CA_SA_V5.py:mamba_attention_module_V4", "attention",
            lambda c: {"classes": c.num_classes, "fea_dim": c.width, "d_state": c.state_size},
            _attention_table, attention_call,
        ),
    ),
    parameter_counts={"synapse": 14_054_803},
    reported={
        "synapse": {"dice": 0.8562},
        "acdc": {"dice": 0.9203},
        "isic2018": {"dice": 0.9012},
        "ph2": {"dice": 0.9156},
    },
    quirks=(
        "a flow is divided by height and width where the grid spans two: it moves half as far as it says (kept)",
        "the bottom-up path shrinks maps by plain bilinear interpolation (kept)",
        "gates multiply scores, so all classes of a pixel near a gate of 0 become equally likely (kept)",
        "pixel and class gates scan the scales one after the other, which makes their order matter (kept)",
    ),
)  # fmt: skip
