"""Classical learners on fixed features: full-batch, deterministic, and their fit is a function of weights of examples.

A weight of 0 leaves an example out, so that folds of one data set are one compiled program: `jax.lax.map` over weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

__all__ = ["LEARNERS", "fit", "minimize", "random_fourier_features", "standardize"]

Predict = Callable[[Float[Array, "M F"]], Float[Array, "M K"]]


def standardize(
    x: Float[Array, "N F"], weight: Float[Array, " N"], *, epsilon: float = 1e-8
) -> Callable[[Float[Array, "M F"]], Float[Array, "M F"]]:
    """(x - mean) / (std + epsilon) with the statistics of the examples that count."""
    share = weight / jnp.sum(weight)
    mean = share @ x
    scale = jnp.sqrt(share @ jnp.square(x - mean)) + epsilon
    return lambda other: (other - mean) / scale


def minimize(objective: Callable, start, *, steps: int):
    """The parameters after `steps` steps of L-BFGS."""
    optimizer = optax.lbfgs()
    evaluate = optax.value_and_grad_from_state(objective)

    def step(_, carry):
        params, state = carry
        value, gradient = evaluate(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]


def random_fourier_features(
    key: Key[Array, ""], size: int, *, count: int = 1024, gamma: float | None = None
) -> Callable[[Float[Array, "M F"]], Float[Array, "M G"]]:
    """z with z(a).z(b) ~ exp(-gamma |a - b|^2): sqrt(2 / G) cos(W x + b), `gamma` 1 / F by default.

    Source: Rahimi and Recht 2007.
    """
    gamma = 1.0 / size if gamma is None else gamma
    waves, shifts = jax.random.split(key)
    frequencies = jnp.sqrt(2.0 * gamma) * jax.random.normal(waves, (size, count))
    phases = jax.random.uniform(shifts, (count,), maxval=2 * jnp.pi)
    return lambda x: jnp.sqrt(2.0 / count) * jnp.cos(x @ frequencies + phases)


def _affine(params, x):
    return x @ params["kernel"] + params["bias"]


def _linear(x, weight, error, strength, classes, steps) -> Predict:
    """Minimises mean error + |W|^2 / (2 strength N), the weight of the data in scikit-learn's C."""
    start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    total = jnp.sum(weight)

    def objective(params):
        fits = jnp.sum(weight * error(_affine(params, x))) / total
        return fits + jnp.sum(jnp.square(params["kernel"])) / (2 * strength * total)

    params = minimize(objective, start, steps=steps)
    return lambda other: _affine(params, other)


def _logistic(x, label, weight, classes, strength, steps, key) -> Predict:
    def error(logits):
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, label[:, None], axis=-1)[:, 0]

    return _linear(x, weight, error, strength, classes, steps)


def _svm(x, label, weight, classes, strength, steps, key) -> Predict:
    """Each class against the rest, with the squared hinge."""
    side = 2.0 * jax.nn.one_hot(label, classes) - 1.0

    def error(scores):
        return jnp.sum(jnp.square(jax.nn.relu(1.0 - side * scores)), axis=-1)

    return _linear(x, weight, error, strength, classes, steps)


def _rbf_svm(x, label, weight, classes, strength, steps, key) -> Predict:
    lift = random_fourier_features(key, x.shape[1])
    fitted = _svm(lift(x), label, weight, classes, strength, steps, key)
    return lambda other: fitted(lift(other))


def _neighbors(x, label, weight, classes, strength, steps, key, count=15) -> Predict:
    """Logarithm of each class's share among the nearest examples, each class seen half a time more."""

    def predict(other):
        squared = jnp.sum(jnp.square(other), axis=1)[:, None] + jnp.sum(jnp.square(x), axis=1) - 2 * other @ x.T
        nearest = jax.lax.top_k(-jnp.where(weight > 0, squared, jnp.inf), min(count, x.shape[0]))[1]
        votes = jnp.sum(jax.nn.one_hot(label[nearest], classes) * weight[nearest][..., None], axis=1) + 0.5
        return jnp.log(votes / jnp.sum(votes, axis=-1, keepdims=True))

    return predict


def _mlp(x, label, weight, classes, strength, steps, key, hidden=64) -> Predict:
    keys = jax.random.split(key)
    layers = [(x.shape[1], hidden), (hidden, classes)]
    start = [
        {"kernel": jax.random.normal(k, size) * (2.0 / size[0]) ** 0.5, "bias": jnp.zeros(size[1])}
        for k, size in zip(keys, layers, strict=True)
    ]

    def network(params, x):
        return _affine(params[1], jax.nn.relu(_affine(params[0], x)))

    def objective(params):
        logits = network(params, x)
        errors = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, label[:, None], axis=-1)[:, 0]
        decay = sum(jnp.sum(jnp.square(layer["kernel"])) for layer in params)
        return (jnp.sum(weight * errors) + decay / (2 * strength)) / jnp.sum(weight)

    params = minimize(objective, start, steps=steps)
    return lambda other: network(params, other)


LEARNERS = {
    "logistic": _logistic,
    "linear_svm": _svm,
    "rbf_svm": _rbf_svm,
    "nearest_neighbors": _neighbors,
    "mlp": _mlp,
}


def fit(
    learner: str,
    x: Float[Array, "N F"],
    label: Int[Array, " N"],
    *,
    num_classes: int,
    weight: Float[Array, " N"] | None = None,
    strength: float | Float[Array, ""] = 1.0,
    steps: int = 100,
    key: Key[Array, ""] | None = None,
) -> Predict:
    """The fitted learner, as a function from features to logits or scores; features are standardised on the way.

    `strength` is what scikit-learn calls C: small values regularise more (not the neighbours, who have none). `weight`
    is 0 for examples that do not take part. `key` draws the random features of rbf_svm and the first weights of mlp.
    """
    if learner not in LEARNERS:
        raise ValueError(f"learner {learner!r} is not one of {', '.join(LEARNERS)}")
    weight = jnp.ones(x.shape[0]) if weight is None else weight
    scale = standardize(x, weight)
    key = jax.random.key(0) if key is None else key
    fitted = LEARNERS[learner](scale(x), label, weight, num_classes, strength, steps, key)
    return lambda other: fitted(scale(other))
