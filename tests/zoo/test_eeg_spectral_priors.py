"""Spectral priors against attention: what the features are, what Medformer is, and the study's result."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layers
import zoo
from trainers.data.signal_standins import eeg_windows
from zoo.blocks.learners import LEARNERS, fit, random_fourier_features
from zoo.signals.eeg_spectral_priors import (
    EncoderLayer,
    augment,
    band_power_features,
    features_of,
    held_out_accuracy,
    stft_band_features,
    wavelet_band_features,
)
from zoo.tasks import classification

KEY = jax.random.key(5)
PAPER = zoo.paper("eeg_spectral_priors")
BANDS = PAPER.config("medformer").bands
X = jax.random.normal(KEY, (2, 256, 3))


def test_power_over_all_frequencies_is_the_energy():  # Acceptance 2
    signal = jnp.swapaxes(X, 1, 2)
    density = layers.power_spectral_density(signal, sampling_rate=256.0, window="rectangular", demean=False)
    whole = layers.band_power(density, bands=((0.0, 200.0),), spacing=1.0)[..., 0]
    np.testing.assert_allclose(whole, jnp.mean(jnp.square(signal), axis=-1), rtol=1e-5)


def test_shares_add_up_and_a_tone_is_in_its_band():  # Acceptance 2
    def shares(x):
        return band_power_features(x, bands=BANDS, sampling_rate=256.0).reshape(*x.shape[::2], 3, 5)[:, :, 1]

    np.testing.assert_allclose(shares(X).sum(-1), 1.0, rtol=1e-5)
    tone = jnp.sin(2 * jnp.pi * 10 * jnp.arange(256) / 256)[None, :, None]
    assert float(shares(tone)[0, 0, 2]) > 0.95
    welch = band_power_features(X, bands=BANDS, sampling_rate=256.0, segment=128)
    by_hand = [
        layers.power_spectral_density(X[:, s : s + 128].swapaxes(1, 2), sampling_rate=256.0) for s in (0, 64, 128)
    ]
    power = layers.band_power(jnp.mean(jnp.stack(by_hand), axis=0), bands=BANDS, spacing=2.0)
    np.testing.assert_allclose(welch.reshape(2, 3, 3, 5)[:, :, 0], jnp.log(power + 1e-8), rtol=1e-4)


def test_copies_of_the_bands_and_the_rest_add_up():  # Acceptance 3
    signal = jnp.swapaxes(X, 1, 2)
    copies = layers.bandpass_filterbank(signal, bands=BANDS, sampling_rate=256.0, transition=0.0)
    spectrum, frequency = np.fft.rfft(signal), np.arange(129)
    outside = ~((frequency >= BANDS[0][0]) & (frequency < BANDS[-1][1]))
    residue = np.fft.irfft(spectrum * outside)
    np.testing.assert_allclose(copies.sum(2) + residue, signal, atol=1e-5)
    for band, (low, high) in enumerate(BANDS):
        power = np.abs(np.fft.rfft(copies[:, :, band])) ** 2
        elsewhere = (frequency < low) | (frequency >= high)
        assert power[..., elsewhere].sum() < 1e-6 * power.sum()


def test_features_do_not_depend_on_phase_and_raw_models_do():  # Acceptance 4
    features = band_power_features(X, bands=BANDS, sampling_rate=256.0, window="rectangular")
    for changed in (jnp.roll(X, 31, axis=1), -X):
        moved = band_power_features(changed, bands=BANDS, sampling_rate=256.0, window="rectangular")
        np.testing.assert_allclose(moved, features, atol=2e-3)
    for function in (wavelet_band_features, lambda x: stft_band_features(x, bands=BANDS, sampling_rate=256.0)):
        np.testing.assert_allclose(function(-X), function(X), rtol=1e-4, atol=1e-5)
    model = zoo.create("eeg_spectral_priors", "tiny", num_layers=1)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables, apply = jax.jit(model.init)(KEY, batch), jax.jit(model.apply)
    assert not np.allclose(apply(variables, batch | {"x": -batch["x"]}), apply(variables, batch), atol=1e-2)


def test_wavelets_keep_energy_and_come_back():  # Acceptance 5
    signal = jnp.swapaxes(X, 1, 2)
    found = layers.wavelet_transform(signal, wavelet="db4", levels=5)
    energy = sum(jnp.sum(jnp.square(d), -1) for d in (*found.details, found.approximation))
    np.testing.assert_allclose(energy, jnp.sum(jnp.square(signal), -1), rtol=1e-5)
    np.testing.assert_allclose(layers.inverse_wavelet_transform(found, wavelet="db4"), signal, atol=1e-5)
    features = wavelet_band_features(X).reshape(2, 3, 4, 5)
    np.testing.assert_allclose(features[:, :, 0, 0], jnp.mean(jnp.square(found.details[1]), -1), rtol=1e-5)
    share = np.square(found.details[2]) / np.square(found.details[2]).sum(-1, keepdims=True)
    np.testing.assert_allclose(features[:, :, 3, 1], -np.sum(share * np.log(share), -1), rtol=1e-4)


def test_features_over_frames_equal_their_definitions():
    signal = np.asarray(X[0, :, 0])
    window = np.asarray(layers.spectral_window(64))
    frames = [
        np.abs(np.fft.rfft(window * signal[s : s + 64])) ** 2 / (256 * np.sum(window**2)) for s in range(0, 193, 32)
    ]
    energy = np.stack(frames)[:, 1] * 4.0  # frequencies are 4 Hz apart: theta has one of them
    found = stft_band_features(X, bands=BANDS, sampling_rate=256.0).reshape(2, 3, 4, 5)[0, 0, :, 1]
    slope = np.polyfit(np.arange(7), energy, 1)[0]
    np.testing.assert_allclose(found, [energy.mean(), energy.std(), energy.max(), slope], rtol=1e-3)


def test_the_last_layer_computes_no_more_than_is_read():
    config = PAPER.config("tiny")
    tokens = tuple(jax.random.normal(KEY, (2, n, 16)) for n in (5, 3))
    whole, routers = EncoderLayer(config), EncoderLayer(config, routers_only=True)
    params = whole.init(KEY, tokens, train=False)
    expected = [h[:, -1:] for h in whole.apply(params, tokens, train=False)]
    chex.assert_trees_all_close(list(routers.apply(params, tokens, train=False)), expected, atol=1e-5)


def test_routers_carry_what_other_granularities_see():
    config = PAPER.config("tiny")
    tokens = tuple(jax.random.normal(KEY, (1, n, 16)) for n in (5, 3))
    other = (tokens[0], tokens[1].at[:, 0].add(1.0))
    for inter in (True, False):
        layer = EncoderLayer(dataclasses.replace(config, inter_attention=inter))
        params = layer.init(KEY, tokens, train=False)
        moved = np.abs(layer.apply(params, other, train=False)[0] - layer.apply(params, tokens, train=False)[0])
        # Only the first granularity's router hears of the second one, and only through the routers.
        assert moved[:, :-1].max() == 0
        assert (moved[:, -1].max() > 1e-4) == inter


def test_channels_on_their_own_share_one_small_kernel():
    shapes = zoo.registry.variable_shapes(PAPER, zoo.create("eeg_spectral_priors", "tiny", single_channel=True))
    assert shapes["params"]["embedding"]["patch_0"]["kernel"].shape == (4, 16)
    assert shapes["params"]["head"]["kernel"].shape == (4 * 2 * 16, 2)


def test_filtered_copies_are_channels_for_attention():
    shapes = zoo.registry.variable_shapes(PAPER, zoo.create("eeg_spectral_priors", "tiny_filterbank"))
    assert shapes["params"]["embedding"]["patch_1"]["kernel"].shape == (5 * 4 * 8, 16)


def test_augmentations_change_what_they_say():
    x = jnp.swapaxes(X, 1, 2)
    assert float(jnp.std(augment(x, "jitter0.5", KEY) - x)) == pytest.approx(0.5, rel=0.1)
    ratio = augment(x, "scale0.3", KEY) / x
    chex.assert_trees_all_close(ratio, jnp.broadcast_to(ratio[..., :1], ratio.shape), rtol=1e-3)
    assert float(jnp.mean(augment(x, "drop0.35", KEY) == 0)) == pytest.approx(0.35, abs=0.04)
    chex.assert_trees_all_equal(augment(x, "flip1.0", KEY), x[..., ::-1])
    chex.assert_trees_all_equal(augment(x, "none", KEY), x)
    gone = np.asarray(augment(x, "mask0.25", KEY) == 0)
    assert gone.all(axis=(0, 1)).sum() == 64 == gone.any(axis=(0, 1)).sum()
    assert (np.asarray(augment(x, "channel0.4", KEY)) == 0).all(axis=(0, 2)).sum() == 1
    lost = np.abs(np.fft.rfft(augment(x, "frequency0.3", KEY))) < 1e-3
    assert lost.mean() == pytest.approx(0.3, abs=0.06)
    with pytest.raises(ValueError, match="augmentation 'shuffle' is not one of none, jitter"):
        augment(x, "shuffle", KEY)


@pytest.mark.parametrize("learner", LEARNERS)
def test_learners_fit_what_they_can_and_ignore_what_does_not_count(learner):
    rng = np.random.default_rng(0)
    label = jnp.asarray(rng.integers(0, 3, 90))
    x = jnp.asarray(rng.normal(size=(90, 4)) + 3.0 * np.eye(3, 4)[label] + 7.0, jnp.float32)
    wrong = jnp.where(jnp.arange(90) < 60, label, 0)
    weight = (jnp.arange(90) < 60).astype(jnp.float32)
    options = {"num_classes": 3, "steps": 30}
    predict = jax.jit(lambda x, y, w, z: fit(learner, x, y, weight=w, **options)(z))
    found = predict(x, wrong, weight, x)
    assert float(jnp.mean(jnp.argmax(found, -1) == label)) > 0.9
    chex.assert_trees_all_close(predict(x, wrong.at[60:].set(1), weight, x), found, atol=1e-4)
    chex.assert_trees_all_close(predict(5 * x - 3, wrong, weight, 5 * x - 3), found, atol=2e-2)  # standardised


def test_logistic_regression_is_at_the_minimum_of_its_objective():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    label = jnp.asarray((rng.normal(size=40) + x[:, 0] > 0).astype(int))
    unit = (x - x.mean(0)) / x.std(0)
    predict = fit("logistic", x, label, num_classes=2, strength=0.5, steps=60)
    bias = predict(x.mean(0)[None])[0]
    kernel = jnp.stack([predict((x.mean(0) + x.std(0) * jnp.eye(3)[i])[None])[0] - bias for i in range(3)])

    def objective(params):
        logits = unit @ params[0] + params[1]
        errors = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, label[:, None], -1)[:, 0]
        return jnp.sum(errors) + jnp.sum(jnp.square(params[0])) / (2 * 0.5)

    chex.assert_trees_all_close(jax.grad(objective)((kernel, bias)), (jnp.zeros((3, 2)), jnp.zeros(2)), atol=1e-2)


def test_random_features_are_a_gaussian_kernel():
    a, b = jax.random.normal(KEY, (2, 30, 4))
    lift = random_fourier_features(KEY, 4, count=20_000, gamma=0.2)
    expected = jnp.exp(-0.2 * jnp.sum(jnp.square(a - b), axis=-1))
    np.testing.assert_allclose(jnp.sum(lift(a) * lift(b), axis=-1), expected, atol=0.04)


def test_an_unknown_learner_is_named():
    with pytest.raises(ValueError, match="learner 'forest' is not one of logistic"):
        fit("forest", jnp.zeros((2, 1)), jnp.zeros(2, int), num_classes=2)


def test_spectral_priors_beat_attention_on_subjects_it_has_not_seen():  # Acceptance 6
    x, label, subject = eeg_windows(np.random.default_rng(0), subjects=40, windows=40, length=64, channels=4)
    model = zoo.create("eeg_spectral_priors", "tiny", dropout_rate=0.0)
    unit = jnp.asarray((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True))
    x, label, fold = jnp.asarray(x), jnp.asarray(label), jnp.asarray(subject // 8)
    features = features_of(unit, model.config)
    accuracies = held_out_accuracy(features, label, fold, num_classes=2, steps=25)
    assert accuracies.shape == (5,)
    assert float(jnp.mean(accuracies)) > 0.85

    train, test = np.flatnonzero(subject < 32), np.flatnonzero(subject >= 32)
    params = jax.jit(model.init)(KEY, {"x": x[:2]})["params"]
    optimizer = optax.adam(1e-3)

    @jax.jit
    def trained(params):
        def loss(params, rows):
            return classification.loss(model.apply({"params": params}, {"x": x[rows]}), {"label": label[rows]})[0]

        def step(i, carry):
            params, state = carry
            rows = jnp.asarray(train)[jax.random.randint(jax.random.fold_in(KEY, i), (32,), 0, len(train))]
            updates, state = optimizer.update(jax.grad(loss)(params, rows), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 150, step, (params, optimizer.init(params)))[0]

    logits = model.apply({"params": trained(params)}, {"x": x[test]})
    attention = float(jnp.mean(jnp.argmax(logits, -1) == label[test]))
    assert float(accuracies[4]) > attention + 0.10, (accuracies, attention)
