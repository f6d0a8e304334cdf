"""Which class does each patient of a cohort have, where whole kinds of measurements are missing?

An example is a cohort, since patients are judged together. Batch: `x` (B, N, F) features of N patients, M blocks side
by side; `block_mask` (B, N, M) is False where a patient lacks a block, and lacking all is padding; `graph` (B, N, N)
weights of edges between similar patients, 0 for none; `label` (B, N); `scored_mask` (B, N) is True for the patients
whose labels are taught or tested, and only they are linked by the graph. Output: logits (B, N, C), or a mapping with
such `logits` among others.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "example", "logits_of", "loss", "majority", "metrics", "pad", "picture"]


def logits_of(outputs: Any) -> Float[Array, "B N C"]:
    """The logits in a model's outputs."""
    return (outputs["logits"] if isinstance(outputs, Mapping) else outputs).astype(jnp.float32)


def _mean(values: Float[Array, "B N"], chosen: Bool[Array, "B N"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.where(chosen, values, 0.0), axis=1) / jnp.maximum(jnp.sum(chosen, axis=1), 1)


def loss(outputs: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy, a mean over the scored patients of each cohort."""
    logs = jax.nn.log_softmax(logits_of(outputs), axis=-1)
    right = jnp.take_along_axis(logs, batch["label"][..., None], axis=-1)[..., 0]
    return jnp.mean(_mean(-right, batch["scored_mask"])), {}


def metrics(outputs: Any, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Of each cohort's scored patients: accuracy, mean F1 of the classes, Matthews correlation, ranking by area.

    AUROC and average precision are of class 1 where there are two, else the mean over each class against the others.
    A class that no scored patient has counts in none of the means.
    """
    logits, label, scored = logits_of(outputs), batch["label"], batch["scored_mask"]
    classes = logits.shape[-1]
    truth = jax.nn.one_hot(label, classes) * scored[..., None]
    guess = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes) * scored[..., None]
    hits, have, said = jnp.sum(truth * guess, 1), jnp.sum(truth, 1), jnp.sum(guess, 1)  # (B, C)
    present, total = have > 0, jnp.sum(have, -1)
    correct = jnp.sum(hits, -1)
    covariance = correct * total - jnp.sum(have * said, -1)
    spread = (total**2 - jnp.sum(said**2, -1)) * (total**2 - jnp.sum(have**2, -1))
    probability = jax.nn.softmax(logits, axis=-1)
    # above[i, j]: patient j is scored and ranks not below patient i, for each class.
    above = scored[:, None, :, None] & (probability[:, None] >= probability[:, :, None])
    tied = scored[:, None, :, None] & (probability[:, None] == probability[:, :, None])
    positives, negatives = truth, scored[..., None] - truth
    better = jnp.einsum("bijc,bic,bjc->bc", above - 0.5 * tied, negatives, positives)
    auroc = better / jnp.maximum(have * (total[:, None] - have), 1)
    precision = jnp.einsum("bijc,bjc->bic", above, positives) / jnp.maximum(jnp.sum(above, axis=2), 1)
    auprc = jnp.sum(precision * positives, axis=1) / jnp.maximum(have, 1)
    chosen = present if classes > 2 else present & (jnp.arange(classes) == 1)
    return {
        "accuracy": correct / jnp.maximum(total, 1),
        "macro_f1": _mean(2 * hits / jnp.maximum(have + said, 1), present),
        "mcc": covariance / jnp.sqrt(jnp.where(spread > 0, spread, 1.0)),
        "auroc": _mean(auroc, chosen),
        "auprc": _mean(auprc, chosen),
    }


def majority(batch: Batch) -> Float[Array, "B N C"]:
    """Everybody has the class that is most frequent among the patients who are not scored."""
    known = ~batch["scored_mask"] & jnp.any(batch["block_mask"], axis=-1)
    same = batch["label"][:, :, None] == batch["label"][:, None, :]
    votes = jnp.sum(same & known[:, None, :], axis=-1)
    winner = jnp.take_along_axis(batch["label"], jnp.argmax(votes, axis=1)[:, None], axis=1)
    return jnp.broadcast_to(jax.nn.one_hot(winner, _MOST_CLASSES), (*batch["label"].shape, _MOST_CLASSES))


_MOST_CLASSES = 32  # of a set; those that no label names change nothing


def example(
    *, block_widths: tuple[int, ...], num_classes: int, batch_size: int, key: jax.Array, num_patients: int = 12
) -> Batch:
    """Random cohorts: uniform features, a third of the blocks missing, a third of the pairs linked."""
    keys = jax.random.split(key, 5)
    patients, blocks = (batch_size, num_patients), len(block_widths)
    measured = jax.random.uniform(keys[1], (*patients, blocks)) < 0.67
    one = jax.random.randint(keys[2], patients, 0, blocks)
    measured |= jnp.arange(blocks) == one[..., None]
    scored = jnp.arange(num_patients) % 4 != 0
    weights = jax.random.uniform(keys[3], (*patients, num_patients))
    weights = jnp.where(jnp.triu(jnp.ones((num_patients, num_patients), bool), 1) & (weights > 0.67), weights, 0.0)
    weights = (weights + jnp.swapaxes(weights, 1, 2)) * (scored[:, None] & scored)
    present = jnp.repeat(measured, jnp.array(block_widths), axis=-1, total_repeat_length=sum(block_widths))
    return {
        "x": jax.random.uniform(keys[0], (*patients, sum(block_widths))) * present,
        "block_mask": measured,
        "graph": weights,
        "label": jax.random.randint(keys[4], patients, 0, num_classes),
        "scored_mask": jnp.broadcast_to(scored, patients),
    }


def pad(batch: Batch) -> tuple[Batch, Any]:
    """(the batch with two more places, which nobody has, in every cohort; how to take them out of outputs)."""
    many = batch["label"].shape[1]
    padded = {name: jnp.pad(a, ((0, 0), (0, 2)) + ((0, 0),) * (a.ndim - 2)) for name, a in batch.items()}
    padded["graph"] = jnp.pad(batch["graph"], ((0, 0), (0, 2), (0, 2)))
    padded["x"] = padded["x"].at[:, many:].set(7.0)

    def unpad(outputs: Any) -> Any:
        return jax.tree.map(lambda x: x[:, :many] if x.ndim > 1 and x.shape[1] == many + 2 else x, outputs)

    return padded, unpad


def picture(batch: Batch, outputs: Any) -> "Figure":
    """Left: how often each class is taken for which, among the scored. Right: the sureness of right and wrong ones."""
    from matplotlib.figure import Figure

    logits, label, scored = (jax.device_get(a)[0] for a in (logits_of(outputs), batch["label"], batch["scored_mask"]))
    logits, label = logits[scored], label[scored]
    classes, guess = logits.shape[-1], logits.argmax(-1)
    table = jax.device_get(jnp.zeros((classes, classes), int).at[label, guess].add(1))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(table, cmap="Blues")
    for i, row in enumerate(table):
        for j, count in enumerate(row):
            left.text(j, i, str(count), ha="center", va="center", color="white" if count > table.max() / 2 else "black")
    left.set_xticks(range(classes))
    left.set_yticks(range(classes))
    left.set_xlabel("predicted class")
    left.set_ylabel("true class")
    sure = jax.device_get(jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1))
    bins = [i / 20 for i in range(21)]
    right.hist([sure[guess == label], sure[guess != label]], bins, stacked=True, color=["0.6", "tab:red"])
    right.legend(["right", "wrong"], frameon=False)
    right.set_xlabel("probability of the predicted class")
    right.set_ylabel("patients")
    return figure


TASK = Task(
    name="patient_classification",
    loss=loss,
    metrics=metrics,
    metric="macro_f1",
    lower_is_better=False,
    baselines={"majority": majority},
    pad=pad,
    picture=picture,
    picture_name="confusion.png",
)
