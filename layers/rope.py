"""Rotary position embeddings: frequencies and their scalings, angles of positions, rotation of channel pairs.

`apply_rope(x, rope_angles(positions, rope_frequencies(head_dim)))` is the plain form; each step has its variants.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from layers.positions import hexagonal_projections

__all__ = [
    "apply_rope",
    "axial_rope_angles",
    "dynamic_ntk_rope_frequencies",
    "fourier_rope",
    "fourier_rope_frequencies",
    "hexagonal_rope_angles",
    "interval_rope",
    "llama3_rope_frequencies",
    "longrope_attention_factor",
    "longrope_frequencies",
    "multimodal_rope_angles",
    "ntk_rope_frequencies",
    "rerotate_keys",
    "rope_angles",
    "rope_frequencies",
    "rotate_pairs",
    "yarn_attention_factor",
    "yarn_rope_frequencies",
]


def _half(function: str, dim: int) -> int:
    if dim < 2 or dim % 2:
        raise ValueError(f"{function}: dim {dim} is not a positive even number of rotated channels")
    return dim // 2


def _geometric(dim: int, base: float) -> np.ndarray:
    """In double precision: far positions multiply the rounding of a frequency."""
    return float(base) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def rope_frequencies(dim: int, *, base: float = 10000.0) -> Float[Array, " F"]:
    """w_i = base^(-2i/dim), i = 0..dim/2-1, in radians per unit of position.

    `dim` is the number of rotated channels: the head width, or less for partial rotary. Divide by a factor for linear
    position interpolation. Source: arXiv:2104.09864, section 3.2.2; arXiv:2306.15595 (interpolation).
    """
    _half("rope_frequencies", dim)
    return jnp.asarray(_geometric(dim, base), jnp.float32)


def ntk_rope_frequencies(dim: int, *, factor: float, base: float = 10000.0) -> Float[Array, " F"]:
    """w_i with base' = base factor^(dim / (dim - 2)): the lowest frequency is divided by `factor`, the highest kept.

    Source: arXiv:2309.00071, definition 1 (NTK-aware interpolation).
    """
    if _half("ntk_rope_frequencies", dim) < 2:
        raise ValueError(f"ntk_rope_frequencies: dim {dim} is not at least 4, one frequency cannot be stretched")
    return jnp.asarray(_geometric(dim, base * factor ** (dim / (dim - 2))), jnp.float32)


@partial(jax.jit, static_argnames=("dim", "original_length", "base"))
def dynamic_ntk_rope_frequencies(
    dim: int,
    length: Int[Array, ""] | int,
    *,
    original_length: int,
    factor: Float[Array, ""] | float = 1.0,
    base: float = 10000.0,
) -> Float[Array, " F"]:
    """NTK scaling by s = factor L / L0 - (factor - 1), which is 1 up to the trained length L0 and grows with L.

    `length` L is the current number of tokens, shorter ones count as L0. Source: arXiv:2309.00071, section 3.3
    (dynamic NTK).
    """
    if _half("dynamic_ntk_rope_frequencies", dim) < 2:
        raise ValueError(f"dynamic_ntk_rope_frequencies: dim {dim} is not at least 4")
    longest = jnp.maximum(jnp.asarray(length, jnp.float32), original_length)
    stretch = factor * longest / original_length - (factor - 1)
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    # base'^-x in parts: the power of the base is a constant, exact to float32, and only the stretch is traced.
    return np.float32(float(base) ** -exponents) * stretch ** -np.float32(exponents * dim / (dim - 2))


@partial(jax.jit, static_argnames=("factor", "low_factor", "high_factor", "original_length"))
def llama3_rope_frequencies(
    frequencies: Float[Array, " F"],
    *,
    factor: float = 8.0,
    low_factor: float = 1.0,
    high_factor: float = 4.0,
    original_length: int = 8192,
) -> Float[Array, " F"]:
    """w for wavelengths under L0 / high_factor, w / factor over L0 / low_factor, in between a blend of the two.

    The blend is linear in the number of turns L0 w / 2 pi. Source: Llama 3.1 model code ("llama3" rope scaling).
    """
    turns = original_length * frequencies / (2 * math.pi)
    keep = jnp.clip((turns - low_factor) / (high_factor - low_factor), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / factor)


def yarn_rope_frequencies(
    dim: int,
    *,
    factor: float,
    original_length: int,
    base: float = 10000.0,
    fast_turns: float = 32.0,
    slow_turns: float = 1.0,
    truncate: bool = True,
) -> Float[Array, " F"]:
    """w_i where it makes over `fast_turns` turns in L0 positions, w_i / factor under `slow_turns`, a ramp in i between.

    `truncate` rounds the ramp's ends outwards to whole channels, as published models do. Attention logits are to be
    multiplied by `yarn_attention_factor` squared: give it to `apply_rope` for queries and keys. Source:
    arXiv:2309.00071, section 3.2.
    """
    half = _half("yarn_rope_frequencies", dim)
    ends = [
        half * math.log(original_length / (turns * 2 * math.pi)) / math.log(base) for turns in (fast_turns, slow_turns)
    ]
    if truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return jnp.asarray(_geometric(dim, base) * ((1 - ramp) + ramp / factor), jnp.float32)


def yarn_attention_factor(factor: float, *, scale: float = 1.0, scale_all: float | None = None) -> float:
    """0.1 scale ln(factor) + 1 (1 for factor <= 1), divided by the same of `scale_all` where a model gives both.

    Source: arXiv:2309.00071, equation 22; `mscale` and `mscale_all_dim` of DeepSeek configurations.
    """

    def one(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return one(scale) if scale_all is None else one(scale) / one(scale_all)


@partial(jax.jit, static_argnames=("dim", "original_length", "base"))
def longrope_frequencies(
    dim: int,
    length: Int[Array, ""] | int,
    short_factors: Float[Array, " F"],
    long_factors: Float[Array, " F"],
    *,
    original_length: int,
    base: float = 10000.0,
) -> Float[Array, " F"]:
    """w_i / short_i for sequences up to the trained length L0, w_i / long_i for longer ones; the factors are searched.

    Source: arXiv:2402.13753, section 3.3; card modality_mutual_attention (Phi-3.5).
    """
    _half("longrope_frequencies", dim)
    factors = jnp.where(jnp.asarray(length) > original_length, long_factors, short_factors)
    return np.float32(_geometric(dim, base)) / factors.astype(jnp.float32)


def longrope_attention_factor(factor: float, *, original_length: int) -> float:
    """sqrt(1 + ln(factor) / ln(L0)), 1 for factor <= 1; factor = longest length / L0.

    Source: arXiv:2402.13753, official code (Phi-3).
    """
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


@jax.jit
def rope_angles(positions: Real[Array, "*shape"], frequencies: Float[Array, " F"]) -> Float[Array, "*shape F"]:
    """a_i = p w_i in radians, float32: positions may be any real numbers, and negative.

    Source: arXiv:2104.09864, equation 15.
    """
    return positions.astype(jnp.float32)[..., None] * frequencies.astype(jnp.float32)


@jax.jit
def axial_rope_angles(
    positions: Real[Array, "*shape A"], frequencies: tuple[Float[Array, " _"], ...]
) -> Float[Array, "*shape F"]:
    """Angles of n-D positions: those of each axis, by its own frequencies, one axis after the other.

    One tuple entry an axis: `tuple(rope_frequencies(d) for d in (16, 56, 56))` for FLUX (text, y, x), (44, 42, 42) for
    Wan's (t, y, x). Models that rotate halves within each axis need `sections` in `apply_rope`. Source: cards dealmate,
    tie, hyperdit, vggt4d.
    """
    if len(frequencies) != positions.shape[-1]:
        raise ValueError(
            f"axial_rope_angles: frequencies of {len(frequencies)} axes is not one for each of {positions.shape[-1]}"
        )
    return jnp.concatenate([rope_angles(positions[..., a], w) for a, w in enumerate(frequencies)], axis=-1)


@partial(jax.jit, static_argnames=("sections", "interleaved"))
def multimodal_rope_angles(
    positions: Real[Array, "*shape A"],
    frequencies: Float[Array, " F"],
    *,
    sections: tuple[int, ...],
    interleaved: bool = False,
) -> Float[Array, "*shape F"]:
    """a_i = p_axis(i) w_i: the frequencies of one head are shared out among (time, height, width) positions.

    `sections` says how many each axis gets, in runs (Qwen2-VL) or, `interleaved`, in turns t h w t h w ... until a
    section is used up, the rest going to time (Qwen3-VL). Text has equal positions, for which this is `rope_angles`.
    Source: arXiv:2409.12191, section 2.1 (M-RoPE).
    """
    count, axes = frequencies.shape[0], positions.shape[-1]
    if len(sections) != axes or sum(sections) != count:
        raise ValueError(
            f"multimodal_rope_angles: sections {sections} is not {axes} numbers that add up to {count} frequencies"
        )
    if interleaved:
        owner = np.zeros(count, np.int32)
        for axis in range(1, axes):
            owner[axis : sections[axis] * axes : axes] = axis
    else:
        owner = np.repeat(np.arange(axes), sections)
    return positions.astype(jnp.float32)[..., owner] * frequencies.astype(jnp.float32)


@jax.jit
def hexagonal_rope_angles(
    cells: Real[Array, "*shape 2"], frequencies: Float[Array, " F"]
) -> Float[Array, "*shape 3*F"]:
    """Axial angles of the three projections of a hexagonal cell (q, r), the same frequencies for each.

    Scores depend on the offset of two cells alone; a turn of the lattice by 60 degrees permutes the three groups of
    channels up to one sign. Source: card hexst, HexRoPE (base 100 for windows of a few cells).
    """
    return axial_rope_angles(hexagonal_projections(cells), (frequencies,) * 3)


@partial(jax.jit, static_argnames=("normalize",))
def interval_rope(
    start: Real[Array, "*shape"],
    end: Real[Array, "*shape"],
    frequencies: Float[Array, " F"],
    *,
    normalize: str | None = "mean",
) -> tuple[Float[Array, "*shape F"], Float[Array, "*shape F"]]:
    """(g cos(c w), g sin(c w)), c = (start + end) / 2, g = sinc(r w) = sin(r w) / (r w), r = (end - start) / 2.

    The mean of all rotations from `start` to `end`, for `rotate_pairs`: a key that stands for an interval. `normalize`
    divides g by its (signed) "mean" over the frequencies, which takes the length bias away, by its "rms", or not at all
    (None). A point (start = end) has g = 1 exactly. Source: card tie, Mechanism.
    """
    if normalize not in (None, "mean", "rms"):
        raise ValueError(f"interval_rope: normalize {normalize!r} is not mean, rms or None")
    start, end = start.astype(jnp.float32), end.astype(jnp.float32)
    amplitude = jnp.sinc(rope_angles((end - start) / 2, frequencies) / math.pi)
    if normalize == "mean":
        amplitude = amplitude / jnp.mean(amplitude, axis=-1, keepdims=True)
    elif normalize == "rms":
        amplitude = amplitude * jax.lax.rsqrt(jnp.mean(jnp.square(amplitude), axis=-1, keepdims=True))
    angles = rope_angles((start + end) / 2, frequencies)
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def fourier_rope_frequencies(dim: int, *, length: int, base: float = 10000.0) -> Float[Array, " F"]:
    """Those of `rope_frequencies` that make a full turn in the trained `length`: w_i >= 2 pi / length.

    May be empty. Source: card wisteria, FoPE 1 (arXiv:2412.17739, section 3.3).
    """
    _half("fourier_rope_frequencies", dim)
    frequencies = _geometric(dim, base)
    return jnp.asarray(frequencies[frequencies >= 2 * math.pi / length], jnp.float32)


@partial(jax.jit, static_argnames=("num_pairs",))
def fourier_rope(
    positions: Real[Array, "*shape"],
    frequencies: Float[Array, " F"],
    sine_mix: Float[Array, "H F M"],
    cosine_mix: Float[Array, "H F M"],
    *,
    num_pairs: int,
) -> tuple[Float[Array, "*shape H num_pairs"], Float[Array, "*shape H num_pairs"]]:
    """(sum_j cos(p w_j) C[h,j,m], sum_j sin(p w_j) S[h,j,m]): tables in which a channel mixes frequencies.

    For `rotate_pairs`. The M mixtures are padded to `num_pairs` (half the head width) with ones in both tables: the
    official zero-frequency part, a constant turn of 45 degrees stretched by sqrt 2. Identity mixtures give RoPE.
    Source: card wisteria, FoPE 3-4 (arXiv:2412.17739).
    """
    if sine_mix.shape[-1] > num_pairs:
        raise ValueError(f"fourier_rope: num_pairs {num_pairs} is not at least the {sine_mix.shape[-1]} mixtures")
    angles = rope_angles(positions, frequencies)
    padding = [(0, 0)] * (positions.ndim + 1) + [(0, num_pairs - sine_mix.shape[-1])]

    def table(waves, mix):
        mixed = jnp.einsum("...f,hfm->...hm", waves, mix.astype(jnp.float32))
        return jnp.pad(mixed, padding, constant_values=1.0)

    return table(jnp.cos(angles), cosine_mix), table(jnp.sin(angles), sine_mix)


@partial(jax.jit, static_argnames=("interleaved", "sections"))
def rotate_pairs(
    x: Float[Array, "B L H D"],
    cosine: Float[Array, "*broadcastable F"],
    sine: Float[Array, "*broadcastable2 F"],
    *,
    interleaved: bool = False,
    sections: tuple[int, ...] | None = None,
) -> Float[Array, "B L H D"]:
    """(a, b) -> (a cos - b sin, a sin + b cos) for F channel pairs; channels from 2 F on pass unchanged.

    The tables broadcast to (B, L, H, F) and need not be a rotation. Pairs are the neighbours (2i, 2i+1) if
    `interleaved` (GPT-J, FLUX, Wan), else (i, i + F) (Llama, GPT-NeoX). `sections` (numbers of pairs, adding up to F)
    pairs halves within each of several blocks of channels, one after the other (VGGT's axial form). Float32 inside.
    Source: arXiv:2104.09864, equation 34.
    """
    pairs = cosine.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"rotate_pairs: {pairs} pairs of channels do not fit into a width of {x.shape[-1]}")
    sections = (pairs,) if sections is None else sections
    if sum(sections) != pairs:
        raise ValueError(f"rotate_pairs: sections {sections} is not a split of {pairs} pairs")
    rotated = x[..., : 2 * pairs].astype(jnp.float32)
    cosine, sine = cosine.astype(jnp.float32), sine.astype(jnp.float32)

    def turn(a, b, c, s):
        return a * c - b * s, a * s + b * c

    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = jnp.stack(turn(a, b, cosine, sine), axis=-1).reshape(rotated.shape)
    else:
        parts, start = [], 0
        for width in sections:
            a, b = rotated[..., 2 * start : 2 * start + width], rotated[..., 2 * start + width : 2 * (start + width)]
            parts.extend(turn(a, b, cosine[..., start : start + width], sine[..., start : start + width]))
            start += width
        rotated = jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


@partial(jax.jit, static_argnames=("interleaved", "sections"))
def apply_rope(
    x: Float[Array, "B L H D"],
    angles: Float[Array, "*batch L F"],
    *,
    interleaved: bool = False,
    sections: tuple[int, ...] | None = None,
    attention_factor: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B L H D"]:
    """Channel pairs of queries or keys turned by `angles`, the same in all heads: q' . k' depends on angle differences.

    `angles` (L, F) or (B, L, F) come from one of the angle functions; their negative undoes the rotation. The rotated
    channels are multiplied by `attention_factor` (YaRN, LongRoPE). `interleaved` and `sections` are those of
    `rotate_pairs`; channels from 2 F on pass (partial rotary). Source: arXiv:2104.09864, equation 34; cards hyformer,
    cubit, chronicle.
    """
    cosine, sine = jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor
    return rotate_pairs(x, cosine[..., None, :], sine[..., None, :], interleaved=interleaved, sections=sections)


@partial(jax.jit, static_argnames=("interleaved", "sections"))
def rerotate_keys(
    key: Float[Array, "B L H D"],
    shift: Real[Array, "*batch L"],
    frequencies: Float[Array, " F"],
    *,
    interleaved: bool = False,
    sections: tuple[int, ...] | None = None,
) -> Float[Array, "B L H D"]:
    """Cached rotated keys moved by `shift` = new - old position: R(p + shift) k = R(shift) R(p) k.

    Values need no change. Give the `frequencies` that rotated the keys. Source: card rcllm, Mechanism, Online 3.
    """
    return apply_rope(key, rope_angles(shift, frequencies), interleaved=interleaved, sections=sections)
