"""GelGT: Gaussian relational graph transformer for relational databases (USTC, arXiv:2605.15575).

Official code: USTC-DataDarknessLab/GelGT@1997b2c (no licence). Fidelity: exact.
New: of many sampled rows only those most similar to the seed row are kept, by a learned similarity; attention among
them is biased by a learned mixture of Gaussians of the time between two rows, a curve for each head.
Differs: places without a row (`token_mask`) take no part, where the official code takes them for copies of the seed and
prefers them; attention dropout is off in evaluation; the random features of the structural encoding, officially anew in
every evaluation, are then a function of the row, so that results repeat. The codebook that the official code holds and
never reads lies in the collection `unused` (`codebook`), and so do stored constants.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.blocks import ActivationDropout, BatchNorm, Dropout, Linear
from zoo.paper import Official, Paper
from zoo.tasks import row_prediction
from zoo.tasks.task import Batch
from zoo.weights.table import Table, batch_norm, constant, layer_norm, linear, parameter

_FIELDS = 7  # of a time: year, month, day, weekday, hour, minute, second, all from 0 but the year
_PERIODS = (12, 31, 7, 24, 60, 60)
_HARMONICS = 4


@dataclass(frozen=True)
class Columns:
    """A table: how many rows it has, and how many columns of each kind."""

    name: str  # of the table
    rows: int  # how many it has
    numerical: int = 0  # how many columns of numbers
    categorical: tuple[int, ...] = ()  # for each column, how many values there are
    timestamp: int = 0  # how many columns of moments
    embedding: tuple[int, ...] = ()  # for each column, how many numbers a cell has

    def __post_init__(self):
        if not self.count:
            raise ValueError(f"table {self.name} has no columns")

    @property
    def count(self) -> int:
        return self.numerical + len(self.categorical) + self.timestamp + len(self.embedding)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of its cells, in the order in which they are read."""
        there = {"numerical": self.numerical, "categorical": len(self.categorical), "timestamp": self.timestamp}
        return *(kind for kind, count in there.items() if count), *(
            f"embedding_{i}" for i in range(len(self.embedding))
        )


@dataclass(frozen=True)
class Config:
    """Sizes and constants; times are in days."""

    tables: tuple[Columns, ...]  # the columns of each table of the database
    num_tokens: int = 800  # K, rows sampled around a seed; what the data holds
    num_kept: int = 300  # K', of which so many are kept
    d_model: int = 512  # D, of a row throughout
    num_outputs: int = 1  # C, numbers predicted of a row
    num_heads: int = 4  # H; also R, the number of Gaussians
    num_layers: int = 1  # n, attention layers
    gnn_layers: int = 3  # of the branch along links
    gin_layers: int = 4  # of the structural encoding
    table_width: int = 128  # of a column, and inside the encoder of a table
    table_layers: int = 4  # residual blocks of that encoder
    max_hop: int = 3  # links that a sampled row may lie away from the seed
    max_lag: float = 30.0  # T_max, the largest centre of a Gaussian at the start
    width_start: float = 10.0  # sigma of every Gaussian at the start
    lag_bias: bool = True  # False: attention knows no time, to compare with
    dropout_rate: float = 0.1  # of feed-forward layers, of attention's output and of the branch along links
    attention_dropout_rate: float = 0.1  # of attention weights
    table_dropout_rate: float = 0.2  # inside the encoder of a table
    edge_dropout_rate: float = 0.2  # of links, in the branch along them
    strict_past: bool = True  # sample rows dated before the moment of prediction; False: at that moment too, officially
    codebook: tuple[int, int, int] | None = None  # nodes, centroids and width of what is never read
    kernel_epsilon: float = 1e-5  # added to |sigma|
    column_epsilon: float = 1e-6  # added to a numerical column's standard deviation
    norm_epsilon: float = 1e-5  # of layer and batch norms, added to the variance under the root

    def __post_init__(self):
        if self.d_model % (4 * self.num_heads) or self.d_model // 4 < 1:
            raise ValueError(f"d_model {self.d_model} is not a multiple of 4 and of num_heads {self.num_heads}")


def _norm(c: Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.norm_epsilon, name=name)


_XAVIER = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.zeros}


# --- what a row says -------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """drop(ReLU(LN(W_2 drop(ReLU(LN(W_1 x)))))) + x, or + W x where the widths differ."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "T F"], *, train: bool) -> Float[Array, "T W"]:
        c, hidden = self.config, x
        for i in (1, 2):
            hidden = jax.nn.relu(_norm(c, f"norm{i}")(Linear(c.table_width, name=f"fc{i}")(hidden)))
            hidden = Dropout(c.table_dropout_rate)(hidden, train=train)
        return hidden + (x if x.shape[-1] == c.table_width else Linear(c.table_width, name="shortcut")(x))


class TableEncoder(nn.Module):
    """Cells to vectors of one width, side by side, through residual blocks: one vector a row of this table.

    `cells` has numerical (T, n), categorical (T, c) with -1 for missing, timestamp (T, t, 7) with -1 for missing and
    embedding_0, embedding_1 ... (T, E).
    """

    config: Config
    columns: Columns

    @nn.compact
    def __call__(self, cells: Mapping[str, Array], *, train: bool) -> Float[Array, "T D"]:
        c, columns, width = self.config, self.columns, self.config.table_width
        start, parts = nn.initializers.normal(0.01), []
        if columns.numerical:
            mean = self.variable("constants", "mean", jnp.zeros, (columns.numerical,)).value
            std = self.variable("constants", "std", jnp.ones, (columns.numerical,)).value
            known = jnp.nan_to_num(cells["numerical"], nan=0.0, posinf=1e6, neginf=-1e6)
            scaled = (known - mean) / (std + c.column_epsilon)
            kernel = self.param("numerical_table", start, (columns.numerical, width))
            parts.append(scaled[..., None] * kernel + self.param("numerical_bias_table", start, kernel.shape))
        if columns.categorical:
            before = np.cumsum((1, *columns.categorical))
            table = self.param("categorical_table", start, (int(before[-1]), width))
            codes = cells["categorical"]
            parts.append(jnp.asarray(table)[jnp.where(codes < 0, 0, codes + before[:-1])])
        if columns.timestamp:
            first_year = self.variable("constants", "first_year", jnp.zeros, (columns.timestamp,), jnp.int32).value
            median = self.variable(
                "constants", "median_table", jnp.zeros, (columns.timestamp, _FIELDS), jnp.int32
            ).value
            times = cells["timestamp"]
            times = jnp.where(jnp.any(times < 0, axis=-1, keepdims=True), median, times).astype(jnp.float32)
            frequencies = 10000.0 ** (-jnp.arange(_HARMONICS) / _HARMONICS)
            self.variable("unused", "frequencies", lambda: frequencies)  # as stored, a rounding apart
            years = layers.sinusoidal_encoding(times[..., 0] - first_year, dim=2 * _HARMONICS, interleaved=False)
            phases = times[..., 1:] / jnp.array(_PERIODS, jnp.float32)
            turns = layers.cyclic_encoding(phases, num_harmonics=_HARMONICS, sine_turns=0.5)
            code = jnp.concatenate([years[..., None, :], turns], axis=-2)
            kernel = self.param("timestamp_table", start, (columns.timestamp, _FIELDS, 2 * _HARMONICS, width))
            bias = self.param("timestamp_bias_table", start, (columns.timestamp, width))
            parts.append(jnp.einsum("tcfe,cfew->tcw", code.astype(kernel.dtype), kernel) + bias)
        if columns.embedding:
            bias = self.param("embedding_bias_table", start, (len(columns.embedding), width))
            read = [
                cells[f"embedding_{i}"] @ self.param(f"embedding_table_{i}", start, (size, width))
                for i, size in enumerate(columns.embedding)
            ]
            parts.append(jnp.stack(read, axis=1) + bias)
        x = jnp.concatenate(parts, axis=1)
        x = x.reshape(x.shape[0], -1)
        for i in range(c.table_layers):
            x = ResidualBlock(c, name=f"blocks_{i}")(x, train=train)
        return Linear(c.d_model, name="out")(jax.nn.relu(_norm(c, "norm")(x)))


class RowEncoder(nn.Module):
    """Of every token what its row says. Where a table has fewer rows than there are tokens, all rows are encoded."""

    config: Config

    def _noise(self, columns: Columns, kind: str) -> Array:
        """In the place of a table's cells of this kind."""
        key, rows = self.make_rng("params"), columns.rows
        if kind == "numerical":
            return jax.random.normal(key, (rows, columns.numerical))
        if kind == "categorical":
            return jax.random.randint(key, (rows, len(columns.categorical)), -1, jnp.array(columns.categorical))
        if kind == "timestamp":
            return jax.random.randint(key, (rows, columns.timestamp, _FIELDS), 0, 7)
        return jax.random.normal(key, (rows, columns.embedding[int(kind.removeprefix("embedding_"))]))

    @nn.compact
    def __call__(self, table: Int[Array, "B K"], row: Int[Array, "B K"], *, train: bool) -> Float[Array, "B K D"]:
        result = 0.0
        for number, columns in enumerate(self.config.tables):
            encoder = TableEncoder(self.config, columns, name=f"tables_{number}")
            cells = {
                kind: self.variable("constants", f"table_{number}_{kind}", partial(self._noise, columns, kind)).value
                for kind in columns.kinds
            }
            if columns.rows <= row.size:
                said = encoder(cells, train=train)[jnp.minimum(row, columns.rows - 1)]
            else:
                chosen = jnp.minimum(row, columns.rows - 1).ravel()
                said = encoder({k: v[chosen] for k, v in cells.items()}, train=train).reshape(*row.shape, -1)
            result = jnp.where((table == number)[..., None], said, result)
        return result


# --- how rows are linked ---------------------------------------------------------------------------------------------


def _aggregate(
    x: Float[Array, "B K D"], edges: Int[Array, "B E 2"], mask: Bool[Array, "B E"], reduction: str
) -> Float[Array, "B K D"]:
    """The sum or mean of what comes along the links that are there."""
    flat = (edges + x.shape[1] * jnp.arange(x.shape[0])[:, None, None]).reshape(-1, 2)
    nodes = x.reshape(-1, x.shape[-1])
    sent = layers.graph_aggregate(nodes, flat[:, 0], flat[:, 1], reduction=reduction, edge_mask=mask.ravel())
    return sent.reshape(x.shape)


class StructureEncoder(nn.Module):
    """Random numbers that flow along the links: z = z + ReLU(BN(MLP((1 + eps) z + sum_j z_j))), several times."""

    config: Config

    @nn.compact
    def __call__(
        self, noise: Float[Array, "B K 1"], edges: Int[Array, "B E 2"], mask: Bool[Array, "B E"], *, train: bool
    ) -> Float[Array, "B K D"]:
        c = self.config
        width, bn = c.d_model // 4, partial(BatchNorm, c.norm_epsilon)
        z = Linear(width, **_XAVIER, name="input")(noise)
        for i in range(c.gin_layers):
            own = 1 + self.param(f"epsilon_{i}", nn.initializers.zeros, (1,))
            hidden = Linear(2 * width, name=f"fc1_{i}")(own * z + _aggregate(z, edges, mask, "sum"))
            hidden = jax.nn.relu(bn(name=f"hidden_norm_{i}")(hidden, train=train))
            z = z + jax.nn.relu(bn(name=f"norm_{i}")(Linear(width, name=f"fc2_{i}")(hidden), train=train))
        return Linear(c.d_model, **_XAVIER, name="out")(z)


class LinkBranch(nn.Module):
    """x = x + drop(GELU(LN(W_l mean_j x_j + b + W_r x))), several times; in training links are dropped."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B K D"], edges: Int[Array, "B E 2"], mask: Bool[Array, "B E"], *, train: bool
    ) -> Float[Array, "B K D"]:
        c, width = self.config, x.shape[-1]
        for i in range(c.gnn_layers):
            there = mask
            if train and c.edge_dropout_rate > 0:
                there = mask & (jax.random.uniform(self.make_rng("dropout"), mask.shape) >= c.edge_dropout_rate)
            mean = _aggregate(x, edges, there, "mean")
            mixed = Linear(width, name=f"neighbours_{i}")(mean) + Linear(width, use_bias=False, name=f"self_{i}")(x)
            x = x + Dropout(c.dropout_rate)(layers.gelu(_norm(c, f"norm_{i}")(mixed)), train=train)
        return x


# --- what is kept, and attention among it ----------------------------------------------------------------------------


def keep_similar(
    x: Float[Array, "B K D"], hop: Int[Array, "B K"], present: Bool[Array, "B K"], num_kept: int
) -> Int[Array, "B _"]:
    """Which tokens are kept, ascending: seed and neighbours first, then two links away by <x_j, x_0>; absent last."""
    similar = jnp.einsum("bkd,bd->bk", x, x[:, 0]).astype(jnp.float32)
    similar = similar + jnp.where((hop == 0) | (hop == 1), 1e9, jnp.where(hop == 2, 0.0, -1e9))
    similar = jnp.where(present, jax.lax.stop_gradient(similar), -jnp.inf)
    return jnp.sort(jax.lax.top_k(similar, min(num_kept, x.shape[1]))[1], axis=-1)


def induced(
    edges: Int[Array, "B E 2"], mask: Bool[Array, "B E"], kept: Int[Array, "B L"], num_tokens: int
) -> tuple[Int[Array, "B E 2"], Bool[Array, "B E"]]:
    """The links among the kept tokens, which they number anew."""

    def one(edges, mask, kept):
        place = jnp.full(num_tokens, -1).at[kept].set(jnp.arange(kept.shape[0]))[edges]
        return jnp.maximum(place, 0), mask & jnp.all(place >= 0, axis=-1)

    return jax.vmap(one)(edges, mask, kept)


class FeedForward(nn.Module):
    """BN(drop(W_2 drop(GELU(W_1 BN(x))))), hidden width 2 D."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B K D"], *, train: bool) -> Float[Array, "B K D"]:
        c, bn = self.config, partial(BatchNorm, self.config.norm_epsilon)
        hidden = Linear(2 * x.shape[-1], name="fc1")(bn(name="norm_in")(x, train=train))
        hidden = Linear(x.shape[-1], name="fc2")(ActivationDropout("gelu", c.dropout_rate)(hidden, train=train))
        return bn(name="norm_out")(Dropout(c.dropout_rate)(hidden, train=train), train=train)


class AttentionLayer(nn.Module):
    """x = x + drop(W_o Attn(LN(x))); x = x + FFN(LN(x)), the logits biased by head and pair."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B K D"],
        bias: Float[Array, "B H K K"] | None,
        present: Bool[Array, "B K"],
        *,
        train: bool,
    ) -> Float[Array, "B K D"]:
        c, normed = self.config, _norm(self.config, "attention_norm")(x)
        query, key, value = (
            Linear(x.shape[-1], **_XAVIER, name=name)(normed).reshape(*x.shape[:2], c.num_heads, -1)
            for name in ("query", "key", "value")
        )
        rate = c.attention_dropout_rate if train else 0.0
        mixed = layers.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=present[:, None, None, :],
            **({"dropout_rate": rate, "dropout_key": self.make_rng("dropout")} if rate else {}),
        )
        mixed = Linear(x.shape[-1], **_XAVIER, name="out")(mixed.reshape(x.shape))
        x = x + Dropout(c.dropout_rate)(mixed, train=train)
        return x + FeedForward(c, name="ffn")(_norm(c, "ffn_norm")(x), train=train)


class LocalModule(nn.Module):
    """Attention among tokens, biased by the time between them; then the seed's reading of all others."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B K D"], lag: Float[Array, "B K"], present: Bool[Array, "B K"], *, train: bool
    ) -> tuple[Float[Array, "B D"], Float[Array, "B K D"]]:
        c, count = self.config, self.config.num_heads
        x = Linear(x.shape[-1], name="embedding")(x)
        centers = self.param("centers", lambda *_: jnp.linspace(0.0, c.max_lag, count))
        widths = self.param("widths", nn.initializers.constant(c.width_start), (count,))
        to_heads = Linear(count, name="to_heads")
        bias = None
        if c.lag_bias or self.is_initializing():
            distance = jnp.abs(lag[:, :, None] - lag[:, None])
            gaussians = layers.radial_basis(distance, centers, widths, epsilon=c.kernel_epsilon)
            bias = jnp.moveaxis(to_heads(gaussians), -1, 1)
            self.sow("intermediates", "bias", bias)
        for i in range(c.num_layers):
            x = AttentionLayer(c, name=f"layers_{i}")(x, bias if c.lag_bias else None, present, train=train)
        x = _norm(c, "norm")(x)
        pairs = jnp.concatenate([jnp.broadcast_to(x[:, :1], x[:, 1:].shape), x[:, 1:]], axis=-1)
        scores = Linear(1, name="readout")(pairs)[..., 0]
        read = layers.dense_graph_readout(x[:, 1:], reduction="attention", scores=scores, node_mask=present[:, 1:])
        return x[:, 0] + read, x


class TimeEncoding(nn.Module):
    """W [sin(t f_k), cos(t f_k)] + b; a learned vector for what lies in the future."""

    config: Config

    @nn.compact
    def __call__(self, lag: Float[Array, "B K"]) -> Float[Array, "B K D"]:
        width = self.config.d_model
        code = layers.sinusoidal_encoding(lag, dim=width, interleaved=False, shift=1.0).astype(lag.dtype)
        frequencies = 1e-4 ** (jnp.arange(width // 2) / (width / 2 - 1))
        self.variable("unused", "frequencies", lambda: frequencies)  # as stored, a rounding apart
        unknown = self.param("unknown", nn.initializers.normal(0.02), (width,))
        return jnp.where((lag < 0)[..., None], unknown, Linear(width, name="out")(code))


def row_noise(table: Int[Array, "B K"], row: Int[Array, "B K"]) -> Float[Array, "B K"]:
    """A normal number for every row, always the same one."""

    def one(table, row):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), table), row))

    return jax.vmap(jax.vmap(one))(table, row)


class Model(nn.Module):
    """Embed the tokens, keep those like the seed, read them by attention and along the links, predict."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B C"]:
        """`batch` may have `noise` (B, K) for the structural encoding."""
        c, edges, linked = self.config, batch["edges"], batch["edge_mask"]
        table, lag, present = batch["table"], batch["lag"], batch["token_mask"]
        noise = batch.get("noise")
        if noise is None and train:
            noise = jax.random.normal(self.make_rng("dropout"), lag.shape, lag.dtype)
        elif noise is None:
            noise = row_noise(table, batch["row"]).astype(lag.dtype)
        parts = {
            "table": nn.Embed(len(c.tables) + 1, c.d_model, name="table")(table),
            "hop": nn.Embed(c.max_hop + 2, c.d_model, name="hop")(batch["hop"] + 1),
            "time": TimeEncoding(c, name="time")(lag),
            "rows": RowEncoder(c, name="rows")(table, batch["row"], train=train),
            "structure": StructureEncoder(c, name="structure")(noise[..., None], edges, linked, train=train),
        }
        x = jnp.concatenate([_norm(c, f"{name}_norm")(part) for name, part in parts.items()], axis=-1)
        x = Linear(c.d_model, name="mix_out")(jax.nn.relu(Linear(2 * c.d_model, name="mix_in")(x)))

        kept = keep_similar(x, batch["hop"], present, c.num_kept)
        edges, linked = induced(edges, linked, kept, x.shape[1])
        x = jnp.take_along_axis(x, kept[..., None], axis=1)
        lag, present = (jnp.take_along_axis(a, kept, axis=1) for a in (lag, present))
        self.sow("intermediates", "kept", (kept, edges, linked))

        local, _ = LocalModule(c, name="local")(x, lag, present, train=train)
        links = LinkBranch(c, name="links")(x, edges, linked, train=train)[:, 0]
        weight = jax.nn.sigmoid(self.param("link_weight", nn.initializers.constant(0.2), ()))
        fused = weight * _norm(c, "links_norm")(links) + (1 - weight) * _norm(c, "local_norm")(local)
        hidden = BatchNorm(c.norm_epsilon, name="head_norm")(Linear(c.d_model, name="head_in")(fused), train=train)
        for name, shape in _unread(c).items():
            counts = name.endswith(("c_idx", "num_batches_tracked"))
            self.variable("unused", f"codebook_{name}", jnp.zeros, shape, jnp.int32 if counts else jnp.float32)
        return Linear(c.num_outputs, name="head_out")(jax.nn.relu(hidden))


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    rows = tuple(columns.rows for columns in config.tables)
    return row_prediction.example(rows=rows, num_tokens=config.num_tokens, batch_size=batch_size, key=key)


def constants(config: Config, data: Any) -> dict[str, Any]:
    """What the rows of the data's tables say, and the statistics of their columns."""
    found: dict[str, Any] = {}
    for number, (cells, statistics) in enumerate(data.tables):
        found |= {f"table_{number}_{kind}": values for kind, values in cells.items()}
        if statistics:
            found[f"tables_{number}"] = statistics
    return {"rows": found}


# --- the official code -----------------------------------------------------------------------------------------------

_HPARAMS = {
    "sample_node_len": "num_kept",
    "channels": "d_model",
    "out_channels": "num_outputs",
    "heads": "num_heads",
    "local_num_layers": "num_layers",
    "max_neighbor_hop": "max_hop",
    "max_time_days": "max_lag",
    "ff_dropout": "dropout_rate",
    "attn_dropout": "attention_dropout_rate",
    "edge_dropout": "edge_dropout_rate",
}
_REAL = ("max_lag", "dropout_rate", "attention_dropout_rate", "edge_dropout_rate")
_TABLE_HPARAMS = {"channels": "table_width", "num_layers": "table_layers"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    given = hparams["ctor"]
    if given.get("conv_type", "full") != "full" or given.get("gnn_pe_dim", 0):
        raise ValueError("only conv_type full and gnn_pe_dim 0 are supported: the official code runs no other")
    ours = {ours: given[theirs] for theirs, ours in _HPARAMS.items() if theirs in given}
    ours |= {name: float(ours[name]) for name in _REAL if name in ours}
    table_sizes = hparams.get("torch_frame_model_kwargs", {})
    ours |= {ours: table_sizes[theirs] for theirs, ours in _TABLE_HPARAMS.items() if theirs in table_sizes}
    order = sorted(given["node_type_map"], key=given["node_type_map"].__getitem__)
    tables = tuple(_columns_from_official(name, hparams["tables"][name]) for name in order)
    codebook = (given["num_nodes"], given["num_centroids"], given["global_dim"])
    return Config(tables=tables, codebook=codebook, num_tokens=2 * ours["num_kept"], **ours)


def _columns_from_official(name: str, kinds: Mapping[str, Any]) -> Columns:
    return Columns(
        name,
        rows=1,
        numerical=len(kinds.get("numerical", ())),
        categorical=tuple(column["n"] for column in kinds.get("categorical", ())),
        timestamp=len(kinds.get("timestamp", ())),
        embedding=tuple(column["dim"] for column in kinds.get("embedding", ())),
    )


def config_to_official(config: Config) -> dict[str, Any]:
    def columns(found: Columns) -> dict[str, Any]:
        kinds = {
            "numerical": [{"name": f"n{i}", "mean": 0.0, "std": 1.0} for i in range(found.numerical)],
            "categorical": [{"name": f"c{i}", "n": n} for i, n in enumerate(found.categorical)],
            "timestamp": [{"name": f"t{i}", "year_range": [0, 0]} for i in range(found.timestamp)],
            "embedding": [{"name": f"e{i}", "dim": n} for i, n in enumerate(found.embedding)],
        }
        return {kind: list_ for kind, list_ in kinds.items() if list_}

    nodes, centroids, width = config.codebook or (0, 0, 0)
    return {
        "tables": {found.name: columns(found) for found in config.tables},
        "torch_frame_model_kwargs": {theirs: getattr(config, ours) for theirs, ours in _TABLE_HPARAMS.items()},
        "ctor": {
            **{theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()},
            "node_type_map": {found.name: i for i, found in enumerate(config.tables)},
            "conv_type": "full",
            "ablate": "none",
            "gnn_pe_dim": 0,
            "num_nodes": nodes,
            "num_centroids": centroids,
            "global_dim": width,
        },
    }


def _unread(config: Config) -> dict[str, tuple[int, ...]]:
    """Tensors of the official model that nothing reads, by their names there."""
    if config.codebook is None:
        return {}
    (nodes, centroids, g), d = config.codebook, config.d_model

    def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def running(name: str, n: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.running_mean": (n,), f"{name}.running_var": (n,), f"{name}.num_batches_tracked": ()}

    vq, conv = "convs.0.vq", "convs.0"
    return {
        f"{conv}.c_idx": (nodes,),
        **{f"{vq}.{name}": (centroids, g) for name in ("_embedding", "_embedding_output", "_ema_w")},
        f"{vq}._ema_cluster_size": (centroids,),
        **running(f"{vq}.bn", g),
        **affine(f"{conv}.lin_proj_g", g, d),
        **{k: v for name in ("key", "query", "value") for k, v in affine(f"{conv}.lin_{name}_g", d, g).items()},
        **affine(f"{conv}.layer_norm_global", d),
        **affine("ffs.0.0", 2 * d),
        **running("ffs.0.0", 2 * d),
        **affine("ffs.0.1", 2 * d, 2 * d),
        **affine("ffs.0.4", d, 2 * d),
        **affine("ffs.0.6", d),
        **running("ffs.0.6", d),
    }


def _local_table(config: Config, theirs: str, ours: str) -> Table:
    yield from parameter(f"{theirs}kernel_mu", f"{ours}centers")
    yield from parameter(f"{theirs}kernel_sigma", f"{ours}widths")
    yield from linear(f"{theirs}kernel_proj", f"{ours}to_heads")
    yield from linear(f"{theirs}att_embeddings_nope", f"{ours}embedding")
    for i in range(config.num_layers):
        layer, own = f"{theirs}layers.{i}", f"{ours}layers_{i}"
        yield from layer_norm(f"{layer}.self_attention_norm", f"{own}/attention_norm")
        for name, their_name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
            yield from linear(f"{layer}.{their_name}_proj", f"{own}/{name}")
        yield from layer_norm(f"{layer}.ffn_norm", f"{own}/ffn_norm")
        yield from batch_norm(f"{layer}.ffn.bn_in", f"{own}/ffn/norm_in")
        yield from batch_norm(f"{layer}.ffn.bn_out", f"{own}/ffn/norm_out")
        yield from linear(f"{layer}.ffn.ffn_net.0", f"{own}/ffn/fc1")
        yield from linear(f"{layer}.ffn.ffn_net.3", f"{own}/ffn/fc2")
    yield from layer_norm(f"{theirs}final_ln", f"{ours}norm")
    yield from linear(f"{theirs}attn_layer", f"{ours}readout")


def _rows_table(config: Config) -> Table:
    for number, columns in enumerate(config.tables):
        theirs, ours = f"tfs_encoder.encoders.{columns.name}", f"rows/tables_{number}"
        encoders = f"{theirs}.encoder.encoder_dict"
        if columns.numerical:
            yield from parameter(f"{encoders}.numerical.weight", f"{ours}/numerical_table")
            yield from parameter(f"{encoders}.numerical.bias", f"{ours}/numerical_bias_table")
            for name in ("mean", "std"):
                yield from parameter(f"{encoders}.numerical.{name}", f"{ours}/{name}", collection="constants")
        if columns.categorical:
            offsets = np.cumsum((0, *columns.categorical))[:-1]
            yield from constant(f"{encoders}.categorical.offset", offsets)
            yield from parameter(f"{encoders}.categorical.emb.weight", f"{ours}/categorical_table")
        if columns.timestamp:
            at = f"{encoders}.timestamp"
            yield from parameter(f"{at}.weight", f"{ours}/timestamp_table")
            yield from parameter(f"{at}.bias", f"{ours}/timestamp_bias_table")
            yield from parameter(f"{at}.fill_values", f"{ours}/median_table", collection="constants")
            yield from parameter(f"{at}.min_year", f"{ours}/first_year", collection="constants")
            yield from constant(f"{at}.max_values", np.array(_PERIODS))
            yield from parameter(f"{at}.positional_encoding.mult_term", f"{ours}/frequencies", collection="unused")
            yield from constant(f"{at}.cyclic_encoding.mult_term", np.arange(1, _HARMONICS + 1))
        if columns.embedding:
            yield from parameter(f"{encoders}.embedding.biases", f"{ours}/embedding_bias_table")
            for i in range(len(columns.embedding)):
                yield from parameter(f"{encoders}.embedding.weight_list.{i}", f"{ours}/embedding_table_{i}")
        for i in range(config.table_layers):
            block, own = f"{theirs}.backbone.{i}", f"{ours}/blocks_{i}"
            for k in (1, 2):
                yield from linear(f"{block}.lin{k}", f"{own}/fc{k}")
                yield from layer_norm(f"{block}.norm{k}", f"{own}/norm{k}")
            if i == 0 and columns.count > 1:
                yield from linear(f"{block}.shortcut", f"{own}/shortcut")
        yield from layer_norm(f"{theirs}.decoder.0", f"{ours}/norm")
        yield from linear(f"{theirs}.decoder.2", f"{ours}/out")


def official_table(config: Config) -> Table:
    yield from parameter("weight", "link_weight")
    yield from parameter("type_encoder.embedding.weight", "table/embedding")
    yield from parameter("hop_encoder.embedding.weight", "hop/embedding")
    yield from parameter("time_encoder.mask_vector", "time/unknown")
    yield from linear("time_encoder.linear", "time/out")
    yield from parameter("time_encoder.pos_encoder.frequency", "time/frequencies", collection="unused")
    yield from _rows_table(config)
    yield from linear("pe_encoder.input_proj", "structure/input")
    for i in range(config.gin_layers):
        theirs, ours = f"pe_encoder.conv.{i}", "structure"
        yield from parameter(f"{theirs}.eps", f"{ours}/epsilon_{i}")
        yield from linear(f"{theirs}.nn.0", f"{ours}/fc1_{i}")
        yield from batch_norm(f"{theirs}.nn.1", f"{ours}/hidden_norm_{i}")
        yield from linear(f"{theirs}.nn.3", f"{ours}/fc2_{i}")
        yield from batch_norm(f"pe_encoder.bns.{i}", f"{ours}/norm_{i}")
    yield from linear("pe_encoder.final_transform", "structure/out")
    for theirs, ours in (("type", "table"), ("hop", "hop"), ("time", "time"), ("tfs", "rows"), ("pe", "structure")):
        yield from layer_norm(f"layer_norm_{theirs}", f"{ours}_norm")
    yield from linear("in_mixture.0", "mix_in")
    yield from linear("in_mixture.2", "mix_out")
    yield from _local_table(config, "convs.0.local_module.", "local/")
    yield from layer_norm("convs.0.layer_norm_local", "local_norm")
    for i in range(config.gnn_layers):
        yield from linear(f"convs.0.gnn_module.convs.{i}.lin_l", f"links/neighbours_{i}")
        yield from linear(f"convs.0.gnn_module.convs.{i}.lin_r", f"links/self_{i}", bias=False)
        yield from layer_norm(f"convs.0.gnn_module.norms.{i}", f"links/norm_{i}")
    yield from layer_norm("convs.0.layer_norm_gnn", "links_norm")
    yield from linear("head.lins.0", "head_in")
    yield from batch_norm("head.norms.0.module", "head_norm")
    yield from linear("head.lins.1", "head_out")
    for name in _unread(config):
        yield from parameter(name, f"codebook_{name}", collection="unused")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`inputs` has the cells of each table's tokens and where those are; links number the tokens of all seeds."""
    c, (seeds, count) = model.config, inputs["neighbor_types"].shape
    row = jnp.zeros(seeds * count, jnp.int32)
    rows = dict(variables["constants"]["rows"])
    tables = []
    for number, columns in enumerate(c.tables):
        places = inputs[f"grouped_indices/{columns.name}"]
        row = row.at[places].set(jnp.arange(places.shape[0], dtype=row.dtype))
        for kind in columns.kinds:
            name, _, place = kind.partition("_")
            cells = inputs[f"tf/{columns.name}/{name}"]
            if place:  # embeddings stand side by side
                cells = jnp.split(cells, np.cumsum(columns.embedding)[:-1], axis=1)[int(place)]
            rows[f"table_{number}_{kind}"] = cells
        tables.append(replace(columns, rows=places.shape[0]))
    model = Model(replace(c, tables=tuple(tables), num_tokens=count))
    senders, receivers = inputs["edge_index"]
    ends = jnp.broadcast_to(jnp.stack([senders, receivers], axis=-1) % count, (seeds, senders.shape[0], 2))
    batch = {
        "table": inputs["neighbor_types"],
        "row": row.reshape(seeds, count),
        "hop": inputs["neighbor_hops"],
        "lag": inputs["neighbor_times"],
        "token_mask": jnp.ones((seeds, count), bool),  # officially nothing is padding
        "edges": ends,
        "edge_mask": senders // count == jnp.arange(seeds)[:, None],
        "noise": inputs["z0"].reshape(seeds, count),
    }
    variables = {**variables, "constants": {"rows": rows}}
    out, captured = model.apply(variables, batch, mutable=["intermediates"])
    kept, edges, linked = captured["intermediates"]["kept"][0]
    edges = edges + kept.shape[1] * jnp.arange(seeds)[:, None, None]
    # Kept links in their old order; how many there are depends on the data, so that the rest is -1.
    everyone = jnp.where(linked[..., None], edges, -1).max(axis=0)
    order = jnp.argsort(~linked.any(axis=0), stable=True)
    return {
        "out": out,
        "filtered_types": jnp.take_along_axis(batch["table"], kept, axis=1),
        "filtered_times": jnp.take_along_axis(batch["lag"], kept, axis=1),
        "filtered_edge_index": everyone[order].T,
    }


_LOCAL_HPARAMS = {
    "input_dim": "d_model",
    "n_layers": "num_layers",
    "num_heads": "num_heads",
    "dropout_rate": "dropout_rate",
    "attention_dropout_rate": "attention_dropout_rate",
    "max_time_days": "max_lag",
    "seq_len": "num_kept",
}
_NOTHING = (Columns("none", 1, numerical=1),)


def local_config(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _LOCAL_HPARAMS.items() if theirs in hparams}
    ours |= {name: float(ours[name]) for name in _REAL if name in ours}
    if hparams.get("hidden_dim", ours["d_model"]) != ours["d_model"]:
        raise ValueError(f"hidden_dim {hparams['hidden_dim']} is not input_dim {ours['d_model']}")
    return Config(tables=_NOTHING, **ours)


def local_hparams(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _LOCAL_HPARAMS.items()} | {"hidden_dim": config.d_model}


class LocalPart(nn.Module):
    """The local module by itself, on a batch of tokens and their lags."""

    config: Config

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> tuple[Float[Array, "B D"], Float[Array, "B K D"]]:
        present = jnp.ones(batch["lag"].shape, bool)
        return LocalModule(self.config, name="local")(batch["x"], batch["lag"], present, train=False)


def local_example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, Array]:
    tokens = (batch_size, config.num_kept)
    return {"x": jax.random.normal(key, (*tokens, config.d_model)), "lag": jnp.zeros(tokens)}


def local_call(model: LocalPart, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    readout, tokens = model.apply(variables, {"x": inputs["batched_data"], "lag": inputs["neighbor_times"]})
    return {"readout": readout, "tokens": tokens}


# --- named configurations --------------------------------------------------------------------------------------------

_STANDIN = (
    Columns("user", 400, numerical=2),
    Columns("event", 12_000, numerical=1, timestamp=1),
    Columns("item", 50, numerical=1, categorical=(5,)),
)

# The tables of rel-f1 without names and other texts, for which the paper uses word vectors.
_F1 = (
    Columns("circuits", 77, numerical=3, categorical=(35,)),
    Columns("constructor_results", 12_180, numerical=1, timestamp=1),
    Columns("constructor_standings", 12_941, numerical=3, timestamp=1),
    Columns("constructors", 211, categorical=(24,)),
    Columns("driver_standings", 33_902, numerical=3, timestamp=1),
    Columns("drivers", 857, categorical=(42,), timestamp=1),
    Columns("qualifying", 9_595, numerical=2, timestamp=1),
    Columns("races", 1_102, numerical=2, timestamp=1),
    Columns("results", 25_860, numerical=9, categorical=(137,), timestamp=1),
)
_F1_DAYS = 7724.0  # the longest lag of its seeds

PAPER = Paper(
    slug="gelgt",
    task=row_prediction.TASK,
    model=Model,
    example=example,
    constants=constants,
    configs={
        "tiny": Config(
            tables=_STANDIN,
            num_tokens=48,
            num_kept=36,
            d_model=32,
            table_width=16,
            table_layers=2,
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
            table_dropout_rate=0.0,
        ),
        "f1": Config(tables=_F1, max_lag=_F1_DAYS),  # the release's settings
        "f1_paper": Config(
            tables=_F1, max_lag=_F1_DAYS, num_tokens=500, num_layers=4, dropout_rate=0.3, attention_dropout_rate=0.3
        ),
        "f1_small": Config(  # for two CPU cores
            tables=_F1, max_lag=_F1_DAYS, num_tokens=128, num_kept=64, d_model=64, table_width=32, table_layers=2
        ),
    },
    reported={"f1_relational/driver_position": {"mae": 3.7345}},
    officials=(
        Official(
            module="model.py:GelGT",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
        Official(
            module="local_module.py:LocalModule",
            config=local_config,
            hparams=local_hparams,
            table=lambda config: _local_table(config, "", "local/"),
            call=local_call,
            model=LocalPart,
            example=local_example,
        ),
    ),
    quirks=(
        "empty places are officially tokens like the seed (hop 0), preferred over real rows and attended to",
        "attention dropout is officially active in evaluation; ours is not",
        "the feed-forward input is layer-normalised and batch-normalised again",
        "batch statistics are over all places of a batch, empty ones too, in training",
    ),
)
