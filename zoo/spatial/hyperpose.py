"""HYPERPOSE: hyperbolic kinematic phase-space attention for 3D human pose estimation (arXiv:2605.10100).

Official code: meural-operator/hpe@22dfe9e (no licence; version 2, of the published logs, is its first commit 15148a7).
Fidelity: exact.
New: joints of a frame attend to each other by closeness on the Lorentz hyperboloid, where trees embed with little
distortion, by the likeness of their velocities, and by hops of the skeleton; frames of a joint attend within windows
that grow from block to block; two of the losses compare geodesic distances, over time and along bones.
Differs: `version` "v3", the repository's latest, is the default and "v2" the paper's; mirroring, under which every loss
is the same, and occlusion are done in the model while it trains; the fourth log-variance, which nothing reads, lies in
the collection `unused`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks import ActivationDropout, Dropout, Linear
from zoo.blocks.basic import torch_uniform
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import pose_lifting
from zoo.tasks.pose_lifting import PARENTS
from zoo.tasks.task import Batch
from zoo.weights.table import Row, Table, fused_linear, layer_norm, linear, parameter, split_columns


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in frames."""

    frames: int = 243  # T, of a clip
    d_model: int = 512  # d, width of a joint in a frame
    num_heads: int = 8  # H; v2 has one
    windows: tuple[int, ...] = (3, 9, 27)  # W of each pair of blocks: how far a frame sees to either side
    mlp_ratio: int = 4  # hidden width of feed-forward layers / d
    dropout_rate: float = 0.1  # of attention outputs and feed-forward layers
    version: Literal["v3", "v2"] = "v3"  # v2: that of the paper and of the published logs
    use_tree: bool = True  # False: attention knows nothing of the skeleton
    velocity_weight: float = 1.0  # lambda; 0: nor of velocities
    tree_hops: int = 3  # K, of v3
    head_norm: float = 3.0  # v3: longer queries and keys are shortened to this before they go to the hyperboloid
    max_norm: float = 15.0  # of any tangent vector that goes there or comes from there
    norm_epsilon: float = 1e-7  # added to a squared norm under the root, and to that where it divides
    min_temperature: float = 1e-3  # lower ones are taken for it
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    geometry_weight: float = 1.0  # c, of both geodesic losses
    curriculum: tuple[int, int] | None = None  # training passes between which c grows from 0; None: none
    mirror_rate: float = 0.5  # share of clips seen in a mirror while training
    occlusion_rate: float = 0.2  # share of clips in which one or two joints lose their confidence, likewise

    def __post_init__(self):
        if self.version not in ("v3", "v2"):
            raise ValueError(f"version {self.version!r} is not v3 or v2")
        if self.version == "v2" and self.num_heads != 1:
            raise ValueError(f"v2 has one head, not num_heads {self.num_heads}")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide d_model {self.d_model}")


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """In float32 at least, as everything on the hyperboloid."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def bounded(v: Float[Array, "*B d"], longest: float) -> Float[Array, "*B d"]:
    """v, shortened to norm `longest` where it is longer: log_0(exp_0(v)) of the official, clipped maps."""
    squared = jnp.sum(jnp.square(wide(v)), axis=-1, keepdims=True)
    return (v * jnp.minimum(longest * jax.lax.rsqrt(jnp.maximum(squared, 1e-12)), 1.0)).astype(v.dtype)


def lifted(u: Float[Array, "*B d"]) -> Float[Array, "*B D"]:
    """u as the space part of a vector whose time is 0."""
    return jnp.pad(wide(u), [(0, 0)] * (u.ndim - 1) + [(1, 0)])


def on_hyperboloid(v: Float[Array, "*B d"], longest: float, epsilon: float) -> Float[Array, "*B D"]:
    """exp_0(v) = (cosh n, sinh n / n v), v shortened to `longest` before; with the official epsilons."""
    v = wide(v)
    squared = jnp.sum(jnp.square(v), axis=-1, keepdims=True)
    norm = jnp.sqrt(squared + epsilon)
    short = jnp.minimum(norm, longest)
    return jnp.concatenate([jnp.cosh(short), jnp.sinh(short) / (norm + epsilon) * v], axis=-1)


def _squared(x: Float[Array, "N I H d"], y: Float[Array, "N J H d"]) -> Float[Array, "N H I J"]:
    """|x_i - y_j|^2; what all have in common cancels, and is taken out first to save digits."""
    common = jnp.mean(x, axis=1, keepdims=True) / 2 + jnp.mean(y, axis=1, keepdims=True) / 2
    x, y = x - common, y - common
    squares = [jnp.sum(jnp.square(v), axis=-1).swapaxes(1, 2) for v in (x, y)]
    products = jnp.einsum("nihd,njhd->nhij", x, y, precision="highest")
    return jnp.maximum(squares[0][..., None] + squares[1][:, :, None] - 2 * products, 0.0)


def origin_like(points: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return jnp.zeros_like(points).at[..., 0].set(1.0)


def velocities(x: Float[Array, "B T J C"], version: str = "v3") -> Float[Array, "B T J C"]:
    """v3: central differences, one-sided at the ends; v2: backward ones, the first frame has the second's."""
    if x.shape[1] < 2:
        return jnp.zeros_like(x)
    steps = jnp.diff(x, axis=1)
    before, after = jnp.concatenate([steps[:, :1], steps], 1), jnp.concatenate([steps, steps[:, -1:]], 1)
    return before if version == "v2" else (before + after) / 2


def tree_powers(adjacency: Float[Array, "J J"], hops: int) -> Float[Array, "K J J"]:
    """A_k = 1 where a walk of k steps leads from i to j != i, for k = 1 .. K. Source: card hyperpose, Mechanism 4."""
    walks, powers = adjacency, []
    for _ in range(hops):
        powers.append((walks > 0) & ~jnp.eye(len(adjacency), dtype=bool))
        walks = jnp.minimum(walks @ adjacency, 1.0)
    return jnp.stack(powers).astype(adjacency.dtype)


def _heads(x: Float[Array, "*B L D"], heads: int) -> Float[Array, "*B L H d"]:
    return x.reshape(*x.shape[:-1], heads, -1)


class Temperature(nn.Module):
    """One of each head, not below the smallest."""

    config: Config

    @nn.compact
    def __call__(self) -> Float[Array, " H"]:
        return jnp.maximum(
            self.param("value", nn.initializers.ones, (self.config.num_heads,)), self.config.min_temperature
        )


class TreeBias(nn.Module):
    """sum_k gamma_hk A_k for each head; only the neighbours' at first. The weights are there without a tree too."""

    config: Config

    @nn.compact
    def __call__(self, adjacency: Float[Array, "J J"] | None) -> Float[Array, "H J J"] | None:
        c = self.config
        gamma = self.param("scale", lambda _, shape: jnp.zeros(shape).at[:, 0].set(1.0), (c.num_heads, c.tree_hops))
        return None if adjacency is None else jnp.einsum("hk,kij->hij", gamma, tree_powers(adjacency, c.tree_hops))


class KinematicAttention(nn.Module):
    """softmax(s_geo + s_kin + s_topo) v among the joints of a frame, no output projection.

    v3: s_geo = (1 + <q, k>_L) / tau, s_topo = sum_k gamma_k A_k; v2: s_geo = -d_L(q, k)^2 / tau, s_topo = A; in both
    s_kin = -lambda |W_q v_i - W_k v_j|^2 of the velocities v. Those of v2 (V = D + 1) lie where the embedding put a
    joint and are carried to the origin from where it is now.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "N J D"], velocity: Float[Array, "N J V"], adjacency: Float[Array, "J J"] | None
    ) -> Float[Array, "N J D"]:
        c, newest = self.config, self.config.version == "v3"
        if not newest:
            here = layers.lorentz_exp_origin(wide(x), max_norm=c.max_norm)
            velocity = layers.lorentz_transport(here, origin_like(here), velocity)[..., 1:]
        project = {name: Linear(c.d_model, name=name) for name in ("query", "key", "value")}
        query, key, value = (_heads(layer(x), c.num_heads) for layer in project.values())
        longest = c.head_norm if newest else c.max_norm
        query, key = (on_hyperboloid(v, longest, c.norm_epsilon) for v in (query, key))
        bias = jnp.zeros((1, 1, 1, 1))
        if c.velocity_weight:
            start, end = (wide(_heads(project[n](velocity), c.num_heads)) for n in ("query", "key"))
            apart = _squared(start, end)
            bias = bias - c.velocity_weight * apart
        tree = None if adjacency is None else adjacency[None]
        if newest:
            tree = TreeBias(c, name="tree")(adjacency)
        if tree is not None:
            bias = bias + wide(tree)
        tau = wide(Temperature(c, name="temperature")()[:, None, None])
        kind = "inner" if newest else "squared_distance"
        scores = layers.lorentz_scores(query, key, kind=kind, temperature=tau)
        scores = scores + bias
        # The softmax is the same, and the digits go where it looks.
        mixed = layers.attend(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), value)
        return mixed.reshape(x.shape).astype(x.dtype)


class TemporalAttention(nn.Module):
    """softmax over the frames within `window` of (q.k / (sqrt(d_h) tau)) v, for each joint, no output projection."""

    config: Config
    window: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T J D"]) -> Float[Array, "B T J D"]:
        c, (batch, frames, joints, _) = self.config, x.shape
        tracks = jnp.swapaxes(x, 1, 2).reshape(batch * joints, frames, -1)
        query, key, value = (_heads(Linear(c.d_model, name=n)(tracks), c.num_heads) for n in ("query", "key", "value"))
        query = query / Temperature(c, name="temperature")()[:, None].astype(query.dtype)
        window = layers.WindowMask(left=self.window, right=self.window)
        mixed = layers.dot_product_attention(query, key, value, mask=window)
        return jnp.swapaxes(mixed.reshape(batch, joints, frames, -1), 1, 2)


class Block(nn.Module):
    """v3: h = x + drop(mix(LN x)), h + FFN(LN h); v2: h = LN(x + mix(x)), then LN(h + FFN h), norms cut to 15.

    `mix` is attention among the joints of a frame or, given a window, among the frames of a joint.
    """

    config: Config
    window: int | None = None

    def mix(
        self, x: Float[Array, "B T J D"], velocity: Float[Array, "B T J V"], adjacency: Float[Array, "J J"] | None
    ) -> Float[Array, "B T J D"]:
        c = self.config
        if self.window is not None:
            return TemporalAttention(c, self.window, name="attention")(x)
        if c.version == "v3":
            velocity = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="velocity_norm")(velocity)
        single = [a.reshape(-1, *a.shape[2:]) for a in (x, velocity)]
        return KinematicAttention(c, name="attention")(*single, adjacency).reshape(x.shape)

    def ffn(self, x: Float[Array, "B T J D"], *, train: bool) -> Float[Array, "B T J D"]:
        c = self.config
        hidden = Linear(c.mlp_ratio * c.d_model, name="ffn_in")(x)
        hidden = ActivationDropout("gelu", c.dropout_rate)(hidden, train=train)
        return Dropout(c.dropout_rate)(Linear(c.d_model, name="ffn_out")(hidden), train=train)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T J D"],
        velocity: Float[Array, "B T J V"],
        adjacency: Float[Array, "J J"] | None,
        *,
        train: bool,
    ) -> Float[Array, "B T J D"]:
        c = self.config
        norm1, norm2 = (nn.LayerNorm(epsilon=c.layer_norm_epsilon, name=name) for name in ("norm1", "norm2"))
        drop = partial(Dropout(c.dropout_rate), train=train)
        if c.version == "v3":
            x = x + drop(self.mix(norm1(x), velocity, adjacency))
            return x + self.ffn(norm2(x), train=train)
        x = norm1(x + drop(bounded(self.mix(x, velocity, adjacency), c.max_norm)))
        return bounded(norm2(x + self.ffn(x, train=train)), c.max_norm)


class JointLinear(nn.Module):
    """x W_j + b_j with weights of every joint's own."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T J D"]) -> Float[Array, "B T J F"]:
        shape = (x.shape[2], x.shape[3], self.features)
        # torch takes all but the first axis for a convolution's inputs: a far smaller start than a layer's.
        kernel = self.param("kernel", torch_uniform(shape[1] * shape[2]), shape)
        return jnp.einsum("btjd,jdf->btjf", x, kernel) + self.param(
            "bias", nn.initializers.zeros, (shape[0], self.features)
        )


class JointHead(nn.Module):
    """W_2 GELU(W_1 LN h), with weights of each joint's own (v3) or the same for all (v2)."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T J D"]) -> Float[Array, "B T J 3"]:
        c = self.config
        x = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)
        if c.version == "v2":
            return Linear(3, name="out")(layers.gelu(Linear(c.d_model, name="hidden")(x)))

        return JointLinear(3, name="out")(layers.gelu(JointLinear(c.d_model, name="hidden")(x)))


class LossWeights(nn.Module):
    """Log-variances of the three losses and the weight c of the geodesic ones, repeated for every example."""

    config: Config

    @nn.compact
    def __call__(self, batch_size: int, *, train: bool) -> dict[str, Array]:
        c = self.config
        learned = self.param("log_variances", nn.initializers.zeros, (3,))
        self.variable("unused", "drift_log_variance", jnp.zeros, (1,))
        weight = jnp.asarray(c.geometry_weight, jnp.float32)
        if c.curriculum is not None:
            passes = self.variable("progress", "passes", jnp.zeros, (), jnp.int32)
            if train:
                start, full = c.curriculum
                weight = weight * jnp.clip((passes.value - start) / max(full - start, 1), 0.0, 1.0)
                if not self.is_initializing() and self.is_mutable_collection("progress"):
                    passes.value += 1
        return {
            "log_variances": jnp.broadcast_to(learned, (batch_size, 3)),
            "geometry_weight": jnp.broadcast_to(weight, (batch_size,)),
        }


class Model(nn.Module):
    """Embed keypoints and their velocities in the tangent space at the origin; joints, frames, joints, ...; decode."""

    config: Config

    def setup(self):
        self.loss_weights = LossWeights(self.config)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c, x = self.config, batch["x"]
        adjacency = jnp.asarray(layers.tree_adjacency(PARENTS), x.dtype) if c.use_tree else None
        turned = None
        if train and c.occlusion_rate:
            x = x.at[..., 2].multiply(1 - self._occluded(x.shape).astype(x.dtype)[:, None])
        if train and c.mirror_rate:
            turned = jax.random.bernoulli(self.make_rng("dropout"), c.mirror_rate, (len(x), 1, 1, 1))
            x = jnp.where(turned, pose_lifting.mirror(x), x)
        pose, _ = self.lift(x, velocities(x, c.version), adjacency, train=train)
        if turned is not None:
            pose = jnp.where(turned, pose_lifting.mirror(pose), pose)
        return {"pose": pose, **self.loss_weights(len(pose), train=train)}

    def _occluded(self, shape: tuple[int, ...]) -> Bool[Array, "B J"]:
        """One or two joints of a share of the clips."""
        keys = jax.random.split(self.make_rng("dropout"), 3)
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(keys[0], (shape[0], shape[2]))))
        count = jax.random.randint(keys[1], (shape[0], 1), 1, 3)
        return (rank < count) & jax.random.bernoulli(keys[2], self.config.occlusion_rate, (shape[0], 1))

    @nn.compact
    def lift(
        self,
        x: Float[Array, "B T J 3"],
        velocity: Float[Array, "B T J 3"],
        adjacency: Float[Array, "J J"] | None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T J 3"], Float[Array, "B T J D"]]:
        """(pose, last state) of keypoints, their velocities and the skeleton's tree."""
        c, newest = self.config, self.config.version == "v3"
        if newest:
            gain = self.param("confidence_gain", nn.initializers.ones, ())
            offset = self.param("confidence_bias", nn.initializers.zeros, ())
            h = Linear(c.d_model, name="position_embedding")(x[..., :2]) * (1 + jnp.tanh(gain * x[..., 2:] + offset))
            v = Linear(c.d_model, name="velocity_embedding")(velocity[..., :2])
            joints = self.param("joint_table", nn.initializers.truncated_normal(0.02), (x.shape[2], c.d_model))
            # arcsinh(|h|) h / |h|: the tangent vector that leads to the hyperboloid's point above h.
            h = layers.lorentz_log_origin(lifted(h), max_norm=c.max_norm).astype(x.dtype) + joints
        else:
            embed = Linear(c.d_model, name="embedding")
            places, moves = (lifted(embed(a)) for a in (x, velocity))
            h = layers.lorentz_log_origin(places, max_norm=c.max_norm).astype(x.dtype)
            places = layers.lorentz_project(places)
            v = layers.lorentz_transport(origin_like(places), places, moves)

        for i, window in enumerate(c.windows):
            h = Block(c, name=f"joint_block_{i}")(h, v, adjacency, train=train)
            h = Block(c, window, name=f"frame_block_{i}")(h, v, adjacency, train=train)
        return JointHead(c, name="head")(h), h


_NEAREST = math.acosh(1 + 1e-7)  # the official distance of a point from itself


def geodesic_losses(pose: Float[Array, "B T J 3"], truth: Float[Array, "B T J 3"]) -> tuple[Array, Array]:
    """mean |d_L of neighbours found - d_L of neighbours true|: neighbours in time, and along bones, on H^3.

    Source: card hyperpose, Training.
    """
    points = [layers.lorentz_project(lifted(p)) for p in (pose, truth)]

    def apart(a, b):
        return jnp.maximum(layers.lorentz_distance(a, b), _NEAREST)

    steps = [apart(p[:, :-1], p[:, 1:]) for p in points]
    child, parent = np.arange(1, len(PARENTS)), np.array(PARENTS[1:])
    bones = [apart(p[:, :, parent], p[:, :, child]) for p in points]
    return tuple(jnp.mean(jnp.abs(found - true)) for found, true in (steps, bones))


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """sum_i (exp(-s_i) L_i + s_i) / 2 of MPJPE and, times c, the two geodesic losses, with s learned."""
    place, _ = pose_lifting.loss(outputs, batch)
    velocity, bone = geodesic_losses(outputs["pose"], batch["y"])
    weight = jnp.mean(outputs["geometry_weight"])
    s = jnp.mean(outputs["log_variances"].astype(jnp.float32), axis=0)
    total = jnp.sum(jnp.exp(-s) * jnp.stack([place, weight * velocity, weight * bone]) + s) / 2
    return total, {"mpjpe": place, "velocity_loss": velocity, "bone_loss": bone}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return pose_lifting.example(frames=config.frames, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    if hparams.get("num_joints", len(PARENTS)) != len(PARENTS):
        raise UserError(f"hyperpose knows the {len(PARENTS)} joints of Human3.6M, not {hparams['num_joints']}")
    blocks, version = hparams["num_temporal"], hparams.get("version", "v3")
    window = hparams.get("temporal_windows") or hparams.get("temporal_window", 3)
    if hparams["num_spatial"] != blocks:
        raise UserError(
            f"hyperpose has as many blocks of frames as of joints, not {blocks} and {hparams['num_spatial']}"
        )
    return Config(
        d_model=hparams["embed_dim"],
        num_heads=hparams.get("num_heads", 8) if version == "v3" else 1,
        windows=tuple(window) if isinstance(window, list | tuple) else (window,) * blocks,
        mlp_ratio=hparams["mlp_ratio"],
        dropout_rate=hparams["dropout"],
        version=version,
        use_tree=hparams.get("use_topo", True),
        geometry_weight=hparams.get("curriculum_weight", 1.0),
    )


def config_to_official(config: Config) -> dict[str, Any]:
    c, blocks = config, len(config.windows)
    own = {"num_joints": len(PARENTS), "num_heads": c.num_heads, "temporal_windows": list(c.windows)}
    return {
        "version": c.version,
        "in_features": 3,
        "dropout": c.dropout_rate,
        "embed_dim": c.d_model,
        "num_spatial": blocks,
        "num_temporal": blocks,
        "mlp_ratio": c.mlp_ratio,
        "use_topo": c.use_tree,
        "curriculum_weight": c.geometry_weight,
        **(own if c.version == "v3" else {"temporal_window": c.windows[0]}),
    }


def official_table(config: Config) -> Table:
    c, newest = config, config.version == "v3"
    if newest:
        yield from parameter("model.joint_embed", "joint_table")
        for theirs, ours in (("gain", "gain"), ("bias", "bias")):
            yield from parameter(f"model.embed.conf_{theirs}", f"confidence_{ours}")
        yield from linear("model.embed.embed_pos", "position_embedding")
        yield from linear("model.embed.embed_vel", "velocity_embedding")
    else:
        yield from linear("model.embed.fc", "embedding")
    for i in range(len(c.windows)):
        for theirs, ours in (("spatial", "joint"), ("temporal", "frame")):
            block, attention = f"model.{theirs}_blocks.{i}", f"{ours}_block_{i}/attention"
            yield from parameter(f"{block}.attn.tau", f"{attention}/temperature/value")
            if newest:
                parts = tuple(f"{attention}/{name}" for name in ("query", "key", "value"))
                yield from fused_linear(f"{block}.attn.qkv_proj", parts, c.d_model)
            else:
                for name in ("query", "key", "value"):
                    yield from linear(f"{block}.attn.{name[0]}_proj", f"{attention}/{name}")
            yield from layer_norm(f"{block}.norm1", f"{ours}_block_{i}/norm1")
            yield from layer_norm(f"{block}.norm2", f"{ours}_block_{i}/norm2")
            yield from linear(f"{block}.ffn.fc1", f"{ours}_block_{i}/ffn_in")
            yield from linear(f"{block}.ffn.fc2", f"{ours}_block_{i}/ffn_out")
        if newest:
            yield from layer_norm(f"model.spatial_blocks.{i}.norm_v", f"joint_block_{i}/velocity_norm")
            yield from parameter(f"model.spatial_blocks.{i}.attn.topo_gamma", f"joint_block_{i}/attention/tree/scale")
    if newest:
        yield from layer_norm("model.head.norm", "head/norm")
        for theirs, ours in (("fc1", "hidden"), ("fc2", "out")):
            yield from parameter(f"model.head.{theirs}_w", f"head/{ours}/kernel")
            yield from parameter(f"model.head.{theirs}_b", f"head/{ours}/bias")
    else:
        yield from layer_norm("model.head.0", "head/norm")
        yield from linear("model.head.1", "head/hidden")
        yield from linear("model.head.3", "head/out")
    ours = ("params/loss_weights/log_variances", "unused/loss_weights/drift_log_variance")
    yield Row(("loss_weighter.log_vars",), ours, split_columns(3, 1))


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c = model.config
    adjacency = inputs["topo_bias"] if c.use_tree else None
    pose, state = model.apply(variables, inputs["x"], inputs["x_vel"], adjacency, method="lift")
    weights = model.apply(variables, len(pose), train=False, method=lambda m, *a, **k: m.loss_weights(*a, **k))
    total, parts = loss({"pose": pose, **weights}, {"y": inputs["y"]})
    found = {"pred": pose, "loss": total, **{f"loss_{n}": parts[k] for n, k in _LOSSES.items()}}
    if c.version == "v2":
        return found | {"log_h": state}
    return found | {"h_manifold": on_hyperboloid(state, 5.0, c.norm_epsilon)}


_LOSSES = {"mpjpe": "mpjpe", "vel": "velocity_loss", "bone": "bone_loss"}
_MODULE = (
    'hyperbolic/model/network.py:HyperbolicHPE ({}) as "model." plus {}UncertaintyWeightedLoss(4) as "loss_weighter."'
)
_TINY = {"frames": 27, "d_model": 32, "num_heads": 4, "windows": (3,), "mlp_ratio": 2, "dropout_rate": 0.0}
_V2 = {"version": "v2", "num_heads": 1}

PAPER = Paper(
    slug="hyperpose",
    task=pose_lifting.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(**_TINY),
        "tiny_v2": Config(**_TINY | _V2),
        # Some 17,700 clips in batches of 8: the curriculum's epochs 10 and 20.
        "h36m": Config(curriculum=(22_180, 44_360)),
        "h36m_v2": Config(**_V2, windows=(3, 3, 3), occlusion_rate=0.0),
    },
    officials=tuple(
        Official(
            module=_MODULE.format(version, file),
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
            float64=True,
        )
        for version, file in (("v3", "hyperbolic/loss/hyperbolic_loss.py:"), ("v2", ""))
    ),
    reported={"h36m": {"mpjpe": 47.42}},  # the repository's log of v2, in thousandths of half the picture's width
    quirks=(
        "velocity scores are neither scaled nor bounded, and rule the softmax of a fresh model (kept)",
        "v2 carries velocities to a joint's first place and back from its present one, where they do not lie (kept)",
        "evaluation calls thousandths of half the picture's width millimetres",
        "a fourth log-variance, of the drift off the hyperboloid, is held and adds nothing (kept, unused)",
    ),
)
