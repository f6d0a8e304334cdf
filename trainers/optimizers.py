"""From a recipe's optimiser settings to an optax transformation."""

import dataclasses
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainers.recipe import Optimizer
from zoo.errors import UserError
from zoo.systems.fedfrozen import Settings as Federation
from zoo.systems.fedfrozen import fed_frozen
from zoo.systems.metaadamw import SETTINGS, meta_adamw

__all__ = ["averaged", "learning_rate", "make_optimizer"]


def learning_rate(o: Optimizer, *, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step (0 = first)."""
    total_epochs = max(total_steps / steps_per_epoch, 1.0)

    def schedule(step):
        after = jnp.maximum(step - o.warmup_steps, 0)
        epoch = after // steps_per_epoch
        factor = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(after / max(total_steps - o.warmup_steps, 1), 1.0))),
            "cosine_per_epoch": 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(epoch / total_epochs, 1.0))),
            "halve_per_epoch": 0.5 ** jnp.maximum(epoch - 1, 0),
            "tenth_in_last_fifth": jnp.where(5 * step >= 4 * total_steps, 0.1, 1.0),
            "one_cycle": _one_cycle(step, total_steps),
        }[o.schedule]
        warmup = jnp.minimum((step + 1) / max(o.warmup_steps, 1), 1.0) if o.warmup_steps else 1.0
        return o.learning_rate * warmup * factor

    return schedule


def _one_cycle(step, total_steps: int):
    """torch's OneCycleLR with pct_start 0.4: between its three values along half periods of a cosine."""
    top, last = 0.4 * total_steps - 1, max(total_steps - 1, 1)
    rise = jnp.clip(step / max(top, 1e-9), 0.0, 1.0)
    fall = jnp.clip((step - top) / max(last - top, 1e-9), 0.0, 1.0)
    up = 1.0 - (1.0 - 1 / 25) * 0.5 * (1 + jnp.cos(jnp.pi * rise))
    down = 0.5 * (1 + jnp.cos(jnp.pi * fall)) * (1 - 1 / 250_000) + 1 / 250_000
    return jnp.where(step <= top, up, down)


def make_optimizer(o: Optimizer, *, total_steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """The transformation of these settings; with `average_decay` its state holds the averaged weights too."""
    rate = learning_rate(o, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    no_decay = _pattern("no-decay", o.no_decay)
    rates = [(_pattern("rates", pattern), factor) for pattern, factor in o.rates.items()]
    if o.average_decay is not None and not 0 < o.average_decay < 1:
        raise UserError(f"--optimizer.average-decay must lie between 0 and 1, not {o.average_decay}")

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not no_decay.search(jax.tree_util.keystr(path, simple=True, separator="/")), params
        )

    decay = {"weight_decay": o.weight_decay}
    update = {
        "adam": lambda: optax.adam(rate, b1=o.b1, b2=o.b2, eps=o.epsilon),
        "adamw": lambda: optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.epsilon, mask=decayed, **decay),
        "sgd": lambda: optax.sgd(rate, momentum=o.b1 or None),
        "lion": lambda: optax.lion(rate, b1=o.b1, b2=o.b2, mask=decayed, **decay),
        "adafactor": lambda: optax.adafactor(rate),
        "muon": lambda: optax.contrib.muon(
            rate, beta=o.b1, adam_b1=o.b1, adam_b2=o.b2, weight_decay_mask=decayed, adam_weight_decay=o.weight_decay,
            **decay,
        ),
        "meta_adamw": lambda: meta_adamw(
            rate, b1=o.b1, b2=o.b2, epsilon=o.epsilon, settings=dataclasses.replace(
                SETTINGS[o.meta], total_steps=total_steps, meta_after=steps_per_epoch
            ), weight_decay=lambda params: jax.tree.map(lambda d: d * o.weight_decay, decayed(params)),
        ),
        "fed_frozen": lambda: fed_frozen(
            Federation(o.warmup_rounds, learning_rate=o.learning_rate, **decay), local_steps=o.local_steps
        ),
    }[o.name]()  # fmt: skip
    steps = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    steps.append(update)
    if rates:
        steps.append(optax.stateless(partial(_at_rates, rates)))
    if o.average_decay is not None:
        steps.append(_average(o.average_decay))
    return optax.chain(*steps) if len(steps) > 1 else update


def _pattern(option: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"--optimizer.{option} {text!r} is not a regular expression: {error}") from error


def _at_rates(rates: list[tuple[re.Pattern[str], float]], updates: Any, params: Any) -> Any:
    def one(path, update):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return update * next((factor for pattern, factor in rates if pattern.search(name)), 1.0)

    return jax.tree_util.tree_map_with_path(one, updates)


class _Average(NamedTuple):
    count: jax.Array
    average: Any


def _average(decay: float) -> optax.GradientTransformation:
    """Keeps the moving average of the weights after each step; young averages follow faster, so that they forget the
    initial weights."""

    def update(updates, state, params):
        count = state.count + 1
        rate = jnp.minimum(decay, count / (count + 9))
        after = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, state.average, after)
        return updates, _Average(count, average)

    return optax.GradientTransformation(lambda params: _Average(jnp.zeros((), jnp.int32), params), update)


def averaged(opt_state: Any) -> Any | None:
    """The averaged weights in an optimiser's state, or None where it keeps none."""
    found = [
        leaf.average
        for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, _Average))
        if isinstance(leaf, _Average)
    ]
    return found[0] if found else None
