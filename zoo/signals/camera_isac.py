"""CC-ISAC: a camera that leads a radio beam to a flying target by one step (Wu et al., arXiv:2605.22090).

Official code: Wenfeng-Wu/cc-isac-uav@14947ac (licence unknown). Fidelity: exact for the two networks.
New: the camera's estimate of the angles (V2EDA, image and box joined by attention) of the current step enters a small
transformer over the past of camera and echo (MMFE) before any echo of this step is sent; both are fused, step by step,
by a learned weighted mean whose weights are no softmax.
Differs: in the release each attention of V2EDA has one key, so that its weights are 1 and query and key have no effect
(`attention="degenerate"`). Ours attends, by default, from the box to the 49 places of the image's map, which know where
they are, and from the image to the four numbers of the box. Both networks train in one run, the second on estimates
that its loss does not change; `frozen_vision` is the official second stage. The authors' trainers choose by test error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import layers
from zoo.blocks import BatchNorm, Dropout, Linear, stack
from zoo.blocks.basic import product_of_patches, torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import beam_tracking
from zoo.tasks.task import Batch
from zoo.weights.table import (
    Table,
    batch_norm,
    conv,
    conv1x1,
    layer_norm,
    linear,
    multihead_attention,
    parameter,
    squeezed,
)

Fault = Literal["camera", "stale", "all_camera", "all_stale", "ahead", "delay", "both", "noise"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the defaults are the release's."""

    lookback: int = 7  # T, steps seen, of the last one by the camera alone
    image_size: tuple[int, int] = (64, 64)  # height and width, from 62 to 77: the convolutions end at one place
    echo_channels: int = 3  # E: azimuth, elevation and distance; 2 without distance
    quantities: tuple[str, ...] = ("azimuth", "elevation")  # Q, predicted by a network each; distance is the third
    channels: tuple[int, int, int, int] = (8, 16, 16, 16)  # of V2EDA's convolutions; the last is its width D
    attention: str = "cross"  # cross | degenerate, see the module's docstring
    num_vision_heads: int = 1  # of the cross attention
    d_model: int = 16  # width of MMFE's tokens
    d_aux: int = 4  # width of the current camera estimate
    d_ff: int = 64
    num_layers: int = 1
    num_heads: int = 2
    max_positions: int = 100  # rows of the learned position table
    fusion: str = "concat"  # of past and current estimate: concat | attn2
    dropout_rate: float = 0.1  # in MMFE's transformer
    frozen_vision: bool = False  # V2EDA does not learn and normalises by its running statistics
    echo_faults: tuple[Fault, ...] = ()  # done to echoes while training, one of them an example, see `disturb_echo`
    echo_fault_rate: float = 0.9  # share of the examples to which it is done
    fusion_epsilon: float = 1e-8  # added to the sum of the two weights, which may vanish
    layer_norm_epsilon: float = 1e-5
    batch_norm_epsilon: float = 1e-5
    batch_norm_momentum: float = 0.1  # share of the batch in the running statistics


def _norm(config: Config, name: str) -> BatchNorm:
    return BatchNorm(config.batch_norm_epsilon, config.batch_norm_momentum, name=name)


class ConvBlock(nn.Module):
    """ReLU(BN(3 x 3 convolution)), without padding."""

    config: Config
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w F"]:
        start = torch_uniform(9 * x.shape[-1])
        convolve = nn.Conv(
            self.features, (3, 3), strides=self.stride, padding="VALID", kernel_init=start, bias_init=start,
            conv_general_dilated=product_of_patches, name="conv",
        )  # fmt: skip
        x = convolve(x)
        return jax.nn.relu(_norm(self.config, "norm")(x, train=train))


class ResidualMLP(nn.Module):
    """ReLU(x + BN(W_2 ReLU(BN(W_1 x))))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, train: bool) -> Float[Array, "B D"]:
        hidden = jax.nn.relu(_norm(self.config, "norm1")(Linear(x.shape[-1], name="fc1")(x), train=train))
        return jax.nn.relu(x + _norm(self.config, "norm2")(Linear(x.shape[-1], name="fc2")(hidden), train=train))


class OneQueryAttention(nn.Module):
    """softmax(W_q a . W_k b / sqrt(D)) W_v b for one query: one token sees all tokens of the other sense."""

    num_heads: int

    @nn.compact
    def __call__(self, a: Float[Array, "B D"], b: Float[Array, "B K D"]) -> Float[Array, "B D"]:
        heads = (self.num_heads, a.shape[-1] // self.num_heads)
        query = Linear(a.shape[-1], name="query")(a).reshape(-1, 1, *heads)
        key, value = (Linear(a.shape[-1], name=n)(b).reshape(*b.shape[:2], *heads) for n in ("key", "value"))
        read, weights = layers.dot_product_attention(query, key, value, return_weights=True)
        self.sow("intermediates", "weights", weights)
        return read.reshape(a.shape)


class VisionAngles(nn.Module):
    """V2EDA: azimuth and elevation, normalised, from the masked frame and the box of the target."""

    config: Config

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"], box: Float[Array, "B 4"], *, train: bool) -> Float[Array, "B 2"]:
        c = self.config
        width = c.channels[-1]
        x = layers.avg_pool(image, 2)
        for i, (features, stride) in enumerate(zip(c.channels, (2, 2, 2, 1), strict=True)):
            x = ConvBlock(c, features, stride, name=f"conv_{i}")(x, train=train)
            if i == 1:
                places = x
        seen = ResidualMLP(c, name="image_mlp")(jnp.mean(x, axis=(1, 2)), train=train)
        boxed = ResidualMLP(c, name="box_mlp")(Linear(width, name="box_embedding")(box), train=train)
        image_attention = OneQueryAttention(c.num_vision_heads, name="image_attention")
        box_attention = OneQueryAttention(c.num_vision_heads, name="box_attention")
        if c.attention == "degenerate":
            joined = image_attention(seen, seen[:, None]) * box_attention(boxed, boxed[:, None])
        else:
            # Convolutions of an un-padded image say what is there but not where.
            size = places.shape[1:3]
            where = layers.grid_coordinates(size, scale=(1 / size[0], 1 / size[1])).astype(image.dtype)
            tokens = Linear(width, name="map_embedding")(places.reshape(len(places), -1, places.shape[-1]))
            tokens = tokens + Linear(width, use_bias=False, name="place_embedding")(where)
            # Each number of the box is a token: a direction of its own times the number, from a start of its own.
            table = self.param("box_tokens", nn.initializers.normal(1.0), (2, 4, width))
            numbers = box[..., None] * table[0] + table[1]
            joined = image_attention(boxed, tokens) * box_attention(seen, numbers)
        hidden = jax.nn.relu(Linear(width // 2, name="out_1")(joined))
        return jax.nn.sigmoid(Linear(2, name="out_2")(hidden))


def fuse(
    camera: Float[Array, "*B"], echo: Float[Array, "*B"], weights: Float[Array, "*B 2"], *, epsilon: float
) -> Float[Array, "*B"]:
    """(p_1 v + p_2 r) / (p_1 + p_2 + epsilon); the weights may be negative."""
    mixed = weights[..., 0] * camera + weights[..., 1] * echo
    return mixed / (weights[..., 0] + weights[..., 1] + epsilon)


class EncoderLayer(nn.Module):
    """Post-norm: x = LN(x + Attn(x)); x = LN(x + W_2 ReLU(W_1 x)); torch's TransformerEncoderLayer."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        c = self.config
        drop = partial(Dropout(c.dropout_rate), train=train)
        query, key, value = (
            Linear(c.d_model, name=n)(x).reshape(*x.shape[:2], c.num_heads, -1) for n in ("query", "key", "value")
        )
        _, weights = layers.dot_product_attention(query, key, value, return_weights=True)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", drop(weights).astype(x.dtype), value).reshape(x.shape)
        x = nn.LayerNorm(c.layer_norm_epsilon, name="norm1")(x + drop(Linear(c.d_model, name="out")(mixed)))
        hidden = drop(jax.nn.relu(Linear(c.d_ff, name="ffn_in")(x)))
        return nn.LayerNorm(c.layer_norm_epsilon, name="norm2")(x + drop(Linear(c.d_model, name="ffn_out")(hidden)))


class TwoTokenFusion(nn.Module):
    """W_o of the softmax-weighted sum of h' = W_h h and a' = W_a a, scored by one vector."""

    @nn.compact
    def __call__(self, past: Float[Array, "B D"], now: Float[Array, "B D"]) -> Float[Array, "B D"]:
        width = past.shape[-1]
        pair = jnp.stack([Linear(width, name="past")(past), Linear(width, name="now")(now)], axis=1)
        weights = jax.nn.softmax(Linear(1, name="score")(pair), axis=1)
        return Linear(width, name="out")(jnp.sum(weights * pair, axis=1))


class Tracker(nn.Module):
    """MMFE: one quantity of the last step from the echoes before it and the camera's angles up to and in it."""

    config: Config

    @nn.compact
    def __call__(
        self, camera: Float[Array, "B T 2"], echo: Float[Array, "B T E"], *, train: bool
    ) -> Float[Array, " B"]:
        c = self.config
        past, heard = camera[:, :-1], echo[:, :-1]  # the last echo is still under way
        pairs = jnp.stack([past, heard[..., :2]], axis=-1)
        fused = [
            fuse(*jnp.moveaxis(pairs[..., i, :], -1, 0), Linear(2, name=f"weigh_{name}")(pairs[..., i, :]),
                 epsilon=c.fusion_epsilon)
            for i, name in enumerate(("azimuth", "elevation"))
        ]  # fmt: skip
        tokens = Linear(c.d_model, name="embedding")(jnp.concatenate([jnp.stack(fused, axis=-1), heard], axis=-1))
        if tokens.shape[1] > c.max_positions:
            raise ValueError(f"lookback {tokens.shape[1] + 1} is beyond the {c.max_positions} positions + 1")
        start = nn.initializers.truncated_normal(0.02)
        tokens = tokens + self.param("positions", start, (c.max_positions, c.d_model))[: tokens.shape[1]]
        tokens = stack(self, partial(EncoderLayer, c), c.num_layers, tokens, train=train)
        known = jnp.mean(tokens, axis=1)
        width = c.d_model if c.fusion == "attn2" else c.d_aux
        now = jax.nn.relu(Linear(width, name="now_embedding")(camera[:, -1]))
        if c.fusion == "attn2":
            joined = TwoTokenFusion(name="fusion")(known, now)
        else:
            joined = jnp.concatenate([known, now], axis=-1)
        hidden = jax.nn.relu(Linear(c.d_model, name="out_1")(joined))
        return jax.nn.sigmoid(Linear(1, name="out_2")(hidden))[..., 0]


def disturb_echo(
    echo: Float[Array, "T E"], camera: Float[Array, "T 2"], fault: Fault, key: jax.Array
) -> Float[Array, "T E"]:
    """One window's echoes as they are when something is wrong.

    camera, stale: the angles of one random step are the camera's, or the first echo's; all_...: of every step. ahead,
    both: each value is shifted towards its neighbour in time, the later one or a random one, by a random share of half
    the difference; delay: towards the earlier one, of a quarter. noise: uniform numbers.
    """
    steps = jnp.arange(len(echo))[:, None]
    if fault == "noise":
        return jax.random.uniform(key, echo.shape, echo.dtype)
    if fault in ("ahead", "delay", "both"):
        later, earlier = (echo[jnp.clip(steps[:, 0] + i, 0, len(echo) - 1)] - echo for i in (1, -1))
        amount, side = (jax.random.uniform(k, echo.shape, echo.dtype) for k in jax.random.split(key))
        if fault == "delay":
            return echo + 0.25 * amount * earlier
        return echo + 0.5 * amount * jnp.where((side < 0.5) & (fault == "both"), earlier, later)
    other = camera if fault.endswith("camera") else jnp.broadcast_to(echo[:1, :2], camera.shape)
    chosen = (steps == jax.random.randint(key, (), 0, len(echo))) | fault.startswith("all")
    return jnp.concatenate([jnp.where(chosen, other, echo[:, :2]), echo[:, 2:]], axis=-1)


class Model(nn.Module):
    """The camera sees every frame; a tracker for each quantity fuses what it saw with the echoes that came back."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c = self.config
        image, box, echo = batch["image"], batch["box"], batch["echo"]
        flat = image.reshape(-1, *image.shape[2:]), box.reshape(-1, box.shape[-1])
        camera = VisionAngles(c, name="vision")(*flat, train=train and not c.frozen_vision).reshape(*box.shape[:2], 2)
        seen = jax.lax.stop_gradient(camera)
        if train and c.echo_faults:
            echo = self._with_faults(echo, seen)
        now = [Tracker(c, name=name)(seen, echo, train=train) for name in c.quantities]
        return {"camera": seen if c.frozen_vision else camera, "now": jnp.stack(now, axis=-1)}

    def _with_faults(self, echo: Float[Array, "B T E"], camera: Float[Array, "B T 2"]) -> Float[Array, "B T E"]:
        c = self.config
        keys = jax.random.split(self.make_rng("dropout"), len(echo))

        def one(echo, camera, key):
            happens, which, how = jax.random.split(key, 3)
            # Not of the last step, which no echo has come back from.
            disturbed = jnp.stack([disturb_echo(echo[:-1], camera[:-1], fault, how) for fault in c.echo_faults])
            chosen = disturbed[jax.random.randint(which, (), 0, len(c.echo_faults))]
            chosen = jnp.concatenate([chosen, echo[-1:]])
            return jnp.where(jax.random.bernoulli(happens, c.echo_fault_rate), chosen, echo)

        return jax.vmap(one)(echo, camera, keys)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return beam_tracking.example(
        lookback=config.lookback,
        image_size=config.image_size,
        echo_channels=config.echo_channels,
        batch_size=batch_size,
        key=key,
    )


# --- the official code ---------------------------------------------------------------------------------------------


class TrackerPart(nn.Module):
    """A `Tracker` as a model of its own, with the release's fusion of distances, which nothing calls."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, " B"]:
        self.variable("unused", "kernel", jnp.zeros, (2, 2))
        self.variable("unused", "bias", jnp.zeros, (2,))
        return Tracker(self.config, name="tracker")(batch["camera"], batch["echo"], train=train)


class FusionPart(nn.Module):
    """`TwoTokenFusion` as a model of its own."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch) -> Float[Array, "B D"]:
        return TwoTokenFusion(name="fusion")(batch["past"], batch["now"])


class VisionPart(nn.Module):
    """`VisionAngles` as a model of its own."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B 2"]:
        return VisionAngles(self.config, name="vision")(batch["image"], batch["box"], train=train)


def vision_example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return {name: value[:, 0] for name, value in example(config, batch_size=batch_size, key=key).items()}


def vision_table(config: Config) -> Table:
    for i, (theirs, at) in enumerate((("embed", 1), ("embed", 4), ("for_box", 0), ("for_box", 3))):
        yield from conv(f"img_{theirs}.{at}", f"vision/conv_{i}/conv")
        yield from batch_norm(f"img_{theirs}.{at + 1}", f"vision/conv_{i}/norm")
    yield from linear("box_embed", "vision/box_embedding")
    for theirs, ours in (("img", "image"), ("box", "box")):
        for i in (1, 2):
            yield from linear(f"resMLP_{theirs}.fc{i}", f"vision/{ours}_mlp/fc{i}")
            yield from batch_norm(f"resMLP_{theirs}.bn{i}", f"vision/{ours}_mlp/norm{i}")
    for name in ("image", "box"):
        for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"attn_{name}.w_{short}", f"vision/{name}_attention/{long}")
    yield from linear("output_fc.0", "vision/out_1")
    yield from linear("output_fc.2", "vision/out_2")


def vision_call(model: VisionPart, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    box = jnp.concatenate([inputs["box_center"], inputs["box_size"]], axis=-1)
    out = model.apply(variables, {"image": jnp.moveaxis(inputs["images"], 1, -1), "box": box})
    outputs = {"out": out, "denormalized": beam_tracking.denormalize(out)}
    if "true" in inputs:
        outputs["loss"] = jnp.mean(jnp.square(out - beam_tracking.normalize(inputs["true"])[:, :2]))
    return outputs


def tracker_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {name: hparams[name] for name in ("d_model", "d_aux") if name in hparams}
    return Config(**ours, echo_channels=hparams.get("input_dim", 5) - 2)


def tracker_example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    shape = (batch_size, config.lookback)
    return {"camera": jnp.zeros((*shape, 2)), "echo": jnp.zeros((*shape, config.echo_channels))}


def tracker_table(config: Config) -> Table:
    for i, name in enumerate(("azimuth", "elevation"), 1):
        yield from conv1x1(f"fuse.fuseMini{i}.conv", f"tracker/weigh_{name}")
    for row in conv1x1("fuse.fuseMini3.conv", ""):
        yield replace(row, ours=tuple(name.replace("params/", "unused") for name in row.ours))
    yield from linear("hist_linear", "tracker/embedding")
    yield from parameter("pos_encoder.pe", "tracker/positions", squeezed(1))
    for i in range(config.num_layers):
        theirs, ours = f"transformer_encoder.layers.{i}", f"tracker/layers_{i}"
        yield from multihead_attention(f"{theirs}.self_attn", ours, config.d_model)
        yield from linear(f"{theirs}.linear1", f"{ours}/ffn_in")
        yield from linear(f"{theirs}.linear2", f"{ours}/ffn_out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from linear("mlp_aux.0", "tracker/now_embedding")
    yield from linear("mlp_out.0", "tracker/out_1")
    yield from linear("mlp_out.2", "tracker/out_2")


def tracker_call(model: TrackerPart, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Array]:
    out = model.apply(variables, {"camera": inputs["vision_ori"], "echo": inputs["echo_ori"]})
    outputs = {"out": out[:, None]}
    if "labels" in inputs:
        outputs["loss"] = jnp.mean(jnp.square(out - inputs["labels"][:, 0]))
    return outputs


def fusion_table(config: Config) -> Table:
    for theirs, ours in (("hist_proj", "past"), ("aux_proj", "now"), ("attn", "score"), ("out_proj", "out")):
        yield from linear(theirs, f"fusion/{ours}")


def fusion_example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return {name: jnp.zeros((batch_size, config.d_model)) for name in ("past", "now")}


def fusion_call(model: FusionPart, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"out": model.apply(variables, {"past": inputs["hist_feat"], "now": inputs["aux_feat"]})}


_DIRECTORY = "uav_vision_rf_sensing"
_FAULTS: tuple[Fault, ...] = ("camera", "stale", "all_camera", "all_stale", "ahead", "delay", "both", "noise")

PAPER = Paper(
    slug="camera_isac",
    task=beam_tracking.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(),  # the release's sizes are tiny
        "release": Config(attention="degenerate", quantities=("azimuth", "elevation", "distance")),
        "second_stage": Config(frozen_vision=True),
        "robust": Config(echo_faults=_FAULTS),
        "two_tokens": Config(fusion="attn2"),
        "wide": Config(channels=(32, 64, 64, 64), num_vision_heads=4),
    },
    officials=(
        Official(
            module=f"{_DIRECTORY}/Calibration_nets/vision_net_est_ab_light.py:Vision_Net",
            config=lambda hparams: Config(attention="degenerate"),
            hparams=lambda config: {},
            table=vision_table,
            call=vision_call,
            model=VisionPart,
            example=vision_example,
        ),
        Official(
            module=f"{_DIRECTORY}/FusionPredict_net/fuse_net_VisionFirstCome_pred_a_1.py:PredModel",
            config=tracker_from_official,
            hparams=lambda c: {"input_dim": 2 + c.echo_channels, "d_model": c.d_model, "d_aux": c.d_aux},
            table=tracker_table,
            call=tracker_call,
            model=TrackerPart,
            example=tracker_example,
        ),
        Official(
            module=f"{_DIRECTORY}/FusionPredict_net/functions.py:CrossAttention",
            config=lambda hparams: Config(d_model=hparams["d_model"], fusion="attn2"),
            hparams=lambda config: {"d_model": config.d_model},
            table=fusion_table,
            call=fusion_call,
            model=FusionPart,
            example=fusion_example,
        ),
    ),
    # 9,226 of V2EDA and three times 5,359 less 6 of MMFE, whose fusion of distances nothing calls.
    parameter_counts={"release": 25_285},
    quirks=(
        "attention=degenerate: one key, so that queries and keys of V2EDA have no effect",
        "the two weights of the fusion may be negative and their sum may vanish",
        "the fusion of distances is never called: it lies in the collection `unused` of the official part",
        "the official trainers keep the epoch of the least test error; ours chooses on flights of its own",
    ),
)
