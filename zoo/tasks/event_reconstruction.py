"""What a detector saw: is an event a neutrino, which of its hits are the particle's and how late are they.

Batch: `hits` (B, N, 5) charge (photoelectrons), time (ns) and place x, y, z (m) of each hit, in the order of time;
`hit_mask` (B, N) is True where there is a hit, and the absent ones come last; `signal` (B, N) 1 where it is light of
the particle, else 0; `residual` (B, N) ns, the expected time of such light less the hit's; `event` (B,) 1 for a
neutrino, 0 for background; `domain` (B,) 0 for simulated, 1 for measured events, whose labels nobody may learn from.
Output: a dictionary with `event` (B, 2), logits; `hits` (B, N, 2), logits of noise and signal; `residual` (B, N) ns.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK", "charge_and_slope", "cherenkov_time", "example", "exposure_at_suppression", "focal_loss", "loss", "metrics",
    "pad", "picture", "report", "suppression_at_exposure",
]  # fmt: skip

_REFRACTION = 1.37  # of sea- and lake water, n
_VACUUM, _WATER = 0.299792458, 0.218826621  # m / ns


def cherenkov_time(
    place: Num[Array | np.ndarray, "*P 3"],
    point: Num[Array | np.ndarray, "*Q 3"],
    direction: Num[Array | np.ndarray, "*Q 3"],
    start: Num[Array | np.ndarray, "*Q"] | float = 0.0,
) -> Num[Array | np.ndarray, "*B"]:
    """t_0 + (l - s / tan c) / c_0 + s / (sin c c_l), when a muon's light reaches `place` (ns).

    The muon passes `point` (m) at `start` along the unit vector `direction`; l is how far along its way the place is,
    s how far from it, cos c = 1 / 1.37, c_0 and c_l the speeds of light in vacuum and water. Shapes broadcast; NumPy
    and JAX arrays alike. Source: card baikal_gvd, "Time residual".
    """
    xp = jnp if isinstance(place, jax.Array) else np
    away = place - point
    along = xp.sum(away * direction, axis=-1)
    beside = xp.sqrt(xp.maximum(xp.sum(away * away, axis=-1) - along * along, 0.0))
    sine = (1 - 1 / _REFRACTION**2) ** 0.5
    return start + (along - beside / (sine * _REFRACTION)) / _VACUUM + beside / (sine * _WATER)


def focal_loss(
    logits: Float[Array, "*B C"], label: Int[Array, "*B"], *, gamma: float, weights: tuple[float, ...] | None = None
) -> Float[Array, "*B"]:
    """-w_y (1 - p_y)^gamma log p_y: cross-entropy for gamma 0. Source: arXiv:1708.02002."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), label[..., None], axis=-1)[..., 0]
    scale = 1.0 if weights is None else jnp.asarray(weights)[label]
    return -scale * (1.0 - jnp.exp(chosen)) ** gamma * chosen if gamma else -scale * chosen


def _mean_over_hits(values: Float[Array, "B N"], chosen: Bool[Array, "B N"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.where(chosen, values, 0.0), axis=1) / jnp.maximum(jnp.sum(chosen, axis=1), 1)


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of events plus that of hits, plus the squared error of the signal's residuals in units of 10 ns."""
    known = 1.0 - batch["domain"].astype(jnp.float32)
    of_event = focal_loss(outputs["event"], batch["event"], gamma=0.0)
    of_hits = _mean_over_hits(focal_loss(outputs["hits"], batch["signal"], gamma=0.0), batch["hit_mask"])
    late = jnp.square((outputs["residual"].astype(jnp.float32) - batch["residual"]) / 10.0)
    late = _mean_over_hits(late, batch["hit_mask"] & (batch["signal"] == 1))
    total = jnp.sum(known * (of_event + of_hits + late)) / jnp.maximum(jnp.sum(known), 1.0)
    return total, {}


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each event: whether its class is right; of its hits, precision, recall and F1 of the signal; the mean absolute
    error of the signal's residuals (ns)."""
    guess, truth = outputs["hits"][..., 1] > outputs["hits"][..., 0], batch["signal"] == 1
    found, called, there = (
        jnp.sum(chosen & batch["hit_mask"], axis=1).astype(jnp.float32) for chosen in (guess & truth, guess, truth)
    )
    late = jnp.abs(outputs["residual"].astype(jnp.float32) - batch["residual"])
    return {
        "event_accuracy": (jnp.argmax(outputs["event"], axis=-1) == batch["event"]).astype(jnp.float32),
        "hit_precision": found / jnp.maximum(called, 1.0),
        "hit_recall": found / jnp.maximum(there, 1.0),
        "hit_f1": 2 * found / jnp.maximum(called + there, 1.0),
        "residual_mae": _mean_over_hits(late, batch["hit_mask"] & truth),
    }


def charge_and_slope(batch: Batch) -> dict[str, Array]:
    """Hits of more than 1.5 photoelectrons are signal, none of them late; an event whose signal rises is a neutrino."""
    charge, time, height = (batch["hits"][..., i] for i in (0, 1, 4))
    signal = (charge > 1.5) & batch["hit_mask"]
    centred = [x - _mean_over_hits(x, signal)[:, None] for x in (time, height)]
    rise = jnp.sum(jnp.where(signal, centred[0] * centred[1], 0.0), axis=1)
    return {
        "event": jnp.stack([-rise, rise], axis=-1),
        "hits": jnp.stack([~signal, signal], axis=-1).astype(jnp.float32),
        "residual": jnp.zeros_like(charge),
    }


def exposure_at_suppression(
    score: np.ndarray, label: np.ndarray, *, background: float, low: float = 0.9, thresholds: int = 100_000
) -> float:
    """Share of neutrinos kept at the lowest of `thresholds` in [low, 1] that less than `background` of the background
    (label 0) passes; 0 if there is none. Source: card baikal_gvd, "Decision metric"."""
    cuts = np.linspace(low, 1.0, thresholds)
    noise, kept = (np.sort(score[label == kind]) for kind in (0, 1))
    passing = 1 - np.searchsorted(noise, cuts, side="left") / max(len(noise), 1)
    good = np.flatnonzero(passing < background)
    return float(1 - np.searchsorted(kept, cuts[good[0]], side="left") / max(len(kept), 1)) if len(good) else 0.0


def suppression_at_exposure(score: np.ndarray, label: np.ndarray, *, exposure: float = 0.99) -> float:
    """By how much the background shrinks where this share of neutrinos is kept: 1 / false positive rate."""
    kept = np.sort(score[label == 1])
    cut = kept[int(np.floor((1 - exposure) * len(kept)))]
    return float(1 / max(np.mean(score[label == 0] >= cut), 1e-12))


def report(outputs: Mapping[str, Any], batch: Batch) -> dict[str, float]:
    """Of a split with simulated and measured events: how well the model's domain classifiers tell them apart (area
    under the ROC curve, the mean over `domain` (B, D); NaN without any), how far the neutrino's probability is from
    having the same distribution in both (Kullback-Leibler divergence of measured from simulated, histograms of 20 bins
    with half an event more in each), and the accuracy on measured events."""
    measured = np.asarray(batch["domain"]) == 1
    if measured.all() or not measured.any():
        return {}
    event = np.asarray(outputs["event"], np.float64)
    chance = 1 / (1 + np.exp(np.clip(event[:, 0] - event[:, 1], -50, 50)))
    counts = [np.histogram(chance[chosen], bins=20, range=(0, 1))[0] + 0.5 for chosen in (measured, ~measured)]
    there, here = (count / count.sum() for count in counts)
    areas = [np.nan]
    if "domain" in outputs:
        score = np.asarray(outputs["domain"], np.float64)
        higher = score[measured][:, None] - score[~measured][None]
        areas = np.mean((higher > 0) + 0.5 * (higher == 0), axis=(0, 1))
    right = np.argmax(event, axis=1) == np.asarray(batch["event"])
    return {
        "domain_auroc": float(np.mean(areas)),
        "domain_kl": float(np.sum(there * np.log(there / here))),
        "measured_accuracy": float(np.mean(right[measured])),
    }


def example(*, num_hits: int, batch_size: int, key: jax.Array) -> Batch:
    """Random hits; every other event has fewer of them, and every fourth one is measured."""
    keys = jax.random.split(key, 6)
    scale = jnp.array([1.0, 300.0, 40.0, 40.0, 150.0])
    hits = scale * jax.random.normal(keys[0], (batch_size, num_hits, 5))
    hits = hits.at[..., 0].set(jnp.abs(hits[..., 0]) + 0.3)
    count = jax.random.randint(keys[1], (batch_size,), min(5, num_hits), num_hits + 1)
    present = jnp.arange(num_hits) < jnp.where(jnp.arange(batch_size) % 2 == 0, num_hits, count)[:, None]
    signal = present & jax.random.bernoulli(keys[2], 0.3, present.shape)
    return {
        "hits": jnp.where(present[..., None], hits, 0.0),
        "hit_mask": present,
        "signal": signal.astype(jnp.int32),
        "residual": jnp.where(present, 5.0 * jax.random.normal(keys[3], present.shape), 0.0),
        "event": jax.random.bernoulli(keys[4], 0.5, (batch_size,)).astype(jnp.int32),
        "domain": (jnp.arange(batch_size) % 4 == 3).astype(jnp.int32),
    }


def pad(batch: Batch):
    """Three more places for hits, with none there."""

    def more(name, values):
        if values.ndim < 2:
            return values
        tail = (values.shape[0], 3, *values.shape[2:])
        filling = 50.0 * jax.random.normal(jax.random.key(0), tail) if name == "hits" else jnp.zeros(tail)
        return jnp.concatenate([values, filling.astype(values.dtype)], axis=1)

    size = batch["hit_mask"].shape[1]

    def unpad(outputs):
        return {k: v[:, :size] if k in ("hits", "residual") else v for k, v in outputs.items()}

    return {name: more(name, values) for name, values in batch.items()}, unpad


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """The first events, height over time: dot sizes are charges, colours the probability of signal, rings the truth."""
    from matplotlib.figure import Figure

    hits, present, signal, event = (np.asarray(batch[k]) for k in ("hits", "hit_mask", "signal", "event"))
    chance = np.asarray(jax.nn.softmax(outputs["hits"].astype(jnp.float32))[..., 1])
    neutrino = np.asarray(jax.nn.softmax(outputs["event"].astype(jnp.float32))[:, 1])
    shown = min(4, len(hits))
    figure = Figure(figsize=(4.2 * shown, 4), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, shown, squeeze=False)[0]):
        charge, time, _, _, height = hits[i, present[i]].T
        size = 12 * np.sqrt(np.maximum(charge, 0.1))
        drawn = axes.scatter(time, height, size, chance[i, present[i]], vmin=0, vmax=1, cmap="coolwarm")
        true = signal[i, present[i]] == 1
        axes.scatter(time[true], height[true], 60, facecolors="none", edgecolors="black", linewidths=0.7)
        axes.set_title(f"{'neutrino' if event[i] else 'background'}, p(neutrino) = {neutrino[i]:.2f}", fontsize=9)
        axes.set_xlabel("time (ns)")
        if i == 0:
            axes.set_ylabel("height (m)")
    figure.colorbar(drawn, ax=axes, label="p(signal)")
    return figure


TASK = Task(
    name="event_reconstruction",
    loss=loss,
    metrics=metrics,
    metric="event_accuracy",
    lower_is_better=False,
    baselines={"charge_and_slope": charge_and_slope},
    pad=pad,
    picture=picture,
    picture_name="events.png",
    report=report,
)
