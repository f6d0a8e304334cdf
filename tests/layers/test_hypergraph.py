"""Hypergraph convolution and attention against matrices and loops in float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import hypergraph

RANDOM = np.random.default_rng(0)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


N, M, H, D = 6, 4, 2, 3
X = draw(N, H, D)
INCIDENCE = jnp.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)[None]
EDGE_WEIGHT = jnp.array([[0.5, 1.5, 2.0, 1.0]])
NODE = draw(1, N, H)


def softmax(values):
    powers = np.exp(np.asarray(values, np.float64) - np.max(values, axis=0))
    return powers / powers.sum(0)


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_hypergraph_convolution_is_its_matrices(normalization):
    x, incidence, weight = (np.asarray(a, np.float64)[0] for a in (draw(1, N, D), INCIDENCE, EDGE_WEIGHT))
    node, edge = incidence @ weight, incidence.sum(0)
    invert = lambda d, p: np.diag(np.where(d > 0, np.where(d > 0, d, 1) ** -p, 0))  # noqa: E731
    middle = incidence @ np.diag(weight) @ invert(edge, 1.0) @ incidence.T
    if normalization == "symmetric":
        expected = invert(node, 0.5) @ middle @ invert(node, 0.5) @ x
    else:
        expected = invert(node, 1.0) @ middle @ x
    run = partial(hypergraph.hypergraph_convolution, edge_weight=EDGE_WEIGHT, normalization=normalization)
    close(run(jnp.asarray(x, jnp.float32)[None], INCIDENCE)[0], expected)
    assert jnp.all(
        jnp.isfinite(jax.grad(lambda x, i: jnp.sum(run(x, i)), argnums=(0, 1))(X[None, :, 0], INCIDENCE * 1.0)[1])
    )


def test_hyperedges_of_two_are_edges_of_a_graph():
    pairs = jnp.array([[1, 0], [1, 1], [0, 1]], bool)[None]
    x = draw(1, 3, D)
    ours = hypergraph.hypergraph_convolution(x, pairs, normalization="row")
    expected = jnp.stack([x[0, :2].mean(0), (x[0, 0] + 2 * x[0, 1] + x[0, 2]) / 4, x[0, 1:].mean(0)])
    close(ours[0], expected)


def hypergraph_loop(value, incidence, member, node, vector, weight):
    value, member, node, vector = (np.asarray(a, np.float64) for a in (value, member, node, vector))
    edges, output = np.zeros((M, H, D)), np.zeros((N, H, D))
    for e in range(M):
        members = np.flatnonzero(incidence[:, e])
        if len(members):
            edges[e] = np.einsum("nh,nhd->hd", softmax(leaky(member[members, e])), value[members])
    for i in range(N):
        mine = np.flatnonzero(incidence[i])
        if len(mine):
            scores = leaky(node[i] + np.sum(vector * edges[mine], -1)) + np.log(np.asarray(weight)[mine])[:, None]
            output[i] = np.einsum("eh,ehd->hd", softmax(scores), edges[mine])
    return output


def test_hypergraph_attention_is_a_loop():
    member, node, vector = draw(1, N, M, H), draw(1, N, H), draw(H, D)
    ours = hypergraph.hypergraph_attention(X[None], INCIDENCE, member, node, vector, edge_weight=EDGE_WEIGHT)
    close(ours[0], hypergraph_loop(X, INCIDENCE[0], member[0], node[0], vector, EDGE_WEIGHT[0]))
    assert not jnp.any(ours[0, 5])


def test_padding_and_order_of_hyperedges_change_nothing():
    member, node, vector = draw(1, N, 1, H), draw(1, N, H), draw(H, D)
    run = partial(hypergraph.hypergraph_attention, X[None], member_score=member, node_score=node, edge_vector=vector)
    ours = run(INCIDENCE)
    close(run(jnp.pad(INCIDENCE, ((0, 0), (0, 0), (0, 3)))), ours)
    close(run(INCIDENCE[..., ::-1]), ours)
    # Weight 0 is as good as not there.
    close(run(INCIDENCE, edge_weight=jnp.array([[1.0, 0, 1, 1]])), run(INCIDENCE.at[..., 1].set(False)))


def test_singletons_leave_every_node_alone():
    ours = hypergraph.hypergraph_attention(
        X[None], jnp.eye(N, dtype=bool)[None], draw(1, N, 1, H), draw(1, N, H), draw(H, D)
    )
    close(ours[0], X)


def test_hypergraph_attention_gradient():
    def run(value, member, vector):
        return jnp.sum(jnp.sin(hypergraph.hypergraph_attention(value, INCIDENCE, member, NODE, vector)))

    check_grads(run, (X[None], draw(1, N, M, H), draw(H, D)), 1, modes=["rev"], rtol=2e-2, atol=2e-3)


def test_hypergraph_errors():
    with pytest.raises(ValueError, match="normalization 'none'"):
        hypergraph.hypergraph_convolution(X[None, :, 0], INCIDENCE, normalization="none")


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

SWEEP = {
    "hypergraph": (lambda x: hypergraph.hypergraph_convolution(x, INCIDENCE), (X[None, :, 0],)),
    "hypergraph attention": (
        lambda v, m, n, a: hypergraph.hypergraph_attention(v, INCIDENCE, m, n, a),
        (X[None], draw(1, N, M, H), draw(1, N, H), X[0]),
    ),
}


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x * 0.5]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_members_write_into_hyperedges_and_read_from_them():
    scores, incidence = draw(1, N, M, H), np.asarray(INCIDENCE[0])
    edges = draw(1, M, H, D)
    written, read = np.zeros((M, H, D)), np.zeros((N, H, D))
    for h in range(H):
        for e in range(M):
            members = np.flatnonzero(incidence[:, e])
            if members.size:
                written[e, h] = softmax(scores[0, members, e, h]) @ np.asarray(X[members, h], np.float64)
        for i in range(N):
            mine = np.flatnonzero(incidence[i])
            if mine.size:
                logits = np.asarray(scores[0, i, mine, h]) + np.log(np.asarray(EDGE_WEIGHT[0, mine]))
                read[i, h] = softmax(logits) @ np.asarray(edges[0, mine, h], np.float64)
    close(hypergraph.hyperedge_gather(scores, X[None], INCIDENCE)[0], written)
    close(hypergraph.hyperedge_read(scores, edges, INCIDENCE, edge_weight=EDGE_WEIGHT)[0], read)
