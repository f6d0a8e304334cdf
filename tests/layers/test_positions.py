"""Position codes against their formulas, entry by entry, and the symmetries of the lattice."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import positions

RNG = np.random.default_rng(4)


@pytest.mark.parametrize("dim", [6, 7])
def test_transformer_code_alternates_sines_and_cosines(dim):
    at = np.asarray([0.0, 1.0, 3.5, 40.0])
    code = positions.sinusoidal_encoding(jnp.asarray(at), dim=dim)
    for row, p in zip(code, at, strict=True):
        for channel in range(dim):
            angle = p / 10000 ** (2 * (channel // 2) / dim)
            assert row[channel] == pytest.approx((math.sin, math.cos)[channel % 2](angle), abs=1e-5)


@pytest.mark.parametrize("cosine_first", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_code_has_diffusers_order_shift_and_padding(cosine_first, shift):
    code = positions.sinusoidal_encoding(
        jnp.asarray([0, 7, 999]), dim=9, interleaved=False, cosine_first=cosine_first, shift=shift, max_period=100.0,
        scale=0.5,
    )  # fmt: skip
    for row, t in zip(code, [0, 7, 999], strict=True):
        angles = [0.5 * t * math.exp(-math.log(100.0) * i / (4 - shift)) for i in range(4)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected = (cosines + sines if cosine_first else sines + cosines) + [0.0]
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_exponents_in_float32_move_late_times():
    options = {"dim": 64, "interleaved": False, "shift": 1.0}
    code = positions.sinusoidal_encoding(jnp.asarray([999]), float32_exponents=True, **options)
    exponents = np.float32(-math.log(10000.0)) * np.arange(32, dtype=np.float32) / np.float32(31)
    angles = np.float32(999) * np.exp(exponents.astype(np.float64)).astype(np.float32)
    expected = np.concatenate([np.sin(angles, dtype=np.float64), np.cos(angles, dtype=np.float64)])
    np.testing.assert_allclose(code[0], expected, atol=1e-6)
    exact = positions.sinusoidal_encoding(jnp.asarray([999]), **options)
    assert 1e-5 < np.max(np.abs(exact - code)) < 5e-4


def test_one_frequency_is_one_whatever_the_shift():
    code = positions.sinusoidal_encoding(jnp.asarray([0.5]), dim=2, interleaved=False, shift=1.0)
    np.testing.assert_allclose(code, [[math.sin(0.5), math.cos(0.5)]], rtol=1e-6)
    chex.assert_shape(positions.sinusoidal_encoding(jnp.asarray(3), dim=1), (1,))


def test_axial_code_is_one_code_per_axis():
    at = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
    code = positions.axial_sinusoidal_encoding(at, dim=8, max_period=20.0)
    parts = [positions.sinusoidal_encoding(at[:, a], dim=4, max_period=20.0) for a in range(2)]
    chex.assert_trees_all_close(code, jnp.concatenate(parts, axis=-1))


def test_padded_image_has_the_coordinates_of_the_image():
    image = jnp.ones((1, 3, 4), bool)
    padded = jnp.zeros((1, 5, 6), bool).at[:, :3, :4].set(True)
    counted = positions.cumulative_coordinates(image, extent=None)
    np.testing.assert_array_equal(counted[0, :, 0, 0], [1, 2, 3])
    np.testing.assert_array_equal(counted[0, 0, :, 1], [1, 2, 3, 4])
    whole = positions.cumulative_coordinates(image)
    chex.assert_trees_all_close(positions.cumulative_coordinates(padded)[:, :3, :4], whole, atol=1e-6)
    assert whole[0, -1, -1] == pytest.approx([2 * math.pi] * 2, rel=1e-5)
    assert np.all(np.isfinite(positions.cumulative_coordinates(jnp.zeros((1, 2, 2), bool))))


def test_fine_patches_average_to_the_coordinate_of_their_coarse_patch():
    coarse = positions.grid_coordinates((2, 3), align_centers=True)
    fine = positions.grid_coordinates((4, 6), scale=0.5, align_centers=True).reshape(2, 2, 3, 2, 2)
    np.testing.assert_array_equal(coarse, positions.grid_coordinates((2, 3)))
    np.testing.assert_allclose(fine.mean(axis=(1, 3)).reshape(6, 2), coarse)


def test_grid_is_row_major_and_scaled_per_axis():
    grid = positions.grid_coordinates((2, 1, 2), scale=(1.0, 5.0, 2.0))
    np.testing.assert_array_equal(grid, [[0, 0, 0], [0, 0, 2], [1, 0, 0], [1, 0, 2]])


def test_turned_hexagonal_lattice_permutes_projections():
    cells = jnp.asarray(RNG.integers(-5, 6, size=(9, 2)))
    a, b, c = jnp.moveaxis(positions.hexagonal_projections(cells), -1, 0)
    spun = jnp.stack([-cells[:, 1], cells.sum(1)], axis=-1)
    chex.assert_trees_all_close(positions.hexagonal_projections(spun), jnp.stack([-c, a, b], axis=-1))
    # All six neighbours are at distance one: sum of squares of the three projections is 3/2 |p|^2.
    ring = jnp.asarray([(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1)])
    np.testing.assert_allclose(jnp.square(positions.hexagonal_projections(ring)).sum(-1), 1.5)


@pytest.mark.parametrize("order", [("function", "frequency", "axis"), ("frequency", "function", "axis"),
                                   ("function", "axis", "frequency")])  # fmt: skip
@pytest.mark.parametrize("include", [None, "first", "last"])
def test_fourier_code_of_points_in_every_order(order, include):
    points, w = RNG.normal(size=(4, 3)), math.pi * 2.0 ** np.arange(2)
    code = positions.fourier_encoding(
        jnp.asarray(points, jnp.float32), jnp.asarray(w, jnp.float32), order=order, include_input=include
    )
    for row, point in zip(code, points, strict=True):
        entries = {
            (s, f, a): (math.sin, math.cos)[s](w[f] * point[a]) for s in range(2) for f in range(2) for a in range(3)
        }
        names = ("function", "frequency", "axis")
        keys = sorted(entries, key=lambda k: [k[names.index(n)] for n in order])
        expected = [entries[k] for k in keys]
        expected = {None: expected, "first": [*point, *expected], "last": [*expected, *point]}[include]
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_cyclic_code_repeats_after_a_period():
    phase = jnp.asarray([0.0, 0.125, 0.75])
    code = positions.cyclic_encoding(phase, num_harmonics=2)
    chex.assert_trees_all_close(positions.cyclic_encoding(phase + 1, num_harmonics=2), code, atol=1e-5)
    half = math.sqrt(0.5)
    np.testing.assert_allclose(code[1], [half, 1, half, 0], atol=1e-6)
    library = positions.cyclic_encoding(phase, num_harmonics=2, sine_turns=0.5)
    np.testing.assert_allclose(library[1, :2], [math.sin(math.pi / 8), math.sin(math.pi / 4)], rtol=1e-6)


POINTWISE = {
    "sinusoidal": lambda x: positions.sinusoidal_encoding(x, dim=4),
    "axial": lambda x: positions.axial_sinusoidal_encoding(x, dim=4),
    "fourier": lambda x: positions.fourier_encoding(x, jnp.asarray([1.0, 2.0])),
    "cyclic": lambda x: positions.cyclic_encoding(x, num_harmonics=2),
    "hexagonal": positions.hexagonal_projections,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_batched_jitted_and_differentiable(name):
    function, x = POINTWISE[name], jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
    whole = function(x)
    chex.assert_trees_all_close(jax.vmap(function)(x), whole, atol=1e-6)
    with jax.disable_jit():
        chex.assert_trees_all_close(function(x), whole, atol=1e-6)
    jax.test_util.check_grads(function, (x,), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)
    low = function(x.astype(jnp.bfloat16)).astype(jnp.float32)
    chex.assert_trees_all_close(low, function(x.astype(jnp.bfloat16).astype(jnp.float32)), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: positions.sinusoidal_encoding(jnp.ones(2), dim=0), "dim 0"),
        (lambda: positions.axial_sinusoidal_encoding(jnp.ones((2, 3)), dim=8), "dim 8"),
        (lambda: positions.grid_coordinates((2, 2), scale=(1.0,)), "scale"),
        (lambda: positions.fourier_encoding(jnp.ones((2, 3)), jnp.ones(2), order=("axis",) * 3), "order"),
        (lambda: positions.fourier_encoding(jnp.ones((2, 3)), jnp.ones(2), include_input="middle"), "include_input"),
    ],
)
def test_impossible_requests_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
