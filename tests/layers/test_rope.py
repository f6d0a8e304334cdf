"""Rotary embeddings against complex multiplication, quadrature and the group laws they are built for."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import positions, rope

RNG = np.random.default_rng(3)
B, L, H, D = 2, 5, 2, 12


def heads(shape=(B, L, H, D), dtype=np.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def turned(x, angles, pairs) -> np.ndarray:
    """x with each pair of channels (i, j) seen as a complex number and multiplied by exp(i angle), in float64."""
    out = np.array(x, np.float64)
    for index, (i, j) in enumerate(pairs):
        z = (out[..., i] + 1j * out[..., j]) * np.exp(1j * np.asarray(angles, np.float64)[..., None, index])
        out[..., i], out[..., j] = z.real, z.imag
    return out


def scores(query, key):
    return jnp.einsum("blhd,bmhd->bhlm", query, key)


HALVES = [(i, i + 6) for i in range(6)]
NEIGHBOURS = [(2 * i, 2 * i + 1) for i in range(6)]


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, HALVES),
        ({"interleaved": True}, NEIGHBOURS),
        ({"sections": (2, 4)}, [(0, 2), (1, 3), (4, 8), (5, 9), (6, 10), (7, 11)]),
        ({"interleaved": True, "sections": (2, 4)}, NEIGHBOURS),
    ],
)
def test_rotation_is_multiplication_of_complex_pairs(options, pairs):
    x, where = heads(), jnp.asarray(RNG.normal(size=(B, L)) * 30, jnp.float32)
    angles = rope.rope_angles(where, rope.rope_frequencies(D))
    chex.assert_trees_all_close(rope.apply_rope(x, angles, **options), turned(x, angles, pairs).astype(np.float32),
                                atol=1e-5)  # fmt: skip


def test_frequencies_fall_from_one_to_almost_one_over_base():
    chex.assert_trees_all_close(
        rope.rope_frequencies(6, base=1000.0), np.float32([1, 1000 ** (-1 / 3), 1000 ** (-2 / 3)])
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotary_leaves_the_other_channels_alone(interleaved):
    x, angles = heads(), rope.rope_angles(jnp.arange(L), rope.rope_frequencies(4))
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    turned_x = rope.apply_rope(x, angles, interleaved=interleaved)
    chex.assert_trees_all_close(turned_x, turned(x, angles, pairs).astype(np.float32), atol=1e-6)
    np.testing.assert_array_equal(turned_x[..., 4:], x[..., 4:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_differences_of_real_positions_only(interleaved):
    query, key, w = heads(), heads(), rope.rope_frequencies(D)
    where = jnp.asarray(RNG.uniform(-3, 3, size=(B, L)), jnp.float32)
    there, moved = (
        scores(*(rope.apply_rope(x, rope.rope_angles(where + by, w), interleaved=interleaved) for x in (query, key)))
        for by in (0.0, 7.25)
    )
    chex.assert_trees_all_close(there, moved, atol=1e-4)


def test_rerotation_composes_and_inverts():
    key, w = heads(), rope.rope_frequencies(D)
    old, new = jnp.asarray([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]]), jnp.asarray([3, 30, 14, 0, 2])
    cached = rope.apply_rope(key, rope.rope_angles(old, w))
    moved = rope.rerotate_keys(cached, new - old, w)
    chex.assert_trees_all_close(moved, rope.apply_rope(key, rope.rope_angles(new, w)), atol=1e-5)
    chex.assert_trees_all_close(rope.rerotate_keys(moved, old - new, w), cached, atol=1e-5)


def test_attention_factor_scales_rotated_channels_only():
    x, angles = heads(), rope.rope_angles(jnp.arange(L), rope.rope_frequencies(8))
    plain, scaled = rope.apply_rope(x, angles), rope.apply_rope(x, angles, attention_factor=1.5)
    chex.assert_trees_all_close(scaled[..., :8], 1.5 * plain[..., :8], rtol=1e-6)
    np.testing.assert_array_equal(scaled[..., 8:], x[..., 8:])


def test_dynamic_scaling_starts_beyond_the_trained_length():
    dynamic = [rope.dynamic_ntk_rope_frequencies(8, n, original_length=64, factor=2.0) for n in (3, 64, 128)]
    chex.assert_trees_all_close(dynamic[0], rope.rope_frequencies(8), rtol=1e-6)
    chex.assert_trees_all_close(dynamic[1], rope.rope_frequencies(8), rtol=1e-6)
    chex.assert_trees_all_close(dynamic[2], rope.ntk_rope_frequencies(8, factor=3.0), rtol=1e-5)


def test_ntk_scaling_divides_the_lowest_frequency_and_keeps_the_highest():
    plain, scaled = rope.rope_frequencies(8), rope.ntk_rope_frequencies(8, factor=4.0)
    assert scaled[0] == plain[0]
    assert scaled[-1] * 4 == pytest.approx(float(plain[-1]), rel=1e-5)


def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_is_continuous():
    turns = np.float32([10, 4.0001, 3.9999, 2.5, 1.0001, 0.9999, 0.1])
    w = jnp.asarray(turns * 2 * math.pi / 8192)
    ratio = rope.llama3_rope_frequencies(w) / w
    # Half-way between the two ends the weight of the plain frequency is one half.
    expected = [1, 1, 1, (1 + 1 / 8) / 2, 1 / 8, 1 / 8, 1 / 8]
    chex.assert_trees_all_close(ratio, np.float32(expected), atol=1e-4)


def test_yarn_keeps_fast_channels_and_divides_slow_ones():
    dim, original, base, factor = 64, 4096, 10000.0, 16.0
    w = np.asarray(rope.rope_frequencies(dim, base=base))
    ratio = np.asarray(rope.yarn_rope_frequencies(dim, factor=factor, original_length=original, base=base)) / w
    turns = original * w / (2 * math.pi)
    # 32 turns are made by channel 10.5, one turn by channel 22.5: the ramp runs from 10 to 23.
    ramp = np.clip((np.arange(32) - 10) / 13, 0, 1)
    np.testing.assert_allclose(ratio, 1 - ramp * (1 - 1 / factor), rtol=1e-5)
    exact = rope.yarn_rope_frequencies(dim, factor=factor, original_length=original, base=base, truncate=False) / w
    middle = (turns < 32) & (turns > 1)
    position = (np.log(32) - np.log(turns[middle])) / np.log(32)
    np.testing.assert_allclose(exact[middle], 1 - position * (1 - 1 / factor), rtol=1e-4)


def test_yarn_attention_factor_has_its_published_values():
    assert rope.yarn_attention_factor(1.0) == 1.0
    assert rope.yarn_attention_factor(40.0) == pytest.approx(1.3688879)
    assert rope.yarn_attention_factor(40.0, scale=1.0, scale_all=1.0) == 1.0
    # Phi-3.5: 131072 tokens after 4096.
    assert rope.longrope_attention_factor(32.0, original_length=4096) == pytest.approx(1.1902380714)
    assert rope.longrope_attention_factor(1.0, original_length=4096) == 1.0


def test_longrope_switches_factors_at_the_trained_length():
    short, long = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 4.0])
    for length, factors in ((64, short), (65, long)):
        got = rope.longrope_frequencies(4, length, short, long, original_length=64)
        chex.assert_trees_all_close(got, rope.rope_frequencies(4) / factors, rtol=1e-6)


def test_axial_angles_turn_each_block_by_its_own_coordinate():
    where = positions.grid_coordinates((2, 3))
    frequencies = (rope.rope_frequencies(4), rope.rope_frequencies(8))
    angles = rope.axial_rope_angles(where, frequencies)
    x = heads((1, 6, H, D))
    whole = rope.apply_rope(x, angles, sections=(2, 4))
    rows = rope.apply_rope(x[..., :4], rope.rope_angles(where[:, 0], frequencies[0]))
    columns = rope.apply_rope(x[..., 4:], rope.rope_angles(where[:, 1], frequencies[1]))
    chex.assert_trees_all_close(whole, jnp.concatenate([rows, columns], axis=-1), atol=1e-6)


def test_multimodal_angles_of_text_are_those_of_one_axis():
    w, where = rope.rope_frequencies(16), jnp.arange(7)
    same = jnp.stack([where] * 3, axis=-1)
    for interleaved in (False, True):
        got = rope.multimodal_rope_angles(same, w, sections=(2, 3, 3), interleaved=interleaved)
        np.testing.assert_array_equal(got, rope.rope_angles(where, w))


def test_multimodal_sections_choose_the_axis_of_a_frequency():
    ones, place = jnp.ones(8), jnp.asarray([[10, 20, 30]])
    runs = rope.multimodal_rope_angles(place, ones, sections=(2, 3, 3))
    np.testing.assert_array_equal(runs, [[10, 10, 20, 20, 20, 30, 30, 30]])
    turns = rope.multimodal_rope_angles(place, ones, sections=(4, 2, 2), interleaved=True)
    np.testing.assert_array_equal(turns, [[10, 20, 30, 10, 20, 30, 10, 10]])


def test_hexagonal_scores_survive_translation_and_a_turn_by_sixty_degrees():
    cells = jnp.asarray(RNG.integers(-4, 5, size=(L, 2)))
    w = rope.rope_frequencies(4, base=100.0)
    query, key = heads((1, L, H, 12)), heads((1, L, H, 12))

    def table(cells, query=query, key=key):
        angles = rope.hexagonal_rope_angles(cells, w)
        return scores(*(rope.apply_rope(x, angles, interleaved=True) for x in (query, key)))

    chex.assert_trees_all_close(table(cells + jnp.asarray([5, -3])), table(cells), atol=1e-4)
    spun = jnp.stack([-cells[:, 1], cells[:, 0] + cells[:, 1]], axis=-1)

    def permuted(x):
        # (a, b, c) -> (-c, a, b): group c answers to -angle, that is to the pair with its second channel negated.
        a, b, c = jnp.split(x, 3, axis=-1)
        return jnp.concatenate([c * jnp.asarray([1, -1, 1, -1]), a, b], axis=-1)

    chex.assert_trees_all_close(table(spun, permuted(query), permuted(key)), table(cells), atol=1e-4)


@pytest.mark.parametrize("normalize", [None, "mean", "rms"])
def test_interval_key_is_the_mean_of_rotated_keys(normalize):
    w = rope.rope_frequencies(D)
    start, end = jnp.asarray([[0.5, 2.0]]), jnp.asarray([[4.5, 2.25]])
    key = heads((1, 2, H, D))
    interval = rope.rotate_pairs(key, *(t[:, :, None] for t in rope.interval_rope(start, end, w, normalize=normalize)))
    nodes, weights = np.polynomial.legendre.leggauss(12)
    mean = 0
    for node, weight in zip(nodes, weights, strict=True):
        at = np.asarray(start) + (np.asarray(end) - np.asarray(start)) * (node + 1) / 2
        mean = mean + weight / 2 * turned(key, at[..., None] * np.asarray(w, np.float64), HALVES)
    half = (np.asarray(end) - np.asarray(start))[..., None] / 2 * np.asarray(w, np.float64)
    sinc = np.sin(half) / half
    norm = {None: 1.0, "mean": sinc.mean(-1), "rms": np.sqrt((sinc**2).mean(-1))}[normalize]
    expected = mean / np.broadcast_to(norm, (1, 2))[..., None, None]
    chex.assert_trees_all_close(interval, expected.astype(np.float32), atol=1e-5)


def test_an_interval_without_length_is_a_point_with_finite_gradients():
    w, at = rope.rope_frequencies(D), jnp.asarray([0.0, 3.5])
    cosine, sine = rope.interval_rope(at, at, w)
    np.testing.assert_array_equal(cosine, jnp.cos(rope.rope_angles(at, w)))
    np.testing.assert_array_equal(sine, jnp.sin(rope.rope_angles(at, w)))
    gradients = jax.grad(lambda a, b: rope.interval_rope(a, b, w)[0].sum(), argnums=(0, 1))(at, at)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_fourier_rope_with_identity_mixtures_is_rope_on_the_kept_frequencies():
    w = rope.fourier_rope_frequencies(16, length=64)
    np.testing.assert_allclose(w, [1, 10**-0.5, 0.1], rtol=1e-6)
    assert rope.fourier_rope_frequencies(16, length=3).shape == (0,)
    mix = jnp.broadcast_to(jnp.eye(3), (H, 3, 3))
    tables = rope.fourier_rope(jnp.arange(L), w, mix, mix, num_pairs=8)
    x = heads((1, L, H, 16))
    got = rope.rotate_pairs(x, *tables)
    angles = np.pad(np.arange(L)[:, None] * np.asarray(w), [(0, 0), (0, 5)], constant_values=math.pi / 4)
    stretch = np.where(np.arange(16) % 8 < 3, 1, math.sqrt(2))
    expected = turned(x, angles, [(i, i + 8) for i in range(8)]) * stretch
    chex.assert_trees_all_close(got, expected.astype(np.float32), atol=1e-5)


def test_fourier_rope_mixes_frequencies_by_head():
    w, at = jnp.asarray([0.3, 0.7]), np.asarray([0.0, 2.0, 5.5])
    sine_mix, cosine_mix = (jnp.asarray(RNG.normal(size=(H, 2, 1)), jnp.float32) for _ in range(2))
    cosine, sine = rope.fourier_rope(jnp.asarray(at, jnp.float32), w, sine_mix, cosine_mix, num_pairs=2)
    for h in range(H):
        for t, p in enumerate(at):
            assert cosine[t, h, 0] == pytest.approx(
                sum(math.cos(p * float(w[j])) * float(cosine_mix[h, j, 0]) for j in range(2)), abs=1e-5
            )
            assert sine[t, h, 0] == pytest.approx(
                sum(math.sin(p * float(w[j])) * float(sine_mix[h, j, 0]) for j in range(2)), abs=1e-5
            )
    assert np.all(np.asarray(cosine[..., 1]) == 1)
    assert np.all(np.asarray(sine[..., 1]) == 1)


def test_gradients_are_those_of_finite_differences():
    w = rope.rope_frequencies(4)
    x = heads((1, 2, 1, 6))
    for interleaved in (False, True):
        check_grads(
            lambda x, p, i=interleaved: rope.apply_rope(x, rope.rope_angles(p, w), interleaved=i),
            (x, jnp.asarray([0.3, 1.7])),
            order=1,
            modes=["rev"],
            rtol=1e-2,
            atol=1e-3,
        )


def test_dtype_batch_and_jit():
    w = rope.rope_frequencies(D)
    x, angles = heads(), rope.rope_angles(jnp.arange(L), w)
    whole = rope.apply_rope(x, angles)
    low = rope.apply_rope(x.astype(jnp.bfloat16), angles)
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), whole, atol=5e-2)
    chex.assert_trees_all_close(jax.vmap(lambda x: rope.apply_rope(x[None], angles)[0])(x), whole)
    with jax.disable_jit():
        chex.assert_trees_all_close(rope.apply_rope(x, angles), whole, atol=1e-6)
    chex.assert_shape(rope.apply_rope(x[:1, :1], angles[:1]), (1, 1, H, D))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rope.rope_frequencies(7), "dim 7"),
        (lambda: rope.ntk_rope_frequencies(2, factor=2.0), "dim 2"),
        (lambda: rope.dynamic_ntk_rope_frequencies(2, 5, original_length=4), "dim 2"),
        (lambda: rope.axial_rope_angles(jnp.ones((3, 2)), (jnp.ones(2),)), "frequencies of 1"),
        (lambda: rope.multimodal_rope_angles(jnp.ones((3, 2)), jnp.ones(4), sections=(1, 2)), "sections"),
        (lambda: rope.interval_rope(jnp.ones(1), jnp.ones(1), jnp.ones(2), normalize="sum"), "normalize 'sum'"),
        (lambda: rope.fourier_rope(jnp.ones(1), jnp.ones(2), *[jnp.ones((1, 2, 2))] * 2, num_pairs=1), "num_pairs 1"),
        (lambda: rope.apply_rope(jnp.ones((1, 2, 1, 4)), jnp.ones((2, 3))), "3 pairs"),
        (lambda: rope.apply_rope(jnp.ones((1, 2, 1, 4)), jnp.ones((2, 2)), sections=(1,)), "sections"),
    ],
)
def test_impossible_requests_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
