"""FedFrozen: federated training whose attention kernel is learned first and then frozen (arXiv:2605.06446).

No official code; nothing but the abstract's algorithm and statements is known. Fidelity: reading.
New: queries and keys decide who attends to whom, values what is carried over. Clients whose data differ pull the first
apart; so after some rounds of ordinary federated averaging, queries and keys are frozen everywhere, and the rest goes
on. For linear attention the rest is then a strongly convex problem, and the first stage is inexact descent on what is
left when the values are eliminated.
Ours, where the paper's text is not at hand: everything but queries and keys stays trainable in the second stage
(`frozen="value"` and `"all_but_value"` are the controls), the constants of the theory's model, and all sizes.

`federate` runs both stages on any model and any clients, by the plain, proximal or variance-reduced rule;
`fed_frozen(...)` is the same, with plain clients, as an optax transformation for the trainer, one round a step; `demo`
computes the theory's claims. The model of this module is a small vision transformer, which the recipes train.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

import layers
from zoo.blocks import Linear, MultiHeadAttention, stack
from zoo.demo import Check, Demo, Findings
from zoo.errors import UserError
from zoo.paper import Paper
from zoo.tasks import classification
from zoo.tasks.task import Batch

Frozen = Literal["query_key", "value", "all_but_value", "nothing"]
_FROZEN = {  # of a parameter's path: does the second stage leave it alone?
    "query_key": re.compile(r"(^|/)(query|key)(/|$)"),
    "value": re.compile(r"(^|/)(value|out)(/|$)"),
    "all_but_value": re.compile(r"^(?!(.*/)?(value|out)(/|$))"),
    "nothing": re.compile(r"(?!)"),
}


# --- the algorithm ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of federated training; a round is one exchange with the server."""

    warmup_rounds: int = 10  # R_w, of the first stage
    frozen: Frozen = "query_key"  # in the second stage
    learning_rate: float | Float[Array, ""] = 0.05  # gamma, of the clients' gradient descent
    weight_decay: float = 1e-4  # added to the gradient, as in plain gradient descent
    proximal: float = 0.0  # FedProx: its mu, the pull towards the server's weights
    variance_reduced: bool = False  # SCAFFOLD: clients correct their gradients by what they know of the others'


def is_frozen(path: str, settings: Settings) -> bool:
    """Whether the second stage leaves the parameter of this path alone."""
    return bool(_FROZEN[settings.frozen].search(path))


def split_message(params: Any, settings: Settings, *, stage: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what clients train and send, what stays as it is) in a stage, 1 or 2, by path."""
    flat = flatten_dict(params, sep="/")
    kept = {name for name in flat if stage == 2 and is_frozen(name, settings)}
    return {n: v for n, v in flat.items() if n not in kept}, {n: flat[n] for n in kept}


class Controls(NamedTuple):
    """Of the variance-reduced rule, by path: each client's mean gradient (N, ...) and the server's."""

    clients: dict[str, Array]
    server: dict[str, Array]


def start_controls(params: Any, num_clients: int) -> Controls:
    """All 0."""
    flat = flatten_dict(params, sep="/")
    zeros = {name: jnp.zeros((num_clients, *value.shape), value.dtype) for name, value in flat.items()}
    return Controls(zeros, {name: jnp.zeros_like(value) for name, value in flat.items()})


def local_training(
    loss: Callable[[Any, Any], Array], moving: dict[str, Array], fixed: dict[str, Array], batches: Any,
    settings: Settings, correction: dict[str, Array] | None = None,
) -> dict[str, Array]:  # fmt: skip
    """A client's trained parameters after a step of gradient descent on each of its `batches` (a leading axis of K)."""
    start = moving

    def step(moving, batch):
        gradients = jax.grad(lambda moving: loss(unflatten_dict({**moving, **fixed}, sep="/"), batch))(moving)

        def one(name, value):
            gradient = gradients[name] + settings.weight_decay * value + settings.proximal * (value - start[name])
            return value - settings.learning_rate * (gradient + (correction[name] if correction else 0.0))

        return {name: one(name, value) for name, value in moving.items()}, None

    return jax.lax.scan(step, moving, batches)[0]


def federated_round(
    loss: Callable[[Any, Any], Array], params: Any, batches: Any, weights: Float[Array, " S"], settings: Settings,
    *, stage: int, controls: Controls | None = None, chosen: Array | None = None,
) -> tuple[Any, Controls | None]:  # fmt: skip
    """The server's parameters after S clients trained on their `batches` (leading axes S and K): sum w_n theta_n.

    With `controls` (the variance-reduced rule) `chosen` are the numbers of the clients. Traceable; `stage` is static.
    """
    moving, fixed = split_message(params, settings, stage=stage)
    if controls is None:
        train = partial(local_training, loss, moving, fixed, settings=settings)
        after = jax.vmap(lambda batches: train(batches))(batches)
    else:
        own = {name: controls.clients[name][chosen] for name in moving}
        correction = {name: controls.server[name] - own[name] for name in moving}
        after = jax.vmap(lambda batches, c: local_training(loss, moving, fixed, batches, settings, c))(
            batches, correction
        )
        steps = jax.tree.leaves(batches)[0].shape[1] * settings.learning_rate
        fresh = {name: -correction[name] + (moving[name] - after[name]) / steps for name in moving}
        count = len(next(iter(controls.clients.values())))
        server = {n: controls.server[n] + jnp.sum(fresh[n] - own[n], axis=0) / count for n in moving}
        clients = {name: controls.clients[name].at[chosen].set(fresh[name]) for name in moving}
        controls = Controls(controls.clients | clients, controls.server | server)
    share = weights / jnp.sum(weights)
    averaged = {name: jnp.tensordot(share.astype(value.dtype), value, axes=1) for name, value in after.items()}
    return unflatten_dict({**averaged, **fixed}, sep="/"), controls


class Report(NamedTuple):
    """What a run of `federate` leaves."""

    params: Any
    history: Any  # what `watch` saw after each round, stacked
    sent: tuple[int, int]  # numbers a client sends in a round of each stage


def federate(
    loss: Callable[[Any, Any], Array],
    params: Any,
    draw: Callable[[Array, Array], Any],
    client_weights: Float[Array, " N"],
    settings: Settings,
    *,
    rounds: int,
    sampled: int | None = None,
    watch: Callable[[Any], Any] = lambda params: (),
    key: Array,
) -> Report:
    """R rounds, the first `warmup_rounds` of them on everything.

    `draw(client, key)` gives a client's local batches of a round, with a leading axis of K steps; `client_weights` are
    the clients' numbers of examples, `sampled` how many take part in a round (None: all). Each stage is one program.
    """
    count = len(client_weights)
    if not 0 <= settings.warmup_rounds <= rounds:
        raise UserError(f"warmup_rounds {settings.warmup_rounds} is not between 0 and the {rounds} rounds there are")
    if sampled is not None and not 1 <= sampled <= count:
        raise UserError(f"{sampled} clients cannot be sampled of {count}")

    def one(stage, carry, key):
        params, controls = carry
        which, how = jax.random.split(key)
        chosen = jnp.arange(count) if sampled is None else jax.random.permutation(which, count)[:sampled]
        batches = jax.vmap(draw)(chosen, jax.random.split(how, len(chosen)))
        carry = federated_round(
            loss, params, batches, client_weights[chosen], settings, stage=stage, controls=controls, chosen=chosen
        )
        return carry, watch(carry[0])

    controls = start_controls(params, count) if settings.variance_reduced else None
    keys, carry, seen = jax.random.split(key, rounds), (params, controls), []
    for stage, part in ((1, keys[: settings.warmup_rounds]), (2, keys[settings.warmup_rounds :])):
        carry, found = jax.jit(lambda carry, keys, stage=stage: jax.lax.scan(partial(one, stage), carry, keys))(
            carry, part
        )
        seen.append(found)
    sent = [sum(v.size for v in split_message(params, settings, stage=stage)[0].values()) for stage in (1, 2)]
    return Report(carry[0], jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen), (sent[0], sent[1]))


class RoundState(NamedTuple):
    """Of `fed_frozen`."""

    round: Array


def fed_frozen(settings: Settings, *, local_steps: int = 5) -> optax.GradientTransformationExtraArgs:
    """A round as one step of the trainer: each of the batch's parts is a client's, which trains on it in `local_steps`
    minibatches. A batch's `client_share` (B,), where it has one, weighs the clients."""

    def update(gradients, state, params, *, objective, batches, **_):
        def cut(x):
            size = x.shape[0] // local_steps
            if not size:
                raise UserError(f"a client has {x.shape[0]} examples for {local_steps} local steps: enlarge the batch")
            return x[: size * local_steps].reshape(local_steps, size, *x.shape[1:])

        warm = state.round < settings.warmup_rounds
        clients = jax.tree.map(lambda *parts: jnp.stack(list(map(cut, parts))), *batches)
        flat = flatten_dict(params, sep="/")
        held = {name: is_frozen(name, settings) for name in flat}

        def loss(params, batch):
            # What is frozen has no gradient: nothing moves it, whichever stage it is.
            kept = {
                name: jnp.where(warm, value, jax.lax.stop_gradient(value)) if held[name] else value
                for name, value in flatten_dict(params, sep="/").items()
            }
            return objective(unflatten_dict(kept, sep="/"), batch)

        after = jax.lax.map(lambda batches: local_training(loss, flat, {}, batches, settings), clients)
        share = jnp.ones(len(batches))
        if "client_share" in batches[0]:
            share = jnp.stack([part["client_share"][0] for part in batches])
        share = share / jnp.sum(share)
        move = {name: jnp.tensordot(share, after[name] - value, axes=1) for name, value in flat.items()}
        # Weight decay does not reach it either.
        move = {n: jnp.where(warm, v, jnp.zeros_like(v)) if held[n] else v for n, v in move.items()}
        return unflatten_dict(move, sep="/"), RoundState(state.round + 1)

    return optax.GradientTransformationExtraArgs(lambda params: RoundState(jnp.zeros((), jnp.int32)), update)


# --- the theory: linear attention, whose values can be eliminated ----------------------------------------------------


def features(kernel: Float[Array, "d d"], x: Float[Array, "*B T d"]) -> Float[Array, "*B T d"]:
    """Phi_A(X) = (1/T) X A X' X: what linear attention with the kernel A = W_Q W_K' / sqrt(d) hands to the values."""
    return x @ (kernel @ (jnp.swapaxes(x, -1, -2) @ x)) / x.shape[-2]


def moments(kernel: Array, x: Float[Array, "S T d"], y: Float[Array, "S T m"]) -> tuple[Array, Array, Array]:
    """(G, C, E|Y|^2): E[Phi' Phi], E[Phi' Y] over samples, and the targets' mean square norm."""
    phi = features(kernel, x)
    count = len(x)
    gram, cross = (jnp.einsum("std,ste->de", phi, other) / count for other in (phi, y))
    return gram, cross, jnp.sum(jnp.square(y)) / count


def objective(kernel: Array, value: Array, x: Array, y: Array, *, ridge: float) -> Float[Array, ""]:
    """F(A, V) = 1/2 E |Phi_A V - Y|^2 + mu/2 |V|^2."""
    error = features(kernel, x) @ value - y
    return 0.5 * jnp.sum(jnp.square(error)) / len(x) + 0.5 * ridge * jnp.sum(jnp.square(value))


def best_value(kernel: Array, x: Array, y: Array, *, ridge: float) -> Float[Array, "d m"]:
    """V*(A) = (G + mu I)^-1 C."""
    gram, cross, _ = moments(kernel, x, y)
    return jnp.linalg.solve(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype), cross)


def profile(kernel: Array, x: Array, y: Array, *, ridge: float, kernel_ridge: float = 0.0) -> Float[Array, ""]:
    """J(A) = min_V F(A, V) = 1/2 E|Y|^2 - 1/2 tr(C' (G + mu I)^-1 C), plus nu/2 |A|^2."""
    _, cross, power = moments(kernel, x, y)
    fit = jnp.sum(cross * best_value(kernel, x, y, ridge=ridge))
    return 0.5 * power - 0.5 * fit + 0.5 * kernel_ridge * jnp.sum(jnp.square(kernel))


def kernel_gradient(kernel: Array, value: Array, x: Array, y: Array) -> Float[Array, "d d"]:
    """dF/dA = (1/T) E[X' (Phi V - Y) V' X' X], the gradient of J at V = V*(A)."""
    error = features(kernel, x) @ value - y
    second = jnp.swapaxes(x, -1, -2) @ x
    # Phi = X A S / T with S = X'X symmetric.
    return jnp.einsum("sti,stm,jm,sjk->ik", x, error, value, second) / (len(x) * x.shape[-2])


def averaged_fixed_point(
    grams: Float[Array, "N d d"], crosses: Float[Array, "N d m"], weights: Float[Array, " N"], *,
    ridge: float, steps: int, learning_rate: float | Float[Array, ""],
) -> tuple[Float[Array, "d m"], Float[Array, ""]]:  # fmt: skip
    """(V^fa, contraction): where federated averaging on a frozen kernel ends, and by how much a round brings it nearer.

    Clients take K full-batch steps: V^fa solves sum_n p_n (I - M_n^K) (V - V_n*) = 0 with M_n = I - gamma (G_n + mu I),
    and differs from V*(A) unless K = 1 or all G_n are equal.
    """
    identity = jnp.eye(grams.shape[-1], dtype=grams.dtype)
    curvature = grams + ridge * identity
    powers = jax.vmap(lambda m: jnp.linalg.matrix_power(m, steps))(identity - learning_rate * curvature)
    pull = weights[:, None, None] * (identity - powers)
    ends = jnp.linalg.solve(curvature, crosses)
    point = jnp.linalg.solve(jnp.sum(pull, axis=0), jnp.sum(pull @ ends, axis=0))
    contraction = jnp.max(jnp.abs(jnp.linalg.eigvalsh(jnp.tensordot(weights, powers, axes=1))))
    return point, contraction


@dataclass(frozen=True)
class Simulation:
    """Clients whose inputs and values differ more with `heterogeneity` h, and not at all for 0."""

    width: int = 8  # d
    outputs: int = 4  # m
    length: int = 16  # T
    clients: int = 10  # N
    samples: int = 32  # of each client
    heterogeneity: float = 1.0  # h
    noise: float = 0.1  # of the targets
    ridge: float = 1e-3  # mu
    local_steps: int = 20  # K, of full-batch gradient descent
    learning_rate: float = 0.03
    rounds: int = 40  # R
    warmups: tuple[int, ...] = (0, 8, 16, 28, 40)  # the R_w that are tried
    seeds: int = 5  # simulations that are averaged


def simulate(config: Simulation, key: Array) -> tuple[Float[Array, "N S T d"], Float[Array, "N S T m"]]:
    """Inputs and targets of each client: rows X ~ N(0, (I + h P_n) / (1 + h)), Y = f(X; A, V + h E_n) + noise."""
    c, keys = config, jax.random.split(key, 6)
    d, h = c.width, c.heterogeneity
    kernel = jnp.eye(d) + 0.3 * jax.random.normal(keys[0], (d, d)) / d**0.5
    value = jax.random.normal(keys[1], (d, c.outputs)) / d**0.5
    # The same draws for all clients, so that without heterogeneity their problems are the same one.
    base = jax.random.normal(keys[2], (c.samples, c.length, d)) / d**0.25
    noise = c.noise * jax.random.normal(keys[3], (c.samples, c.length, c.outputs))
    spread = jax.random.normal(keys[4], (c.clients, d, d)) / d**0.5
    # Of the same size on average for every h, so that one learning rate fits all.
    root = jnp.linalg.cholesky((jnp.eye(d) + h * spread @ jnp.swapaxes(spread, 1, 2)) / (1 + h))
    values = value + h * jax.random.normal(keys[5], (c.clients, d, c.outputs)) / d**0.5
    x = jnp.einsum("std,nde->nste", base, jnp.swapaxes(root, 1, 2))
    return x, jax.vmap(lambda x, v: features(kernel, x) @ v + noise)(x, values)


def final_losses(config: Simulation, key: Array) -> Float[Array, " W"]:
    """The clients' mean F after R rounds, for each length of the first stage; the kernel starts far from the true."""
    c = config
    x, y = simulate(c, key)
    weights = jnp.ones(c.clients)
    # |X P - Y|^2 with P = A X'X V / T, from what a sample's inputs and targets amount to.
    second, cross = jnp.einsum("nsti,nstj->nsij", x, x), jnp.einsum("nsti,nstm->nsim", x, y)
    power = jnp.sum(jnp.square(y), axis=(2, 3))

    def loss(params, batch):
        second, cross, power = batch
        kernel, value = params["query"]["kernel"], params["value"]["kernel"]
        p = kernel @ (second @ value) / c.length
        error = jnp.sum(p * (second @ p - 2 * cross), axis=(1, 2)) + power
        return 0.5 * jnp.mean(error) + 0.5 * c.ridge * jnp.sum(jnp.square(value))

    samples = (second, cross, power)
    batches = jax.tree.map(lambda a: jnp.broadcast_to(a[:, None], (len(a), c.local_steps, *a.shape[1:])), samples)
    settings = Settings(learning_rate=c.learning_rate, weight_decay=0.0)

    def one(stage, params):
        return federated_round(loss, params, batches, weights, settings, stage=stage)[0]

    start = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (c.width, c.width)) / c.width**0.5
    params = {"query": {"kernel": start}, "value": {"kernel": jnp.zeros((c.width, c.outputs))}}
    last, before = jax.lax.scan(lambda params, _: (one(1, params), params), params, length=c.rounds)
    first = jax.tree.map(lambda whole, end: jnp.concatenate([whole, end[None]]), before, last)

    def total(warmup):
        params = jax.tree.map(lambda a: a[warmup], first)
        end = jax.lax.fori_loop(0, c.rounds - warmup, lambda _, params: one(2, params), params)
        return jnp.mean(jax.vmap(lambda *batch: loss(end, batch))(*samples))

    return jax.lax.map(total, jnp.asarray(c.warmups))


@partial(jax.jit, static_argnums=0)
def _theory(config: Simulation, key: Array) -> dict[str, Array]:
    """Closed forms, and what they are closed forms of."""
    c, ridge = config, config.ridge
    x, y = simulate(c, key)
    pooled = x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:])
    kernel = jax.random.normal(jax.random.fold_in(key, 2), (c.width, c.width)) / c.width**0.5
    value = best_value(kernel, *pooled, ridge=ridge)
    # Newton's step from anywhere ends at the least value of a quadratic, by autodiff alone.
    away = jax.random.normal(jax.random.fold_in(key, 3), value.shape)
    slope = jax.grad(lambda v: objective(kernel, v, *pooled, ridge=ridge))
    curvature = jax.jacfwd(slope)(away).reshape(value.size, value.size)
    newton = away - jnp.linalg.solve(curvature, slope(away).ravel()).reshape(value.shape)
    exact = jax.grad(lambda a: profile(a, *pooled, ridge=ridge))(kernel)

    grams, crosses, _ = jax.vmap(moments, (None, 0, 0))(kernel, x, y)
    weights = jnp.full(c.clients, 1 / c.clients)
    rate = 1.0 / (jnp.max(jnp.linalg.eigvalsh(grams)) + ridge)
    settings = Settings(learning_rate=rate, weight_decay=0.0)

    def loss(params, batch):
        gram, cross = batch
        v = params["value"]
        return 0.5 * jnp.sum(v * (gram @ v)) - jnp.sum(v * cross) + 0.5 * ridge * jnp.sum(jnp.square(v))

    distances, left = [], []
    for steps in LOCAL_STEPS:
        point, contraction = averaged_fixed_point(grams, crosses, weights, ridge=ridge, steps=steps, learning_rate=rate)
        batches = jax.tree.map(lambda a, k=steps: jnp.stack([a] * k, axis=1), (grams, crosses))

        def one(params, _, batches=batches):
            return federated_round(loss, params, batches, weights, settings, stage=2)[0], None

        after, _ = jax.lax.scan(one, {"value": point + away}, length=_ROUNDS)
        distances.append(jnp.linalg.norm(point - value))
        left.append(jnp.linalg.norm(after["value"] - point) / jnp.linalg.norm(away) / contraction**_ROUNDS)
    return {
        "profile": jnp.abs(profile(kernel, *pooled, ridge=ridge) / objective(kernel, newton, *pooled, ridge=ridge) - 1),
        "envelope": jnp.linalg.norm(kernel_gradient(kernel, value, *pooled) - exact) / jnp.linalg.norm(exact),
        "distances": jnp.stack(distances),
        "left": jnp.stack(left),
    }


LOCAL_STEPS, _ROUNDS = (1, 2, 5), 40  # K of the frozen stage that are compared, and for how many rounds


def _theory_checks(config: Simulation, key: Array) -> list[Check]:
    found = {name: np.asarray(values) for name, values in _theory(config, key).items()}
    return [
        Check("J(A) is the least F(A, V), by one Newton step: relative difference", found["profile"], high=1e-8),
        Check("the gradient of J is that of F at V*(A): relative difference", found["envelope"], high=1e-8),
        Check("on a frozen kernel, averaging nears V^fa by the top eigenvalue a round or more: distance "
              "after 40 rounds over that", found["left"], high=1.0 + 1e-6,
              over=("local steps K", tuple(map(float, LOCAL_STEPS)))),
        Check("V^fa is V*(A) for one local step: distance", found["distances"][0], high=1e-8),
        Check("and is the further from it the more local steps", np.diff(found["distances"]), low=0.0),
    ]  # fmt: skip


def _warmup_checks(config: Simulation, key: Array) -> list[Check]:
    """Mean over seeds of the loss after R rounds for each R_w, relative to its value for R_w = R."""
    curves = []
    for h in (0.0, config.heterogeneity):
        each = jax.jit(jax.vmap(partial(final_losses, replace(config, heterogeneity=h))))
        found = jnp.mean(each(jax.random.split(key, config.seeds)), axis=0)
        curves.append(np.asarray(found / found[-1]))
    alike, unlike = curves
    return [
        Check("alike clients: a longer first stage never harms (largest rise of the loss)",
              np.max(np.diff(alike)), high=1e-6),
        Check("unlike clients: the loss is least for a first stage that is neither absent nor all there is",
              np.min(unlike[1:-1]) / min(unlike[0], unlike[-1]), high=1.0 - 1e-6),
        Check("unlike clients: the loss over that for R_w = R", unlike, low=0.0,
              over=("first stage R_w", tuple(map(float, config.warmups)))),
    ]  # fmt: skip


def demonstrate(config: Simulation, key: Array) -> Findings:
    """The card's claims on linear attention."""
    return Findings((*_theory_checks(config, key), *_warmup_checks(config, jax.random.fold_in(key, 7))))


# --- the model the recipes train --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """A small vision transformer: pre-norm, class token, learned positions, no dropout."""

    image_size: int = 32  # side of a square image
    channels: int = 3
    num_classes: int = 10
    patch: int = 4  # side of a patch
    d_model: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_ratio: int = 4
    layer_norm_epsilon: float = 1e-6
    position_scale: float = 0.02  # deviation of the initial positions; plain descent takes long to enlarge small ones


class TransformerLayer(nn.Module):
    """x = x + Attn(LN(x)); x = x + MLP(LN(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        c = self.config
        normed = nn.LayerNorm(c.layer_norm_epsilon, name="norm1")(x)
        x = x + MultiHeadAttention(c.num_heads, name="attention")(normed, train=train)
        hidden = Linear(c.mlp_ratio * c.d_model, name="mlp_in")(nn.LayerNorm(c.layer_norm_epsilon, name="norm2")(x))
        return x + Linear(c.d_model, name="mlp_out")(layers.gelu(hidden))


class Model(nn.Module):
    """Logits of an image from its class token."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B K"]:
        c, x = self.config, batch["x"]
        if c.image_size % c.patch:
            raise ValueError(f"image_size {c.image_size} is not a multiple of patch {c.patch}")
        tokens = Linear(c.d_model, name="embedding")(layers.patchify(x, c.patch))
        small, far = (nn.initializers.truncated_normal(scale) for scale in (0.02, c.position_scale))
        first = self.param("class_token", small, (1, 1, c.d_model)).astype(tokens.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.d_model)), tokens], axis=1)
        tokens = tokens + self.param("positions", far, (tokens.shape[1], c.d_model))
        tokens = stack(self, partial(TransformerLayer, c), c.num_layers, tokens, train=train)
        return Linear(c.num_classes, name="head")(nn.LayerNorm(c.layer_norm_epsilon, name="norm")(tokens[:, 0]))


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    shape = (config.image_size, config.image_size, config.channels)
    return classification.example(shape=shape, num_classes=config.num_classes, batch_size=batch_size, key=key)


_TINY = Config(image_size=16, channels=1, d_model=32, num_layers=2, num_heads=2)

PAPER = Paper(
    slug="fedfrozen",
    task=classification.TASK,
    model=Model,
    example=example,
    demo=Demo(
        demonstrate,
        {"tiny": Simulation(clients=6, samples=8), "card": Simulation()},
    ),
    configs={
        "tiny": _TINY,
        "digits": replace(_TINY, image_size=8, patch=2, position_scale=0.5),
        "cifar10": Config(),
    },
)
