"""Scan orders: permutations with the connectivity their papers claim; scans and their merge."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import scan_orders

GRIDS = [(1, 1), (1, 5), (4, 1), (3, 4), (5, 5), (6, 3), (7, 8)]
ORDERS = {
    "raster": scan_orders.raster_order,
    "column": lambda h, w: scan_orders.raster_order(h, w, column=True),
    "snake": scan_orders.snake_order,
    "snake column": lambda h, w: scan_orders.snake_order(h, w, column=True),
    "ring": scan_orders.ring_order,
    "spiral": lambda h, w: scan_orders.ring_order(h, w, alternate=False),
    "window": lambda h, w: scan_orders.window_order(h, w, 2),
    "window column": lambda h, w: scan_orders.window_order(h, w, (2, 3), column=True),
    "cross": scan_orders.cross_scan_orders,
    "local": lambda h, w: scan_orders.local_scan_orders(h, w, 3),
    "polygon": scan_orders.polygon_scan_orders,
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_a_permutation_with_its_inverse(name):
    for height, width in GRIDS:
        orders = np.atleast_2d(ORDERS[name](height, width))
        inverses = scan_orders.inverse_order(orders)
        for order, inverse in zip(orders, inverses, strict=True):
            np.testing.assert_array_equal(np.sort(order), np.arange(height * width))
            np.testing.assert_array_equal(inverse[order], np.arange(height * width))
            np.testing.assert_array_equal(order[inverse], np.arange(height * width))


@pytest.mark.parametrize("name", ["snake", "snake column", "ring"])
def test_consecutive_cells_touch(name):
    for height in range(1, 12):
        for width in range(1, 12):
            y, x = np.divmod(ORDERS[name](height, width), width)
            assert np.all(np.abs(np.diff(y)) + np.abs(np.diff(x)) == 1), (height, width)


def test_orders_on_a_small_grid():
    # Cells of 3 x 4: 0 1 2 3 / 4 5 6 7 / 8 9 10 11.
    assert scan_orders.raster_order(3, 4, column=True).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert scan_orders.snake_order(3, 4).tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert scan_orders.snake_order(3, 4, column=True).tolist() == [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]
    assert scan_orders.ring_order(3, 4).tolist() == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]
    assert scan_orders.ring_order(4, 4)[12:].tolist() == [5, 9, 10, 6]
    assert scan_orders.ring_order(4, 4, alternate=False)[12:].tolist() == [5, 6, 10, 9]
    assert scan_orders.window_order(3, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert scan_orders.window_order(3, 4, 2, column=True).tolist() == [0, 4, 1, 5, 8, 9, 2, 6, 3, 7, 10, 11]
    cross = scan_orders.cross_scan_orders(2, 2)
    assert cross.tolist() == [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]


def test_polygon_directions_are_turns_of_one_path():
    inwards, outwards, turned, turned_outwards = scan_orders.polygon_scan_orders(5, 6)
    np.testing.assert_array_equal(outwards, inwards[::-1])
    np.testing.assert_array_equal(turned_outwards, turned[::-1])
    # The turned path walks over the turned picture as the path does over the picture.
    picture = np.arange(30).reshape(5, 6)
    np.testing.assert_array_equal(np.rot90(picture, 2).ravel()[turned], picture.ravel()[inwards])


def test_same_window_tokens_stay_close():
    window, height, width = 4, 16, 24
    place = scan_orders.inverse_order(scan_orders.interleaved_order(scan_orders.window_order(height, width, window), 2))
    place = place.reshape(2, height // window, window, width // window, window)
    spread = place.max(axis=(0, 2, 4)) - place.min(axis=(0, 2, 4))
    assert spread.max() < 2 * window**2
    # The two streams' tokens of one cell are neighbours.
    np.testing.assert_array_equal(place[1] - place[0], 1)


def test_interleaving_is_cell_by_cell():
    order = np.array([2, 0, 1])
    assert scan_orders.interleaved_order(order, 2).tolist() == [2, 5, 0, 3, 1, 4]
    both = scan_orders.interleaved_order(np.stack([order, order[::-1]]), 3)
    assert both.shape == (2, 9)
    assert both[1].tolist() == [1, 4, 7, 0, 3, 6, 2, 5, 8]


def test_scan_and_merge():
    height, width = 3, 5
    orders = scan_orders.cross_scan_orders(height, width)
    x = jax.random.normal(jax.random.key(0), (2, 15, 4))
    scanned = scan_orders.scan_sequences(x, orders)
    for k in range(4):
        np.testing.assert_array_equal(scanned[:, k], x[:, orders[k]])
    grid = x.reshape(2, height, width, 4)
    np.testing.assert_array_equal(scanned[:, 1], grid.swapaxes(1, 2).reshape(2, 15, 4))
    chex.assert_trees_all_close(scan_orders.merge_scans(scanned, orders), 4 * x, rtol=1e-6)

    y = jax.random.normal(jax.random.key(1), scanned.shape)
    expected = np.zeros(x.shape)
    for k in range(4):
        expected[:, orders[k]] += np.asarray(y[:, k], np.float64)
    chex.assert_trees_all_close(scan_orders.merge_scans(y, orders), expected, rtol=1e-5, atol=1e-6)
    # Merging is the transpose of scanning, and the other way round; traced orders do as well.
    (pulled,) = jax.vjp(lambda x: scan_orders.scan_sequences(x, orders), x)[1](y)
    chex.assert_trees_all_close(pulled, expected, rtol=1e-5, atol=1e-6)
    (pulled,) = jax.vjp(lambda y: scan_orders.merge_scans(y, jnp.asarray(orders)), y)[1](x)
    np.testing.assert_array_equal(pulled, scanned)


def test_scans_of_integers_bfloat16_vmap_and_eager():
    orders = scan_orders.snake_order(3, 4)[None]
    numbers = jnp.arange(12)[None]
    np.testing.assert_array_equal(scan_orders.scan_sequences(numbers, orders)[0, 0], orders[0])
    assert scan_orders.merge_scans(numbers[:, None], orders).dtype == numbers.dtype
    x = jax.random.normal(jax.random.key(0), (2, 12, 3)).astype(jnp.bfloat16)
    merged = scan_orders.merge_scans(scan_orders.scan_sequences(x, orders), orders)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, x)
    each = jax.vmap(lambda x: scan_orders.merge_scans(scan_orders.scan_sequences(x[None], orders), orders)[0])
    np.testing.assert_array_equal(each(x), x)
    with jax.disable_jit():
        np.testing.assert_array_equal(scan_orders.merge_scans(scan_orders.scan_sequences(x, orders), orders), x)


def test_tables_are_shared_and_cannot_be_written_to():
    table = scan_orders.ring_order(6, 7)
    assert table is scan_orders.ring_order(6, 7)
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="grid 0 x 3 is not"):
        scan_orders.raster_order(0, 3)
    with pytest.raises(ValueError, match="window 0 is not"):
        scan_orders.window_order(2, 3, 0)
    with pytest.raises(ValueError, match="num_streams 0 is not"):
        scan_orders.interleaved_order(np.arange(3), 0)
