"""Language modelling: which token comes next.

Batch: `tokens` (B, L); `segments` (B, L) the number of the text within the row, from 1, 0 where there is none, so that
texts of one row do not see each other; `positions` (B, L) from 0 in each text; `scored` (B, L) True at tokens that are
to be named from those before them; `frequency` (B, V) logarithm of each scored token's share of the training part.

Output: `Output`; `logits` at each place are those of the token after it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.tasks.task import Batch, Task
from zoo.tasks.tokens import masked_mean, token_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TASK", "Output", "example", "pad", "picture", "unigram"]


class Output(NamedTuple):
    logits: Float[Array, "B L V"]
    cache: Any = None  # with a cache to decode from: the same with these tokens in it


def loss(outputs: Output, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean -log p of the scored tokens."""
    errors = token_errors(outputs.logits[:, :-1], batch["tokens"][:, 1:])
    return masked_mean(errors, batch["scored"][:, 1:]), {}


def metrics(outputs: Output, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """What `summarise` needs of each row."""
    logits, tokens, scored = outputs.logits[:, :-1], batch["tokens"][:, 1:], batch["scored"][:, 1:]
    counts = {
        "errors": token_errors(logits, tokens),
        "hits": (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32),
        "tokens": jnp.ones(tokens.shape),
    }
    return {name: jnp.sum(jnp.where(scored, x, 0.0), axis=1) for name, x in counts.items()}


def summarise(totals: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, float]:
    """Of a token: `nll` in nats and `bits`; `perplexity`, exp(nll); `accuracy`, the share named first."""
    tokens = max(float(totals["tokens"]), 1.0)
    nll = float(totals["errors"]) / tokens
    return {
        "nll": nll,
        "bits": nll / float(np.log(2.0)),
        "perplexity": float(np.exp(min(nll, 700.0))),
        "accuracy": float(totals["hits"]) / tokens,
    }


def unigram(batch: Batch) -> Output:
    """Tokens as often as they are, whatever stands before them."""
    frequency = batch["frequency"][:, None]
    return Output(jnp.broadcast_to(frequency, (*batch["tokens"].shape, frequency.shape[-1])))


def example(*, length: int, vocabulary: int, batch_size: int, key: jax.Array) -> Batch:
    """Random tokens, in each row two texts of different lengths and padding after them."""
    keys = jax.random.split(key, 3)
    border = jax.random.randint(keys[0], (batch_size, 1), 2, max(length // 2, 3))
    end = jax.random.randint(keys[1], (batch_size, 1), length // 2 + 1, length + 1)
    place = jnp.arange(length)
    segments = jnp.where(place < end, 1 + (place >= border), 0)
    return {
        "tokens": jax.random.randint(keys[2], (batch_size, length), 0, vocabulary),
        "segments": segments,
        "positions": jnp.where(segments == 2, place - border, jnp.where(segments == 1, place, 0)),
        "scored": (segments > 0) & (place > 0) & (place != border),
        "frequency": jnp.full((batch_size, vocabulary), -jnp.log(float(vocabulary))),
    }


def pad(batch: Batch) -> tuple[Batch, Callable[[Output], Output]]:
    """(the batch with three places of no text before it and as many after, how to leave them out of outputs again)."""
    length = batch["tokens"].shape[1]
    padded = dict(batch)
    for name in ("tokens", "segments", "positions", "scored"):
        padded[name] = jnp.pad(batch[name], ((0, 0), (3, 3)))
    # Tokens of other rows, so that a leak shows.
    other = jnp.roll(batch["tokens"], 1, axis=0)
    padded["tokens"] = jnp.concatenate([other[:, :3], batch["tokens"], other[:, 3:6]], axis=1)
    return padded, lambda outputs: outputs._replace(logits=outputs.logits[:, 3 : 3 + length])


def picture(batch: Batch, outputs: Output) -> "Figure":
    """-log p of each scored token of the first rows, and its mean over all rows by place: what context is worth."""
    from matplotlib.figure import Figure

    errors = np.asarray(jax.device_get(token_errors(outputs.logits[:, :-1], batch["tokens"][:, 1:])))
    errors = np.where(jax.device_get(batch["scored"])[:, 1:], errors, np.nan)
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    image = above.imshow(errors[:16], aspect="auto", cmap="magma", interpolation="nearest", vmin=0)
    above.set(ylabel="text", title="-log p of each token")
    figure.colorbar(image, ax=above, label="nats")
    counted = np.isfinite(errors).any(axis=0)
    below.plot(np.flatnonzero(counted), np.nanmean(errors[:, counted], axis=0), color="0.2")
    below.set(xlabel="place", ylabel="mean -log p (nats)", ylim=(0, None))
    return figure


TASK = Task(
    name="language_modelling",
    loss=loss,
    metrics=metrics,
    metric="nll",
    baselines={"unigram": unigram},
    summarise=summarise,
    pad=pad,
    picture=picture,
    picture_name="tokens.png",
)
