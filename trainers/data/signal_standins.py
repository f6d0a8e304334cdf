"""Stand-ins for measured signals: generated, the same on every machine, learnable by a correct model.

Each takes (seed, length, channels, num_classes) and gives the parts as (signals (N, L, C), class numbers (N,)).
"""

from collections.abc import Callable, Mapping

import numpy as np

from zoo.errors import UserError

__all__ = ["STANDINS", "ecg_records", "ecg_standin", "eeg_standin", "eeg_windows", "imu_standin"]

Parts = Mapping[str, tuple[np.ndarray, np.ndarray]]


def _fixed(name: str, **sizes: tuple[int, int]) -> None:
    for field, (given, fixed) in sizes.items():
        if given != fixed:
            option = f"--model.{field.replace('_', '-')}"
            raise UserError(f"the stand-in of {name} has {fixed} {field.replace('_', ' ')}, not {given}: set {option}")


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation of space, evenly distributed."""
    basis, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    basis = basis * np.sign(np.diag(upper))
    return basis * np.linalg.det(basis)


GAITS = (1.2, 1.8, 2.4)  # steps a second; the last class is still
_RATE = 20.0  # of the motion sensors, samples a second


def imu_standin(seed: int, *, length: int, channels: int, num_classes: int) -> Parts:
    """Four gaits of an accelerometer and a gyroscope (x, y, z each) at 20 samples a second, in two domains.

    A class is a step frequency (within 5 %) and how strong its harmonics are on each axis; the last stands still. Test
    windows are of the other domain, whose sensors point elsewhere, by one rotation for all its windows, and have
    another gain and more noise. Every window begins anywhere in a step. Source: card genhar, "Data".
    """
    _fixed("genhar", channels=(channels, 6), num_classes=(num_classes, len(GAITS) + 1))
    rng = np.random.Generator(np.random.PCG64(seed))
    harmonics = np.arange(1, 4)
    strength = rng.uniform(0.3, 1.0, (len(GAITS), 6, harmonics.size)) / harmonics
    offset = rng.uniform(0, 2 * np.pi, (len(GAITS), 6, harmonics.size))

    def domain(counts: tuple[int, ...], gain: float, noise: float) -> list[tuple[np.ndarray, np.ndarray]]:
        turn = _rotation(rng)
        label = np.concatenate([rng.permutation(np.arange(count) % num_classes) for count in counts])
        windows = len(label)
        moving = np.minimum(label, len(GAITS) - 1)
        frequency = np.asarray(GAITS)[moving] * rng.uniform(0.95, 1.05, windows)
        start = rng.uniform(0, 1, windows)
        steps = (np.arange(length) / _RATE)[None] * frequency[:, None] + start[:, None]
        phase = 2 * np.pi * harmonics * steps[..., None, None] + offset[moving][:, None]
        x = np.sum(strength[moving][:, None] * np.sin(phase), axis=-1)  # (N, L, 6)
        x = np.where((label < len(GAITS))[:, None, None], x, 0.0) + noise * rng.normal(size=x.shape)
        x[..., 2] += 9.8
        turned = [part @ turn.T for part in (x[..., :3], x[..., 3:])]
        signals = (gain * np.concatenate(turned, axis=-1)).astype(np.float32)
        borders = np.cumsum(counts)[:-1]
        return list(zip(np.split(signals, borders), np.split(label.astype(np.int32), borders), strict=True))

    train, valid = domain((1_200, 400), 1.0, 0.8)
    (test,) = domain((800,), 1.3, 1.2)
    return {"train": train, "valid": valid, "test": test}


def eeg_windows(
    rng: np.random.Generator, *, subjects: int, windows: int, length: int, channels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(one-second windows (N, L, C), class (N,), subject (N,)): 1/f noise with a rhythm at 10 Hz, or slowed to 8.5 Hz.

    In class 1, 30 % of the power of alpha and beta has moved to theta. Exponent of the noise (1 to 1.5) and gains of
    channels are the subject's, phases are new in every window, so that only power tells. Source: card
    eeg_spectral_priors, "Data".
    """
    frequency = np.fft.rfftfreq(length, 1 / length)
    theta, faster = ((low <= frequency) & (frequency < high) for low, high in ((4, 8), (8, 30)))
    signals, labels, names = [], [], []
    for subject in range(subjects):
        label = subject % 2
        gains = np.exp(rng.normal(0, 0.5, channels))
        peak = (8.5 if label else 10.0) + rng.normal(0, 0.3)
        power = np.maximum(frequency, 1.0) ** -rng.uniform(1.0, 1.5)
        power += rng.uniform(0.3, 0.6) * np.exp(-0.5 * ((frequency - peak) / 0.8) ** 2)
        power[0] = 0.0
        if label:
            moved = 0.3 * power[faster].sum()
            power = np.where(faster, 0.7 * power, power) + np.where(theta, moved / max(theta.sum(), 1), 0.0)
        size = (windows, channels, frequency.size)
        spectrum = np.sqrt(power) * (rng.normal(size=size) + 1j * rng.normal(size=size))
        x = np.fft.irfft(spectrum, n=length) * np.sqrt(length) * gains[:, None]
        signals.append(np.swapaxes(x, 1, 2))
        labels.append(np.full(windows, label))
        names.append(np.full(windows, subject))
    return (
        np.concatenate(signals).astype(np.float32),
        np.concatenate(labels).astype(np.int32),
        np.concatenate(names).astype(np.int32),
    )


def eeg_standin(seed: int, *, length: int, channels: int, num_classes: int) -> Parts:
    """`eeg_windows` of forty subjects: 24 to train on, 8 for validation and 8 for test, no subject in two parts."""
    _fixed("eeg_spectral_priors", num_classes=(num_classes, 2))
    rng = np.random.Generator(np.random.PCG64(seed))
    x, label, subject = eeg_windows(rng, subjects=40, windows=40, length=length, channels=channels)
    borders = {"train": (0, 24), "valid": (24, 32), "test": (32, 40)}
    parts = {part: (first <= subject) & (subject < last) for part, (first, last) in borders.items()}
    return {part: (x[chosen], label[chosen]) for part, chosen in parts.items()}


ECG_CLASSES = ("sinus", "fibrillation", "slow", "wide QRS", "ST elevation")
_ECG_RATE = 100.0
# Centre and width in s, and height, of the waves P, Q, R, S, T about the R peak.
_CENTRES = np.array([-0.20, -0.04, 0.0, 0.04, 0.25])
_WIDTHS = np.array([0.025, 0.010, 0.011, 0.010, 0.060])
_HEIGHTS = np.array([0.12, -0.1, 1.0, -0.2, 0.3])


def ecg_records(rng: np.random.Generator, records: int, *, length: int, leads: int) -> tuple[np.ndarray, np.ndarray]:
    """(records (N, L, C) at 100 samples a second, z-scored lead by lead; class (N,) in the order of ECG_CLASSES).

    Five waves a beat as Gaussians, projected onto the leads by a matrix that all records share within 5 %, with
    baseline wander and noise. Fibrillation: no P wave, irregular, ripples at 6 Hz; slow: 1.4 s from beat to beat;
    wide QRS: 2.5 times, T upside down; ST elevation: 0.2 between S and T. Source: card ecg_nat, "Data".
    """
    time = np.arange(length) / _ECG_RATE
    label = rng.permutation(np.arange(records) % len(ECG_CLASSES))
    # The heart's directions belong to the kind of data, not to a draw of it.
    shared = np.random.Generator(np.random.PCG64(12)).normal(size=(leads, 5)) * 0.4 + 0.6
    beats = int(time[-1] / 0.4) + 4
    x = np.empty((records, length, leads), np.float32)
    for i, kind in enumerate(label):
        mean = 1.4 if kind == 2 else rng.uniform(0.65, 0.95)
        spread = 0.2 if kind == 1 else 0.03
        gaps = mean * np.maximum(1 + spread * rng.normal(size=beats), 0.5)
        peaks = np.cumsum(gaps) - gaps[0] - rng.uniform(0, mean) - 0.3
        heights, widths = _HEIGHTS.copy(), _WIDTHS.copy()
        if kind == 1:
            heights[0] = 0.0
        if kind == 3:
            widths[1:4] *= 2.5
            heights[4] *= -1
        apart = time[:, None] - peaks  # (L, beats)
        waves = heights * np.exp(-0.5 * ((apart[..., None] - _CENTRES) / widths) ** 2)
        waves = waves.sum(axis=1)  # (L, 5)
        if kind == 4:
            waves[:, 4] += 0.2 * ((apart > 0.06) & (apart < 0.25)).any(axis=1)
        gain = shared * (1 + 0.05 * rng.normal(size=shared.shape))
        record = waves @ gain.T
        if kind == 1:
            record += 0.05 * np.sin(2 * np.pi * 6 * time + rng.uniform(0, 2 * np.pi))[:, None]
        wander = 0.05 * np.sin(2 * np.pi * rng.uniform(0.2, 0.4) * time + rng.uniform(0, 2 * np.pi))
        record += wander[:, None] + 0.02 * rng.normal(size=record.shape)
        x[i] = (record - record.mean(axis=0)) / record.std(axis=0)
    return x, label.astype(np.int32)


def ecg_standin(seed: int, *, length: int, channels: int, num_classes: int) -> Parts:
    """`ecg_records`: 1,000 to train on, 250 for validation, 500 for test."""
    _fixed("ecg_nat", num_classes=(num_classes, len(ECG_CLASSES)))
    rng = np.random.Generator(np.random.PCG64(seed))
    counts = {"train": 1_000, "valid": 250, "test": 500}
    return {part: ecg_records(rng, count, length=length, leads=channels) for part, count in counts.items()}


STANDINS: dict[str, Callable[..., Parts]] = {
    "genhar": imu_standin,
    "eeg_spectral_priors": eeg_standin,
    "ecg_nat": ecg_standin,
}
