"""Relative position biases against loops over pairs, breadth-first search, stored torch numbers and dense tables."""

import itertools
import math
from collections import deque

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import graph, relative, spectral
from layers.linear import linear_attention

RNG = np.random.default_rng(5)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


# How many distances share each bucket, the farthest bucket first, among offsets -max_distance-5 .. max_distance+5:
# torch 2.13 in the float32 arithmetic of transformers' T5, by itertools.groupby over the list of buckets.
T5_RUNS = {
    (True, 32, 128): [43, 27, 18, 14, 9, 7, 4, 4, *[1] * 7],
    (True, 32, 64): [20, 11, 9, 7, 5, 4, 3, 3, *[1] * 7],
    (True, 8, 16): [16, 4, 1],
    (False, 32, 128): [21, 14, 12, 10, 10, 8, 7, 6, 6, 5, 4, 4, 3, 3, 2, 3, *[1] * 15],
    (False, 8, 16): [10, 4, 2, 2, *[1] * 3],
}


@pytest.mark.parametrize("case", T5_RUNS)
def test_t5_buckets_are_those_of_the_published_models(case):
    bidirectional, num_buckets, max_distance = case
    offsets = jnp.arange(-max_distance - 5, max_distance + 6)
    buckets = relative.t5_relative_buckets(
        offsets, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    before = T5_RUNS[case]
    expected = np.repeat(np.arange(len(before), 0, -1), before).tolist()
    if bidirectional:
        expected += [0, *(b + num_buckets // 2 for b in reversed(expected))]
    else:
        expected += [0] * (max_distance + 6)
    assert buckets.tolist() == expected


def test_t5_bias_looks_up_key_minus_query():
    table, query, key = normal(8, 3), jnp.asarray([[0, 5], [30, 2]]), jnp.asarray([[1, 0, 7]] * 2)
    bias = relative.t5_relative_bias(table, query, key, max_distance=16)
    buckets = relative.t5_relative_buckets(key[:, None, :] - query[:, :, None], num_buckets=8, max_distance=16)
    for b, h, i, j in np.ndindex(2, 3, 2, 3):
        assert bias[b, h, i, j] == table[buckets[b, i, j], h]


def test_clipped_bias_shares_one_number_beyond_its_reach():
    table = normal(5, 2)
    bias = relative.clipped_relative_bias(table, jnp.arange(6), jnp.arange(6))
    for h, i, j in np.ndindex(2, 6, 6):
        assert bias[h, i, j] == table[max(-2, min(2, j - i)) + 2, h]


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 3)])
def test_window_index_numbers_offsets_of_cells(shape):
    index = relative.relative_position_index(shape)
    cells = list(np.ndindex(*shape))
    sizes = [2 * s - 1 for s in shape]
    for (i, a), (j, b) in itertools.product(enumerate(cells), repeat=2):
        row = 0
        for p, q, s, size in zip(a, b, shape, sizes, strict=True):
            row = row * size + (p - q + s - 1)
        assert index[i, j] == row
    table = normal(math.prod(sizes), 2)
    bias = relative.relative_position_bias(table, shape=shape)
    np.testing.assert_array_equal(bias[0, 1], np.asarray(table)[index, 1])


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize(("causal", "extra"), [(True, 0), (True, 3), (False, 0), (False, 4)])
def test_skewed_logits_equal_the_gather(length, causal, extra):
    query = normal(2, length, 3, 4)
    rows = (length if causal else 2 * length - 1) + extra
    embedding = normal(rows, 3, 4)
    zero = rows - 1 if causal else rows // 2
    expected = np.zeros((2, 3, length, length), np.float32)
    for row, column in itertools.product(range(length), repeat=2):
        if column <= row or not causal:
            logits = np.einsum("bhd,hd->bh", query[:, row], embedding[zero + column - row])
            expected[:, :, row, column] = logits
    cotangent = normal(*expected.shape)
    grads = []
    for implementation in ("reference", "skew"):
        options = {"causal": causal, "implementation": implementation}
        chex.assert_trees_all_close(relative.skewed_relative_logits(query, embedding, **options), expected, atol=1e-5)
        grads.append(
            jax.grad(lambda q, e, o=options: (relative.skewed_relative_logits(q, e, **o) * cotangent).sum(), (0, 1))(
                query, embedding
            )
        )
    chex.assert_trees_all_close(*grads, atol=1e-4)


def test_alibi_slopes_halve_and_interpolate():
    np.testing.assert_allclose(relative.alibi_slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(relative.alibi_slopes(1), [2.0**-8])
    twelve = relative.alibi_slopes(12)
    np.testing.assert_allclose(twelve[:8], 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(twelve[8:], 0.5 ** np.arange(0.5, 4, 1), rtol=1e-6)
    bias = relative.alibi_bias(twelve, jnp.asarray([4]), jnp.asarray([1, 4, 6]))
    np.testing.assert_allclose(bias[1, 0], [-0.75, 0, -0.5])


def random_graph(nodes=9, edges=11):
    adjacency = np.zeros((nodes, nodes), bool)
    for _ in range(edges):
        i, j = RNG.choice(nodes - 1, 2, replace=False)  # the last node stays alone
        adjacency[i, j] = adjacency[j, i] = True
    return adjacency


def breadth_first(adjacency) -> np.ndarray:
    nodes = len(adjacency)
    hops = np.full((nodes, nodes), nodes)
    for start in range(nodes):
        hops[start, start], queue = 0, deque([start])
        while queue:
            i = queue.popleft()
            for j in np.flatnonzero(adjacency[i]):
                if hops[start, j] == nodes:
                    hops[start, j] = hops[start, i] + 1
                    queue.append(j)
    return hops


def test_hops_are_breadth_first_distances_cut_off():
    graphs = np.stack([random_graph(), np.triu(random_graph())])
    got = graph.hop_distances(jnp.asarray(graphs), max_hops=3)
    for g in range(2):
        np.testing.assert_array_equal(got[g], np.minimum(breadth_first(graphs[g]), 4))


def test_walks_are_counted_by_their_exact_length():
    parents = (-1, 0, 1, 1, 3)
    adjacency = np.zeros((5, 5), bool)
    for node, parent in enumerate(parents[1:], 1):
        adjacency[node, parent] = adjacency[parent, node] = True
    got = relative.walk_reachability(jnp.asarray(adjacency), max_length=3)

    def walks(i, j, length):
        return i == j if length == 0 else any(walks(n, j, length - 1) for n in np.flatnonzero(adjacency[i]))

    for k, i, j in np.ndindex(3, 5, 5):
        assert bool(got[k, i, j]) == (i != j and walks(i, j, k + 1))


def test_hop_bands_double_and_fade():
    path = np.eye(12, k=1, dtype=bool) | np.eye(12, k=-1, dtype=bool)
    weights = relative.hop_band_weights(jnp.asarray(path), num_levels=4, decay=0.5)
    band = {0: 0, 1: 1, 2: 0.5, 3: 0.25, 4: 0.25, 5: 0.125, 6: 0.125, 7: 0.125, 8: 0.125}
    for i, j in np.ndindex(12, 12):
        assert weights[i, j] == band.get(abs(i - j), 0)


def test_tree_hops_are_graph_distances_of_the_tree():
    parents = (-1, 0, 0, 1, 1, 2, -1, 6)
    adjacency = np.zeros((8, 8), bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            adjacency[node, parent] = adjacency[parent, node] = True
    np.testing.assert_array_equal(relative.tree_hops(parents), breadth_first(adjacency))


def test_tree_relations_name_the_nearest_kinship():
    relations = relative.tree_relations((-1, 0, 0, 1, 1, 3), groups=(0, 1, 2, 1, 1, 2))
    names = ("self", "parent", "child", "ancestor", "descendant", "sibling", "same group", "other")
    expected = {(0, 0): "self", (1, 0): "parent", (0, 1): "child", (5, 0): "ancestor", (0, 4): "descendant",
                (3, 4): "sibling", (5, 2): "same group", (5, 4): "other", (1, 2): "sibling"}  # fmt: skip
    assert {pair: names[relations[pair]] for pair in expected} == expected
    assert names[relative.tree_relations((-1, -1))[0, 1]] == "other"  # two roots are no siblings


def test_radial_basis_bias_equals_four_loops_and_ignores_a_common_shift():
    lags, centers, widths = normal(2, 4) * 3, normal(3), normal(3)
    weights, offset = normal(3, 2), normal(2)
    bias = relative.radial_basis_bias(lags, lags, centers, widths, weights, offset)
    for b, h, i, j in np.ndindex(2, 2, 4, 4):
        delta = abs(float(lags[b, i]) - float(lags[b, j]))
        expected = float(offset[h]) + sum(
            float(weights[r, h]) * math.exp(-((delta - float(centers[r])) ** 2) / (abs(float(widths[r])) + 1e-5) ** 2)
            for r in range(3)
        )
        assert bias[b, h, i, j] == pytest.approx(expected, abs=1e-4)
    shifted = relative.radial_basis_bias(lags + 8, lags + 8, centers, widths, weights, offset)
    chex.assert_trees_all_close(shifted, bias, atol=1e-3)
    chex.assert_trees_all_close(bias, jnp.swapaxes(bias, -1, -2))
    assert np.all(np.isfinite(jax.grad(lambda s: relative.radial_basis(jnp.ones(2), centers, s).sum())(jnp.zeros(3))))


def test_distance_bias_equals_its_formula():
    p, q, overlap = normal(2, 3, 2), normal(2, 4, 2), jnp.abs(normal(2, 3, 4))
    strength, share = jnp.asarray([0.5, 2.0]), jnp.asarray([0.0, 3.0])
    plain = relative.distance_bias(p, q, strength, length_scale=0.5)
    full = relative.distance_bias(p, q, strength, length_scale=0.5, overlap=overlap, overlap_strength=share)
    unit = relative.distance_bias(p, q, strength, length_scale=0.5, overlap=overlap)
    for b, h, i, j in np.ndindex(2, 2, 3, 4):
        squared = float(np.sum((np.asarray(p[b, i]) - np.asarray(q[b, j])) ** 2))
        near, seen = -float(strength[h]) * squared / 0.5, math.log(float(overlap[b, i, j]) + 1e-3)
        assert plain[b, h, i, j] == pytest.approx(near, abs=1e-4)
        assert full[b, h, i, j] == pytest.approx(near + float(share[h]) * seen, abs=1e-4)
        assert unit[b, h, i, j] == pytest.approx(near + seen, abs=1e-4)


def spectral_inputs(length=6, modes=4, heads=2, dims=2):
    phi = [jnp.abs(normal(2, length, heads, 3)) + 0.1 for _ in range(2)]
    points = [jnp.asarray(RNG.uniform(-0.5, 0.5, size=(2, length, dims)), jnp.float32) for _ in range(2)]
    sigma = jnp.asarray([[0.2, 0.5], [0.3, 0.7]])[:heads]
    spectrum = relative.gaussian_spectrum(jnp.full((heads, 2), 0.5), sigma, modes=modes, dims=dims, period=2.0)
    return *phi, normal(2, length, heads, 3), *points, spectrum


def dense_oracle(phi_q, phi_k, value, query_points, key_points, spectrum, period, present=None) -> np.ndarray:
    phi_q, phi_k, value, query_points, key_points, spectrum = (
        np.asarray(x, np.float64) for x in (phi_q, phi_k, value, query_points, key_points, spectrum)
    )
    modes, dims = spectrum.shape[1], spectrum.ndim - 1
    output = np.zeros(value.shape)
    for b, h, i in np.ndindex(value.shape[0], value.shape[2], phi_q.shape[1]):
        top, bottom = 0.0, 1e-6
        for j in range(phi_k.shape[1]):
            if present is not None and not present[b, j]:
                continue
            f = 0.0
            for n in itertools.product(range(modes), repeat=dims):
                wave = sum((m - modes // 2) * x for m, x in zip(n, query_points[b, i] - key_points[b, j], strict=True))
                f += spectrum[(h, *n)] * math.cos(2 * math.pi * wave / period)
            weight = f * phi_q[b, i, h] @ phi_k[b, j, h]
            top, bottom = top + weight * value[b, j, h], bottom + weight
        output[b, i, h] = top / bottom
    return output


@pytest.mark.parametrize(("implementation", "tolerance"), [("reference", 1e-4), ("direct", 1e-4), ("gridding", 2e-3)])
def test_spectral_attention_equals_the_dense_table(implementation, tolerance):
    arrays = spectral_inputs()
    present = jnp.asarray([[True] * 6, [True, False, True, True, False, True]])
    got = relative.spectral_linear_attention(*arrays, period=2.0, token_mask=present, implementation=implementation)
    expected = dense_oracle(*arrays, 2.0, present)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


def test_spectral_attention_gradients_agree_and_points_are_constants():
    *arrays, spectrum = spectral_inputs(length=4, heads=1, dims=1)
    cotangent = normal(*arrays[2].shape)

    def loss(phi_q, phi_k, value, p, r, spectrum, implementation):
        return jnp.sum(cotangent * relative.spectral_linear_attention(
            phi_q, phi_k, value, p, r, spectrum, period=2.0, width=7, implementation=implementation))  # fmt: skip

    grads = {
        name: jax.grad(loss, argnums=(0, 1, 2, 3, 4, 5))(*arrays, spectrum, name)
        for name in ("reference", "direct", "gridding")
    }
    chex.assert_trees_all_close(grads["direct"], grads["reference"], atol=1e-4, rtol=1e-3)
    chex.assert_trees_all_close(grads["gridding"], grads["reference"], atol=2e-3, rtol=1e-2)
    assert not np.any(grads["direct"][3])
    assert not np.any(grads["reference"][4])


def test_a_constant_function_gives_plain_linear_attention_and_no_key_gives_zero():
    phi_q, phi_k, value, p, r, spectrum = spectral_inputs(modes=4)
    constant = jnp.zeros_like(spectrum).at[:, 2, 2].set(1.0)
    present = jnp.asarray([[True] * 6, [False] * 6])
    got = relative.spectral_linear_attention(phi_q, phi_k, value, p, r, constant, period=2.0, token_mask=present)
    plain = linear_attention(phi_q, phi_k, value, feature_map="identity", token_mask=present)
    chex.assert_trees_all_close(got, plain, atol=1e-5)
    np.testing.assert_array_equal(got[1], 0)
    sums = relative.spectral_linear_attention(phi_q, phi_k, value, p, r, constant, period=2.0, normalize=False)
    chex.assert_trees_all_close(
        sums, linear_attention(phi_q, phi_k, value, feature_map="identity", normalize=False), atol=1e-4
    )


def test_spectral_attention_ignores_a_common_translation_and_orders_of_keys():
    phi_q, phi_k, value, p, r, spectrum = spectral_inputs()
    got = relative.spectral_linear_attention(phi_q, phi_k, value, p, r, spectrum, period=2.0)
    moved = relative.spectral_linear_attention(phi_q, phi_k, value, p + 0.3, r + 0.3, spectrum, period=2.0)
    chex.assert_trees_all_close(moved, got, atol=1e-4)
    order = RNG.permutation(6)
    shuffled = relative.spectral_linear_attention(
        phi_q, phi_k[:, order], value[:, order], p, r[:, order], spectrum, period=2.0
    )
    chex.assert_trees_all_close(shuffled, got, atol=1e-4)


def test_spectra_make_their_functions():
    offsets = jnp.asarray(RNG.uniform(-0.25, 0.25, size=(1, 7, 3)), jnp.float32)
    distance = np.linalg.norm(offsets[0], axis=-1)
    spectrum = relative.gaussian_spectrum(jnp.asarray([[2.0, 1.0]]), jnp.asarray([[0.1, 0.12]]), modes=16, dims=3,
                                          period=1.0)  # fmt: skip

    def values(spectrum):
        return spectral.nonuniform_fourier_values(spectrum[None].astype(jnp.complex64), offsets, period=1.0)[0, 0].real

    expected = 2 * np.exp(-(distance**2) / 0.02) + np.exp(-(distance**2) / 0.0288)
    np.testing.assert_allclose(values(spectrum), expected, atol=3e-3)
    # Slower decay in frequency: away from the cusp at 0 a coarse lattice is near.
    laplace = relative.laplace_spectrum(jnp.asarray([0.08]), modes=24, period=1.0)
    far = distance > 0.1
    np.testing.assert_allclose(np.asarray(values(laplace))[far], np.exp(-distance[far] / 0.08), atol=2e-2)


def test_no_table_of_pairs_is_made():
    shapes = []
    arrays = spectral_inputs(length=37)
    jaxpr = jax.make_jaxpr(lambda *a: relative.spectral_linear_attention(*a, period=2.0))(*arrays)

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            shapes.extend(v.aval.shape for v in equation.outvars)
            for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(sub, "jaxpr"):
                    walk(sub.jaxpr)
                elif hasattr(sub, "eqns"):
                    walk(sub)

    walk(jaxpr.jaxpr)
    assert len(shapes) > 30
    assert not any(shape.count(37) > 1 for shape in shapes)


BIASES = {
    "lookup": (lambda t: relative.lookup_bias(t, jnp.asarray([[0, 1], [4, 2]])), (5, 2)),
    "t5": (lambda t: relative.t5_relative_bias(t, jnp.arange(3), jnp.arange(4), max_distance=8), (8, 2)),
    "clipped": (lambda t: relative.clipped_relative_bias(t, jnp.arange(3), jnp.arange(4)), (5, 2)),
    "window": (lambda t: relative.relative_position_bias(t, shape=(2, 2)), (9, 2)),
    "skew": (lambda t: relative.skewed_relative_logits(t, jnp.ones((5, 2, 3))), (1, 3, 2, 3)),
    "alibi": (lambda t: relative.alibi_bias(t, jnp.arange(3), jnp.arange(4)), (2,)),
    "radial": (lambda t: relative.radial_basis_bias(t, t, jnp.ones(2), jnp.ones(2), jnp.ones((2, 2))), (2, 3)),
    "distance": (lambda t: relative.distance_bias(t, t, jnp.ones(2)), (3, 2)),
}


@pytest.mark.parametrize("name", BIASES)
def test_batched_jitted_and_differentiable(name):
    function, shape = BIASES[name]
    x = normal(2, *shape)
    whole = jax.vmap(function)(x)
    chex.assert_trees_all_close(whole, jnp.stack([function(x[0]), function(x[1])]), atol=1e-6)
    with jax.disable_jit():
        chex.assert_trees_all_close(function(x[0]), whole[0], atol=1e-6)
    check_grads(function, (x[0],), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)
    low = function(x[0].astype(jnp.bfloat16)).astype(jnp.float32)
    chex.assert_trees_all_close(low, whole[0], atol=0.2, rtol=5e-2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: relative.t5_relative_buckets(jnp.arange(3), num_buckets=2), "num_buckets 2"),
        (lambda: relative.clipped_relative_bias(jnp.ones((4, 1)), jnp.arange(2), jnp.arange(2)), "table of 4"),
        (lambda: relative.relative_position_bias(jnp.ones((8, 1)), shape=(2, 2)), "table of 8"),
        (lambda: relative.skewed_relative_logits(jnp.ones((1, 3, 1, 2)), jnp.ones((4, 1, 2))), "embedding of 4"),
        (lambda: relative.skewed_relative_logits(jnp.ones((1, 3, 1, 2)), jnp.ones((2, 1, 2)), causal=True), "of 2"),
        (lambda: relative.skewed_relative_logits(jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 2)), implementation="x"), "x"),
        (lambda: relative.alibi_slopes(0), "num_heads 0"),
        (lambda: relative.tree_hops((1, 0)), "parents"),
        (lambda: relative.spectral_linear_attention(*spectral_inputs(), period=1.0, implementation="x"), "'x'"),
        (lambda: relative.spectral_linear_attention(*spectral_inputs()[:5], jnp.ones((2, 4, 3)), period=1.0), "axes"),
    ],
)
def test_impossible_requests_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
