"""Nearly optimal attention coresets: how few keys and values can stand for all (arXiv:2605.05602).

No official code. Fidelity: reading. New: for unit keys and values, some S = O(sqrt(d) e^rho / eps) of any number of
pairs answer every query of norm up to rho within eps, and no fewer do in general. Dropping pairs at random needs
(1 / eps)^2. Ours: the proof is by existence; here pairs are halved, round after round, by signs that balance the sums
in attention's numerator and denominator (`layers.attention_coreset`), and the error is searched for by ascent.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import layers
from zoo.demo import Check, Demo, Findings, exponent
from zoo.paper import Paper

__all__ = ["PAPER", "Config", "bound", "compress_cache", "random_pairs"]


def bound(dimension: int, radius: float, size: Any) -> Any:
    """sqrt(d) e^rho / S, the theorem's error with the constant 1."""
    return np.sqrt(dimension) * np.exp(radius) / np.asarray(size, float)


def random_pairs(key: jax.Array, count: int, dimension: int) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """Unit keys and values, uniform on the sphere."""
    rows = jax.random.normal(key, (2, count, dimension))
    return tuple(rows / jnp.linalg.norm(rows, axis=-1, keepdims=True))


@partial(jax.jit, static_argnames=("rounds", "chooser"))
def compress_cache(
    key: Float[Array, "B L H D"],
    value: Float[Array, "B L H D"],
    random_key: jax.Array,
    *,
    rounds: int,
    radius: float = 1.0,
    chooser: str = "greedy",
) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H D"]]:
    """A cache of L / 2^rounds entries, chosen for every row and head by itself.

    Keys of any length are those of the unit ball times their largest norm R, queries of norm `radius` then R times
    longer; values are scaled alike, which no weight depends on.
    """

    def one(key, value, random_key):
        longest = jnp.maximum(jnp.max(jnp.linalg.norm(key, axis=-1)), 1e-12)
        largest = jnp.maximum(jnp.max(jnp.linalg.norm(value, axis=-1)), 1e-12)
        index = layers.attention_coreset(
            key / longest, value / largest, random_key, rounds=rounds, radius=radius * longest, chooser=chooser
        )
        return key[index], value[index]

    heads = jax.vmap(jax.vmap(one, in_axes=(1, 1, 0), out_axes=1))
    keys = jax.random.split(random_key, (key.shape[0], key.shape[2]))
    return heads(key, value, keys)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment."""

    count: int = 2_048  # n pairs
    dimension: int = 8
    radii: tuple[float, ...] = (1.0, 2.0)  # rho
    rounds: tuple[int, ...] = (2, 3, 4)  # sizes n / 2^rounds
    seeds: int = 2


def _kept(index: Int[Array, " S"], count: int):
    return jnp.zeros(count, bool).at[index].set(True)


def _errors(c: Config, key: jax.Array) -> Float[Array, "2 R S"]:
    """Of coresets and of random subsets: the mean error over seeds for every radius and size."""
    found = []
    for rounds in c.rounds:

        def once(pair, rounds=rounds):
            key, radius = pair
            keys = jax.random.split(key, 4)
            k, v = random_pairs(keys[0], c.count, c.dimension)
            index = layers.attention_coreset(k, v, keys[1], rounds=rounds, radius=radius)
            uniform = jax.random.permutation(keys[2], c.count)[: len(index)]
            kept = jnp.stack([_kept(i, c.count) for i in (index, uniform)])
            error = partial(layers.coreset_error, num_directions=256)
            return jax.lax.map(lambda rows: error(k, v, rows, keys[3], radius=radius), kept)

        seeds = jnp.tile(jax.random.split(key, c.seeds), len(c.radii))
        errors = jax.lax.map(once, (seeds, jnp.repeat(jnp.asarray(c.radii), c.seeds)))
        found.append(jnp.mean(errors.reshape(len(c.radii), c.seeds, 2), axis=1))
    return jnp.transpose(jnp.stack(found), (2, 1, 0))


def _against_all_subsets(key: jax.Array) -> float:
    """The halving's error over that of the best of all 924 halves of twelve pairs in the plane."""
    k, v = random_pairs(key, 12, 2)
    queries = random_pairs(jax.random.fold_in(key, 1), 256, 2)[0]

    def attend(kept):
        return jax.nn.softmax(jnp.where(kept, queries @ k.T, -jnp.inf), axis=-1) @ v

    halves = jnp.asarray(list(itertools.combinations(range(12), 6)))
    masks = jax.vmap(partial(_kept, count=12))(halves)
    whole = attend(jnp.ones(12, bool))
    error = jax.jit(lambda kept: jnp.max(jnp.linalg.norm(attend(kept) - whole, axis=-1)))
    best = jnp.min(jax.lax.map(error, masks))
    tries = [layers.attention_coreset(k, v, s, rounds=1) for s in jax.random.split(key, 8)]
    return float(min(error(_kept(index, 12)) for index in tries) / best)


def _feature_gram(k: Float[Array, "N 2"], v: Float[Array, "N 2"], radius: float, terms: int = 24):
    """The Gram matrix from explicit features: the exponential's series in the monomials of a plane."""
    rows = []
    for i in range(terms):
        for j in range(terms - i):
            scale = radius ** ((i + j) / 2) / np.sqrt(
                float(jax.scipy.special.factorial(i) * jax.scipy.special.factorial(j))
            )
            rows.append(scale * k[:, 0] ** i * k[:, 1] ** j)
    phi = jnp.stack(rows, axis=-1) * np.exp(-radius / 2)
    lifted = phi[:, :, None] * jnp.concatenate([jnp.ones((len(k), 1)), v], axis=-1)[:, None, :]
    lifted = lifted.reshape(len(k), -1) / np.sqrt(2)
    return lifted @ lifted.T


def run(config: Config, key: jax.Array) -> Findings:
    """The error of coresets against their size, radius and random subsets."""
    c, keys = config, jax.random.split(key, 4)
    sizes = tuple(c.count // 2**r for r in c.rounds)
    checks, found = [], np.asarray(_errors(c, keys[0]))
    for radius, errors, uniform in zip(c.radii, *found, strict=True):
        checks += [
            Check(
                f"rho {radius:g}: error of a coreset, below sqrt(d) e^rho / S",
                errors, 0.0, bound(c.dimension, radius, sizes), over=("size S", sizes),
            ),
            Check(f"rho {radius:g}: exponent of its error in S", exponent(sizes, errors), -1.25, -0.75, -1.0),
            Check(f"rho {radius:g}: exponent of a random subset's", exponent(sizes, uniform), -0.65, -0.35, -0.5),
            Check(
                f"rho {radius:g}: its error over a random subset's, the larger half of sizes",
                (errors / uniform)[: len(sizes) // 2], high=0.6,
            ),
        ]  # fmt: skip
    growth = found[0, -1, -1] / found[0, 0, -1]
    checks.append(Check("the error grows with rho no faster than e^rho", growth, high=np.exp(c.radii[-1] - c.radii[0])))

    k, v = random_pairs(keys[1], 64, 2)
    gram = layers.attention_gram(k, v, 1.5)
    k8, v8 = random_pairs(keys[2], 256, c.dimension)
    everything = layers.coreset_error(k8, v8, jnp.ones(256, bool), keys[3])
    checks += [
        Check(
            "the balanced sums' Gram matrix equals that of explicit features",
            float(jnp.max(jnp.abs(gram - _feature_gram(k, v, 1.5)))), high=1e-6,
        ),
        Check("it is positive definite: least eigenvalue", float(jnp.linalg.eigvalsh(gram)[0]), low=-1e-8),
        Check("all pairs kept: error", float(everything), high=1e-12),
        Check("twelve pairs in the plane: error over that of the best half", _against_all_subsets(keys[3]), 1.0, 4.0),
    ]  # fmt: skip
    return Findings(tuple(checks))


PAPER = Paper(
    slug="attention_coresets",
    demo=Demo(
        run,
        configs={
            "tiny": Config(),
            "card": Config(count=8_192, dimension=16, radii=(1.0, 2.0, 3.0), rounds=(1, 2, 3, 4, 5)),
        },
    ),
)
