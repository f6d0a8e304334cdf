"""Graphs: attention and aggregation over edge lists and over dense adjacency, operators, distances and readouts.

An edge list says sender -> receiver; padded edges are left out by `edge_mask` (True = present), whatever their indices.
A dense adjacency has one row a receiver and one column a sender, so that A x aggregates. Several graphs in one edge
list are one graph of unconnected parts; the `dense_` forms carry a batch axis. Projections stay outside.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

__all__ = [
    "block_cosine_similarity",
    "dense_gated_graph_aggregate",
    "dense_graph_aggregate",
    "dense_graph_attention",
    "dense_graph_attention_v2",
    "dense_graph_convolution",
    "dense_graph_readout",
    "dense_to_edges",
    "edges_to_dense",
    "gated_graph_aggregate",
    "graph_aggregate",
    "graph_attention",
    "graph_attention_v2",
    "graph_convolution",
    "graph_laplacian",
    "graph_readout",
    "hop_distances",
    "laplacian_encoding",
    "normalized_adjacency",
    "random_walk_encoding",
    "segment_reduce",
    "segment_softmax",
    "similarity_graph",
    "tree_adjacency",
]

Adjacency = Num[Array, "B N M"] | Bool[Array, "B N M"]
EdgeMask = Bool[Array, " E"] | None


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _spread(weight, like):
    return weight.reshape(weight.shape + (1,) * (like.ndim - weight.ndim))


def _divide(numerator, denominator):
    return numerator / jnp.where(denominator == 0, 1, denominator)


def _check(function: str, name: str, value, allowed):
    if value not in allowed:
        raise ValueError(f"{function}: {name} {value!r} is not one of {', '.join(map(str, allowed))}")


# ---- segments --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_segments",))
def segment_softmax(
    scores: Float[Array, "E *H"],
    segment_ids: Int[Array, " E"],
    *,
    num_segments: int,
    mask: Bool[Array, " E"] | None = None,
) -> Float[Array, "E *H"]:
    """w_e = exp(s_e) / sum of exp(s_f) over the f of e's segment, for every trailing axis by itself.

    Masked entries get weight 0 and no gradient; a segment without entries changes nothing. Float32 inside. O(E).
    Source: card rctea, Mechanism 3; arXiv:1710.10903, equation 2.
    """
    wide = _wide(scores)
    present = jnp.ones_like(wide, bool) if mask is None else jnp.broadcast_to(_spread(mask, wide), wide.shape)
    top = jax.ops.segment_max(jnp.where(present, jax.lax.stop_gradient(wide), -jnp.inf), segment_ids, num_segments)
    top = jnp.where(jnp.isfinite(top), top, 0.0)[segment_ids]
    powers = jnp.where(present, jnp.exp(jnp.where(present, wide - top, 0.0)), 0.0)
    return _divide(powers, jax.ops.segment_sum(powers, segment_ids, num_segments)[segment_ids]).astype(scores.dtype)


@partial(jax.jit, static_argnames=("num_segments", "reduction"))
def segment_reduce(
    x: Float[Array, "E *S"],
    segment_ids: Int[Array, " E"],
    *,
    num_segments: int,
    reduction: str = "sum",
    weight: Float[Array, "E *W"] | None = None,
    mask: Bool[Array, " E"] | None = None,
) -> Float[Array, "{num_segments} *S"]:
    """y_s = sum, mean, max or min of the x_e with segment_ids[e] = s; an empty segment gives 0.

    `weight` has leading axes of x and multiplies it; "mean" is sum w x / sum w (0 where sum w is 0). `mask` (True =
    present) leaves entries out. Float32 inside. O(E S). Source: cards magnet, Mechanism 4; gelgt, Mechanism 6.
    """
    _check("segment_reduce", "reduction", reduction, ("sum", "mean", "max", "min"))
    wide = _wide(x)
    present = None if mask is None else _spread(mask, wide)
    if reduction in ("max", "min"):
        if weight is not None:
            raise ValueError(f"segment_reduce: weight is given, reduction {reduction!r} has no weighted form")
        worst = -jnp.inf if reduction == "max" else jnp.inf
        reduce = jax.ops.segment_max if reduction == "max" else jax.ops.segment_min
        best = reduce(wide if present is None else jnp.where(present, wide, worst), segment_ids, num_segments)
        return jnp.where(best == worst, 0.0, best).astype(x.dtype)
    factor = jnp.ones(x.shape[:1], wide.dtype) if weight is None else _wide(weight)
    if mask is not None:
        factor = jnp.where(_spread(mask, factor), factor, 0.0)
        wide = jnp.where(present, wide, 0.0)
    total = jax.ops.segment_sum(wide * _spread(factor, wide), segment_ids, num_segments)
    if reduction == "mean":
        total = _divide(total, _spread(jax.ops.segment_sum(factor, segment_ids, num_segments), total))
    return total.astype(x.dtype)


# ---- aggregation -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("reduction", "num_nodes"))
def graph_aggregate(
    x: Float[Array, "N *S"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    *,
    reduction: str = "sum",
    edge_weight: Float[Array, "E *W"] | None = None,
    edge_mask: EdgeMask = None,
    num_nodes: int | None = None,
) -> Float[Array, "M *S"]:
    """y_i = sum, mean, max or min of w_e x_j over the edges e = (j -> i); a node without edges gets 0.

    "mean" is sum w x / sum w: GraphSAGE's mean, "max" its pooling; (1 + epsilon) x + the sum is the input of GIN's
    MLP. `num_nodes` is the number of receivers where they are not the senders' nodes (bipartite graphs). O(E S).
    Source: arXiv:1706.02216, section 3.3; arXiv:1810.00826, equation 4.1; card alda4rec, Mechanism 4.
    """
    return segment_reduce(
        x[senders],
        receivers,
        num_segments=x.shape[0] if num_nodes is None else num_nodes,
        reduction=reduction,
        weight=edge_weight,
        mask=edge_mask,
    )


@partial(jax.jit, static_argnames=("reduction",))
def dense_graph_aggregate(
    x: Float[Array, "B M *S"], adjacency: Adjacency, *, reduction: str = "sum"
) -> Float[Array, "B N *S"]:
    """y_i = sum, mean, max or min of a_ij x_j over the j with a_ij != 0; a node without edges gets 0.

    "mean" divides by sum a_ij; "max" and "min" look at which entries are not 0, not at their weight. O(N M S).
    Source: arXiv:1706.02216, section 3.3; card magnet, Acceptance 3.
    """
    _check("dense_graph_aggregate", "reduction", reduction, ("sum", "mean", "max", "min"))
    wide = _wide(x)
    if reduction in ("max", "min"):
        worst = -jnp.inf if reduction == "max" else jnp.inf
        table = jnp.where(_spread(adjacency != 0, wide[:, None]), wide[:, None], worst)
        best = jnp.max(table, axis=2) if reduction == "max" else jnp.min(table, axis=2)
        return jnp.where(best == worst, 0.0, best).astype(x.dtype)
    weights = adjacency.astype(wide.dtype)
    total = jnp.einsum("bnm,bm...->bn...", weights, wide)
    if reduction == "mean":
        total = _divide(total, _spread(jnp.sum(weights, axis=2), total))
    return total.astype(x.dtype)


@partial(jax.jit, static_argnames=("self_loops",))
def graph_convolution(
    x: Float[Array, "N *S"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    *,
    edge_weight: Float[Array, " E"] | None = None,
    edge_mask: EdgeMask = None,
    self_loops: bool = True,
) -> Float[Array, "N *S"]:
    """y = D^-1/2 A D^-1/2 x with D the sums of incoming weights: the propagation of a graph convolutional network.

    `self_loops` first adds a loop of weight 1 to every node that has none. A degree of 0 or less counts as no edge.
    O(E S). Source: arXiv:1609.02907, equation 2.
    """
    wide, count = _wide(x), x.shape[0]
    weight = jnp.ones(senders.shape, wide.dtype) if edge_weight is None else _wide(edge_weight)
    if edge_mask is not None:
        weight = jnp.where(edge_mask, weight, 0.0)
    loop = jnp.zeros((count,), wide.dtype)
    if self_loops:
        own = senders == receivers if edge_mask is None else (senders == receivers) & edge_mask
        loop = jnp.where(jax.ops.segment_sum(own.astype(jnp.int32), receivers, count) > 0, 0.0, 1.0)
    inverse = _inverse_root(jax.ops.segment_sum(weight, receivers, count) + loop)
    scaled = wide * _spread(inverse, wide)
    total = segment_reduce(scaled[senders], receivers, num_segments=count, weight=weight, mask=edge_mask)
    return (_spread(inverse, wide) * (total + _spread(loop, wide) * scaled)).astype(x.dtype)


def _inverse_root(degree):
    return jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1.0)), 0.0)


@partial(jax.jit, static_argnames=("self_loops",))
def dense_graph_convolution(
    x: Float[Array, "B N *S"],
    adjacency: Num[Array, "B N N"] | Bool[Array, "B N N"],
    *,
    self_loops: bool = True,
) -> Float[Array, "B N *S"]:
    """y = D^-1/2 A D^-1/2 x; `graph_convolution` with a dense adjacency. O(N^2 S). Source: arXiv:1609.02907, eq. 2."""
    operator = normalized_adjacency(_wide(adjacency), self_loops=self_loops)
    return jnp.einsum("bnm,bm...->bn...", operator, _wide(x)).astype(x.dtype)


@partial(jax.jit, static_argnames=("num_nodes", "epsilon"))
def gated_graph_aggregate(
    gates: Float[Array, "E *S"],
    value: Float[Array, "N *S"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    *,
    edge_mask: EdgeMask = None,
    num_nodes: int | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, "M *S"]:
    """y_i = sum_j sigmoid(g_ij) v_j / (sum_j sigmoid(g_ij) + epsilon), every channel with its own gate.

    `gates` are logits, one an edge. A node without edges gets 0. O(E S). Source: card routeformer, Encoder;
    arXiv:1711.07553.
    """
    count = value.shape[0] if num_nodes is None else num_nodes
    opened = jax.nn.sigmoid(_wide(gates))
    sums = partial(segment_reduce, segment_ids=receivers, num_segments=count, mask=edge_mask)
    return (sums(opened * _wide(value)[senders]) / (sums(opened) + epsilon)).astype(value.dtype)


@partial(jax.jit, static_argnames=("epsilon",))
def dense_gated_graph_aggregate(
    gates: Float[Array, "B N M *S"], value: Float[Array, "B M *S"], adjacency: Adjacency, *, epsilon: float = 1e-6
) -> Float[Array, "B N *S"]:
    """y_i = sum_j sigmoid(g_ij) v_j / (sum_j sigmoid(g_ij) + epsilon) over the j with a_ij != 0.

    `gated_graph_aggregate` with dense gates. O(N M S). Source: card routeformer, Encoder.
    """
    opened = jax.nn.sigmoid(_wide(gates))
    opened = jnp.where(_spread(adjacency != 0, opened), opened, 0.0)
    return (jnp.sum(opened * _wide(value)[:, None], axis=2) / (jnp.sum(opened, axis=2) + epsilon)).astype(value.dtype)


# ---- attention -------------------------------------------------------------------------------------------------------


def _with_loops(senders, receivers, edge_mask, count, edge_arrays, fill):
    """Edges without their loops, then one loop a node; edge arrays get 0 or the mean over the node's edges there."""
    nodes = jnp.arange(count, dtype=senders.dtype)
    mask = senders != receivers if edge_mask is None else (senders != receivers) & edge_mask

    def extend(array):
        if array is None:
            return None
        rows = jnp.zeros((count, *array.shape[1:]), array.dtype)
        if fill == "mean":
            rows = segment_reduce(array, receivers, num_segments=count, reduction="mean", mask=mask)
        return jnp.concatenate([array, rows])

    ends = (jnp.concatenate([ids, nodes.astype(ids.dtype)]) for ids in (senders, receivers))
    return *ends, jnp.concatenate([mask, jnp.ones((count,), bool)]), *map(extend, edge_arrays)


def _read_edges(scores, value, edge_value, senders, receivers, edge_mask, count):
    weights = segment_softmax(scores, receivers, num_segments=count, mask=edge_mask)
    messages = _wide(value)[senders]
    if edge_value is not None:
        messages = messages + _wide(edge_value)
    return segment_reduce(messages, receivers, num_segments=count, weight=weights, mask=edge_mask), weights


def _check_loops(function, fill, receivers, senders):
    _check(function, "loop_fill", fill, ("mean", "zero"))
    if receivers != senders:
        raise ValueError(f"{function}: self_loops need as many receivers as senders, not {receivers} and {senders}")


@partial(jax.jit, static_argnames=("negative_slope", "self_loops", "loop_fill", "return_weights"))
def graph_attention(
    query_score: Float[Array, "N H"],
    key_score: Float[Array, "M H"],
    value: Float[Array, "M H D"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    *,
    edge_score: Float[Array, "E H"] | None = None,
    edge_value: Float[Array, "E H D"] | None = None,
    edge_mask: EdgeMask = None,
    negative_slope: float = 0.2,
    self_loops: bool = True,
    loop_fill: str = "mean",
    return_weights: bool = False,
) -> Float[Array, "N H D"] | tuple[Float[Array, "N H D"], Float[Array, "F H"]]:
    """o_i = sum_j w_ij (v_j + r_ij), w = softmax over i's incoming edges of LeakyReLU(q_i + k_j + e_ij): GAT.

    The scores are the halves of a.[W h_i, W h_j] and, with edge features, a.W e_ij; `edge_value` is r. `self_loops`
    replaces loops by one a node, whose edge terms are 0 (`loop_fill` "zero") or the mean over the node's edges
    ("mean"). `return_weights` adds w of the E edges, then of the N loops. A node without edges gets 0. O(E H D).
    Source: arXiv:1710.10903, equation 3; cards mkg_care, Image-centric GAT; gatp, Mechanism 2.
    """
    count = query_score.shape[0]
    if self_loops:
        _check_loops("graph_attention", loop_fill, count, key_score.shape[0])
        senders, receivers, edge_mask, edge_score, edge_value = _with_loops(
            senders, receivers, edge_mask, count, (edge_score, edge_value), loop_fill
        )
    scores = _wide(query_score)[receivers] + _wide(key_score)[senders]
    if edge_score is not None:
        scores = scores + _wide(edge_score)
    scores = jax.nn.leaky_relu(scores, negative_slope)
    output, weights = _read_edges(scores, value, edge_value, senders, receivers, edge_mask, count)
    output = output.astype(value.dtype)
    return (output, weights.astype(value.dtype)) if return_weights else output


@partial(jax.jit, static_argnames=("negative_slope", "self_loops", "loop_fill", "return_weights"))
def graph_attention_v2(
    query: Float[Array, "N H D"],
    key: Float[Array, "M H D"],
    value: Float[Array, "M H Dv"],
    score_vector: Float[Array, "H D"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    *,
    edge_key: Float[Array, "E H D"] | None = None,
    edge_value: Float[Array, "E H Dv"] | None = None,
    edge_mask: EdgeMask = None,
    negative_slope: float = 0.2,
    self_loops: bool = True,
    loop_fill: str = "mean",
    return_weights: bool = False,
) -> Float[Array, "N H Dv"] | tuple[Float[Array, "N H Dv"], Float[Array, "F H"]]:
    """o_i = sum_j w_ij (v_j + r_ij), w = softmax over i's incoming edges of a.LeakyReLU(q_i + k_j + e_ij): GATv2.

    query = W_t h, key = W_s h (often the value too), edge_key e = W_e of the edge's features, edge_value r. Loops,
    `loop_fill` and `return_weights` as in `graph_attention`. O(E H D). Source: arXiv:2105.14491, equation 7; card
    gatp, Mechanism 2.
    """
    count = query.shape[0]
    if self_loops:
        _check_loops("graph_attention_v2", loop_fill, count, key.shape[0])
        senders, receivers, edge_mask, edge_key, edge_value = _with_loops(
            senders, receivers, edge_mask, count, (edge_key, edge_value), loop_fill
        )
    mixed = _wide(query)[receivers] + _wide(key)[senders]
    if edge_key is not None:
        mixed = mixed + _wide(edge_key)
    scores = jnp.einsum("ehd,hd->eh", jax.nn.leaky_relu(mixed, negative_slope), _wide(score_vector))
    output, weights = _read_edges(scores, value, edge_value, senders, receivers, edge_mask, count)
    output = output.astype(value.dtype)
    return (output, weights.astype(value.dtype)) if return_weights else output


def _dense_loops(adjacency, edge_arrays, fill):
    """As `_with_loops`, on tables: the diagonal becomes an edge with filled features."""
    loop = jnp.eye(adjacency.shape[1], dtype=bool)
    others = (adjacency != 0) & ~loop

    def extend(table):
        if table is None:
            return None
        rows = jnp.zeros_like(table[:, :, :1])
        if fill == "mean":
            kept = _spread(others, table)
            total = jnp.sum(jnp.where(kept, _wide(table), 0.0), axis=2, keepdims=True)
            rows = _divide(total, jnp.sum(kept, axis=2, keepdims=True)).astype(table.dtype)
        return jnp.where(_spread(loop[None], table), rows, table)

    return others | loop, *map(extend, edge_arrays)


def _read_dense(scores, value, edge_value, adjacency):
    allowed = (adjacency != 0)[..., None]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=2, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    powers = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top, 0.0)), 0.0)
    weights = _divide(powers, jnp.sum(powers, axis=2, keepdims=True))
    output = jnp.einsum("bnmh,bmhd->bnhd", weights, _wide(value))
    if edge_value is not None:
        output = output + jnp.einsum("bnmh,bnmhd->bnhd", weights, jnp.where(allowed[..., None], _wide(edge_value), 0.0))
    return output, weights


@partial(jax.jit, static_argnames=("negative_slope", "self_loops", "loop_fill", "return_weights"))
def dense_graph_attention(
    query_score: Float[Array, "B N H"],
    key_score: Float[Array, "B M H"],
    value: Float[Array, "B M H D"],
    adjacency: Adjacency,
    *,
    edge_score: Float[Array, "B N M H"] | None = None,
    edge_value: Float[Array, "B N M H D"] | None = None,
    negative_slope: float = 0.2,
    self_loops: bool = True,
    loop_fill: str = "mean",
    return_weights: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], Float[Array, "B N M H"]]:
    """o_i = sum_j w_ij (v_j + r_ij), w = softmax over the j with a_ij != 0 of LeakyReLU(q_i + k_j + e_ij).

    `graph_attention` with tables for edges; the values of the adjacency do not matter. O(N M H D).
    Source: arXiv:1710.10903, equation 3; card mkg_care, Image-centric GAT.
    """
    if self_loops:
        _check_loops("dense_graph_attention", loop_fill, query_score.shape[1], key_score.shape[1])
        adjacency, edge_score, edge_value = _dense_loops(adjacency, (edge_score, edge_value), loop_fill)
    scores = _wide(query_score)[:, :, None] + _wide(key_score)[:, None]
    if edge_score is not None:
        scores = scores + _wide(edge_score)
    output, weights = _read_dense(jax.nn.leaky_relu(scores, negative_slope), value, edge_value, adjacency)
    output = output.astype(value.dtype)
    return (output, weights.astype(value.dtype)) if return_weights else output


@partial(jax.jit, static_argnames=("negative_slope", "self_loops", "loop_fill", "return_weights"))
def dense_graph_attention_v2(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H Dv"],
    score_vector: Float[Array, "H D"],
    adjacency: Adjacency,
    *,
    edge_key: Float[Array, "B N M H D"] | None = None,
    edge_value: Float[Array, "B N M H Dv"] | None = None,
    negative_slope: float = 0.2,
    self_loops: bool = True,
    loop_fill: str = "mean",
    return_weights: bool = False,
) -> Float[Array, "B N H Dv"] | tuple[Float[Array, "B N H Dv"], Float[Array, "B N M H"]]:
    """o_i = sum_j w_ij (v_j + r_ij), w = softmax over the j with a_ij != 0 of a.LeakyReLU(q_i + k_j + e_ij).

    `graph_attention_v2` with tables for edges; the values of the adjacency do not matter. O(N M H D).
    Source: arXiv:2105.14491, equation 7; card gatp, Mechanism 2.
    """
    if self_loops:
        _check_loops("dense_graph_attention_v2", loop_fill, query.shape[1], key.shape[1])
        adjacency, edge_key, edge_value = _dense_loops(adjacency, (edge_key, edge_value), loop_fill)
    mixed = _wide(query)[:, :, None] + _wide(key)[:, None]
    if edge_key is not None:
        mixed = mixed + _wide(edge_key)
    scores = jnp.einsum("bnmhd,hd->bnmh", jax.nn.leaky_relu(mixed, negative_slope), _wide(score_vector))
    output, weights = _read_dense(scores, value, edge_value, adjacency)
    output = output.astype(value.dtype)
    return (output, weights.astype(value.dtype)) if return_weights else output


# ---- readouts --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_graphs", "reduction"))
def graph_readout(
    x: Float[Array, "N *S"],
    graph_ids: Int[Array, " N"],
    *,
    num_graphs: int,
    reduction: str = "mean",
    scores: Float[Array, "N *H"] | None = None,
    node_mask: Bool[Array, " N"] | None = None,
) -> Float[Array, "{num_graphs} *S"]:
    """One vector a graph: "sum", "mean", "max", "min", or "attention": sum of softmax(scores) x over the graph's nodes.

    `scores` has leading axes of x (one score a node, or a node and head). A graph without nodes gets 0. O(N S).
    Source: cards ctqwformer, Mechanism 5; gelgt, Mechanism 5.
    """
    if (reduction == "attention") != (scores is not None):
        raise ValueError(f"graph_readout: scores belong to reduction 'attention', reduction is {reduction!r}")
    weight = None
    if scores is not None:
        weight = segment_softmax(_wide(scores), graph_ids, num_segments=num_graphs, mask=node_mask)
        reduction = "sum"
    return segment_reduce(x, graph_ids, num_segments=num_graphs, reduction=reduction, weight=weight, mask=node_mask)


@partial(jax.jit, static_argnames=("reduction",))
def dense_graph_readout(
    x: Float[Array, "B N *S"],
    *,
    reduction: str = "mean",
    scores: Float[Array, "B N *H"] | None = None,
    node_mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B *S"]:
    """One vector a padded graph of a batch; `graph_readout` with `node_mask` (True = present) for graph ids.

    O(N S). Source: cards ctqwformer, Mechanism 5; gelgt, Mechanism 5.
    """

    def one(x, scores, mask):
        ids = jnp.zeros(x.shape[:1], jnp.int32)
        return graph_readout(x, ids, num_graphs=1, reduction=reduction, scores=scores, node_mask=mask)[0]

    return jax.vmap(one)(x, scores, node_mask)


# ---- operators and distances -----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_nodes", "num_senders"))
def edges_to_dense(
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    *,
    num_nodes: int,
    num_senders: int | None = None,
    edge_weight: Float[Array, " E"] | None = None,
    edge_mask: EdgeMask = None,
) -> Float[Array, "N M"]:
    """A[i, j] = sum of the weights (1 each without `edge_weight`) of the edges j -> i; repeated edges add up.

    O(E + N M). Source: card rctea, Acceptance 2.
    """
    weight = jnp.ones(senders.shape) if edge_weight is None else edge_weight
    if edge_mask is not None:
        weight = jnp.where(edge_mask, weight, 0.0)
    empty = jnp.zeros((num_nodes, num_nodes if num_senders is None else num_senders), weight.dtype)
    return empty.at[receivers, senders].add(weight)


@partial(jax.jit, static_argnames=("num_edges",))
def dense_to_edges(
    adjacency: Num[Array, "N M"] | Bool[Array, "N M"], *, num_edges: int
) -> tuple[Int[Array, "{num_edges}"], Int[Array, "{num_edges}"], Num[Array, "{num_edges}"], Bool[Array, "{num_edges}"]]:
    """(senders, receivers, weights, mask) of the entries that are not 0, row by row, padded or cut to `num_edges`.

    Weights of a boolean adjacency are 1.0. O(N M). Source: card rctea, Mechanism 1.
    """
    receivers, senders = jnp.nonzero(adjacency, size=num_edges, fill_value=0)
    mask = jnp.arange(num_edges) < jnp.sum(adjacency != 0)
    values = adjacency.astype(jnp.float32) if adjacency.dtype == bool else adjacency
    return senders, receivers, jnp.where(mask, values[receivers, senders], 0), mask


@partial(jax.jit, static_argnames=("normalization", "self_loops"))
def normalized_adjacency(
    adjacency: Num[Array, "*B N N"] | Bool[Array, "*B N N"],
    *,
    normalization: str = "symmetric",
    self_loops: bool = False,
) -> Float[Array, "*B N N"]:
    """D^-1/2 A D^-1/2 ("symmetric"), D^-1 A ("row", the random walk) or A D^-1 ("column"), D the row sums of A.

    "column" divides by column sums. `self_loops` first puts 1 on empty diagonal entries. Rows of degree 0 (or less)
    stay 0. O(N^2). Source: arXiv:1609.02907, equation 2.
    """
    _check("normalized_adjacency", "normalization", normalization, ("symmetric", "row", "column"))
    table = adjacency if jnp.issubdtype(adjacency.dtype, jnp.floating) else adjacency.astype(jnp.float32)
    wide = _wide(table)
    if self_loops:
        wide = jnp.where(jnp.eye(wide.shape[-1], dtype=bool) & (wide == 0), 1.0, wide)
    degree = jnp.sum(wide, axis=-2 if normalization == "column" else -1)
    if normalization == "symmetric":
        root = _inverse_root(degree)
        wide = root[..., :, None] * wide * root[..., None, :]
    else:
        inverse = jnp.square(_inverse_root(degree))
        wide = wide * (inverse[..., None, :] if normalization == "column" else inverse[..., :, None])
    return wide.astype(table.dtype)


@partial(jax.jit, static_argnames=("normalization",))
def graph_laplacian(
    adjacency: Num[Array, "*B N N"] | Bool[Array, "*B N N"], *, normalization: str | None = None
) -> Float[Array, "*B N N"]:
    """L = D - A (None), D^-1/2 L D^-1/2 ("symmetric") or D^-1 L ("row"), D the row sums of A.

    A node of degree 0 has a row of zeros in all three. O(N^2). Source: card ctqwformer, Mechanism 1.
    """
    _check("graph_laplacian", "normalization", normalization, (None, "symmetric", "row"))
    table = adjacency if jnp.issubdtype(adjacency.dtype, jnp.floating) else adjacency.astype(jnp.float32)
    degree = jnp.sum(_wide(table), axis=-1)
    if normalization is None:
        flow = _wide(table)
    else:
        flow = _wide(normalized_adjacency(table, normalization=normalization))
        degree = (degree > 0).astype(degree.dtype)
    return (degree[..., None] * jnp.eye(table.shape[-1], dtype=flow.dtype) - flow).astype(table.dtype)


@partial(jax.jit, static_argnames=("num_steps",))
def random_walk_encoding(
    adjacency: Num[Array, "*B N N"] | Bool[Array, "*B N N"], *, num_steps: int
) -> Float[Array, "*B N {num_steps}"]:
    """p_ik = [(D^-1 A)^k]_ii for k = 1..num_steps: how likely a walk is back at i after k steps.

    O(num_steps N^3). Source: arXiv:2110.07875, section 3.
    """
    step = normalized_adjacency(adjacency, normalization="row")
    wide = _wide(step)

    def walk(power, _):
        return power @ wide, jnp.diagonal(power, axis1=-2, axis2=-1)

    _, returns = jax.lax.scan(walk, wide, None, length=num_steps)
    return jnp.moveaxis(returns, 0, -1).astype(step.dtype)


@partial(jax.jit, static_argnames=("num_vectors", "normalization"))
def laplacian_encoding(
    adjacency: Num[Array, "*B N N"] | Bool[Array, "*B N N"],
    *,
    num_vectors: int,
    normalization: str | None = "symmetric",
    node_mask: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B N {num_vectors}"]:
    """Eigenvectors 2..num_vectors+1 of the Laplacian, by rising eigenvalue, as coordinates of the nodes.

    The adjacency must be symmetric, hence `normalization` None or "symmetric". Signs: the entry of largest magnitude
    is positive. Missing vectors and the rows of absent nodes (`node_mask` True = present) are 0. A constant: no
    gradient passes. O(N^3). Source: card qap_router, Mechanism 5; card gelgt, Mechanism 2 (pe_dim).
    """
    _check("laplacian_encoding", "normalization", normalization, (None, "symmetric"))
    laplacian = _wide(graph_laplacian(jax.lax.stop_gradient(adjacency), normalization=normalization))
    count = laplacian.shape[-1]
    if node_mask is not None:
        both = node_mask[..., :, None] & node_mask[..., None, :]
        # Absent nodes get an eigenvalue above all others, so that their vectors come last.
        above = 2 * jnp.max(jnp.abs(laplacian), axis=(-2, -1), keepdims=True) * count + 1
        laplacian = jnp.where(both, laplacian, 0.0) + jnp.where(both, 0.0, above) * jnp.eye(count)
    vectors = jnp.linalg.eigh(laplacian)[1][..., 1 : num_vectors + 1]
    if node_mask is not None:
        kept = jnp.arange(vectors.shape[-1]) < jnp.sum(node_mask, axis=-1)[..., None] - 1
        vectors = jnp.where(node_mask[..., None] & kept[..., None, :], vectors, 0.0)
    strongest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True), axis=-2)
    vectors = jnp.where(strongest < 0, -vectors, vectors)
    fill = [(0, 0)] * (vectors.ndim - 1) + [(0, num_vectors - vectors.shape[-1])]
    return jnp.pad(vectors, fill)


@partial(jax.jit, static_argnames=("max_hops",))
def hop_distances(adjacency: Num[Array, "*B N N"] | Bool[Array, "*B N N"], *, max_hops: int) -> Int[Array, "*B N N"]:
    """d_ij = the fewest steps from i to j along entries that are not 0; max_hops + 1 where more are needed.

    O(max_hops N^3) on matrix units. Source: cards atomic_motion, Mechanism 3; euphoria, Physics-bias attention.
    """
    links = (adjacency != 0).astype(jnp.float32)
    reached = jnp.broadcast_to(jnp.eye(links.shape[-1]), links.shape)
    distances = jnp.where(reached > 0, 0, max_hops + 1)

    def hop(step, carry):
        reached, distances = carry
        reached = jnp.minimum(reached @ links, 1.0)
        return reached, jnp.where(reached > 0, jnp.minimum(distances, step), distances)

    return jax.lax.fori_loop(1, max_hops + 1, hop, (reached, distances))[1]


@partial(jax.jit, static_argnames=("widths", "epsilon"))
def block_cosine_similarity(
    x: Float[Array, "N F"], block_mask: Bool[Array, "N M"], *, widths: tuple[int, ...], epsilon: float = 1e-8
) -> Float[Array, "N N"]:
    """s_ij = |<z_i, z_j>| / (|z_i| |z_j| + epsilon) over the blocks of features that both i and j have; s_ii = 0.

    x holds M blocks of these `widths` side by side; what stands in a missing one (`block_mask` False) has no effect.
    Exactly symmetric; 0 where no block is shared. O(N^2 F). Source: card magnet, Mechanism 3.
    """
    if sum(widths) != x.shape[1] or len(widths) != block_mask.shape[1]:
        raise ValueError(f"block_cosine_similarity: widths {widths} are not {block_mask.shape[1]} blocks of {x.shape}")
    wide = jnp.where(jnp.repeat(block_mask, np.array(widths), axis=1, total_repeat_length=x.shape[1]), _wide(x), 0.0)
    squares = jnp.stack([jnp.sum(jnp.square(b), axis=1) for b in jnp.split(wide, np.cumsum(widths)[:-1], 1)], axis=1)
    norms = jnp.sqrt(jnp.einsum("im,jm->ij", squares, block_mask.astype(wide.dtype)))
    similarity = jnp.abs(wide @ wide.T) / (norms * norms.T + epsilon)
    similarity = jnp.where(jnp.eye(x.shape[0], dtype=bool), 0.0, similarity)
    # A product's two halves may be rounded apart, and a threshold that is one of the entries would then part them.
    return (jnp.maximum(similarity, similarity.T)).astype(x.dtype)


@partial(jax.jit, static_argnames=("num_groups", "sparsity"))
def similarity_graph(
    similarity: Float[Array, "N N"], groups: Int[Array, " N"], *, num_groups: int, sparsity: float
) -> Float[Array, "N N"]:
    """Of the entries among the nodes of each group (its diagonal too), those not below the group's quantile `sparsity`.

    Everything else is 0, pairs of different groups and nodes of negative groups included. Then node after node, one
    without an edge gets its best in the group, in both directions; a node that is like nobody stays alone. Similarities
    are symmetric and not negative, sparsity is in [0, 1). O(N^2 log N). Source: card magnet, Mechanism 3.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"similarity_graph: sparsity {sparsity} is not in [0, 1)")
    count = similarity.shape[0]
    own = jnp.arange(num_groups)[:, None] == groups
    rank = jnp.asarray([int(sparsity * n * n) for n in range(count + 1)])[jnp.sum(own, axis=1)]

    def threshold(member, rank):
        inside = member[:, None] & member
        return jnp.sort(jnp.where(inside, similarity, jnp.inf).ravel())[rank]

    together = (groups[:, None] == groups) & (groups >= 0)
    inside = jnp.where(together, similarity, 0.0)
    limits = jnp.concatenate([jax.vmap(threshold)(own, rank), jnp.full(1, jnp.inf, similarity.dtype)])[groups]
    graph = jnp.where(inside >= limits[:, None], inside, 0.0)

    def connect(i, graph):
        best = jnp.argmax(inside[i])
        missing = ~jnp.any(graph[i] > 0) & (inside[i, best] > 0)
        weight = jnp.where(missing, inside[i, best], graph[i, best])
        return graph.at[i, best].set(weight).at[best, i].set(weight)

    return jax.lax.fori_loop(0, count, connect, graph)


def tree_adjacency(parents: tuple[int, ...]) -> np.ndarray:
    """A[i, j] = whether i is the parent or a child of j; `parents[j]` is -1 at a root. A constant (N, N) numpy array.

    Source: card atomic_motion, Mechanism (joints and parents).
    """
    count = len(parents)
    table = np.zeros((count, count), bool)
    for child, parent in enumerate(parents):
        if not -1 <= parent < count or parent == child:
            raise ValueError(f"tree_adjacency: parents[{child}] = {parent} is not -1 or another node of {count}")
        if parent >= 0:
            table[child, parent] = table[parent, child] = True
    return table
