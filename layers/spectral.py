"""Fourier methods: short-time transforms, band power, filters and masks, envelopes, constant-Q and nonuniform points.

Signals have time on the last axis; images are (B, H, W, C). Everything is computed in float32 / complex64.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact

__all__ = [
    "adaptive_low_pass_mask",
    "analytic_signal",
    "band_power",
    "bandpass_filterbank",
    "box_low_pass_mask",
    "constant_q_transform",
    "demon_spectrum",
    "exchange_frequencies",
    "fourier_channels",
    "hilbert_envelope",
    "inverse_fourier_channels",
    "inverse_short_time_fourier",
    "nonuniform_fourier_sum",
    "nonuniform_fourier_values",
    "power_spectral_density",
    "radial_low_pass_mask",
    "short_time_fourier",
    "spectral_amplitude_loss",
    "spectral_window",
    "split_frequencies",
    "third_order_spectrum",
    "variational_modes",
]

_WINDOWS = {"hann": (0.5, 0.5), "hamming": (0.54, 0.46), "blackman": (0.42, 0.5, 0.08), "rectangular": (1.0,)}


def _safe_abs(z: Complex[Array, "*shape"]) -> Float[Array, "*shape"]:
    """|z| with a zero gradient, not a NaN, at z = 0."""
    squared = jnp.square(z.real) + jnp.square(z.imag)
    there = squared > 0
    return jnp.where(there, jnp.sqrt(jnp.where(there, squared, 1.0)), 0.0)


def spectral_window(length: int, *, kind: str = "hann", periodic: bool = True) -> Float[Array, " length"]:
    """w[n] = sum_k (-1)^k a_k cos(2 pi k n / N): "hann", "hamming", "blackman" or "rectangular".

    `periodic` takes N = length, as torch and spectral analysis do; otherwise N = length - 1, symmetric.
    Source: Harris 1978.
    """
    if kind not in _WINDOWS:
        raise ValueError(f"spectral_window: kind {kind!r} is not one of {', '.join(_WINDOWS)}")
    angles = 2 * math.pi * np.arange(length) / max(length if periodic else length - 1, 1)
    terms = [(-1) ** k * a * np.cos(k * angles) for k, a in enumerate(_WINDOWS[kind])]
    return jnp.asarray(np.sum(terms, axis=0), jnp.float32)


def _frames(x, length, hop):
    starts = np.arange((x.shape[-1] - length) // hop + 1) * hop
    return x[..., starts[:, None] + np.arange(length)]


def _full_window(function, window, frame_length):
    if window.shape[0] > frame_length:
        raise ValueError(f"{function}: window of {window.shape[0]} is longer than frame_length {frame_length}")
    left = (frame_length - window.shape[0]) // 2
    return jnp.pad(window.astype(jnp.float32), (left, frame_length - window.shape[0] - left))


@partial(jax.jit, static_argnames=("frame_length", "hop", "center", "pad_mode", "normalized"))
def short_time_fourier(
    x: Float[Array, "*batch L"],
    window: Float[Array, " W"],
    *,
    frame_length: int,
    hop: int,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
) -> Complex[Array, "*batch F T"]:
    """X[f, t] = sum_n w[n] x[t hop + n] e^(-2 pi i f n / N), f = 0..N/2: torch.stft's conventions.

    N = `frame_length`; a shorter window stands in its middle. `center` pads N // 2 samples at both ends (by `pad_mode`,
    as in `jnp.pad`), so that frame t is centred on sample t hop. `normalized` divides by sqrt N. O(T N log N).
    Source: card ecg_biometric, Time-frequency image; card eeg_spectral_priors.
    """
    if center:
        half = frame_length // 2
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode=pad_mode)
    if x.shape[-1] < frame_length:
        raise ValueError(f"short_time_fourier: frame_length {frame_length} is longer than the {x.shape[-1]} samples")
    frames = _frames(x.astype(jnp.float32), frame_length, hop) * _full_window(
        "short_time_fourier", window, frame_length
    )
    return jnp.swapaxes(jnp.fft.rfft(frames, norm="ortho" if normalized else None), -1, -2)


@partial(jax.jit, static_argnames=("frame_length", "hop", "length", "center", "normalized"))
def inverse_short_time_fourier(
    spectrum: Complex[Array, "*batch F T"],
    window: Float[Array, " W"],
    *,
    frame_length: int,
    hop: int,
    length: int | None = None,
    center: bool = True,
    normalized: bool = False,
) -> Float[Array, "*batch L"]:
    """x[s] = sum_t w[s - t hop] y_t[s - t hop] / sum_t w[s - t hop]^2: least-squares inverse by overlap and add.

    Options as in `short_time_fourier`; `length` cuts or pads with zeros. Samples under no window are 0.
    Source: Griffin and Lim 1984, equation 6; torch.istft.
    """
    window = _full_window("inverse_short_time_fourier", window, frame_length)
    frames = jnp.fft.irfft(jnp.swapaxes(spectrum, -1, -2), n=frame_length, norm="ortho" if normalized else None)
    num_frames = frames.shape[-2]
    where = np.arange(num_frames)[:, None] * hop + np.arange(frame_length)
    total = (num_frames - 1) * hop + frame_length
    signal = jnp.zeros((*frames.shape[:-2], total)).at[..., where].add(frames * window)
    weight = jnp.zeros(total).at[where].add(jnp.broadcast_to(jnp.square(window), where.shape))
    signal = jnp.where(weight > 1e-11, signal / jnp.where(weight > 1e-11, weight, 1.0), 0.0)
    if center:
        signal = signal[..., frame_length // 2 :]
        if length is None:
            signal = signal[..., : (num_frames - 1) * hop]
    if length is not None:
        signal = signal[..., :length]
        signal = jnp.pad(signal, [(0, 0)] * (signal.ndim - 1) + [(0, length - signal.shape[-1])])
    return signal


@partial(jax.jit, static_argnames=("sampling_rate", "segment", "overlap", "window", "demean"))
def power_spectral_density(
    x: Float[Array, "*batch L"],
    *,
    sampling_rate: float,
    segment: int | None = None,
    overlap: int = 0,
    window: str = "hann",
    demean: bool = True,
) -> Float[Array, "*batch F"]:
    """P[f] = |rfft(w x)|^2 / (fs sum w^2), one-sided (doubled but at 0 and Nyquist), in x^2 per unit of frequency.

    With `segment` (samples) it is the mean over segments that overlap by `overlap` samples (Welch). Frequencies are
    f sampling_rate / N; `demean` takes each segment's mean away. Source: card eeg_spectral_priors, band_power_features.
    """
    length = x.shape[-1] if segment is None else segment
    if not 0 <= overlap < length <= x.shape[-1]:
        raise ValueError(
            f"power_spectral_density: segment {segment} with overlap {overlap} does not fit {x.shape[-1]} samples"
        )
    frames = _frames(x.astype(jnp.float32), length, length - overlap)
    if demean:
        frames = frames - jnp.mean(frames, axis=-1, keepdims=True)
    weights = spectral_window(length, kind=window)
    spectrum = jnp.fft.rfft(frames * weights)
    power = jnp.mean(jnp.square(spectrum.real) + jnp.square(spectrum.imag), axis=-2)
    sides = np.full(power.shape[-1], 2.0, np.float32)
    sides[0] = 1.0
    if length % 2 == 0:
        sides[-1] = 1.0
    return power * sides / (sampling_rate * jnp.sum(jnp.square(weights)))


@partial(jax.jit, static_argnames=("bands", "spacing"))
def band_power(
    density: Float[Array, "*batch F"], *, bands: tuple[tuple[float, float], ...], spacing: float
) -> Float[Array, "*batch K"]:
    """A_k = sum over low_k <= f < high_k of P[f] df: the power in each band, f = 0, spacing, 2 spacing, ...

    `spacing` df is sampling_rate / N of the transform; bands in the same unit. A band that reaches the last frequency
    should end beyond it. Source: card eeg_spectral_priors, band_power_features.
    """
    frequencies = np.arange(density.shape[-1]) * spacing
    inside = np.stack([(frequencies >= low) & (frequencies < high) for low, high in bands], axis=-1)
    return jnp.einsum("...f,fk->...k", density.astype(jnp.float32), inside.astype(np.float32)) * spacing


@partial(jax.jit, static_argnames=("bands", "sampling_rate", "transition"))
def bandpass_filterbank(
    x: Float[Array, "*batch L"],
    *,
    bands: tuple[tuple[float, float], ...],
    sampling_rate: float,
    transition: float = 1.0,
) -> Float[Array, "*batch K L"]:
    """Zero-phase copies of x, one per band (low, high): the spectrum times a window with raised-cosine edges.

    `transition` is the width of an edge, centred on the band's limit, in the unit of `sampling_rate`; 0 cuts to
    low <= f < high. Copies of adjoining bands and what lies outside them add up to x. Circular at the ends of x.
    O(K L log L). Source: card eeg_spectral_priors, bandpass_filterbank.
    """
    frequencies = np.fft.rfftfreq(x.shape[-1], 1 / sampling_rate)

    def above(edge):
        if transition == 0:
            return (frequencies >= edge).astype(np.float32)
        phase = np.clip((frequencies - edge) / transition, -0.5, 0.5)
        return (0.5 + 0.5 * np.sin(math.pi * phase)).astype(np.float32)

    # A band from 0 has no lower edge: the mean belongs to it entirely.
    gains = np.stack([(above(low) if low > 0 else 1.0) - above(high) for low, high in bands])
    spectrum = jnp.fft.rfft(x.astype(jnp.float32))
    return jnp.fft.irfft(spectrum[..., None, :] * gains, n=x.shape[-1]).astype(x.dtype)


@partial(jax.jit, static_argnames=("fraction",))
def adaptive_low_pass_mask(amplitude: Float[Array, "*batch F"], *, fraction: float = 0.25) -> Bool[Array, "*batch F"]:
    """True for f <= f0 + trunc(fraction (F - f0)), f0 the strongest bin: keep the fundamental and some bins above it.

    GenHAR leaves the mean's bin out of its F bins. Source: card genhar, Mechanism 2 (fraction = filter_pos / 4).
    """
    bins = amplitude.shape[-1]
    strongest = jnp.argmax(amplitude, axis=-1)
    cutoff = strongest + jnp.trunc(fraction * (bins - strongest)).astype(strongest.dtype)
    return jnp.arange(bins) <= cutoff[..., None]


def radial_low_pass_mask(shape: tuple[int, int], *, cutoff: float) -> Bool[Array, "H W"]:
    """True where sqrt(fy^2 + fx^2) <= cutoff, in cycles per pixel (Nyquist 1/2), in the order of `jnp.fft.fft2`.

    The first W // 2 + 1 columns are the mask of `rfft2`. Source: card polygon_mamba, SFCAM.
    """
    rows, columns = (np.fft.fftfreq(size) for size in shape)
    return jnp.asarray(np.hypot(rows[:, None], columns[None]) <= cutoff)


def box_low_pass_mask(shape: tuple[int, int], *, ratio: float) -> Bool[Array, "H W"]:
    """True on the half-open box [c - k, c + k) of the shifted spectrum, c = s // 2, k = int(s ratio / 2), unshifted.

    Not symmetric about zero frequency, and empty where k = 0. Source: card realdiffusion, Mechanism 2 (ratio 1/4).
    """
    sides = []
    for size in shape:
        half = int(size * ratio / 2)
        index = np.arange(size) - size // 2
        sides.append(np.fft.ifftshift((index >= -half) & (index < half)))
    return jnp.asarray(sides[0][:, None] & sides[1][None])


@jax.jit
def exchange_frequencies(
    inside: Float[Array, "B H W C"], outside: Float[Array, "B H W C"], mask: Bool[Array, "H W"]
) -> Float[Array, "B H W C"]:
    """Re ifft2(where(mask, fft2(inside), fft2(outside))): the masked frequencies of one image in the other.

    The mask is in the order of `jnp.fft.fft2`. O(H W C log(H W)). Source: card realdiffusion, Mechanism 2.
    """
    change = (inside.astype(jnp.float32) - outside.astype(jnp.float32)).astype(jnp.complex64)
    change = jnp.where(mask[:, :, None], jnp.fft.fft2(change, axes=(1, 2)), 0.0)
    return (outside.astype(jnp.float32) + jnp.fft.ifft2(change, axes=(1, 2)).real).astype(inside.dtype)


@jax.jit
def split_frequencies(
    x: Float[Array, "B H W C"], mask: Bool[Array, "H W"]
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """(low, high): the part of an image in the masked frequencies and the rest; they add up to x.

    Source: card polygon_mamba, SFCAM (frequency branch).
    """
    low = exchange_frequencies(x, jnp.zeros_like(x), mask)
    return low, x - low


@jax.jit
def fourier_channels(x: Float[Array, "B H W C"], mask: Bool[Array, "H W"] | None = None) -> Float[Array, "B H F 2*C"]:
    """[Re, Im] of the orthonormal rfft2, F = W // 2 + 1, zero where `mask` (in `fft2` order) is False.

    What a pointwise network mixes before a spectral gate; `inverse_fourier_channels` comes back. Source: card
    polygon_mamba, SFCAM (frequency branch).
    """
    spectrum = jnp.fft.rfft2(x.astype(jnp.float32), axes=(1, 2), norm="ortho")
    if mask is not None:
        spectrum = jnp.where(mask[:, : spectrum.shape[2], None], spectrum, 0.0)
    return jnp.concatenate([spectrum.real, spectrum.imag], axis=-1).astype(x.dtype)


@partial(jax.jit, static_argnames=("width",))
def inverse_fourier_channels(features: Float[Array, "B H F C2"], *, width: int) -> Float[Array, "B H W C"]:
    """The image, `width` W columns wide, of `fourier_channels` [Re, Im].

    Source: card polygon_mamba, SFCAM (frequency branch).
    """
    if features.shape[2] != width // 2 + 1 or features.shape[3] % 2:
        raise ValueError(f"inverse_fourier_channels: width {width} does not fit features of shape {features.shape}")
    real, imaginary = jnp.split(features.astype(jnp.float32), 2, axis=-1)
    image = jnp.fft.irfft2(jax.lax.complex(real, imaginary), s=(features.shape[1], width), axes=(1, 2), norm="ortho")
    return image.astype(features.dtype)


@partial(jax.jit, static_argnames=("radius_power",))
def spectral_amplitude_loss(
    prediction: Float[Array, "*batch H W"], target: Float[Array, "*batch H W"], *, radius_power: float = 0.0
) -> Float[Array, ""]:
    """mean_f (|k| / k_max)^radius_power | |F y'| - |F y| |, F the orthonormal rfft2: misplaced detail costs nothing.

    Source: card mambarain, Mechanism 6.
    """
    # One transform of both: two of them at once can wait for each other's threads for ever on a CPU (jax 0.10).
    both = jnp.stack([prediction.astype(jnp.float32), target.astype(jnp.float32)])
    amplitudes = _safe_abs(jnp.fft.rfft2(both, norm="ortho"))
    height, width = prediction.shape[-2:]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    weights = (radius / max(radius.max(), 1e-12)) ** radius_power
    return jnp.mean(weights.astype(np.float32) * jnp.abs(amplitudes[0] - amplitudes[1]))


@jax.jit
def analytic_signal(x: Float[Array, "*batch L"]) -> Complex[Array, "*batch L"]:
    """x + i H x with H the Hilbert transform: negative frequencies dropped, positive ones doubled.

    Source: Gabor 1946; card underwater_acoustic, Mechanism 2.
    """
    length = x.shape[-1]
    gain = np.zeros(length, np.float32)
    gain[0] = 1.0
    gain[1 : (length + 1) // 2] = 2.0
    if length % 2 == 0:
        gain[length // 2] = 1.0
    return jnp.fft.ifft(jnp.fft.fft(x.astype(jnp.complex64)) * gain)


@jax.jit
def hilbert_envelope(x: Float[Array, "*batch L"]) -> Float[Array, "*batch L"]:
    """|x + i H x|: the amplitude of a modulated carrier. Zero gradient where it is 0.

    Source: card underwater_acoustic, Mechanism 2.
    """
    return _safe_abs(analytic_signal(x)).astype(x.dtype)


@partial(jax.jit, static_argnames=("frame_length", "hop", "window"))
def demon_spectrum(
    x: Float[Array, "*batch L"], *, frame_length: int, hop: int, window: str = "hann"
) -> Float[Array, "*batch F"]:
    """mean over frames of |rfft(w (a - mean a))|^2, a the Hilbert envelope: lines at the rates that modulate a noise.

    Source: card underwater_acoustic, Mechanism 4 (classical DEMON).
    """
    return _envelope_frames(hilbert_envelope(x), frame_length, hop, window, lambda a: jnp.abs(a[0]) ** 2)


def _envelope_frames(envelope, frame_length, hop, window, statistic):
    if frame_length > envelope.shape[-1]:
        raise ValueError(f"frame_length {frame_length} is longer than the {envelope.shape[-1]} samples")
    envelope = envelope.astype(jnp.float32)
    frames = _frames(envelope - jnp.mean(envelope, axis=-1, keepdims=True), frame_length, hop)
    weights = spectral_window(frame_length, kind=window)
    # One transform of both: two of them at once can wait for each other's threads for ever on a CPU (jax 0.10).
    transforms = jnp.fft.rfft(weights * jnp.stack([frames, jnp.square(frames)]))
    return jnp.mean(statistic(transforms), axis=-2)


@partial(jax.jit, static_argnames=("frame_length", "hop", "window"))
def third_order_spectrum(
    envelope: Float[Array, "*batch L"], *, frame_length: int, hop: int, window: str = "hann"
) -> Complex[Array, "*batch F"]:
    """E[conj(A(f)) A2(f)], A = rfft(w a), A2 = rfft(w a^2): the transform of E[a(t) a(t + s)^2], the 3/2-D spectrum.

    a has its mean removed; the expectation is over frames. Symmetric noise averages out, lines with a second harmonic
    stay. Source: card underwater_acoustic, Mechanism 3.
    """
    return _envelope_frames(envelope, frame_length, hop, window, lambda a: jnp.conj(a[0]) * a[1])


@partial(jax.jit, static_argnames=("num_modes", "max_iterations"))
def variational_modes(
    x: Float[Array, "*batch L"],
    *,
    num_modes: int,
    penalty: Float[Array, ""] | float = 2000.0,
    dual_step: Float[Array, ""] | float = 0.0,
    max_iterations: int = 200,
    tolerance: Float[Array, ""] | float = 1e-6,
) -> tuple[Float[Array, "*batch M L"], Float[Array, "*batch M"]]:
    """Modes u_m, each narrow around its centre w_m, that add up to x: (modes, centres in cycles per sample), by centre.

    On the half-spectrum of x mirrored at both ends, one mode after the other: u_m <- (x - sum_{i != m} u_i + lambda/2)
    / (1 + 2 penalty (w - w_m)^2), w_m <- its mean frequency, then lambda <- lambda + dual_step (x - sum_m u_m).
    `dual_step` 0 leaves noise out of the modes. A signal stops when the relative change is below `tolerance`. Not
    differentiable in reverse. O(iterations M L). Source: card underwater_acoustic, Mechanism 1 (Dragomiretskiy and
    Zosso 2014, algorithm 2).
    """
    length, half = x.shape[-1], x.shape[-1] // 2
    wide = x.astype(jnp.float32)
    mirrored = jnp.concatenate([wide[..., :half][..., ::-1], wide, wide[..., half:][..., ::-1]], axis=-1)
    target = jnp.fft.rfft(mirrored)
    frequencies = jnp.asarray(np.fft.rfftfreq(2 * length), jnp.float32)

    def squared(z):
        return jnp.square(z.real) + jnp.square(z.imag)

    def sweep(modes, centers, dual):
        for m in range(num_modes):
            rest = target - jnp.sum(modes, axis=-2) + modes[..., m, :] + dual / 2
            mode = rest / (1 + 2 * penalty * jnp.square(frequencies - centers[..., m, None]))
            power = squared(mode)
            center = jnp.sum(frequencies * power, -1) / jnp.maximum(jnp.sum(power, -1), 1e-30)
            modes, centers = modes.at[..., m, :].set(mode), centers.at[..., m].set(center)
        return modes, centers, dual + dual_step * (target - jnp.sum(modes, axis=-2))

    def step(state):
        count, active, modes, centers, dual = state
        fresh = sweep(modes, centers, dual)
        change = jnp.sum(squared(fresh[0] - modes), axis=(-2, -1)) / jnp.maximum(
            jnp.sum(squared(modes), axis=(-2, -1)), 1e-30
        )
        # Every signal stops on its own: what a batch computes does not depend on its other members.
        keep = [
            jnp.where(active.reshape(*active.shape, *(1,) * (new.ndim - active.ndim)), new, old)
            for new, old in zip(fresh, (modes, centers, dual), strict=True)
        ]
        return count + 1, active & (change > tolerance), *keep

    batch = x.shape[:-1]
    start = (
        0,
        jnp.ones(batch, bool),
        jnp.zeros((*batch, num_modes, frequencies.size), jnp.complex64),
        jnp.broadcast_to(0.5 * jnp.arange(num_modes, dtype=jnp.float32) / num_modes, (*batch, num_modes)),
        jnp.zeros_like(target),
    )
    _, _, modes, centers, _ = jax.lax.while_loop(lambda s: (s[0] < max_iterations) & jnp.any(s[1]), step, start)
    order = jnp.argsort(centers, axis=-1)
    modes = jnp.take_along_axis(modes, order[..., None], axis=-2)
    signals = jnp.fft.irfft(modes, n=2 * length)[..., half : half + length]
    return signals.astype(x.dtype), jnp.take_along_axis(centers, order, axis=-1)


@partial(jax.jit, static_argnames=("sampling_rate", "hop", "min_frequency", "bins_per_octave", "num_bins"))
def constant_q_transform(
    x: Float[Array, "*batch L"],
    *,
    sampling_rate: float,
    hop: int,
    min_frequency: float,
    bins_per_octave: int,
    num_bins: int,
) -> Complex[Array, "*batch K T"]:
    """X[k, t] = sum_n x[t hop + n] w_k[n] e^(-2 pi i f_k n / fs) / sum_n w_k[n], f_k = min_frequency 2^(k / octave).

    w_k is a Hann window of Q fs / f_k samples centred on 0, Q = 1 / (2^(1/bins_per_octave) - 1), so that a tone of
    amplitude a gives a / 2 in its bin. Zeros beyond the ends; T = ceil(L / hop). One fast transform of the whole signal
    per bin. Source: Brown 1991; card piano_ot, Model (front-end).
    """
    quality = 1 / (2 ** (1 / bins_per_octave) - 1)
    frequencies = min_frequency * 2 ** (np.arange(num_bins) / bins_per_octave)
    if frequencies[-1] >= sampling_rate / 2:
        raise ValueError(f"constant_q_transform: num_bins {num_bins} reaches {frequencies[-1]:g}, beyond Nyquist")
    spans = quality * sampling_rate / frequencies
    num_frames = -(-x.shape[-1] // hop)
    size = hop * -(-(x.shape[-1] + math.ceil(spans[0])) // hop)
    spectrum = jnp.fft.fft(x.astype(jnp.complex64), n=size)
    offset = jnp.asarray(np.round(np.fft.fftfreq(size, 1 / size)), jnp.int32)

    def one(bin_):
        turns, span = bin_
        window = jnp.where(jnp.abs(offset) < span / 2, 0.5 + 0.5 * jnp.cos(2 * math.pi * offset / span), 0.0)
        # Whole turns drop out of the product of 32-bit words: far from the centre float32 would lose the phase.
        phase = (offset.astype(jnp.uint32) * turns).astype(jnp.float32) * (2 * math.pi / 2**32)
        kernel = window * jnp.exp(1j * phase) / jnp.sum(window)
        product = spectrum * jnp.conj(jnp.fft.fft(kernel))
        # Sampling every hop-th frame folds the spectrum.
        folded = jnp.mean(product.reshape(*product.shape[:-1], hop, size // hop), axis=-2)
        return jnp.fft.ifft(folded)[..., :num_frames]

    turns = np.round(frequencies / sampling_rate * 2.0**32).astype(np.uint32)
    bins = jnp.asarray(turns), jnp.asarray(spans, jnp.float32)
    return jnp.moveaxis(jax.lax.map(one, bins), 0, -2)


def _check_nonuniform(function, implementation):
    if implementation not in (None, "direct", "gridding"):
        raise ValueError(f"{function}: implementation {implementation!r} is not one of direct, gridding")


def _lattice_waves(points, modes, period):
    """e^(2 pi i n.r / T) for every point and lattice vector, flattened: (B, L, modes^P)."""
    axis = jnp.arange(-(modes // 2), modes - modes // 2, dtype=jnp.float32)
    # Positions are reduced to one period first, which keeps the phase exact in float32.
    phase = (points / period) % 1.0
    waves = jnp.exp(2j * math.pi * (phase[..., None] * axis))
    product = waves[..., 0, :]
    for dim in range(1, points.shape[-1]):
        product = product[..., :, None] * waves[..., dim, None, :]
        product = product.reshape(*product.shape[:2], -1)
    return product


def _spreading_window(z, width):
    """Exponential of a semicircle: almost band-limited, zero beyond width / 2."""
    inside = jnp.maximum(1 - jnp.square(2 * z / width), 0.0)
    return jnp.where(jnp.abs(z) <= width / 2, jnp.exp(2.30 * width * (jnp.sqrt(inside) - 1)), 0.0)


def _deconvolution(modes, width):
    """1 / the window's Fourier coefficients on the modes of a grid twice as fine, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(8 * width + 16)
    window = np.exp(2.30 * width * (np.sqrt(1 - nodes**2) - 1)) * weights * width / 2
    axis = np.arange(-(modes // 2), modes - modes // 2) / (2 * modes)
    return 1 / (np.cos(2 * math.pi * axis[:, None] * nodes * width / 2) @ window)


def _stencil(points, modes, period, width):
    """For each of S = width^P neighbours of the points (L, P): flat index on the fine grid, and weight, both (S, L)."""
    fine = 2 * modes
    place = (points / period) % 1.0 * fine
    first = jnp.ceil(place - width / 2)
    steps = np.asarray(list(itertools.product(range(width), repeat=points.shape[-1])))
    per_axis = _spreading_window(place[..., None] - first[..., None] - np.arange(width), width)
    weights, index = 1.0, 0
    for dim in range(points.shape[-1]):
        weights = weights * per_axis[:, dim, steps[:, dim]]
        index = index * fine + (first[:, dim, None].astype(jnp.int32) + steps[:, dim]) % fine
    return index.T, weights.T


def _lattice_on_grid(modes, dims):
    """Where the modes -M/2 .. M/2 - 1 stand in the fine grid's transform, flattened."""
    axis = np.arange(-(modes // 2), modes - modes // 2) % (2 * modes)
    return np.ravel_multi_index(np.meshgrid(*[axis] * dims, indexing="ij"), [2 * modes] * dims).reshape(-1)


def _lattice_gains(modes, dims, width):
    axis = _deconvolution(modes, width)
    return math.prod(np.meshgrid(*[axis] * dims, indexing="ij")).reshape(-1).astype(np.float32)


@partial(jax.jit, static_argnames=("modes", "period", "width", "implementation"))
def nonuniform_fourier_sum(
    values: Inexact[Array, "B C L"],
    points: Float[Array, "B L P"],
    *,
    modes: int,
    period: float,
    width: int = 6,
    implementation: str | None = None,
) -> Complex[Array, "B C *lattice"]:
    """G[n] = sum_j v_j e^(-2 pi i n.r_j / T) for n in {-M/2 .. M/2 - 1}^P: type-1 nonuniform transform, M = `modes`.

    Points anywhere, taken modulo the `period` T; no gradient flows to them. implementation: "direct" multiplies by the
    table of waves, O(C L M^P); "gridding" spreads on a grid twice as fine through `width` neighbours an axis, relative
    error about 10^(1 - width), O(C (L width^P + M^P log M)). None is "direct" for M^P <= 512. Source: card
    relflexformer, Mechanism 4-5; Dutt and Rokhlin 1993.
    """
    _check_nonuniform("nonuniform_fourier_sum", implementation)
    batch, channels, _ = values.shape
    dims = points.shape[-1]
    points = jax.lax.stop_gradient(points.astype(jnp.float32))
    if implementation == "direct" or (implementation is None and modes**dims <= 512):
        sums = jnp.einsum("bcl,bln->bcn", values.astype(jnp.complex64), jnp.conj(_lattice_waves(points, modes, period)))
        return sums.reshape(batch, channels, *(modes,) * dims)

    def one(values, points):
        # Real rows: a real input spreads at half the cost.
        rows = jnp.concatenate([values.real, values.imag]) if jnp.iscomplexobj(values) else values
        rows = rows.T.astype(jnp.float32)

        def spread(grid, neighbour):
            index, weight = neighbour
            return grid.at[index].add(weight[:, None] * rows), None

        grid = jnp.zeros(((2 * modes) ** dims, rows.shape[1]), jnp.float32)
        grid, _ = jax.lax.scan(spread, grid, _stencil(points, modes, period, width))
        grid = grid.T
        if jnp.iscomplexobj(values):
            grid = jax.lax.complex(grid[:channels], grid[channels:])
        transform = jnp.fft.fftn(grid.reshape(channels, *(2 * modes,) * dims), axes=range(1, dims + 1))
        return transform.reshape(channels, -1)[:, _lattice_on_grid(modes, dims)] * _lattice_gains(modes, dims, width)

    return jax.vmap(one)(values, points).reshape(batch, channels, *(modes,) * dims)


@partial(jax.jit, static_argnames=("period", "width", "implementation"))
def nonuniform_fourier_values(
    coefficients: Complex[Array, "B C *lattice"],
    points: Float[Array, "B L P"],
    *,
    period: float,
    width: int = 6,
    implementation: str | None = None,
) -> Complex[Array, "B C L"]:
    """v_j = sum_n G[n] e^(2 pi i n.r_j / T): type-2 nonuniform transform, the adjoint of `nonuniform_fourier_sum`.

    The lattice has P axes of one size; options as there. Source: card relflexformer, Mechanism 4-5.
    """
    _check_nonuniform("nonuniform_fourier_values", implementation)
    batch, channels, modes = coefficients.shape[:3]
    dims = points.shape[-1]
    if coefficients.shape[2:] != (modes,) * dims:
        raise ValueError(
            f"nonuniform_fourier_values: coefficients of shape {coefficients.shape} do not have {dims} axes of one size"
        )
    points = jax.lax.stop_gradient(points.astype(jnp.float32))
    flat = coefficients.reshape(batch, channels, -1)
    if implementation == "direct" or (implementation is None and modes**dims <= 512):
        return jnp.einsum("bcn,bln->bcl", flat, _lattice_waves(points, modes, period))

    def one(flat, points):
        fine = (2 * modes,) * dims
        grid = jnp.zeros((channels, math.prod(fine)), jnp.complex64)
        grid = grid.at[:, _lattice_on_grid(modes, dims)].set(flat * _lattice_gains(modes, dims, width))
        grid = jnp.fft.ifftn(grid.reshape(channels, *fine), axes=range(1, dims + 1), norm="forward")
        grid = grid.reshape(channels, -1).T
        grid = jnp.concatenate([grid.real, grid.imag], axis=-1)

        def gather(total, neighbour):
            index, weight = neighbour
            return total + weight[:, None] * grid[index], None

        total, _ = jax.lax.scan(
            gather, jnp.zeros((points.shape[0], grid.shape[1])), _stencil(points, modes, period, width)
        )
        return jax.lax.complex(total[:, :channels], total[:, channels:]).T

    return jax.vmap(one)(flat, points)
