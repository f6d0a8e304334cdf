"""Resampling on grids by torch's conventions: resize, sampling at positions, flow warps, pixel shuffles, pooling."""

import itertools
import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

__all__ = [
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "flow_warp",
    "grid_sample",
    "max_pool",
    "pixel_shuffle",
    "pixel_unshuffle",
    "resize",
    "sample_pixels",
]

METHODS = ("nearest", "nearest-exact", "linear", "cubic", "area")
SAMPLING = ("nearest", "linear", "cubic")
PADDINGS = ("zeros", "border", "reflection")
IMPLEMENTATIONS = ("matmul", "gather")


def _check(function: str, argument: str, value, allowed: tuple):
    if value not in allowed:
        raise ValueError(f"{function}: {argument} {value!r} is not one of {', '.join(map(str, allowed))}")


def _per_axis(function: str, argument: str, value, axes: int) -> tuple:
    if not isinstance(value, tuple):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{function}: {argument} {value} has not one entry for each of {axes} spatial axes")
    return value


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _bins(source: int, target: int) -> list[np.ndarray]:
    """Adaptive pooling's bins, which overlap where the sizes do not divide."""
    return [np.arange(i * source // target, -(-(i + 1) * source // target)) for i in range(target)]


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(distance)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _nearest_index(source: int, target: int, ratio: float, exact: bool) -> np.ndarray:
    # Torch rounds the ratio to float32 first, which decides on which side of a whole number a product falls.
    if source == target:
        return np.arange(target)
    position = (np.arange(target, dtype=np.float32) + np.float32(0.5 if exact else 0)) * np.float32(ratio)
    return np.minimum(np.floor(position).astype(int), source - 1)


@lru_cache(maxsize=256)
def _taps(source: int, target: int, ratio: float, method: str, align_corners: bool, antialias: bool):
    """(target, K) source indices and weights of one axis."""
    if method == "area":
        windows = _bins(source, target)
        parts = [(window, np.full(len(window), 1 / len(window))) for window in windows]
    elif antialias:
        step = _aligned_step(source, target) if align_corners else ratio
        stretch, reach = max(step, 1.0), 1 if method == "linear" else 2
        parts = []
        for i in range(target):
            center = step * (i + 0.5)
            low = max(int(center - reach * stretch + 0.5), 0)
            window = np.arange(low, min(int(center + reach * stretch + 0.5), source))
            distance = (window - center + 0.5) / stretch
            weight = np.maximum(1 - np.abs(distance), 0) if method == "linear" else _cubic(distance, -0.5)
            parts.append((window, weight / weight.sum()))
    else:
        if align_corners:
            position = np.arange(target) * _aligned_step(source, target)
        else:
            position = (np.arange(target) + 0.5) * ratio - 0.5
        if method == "linear":
            position = np.maximum(position, 0)
        low = np.minimum(np.floor(position), source - 1)
        fraction = np.clip(position - low, 0, 1)[:, None]
        offsets = np.array([0, 1] if method == "linear" else [-1, 0, 1, 2])
        distance = fraction - offsets
        weight = 1 - np.abs(distance) if method == "linear" else _cubic(distance, -0.75)
        return np.clip(low[:, None] + offsets, 0, source - 1).astype(int), weight
    width = max(len(window) for window, _ in parts)
    index, weight = np.zeros((target, width), int), np.zeros((target, width))
    for i, (window, share) in enumerate(parts):
        index[i, : len(window)], weight[i, : len(window)] = window, share
    return index, weight


def _aligned_step(source: int, target: int) -> float:
    return (source - 1) / (target - 1) if target > 1 else 0.0


def _resample(x: Array, axis: int, index: np.ndarray, weight: np.ndarray, implementation: str | None) -> Array:
    source, (target, taps) = x.shape[axis], index.shape
    if implementation is None:
        # A matrix needs `source` products an output where taps need few, but no gather, forwards or backwards.
        implementation = "matmul" if source <= 32 * taps else "gather"
    if implementation == "matmul":
        matrix = np.zeros((target, source), np.float32)
        np.add.at(matrix, (np.arange(target)[:, None], index), weight)
        return jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST), -1, axis)
    shape = [1] * x.ndim
    shape[axis] = target
    weight = weight.astype(np.float32)
    return sum(jnp.take(x, index[:, k], axis=axis) * weight[:, k].reshape(shape) for k in range(taps))


@partial(
    jax.jit,
    static_argnames=("size", "scale", "method", "align_corners", "antialias", "recompute_scale", "implementation"),
)
def resize(
    x: Shaped[Array, "B *size C"],
    size: int | tuple[int, ...] | None = None,
    *,
    scale: float | tuple[float, ...] | None = None,
    method: str = "linear",
    align_corners: bool = False,
    antialias: bool = False,
    recompute_scale: bool = False,
    implementation: str | None = None,
) -> Shaped[Array, "B *resized C"]:
    """torch's `F.interpolate` for any number of spatial axes, separably: y = W_1 ... W_d x with fixed sparse W.

    `method`: "nearest", "nearest-exact", "linear" (bi-, trilinear), "cubic" (a = -0.75, bicubic), "area" (adaptive
    average). `antialias` widens linear and cubic (then a = -0.5) by the shrinking, as PIL does. Either `size` or
    `scale`: floor(size * scale) results, read at steps of 1 / scale, or of the true ratio with `recompute_scale`. The
    nearest ones keep any dtype. `implementation`: "matmul" (dense W), "gather" (few taps) or None: by size.
    O(taps) an output and axis, or O(size) by matmul. Source: arXiv:1912.01703 (PyTorch, F.interpolate); cards
    attention_mamba, csrnet_attention, issm_depth_sr, neuromorphic_sign.
    """
    spatial = x.shape[1:-1]
    _check("resize", "method", method, METHODS)
    _check("resize", "implementation", implementation, (None, *IMPLEMENTATIONS))
    if (size is None) == (scale is None):
        raise ValueError(f"resize: size {size} and scale {scale} are not one given, one None")
    if antialias and method not in ("linear", "cubic"):
        raise ValueError(f"resize: antialias is not defined for method {method!r}, only for linear and cubic")
    if align_corners and method not in ("linear", "cubic"):
        raise ValueError(f"resize: align_corners is not defined for method {method!r}, only for linear and cubic")
    if scale is None:
        targets = _per_axis("resize", "size", size, len(spatial))
        ratios = tuple(a / b for a, b in zip(spatial, targets, strict=True) if b > 0)
    else:
        scales = _per_axis("resize", "scale", scale, len(spatial))
        targets = tuple(math.floor(a * s) for a, s in zip(spatial, scales, strict=True))
        exact = recompute_scale or method == "area"
        ratios = tuple((a / b if exact else 1 / s) for a, b, s in zip(spatial, targets, scales, strict=True) if b > 0)
    if min(targets) < 1:
        raise ValueError(f"resize: size {targets} is not at least 1 on every axis")
    nearest = method.startswith("nearest")
    if not nearest and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"resize: dtype {x.dtype} is not floating, which method {method!r} needs")
    y = x if nearest else _wide(x)
    # Axes that shrink most go first: the later ones then have less to do.
    for axis in sorted(range(len(spatial)), key=lambda a: targets[a] / spatial[a]):
        source, target, ratio = spatial[axis], targets[axis], ratios[axis]
        if nearest:
            index = _nearest_index(source, target, ratio, method == "nearest-exact")
            y = jnp.take(y, index, axis=axis + 1)
        else:
            index, weight = _taps(source, target, ratio, method, align_corners, antialias)
            y = _resample(y, axis + 1, index, weight, implementation)
    return y.astype(x.dtype)


def _inside(position: Array, low: float, high: float) -> Array:
    # Not jnp.clip: the slope is 0 on the very edge too, as in torch.
    return jnp.where(position <= low, low, jnp.where(position >= high, high, position))


def _reflect(position: Array, low: float, high: float) -> Array:
    if high <= low:
        return jnp.zeros_like(position)
    span = high - low
    away = jnp.abs(position - low)
    flips = jnp.floor(away / span)
    rest = away - flips * span
    return low + jnp.where(flips % 2 == 0, rest, span - rest)


def _pad_position(position: Array, size: int, padding: str, on_centers: bool) -> Array:
    if padding == "reflection":
        margin = 0.0 if on_centers else 0.5
        position = _reflect(position, -margin, size - 1 + margin)
    return position if padding == "zeros" else _inside(position, 0.0, size - 1.0)


def _axis_taps(position: Array, size: int, method: str, padding: str, on_centers: bool) -> list[tuple[Array, Array]]:
    """(index, weight) of each tap on one axis; the weight is 0 where the tap is outside."""
    if method != "cubic":
        position = _pad_position(position, size, padding, on_centers)
    low = jnp.round(position) if method == "nearest" else jnp.floor(position)
    fraction = position - low
    if method == "nearest":
        taps = [(low, jnp.ones_like(position))]
    elif method == "linear":
        taps = [(low, 1 - fraction), (low + 1, fraction)]
    else:
        a = -0.75
        inner = [((a + 2) * t - (a + 3)) * t * t + 1 for t in (fraction, 1 - fraction)]
        outer = [((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (fraction + 1, 2 - fraction)]
        weights = (outer[0], inner[0], inner[1], outer[1])
        # Torch pads each tap, not the position: the taps of one output may come from both sides of a fold.
        taps = [(_pad_position(low + k - 1, size, padding, on_centers), w) for k, w in enumerate(weights)]
    placed = []
    for index, weight in taps:
        inside = (index >= 0) & (index <= size - 1)
        safe = jnp.clip(index, 0, size - 1).astype(jnp.int32)
        placed.append((safe, jnp.where(inside, weight, 0.0)))
    return placed


def _sample(x: Array, position: Array, method: str, padding: str, on_centers: bool) -> Array:
    """`position` (B, *G, d) float32, in the order of x's axes."""
    batch, *spatial, channels = x.shape
    points = position.reshape(batch, -1, len(spatial))
    axes = [_axis_taps(points[..., i], n, method, padding, on_centers) for i, n in enumerate(spatial)]
    flat, total = _wide(x).reshape(batch, -1, channels), 0.0
    for corner in itertools.product(*axes):
        index, weight = 0, 1.0
        for (tap, share), size in zip(corner, spatial, strict=True):
            index, weight = index * size + tap, weight * share
        total = total + weight[..., None] * jnp.take_along_axis(flat, index[..., None], axis=1)
    return total.reshape(*position.shape[:-1], channels).astype(x.dtype)


def _check_sampling(function: str, x: Array, position: Array, method: str, padding: str):
    _check(function, "method", method, SAMPLING)
    _check(function, "padding", padding, PADDINGS)
    if position.shape[-1] != x.ndim - 2:
        raise ValueError(
            f"{function}: positions of {position.shape[-1]} coordinates are not for {x.ndim - 2} spatial axes"
        )


@partial(jax.jit, static_argnames=("method", "padding"))
def sample_pixels(
    x: Float[Array, "B *size C"],
    position: Float[Array, "B *points d"],
    *,
    method: str = "linear",
    padding: str = "zeros",
) -> Float[Array, "B *points C"]:
    """y_p = x at position p in pixels, (x, y) or (x, y, z): the last spatial axis first; whole numbers are centres.

    `method` "nearest" (half to even), "linear", "cubic" (a = -0.75); `padding` "zeros", "border" or "reflection" (at
    the outer pixels' edges). Differentiable in both arguments. O(2^d) reads a point, 4^d for cubic.
    Source: arXiv:1506.02025 (spatial transformers), equation 5; cards avi_ht, dual_interval_motion.
    """
    _check_sampling("sample_pixels", x, position, method, padding)
    return _sample(x, position.astype(jnp.float32)[..., ::-1], method, padding, on_centers=False)


@partial(jax.jit, static_argnames=("method", "padding", "align_corners"))
def grid_sample(
    x: Float[Array, "B *size C"],
    grid: Float[Array, "B *points d"],
    *,
    method: str = "linear",
    padding: str = "zeros",
    align_corners: bool = False,
) -> Float[Array, "B *points C"]:
    """torch's `F.grid_sample`: x at grid positions in [-1, 1], coordinates (x, y) or (x, y, z).

    -1 and 1 are the centres of the outer pixels with `align_corners`, else their outer edges. `padding` "zeros",
    "border" or "reflection"; `method` "nearest", "linear", "cubic" (torch: 2-D only). The points may have any shape.
    O(2^d) reads a point. Source: arXiv:1506.02025; card attention_mamba, flow alignment (PyTorch's conventions).
    """
    _check_sampling("grid_sample", x, grid, method, padding)
    size = jnp.asarray(x.shape[1:-1], jnp.float32)
    position = grid.astype(jnp.float32)[..., ::-1]
    position = (position + 1) / 2 * (size - 1) if align_corners else ((position + 1) * size - 1) / 2
    return _sample(x, position, method, padding, on_centers=align_corners)


@partial(jax.jit, static_argnames=("units", "method", "padding", "align_corners"))
def flow_warp(
    x: Float[Array, "B H W C"],
    flow: Float[Array, "B Ho Wo 2"],
    *,
    units: str = "pixels",
    method: str = "linear",
    padding: str = "zeros",
    align_corners: bool = True,
) -> Float[Array, "B Ho Wo C"]:
    """y_p = x at (p stretched to x's size) + flow_p, flow in (x, y) order: backward warping.

    `units` "pixels": flow in pixels of x. "output": flow / (Wo, Ho) is added to the grid over [-1, 1], as semantic
    flow alignment does. Zero flow at equal size is the identity; at another size it is `resize` (linear). O(Ho Wo C).
    Source: card attention_mamba, flow alignment (arXiv:2002.10120, equation 2); card dual_interval_motion.
    """
    _check("flow_warp", "units", units, ("pixels", "output"))
    height, width = flow.shape[1:3]
    if align_corners:
        axes = [np.linspace(-1, 1, n) if n > 1 else -np.ones(1) for n in (width, height)]
    else:
        axes = [(2 * np.arange(n) + 1) / n - 1 for n in (width, height)]
    grid = np.stack(np.meshgrid(*axes), axis=-1).astype(np.float32)
    flow = flow.astype(jnp.float32)
    if units == "output":
        shift = flow / np.array([width, height], np.float32)
    else:
        reach = np.array([x.shape[2], x.shape[1]], np.float32) - align_corners
        shift = flow * 2 / np.maximum(reach, 1)
    return grid_sample(x, grid + shift, method=method, padding=padding, align_corners=align_corners)


@partial(jax.jit, static_argnames=("factor",))
def pixel_shuffle(x: Shaped[Array, "B H W D"], factor: int) -> Shaped[Array, "B rH rW C"]:
    """y[r i + a, r j + b, c] = x[i, j, c r^2 + a r + b], r = `factor`: channels to space, torch's channel order.

    Source: arXiv:1609.05158, equation 4; cards dual_path_dun, issm_depth_sr.
    """
    batch, height, width, channels = x.shape
    if channels % factor**2:
        raise ValueError(f"pixel_shuffle: channels {channels} is not a multiple of {factor}^2")
    blocks = x.reshape(batch, height, width, channels // factor**2, factor, factor)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * factor, width * factor, -1)


@partial(jax.jit, static_argnames=("factor",))
def pixel_unshuffle(x: Shaped[Array, "B rH rW C"], factor: int) -> Shaped[Array, "B H W D"]:
    """The inverse of `pixel_shuffle`: space to channels. Source: arXiv:1609.05158; card dual_path_dun."""
    batch, height, width, channels = x.shape
    if height % factor or width % factor:
        raise ValueError(f"pixel_unshuffle: image {height} x {width} is not a multiple of factor {factor}")
    blocks = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // factor, width // factor, -1)


@partial(jax.jit, static_argnames=("size",))
def adaptive_avg_pool(x: Float[Array, "B *size C"], size: int | tuple[int, ...]) -> Float[Array, "B *pooled C"]:
    """Means over bins floor(i n / m) .. ceil((i + 1) n / m) of each axis, n inputs to m outputs, as torch cuts them.

    Source: arXiv:1912.01703 (PyTorch, adaptive_avg_pool2d); cards land_use, convrec.
    """
    return resize(x, size, method="area")


@partial(jax.jit, static_argnames=("size",))
def adaptive_max_pool(x: Float[Array, "B *size C"], size: int | tuple[int, ...]) -> Float[Array, "B *pooled C"]:
    """Maxima over the bins of `adaptive_avg_pool`. Source: arXiv:1912.01703 (PyTorch, adaptive_max_pool2d)."""
    for axis, target in enumerate(_per_axis("adaptive_max_pool", "size", size, x.ndim - 2), start=1):
        if target < 1:
            raise ValueError(f"adaptive_max_pool: size {size} is not at least 1 on every axis")
        windows = [jax.lax.slice_in_dim(x, w[0], w[-1] + 1, axis=axis) for w in _bins(x.shape[axis], target)]
        x = jnp.stack([jnp.max(window, axis=axis) for window in windows], axis=axis)
    return x


def _windows(function: str, x: Array, window, stride, padding) -> tuple[tuple, tuple, tuple]:
    axes = x.ndim - 2
    window = _per_axis(function, "window", window, axes)
    stride = window if stride is None else _per_axis(function, "stride", stride, axes)
    padding = _per_axis(function, "padding", padding, axes)
    if any(2 * p > w for p, w in zip(padding, window, strict=True)):
        raise ValueError(f"{function}: padding {padding} is not at most half of window {window}")
    return (1, *window, 1), (1, *stride, 1), ((0, 0), *((p, p) for p in padding), (0, 0))


def _total_of_tiles(x: Float[Array, "B *size C"], tile: tuple[int, ...]) -> Float[Array, "B *tiles C"]:
    """An axis after the other, incomplete tiles left out: XLA's windows take six times as long on CPUs."""
    for axis, n in enumerate(tile, start=1):
        count = x.shape[axis] // n
        x = jax.lax.slice_in_dim(x, 0, count * n, axis=axis).reshape(*x.shape[:axis], count, n, *x.shape[axis + 1 :])
        parts = (jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(n))
        x = jnp.sum(x, axis=axis + 1) if n > 8 else sum(parts)
    return x


@partial(jax.jit, static_argnames=("window", "stride", "padding", "count_include_pad"))
def avg_pool(
    x: Float[Array, "B *size C"],
    window: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    count_include_pad: bool = True,
) -> Float[Array, "B *pooled C"]:
    """Means over windows, torch's defaults: `stride` is the window, `padding` zeros on both sides, which count.

    Without `count_include_pad` the mean is over the pixels inside. O(window) an output. Source: arXiv:1912.01703
    (PyTorch, avg_pool2d); cards dgad, convrec.
    """
    window, stride, padding = _windows("avg_pool", x, window, stride, padding)
    if stride == window and not np.any(padding):
        return (_total_of_tiles(_wide(x), window[1:-1]) / math.prod(window)).astype(x.dtype)

    def total(y):
        # A Python 0 of y's type: with an array as start JAX does not see the sum, which then has no gradient.
        return jax.lax.reduce_window(y, y.dtype.type(0), jax.lax.add, window, stride, padding)

    sums = total(_wide(x))
    count = math.prod(window) if count_include_pad else total(jnp.ones((1, *x.shape[1:-1], 1), sums.dtype))
    return (sums / count).astype(x.dtype)


@partial(jax.jit, static_argnames=("window", "stride", "padding"))
def max_pool(
    x: Float[Array, "B *size C"],
    window: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
) -> Float[Array, "B *pooled C"]:
    """Maxima over windows; `stride` defaults to the window, `padding` never wins. O(window) an output.

    Source: arXiv:1912.01703 (PyTorch, max_pool2d); cards dual_interval_motion (SPPF), dgad.
    """
    window, stride, padding = _windows("max_pool", x, window, stride, padding)
    return jax.lax.reduce_window(x, x.dtype.type(-np.inf), jax.lax.max, window, stride, padding)
