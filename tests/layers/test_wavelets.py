"""Wavelet transforms against direct sums, orthonormality, vanishing moments and exact inverses."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import wavelets

RNG = np.random.default_rng(7)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_db4_has_its_published_taps():
    low, high = wavelets.wavelet_filters("db4")
    taps = [0.2303778133, 0.7148465706, 0.6308807679, -0.0279837694, -0.1870348117, 0.0308413818, 0.0328830117,
            -0.0105974018]  # fmt: skip
    np.testing.assert_allclose(low, taps, atol=1e-9)
    np.testing.assert_allclose(high, [(-1) ** n * taps[7 - n] for n in range(8)], atol=1e-9)
    np.testing.assert_allclose(wavelets.wavelet_filters("haar"), np.array([[1, 1], [1, -1]]) / math.sqrt(2))


@pytest.mark.parametrize("order", range(1, 11))
def test_filters_are_orthonormal_with_vanishing_moments(order):
    low, high = wavelets.wavelet_filters(f"db{order}")
    assert low.sum() == pytest.approx(math.sqrt(2))
    for shift in range(order):
        ends = 2 * order - 2 * shift
        assert low[:ends] @ low[2 * shift :] == pytest.approx(float(shift == 0), abs=1e-6)
        assert low[:ends] @ high[2 * shift :] == pytest.approx(0, abs=1e-6)
    for power in range(order):
        moment = (np.arange(2 * order) / order) ** power @ high
        assert moment == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4"])
@pytest.mark.parametrize("length", [1, 2, 6, 7])
def test_coefficients_equal_periodic_sums(wavelet, length):
    x = normal(2, length)
    low, high = wavelets.wavelet_filters(wavelet)
    even = np.asarray(x, np.float64)
    if length % 2:
        even = np.concatenate([even, even[:, -1:]], axis=1)
    size = even.shape[1]
    got = wavelets.wavelet_transform(x, wavelet=wavelet)
    for band, taps in ((got.approximation, low), (got.details[0], high)):
        expected = [sum(taps[n] * even[:, (2 * k + n) % size] for n in range(taps.size)) for k in range(size // 2)]
        np.testing.assert_allclose(band, np.stack(expected, axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("wavelet", "length", "levels"), [("db4", 64, 3), ("db4", 23, 4), ("haar", 5, 5), ("db2", 1, 1)]
)
@pytest.mark.parametrize("extension", ["edge", "reflect"])
def test_inverse_is_exact_at_any_length_and_depth(wavelet, length, levels, extension):
    x = normal(3, length)
    coefficients = wavelets.wavelet_transform(x, wavelet=wavelet, levels=levels, extension=extension)
    assert len(coefficients.details) == levels
    back = wavelets.inverse_wavelet_transform(coefficients, wavelet=wavelet, length=length)
    np.testing.assert_allclose(back, x, atol=1e-5)
    if length % 2**levels == 0:
        energy = sum(jnp.sum(c**2) for c in jax.tree.leaves(coefficients))
        assert float(energy) == pytest.approx(float(jnp.sum(x**2)), rel=1e-5)
        np.testing.assert_allclose(wavelets.inverse_wavelet_transform(coefficients, wavelet=wavelet), x, atol=1e-5)


def test_haar_of_an_image_is_the_four_sums_of_a_block():
    a, b, c, d = 1.0, 2.0, 5.0, 11.0
    image = jnp.asarray([[a, b], [c, d]])[None, :, :, None]
    low, (details,) = wavelets.wavelet_transform_2d(image)
    assert float(low[0, 0, 0, 0]) == pytest.approx((a + b + c + d) / 2)
    expected = [(a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]
    np.testing.assert_allclose([float(x[0, 0, 0, 0]) for x in details], expected, atol=1e-6)


@pytest.mark.parametrize(("wavelet", "shape", "levels"), [("haar", (4, 6), 1), ("haar", (5, 7), 2), ("db2", (9, 4), 3),
                                                          ("haar", (1, 1), 1)])  # fmt: skip
def test_inverse_of_images_is_exact_and_linear(wavelet, shape, levels):
    x = normal(2, *shape, 3)
    coefficients = wavelets.wavelet_transform_2d(x, wavelet=wavelet, levels=levels)
    back = wavelets.inverse_wavelet_transform_2d(coefficients, wavelet=wavelet, shape=shape)
    np.testing.assert_allclose(back, x, atol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, coefficients)
    parts = [
        wavelets.inverse_wavelet_transform_2d(part, wavelet=wavelet, shape=shape)
        for part in (
            coefficients._replace(details=zero.details),
            coefficients._replace(approximation=zero.approximation),
        )
    ]
    np.testing.assert_allclose(parts[0] + parts[1], x, atol=1e-5)
    constant = wavelets.wavelet_transform_2d(jnp.ones((1, *shape, 1)), wavelet=wavelet, levels=levels)
    assert max(float(jnp.abs(d).max()) for d in jax.tree.leaves(constant.details)) < 1e-6


def test_odd_images_are_extended_as_asked_and_even_ones_need_no_shape():
    x = normal(1, 3, 2, 1)
    reflected = wavelets.wavelet_transform_2d(x)
    by_hand = wavelets.wavelet_transform_2d(jnp.concatenate([x, x[:, 1:2]], axis=1))
    chex.assert_trees_all_close(reflected, by_hand)
    edge = wavelets.wavelet_transform_2d(x, extension="edge")
    chex.assert_trees_all_close(edge, wavelets.wavelet_transform_2d(jnp.concatenate([x, x[:, 2:]], axis=1)))
    y = normal(1, 4, 2, 1)
    np.testing.assert_allclose(wavelets.inverse_wavelet_transform_2d(wavelets.wavelet_transform_2d(y)), y, atol=1e-6)


@pytest.mark.parametrize("length", [10, 11, 1])
def test_continuous_transform_equals_its_sum(length):
    x, rate, omega = normal(2, length), 8.0, 5.0
    frequencies = np.asarray([0.7, 2.0, 3.5])
    got = wavelets.continuous_wavelet_transform(
        x, jnp.asarray(frequencies, jnp.float32), sampling_rate=rate, omega=omega
    )
    half = length // 2 if length > 1 else 0
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (half, half)], mode="reflect")
    for f, t in np.ndindex(3, length):
        scale = omega * rate / (2 * math.pi * frequencies[f])
        place = (np.arange(padded.shape[1]) - t - half) / scale
        wave = math.pi**-0.25 * np.exp(1j * omega * place - place**2 / 2)
        np.testing.assert_allclose(got[:, f, t], padded @ np.conj(wave) / math.sqrt(scale), atol=1e-4)


def test_scalogram_of_a_tone_peaks_at_its_frequency():
    rate, time = 128.0, jnp.arange(256) / 128.0
    frequencies = jnp.geomspace(0.5, 40.0, 32)
    for tone in (2.0, 8.0, 20.0):
        image = wavelets.scalogram(jnp.sin(2 * math.pi * tone * time), frequencies, sampling_rate=rate)
        # 1/sqrt(a) weighs lower frequencies a little more: the nearest row or the one below it.
        nearest = int(jnp.argmin(jnp.abs(frequencies - tone)))
        assert int(jnp.argmax(image[:, 128])) in (nearest, nearest - 1)
        # The transform on several threads differs in the last bit from run to run.
        assert float(image.min()) == pytest.approx(0, abs=1e-6)
        assert float(image.max()) == pytest.approx(1, abs=1e-6)
    flat = wavelets.scalogram(jnp.zeros(16), frequencies[:3], sampling_rate=rate)
    np.testing.assert_array_equal(flat, 0)
    gradient = jax.grad(lambda x: wavelets.scalogram(x, frequencies[:3], sampling_rate=rate).sum())(jnp.zeros(16))
    assert np.all(np.isfinite(gradient))


MAPS = {
    "signal": lambda x: wavelets.wavelet_transform(x.reshape(-1), wavelet="db2", levels=2),
    "image": lambda x: wavelets.wavelet_transform_2d(x[None, :, :, None]),
    "inverse": lambda x: wavelets.inverse_wavelet_transform(
        wavelets.WaveletCoefficients(x[0], (x[1],)), wavelet="db2", length=9
    ),
    "inverse image": lambda x: wavelets.inverse_wavelet_transform_2d(
        wavelets.WaveletCoefficients(x[None, :, :, None], ((x[None, :, :, None],) * 3,))
    ),
    "scalogram": lambda x: wavelets.scalogram(x, jnp.asarray([1.0, 2.0]), sampling_rate=8.0),
}


@pytest.mark.parametrize("name", MAPS)
def test_batched_jitted_and_differentiable(name):
    function, x = MAPS[name], normal(2, 3, 5)
    whole = jax.vmap(function)(x)
    chex.assert_trees_all_close(jax.tree.map(lambda y: y[1], whole), function(x[1]), atol=1e-5)
    with jax.disable_jit():
        chex.assert_trees_all_close(function(x[1]), jax.tree.map(lambda y: y[1], whole), atol=1e-5)
    check_grads(function, (x[0],), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    low = function(x[1].astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_close(
        jax.tree.map(lambda y: y.astype(jnp.float32), low), jax.tree.map(lambda y: y[1], whole), atol=6e-2
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wavelets.wavelet_filters("db0"), "wavelet 'db0'"),
        (lambda: wavelets.wavelet_filters("sym4"), "wavelet 'sym4'"),
        (lambda: wavelets.wavelet_transform(jnp.ones(4), levels=0), "levels 0"),
        (lambda: wavelets.wavelet_transform_2d(jnp.ones((1, 4, 4, 1)), extension="zero"), "extension 'zero'"),
    ],
)
def test_impossible_requests_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
