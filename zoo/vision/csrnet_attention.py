"""Optimising CSRNet with parameter-free attention mechanisms for crowd counting in public transport
(arXiv:2605.18349).

No official code; the network is that of leeyeehoo/CSRNet-pytorch@ed29d89 (no licence). Fidelity: reading.
New: what a crowd counter attends to is computed from its features' own statistics, without a single weight: channels
that stand out among channels (PFCA), places that are brighter than others (SA), both in turn (PFCASA), or every value
by how far it is from its channel's mean (SimAM); next to gates that learn within 1 % of the network's weights.
Differs: the formulas are those of the modules' own publications and, for PFCA, derived from SimAM's; where the gates
stand, their order and which learned ones stand beside them is unpublished, and ours. The loss is a mean over cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from zoo.blocks import BatchNorm, Linear
from zoo.blocks.basic import product_of_patches
from zoo.paper import Official, Paper
from zoo.tasks import density_regression
from zoo.tasks.task import Batch
from zoo.weights.convert import forwards
from zoo.weights.table import Table, conv

POOL = 0  # in a list of channels: the largest of every 2 x 2
_PLACES = {"front": ("front",), "back": ("back",), "both": ("front", "back")}


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the network itself takes images of any size."""

    height: int = 768  # of the data's images, in pixels
    width: int = 1024  # likewise
    front: tuple[int, ...] = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512)
    """Channels of the convolutions of VGG-16, 0 for pooling."""
    back: tuple[int, ...] = (512, 512, 512, 256, 128, 64)  # channels of the dilated convolutions
    dilation: int = 2  # of these
    attention: Literal["none", "simam", "pfca", "sa", "pfcasa", "se", "eca", "cbam", "coordinate"] = "pfcasa"
    """What features are multiplied by; the first five have no weights."""
    attention_at: Literal["front", "back", "both", "every_block"] = "front"  # behind what it stands
    order: Literal["channel_first", "spatial_first", "parallel"] = "channel_first"  # of pfcasa's two
    channel_variant: Literal["energy", "literal"] = "energy"  # of pfca: literal as a public reimplementation has it
    spatial_normalize: Literal["mean", "sum"] = "mean"  # of sa: sum as its publication has it, before global pooling
    ridge: float = 1e-4  # added to variances, in squared units of features
    epsilon: float = 1e-6  # added to sa's denominator
    reduction: int = 16  # of se's and cbam's bottleneck; coordinate's is twice that
    eca_taps: int = 5  # neighbouring channels that eca looks at
    cbam_size: int = 7  # of its convolution
    batch_norm_epsilon: float = 1e-5  # of coordinate attention
    convolution: Literal["native", "patches"] = "native"
    """native: as `layers` has it; patches: as a product of patches, which on CPUs is faster for narrow layers."""
    init_std: float | None = 0.01
    """Of new kernels; None: sqrt(2 / fan-in), where the front end starts afresh too, and 0.01 of the last one's."""


# --- attention --------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Features times what the chosen attention makes of them. Source: card csrnet_attention, Mechanism."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], *, train: bool) -> Float[Array, "B h w C"]:
        c, channels = self.config, x.shape[-1]
        channel = {"ridge": c.ridge, "variant": c.channel_variant}
        spatial = {"normalize": c.spatial_normalize, "epsilon": c.epsilon}
        if c.attention == "simam":
            return x * layers.simam_gate(x, ridge=c.ridge)
        if c.attention == "pfca":
            return x * layers.energy_channel_gate(x, **channel)
        if c.attention == "sa":
            return x * layers.mean_map_gate(x, **spatial)
        if c.attention == "pfcasa":
            return layers.pfcasa(x, order=c.order, **channel, **spatial)
        start, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        if c.attention == "eca":
            return x * layers.efficient_channel_gate(x, self.param("taps", nn.initializers.normal(0.5), (c.eca_taps,)))
        if c.attention == "coordinate":
            return x * self.coordinate_gate(x, train=train)
        narrow = max(channels // c.reduction, 1)
        reduce = self.param("reduce", start, (channels, narrow))
        expand = self.param("expand", start, (narrow, channels))
        if c.attention == "se":
            return x * layers.squeeze_excitation_gate(x, reduce, expand)
        biases = {"reduce_bias": self.param("reduce_bias", zeros, (narrow,))}
        biases["expand_bias"] = self.param("expand_bias", zeros, (channels,))
        kernel = self.param("kernel", start, (c.cbam_size, c.cbam_size, 2, 1))
        return layers.cbam(x, reduce, expand, kernel, **biases)

    def coordinate_gate(self, x: Float[Array, "B h w C"], *, train: bool) -> Float[Array, "B h w C"]:
        """A gate for each row times one for each column. Source: arXiv:2103.02907, equations 4 to 9."""
        c, height, channels = self.config, x.shape[1], x.shape[-1]
        profile = jnp.concatenate([jnp.mean(x, axis=2), jnp.mean(x, axis=1)], axis=1)
        hidden = Linear(max(channels // (2 * c.reduction), 8), name="reduce")(profile)
        hidden = jax.nn.hard_swish(BatchNorm(c.batch_norm_epsilon, name="norm")(hidden, train=train))
        rows = jax.nn.sigmoid(Linear(channels, name="rows")(hidden[:, :height]))
        columns = jax.nn.sigmoid(Linear(channels, name="columns")(hidden[:, height:]))
        return rows[:, :, None] * columns[:, None]


# --- the network ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Image to things a cell of 8 x 8 pixels: VGG's convolutions, attention, dilated convolutions, a weighted sum."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B h w 1"]:
        c, x = self.config, batch["x"]

        def convolved(x: Array, channels: int, name: str, *, size: int = 3, dilation: int = 1) -> Array:
            spread = {"padding": dilation * (size // 2), "kernel_dilation": dilation}
            start = nn.initializers.normal(c.init_std or 0.01)
            if c.init_std is None and name != "out":  # counts begin near 0
                start = nn.initializers.he_normal()
            convolve = layers.conv_general_dilated if c.convolution == "native" else product_of_patches
            return nn.Conv(
                channels, (size, size), kernel_init=start, **spread, conv_general_dilated=convolve, name=name
            )(x)

        def attended(x: Array, place: str) -> Array:
            if c.attention == "none" or place not in _PLACES.get(c.attention_at, (place,)):
                return x
            return Gate(c, name=f"attention_{place}")(x, train=train)

        number = 0
        for i, channels in enumerate(c.front):
            if channels == POOL:
                x = nn.max_pool(attended(x, f"block_{i}"), (2, 2), (2, 2))
            else:
                x = jax.nn.relu(convolved(x, channels, f"front_{number}"))
                number += 1
        x = attended(x, "front")
        for i, channels in enumerate(c.back):
            x = jax.nn.relu(convolved(x, channels, f"back_{i}", dilation=c.dilation))
        return convolved(attended(x, "back"), 1, "out", size=1)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    cell = 2 ** config.front.count(POOL)
    size = {"height": config.height, "width": config.width, "cell": cell}
    return density_regression.example(**size, batch_size=batch_size, key=key)


# --- the network's official code, and the weights its front end starts from -------------------------------------------


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    lists = {"frontend_feat": "front", "backend_feat": "back"}  # constants there
    ours = {
        ours: tuple(POOL if channels == "M" else channels for channels in hparams[theirs])
        for theirs, ours in lists.items()
        if theirs in hparams
    }
    return Config(**ours, attention="none")


def config_to_official(config: Config) -> dict[str, Any]:
    front = ["M" if channels == POOL else channels for channels in config.front]
    return {"frontend_feat": front, "backend_feat": list(config.back)}


def front_table(config: Config, official: str) -> Table:
    place = number = 0  # pooling and activations count in the official numbers
    for channels in config.front:
        if channels != POOL:
            yield from conv(f"{official}.{place}", f"front_{number}")
            number += 1
        place += 1 if channels == POOL else 2


def official_table(config: Config) -> Table:
    yield from front_table(config, "frontend")
    for i in range(len(config.back)):
        yield from conv(f"backend.{2 * i}", f"back_{i}")
    yield from conv("output_layer", "out")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    y = model.apply(variables, {"x": jnp.moveaxis(inputs["x"], 1, -1)})
    return {"y": jnp.moveaxis(y, -1, 1)}


def with_vgg_front(config: Config, variables: Mapping[str, Any], vgg16: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with the front end of torchvision's VGG-16 (its state dict), from which the paper's starts.

    zoo.save("start.safetensors", model, with_vgg_front(model.config, variables, vgg16)), then
    zoo train csrnet_attention --init-from start.safetensors.
    """
    front = forwards(front_table(config, "features"), vgg16)["params"]
    return {**variables, "params": {**variables["params"], **jax.tree.map(jnp.asarray, front)}}


PAPER = Paper(
    slug="csrnet_attention",
    task=density_regression.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(
            height=96,
            width=96,
            front=(8, 8, POOL, 16, 16, POOL, 32, 32, POOL, 64),
            back=(64, 32, 16),
            convolution="patches",
            init_std=None,
        ),
        "csrnet": Config(attention="none"),
        "pfcasa": Config(),
    },
    officials=(
        Official(
            module="model.py:CSRNet",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts=dict.fromkeys(("csrnet", "pfcasa"), 16_263_489),
    quirks=("CSRNet's loss is a sum over cells, for which its learning rate of 1e-7 is meant; here it is the mean",),
)
