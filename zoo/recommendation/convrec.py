"""ConvRec: rethinking convolutional networks for attribute-aware sequential recommendation (arXiv:2605.04723).

Official code: ismll-research/ConvRec@0b76fd3 (no licence). Fidelity: exact.
New: a user's history is read without attention. Strided convolutions in groups of channels shorten it level by level
until one vector is left, in time linear in its length; average poolings of a level's and of the first level's input run
beside every convolution. Items are embedded with their attributes and the calendar of the moment.
Differs: what the official constructor makes and never reads (a table of users, four layers) is left out, unless
`num_users` asks for it; the random replacement of history items, a matter of the official loader, is done by the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import layers
from zoo.blocks import Dropout, Linear
from zoo.blocks.basic import matmul, torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import recommendation
from zoo.tasks.task import Batch
from zoo.weights.table import Row, Table, end_to_end, linear, parameter

_USER_WIDTH = 20  # of the official table of users, which nothing reads


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the defaults are the official ones, with as many heads as the paper's figures suggest."""

    history: int = 35  # L, items of a user that are seen
    num_items: int = 48  # of the catalogue; 0 stands for no item
    num_attributes: int = 2048  # F, numbers an item
    num_contexts: int = 6  # C, numbers a moment; the first three also count as differences in time
    hidden_dim: int = 256  # h, the width of an item
    num_heads: int = 4  # G, groups of channels of a convolution; divides h
    convolutions: tuple[tuple[int, int], ...] = ((2, 2), (5, 5), (7, 7))  # kernel and stride of each level
    dropout_rate: float = 0.1  # of attributes, of the input and of every convolution's output
    corruption_rate: float = 0.01  # history items replaced by random ones while training
    norm_epsilon: float = 1e-6  # added to the standard deviation, outside the root
    num_known_items: int | None = None  # items above share one embedding and keep their attributes; None: all known
    num_users: int | None = None  # carries the official code's unread parameters, for exact round trips

    def __post_init__(self):
        # From a file they come as lists.
        object.__setattr__(self, "convolutions", tuple(map(tuple, self.convolutions)))
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")


class StdNorm(nn.Module):
    """alpha (x - mean) / (std + epsilon) + beta with the standard deviation of a sample (n - 1). Float32 inside."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        alpha = self.param("scale", nn.initializers.ones, x.shape[-1:])
        beta = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / (x.shape[-1] - 1)
        # The root has no slope at 0: a vector of equal entries, as padding may be, would make every gradient NaN.
        std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
        return (alpha * (centred / (std + self.epsilon)) + beta).astype(x.dtype)


class ItemEncoder(nn.Module):
    """An item and its moment in h numbers: W_e [E[item]; W_ac [W_f attributes; W_c context]], without non-linearity."""

    config: Config

    @nn.compact
    def __call__(
        self, items: Int[Array, "B N"], contexts: Float[Array, "B N C"], *, train: bool
    ) -> Float[Array, "B N h"]:
        c = self.config
        known = c.num_items if c.num_known_items is None else c.num_known_items
        rows = 1 + known + (c.num_known_items is not None)
        embedding = self.param("embedding", _zero_first_row, (rows, c.hidden_dim))
        # Attributes belong to the data set, not to the trained weights. Noise stands in until they are given.
        table = self.variable(
            "constants",
            "attribute_table",
            lambda: jax.random.uniform(self.make_rng("params"), (c.num_items + 1, c.num_attributes)),
        ).value

        identity = jnp.where((items > 0)[..., None], embedding[jnp.minimum(items, rows - 1)], 0.0)
        # Before the dropout an item's attributes are the same wherever it occurs: a catalogue smaller than the batch
        # is cheaper to multiply as a whole.
        if c.num_items < items.size:
            attributes, index = table, items
        else:
            attributes, index = table[items.reshape(-1)], jnp.arange(items.size).reshape(items.shape)
        attributes = attributes.astype(contexts.dtype)
        of_attributes, bias = Weights(4 * c.hidden_dim, name="attributes")(c.num_attributes)
        of_context, context_bias = Weights(c.hidden_dim, name="context")(c.num_contexts)
        joint, joint_bias = Weights(4 * c.hidden_dim, name="attributes_context")(5 * c.hidden_dim)
        first, second = joint[: 4 * c.hidden_dim], joint[4 * c.hidden_dim :]
        # Nothing bends in between, so that weights are multiplied with each other before they meet many items.
        if len(attributes) > c.num_attributes:
            said = matmul(attributes, of_attributes @ first)
        else:
            said = matmul(matmul(attributes, of_attributes), first)
        moment = contexts @ (of_context @ second) + (bias @ first + context_bias @ second + joint_bias)
        both = said[index] + moment
        both = Dropout(c.dropout_rate)(both, train=train)
        return Linear(c.hidden_dim, name="item")(jnp.concatenate([identity, both], axis=-1))


def _zero_first_row(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "I h"]:
    return jax.random.normal(key, shape, dtype).at[0].set(0.0)


class Weights(nn.Module):
    """W and b of a linear layer, for products with other weights."""

    features: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "E F"], Float[Array, " F"]]:
        start = torch_uniform(width)
        return self.param("kernel", start, (width, self.features)), self.param("bias", start, (self.features,))


def windows(x: Float[Array, "B L h"], kernel_size: int, stride: int) -> Float[Array, "B K k h"]:
    """Stretches of `kernel_size` positions, `stride` apart."""
    count = (x.shape[1] - kernel_size) // stride + 1
    return jnp.stack([x[:, i : i + (count - 1) * stride + 1 : stride] for i in range(kernel_size)], axis=2)


class MultiHeadConv(nn.Module):
    """A strided convolution within each of `num_heads` groups of channels, then a linear layer across them.

    It takes the windows instead of the sequence: products of windows are what XLA's CPU is fast at, and its partitioner
    aborts on the gradient of a grouped convolution whose channels lie on more devices than there are groups.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B K k h"]) -> Float[Array, "B K h"]:
        *shape, kernel_size, width = x.shape
        each = width // self.num_heads
        start = torch_uniform(each * kernel_size)
        kernel = self.param("kernel", start, (kernel_size, each, width))
        bias = self.param("bias", start, (width,))
        heads = x.reshape(*shape, kernel_size, self.num_heads, each)
        y = jnp.einsum("btkgi,kigo->btgo", heads, kernel.reshape(kernel_size, each, self.num_heads, each))
        return Linear(width, name="out")(y.reshape(*shape, width) + bias)


def left_padding(length: int, kernel_size: int, stride: int) -> int:
    """Zeros in front of `length` positions so that windows of a kernel at a stride end exactly with the last one."""
    return -(length - kernel_size) % stride if length >= kernel_size else kernel_size - length


class PyramidLevel(nn.Module):
    """LN(drop(GELU(conv x)) + w1 pool(x) + w2 pool(r)), and pool(r): r is the pyramid's own input, ever more pooled."""

    config: Config
    kernel_size: int
    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L h"], first: Float[Array, "B L h"], *, train: bool
    ) -> tuple[Float[Array, "B K h"], Float[Array, "B K h"]]:
        c = self.config
        before = left_padding(x.shape[1], self.kernel_size, self.stride)
        x, first = (jnp.pad(a, ((0, 0), (before, 0), (0, 0))) for a in (x, first))
        x, first = (windows(a, self.kernel_size, self.stride) for a in (x, first))
        y = layers.gelu(MultiHeadConv(c.num_heads, name="heads")(x))
        pooled, first = jnp.mean(x, axis=2), jnp.mean(first, axis=2)
        near, far = (self.param(name, nn.initializers.constant(0.5), ()) for name in ("near_weight", "far_weight"))
        y = Dropout(c.dropout_rate)(y, train=train) + near * pooled + far * first
        return StdNorm(c.norm_epsilon, name="norm")(y), first


class Model(nn.Module):
    """Embed the history, compress it to one vector, score candidates by their product with it."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B M"]:
        c = self.config
        items, contexts = batch["items"], batch["contexts"]
        if train and c.corruption_rate > 0:
            items = self._corrupted(items)
        moments = batch["candidate_contexts"]
        both = jnp.concatenate([items, batch["candidates"]], axis=1), jnp.concatenate([contexts, moments], axis=1)
        taken, offered = jnp.split(ItemEncoder(c, name="encoder")(*both, train=train), [c.history], axis=1)
        norm, project = StdNorm(c.norm_epsilon, name="norm"), Linear(c.hidden_dim, name="projection")

        steps = jnp.concatenate([jnp.ones_like(contexts[:, :1, :3]), jnp.diff(contexts[..., :3], axis=1)], axis=1)
        x = layers.gelu(jnp.concatenate([taken, steps], axis=-1))
        x = layers.gelu(project(norm(Dropout(c.dropout_rate)(x, train=train))))
        x = first = jnp.where((items > 0)[..., None], x, 0.0)
        for i, (kernel_size, stride) in enumerate(c.convolutions):
            x, first = PyramidLevel(c, kernel_size, stride, name=f"levels_{i}")(x, first, train=train)
        profile = jnp.mean(x, axis=1)

        y = layers.gelu(jnp.concatenate([offered, moments[..., :3] - contexts[:, -1:, :3]], axis=-1))
        y = layers.gelu(project(norm(y)))
        if c.num_users is not None:
            self._unread()
        return jnp.einsum("bmh,bh->bm", y, profile)

    def _corrupted(self, items: Int[Array, "B L"]) -> Int[Array, "B L"]:
        where, what = jax.random.split(self.make_rng("dropout"))
        random = jax.random.randint(what, items.shape, 1, self.config.num_items + 1, items.dtype)
        chosen = jax.random.bernoulli(where, self.config.corruption_rate, items.shape)
        return jnp.where(chosen & (items > 0), random, items)

    def _unread(self) -> None:
        c = self.config
        Unread({"user_table": (c.num_users + 1, _USER_WIDTH)}, name="users")()
        layers_of = {"attributes_out": (4 * c.hidden_dim, c.hidden_dim), "user": (_USER_WIDTH, c.hidden_dim)}
        for name, shape in (layers_of | {"time": (c.hidden_dim, 1)}).items():
            Unread({"kernel": shape, "bias": shape[1:]}, name=name)()
        for i in range(len(c.convolutions)):
            Unread({"scale": (c.hidden_dim,), "bias": (c.hidden_dim,)}, name=f"norm_{i}")()


class Unread(nn.Module):
    """A layer that the official constructor makes and nothing reads: variables of these names and shapes."""

    shapes: Mapping[str, tuple[int, ...]]

    @nn.compact
    def __call__(self) -> None:
        for name, shape in self.shapes.items():
            self.variable("unread", name, jnp.zeros, tuple(shape))


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return recommendation.example(
        history=config.history,
        num_items=config.num_items,
        num_contexts=config.num_contexts,
        batch_size=batch_size,
        key=key,
    )


def constants(config: Config, data: Any) -> dict[str, Any]:
    """The attributes of the data set's items."""
    return {"encoder": {"attribute_table": data.attributes}}


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "sequence_len": "history",
    "num_items": "num_items",
    "num_users": "num_users",
    "ifeature_dim": "num_attributes",
    "icontext_dim": "num_contexts",
    "hidden_dim": "hidden_dim",
    "num_known_item": "num_known_items",
    "dropout_prob": "dropout_rate",
    "num_conv_heads": "num_heads",
    "conv_params": "convolutions",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {"num_heads": 1} | {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    if "convolutions" in ours:
        ours["convolutions"] = tuple((int(kernel), int(stride)) for kernel, stride in ours["convolutions"])
    return Config(**ours)


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    return {**named, "conv_params": [list(pair) for pair in config.convolutions], "random_seed": 0}


def _std_norm(official: str, ours: str) -> Table:
    yield from parameter(f"{official}.alpha", f"{ours}/scale")
    yield from parameter(f"{official}.beta", f"{ours}/bias")


def official_table(config: Config) -> Table:
    yield from parameter("item_encoder.ifeature_cache.weight", "encoder/attribute_table", collection="constants")
    yield from parameter("item_encoder.token_embedding.weight", "encoder/embedding")
    names = {"features": "attributes", "cxt": "context", "ac": "attributes_context", "item": "item"}
    for theirs, ours in names.items():
        yield from linear(f"item_encoder.{theirs}_encoder", f"encoder/{ours}")
    yield from _std_norm("item_layernorm", "norm")
    yield from linear("in_lin", "projection")
    heads, stack = config.num_heads, "stacked_multihead_conv"
    for i in range(len(config.convolutions)):
        convs = [f"{stack}.conv_layers.{i}.convs.{g}" for g in range(heads)]
        ours = f"levels_{i}/heads"
        yield Row(tuple(f"{c}.weight" for c in convs), (f"params/{ours}/kernel",), end_to_end(heads, 2, 1, 0, axis=-1))
        yield Row(tuple(f"{c}.bias" for c in convs), (f"params/{ours}/bias",), end_to_end(heads, 0))
        yield from linear(f"{stack}.conv_layers.{i}.out_linear", f"levels_{i}/heads/out")
        yield from _std_norm(f"{stack}.layer_norms.{i}", f"levels_{i}/norm")
        yield from parameter(f"{stack}.Res_weights1.{i}", f"levels_{i}/near_weight")
        yield from parameter(f"{stack}.Res_weights2.{i}", f"levels_{i}/far_weight")
    if config.num_users is not None:
        yield from _unread_table(config)


def _unread_table(config: Config) -> Table:
    yield from parameter("item_encoder.user_embedding.weight", "users/user_table", collection="unread")
    rows = [
        *linear("item_encoder.features_encoder_out", "attributes_out"),
        *linear("cxt_layer", "user"),
        *linear("time_linear", "time"),
    ]
    for i in range(len(config.convolutions)):
        rows += _std_norm(f"stacked_multihead_conv.layer_norms_out.{i}", f"norm_{i}")
    for row in rows:
        yield replace(row, ours=(row.ours[0].replace("params", "unread", 1),))


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    batch = {
        "items": jnp.asarray(inputs["profile_tokens"]),
        "contexts": inputs["profile_icontexts"],
        "candidates": jnp.asarray(inputs["extract_tokens"]),
        "candidate_contexts": inputs["extract_icontexts"],
    }
    return {"logits": model.apply(jax.tree.map(jnp.asarray, variables), batch)}


PAPER = Paper(
    slug="convrec",
    task=recommendation.TASK,
    model=Model,
    example=example,
    constants=constants,
    configs={
        # The stand-in's order is learnt where the pyramid ends in one position: a mean over two blurs it.
        "tiny": Config(
            history=16,
            num_attributes=12,
            hidden_dim=32,
            convolutions=((2, 2), (4, 4), (2, 2)),
            dropout_rate=0.0,
            corruption_rate=0.0,
        ),
        # Of the paper's four sets only this one's sizes are stated; the published code has no settings of its runs.
        "fashion": Config(num_items=166_270),
        "beauty": Config(history=50, num_items=12_101, num_attributes=637),
        "movielens100k": Config(history=50, num_items=1_682, num_attributes=19, hidden_dim=64),
    },
    officials=(
        Official(
            module="models/convrec.py:ConvRec",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    quirks=(
        "positions without an item are zeroed once; norms and poolings make them non-zero again in deeper levels",
        "the time step of the first item is its distance from the zero context of the padding before it",
        "padding zeros count in the average poolings",
    ),
)
