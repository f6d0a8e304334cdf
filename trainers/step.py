"""The jitted functions of training: initialise, run many steps, evaluate; all data stays on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trainers.sharding import DEFAULT_RULES, Rule, batch_sharding, replicated, tree_shardings
from zoo.paper import Paper
from zoo.tasks.task import Batch

__all__ = ["Program", "Split", "TrainState", "make_program"]


class Split(Protocol):
    """Examples on the device: a pytree of arrays from which a batch is gathered inside the jitted step."""

    def __len__(self) -> int: ...
    def batch(self, indices: jax.Array) -> Batch: ...


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step. Keys and data order are functions of (seed, step), so they need no state."""

    step: jax.Array
    params: Any
    collections: Any  # Flax collections other than parameters, e.g. running statistics
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, **self.collections}


@dataclass(frozen=True)
class Program:
    """The compiled functions of one run.

    `init()`; `run(state, split, order, first, count)` takes `count` steps over the examples
    `order[first * batch_size :]` and gives (state, losses and other scalars of each step, padded to the maximum count);
    `evaluate(variables, split)` sums each metric and baseline over a split; `predict(variables, split, indices)`.
    """

    init: Callable[..., TrainState]
    run: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]
    predict: Callable[..., tuple[Batch, Any]]
    state_shapes: Any
    state_shardings: Any


def make_program(
    paper: Paper,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    batch_size: int,
    max_steps: int,
    eval_batch_size: int,
    precision: str = "float32",
    rules: tuple[Rule, ...] = DEFAULT_RULES,
) -> Program:
    """Builds the functions for one model on one mesh; nothing is compiled before its first call."""
    low = jnp.bfloat16 if precision == "bfloat16" else None
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    eval_batch_size = -(-eval_batch_size // replicas) * replicas

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(low) if low and a.dtype == jnp.float32 else a, tree)

    def spread(batch: Batch) -> Batch:
        return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))

    def init() -> TrainState:
        example = paper.example(model.config, batch_size=1, key=init_key)
        variables = model.init({"params": init_key, "dropout": init_key}, example)
        params = variables.pop("params")
        variables.pop("intermediates", None)
        return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params))

    state_shapes = jax.eval_shape(init)
    state_shardings = tree_shardings(state_shapes, mesh, rules)

    def one_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        dropout = jax.random.fold_in(dropout_key, state.step)

        def loss_fn(params):
            variables = cast({"params": params}) | state.collections
            outputs, updated = model.apply(
                variables, cast(batch), train=True, rngs={"dropout": dropout}, mutable=list(state.collections)
            )
            loss, extra = paper.compute_loss(outputs, batch)
            return loss.astype(jnp.float32), (extra, updated)

        (loss, (extra, updated)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        scalars = {"loss": loss, "grad_norm": optax.global_norm(gradients), **extra}
        return TrainState(state.step + 1, params, dict(updated), opt_state), scalars

    @partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))
    def run(state: TrainState, split: Split, order: jax.Array, first: jax.Array, count: jax.Array):
        def gather(i):
            return spread(split.batch(jax.lax.dynamic_slice(order, ((first + i) * batch_size,), (batch_size,))))

        shapes = jax.eval_shape(lambda s: one_step(s, gather(0))[1], state)
        history = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes)

        def body(i, carry):
            state, history = carry
            state, scalars = one_step(state, gather(i))
            return state, jax.tree.map(lambda h, s: h.at[i].set(s), history, scalars)

        # A trip count that is an argument: any number of steps up to the maximum runs the same compiled code, which
        # is also why a resumed run repeats the bits of an uninterrupted one.
        return jax.lax.fori_loop(0, count, body, (state, history))

    def apply(variables, batch):
        params = cast({"params": variables["params"]}) | {k: v for k, v in variables.items() if k != "params"}
        return model.apply(params, cast(batch), train=False)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def evaluate(variables: Any, split: Split) -> dict[str, jax.Array]:
        total = len(split)

        def measure(i):
            indices = i * eval_batch_size + jnp.arange(eval_batch_size)
            weight = indices < total  # the last batch is filled up with repetitions that count nothing
            batch = spread(split.batch(jnp.minimum(indices, total - 1)))
            results = paper.task.metrics(apply(variables, batch), batch)
            for name, baseline in paper.task.baselines.items():
                scores = paper.task.metrics(baseline(batch), batch)
                results |= {f"{name}/{metric}": score for metric, score in scores.items()}
            return {name: jnp.sum(jnp.where(weight, value, 0.0)) for name, value in results.items()}

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(measure, 0))
        rounds = -(-total // eval_batch_size)
        sums = jax.lax.fori_loop(0, rounds, lambda i, acc: jax.tree.map(jnp.add, acc, measure(i)), zeros)
        return {name: value / total for name, value in sums.items()}

    @partial(jax.jit, out_shardings=replicated(mesh))
    def predict(variables: Any, split: Split, indices: jax.Array) -> tuple[Batch, Any]:
        batch = split.batch(indices)
        return batch, apply(variables, batch)

    return Program(
        init=jax.jit(init, out_shardings=state_shardings),
        run=run,
        evaluate=evaluate,
        predict=predict,
        state_shapes=state_shapes,
        state_shardings=state_shardings,
    )
