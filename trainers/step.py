"""The jitted functions of training: initialise, run many steps, evaluate; all data stays on the device."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainers.optimizers import averaged, make_optimizer
from trainers.recipe import Recipe
from trainers.sharding import DEFAULT_RULES, Rule, batch_sharding, recipe_rules, replicated, tree_shardings
from zoo.blocks import Execution, execution
from zoo.errors import UserError
from zoo.paper import Paper
from zoo.tasks.task import Batch, Task

__all__ = ["Program", "Split", "TrainState", "make_program", "recipe_program"]


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
        """What is evaluated and kept: the averaged weights if the optimiser averages, else those being trained."""
        average = averaged(self.opt_state)
        return {"params": self.params if average is None else average, **self.collections}


@dataclass(frozen=True)
class Program:
    """The compiled functions of one run.

    `init()`; `begin(params, collections)` is a state of step 0 with given weights; `step(state, batch)` takes one step
    and gives (state, loss and other scalars);
    `run(state, split, order, first, count)` takes `count` steps over the examples `order[first * batch_size :]` and
    gives (state, losses and other scalars of each step, padded to the maximum count);
    `forward(variables, batch)` gives the model's outputs; `evaluate(variables, split)` is the mean of each metric and
    baseline over a split, `score(variables, batch, weight)` their sums over the rows of a batch that count;
    `predict(variables, split, indices)`;
    `loss(params, state, batch, part)`, not compiled, is what the step of `state` computes for one of the batch's
    `accumulate` parts, for looking inside.
    """

    init: Callable[..., TrainState]
    begin: Callable[..., TrainState]
    loss: Callable[..., jax.Array]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    run: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    forward: Callable[..., Any]
    evaluate: Callable[..., dict[str, jax.Array]]
    score: Callable[..., dict[str, jax.Array]]
    predict: Callable[..., tuple[Batch, Any]]
    state_shapes: Any
    state_shardings: Any
    mesh: Mesh
    eval_batch_size: int
    task: Task


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
    rules: Sequence[Rule] = DEFAULT_RULES,
    accumulate: int = 1,
    own_gradients: bool = False,
    layers: Execution | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Program:
    """Builds the functions for one model on one mesh; nothing is compiled before its first call.

    Every state begins with `constants`, the data's (see `zoo.Paper`), in the place of those that the model makes. An
    optimiser with `own_gradients` takes those of `objective` and ignores the step's, which are then not computed: the
    norm that is logged is that of its updates.
    """
    low = jnp.bfloat16 if precision == "bfloat16" else None
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    eval_batch_size = -(-eval_batch_size // replicas) * replicas

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(low) if low and a.dtype == jnp.float32 else a, tree)

    def spread(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.shape)), batch)

    def init() -> TrainState:
        example = paper.example(model.config, batch_size=1, key=init_key)
        variables = model.init({"params": init_key, "dropout": init_key}, example)
        params = variables.pop("params")
        variables.pop("intermediates", None)
        return begin(params, variables)

    def begin(params, collections) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, collections, optimizer.init(params))

    state_shapes = jax.eval_shape(init)
    state_shardings = tree_shardings(state_shapes, mesh, rules)

    def gathered(params: Any) -> Any:
        """Weights in use: whole over fsdp, and over tensor as they lie.

        XLA can do that by itself, and does it wrongly where both axes split a weight: a sum of a projection and of what
        went into it then added rows of different examples (jax 0.10.2).
        """
        if mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] == 1:
            return params

        def one(x: jax.Array, lies: NamedSharding) -> jax.Array:
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in lies.spec))
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        return jax.tree.map(one, params, state_shardings.params)

    def loss_fn(params, collections, batch: Batch, dropout: jax.Array):
        variables = cast({"params": gathered(params)}) | collections
        outputs, updated = model.apply(
            variables, cast(batch), train=True, rngs={"dropout": dropout}, mutable=list(collections)
        )
        loss, extra = paper.compute_loss(outputs, batch)
        return loss.astype(jnp.float32), (extra, dict(updated))

    def loss_of_part(params, state: TrainState, batch: Batch, part: int) -> jax.Array:
        dropout = jax.random.fold_in(dropout_key, state.step)
        if accumulate > 1:
            batch = jax.tree.map(lambda x: x[part::accumulate], batch)
            dropout = jax.random.split(dropout, accumulate)[part]
        return loss_fn(params, state.collections, batch, dropout)[0]

    def value_and_gradients(params, collections, batch: Batch, dropout: jax.Array):
        with execution(dataclasses.replace(layers or Execution(), place=spread)):
            (loss, (extra, updated)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                params, collections, batch, dropout
            )
        return ({"loss": loss, **extra}, gradients), updated

    def objective(params, collections, batch: Batch) -> jax.Array:
        """The loss as it is evaluated: no dropout, running statistics."""
        outputs = model.apply(cast({"params": gathered(params)}) | collections, cast(batch), train=False)
        return paper.compute_loss(outputs, batch)[0].astype(jnp.float32)

    def in_parts(params, collections, batch: Batch, dropout: jax.Array):
        """Means over the parts of a batch, one part after the other; running statistics pass from part to part."""

        def cut(x):
            # Neighbours go to different parts, so that every device has its share of each.
            return spread_parts(jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1))

        def part(carry, row):
            sums, collections = carry
            means, collections = value_and_gradients(params, collections, *row)
            return (jax.tree.map(jnp.add, sums, means), collections), None

        rows = jax.tree.map(cut, batch), jax.random.split(dropout, accumulate)
        first = jax.tree.map(lambda x: x[0], rows)
        shapes = jax.eval_shape(lambda: value_and_gradients(params, collections, *first)[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (sums, collections), _ = jax.lax.scan(part, (zeros, collections), rows)
        return jax.tree.map(lambda x: x / accumulate, sums), collections

    def spread_parts(x):
        one = batch_sharding(mesh, x.shape[1:]).spec
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *one)))

    # `run` asks for the shapes first and traces it then: as a function of its own it is traced once for both.
    @partial(jax.jit, inline=True)
    def one_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        dropout = jax.random.fold_in(dropout_key, state.step)
        compute = value_and_gradients if accumulate == 1 else in_parts
        (scalars, gradients), updated = compute(state.params, state.collections, batch, dropout)
        # For optimisers that learn how to step: the weights have not been trained on these examples yet.
        extras = {
            "objective": lambda params, batch: objective(params, state.collections, batch),
            "batches": [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)],
        }
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            gradients, state.opt_state, state.params, **extras
        )
        params = optax.apply_updates(state.params, updates)
        scalars["grad_norm"] = optax.global_norm(updates if own_gradients else gradients)
        return TrainState(state.step + 1, params, updated, opt_state), scalars

    @partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))
    def step(state: TrainState, batch: Batch):
        return one_step(state, spread(batch))

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
        params = cast({"params": gathered(variables["params"])}) | {k: v for k, v in variables.items() if k != "params"}
        return model.apply(params, cast(batch), train=False)

    @jax.jit
    def forward(variables: Any, batch: Batch) -> Any:
        return apply(variables, spread(batch))

    def sums(variables: Any, batch: Batch, weight: jax.Array) -> dict[str, jax.Array]:
        batch = spread(batch)
        results = paper.task.metrics(apply(variables, batch), batch)
        for name, baseline in paper.task.baselines.items():
            scores = paper.task.metrics(baseline(batch), batch)
            results |= {f"{name}/{metric}": score for metric, score in scores.items()}

        def total(value: jax.Array) -> jax.Array:
            counted = weight.reshape(-1, *(1,) * (value.ndim - 1))
            return jnp.sum(jnp.where(counted, value, 0.0), axis=0)

        return {name: total(value) for name, value in results.items()}

    @partial(jax.jit, out_shardings=replicated(mesh))
    def evaluate(variables: Any, split: Split) -> dict[str, jax.Array]:
        total = len(split)

        def measure(i):
            indices = i * eval_batch_size + jnp.arange(eval_batch_size)
            # The last batch is filled up with repetitions that count nothing.
            return sums(variables, split.batch(jnp.minimum(indices, total - 1)), indices < total)

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(measure, 0))
        rounds = -(-total // eval_batch_size)
        totals = jax.lax.fori_loop(0, rounds, lambda i, acc: jax.tree.map(jnp.add, acc, measure(i)), zeros)
        return {name: value / total for name, value in totals.items()}

    @partial(jax.jit, out_shardings=replicated(mesh))
    def predict(variables: Any, split: Split, indices: jax.Array) -> tuple[Batch, Any]:
        batch = split.batch(indices)
        return batch, apply(variables, batch)

    def with_constants(make: Callable[..., TrainState]) -> Callable[..., TrainState]:
        if not constants:
            return make
        kinds = state_shapes.collections.get("constants", {}), state_shardings.collections.get("constants", {})
        given, expected = jax.tree.map(np.shape, constants), jax.tree.map(lambda s: s.shape, kinds[0])
        if given != expected:
            raise ValueError(f"the data makes constants of shapes {given}, the model wants {expected}")

        def one(value, shape, sharding):
            value = np.asarray(value, shape.dtype)  # not closed over by a jitted function: it may be large
            return jax.make_array_from_callback(shape.shape, sharding, lambda index: value[index])

        def made(*arguments) -> TrainState:
            state = make(*arguments)
            placed = jax.tree.map(one, dict(constants), *kinds)
            return state.replace(collections={**state.collections, "constants": placed})

        return made

    return Program(
        init=with_constants(jax.jit(init, out_shardings=state_shardings)),
        begin=with_constants(jax.jit(begin, out_shardings=state_shardings)),
        loss=loss_of_part,
        step=step,
        run=run,
        forward=forward,
        evaluate=evaluate,
        score=jax.jit(sums, out_shardings=replicated(mesh)),
        predict=predict,
        state_shapes=state_shapes,
        state_shardings=state_shardings,
        mesh=mesh,
        eval_batch_size=eval_batch_size,
        task=paper.task,
    )


def recipe_program(
    recipe: Recipe,
    paper: Paper,
    model: nn.Module,
    mesh: Mesh,
    *,
    total_steps: int,
    steps_per_epoch: int,
    constants: Mapping[str, Any] | None = None,
) -> Program:
    """The program of a recipe; UserError if its sizes do not make a model."""
    try:
        return make_program(
            paper,
            model,
            make_optimizer(recipe.optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch),
            mesh,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            max_steps=recipe.log_every,
            eval_batch_size=recipe.evaluation.batch_size,
            precision=recipe.precision,
            rules=recipe_rules(recipe.rules),
            accumulate=recipe.accumulate,
            own_gradients=recipe.optimizer.name == "fed_frozen",
            layers=Execution(recipe.remat, recipe.scan_layers),
            constants=constants,
        )
    except (ValueError, TypeError, flax.errors.FlaxError) as error:  # the model is traced here, with these sizes
        raise UserError(
            f"this configuration of {paper.slug} does not make a model: {str(error).splitlines()[0]}"
        ) from error
