"""HeteroGenManip: generalizable manipulation for heterogeneous object interactions (arXiv:2605.10201).

Official code: YzmYalier/HeteroGenManip@ce0c5db (MIT). Fidelity: exact.
New: each of two objects is described by the foundation model of its category; where to grasp is found by matching the
features of its points to a demonstration's (`contact_points`); two cross-attentions join both objects' points with
those features, and a diffusion policy makes actions of them.
Differs: the official attention is over one token an object, whose softmax is 1, so that neither the active object nor
any feature of a foundation model is ever seen; here an object is several tokens (`attention`, "tokens"), each of the
points nearest to one of those farthest apart, queries keep a residual and scores are scaled. DDIM keeps to what the
network's output means (`sampler`, "consistent"); the pinned library's step takes it for noise ("pinned"). Actions are
drawn from the same noise for every example.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

import layers
from zoo.blocks import Linear
from zoo.blocks.basic import torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import manipulation
from zoo.tasks.task import Batch
from zoo.weights.table import Table, constant, conv, conv1x1, conv_transpose, layer_norm, linear, parameter


@dataclass(frozen=True)
class Config:
    """Sizes and constants; a step is one action."""

    horizon: int = 8  # P, actions that are drawn
    num_actions: int = 4  # of them, those carried out, from the last moment seen on
    num_observations: int = 3  # T, moments seen
    num_points: int = 2048  # N, of each cloud
    state_dim: int = 60  # S, of the robot
    action_dim: int = 60  # A, its next state or a part of it
    environment_channels: int = 6  # of its points: place and colour
    active_features: int = 2  # a foundation model's channels of each point
    passive_features: int = 5  # likewise, of the object that stays
    use_color: bool = False  # False: colours are normalised and left out, as officially
    point_widths: tuple[int, ...] = (64, 128, 256)  # of what every point goes through
    feature_width: int = 128  # of the environment; an object has half
    state_widths: tuple[int, int] = (128, 64)  # of the two layers for the robot's state
    attention: Literal["tokens", "official"] = "tokens"  # official: one token an object, whose softmax is 1
    num_groups: int = 32  # G, tokens of an object
    widths: tuple[int, ...] = (512, 1024, 2048)  # of the U-Net's levels
    kernel_size: int = 5  # of the U-Net's convolutions
    norm_groups: int = 8  # of its normalisations
    final_norm_groups: int = 8  # of the last one
    step_dim: int = 64  # of the embedding of a diffusion step
    train_steps: int = 100  # diffusion steps
    inference_steps: int = 10  # of those, taken while drawing
    clip: float = 1.0  # of clean actions while drawing
    sampler: Literal["consistent", "pinned"] = "consistent"  # pinned: that of the library the official code pins
    norm_epsilon: float = 1e-5  # added to the variance under the root, of layers and groups
    smallest_range: float = 1e-4  # of data: what varies less is taken for constant
    similarity_epsilon: float = 1e-8  # added to the range that a column of similarities is divided by

    def __post_init__(self):
        if self.attention not in ("tokens", "official") or self.sampler not in ("consistent", "pinned"):
            raise ValueError(f"attention {self.attention!r} or sampler {self.sampler!r} is unknown")
        if self.horizon % 2 ** (len(self.widths) - 1):
            raise ValueError(f"horizon {self.horizon} cannot be halved {len(self.widths) - 1} times")


# --- where to grasp ---------------------------------------------------------------------------------------------------


def _unit(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def similarity(
    demonstrated: Float[Array, "I C"], observed: Float[Array, "B N C"], *, epsilon: float = 1e-8
) -> Float[Array, "B N I"]:
    """Cosines of every point's features and each demonstrated one's, per column stretched to [0, 1] over the points.

    Source: card heterogenmanip, Mechanism (point features).
    """
    cosine = jnp.einsum("bnc,ic->bni", _unit(observed), _unit(demonstrated), precision="highest")
    low, high = (f(cosine, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    return (cosine - low) / (high - low + epsilon)


def contact_points(
    demonstrated: Float[Array, "I C"], observed: Float[Array, "B N C"], points: Float[Array, "B N 3"]
) -> Float[Array, "B I 3"]:
    """The point most like each demonstrated contact. Source: card heterogenmanip, Stage 1."""
    return layers.gather_points(points, jnp.argmax(similarity(demonstrated, observed), axis=1))


# --- what is seen -----------------------------------------------------------------------------------------------------


class Limits(nn.Module):
    """x scale + offset, or back: the data's smallest and largest values to -1 and 1. Not trained."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], *, inverse: bool = False) -> Float[Array, "*B D"]:
        start = {"scale": jnp.ones, "max": jnp.ones, "min": lambda shape: -jnp.ones(shape), "std": jnp.ones}
        v = {n: self.variable("constants", n, start.get(n, jnp.zeros), (self.width,)).value for n in _LIMITS}
        return (x - v["offset"]) / v["scale"] if inverse else x * v["scale"] + v["offset"]


_LIMITS = ("scale", "offset", "max", "mean", "min", "std")


def limits(values: Float[np.ndarray, "S D"], smallest_range: float) -> dict[str, Float[np.ndarray, " D"]]:
    """What `Limits` holds for these data; what does not vary goes to 0."""
    low, high = values.min(axis=0), values.max(axis=0)
    fixed = high - low < smallest_range
    scale = 2 / np.where(fixed, 2, high - low)
    offset = np.where(fixed, -low, -1 - scale * low)
    spread = values.std(axis=0, ddof=1)
    return dict(zip(_LIMITS, (scale, offset, high, values.mean(axis=0), low, spread), strict=True))


def groups_of(points: Float[Array, "B N 3"], count: int) -> Int[Array, "B N"]:
    """Which of `count` points, chosen far apart beginning with the outermost, each point is nearest to."""
    away = jnp.sum(jnp.square(points - jnp.mean(points, axis=1, keepdims=True)), axis=-1)
    chosen = layers.farthest_point_sampling(points, count, start=jnp.argmax(away, axis=1))
    return layers.nearest_points(points, layers.gather_points(points, chosen), 1)[0][..., 0]


class PointNet(nn.Module):
    """LN(W max_n MLP(x_n)), over all points or over those of each group."""

    config: Config
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], groups: Int[Array, "B N"] | None = None) -> Float[Array, "B G D"]:
        c = self.config
        for i, width in enumerate(c.point_widths):
            x = nn.LayerNorm(epsilon=c.norm_epsilon, name=f"norm{i}")(Linear(width, name=f"layer{i}")(x))
            x = jax.nn.relu(x)
        # Nothing is below 0, which is also what a group without points has.
        x = layers.pool_points(x, groups, num_groups=1 if groups is None else c.num_groups)
        return nn.LayerNorm(epsilon=c.norm_epsilon, name="out_norm")(Linear(self.features, name="out")(x))


class CrossAttention(nn.Module):
    """ReLU(LN(W (u + softmax(q k^T / sqrt(D)) v))) of tokens u; officially without u and without the scale."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Float[Array, "B L D"], others: Float[Array, "B M D"]) -> Float[Array, "B L D"]:
        c, width = self.config, tokens.shape[-1]
        query, key, value = (
            Linear(width, name=name)(x)[:, :, None]
            for name, x in (("query", tokens), ("key", others), ("value", others))
        )
        official = c.attention == "official"
        mixed = layers.dot_product_attention(query, key, value, scale=1.0 if official else None)[:, :, 0]
        mixed = Linear(width, name="out")(mixed if official else tokens + mixed)
        return jax.nn.relu(nn.LayerNorm(epsilon=c.norm_epsilon, name="out_norm")(mixed))


class Encoder(nn.Module):
    """[environment, both objects, state] of a moment; the active object asks the passive one, features ask places."""

    config: Config

    @nn.compact
    def __call__(self, seen: Mapping[str, Array]) -> Float[Array, "M F"]:
        c, half = self.config, self.config.feature_width // 2
        grouped = (lambda x: groups_of(x, c.num_groups)) if c.attention == "tokens" else (lambda x: None)
        active, passive = seen["active"], seen["passive"]
        featured = {
            name: jnp.concatenate([seen[f"{name}_features"], seen[name]], axis=-1) for name in ("active", "passive")
        }
        environment = PointNet(c, c.feature_width, name="environment")(seen["environment"])[:, 0]
        near = grouped(passive)
        asking = PointNet(c, half, name="active")(featured["active"], grouped(active))
        marked = PointNet(c, half, name="passive")(featured["passive"], near)
        places = PointNet(c, half, name="passive_points")(passive, near)
        answering = CrossAttention(c, name="passive_attention")(marked, places)
        objects = layers.pool_points(CrossAttention(c, name="fuser")(asking, answering))[:, 0]
        hidden = jax.nn.relu(Linear(c.state_widths[0], name="state_in")(seen["state"]))
        return jnp.concatenate([environment, objects, Linear(c.state_widths[1], name="state_out")(hidden)], axis=-1)


# --- what is done -----------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """Along time, each output in the middle of `width` inputs; as a product of windows, which CPUs do faster."""

    features: int
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B _ F"]:
        start, (_, length, channels) = torch_uniform(self.width * x.shape[-1]), x.shape
        kernel = self.param("kernel", start, (self.width, channels, self.features))
        side = self.width // 2
        padded = jnp.pad(x, ((0, 0), (side, side), (0, 0)))
        taps = [padded[:, k : k + length : self.stride] for k in range(self.width)]
        y = jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, self.features)
        return y + self.param("bias", start, (self.features,))


class ResidualBlock(nn.Module):
    """W x + m(conv(s m(conv(x)) + b)), m = Mish(GN): scale s and bias b are made of the condition (FiLM, no 1 +)."""

    config: Config
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"], condition: Float[Array, "B K"]) -> Float[Array, "B L D"]:
        c, y = self.config, x
        scale, bias = jnp.split(Linear(2 * self.features, name="film")(jax.nn.mish(condition))[:, None], 2, axis=-1)
        for i in range(2):
            y = Convolution(self.features, c.kernel_size, name=f"conv{i}")(y)
            norm = nn.GroupNorm(c.norm_groups, epsilon=c.norm_epsilon, use_fast_variance=False, name=f"norm{i}")
            y = jax.nn.mish(norm(y))
            y = scale * y + bias if i == 0 else y
        return y + (x if x.shape[-1] == self.features else Linear(self.features, name="skip")(x))


class UNet(nn.Module):
    """Clean actions of noisy ones: two blocks a level, halved in time but for the last; then back with skips."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B P A"], step: Num[Array, " B"], seen: Float[Array, "B F"]
    ) -> Float[Array, "B P A"]:
        c, actions = self.config, x.shape[-1]
        code = layers.sinusoidal_encoding(step, dim=c.step_dim, interleaved=False, shift=1.0).astype(x.dtype)
        code = jax.nn.mish(Linear(4 * c.step_dim, name="step_in")(code))
        condition = jnp.concatenate([Linear(c.step_dim, name="step_out")(code), seen], axis=-1)

        def level(x, width: int, name: str):
            for i in range(2):
                x = ResidualBlock(c, width, name=f"{name}_{i}")(x, condition)
            return x

        skips = []
        for i, width in enumerate(c.widths):
            x = level(x, width, f"down_{i}")
            skips.append(x)
            if i + 1 < len(c.widths):
                x = Convolution(width, 3, stride=2, name=f"down_{i}_half")(x)
        x = level(x, c.widths[-1], "middle")
        for i, width in enumerate(c.widths[-2::-1]):
            x = level(jnp.concatenate([x, skips.pop()], axis=-1), width, f"up_{i}")
            start = torch_uniform(4 * width)
            twice = {"strides": (2,), "padding": ((2, 2),), "kernel_init": start, "bias_init": start}
            x = nn.ConvTranspose(width, (4,), **twice, name=f"up_{i}_twice")(x)
        x = Convolution(c.widths[0], c.kernel_size, name="final_conv")(x)
        x = nn.GroupNorm(c.final_norm_groups, epsilon=c.norm_epsilon, use_fast_variance=False, name="final_norm")(x)
        return Linear(actions, name="out")(jax.nn.mish(x))


class Model(nn.Module):
    """Learns to clear noise from demonstrated actions; draws actions by clearing noise in a few steps."""

    config: Config

    def setup(self):
        c = self.config
        self.encoder, self.unet = Encoder(c), UNet(c)
        self.action_limits, self.state_limits = Limits(c.action_dim), Limits(c.state_dim)
        self.environment_limits = Limits(c.environment_channels)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c = self.config
        seen, clean = self.encode(batch), self.action_limits(batch["y"])
        if train:
            keys = jax.random.split(self.make_rng("dropout"))
            step = jax.random.randint(keys[0], clean.shape[:1], 0, c.train_steps)
            guess = self.clear(clean, jax.random.normal(keys[1], clean.shape, clean.dtype), step, seen)
        else:
            guess = self.draw(seen, jnp.broadcast_to(start_noise(c), clean.shape).astype(clean.dtype))
        return {"guess": guess, "clean": clean, "actions": self.action_limits(guess, inverse=True)}

    def encode(self, batch: Batch) -> Float[Array, "B F"]:
        """The moments seen, one after the other."""
        c = self.config
        seen = {name: a[:, : c.num_observations].reshape(-1, *a.shape[2:]) for name, a in batch.items() if name != "y"}
        environment = self.environment_limits(seen["environment"])
        seen["environment"] = environment if c.use_color else environment[..., :3]
        seen["state"] = self.state_limits(seen["state"])
        return self.encoder(seen).reshape(len(batch["state"]), -1)

    def clear(
        self, clean: Float[Array, "B P A"], noise: Float[Array, "B P A"], step: Int[Array, " B"], seen: Array
    ) -> Float[Array, "B P A"]:
        """What the network makes of clean actions with noise of a step's strength."""
        return self.unet(layers.add_noise(clean, noise, schedule(self.config)[step]), step, seen)

    def draw(self, seen: Float[Array, "B F"], noise: Float[Array, "B P A"]) -> Float[Array, "B P A"]:
        """DDIM from noise to actions, each between -1 and 1."""
        c = self.config
        if self.is_initializing():
            return self.unet(noise, jnp.zeros(len(noise)), seen)
        unet, weights = self.unet.unbind()
        steps = layers.diffusion_timesteps(c.train_steps, c.inference_steps)
        levels = schedule(c)
        later = steps - c.train_steps // c.inference_steps
        later = jnp.where(later >= 0, levels[jnp.maximum(later, 0)], 1.0)

        def one(x, row):
            step, level, next_level = row
            output = unet.apply(weights, x, jnp.full(len(x), step), seen)
            direction = "raw" if c.sampler == "pinned" else "consistent"
            x = layers.ddim_step(x, output, level, next_level, prediction="sample", clip=c.clip, direction=direction)
            return x, None

        return jax.lax.scan(one, noise, (steps, levels[steps], later))[0]

    def policy(self, batch: Batch) -> Float[Array, "B p A"]:
        """The actions to carry out now; `y` is not read."""
        c = self.config
        noise = jnp.broadcast_to(start_noise(c), (len(batch["state"]), c.horizon, c.action_dim))
        actions = self.action_limits(self.draw(self.encode(batch), noise), inverse=True)
        return actions[:, c.num_observations - 1 :][:, : c.num_actions]


def schedule(config: Config) -> Float[Array, " T"]:
    return layers.diffusion_schedule(config.train_steps, kind="squaredcos")


def start_noise(config: Config) -> Float[Array, "P A"]:
    return jax.random.normal(jax.random.key(0), (config.horizon, config.action_dim))


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of normalised actions."""
    return jnp.mean(jnp.square((outputs["guess"] - outputs["clean"]).astype(jnp.float32))), {}


def constants(config: Config, data: Any) -> dict[str, Any]:
    """The limits of the training part."""
    batch = jax.device_get(data.train.batch(np.arange(len(data.train))))
    named = {"action_limits": batch["y"], "state_limits": batch["state"], "environment_limits": batch["environment"]}
    return {
        name: limits(np.asarray(a, np.float64).reshape(-1, a.shape[-1]), config.smallest_range)
        for name, a in named.items()
    }


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    c = config
    return manipulation.example(
        horizon=c.horizon,
        moments=c.num_observations,
        points=c.num_points,
        channels=c.environment_channels,
        features=(c.active_features, c.passive_features),
        state=c.state_dim,
        action=c.action_dim,
        batch_size=batch_size,
        key=key,
    )


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "horizon": "horizon",
    "n_action_steps": "num_actions",
    "n_obs_steps": "num_observations",
    "num_inference_steps": "inference_steps",
    "num_train_timesteps": "train_steps",
    "diffusion_step_embed_dim": "step_dim",
    "kernel_size": "kernel_size",
    "n_groups": "norm_groups",
    "use_pc_color": "use_color",
    "down_dims": "widths",
    "encoder_output_dim": "feature_width",
    "pn_widths": "point_widths",
    "state_mlp_size": "state_widths",
}
# Official name of an observation, and what of its shape is ours.
_SEEN = {
    "environment_point_cloud": ("environment", ("num_points", "environment_channels")),
    "active_object_point_cloud": ("active", ("num_points", None)),
    "passive_object_point_cloud": ("passive", ("num_points", None)),
    "active_object_point_feature": ("active_features", ("num_points", "active_features")),
    "passive_object_point_feature": ("passive_features", ("num_points", "passive_features")),
    "agent_pos": ("state", ("state_dim",)),
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {own: hparams[theirs] for theirs, own in _HPARAMS.items() if theirs in hparams}
    ours |= {name: tuple(value) for name, value in ours.items() if isinstance(value, list)}
    if hparams.get("condition_type", "film") != "film":
        raise ValueError(f"heterogenmanip conditions by film, not by {hparams['condition_type']}")
    shapes = hparams["shape_meta"]["obs"]
    for name, (_, fields) in _SEEN.items():
        ours |= {field: size for field, size in zip(fields, shapes[name]["shape"], strict=True) if field}
    return Config(
        **ours, action_dim=hparams["shape_meta"]["action"]["shape"][0], attention="official", sampler="pinned"
    )


def config_to_official(config: Config) -> dict[str, Any]:
    kinds = {name: "low_dim" if name == "agent_pos" else "point_cloud" for name in _SEEN}
    shapes = {n: [getattr(config, field) if field else 3 for field in fields] for n, (_, fields) in _SEEN.items()}
    named = {theirs: getattr(config, own) for theirs, own in _HPARAMS.items()}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in named.items()},
        "condition_type": "film",
        "shape_meta": {
            "obs": {name: {"shape": shapes[name], "type": kind} for name, kind in kinds.items()},
            "action": {"shape": [config.action_dim]},
        },
    }


def _block_table(theirs: str, ours: str, *, skip: bool) -> Table:
    for i in range(2):
        yield from conv(f"{theirs}.blocks.{i}.block.0", f"{ours}/conv{i}", axes=1)
        yield from layer_norm(f"{theirs}.blocks.{i}.block.1", f"{ours}/norm{i}")
    yield from linear(f"{theirs}.cond_encoder.1", f"{ours}/film")
    if skip:
        yield from conv1x1(f"{theirs}.residual_conv", f"{ours}/skip")


def official_table(config: Config) -> Table:
    c = config
    for name in ("_dummy_variable", "mask_generator._dummy_variable"):
        yield from constant(name, np.zeros(0, np.float32))
    nets = {
        "extractor_env": "environment",
        "extractor_active_object_feature_reducer": "active",
        "extractor_passive_object_feature_reducer": "passive",
        "extractor_passive_object_points_reducer": "passive_points",
    }
    for theirs, ours in nets.items():
        theirs, ours = f"obs_encoder.{theirs}", f"encoder/{ours}"
        for i in range(len(c.point_widths)):
            yield from linear(f"{theirs}.mlp.{3 * i}", f"{ours}/layer{i}")
            yield from layer_norm(f"{theirs}.mlp.{3 * i + 1}", f"{ours}/norm{i}")
        yield from linear(f"{theirs}.final_projection.0", f"{ours}/out")
        yield from layer_norm(f"{theirs}.final_projection.1", f"{ours}/out_norm")
    for theirs, ours in (("passive_object_cross_attention", "passive_attention"), ("fuser", "fuser")):
        theirs, ours = f"obs_encoder.{theirs}", f"encoder/{ours}"
        for name in ("query", "key", "value"):
            yield from linear(f"{theirs}.cross_attention.{name}_proj", f"{ours}/{name}")
        yield from linear(f"{theirs}.output_proj.0", f"{ours}/out")
        yield from layer_norm(f"{theirs}.output_proj.1", f"{ours}/out_norm")
    yield from linear("obs_encoder.state_mlp.0", "encoder/state_in")
    yield from linear("obs_encoder.state_mlp.2", "encoder/state_out")

    yield from linear("model.diffusion_step_encoder.1", "unet/step_in")
    yield from linear("model.diffusion_step_encoder.3", "unet/step_out")
    widths = (c.action_dim, *c.widths)
    for i in range(len(c.widths)):
        for j in range(2):
            skip = j == 0 and widths[i] != widths[i + 1]
            yield from _block_table(f"model.down_modules.{i}.{j}", f"unet/down_{i}_{j}", skip=skip)
        if i + 1 < len(c.widths):
            yield from conv(f"model.down_modules.{i}.2.conv", f"unet/down_{i}_half", axes=1)
    for j in range(2):
        yield from _block_table(f"model.mid_modules.{j}", f"unet/middle_{j}", skip=False)
    for i, width in enumerate(c.widths[-2::-1]):
        for j in range(2):
            skip = j == 0 and 2 * c.widths[len(c.widths) - 1 - i] != width
            yield from _block_table(f"model.up_modules.{i}.{j}", f"unet/up_{i}_{j}", skip=skip)
        yield from conv_transpose(f"model.up_modules.{i}.2.conv", f"unet/up_{i}_twice", axes=1)
    yield from conv("model.final_conv.0.block.0", "unet/final_conv", axes=1)
    yield from layer_norm("model.final_conv.0.block.1", "unet/final_norm")
    yield from conv1x1("model.final_conv.1", "unet/out")

    fields = {"action": "action", "agent_pos": "state", "environment_point_cloud": "environment"}
    for theirs, ours in fields.items():
        for name in _LIMITS:
            at = name if name in ("scale", "offset") else f"input_stats.{name}"
            place = f"{ours}_limits/{name}"
            yield from parameter(f"normalizer.params_dict.{theirs}.{at}", place, collection="constants")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c = model.config
    batch = {ours: inputs[theirs] for theirs, (ours, _) in _SEEN.items()} | {"y": inputs["action"]}

    def run(model: Model):
        seen, clean = model.encode(batch), model.action_limits(batch["y"])
        guess = model.clear(clean, inputs["noise"], inputs["timesteps"], seen)
        return seen, clean, guess, model.action_limits(model.draw(seen, inputs["init_noise"]), inverse=True)

    seen, clean, guess, drawn = model.apply(variables, method=run)
    other = Model(Config(**vars(c) | {"sampler": "consistent"}))
    consistent = other.apply(variables, method=run)[3]
    first = c.num_observations - 1
    return {
        "obs_features": seen.reshape(len(seen) * c.num_observations, -1),
        "pred": guess,
        "loss": loss({"guess": guess, "clean": clean}, batch)[0],
        "action_pred": drawn,
        "action": drawn[:, first : first + c.num_actions],
        "action_pred_consistent": consistent,
        "alphas_cumprod": schedule(c),
        "inference_timesteps": layers.diffusion_timesteps(c.train_steps, c.inference_steps),
        "similarity": similarity(inputs["demo_feats"], inputs["input_feats"], epsilon=c.similarity_epsilon),
    }


# One moment: from several, the way could be read off the motion, and nobody would look at the scene.
_TINY = {
    "num_observations": 1, "num_points": 32, "state_dim": 3, "action_dim": 3, "environment_channels": 3,
    "passive_features": 2, "point_widths": (32, 64), "feature_width": 64, "state_widths": (64, 32), "num_groups": 6,
    "widths": (32, 64), "step_dim": 16, "train_steps": 20, "inference_steps": 5,
}  # fmt: skip

PAPER = Paper(
    slug="heterogenmanip",
    task=manipulation.TASK,
    model=Model,
    example=example,
    loss=loss,
    constants=constants,
    configs={
        "tiny": Config(**_TINY),
        "tiny_official": Config(**_TINY, attention="official"),
        "garment": Config(),  # Hang_Coat, Hang_Tops, Store_Tops, Wear_Bowlhat: two arms with hands
        "stack_tops": Config(passive_features=4),
        "store_mug": Config(state_dim=9, action_dim=9),
    },
    officials=(
        Official(
            module="MFMDP/multi_foundation_model_diffusion_policy/policy/mfmdp.py:MFMDP",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    quirks=(
        "attention over a single key: the active object and all foundation features have no effect ('official')",
        "the sampler of the pinned library takes clean actions for noise ('pinned')",
        "colours are normalised and then left out (kept)",
    ),
)
