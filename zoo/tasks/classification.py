"""Classification: which of K classes is it, or, where several may hold at once, which of them.

Batch: `x` in the modality's own shape: signals (B, L, C), images (B, H, W, C), tokens (B, L); `label` (B,) the number
of the class, or (B, K) with 1 for each class that holds and 0 for the others; `prior` (B, K), the same in every row:
the logarithm of each class's share of the training examples (its log odds where several may hold); and, for sequences
of different lengths, `mask` (B, L), True where there is something, with what fills them up at the end. Output: logits
(B, K), or a mapping with such `logits` among others.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK",
    "class_prior",
    "confusion_matrix",
    "example",
    "logits_of",
    "loss",
    "metrics",
    "pad",
    "picture",
    "prior",
    "report",
]


def logits_of(outputs: Any) -> Float[Array, "B K"]:
    """The logits in a model's outputs, float32."""
    return (outputs["logits"] if isinstance(outputs, Mapping) else outputs).astype(jnp.float32)


def _errors(outputs: Any, batch: Batch) -> Float[Array, " B"]:
    """-log p of each example's label; with several labels the mean over classes of each yes's or no's."""
    logits, label = logits_of(outputs), batch["label"]
    if label.ndim == 2:
        return jnp.mean(jax.nn.softplus(logits) - logits * label.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(logits, label[:, None].astype(jnp.int32), axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def loss(outputs: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy: of a softmax over classes, or of a sigmoid for each where several may hold."""
    return jnp.mean(_errors(outputs, batch)), {}


def metrics(outputs: Any, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each example: whether its class has the highest logit (shared among ties), and -log p of its label.

    With several labels: the share of classes on the right side of zero, and the mean of their -log p.
    """
    logits, label = logits_of(outputs), batch["label"]
    if label.ndim == 2:
        right = jnp.mean(jnp.where(label > 0, logits > 0, logits <= 0), axis=-1, dtype=jnp.float32)
    else:
        # Whatever is not a number is not equal to the highest, and wins nothing.
        best = logits == jnp.max(logits, axis=-1, keepdims=True)
        hit = jnp.take_along_axis(best, label[:, None].astype(jnp.int32), axis=-1)[:, 0]
        right = hit / jnp.maximum(jnp.sum(best, axis=-1), 1)
    return {"accuracy": right.astype(jnp.float32), "nll": _errors(outputs, batch)}


def prior(batch: Batch) -> Float[Array, "B K"]:
    """The classes as often as they are among the training examples, whatever is seen: the most frequent one wins."""
    return batch["prior"]


def class_prior(label: Shaped[np.ndarray, "N *K"], num_classes: int) -> Float[np.ndarray, " K"]:
    """`prior` of a training split: log of each class's share (log odds if several may hold), half an example added to
    each so that what is absent stays possible."""
    if label.ndim == 2:
        count = label.sum(axis=0, dtype=np.float64)
        return (np.log(count + 0.5) - np.log(len(label) - count + 0.5)).astype(np.float32)
    count = np.bincount(label, minlength=num_classes) + 0.5
    return np.log(count / count.sum()).astype(np.float32)


# --- what cannot be averaged over examples --------------------------------------------------------------------------


def confusion_matrix(label: Shaped[np.ndarray, " N"], guess: Shaped[np.ndarray, " N"], classes: int) -> np.ndarray:
    """(K, K) counts: rows are the true classes, columns the guessed ones."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (label, guess), 1)
    return counts


def _ranking(score: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """(area under the ROC curve, average precision) of one class's scores, tied scores taken at once."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits, number = np.cumsum(positive[order])[ends], ends + 1
    misses = number - hits
    area = np.trapezoid(np.append(0, hits), np.append(0, misses)) / (hits[-1] * misses[-1])
    return float(area), float(np.sum(np.diff(hits, prepend=0) * hits / number) / hits[-1])


def report(outputs: Any, batch: Batch) -> dict[str, float]:
    """Of a whole split: precision, recall and F1 of each class, AUROC and AUPRC of each class against the rest, all
    averaged over classes ("macro").

    As in scikit-learn, what has no guesses or no examples counts 0, and classes that are neither true nor guessed are
    left out of the first three; the last two are over classes that have examples and do not have all. Several labels:
    a class is guessed where its logit is positive.
    """
    logits, label = np.asarray(logits_of(outputs), np.float64), np.asarray(batch["label"])
    classes = logits.shape[1]
    true = label > 0 if label.ndim == 2 else np.arange(classes) == label[:, None]
    guess = logits > 0 if label.ndim == 2 else np.arange(classes) == logits.argmax(axis=1)[:, None]
    hits, guessed, there = (both.sum(axis=0) for both in (true & guess, guess, true))
    known = (guessed + there) > 0
    shares = {
        "macro_precision": hits / np.maximum(guessed, 1),
        "macro_recall": hits / np.maximum(there, 1),
        "macro_f1": 2 * hits / np.maximum(guessed + there, 1),
    }
    found = {name: float(np.mean(share[known])) for name, share in shares.items()}
    # A softmax ranks examples by the share of a class, not by its logit alone.
    top = logits - logits.max(axis=1, keepdims=True)
    score = logits if label.ndim == 2 else np.exp(top) / np.exp(top).sum(axis=1, keepdims=True)
    ranked = [_ranking(score[:, k], true[:, k]) for k in range(classes) if 0 < there[k] < len(label)]
    areas = np.mean(ranked, axis=0) if ranked else (np.nan, np.nan)
    return found | {"auroc": float(areas[0]), "auprc": float(areas[1])}


# --- examples -------------------------------------------------------------------------------------------------------


def example(
    *,
    shape: tuple[int, ...],
    num_classes: int,
    batch_size: int,
    key: jax.Array,
    vocabulary: int | None = None,
    several: bool = False,
    masked: bool = False,
) -> Batch:
    """A random batch: `x` is unit noise of this shape (without the batch's axis), or tokens below `vocabulary`; with
    `several` any number of classes holds at once; `masked` sequences have all lengths from one to full."""
    keys = jax.random.split(key, 4)
    size = (batch_size, *shape)
    noise = jax.random.normal(keys[0], size)
    batch = {"x": noise if vocabulary is None else jax.random.randint(keys[0], size, 0, vocabulary)}
    if several:
        batch["label"] = jax.random.randint(keys[1], (batch_size, num_classes), 0, 2)
    else:
        batch["label"] = jax.random.randint(keys[1], (batch_size,), 0, num_classes)
    share = jax.nn.log_softmax(jax.random.normal(keys[2], (num_classes,)))
    batch["prior"] = jnp.broadcast_to(share, (batch_size, num_classes))
    if masked:
        lengths = jax.random.randint(keys[3], (batch_size, 1), 1, shape[0] + 1)
        batch["mask"] = jnp.arange(shape[0]) < lengths
    return batch


def pad(batch: Batch) -> tuple[Batch, Any]:
    """(the batch with three more places at the end that hold nothing, how to leave them out of outputs again); without
    a mask there is nothing to pad."""
    if "mask" not in batch:
        return batch, lambda outputs: outputs
    length = batch["mask"].shape[1]

    def longer(x: jax.Array) -> jax.Array:
        # Other values than zero, so that a leak shows: what stands elsewhere in the batch.
        return jnp.concatenate([x, jnp.roll(x, 1, axis=0)[:, :3][:, jnp.arange(3) % length]], axis=1)

    def unpad(outputs: Any) -> Any:
        if not isinstance(outputs, Mapping):
            return outputs
        cut = {k: v[:, :length] if v.ndim > 1 and v.shape[1] == length + 3 else v for k, v in outputs.items()}
        return cut | {"logits": outputs["logits"]}

    nothing = jnp.zeros((batch["mask"].shape[0], 3), bool)
    return {**batch, "x": longer(batch["x"]), "mask": jnp.concatenate([batch["mask"], nothing], axis=1)}, unpad


def picture(batch: Batch, outputs: Any) -> "Figure":
    """The first example, where it can be drawn, and beside it the probability of each class, what is true in red."""
    from matplotlib.figure import Figure

    x, label, logits = (jax.device_get(a)[0] for a in (batch["x"], batch["label"], logits_of(outputs)))
    several = np.ndim(label) == 1
    shares = np.asarray(jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits))
    true = np.flatnonzero(label) if several else np.array([label])
    shown = np.sort(np.argsort(-shares)[:20])
    image = x.ndim == 3 and x.shape[-1] in (1, 3)
    signal = x.ndim == 2 and np.issubdtype(x.dtype, np.floating)
    figure = Figure(figsize=(9 if image or signal else 5, 3.2), layout="constrained")
    panels = figure.subplots(1, 2 if image or signal else 1, squeeze=False)[0]
    if image:
        low, high = float(x.min()), float(x.max())
        panels[0].imshow(((x - low) / max(high - low, 1e-12)).squeeze(), cmap="gray")
        panels[0].set_axis_off()
    if signal:
        there = jax.device_get(batch["mask"])[0] if "mask" in batch else np.ones(len(x), bool)
        spread = max(float(np.std(x[there])), 1e-12)
        for channel in range(min(x.shape[1], 12)):  # one above the other
            panels[0].plot(x[there, channel] / spread - 4 * channel, linewidth=0.8)
        panels[0].set_yticks([])
        panels[0].set_xlabel("sample")
    axes = panels[-1]
    axes.bar(range(len(shown)), shares[shown], color=["tab:red" if k in true else "0.6" for k in shown])
    axes.set_xticks(range(len(shown)), [str(k) for k in shown])
    axes.set(xlabel="class; red: the true one", ylabel="probability", ylim=(0, 1))
    return figure


TASK = Task(
    name="classification",
    loss=loss,
    metrics=metrics,
    metric="accuracy",
    lower_is_better=False,
    baselines={"prior": prior},
    report=report,
    pad=pad,
    picture=picture,
    picture_name="classes.png",
)
