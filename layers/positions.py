"""Codes of a position: sinusoids of an index, a time, a point, a cell of a hexagonal lattice; coordinates of grids."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

__all__ = [
    "axial_sinusoidal_encoding",
    "cumulative_coordinates",
    "cyclic_encoding",
    "fourier_encoding",
    "grid_coordinates",
    "hexagonal_projections",
    "sinusoidal_encoding",
]

_FOURIER_AXES = ("frequency", "function", "axis")


@partial(
    jax.jit, static_argnames=("dim", "max_period", "interleaved", "cosine_first", "shift", "scale", "float32_exponents")
)
def sinusoidal_encoding(
    positions: Real[Array, "*shape"],
    *,
    dim: int,
    max_period: float = 10000.0,
    interleaved: bool = True,
    cosine_first: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
    float32_exponents: bool = False,
) -> Float[Array, "*shape dim"]:
    """[sin(scale p f_i), cos(scale p f_i)] with f_i = max_period^(-i / (dim/2 - shift)), float32.

    `interleaved` puts each cosine behind its sine (transformer); otherwise all sines, then all cosines (DDPM).
    `cosine_first` swaps the two (`flip_sin_to_cos`), `shift` is diffusers' `downscale_freq_shift`: with 1 the lowest
    frequency is exactly 1 / max_period. An odd `dim` ends in a sine without cosine if interleaved, in a zero otherwise.
    Positions may be real numbers. `float32_exponents` rounds ln(f_i) to float32 as DDPM's code does: at p = 1000 that
    moves an angle by up to 2e-4, which weights trained with it have seen. Source: arXiv:1706.03762, section 3.5;
    arXiv:2006.11239, appendix B; cards gelgt, demaformer, tie.
    """
    if dim < 1:
        raise ValueError(f"sinusoidal_encoding: dim {dim} is not a positive number of channels")
    half = dim / 2 if interleaved else dim // 2
    count = math.ceil(half)
    spread = half - shift
    exponents = np.arange(count) / spread if spread > 0 else np.zeros(count)
    if float32_exponents:
        exponents = np.float32(-math.log(max_period)) * np.arange(count, dtype=np.float32) / np.float32(spread)
        frequencies = np.float32(np.exp(exponents.astype(np.float64)))
    else:
        frequencies = np.float32(max_period ** -exponents.astype(np.float64))
    angles = positions.astype(jnp.float32)[..., None] * scale * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    if cosine_first:
        parts.reverse()
    if interleaved:
        return jnp.stack(parts, axis=-1).reshape(*positions.shape, 2 * count)[..., :dim]
    code = jnp.concatenate(parts, axis=-1)
    return jnp.pad(code, [(0, 0)] * positions.ndim + [(0, dim - 2 * count)])


@partial(jax.jit, static_argnames=("dim", "max_period", "interleaved", "cosine_first", "shift", "scale"))
def axial_sinusoidal_encoding(
    positions: Real[Array, "*shape A"],
    *,
    dim: int,
    max_period: float = 10000.0,
    interleaved: bool = True,
    cosine_first: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
) -> Float[Array, "*shape dim"]:
    """The `sinusoidal_encoding` of each of the A coordinates on dim / A channels, one axis after the other.

    Pass (y, x) for DETR's order, (x, y) for that of MAE and DiT (which are not `interleaved`). `dim` must be a multiple
    of A; the other options are those of `sinusoidal_encoding`. Source: arXiv:2005.12872, appendix A.4; cards geovista,
    soft_attention_mask.
    """
    axes = positions.shape[-1]
    if dim % axes:
        raise ValueError(f"axial_sinusoidal_encoding: dim {dim} is not a multiple of {axes} axes")
    code = sinusoidal_encoding(
        positions, dim=dim // axes, max_period=max_period, interleaved=interleaved, cosine_first=cosine_first,
        shift=shift, scale=scale,
    )  # fmt: skip
    return code.reshape(*positions.shape[:-1], dim)


@partial(jax.jit, static_argnames=("extent", "epsilon"))
def cumulative_coordinates(
    present: Bool[Array, "B H W"], *, extent: float | None = 2 * math.pi, epsilon: float = 1e-6
) -> Float[Array, "B H W 2"]:
    """(y, x) = number of present pixels above and to the left, this one included: coordinates of padded images.

    With `extent` they are divided by the largest of their column or row (+ epsilon) and multiplied by it, so that an
    image of any size spans the same range; `None` leaves counts. Source: arXiv:2005.12872, official position code.
    """
    counts = [jnp.cumsum(present.astype(jnp.float32), axis=axis) for axis in (1, 2)]
    if extent is not None:
        counts = [
            extent * count / (jax.lax.slice_in_dim(count, count.shape[axis] - 1, None, axis=axis) + epsilon)
            for count, axis in zip(counts, (1, 2), strict=True)
        ]
    return jnp.stack(counts, axis=-1)


def grid_coordinates(
    shape: tuple[int, ...], *, scale: float | tuple[float, ...] = 1.0, align_centers: bool = False
) -> Float[Array, "N A"]:
    """Coordinates of the cells of a grid in row-major order, in units of a reference cell: scale i.

    `scale` is the cell's size over the reference cell's, one number or one per axis: 2 for a condition image of half
    the resolution, Lref / L to interpolate positions. `align_centers` measures cell centres instead of corners,
    (i + 1/2) scale - 1/2, so that patches of any size share one frame in which the reference grid is 0, 1, 2, ...
    Source: card hyperdit, Mechanism 1; card dealmate, Mechanism 6; arXiv:2306.15595, equation 4.
    """
    scales = (scale,) * len(shape) if isinstance(scale, (int, float)) else tuple(scale)
    if len(scales) != len(shape):
        raise ValueError(f"grid_coordinates: scale {scale} is not one number nor one for each axis of {shape}")
    half = 0.5 if align_centers else 0.0
    axes = [(np.arange(size) + half) * step - half for size, step in zip(shape, scales, strict=True)]
    return jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(shape)), jnp.float32)


@jax.jit
def hexagonal_projections(cells: Real[Array, "*shape 2"]) -> Float[Array, "*shape 3"]:
    """(q + r/2, r + q/2, (r - q)/2): axial cell (q, r) projected on the lattice directions at 0, 60 and 120 degrees.

    Turning the lattice by 60 degrees, (q, r) -> (-r, q + r), maps (a, b, c) to (-c, a, b). Encode the three with
    `axial_sinusoidal_encoding` or rotate by them (`axial_rope_angles`). Source: card hexst, HexRoPE.
    """
    q, r = cells[..., 0].astype(jnp.float32), cells[..., 1].astype(jnp.float32)
    return jnp.stack([q + r / 2, r + q / 2, (r - q) / 2], axis=-1)


@partial(jax.jit, static_argnames=("include_input", "order"))
def fourier_encoding(
    points: Float[Array, "*shape A"],
    frequencies: Float[Array, " F"],
    *,
    include_input: str | None = "first",
    order: tuple[str, str, str] = ("function", "frequency", "axis"),
) -> Float[Array, "*shape E"]:
    """[x, sin(f_k x), cos(f_k x)] of every coordinate, E = A (2 F + 1) channels.

    `frequencies` are in radians per unit, pi 2^k or 2^k as a rule. `order` names the axes of the table of sines and
    cosines from the slowest to the fastest: ("function", "frequency", "axis") all sines first, frequency by frequency;
    ("frequency", "function", "axis") the NeRF order; ("function", "axis", "frequency") that of 3DShape2VecSet.
    `include_input` is "first", "last" or None (E = 2 A F). Computed in float32. Source: arXiv:2003.08934, equation 4;
    cards polycubenet, r_dmesh, ga_wireless_splat.
    """
    if sorted(order) != sorted(_FOURIER_AXES):
        raise ValueError(f"fourier_encoding: order {order} is not an arrangement of {', '.join(_FOURIER_AXES)}")
    if include_input not in (None, "first", "last"):
        raise ValueError(f"fourier_encoding: include_input {include_input!r} is not first, last or None")
    angles = frequencies.astype(jnp.float32)[:, None] * points.astype(jnp.float32)[..., None, :]
    table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2)
    leading = points.ndim - 1
    table = jnp.transpose(table, (*range(leading), *(leading + _FOURIER_AXES.index(name) for name in order)))
    code = table.reshape(*points.shape[:-1], 2 * frequencies.shape[0] * points.shape[-1]).astype(points.dtype)
    parts = {None: [code], "first": [points, code], "last": [code, points]}[include_input]
    return jnp.concatenate(parts, axis=-1)


@partial(jax.jit, static_argnames=("num_harmonics", "sine_turns"))
def cyclic_encoding(
    phase: Float[Array, "*shape"], *, num_harmonics: int, sine_turns: float = 1.0
) -> Float[Array, "*shape E"]:
    """[sin(2 pi k p), cos(2 pi k p)], k = 1..K, of a quantity that repeats: hour / 24, weekday / 7; E = 2 K.

    `phase` p is a share of the period. `sine_turns` is how often the first sine turns in a period; the tabular library
    behind gelgt uses 1/2, which is not periodic. Source: card gelgt, Model (timestamp columns).
    """
    multiples = jnp.arange(1, num_harmonics + 1, dtype=jnp.float32) * 2 * math.pi
    angles = phase.astype(jnp.float32)[..., None] * multiples
    return jnp.concatenate([jnp.sin(sine_turns * angles), jnp.cos(angles)], axis=-1).astype(phase.dtype)
