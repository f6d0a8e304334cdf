"""Resizing, sampling, pooling and patches: torch's numbers, loops in numpy, and each operation's own laws."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import patches
from layers import resampling as resize
from tests.layers.data.torch_images import INPUTS, grid_cases, resize_cases

# Written by: /opt/torchenv/bin/python tests/layers/data/torch_images.py (torch 2.13.0, CPU).
TORCH = np.load(Path(__file__).parent / "data" / "torch_images.npz")
KEYS = jax.random.split(jax.random.key(3), 8)
normal = jax.random.normal
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
OUR_METHOD = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}


def channels_last(x):
    return jnp.asarray(np.moveaxis(np.asarray(x, np.float32), 1, -1))


def inputs(name):
    return jnp.asarray(INPUTS[name], jnp.float32) if "grid" in name else channels_last(INPUTS[name])


IMAGE = inputs("image")

# ---- resize ----------------------------------------------------------------------------------------------------------

RESIZE_CASES = list(enumerate(resize_cases()))


@pytest.mark.parametrize(("i", "case"), RESIZE_CASES)
def test_resize_is_torchs_interpolate(i, case):
    name, options = case
    method = OUR_METHOD.get(options["mode"], options["mode"])
    run = partial(
        resize.resize,
        inputs(name),
        options.get("size"),
        scale=options.get("scale_factor"),
        method=method,
        align_corners=bool(options.get("align_corners")),
        antialias=options.get("antialias", False),
        recompute_scale=options.get("recompute_scale_factor", False),
    )
    implementations = (None,) if method.startswith("nearest") else resize.IMPLEMENTATIONS
    with jax.disable_jit():
        for implementation in implementations:
            close(run(implementation=implementation), channels_last(TORCH[f"resize{i}"]))


def test_the_nearest_pixel_is_the_one_torch_takes_at_every_size():
    """Whole numbers reached only by rounding: torch picks float32 products' floors (seen at 1 .. 64)."""
    x = jnp.arange(49)[None, :, None]
    picked = resize.resize(x, 41, method="nearest")[0, :, 0]
    expected = np.floor(np.arange(41, dtype=np.float32) * (np.float32(49) / np.float32(41))).astype(int)
    chex.assert_trees_all_equal(picked, jnp.asarray(expected))
    assert resize.resize(x > 20, 8, method="nearest-exact").dtype == bool


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_resize_keeps_constants_and_lines(method):
    close(resize.resize(jnp.ones((1, 9, 4, 1)), (5, 7), method=method, antialias=True), jnp.ones((1, 5, 7, 1)))
    line = jnp.linspace(0, 1, 9)[None, :, None]
    inner = resize.resize(line, 17, method="linear", align_corners=True)
    close(inner[0, :, 0], jnp.linspace(0, 1, 17))


def test_density_keeps_its_sum_under_area_resizing():
    x = jax.random.uniform(KEYS[0], (1, 16, 8, 1))
    close(jnp.sum(resize.resize(x, (4, 2), method="area")) * 16, jnp.sum(x))


@pytest.mark.parametrize("implementation", resize.IMPLEMENTATIONS)
@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_gradients_of_resize(implementation, method):
    run = partial(resize.resize, size=(3, 9), method=method, implementation=implementation)
    check_grads(run, (IMAGE[:1, :, :3, :1],), order=1, modes=["rev"], rtol=2e-2)
    close(
        jax.grad(lambda x: jnp.sum(jnp.sin(run(x))))(IMAGE),
        jax.grad(lambda x: jnp.sum(jnp.sin(resize.resize(x, (3, 9), method=method))))(IMAGE),
    )


def test_wide_axes_gather_and_narrow_ones_multiply():
    wide, narrow = (jax.make_jaxpr(partial(resize.resize, size=5))(jnp.ones((1, n, 1))) for n in (100, 30))
    assert "gather" in str(wide)
    assert "dot_general" in str(narrow)


def test_resize_names_what_is_wrong():
    x = jnp.ones((1, 4, 4, 1))
    for options, message in (
        ({"size": 2, "method": "lanczos"}, "method 'lanczos' is not one of nearest, nearest-exact, linear"),
        ({"size": 2, "implementation": "fast"}, "implementation 'fast' is not one of None, matmul, gather"),
        ({"size": 2, "scale": 0.5}, "size 2 and scale 0.5 are not one given"),
        ({}, "size None and scale None are not one given"),
        ({"size": (2, 2, 2)}, "size .* has not one entry for each of 2 spatial axes"),
        ({"scale": 0.1}, "is not at least 1 on every axis"),
        ({"size": 2, "method": "area", "antialias": True}, "antialias is not defined for method 'area'"),
        ({"size": 2, "method": "nearest", "align_corners": True}, "align_corners is not defined for method 'nearest'"),
    ):
        with pytest.raises(ValueError, match=message):
            resize.resize(x, **options)
    with pytest.raises(ValueError, match="dtype int32 is not floating"):
        resize.resize(jnp.ones((1, 4, 4, 1), jnp.int32), 2)


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("i", "case"), list(enumerate(grid_cases())))
def test_grid_sample_is_torchs(i, case):
    name, grid, options = case
    x, grid = inputs(name), inputs(grid)
    run = partial(
        resize.grid_sample,
        method=OUR_METHOD.get(options["mode"], options["mode"]),
        padding=options["padding_mode"],
        align_corners=options["align_corners"],
    )
    close(run(x, grid), channels_last(TORCH[f"grid{i}"]), atol=2e-5)
    if f"grid{i}_dx" in TORCH:
        expected = TORCH[f"grid{i}"]
        weights = channels_last(np.sin(np.arange(expected.size)).reshape(expected.shape))
        dx, dgrid = jax.grad(lambda *a: jnp.sum(run(*a) * weights), argnums=(0, 1))(x, grid)
        close(dx, channels_last(TORCH[f"grid{i}_dx"]), atol=5e-5)
        close(dgrid, jnp.asarray(TORCH[f"grid{i}_dgrid"]), rtol=1e-4, atol=2e-4)


def test_border_positions_have_no_slope_as_in_torch():
    """torch: clip_coordinates_set_grad is 0 on the outermost pixel, not only beyond it."""
    run = partial(resize.grid_sample, IMAGE, padding="border", align_corners=True)
    slope = jax.grad(lambda g: jnp.sum(run(g)))(-jnp.ones((2, 1, 2)))
    assert not jnp.any(slope)


def test_pixels_are_read_where_they_are():
    rows, columns = jnp.meshgrid(jnp.arange(5), jnp.arange(7), indexing="ij")
    position = jnp.broadcast_to(jnp.stack([columns, rows], -1).astype(jnp.float32), (2, 5, 7, 2))
    for method in resize.SAMPLING:
        close(resize.sample_pixels(IMAGE, position, method=method), IMAGE)
    far = jnp.array([[[1e9, -1e9]], [[-jnp.inf, 3.0]]])
    assert not jnp.any(resize.sample_pixels(IMAGE, far, method="nearest"))
    one = resize.sample_pixels(jnp.full((1, 1, 1, 1), 3.0), jnp.full((1, 4, 2), 0.7), padding="reflection")
    close(one, jnp.full((1, 4, 1), 3.0))


def test_reflection_about_centres_of_a_single_pixel():
    one = resize.grid_sample(
        jnp.full((1, 1, 1, 1), 3.0), jnp.full((1, 4, 2), 0.7), padding="reflection", align_corners=True
    )
    close(one, jnp.full((1, 4, 1), 3.0))


def test_warps_by_whole_pixels_move_and_zero_flow_resizes():
    flow = jnp.broadcast_to(jnp.array([2.0, -1.0]), (2, 5, 7, 2))
    for align in (False, True):
        moved = resize.flow_warp(IMAGE, flow, align_corners=align)
        close(moved[:, 1:, :5], IMAGE[:, :-1, 2:])
        assert not jnp.any(moved[:, 0])
        stretched = resize.flow_warp(
            IMAGE, jnp.zeros((2, 8, 10, 2)), units="output", align_corners=align, padding="border"
        )
        close(stretched, resize.resize(IMAGE, (8, 10), align_corners=align), atol=2e-5)
    assert resize.flow_warp(IMAGE, jnp.zeros((2, 1, 1, 2))).shape == (2, 1, 1, 2)


def test_flow_in_output_units_is_semantic_flow_alignment():
    """grid = linspace(-1, 1) + flow / [w, h], sampled with align_corners (card attention_mamba)."""
    flow = normal(KEYS[1], (2, 4, 6, 2))
    base = np.stack(np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 4)), -1)
    expected = resize.grid_sample(IMAGE, jnp.asarray(base + flow / np.array([6, 4]), jnp.float32), align_corners=True)
    close(resize.flow_warp(IMAGE, flow, units="output"), expected)


def test_sampling_names_what_is_wrong():
    with pytest.raises(ValueError, match="grid_sample: padding 'wrap' is not one of zeros, border, reflection"):
        resize.grid_sample(IMAGE, jnp.zeros((2, 3, 2)), padding="wrap")
    with pytest.raises(ValueError, match="positions of 3 coordinates are not for 2 spatial axes"):
        resize.sample_pixels(IMAGE, jnp.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="units 'metres' is not one of pixels, output"):
        resize.flow_warp(IMAGE, jnp.zeros((2, 3, 3, 2)), units="metres")


# ---- shuffles and pooling --------------------------------------------------------------------------------------------


def test_pixel_shuffle_is_torchs_and_has_its_inverse():
    x = channels_last(np.arange(48.0).reshape(1, 12, 2, 2))
    y = resize.pixel_shuffle(x, 2)
    close(y, channels_last(TORCH["pixel_shuffle"]))
    close(resize.pixel_unshuffle(y, 2), x)
    with pytest.raises(ValueError, match="channels 12 is not a multiple of 5"):
        resize.pixel_shuffle(x, 5)
    with pytest.raises(ValueError, match="image 2 x 2 is not a multiple of factor 3"):
        resize.pixel_unshuffle(x, 3)


def test_pooling_is_torchs():
    close(resize.adaptive_avg_pool(IMAGE, (3, 5)), channels_last(TORCH["adaptive_avg"]))
    close(resize.adaptive_max_pool(IMAGE, (3, 5)), channels_last(TORCH["adaptive_max"]))
    for count in (False, True):
        pooled = resize.avg_pool(IMAGE, 3, stride=2, padding=1, count_include_pad=count)
        close(pooled, channels_last(TORCH[f"avg_pool_{count}"]))
    close(resize.max_pool(IMAGE, 3, stride=2, padding=1), channels_last(TORCH["max_pool"]))
    close(resize.adaptive_avg_pool(IMAGE, (5, 7)), IMAGE)
    close(resize.avg_pool(IMAGE, (5, 7))[:, 0, 0], jnp.mean(IMAGE, axis=(1, 2)))
    tiles = [[jnp.mean(IMAGE[:, i : i + 2, j : j + 3], axis=(1, 2)) for j in (0, 3)] for i in (0, 2)]
    close(resize.avg_pool(IMAGE, (2, 3)), jnp.moveaxis(jnp.array(tiles), 2, 0))
    long = jnp.arange(40.0).reshape(1, 20, 2, 1)
    close(resize.avg_pool(long, (9, 1)), long[:, 4:14:9])


def test_pooling_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"max_pool: padding \(2, 2\) is not at most half of window \(3, 3\)"):
        resize.max_pool(IMAGE, 3, padding=2)
    with pytest.raises(ValueError, match="adaptive_max_pool: size 0 is not at least 1"):
        resize.adaptive_max_pool(IMAGE, 0)


@pytest.mark.parametrize(
    "function",
    [
        partial(resize.avg_pool, window=3, stride=2, padding=1, count_include_pad=False),
        partial(resize.max_pool, window=2),
        partial(resize.adaptive_avg_pool, size=3),
        partial(resize.adaptive_max_pool, size=3),
        partial(patches.unfold, kernel=(2, 3), padding=1, stride=2),
    ],
    ids=lambda f: f.func.__name__,
)
def test_gradients_of_pooling_and_patches(function):
    check_grads(function, (IMAGE[:1, :, :6],), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


# ---- patches ---------------------------------------------------------------------------------------------------------

GEOMETRY = {"dilation": (1, 2), "padding": (1, 2), "stride": (2, 1)}


def test_unfold_and_fold_are_torchs():
    windows = patches.unfold(IMAGE, (2, 3), **GEOMETRY)
    columns = jnp.moveaxis(windows, -1, 3).reshape(2, -1, 2 * 6)
    close(jnp.swapaxes(columns, 1, 2), jnp.asarray(TORCH["unfold"]))
    close(patches.fold(windows, (5, 7), (2, 3), **GEOMETRY), channels_last(TORCH["fold"]))


def test_unfold_is_its_definition_in_one_and_three_dimensions():
    line = normal(KEYS[2], (2, 6, 3))
    windows = patches.unfold(line, 3, stride=2, padding=1)
    padded = np.pad(line, ((0, 0), (1, 1), (0, 0)))
    chex.assert_trees_all_equal(windows, jnp.stack([padded[:, o : o + 3] for o in range(0, 6, 2)], 1))
    volume = normal(KEYS[3], (1, 3, 4, 5, 1))
    windows = patches.unfold(volume, (2, 2, 3))
    for o in np.ndindex(2, 3, 3):
        chex.assert_trees_all_equal(windows[0, *o], volume[0, o[0] : o[0] + 2, o[1] : o[1] + 2, o[2] : o[2] + 3])


def test_fold_with_counts_inverts_unfold_and_leaves_uncovered_pixels_zero():
    windows = patches.unfold(IMAGE, 3, padding=1)
    close(patches.fold(windows, (5, 7), 3, padding=1, mean=True), IMAGE)
    gaps = patches.fold(patches.unfold(IMAGE, 1, stride=2), (5, 7), 1, stride=2, mean=True)
    close(gaps[:, ::2, ::2], IMAGE[:, ::2, ::2])
    assert not jnp.any(gaps[:, 1::2])


def test_fold_is_the_adjoint_of_unfold():
    windows = normal(KEYS[4], patches.unfold(IMAGE, (2, 3), **GEOMETRY).shape)
    left = jnp.sum(patches.unfold(IMAGE, (2, 3), **GEOMETRY) * windows)
    close(left, jnp.sum(IMAGE * patches.fold(windows, (5, 7), (2, 3), **GEOMETRY)), rtol=1e-4)


def test_patches_are_row_major_and_come_back():
    image = normal(KEYS[5], (2, 4, 6, 3))
    tokens = patches.patchify(image, (2, 3))
    assert tokens.shape == (2, 4, 18)
    chex.assert_trees_all_equal(tokens[:, 1], image[:, :2, 3:].reshape(2, -1))
    chex.assert_trees_all_equal(patches.unpatchify(tokens, (4, 6), (2, 3)), image)
    video = normal(KEYS[6], (1, 4, 4, 6, 2))
    chex.assert_trees_all_equal(patches.unpatchify(patches.patchify(video, 2), (4, 4, 6), 2), video)


def test_patches_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"size .5, 7. is not a multiple of patch"):
        patches.patchify(IMAGE, 2)
    with pytest.raises(ValueError, match="are not an image of size"):
        patches.unpatchify(jnp.ones((1, 3, 8)), (4, 4), 2)
    with pytest.raises(ValueError, match=r"kernel .9, 9. with dilation .1, 1. is not within the padded"):
        patches.unfold(IMAGE, 9)
    with pytest.raises(ValueError, match="fold: windows of shape"):
        patches.fold(jnp.ones((1, 2, 2, 3, 3, 1)), (5, 5), 3)
    with pytest.raises(ValueError, match=r"stride .* has not one entry for each of 2"):
        patches.unfold(IMAGE, 2, stride=(1, 1, 1))
    with pytest.raises(ValueError, match="tile_starts: tile 9 and stride 2"):
        patches.tile_starts(8, 9, 2)
    with pytest.raises(ValueError, match="1 starts are not one for each of 2 tiles"):
        patches.blend_tiles(jnp.ones((2, 1, 3, 1)), ((0,),), (5,), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="is not within the image"):
        patches.blend_tiles(jnp.ones((1, 1, 3, 1)), ((3,),), (5,), jnp.ones((1, 3)))


def test_tiles_cover_the_length_and_blend_back_to_the_image():
    assert patches.tile_starts(10, 4, 3) == (0, 3, 6)
    assert patches.tile_starts(11, 4, 3) == (0, 3, 6, 7)
    assert patches.tile_starts(4, 4, 3) == (0,)
    starts = tuple((a, b) for a in patches.tile_starts(5, 3, 2) for b in patches.tile_starts(7, 4, 2))
    tiles = jnp.stack([IMAGE[:, a : a + 3, b : b + 4] for a, b in starts])
    ramp = jax.random.uniform(KEYS[7], (len(starts), 3, 4), minval=0.1)
    close(patches.blend_tiles(tiles, starts, (5, 7), ramp), IMAGE)
    hole = patches.blend_tiles(tiles[:1], starts[:1], (5, 7), jnp.ones((1, 3, 4)))
    assert not jnp.any(hole[:, 3:])
    slope = jax.grad(lambda w: jnp.sum(patches.blend_tiles(tiles, starts, (5, 7), w)))(jnp.zeros((1, 3, 4)))
    assert jnp.all(jnp.isfinite(slope))


# ---- what holds for every function -----------------------------------------------------------------------------------

SWEEP = {
    "resize": (partial(resize.resize, size=(3, 9)), (IMAGE,)),
    "resize_antialias": (partial(resize.resize, scale=0.6, method="cubic", antialias=True), (IMAGE,)),
    "grid_sample": (resize.grid_sample, (IMAGE, inputs("grid2"))),
    "sample_pixels": (partial(resize.sample_pixels, method="cubic"), (IMAGE, 3 * inputs("grid2"))),
    "flow_warp": (resize.flow_warp, (IMAGE, inputs("grid2"))),
    "pixel_shuffle": (partial(resize.pixel_shuffle, factor=1), (IMAGE,)),
    "avg_pool": (partial(resize.avg_pool, window=3), (IMAGE,)),
    "max_pool": (partial(resize.max_pool, window=3), (IMAGE,)),
    "adaptive_max_pool": (partial(resize.adaptive_max_pool, size=2), (IMAGE,)),
    "unfold": (partial(patches.unfold, kernel=3), (IMAGE,)),
    "fold": (partial(patches.fold, size=(4, 4), kernel=2, mean=True), (jnp.ones((1, 3, 3, 2, 2, 1)),)),
    "patchify": (partial(patches.patchify, patch=(5, 7)), (IMAGE,)),
}


@pytest.mark.parametrize("name", SWEEP)
def test_every_function_under_jit_vmap_eval_shape_and_bfloat16(name):
    function, arguments = SWEEP[name]
    y = function(*arguments)
    assert jax.eval_shape(function, *arguments) == jax.ShapeDtypeStruct(y.shape, y.dtype)
    with jax.disable_jit():
        close(function(*arguments), y)
    twice = jax.vmap(function)(*(jnp.stack([a, 2 * a]) for a in arguments))
    close(twice[0], y)
    half = function(arguments[0].astype(jnp.bfloat16), *arguments[1:])
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), y, atol=0.05, rtol=0.02)
    # A batch of one is a slice of the batch.
    close(function(*(a[:1] for a in arguments)), y[:1])
