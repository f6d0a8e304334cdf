"""Self-attention as a covariance readout (arXiv:2605.10466): what softmax attention over a long context computes.

No official code. Fidelity: reading. New: for a stationary, elliptical context with covariance S, a head's output tends
to Theta_V S Theta_K' Theta_Q x, a linear map of the query, at the rate of t^-1/2. So one head is one gradient step of
in-context linear regression, and a deep stack forgets its context: decoding becomes a Markov chain and repeats itself.
Ours: the exact limit Theta_V grad log M(a), a = Theta_K' Theta_Q x, M the moment generating function of a token; for an
elliptical law that is c S a with a scalar c (1 for a Gaussian), which `elliptical_factor` computes.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from zoo.demo import Check, Demo, Findings, exponent
from zoo.paper import Paper

__all__ = [
    "PAPER",
    "Config",
    "Head",
    "attention_limit",
    "deep_limit",
    "elliptical_factor",
    "in_context_stack",
    "limit_map",
    "read",
    "stack_states",
]


class Head(NamedTuple):
    """The three matrices of a head: (d_k, d), (d_k, d), (d_v, d). Scores have no 1 / sqrt(d_k)."""

    query: Float[Array, "*L K D"]
    key: Float[Array, "*L K D"]
    value: Float[Array, "*L V D"]


# --- the finite head and its limit ------------------------------------------------------------------------------------


def read(
    tilt: Float[Array, "Q D"], context: Float[Array, "T D"], values: Float[Array, "T V"], chunk: int = 16_384
) -> Float[Array, "Q V"]:
    """sum_i softmax_i(<x_i, a>) v_i for every tilt a, in pieces of the context: memory does not grow with it."""
    length = context.shape[0]
    pieces = -(-length // chunk)
    padded = [jnp.pad(x, ((0, pieces * chunk - length), (0, 0))) for x in (context, values)]
    there = (jnp.arange(pieces * chunk) < length).reshape(pieces, chunk)

    def piece(carry, rows):
        top, total, sums = carry
        x, v, present = rows
        scores = jnp.where(present, tilt @ x.T, -jnp.inf)
        higher = jnp.maximum(top, scores.max(axis=-1))
        weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        return (higher, total * shrink + weights.sum(axis=-1), sums * shrink[:, None] + weights @ v), None

    start = (jnp.full(len(tilt), -jnp.inf), jnp.zeros(len(tilt)), jnp.zeros((len(tilt), values.shape[1])))
    split = [x.reshape(pieces, chunk, -1) for x in padded]
    (_, total, sums), _ = jax.lax.scan(piece, start, (*split, there))
    return sums / total[:, None]


def attention_limit(head: Head, covariance: Float[Array, "D D"], query: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Theta_V S Theta_K' Theta_Q x: what the head's output tends to as its Gaussian context grows."""
    return query @ (head.value @ covariance @ head.key.T @ head.query).T


def elliptical_factor(dimension: int, s: float) -> float:
    """c in grad log M(a) = c S a for x = sqrt(d) S^1/2 u, u uniform on the sphere, s = a' S a: by Bessel functions."""
    kappa = np.sqrt(dimension * s)
    ratio = scipy.special.ive(dimension / 2, kappa) / scipy.special.ive(dimension / 2 - 1, kappa)
    return float(dimension / kappa * ratio)


# --- in-context regression --------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_layers",))
def in_context_stack(
    x: Float[Array, "T D"],
    y: Float[Array, " T"],
    queries: Float[Array, "Q D"],
    rate: Float[Array, ""] | float,
    *,
    num_layers: int,
) -> Float[Array, "L Q"]:
    """Predictions for queries after each layer of a stack with residuals: r <- r - o in the context, y_q <- y_q + o_q.

    o reads the residuals with the scores rate <x_i, x_j>; in the limit a layer is one gradient step on the population's
    squared error, so that after l of them y_q = w' (I - (I - rate S)^l) q.
    """
    rows = jnp.concatenate([x, queries])

    def layer(carry, _):
        residual, answers = carry
        out = read(rate * rows, x, residual[:, None], chunk=min(1024, len(x)))[:, 0]
        answers = answers + out[len(x) :]
        return (residual - out[: len(x)], answers), answers

    return jax.lax.scan(layer, (y, jnp.zeros(len(queries))), length=num_layers)[1]


# --- deep stacks ------------------------------------------------------------------------------------------------------


@jax.jit
def stack_states(heads: Head, x: Float[Array, "T D"]) -> Float[Array, "L T D"]:
    """The inputs of every layer of a causal residual stack h <- h + head(h), and its output: L + 1 rows."""

    def layer(h, head):
        def row(i):
            scores = jnp.where(jnp.arange(len(h)) <= i, h @ (head.key.T @ (head.query @ h[i])), -jnp.inf)
            return h[i] + head.value @ (jax.nn.softmax(scores) @ h)

        return jax.lax.map(row, jnp.arange(len(h)), batch_size=64), h

    last, inputs = jax.lax.scan(layer, x, heads)
    return jnp.concatenate([inputs, last[None]])


@jax.jit
def _next_state(heads: Head, states: Float[Array, "L T D"], length: Int[Array, ""], x: Float[Array, " D"]):
    """(inputs of every layer and output for one more token after the first `length` of `states`)."""

    def layer(h, rows):
        head, context = rows
        scores = jnp.where(jnp.arange(len(context)) < length, context @ (head.key.T @ (head.query @ h)), -jnp.inf)
        own = h @ (head.key.T @ (head.query @ h))
        weights = jax.nn.softmax(jnp.append(scores, own))
        return h + head.value @ (weights[:-1] @ context + weights[-1] * h), h

    last, inputs = jax.lax.scan(layer, x, (heads, states[:-1]))
    return jnp.concatenate([inputs, last[None]])


def deep_limit(heads: Head, covariance: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """prod_l (I + B_l): the linear map of the current token that a stack tends to, B_l = V_l S_l K_l' Q_l."""
    total = jnp.eye(covariance.shape[0])
    for number in range(heads.query.shape[0]):
        head = Head(*(m[number] for m in heads))
        step = jnp.eye(covariance.shape[0]) + head.value @ covariance @ head.key.T @ head.query
        covariance, total = step @ covariance @ step.T, step @ total
    return total


def limit_map(total: Float[Array, "D D"], embeddings: Float[Array, "M D"]) -> Int[Array, " M"]:
    """The next token of every token under greedy decoding with tied weights: argmax_v <e_v, total e>."""
    return jnp.argmax(embeddings @ total.T @ embeddings.T, axis=-1)


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes; contexts are in tokens."""

    dimension: int = 4
    num_layers: int = 3
    contexts: tuple[int, ...] = (300, 3_000, 30_000)  # of the readout's rate
    seeds: int = 100  # contexts drawn at each length
    long_context: int = 200_000  # for what is compared at one length
    regression_context: int = 4_000
    deep_contexts: tuple[int, ...] = (60, 240, 960)
    deep_seeds: int = 32
    vocabulary: int = 32
    weight_scale: float = 0.25  # standard deviation of a deep stack's weights
    tilt: float = 0.7  # |S^1/2 a| of the readout's query


def _covariance(key: jax.Array, dimension: int) -> Float[Array, "D D"]:
    root = jax.random.normal(key, (dimension, 2 * dimension)) / np.sqrt(2 * dimension)
    return root @ root.T + 0.2 * jnp.eye(dimension)


def _tilt(key: jax.Array, covariance: Float[Array, "D D"], size: float) -> Float[Array, " D"]:
    """A random a with a' S a = size^2."""
    a = jax.random.normal(key, covariance.shape[:1])
    return a * size / jnp.sqrt(a @ covariance @ a)


def _readout(c: Config, key: jax.Array) -> list[Check]:
    keys = jax.random.split(key, 6)
    covariance = _covariance(keys[0], c.dimension)
    root = jnp.linalg.cholesky(covariance)
    a = _tilt(keys[1], covariance, c.tilt)
    target = covariance @ a

    def error(length: int):
        def draw(key):
            x = jax.random.normal(key, (length, c.dimension)) @ root.T
            return read(a[None], x, x)[0] - target

        return jax.jit(lambda key: jax.lax.map(draw, jax.random.split(key, c.seeds)))

    squares = [float(jnp.mean(jnp.sum(jnp.square(error(t)(keys[2])), axis=-1))) for t in c.contexts]
    scaled = [t * square for t, square in zip(c.contexts, squares, strict=True)]
    predicted = float(jnp.exp(c.tilt**2) * (jnp.trace(covariance) + target @ target))
    slope = exponent(c.contexts, np.sqrt(squares))

    size = 1.4
    steep = _tilt(keys[3], covariance, size)
    u = jax.random.normal(keys[4], (c.long_context, c.dimension))
    shell = np.sqrt(c.dimension) * u / jnp.linalg.norm(u, axis=-1, keepdims=True) @ root.T
    out, along = read(steep[None], shell, shell)[0], covariance @ steep
    factor = elliptical_factor(c.dimension, size**2)

    skew = jax.random.exponential(keys[5], (c.long_context, c.dimension)) - 1
    b = jnp.linspace(0.05, 0.4, c.dimension)
    tilted = read(b[None], skew, skew)[0]

    def angle(p, q):
        return float(jnp.rad2deg(jnp.arccos(p @ q / jnp.linalg.norm(p) / jnp.linalg.norm(q))))

    return [
        Check("Gaussian context: the error falls as t^-1/2", slope, -0.6, -0.4, -0.5),
        Check(
            "Gaussian context: t E|error|^2 tends to e^s (tr S + |S a|^2)",
            scaled, 0.7 * predicted, 1.3 * predicted, predicted, ("context t", c.contexts),
        ),
        Check(
            "tokens on an ellipsoid: the output is c S a, c a ratio of Bessel functions",
            float(out @ along / (along @ along)), 0.98 * factor, 1.02 * factor, factor,
        ),
        Check("tokens on an ellipsoid: degrees between output and S a", angle(out, along), high=1.5, predicted=0.0),
        Check("exponential tokens: degrees between output and S a", angle(tilted, b), low=5.0),
        Check(
            "exponential tokens: the output is grad log M(a), a / (1 - a)",
            tilted / (b / (1 - b)), 0.95, 1.05, 1.0,
        ),
    ]  # fmt: skip


def _regression(c: Config, key: jax.Array) -> list[Check]:
    keys = jax.random.split(key, 6)
    covariance = _covariance(keys[0], c.dimension)
    root = jnp.linalg.cholesky(covariance)
    weights, query = jax.random.normal(keys[1], (2, c.dimension))
    query = query / jnp.linalg.norm(query)

    def examples(key, length):
        x = jax.random.normal(key, (length, c.dimension)) @ root.T
        return x, x @ weights + 0.1 * jax.random.normal(keys[4], (length,))

    rate = 0.5
    x, y = examples(keys[2], c.long_context)
    one = float(read(rate * query[None], x, y[:, None])[0, 0])
    step = float(rate * weights @ covariance @ query)

    x, y = examples(keys[3], c.regression_context)
    eye, eigenvalues = jnp.eye(c.dimension), jnp.linalg.eigvalsh(covariance)

    def population(rate, count, query=query):
        return weights @ (eye - jnp.linalg.matrix_power(eye - rate * covariance, count)) @ query

    gentle = float(0.4 / eigenvalues[-1])
    depths = tuple(range(1, c.num_layers + 1))
    queries = jax.random.normal(keys[5], (64, c.dimension)) @ root.T
    deep = in_context_stack(x, y, queries, gentle, num_layers=c.num_layers)
    expected = jnp.stack([population(gentle, n, queries.T) for n in depths])
    apart = jnp.sqrt(jnp.mean(jnp.square(deep - expected), axis=1) / jnp.mean(jnp.square(expected), axis=1))
    wild = float(2.5 / eigenvalues[-1])
    growth = [abs(float(population(wild, n) - weights @ query)) for n in (1, 8)]
    return [
        Check(
            "one head is one gradient step of in-context regression",
            one, step - 0.03 * abs(step) - 0.01, step + 0.03 * abs(step) + 0.01, step,
        ),
        Check(
            "a stack of heads follows gradient descent: relative distance of its predictions",
            apart, 0.0, 0.15, over=("layers", depths),
        ),
        Check("beyond 2 / the largest eigenvalue the steps diverge: growth over seven", growth[1] / growth[0], 1.5),
    ]  # fmt: skip


def _forgetting(c: Config, key: jax.Array) -> list[Check]:
    keys = jax.random.split(key, 5)
    covariance = _covariance(keys[0], c.dimension)
    root = jnp.linalg.cholesky(covariance)
    shape = (c.num_layers, c.dimension, c.dimension)
    heads = Head(*(c.weight_scale * jax.random.normal(k, shape) for k in jax.random.split(keys[1], 3)))
    total = deep_limit(heads, covariance)

    errors, changes = [], []
    for length in c.deep_contexts:

        def one(key, length=length):
            own, other = jax.random.split(key)
            x = jax.random.normal(own, (length, c.dimension)) @ root.T
            fresh = jax.random.normal(other, (length // 2, c.dimension)) @ root.T
            h = stack_states(heads, x)[-1, -1]
            changed = stack_states(heads, jnp.concatenate([fresh, x[length // 2 :]]))[-1, -1]
            return jnp.sum(jnp.square(h - total @ x[-1])), jnp.sum(jnp.square(h - changed))

        columns = jax.lax.map(one, jax.random.split(keys[2], c.deep_seeds))
        for means, column in zip((errors, changes), columns, strict=True):
            means.append(float(jnp.mean(column)))

    # Decoding: Gaussian vectors as a long past, then tokens of a vocabulary, each the argmax of the tied readout.
    embeddings = jax.random.normal(keys[3], (c.vocabulary, c.dimension)) @ root.T
    following = np.asarray(limit_map(total, embeddings))
    past = jax.random.normal(keys[4], (c.regression_context, c.dimension)) @ root.T
    states = stack_states(heads, past)
    states = jnp.pad(states, ((0, 0), (0, 2 * c.vocabulary), (0, 0)))
    agreeing = [
        int(jnp.argmax(embeddings @ _next_state(heads, states, len(past), e)[-1])) == following[i]
        for i, e in enumerate(embeddings)
    ]
    token, made = 0, [0]
    for number in range(2 * c.vocabulary - 1):
        new = _next_state(heads, states, len(past) + number, embeddings[token])
        states = states.at[:, len(past) + number].set(new)
        token = int(jnp.argmax(embeddings @ new[-1]))
        made.append(token)
    period = next(p for p in range(1, len(made)) if made[-p - 1] == made[-1])
    settled = next(i for i in range(len(made)) if made[i : len(made) - period] == made[i + period :])
    return [
        Check(
            "a deep stack forgets: its squared error falls as 1/t",
            exponent(c.deep_contexts, errors), -1.5, -0.5, -1.0,
        ),
        Check(
            "changing the first half of the context: squared change, against the 1/t of the first",
            changes, 0.0, [4 * changes[0] * c.deep_contexts[0] / t for t in c.deep_contexts],
            over=("context t", c.deep_contexts),
        ),
        Check("greedy decoding agrees with the limit's map of tokens", np.mean(agreeing), 0.9, 1.0, 1.0),
        Check("greedy decoding repeats itself: steps until it is in a cycle", settled, 0, c.vocabulary),
    ]  # fmt: skip


def run(config: Config, key: jax.Array) -> Findings:
    """T1 to T4 of the card: readout, regression, forgetting and repetition."""
    keys = jax.random.split(key, 3)
    parts = (_readout(config, keys[0]), _regression(config, keys[1]), _forgetting(config, keys[2]))
    return Findings(tuple(check for part in parts for check in part))


PAPER = Paper(
    slug="covariance_readout",
    demo=Demo(
        run,
        configs={
            "tiny": Config(),
            "card": Config(
                contexts=(1_000, 10_000, 100_000),
                long_context=2_000_000,
                regression_context=16_000,
                deep_contexts=(250, 1_000, 4_000),
            ),
        },
    ),
)
