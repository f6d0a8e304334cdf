"""Windows: partition and merge, shifts and their masks against loops over pairs, hexagons, tables of tokens."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import windows

KEYS = jax.random.split(jax.random.key(0), 5)
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def tokens(*grid, heads=2, key_heads=2, width=3, batch=2):
    shapes = [(batch, *grid, h, width) for h in (heads, key_heads, key_heads)]
    return tuple(jax.random.normal(k, shape) for k, shape in zip(KEYS, shapes, strict=False))


def attend_by_hand(q, k, v, keys, bias):
    """One query; keys is a list of indices into the arrays of keys and values."""
    output = np.zeros(v.shape[-2:])
    for h in range(q.shape[0]):
        if keys:
            scores = np.array([q[h] @ k[(*c, h)] / np.sqrt(q.shape[-1]) + bias(h, c) for c in keys])
            weights = np.exp(scores - scores.max())
            output[h] = sum(w * v[(*c, h)] for w, c in zip(weights, keys, strict=True)) / weights.sum()
    return output


# ---- rectangles ------------------------------------------------------------------------------------------------------

CASES = [
    ((10,), 4, 2),
    ((7, 9), (4, 3), (2, 1)),
    ((8, 8), 4, 2),
    ((5, 3), (2, 7), (1, 3)),
    ((4, 5, 3), (2, 3, 4), (1, 1, 2)),
    ((6, 1), 3, 0),
]


@pytest.mark.parametrize(("grid", "window", "_"), CASES)
def test_merge_undoes_partition(grid, window, _):
    x = jax.random.normal(KEYS[0], (2, *grid, 3))
    parts = windows.partition_windows(x, window)
    np.testing.assert_array_equal(windows.merge_windows(parts, window, grid), x)


def test_windows_and_their_tokens_are_in_raster_order():
    x = jnp.arange(20)[None].reshape(1, 4, 5, 1)
    parts = windows.partition_windows(x, (2, 3))[0, :, :, 0]
    assert parts.tolist() == [
        [0, 1, 2, 5, 6, 7],
        [3, 4, 0, 8, 9, 0],
        [10, 11, 12, 15, 16, 17],
        [13, 14, 0, 18, 19, 0],
    ]
    volume = windows.partition_windows(jnp.arange(16).reshape(1, 2, 2, 4, 1), (1, 2, 2))[0, :, :, 0]
    assert volume.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_small_grids_cut_the_window_and_cancel_the_shift():
    assert windows.fit_window((8, 4, 2), 4, 2) == ((4, 4, 2), (2, 0, 0))
    assert windows.fit_window((9,), (7,), 3) == ((7,), (3,))
    assert windows.fit_window((9,), 3, 3) == ((3,), (0,))


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
@pytest.mark.parametrize("implementation", ["reference", "windows"])
def test_window_attention_is_the_loop_over_pairs(grid, window, shift, implementation):
    q, k, v = tokens(*grid)
    fitted, moved = windows.fit_window(grid, window, shift)
    count = int(np.prod(fitted))
    bias = jax.random.normal(KEYS[3], (2, count, count))
    present = jax.random.uniform(KEYS[4], (2, *grid)) > 0.3
    output = windows.window_attention(
        q, k, v, window=window, shift=shift, bias=bias, token_mask=present, implementation=implementation
    )
    q, k, v, bias, present = (np.asarray(x) for x in (q, k, v, bias, present))
    # A shifted window begins at shift, shift + w, ...; what lies before shift is a window of its own, at the slots it
    # has in the window around the border.
    padded = [-(-n // w) * w for n, w in zip(grid, fitted, strict=True)]

    def window_of(cell):
        return tuple((c - s) // w for c, s, w in zip(cell, moved, fitted, strict=True))

    def slot(cell):
        slots = [(c - s) % p % w for c, s, p, w in zip(cell, moved, padded, fitted, strict=True)]
        return np.ravel_multi_index(slots, fitted)

    cells = list(np.ndindex(*grid))
    expected = np.zeros(v.shape)
    for b in range(2):
        for cell in cells:
            keys = [c for c in cells if window_of(c) == window_of(cell) and present[(b, *c)]]
            here = slot(cell)
            expected[(b, *cell)] = attend_by_hand(
                q[(b, *cell)], k[b], v[b], keys, lambda h, c, here=here: bias[h, here, slot(c)]
            )
    close(output, expected)


def test_the_shift_mask_is_that_of_nine_regions():
    # Swin numbers the slices (-w), (-w, -s), (-s) of both axes and compares the numbers within every window.
    size, window, shift = 8, 4, 1
    region = np.zeros((size, size))
    slices = slice(0, -window), slice(-window, -shift), slice(-shift, None)
    for number, (y, x) in enumerate((y, x) for y in slices for x in slices):
        region[y, x] = number
    region = region.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)
    expected = region[:, :, None] == region[:, None, :]
    np.testing.assert_array_equal(windows.window_shift_mask((size, size), window, shift), expected)
    # Without a shift along an axis nothing is cut along it; grids are rounded up.
    assert windows.window_shift_mask((7, 8), window, 0).all()
    assert not windows.window_shift_mask((7, 3, 8), (4, 4, 4), (0, 0, 2)).all()


@pytest.mark.parametrize("window", [5, (2, 3), (3, 2, 2)])
def test_relative_index_numbers_the_offsets(window):
    sizes = (window,) if isinstance(window, int) else window
    index = windows.window_relative_index(window)
    offsets = list(np.ndindex(*(2 * w - 1 for w in sizes)))
    cells = list(np.ndindex(*sizes))
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            assert offsets[index[i, j]] == tuple(x - y + w - 1 for x, y, w in zip(a, b, sizes, strict=True))
    table = jax.random.normal(KEYS[0], (len(offsets), 2))
    np.testing.assert_array_equal(windows.window_relative_bias(table, window)[1], table[:, 1][index])


def test_padding_before_the_projection_takes_part():
    x = jax.random.normal(KEYS[0], (1, 3, 5, 4))
    padded = windows.pad_to_windows(x, (2, 3))
    assert padded.shape == (1, 4, 6, 4)
    np.testing.assert_array_equal(padded[:, :3, :5], x)
    assert not np.any(padded[:, 3:])
    q = padded.reshape(1, 4, 6, 2, 2)
    with_padding = windows.window_attention(q, q, q, window=(2, 3))[:, :3, :5]
    without = windows.window_attention(q[:, :3, :5], q[:, :3, :5], q[:, :3, :5], window=(2, 3))
    close(with_padding[:, :2, :3], without[:, :2, :3])
    assert np.abs(with_padding - without).max() > 0.01


def test_key_heads_are_shared_by_query_heads():
    q, k, v = tokens(6, 6, heads=4, key_heads=2)
    output = windows.window_attention(q, k, v, window=3, shift=1)
    close(output, windows.window_attention(q, *(jnp.repeat(x, 2, 3) for x in (k, v)), window=3, shift=1))


def test_gradients_are_those_of_the_dense_form():
    present = jnp.ones((2, 5, 6), bool).at[:, :2, :2].set(False)
    bias = jax.random.normal(KEYS[3], (2, 4, 4))

    def loss(q, k, v, bias, implementation):
        output = windows.window_attention(
            q, k, v, window=2, shift=0, bias=bias, token_mask=present, implementation=implementation
        )
        return jnp.sum(jnp.sin(output))

    gradients = [jax.grad(loss, (0, 1, 2, 3))(*tokens(5, 6), bias, name) for name in ("reference", "windows")]
    close(*gradients)
    chex.assert_tree_all_finite(gradients)
    assert not np.any(gradients[1][0][:, :2, :2])


def check_dtypes_vmap_and_eager(run, arguments):
    expected = run(*arguments)
    low = run(*(x.astype(jnp.bfloat16) for x in arguments))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), expected, atol=0.05)
    close(jax.vmap(run)(*(x[:, None] for x in arguments))[:, 0], expected)
    with jax.disable_jit():
        close(run(*arguments), expected)


def test_windows_in_bfloat16_vmap_and_eager():
    check_dtypes_vmap_and_eager(partial(windows.window_attention, window=2, shift=1), tokens(5, 4))


def test_errors_name_the_argument():
    q, k, v = tokens(6, 6)
    with pytest.raises(ValueError, match=r"window \(2, 2, 2\) is not 2 sizes of at least 1"):
        windows.window_attention(q, k, v, window=(2, 2, 2))
    with pytest.raises(ValueError, match="implementation 'swin' is not one of reference, windows"):
        windows.window_attention(q, k, v, window=2, implementation="swin")
    with pytest.raises(ValueError, match="bias for 9 tokens is not one for the fitted window"):
        windows.window_attention(q, k, v, window=2, bias=jnp.zeros((2, 9, 9)))
    with pytest.raises(ValueError, match="is not a grid of 4 windows"):
        windows.merge_windows(jnp.zeros((1, 4, 4, 1)), 2, (6, 6))
    with pytest.raises(ValueError, match="table of 8 rows"):
        windows.window_relative_bias(jnp.zeros((8, 2)), 2)
    with pytest.raises(ValueError, match="radius 0 is not"):
        windows.hex_window(jnp.zeros((1, 2), jnp.int32), radius=0)


# ---- hexagons and tables ---------------------------------------------------------------------------------------------


def disc(radius):
    q, r = np.meshgrid(*[np.arange(-radius, radius + 1)] * 2, indexing="ij")
    return np.stack([q, r], -1)[np.abs(q + r) <= radius]


@pytest.mark.parametrize("radius", [1, 2, 3, 4])
@pytest.mark.parametrize("shifted", [False, True])
def test_hexagons_tile_the_lattice(radius, shifted):
    cells = disc(6 * radius)
    window, slot = windows.hex_window(jnp.asarray(cells), radius=radius, shifted=shifted)
    window, slot = np.asarray(window), np.asarray(slot)
    first, second = np.array([2 * radius + 1, -radius]), np.array([radius, radius + 1])
    move = np.array([-(-radius // 2) + radius // 2, -(radius // 2)]) * shifted
    centre = window[:, :1] * first + window[:, 1:] * second - move
    assert windows.hex_distance(jnp.asarray(cells), jnp.asarray(centre)).max() == radius
    area = 3 * radius**2 + 3 * radius + 1
    inner = (np.abs(centre).max(1) + radius <= 3 * radius) & (np.abs(centre.sum(1)) + radius <= 3 * radius)
    numbers, sizes = np.unique(window[inner], axis=0, return_counts=True)
    assert (sizes == area).all()
    for number in numbers:
        np.testing.assert_array_equal(np.sort(slot[(window == number).all(1)]), np.arange(area))
    # Moving by a basis vector moves the window by one and leaves the slot.
    moved, same = windows.hex_window(jnp.asarray(cells + first), radius=radius, shifted=shifted)
    np.testing.assert_array_equal(moved, window + np.array([1, 0]))
    np.testing.assert_array_equal(same, slot)


def components(groups, count):
    parent = list(range(count))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for group in groups:
        for member in group[1:]:
            parent[root(member)] = root(group[0])
    return len({root(i) for i in range(count)})


@pytest.mark.parametrize(("radius", "apart"), [(1, 7), (2, 13)])
def test_shifted_hexagons_connect_a_disc(radius, apart):
    cells = disc(3 * radius)
    tables = [
        np.asarray(windows.hex_windows(jnp.asarray(cells), radius=radius, shifted=shifted, num_windows=30).table)
        for shifted in (False, True)
    ]
    groups = [[row[row >= 0].tolist() for row in table if (row >= 0).any()] for table in tables]
    assert components(groups[0], len(cells)) == apart
    assert components(groups[0] + groups[1], len(cells)) == 1


def test_lattice_coordinates():
    row, column = jnp.array([0, 1, 1, 2, -1]), jnp.array([0, 1, 3, 0, -3])
    axial = windows.axial_from_doubled(row, column)
    assert axial.tolist() == [[0, 0], [0, 1], [1, 1], [-1, 2], [-1, -1]]
    assert windows.hex_distance(axial, jnp.zeros((1, 2), jnp.int32)).tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("implementation", ["reference", "windows"])
@pytest.mark.parametrize("shifted", [False, True])
def test_hex_window_attention_is_the_loop_over_pairs(implementation, shifted):
    rng = np.random.default_rng(0)
    cells = disc(4)[rng.permutation(61)[:25]]
    present = rng.random(25) > 0.2
    table = windows.hex_windows(jnp.asarray(cells), jnp.asarray(present), radius=1, shifted=shifted)
    q, k, v = tokens(25)
    bias = jax.random.normal(KEYS[3], (2, 7, 7))
    output = windows.token_window_attention(q, k, v, table, bias=bias, implementation=implementation)
    window, slot = windows.hex_window(jnp.asarray(cells), radius=1, shifted=shifted)
    window, slot, q, k, v, bias = (np.asarray(x) for x in (window, slot, q, k, v, bias))
    assert table.count == len(np.unique(window[present], axis=0))
    expected = np.zeros(v.shape)
    for b in range(2):
        for i in np.flatnonzero(present):
            keys = [(j,) for j in np.flatnonzero(present) if (window[i] == window[j]).all()]
            expected[b, i] = attend_by_hand(q[b, i], k[b], v[b], keys, lambda h, c, i=i: bias[h, slot[i], slot[c[0]]])
    close(output, expected)


def test_cells_of_windows_beyond_the_table_are_in_none():
    cells = jnp.asarray(disc(3))
    every = windows.hex_windows(cells, radius=1)
    few = windows.hex_windows(cells, radius=1, num_windows=3)
    assert few.count == every.count > 3
    np.testing.assert_array_equal(few.table, every.table[:3])
    np.testing.assert_array_equal(few.place, np.where(every.place < 21, every.place, -1))
    q, k, v = tokens(37)
    output = windows.token_window_attention(q, k, v, few)
    assert not np.any(output[:, few.place < 0])
    with pytest.raises(ValueError, match="implementation 'hex' is not one of"):
        windows.token_window_attention(q, k, v, few, implementation="hex")


def test_gradients_and_dtypes_of_token_windows():
    cells = jnp.asarray(disc(2))
    table = windows.hex_windows(cells, jnp.arange(19) > 2, radius=1, num_windows=12)

    def loss(q, k, v, implementation):
        return jnp.sum(jnp.sin(windows.token_window_attention(q, k, v, table, implementation=implementation)))

    gradients = [jax.grad(loss, (0, 1, 2))(*tokens(19), name) for name in ("reference", "windows")]
    close(*gradients)
    assert not np.any(gradients[1][2][:, :3])
    check_dtypes_vmap_and_eager(lambda q, k, v: windows.token_window_attention(q, k, v, table), tokens(19))
