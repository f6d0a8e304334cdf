"""Fourier methods against direct sums in float64, stored torch numbers, Parseval and adjointness."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import spectral

RNG = np.random.default_rng(6)
EEG = ((0.5, 4.0), (4.0, 8.0), (8.0, 13.0), (13.0, 30.0), (30.0, 45.0))


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_windows_equal_their_names():
    np.testing.assert_allclose(spectral.spectral_window(8, periodic=False), np.hanning(8), atol=1e-6)
    np.testing.assert_allclose(spectral.spectral_window(8, kind="hamming", periodic=False), np.hamming(8), atol=1e-6)
    np.testing.assert_allclose(spectral.spectral_window(8, kind="blackman", periodic=False), np.blackman(8), atol=1e-6)
    np.testing.assert_allclose(spectral.spectral_window(8), np.hanning(9)[:-1], atol=1e-6)
    np.testing.assert_array_equal(spectral.spectral_window(3, kind="rectangular"), 1)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("length", "frame", "window", "hop"), [(23, 8, 8, 3), (16, 6, 5, 2)])
def test_short_time_transform_equals_the_sum_of_its_definition(center, normalized, length, frame, window, hop):
    x, w = normal(2, length), spectral.spectral_window(window, kind="hamming")
    got = spectral.short_time_fourier(x, w, frame_length=frame, hop=hop, center=center, normalized=normalized)
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (frame // 2,) * 2], mode="reflect") if center else np.asarray(x)
    left = (frame - window) // 2
    for f, t in np.ndindex(*got.shape[1:]):
        total = sum(
            padded[:, t * hop + left + n] * float(w[n]) * np.exp(-2j * np.pi * f * (left + n) / frame)
            for n in range(window)
        )
        np.testing.assert_allclose(got[:, f, t], total / (math.sqrt(frame) if normalized else 1), atol=1e-4)
    assert got.shape == (2, frame // 2 + 1, (padded.shape[1] - frame) // hop + 1)


def test_short_time_transform_has_the_numbers_of_torch():
    # torch.stft(torch.arange(10.)**2 / 10, 4, hop_length=3, window=torch.hann_window(4), return_complex=True)
    expected = [[0.1, 1.9, 7.3, 14.5], [0, -0.9 + 0.6j, -3.6 + 1.2j, -8.1], [-0.1, -0.1, -0.1, 1.7]]
    got = spectral.short_time_fourier(jnp.arange(10.0) ** 2 / 10, spectral.spectral_window(4), frame_length=4, hop=3)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_inverse_restores_every_sample_under_a_window(center, normalized):
    x, window = normal(2, 29), spectral.spectral_window(8, kind="hamming")
    options = {"frame_length": 8, "hop": 3, "center": center, "normalized": normalized}
    spectrum = spectral.short_time_fourier(x, window, **options)
    back = spectral.inverse_short_time_fourier(spectrum, window, length=29, **options)
    covered = 29 if center else 8 + 3 * (spectrum.shape[-1] - 1)
    np.testing.assert_allclose(back[:, :covered], x[:, :covered], atol=1e-5)
    np.testing.assert_array_equal(back[:, covered:], 0)
    short = spectral.inverse_short_time_fourier(spectrum, window, **options)
    np.testing.assert_allclose(short, x[:, : short.shape[-1]], atol=1e-5)


def test_samples_under_no_window_are_zero():
    window = spectral.spectral_window(4)  # zero at its first sample
    options = {"frame_length": 4, "hop": 4, "center": False}
    x = normal(8)
    back = spectral.inverse_short_time_fourier(spectral.short_time_fourier(x, window, **options), window, **options)
    np.testing.assert_allclose(back, np.where(np.arange(8) % 4 == 0, 0, x), atol=1e-5)


@pytest.mark.parametrize("length", [16, 17])
def test_power_sums_to_the_energy_of_the_signal(length):
    x = normal(3, length)
    density = spectral.power_spectral_density(x, sampling_rate=100.0, window="rectangular", demean=False)
    np.testing.assert_allclose(density.sum(-1) * 100 / length, jnp.mean(x**2, axis=-1), rtol=1e-5)


def test_a_tone_has_its_power_in_its_band():
    time = jnp.arange(256) / 256.0
    x = jnp.stack([jnp.sin(2 * math.pi * 10 * time) + 3, jnp.sin(2 * math.pi * 20 * time)])
    for segment, spacing in ((None, 1.0), (128, 2.0)):
        density = spectral.power_spectral_density(
            x, sampling_rate=256.0, segment=segment, overlap=0 if segment is None else 64
        )
        power = spectral.band_power(density, bands=EEG, spacing=spacing)
        relative = power / power.sum(-1, keepdims=True)
        assert relative[0, 2] > 0.95
        assert relative[1, 3] > 0.95
        np.testing.assert_allclose(density.sum(-1) * spacing, 0.5, rtol=1e-3)


def test_welch_is_the_mean_over_segments():
    x = normal(20)
    whole = spectral.power_spectral_density(x, sampling_rate=1.0, segment=8, overlap=4)
    parts = [spectral.power_spectral_density(x[s : s + 8], sampling_rate=1.0) for s in (0, 4, 8, 12)]
    chex.assert_trees_all_close(whole, sum(parts) / 4, rtol=1e-5)


def test_bands_take_their_lower_edge_and_leave_the_upper():
    power = spectral.band_power(jnp.asarray([1.0, 10.0, 100.0, 1000.0]), bands=((0.0, 1.0), (0.5, 1.5)), spacing=0.5)
    np.testing.assert_allclose(power, [5.5, 55.0])


@pytest.mark.parametrize("transition", [0.0, 1.0])
def test_filtered_copies_and_the_rest_add_up(transition):
    x = normal(2, 256)
    bands = ((0.0, 0.5), *EEG, (45.0, 200.0))
    copies = spectral.bandpass_filterbank(x, bands=bands, sampling_rate=256.0, transition=transition)
    np.testing.assert_allclose(copies.sum(1), x, atol=1e-5)
    power = np.abs(np.fft.rfft(np.asarray(copies)[:, 3])) ** 2
    outside = (np.arange(129) < 8 - transition / 2) | (np.arange(129) >= 13 + transition / 2)
    assert power[:, outside].max() < 1e-6 * power.max()
    # Half of the amplitude at an edge of a raised cosine.
    if transition:
        gain = np.abs(np.fft.rfft(np.asarray(copies)[:, 3]) / np.fft.rfft(np.asarray(x)))
        np.testing.assert_allclose(gain[:, 8], 0.5, atol=1e-3)


def test_adaptive_mask_keeps_the_fundamental_and_a_share_above_it():
    amplitude = jnp.zeros((2, 60)).at[0, 12].set(1.0).at[1, 59].set(1.0)
    kept = spectral.adaptive_low_pass_mask(amplitude)
    np.testing.assert_array_equal(kept.sum(-1), [12 + 12 + 1, 60])
    assert not kept[0, 25]
    assert kept[0, 24]


def test_box_mask_equals_its_shifted_indices_and_is_empty_on_small_images():
    mask = np.fft.fftshift(spectral.box_low_pass_mask((9, 16), ratio=0.25), axes=(0, 1))
    expected = np.zeros((9, 16), bool)
    expected[4 - 1 : 4 + 1, 8 - 2 : 8 + 2] = True
    np.testing.assert_array_equal(mask, expected)
    assert not np.any(spectral.box_low_pass_mask((7, 7), ratio=0.25))


def test_exchange_takes_masked_frequencies_from_one_and_the_rest_from_the_other():
    a, b = normal(1, 9, 16, 2), normal(1, 9, 16, 2)
    mask = spectral.box_low_pass_mask((9, 16), ratio=0.25)
    spectra = [np.fft.fft2(np.asarray(x, np.float64), axes=(1, 2)) for x in (a, b)]
    expected = np.fft.ifft2(np.where(np.asarray(mask)[..., None], *spectra), axes=(1, 2)).real
    np.testing.assert_allclose(spectral.exchange_frequencies(a, b, mask), expected, atol=1e-5)
    empty = jnp.zeros_like(mask)
    np.testing.assert_array_equal(spectral.exchange_frequencies(a, b, empty), b)


def test_split_adds_up_and_sorts_waves_by_radius():
    rows = jnp.cos(2 * math.pi * 0.125 * jnp.arange(16))[:, None] * jnp.ones(8)
    columns = jnp.ones((16, 1)) * jnp.cos(math.pi * jnp.arange(8))
    x = jnp.stack([rows, columns], axis=-1)[None]
    low, high = spectral.split_frequencies(x, spectral.radial_low_pass_mask((16, 8), cutoff=0.25))
    np.testing.assert_allclose(low, x * jnp.asarray([1, 0]), atol=1e-6)
    np.testing.assert_allclose(low + high, x, atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 1)])
def test_fourier_channels_come_back_and_halves_add_up(shape):
    x = normal(2, *shape, 3)
    features = spectral.fourier_channels(x)
    np.testing.assert_allclose(spectral.inverse_fourier_channels(features, width=shape[1]), x, atol=1e-5)
    mask = spectral.radial_low_pass_mask(shape, cutoff=0.25)
    low, high = spectral.fourier_channels(x, mask), spectral.fourier_channels(x, ~mask)
    np.testing.assert_allclose(low + high, features, atol=1e-6)
    by_image = spectral.split_frequencies(x, mask)[0]
    np.testing.assert_allclose(spectral.inverse_fourier_channels(low, width=shape[1]), by_image, atol=1e-5)


def test_modes_are_the_tones_of_a_signal_whatever_else_is_in_the_batch():
    # Whole periods that the mirrors continue without a kink: no tone leaks into the other's frequencies.
    time = jnp.arange(200) + 0.5
    tones = jnp.stack([jnp.cos(2 * math.pi * 0.05 * time), 0.5 * jnp.cos(2 * math.pi * 0.3 * time)])
    modes, centers = spectral.variational_modes(tones.sum(0), num_modes=2)
    np.testing.assert_allclose(centers, [0.05, 0.3], atol=2e-3)
    np.testing.assert_allclose(modes, tones, atol=1e-2)
    batch = spectral.variational_modes(jnp.stack([tones.sum(0), normal(200)]), num_modes=2)
    np.testing.assert_allclose(batch[0][0], modes, atol=1e-5)
    exact = spectral.variational_modes(tones.sum(0), num_modes=2, dual_step=0.5)[0]
    np.testing.assert_allclose(exact.sum(0), tones.sum(0), atol=2e-2)
    assert np.all(np.isfinite(spectral.variational_modes(jnp.zeros(7), num_modes=2)[0]))


def test_amplitude_loss_ignores_shifts_and_weighs_radii():
    x, y = normal(2, 6, 8), normal(2, 6, 8)
    assert spectral.spectral_amplitude_loss(jnp.roll(x, (2, 3), (1, 2)), x) == pytest.approx(0, abs=1e-6)
    spectra = [np.abs(np.fft.rfft2(np.asarray(z, np.float64))) / math.sqrt(48) for z in (x, y)]
    difference = np.abs(spectra[0] - spectra[1])
    assert spectral.spectral_amplitude_loss(x, y) == pytest.approx(difference.mean(), rel=1e-5)
    radius = [[math.hypot(min(i, 6 - i) / 6, j / 8) for j in range(5)] for i in range(6)]
    weights = np.asarray(radius) / np.max(radius)
    assert spectral.spectral_amplitude_loss(x, y, radius_power=1.0) == pytest.approx((weights * difference).mean(),
                                                                                     rel=1e-5)  # fmt: skip
    assert np.all(np.isfinite(jax.grad(spectral.spectral_amplitude_loss)(jnp.zeros((4, 4)), jnp.ones((4, 4)))))


@pytest.mark.parametrize("length", [32, 33])
def test_envelope_of_a_modulated_carrier_is_its_modulation(length):
    time = jnp.arange(length)
    modulation = 1.5 + jnp.cos(2 * math.pi * 2 * time / length)
    carrier = jnp.cos(2 * math.pi * 10 * time / length)
    np.testing.assert_allclose(spectral.hilbert_envelope(modulation * carrier), modulation, atol=1e-5)
    signal = normal(length)
    np.testing.assert_allclose(spectral.analytic_signal(signal).real, signal, atol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda x: spectral.hilbert_envelope(x).sum())(jnp.zeros(length))))


def test_third_order_spectrum_is_the_transform_of_the_moment():
    a = normal(16)
    got = spectral.third_order_spectrum(a, frame_length=16, hop=16, window="rectangular")
    b = np.asarray(a, np.float64) - np.mean(np.asarray(a, np.float64))
    moment = [sum(b[t] * b[(t + s) % 16] ** 2 for t in range(16)) for s in range(16)]
    np.testing.assert_allclose(got, np.fft.rfft(moment), atol=1e-3)


def test_third_order_spectrum_shows_coupled_lines_and_no_lonely_one():
    time = jnp.arange(512)
    one, two = (jnp.cos(2 * math.pi * k * 8 * time / 64) for k in (1, 2))
    options = {"frame_length": 64, "hop": 32}
    coupled = jnp.abs(spectral.third_order_spectrum(one + two, **options))
    lonely = jnp.abs(spectral.third_order_spectrum(one, **options))
    peaks = {int(k) for k in np.argsort(coupled)[-2:]}
    assert peaks == {8, 16}
    assert lonely.max() < 1e-3 * coupled.max()


def test_demon_finds_the_rate_that_modulates_a_noise():
    time = jnp.arange(2048)
    noise = normal(2048)
    spectrum = spectral.demon_spectrum((1 + 0.9 * jnp.cos(2 * math.pi * 5 * time / 256)) * noise, frame_length=256,
                                       hop=128)  # fmt: skip
    assert int(jnp.argmax(spectrum)) == 5
    chex.assert_shape(spectrum, (129,))


def test_constant_q_transform_equals_its_sum_at_every_hop():
    x = normal(50)
    options = {"sampling_rate": 100.0, "hop": 7, "min_frequency": 9.0, "bins_per_octave": 3, "num_bins": 5}
    got = spectral.constant_q_transform(x, **options)
    assert got.shape == (5, 8)
    quality = 1 / (2 ** (1 / 3) - 1)
    for k, t in np.ndindex(5, 8):
        frequency = 9 * 2 ** (k / 3)
        span = quality * 100 / frequency
        total = norm = 0.0
        for n in range(-40, 41):
            weight = 0.5 + 0.5 * math.cos(2 * math.pi * n / span) if abs(n) < span / 2 else 0.0
            norm += weight
            if 0 <= t * 7 + n < 50:
                total += float(x[t * 7 + n]) * weight * np.exp(-2j * math.pi * frequency * n / 100)
        np.testing.assert_allclose(got[k, t], total / norm, atol=1e-5)


def test_constant_q_bins_are_the_notes_of_a_scale():
    rate, time = 4000.0, jnp.arange(4000) / 4000.0
    got = jnp.abs(spectral.constant_q_transform(
        jnp.sin(2 * math.pi * 110 * 2 ** (7 / 12) * time), sampling_rate=rate, hop=500, min_frequency=110.0,
        bins_per_octave=12, num_bins=24,
    ))  # fmt: skip
    assert int(jnp.argmax(got[:, 4])) == 7
    assert got[7, 4] == pytest.approx(0.5, abs=1e-2)


def points(dims, count=7):
    return jnp.asarray(RNG.uniform(-2, 2, size=(2, count, dims)), jnp.float32)


def direct_sum(values, where, modes, period) -> np.ndarray:
    values, where = np.asarray(values, np.complex128), np.asarray(where, np.float64)
    out = np.zeros((*values.shape[:2], *(modes,) * where.shape[-1]), np.complex128)
    for n in itertools.product(range(modes), repeat=where.shape[-1]):
        phase = where @ (np.asarray(n) - modes // 2)
        out[(..., *n)] = np.einsum("bcl,bl->bc", values, np.exp(-2j * np.pi * phase / period))
    return out


@pytest.mark.parametrize(("dims", "modes"), [(1, 8), (1, 5), (2, 6), (3, 4)])
@pytest.mark.parametrize("implementation", ["direct", "gridding"])
def test_nonuniform_transforms_equal_their_sums_and_are_adjoint(dims, modes, implementation):
    where, values = points(dims), normal(2, 3, 7) + 1j * normal(2, 3, 7)
    options = {"period": 1.5, "implementation": implementation}
    tolerance = 1e-5 if implementation == "direct" else 1e-4
    sums = spectral.nonuniform_fourier_sum(values, where, modes=modes, **options)
    expected = direct_sum(values, where, modes, 1.5)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(sums, expected, atol=tolerance * scale)
    lattice = normal(*sums.shape) + 1j * normal(*sums.shape)
    back = spectral.nonuniform_fourier_values(lattice, where, **options)
    left, right = jnp.vdot(lattice, sums), jnp.vdot(back, values)
    assert abs(left - right) < 1e-4 * scale * np.sqrt(lattice.size)


def test_gridding_gets_better_with_its_width_and_treats_real_values_alike():
    where, values = points(2, 20), normal(2, 3, 20)
    exact = spectral.nonuniform_fourier_sum(values, where, modes=10, period=4.0, implementation="direct")
    errors = []
    for width in (2, 4, 6):
        got = spectral.nonuniform_fourier_sum(values, where, modes=10, period=4.0, width=width,
                                              implementation="gridding")  # fmt: skip
        errors.append(float(jnp.max(jnp.abs(got - exact)) / jnp.max(jnp.abs(exact))))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-4


def test_the_default_takes_gridding_on_large_lattices():
    where, values = points(1, 3), normal(2, 1, 3)
    for modes, named in ((16, "direct"), (600, "gridding")):
        options = {"modes": modes, "period": 3.0}
        plain = spectral.nonuniform_fourier_sum(values, where, **options)
        np.testing.assert_array_equal(
            plain, spectral.nonuniform_fourier_sum(values, where, implementation=named, **options)
        )
        np.testing.assert_array_equal(
            spectral.nonuniform_fourier_values(plain, where, period=3.0),
            spectral.nonuniform_fourier_values(plain, where, period=3.0, implementation=named),
        )


MAPS = {
    "stft": lambda x: spectral.short_time_fourier(x, jnp.ones(4), frame_length=4, hop=3).real,
    "density": lambda x: spectral.power_spectral_density(x, sampling_rate=2.0),
    "filterbank": lambda x: spectral.bandpass_filterbank(x, bands=((1.0, 3.0),), sampling_rate=9.0),
    "envelope": spectral.hilbert_envelope,
    "demon": lambda x: spectral.demon_spectrum(x, frame_length=8, hop=1),
    "third": lambda x: spectral.third_order_spectrum(x, frame_length=8, hop=1).imag,
    "cqt": lambda x: spectral.constant_q_transform(x, sampling_rate=9.0, hop=3, min_frequency=2.0, bins_per_octave=2,
                                                   num_bins=2).real,
    "sum": lambda x: spectral.nonuniform_fourier_sum(x[None, None], jnp.linspace(0, 1, 9)[None, :, None], modes=4,
                                                     period=2.0, implementation="gridding").imag,
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_batched_jitted_and_differentiable(name):
    function, x = MAPS[name], normal(2, 9)
    whole = jax.vmap(function)(x)
    chex.assert_trees_all_close(whole[1], function(x[1]), atol=1e-5)
    if name != "cqt":  # lax.map does not run without jit
        with jax.disable_jit():
            chex.assert_trees_all_close(function(x[0]), whole[0], atol=1e-5)
    check_grads(function, (x[0],), order=1, modes=["rev"], rtol=2e-2, atol=1e-2)
    low = function(x[0].astype(jnp.bfloat16)).astype(jnp.float32)
    chex.assert_trees_all_close(low, whole[0], atol=0.05 * float(jnp.abs(whole).max()) + 0.05)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: spectral.spectral_window(4, kind="kaiser"), "kind 'kaiser'"),
        (lambda: spectral.short_time_fourier(jnp.ones(9), jnp.ones(5), frame_length=4, hop=1), "window of 5"),
        (lambda: spectral.short_time_fourier(jnp.ones(3), jnp.ones(4), frame_length=4, hop=1, center=False), "th 4"),
        (lambda: spectral.power_spectral_density(jnp.ones(9), sampling_rate=1.0, segment=4, overlap=4), "segment 4"),
        (lambda: spectral.demon_spectrum(jnp.ones(9), frame_length=10, hop=1), "frame_length 10"),
        (lambda: spectral.constant_q_transform(jnp.ones(9), sampling_rate=9.0, hop=3, min_frequency=2.0,
                                               bins_per_octave=1, num_bins=3), "num_bins 3"),
        (lambda: spectral.inverse_fourier_channels(jnp.ones((1, 2, 3, 2)), width=3), "width 3"),
        (lambda: spectral.nonuniform_fourier_sum(jnp.ones((1, 1, 2)), jnp.ones((1, 2, 1)), modes=2, period=1.0,
                                                 implementation="x"), "implementation 'x'"),
        (lambda: spectral.nonuniform_fourier_values(jnp.ones((1, 1, 2, 3), jnp.complex64), jnp.ones((1, 2, 2)),
                                                    period=1.0), "axes of one size"),
    ],
)  # fmt: skip
def test_impossible_requests_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
