"""Curves, point sequences in patches, pooling by code: bit loops, official codes, brute-force patches and clusters."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import curves, serialization

close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)
KEYS = jax.random.split(jax.random.key(0), 4)


def grid(depth, dims):
    return np.stack(np.meshgrid(*[np.arange(1 << depth)] * dims, indexing="ij"), -1).reshape(-1, dims)


# ---- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "dims"), [(10, 3), (16, 2), (1, 1), (8, 4)])
def test_morton_codes_are_interleaved_bits(depth, dims):
    cells = np.random.default_rng(0).integers(0, 1 << depth, (50, dims))
    expected = [
        sum(((int(x) >> i) & 1) << (dims * i + dims - 1 - a) for a, x in enumerate(cell) for i in range(depth))
        for cell in cells
    ]
    codes = curves.morton_encode(jnp.asarray(cells), depth=depth)
    assert np.asarray(codes).tolist() == expected
    np.testing.assert_array_equal(curves.morton_decode(codes, depth=depth, dims=dims), cells)
    np.testing.assert_array_equal(codes >> dims, curves.morton_encode(jnp.asarray(cells >> 1), depth=depth))


@pytest.mark.parametrize(("depth", "dims"), [(4, 2), (3, 3), (1, 3), (2, 4)])
def test_the_hilbert_curve_visits_every_cell_in_single_steps(depth, dims):
    cells = grid(depth, dims)
    codes = curves.hilbert_encode(jnp.asarray(cells), depth=depth)
    np.testing.assert_array_equal(np.sort(codes), np.arange(len(cells)))
    np.testing.assert_array_equal(np.abs(np.diff(cells[np.argsort(codes)], axis=0)).sum(1), 1)
    np.testing.assert_array_equal(curves.hilbert_decode(codes, depth=depth, dims=dims), cells)


@pytest.mark.parametrize(("depth", "dims"), [(10, 3), (16, 2)])
def test_hilbert_codes_of_full_depth_come_back(depth, dims):
    cells = np.random.default_rng(1).integers(0, 1 << depth, (3, 40, dims))
    codes = curves.hilbert_encode(jnp.asarray(cells), depth=depth)
    np.testing.assert_array_equal(curves.hilbert_decode(codes, depth=depth, dims=dims), cells)


def test_codes_equal_the_official_ones():
    # letatanu/Pointcept@6cf2d86, optnet golden case open_a, first cloud: rows z, hilbert-trans, hilbert, z-trans.
    stored = np.load(Path(__file__).parent / "data" / "curve_codes.npz")
    cells = jnp.asarray(stored["grid"].astype(np.int32))
    swapped = cells[:, jnp.array([1, 0, 2])]
    z, hilbert = (partial(f, depth=4) for f in (curves.morton_encode, curves.hilbert_encode))
    np.testing.assert_array_equal(np.stack([z(cells), hilbert(swapped), hilbert(cells), z(swapped)]), stored["codes"])


def test_coordinates_are_cells_of_a_box():
    points = jnp.array([[-0.1, 0.0, 0.49], [0.5, 0.99, 1.0]])
    cells = curves.quantize_coordinates(points, jnp.zeros(3), 0.25, depth=2)
    assert cells.tolist() == [[0, 0, 1], [2, 3, 3]]
    upper = jnp.array([1.0, 2.0, 4.0])
    assert curves.quantize_coordinates(points, jnp.zeros(3), upper / 4, depth=2).tolist() == [[0, 0, 0], [2, 1, 1]]


def test_sorting_is_stable_and_padding_comes_last():
    codes = jnp.array([[3, 1, 3, 0, 1], [2, 2, 2, 2, 2]], jnp.uint32)
    present = jnp.array([[True, True, True, False, True], [False, True, True, True, True]])
    order, inverse = curves.sort_by_code(codes, present)
    assert order.tolist() == [[1, 4, 0, 2, 3], [1, 2, 3, 4, 0]]
    np.testing.assert_array_equal(jnp.take_along_axis(inverse, order, 1), np.arange(5) + np.zeros((2, 1)))
    scores = jnp.array([0.3, -1.0, jnp.inf, 0.0])
    assert curves.sort_by_code(scores)[0].tolist() == [1, 3, 0, 2]


def test_too_many_bits_are_an_error():
    for function in (curves.morton_encode, curves.hilbert_encode):
        with pytest.raises(ValueError, match=r"depth 11 is not in 1\.\.10"):
            function(jnp.zeros((2, 3), jnp.int32), depth=11)
    with pytest.raises(ValueError, match=r"depth 0 is not in 1\.\.16"):
        curves.hilbert_decode(jnp.zeros(2, jnp.uint32), depth=0, dims=2)


# ---- patches ---------------------------------------------------------------------------------------------------------


def cloud(batch, length, heads=2, width=3):
    q, k, v = (jax.random.normal(key, (batch, length, heads, width)) for key in KEYS[:3])
    return q, k, v


def patches_by_hand(order, length, size):
    """Patch (list of tokens) of every token of one cloud, filled up from the patch before."""
    order = np.asarray(order)[:length]
    patches = [list(order[i : i + size]) for i in range(0, length, size)]
    if len(patches) > 1:
        missing = len(patches[-1])
        patches[-1] = patches[-1] + patches[-2][missing:]
    return patches


LENGTHS = [13, 8, 3, 0]


@pytest.fixture
def batch():
    codes = jax.random.randint(KEYS[3], (4, 14), 0, 1000)
    present = jnp.arange(14) < jnp.array(LENGTHS)[:, None]
    # Padding anywhere in the row.
    present = jax.vmap(jax.random.permutation)(jax.random.split(KEYS[3], 4), present)
    order, _ = curves.sort_by_code(codes, present)
    return order, present


@pytest.mark.parametrize("size", [1, 4, 5, 14, 20])
def test_patch_tables_borrow_from_the_previous_patch(batch, size):
    order, present = batch
    windows = serialization.serialized_patches(order, present, patch_size=size)
    for b, length in enumerate(LENGTHS):
        patches = patches_by_hand(order[b], length, size)
        table = np.asarray(windows.table[b])
        assert windows.count[b] == len(patches)
        for row, patch in zip(table, patches, strict=False):
            assert row[row >= 0].tolist() == patch
        assert (table[len(patches) :] == -1).all()
        place = np.asarray(windows.place[b])
        np.testing.assert_array_equal(place >= 0, present[b])
        np.testing.assert_array_equal(table.ravel()[place[place >= 0]], np.flatnonzero(present[b]))
        np.testing.assert_array_equal(np.sort(place[place >= 0]), np.arange(length))


@pytest.mark.parametrize("implementation", ["reference", "windows"])
@pytest.mark.parametrize("size", [4, 5, 20])
def test_attention_is_dense_within_each_patch(batch, size, implementation):
    order, present = batch
    q, k, v = cloud(4, 14)
    output = serialization.serialized_attention(q, k, v, order, present, patch_size=size, implementation=implementation)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    expected = np.zeros(v.shape)
    for b, length in enumerate(LENGTHS):
        for number, patch in enumerate(patches_by_hand(order[b], length, size)):
            for token in np.asarray(order[b])[number * size : min(number * size + size, length)]:
                scores = np.einsum("hd,khd->hk", q[b, token], k[b, patch]) / np.sqrt(3)
                weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
                expected[b, token] = np.einsum("hk,khd->hd", weights, v[b, patch])
    close(output, expected)


def test_one_patch_for_all_is_full_attention_in_any_order():
    q, k, v = cloud(2, 9)
    order = jnp.stack([jnp.arange(9), jax.random.permutation(KEYS[3], 9)])
    close(serialization.serialized_attention(q, k, v, order, patch_size=9), jax.nn.dot_product_attention(q, k, v))


def test_gradients_of_patches(batch):
    order, present = batch

    def loss(q, k, v, implementation):
        output = serialization.serialized_attention(
            q, k, v, order, present, patch_size=4, implementation=implementation
        )
        return jnp.sum(jnp.sin(output))

    gradients = [jax.grad(loss, (0, 1, 2))(*cloud(4, 14), name) for name in ("reference", "windows")]
    close(*gradients)
    assert not np.any(gradients[1][1][3])


def test_patches_in_bfloat16_vmap_and_eager(batch):
    order, present = batch
    run = partial(serialization.serialized_attention, patch_size=4)
    arguments = cloud(4, 14)
    expected = run(*arguments, order, present)
    low = run(*(x.astype(jnp.bfloat16) for x in arguments), order, present)
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), expected, atol=0.05)
    close(jax.vmap(run)(*(x[:, None] for x in (*arguments, order, present)))[:, 0], expected)
    with jax.disable_jit():
        close(run(*arguments, order, present), expected)
    with pytest.raises(ValueError, match="patch_size 0 is not"):
        run(*arguments, order, patch_size=0)


# ---- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("padded", [False, True])
def test_pooling_is_per_distinct_code(reduction, padded):
    codes = jax.random.randint(KEYS[0], (2, 20), 0, 40).astype(jnp.uint32)
    present = jax.random.uniform(KEYS[1], (2, 20)) > 0.3 if padded else None
    x = jax.random.normal(KEYS[2], (2, 20, 3))
    clusters = serialization.cluster_by_code(codes, present, bits=2)
    pooled = serialization.pool_clusters(x, clusters, reduction=reduction)
    copies = serialization.unpool_clusters(pooled, clusters)
    reduce = {"sum": np.sum, "mean": np.mean, "max": np.max}[reduction]
    for b in range(2):
        here = np.ones(20, bool) if present is None else np.asarray(present[b])
        cells = np.asarray(codes[b]) >> 2
        kept = np.unique(cells[here])
        assert clusters.count[b] == len(kept)
        np.testing.assert_array_equal(clusters.code[b, : len(kept)], kept)
        np.testing.assert_array_equal(clusters.present[b], np.arange(20) < len(kept))
        expected = np.stack([reduce(np.asarray(x[b])[here & (cells == cell)], axis=0) for cell in kept])
        close(pooled[b, : len(kept)], expected)
        assert not np.any(pooled[b, len(kept) :])
        close(copies[b][here], expected[np.searchsorted(kept, cells[here])])
        assert not np.any(copies[b][~here])
        np.testing.assert_array_equal(clusters.index[b] == -1, ~here)


def test_dropping_all_bits_leaves_one_mean():
    codes = jax.random.randint(KEYS[0], (1, 6), 0, 1 << 30).astype(jnp.uint32)
    x = jax.random.normal(KEYS[2], (1, 6, 2)).astype(jnp.bfloat16)
    for bits in (30, 32):
        clusters = serialization.cluster_by_code(codes, bits=bits, size=1)
        pooled = serialization.pool_clusters(x, clusters)
        assert pooled.dtype == jnp.bfloat16
        chex.assert_trees_all_close(pooled.astype(jnp.float32), x.astype(jnp.float32).mean(1)[:, None], atol=0.01)


def test_clusters_that_do_not_fit_are_counted_and_left_out():
    codes = jnp.array([[5, 1, 3, 1]], jnp.uint32)
    clusters = serialization.cluster_by_code(codes, bits=0, size=2)
    assert clusters.index.tolist() == [[-1, 0, 1, 0]]
    assert clusters.code.tolist() == [[1, 3]]
    assert clusters.count.tolist() == [3]
    empty = serialization.cluster_by_code(codes, jnp.zeros((1, 4), bool), bits=0)
    assert empty.count.tolist() == [0]
    assert not np.any(serialization.pool_clusters(jnp.ones((1, 4, 1)), empty, reduction="max"))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_gradients_of_pooling(reduction):
    codes = jnp.array([[5, 1, 3, 1, 5, 5], [0, 0, 0, 0, 0, 0]], jnp.uint32)
    clusters = serialization.cluster_by_code(codes, codes[:, :] < 6, bits=0)
    x = jax.random.normal(KEYS[2], (2, 6, 2))
    weights = jnp.arange(24.0).reshape(2, 6, 2)
    gradient = jax.grad(lambda x: jnp.sum(weights * serialization.pool_clusters(x, clusters, reduction=reduction)))(x)
    expected = np.zeros(x.shape)
    for b, token, channel in np.ndindex(x.shape):
        members = np.flatnonzero(codes[b] == codes[b, token])
        share = {"sum": 1, "mean": 1 / len(members), "max": x[b, token, channel] == x[b, members, channel].max()}
        expected[b, token, channel] = share[reduction] * weights[b, int(clusters.index[b, token]), channel]
    close(gradient, expected)


def test_pooling_under_vmap_and_eager():
    codes = jax.random.randint(KEYS[0], (2, 9), 0, 8).astype(jnp.uint32)
    x = jax.random.normal(KEYS[2], (2, 9, 3))

    def pool(x, codes):
        return serialization.pool_clusters(x, serialization.cluster_by_code(codes, bits=1), reduction="max")

    expected = pool(x, codes)
    close(jax.vmap(pool)(x[:, None], codes[:, None])[:, 0], expected)
    with jax.disable_jit():
        close(pool(x, codes), expected)
    with pytest.raises(ValueError, match="reduction 'median' is not one of sum, mean, max"):
        serialization.pool_clusters(x, serialization.cluster_by_code(codes, bits=1), reduction="median")
    with pytest.raises(ValueError, match=r"bits 33 is not in 0\.\.32"):
        serialization.cluster_by_code(codes, bits=33)


# ---- convolution among points ----------------------------------------------------------------------------------------


def scattered(batch, count, side):
    rng = np.random.default_rng(7)
    numbers = np.stack([rng.permutation(side**3)[:count] for _ in range(batch)])
    return jnp.asarray(np.stack(np.unravel_index(numbers, (side,) * 3), axis=-1).astype(np.int32))


@pytest.mark.parametrize("size", [3, 5])
def test_convolution_among_points_is_a_dense_one_read_where_they_are(size):
    cells, present = scattered(2, 40, 5), jnp.arange(40)[None] < jnp.array([[40], [23]])
    keys = jax.random.split(jax.random.key(2), 4)
    x, kernel = jax.random.normal(keys[0], (2, 40, 3)), jax.random.normal(keys[1], (size,) * 3 + (3, 4))
    bias, weight = jax.random.normal(keys[2], (4,)), jax.random.normal(keys[3], (2, 40, 4)) * present[..., None]
    neighbors = serialization.voxel_neighbors(cells, present, kernel_size=size, depth=3)
    rows, places = jnp.arange(2)[:, None], tuple(jnp.moveaxis(cells, -1, 0))

    def dense(x, kernel, bias):
        volume = jnp.zeros((2, 5, 5, 5, 3)).at[(rows, *places)].add(jnp.where(present[..., None], x, 0))
        y = jax.lax.conv_general_dilated(
            volume, kernel, (1, 1, 1), "SAME", dimension_numbers=("NXYZC", "XYZIO", "NXYZC"), precision="highest"
        )
        return jnp.sum((y[(rows, *places)] + bias) * weight)

    def sparse(x, kernel, bias, implementation=None):
        y = serialization.submanifold_convolution(x, kernel, neighbors, bias=bias, implementation=implementation)
        return jnp.sum(y * weight)

    expected = jax.value_and_grad(dense, argnums=(0, 1, 2))(x, kernel, bias)
    for implementation in (None, "reference"):
        found = jax.value_and_grad(partial(sparse, implementation=implementation), argnums=(0, 1, 2))(x, kernel, bias)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_neighbours_are_symmetric_and_absent_points_have_none():
    cells, present = scattered(1, 60, 6), jnp.arange(60)[None] < 41
    table = np.asarray(serialization.voxel_neighbors(cells, present, kernel_size=3, depth=3))[0]
    assert np.all(table[41:] == -1)
    assert table.max() < 41
    np.testing.assert_array_equal(table[:41, 13], np.arange(41))  # the middle is oneself
    for i, k in np.argwhere(table >= 0):
        assert table[table[i, k], 26 - k] == i
    full = serialization.voxel_neighbors(cells[:, :1], kernel_size=1, depth=10)
    assert full.tolist() == [[[0]]]


def test_what_is_no_neighbourhood():
    cells = jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ValueError, match="kernel_size 4 is not odd"):
        serialization.voxel_neighbors(cells, kernel_size=4, depth=3)
    with pytest.raises(ValueError, match=r"depth 11 is not in 1\.\.10"):
        serialization.voxel_neighbors(cells, kernel_size=3, depth=11)
    table = serialization.voxel_neighbors(cells, kernel_size=1, depth=3)
    with pytest.raises(ValueError, match="27 offsets of the kernel are not the 1 of the neighbours"):
        serialization.submanifold_convolution(jnp.zeros((1, 2, 3)), jnp.zeros((3, 3, 3, 3, 2)), table)
    with pytest.raises(ValueError, match="implementation 'fast' is not gather or reference"):
        serialization.submanifold_convolution(jnp.zeros((1, 2, 3)), jnp.zeros((1, 3, 2)), table, implementation="fast")
