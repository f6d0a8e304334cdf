"""Stand-in data: generated, the same on every machine, learnable by a correct model and not by a broken one."""

import numpy as np

from trainers.data.csv_series import RawSeries

__all__ = ["forecasting_standin"]

HOURS = 2_000
VARIATES = 7
_LAGGED = {5: (0, 3), 6: (1, 7)}  # variate -> (the one it copies, hours later)


def forecasting_standin(seed: int) -> RawSeries:
    """Seven hourly series: a sin(2 pi t / 24 + phase) + slow trend + 0.1 noise; the last two copy earlier ones, lagged.

    The trend is a line plus a slow random walk. Repeating the last value misses the daily cycle; a model that finds
    cycle and trend is left with the noise. Source: card ister, "Data".
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    hours = np.arange(HOURS)[:, None]
    amplitude, phase = rng.uniform(0.5, 1.5, VARIATES), rng.uniform(0, 2 * np.pi, VARIATES)
    line = rng.uniform(-1, 1, VARIATES) * hours / HOURS
    walk = np.cumsum(rng.normal(0, 0.01, (HOURS, VARIATES)), axis=0)
    clean = amplitude * np.sin(2 * np.pi * hours / 24 + phase) + line + walk
    for variate, (source, lag) in _LAGGED.items():
        clean[:, variate] = np.concatenate([np.repeat(clean[:1, source], lag), clean[:-lag, source]])
    values = clean + rng.normal(0, 0.1, (HOURS, VARIATES))
    times = np.datetime64("2016-07-01T00:00:00", "s") + np.arange(HOURS) * np.timedelta64(3600, "s")
    return RawSeries(values, times)
