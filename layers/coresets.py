"""Coresets for attention: the few keys and values that answer nearly as all of them, for every query at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

__all__ = ["attention_coreset", "attention_gram", "coreset_error", "halve"]

_CHOOSERS = ("greedy", "walk")


@jax.jit
def attention_gram(
    key: Float[Array, "N D"], value: Float[Array, "N Dv"], radius: Float[Array, ""] | float
) -> Float[Array, "N N"]:
    """G_ij = exp(radius (k_i.k_j - 1)) (1 + v_i.v_j) / 2 for unit keys and values: positive definite, unit diagonal.

    The inner products of what attention's numerator and denominator are linear in, for queries up to norm `radius`.
    O(N^2 D). Source: card attention_coresets, Mechanism A (arXiv reference there).
    """
    return jnp.exp(radius * (key @ key.T - 1)) * (1 + value @ value.T) / 2


def _signs(gram, first, second, random, chooser: str, n: int):
    """+1 or -1 for every pair, one after the other, so that the signed sum of the differences stays small."""
    differences = gram[first][:, first] - gram[first][:, second] - gram[second][:, first] + gram[second][:, second]
    limit = 30 * jnp.log(jnp.maximum(float(n), 2.0))

    def step(products, row):
        index, uniform = row
        if chooser == "greedy":
            sign = jnp.where(products[index] > 0, -1.0, 1.0)
        else:
            sign = jnp.where(uniform < 0.5 - products[index] / (2 * limit), 1.0, -1.0)
        return products + sign * differences[index], sign

    start = jnp.zeros(first.shape[0], gram.dtype)
    return jax.lax.scan(step, start, (jnp.arange(first.shape[0]), random))[1]


@partial(jax.jit, static_argnames=("chooser",))
def halve(gram: Float[Array, "N N"], key: PRNGKeyArray, *, chooser: str = "greedy") -> Int[Array, " M"]:
    """Indices of M = N // 2 of N items, one of every pair of a random matching, chosen to balance their sum in G.

    `chooser`: "greedy" signs against the running sum; "walk" the self-balancing random walk, P(+) = 1/2 - <w, u> / 2c
    with c = 30 log N. An odd item is left out. O(N^2). Source: card attention_coresets, Mechanism B.
    """
    if chooser not in _CHOOSERS:
        raise ValueError(f"halve: chooser {chooser!r} is not one of {', '.join(_CHOOSERS)}")
    count = gram.shape[0] // 2
    if count == 0:
        raise ValueError(f"halve: {gram.shape[0]} items cannot be halved")
    order_key, sign_key = jax.random.split(key)
    order = jax.random.permutation(order_key, gram.shape[0])
    first, second = order[:count], order[count : 2 * count]
    signs = _signs(gram, first, second, jax.random.uniform(sign_key, (count,)), chooser, gram.shape[0])
    return jnp.where(signs > 0, first, second)


@partial(jax.jit, static_argnames=("rounds", "chooser"))
def attention_coreset(
    key: Float[Array, "N D"],
    value: Float[Array, "N Dv"],
    random_key: PRNGKeyArray,
    *,
    rounds: int,
    radius: Float[Array, ""] | float = 1.0,
    chooser: str = "greedy",
) -> Int[Array, " S"]:
    """S = N / 2^rounds indices whose keys and values stand for all: attention over them differs by O(sqrt(D) e^r / S).

    For unit keys and values and queries of norm at most `radius` r, without 1/sqrt(D); longer keys by their largest
    norm R are the case of keys / R and radius r R. For heads and batches use vmap. O(N^2 D). Source: card
    attention_coresets, Mechanism C.
    """
    index = jnp.arange(key.shape[0])
    for round_key in jax.random.split(random_key, rounds) if rounds else ():
        gram = attention_gram(key[index], value[index], radius)
        index = index[halve(gram, round_key, chooser=chooser)]
    return index


def _attend(query, key, value, kept=None):
    scores = query @ key.T
    if kept is not None:
        scores = jnp.where(kept, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ value


@partial(jax.jit, static_argnames=("num_directions", "ascent_steps", "num_ascents"))
def coreset_error(
    key: Float[Array, "N D"],
    value: Float[Array, "N Dv"],
    kept: Bool[Array, " N"],
    random_key: PRNGKeyArray,
    *,
    radius: Float[Array, ""] | float = 1.0,
    num_directions: int = 512,
    ascent_steps: int = 20,
    num_ascents: int = 16,
) -> Float[Array, ""]:
    """max_q |Attn(q, all) - Attn(q, kept)| over queries of norm <= radius: the largest found, so a lower estimate.

    Queries tried: random directions and all keys at norm `radius`, then projected gradient ascent from the best.
    O((directions + N) N D). Source: card attention_coresets, "Evaluator".
    """

    def gap(query):
        return jnp.sum(jnp.square(_attend(query, key, value) - _attend(query, key, value, kept)), axis=-1)

    def to_ball(query):
        norm = jnp.linalg.norm(query, axis=-1, keepdims=True)
        return query * jnp.minimum(1.0, radius / jnp.maximum(norm, 1e-12))

    directions = jnp.concatenate([jax.random.normal(random_key, (num_directions, key.shape[1])), key])
    queries = radius * directions / jnp.maximum(jnp.linalg.norm(directions, axis=-1, keepdims=True), 1e-12)
    gaps, best = jax.lax.top_k(gap(queries), min(num_ascents, queries.shape[0]))

    def ascend(queries, _):
        slope = jax.grad(lambda q: jnp.sum(gap(q)))(queries)
        length = jnp.maximum(jnp.linalg.norm(slope, axis=-1, keepdims=True), 1e-30)
        queries = to_ball(queries + 0.1 * radius * slope / length)
        return queries, gap(queries)

    _, climbed = jax.lax.scan(ascend, queries[best], None, length=ascent_steps)
    return jnp.sqrt(jnp.maximum(jnp.max(gaps), jnp.max(climbed, initial=0.0)))
