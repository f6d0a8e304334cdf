"""Data that does not fit on the device: Grain reads, shuffles, batches and packs it, two batches ahead of the step.

The order is a pure function of (seed, epoch, index): nothing is drawn while reading, so the state of a stream is a few
integers, and a run that goes on sees exactly the batches it would have seen. Position `i` of an epoch's order goes to
process `i % process_count`: step for step, the processes together see the same examples as one process alone.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import FirstFitPackIterDataset, FlatMapIterDataset, FlatMapTransform, ThreadPrefetchIterDataset

from zoo.errors import UserError

__all__ = ["Source", "Stream", "Throughput", "batches", "measure_throughput", "packed_batches"]

Example = dict[str, Any]
_READ_AHEAD = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)  # batches; Grain's own 500 would fill the memory


@runtime_checkable
class Source(Protocol):
    """Examples by number, e.g. a TFDS data source."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Example: ...


class Stream:
    """Dict batches of a Grain data set with a state that is stored beside a checkpoint.

    With `sharding`, batches are arrays on the device, transferred while the step before runs (double buffering); each
    process gives its own rows and the result is the global batch. Without, they are numpy arrays.
    """

    def __init__(self, dataset: grain.IterDataset, *, sharding: jax.sharding.Sharding | None = None):
        if sharding is not None:
            dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
            dataset = dataset.map(lambda batch: _put(batch, sharding))
            dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
        self._iterator = iter(dataset)

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        return next(self._iterator)

    def state(self) -> str:
        """The position after the last batch given out, as json; what was read ahead does not count."""
        return json.dumps(self._iterator.get_state())

    def restore(self, state: str) -> None:
        """Goes on after the batch at which `state()` was taken, of a stream made with the same arguments."""
        try:
            self._iterator.set_state(json.loads(state))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the stored position of the data does not belong to this stream ({type(error).__name__}: {error}): "
                "use the same data, packing and number of workers as the run that stored it"
            ) from error

    def close(self) -> None:
        """Ends its threads and workers."""
        self._iterator.close()


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    transform: Callable[[Example], Example] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.IterDataset:
    """Batches of `batch_size // process_count` examples, this process's rows of each batch of `batch_size`.

    `epochs=None` never ends. Without
    `drop_remainder`, the last batch of an epoch is smaller and processes may differ by one example. `workers` are
    processes that read and transform beside the trainer; reading uses threads anyway, so they pay for slow transforms.
    """
    examples = _shard(source, batch_size, seed, shuffle, drop_remainder, process_index, process_count)
    if transform is not None:
        examples = examples.map(transform)
    rows = examples.batch(batch_size // process_count, drop_remainder=drop_remainder)
    return _in_workers(rows.repeat(epochs).to_iter_dataset(_READ_AHEAD), workers)


def packed_batches(
    source: Source,
    *,
    length: int,
    batch_size: int,
    feature: str = "tokens",
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    transform: Callable[[Example], Example] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.IterDataset:
    """Documents of any length packed into rows of `length`, first fit: no row mixes them unmarked and no token is lost.

    Each example has its tokens (T,) in `feature`. Batches hold, each (B, length): `tokens`, `segments` (1, 2, ... a
    document of the row, 0 where it is padded) and `positions` (from 0 in each document). A document longer than a row
    is cut into pieces, which are segments of their own. With `epochs`, the last batch may be smaller. Each worker packs
    documents of its own, so that the batches depend on their number.
    """
    documents = _shard(source, batch_size, seed, shuffle, False, process_index, process_count)
    if transform is not None:
        documents = documents.map(transform)
    pieces = FlatMapIterDataset(documents.repeat(epochs).to_iter_dataset(_READ_AHEAD), _Cut(feature, length))
    rows = FirstFitPackIterDataset(
        pieces, length_struct={"tokens": length}, num_packing_bins=batch_size // process_count, shuffle_bins=False
    )
    return _in_workers(rows.map(_named).batch(batch_size // process_count, drop_remainder=epochs is None), workers)


class _Cut(FlatMapTransform):
    max_fan_out = 1 << 20

    def __init__(self, feature: str, length: int):
        self._feature, self._length = feature, length

    def flat_map(self, element: Example) -> list[Example]:
        tokens = np.asarray(element[self._feature])
        return [{"tokens": tokens[i : i + self._length]} for i in range(0, len(tokens), self._length)]


def _named(row: Example) -> Example:
    return {"tokens": row["tokens"], "segments": row["tokens_segment_ids"], "positions": row["tokens_positions"]}


def _shard(
    source: Source,
    batch_size: int,
    seed: int,
    shuffle: bool,
    whole_batches: bool,
    process_index: int,
    process_count: int,
) -> grain.MapDataset:
    """This process's examples of every epoch, in order."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"batches: process_index {process_index} is not one of {process_count} processes")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} cannot be shared by {process_count} processes: use a multiple of it")
    usable = len(source) // batch_size * batch_size if whole_batches else len(source)
    if usable == 0 or len(source) < process_count:
        raise UserError(f"a batch of {batch_size} is larger than the data, {len(source)} examples: use a smaller batch")
    examples = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        examples = examples.shuffle()
    return examples.slice(slice(process_index, usable, process_count))


def _in_workers(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    if workers == 0:
        return dataset
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its options from absl, whose command line is not ours
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def _put(batch: Example, sharding: jax.sharding.Sharding) -> Example:
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


@dataclass(frozen=True)
class Throughput:
    """Of this process, without a training step between batches."""

    examples_per_second: float
    megabytes_per_second: float


def measure_throughput(stream: Iterator[Example], *, seconds: float = 2.0) -> Throughput:
    """Reads for that long, after a first batch that starts threads and workers."""
    jax.block_until_ready(next(stream))
    examples = size = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        arrays = jax.tree.leaves(jax.block_until_ready(next(stream)))
        examples += len(arrays[0])
        size += sum(a.nbytes for a in arrays)
    return Throughput(examples / elapsed, size / elapsed / 1e6)
