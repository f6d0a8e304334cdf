"""Transformers by a softmax partition of unity: local values glued to a function (arXiv:2605.08811).

No official code. Fidelity: reading. New: softmax weights whose logits are affine in x are a smooth partition of unity,
so that attention picks the centres near x and averages the function's values there. Two encoder blocks of single-layer
feed-forward networks reach sup error eps on an alpha-Hoelder function with O(eps^(-d/alpha)) parameters, and least
squares over them learns at the rate n^(-2 alpha / (2 alpha + d)); on a manifold d is the intrinsic dimension.
Ours: the explicit network. Its first block looks values up from the sinusoidal position code, its second attends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.demo import Check, Demo, Findings, exponent
from zoo.paper import Paper

__all__ = ["PAPER", "Block", "Config", "affine_logits", "glue", "grid_centres", "two_block_encoder", "two_block_params"]


def grid_centres(per_axis: int, dimension: int) -> Float[Array, "N D"]:
    """The middles of the cells of a grid on the unit cube."""
    ticks = (jnp.arange(per_axis) + 0.5) / per_axis
    return jnp.stack(jnp.meshgrid(*[ticks] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)


def affine_logits(x: Float[Array, "B D"], centres: Float[Array, "N D"], beta: float) -> Float[Array, "B N"]:
    """2 beta <c, x> - beta |c|^2, under a softmax the same as -beta |x - c|^2."""
    return 2 * beta * x @ centres.T - beta * jnp.sum(jnp.square(centres), axis=-1)


def glue(
    x: Float[Array, "B D"], centres: Float[Array, "N D"], values: Float[Array, " N"], beta: float
) -> Float[Array, " B"]:
    """sum_j softmax_j(-beta |x - c_j|^2) values_j."""
    return jax.nn.softmax(affine_logits(x, centres, beta), axis=-1) @ values


# --- the network ------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """One head and one feed-forward layer, both with residuals and without norms: matrices act from the right."""

    query: Float[Array, "W K"]
    key: Float[Array, "W K"]
    value: Float[Array, "W W"]
    ffn_in: Float[Array, "W F"]
    ffn_bias: Float[Array, " F"]
    ffn_out: Float[Array, "F W"]
    out_bias: Float[Array, " W"]


def two_block_encoder(blocks: tuple[Block, ...], tokens: Float[Array, "N W"]) -> Float[Array, "N W"]:
    """x <- x + softmax(x Q K' x') x V; x <- x + relu(x W_1 + b_1) W_2 + b_2, block after block."""
    for b in blocks:
        weights = jax.nn.softmax(tokens @ b.query @ (tokens @ b.key).T, axis=-1)
        tokens = tokens + weights @ tokens @ b.value
        tokens = tokens + jax.nn.relu(tokens @ b.ffn_in + b.ffn_bias) @ b.ffn_out + b.out_bias
    return tokens


def embed(x: Float[Array, " D"], count: int) -> Float[Array, "N W"]:
    """A token for every centre: [x | 1 | sin, cos of its number | D + 2 empty slots | output]."""
    angles = jnp.pi / (2 * count) * jnp.arange(1, count + 1)
    same = jnp.broadcast_to(jnp.append(x, 1.0), (count, x.shape[0] + 1))
    code = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.concatenate([same, code, jnp.zeros((count, x.shape[0] + 3))], axis=-1)


def two_block_params(centres: Float[Array, "N D"], values: Float[Array, " N"], beta: float) -> tuple[Block, Block]:
    """Blocks whose output coordinate, of any token, is `glue` of these centres and values.

    The first feed-forward layer has a kink at the sine of every position and so interpolates the table of keys and
    values exactly; the second block's head scores it with x.
    """
    count, d = centres.shape
    width, slots = 2 * d + 6, slice(d + 3, 2 * d + 5)
    table = jnp.concatenate(
        [2 * beta * centres, -beta * jnp.sum(jnp.square(centres), axis=-1, keepdims=True), values[:, None]], axis=-1
    )
    sines = jnp.sin(jnp.pi / (2 * count) * jnp.arange(1, count + 1))
    slopes = jnp.diff(table, axis=0) / jnp.diff(sines)[:, None]
    bends = jnp.diff(slopes, axis=0, prepend=jnp.zeros_like(slopes[:1]))
    zeros = jnp.zeros((width, width))
    look_up = Block(
        query=jnp.zeros((width, 1)),
        key=jnp.zeros((width, 1)),
        value=zeros,
        ffn_in=jnp.zeros((width, count - 1)).at[d + 1].set(1.0),
        ffn_bias=-sines[:-1],
        ffn_out=jnp.zeros((count - 1, width)).at[:, slots].set(bends),
        out_bias=jnp.zeros(width).at[slots].set(table[0]),
    )
    attend = Block(
        query=jnp.zeros((width, d + 1)).at[: d + 1].set(jnp.eye(d + 1)),
        key=jnp.zeros((width, d + 1)).at[d + 3 : 2 * d + 4].set(jnp.eye(d + 1)),
        value=zeros.at[2 * d + 4, -1].set(1.0),
        ffn_in=jnp.zeros((width, 1)),
        ffn_bias=jnp.zeros(1),
        ffn_out=jnp.zeros((1, width)),
        out_bias=jnp.zeros(width),
    )
    return look_up, attend


def parameter_count(dimension: int, per_axis: int) -> int:
    """Of the two blocks for a grid of that many cells an axis."""
    centres = jax.ShapeDtypeStruct((per_axis**dimension, dimension), float)
    values = jax.ShapeDtypeStruct((per_axis**dimension,), float)
    blocks = jax.eval_shape(lambda c, v: two_block_params(c, v, 1.0), centres, values)
    return sum(leaf.size for leaf in jax.tree.leaves(blocks))


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes; `bandwidth` b makes the softmax's sharpness b M^2 on a grid of M cells an axis."""

    line_grids: tuple[int, ...] = (16, 32, 64, 128)  # M in one dimension
    square_grids: tuple[int, ...] = (4, 8, 16, 32)  # and in two
    examples: tuple[int, ...] = (256, 1_024, 4_096, 16_384)  # n of the learning curve
    seeds: int = 10
    circle_grids: tuple[int, ...] = (8, 16, 32, 64)
    ambient: int = 10  # dimension of the space the circle lies in
    bandwidth: float = 1.0


def hoelder(x: Float[Array, "B D"], alpha: float, kink: Float[Array, ""] | float = 0.37) -> Float[Array, " B"]:
    """(sum_k |x_k - kink|)^alpha: alpha-Hoelder, no better at its kink."""
    return jnp.sum(jnp.abs(x - kink), axis=-1) ** alpha


def weierstrass(x: Float[Array, " B"], alpha: float) -> Float[Array, " B"]:
    """sum_k 2^(-k alpha) cos(2^k pi x): alpha-Hoelder and no better anywhere, up to the scale of 2^-14."""
    k = jnp.arange(15)
    return jnp.sum(2.0 ** (-k * alpha) * jnp.cos(2.0**k * jnp.pi * x[:, None]), axis=-1)


def _sup_errors(c: Config, dimension: int, alpha: float, grids: tuple[int, ...]) -> list[float]:
    """The mean over kinks: where one lies between two centres decides a good part of the error."""
    probes, found = grid_centres(2_001, 1) if dimension == 1 else grid_centres(101, 2), []
    kinks = 0.3 + 0.05 * jnp.arange(8)
    for m in grids:
        centres = grid_centres(m, dimension)
        weights = jax.nn.softmax(affine_logits(probes, centres, c.bandwidth * m**2), axis=-1)
        tables, truths = (jax.vmap(lambda kink, x=x: hoelder(x, alpha, kink))(kinks) for x in (centres, probes))
        found.append(float(jnp.mean(jnp.max(jnp.abs(tables @ weights.T - truths), axis=-1))))
    return found


def _learning_curve(c: Config, key: jax.Array, alpha: float, cells: Callable[[int], int]) -> list[float]:
    """Test error of least squares over the centres' values, the partition fixed, as n grows."""
    probes = jnp.linspace(0, 1, 2_001)[:, None]
    truth, found = weierstrass(probes[:, 0], alpha), []
    for n in c.examples:
        m = cells(n)
        centres, beta = grid_centres(m, 1), 4.0 * m**2

        def once(key, n=n, centres=centres, beta=beta):
            own, noise = jax.random.split(key)
            x = jax.random.uniform(own, (n, 1))
            y = weierstrass(x[:, 0], alpha) + 0.1 * jax.random.normal(noise, (n,))
            design = jax.nn.softmax(affine_logits(x, centres, beta), axis=-1)
            gram = design.T @ design + 1e-8 * jnp.eye(len(centres))
            values = jnp.linalg.solve(gram, design.T @ y)
            return jnp.mean(jnp.square(glue(probes, centres, values, beta) - truth))

        found.append(float(jnp.mean(jax.lax.map(once, jax.random.split(key, c.seeds)))))
    return found


def _circle_errors(c: Config, key: jax.Array) -> list[float]:
    """Sup error for the distance to a point of a circle that lies somehow in a space of many dimensions."""
    frame = jnp.linalg.qr(jax.random.normal(key, (c.ambient, 2)))[0]

    def place(angle):
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1) @ frame.T

    def distance(angle, start):
        return jnp.abs((angle - start + jnp.pi) % (2 * jnp.pi) - jnp.pi)

    probes, starts, found = jnp.linspace(0, 2 * jnp.pi, 4_001), 0.1 + 0.7 * jnp.arange(8), []
    for m in c.circle_grids:
        angles = 2 * jnp.pi * jnp.arange(m) / m
        beta = c.bandwidth * (m / (2 * jnp.pi)) ** 2
        weights = jax.nn.softmax(affine_logits(place(probes), place(angles), beta), axis=-1)
        errors = [jnp.max(jnp.abs(weights @ distance(angles, s) - distance(probes, s))) for s in starts]
        found.append(float(np.mean(errors)))
    return found


def run(config: Config, key: jax.Array) -> Findings:
    """Approximation, the explicit network, learning, and a manifold."""
    c, keys = config, jax.random.split(key, 4)
    checks = []
    for dimension, grids in ((1, c.line_grids), (2, c.square_grids)):
        for alpha in (1.0, 0.5):
            errors = _sup_errors(c, dimension, alpha, grids)
            slope = exponent(grids, errors)
            predicted = [errors[0] * (m / grids[0]) ** -alpha for m in grids]
            checks += [
                Check(
                    f"sup error for alpha {alpha:g} in {dimension} dimension(s): exponent in M",
                    slope, -1.2 * alpha, -0.8 * alpha, -alpha,
                ),
                Check(
                    f"sup error for alpha {alpha:g} in {dimension} dimension(s)",
                    errors, 0.0, 2 * np.array(predicted), predicted, ("grid M", grids),
                ),
            ]  # fmt: skip

    apart = []
    for dimension, m in ((1, c.line_grids[0]), (2, c.square_grids[-2])):
        centres, beta = grid_centres(m, dimension), c.bandwidth * m**2
        values, count = hoelder(centres, 1.0), len(centres)
        blocks = two_block_params(centres, values, beta)
        x = jax.random.uniform(keys[0], (16, dimension))
        network = jax.vmap(lambda x, n=count, b=blocks: two_block_encoder(b, embed(x, n))[:, -1])(x)
        apart.append(float(jnp.max(jnp.abs(network - glue(x, centres, values, beta)[:, None]))))
    checks.append(Check("two blocks compute the partition's sum: largest difference", apart, high=1e-9))
    for dimension, grids in ((1, (64, 256, 1_024)), (2, (8, 16, 32))):
        counts = [parameter_count(dimension, m) for m in grids]
        checks.append(
            Check(
                f"parameters of the network in {dimension} dimension(s): exponent in M",
                exponent(grids, counts), 0.9 * dimension, 1.05 * dimension, dimension,
            )
        )  # fmt: skip

    for alpha, cells in ((0.5, lambda n: round(n**0.5)), (1.0, lambda n: round(2 * n ** (1 / 3)))):
        errors, rate = _learning_curve(c, keys[1], alpha, cells), -2 * alpha / (2 * alpha + 1)
        predicted = [errors[0] * (n / c.examples[0]) ** rate for n in c.examples]
        checks += [
            Check(
                f"learning, alpha {alpha:g}: exponent of the test error in n",
                exponent(c.examples, errors), rate - 0.12, rate + 0.12, rate,
            ),
            Check(
                f"learning, alpha {alpha:g}: test error",
                errors, 0.0, 2 * np.array(predicted), predicted, ("examples n", c.examples),
            ),
        ]  # fmt: skip

    errors = _circle_errors(c, keys[2])
    checks.append(
        Check(
            f"a circle in {c.ambient} dimensions: exponent in M, that of one dimension",
            exponent(c.circle_grids, errors), -1.25, -0.75, -1.0,
        )
    )  # fmt: skip
    return Findings(tuple(checks))


PAPER = Paper(
    slug="partition_of_unity",
    demo=Demo(
        run,
        configs={"tiny": Config(), "card": Config(line_grids=(16, 32, 64, 128, 256), square_grids=(4, 8, 16, 32, 64))},
    ),
)
