"""The synthetic series that XCTFormer's authors test on: a target that its own past tells little of.

Source: card xctformer, "Data" (the official generator).
"""

import numpy as np

from trainers.data.csv_series import RawSeries

__all__ = ["CROSS_CHANNEL_COLUMNS", "cross_channel_series"]

CROSS_CHANNEL_COLUMNS = (*(f"wave {i}" for i in range(4)), "walk 0", "walk 1", "target")
_STEPS, _PATCH, _STRIDE, _PERIOD = 10_000, 16, 8, 20
_WAVES = ((1, 0.02, 0.0, 0.02), (3, 0.03, 1.0, 0.07), (2, 0.01, 1.0, 0.03), (5, 0.002, 0.5, 0.02))
_WALKS = (0.1, 0.15)
_LAGS = (1, 2, 2, 3)  # patches by which the target follows each wave
_NOISE = 0.02


def cross_channel_series(seed: int) -> RawSeries:
    """Four waves a sin(2 pi f t + phase) + noise, two random walks of no meaning, and the target.

    Patch k of the target (16 steps, one each 8) is the mean of two blends, w s0[k-1] + (1-w) s1[k-2] and
    w s2[k-2] + (1-w) s3[k-3], where s[j] is a wave's patch j and w goes 0, 0.1, ... 1, ... 0 with a period of 20
    patches. Terms from before the beginning are left out and the rest weighs more; overlapping patches are averaged.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    time = np.arange(_STEPS)
    waves = [a * np.sin(2 * np.pi * f * time + phase) + rng.normal(0, s, _STEPS) for a, f, phase, s in _WAVES]
    walks = [np.cumsum(rng.normal(0, step, _STEPS)) for step in _WALKS]
    total, number = np.zeros(_STEPS), np.zeros(_STEPS)
    for k in range((_STEPS - _PATCH) // _STRIDE + 1):
        place = k % _PERIOD
        w = place / 10 if place < 10 else (_PERIOD - place) / 10
        weights = 0.5 * np.array([w, 1 - w, w, 1 - w])
        terms = [(weight, wave, k - lag) for weight, wave, lag in zip(weights, waves, _LAGS, strict=True) if k >= lag]
        used = sum(weight for weight, _, _ in terms)
        if used == 0:
            continue
        blend = sum(weight * wave[_STRIDE * j : _STRIDE * j + _PATCH] for weight, wave, j in terms) / used
        here = slice(_STRIDE * k, _STRIDE * k + _PATCH)
        total[here] += blend
        number[here] += 1
    target = total / np.maximum(number, 1) + rng.normal(0, _NOISE, _STEPS)
    return RawSeries(np.stack([*waves, *walks, target], axis=1), np.array([], "datetime64[s]"))
