"""Stand-in data: generated, the same on every machine, learnable by a correct model and not by a broken one."""

from dataclasses import dataclass

import numpy as np

from trainers.data.csv_series import RawSeries

__all__ = ["Interactions", "forecasting_standin", "recommendation_standin", "trajectory_standin"]

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


SCENES = 5_000
_NEAR = 1.0  # a neighbour that comes nearer makes the ego swerve
_SWERVE = 0.5  # sideways, a frame squared, in the first two frames


def trajectory_standin(
    seed: int, *, lookback: int, horizon: int, num_agents: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(past (S, T, N, 2), present (S, N), the ego's future (S, P, 2)) of agents on a plane, in metres and frames.

    All move straight on until now. Then the ego turns to one of two goals, left or right of its way, by the toss of a
    coin; and if a neighbour, going straight on as neighbours do, would come within a metre of where the ego was going,
    it swerves to the side from which that neighbour comes, to pass behind it. The coin cannot be foreseen, so that two
    guesses are needed; the swerve can, by a model that looks at the neighbours. Every place but the ego's is empty in a
    fifth of the scenes.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    shape = (SCENES, num_agents)
    speed, heading = rng.uniform(0.6, 1.2, shape), rng.uniform(-np.pi, np.pi, shape)
    heading[:, 0] = rng.uniform(-0.5, 0.5, SCENES)
    velocity = speed[..., None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    place = rng.uniform(-12, 12, (*shape, 2))
    place[:, 0] = rng.uniform(-3, 3, (SCENES, 2))
    # Every other scene has a neighbour who will cross the ego's way, up to half a metre early or late.
    meeting = rng.integers(0, 2, SCENES).astype(bool)
    frames = rng.uniform(1, horizon, (SCENES, 1))
    beside = rng.uniform(-0.5, 0.5, (SCENES, 2))
    crossing = place[:, 0] + frames * (velocity[:, 0] - velocity[:, 1]) + beside
    place[:, 1] = np.where(meeting[:, None], crossing, place[:, 1])
    # Nobody's place tells who the crossing one is.
    order = np.concatenate([np.zeros((SCENES, 1)), rng.uniform(1, 2, (SCENES, num_agents - 1))], axis=1).argsort(axis=1)
    place, velocity = (np.take_along_axis(v, order[..., None], axis=1) for v in (place, velocity))
    count = 1 + (rng.uniform(size=(SCENES, num_agents - 1)) > 0.2).sum(axis=1)
    present = np.arange(num_agents) < count[:, None]

    past = place[:, None] + velocity[:, None] * np.arange(1 - lookback, 1)[:, None, None]
    past = np.where(present[:, None, :, None], past + rng.normal(0, 0.01, past.shape), 0.0)

    ahead = np.arange(1, horizon + 1)[:, None, None]
    apart = (place - place[:, :1])[:, None] + (velocity - velocity[:, :1])[:, None] * ahead  # (S, P, N, 2)
    distance = np.where(present[:, None] & (np.arange(num_agents) > 0), np.linalg.norm(apart, axis=-1), np.inf)
    who = distance.min(axis=1).argmin(axis=1)
    threat = np.take_along_axis(place - place[:, :1], who[:, None, None], axis=1)[:, 0]
    left = np.stack([-velocity[:, 0, 1], velocity[:, 0, 0]], axis=-1) / np.linalg.norm(velocity[:, 0], axis=-1)[:, None]
    side = np.where(np.sum(threat * left, axis=-1) > 0, 1.0, -1.0) * (distance.min(axis=(1, 2)) < _NEAR)
    turn = rng.choice([-0.3, 0.3], SCENES)
    cos, sin = np.cos(turn), np.sin(turn)
    towards = np.stack(
        [cos * velocity[:, 0, 0] - sin * velocity[:, 0, 1], sin * velocity[:, 0, 0] + cos * velocity[:, 0, 1]], axis=-1
    )
    pushed = np.minimum(ahead[:, :, 0], 2)  # frames of acceleration so far
    sideways = _SWERVE * (0.5 * pushed**2 + pushed * (ahead[:, :, 0] - pushed))
    future = place[:, :1] + towards[:, None] * ahead[:, :, 0] + side[:, None, None] * sideways * left[:, None]
    future = future + rng.normal(0, 0.02, future.shape)
    return past.astype(np.float32), present, future.astype(np.float32)


@dataclass(frozen=True)
class Interactions:
    """Who took what and when: items of each user in the order of time, numbered from 1."""

    sequences: tuple[np.ndarray, ...]
    times: tuple[np.ndarray, ...] | None  # datetime64[s], as long as each sequence
    attributes: np.ndarray  # (I + 1, F), row 0 is no item
    returns: bool  # users take items again


CATEGORIES, SEASONS, BRANDS = 4, 2, 6


def recommendation_standin(seed: int, users: int = 600, events: int = 20) -> Interactions:
    """48 items, one for each category, season and brand, which are its attributes. A user stays with one brand, goes on
    to the next category each time (any one, once in 20), and takes what the season asks for (1: from July on).

    So the next item follows from what a history holds (brand), from its order (category) and from the date (season).
    Source: card convrec, "Data".
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    category, season, brand = np.unravel_index(np.arange(CATEGORIES * SEASONS * BRANDS), (CATEGORIES, SEASONS, BRANDS))
    one_hots = [np.eye(n, dtype=np.float32)[v] for n, v in ((CATEGORIES, category), (SEASONS, season), (BRANDS, brand))]
    attributes = np.concatenate(one_hots, axis=1)
    attributes = np.concatenate([np.zeros_like(attributes[:1]), attributes])

    steps = rng.integers(1, 40, (users, events)).cumsum(axis=1) + rng.integers(0, 365, (users, 1))
    times = np.datetime64("2020-01-01T12:00:00", "s") + steps * np.timedelta64(86_400, "s")
    months = times.astype("datetime64[M]").astype(np.int64) % 12
    jumps = np.where(rng.random((users, events)) < 0.05, rng.integers(0, CATEGORIES, (users, events)), 1)
    categories = (rng.integers(0, CATEGORIES, (users, 1)) + jumps.cumsum(axis=1)) % CATEGORIES
    brands = np.broadcast_to(rng.integers(0, BRANDS, (users, 1)), (users, events))
    items = 1 + np.ravel_multi_index((categories, months // 6, brands), (CATEGORIES, SEASONS, BRANDS))
    return Interactions(tuple(items), tuple(times), attributes, returns=True)
