"""Graphs on edge lists and dense tables against loops in float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import graph

RANDOM = np.random.default_rng(0)
N, H, D = 6, 2, 3
# Node 5 has no edge; edge 3 is a loop; the last two edges are padding with wild indices.
SENDERS = jnp.array([0, 1, 2, 3, 4, 0, 2, 99, 5])
RECEIVERS = jnp.array([1, 0, 1, 3, 3, 3, 0, 1, -7])
EDGE_MASK = jnp.array([True] * 7 + [False] * 2)
E = len(SENDERS)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


X, WEIGHT = draw(N, H, D), jnp.abs(draw(E)) + 0.1
EDGES = [(int(s), int(r), e) for e, (s, r) in enumerate(zip(SENDERS, RECEIVERS, strict=True)) if EDGE_MASK[e]]
ADJACENCY = graph.edges_to_dense(SENDERS, RECEIVERS, num_nodes=N, edge_weight=WEIGHT, edge_mask=EDGE_MASK)


def table(rows):
    """An edge array as a dense one; the edges are all different."""
    dense = np.zeros((N, N, *rows.shape[1:]), np.float32)
    for s, r, e in EDGES:
        dense[r, s] = rows[e]
    return jnp.asarray(dense)[None]


def softmax(values):
    powers = np.exp(np.asarray(values, np.float64) - np.max(values, axis=0))
    return powers / powers.sum(0)


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


# ---- segments and aggregation ----------------------------------------------------------------------------------------


def test_segment_softmax_is_a_softmax_in_every_segment():
    scores = draw(E, H) * 30
    ours = graph.segment_softmax(scores, RECEIVERS, num_segments=N, mask=EDGE_MASK)
    expected = np.zeros((E, H))
    for node in range(N):
        members = [e for _, r, e in EDGES if r == node]
        if members:
            expected[members] = softmax(scores[np.array(members)])
    close(ours, expected)
    assert not jnp.any(ours[~EDGE_MASK])


def test_segment_softmax_keeps_forbidden_scores_and_empty_segments_at_zero():
    ids = jnp.array([0, 0, 1, 2])
    run = partial(graph.segment_softmax, segment_ids=ids, num_segments=4)
    close(run(jnp.array([0.0, -jnp.inf, -jnp.inf, 5e4])), jnp.array([1.0, 0.0, 0.0, 1.0]))
    masked = partial(run, mask=jnp.zeros(4, bool))
    assert not jnp.any(masked(jnp.full(4, jnp.nan)))
    assert not jnp.any(jax.grad(lambda s: jnp.sum(masked(s)))(jnp.ones(4)))


def test_segment_softmax_gradient():
    ids, mask, weights = jnp.array([0, 0, 2, 2, 2]), jnp.array([True, True, True, False, True]), draw(5)
    check_grads(
        lambda s: jnp.sum(weights * graph.segment_softmax(s, ids, num_segments=3, mask=mask)), (draw(5),), 1, rtol=1e-2
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("weighted", [False, True])
def test_aggregation_is_a_loop_over_edges_in_both_forms(reduction, weighted):
    if weighted and reduction in ("max", "min"):
        with pytest.raises(ValueError, match="weight is given"):
            graph.graph_aggregate(X, SENDERS, RECEIVERS, reduction=reduction, edge_weight=WEIGHT)
        return
    expected = np.zeros((N, H, D))
    for node in range(N):
        rows = [np.asarray(X[s], np.float64) for s, r, _ in EDGES if r == node]
        shares = [float(WEIGHT[e]) if weighted else 1.0 for _, r, e in EDGES if r == node]
        if rows:
            total = sum(w * x for w, x in zip(shares, rows, strict=True))
            expected[node] = {
                "sum": total, "mean": total / sum(shares), "max": np.max(rows, 0), "min": np.min(rows, 0)
            }[reduction]  # fmt: skip

    def listed(x):
        return graph.graph_aggregate(
            x, SENDERS, RECEIVERS, reduction=reduction, edge_weight=WEIGHT if weighted else None, edge_mask=EDGE_MASK
        )

    def dense(x):
        matrix = ADJACENCY if weighted else ADJACENCY != 0
        return graph.dense_graph_aggregate(x[None], matrix[None], reduction=reduction)[0]

    close(listed(X), expected)
    close(dense(X), expected)
    gradients = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(X) for f in (listed, dense)]
    close(*gradients)
    assert jnp.all(jnp.isfinite(gradients[0]))


def test_bipartite_aggregation_has_its_own_receivers():
    users, items = jnp.array([0, 0, 2]), jnp.array([1, 3, 3])
    ours = graph.graph_aggregate(draw(4, D), items, users, num_nodes=3)
    assert ours.shape == (3, D)
    assert not jnp.any(ours[1])


def test_edge_weights_may_differ_between_heads():
    weight = draw(E, H)
    ours = graph.graph_aggregate(X, SENDERS, RECEIVERS, edge_weight=weight, edge_mask=EDGE_MASK)
    for head in range(H):
        one = graph.graph_aggregate(X[:, head], SENDERS, RECEIVERS, edge_weight=weight[:, head], edge_mask=EDGE_MASK)
        close(ours[:, head], one)


@pytest.mark.parametrize("self_loops", [False, True])
def test_graph_convolution_is_the_normalised_adjacency(self_loops):
    matrix = np.asarray(ADJACENCY, np.float64)
    if self_loops:
        matrix = matrix + np.diag(np.diag(matrix) == 0)
    degree = matrix.sum(1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    expected = np.einsum("nm,mhd->nhd", root[:, None] * matrix * root, X)
    close(
        graph.graph_convolution(X, SENDERS, RECEIVERS, edge_weight=WEIGHT, edge_mask=EDGE_MASK, self_loops=self_loops),
        expected,
    )
    close(graph.dense_graph_convolution(X[None], ADJACENCY[None], self_loops=self_loops)[0], expected)


def test_graph_convolution_keeps_constants_of_regular_graphs():
    ring = jnp.arange(5)
    ends = jnp.concatenate([ring, (ring + 1) % 5]), jnp.concatenate([(ring + 1) % 5, ring])
    close(graph.graph_convolution(jnp.ones((5, 1)), *ends), jnp.ones((5, 1)))


def test_gated_aggregation_is_a_loop_in_both_forms():
    gates, value = draw(E, D), draw(N, D)
    expected = np.zeros((N, D))
    for node in range(N):
        opened = [1 / (1 + np.exp(-np.asarray(gates[e], np.float64))) for _, r, e in EDGES if r == node]
        rows = [np.asarray(value[s]) for s, r, _ in EDGES if r == node]
        expected[node] = sum(g * v for g, v in zip(opened, rows, strict=True)) / (sum(opened) + 1e-6) if rows else 0
    close(graph.gated_graph_aggregate(gates, value, SENDERS, RECEIVERS, edge_mask=EDGE_MASK), expected)
    close(graph.dense_gated_graph_aggregate(table(gates), value[None], ADJACENCY[None])[0], expected)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_by_loop(score, value, extra, self_loops, fill):
    """score(i, j, edge row), value rows; loops as PyG's GATConv: removed, then one a node with filled features."""
    output = np.zeros((N, H, D))
    for node in range(N):
        edges = [(s, e) for s, r, e in EDGES if r == node and not (self_loops and s == node)]
        rows = [(s, {name: np.asarray(x[e], np.float64) for name, x in extra.items()}) for s, e in edges]
        if self_loops:
            filled = {
                name: np.mean([row[name] for _, row in rows], 0) if rows and fill == "mean" else np.zeros(x.shape[1:])
                for name, x in extra.items()
            }
            rows.append((node, filled))
        if rows:
            weights = softmax([score(node, s, row) for s, row in rows])
            messages = np.stack([np.asarray(value[s]) + row["value"] for s, row in rows])
            output[node] = np.einsum("eh,ehd->hd", weights, messages)
    return output


@pytest.mark.parametrize(("self_loops", "fill"), [(False, "zero"), (True, "zero"), (True, "mean")])
def test_graph_attention_is_a_loop_in_both_forms(self_loops, fill):
    query, key, edge, edge_value = draw(N, H), draw(N, H), draw(E, H), draw(E, H, D)
    options = {"self_loops": self_loops, "loop_fill": fill}
    expected = attention_by_loop(
        lambda i, j, row: leaky(np.asarray(query[i]) + np.asarray(key[j]) + row["score"]),
        X, {"score": edge, "value": edge_value}, self_loops, fill,
    )  # fmt: skip

    def listed(query, key, value, edge, edge_value):
        return graph.graph_attention(
            query,
            key,
            value,
            SENDERS,
            RECEIVERS,
            edge_score=edge,
            edge_value=edge_value,
            edge_mask=EDGE_MASK,
            **options,
        )

    def dense(query, key, value, edge, edge_value):
        return graph.dense_graph_attention(
            query[None], key[None], value[None], ADJACENCY[None], edge_score=edge, edge_value=edge_value, **options
        )[0]

    close(listed(query, key, X, edge, edge_value), expected)
    close(dense(query, key, X, table(edge), table(edge_value)), expected)
    first = jax.grad(lambda *a: jnp.sum(jnp.sin(listed(*a))), argnums=(0, 1, 2))(query, key, X, edge, edge_value)
    second = jax.grad(lambda *a: jnp.sum(jnp.sin(dense(*a))), argnums=(0, 1, 2))(
        query, key, X, table(edge), table(edge_value)
    )
    close(first, second)


@pytest.mark.parametrize(("self_loops", "fill"), [(False, "zero"), (True, "mean")])
def test_graph_attention_v2_is_a_loop_in_both_forms(self_loops, fill):
    query, key, vector = draw(N, H, D), draw(N, H, D), draw(H, D)
    edge, edge_value = draw(E, H, D), draw(E, H, D)
    options = {"self_loops": self_loops, "loop_fill": fill}
    expected = attention_by_loop(
        lambda i, j, row: np.sum(np.asarray(vector) * leaky(np.asarray(query[i] + key[j]) + row["key"]), -1),
        X, {"key": edge, "value": edge_value}, self_loops, fill,
    )  # fmt: skip
    listed = graph.graph_attention_v2(
        query, key, X, vector, SENDERS, RECEIVERS,
        edge_key=edge, edge_value=edge_value, edge_mask=EDGE_MASK, **options,
    )  # fmt: skip
    dense = graph.dense_graph_attention_v2(
        query[None], key[None], X[None], vector, ADJACENCY[None],
        edge_key=table(edge), edge_value=table(edge_value), **options,
    )  # fmt: skip
    close(listed, expected)
    close(dense[0], expected)


def test_attention_weights_sum_to_one_and_skip_masked_edges():
    _, weights = graph.graph_attention(
        draw(N, H), draw(N, H), X, SENDERS, RECEIVERS, edge_mask=EDGE_MASK, return_weights=True
    )
    assert weights.shape == (E + N, H)
    assert not jnp.any(weights[:E][~EDGE_MASK])
    receivers = jnp.concatenate([RECEIVERS, jnp.arange(N)])
    close(jax.ops.segment_sum(weights, receivers, N), jnp.ones((N, H)))
    _, dense = graph.dense_graph_attention(draw(1, N, H), draw(1, N, H), X[None], ADJACENCY[None], return_weights=True)
    close(jnp.sum(dense, 2), jnp.ones((1, N, H)))
    _, v2 = graph.graph_attention_v2(X, X, X, draw(H, D), SENDERS, RECEIVERS, edge_mask=EDGE_MASK, return_weights=True)
    _, v2_dense = graph.dense_graph_attention_v2(
        X[None], X[None], X[None], draw(H, D), ADJACENCY[None], return_weights=True
    )
    close(jax.ops.segment_sum(v2, receivers, N), jnp.sum(v2_dense, 2)[0])


def test_a_lone_node_attends_to_itself_and_without_loops_to_nothing():
    query, key = draw(N, H), draw(N, H)
    run = partial(graph.graph_attention, query, key, senders=SENDERS, receivers=RECEIVERS, edge_mask=EDGE_MASK)
    close(run(X)[5], X[5])
    assert not jnp.any(run(X, self_loops=False)[5])
    nobody = partial(run, edge_mask=jnp.zeros(E, bool), self_loops=False)
    assert not jnp.any(jax.grad(lambda x: jnp.sum(nobody(x)))(X))
    empty = jnp.zeros((1, N, N), bool)
    assert not jnp.any(graph.dense_graph_attention(query[None], key[None], X[None], empty, self_loops=False))


def test_padding_never_leaks_through_values():
    value = X.at[5].set(jnp.nan)  # only a padded edge touches node 5
    ours = graph.graph_attention(
        draw(N, H), draw(N, H), value, SENDERS, RECEIVERS, edge_mask=EDGE_MASK, self_loops=False
    )
    assert jnp.all(jnp.isfinite(ours))
    assert jnp.all(jnp.isfinite(graph.graph_aggregate(value, SENDERS, RECEIVERS, edge_mask=EDGE_MASK)))


def test_attention_follows_a_relabelling_of_nodes():
    order = jnp.array(RANDOM.permutation(N))
    place = jnp.argsort(order)
    query, key = draw(N, H), draw(N, H)
    ours = graph.graph_attention(query, key, X, SENDERS[:7], RECEIVERS[:7])
    moved = graph.graph_attention(query[order], key[order], X[order], place[SENDERS[:7]], place[RECEIVERS[:7]])
    close(moved, ours[order])


# ---- readouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "min", "attention"])
def test_readouts_agree_and_an_empty_graph_gives_zero(reduction):
    x, scores, present = draw(3, 4, D), draw(3, 4), jnp.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    given = {"scores": scores} if reduction == "attention" else {}
    dense = graph.dense_graph_readout(x, reduction=reduction, node_mask=present, **given)
    listed = graph.graph_readout(
        x.reshape(12, D), jnp.repeat(jnp.arange(3), 4), num_graphs=3, reduction=reduction,
        node_mask=present.reshape(12), **jax.tree.map(jnp.ravel, given),
    )  # fmt: skip
    close(dense, listed)
    assert not jnp.any(dense[2])
    rows = np.asarray(x[1, ::2], np.float64)
    expected = {
        "sum": rows.sum(0), "mean": rows.mean(0), "max": rows.max(0), "min": rows.min(0),
        "attention": softmax(scores[1, ::2]) @ rows,
    }[reduction]  # fmt: skip
    close(dense[1], expected)


# ---- operators -------------------------------------------------------------------------------------------------------


def test_edge_lists_and_tables_come_back():
    senders, receivers, weights, mask = graph.dense_to_edges(ADJACENCY, num_edges=9)
    close(graph.edges_to_dense(senders, receivers, num_nodes=N, edge_weight=weights, edge_mask=mask), ADJACENCY)
    assert int(mask.sum()) == len(EDGES)
    _, _, ones, _ = graph.dense_to_edges(ADJACENCY != 0, num_edges=9)
    assert float(ones.sum()) == len(EDGES)
    assert graph.edges_to_dense(SENDERS[:2], RECEIVERS[:2], num_nodes=2, num_senders=3).shape == (2, 3)


SYMMETRIC = ADJACENCY + ADJACENCY.T


def test_normalised_operators_have_unit_rows_columns_and_radius():
    lonely = jnp.array([1.0] * 5 + [0.0])
    close(jnp.sum(graph.normalized_adjacency(SYMMETRIC, normalization="row"), -1), lonely)
    close(jnp.sum(graph.normalized_adjacency(SYMMETRIC, normalization="column"), -2), lonely)
    close(jnp.max(jnp.linalg.eigvalsh(graph.normalized_adjacency(SYMMETRIC))), 1.0)
    close(jnp.diag(graph.normalized_adjacency(jnp.eye(3) > 2, self_loops=True)), jnp.ones(3))


def test_laplacians_annihilate_what_they_should():
    ones, degree = jnp.ones(N), jnp.sum(SYMMETRIC, -1)
    close(graph.graph_laplacian(SYMMETRIC) @ ones, 0 * ones)
    close(graph.graph_laplacian(SYMMETRIC, normalization="row") @ ones, 0 * ones)
    close(graph.graph_laplacian(SYMMETRIC, normalization="symmetric") @ jnp.sqrt(degree), 0 * ones)
    assert float(jnp.min(jnp.linalg.eigvalsh(graph.graph_laplacian(SYMMETRIC)))) > -1e-5


def test_random_walk_encoding_is_the_diagonal_of_powers():
    step = np.asarray(graph.normalized_adjacency(SYMMETRIC, normalization="row"), np.float64)
    expected = np.stack([np.diag(np.linalg.matrix_power(step, k)) for k in (1, 2, 3)], -1)
    close(graph.random_walk_encoding(SYMMETRIC, num_steps=3), expected)
    close(graph.random_walk_encoding(jnp.stack([SYMMETRIC] * 2), num_steps=3)[1], expected)


@pytest.mark.parametrize("normalization", [None, "symmetric"])
def test_laplacian_encoding_of_a_padded_path_is_that_of_the_path(normalization):
    path = jnp.diag(jnp.ones(3), 1) + jnp.diag(jnp.ones(3), -1)
    run = partial(graph.laplacian_encoding, num_vectors=2, normalization=normalization)
    small = run(path)
    laplacian = graph.graph_laplacian(path, normalization=normalization)
    close(laplacian @ small, small * jnp.linalg.eigvalsh(laplacian)[1:3])
    assert jnp.all(jnp.max(small, 0) >= -jnp.min(small, 0) - 1e-6)
    padded = run(jnp.pad(path, (0, 2)), node_mask=jnp.arange(6) < 4)
    # Two entries of a path's vector have the same magnitude: the sign rule cannot tell them apart.
    close(jnp.abs(padded[:4]), jnp.abs(small), atol=1e-4)
    assert not jnp.any(padded[4:])
    assert graph.laplacian_encoding(path, num_vectors=5).shape == (4, 5)
    assert not jnp.any(graph.laplacian_encoding(path, num_vectors=5)[:, 3:])
    assert not jnp.any(run(path, node_mask=jnp.arange(4) < 2)[:, 1])
    assert not jnp.any(jax.grad(lambda a: jnp.sum(run(a)))(path))


def test_hop_distances_are_breadth_first_search():
    parents = (-1, 0, 0, 1, 3, 3)
    tree = graph.tree_adjacency(parents)
    expected = np.full((6, 6), 3)
    for start in range(6):
        ring, seen = {start}, set()
        for step in range(3):
            for node in ring:
                expected[start, node] = step
            seen |= ring
            ring = {j for i in ring for j in np.flatnonzero(tree[i])} - seen
    chex.assert_trees_all_equal(graph.hop_distances(jnp.asarray(tree), max_hops=2), jnp.asarray(expected))
    directed = jnp.array([[0, 1], [0, 0]])
    chex.assert_trees_all_equal(graph.hop_distances(directed, max_hops=3), jnp.array([[0, 1], [4, 0]]))


def test_bad_requests_say_what_is_wrong():
    with pytest.raises(ValueError, match="reduction 'median' is not one of"):
        graph.segment_reduce(X, jnp.zeros(N, jnp.int32), num_segments=1, reduction="median")
    with pytest.raises(ValueError, match="reduction 'median' is not one of"):
        graph.dense_graph_aggregate(X[None], ADJACENCY[None], reduction="median")
    with pytest.raises(ValueError, match="as many receivers as senders"):
        graph.graph_attention(draw(3, H), draw(N, H), X, SENDERS, RECEIVERS)
    with pytest.raises(ValueError, match="scores belong to"):
        graph.graph_readout(X, jnp.zeros(N, jnp.int32), num_graphs=1, reduction="attention")
    with pytest.raises(ValueError, match=r"parents\[1\] = 7"):
        graph.tree_adjacency((-1, 7))


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

B2 = (jnp.stack([X, X + 1]), jnp.stack([ADJACENCY, SYMMETRIC]))
SWEEP = {
    "aggregate": (lambda x: graph.graph_aggregate(x, SENDERS, RECEIVERS, reduction="mean", edge_mask=EDGE_MASK), (X,)),
    "max": (lambda x: graph.graph_aggregate(x, SENDERS, RECEIVERS, reduction="max", edge_mask=EDGE_MASK), (X,)),
    "convolution": (lambda x: graph.graph_convolution(x, SENDERS, RECEIVERS, edge_mask=EDGE_MASK), (X,)),
    "gat": (
        lambda q, k, v: graph.graph_attention(q, k, v, SENDERS, RECEIVERS, edge_mask=EDGE_MASK),
        (X[..., 0], X[..., 1], X),
    ),
    "gatv2": (
        lambda q, k, v, a: graph.graph_attention_v2(q, k, v, a, SENDERS, RECEIVERS, edge_mask=EDGE_MASK),
        (X, -X, X, X[0]),
    ),
    "gated": (
        lambda g, v: graph.gated_graph_aggregate(g, v, SENDERS, RECEIVERS, edge_mask=EDGE_MASK), (draw(E, H, D), X)
    ),
    "dense gat": (
        lambda q, k, v: graph.dense_graph_attention(q, k, v, B2[1]), (B2[0][..., 0], B2[0][..., 1], B2[0])
    ),
    "readout": (lambda x, s: graph.graph_readout(
        x, jnp.array([0, 0, 1, 1, 1, 2]), num_graphs=3, reduction="attention", scores=s), (X, X[..., 0])),
    "laplacian": (lambda a: graph.graph_laplacian(a, normalization="symmetric"), (SYMMETRIC,)),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x * 0.5]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


# ---- graphs of similarity --------------------------------------------------------------------------------------------


def test_block_cosine_similarity_looks_at_shared_blocks_alone():
    widths, mask = (3, 2, 4), jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0]], bool)
    x = draw(5, 9)
    ours = graph.block_cosine_similarity(x, mask, widths=widths)
    expected = np.zeros((5, 5))
    starts = np.cumsum((0, *widths))
    for i in range(5):
        for j in range(5):
            shared = [m for m in range(3) if mask[i, m] and mask[j, m]]
            if i != j and shared:
                a, b = (
                    np.concatenate([np.asarray(x[k, starts[m] : starts[m + 1]], np.float64) for m in shared])
                    for k in (i, j)
                )
                expected[i, j] = abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-8)
    close(ours, jnp.asarray(expected, jnp.float32))
    chex.assert_trees_all_equal(ours, ours.T)
    absent = ~jnp.repeat(mask, np.array(widths), axis=1)
    close(graph.block_cosine_similarity(jnp.where(absent, 9.0, x), mask, widths=widths), ours)
    low = graph.block_cosine_similarity(x.astype(jnp.bfloat16), mask, widths=widths)
    close(low.astype(jnp.float32), ours, atol=2e-2)
    with pytest.raises(ValueError, match="widths"):
        graph.block_cosine_similarity(x, mask, widths=(3, 2))


def slow_similarity_graph(similarity, groups, sparsity):
    result = np.zeros_like(similarity)
    for group in set(groups[groups >= 0].tolist()):
        nodes = np.flatnonzero(groups == group)
        inside = similarity[np.ix_(nodes, nodes)]
        limit = np.sort(inside.ravel())[int(sparsity * inside.size)]
        kept = np.where(inside >= limit, inside, 0.0)
        for i in range(len(nodes)):
            best = inside[i].argmax()
            if not kept[i].any() and inside[i, best] > 0:
                kept[i, best] = kept[best, i] = inside[i, best]
        result[np.ix_(nodes, nodes)] = kept
    return result


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_similarity_graph_keeps_the_strongest_pairs_of_each_group(sparsity):
    table = np.abs(RANDOM.normal(size=(14, 14))).astype(np.float32)
    table = (table + table.T) * (1 - np.eye(14, dtype=np.float32))
    table[3] = table[:, 3] = 0  # like nobody
    groups = np.array([0, 1, 0, 0, 1, 2, 0, 0, 1, -1, 0, 1, 2, 0])
    ours = graph.similarity_graph(jnp.asarray(table), jnp.asarray(groups), num_groups=3, sparsity=sparsity)
    chex.assert_trees_all_equal(ours, jnp.asarray(slow_similarity_graph(table, groups, sparsity)))
    with pytest.raises(ValueError, match="sparsity"):
        graph.similarity_graph(jnp.asarray(table), jnp.asarray(groups), num_groups=3, sparsity=1.0)
