"""Uniform scaling limits of transformers trained by AdamW (arXiv:2605.11059): deep and wide, training is an ODE.

No official code. Fidelity: reading. New: with heads averaged and layers of step 1/L, tokens are particles and depth is
time. States and back-propagated adjoints of a network trained by AdamW tend to a forward-backward system of ODEs at the
rate 1/L + L^(-1/3) H^(-1/2), whatever the number of tokens; a normaliser shared by a whole matrix (blockwise AdamW)
takes the dimension out of the constant too.
Ours: attention with merged matrices, x_i <- x_i + (1/LH) sum_h V sum_j softmax_j(<x_i, A x_j>) x_j; the quadratic loss
against a fixed map of the tokens; the limit as a much larger network, averaged over draws.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.demo import Check, Demo, Findings, exponent
from zoo.paper import Paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAPER", "AdamW", "Config", "Heads", "adjoint", "bound", "flow_map", "forward", "shares", "train"]


class Heads(NamedTuple):
    """The two merged matrices of every head of every layer: scores are x' A y, outputs V times a mean of tokens."""

    score: Float[Array, "*L d d"]
    value: Float[Array, "*L d d"]


class AdamW(NamedTuple):
    """Constants of the update. An epsilon near zero would make it a step function of the gradient, without a limit."""

    rate: float = 0.1
    decay_mean: float = 0.9
    decay_square: float = 0.99
    epsilon: float = 1e-2
    weight_decay: float = 0.01


_ADAMW = AdamW()


def shares(layers: int, heads: int, size: tuple[int, int]) -> Float[Array, "L H"]:
    """1 / (layers heads) for the first of them and 0 beyond: networks of every size have one shape, compiled once."""
    there = (jnp.arange(size[0])[:, None] < layers) & (jnp.arange(size[1]) < heads)
    return there / (layers * heads)


def _attend(
    heads: Heads, x: Float[Array, "n d"], y: Float[Array, "m d"], allowed: Bool[Array, "n m"]
) -> tuple[Float[Array, "h n m"], Float[Array, "h n d"]]:
    """Weights of the tokens y for x, and their means."""
    scores = jnp.einsum("nd,hde,me->hnm", x, heads.score, y)
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return weights, weights @ y


def forward(
    heads: Heads, x: Float[Array, "n d"], share: Float[Array, "L H"], allowed: Bool[Array, "n n"]
) -> Float[Array, "S n d"]:
    """The tokens before every layer, and after the last."""

    def layer(x, row):
        heads, share = row
        x = x + jnp.einsum("h,hnd,hed->ne", share, _attend(heads, x, x, allowed)[1], heads.value)
        return x, x

    return jnp.concatenate([x[None], jax.lax.scan(layer, x, (heads, share))[1]])


def flow_map(
    heads: Heads, states: Float[Array, "S n d"], x: Float[Array, "m d"], share: Float[Array, "L H"]
) -> Float[Array, "m d"]:
    """Where particles of no weight go that see the tokens of `states` and are not seen by them."""

    def layer(x, row):
        heads, share, tokens = row
        means = _attend(heads, x, tokens, jnp.ones((len(x), len(tokens)), bool))[1]
        return x + jnp.einsum("h,hnd,hed->ne", share, means, heads.value), None

    return jax.lax.scan(layer, x, (heads, share, states[:-1]))[0]


def adjoint(
    heads: Heads,
    states: Float[Array, "S n d"],
    last: Float[Array, "n d"],
    share: Float[Array, "L H"],
    allowed: Bool[Array, "n n"],
) -> tuple[Float[Array, "S n d"], Heads]:
    """p^l = dJ/dx^l from `last` = p^L, and the gradients of the heads times L H, which stay of order one."""

    def layer(p, row):
        heads, x, share = row
        weights, means = _attend(heads, x, x, allowed)
        back = jnp.einsum("ni,hij->hnj", p, heads.value)
        d_weights = jnp.einsum("hnj,mj->hnm", back, x)
        d_scores = weights * (d_weights - jnp.sum(weights * d_weights, axis=-1, keepdims=True))
        gradient = Heads(jnp.einsum("hnm,nd,me->hde", d_scores, x, x), jnp.einsum("ni,hnj->hij", p, means))
        as_query = jnp.einsum("hnm,hde,me->hnd", d_scores, heads.score, x)
        as_key = jnp.einsum("hnm,hde,nd->hme", d_scores, heads.score, x)
        as_value = jnp.einsum("hnm,hnd->hmd", weights, back)
        return p + jnp.einsum("h,hnd->nd", share, as_query + as_key + as_value), (p, gradient)

    first, (rest, gradient) = jax.lax.scan(layer, last, (heads, states[:-1], share), reverse=True)
    return jnp.concatenate([first[None], rest]), gradient


def _square(gradient: Float[Array, "*L d d"], blockwise: Bool[Array, ""] | bool) -> Float[Array, "*L d d"]:
    squares = jnp.square(gradient)
    return jnp.where(blockwise, jnp.mean(squares, axis=(-2, -1), keepdims=True), squares)


@partial(jax.jit, static_argnames=("steps", "adamw"))
def train(
    heads: Heads,
    x: Float[Array, "n d"],
    target: Float[Array, "n d"],
    share: Float[Array, "L H"],
    *,
    steps: int,
    adamw: AdamW = _ADAMW,
    blockwise: Bool[Array, ""] | bool = False,
    allowed: Bool[Array, "n n"] | None = None,
) -> tuple[Float[Array, "t S n d"], Float[Array, "t S n d"], Float[Array, " t"], Float[Array, " t"]]:
    """States, adjoints, losses and the gradients' root mean square before each step and after the last.

    Full-batch AdamW on J = |x^L - target|^2 / (2 n d). `blockwise` normalises by the mean square of a whole matrix.
    """
    allowed = jnp.ones((len(x), len(x)), bool) if allowed is None else allowed
    zeros = jax.tree.map(jnp.zeros_like, heads)

    def step(carry, t):
        heads, mean, square = carry
        states = forward(heads, x, share, allowed)
        apart = states[-1] - target
        adjoints, gradient = adjoint(heads, states, apart / apart.size, share, allowed)
        mean = jax.tree.map(lambda m, g: adamw.decay_mean * m + (1 - adamw.decay_mean) * g, mean, gradient)
        square = jax.tree.map(
            lambda v, g: adamw.decay_square * v + (1 - adamw.decay_square) * _square(g, blockwise), square, gradient
        )
        fixes = 1 - adamw.decay_mean**t, 1 - adamw.decay_square**t

        def move(w, m, v):
            direction = m / fixes[0] / (jnp.sqrt(v / fixes[1]) + adamw.epsilon)
            return w - adamw.rate * (direction + adamw.weight_decay * w)

        used = share[..., None, None] > 0
        size = jnp.sqrt(sum(jnp.sum(jnp.square(g) * used) for g in gradient) / (2 * jnp.sum(used) * x.shape[1] ** 2))
        heads = jax.tree.map(move, heads, mean, square)
        return (heads, mean, square), (states, adjoints, jnp.sum(jnp.square(apart)) / (2 * apart.size), size)

    return jax.lax.scan(step, (heads, zeros, zeros), jnp.arange(1, steps + 2, dtype=x.dtype))[1]


def bound(layers: int, heads: int) -> float:
    """The theorem's rate, without its constant."""
    return 1 / layers + layers ** (-1 / 3) * heads**-0.5


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of the networks and of what they are compared with."""

    tokens: int = 6
    dimension: int = 3
    layers: tuple[int, ...] = (4, 16)
    heads: tuple[int, ...] = (1, 4)
    reference: int = 32  # layers, and heads of each, of what stands for the limit
    reference_seeds: int = 12
    seeds: int = 12
    steps: int = 5  # of AdamW
    long_steps: int = 50  # of the run that has to converge, of 16 layers of 16 heads
    token_counts: tuple[int, ...] = (4, 32)
    dimensions: tuple[int, ...] = (2, 8)
    sweep: int = 4  # layers and heads of the sweeps over tokens and dimension, and their limit's: four times that
    adamw: AdamW = _ADAMW


def _draw(key: jax.Array, shape: tuple[int, int], dimension: int) -> Heads:
    """A ~ N(0, 1/d), V ~ I/2 + N(0, 1/d), every head by itself."""
    score, value = jax.random.normal(key, (2, *shape, dimension, dimension)) / np.sqrt(dimension)
    return Heads(score, value + 0.5 * jnp.eye(dimension))


def _task(key: jax.Array, tokens: int, dimension: int) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Tokens on the sphere, and 1.5 times their image under a signed permutation of the axes."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (tokens, dimension))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    signs = jax.random.rademacher(keys[1], (dimension,), dtype=x.dtype)
    return x, 1.5 * signs * x[:, jax.random.permutation(keys[2], dimension)]


class _Comparison:
    """Networks of one task and shape against the largest of them."""

    def __init__(self, c: Config, key: jax.Array, *, size: int, tokens: int, dimension: int, blockwise: bool = False):
        self.c, self.size, self.dimension = c, (size, size), dimension
        task_key, reference_key, self.key = jax.random.split(key, 3)
        x, target = _task(task_key, tokens, dimension)

        def one(key, share):
            heads = _draw(key, self.size, dimension)
            return train(heads, x, target, share, steps=c.steps, adamw=c.adamw, blockwise=blockwise)

        self.several = jax.jit(lambda keys, share: jax.lax.map(lambda key: one(key, share), keys))
        keys = jax.random.split(reference_key, c.reference_seeds)
        limit = self.several(keys, shares(*self.size, self.size))
        self.limit = [jnp.mean(part, axis=0) for part in limit[:2]]

    def errors(self, layers: int, heads: int) -> tuple[np.ndarray, float]:
        """Root mean squares, before the first step and after the last, of the states' largest distances from the limit
        over depth; and of the gradients."""
        runs = self.several(jax.random.split(self.key, self.c.seeds), shares(layers, heads, self.size))
        times = jnp.arange(layers + 1)
        there = self.limit[0][:, times * (self.size[0] // layers)]
        squares = jnp.sum(jnp.square(runs[0][:, :, : layers + 1] - there), axis=-1).max(axis=2)
        return np.sqrt(np.mean(squares, axis=(0, 2)))[[0, -1]], float(jnp.mean(runs[3][:, 0]))


def _rates(c: Config, key: jax.Array) -> list[Check]:
    compare = _Comparison(c, key, size=c.reference, tokens=c.tokens, dimension=c.dimension)
    found = {(n, h): compare.errors(n, h) for n in c.layers for h in c.heads}
    checks = []
    for when, name in enumerate(("at the start", f"after {c.steps} steps of AdamW")):
        error = {size: pair[0][when] for size, pair in found.items()}
        for n in c.layers:
            limits = [bound(n, h) for h in c.heads]
            checks.append(
                Check(
                    f"{n} layers, {name}: distance from the limit, at most half of 1/L + L^(-1/3) H^(-1/2)",
                    [error[n, h] for h in c.heads], 0.0, [limit / 2 for limit in limits], over=("heads", c.heads),
                )
            )  # fmt: skip
        slopes = [exponent(c.heads, [error[n, h] for h in c.heads]) for n in c.layers]
        checks.append(Check(f"{name}: exponent of the heads", slopes, -0.65, -0.35, -0.5, ("layers", c.layers)))
        deeper = [max(error[b, h] / error[a, h] for a, b in zip(c.layers, c.layers[1:])) for h in c.heads]  # noqa: B905
        checks.append(Check(f"{name}: a deeper network is not further away", deeper, 0.0, 1.2, over=("heads", c.heads)))
    sizes = found[c.layers[-1], c.heads[-1]][1] / found[c.layers[0], c.heads[0]][1]
    checks.append(Check("rescaled gradients of the largest network and of the smallest", sizes, 0.5, 2.0, 1.0))
    return checks


def _euler(c: Config, key: jax.Array) -> Check:
    """One head, the same in every layer: nothing is random, and only the size of the steps is left."""
    depths, fine = (4, 8, 16, 32), 2048
    x, _ = _task(key, c.tokens, c.dimension)
    one = _draw(key, (1, 1), c.dimension)
    everyone = jnp.ones((c.tokens, c.tokens), bool)

    @partial(jax.jit, static_argnums=0)
    def states(depth):
        heads = jax.tree.map(lambda w: jnp.broadcast_to(w, (depth, *w.shape[1:])), one)
        return forward(heads, x, shares(depth, 1, (depth, 1)), everyone)

    limit = states(fine)
    errors = [float(jnp.linalg.norm(states(n) - limit[:: fine // n], axis=-1).max()) for n in depths]
    return Check("one head, the same in all layers: exponent of the layers", exponent(depths, errors), -1.2, -0.8, -1.0)


def _uniformity(c: Config, key: jax.Array) -> list[Check]:
    def error(**sizes):
        compare = _Comparison(replace(c, seeds=2 * c.seeds), key, size=4 * c.sweep, **sizes)
        return float(compare.errors(c.sweep, c.sweep)[0][-1] / np.sqrt(sizes["dimension"]))

    by_tokens = [error(tokens=n, dimension=c.dimension) for n in c.token_counts]
    by_dimension = {
        blockwise: [error(tokens=c.tokens, dimension=d, blockwise=blockwise) for d in c.dimensions]
        for blockwise in (True, False)
    }
    # Tokens on the unit sphere: more of them average out, and each coordinate gets smaller. A constant that depended
    # on neither would let errors fall, and not grow.
    return [
        Check(
            "more tokens: distance from the limit, over that of the fewest",
            [e / by_tokens[0] for e in by_tokens], 0.0, 1.5, over=("tokens", c.token_counts),
        ),
        *(
            Check(
                f"more dimensions, {name} AdamW: distance of a coordinate, over that of the fewest",
                [e / found[0] for e in found], 0.0, high, over=("dimensions", c.dimensions),
            )
            for name, found, high in (("blockwise", by_dimension[True], 1.5), ("plain", by_dimension[False], np.inf))
        ),
    ]  # fmt: skip


def run(config: Config, key: jax.Array) -> Findings:
    """Rates, their Euler part, uniformity in tokens and dimension, and that such training does learn."""
    keys = jax.random.split(key, 4)
    x, target = _task(keys[3], config.tokens, config.dimension)
    share = shares(16, 16, (16, 16))
    heads = _draw(keys[3], share.shape, config.dimension)
    losses = train(heads, x, target, share, steps=config.long_steps, adamw=config.adamw)[2]
    learned = Check(
        f"16 layers of 16 heads learn: loss after {config.long_steps} steps over that before",
        float(losses[-1] / losses[0]), 0.0, 0.1,
    )  # fmt: skip
    checks = (*_rates(config, keys[0]), _euler(config, keys[1]), *_uniformity(config, keys[2]), learned)
    return Findings(checks, partial(_picture, np.asarray(losses)))


def _picture(losses: np.ndarray) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(losses)
    axes.set(xlabel="steps of AdamW", ylabel="loss", title="16 layers of 16 averaged heads")
    return figure


PAPER = Paper(
    slug="adamw_scaling_limits",
    demo=Demo(
        run,
        configs={
            "tiny": Config(),
            "card": Config(
                layers=(4, 16, 64),
                heads=(4, 16, 64),
                reference=128,
                seeds=24,
                token_counts=(4, 16, 64),
                dimensions=(2, 4, 8, 16),
                sweep=16,
            ),
        },
    ),
)
