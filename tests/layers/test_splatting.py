"""Gaussian splatting: projections against finite differences, compositing against a loop over Gaussians."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import splatting

KEYS = jax.random.split(jax.random.key(6), 12)
normal, uniform = jax.random.normal, jax.random.uniform
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
G, C, SIZE = 7, 3, (6, 8)
INTRINSICS = jnp.array([[10.0, 0, 3.5], [0, 12.0, 2.5], [0, 0, 1]])
TURN = splatting.gaussian_covariance(jnp.ones(3), jnp.array([1.0, 0, 0, 0]))  # the identity
MEAN = normal(KEYS[0], (G, 3)) * jnp.array([0.6, 0.5, 0.5]) + jnp.array([0.0, 0.0, 3.0])
SCALE, QUATERNION = uniform(KEYS[1], (G, 3), minval=0.05, maxval=0.4), normal(KEYS[2], (G, 4))
OPACITY, FEATURES = uniform(KEYS[3], (G,), minval=0.2), normal(KEYS[4], (G, C))
SHIFT = jnp.array([0.1, -0.2, 0.3])


def exact(x):
    return np.asarray(x, np.float64)


def scene(mean=MEAN, scale=SCALE, quaternion=QUATERNION):
    covariance = splatting.gaussian_covariance(scale, quaternion)
    return splatting.project_gaussians(mean, covariance, TURN, SHIFT, INTRINSICS)


def render(mean=MEAN, scale=SCALE, quaternion=QUATERNION, opacity=OPACITY, features=FEATURES, **options):
    center, covariance, depth, visible = scene(mean, scale, quaternion)
    return splatting.composite_gaussians(center, covariance, depth, opacity, features, SIZE, visible=visible, **options)


# ---- covariance and projection ---------------------------------------------------------------------------------------


def test_covariance_has_the_scales_as_deviations_and_turns_by_the_quaternion():
    covariance = splatting.gaussian_covariance(SCALE, QUATERNION)
    values = np.linalg.eigvalsh(exact(covariance))
    np.testing.assert_allclose(values, np.sort(exact(SCALE) ** 2, -1), rtol=1e-4)
    quarter = splatting.gaussian_covariance(jnp.array([1.0, 2, 3]), jnp.array([1.0, 0, 0, 1.0]))  # 90 degrees about z
    close(quarter, jnp.diag(jnp.array([4.0, 1, 9])))
    raw = splatting.gaussian_covariance(SCALE, QUATERNION, normalize=False)
    unit = QUATERNION / jnp.linalg.norm(QUATERNION, axis=-1, keepdims=True)
    close(splatting.gaussian_covariance(SCALE, unit, normalize=False), covariance)
    assert jnp.max(jnp.abs(raw - covariance)) > 1e-2
    value, slope = jax.value_and_grad(lambda q: jnp.sum(splatting.gaussian_covariance(jnp.ones(3), q)))(jnp.zeros(4))
    assert value == 3
    assert jnp.all(jnp.isfinite(slope))


ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
ROTATION = jnp.asarray(ROTATION * np.linalg.det(ROTATION), jnp.float32)


def pinhole(point):
    image = exact(INTRINSICS) @ point
    return image[:2] / image[2]


def equirectangular(point):
    x, y, z = point
    r = np.linalg.norm(point)
    turn = np.array([np.arctan2(x, z) / np.pi, 2 * np.arcsin(y / r) / np.pi])
    return ((turn + 1) * np.array([SIZE[1], SIZE[0]]) - 1) / 2


@pytest.mark.parametrize("camera", ["pinhole", "equirectangular"])
def test_projected_covariance_is_that_of_the_linearised_camera(camera):
    covariance = splatting.gaussian_covariance(SCALE, QUATERNION)
    mean = MEAN if camera == "equirectangular" else jnp.einsum("ji,nj->ni", ROTATION, MEAN)
    if camera == "pinhole":
        project = pinhole
        center, flat, depth, visible = splatting.project_gaussians(mean, covariance, ROTATION, SHIFT, INTRINSICS)
    else:
        project = equirectangular
        center, flat, depth, visible = splatting.project_gaussians_equirectangular(
            mean, covariance, ROTATION, SHIFT, SIZE
        )
    for i in range(G):
        point = exact(ROTATION) @ exact(mean[i]) + exact(SHIFT)
        steps = 1e-5 * np.eye(3)
        jacobian = np.stack([(project(point + s) - project(point - s)) / 2e-5 for s in steps], -1) @ exact(ROTATION)
        expected = jacobian @ exact(covariance[i]) @ jacobian.T + 0.3 * np.eye(2)
        np.testing.assert_allclose(center[i], project(point), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(flat[i], expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(depth[i], point[2] if camera == "pinhole" else np.linalg.norm(point), rtol=1e-5)
    assert jnp.all(visible)


def test_the_limit_bounds_the_slope_inside_the_jacobian_alone():
    covariance, aside = splatting.gaussian_covariance(SCALE[:1], QUATERNION[:1]), jnp.array([[9.0, -7.0, 1.0]])
    free = splatting.project_gaussians(aside, covariance, TURN, jnp.zeros(3), INTRINSICS)
    bounded = splatting.project_gaussians(aside, covariance, TURN, jnp.zeros(3), INTRINSICS, limit=(0.5, 0.4))
    close(free[0], bounded[0])
    at_limit = splatting.project_gaussians(jnp.array([[0.5, -0.4, 1.0]]), covariance, TURN, jnp.zeros(3), INTRINSICS)
    close(bounded[1], at_limit[1])


@pytest.mark.parametrize("camera", ["pinhole", "equirectangular"])
def test_points_behind_at_the_camera_and_at_the_poles_are_finite(camera):
    odd = jnp.array([[0.0, 0, -1], [0, 0, 0], [1, 0, 0], [0, 2, 0], [1e-9, -2, 0], [0.0, 0.0, 0.1]])
    covariance = jnp.broadcast_to(0.01 * jnp.eye(3), (6, 3, 3))

    def run(mean, covariance):
        if camera == "pinhole":
            return splatting.project_gaussians(mean, covariance, TURN, jnp.zeros(3), INTRINSICS)
        return splatting.project_gaussians_equirectangular(mean, covariance, TURN, jnp.zeros(3), SIZE)

    visible = run(odd, covariance)[3]
    assert visible.tolist() == ([False] * 6 if camera == "pinhole" else [True, False, True, True, True, False])
    slopes = jax.grad(lambda *a: sum(jnp.sum(x) for x in run(*a)[:3]), argnums=(0, 1))(odd, covariance)
    assert all(jnp.all(jnp.isfinite(s)) for s in slopes)


def test_a_direction_lands_where_the_panorama_shows_it():
    forward, right = jnp.array([[0.0, 0, 1]]), jnp.array([[1.0, 0, 0]])
    for point, pixel in ((forward, (3.5, 2.5)), (right, (5.5, 2.5))):
        center, *_ = splatting.project_gaussians_equirectangular(point, jnp.zeros((1, 3, 3)), TURN, jnp.zeros(3), SIZE)
        close(center[0], jnp.array(pixel))


# ---- compositing -----------------------------------------------------------------------------------------------------


def composite_loop(center, covariance, depth, opacity, features, size, background, max_alpha=0.99):
    center, covariance, depth, opacity, features = map(exact, (center, covariance, depth, opacity, features))
    image, weight, far = np.zeros((*size, features.shape[1])), np.zeros(size), np.zeros(size)
    for y, x in np.ndindex(*size):
        light = 1.0
        for i in np.argsort(depth, kind="stable"):
            d = np.array([x, y]) - center[i]
            alpha = min(max_alpha, opacity[i] * np.exp(-d @ np.linalg.inv(covariance[i]) @ d / 2))
            if alpha < 1 / 255:
                continue
            if light * (1 - alpha) < 1e-4:
                break
            image[y, x] += light * alpha * features[i]
            weight[y, x] += light * alpha
            far[y, x] += light * alpha * depth[i]
            light *= 1 - alpha
        image[y, x] += light * background
    return image, weight, far


@pytest.mark.parametrize("chunk", [1024, 5])
def test_compositing_is_the_loop_front_to_back(chunk):
    center, covariance, depth, visible = scene()
    background = jnp.array([0.3, -1.0, 2.0])
    ours = render(background=background, chunk=chunk)
    expected = composite_loop(center, covariance, depth, OPACITY, FEATURES, SIZE, exact(background))
    close(ours, tuple(jnp.asarray(x, jnp.float32) for x in expected), atol=1e-4)
    assert jnp.all(visible)


def test_opaque_gaussians_end_a_pixel():
    """Five nearly opaque layers: 0.03 and 0.03^2 of the light are left, 0.03^3 would be too little."""
    center, covariance = jnp.full((5, 2), 2.0), jnp.broadcast_to(4 * jnp.eye(2), (5, 2, 2))
    depth, opacity, features = jnp.arange(5.0), jnp.full(5, 0.97), jnp.eye(5)
    ours = splatting.composite_gaussians(center, covariance, depth, opacity, features, (5, 5))
    expected = composite_loop(center, covariance, depth, opacity, features, (5, 5), 0.0)
    close(ours, tuple(jnp.asarray(x, jnp.float32) for x in expected))
    assert jnp.sum(ours[0][2, 2] > 0) == 2


def test_order_of_gaussians_does_not_matter_and_weights_stay_below_one():
    order = jax.random.permutation(KEYS[5], G)
    shuffled = render(MEAN[order], SCALE[order], QUATERNION[order], OPACITY[order], FEATURES[order])
    close(shuffled, render())
    assert jnp.all(render()[1] <= 1)


def test_rendering_is_linear_in_features():
    image, weight, _ = render(features=jnp.ones((G, 2)) * jnp.array([1.0, -2.0]))
    close(image, weight[..., None] * jnp.array([1.0, -2.0]))
    wide = jnp.concatenate([FEATURES, normal(KEYS[6], (G, 4))], -1)
    close(render(features=wide)[0][..., :C], render()[0])


def test_nothing_comes_from_the_invisible_the_transparent_and_the_degenerate():
    behind = MEAN.at[0, 2].set(-5.0)
    image, *_ = render(behind)
    clear, *_ = render(behind, opacity=OPACITY.at[0].set(0.0))
    close(image, clear)
    nothing = render(opacity=jnp.zeros(G))
    assert not any(jnp.any(x) for x in nothing)
    center, covariance, depth, _ = scene()
    flat = splatting.composite_gaussians(center, jnp.zeros_like(covariance), depth, OPACITY, FEATURES, SIZE)
    assert not any(jnp.any(x) for x in flat)


def test_a_gaussian_peaks_at_its_pixel_with_its_opacity():
    image, weight, depth = splatting.composite_gaussians(
        jnp.array([[3.0, 4.0]]), jnp.eye(2)[None], jnp.array([2.0]), jnp.array([0.6]), jnp.ones((1, 1)), SIZE
    )
    assert np.unravel_index(jnp.argmax(weight), SIZE) == (4, 3)
    close((image[4, 3, 0], depth[4, 3]), (jnp.asarray(0.6), jnp.asarray(1.2)))


@pytest.mark.parametrize("chunk", [1024, 20])
def test_gradients_of_rendering(chunk):
    """Without the cut of faint contributions, which jumps."""

    def loss(mean, scale, quaternion, opacity, features):
        image, weight, depth = render(
            mean, scale, quaternion, opacity, features, chunk=chunk, min_alpha=0.0, background=jnp.ones(C)
        )
        return jnp.sum(jnp.sin(image)) + jnp.sum(weight**2) + 0.1 * jnp.sum(depth)

    check_grads(
        loss, (MEAN, SCALE, QUATERNION, 0.8 * OPACITY, FEATURES), order=1, modes=["rev"], rtol=3e-2, atol=3e-2
    )  # fmt: skip


def test_the_cut_of_alpha_lets_the_gradient_pass():
    def peak(opacity):
        return splatting.composite_gaussians(
            jnp.zeros((1, 2)), jnp.eye(2)[None], jnp.ones(1), opacity, jnp.ones((1, 1)), (1, 1)
        )[1][0, 0]

    value, slope = jax.value_and_grad(peak)(jnp.array([3.0]))
    close((value, slope), (jnp.asarray(0.99), jnp.ones(1)))


def test_memory_of_the_backward_pass_is_linear_in_pixels():
    """No array of all Gaussians by all pixels, forwards or backwards: the temporaries do not grow with the image."""

    def temporaries(side):
        def loss(features):
            return jnp.sum(
                splatting.composite_gaussians(
                    jnp.ones((64, 2)), jnp.broadcast_to(jnp.eye(2), (64, 2, 2)), jnp.ones(64), jnp.full(64, 0.1),
                    features, (side, side), chunk=64,
                )[0] ** 2
            )  # fmt: skip

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 3))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) - temporaries(32) < 3 * 32 * 32 * 64 * 4


# ---- colour ----------------------------------------------------------------------------------------------------------


def test_harmonics_are_orthonormal_on_the_sphere():
    """Gauss-Legendre in height times equal steps in longitude is exact for products of degree 6."""
    heights, weights = np.polynomial.legendre.leggauss(8)
    angles = 2 * np.pi * np.arange(16) / 16
    z, a = np.meshgrid(heights, angles, indexing="ij")
    ring = np.sqrt(1 - z**2)
    sphere = jnp.asarray(np.stack([ring * np.cos(a), ring * np.sin(a), z], -1), jnp.float32)
    basis = splatting.spherical_harmonics(sphere, 3)
    gram = jnp.einsum("hak,hal,h->kl", basis, basis, jnp.asarray(weights, jnp.float32)) * 2 * np.pi / 16
    close(gram, jnp.eye(16), atol=1e-5)


def test_signs_and_order_of_harmonics_are_those_of_3dgs():
    x, y, z = 0.48, 0.6, 0.64
    basis = splatting.spherical_harmonics(jnp.array([x, y, z]), 3)
    expected = [
        0.28209479, -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
        1.09254843 * x * y, -1.09254843 * y * z, 0.31539157 * (2 * z * z - x * x - y * y), -1.09254843 * x * z,
        0.54627422 * (x * x - y * y), -0.59004359 * y * (3 * x * x - y * y), 2.89061144 * x * y * z,
        -0.45704580 * y * (4 * z * z - x * x - y * y), 0.37317633 * z * (2 * z * z - 3 * x * x - 3 * y * y),
        -0.45704580 * x * (4 * z * z - x * x - y * y), 1.44530572 * z * (x * x - y * y),
        -0.59004359 * x * (x * x - 3 * y * y),
    ]  # fmt: skip
    close(basis, jnp.asarray(expected, jnp.float32))
    for degree in range(3):
        close(splatting.spherical_harmonics(jnp.array([x, y, z]), degree), basis[: (degree + 1) ** 2])


def test_colour_of_the_constant_harmonic_is_the_colour():
    colors = uniform(KEYS[7], (G, 3))
    for count in (1, 4, 9, 16):
        coefficients = jnp.zeros((G, count, 3)).at[:, 0].set((colors - 0.5) / 0.28209479)
        close(splatting.gaussian_color(coefficients, MEAN), colors)
    assert jnp.all(splatting.gaussian_color(normal(KEYS[8], (G, 16, 3)) * 9, MEAN) >= 0)
    coefficients = normal(KEYS[8], (G, 4, 3))
    close(splatting.gaussian_color(coefficients, 5 * MEAN), splatting.gaussian_color(coefficients, MEAN))
    slope = jax.grad(lambda d: jnp.sum(splatting.gaussian_color(coefficients, d)))(jnp.zeros((G, 3)))
    assert jnp.all(jnp.isfinite(slope))
    with pytest.raises(ValueError, match="degree 4 is not one of 0, 1, 2, 3"):
        splatting.spherical_harmonics(MEAN, 4)
    with pytest.raises(ValueError, match="5 coefficients are not 1, 4, 9 or 16"):
        splatting.gaussian_color(jnp.ones((G, 5, 3)), MEAN)


# ---- what holds for every function -----------------------------------------------------------------------------------

COVARIANCE = splatting.gaussian_covariance(SCALE, QUATERNION)
CENTER, FLAT, DEPTH, _ = scene()
SWEEP = {
    "gaussian_covariance": (splatting.gaussian_covariance, (SCALE, QUATERNION)),
    "project_gaussians": (splatting.project_gaussians, (MEAN, COVARIANCE, TURN, SHIFT, INTRINSICS)),
    "equirectangular": (
        partial(splatting.project_gaussians_equirectangular, size=SIZE), (MEAN, COVARIANCE, TURN, SHIFT)
    ),
    "composite_gaussians": (
        partial(splatting.composite_gaussians, size=SIZE, chunk=20), (CENTER, FLAT, DEPTH, OPACITY, FEATURES)
    ),
    "gaussian_color": (splatting.gaussian_color, (normal(KEYS[8], (G, 9, 3)), MEAN)),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEP)
def test_every_function_under_jit_vmap_eval_shape_and_bfloat16(name):
    function, arguments = SWEEP[name]
    y = function(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(function, *arguments), jax.eval_shape(lambda: y))
    with jax.disable_jit():
        close(function(*arguments), y, atol=1e-4, rtol=1e-4)
    twice = jax.vmap(function)(*(jnp.stack([a, a + 0.01]) for a in arguments))
    close(jax.tree.map(lambda z: z[0], twice), y, atol=1e-4, rtol=1e-4)
    low = [a.astype(jnp.bfloat16) for a in arguments]
    half, wide = function(*low), function(*(a.astype(jnp.float32) for a in low))
    for ours, full in zip(jax.tree.leaves(half), jax.tree.leaves(wide), strict=True):
        close(ours.astype(jnp.float32), full.astype(jnp.float32), atol=0.02, rtol=0.02)


def test_tiles_are_those_that_the_square_around_a_gaussian_meets():
    rng = np.random.default_rng(5)
    center = rng.uniform(-20, 90, (30, 2))
    root = rng.normal(size=(30, 2, 2)) * 2
    covariance = root @ root.transpose(0, 2, 1) + 0.3 * np.eye(2)
    arrays = [jnp.asarray(v, jnp.float32) for v in (center, covariance)]
    bounds, radius = splatting.gaussian_tiles(*arrays, (40, 70))
    for box, r, middle, matrix in zip(np.asarray(bounds), np.asarray(radius), center, covariance, strict=True):
        assert abs(r - 3 * np.sqrt(np.linalg.eigvalsh(matrix)[-1])) < 1.01 + 0.5
        for axis, tiles in enumerate((5, 3)):
            met = [k for k in range(tiles) if 16 * k + 1 < middle[axis] + r and 16 * (k + 1) > middle[axis] - r]
            low, high = box[axis], box[2 + axis]
            assert set(met) <= set(range(low // 16, high // 16))
            assert high - low <= 16 * (len(met) + 1)


def test_nothing_is_drawn_out_of_bounds():
    center, flat = jnp.array([[8.0, 8.0]]), jnp.eye(2)[None] * 20
    arguments = (center, flat, jnp.ones(1), jnp.ones(1), jnp.ones((1, 2)), (16, 16))
    everywhere = splatting.composite_gaussians(*arguments)[0]
    cut = splatting.composite_gaussians(*arguments, bounds=jnp.array([[4, 6, 10, 12]]))[0]
    inside = jnp.zeros((16, 16), bool).at[6:12, 4:10].set(True)[..., None]
    chex.assert_trees_all_close(cut, jnp.where(inside, everywhere, 0.0))


# ---- how many there are ----------------------------------------------------------------------------------------------


def test_density_grows_where_gradients_are_great_and_the_faint_make_room():
    place = jnp.arange(8.0)[:, None] * jnp.array([1.0, 0, 0])
    small, large = np.log(0.001), np.log(0.2)
    log_scale = jnp.where(jnp.arange(8)[:, None] == 1, large, small) * jnp.ones(3)
    alive = jnp.arange(8) < 6
    opacity = jnp.array([0.5, 0.5, 0.5, 0.5, 0.001, 0.5, 0.9, 0.9])
    gradient = jnp.array([3e-4, 5e-4, 0.0, 2.5e-4, 9e-4, 4e-4, 9e-4, 9e-4])
    turned = jnp.tile(jnp.array([0.3, 0.1, -0.5, 0.8]), (8, 1))
    density = partial(splatting.densify_gaussians, place, log_scale, turned, opacity, alive, gradient, extent=2.0)
    index, moved, scale, there = density(KEYS[0])
    # 4 is too faint; 1, 5 and 0 have the greatest slopes and get its place and the two empty ones; 3 gets none.
    assert index.tolist() == [0, 1, 2, 3, 1, 5, 5, 0]
    assert bool(there.all())
    close(moved[jnp.array([0, 2, 3, 5, 6, 7])], place[jnp.array([0, 2, 3, 5, 5, 0])])
    expected = log_scale[index] - jnp.where(index == 1, np.log(1.6), 0.0)[:, None]
    close(scale, expected)
    assert not np.allclose(moved[1], moved[4])
    # Both halves are drawn from the Gaussian that was there.
    keys = jax.random.split(KEYS[1], 4000)
    drawn = jax.vmap(lambda k: density(k)[1][jnp.array([1, 4])])(keys).reshape(-1, 3)
    close(drawn.mean(axis=0), place[1], atol=0.02)
    close(jnp.cov(drawn.T), 0.04 * jnp.eye(3), atol=0.003)
    # Nothing to do: nothing is done.
    index, moved, scale, there = splatting.densify_gaussians(
        place, log_scale, turned, jnp.ones(8), alive, jnp.zeros(8), KEYS[0]
    )
    chex.assert_trees_all_equal((index, moved, scale, there), (jnp.arange(8), place, log_scale, alive))


def test_halves_lie_along_a_long_gaussian():
    long = jnp.log(jnp.array([[1e-4, 1.0, 1e-4], [1.0, 1.0, 1.0]]))
    turn = jnp.array([[np.cos(np.pi / 4), 0, 0, np.sin(np.pi / 4)], [1.0, 0, 0, 0]])  # y to -x
    _, moved, _, _ = splatting.densify_gaussians(
        jnp.zeros((2, 3)), long, turn, jnp.ones(2), jnp.array([True, False]), jnp.ones(2), KEYS[2]
    )
    assert float(jnp.abs(moved[:, 0]).min()) > 0.01
    assert float(jnp.abs(moved[:, 1:]).max()) < 1e-3
