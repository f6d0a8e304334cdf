"""From a recipe's optimiser settings to an optax transformation."""

import jax.numpy as jnp
import optax

from trainers.recipe import Optimizer

__all__ = ["learning_rate", "make_optimizer"]


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
        }[o.schedule]
        warmup = jnp.minimum((step + 1) / max(o.warmup_steps, 1), 1.0) if o.warmup_steps else 1.0
        return o.learning_rate * warmup * factor

    return schedule


def make_optimizer(o: Optimizer, *, total_steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
    rate = learning_rate(o, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    update = {
        "adam": lambda: optax.adam(rate, b1=o.b1, b2=o.b2, eps=o.epsilon),
        "adamw": lambda: optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.epsilon, weight_decay=o.weight_decay),
        "sgd": lambda: optax.sgd(rate, momentum=o.b1 or None),
        "lion": lambda: optax.lion(rate, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay),
        "adafactor": lambda: optax.adafactor(rate),
    }[o.name]()
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), update) if o.clip_norm else update
