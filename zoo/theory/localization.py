"""The general theory of localization methods (arXiv:2605.20635): attention as a local mean, and its many relatives.

No official code. Fidelity: reading. New: weigh the data by a kernel around the target, fit something simple, predict
there. A constant fitted so is the local mean, which is attention, mean shift, a Hopfield step, the best denoiser, a
fuzzy rule base, according to the kernel; fitting on the output of another local model gives a transformer.
Ours: the identities as checks of numbers, each against a computation of another kind; `LocalTransformer`, of local
means over tokens and, for its feed-forward part, over a learned memory (`memory="softmax"`) or the usual ReLU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import layers
from zoo.demo import Check, Demo, Findings
from zoo.paper import Paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PAPER",
    "Config",
    "LocalTransformer",
    "Memory",
    "TokenMean",
    "best_bandwidth",
    "local_fit",
    "locally_linear_embedding",
    "relaxation_labelling",
    "takagi_sugeno",
]


# --- local models -----------------------------------------------------------------------------------------------------


def local_fit(
    loss: Callable[[Array, Array, Array], Array],
    log_kernel: Float[Array, " N"],
    source: Float[Array, "N D"],
    value: Float[Array, "N M"],
    start: Float[Array, " P"],
    *,
    steps: int = 12,
) -> Float[Array, " P"]:
    """argmin over theta of sum_n w_n loss(theta, x_n, y_n), w the normalised kernel around one target, by Newton steps.

    A convex loss, twice differentiable; a quadratic one needs a single step.
    """
    weights = jax.nn.softmax(log_kernel)

    def risk(theta):
        return weights @ jax.vmap(partial(loss, theta))(source, value)

    def step(theta, _):
        return theta - jnp.linalg.solve(jax.hessian(risk)(theta), jax.grad(risk)(theta)), None

    return jax.lax.scan(step, start, length=steps)[0]


def takagi_sugeno(
    log_firing: Float[Array, "T R"],
    target: Float[Array, "T D"],
    slopes: Float[Array, "R D"],
    levels: Float[Array, " R"],
) -> Float[Array, " T"]:
    """The fuzzy rules "near r, y is slopes_r x + levels_r", averaged by how strongly each fires."""
    consequents = target @ slopes.T + levels
    return jnp.sum(jax.nn.softmax(log_firing, axis=-1) * consequents, axis=-1)


def relaxation_labelling(
    labels: Float[Array, "N C"], log_kernel: Float[Array, "N N"], compatibility: Float[Array, "C C"], *, steps: int
) -> Float[Array, "N C"]:
    """p_i(l) <- p_i(l) q_i(l) / sum_l' p_i(l') q_i(l'), q_i the local mean of the neighbours' compatibilities."""

    def step(p, _):
        p = p * layers.local_mean(log_kernel, p @ compatibility)
        return p / jnp.sum(p, axis=-1, keepdims=True), None

    return jax.lax.scan(step, labels, length=steps)[0]


def locally_linear_embedding(
    x: Float[Array, "N D"], *, neighbors: int, dimension: int, ridge: float = 1e-3
) -> Float[Array, "N E"]:
    """Coordinates that the local weights of the points reconstruct best: bottom eigenvectors of (I - W)'(I - W)."""
    square = jnp.sum(jnp.square(x[:, None] - x), axis=-1)
    index = jnp.argsort(square, axis=-1)[:, 1 : neighbors + 1]
    weights = layers.reconstruction_weights(x, x[index], ridge=ridge)
    rest = jnp.eye(len(x)).at[jnp.arange(len(x))[:, None], index].add(-weights)
    # The last eigenvector but none is constant.
    return jnp.linalg.eigh(rest.T @ rest)[1][:, 1 : dimension + 1]


def best_bandwidth(
    source: Float[Array, "N D"], value: Float[Array, "N M"], start: float, *, steps: int = 200
) -> Float[Array, ""]:
    """h = softplus(eta) by gradient descent on the error of every point's local mean over the others."""
    alone = jnp.where(jnp.eye(len(source), dtype=bool), -jnp.inf, 0.0)

    def error(eta):
        kernel = layers.gaussian_log_kernel(source, source, jax.nn.softplus(eta)) + alone
        return jnp.mean(jnp.square(layers.local_mean(kernel, value) - value))

    optimizer = optax.adam(0.05)
    eta = jnp.log(jnp.expm1(jnp.asarray(start, source.dtype)))

    def step(carry, _):
        eta, state = carry
        updates, state = optimizer.update(jax.grad(error)(eta), state)
        return (eta + updates, state), None

    return jax.nn.softplus(jax.lax.scan(step, (eta, optimizer.init(eta)), length=steps)[0][0])


# --- a hierarchy of them ----------------------------------------------------------------------------------------------


class TokenMean(nn.Module):
    """Heads of local means over a token's past, with learned dot-product kernels: causal self-attention."""

    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        query, key, value = (
            jnp.moveaxis(nn.Dense(x.shape[-1], name=name)(x).reshape(*x.shape[:2], self.num_heads, -1), 2, 1)
            for name in ("query", "key", "value")
        )
        kernel = query @ jnp.swapaxes(key, -1, -2) * query.shape[-1] ** -0.5
        past = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        mean = layers.local_mean(jnp.where(past, kernel, -jnp.inf), value)
        return nn.Dense(x.shape[-1], name="out")(jnp.moveaxis(mean, 1, 2).reshape(x.shape))


class Memory(nn.Module):
    """sum_m K(x, k_m) v_m over learned keys and values: by softmax a local mean, by ReLU the usual layer."""

    size: int
    kernel: str = "relu"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        scores = nn.Dense(self.size, name="keys")(x)
        values = self.param("values", nn.initializers.lecun_normal(), (self.size, x.shape[-1]))
        if self.kernel == "softmax":
            return layers.local_mean(scores, jnp.broadcast_to(values, (len(x), *values.shape)))
        return jax.nn.relu(scores) @ values


class LocalTransformer(nn.Module):
    """Token logits by layers of local means, over the tokens so far and over a learned memory, each on a layer norm."""

    vocabulary: int = 32
    length: int = 32
    d_model: int = 32
    num_heads: int = 2
    num_layers: int = 2
    memory_size: int = 64
    memory: str = "relu"

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        x = nn.Embed(self.vocabulary, self.d_model, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.5), (self.length, self.d_model))[: tokens.shape[1]]
        for i in range(self.num_layers):
            x = x + TokenMean(self.num_heads, name=f"mean_{i}")(nn.LayerNorm(name=f"mean_norm_{i}")(x))
            x = x + Memory(self.memory_size, self.memory, name=f"memory_{i}")(nn.LayerNorm(name=f"memory_norm_{i}")(x))
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of the data and of the copy task."""

    points: int = 40
    pairs: int = 1_000_000  # clean and noisy, for the denoiser
    moons: int = 120  # points
    moons_bandwidth: float = 0.4
    roll: int = 500  # points of the Swiss roll
    copied: int = 8  # symbols of the copy task
    alphabet: int = 16
    copy_steps: int = 300


def _identities(c: Config, key: jax.Array) -> list[Check]:
    keys = jax.random.split(key, 6)
    h = 0.6
    x, y = jax.random.normal(keys[0], (c.points, 3)), jax.random.normal(keys[1], (c.points, 2))
    targets = jax.random.normal(keys[2], (7, 3))

    def gap(a, b):
        return float(jnp.abs(a - b).max())

    attended = layers.dot_product_attention(*(z[None, :, None] for z in (targets, x, y)), scale=1.0)[0, :, 0]
    lifted = targets @ x.T / h**2 - jnp.sum(jnp.square(x), axis=-1) / (2 * h**2)
    gaussian = layers.gaussian_log_kernel(targets, x, h)

    def log_density(z):
        return jax.nn.logsumexp(-jnp.sum(jnp.square(z - x), axis=-1) / (2 * h**2))

    moved = layers.mean_shift(targets, x, h) - targets
    heights = [jax.vmap(log_density)(targets)]
    walk = targets
    for _ in range(30):
        walk = layers.mean_shift(walk, x, h)
        heights.append(jax.vmap(log_density)(walk))
    rules = takagi_sugeno(gaussian, targets, jnp.zeros_like(x), y[:, 0])
    return [
        Check(
            "attention is a local mean under the kernel exp(q.k): largest difference",
            gap(layers.local_mean(targets @ x.T, y), attended), 0.0, 1e-6,
        ),
        Check(
            "the Gaussian local mean is attention with lifted keys",
            gap(layers.local_mean(gaussian, y), jax.nn.softmax(lifted, axis=-1) @ y), 0.0, 1e-12,
        ),
        Check(
            "mean shift goes h^2 grad log p: largest difference",
            gap(moved, h**2 * jax.vmap(jax.grad(log_density))(targets)), 0.0, 1e-8,
        ),
        Check(
            "mean shift climbs: smallest rise of log p in 30 steps",
            jnp.diff(jnp.array(heights), axis=0).min(), -1e-12,
        ),
        Check(
            "rules with constant consequents are a local mean",
            gap(rules, layers.local_mean(gaussian, y)[:, 0]), 0.0, 1e-12,
        ),
    ]  # fmt: skip


def _memories(key: jax.Array) -> list[Check]:
    keys = jax.random.split(key, 2)
    patterns = jax.random.rademacher(keys[0], (8, 64), dtype=float)
    places = jnp.argsort(jax.random.uniform(keys[1], patterns.shape), axis=-1)
    shares = (0.1, 0.2, 0.3)

    def turned(share):
        return jnp.where(places < share * patterns.shape[1], -patterns, patterns)

    state = turned(shares[-1])

    def energy(x, beta):
        return jnp.sum(jnp.square(x), axis=-1) / 2 - jax.nn.logsumexp(beta * x @ patterns.T, axis=-1) / beta

    rises, walk = [], state
    for _ in range(10):
        after = layers.hopfield_retrieve(walk, patterns, 0.1)
        rises.append(jnp.max(energy(after, 0.1) - energy(walk, 0.1)))
        walk = after
    found = [jnp.sign(layers.hopfield_retrieve(turned(share), patterns, 1.0, steps=3)) for share in shares]
    right = [jnp.mean(jnp.all(signs == patterns, axis=-1)) for signs in found]
    hard = layers.hopfield_retrieve(state, patterns, 1e4)
    nearest = patterns[jnp.argmax(state @ patterns.T, axis=-1)]
    return [
        Check("a Hopfield step never raises the energy: largest rise", jnp.max(jnp.array(rises)), high=1e-10),
        Check("patterns found again", right, 1.0, 1.0, 1.0, over=("share turned over", shares)),
        Check("without temperature a step gives the nearest pattern", jnp.abs(hard - nearest).max(), 0.0, 1e-9),
    ]


def _denoiser(c: Config, key: jax.Array) -> Check:
    """The mean of clean points whose noisy copies fell near z, over a million pairs, against the local mean at z."""
    keys = jax.random.split(key, 3)
    x, noise, near = jax.random.normal(keys[0], (5, 2)), 0.7, 0.1
    clean = x[jax.random.randint(keys[1], (c.pairs,), 0, len(x))]
    noisy = clean + noise * jax.random.normal(keys[2], clean.shape)
    targets = jnp.stack(jnp.meshgrid(*[jnp.linspace(-0.6, 0.6, 4)] * 2), axis=-1).reshape(-1, 2)

    @jax.jit
    def observed(z):
        there = jnp.sum(jnp.square(noisy - z), axis=-1) < near**2
        return there @ clean / jnp.sum(there)

    found = jax.lax.map(observed, targets)
    best = layers.local_mean(layers.gaussian_log_kernel(targets, x, noise), x)
    error = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(found - best), -1)) / jnp.mean(jnp.sum(jnp.square(x), -1)))
    return Check("the best denoiser is a local mean: relative error over a million pairs", error, 0.0, 0.02)


def _fits(c: Config, key: jax.Array) -> list[Check]:
    keys = jax.random.split(key, 5)
    x = jax.random.uniform(keys[0], (c.points, 2), minval=-1.0)
    slope = jnp.array([[1.0], [-2.0]])
    y = x @ slope + 0.5
    targets = jnp.concatenate([x[:5], jnp.array([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])])
    kernels = {
        "Gaussian": layers.gaussian_log_kernel(targets, x, 0.4),
        "Epanechnikov": layers.epanechnikov_log_kernel(targets, x, 1.5),
        "nearest": layers.nearest_log_kernel(targets, x, neighbors=10),
    }
    exact = targets @ slope + 0.5
    linear = [layers.local_linear_regression(k, targets, x, y, ridge=1e-12) for k in kernels.values()]
    border = [jnp.abs(layers.local_mean(k, y) - exact)[5:7].max() for k in kernels.values()]

    rough = jnp.sin(3 * x[:, :1]) + 0.1 * jax.random.normal(keys[1], (c.points, 1))
    design = jnp.concatenate([jnp.ones((c.points, 1)), x], axis=-1)
    globally = jnp.concatenate([jnp.ones((len(targets), 1)), targets], axis=-1) @ jnp.linalg.lstsq(design, rough)[0]
    wide = layers.local_linear_regression(layers.gaussian_log_kernel(targets, x, 1e5), targets, x, rough, ridge=1e-12)
    narrow = layers.local_mean(layers.gaussian_log_kernel(targets, x, 1e-3), rough)
    closest = rough[jnp.argmin(jnp.sum(jnp.square(targets[:, None] - x), -1), axis=1)]

    def features(point):
        return jnp.concatenate([jnp.ones(1), point])

    losses = {
        "constant": (lambda t, x, y: jnp.square(t[0] - y[0]), 1, rough),
        "linear": (lambda t, x, y: jnp.square(t @ features(x) - y[0]), 3, rough),
        "ridge": (lambda t, x, y: jnp.square(t @ features(x) - y[0]) + 0.1 * t @ t, 3, rough),
        "logistic": (
            lambda t, x, y: jax.nn.softplus(t @ features(x)) - y[0] * (t @ features(x)) + 0.01 * t @ t,
            3, (rough > 0).astype(float),
        ),
    }  # fmt: skip
    gradients = []
    for loss, size, value in losses.values():
        kernel = kernels["Gaussian"][5]
        theta = local_fit(loss, kernel, x, value, jnp.zeros(size))
        slopes = jax.vmap(jax.grad(loss), (None, 0, 0))(theta, x, value)
        gradients.append(jnp.abs(jax.nn.softmax(kernel) @ slopes).max())

    dense = jnp.linspace(0.0, 1.0, 200)[:, None]
    wave = jnp.sin(12 * dense) + 0.3 * jax.random.normal(keys[2], dense.shape)
    h = best_bandwidth(dense, wave, 0.3)

    def error(h):
        return jnp.mean(
            jnp.square(layers.local_mean(layers.gaussian_log_kernel(dense, dense, h), wave) - jnp.sin(12 * dense))
        )

    return [
        Check(
            "local linear fits reproduce a linear function, under Gaussian, Epanechnikov and nearest-10 kernels",
            [jnp.abs(fit - exact).max() for fit in linear], 0.0, 1e-6,
        ),
        Check("local means do not, at the border: their errors", border, 0.05),
        Check("an infinite bandwidth gives the global fit", jnp.abs(wide - globally).max(), 0.0, 1e-6),
        Check("a vanishing one the nearest neighbour", jnp.abs(narrow - closest).max(), 0.0, 1e-9),
        Check(
            "the local risk is stationary: gradients of constant, linear, ridge and logistic fits",
            gradients, 0.0, 1e-6,
        ),
        Check(
            "the bandwidth chosen by leaving one out beats half and twice it: ratios of true errors",
            [error(h / 2) / error(h), error(2 * h) / error(h)], 1.0,
        ),
    ]  # fmt: skip


def _moons(key: jax.Array, count: int) -> tuple[Float[Array, "N 2"], Int[Array, " N"]]:
    angle = jnp.pi * jnp.linspace(0.0, 1.0, count // 2)
    upper = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    lower = jnp.stack([1 - jnp.cos(angle), 0.5 - jnp.sin(angle)], axis=-1)
    points = jnp.concatenate([upper, lower])
    return points + 0.05 * jax.random.normal(key, points.shape), jnp.repeat(jnp.arange(2), count // 2)


def _shapes(c: Config, key: jax.Array) -> tuple[list[Check], np.ndarray, np.ndarray]:
    keys = jax.random.split(key, 4)
    points, moon = _moons(keys[0], c.moons)
    ends = layers.mean_shift(points, points, c.moons_bandwidth, steps=400)
    modes = np.unique(np.round(np.asarray(ends), 2), axis=0)

    turn = 1.5 * jnp.pi * (1 + 2 * jax.random.uniform(keys[1], (c.roll,)))
    height = 10 * jax.random.uniform(keys[2], (c.roll,))
    roll = jnp.stack([turn * jnp.cos(turn), height, turn * jnp.sin(turn)], axis=-1)
    flat = locally_linear_embedding(roll, neighbors=12, dimension=2)
    # The length of the spiral up to each point, against the best linear reading of the two coordinates.
    arc = (turn * jnp.sqrt(1 + turn**2) + jnp.arcsinh(turn)) / 2
    design = jnp.concatenate([jnp.ones((c.roll, 1)), flat], axis=-1)
    fitted = design @ jnp.linalg.lstsq(design, arc)[0]

    noisy = jnp.where(jax.random.uniform(keys[3], moon.shape) < 0.2, 1 - moon, moon)
    start = jax.nn.one_hot(noisy, 2) * 0.6 + 0.2
    kernel = layers.gaussian_log_kernel(points, points, 0.15)
    settled = relaxation_labelling(start, kernel, jnp.array([[0.9, 0.1], [0.1, 0.9]]), steps=20)
    return [
        Check(f"two moons: modes that mean shift finds at h = {c.moons_bandwidth}", len(modes), 2, 2, 2),
        Check(
            "Swiss roll: correlation of the embedding with the length along it",
            jnp.corrcoef(fitted, arc)[0, 1], 0.9,
        ),
        Check(
            "relaxation labelling: labels that are right, of which a fifth were wrong",
            jnp.mean(jnp.argmax(settled, -1) == moon), 0.97,
        ),
    ], np.asarray(points), np.asarray(ends)  # fmt: skip


def _copying(c: Config, key: jax.Array) -> list[Check]:
    """A string, a mark, the string again: symbols of the second half predicted, in float32 like any training."""
    model = LocalTransformer(vocabulary=c.alphabet + 1, length=2 * c.copied)
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, c.copy_steps))

    def draw(key, count=64):
        string = jax.random.randint(key, (count, c.copied), 0, c.alphabet)
        mark = jnp.full((count, 1), c.alphabet)
        return jnp.concatenate([string, mark, string[:, :-1]], axis=-1), string

    def logits(params, inputs):
        return model.apply(params, inputs)[:, c.copied :]

    @jax.jit
    def train(params, key):
        def objective(params, key):
            inputs, string = draw(key)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), string))

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params, key), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, c.copy_steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    keys = jax.random.split(key, 4)
    with jax.enable_x64(False):
        params = train(model.init(keys[0], draw(keys[1])[0]), keys[1])
        inputs, string = draw(keys[2], 256)
        right = float(jnp.mean(jnp.argmax(logits(params, inputs), -1) == string))
        x = jax.random.normal(keys[3], (4, 3, model.d_model))
        out, variables = Memory(model.memory_size, "softmax").init_with_output(keys[0], x)
        directions = jax.random.normal(keys[1], (model.d_model, 1000))
        outside = jnp.max(out @ directions - jnp.max(variables["params"]["values"] @ directions, axis=0))
    return [
        Check("a transformer of local means copies: symbols that are right", right, 0.99),
        Check("a softmax memory answers within the hull of its values: how far outside", float(outside), high=0.0),
    ]


def run(config: Config, key: jax.Array) -> Findings:
    """The identities, the denoiser, local fits, shapes of data, and the hierarchy that is a transformer."""
    keys = jax.random.split(key, 6)
    shapes, points, ends = _shapes(config, keys[4])
    checks = (
        *_identities(config, keys[0]),
        *_memories(keys[1]),
        _denoiser(config, keys[2]),
        *_fits(config, keys[3]),
        *shapes,
        *_copying(config, keys[5]),
    )
    return Findings(checks, partial(_picture, points, ends))


def _picture(points: np.ndarray, ends: np.ndarray) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.stack([points, ends]).transpose(2, 0, 1), color="0.85", linewidth=0.7)
    axes.scatter(*points.T, s=8, label="points")
    axes.scatter(*ends.T, s=30, marker="x", label="where mean shift takes them")
    axes.set_aspect("equal")
    axes.legend()
    return figure


PAPER = Paper(slug="localization", demo=Demo(run, configs={"tiny": Config()}))
