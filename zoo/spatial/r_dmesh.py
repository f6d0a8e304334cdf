"""R-DMesh: video-guided 3D animation via rectified dynamic mesh flow (Tencent Hunyuan, arXiv:2605.13838).

Official code: Tencent-Hunyuan/R-DMesh@b07eb6f (no licence). Fidelity: exact.
New: a moving mesh is a shape, a jump from its pose to that of the video's first frame, and a motion from there; the
three share the attention weights of the shape alone ("Triflow"), and jump and motion become latents of a few sampled
vertices. A rectified flow draws these latents, given the shape's and a video's features.
Differs: padding is not attended (`padding="attended"`: it is). While training, tokens and latents are drawn as in the
official code; evaluation keeps the sampled vertices and the latents' means. The flow learns with warped times and is
integrated by plain ones: here the network is told the time it was taught (`official_time`: it is not). Autoencoder and
flow may learn in one run, the latter from latents that it does not change (`stage`); the latents' mean and deviation
are running ones. Features of the video (Wan2.2) are given.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.backbones.adaptive import modulated
from zoo.blocks import Linear, stack
from zoo.blocks.basic import torch_uniform
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import mesh_animation
from zoo.tasks.mesh_animation import distance, mean_over_vertices
from zoo.tasks.task import Batch
from zoo.weights.table import Table, constant, layer_norm, linear, stacked

STREAMS = ("shape", "jump", "motion")


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the defaults are the authors', with the flow of 289 million parameters."""

    stage: Literal["autoencoder", "flow", "both"] = "both"  # autoencoder: there is no flow; flow: only that learns
    frames: int = 64  # T, of the video, without the mesh as given
    num_vertices: int = 4096  # N, places for vertices
    num_edges: int = 15_360  # places for pairs of joined vertices
    d_model: int = 256  # D, width of a stream
    encoder_layers: int = 8  # in which tokens read all vertices, with one head
    decoder_layers: int = 8  # in which tokens read one another
    num_heads: int = 8  # of the decoder's attention
    head_dim: int = 64  # width of one of them
    latent_dim: int = 64  # of a token's shape, and of its motion
    jump_latent_dim: int = 16  # of a token's jump
    num_tokens: int = 512  # K, vertices that are sampled
    mixing_layers: int = 2  # in which vertices read their neighbours, with one head
    hop_levels: int = 4  # of neighbours: at one step, at two, at three and four, ...
    hop_decay: float = 0.5  # of their weights
    hop_epsilon: float = 1e-9  # added to the weights under the logarithm
    point_frequencies: int = 8  # pi 2^k of the codes of shape and jump
    motion_frequencies: int = 10  # of the motion's
    ffn_ratio: int = 4  # hidden width of a stream's feed-forward layer, in D
    padding: Literal["masked", "attended"] = "masked"  # whether places without a vertex are read as vertices at 0
    layer_norm_epsilon: float = 1e-5  # added to the variance
    separate_losses: bool = True  # of jump and motion; False: of where vertices are
    per_instance_loss: bool = True  # every mesh counts the same; False: every vertex does
    jump_weight: float = 0.1  # of the jump's loss
    kl_weight: float = 1e-6  # of the posteriors' divergence from the normal distribution
    video_tokens: int = 1088  # of the features of a video
    video_channels: int = 3072  # of each
    flow_width: int = 1024  # of the flow's transformer
    flow_layers: int = 12  # of it
    flow_heads: int = 16  # of it
    modulation_norm_epsilon: float = 1e-6  # of its norms without weights
    flow_init_scale: float = 0.25  # of its first weights, in width^(-1/2)
    condition_drop_rate: float = 0.1  # of videos replaced by zeros while training
    guidance_scale: float = 1.5  # of sampling: 1 follows the video, 0 ignores it
    sampling_steps: int = 64  # points in time, ends included
    official_time: bool = False  # sampling tells the network the time t of its samples, not the tau it has learned
    keep_jump: bool = False  # sampling takes the mesh for posed as the video's first frame
    statistics_momentum: float = 1e-3  # least share of a batch in the latents' mean and variance
    statistics_epsilon: float = 1e-8  # added to the variance

    def __post_init__(self):
        if self.flow_width % self.flow_heads:
            raise ValueError(f"flow_heads {self.flow_heads} does not divide flow_width {self.flow_width}")

    @property
    def latent_sizes(self) -> tuple[int, int, int]:
        return self.latent_dim, self.jump_latent_dim, self.latent_dim


def _norm(c: Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.layer_norm_epsilon, use_fast_variance=False, name=name)


def _norms(c: Config, name: str) -> nn.LayerNorm:
    """Of (3, ..., D): each stream has weights of its own."""
    return nn.LayerNorm(epsilon=c.layer_norm_epsilon, feature_axes=(0, -1), use_fast_variance=False, name=name)


def _heads(x: Float[Array, "B L F"], count: int) -> Float[Array, "B L H d"]:
    return x.reshape(*x.shape[:2], count, -1)


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jnp.eye(*shape, dtype=dtype)


_zeros = nn.initializers.zeros


# --- the autoencoder ------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """x + W_o softmax(q k^T / sqrt(2D) + log(hop weights + epsilon)) v: of vertices that are near on the mesh."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], *, hops: Float[Array, "B N N"], mask: layers.Mask | None
    ) -> Float[Array, "B N D"]:
        c, width = self.config, x.shape[-1]
        query, key, value = (
            _heads(Linear(2 * width, use_bias=False, name=name)(_norm(c, f"{name}_norm")(x)), 1)
            for name in ("query", "key", "value")
        )
        bias = jnp.log(hops + c.hop_epsilon)[:, None]
        mixed = layers.dot_product_attention(query, key, value, bias=bias, mask=mask)[:, :, 0]
        return x + Linear(width, kernel_init=_identity, bias_init=_zeros, name="out")(mixed)


class StreamLinear(nn.Module):
    """x W_m + b_m of each of the three streams m; starts as torch's linear layers do."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "3 B K D"]) -> Float[Array, "3 B K F"]:
        start = torch_uniform(x.shape[-1])
        y = jnp.einsum("mbkd,mdf->mbkf", x, self.param("kernel", start, (3, x.shape[-1], self.features)))
        return y + self.param("bias", start, (3, self.features))[:, None, None] if self.use_bias else y


class Triflow(nn.Module):
    """out_m = W_m A V_m of each stream m, A = softmax(q k^T / sqrt(d)) of the first alone; then a GEGLU layer each.

    Queries and what is read are the same streams, unless `context` is given. Weights are the intermediate `weights`.
    """

    config: Config
    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "B K D"], ...],
        *,
        context: tuple[Float[Array, "B N D"], ...] | None = None,
        mask: layers.Mask | None = None,
    ) -> tuple[Float[Array, "B K D"], ...]:
        c, width, heads = self.config, streams[0].shape[-1], (self.num_heads, self.head_dim)
        x = jnp.stack(streams)
        read = x if context is None else jnp.stack(context)

        def project(name, y):
            y = Linear(math.prod(heads), use_bias=False, name=name)(_norm(c, f"{name}_norm")(y))
            return y.reshape(*y.shape[:2], *heads)

        query, key = project("query", x[0]), project("key", read[0])
        value = StreamLinear(math.prod(heads), use_bias=False, name="value")(_norms(c, "value_norm")(read))
        # One attention reads the values of all three, behind one another in each head.
        value = jnp.moveaxis(value.reshape(*value.shape[:3], *heads), 0, 3).reshape(*key.shape[:3], -1)
        if self.is_mutable_collection("intermediates"):
            mixed, weights = layers.dot_product_attention(query, key, value, mask=mask, return_weights=True)
            self.sow("intermediates", "weights", weights)
        else:
            mixed = layers.dot_product_attention(query, key, value, mask=mask)
        mixed = jnp.moveaxis(mixed.reshape(*mixed.shape[:3], 3, -1), 3, 0).reshape(*x.shape[:3], -1)
        x = x + StreamLinear(width, name="out")(mixed)
        hidden = StreamLinear(2 * c.ffn_ratio * width, name="ffn_in")(_norms(c, "ffn_norm")(x))
        hidden = layers.gated_linear_unit(*jnp.split(hidden, 2, axis=-1), activation="gelu")
        return tuple(x + StreamLinear(width, name="ffn_out")(hidden))


def sample_tokens(
    vertices: Float[Array, "B N D"], mask: Bool[Array, "B N"], count: int, uniform: Float[Array, "B K"] | None = None
) -> Int[Array, "B K"]:
    """`count` vertices far apart in the space of their embeddings, from the first on; more than there are: again.

    With uniform numbers, the first one and those that are too many are replaced by random ones, as in the official
    code. Source: card r_dmesh, Mechanism 4.
    """
    index = layers.farthest_point_sampling(vertices, count, mask=mask)
    present, place = jnp.sum(mask, axis=1, keepdims=True), jnp.arange(count)
    if uniform is None:
        return jnp.take_along_axis(index, place % jnp.maximum(present, 1), axis=1)
    drawn = jnp.minimum((uniform * present).astype(jnp.int32), jnp.maximum(present - 1, 0))
    return jnp.where((index <= 0) | (place >= present), drawn, index)


class Encoded(NamedTuple):
    vertices: Float[Array, "B N D"]  # of the mesh as given, after mixing
    tokens: Int[Array, "B K"]  # which vertices were sampled
    shape: Float[Array, "B K Z"]
    jump: tuple[Float[Array, "B K J"], Float[Array, "B K J"]]  # mean, logarithm of the variance
    motion: tuple[Float[Array, "B K Z"], Float[Array, "B K Z"]]

    def latents(self, noises: tuple[Array, Array] | None = None) -> Float[Array, "B K C"]:
        """[shape, jump, motion] with the posteriors' means, or with mean + deviation times noise."""
        drawn = [mean for mean, _ in (self.jump, self.motion)]
        if noises is not None:
            spreads = [jnp.exp(0.5 * logvar) for _, logvar in (self.jump, self.motion)]
            drawn = [m + s * n.astype(m.dtype) for m, s, n in zip(drawn, spreads, noises, strict=True)]
        return jnp.concatenate([self.shape, *drawn], axis=-1)

    def divergences(self) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """KL of jump and motion: means over tokens and channels of (mu^2 + var - 1 - log var) / 2."""
        pairs = (tuple(a.astype(jnp.float32) for a in pair) for pair in (self.jump, self.motion))
        return tuple(0.5 * jnp.mean(jnp.square(m) + jnp.exp(v) - 1.0 - v, axis=(1, 2)) for m, v in pairs)


class Encoder(nn.Module):
    """Codes of shape, jump and motion of all vertices; a few of them read all, and become latents."""

    config: Config

    @nn.compact
    def __call__(
        self,
        base: Float[Array, "B N 3"],
        frames: Float[Array, "B T N 3"],
        hops: Float[Array, "B N N"],
        mask: Bool[Array, "B N"],
        uniform: Float[Array, "B K"] | None = None,
    ) -> Encoded:
        c, seen = self.config, layers.KeyMask(mask) if self.config.padding == "masked" else None
        motion = jnp.moveaxis(frames - frames[:, :1], 1, 2).reshape(*base.shape[:2], -1)

        def point_code(name, x):
            order = ("function", "axis", "frequency")
            code = layers.fourier_encoding(x, _octaves(c.point_frequencies), include_input="last", order=order)
            return Linear(c.d_model, kernel_init=_identity, bias_init=_zeros, name=name)(code)

        shape = point_code("shape_embedding", base)
        jump = point_code("jump_embedding", frames[:, 0] - base)
        motion = Linear(c.d_model, name="motion_embedding")(
            layers.fourier_encoding(motion, _octaves(c.motion_frequencies))
        )
        shape = stack(self, partial(Mixing, c), c.mixing_layers, shape, name="mixing", hops=hops, mask=seen)
        tokens = sample_tokens(shape, mask, c.num_tokens, uniform)
        context = shape, jump, motion
        streams = tuple(layers.gather_points(x, tokens) for x in context)
        block = partial(Triflow, c, 1, c.d_model)
        streams = stack(self, block, c.encoder_layers, streams, context=context, mask=seen)

        def posterior(name, x, size):
            mean, logvar = (Linear(size, name=f"{name}_{part}")(x) for part in ("mean", "logvar"))
            return mean, jnp.clip(logvar, -30.0, 20.0)

        return Encoded(
            vertices=shape,
            tokens=tokens,
            shape=Linear(c.latent_dim, name="shape_mean")(streams[0]),
            jump=posterior("jump", streams[1], c.jump_latent_dim),
            motion=posterior("motion", streams[2], c.latent_dim),
        )


def _octaves(count: int) -> Float[Array, " F"]:
    return jnp.pi * 2.0 ** jnp.arange(count)


class Readout(nn.Module):
    """W_o softmax(q k^T / sqrt(F)) v of every vertex over the tokens; begins as 0."""

    config: Config

    @nn.compact
    def __call__(
        self, query: Float[Array, "B N F"], key: Float[Array, "B K D"], value: Float[Array, "B K D"]
    ) -> Float[Array, "B N F"]:
        width = query.shape[-1]
        query, key, value = (
            _heads(Linear(width, use_bias=False, name=name)(_norm(self.config, f"{name}_norm")(x)), 1)
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        mixed = layers.dot_product_attention(query, key, value)[:, :, 0]
        return Linear(width, kernel_init=_zeros, bias_init=_zeros, name="out")(mixed)


class Decoder(nn.Module):
    """Latents to where each vertex is in the first frame, and how it moves from there."""

    config: Config

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B K C"], base: Float[Array, "B N 3"], vertices: Float[Array, "B N D"]
    ) -> tuple[Float[Array, "B N 3"], Float[Array, "B T N 3"]]:
        c, parts = self.config, jnp.split(latents, np.cumsum(self.config.latent_sizes[:2]), axis=-1)
        streams = tuple(Linear(c.d_model, name=f"{s}_projection")(z) for s, z in zip(STREAMS, parts, strict=True))
        block = partial(Triflow, c, c.num_heads, c.head_dim)
        shape, jump, motion = stack(self, block, c.decoder_layers, streams)
        query = Linear(2 * c.d_model, name="query")(vertices)
        jump, motion = (
            Readout(c, name=f"{s}_readout")(query, shape, x) for s, x in (("jump", jump), ("motion", motion))
        )
        moved = Linear(3 * c.frames, name="motion_out")(motion).reshape(*base.shape[:2], c.frames, 3)
        return base + Linear(3, name="jump_out")(jump), jnp.moveaxis(moved, 2, 1)


def hop_weights(edges: Int[Array, "B E 2"], number: int, config: Config) -> Float[Array, "B N N"]:
    """1, decay, decay^2 ... of pairs one step, two, three to four ... apart along edges (B, E, 2); else 0."""

    def joined(pairs):
        absent = pairs < 0
        pairs = jnp.where(jnp.any(absent, axis=1, keepdims=True), number, pairs)  # beyond the table: dropped
        return jnp.zeros((number, number), bool).at[pairs[:, 0], pairs[:, 1]].set(True, mode="drop")

    table = jax.vmap(joined)(edges)
    return layers.hop_band_weights(table | table.mT, num_levels=config.hop_levels, decay=config.hop_decay)


def reconstruction_losses(
    config: Config, first: Float[Array, "B N 3"], motion: Float[Array, "B T N 3"], batch: Batch
) -> dict[str, Float[Array, " B"]]:
    """Mean distances of vertices, of each mesh: in all frames, in the first, and of their motions from it."""
    truth = batch["frames"]
    apart = {
        "global": distance(first[:, None] + motion, truth),
        "jump": distance(first, truth[:, 0]),
        "motion": distance(motion, truth - truth[:, :1]),
    }
    mean = partial(mean_over_vertices, mask=batch["vertex_mask"], per_instance=config.per_instance_loss)
    return {name: mean(values) for name, values in apart.items()}


def autoencoder_losses(config: Config, first: Array, motion: Array, found: Encoded, batch: Batch) -> dict[str, Array]:
    """What the autoencoder learns from, weighted: their sum is L = 0.1 L_x1 + L_xt + 1e-6 (KL_1 + KL_t)."""
    means = reconstruction_losses(config, first, motion, batch)
    if config.separate_losses:
        chosen = {"loss_jump": config.jump_weight * means["jump"], "loss_motion": means["motion"]}
    else:
        chosen = {"loss_global": means["global"]}
    return chosen | {"loss_kl": config.kl_weight * sum(found.divergences())}


# --- the flow --------------------------------------------------------------------------------------------------------


class FlowLayer(nn.Module):
    """y = norm(x) instead of x; then y + attention to the video, and gated self-attention and MLP, told the time."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B K W"], *, time: Float[Array, "B W"], video: Float[Array, "B L W"]
    ) -> Float[Array, "B K W"]:
        c, width = self.config, self.config.flow_width
        start = _flow_init(c)
        modulation = Linear(6 * width, name="modulation")(jax.nn.silu(time))[:, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split(modulation, 6, axis=-1)

        def projected(name, y, count):
            y = _heads(Linear(count * width, **start, name=name)(y), c.flow_heads)
            return jnp.split(y, count, axis=-1)  # of each head, one behind the other

        def attention(name, *parts):
            mixed = layers.dot_product_attention(*parts).reshape(x.shape)
            return Linear(width, **start, name=f"{name}_out")(mixed)

        x = _norm(c, "pre_norm")(x)
        x = x + attention("video", *projected("video_query", x, 1), *projected("video_key_value", video, 2))
        y = modulated(x, shift, scale, c.modulation_norm_epsilon)
        x = x + gate * attention("self", *projected("self_query_key_value", y, 3))
        y = _norm(c, "ffn_norm")(x) * (1 + ffn_scale) + ffn_shift
        return x + ffn_gate * _flow_mlp(c, "ffn", y)


def _flow_init(c: Config) -> dict[str, Any]:
    return {"kernel_init": nn.initializers.normal(c.flow_init_scale * c.flow_width**-0.5), "bias_init": _zeros}


def _flow_mlp(c: Config, name: str, x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
    """W_2 GELU(W_1 x), called inside a compact method."""
    hidden = layers.gelu(Linear(4 * c.flow_width, **_flow_init(c), name=f"{name}_in")(x))
    return Linear(c.flow_width, **_flow_init(c), name=f"{name}_out")(hidden)


class FlowTransformer(nn.Module):
    """The velocity of latents in normal units, at a time, given the features of a video; begins as 0."""

    config: Config

    @nn.compact
    def __call__(self, given: Batch) -> Float[Array, "B K C"]:
        c, width = self.config, self.config.flow_width
        latents, time, video = (given[name] for name in ("latents", "time", "video"))
        code = layers.sinusoidal_encoding(time, dim=width, interleaved=False, cosine_first=True).astype(latents.dtype)
        time = _flow_mlp(c, "time", code)
        video = _norm(c, "video_norm")(Linear(width, name="video_projection")(video))
        x = _norm(c, "norm_in")(Linear(width, name="latent_projection")(latents))
        x = stack(self, partial(FlowLayer, c), c.flow_layers, x, time=time, video=video)
        return Linear(latents.shape[-1], kernel_init=_zeros, bias_init=_zeros, name="head")(_norm(c, "norm_out")(x))


Flow = Callable[[Batch], Array]


def warped_time(tau: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """t = 1 - 1 / (tan(pi tau / 2) + 1), from 0 to 1. Source: arXiv:2403.03206, algorithm 21."""
    sine, cosine = jnp.sin(0.5 * jnp.pi * tau), jnp.cos(0.5 * jnp.pi * tau)
    return sine / (sine + cosine)


def unwarped_time(time: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The inverse of `warped_time`."""
    return jnp.arctan2(time, 1 - time) * (2 / jnp.pi)


def flow_losses(
    flow: Flow,
    latents: Float[Array, "B K C"],
    noise: Float[Array, "B K C"],
    tau: Float[Array, " B"],
    video: Float[Array, "B L V"],
    config: Config,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Mean squared errors of the velocity of jump and motion at time t(tau); the shape is known and has no noise."""
    size, jump, _ = config.latent_sizes
    mixed, velocity = layers.flow_pair(latents, noise, warped_time(tau).astype(latents.dtype))
    mixed = jnp.concatenate([latents[..., :size], mixed[..., size:]], axis=-1)
    found = flow({"latents": mixed, "time": tau, "video": video})
    error = jnp.square((found - velocity).astype(jnp.float32))
    parts = error[..., size : size + jump], error[..., size + jump :]
    return tuple(jnp.mean(part, axis=(1, 2)) for part in parts)


def sample_latents(
    flow: Flow, noise: Float[Array, "B K C"], known: Float[Array, "B K c"], video: Float[Array, "B L V"], config: Config
) -> Float[Array, "B K C"]:
    """Latents whose first channels are `known`, from noise along the guided flow, by the midpoint rule."""
    both = jnp.concatenate([video, jnp.zeros_like(video)])

    def fixed(x):
        return jnp.concatenate([known, x[..., known.shape[-1] :]], axis=-1)

    def velocity(x, t):
        told = jnp.full((2 * len(x),), t if config.official_time else unwarped_time(t))
        answers = flow({"latents": jnp.concatenate([fixed(x)] * 2), "time": told, "video": both})
        given, ignored = jnp.split(answers, 2)
        return layers.classifier_free_guidance(given, ignored, config.guidance_scale)

    times = jnp.linspace(0.0, 1.0, config.sampling_steps)
    return fixed(layers.integrate_flow(velocity, noise, times, method="midpoint"))


# --- the model -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The mesh of a batch as it moves: restored from its own frames, or, where there is a flow, from the video."""

    config: Config

    def setup(self):
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        if c.stage != "autoencoder":
            self.flow = FlowTransformer(c)
            size = (sum(c.latent_sizes),)
            self.mean = self.variable("latent_stats", "mean", jnp.zeros, size)
            self.variance = self.variable("latent_stats", "variance", jnp.ones, size)
            self.count = self.variable("latent_stats", "count", jnp.zeros, (), jnp.int32)

    def encode(self, batch: Batch, uniform: Float[Array, "B K"] | None = None) -> Encoded:
        hops = hop_weights(batch["edges"], batch["base"].shape[1], self.config)
        return self.encoder(batch["base"], batch["frames"], hops, batch["vertex_mask"], uniform)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c, base, uniform, noises = self.config, batch["base"], None, None
        key = self.make_rng("dropout") if train else jax.random.key(0)
        if train:
            key, *keys = jax.random.split(key, 4)
            rows = len(base), c.num_tokens
            uniform = jax.random.uniform(keys[0], rows)
            noises = tuple(jax.random.normal(k, (*rows, d)) for k, d in zip(keys[1:], c.latent_sizes[1:], strict=True))
        found = self.encode(batch, uniform)
        latents = found.latents(noises)
        first, motion = self.decoder(latents, base, found.vertices)
        outputs = {"first": first, "motion": motion}
        if c.stage != "flow":
            outputs |= autoencoder_losses(c, first, motion, found, batch)
        if c.stage != "autoencoder":
            outputs["loss_flow"] = self._flow_loss(jax.lax.stop_gradient(latents), batch["video"], key, train)
            if not train and not self.is_initializing():
                outputs |= {"reconstructed_first": first, "reconstructed_motion": motion}
                outputs["first"], outputs["motion"] = self.animate(batch, found=None if c.keep_jump else found)
        return outputs

    def _flow_loss(self, latents: Float[Array, "B K C"], video: Array, key: jax.Array, train: bool) -> Array:
        """At a time and with noise drawn for each mesh; in evaluation the same for all, whatever the batch."""
        c, keys = self.config, jax.random.split(key, 3)
        if train and not self.is_initializing() and self.is_mutable_collection("latent_stats"):
            wide, share = latents.astype(jnp.float32), jnp.maximum(1 / (self.count.value + 1), c.statistics_momentum)
            self.mean.value += share * (jnp.mean(wide, axis=(0, 1)) - self.mean.value)
            spread = jnp.mean(jnp.square(wide - self.mean.value), axis=(0, 1))
            self.variance.value += share * (spread - self.variance.value)
            self.count.value += 1
        rows = len(latents) if train else 1
        tau = jnp.broadcast_to(jax.random.uniform(keys[0], (rows,)), latents.shape[:1])
        noise = jax.random.normal(keys[1], (rows, *latents.shape[1:]))
        if train:
            kept = jax.random.bernoulli(keys[2], 1 - c.condition_drop_rate, (rows, 1, 1))
            video = jnp.where(kept, video, 0)
        noise = jnp.broadcast_to(noise, latents.shape).astype(latents.dtype)
        return sum(flow_losses(self.flow, self._normal(latents), noise, tau, video, c))

    def _deviation(self) -> Float[Array, " C"]:
        return jnp.sqrt(self.variance.value + self.config.statistics_epsilon)

    def _normal(self, latents: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        return ((latents - self.mean.value) / self._deviation()).astype(latents.dtype)

    def animate(
        self, batch: Batch, key: jax.Array | None = None, found: Encoded | None = None
    ) -> tuple[Float[Array, "B N 3"], Float[Array, "B T N 3"]]:
        """(first, motion) of the meshes as the videos have it; needs no `frames`. The noise is the same for all meshes,
        that of `key` if given. Shape and vertices may have been `found` with any motion."""
        c, base = self.config, batch["base"]
        if found is None:  # of meshes that stay as they are, whose jump is none
            frames = jnp.broadcast_to(base[:, None], (len(base), c.frames, *base.shape[1:]))
            found = self.encode({**batch, "frames": frames})
        latents = self._normal(found.latents())
        known = latents[..., : sum(c.latent_sizes[: 2 if c.keep_jump else 1])]
        noise = jax.random.normal(jax.random.key(1) if key is None else key, latents.shape[1:])
        noise = jnp.broadcast_to(noise, latents.shape).astype(latents.dtype)
        flow, variables = self.flow.unbind()  # which a loop may call
        drawn = sample_latents(partial(flow.apply, variables), noise, known, batch["video"], c)
        drawn = (drawn * self._deviation() + self.mean.value).astype(latents.dtype)
        return self.decoder(drawn, base, found.vertices)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    c = config
    sizes = {"frames": c.frames, "num_vertices": c.num_vertices, "num_edges": c.num_edges}
    video = c.video_tokens, c.video_channels
    return mesh_animation.example(**sizes, video_shape=video, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_AUTOENCODER = {  # theirs -> ours, their default
    "enc_depth": ("encoder_layers", 8), "dec_depth": ("decoder_layers", 8), "dim": ("d_model", 256),
    "latent_dim": ("latent_dim", 32), "latent_dim_x1": ("jump_latent_dim", 8), "heads": ("num_heads", 8),
    "dim_head": ("head_dim", 64), "T": ("frames", 16), "num_traj": ("num_tokens", 512),
    "n_layers": ("mixing_layers", 1), "num_hops": ("hop_levels", 1), "alpha_hops": ("hop_decay", 0.5),
}  # fmt: skip
_LOSS = {  # theirs -> ours, their default
    "per_instance_loss": ("per_instance_loss", False), "sep_rec_loss": ("separate_losses", False),
    "alpha_recon_x1": ("jump_weight", 0.1), "alpha_kl": ("kl_weight", 1e-6),
}  # fmt: skip
_FLOW = {"width": ("flow_width", 512), "layers": ("flow_layers", 12), "heads": ("flow_heads", 8)}
_SAMPLER = {"steps": ("sampling_steps", 64), "guidance_scale": ("guidance_scale", 3.0), "give_x1": ("keep_jump", False)}


def _read(names: Mapping[str, tuple[str, Any]], hparams: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: hparams.get(theirs, default) for theirs, (ours, default) in names.items()}


def _written(names: Mapping[str, tuple[str, Any]], config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, (ours, _) in names.items()}


def autoencoder_from_official(hparams: Mapping[str, Any]) -> Config:
    read = _read(_AUTOENCODER, hparams) | _read(_LOSS, hparams.get("loss", {}))
    if hparams.get("output_dim", 3 * read["frames"]) != 3 * read["frames"]:
        raise UserError(f"r_dmesh has three numbers a frame: output_dim {hparams['output_dim']} is not 3 T")
    return Config(stage="autoencoder", padding="attended", **read)


def autoencoder_to_official(config: Config) -> dict[str, Any]:
    return _written(_AUTOENCODER, config) | {"output_dim": 3 * config.frames, "loss": _written(_LOSS, config)}


def flow_from_official(hparams: Mapping[str, Any]) -> Config:
    h = hparams
    jump = h.get("x1_channels", 16)
    size = h.get("x0_channels", (h["input_channels"] - jump) // 2)
    if not h["input_channels"] == h["output_channels"] == 2 * size + jump:
        raise UserError(f"r_dmesh's flow has 2 {size} + {jump} channels, not {h['input_channels']}")
    return Config(
        official_time=True,
        latent_dim=size,
        jump_latent_dim=jump,
        video_channels=h.get("video_channels", 3072) * h.get("dit_layers", 1),
        flow_init_scale=h.get("init_scale", 0.25),
        **_read(_FLOW, h),
        **_read(_SAMPLER, h.get("sampler", {})),
    )


def flow_to_official(config: Config) -> dict[str, Any]:
    c, channels = config, sum(config.latent_sizes)
    parts = {f"x{i}_channels": size for i, size in zip("01t", c.latent_sizes, strict=True)}
    own = {"input_channels": channels, "output_channels": channels, "video_channels": c.video_channels, "dit_layers": 1}
    return own | parts | _written(_FLOW, c) | {"init_scale": c.flow_init_scale, "sampler": _written(_SAMPLER, c)}


def autoencoder_table(config: Config) -> Table:
    def attention(theirs: str, parts: str, ours: str, bias: bool = True):
        for short, name in zip("qkv", ("query", "key", "value"), strict=True):
            yield from layer_norm(f"{theirs}.norm_{short}", f"{ours}/{name}_norm")
            yield from linear(f"{theirs}.{parts}.to_{short}", f"{ours}/{name}", bias=False)
        yield from linear(f"{theirs}.{parts}.to_out", f"{ours}/out")

    def block(theirs: str, ours: str):
        for short, name in (("q", "query"), ("k", "key")):
            yield from layer_norm(f"{theirs}.0.norm_{short}", f"{ours}/{name}_norm")
            yield from linear(f"{theirs}.0.attn.to_{short}", f"{ours}/{name}", bias=False)
        for part, name in (("0.norm_v{}", "value_norm"), ("1.norm{}", "ffn_norm")):
            yield from stacked([layer_norm(f"{theirs}.{part.format(i)}", f"{ours}/{name}") for i in (1, 2, 3)])
        for part, name in (
            ("0.attn.to_v{}", "value"),
            ("0.attn.to_out{}", "out"),
            ("1.ffn.ffn{}.0", "ffn_in"),
            ("1.ffn.ffn{}.2", "ffn_out"),
        ):
            tables = [linear(f"{theirs}.{part.format(i)}", f"{ours}/{name}", bias=name != "value") for i in (1, 2, 3)]
            yield from stacked(tables)

    octaves = np.float32(np.pi) * np.exp2(np.arange(config.point_frequencies, dtype=np.float32))
    bands = np.exp2(np.arange(config.motion_frequencies, dtype=np.float32))
    for theirs, ours in (("point", "shape"), ("jump", "jump"), ("traj", "motion")):
        yield from linear(f"{theirs}_embed.mlp", f"encoder/{ours}_embedding")
        if theirs != "traj":
            yield from constant(f"{theirs}_embed.basis", np.kron(np.eye(3, dtype=np.float32), octaves[None]))
    yield from constant("traj_embed.freq_bands", bands[:, None])
    for i in range(config.mixing_layers):
        yield from attention(f"neighbor_layers.{i}", "fn", f"encoder/mixing_{i}")
    for i in range(config.encoder_layers):
        yield from block(f"enc_blocks.{i}", f"encoder/layers_{i}")
    for i in range(config.decoder_layers):
        yield from block(f"dec_blocks.{i}", f"decoder/layers_{i}")
    for short, s in zip(("x0", "x1", "xt"), STREAMS, strict=True):
        yield from linear(f"mean_fc_{short}", f"encoder/{s}_mean")
        yield from linear(f"proj_{short}", f"decoder/{s}_projection")
        if short != "x0":
            yield from linear(f"logvar_fc_{short}", f"encoder/{s}_logvar")
            yield from attention(f"decoder_final_ca_{short}", "fn", f"decoder/{s}_readout")
            yield from linear(f"to_outputs_{short}", f"decoder/{s}_out")
    yield from linear("fc_query", "decoder/query")


_FLOW_PARTS = {
    "input_proj": "latent_projection", "output_proj": "head", "dit_proj": "video_projection",
    "time_embed.c_fc": "time_in", "time_embed.c_proj": "time_out",
}  # fmt: skip
_FLOW_LAYER = {
    "attn.c_qkv": "self_query_key_value", "attn.c_proj": "self_out", "attn_vid.c_q": "video_query",
    "attn_vid.c_kv": "video_key_value", "attn_vid.c_proj": "video_out", "mlp.c_fc": "ffn_in", "mlp.c_proj": "ffn_out",
    "adaln_x.linear": "modulation",
}  # fmt: skip


def flow_table(config: Config) -> Table:
    for theirs, ours in (("ln_pre", "norm_in"), ("ln_post", "norm_out"), ("ln_pre_vid", "video_norm")):
        yield from layer_norm(theirs, ours)
    for theirs, ours in _FLOW_PARTS.items():
        yield from linear(theirs, ours)
    for i in range(config.flow_layers):
        theirs, ours = f"backbone.resblocks.{i}", f"layers_{i}"
        for part, own in _FLOW_LAYER.items():
            yield from linear(f"{theirs}.{part}", f"{ours}/{own}")
        yield from layer_norm(f"{theirs}.ln_x", f"{ours}/ffn_norm")
        yield from layer_norm(f"{theirs}.ln_x_pre", f"{ours}/pre_norm")


def autoencoder_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    c, faces, base = model.config, jnp.asarray(inputs["faces"], jnp.int32), inputs["pc"][:, 0]
    edges = jnp.concatenate([faces[..., [0, 1]], faces[..., [1, 2]], faces[..., [2, 0]]], axis=1)
    batch = {"base": base, "frames": inputs["pc"][:, 1:], "edges": edges, "vertex_mask": inputs["valid_mask"]}
    found = model.apply(variables, batch, inputs["rand_values"], method="encode")
    latents = found.latents((inputs["noise_x1"], inputs["noise_xt"]))
    first, motion = model.apply(variables, latents, base, found.vertices, method=lambda m, *a: m.decoder(*a))
    means, divergences = reconstruction_losses(c, first, motion, batch), found.divergences()
    return {
        "adj_matrix": hop_weights(edges, base.shape[1], c),
        "idx_temp": found.tokens,
        "pc0_embed_ori": found.vertices,
        "latent": latents,
        "recon_pc": first[:, None] + motion,
        "recon_x1": first,
        "rel_xt": motion,
        "kl_x1": divergences[0],
        "kl_temp": divergences[1],
        "loss": mesh_animation.loss(autoencoder_losses(c, first, motion, found, batch), batch)[0],
        **{f"loss_{n}": jnp.mean(means[k]) for n, k in (("recon_global", "global"), ("x1", "jump"), ("xt", "motion"))},
    }


def flow_call(model: FlowTransformer, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    c, flow, start = model.config, partial(model.apply, variables), inputs["x_start"]
    tau, video = inputs["times"], inputs["vid_embed"]
    jump, motion = flow_losses(flow, start, inputs["noise"], tau, video, c)
    known = start[..., : sum(c.latent_sizes[: 2 if c.keep_jump else 1])]
    drawn = sample_latents(flow, inputs["sample_noise"], known, video, c)
    found = {
        "out": flow({"latents": start, "time": tau, "video": video}),
        "mse_x1": jump,
        "mse_xt": motion,
        "loss": jump + motion,
    }
    return found | {"sample": jax.lax.stop_gradient(drawn)}


def flow_example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    latents = jax.random.normal(key, (batch_size, config.num_tokens, sum(config.latent_sizes)))
    video = jnp.zeros((batch_size, config.video_tokens, config.video_channels))
    return {"latents": latents, "time": jnp.zeros(batch_size), "video": video}


PAPER = Paper(
    slug="r_dmesh",
    task=mesh_animation.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(
            frames=8, num_vertices=96, num_edges=288, d_model=48, encoder_layers=2, decoder_layers=2, num_heads=2,
            head_dim=24, latent_dim=8, jump_latent_dim=4, num_tokens=32, mixing_layers=1, hop_levels=2,
            point_frequencies=4, motion_frequencies=4, video_tokens=16, video_channels=32, flow_width=64,
            flow_layers=2, flow_heads=4, sampling_steps=12, statistics_momentum=0.02,
        ),
        "300m": Config(),
    },
    officials=(
        Official(
            module="networks/rdmeshvae.py:RDMeshVAE",
            config=autoencoder_from_official,
            hparams=autoencoder_to_official,
            table=autoencoder_table,
            call=autoencoder_call,
        ),
        Official(
            module="networks/rdmeshdit.py:RDMeshDiT + diffusion/rf_diffusion.py",
            config=flow_from_official,
            hparams=flow_to_official,
            table=flow_table,
            call=flow_call,
            model=FlowTransformer,
            example=flow_example,
        ),
    ),
    parameter_counts={"300m": 54_536_099 + 288_949_392},  # autoencoder and flow
    quirks=(
        "places without a vertex are read as vertices at the origin (`padding`)",
        "the flow is told the warped time in training and the plain one in sampling (`official_time`)",
        "a layer of the flow goes on from the norm of its input (kept)",
        "the first sampled vertex and those that are too many are replaced by random ones (kept in training)",
    ),
)  # fmt: skip
