"""How training examples come to the devices: all of them once, or batch by batch from the host's memory.

Either way the order is a pure function of (seed, epoch, index), so the position of a run is the number of its step and
nothing else: a run that goes on, on however many devices or processes, sees the examples it would have seen.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trainers import distributed
from trainers.recipe import Recipe
from trainers.sharding import batch_sharding
from trainers.step import Program, TrainState
from zoo.tasks.task import Batch

__all__ = [
    "DeviceFeed",
    "HostFeed",
    "HostSplit",
    "epoch_order",
    "evaluate",
    "make_feed",
    "place",
    "predict",
    "split_report",
]

# Of a device's memory: what a data set may take before it stays on the host.
_SHARE = 0.25
_READ_AHEAD = 2  # batches read, and as many on their way to the devices


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order in which an epoch visits the training examples: a function of (seed, epoch) and nothing else."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples).astype(np.int32)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class HostSplit:
    """Examples in the host's memory, or read one by one from a source; only batches go to the devices.

    `examples` is a `trainers.step.Split` or a `trainers.data.stream.Source`. Each process gathers the rows that its own
    devices need.
    """

    examples: Any
    mesh: Mesh

    @classmethod
    def of(cls, examples: Any, mesh: Mesh) -> "HostSplit":
        if hasattr(examples, "batch"):
            examples = jax.device_put(examples, jax.local_devices(backend="cpu")[0])
        return cls(examples, mesh)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Any) -> Batch:
        """Traceable, for its shapes."""
        if hasattr(self.examples, "batch"):
            return self.examples.batch(indices)
        first = self.gather(np.zeros(1, np.int32))
        return jax.tree.map(lambda x: jax.numpy.broadcast_to(x, (indices.shape[0], *x.shape[1:])), first)

    def gather(self, indices: np.ndarray) -> Batch:
        """These examples, as numpy arrays."""
        if hasattr(self.examples, "batch"):
            return jax.tree.map(np.asarray, _gather(self.examples, indices))
        rows = [self.examples[int(i)] for i in indices]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def local_rows(self, count: int) -> slice:
        """Which of so many rows this process's devices hold."""
        places = batch_sharding(self.mesh, (count,)).addressable_devices_indices_map((count,)).values()
        bounds = [rows.indices(count)[:2] for (rows,) in places]
        return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))

    def put(self, local: Batch, count: int) -> Batch:
        """The global batch of `count` rows, of which `local` are those of `local_rows`."""
        first = self.local_rows(count).start

        def array(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(count)
                return x[(slice(start - first, stop - first), *index[1:])]

            shape = (count, *x.shape[1:])
            return jax.make_array_from_callback(shape, batch_sharding(self.mesh, shape), part)

        return jax.tree.map(array, local)

    def fetch(self, indices: np.ndarray) -> Batch:
        """These examples on the devices."""
        return self.put(self.gather(indices[self.local_rows(len(indices))]), len(indices))


@jax.jit
def _gather(examples: Any, indices: jax.Array) -> Batch:
    return examples.batch(indices)


def place(splits: tuple[Any, ...], mesh: Mesh, where: str) -> tuple[Any, ...]:
    """The splits on the devices, each device with all of them, or on the host as `HostSplit`s.

    `where` is "device", "host", or "auto": the devices if the splits take at most a quarter of one's memory. Sources,
    whose examples are not arrays yet, always stay on the host.
    """
    sources = not all(hasattr(split, "batch") for split in splits)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(splits)) if not sources else 0
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    too_large = where == "auto" and limit is not None and size > _SHARE * limit
    if sources or where == "host" or too_large:
        return tuple(HostSplit.of(split, mesh) for split in splits)
    return distributed.replicate(splits, mesh)


@dataclass(frozen=True)
class DeviceFeed:
    """Data on the devices: many steps are one call of one compiled function."""

    recipe: Recipe
    program: Program
    train: Any
    steps_per_epoch: int

    def _arguments(self, step: int) -> tuple[Any, np.ndarray, int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.train, epoch_order(self.recipe.seed, epoch, len(self.train)), position

    def compile(self, state: TrainState, step: int) -> TrainState:
        """Takes no step."""
        return self.program.run(state, *self._arguments(step), 0)[0]

    def advance(self, state: TrainState, step: int, count: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        """The state after `count` steps from `step`, all of one epoch, and the scalars of each."""
        state, history = self.program.run(state, *self._arguments(step), count)
        return state, {name: values[:count] for name, values in jax.device_get(history).items()}

    def batch(self, step: int) -> Batch:
        """What `step` trains on."""
        train, order, position = self._arguments(step)
        size = self.recipe.batch_size
        return jax.jit(lambda split, indices: split.batch(indices))(
            train, order[position * size : (position + 1) * size]
        )

    def close(self) -> None:
        """Nothing runs beside the steps."""


class _Steps:
    """This process's rows of the batch of every step from `first` on, by number."""

    def __init__(self, feed: "HostFeed", first: int):
        self._feed, self._first = feed, first

    def __len__(self) -> int:
        return self._feed.total_steps - self._first

    def __getitem__(self, index: Any) -> Batch:
        indices = self._feed.indices(self._first + int(index))
        return self._feed.train.gather(indices[self._feed.train.local_rows(len(indices))])


class HostFeed:
    """Data on the host: Grain's threads gather batches and send them to the devices while the steps before run."""

    def __init__(self, recipe: Recipe, program: Program, train: HostSplit, steps_per_epoch: int, total_steps: int):
        self.recipe, self.program, self.train, self.total_steps = recipe, program, train, total_steps
        self.steps_per_epoch = steps_per_epoch
        self._step = program.step
        self._batches: Iterator[Batch] | None = None
        self._next = -1

    def indices(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.recipe.batch_size
        return epoch_order(self.recipe.seed, epoch, len(self.train))[position * size : (position + 1) * size]

    def batches(self, step: int) -> Iterator[Batch]:
        """The batches of this step and all later ones, on the devices, read ahead."""
        import grain
        from grain.experimental import ThreadPrefetchIterDataset

        size = self.recipe.batch_size
        options = grain.ReadOptions(num_threads=_READ_AHEAD, prefetch_buffer_size=_READ_AHEAD)
        local = grain.MapDataset.source(_Steps(self, step)).to_iter_dataset(options)
        sent = local.map(lambda batch: self.train.put(batch, size))
        return iter(ThreadPrefetchIterDataset(sent, prefetch_buffer_size=_READ_AHEAD))

    def compile(self, state: TrainState, step: int) -> TrainState:
        """Compiles a step of a state of this shape and takes none."""
        self._step = self.program.step.lower(state, self.batch(step)).compile()
        return state

    def advance(self, state: TrainState, step: int, count: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        """The state after `count` steps from `step`, and the scalars of each."""
        if self._batches is None or self._next != step:
            self.close()
            self._batches = self.batches(step)
        rows = []
        for _ in range(count):
            state, scalars = self._step(state, next(self._batches))
            rows.append(scalars)
        self._next = step + count
        rows = jax.device_get(rows)
        return state, {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def batch(self, step: int) -> Batch:
        """What `step` trains on."""
        return self.train.fetch(self.indices(step))

    def close(self) -> None:
        """Ends the reading ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None


def make_feed(
    recipe: Recipe, program: Program, train: Any, *, steps_per_epoch: int, total_steps: int
) -> DeviceFeed | HostFeed:
    """The feed for where the training split lies."""
    if isinstance(train, HostSplit):
        return HostFeed(recipe, program, train, steps_per_epoch, total_steps)
    return DeviceFeed(recipe, program, train, steps_per_epoch)


def evaluate(program: Program, variables: Any, split: Any, *, tuned_on: Any = None) -> dict[str, float]:
    """Mean of every metric and baseline over a split, wherever it lies; or what the task makes of their sums, with
    thresholds from the split `tuned_on` if one is given."""
    means = _means(program, variables, split)
    summarise = program.task.summarise
    if summarise is None:
        return {name: float(value) for name, value in means.items()}
    totals = _totals(means, split)
    tuning = {} if tuned_on is None else _totals(_means(program, variables, tuned_on), tuned_on)
    return {
        f"{who}{name}": value
        for who, values in totals.items()
        for name, value in summarise(values, tuning.get(who)).items()
    }


def _means(program: Program, variables: Any, split: Any) -> dict[str, np.ndarray]:
    if not isinstance(split, HostSplit):
        return jax.device_get(program.evaluate(variables, split))
    total, size, sums = len(split), program.eval_batch_size, None
    for first in range(0, total, size):
        indices = first + np.arange(size, dtype=np.int32)
        present = indices < total  # the last batch is filled up with repetitions that count nothing
        batch = split.fetch(np.minimum(indices, total - 1))
        scores = program.score(variables, batch, present)
        sums = scores if sums is None else jax.tree.map(jax.numpy.add, sums, scores)
    return {name: np.asarray(value, np.float64) / total for name, value in jax.device_get(sums).items()}


def _totals(means: dict[str, np.ndarray], split: Any) -> dict[str, dict[str, Any]]:
    """Sums over the split's examples: the model's under "", a baseline's under its name and a stroke."""
    totals: dict[str, dict[str, Any]] = {}
    for name, value in means.items():
        who, stroke, metric = name.rpartition("/")
        totals.setdefault(who + stroke, {"examples": len(split)})[metric] = np.asarray(value) * len(split)
    return totals


def predict(program: Program, variables: Any, split: Any, indices: np.ndarray) -> tuple[Batch, Any]:
    """(batch, outputs) of these examples, wherever they lie; their number need not fit the mesh."""
    if not isinstance(split, HostSplit):
        return program.predict(variables, split, indices)
    return program.predict(variables, _Gathered(split.gather(indices)), np.arange(len(indices)))


def split_report(program: Program, variables: Any, split: Any, *, tuned_on: Any = None) -> dict[str, float]:
    """What `evaluate` gives, and what the task says of all outputs on the split together."""
    task, scores = program.task, evaluate(program, variables, split, tuned_on=tuned_on)
    if task.report is None:
        return scores
    total, size, parts = len(split), program.eval_batch_size, []
    for first in range(0, total, size):
        indices = first + np.arange(size, dtype=np.int32)
        batch, outputs = predict(program, variables, split, np.minimum(indices, total - 1))
        found = {name: value for name, value in batch.items() if name != "x"}, outputs
        parts.append(jax.tree.map(lambda x, count=total - first: np.asarray(x)[:count], found))
    batch, outputs = jax.tree.map(lambda *leaves: jax.numpy.asarray(np.concatenate(leaves)), *parts)
    scores |= task.report(outputs, batch)
    for name, baseline in task.baselines.items():
        scores |= {f"{name}/{score}": value for score, value in task.report(baseline(batch), batch).items()}
    return scores


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Gathered:
    """Examples that are all of a split."""

    examples: Batch

    def batch(self, indices: jax.Array) -> Batch:
        return jax.tree.map(lambda x: x[indices], self.examples)
