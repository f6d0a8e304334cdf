"""Clustering in pure-attention hardmax transformers (arXiv:2407.01602).

Official code: DCN-FAU-AvH/clustering-hardmax-transformers@214785d (CC0-1.0). Fidelity: exact.
New: attention that looks only at the tokens furthest in a token's own direction, the same step again and again, drives
tokens to the corners of a polytope, whose corners are leaders that never move, or to where a face is nearest to the
origin. A classifier of reviews built of nothing else finds leaders that are words of sentiment.
Differs: nothing by default. The official clamp of alpha has no effect; `clamp_alpha` makes it work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.demo import Check, Demo, Findings
from zoo.paper import Official, Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch
from zoo.weights.table import Table, linear, parameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAPER", "Config", "Model", "leaders", "step", "trajectory"]


# --- the dynamics -----------------------------------------------------------------------------------------------------


def step(
    tokens: Float[Array, "*B N D"],
    alpha: Float[Array, ""] | float,
    metric: Float[Array, "D D"] | None = None,
    *,
    temperature: float = 0.0,
) -> Float[Array, "*B N D"]:
    """(z_i + alpha mean_{j in C_i} z_j) / (1 + alpha), C_i where <A z_i, z_j> is largest; ties share.

    A is the identity unless a `metric` is given. A positive `temperature` T takes softmax(<A z_i, z_j> / T) in place
    of the mean over C_i, which it tends to as T falls.
    """
    scores = (tokens if metric is None else tokens @ metric) @ jnp.swapaxes(tokens, -1, -2)
    if temperature:
        weights = jax.nn.softmax(scores / temperature, axis=-1)
    else:
        winners = scores == jnp.max(scores, axis=-1, keepdims=True)
        weights = winners / jnp.sum(winners, axis=-1, keepdims=True)
    return (tokens + alpha * (weights @ tokens)) / (1 + alpha)


@partial(jax.jit, static_argnames=("depth", "temperature"))
def trajectory(
    tokens: Float[Array, "*B N D"],
    alpha: Float[Array, ""] | float,
    metric: Float[Array, "D D"] | None = None,
    *,
    depth: int,
    temperature: float = 0.0,
) -> Float[Array, "K *B N D"]:
    """The tokens at the start and after each of `depth` steps."""

    def one(z, _):
        z = step(z, alpha, metric, temperature=temperature)
        return z, z

    return jnp.concatenate([tokens[None], jax.lax.scan(one, tokens, length=depth)[1]])


def leaders(
    tokens: Float[Array, "*B N D"], metric: Float[Array, "D D"] | None = None, *, tolerance: float = 1e-12
) -> Bool[Array, "*B N"]:
    """Tokens that attend to themselves: nothing lies further in their own direction, up to `tolerance`."""
    scores = (tokens if metric is None else tokens @ metric) @ jnp.swapaxes(tokens, -1, -2)
    return jnp.diagonal(scores, axis1=-2, axis2=-1) >= jnp.max(scores, axis=-1) - tolerance


# --- the classifier ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Of the classifier; padding is a word like any other, as in the official code."""

    length: int = 128  # T, words of a review
    vocabulary: int = 50_000  # numbers of words, 0 for none
    num_classes: int = 2
    embed_dim: int = 2  # D
    depth: int = 8  # steps, all with the same alpha
    temperature: float = 1e-3  # of the softmax that stands for hardmax; 0: hardmax itself
    clamp_alpha: bool = False  # keep alpha above 0


class Model(nn.Module):
    """`logits` of a review (0 and that of the second class), and its `tokens` after the last step."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c = self.config
        table = self.param("embedding", nn.initializers.normal(1.0), (c.vocabulary, c.embed_dim))
        alpha = jnp.asarray(self.param("alpha", nn.initializers.uniform(1.0), (1,)))[0]
        alpha = jnp.maximum(alpha, 0.0) if c.clamp_alpha else alpha
        tokens = jnp.asarray(table)[batch["x"]]
        for _ in range(c.depth):
            # Weights at such temperatures are decided by the last bits: half a precision would decide otherwise.
            tokens = step(tokens.astype(jnp.float32), alpha.astype(jnp.float32), temperature=c.temperature)
        score = nn.Dense(1, name="head")(jnp.mean(tokens, axis=-2).astype(table.dtype))
        return {"logits": jnp.concatenate([jnp.zeros_like(score), score], axis=-1), "tokens": tokens}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    keys = jax.random.split(key)
    return {
        "x": jax.random.randint(keys[0], (batch_size, config.length), 0, config.vocabulary),
        "label": jax.random.randint(keys[1], (batch_size,), 0, config.num_classes),
        "prior": jnp.full((batch_size, config.num_classes), -np.log(config.num_classes), jnp.float32),
    }


# --- the official code ------------------------------------------------------------------------------------------------

_HPARAMS = {
    "vocab_size": "vocabulary",
    "emb": "embed_dim",
    "n": "length",
    "depth": "depth",
    "temperature": "temperature",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    named = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    return Config(**named | {"temperature": float(named.get("temperature", Config.temperature))})


def config_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}


def official_table(config: Config) -> Table:
    yield from parameter("encoder.weight", "embedding")
    yield from parameter("attention.alpha", "alpha")
    yield from linear("decoder", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    logits = model.apply(variables, {"x": inputs["x"]})["logits"]
    params = variables["params"]
    start = params["embedding"][inputs["x"]]
    hard = trajectory(start, params["alpha"][0], depth=model.config.depth)[-1]
    return {"output": jax.nn.sigmoid(logits[:, 1:]), "hardmax_Zf": hard}


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of the demonstration."""

    draws: int = 20  # of random tokens in the plane
    tokens: int = 16  # in each
    steps: int = 3_000  # until the limit
    alpha: float = 0.5


def nearest_on_hull(corners: Float[np.ndarray, "C 2"]) -> Float[np.ndarray, "E 2"]:
    """The points of all segments between corners that are nearest to the origin."""
    first, second = (corners[i] for i in np.triu_indices(len(corners), 1))
    way = second - first
    share = np.clip(-np.sum(first * way, axis=1) / np.maximum(np.sum(way**2, axis=1), 1e-30), 0, 1)
    return first + share[:, None] * way


SQUARE = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [-0.5, 0.0], [0.5, 0.0]])


def run(config: Sizes, key: jax.Array) -> Findings:
    """Where tokens end, what leaders do, and how softmax tends to hardmax."""
    c, keys = config, jax.random.split(key, 4)
    start = jax.random.normal(keys[0], (c.draws, c.tokens, 2))
    path = trajectory(start, c.alpha, depth=c.steps)
    ends, apart = np.asarray(path[-1]), []
    for end in ends:
        places = np.unique(np.round(end, 6), axis=0)
        scores = places @ places.T
        own = np.diagonal(scores).copy()
        np.fill_diagonal(scores, -np.inf)
        # A corner is furthest in its own direction; where a face is nearest to the origin, its corners are as far.
        corners = places[own > scores.max(axis=1, initial=-np.inf) + 1e-5]
        targets = np.concatenate([corners, nearest_on_hull(corners)]) if len(corners) > 1 else corners
        apart.append(np.linalg.norm(end[:, None] - targets, axis=-1).min(axis=1).max())
    first = np.asarray(leaders(start))
    moved = np.linalg.norm(np.asarray(path[400] - path[0]), axis=-1)[first].max()
    norms = jnp.linalg.norm(path, axis=-1)
    directions = jnp.stack([jnp.cos(a := jnp.linspace(0, 2 * jnp.pi, 64)), jnp.sin(a)])
    reach = jnp.max(path @ directions, axis=2)  # of the convex hull, in each direction
    square = trajectory(jnp.asarray(SQUARE), c.alpha, depth=c.steps)[-1]

    generic = jax.random.normal(keys[1], (c.draws, 32, 4))
    hard = trajectory(generic, c.alpha, depth=8)[-1]
    temperatures, soft = (1.0, 0.1, 0.01, 0.001, 0.0001), []
    for temperature in temperatures:
        ends_soft = trajectory(generic, c.alpha, depth=8, temperature=temperature)[-1]
        # The median over draws: in some, two tokens lie nearly as far as one another.
        soft.append(float(jnp.median(jnp.max(jnp.abs(ends_soft - hard), axis=(1, 2)))))
    turn = jnp.linalg.qr(jax.random.normal(keys[2], (4, 4)))[0]
    turned = trajectory(3 * generic @ turn.T, c.alpha, depth=8)[-1] - 3 * hard @ turn.T
    mean_leaders = [
        float(jnp.mean(jnp.sum(leaders(jax.random.normal(keys[3], (50, n, d))), axis=1)))
        for n, d in ((64, 2), (128, 16))
    ]
    checks = (
        Check("limits lie at leaders or where a face is nearest to the origin: distance", apart, high=1e-3),
        Check("leaders of the start have not moved after 400 steps", moved, high=1e-12),
        Check("norms never fall: largest fall", float(-jnp.min(jnp.diff(norms, axis=0))), high=1e-12),
        Check("tokens stay in the hull of the start: excess", float(jnp.max(reach - reach[0])), high=1e-12),
        Check(
            "a square with two points inside: these end in the middles of sides",
            float(jnp.max(jnp.abs(square[4:] - jnp.array([[-1.0, 0.0], [1.0, 0.0]])))), high=1e-6,
        ),
        Check(
            "softmax tends to hardmax: difference after eight steps",
            soft, 0.0, [10.0, 10.0, 10.0, 1e-2, 1e-6], over=("temperature", temperatures),
        ),
        Check("turned and scaled tokens move alike", float(jnp.max(jnp.abs(turned))), high=1e-9),
        Check("leaders of 64 tokens in the plane are few", mean_leaders[0], 3.0, 8.0),
        Check("of 128 in sixteen dimensions nearly all lead", mean_leaders[1], 110.0, 128.0),
    )  # fmt: skip
    return Findings(checks, partial(_picture, np.asarray(path[:60, 0]), first[0], ends[0]))


def _picture(path: np.ndarray, first: np.ndarray, end: np.ndarray) -> "Figure":
    """The ways of the tokens of the first draw; leaders are filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(path[..., 0], path[..., 1], color="0.6", linewidth=0.8)
    axes.plot(*path[0][~first].T, "o", markerfacecolor="white", color="0.3", label="start")
    axes.plot(*path[0][first].T, "o", color="tab:red", label="leaders")
    axes.plot(*end.T, "x", color="black", label="end")
    axes.set_aspect("equal")
    axes.legend(frameon=False)
    return figure


PAPER = Paper(
    slug="hardmax_clustering",
    task=classification.TASK,
    model=Model,
    example=example,
    demo=Demo(run, configs={"tiny": Sizes(), "paper": Sizes(draws=200, tokens=64)}),
    configs={
        "tiny": Config(length=16, vocabulary=202),
        "imdb": Config(),
        **{f"imdb_{d}": Config(embed_dim=d) for d in (4, 8, 16)},
    },
    officials=(
        Official(
            module="utils/models.py:TClassifier (output/output) and utils/models.py:hardmaxDynamics(alpha, depth, "
            "encoder.weight[x]) (output/hardmax_Zf)",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    reported={f"imdb, D = {d}": {"accuracy": a} for d, a in ((2, 0.791), (4, 0.823), (8, 0.851), (16, 0.882))},
    quirks=("the official clamp of alpha has no effect", "padding takes part in attention and in the mean"),
)
