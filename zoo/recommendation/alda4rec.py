"""ALDA4Rec: adaptive long-term embedding with denoising and augmentation for recommendation (arXiv:2504.13614).

Official code: zahraakhlaghi/ALDA4Rec@7bb38f7 (no licence; TensorFlow 1, grown out of HKUDS/SelfGNN). Fidelity: exact.
New: histories are cut into time intervals, each a graph of users and items that is cleaned (items outside a user's
communities weigh less) and enriched (edges to similar items). A small graph network reads each; the mean of intervals
is the short representation, an LSTM with attention over them the long one, and a user's gate mixes their scores.
Differs: graphs are dense matrices, which suits accelerators and catalogues of some ten thousand items. As in the code,
an edge is there or not, so that cleaning has no effect (`use_edge_weights` is the paper's intent), and the loss gives
the gate to the other score than the prediction does (`consistent_gate`). Repaired: cleaning took global item numbers
for local ones (`official_denoising` brings it back).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.blocks import Dropout
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import recommendation
from zoo.tasks.task import Batch
from zoo.weights.table import Table, parameter


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the defaults are the official ones."""

    num_users: int = 600  # N, users with an embedding
    num_items: int = 48  # I, items of the catalogue; 0 stands for no item
    num_intervals: int = 6  # T, of equal length in time
    history: int = 200  # L, items of a user that the sequence branch sees
    hidden_dim: int = 64  # d, width of a user and of an item
    graph_layers: int = 2  # G, propagations along the edges of an interval
    sequence_layers: int = 3  # of the sequence branch
    num_heads: int = 16  # of all attentions; divides d
    gate_dim: int = 1024  # first hidden width of the gate; the second is an eighth of it
    leaky_slope: float = 0.5  # of every leaky ReLU
    item_threshold: float = 0.0  # transitions rarer than this share of an item's are dropped
    similarity_threshold: float = 0.1  # items are similar above it, the similarities of an interval scaled to [0, 1]
    noise_weight: float = 0.5  # beta, of an edge to an item outside every community
    augment: bool = True  # add edges to similar items
    use_edge_weights: bool = False  # the paper's intent; False: an edge counts 1 whatever its weight, as in the code
    consistent_gate: bool = False  # the loss weighs scores as the prediction does; False: the other way round
    official_denoising: bool = False  # reproduces the code's mistaken item numbers; matters with edge weights only
    long_share: float = 0.1  # lambda1, of the hinge loss of the long-term scores
    penalty: float = 1e-2  # of the sum of squares of tables and gate kernels
    dropout_rate: float = 0.5  # of the LSTM's outputs, and of edges where their weights are used
    layer_norm_epsilon: float = 1e-12  # added to the variance under the root
    softmax_epsilon: float = 1e-8  # added to the sum of exponentials
    num_times: int | None = None  # carries the official code's unread parameters (a table of times, projections)

    def __post_init__(self):
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")


# --- the graphs, made once of the data, in NumPy ----------------------------------------------------------------------


@dataclass(frozen=True)
class Graphs:
    """What the interactions say, interval by interval."""

    similarity: np.ndarray  # (T, I, I) of items
    weights: np.ndarray  # (T, N, I) of edges, those added included; 0: none
    linked: np.ndarray  # (T, N, I) whether there is an edge; an added one can have weight 0


def interval_graphs(interactions: np.ndarray, config: Config) -> Graphs:
    """Graphs of rows (user, item, interval, time), all counted from 0."""
    c = config
    shape = c.num_intervals, c.num_users, c.num_items
    similarity = np.zeros((c.num_intervals, c.num_items, c.num_items))
    clean, weights = np.zeros(shape), np.zeros(shape)
    linked = np.zeros(shape, bool)
    for t in range(c.num_intervals):
        rows = interactions[interactions[:, 2] == t]
        sequences = {int(u): _in_order(rows[rows[:, 0] == u]) for u in np.unique(rows[:, 0])}
        similarity[t] = item_similarity(list(sequences.values()), c.num_items, threshold=c.item_threshold)
        scaled = _min_max(similarity[t])
        for user, items in sequences.items():
            clean[t, user, items] = 1.0
            if c.use_edge_weights and len(items) >= 3:
                clean[t, user, items] = denoised_weights(items, similarity[t], c)
        had = clean[t] > 0
        weights[t], linked[t] = clean[t], had
        if c.augment:
            pairs = similar_pairs(similarity[t], c.similarity_threshold)
            empty = ~had.any(axis=1, keepdims=True)
            # A user without items in this interval goes by those of the one before.
            before = clean[t - 1] if t else np.zeros_like(clean[0])
            source = np.where(empty, before, clean[t])
            added = (((source > 0).astype(np.float64) @ pairs) > 0) & ~had
            weights[t] += np.where(added, source @ (scaled * pairs), 0.0)
            linked[t] |= added
    return Graphs(similarity, weights, linked)


def _in_order(rows: np.ndarray) -> np.ndarray:
    """The different items of one user in the order of time; of an item taken again, the last time counts."""
    last = {int(item): time for item, time in zip(rows[:, 1], rows[:, 3], strict=True)}
    return np.array(sorted(sorted(last), key=last.__getitem__), np.int64)


def item_similarity(sequences: Sequence[np.ndarray], num_items: int, *, threshold: float) -> np.ndarray:
    """(I, I): the rows of the items' transition matrix M compared, S = M M^T over (its row and column sums - 2)."""
    transitions = np.zeros((num_items, num_items))
    for items in sequences:
        np.add.at(transitions, (items[:-1], items[1:]), 1.0)
        np.add.at(transitions, (items[1:], items[:-1]), 1.0)
    transitions /= np.maximum(transitions.sum(axis=1, keepdims=True), 1e-300)
    transitions[transitions <= threshold] = 0.0
    np.fill_diagonal(transitions, 1.0)
    products = transitions @ transitions.T
    sums = products.sum(axis=1)[:, None] + products.sum(axis=0)[None, :]
    use = (products != 0) & (sums > 2)
    np.fill_diagonal(use, False)
    return np.where(use, products / np.where(use, sums - 2, 1.0), 0.0)


def similar_pairs(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """(I, I) 1 where the similarity, scaled over those that are not zero, is above the threshold."""
    present = similarity != 0
    if not present.any():
        return np.zeros_like(similarity)
    low, high = similarity[present].min(), similarity[present].max()
    return (present & (similarity - low > threshold * (high - low))).astype(np.float64)


def _min_max(x: np.ndarray) -> np.ndarray:
    span = x.max() - x.min()
    return (x - x.min()) / span if span > 0 else np.zeros_like(x)


def denoised_weights(items: np.ndarray, similarity: np.ndarray, config: Config) -> np.ndarray:
    """1, or `noise_weight` for an item that is alone in its community of the user's items."""
    own = similarity[items]
    communities = louvain(_min_max(0.5 * own @ own.T))
    alone = np.bincount(communities)[communities] == 1
    if config.official_denoising:
        # The code looks for an item's global number among the local numbers of lonely items.
        alone = np.isin(items, np.flatnonzero(alone))
    return np.where(alone, config.noise_weight, 1.0)


def louvain(weights: np.ndarray) -> np.ndarray:
    """The community of each node of a weighted graph (n, n): modularity climbed by single moves, then with communities
    as nodes, until it rises no more (arXiv:0803.0476). Nodes are visited in order, so that the result is one."""
    community = np.arange(len(weights))
    graph = weights
    while True:
        moved = _best_moves(graph)
        labels, moved = np.unique(moved, return_inverse=True)
        if len(labels) == len(graph):
            return community
        community = moved[community]
        members = np.eye(len(labels))[moved]
        graph = members.T @ graph @ members


def _best_moves(weights: np.ndarray) -> np.ndarray:
    degree, total = weights.sum(axis=1), weights.sum()
    own, community = np.diag(weights), np.arange(len(weights))
    if total <= 0:
        return community
    sums, moving = degree.copy(), True
    while moving:
        moving = False
        for node in range(len(weights)):
            here = community[node]
            sums[here] -= degree[node]
            to = np.bincount(community, weights[node], minlength=len(weights))
            to[here] -= own[node]
            gain = to - sums * degree[node] / total
            best = int(np.argmax(gain))
            if gain[best] <= gain[here] + 1e-12:
                best = here
            community[node], moving = best, moving or best != here
            sums[best] += degree[node]
    return community


def normalized_graphs(graphs: Graphs, config: Config) -> np.ndarray:
    """(T, N, I) what propagation multiplies with: 1 for each edge, or D_u^-1/2 A D_i^-1/2 of the weights."""
    if not config.use_edge_weights:
        return graphs.linked.astype(np.float32)
    users, items = (np.maximum(graphs.weights.sum(axis=a, keepdims=True), 1e-300) for a in (2, 1))
    return (graphs.weights / np.sqrt(users) / np.sqrt(items)).astype(np.float32)


# --- the model --------------------------------------------------------------------------------------------------------


def dense(features: int, name: str) -> nn.Dense:
    """x W + b, started as TensorFlow does: Glorot's uniform kernel, no bias."""
    return nn.Dense(features, kernel_init=nn.initializers.glorot_uniform(), name=name)


class JointLayerNorm(nn.Module):
    """Normalises over positions and channels together; scale and shift for each channel. Float32 inside."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=(1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=(1, 2), keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


class SelfAttention(nn.Module):
    """Heads of exp(q k / sqrt(head width)) / (sum + epsilon), without an output projection."""

    num_heads: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        split = (*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (dense(x.shape[-1], name)(x).reshape(split) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / np.sqrt(split[-1])
        # The official code takes no maximum out; with it, the epsilon is scaled likewise and nothing overflows.
        top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), 0.0))
        weights = jnp.exp(scores - top)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + self.epsilon * jnp.exp(-top))
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v).reshape(x.shape)


class LSTM(nn.Module):
    """TensorFlow's basic cell over the second axis: gates i, j, f, o from [x, h] W + b, and 1 added to f."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        kernel = self.param(
            "kernel", nn.initializers.glorot_uniform(), (x.shape[-1] + self.features, 4 * self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (4 * self.features,))

        def step(carry, x):
            cell, hidden = carry
            i, j, f, o = jnp.split(jnp.concatenate([x, hidden], axis=-1) @ kernel + bias, 4, axis=-1)
            cell = cell * jax.nn.sigmoid(f + 1.0) + jax.nn.sigmoid(i) * jnp.tanh(j)
            hidden = jnp.tanh(cell) * jax.nn.sigmoid(o)
            return (cell, hidden), hidden

        zeros = jnp.zeros((len(x), self.features), x.dtype)
        return jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def propagate(
    graph: Float[Array, "T N I"],
    users: Float[Array, "T N D"],
    items: Float[Array, "T I D"],
    *,
    layers: int,
    slope: float,
) -> tuple[Float[Array, "T N D"], Float[Array, "T I D"]]:
    """u' = lrelu(A v) + u and v' = lrelu(A^T u) + v, `layers` times; sums over all levels, the first included."""
    totals = users, items
    for _ in range(layers):
        from_items = jnp.einsum("tni,tid->tnd", graph, items)
        from_users = jnp.einsum("tni,tnd->tid", graph, users)
        users, items = (nn.leaky_relu(m, slope) + x for m, x in ((from_items, users), (from_users, items)))
        totals = totals[0] + users, totals[1] + items
    return totals


def _xavier(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "*S"]:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * (6 / (shape[-2] + shape[-1])) ** 0.5


class LongTerm(nn.Module):
    """mean_t Attn(LN(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        c = self.config
        x = JointLayerNorm(c.layer_norm_epsilon, name="norm")(x)
        return jnp.mean(SelfAttention(c.num_heads, c.softmax_epsilon, name="attention")(x), axis=1)


class SequenceBranch(nn.Module):
    """LN(sum of the history's items) + LN(sum of the positions they fill), then attention layers over that token."""

    config: Config

    @nn.compact
    def __call__(self, items: Float[Array, "B L D"], present: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        c = self.config
        table = self.param("position_table", _xavier, (c.history, c.hidden_dim))
        mask = present.astype(items.dtype)
        summed = jnp.einsum("bl,bld->bd", mask, items)[:, None]
        positions = (mask @ table)[:, None]
        z = JointLayerNorm(c.layer_norm_epsilon, name="item_norm")(summed)
        z = z + JointLayerNorm(c.layer_norm_epsilon, name="position_norm")(positions)
        for i in range(c.sequence_layers):
            y = JointLayerNorm(c.layer_norm_epsilon, name=f"norm_{i}")(z)
            y = SelfAttention(c.num_heads, c.softmax_epsilon, name=f"attention_{i}")(y)
            z = nn.leaky_relu(y, c.leaky_slope) + z
        return z[:, 0]


class Gate(nn.Module):
    """w = sigmoid(MLP [long; short]), one number a user."""

    config: Config

    @nn.compact
    def __call__(self, long: Float[Array, "B D"], short: Float[Array, "B D"]) -> Float[Array, " B"]:
        c = self.config
        x = jnp.concatenate([long, short], axis=-1)
        for name, width in (("fc1", c.gate_dim), ("fc2", c.gate_dim // 8)):
            x = nn.leaky_relu(dense(width, name)(x), c.leaky_slope)
        return jax.nn.sigmoid(dense(1, "fc3")(x))[:, 0]


class Model(nn.Module):
    """Scores of the candidates, their short- and long-term parts, each user's gate, and the parts of the loss."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *M"]]:
        c = self.config
        users = self.param("user_table", _xavier, (c.num_intervals, c.num_users, c.hidden_dim))
        items = self.param("item_table", _xavier, (c.num_intervals, c.num_items, c.hidden_dim))
        graph = self.variable("constants", "graph_table", self._random_graph).value.astype(users.dtype)
        if c.use_edge_weights:
            graph = Dropout(c.dropout_rate)(graph, train=train)
        users, items = propagate(graph, users, items, layers=c.graph_layers, slope=c.leaky_slope)

        both = jnp.swapaxes(jnp.concatenate([users, items], axis=1), 0, 1)  # (N + I, T, d)
        short_user, short_item = jnp.split(jnp.mean(both, axis=1), [c.num_users])
        states = Dropout(c.dropout_rate)(LSTM(c.hidden_dim, name="lstm")(both), train=train)
        long_user = LongTerm(c, name="user_long")(states[: c.num_users])
        long_item = LongTerm(c, name="item_long")(states[c.num_users :])

        user, chosen = batch["user"], _rows(batch["candidates"])
        history = SequenceBranch(c, name="sequence")(long_item[_rows(batch["items"])], batch["items"] > 0)
        gate = Gate(c, name="gate")(long_user[user], short_user[user])
        short = jnp.sum(nn.leaky_relu(short_user[user][:, None] * short_item[chosen], c.leaky_slope), axis=-1)
        direction = long_user[user] + nn.leaky_relu(history, c.leaky_slope)
        long = jnp.einsum("bd,bmd->bm", direction, long_item[chosen])
        scores = gate[:, None] * long + (1 - gate[:, None]) * short
        if c.num_times is not None:
            Unread((c.num_times, c.hidden_dim), name="times")()
            for i in range(2 * c.num_intervals * c.graph_layers):
                Unread((c.hidden_dim, c.hidden_dim), name=f"projection_{i}")()
        return {"scores": scores, "short": short, "long": long, "gate": gate} | self._losses(batch, short, long, gate)

    def _random_graph(self) -> Float[Array, "T N I"]:
        c = self.config
        sizes = c.num_intervals, c.num_users, c.num_items
        return jax.random.bernoulli(self.make_rng("params"), 0.1, sizes).astype(jnp.float32)

    def _losses(self, batch: Batch, short, long, gate) -> dict[str, Float[Array, " B"]]:
        """The three parts of the loss, each example's own; the penalty is the same for all."""
        c = self.config
        there = (batch["candidates"][:, 1:] > 0).astype(jnp.float32)

        def hinge(scores):
            margins = nn.relu(1 - (scores[:, :1] - scores[:, 1:])).astype(jnp.float32)
            return jnp.sum(margins * there, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1.0)

        for_short, for_long = loss_gates(gate, consistent=c.consistent_gate)
        return {
            "loss_short": (1 - c.long_share) * hinge(for_short[:, None] * short),
            "loss_long": c.long_share * hinge(for_long[:, None] * long),
            "loss_penalty": jnp.broadcast_to(c.penalty * self._squares(), gate.shape),
        }

    def _squares(self) -> Float[Array, ""]:
        params = self.variables["params"]
        penalised = [params["user_table"], params["item_table"], params["sequence"]["position_table"]]
        penalised += [params["gate"][name]["kernel"] for name in ("fc1", "fc2", "fc3")]
        penalised += jax.tree.leaves(self.variables.get("unread", {}))
        return sum(jnp.sum(jnp.square(p.astype(jnp.float32))) for p in penalised)


class Unread(nn.Module):
    """A parameter of the official code that is penalised and never read."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> None:
        self.variable("unread", "table", jnp.zeros, self.shape)


def loss_gates(gate: Float[Array, " B"], *, consistent: bool) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """What the loss multiplies short- and long-term scores with."""
    return (1 - gate, gate) if consistent else (gate, 1 - gate)


def _rows(items: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """Table rows of items counted from 1; no item reads the first row, and whoever asks must mask it."""
    return jnp.maximum(items - 1, 0)


def loss(outputs: Mapping[str, jax.Array], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Hinge losses of both kinds of scores, true item against each other candidate, and the penalty."""
    parts = {name: jnp.mean(outputs[name]) for name in ("loss_short", "loss_long", "loss_penalty")}
    return sum(parts.values()), parts


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return recommendation.example(
        history=config.history,
        num_items=config.num_items,
        num_users=config.num_users,
        batch_size=batch_size,
        key=key,
    )


def constants(config: Config, data: Any) -> dict[str, Any]:
    """The graphs of the training items."""
    if data.times is None:
        raise UserError("alda4rec cuts histories into intervals of time and this data set has no dates: use another")
    if len(data.sequences) != config.num_users:
        raise UserError(
            f"the data has {len(data.sequences)} users, the model is made for {config.num_users}: set --model.num-users"
        )
    times = np.concatenate(data.times).astype("datetime64[s]").astype(np.int64)
    users = np.repeat(np.arange(len(data.sequences)), [len(s) for s in data.sequences])
    items = np.concatenate(data.sequences).astype(np.int64) - 1
    place = (times - times.min()) / max(int(np.ptp(times)), 1)
    intervals = np.minimum((place * config.num_intervals).astype(np.int64), config.num_intervals - 1)
    graphs = interval_graphs(np.stack([users, items, intervals, times], axis=1), config)
    return {"graph_table": normalized_graphs(graphs, config)}


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "graphNum": "num_intervals",
    "latdim": "hidden_dim",
    "gnn_layer": "graph_layers",
    "att_layer": "sequence_layers",
    "num_attention_heads": "num_heads",
    "pos_length": "history",
    "pSdim": "gate_dim",
    "leaky": "leaky_slope",
    "beta": "noise_weight",
    "similarity_threshold": "similarity_threshold",
    "item_threshold": "item_threshold",
    "lambda1": "long_share",
    "reg": "penalty",
    "user": "num_users",
    "item": "num_items",
    "maxTime": "num_times",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    return Config(**{ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams})


def sizes_of(config: Config, tensors: Mapping[str, Any]) -> Config:
    """With what the official code reads off its data."""
    shapes = {name: np.shape(tensors[name]) for name in ("uEmbed", "iEmbed", "timeEmbed")}
    return replace(
        config, num_users=shapes["uEmbed"][1], num_items=shapes["iEmbed"][1], num_times=shapes["timeEmbed"][0]
    )


def config_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}


def official_table(config: Config) -> Table:
    yield from parameter("uEmbed", "user_table")
    yield from parameter("iEmbed", "item_table")
    yield from parameter("posEmbed", "sequence/position_table")
    yield from parameter("rnn/multi_rnn_cell/cell_0/basic_lstm_cell/kernel", "lstm/kernel")
    yield from parameter("rnn/multi_rnn_cell/cell_0/basic_lstm_cell/bias", "lstm/bias")
    norms, layers = ["user_long/norm", "item_long/norm", "sequence/item_norm", "sequence/position_norm"], []
    norms += [f"sequence/norm_{i}" for i in range(config.sequence_layers)]
    attentions = ["user_long/attention", "item_long/attention"]
    attentions += [f"sequence/attention_{i}" for i in range(config.sequence_layers)]
    layers = [f"{attention}/{name}" for attention in attentions for name in ("query", "key", "value")]
    for i, name in enumerate(norms):
        yield from parameter(_numbered("LayerNorm", i) + "/gamma", f"{name}/scale")
        yield from parameter(_numbered("LayerNorm", i) + "/beta", f"{name}/bias")
    for i, name in enumerate(layers):
        yield from parameter(_numbered("dense", i) + "/kernel", f"{name}/kernel")
        yield from parameter(_numbered("dense", i) + "/bias", f"{name}/bias")
    for theirs, ours in (("meta12", "fc1"), ("meta14", "fc2"), ("meta13", "fc3")):
        yield from parameter(theirs, f"gate/{ours}/kernel")
        yield from parameter(f"{theirs}Bias", f"gate/{ours}/bias")
    if config.num_times is not None:
        yield from parameter("timeEmbed", "times/table", collection="unread")
        for i in range(2 * config.num_intervals * config.graph_layers):
            yield from parameter(f"defaultParamName{i + 1}", f"projection_{i}/table", collection="unread")


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The graphs of the interactions, scores of pairs of user and item, and the loss of their first half, as what was
    taken, against the second."""
    c = model.config
    graphs = interval_graphs(np.asarray(inputs["interactions"]), c)
    row = inputs["uLocs_seq"]
    items = jnp.where(jnp.asarray(inputs["mask"]) > 0, jnp.asarray(inputs["sequence"]) + 1, 0)[row]
    pairs = {
        "user": jnp.asarray(inputs["uids"]),
        "items": items,
        "candidates": jnp.asarray(inputs["iids"])[:, None] + 1,
    }
    constants = {"graph_table": normalized_graphs(graphs, c)}
    ours = model.apply(jax.tree.map(jnp.asarray, {**variables, "constants": constants}), pairs)
    short, long, gate, half = ours["short"][:, 0], ours["long"][:, 0], ours["gate"], len(row) // 2

    def hinge(scores):
        return jnp.mean(nn.relu(1 - (scores[:half] - scores[half:])))

    for_short, for_long = loss_gates(gate, consistent=c.consistent_gate)
    losses = {
        "loss_mean": hinge(for_short * short),
        "loss_long": hinge(for_long * long),
        "loss_reg": ours["loss_penalty"][0],
    }
    total = (1 - c.long_share) * losses["loss_mean"] + c.long_share * losses["loss_long"] + losses["loss_reg"]
    return {
        "preds": ours["scores"][:, 0],
        "mean_preds": short,
        "long_preds": long,
        "user_weight": gate,
        **losses,
        "loss": total,
        "item_similarity": jnp.asarray(graphs.similarity, jnp.float32),
        "adjacency": jnp.asarray(graphs.linked, jnp.int32),
    }


PAPER = Paper(
    slug="alda4rec",
    task=recommendation.TASK,
    model=Model,
    example=example,
    loss=loss,
    constants=constants,
    configs={
        "tiny": Config(
            num_intervals=4,
            history=20,
            hidden_dim=16,
            sequence_layers=1,
            num_heads=4,
            gate_dim=32,
            penalty=1e-4,
            dropout_rate=0.1,
        ),
        # The paper's four, after the settings of the code it grew out of; users and items as the paper counts them.
        "amazon": Config(num_users=11_199, num_items=30_821, num_intervals=5, graph_layers=3, sequence_layers=4),
        "movielens100k": Config(num_users=943, num_items=1_682, history=50),
    },
    officials=(
        Official(
            module="model.py:Recommender.prepareModel/ours (+ DataHandler.py, Utils/attention.py)",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
            refine=sizes_of,
        ),
    ),
    quirks=(
        "propagation reads no edge weights and no degrees, so that cleaning has no effect (use_edge_weights)",
        "the loss weighs scores by the gate the other way round than the prediction does (consistent_gate)",
        "cleaning confuses local and global item numbers (repaired; official_denoising)",
        "the code has an LSTM where the paper says GRU",
    ),
)
