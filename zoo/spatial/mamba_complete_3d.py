"""3DMambaComplete: structured state space models complete point clouds (Li et al., arXiv:2404.07106).

Official code: yixuanli1230/3DMambaComplete@bac3293 (no licence). Fidelity: exact.
New: AnchorFormer with Mamba where it had self-attention. Every encoder block adds points of its own, whose places are
what a softmax without weights makes of the places there are; they are spread out, and each grows a patch of surface
from a square grid whose channels are restyled for it.
Differs: padding takes no part (`mask_padding`; the official code keeps it from being sampled, and with it all points
within 0.03 of the origin, but not from being a neighbour). The tokens are scanned in the order in which they were
sampled, the farthest first, as there.
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
from zoo.blocks import BatchNorm, Linear, Mamba, stack
from zoo.blocks.basic import torch_uniform
from zoo.blocks.mamba import mamba
from zoo.paper import Official, Paper
from zoo.tasks import point_completion
from zoo.tasks.task import Batch
from zoo.weights.table import Table, batch_norm, conv1x1, layer_norm, linear, parameter


@dataclass(frozen=True)
class Config:
    """Sizes and constants of the network for PCN."""

    num_points: int = 2048  # N, places for points seen
    num_targets: int = 16384  # points of the true cloud that training compares with
    predicted: int = 16384  # points asked for: each token grows the nearest square number of its share of them
    d_model: int = 384  # C, width of a token
    sampled: int = 512  # points kept half way to the tokens
    tokens: int = 128  # T, sampled from the points seen
    added: int = 16  # tokens that each encoder block adds
    encoder_blocks: int = 8  # which mix the tokens and add to them
    decoder_blocks: int = 6  # which read the encoder's tokens
    num_mamba: int = 6  # layers of Mamba in each block
    num_heads: int = 6  # of the decoder's attention
    mlp_ratio: int = 2  # hidden width of a feed-forward layer / C
    neighbors: int = 16  # of a point in the edge convolutions
    norm_groups: int = 4  # of channels there
    edge_widths: tuple[int, ...] = (8, 32, 64, 64, 128)  # of the points, then of the four edge convolutions
    place_width: int = 128  # hidden width of the embedding of places
    generator_widths: tuple[int, int] = (256, 64)  # from the tokens of a block to those it adds
    global_width: int = 1024  # of the summary of a whole cloud
    patch_width: int = 256  # of the first layer that unfolds a patch; then a half and a quarter
    state_size: int = 16  # of every Mamba: states of a channel
    conv_width: int = 4  # of every Mamba: taps of its convolution
    expand: int = 2  # of every Mamba: inner width / C
    mask_padding: bool = True  # False: as the official code, see above
    distance_weights: tuple[float, float] = (1.0, 1.0)  # of the coarse and of the dense cloud, in the loss
    penalty_weights: tuple[float, float] = (0.1, 0.05)  # of their expansion, likewise
    penalty_factors: tuple[float, float] = (0.5, 1.2)  # edges longer than this times the mean are penalised
    penalty_blocks: tuple[int, int] = (16, 64)  # points that share a spanning tree
    penalty_slope: Literal["square", "length"] = "square"  # the kernel's gradient, which the weights fit, or the exact
    negative_slope: float = 0.2  # of the leaky ReLUs
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    group_norm_epsilon: float = 1e-5  # likewise
    batch_norm_epsilon: float = 1e-5  # likewise
    instance_norm_epsilon: float = 1e-5  # likewise
    batch_norm_momentum: float = 0.1  # share of a batch in the running statistics

    @property
    def queries(self) -> int:
        return self.tokens + self.encoder_blocks * self.added

    @property
    def side(self) -> int:
        """Points along a patch."""
        return int(math.sqrt(self.predicted // self.queries) + 0.5)


# Inside the transformer, Mamba included, linear layers start so, and convolutions with the other.
_NORMAL, _XAVIER = nn.initializers.normal(0.02), nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
_Dense = partial(Linear, kernel_init=_NORMAL, bias_init=nn.initializers.zeros)
_Convolution = partial(Linear, kernel_init=_XAVIER)
_NEAR_ORIGIN = 1e-3  # square of the distance within which the official sampling takes no point


def _leaky(c: Config, x: Array) -> Array:
    return jax.nn.leaky_relu(x, c.negative_slope)


def _layer_norm(c: Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.layer_norm_epsilon, use_fast_variance=False, name=name)


def _batch_norm(c: Config, name: str) -> BatchNorm:
    return BatchNorm(c.batch_norm_epsilon, c.batch_norm_momentum, name=name)


# --- from points to tokens ----------------------------------------------------------------------------------------


class Affine(nn.Module):
    """The scale and bias of a norm, for those that it is applied to elsewhere."""

    @nn.compact
    def __call__(self, features: int) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        scale = self.param("scale", nn.initializers.ones, (features,))
        return scale, self.param("bias", nn.initializers.zeros, (features,))


class EdgeConv(nn.Module):
    """max over the k nearest points j of LeakyReLU(GN(W [f_j - q_i, q_i])); the norm's groups span points and edges.

    W is linear, the norm rises or falls with each channel as its scale does, and LeakyReLU rises: the greatest edge is
    that of the point whose own part is greatest (least), so that norm and activation see points and not edges.
    """

    config: Config
    features: int

    @nn.compact
    def __call__(
        self,
        query_place: Float[Array, "B Q 3"],
        query: Float[Array, "B Q C"],
        place: Float[Array, "B N 3"],
        points: Float[Array, "B N C"],
        *,
        present: Bool[Array, "B N"] | None = None,
        query_present: Bool[Array, "B Q"] | None = None,
    ) -> Float[Array, "B Q F"]:
        c, width = self.config, 2 * points.shape[-1]
        index, _ = layers.nearest_points(query_place, place, c.neighbors, mask=present)
        kernel = self.param("kernel", torch_uniform(width), (width, self.features))
        of_neighbor, of_both = jnp.split(kernel, 2)
        own = query @ (of_both - of_neighbor)
        neighbors = layers.gather_points(points @ of_neighbor, index)

        wide = (neighbors + own[:, :, None]).astype(jnp.float32)
        grouped = wide.reshape(*wide.shape[:3], c.norm_groups, -1)
        where = None if query_present is None else query_present[:, :, None, None, None]
        mean = jnp.mean(grouped, axis=(1, 2, 4), where=where, keepdims=True)
        variance = jnp.mean(jnp.square(grouped - mean), axis=(1, 2, 4), where=where)[:, None, :, None]
        scale, bias = Affine(name="norm")(self.features)
        greatest = jnp.where(scale >= 0, jnp.max(neighbors, axis=2), jnp.min(neighbors, axis=2)) + own
        greatest = greatest.astype(jnp.float32).reshape(*own.shape[:2], c.norm_groups, -1)
        normed = (greatest - mean[:, :, 0]) * jax.lax.rsqrt(variance + c.group_norm_epsilon)
        return _leaky(c, (normed.reshape(own.shape) * scale + bias).astype(query.dtype))


class Tokens(nn.Module):
    """Places and features of T points, sampled in two steps, each of which hears of its neighbours."""

    config: Config

    @nn.compact
    def __call__(
        self, place: Float[Array, "B N 3"], present: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B T 3"], Float[Array, "B T F"]]:
        c = self.config
        there = present if c.mask_padding else None
        x = _Convolution(c.edge_widths[0], name="input")(place)
        edge = [EdgeConv(c, width, name=f"edge_{i}") for i, width in enumerate(c.edge_widths[1:], start=1)]
        x = edge[0](place, x, place, x, present=there, query_present=there)
        chosen = sample(c, place, present, c.sampled)
        half, half_x = (layers.gather_points(v, chosen) for v in (place, x))
        x = edge[1](half, half_x, place, x, present=there)
        x = edge[2](half, x, half, x)
        chosen = sample(c, half, jnp.ones(half.shape[:2], bool), c.tokens)
        last, last_x = (layers.gather_points(v, chosen) for v in (half, x))
        return last, edge[3](last, last_x, half, x)


def sample(c: Config, place: Float[Array, "B N 3"], present: Bool[Array, "B N"], count: int) -> Array:
    """Indices of the points that are farthest from each other."""
    if c.mask_padding:
        return layers.farthest_point_sampling(place, count, mask=present)
    away = jnp.sum(jnp.square(place.astype(jnp.float32)), axis=-1) > _NEAR_ORIGIN
    return layers.farthest_point_sampling(place, count, start=0, mask=away)


class Lift(nn.Module):
    """W_2 LeakyReLU(BN(W_1 x)), both of the same kind."""

    config: Config
    hidden: int
    features: int
    kernel_init: nn.initializers.Initializer | None = _XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"], *, train: bool) -> Float[Array, "B L F"]:
        x = Linear(self.hidden, kernel_init=self.kernel_init, name="hidden")(x)
        x = _leaky(self.config, _batch_norm(self.config, "norm")(x, train=train))
        return Linear(self.features, kernel_init=self.kernel_init, name="out")(x)


# --- blocks ---------------------------------------------------------------------------------------------------------


class MambaLayer(nn.Module):
    """x + Mamba(LN(x)), one way along the tokens."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        c = self.config
        mixer = Mamba(c.state_size, c.conv_width, c.expand, kernel_init=_NORMAL, conv_init=_XAVIER, name="mixer")
        return x + mixer(_layer_norm(c, "norm")(x))


class MambaStack(nn.Module):
    """LN of what layers of Mamba make of x."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return _layer_norm(self.config, "norm")(stack(self, partial(MambaLayer, self.config), self.config.num_mamba, x))


class FeedForward(nn.Module):
    """W_2 GELU(W_1 x)."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        hidden = layers.gelu(_Dense(self.config.mlp_ratio * x.shape[-1], name="ffn_in")(x))
        return _Dense(x.shape[-1], name="ffn_out")(hidden)


class Fold(nn.Module):
    """Places from [places, summary]: two hidden layers of C / 2 and C / 4, with batch norms."""

    config: Config

    @nn.compact
    def __call__(self, place: Float[Array, "B A 3"], summary: Float[Array, "B C"], *, train: bool):
        c = self.config
        x = jnp.concatenate([place, jnp.broadcast_to(summary[:, None], (*place.shape[:2], summary.shape[-1]))], -1)
        for i, width in enumerate((c.d_model // 2, c.d_model // 4)):
            x = _batch_norm(c, f"norm_{i}")(_Convolution(width, name=f"hidden_{i}")(x), train=train)
            x = jax.nn.relu(x)
        return _Convolution(3, name="out")(x)


class EncoderBlock(nn.Module):
    """Mix the tokens, make A new ones of how they differ from their maximum, and find the new ones' places."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L C"], place: Float[Array, "B L 3"], *, train: bool
    ) -> tuple[Float[Array, "B M C"], Float[Array, "B M 3"]]:
        c = self.config
        x = x + MambaStack(c, name="mamba")(_layer_norm(c, "norm1")(x))
        x = x + FeedForward(c, name="ffn")(_layer_norm(c, "norm2")(x))
        summary = layers.pool_points(x)[:, 0]
        # Over the tokens, channel by channel: the block knows their number and their order.
        new = jnp.swapaxes(summary[:, None] - x, 1, 2)
        for i, width in enumerate((*c.generator_widths, c.added)):
            new = _Convolution(width, name=f"generate_{i}")(new if i == 0 else _leaky(c, new))
        new = jnp.swapaxes(new, 1, 2)
        between = layers.dot_product_attention(new[:, :, None], x[:, :, None], place[:, :, None])[:, :, 0]
        self.sow("intermediates", "between", between)
        found = Fold(c, name="fold1")(between, summary, train=train)
        found = Fold(c, name="fold2")(found, summary, train=train)
        return jnp.concatenate([x, new], axis=1), jnp.concatenate([place, found], axis=1)


class DecoderBlock(nn.Module):
    """Mix the queries, let them read the encoder's tokens, feed forward; each on normed inputs beside a residual."""

    config: Config

    @nn.compact
    def __call__(self, q: Float[Array, "B Q C"], *, memory: Float[Array, "B L C"]) -> Float[Array, "B Q C"]:
        c = self.config
        q = q + MambaStack(c, name="mamba")(_layer_norm(c, "norm1")(q))
        read, asked = _layer_norm(c, "norm_memory")(memory), _layer_norm(c, "norm_query")(q)
        heads = [
            _Dense(c.d_model, use_bias=False, name=name)(x).reshape(*x.shape[:2], c.num_heads, -1)
            for name, x in (("query", asked), ("key", read), ("value", read))
        ]
        mixed = layers.dot_product_attention(*heads).reshape(q.shape)
        q = q + _Dense(c.d_model, name="out")(mixed)
        return q + FeedForward(c, name="ffn")(_layer_norm(c, "norm2")(q))


class Decoder(nn.Module):
    """Blocks of their own module, which the trainer can loop over: nothing in them has running statistics."""

    config: Config

    @nn.compact
    def __call__(self, q: Float[Array, "B Q C"], memory: Float[Array, "B L C"]) -> Float[Array, "B Q C"]:
        return stack(self, partial(DecoderBlock, self.config), self.config.decoder_blocks, q, memory=memory)


class Patches(nn.Module):
    """For each query a square grid, unfolded: convolution, restyling by the query, batch norm and ReLU, three times.

    A channel's scale comes of the cloud's summary, its shift of the query; what is restyled is each patch by itself.
    """

    config: Config

    @nn.compact
    def __call__(self, style: Float[Array, "B C"], local: Float[Array, "B Q C"], *, train: bool):
        c = self.config
        widths = [c.patch_width // 2**i for i in range(3)]
        total = sum(widths)

        def parameters(x, name):
            hidden = jax.nn.relu(Linear(c.d_model, name=f"{name}_hidden")(x))
            return jnp.split(Linear(total, name=f"{name}_out")(hidden), np.cumsum(widths)[:-1], axis=-1)

        scales, shifts = parameters(style, "scale"), parameters(local, "shift")
        batch, queries = local.shape[:2]
        line = jnp.linspace(-1.0, 1.0, c.side, dtype=local.dtype)
        grid = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)  # the first coordinate runs fastest
        x = jnp.broadcast_to(grid, (batch * queries, *grid.shape))
        for i, (width, scale, shift) in enumerate(zip(widths, scales, shifts, strict=True)):
            x = Linear(width, name=f"conv_{i}")(x)
            scale = jnp.broadcast_to(scale[:, None], shift.shape).reshape(-1, width)
            x = layers.adaptive_instance_norm(x, scale, shift.reshape(-1, width), epsilon=c.instance_norm_epsilon)
            x = jax.nn.relu(_batch_norm(c, f"norm_{i}")(x, train=train))
            for name, start in (("mean", jnp.zeros), ("var", jnp.ones)):  # held by the official code, which never looks
                self.variable("unused", f"{name}_{i}", start, (width,))
        x = jnp.tanh(Linear(3, name="conv_3")(x))
        return x.reshape(batch, queries, -1, 3)


class Model(nn.Module):
    """Points seen to `points` (B, Q s^2, 3), `coarse` (B, 2 Q, 3), half of them seen, and the loss's `penalty`."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *shape"]]:
        c, seen, present = self.config, batch["x"], batch["point_mask"]
        place, x = Tokens(c, name="grouper")(seen, present)
        x = Lift(c, c.d_model, c.d_model, name="input")(x, train=train)
        x = x + Lift(c, c.place_width, c.d_model, name="places")(place, train=train)
        for i in range(c.encoder_blocks):
            x, place = EncoderBlock(c, name=f"encoder_{i}")(x, place, train=train)

        # The sampled points stay where they are, the added ones are moved.
        summary = layers.pool_points(Lift(c, c.global_width, c.global_width, name="summary")(x, train=train))[:, 0]
        moved = jax.nn.relu(_Dense(c.global_width, name="spread_hidden")(summary))
        moved = _Dense(3 * (c.queries - c.tokens), name="spread_out")(moved).reshape(seen.shape[0], -1, 3)
        place = jnp.concatenate([place[:, : c.tokens], place[:, c.tokens :] + moved], axis=1)

        q = jnp.concatenate([jnp.broadcast_to(summary[:, None], (*place.shape[:2], c.global_width)), place], axis=-1)
        for i, width in enumerate((c.global_width, c.global_width, c.d_model)):
            q = _Convolution(width, name=f"query_{i}")(q if i == 0 else _leaky(c, q))
        q = Decoder(c, name="decoder")(q, x)

        lift = Lift(c, c.global_width, c.global_width, None, name="head_summary")
        style = Linear(c.d_model, name="head_global")(layers.pool_points(lift(q, train=train))[:, 0])
        local = Linear(c.d_model, name="head_local")(jnp.concatenate([q, place], axis=-1))
        grown = place[:, :, None] + Patches(c, name="patches")(style, local, train=train)
        dense = grown.reshape(seen.shape[0], -1, 3)

        kept = layers.gather_points(seen, sample(c, seen, present, c.queries))
        penalty = jnp.zeros(seen.shape[0])
        if any(c.penalty_weights):
            for weight, each in zip(c.penalty_weights, self.penalties(place, dense), strict=True):
                penalty = penalty + weight * jnp.mean(each.astype(jnp.float32), axis=1)
        return {
            "points": dense,
            "coarse": jnp.concatenate([place, kept], axis=1),
            "penalty": penalty,
            "weights": jnp.broadcast_to(jnp.asarray(c.distance_weights), (seen.shape[0], 2)),
        }

    def penalties(self, *clouds: Float[Array, "B _ 3"]) -> list[Float[Array, "B _"]]:
        """Of the coarse and of the dense cloud, at each point."""
        c = self.config
        each = zip(clouds, c.penalty_factors, c.penalty_blocks, strict=True)
        return [layers.expansion_penalty(cloud, f, block=b, slope=c.penalty_slope) for cloud, f, b in each]


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    sizes = {"num_points": config.num_points, "num_targets": config.num_targets}
    return point_completion.example(**sizes, batch_size=batch_size, key=key)


# --- the official code ----------------------------------------------------------------------------------------------

_HPARAMS = {
    "trans_dim": "d_model",
    "num_pred": "predicted",
    "num_encoder_blk": "encoder_blocks",
    "num_decoder_blk": "decoder_blocks",
}
# Literals there, arguments here.
_CONSTANTS = {
    "token_base": "tokens",
    "hyper_add": "added",
    "fps1": "sampled",
    "grouper": "edge_widths",
    "gen_feat": "generator_widths",
    "glob": "global_width",
    "pos_hidden": "place_width",
    "n_layer": "num_mamba",
    "num_heads": "num_heads",
    "morph_hidden": "patch_width",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    constants = hparams.get("constants", {})
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    ours |= {ours: constants[theirs] for theirs, ours in _CONSTANTS.items() if theirs in constants}
    ours |= {name: tuple(value) for name, value in ours.items() if isinstance(value, list)}
    factors = tuple(hparams.get(f"{kind}_expansion_lambda", d) for kind, d in (("sparse", 0.5), ("dense", 1.2)))
    weights = tuple(hparams.get("loss_weights", (1.0, 1.0, 0.1, 0.05)))
    config = Config(
        **ours, penalty_factors=factors, distance_weights=weights[:2], penalty_weights=weights[2:], mask_padding=False
    )
    if hparams.get("num_query", config.queries) != config.queries:
        raise ValueError(f"mamba_complete_3d: num_query {hparams['num_query']} is not tokens + blocks {config.queries}")
    return config


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()} | {"num_query": config.queries}
    named |= dict(zip(("sparse_expansion_lambda", "dense_expansion_lambda"), config.penalty_factors, strict=True))
    named["loss_weights"] = [*config.distance_weights, *config.penalty_weights]
    return named | {"constants": {theirs: getattr(config, ours) for theirs, ours in _CONSTANTS.items()}}


def _lift(theirs: str, ours: str) -> Table:
    yield from conv1x1(f"{theirs}.0", f"{ours}/hidden")
    yield from batch_norm(f"{theirs}.1", f"{ours}/norm")
    yield from conv1x1(f"{theirs}.3", f"{ours}/out")


def _block(config: Config, theirs: str, ours: str) -> Table:
    for name in ("norm1", "norm2"):
        yield from layer_norm(f"{theirs}.{name}", f"{ours}/{name}")
    for i in range(config.num_mamba):
        yield from layer_norm(f"{theirs}.mamba.layers.{i}.norm", f"{ours}/mamba/layers_{i}/norm")
        yield from mamba(f"{theirs}.mamba.layers.{i}.mixer", f"{ours}/mamba/layers_{i}/mixer")
    yield from layer_norm(f"{theirs}.mamba.norm_f", f"{ours}/mamba/norm")
    yield from linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/ffn_in")
    yield from linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/ffn_out")


def official_table(config: Config) -> Table:
    base = "base_model"
    yield from conv1x1(f"{base}.grouper.input_trans", "grouper/input")
    for i in range(1, len(config.edge_widths)):
        yield from conv1x1(f"{base}.grouper.layer{i}.0", f"grouper/edge_{i}", axes=2, bias=False)
        yield from layer_norm(f"{base}.grouper.layer{i}.1", f"grouper/edge_{i}/norm")
    yield from _lift(f"{base}.pos_embed", "places")
    yield from _lift(f"{base}.input_proj", "input")
    for i in range(config.encoder_blocks):
        theirs, ours = f"{base}.encoder.{i}", f"encoder_{i}"
        yield from _block(config, theirs, ours)
        for fold in (1, 2):
            for j in (0, 1):
                yield from conv1x1(f"{theirs}.generate_anchor.folding{fold}.{3 * j}", f"{ours}/fold{fold}/hidden_{j}")
                yield from batch_norm(
                    f"{theirs}.generate_anchor.folding{fold}.{3 * j + 1}", f"{ours}/fold{fold}/norm_{j}"
                )
            yield from conv1x1(f"{theirs}.generate_anchor.folding{fold}.6", f"{ours}/fold{fold}/out")
        for j in range(3):
            yield from conv1x1(f"{theirs}.generate_feature.{2 * j}", f"{ours}/generate_{j}")
    yield from _lift(f"{base}.increase_dim", "summary")
    yield from linear(f"{base}.coarse_pred.0", "spread_hidden")
    yield from linear(f"{base}.coarse_pred.2", "spread_out")
    for j in range(3):
        yield from conv1x1(f"{base}.mlp_query.{2 * j}", f"query_{j}")
    for i in range(config.decoder_blocks):
        theirs, ours = f"{base}.decoder.{i}", f"decoder/layers_{i}"
        yield from _block(config, theirs, ours)
        yield from layer_norm(f"{theirs}.norm_q", f"{ours}/norm_query")
        yield from layer_norm(f"{theirs}.norm_v", f"{ours}/norm_memory")
        for name, own in (("q_map", "query"), ("k_map", "key"), ("v_map", "value")):
            yield from linear(f"{theirs}.attn.{name}", f"{ours}/{own}", bias=False)
        yield from linear(f"{theirs}.attn.proj", f"{ours}/out")
    for i in range(4):
        yield from conv1x1(f"upsample_net.dec.conv{i + 1}", f"patches/conv_{i}")
    for i in range(3):
        yield from batch_norm(f"upsample_net.dec.bn{i + 1}", f"patches/norm_{i}")
        for name in ("mean", "var"):
            theirs = f"upsample_net.dec.adain{i + 1}.running_{name}"
            yield from parameter(theirs, f"patches/{name}_{i}", collection="unused")
    for theirs, ours in (("global", "scale"), ("local", "shift")):
        yield from linear(f"upsample_net.mlp_{theirs}.0", f"patches/{ours}_hidden")
        yield from linear(f"upsample_net.mlp_{theirs}.2", f"patches/{ours}_out")
        yield from linear(f"reduce_map_{theirs}", f"head_{theirs}")
    yield from _lift("increase_dim", "head_summary")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    seen = jnp.asarray(inputs["xyz"])
    outputs = model.apply(variables, {"x": seen, "point_mask": jnp.ones(seen.shape[:2], bool)})
    found = {"sparse": outputs["coarse"], "dense": outputs["points"]}
    clouds = outputs["coarse"][:, : model.config.queries], outputs["points"]
    for name, penalty in zip(("sparse", "dense"), model.penalties(*clouds), strict=True):
        found[f"penalty_{name}"] = jnp.mean(penalty)
    if inputs.get("gt") is not None:
        batch = {"y": jnp.asarray(inputs["gt"])}
        found["loss_coarse"] = jnp.mean(layers.chamfer_distance(outputs["coarse"], batch["y"]))
        found["loss_fine"] = jnp.mean(layers.chamfer_distance(outputs["points"], batch["y"]))
        found["loss"] = point_completion.loss(outputs, batch)[0]
    return found


# --- named configurations -------------------------------------------------------------------------------------------

PAPER = Paper(
    slug="mamba_complete_3d",
    task=point_completion.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(
            num_points=128,
            num_targets=256,
            predicted=512,
            d_model=48,
            sampled=48,
            tokens=16,
            encoder_blocks=1,
            decoder_blocks=1,
            num_mamba=1,
            edge_widths=(8, 16, 32, 32, 32),
            place_width=32,
            generator_widths=(64, 32),
            global_width=128,
            patch_width=64,
            neighbors=8,
            penalty_blocks=(16, 16),
        ),
        "pcn": Config(),  # ShapeNet-55 and -34: predicted=6400, num_targets=8192
    },
    officials=(
        Official(
            module="models/AnchorFormer.py:AnchorFormer",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"pcn": 103_239_827},
    reported={"pcn": {"cd_l1": 6.907, "cd_l2": 0.216, "f_score": 0.805}},
    quirks=(
        "points within 0.03 of the origin are never sampled, zeros that fill up a cloud among them, but are neighbours",
        "the gradient of the expansion penalty is that of squared lengths, its value that of lengths",
        "the initial weights of Mamba are those of all linear layers, so that its steps begin at 0.69",
        "each encoder block knows the number of its tokens and their order",
        "patches are squares: KITTI's network (pcn with predicted=14336) gives 12,544 points",
    ),
)
