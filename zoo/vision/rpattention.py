"""Representative Attention for Vision Transformers (arXiv:2605.14913).

Official code: Liyuntong123/RPAtten@b8c21a9 (no licence), which so far is a description with figures. Fidelity: reading.
New: tokens compete for a few representatives by what they hold, not by where they are (Gather); representatives attend
to one another (Interact); tokens read the result by attention to them (Distribute). Linear in the number of tokens, and
a drop-in for the attention of vision transformers: here DeiT, PVT, PVTv2 and Swin, all of `zoo.backbones` but PVT.
Differs: shares of tokens are normalised within each representative, without which a sum grows with the image; routing
is scaled like attention, and one map routes all heads; each of these is ours, as the code is unpublished.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import layers
from zoo.backbones import pvt_v2, swin, vit
from zoo.backbones.encoder import LayerConfig, encode, fitting_positions
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention
from zoo.blocks import Linear
from zoo.blocks.basic import DepthwiseConv
from zoo.paper import Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_START = nn.initializers.truncated_normal(0.02)
_SHOWN = 3  # tokens whose attention is an output


@dataclass(frozen=True)
class Config:
    """Sizes and constants; tuples have an entry for each stage, of which DeiT has one."""

    host: Literal["deit", "pvt", "pvt_v2", "swin"] = "deit"  # the transformer whose attention is replaced
    image_size: int = 224  # side of a square image; others have their positions interpolated
    channels: int = 3  # of the image
    num_classes: int = 1000  # K, to tell apart
    patch: int = 16  # side of a token of the first stage, in pixels; of pvt_v2 always 4
    widths: tuple[int, ...] = (192,)  # of a token; in swin each is twice the one before
    depths: tuple[int, ...] = (12,)  # layers
    num_heads: tuple[int, ...] = (3,)  # H, of attention
    mlp_ratios: tuple[float, ...] = (4.0,)  # of the MLPs' widths to the tokens'
    representatives: tuple[int, ...] = (49,)  # M; 0: the host's own attention, which in pvt and pvt_v2 is to all tokens
    class_token: bool = True  # of deit and pvt, the token that is classified; else the mean of all
    window: int = 7  # side of swin's windows, in tokens, where attention is its own
    routing_scale: bool = True  # of the routing: 1 / sqrt(width of a head), as in attention
    normalize_gather: bool = True  # representatives are means of their tokens, else sums
    gather_epsilon: float = 1e-6  # added to the tokens' shares that a mean is divided by
    interact: Literal["projected", "plain", "skipped"] = "projected"
    """How representatives attend to one another: through projections, as they are, or not at all."""
    branches: Literal["both", "global", "local"] = "both"
    """What is added up: representatives (global), a depthwise convolution of the values (local), or both."""
    local_size: int = 3  # of that convolution, odd
    dropout_rate: float = 0.0  # of what attention gives, after its projection
    drop_path_rate: float = 0.0  # share of examples that skip the last layer's branches; grows from 0 at the first
    layer_norm_epsilon: float = 1e-6  # of deit and pvt; pvt_v2 and swin have their own

    def __post_init__(self):
        for name in ("widths", "num_heads", "mlp_ratios", "representatives"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(f"{name} {getattr(self, name)} has not {len(self.depths)} entries, one a stage")
        if self.host == "deit" and len(self.depths) != 1:
            raise ValueError(f"deit has one stage, not {len(self.depths)}")
        if self.host == "swin" and any(b != 2 * a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"the widths of swin double from stage to stage, unlike {self.widths}")

    def grid(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens of a stage, height and width, for images of this size."""
        up = self.host in ("pvt_v2", "swin")  # what is left over makes a token
        patch = 4 if self.host == "pvt_v2" else self.patch
        first = (-(-n // patch) if up else n // patch for n in size)
        height, width = (-(-n // 2**stage) if up else n // 2**stage for n in first)
        return height, width

    def prefix(self, stage: int) -> int:
        """Tokens that are no places, before the others."""
        return int(self.class_token and self.host in ("deit", "pvt") and stage == len(self.depths) - 1)

    def stage_of(self, layer: int) -> int:
        return bisect_right(list(accumulate(self.depths)), layer)


# --- attention --------------------------------------------------------------------------------------------------------


class RepresentativeAttention(nn.Module):
    """In place of softmax(s q k') v: Gather, Interact, Distribute, and a convolution of the values on their grid.

    A = softmax_m(s (k W_r + b_r)), k', u = shares of A times k, v; r = attention of u's heads among themselves;
    y = softmax_m(s q k') r + conv(v). O(L M C). Also gives what a token reads of each representative, and what each of
    these has of every token. Source: card rpattention, Mechanism.
    """

    config: Config
    stage: int
    grid: tuple[int, int]

    @nn.compact
    def __call__(
        self, query: Float[Array, "B L H D"], key: Float[Array, "B L H D"], value: Float[Array, "B L H D"]
    ) -> tuple[Float[Array, "B L H D"], tuple[Float[Array, "B H L M"], Float[Array, "B H M L"]] | None]:
        c, mixed, weights = self.config, 0.0, None
        if c.branches != "local":
            scale = key.shape[-1] ** -0.5 if c.routing_scale else 1.0
            route = Linear(
                c.representatives[self.stage], kernel_init=_START, bias_init=nn.initializers.zeros, name="route"
            )
            keys, values, assigned = layers.gather_representatives(
                scale * route(key), key, value, normalize=c.normalize_gather, epsilon=c.gather_epsilon
            )
            values, among = self.interact(values)
            mixed, reads = layers.dot_product_attention(query, keys, values, return_weights=True)
            share = jnp.moveaxis(assigned, 1, 3)  # (B, H, M, L)
            if c.normalize_gather:
                share = share / (jnp.sum(share, axis=-1, keepdims=True) + c.gather_epsilon)
            weights = reads, share if among is None else among @ share
        if c.branches != "global":
            mixed = mixed + self.local(value)
        return mixed, weights

    def interact(self, values: Float[Array, "B M H D"]) -> tuple[Float[Array, "B M H D"], Array | None]:
        """(what representatives have heard from one another, with which weights)."""
        if self.config.interact == "skipped":
            return values, None
        if self.config.interact == "plain":
            return layers.dot_product_attention(values, values, values, return_weights=True)
        merged = values.reshape(*values.shape[:2], -1)
        make = partial(Linear, merged.shape[-1], kernel_init=_START, bias_init=nn.initializers.zeros)
        names = (f"interact_{name}" for name in ("query", "key", "value"))
        entering = (make(name=name)(merged).reshape(values.shape) for name in names)
        return layers.dot_product_attention(*entering, return_weights=True)

    def local(self, value: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
        """Each channel's 3 x 3 convolution over the places; 0 for the tokens before them."""
        prefix = value.shape[1] - self.grid[0] * self.grid[1]
        places = value[:, prefix:]
        y = DepthwiseConv(self.config.local_size, name="depthwise")(places.reshape(len(value), *self.grid, -1))
        return jnp.pad(y.reshape(places.shape), ((0, 0), (prefix, 0), (0, 0), (0, 0)))


def representative_hook(
    config: Config, size: tuple[int, int], seen: list[tuple[Any, Any, int]] | None = None
) -> AttentionHook:
    """The `attention` of a backbone that has these depths, for images of this size; its new weights are beside the
    projections of each attention, under `representatives`.

    `seen` gets the weights of each layer, and its stage.
    """

    def attention(layer: Layer, query: Array, key: Array, value: Array, *, return_weights: bool, **options: Any):
        stage = config.stage_of(layer.index)
        if not config.representatives[stage]:
            return plain_attention(layer, query, key, value, return_weights=return_weights, **options)
        grid = config.grid(stage, size)
        mixed, weights = RepresentativeAttention(config, stage, grid, name="representatives")(query, key, value)
        if seen is not None and weights is not None:
            seen.append((*weights, stage))
        # From token to token: what is read of a representative, times what that one has of each token.
        return (mixed, weights and weights[0] @ weights[1]) if return_weights else mixed

    return attention


# --- hosts ------------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """PVT, the first version, whose keys and values come from all tokens (whai362/PVT, arXiv:2102.12122)."""

    config: Config
    attention: AttentionHook

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> vit.Output:
        c, x, first = self.config, images, 0
        for stage, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            side = 2 if stage else c.patch
            x = nn.Conv(width, (side, side), strides=side, padding="VALID", name=f"stage{stage}_embedding")(x)
            x = nn.LayerNorm(1e-5, use_fast_variance=False, name=f"stage{stage}_embedding_norm")(x)
            grid, start, prefix = x.shape[1:3], nn.initializers.normal(0.02), c.prefix(stage)
            x = x.reshape(len(x), -1, width)
            if prefix:
                token = self.param("class_token", start, (1, width)).astype(x.dtype)
                x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, width)), x], axis=1)
            trained = c.grid(stage, (c.image_size, c.image_size))
            table = self.param(f"stage{stage}_positions", start, (prefix + trained[0] * trained[1], width))
            x = x + fitting_positions(jnp.asarray(table, x.dtype), trained, grid, prefix=prefix, resample=True)
            hidden = int(width * c.mlp_ratios[stage])
            layer = LayerConfig(width, c.num_heads[stage], hidden, norm_epsilon=c.layer_norm_epsilon)
            x = encode(self, layer, depth, self.attention, x, start=first)
            first += depth
            if stage < len(c.depths) - 1:
                x = x.reshape(len(x), *grid, width)
        x = nn.LayerNorm(c.layer_norm_epsilon, use_fast_variance=False, name="norm")(x)
        return vit.Output(Linear(c.num_classes, name="head")(x[:, 0] if prefix else jnp.mean(x, axis=1)), x, None)


def make_host(config: Config, size: tuple[int, int], attention: AttentionHook) -> nn.Module:
    """The transformer, for images of this size."""
    c, sizes = config, (config.image_size, config.image_size)
    same = {"in_channels": c.channels, "num_classes": c.num_classes}
    stages = {"depths": c.depths, "num_heads": c.num_heads, "mlp_ratios": c.mlp_ratios}
    if c.host == "pvt":
        return Pyramid(c, attention)
    if c.host == "pvt_v2":
        return pvt_v2.Model(
            pvt_v2.Config(widths=c.widths, reductions=(1,) * len(c.depths), **same, **stages), attention
        )
    if c.host == "swin":
        # One window, as large as the grid, needs no table of biases: nothing of it would be read.
        windows = [c.grid(i, size) if m else (c.window, c.window) for i, m in enumerate(c.representatives)]
        own = {"head_dims": (None,) * len(c.depths), "position_bias": tuple(not m for m in c.representatives)}
        whole = {"image_size": size, "patch_size": (c.patch, c.patch), "width": c.widths[0], "windows": tuple(windows)}
        return swin.Model(swin.Config(**whole, **own, **same, **stages), attention)
    hidden = int(c.widths[0] * c.mlp_ratios[0])
    host = vit.Config(
        family="deit",
        image_size=sizes,
        patch_size=(c.patch, c.patch),
        num_layers=c.depths[0],
        layer=LayerConfig(c.widths[0], c.num_heads[0], hidden, norm_epsilon=c.layer_norm_epsilon),
        mlp_ratio=c.mlp_ratios[0],
        class_token=c.class_token,
        resample_positions=True,
        pool="token" if c.class_token else "avg",
        **same,
    )
    return vit.Model(host, attention)


def dropping(config: Config) -> Callable[..., Any]:
    """For `nn.intercept_methods`: dropout, and branches that examples skip, in a host that knows of neither.

    What a layer adds comes from its projections `out` (attention) and `fc2` (MLP).
    """
    last = max(sum(config.depths) - 1, 1)

    def call(function: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        y, module = function(*args, **kwargs), context.module
        if not isinstance(module, Linear) or module.name not in ("out", "fc2") or context.method_name != "__call__":
            return y
        stage, number = re.search(r"(?:stage(\d+)_)?layers?_(\d+)", "/".join(module.path)).groups()
        rate = config.drop_path_rate * (sum(config.depths[: int(stage or 0)]) + int(number)) / last
        if module.name == "out" and config.dropout_rate:
            y = layers.dropout(y, module.make_rng("dropout"), rate=config.dropout_rate)
        if rate:
            whole = jnp.ones((len(y),) + (1,) * (y.ndim - 1), y.dtype)
            y = y * layers.dropout(whole, module.make_rng("dropout"), rate=rate)
        return y

    return call


class Model(nn.Module):
    """Images to `logits`; and, when not training, the `queries` (B, 3), tokens whose pixels differ most from the
    image's mean, with their `attention` (B, 3, h, w) to the others in the last layer that has representatives.

    Its tree of parameters is the host's, with `representatives` in it, so that a host's weights can be started from.
    """

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c, x = self.config, batch["x"]
        size, seen = x.shape[1:3], []
        host = make_host(c, size, representative_hook(c, size, None if train else seen))
        nn.share_scope(self, host)
        drops = train and (c.dropout_rate > 0 or c.drop_path_rate > 0)
        with nn.intercept_methods(dropping(c)) if drops else nullcontext():
            outputs = {"logits": host(x).logits}
        if seen:
            reads, shares, stage = seen[-1]
            outputs["queries"], outputs["attention"] = shown(x, reads, shares, c.grid(stage, size), c.prefix(stage))
        return outputs


def shown(
    x: Float[Array, "B height width C"], reads: Float[Array, "B H L M"], shares: Float[Array, "B H M L"],
    grid: tuple[int, int], prefix: int,
) -> tuple[Int[Array, "B Q"], Float[Array, "B Q h w"]]:  # fmt: skip
    """Places that stand out, and the mean over heads of what they attend to."""
    pixels = x.astype(jnp.float32)
    distance = jnp.square(pixels - jnp.mean(pixels, axis=(1, 2), keepdims=True))
    salient = jnp.sum(layers.adaptive_avg_pool(distance, grid), axis=-1).reshape(len(x), -1)
    queries = jax.lax.top_k(salient, min(_SHOWN, grid[0] * grid[1]))[1]
    chosen = jnp.take_along_axis(reads[:, :, prefix:], queries[:, None, :, None], axis=2)
    found = jnp.mean(chosen @ shares[..., prefix:], axis=1)
    return queries, found.reshape(*found.shape[:2], *grid)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    shape = (config.image_size, config.image_size, config.channels)
    return classification.example(shape=shape, num_classes=config.num_classes, batch_size=batch_size, key=key)


def picture(batch: Batch, outputs: Any) -> "Figure":
    """The first image, beside it what three of its tokens (crosses) attend to."""
    from matplotlib.figure import Figure

    if "attention" not in outputs:
        return classification.picture(batch, outputs)
    x, label, logits = (
        np.asarray(jax.device_get(a)[0], np.float32) for a in (batch["x"], batch["label"], outputs["logits"])
    )
    queries, attention = (np.asarray(jax.device_get(outputs[name])[0]) for name in ("queries", "attention"))
    figure = Figure(figsize=(2.4 * (1 + len(queries)), 2.8), layout="constrained")
    panels = figure.subplots(1, 1 + len(queries))
    shade = ((x - x.min()) / max(float(np.ptp(x)), 1e-12)).squeeze()
    panels[0].imshow(shade, cmap="gray")
    panels[0].set_title(f"class {int(label)}, said {int(logits.argmax())}")
    side = x.shape[0] / attention.shape[1], x.shape[1] / attention.shape[2]
    for axes, query, weights in zip(panels[1:], queries, attention, strict=True):
        row, column = divmod(int(query), weights.shape[1])
        axes.imshow(shade, cmap="gray")
        extent = (-0.5, x.shape[1] - 0.5, x.shape[0] - 0.5, -0.5)
        axes.imshow(weights, extent=extent, cmap="inferno", alpha=0.75)
        axes.plot((column + 0.5) * side[1] - 0.5, (row + 0.5) * side[0] - 0.5, "+", color="cyan", markersize=12)
        axes.set_title(f"{weights.min():.3f} to {weights.max():.3f}")
    for axes in panels:
        axes.set_axis_off()
    return figure


# --- named configurations: the card's, as the paper's numbers of representatives are unknown --------------------------

_TINY = Config(
    image_size=32, patch=4, num_classes=8, widths=(48,), depths=(3,), mlp_ratios=(2.0,), representatives=(8,),
    class_token=False,
)  # fmt: skip
_PYRAMID = {
    "patch": 4, "widths": (64, 128, 320, 512), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 5, 8),
    "mlp_ratios": (8.0, 8.0, 4.0, 4.0), "representatives": (9, 16, 49, 49),
}  # fmt: skip

PAPER = Paper(
    slug="rpattention",
    task=replace(classification.TASK, picture=picture, picture_name="attention.png"),
    model=Model,
    example=example,
    configs={
        "tiny": _TINY,
        "digits": replace(_TINY, image_size=8, patch=2, channels=1, num_classes=10),
        "mnist": replace(_TINY, image_size=28, channels=1, num_classes=10),
        "deit_t": Config(),
        "deit_s": Config(widths=(384,), num_heads=(6,), drop_path_rate=0.1),
        "deit_b": Config(widths=(768,), num_heads=(12,), drop_path_rate=0.5),
        "pvt_t": Config(host="pvt", **_PYRAMID),
        "pvt_v2_b1": Config(host="pvt_v2", **_PYRAMID),
        "swin_t": Config(
            host="swin", patch=4, widths=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24),
            mlp_ratios=(4.0,) * 4, representatives=(9, 16, 49, 0), drop_path_rate=0.1,
        ),
    },
    # The hosts' own numbers with the card's for each layer: d M + M, 3 C^2 + 3 C and 10 C.
    parameter_counts={"tiny": 85_808, "deit_t": 7_112_692, "deit_s": 27_457_204, "deit_b": 107_959_348},
)  # fmt: skip
