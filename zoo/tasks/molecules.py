"""Molecules as SMILES: which symbol comes next, which ones were hidden, and what the molecule's properties are.

Batch: `tokens` (B, L) numbers of symbols, each row begun and ended by a token for that and then filled up; `mask`
(B, L) True where there is a token; `asked` (B, L) the symbols to restore, and `corrupted` (B, L) the tokens with most
of those hidden; `scored` (B, L) the tokens that a language model is to name, which unknown ones and the beginning are
not; `descriptors` (B, C) counts of atoms, rings and so on, standardised; `targets` (B, K) with `known` (B, K), either
measurements, standardised by mean and deviation of the training part, or whole numbers 0 and 1; `unit` (B, K) that
deviation, 1 for classes; `typical` (B, K) what is predicted without looking: 0, or a class's log odds; `frequency`
(B, V) logarithm of each token's share, both of the training part.

Output: a mapping with `next` (B, L, V), at each place logits of the token after it; `predictions` (B, K) in standard
units, or log odds; and from models that do it `restored` (B, L, V), at each place logits of its own token, and
`described` (B, C).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.tasks import thresholds
from zoo.tasks.task import Batch, Task
from zoo.tasks.tokens import masked_mean, token_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CLASSES",
    "LANGUAGE",
    "MEASUREMENTS",
    "example",
    "losses",
    "pad",
    "picture",
    "typical",
]

Outputs = Mapping[str, Array]
_BORDERS = np.linspace(-12, 12, 601, dtype=np.float32)  # of the bins of log odds


def _classes(batch: Batch) -> bool:
    return jnp.issubdtype(batch["targets"].dtype, jnp.integer)


def _target_errors(outputs: Outputs, batch: Batch) -> Float[Array, "B K"]:
    """-log p of classes, squared errors of measurements."""
    # What is not known may be anything: it must not spoil a gradient.
    target = jnp.where(batch["known"], batch["targets"], 0).astype(jnp.float32)
    guess = outputs["predictions"].astype(jnp.float32)
    return jax.nn.softplus(guess) - guess * target if _classes(batch) else jnp.square(guess - target)


def losses(outputs: Outputs, batch: Batch) -> dict[str, Float[Array, ""]]:
    """The mean errors of what a model does: cross-entropy of tokens and classes, squared error of numbers."""
    errors = token_errors(outputs["next"][:, :-1], batch["tokens"][:, 1:])
    found = {"generation": masked_mean(errors, batch["scored"][:, 1:])}
    if "restored" in outputs:
        found["reconstruction"] = masked_mean(token_errors(outputs["restored"], batch["tokens"]), batch["asked"])
    if "described" in outputs:
        wide = outputs["described"].astype(jnp.float32) - batch["descriptors"].astype(jnp.float32)
        found["descriptors"] = jnp.mean(jnp.square(wide))
    if batch["targets"].shape[1]:
        found["prediction"] = masked_mean(_target_errors(outputs, batch), batch["known"])
    return found


def loss(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the mean errors, and these."""
    found = losses(outputs, batch)
    return sum(found.values(), jnp.zeros(())), found


def metrics(outputs: Outputs, batch: Batch) -> dict[str, Float[Array, "B *_"]]:
    """What `summarise` needs of each molecule: errors of its tokens and targets, and how many there are."""
    errors, scored = token_errors(outputs["next"][:, :-1], batch["tokens"][:, 1:]), batch["scored"][:, 1:]
    known = batch["known"]
    found = {
        "token_errors": jnp.sum(jnp.where(scored, errors, 0.0), axis=1),
        "tokens": jnp.sum(scored, axis=1).astype(jnp.float32),
        "known": known.astype(jnp.float32),
    }
    errors = _target_errors(outputs, batch) * jnp.square(batch["unit"].astype(jnp.float32))
    found["errors"] = jnp.where(known, errors, 0.0)
    if _classes(batch):
        place = jnp.searchsorted(jnp.asarray(_BORDERS), outputs["predictions"].astype(jnp.float32), side="right")
        row, column = jnp.indices(known.shape)
        counts = jnp.zeros((*known.shape, 2, len(_BORDERS) + 1))
        kind = (batch["targets"] > 0).astype(jnp.int32)
        found["counts"] = counts.at[row, column, kind, place].set(known.astype(jnp.float32))
    return found


def summarise(totals: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, float]:
    """`nll`, -log p a token; and of the targets, mean over them, the root mean squared error in their own units, or
    the area under the ROC curve (log odds in bins of 0.04) and -log p."""
    errors, known = (np.asarray(totals[name], np.float64) for name in ("errors", "known"))
    found = {"nll": float(totals["token_errors"]) / max(float(totals["tokens"]), 1.0)}
    if not known.any():
        return found
    means = errors[known > 0] / known[known > 0]
    if "counts" not in totals:
        return found | {"rmse": float(np.sqrt(means).mean())}
    areas = [thresholds.auroc(*kinds) for kinds in np.asarray(totals["counts"], np.float64)]
    areas = [area for area in areas if np.isfinite(area)]  # where there are examples of both kinds
    return found | {"auroc": float(np.mean(areas)) if areas else float("nan"), "cross_entropy": float(means.mean())}


def typical(batch: Batch) -> Outputs:
    """Symbols as often as they are, wherever they stand, and for every molecule the same properties."""
    frequency = batch["frequency"][:, None]
    logits = jnp.broadcast_to(frequency, (*batch["tokens"].shape, frequency.shape[-1]))
    return {"next": logits, "predictions": batch["typical"]}


def example(
    *,
    length: int,
    vocabulary: int,
    num_targets: int,
    num_descriptors: int,
    classes: bool,
    special: Mapping[str, int],
    batch_size: int,
    key: jax.Array,
) -> Batch:
    """Random symbols in rows of all lengths, between the `bos` and `eos` of `special`; every third target unknown."""
    keys = jax.random.split(key, 7)
    size, wide = (batch_size, length), (batch_size, num_targets)
    symbols = jnp.array([i for i in range(vocabulary) if i not in special.values()])
    tokens = symbols[jax.random.randint(keys[0], size, 0, len(symbols))]
    place, ends = jnp.arange(length), jax.random.randint(keys[1], (batch_size, 1), min(3, length - 1), length)
    mask = place <= ends
    tokens = jnp.where(place == 0, special["bos"], jnp.where(place == ends, special["eos"], tokens))
    tokens = jnp.where(mask, tokens, special["pad"])
    # At least the first symbol is asked for.
    asked = (jax.random.uniform(keys[2], size) < 0.3) & (place > 0) & (place < ends) | (place == 1)
    targets = jax.random.normal(keys[3], wide)
    return {
        "tokens": tokens,
        "mask": mask,
        "asked": asked,
        "corrupted": jnp.where(asked, special["mask"], tokens),
        "scored": mask & (place > 0),
        "descriptors": jax.random.normal(keys[4], (batch_size, num_descriptors)),
        "targets": (targets > 0).astype(jnp.int32) if classes else targets,
        "known": (jnp.arange(batch_size)[:, None] + jnp.arange(num_targets)) % 3 < 2,
        "unit": jnp.ones(wide),
        "typical": jnp.zeros(wide),
        "frequency": jnp.full((batch_size, vocabulary), -jnp.log(float(vocabulary))),
    }


def pad(batch: Batch) -> tuple[Batch, Any]:
    """(the batch with three more places at the end that hold nothing, how to leave them out of outputs again)."""
    length = batch["tokens"].shape[1]

    def longer(x: jax.Array) -> jax.Array:
        # What stands elsewhere in the batch, so that a leak shows.
        return jnp.concatenate([x, jnp.roll(x, 1, axis=0)[:, 1:4]], axis=1)

    padded = dict(batch) | {name: longer(batch[name]) for name in ("tokens", "corrupted")}
    for name in ("mask", "asked", "scored"):
        padded[name] = jnp.pad(batch[name], ((0, 0), (0, 3)))
    return padded, lambda outputs: {
        name: x[:, :length] if name in ("next", "restored") else x for name, x in outputs.items()
    }


def picture(batch: Batch, outputs: Outputs) -> "Figure":
    """How surprising each symbol of the first molecule is, and the first property of all, predicted against true."""
    from matplotlib.figure import Figure

    errors = jax.device_get(token_errors(outputs["next"][:, :-1], batch["tokens"][:, 1:]))[0]
    there = jax.device_get(batch["scored"])[0, 1:]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.flatnonzero(there) + 1, errors[there], color="0.5")
    left.set(xlabel="place", ylabel="-log p of the symbol", title="first molecule")
    if outputs["predictions"].shape[1]:
        known = jax.device_get(batch["known"])[:, 0]
        true, guess = (jax.device_get(x)[:, 0][known] for x in (batch["targets"], outputs["predictions"]))
        right.scatter(true, guess, s=10, color="0.3")
        right.set(xlabel="true", ylabel="predicted", title="first property")
    return figure


def _task(metric: str, lower_is_better: bool) -> Task:
    return Task(
        name="molecules",
        loss=loss,
        metrics=metrics,
        metric=metric,
        lower_is_better=lower_is_better,
        baselines={"typical": typical},
        summarise=summarise,
        pad=pad,
        picture=picture,
        picture_name="molecules.png",
    )


# By what is measured of a molecule: numbers, classes, nothing.
MEASUREMENTS, CLASSES, LANGUAGE = _task("rmse", True), _task("auroc", False), _task("nll", True)
