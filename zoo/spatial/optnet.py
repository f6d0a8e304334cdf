"""OPTNet: a point transformer that learns in which order to read the points (Lehigh University, arXiv:2605.17197).

Official code: letatanu/Pointcept@6cf2d86 (no licence; upstream Pointcept is MIT). Fidelity: exact.
New: Point Transformer V3 attends within patches of consecutive points along Z- and Hilbert curves; here a small network
gives every point scores, and sorting by them makes the finest level's orders. Sorting has no gradient: the scores learn
from neighbours, which should have similar ones, and from a ramp, which all of them together should fill.
Differs: after unpooling, the first convolution sees the sum of both branches (`conv_sees_sum`; officially one of them);
curves are permuted in training only, officially at pooled levels also when evaluating; the warm-up is counted in steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

import layers
from zoo.blocks import BatchNorm, Linear
from zoo.blocks.basic import torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import point_segmentation
from zoo.tasks.task import Batch
from zoo.weights.table import Table, batch_norm, layer_norm, linear, parameter, permute

_CURVES = ("z", "z-trans", "hilbert", "hilbert-trans")


@dataclass(frozen=True)
class Config:
    """Sizes and constants of the network for 3DAeroRelief; lists have an entry a stage, the finest first."""

    num_points: int = 102_400  # N, places for points
    num_classes: int = 5  # that a point may belong to
    in_channels: int = 6  # of features: places and colours
    cell: float = 0.2  # of the finest voxels, in metres
    depth: int = 9  # bits of a voxel's coordinate, at most 10
    curves: tuple[str, ...] = _CURVES  # as many orders are learned
    strides: tuple[int, ...] = (2, 2, 2, 2)  # of the poolings, powers of 2
    encoder_depths: tuple[int, ...] = (2, 2, 2, 6, 2)  # blocks
    encoder_widths: tuple[int, ...] = (32, 64, 128, 256, 512)  # channels
    encoder_heads: tuple[int, ...] = (2, 4, 8, 16, 32)  # of attention
    encoder_patches: tuple[int, ...] = (1024, 1024, 1024, 1024, 1024)  # points that attend to each other
    decoder_depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks
    decoder_widths: tuple[int, ...] = (64, 64, 128, 256)  # channels
    decoder_heads: tuple[int, ...] = (4, 4, 8, 16)  # of attention
    decoder_patches: tuple[int, ...] = (1024, 1024, 1024, 1024)  # points that attend to each other
    mlp_ratio: float = 4.0  # hidden width of a feed-forward layer / channels
    qkv_bias: bool = True  # whether queries, keys and values have biases
    pre_norm: bool = True  # False: norms after the residual sums
    drop_path_rate: float = 0.3  # of a point's branch in the last block of the encoder, rising from 0
    sorter_width: int = 64  # hidden channels of the network that scores points
    ordering_weight: float = 1.0  # of the ordering loss
    neighbors: int = 16  # whose scores should be similar; a point is its own nearest
    warmup_steps: int = 0  # of training before the learned orders are used
    shuffle_curves: bool = True  # permute the curves of the finest level too, in training
    conv_sees_sum: bool = True  # False: as the official code, see above
    flash: bool = True  # no effect; officially, without it a patch is at most the smallest cloud of the batch
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root
    batch_norm_epsilon: float = 1e-3  # likewise
    sorter_norm_epsilon: float = 1e-5  # likewise
    batch_norm_momentum: float = 0.01  # share of a batch in the running statistics
    sorter_norm_momentum: float = 0.1  # likewise

    def __post_init__(self):
        stages = len(self.encoder_depths)
        for name in ("encoder_widths", "encoder_heads", "encoder_patches"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {stages} stages")
        for name in ("strides", "decoder_depths", "decoder_widths", "decoder_heads", "decoder_patches"):
            if len(getattr(self, name)) != stages - 1:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {stages} stages, not {stages - 1}")
        if unknown := set(self.curves) - set(_CURVES):
            raise ValueError(f"curves {sorted(unknown)} are not among {', '.join(_CURVES)}")


# --- where the points are -------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """The points of one resolution and the ways through them."""

    cells: Int[Array, "B L 3"]
    present: Bool[Array, "B L"]
    codes: UInt32[Array, "O B L"]
    orders: Int[Array, "O B L"]
    depth: int
    around: Int[Array, "B L K"]  # of convolutions over 3 x 3 x 3 cells


def curve_codes(cells: Int[Array, "B L 3"], depth: int, curves: tuple[str, ...]) -> UInt32[Array, "O B L"]:
    """Each point's place on each curve; "-trans" goes through space with x and y exchanged."""
    encode = {"z": layers.morton_encode, "hilbert": layers.hilbert_encode}
    turned = cells[..., jnp.array([1, 0, 2])]
    rows = [(name.partition("-")[0], turned if name.endswith("-trans") else cells) for name in curves]
    return jnp.stack([encode[kind](places, depth=depth) for kind, places in rows])


def _level(cells, present, codes, depth: int) -> Level:
    orders = jax.vmap(lambda row: layers.sort_by_code(row, present)[0])(codes)
    around = layers.voxel_neighbors(cells, present, kernel_size=3, depth=max(depth, 1))
    return Level(cells, present, codes, orders, depth, around)


def coarser(level: Level, stride: int, permutation: Int[Array, " O"] | None) -> tuple[Level, layers.CodeClusters]:
    """The level of points that share a cell `stride` times as wide, and who is in which."""
    bits = (stride - 1).bit_length()
    bits = bits if bits <= level.depth else 0
    clusters = layers.cluster_by_code(level.codes[0], level.present, bits=3 * bits)
    size = clusters.code.shape[1]
    index = jnp.where(clusters.index < 0, size, clusters.index)
    rows = jnp.arange(index.shape[0])[:, None]
    # All members of a cluster agree in both.
    cells = jnp.zeros_like(level.cells).at[rows, index].set(level.cells >> bits, mode="drop")
    codes = jnp.zeros_like(level.codes).at[:, rows, index].set(level.codes >> (3 * bits), mode="drop")
    codes = codes if permutation is None else codes[permutation]
    return _level(cells, clusters.present, codes, level.depth - bits), clusters


# --- orders ---------------------------------------------------------------------------------------------------------


class Sorter(nn.Module):
    """Scores in (0, 1) of every point for each order: sigmoid(W_3 GELU(BN(W_2 GELU(BN(W_1 [place, features])))))."""

    config: Config

    @nn.compact
    def __call__(
        self, coord: Float[Array, "B L 3"], feat: Float[Array, "B L C"], present: Bool[Array, "B L"], *, train: bool
    ) -> tuple[Float[Array, "B L O"], Int[Array, ""]]:
        """(scores, training steps before this one)."""
        c = self.config
        x = jnp.concatenate([coord, jax.lax.stop_gradient(feat)], axis=-1)
        for i in range(2):
            norm = BatchNorm(c.sorter_norm_epsilon, c.sorter_norm_momentum, name=f"norm_{i}")
            x = layers.gelu(norm(Linear(c.sorter_width, name=f"dense_{i}")(x), train=train, present=present))
            taken = norm.variables["batch_stats"]["count"]
        scores = jax.nn.sigmoid(Linear(len(c.curves), name="dense_2")(x).astype(jnp.float32))
        return scores, taken - 1 if train else taken


def learned_orders(scores: Float[Array, "B L O"], present: Bool[Array, "B L"]) -> Int[Array, "O B L"]:
    """The points of each cloud by rising score, the absent ones last."""
    fixed = jnp.moveaxis(jax.lax.stop_gradient(scores), -1, 0)
    return jax.vmap(lambda row: layers.sort_by_code(row, present)[0])(fixed)


def roughness(
    scores: Float[Array, "B L O"],
    coord: Float[Array, "B L 3"],
    present: Bool[Array, "B L"],
    neighbors: int,
    stray: Float[Array, " O"] | None = None,
) -> Float[Array, " B"]:
    """sum over points i, orders and the `neighbors` nearest points j of (s_i - s_j)^2.

    `stray` has the scores that stand for neighbours that do not exist: the official code takes those of the batch's
    last point. Source: card optnet, Mechanism 5 (L_loc, there as a mean over points and orders).
    """
    index, square = layers.nearest_points(coord, coord, min(neighbors, coord.shape[1]), mask=present)
    found = (square < jnp.inf)[..., None]
    around = layers.gather_points(scores, index)
    if stray is not None:
        around, found = jnp.where(found, around, stray), jnp.ones_like(found)
    rough = jnp.sum(jnp.where(found, jnp.square(scores[:, :, None] - around), 0.0), axis=(2, 3))
    return jnp.sum(jnp.where(present, rough, 0.0), axis=1)


def unevenness(scores: Float[Array, "B L O"], present: Bool[Array, "B L"]) -> Float[Array, ""]:
    """mean_t (s_(t) - t / (n - 1))^2 over the n scores of a batch by rank. Source: card optnet, 5 (L_dist)."""
    there = jnp.broadcast_to(present[..., None], scores.shape).reshape(-1)
    ranked = jnp.sort(jnp.where(there, scores.reshape(-1), jnp.inf))
    count, place = jnp.sum(there), jnp.arange(there.size)
    counted = place < count
    away = jnp.where(counted, ranked, 0.0) - place / jnp.maximum(count - 1, 1)
    return jnp.sum(jnp.where(counted, jnp.square(away), 0.0)) / jnp.maximum(count, 1)


def ordering_loss(
    rough: Float[Array, " B"], scores: Float[Array, "B L O"], present: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Mean roughness of a point and order, plus the unevenness of all scores."""
    count = jnp.maximum(jnp.sum(present), 1) * scores.shape[-1]
    return jnp.sum(rough) / count + unevenness(scores, present)


# --- the network ----------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """Convolution among the points alone, over k x k x k cells."""

    features: int
    size: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"], around: Int[Array, "B L K"]) -> Float[Array, "B L F"]:
        start = torch_uniform(x.shape[-1] * self.size**3)
        kernel = self.param("kernel", start, (self.size,) * 3 + (x.shape[-1], self.features))
        bias = self.param("bias", start, (self.features,)) if self.use_bias else None
        return layers.submanifold_convolution(x, kernel, around, bias=bias)


class Block(nn.Module):
    """x += LN(W conv(x)); x += attention within patches; x += MLP; `conv_input` may stand in for the first x."""

    config: Config
    heads: int
    patch: int
    drop_rate: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L C"],
        level: Level,
        order: Int[Array, "B L"],
        conv_input: Float[Array, "B L C"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "B L C"]:
        c, width = self.config, x.shape[-1]

        def norm(name):
            return nn.LayerNorm(epsilon=c.layer_norm_epsilon, use_fast_variance=False, name=name)

        place = Convolution(width, 3, name="conv")(x if conv_input is None else conv_input, level.around)
        x = x + norm("conv_norm")(Linear(width, name="conv_linear")(place))

        def attend(x):
            qkv = Linear(3 * width, use_bias=c.qkv_bias, name="qkv")(x).reshape(*x.shape[:2], 3, self.heads, -1)
            patch = min(self.patch, x.shape[1])
            mixed = layers.serialized_attention(
                *(qkv[:, :, i] for i in range(3)), order, level.present, patch_size=patch
            )
            return Linear(width, name="proj")(mixed.reshape(x.shape))

        def feed(x):
            hidden = layers.gelu(Linear(int(c.mlp_ratio * width), name="ffn_in")(x))
            return Linear(width, name="ffn_out")(hidden)

        for branch, name in ((attend, "norm1"), (feed, "norm2")):
            if c.pre_norm:
                x = x + self.kept(branch(norm(name)(x)), train=train)
            else:
                x = norm(name)(x + self.kept(branch(x), train=train))
        return x

    def kept(self, x: Float[Array, "B L C"], *, train: bool) -> Float[Array, "B L C"]:
        """x, or while training 0 at a share of the points, the others scaled to the same mean."""
        if not train or self.drop_rate == 0.0:
            return x
        ones = jnp.ones((*x.shape[:2], 1), x.dtype)
        return x * layers.dropout(ones, self.make_rng("dropout"), rate=self.drop_rate)


class Model(nn.Module):
    """Points to `logits` (B, N, K), `scores` (B, N, O), and what the ordering loss needs: `rough`, `order_weight`."""

    config: Config

    @nn.compact
    def __call__(
        self, batch: Batch, *, train: bool = False, permutations: Int[Array, "S O"] | None = None
    ) -> dict[str, Float[Array, "B *shape"]]:
        """`permutations` of the curves, a row a stage; without them random ones while training, else none."""
        c, present = self.config, batch["point_mask"]
        if permutations is None and train:
            permutations = self.permutations(self.make_rng("dropout"))
        codes = curve_codes(batch["cell"], c.depth, c.curves)
        codes = codes if permutations is None else codes[permutations[0]]
        level = _level(batch["cell"], present, codes, c.depth)
        scores, steps = Sorter(c, name="sorter")(batch["coord"], batch["feat"], present, train=train)
        orders = learned_orders(scores, present)
        if train:
            orders = jnp.where(steps >= c.warmup_steps, orders, level.orders)
        levels, clusters = [level._replace(orders=orders)], []

        norm = partial(BatchNorm, c.batch_norm_epsilon, c.batch_norm_momentum)

        def lifted(x, width, name, present):
            x = Linear(width, name=name)(x)
            return layers.gelu(norm(name=f"{name}_norm")(x, train=train, present=present))

        around = layers.voxel_neighbors(batch["cell"], present, kernel_size=5, depth=c.depth)
        x = Convolution(c.encoder_widths[0], 5, use_bias=False, name="stem")(batch["feat"], around)
        x = layers.gelu(norm(name="stem_norm")(x, train=train, present=present))
        self.sow("intermediates", "stem", x)
        rates, skips = np.linspace(0, c.drop_path_rate, sum(c.encoder_depths)), []
        for stage in range(len(c.encoder_depths)):
            if stage > 0:
                skips.append(x)
                turn = None if permutations is None else permutations[stage]
                level, members = coarser(level, c.strides[stage - 1], turn)
                levels.append(level)
                clusters.append(members)
                x = Linear(c.encoder_widths[stage], name=f"down_{stage}")(x)
                x = layers.pool_clusters(x, members, reduction="max")
                x = layers.gelu(norm(name=f"down_{stage}_norm")(x, train=train, present=level.present))
            x = self.blocks("encoder", stage, x, levels[stage], rates[sum(c.encoder_depths[:stage]) :], train=train)

        rates = np.linspace(0, c.drop_path_rate, sum(c.decoder_depths))
        for stage in reversed(range(len(c.decoder_depths))):
            width, depth = c.decoder_widths[stage], c.decoder_depths[stage]
            coarse = lifted(x, width, f"up_{stage}", levels[stage + 1].present)
            skip = lifted(skips[stage], width, f"skip_{stage}", levels[stage].present)
            x = skip + layers.unpool_clusters(coarse, clusters[stage])
            first = sum(c.decoder_depths[:stage])
            own = rates[first : first + depth][::-1]
            x = self.blocks("decoder", stage, x, levels[stage], own, None if c.conv_sees_sum else skip, train=train)

        rough = roughness(scores, batch["coord"].astype(jnp.float32), present, c.neighbors)
        return {
            "logits": Linear(c.num_classes, name="head")(x),
            "scores": scores,
            "rough": rough,
            "order_weight": jnp.full(rough.shape, c.ordering_weight),
        }

    def blocks(self, side: str, stage: int, x, level: Level, rates, conv_input=None, *, train: bool):
        c = self.config
        depths, heads, patches = (getattr(c, f"{side}_{name}") for name in ("depths", "heads", "patches"))
        for i in range(depths[stage]):
            block = Block(c, heads[stage], patches[stage], float(rates[i]), name=f"{side}_{stage}_{i}")
            order = level.orders[i % len(c.curves)]
            x = block(x, level, order, conv_input if i == 0 else None, train=train)
        return x

    def permutations(self, key: Key[Array, ""]) -> Int[Array, "S O"]:
        c = self.config
        keys = jax.random.split(key, len(c.encoder_depths))
        drawn = jax.vmap(lambda key: jax.random.permutation(key, len(c.curves)))(keys)
        return drawn if c.shuffle_curves else drawn.at[0].set(jnp.arange(len(c.curves)))


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy, Lovasz's loss and the ordering loss, of which only the last reaches the sorter."""
    segmentation, _ = point_segmentation.loss(outputs, batch)
    ordering = ordering_loss(outputs["rough"], outputs["scores"], batch["point_mask"])
    return segmentation + outputs["order_weight"][0] * ordering, {"ordering": ordering}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    sizes = {name: getattr(config, name) for name in ("num_points", "num_classes", "cell", "depth")}
    return point_segmentation.example(**sizes, batch_size=batch_size, key=key)


# --- the official code ----------------------------------------------------------------------------------------------

_HPARAMS = {
    "in_channels": "in_channels",
    "num_classes": "num_classes",
    "order": "curves",
    "stride": "strides",
    "enc_depths": "encoder_depths",
    "enc_channels": "encoder_widths",
    "enc_num_head": "encoder_heads",
    "enc_patch_size": "encoder_patches",
    "dec_depths": "decoder_depths",
    "dec_channels": "decoder_widths",
    "dec_num_head": "decoder_heads",
    "dec_patch_size": "decoder_patches",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "pre_norm": "pre_norm",
    "drop_path": "drop_path_rate",
    "ordering_loss_weight": "ordering_weight",
    "ordering_k": "neighbors",
    "shuffle_orders": "shuffle_curves",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    if hparams.get("enable_rpe"):
        raise ValueError("optnet: enable_rpe, relative positions, is for networks without flash attention, not these")
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    ours = {name: tuple(value) if isinstance(value, list) else value for name, value in ours.items()}
    ours |= {name: float(ours[name]) for name in ("mlp_ratio", "drop_path_rate", "ordering_weight") if name in ours}
    return Config(**ours, conv_sees_sum=False, flash=bool(hparams.get("enable_flash", True)))


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    named = {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
    return named | {"enable_flash": config.flash, "backbone_out_channels": config.decoder_widths[0]}


def _convolution(theirs: str, ours: str, *, bias: bool = True) -> Table:
    yield from parameter(f"{theirs}.weight", f"{ours}/kernel", permute(1, 2, 3, 4, 0))
    if bias:
        yield from parameter(f"{theirs}.bias", f"{ours}/bias")


def _block(config: Config, theirs: str, ours: str) -> Table:
    yield from _convolution(f"{theirs}.cpe.0", f"{ours}/conv")
    yield from linear(f"{theirs}.cpe.1", f"{ours}/conv_linear")
    yield from layer_norm(f"{theirs}.cpe.2", f"{ours}/conv_norm")
    yield from layer_norm(f"{theirs}.norm1.0", f"{ours}/norm1")
    yield from linear(f"{theirs}.attn.qkv", f"{ours}/qkv", bias=config.qkv_bias)
    yield from linear(f"{theirs}.attn.proj", f"{ours}/proj")
    yield from layer_norm(f"{theirs}.norm2.0", f"{ours}/norm2")
    yield from linear(f"{theirs}.mlp.0.fc1", f"{ours}/ffn_in")
    yield from linear(f"{theirs}.mlp.0.fc2", f"{ours}/ffn_out")


def official_table(config: Config) -> Table:
    yield from _convolution("backbone.embedding.stem.conv", "stem", bias=False)
    yield from batch_norm("backbone.embedding.stem.norm", "stem_norm")
    for stage, depth in enumerate(config.encoder_depths):
        theirs = f"backbone.enc.enc{stage}"
        if stage > 0:
            yield from linear(f"{theirs}.down.proj", f"down_{stage}")
            yield from batch_norm(f"{theirs}.down.norm.0", f"down_{stage}_norm")
        for i in range(depth):
            yield from _block(config, f"{theirs}.block{i}", f"encoder_{stage}_{i}")
    for stage, depth in enumerate(config.decoder_depths):
        theirs = f"backbone.dec.dec{stage}"
        for name, own in (("proj", "up"), ("proj_skip", "skip")):
            yield from linear(f"{theirs}.up.{name}.0", f"{own}_{stage}")
            yield from batch_norm(f"{theirs}.up.{name}.1", f"{own}_{stage}_norm")
        for i in range(depth):
            yield from _block(config, f"{theirs}.block{i}", f"decoder_{stage}_{i}")
    for i, place in enumerate((0, 3, 6)):
        yield from linear(f"backbone.sorter.mlp.{place}", f"sorter/dense_{i}")
    for i, place in enumerate((1, 4)):
        yield from batch_norm(f"backbone.sorter.mlp.{place}", f"sorter/norm_{i}")
    yield from linear("seg_head", "head")


def _with_official_sizes(config: Config, cells: np.ndarray, lengths: np.ndarray) -> Config:
    """Bits of a coordinate, and patches no longer than the smallest cloud where flash attention is off: both depend
    on the batch there."""
    config = replace(config, depth=int(cells.max() + 1).bit_length())
    if config.flash:
        return config
    smallest, shift, starts = [], 0, np.cumsum(lengths)[:-1]
    for stride in (1, *config.strides):
        shift += (stride - 1).bit_length()
        smallest.append(min(len(np.unique(part >> shift, axis=0)) for part in np.split(cells, starts)))

    def limited(patches):
        return tuple(min(size, least) for size, least in zip(patches, smallest, strict=False))

    return replace(
        config,
        encoder_patches=limited(config.encoder_patches),
        decoder_patches=limited(config.decoder_patches),
    )


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Clouds there are one after another; `offset` says where each ends."""
    ends = np.asarray(inputs["offset"])
    lengths = np.diff(ends, prepend=0)
    cells = np.asarray(inputs["grid_coord"])
    model = Model(_with_official_sizes(model.config, cells, lengths))
    c = model.config
    present = np.arange(lengths.max()) < lengths[:, None]
    place = np.where(present, np.arange(lengths.max()) + (ends - lengths)[:, None], 0)
    clouds, rows = np.nonzero(present)

    def padded(x):
        x = jnp.asarray(x)[place]
        return jnp.where(present.reshape(*present.shape, *(1,) * (x.ndim - 2)), x, 0)

    def flat(x):
        return x[clouds, rows]

    turns = np.asarray(inputs["order_perms"])
    turns = turns if c.shuffle_curves else np.concatenate([np.arange(len(c.curves))[None], turns[1:]])
    mask = jnp.asarray(present)
    batch = {"coord": padded(inputs["coord"]), "feat": padded(inputs["feat"]), "cell": padded(cells.astype(np.int32))}
    batch |= {"point_mask": mask, "label": jnp.zeros(present.shape, jnp.int32)}
    outputs = model.apply(variables, batch, permutations=jnp.asarray(turns))
    scores, logits = outputs["scores"], flat(outputs["logits"])

    def joined(orders):
        parts = [orders[:, b, :n] + end - n for b, (n, end) in enumerate(zip(lengths, ends, strict=True))]
        return jnp.concatenate(parts, axis=1)

    codes = curve_codes(batch["cell"], c.depth, c.curves)[jnp.asarray(turns[0])]
    learned = joined(learned_orders(scores, mask))
    geometric = joined(_level(batch["cell"], mask, codes, c.depth).orders)
    of_cloud = np.repeat(np.arange(len(lengths)), lengths)
    rough = roughness(scores, batch["coord"], mask, c.neighbors, stray=flat(scores)[-1])
    found = {
        "seg_logits": logits,
        "scores": flat(scores),
        "learned_order": learned,
        "learned_inverse": jnp.argsort(learned, axis=1),
        "ordering_loss": c.ordering_weight * ordering_loss(rough, scores, mask),
        "serialized_code": codes[:, clouds, rows].astype(jnp.int32) + (of_cloud << (3 * c.depth)),
        "serialized_order": geometric,
    }
    if inputs.get("segment") is not None:
        label = jnp.asarray(inputs["segment"])
        found["seg_loss"] = point_segmentation.segmentation_loss(logits, label.astype(jnp.int32), label >= 0)
    return found


PAPER = Paper(
    slug="optnet",
    task=point_segmentation.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(
            num_points=160,
            cell=1.5,
            depth=3,
            strides=(2,),
            encoder_depths=(2, 2),
            encoder_widths=(16, 32),
            encoder_heads=(2, 4),
            encoder_patches=(24, 24),
            decoder_depths=(1,),
            decoder_widths=(16,),
            decoder_heads=(2,),
            decoder_patches=(24,),
            drop_path_rate=0.1,
            warmup_steps=100,
        ),
        "aero_relief": Config(),
    },
    officials=(
        Official(
            module="pointcept/models/optnet/optnet_ICPR.py:OPTNetSegmentor(backbone=OPTNet)",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"aero_relief": 46_171_913},
    reported={"3d_aero_relief": {"miou": 0.7965}},
    quirks=(
        "after unpooling, the first block's convolution sees the skip branch alone, its residual the sum",
        "of four learned orders two are used: blocks of a stage take turns, and the finest stages have two",
        "where a cloud has too few points, the batch's last one stands for the missing neighbours",
        "curves are permuted at pooled levels when evaluating too, so that results vary",
        "flash attention casts to bfloat16 there, whatever the precision",
    ),
)
