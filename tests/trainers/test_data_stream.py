"""The streaming path: order, shards, resuming, packing, memory, transfer, augmentation."""

import gc
import json
import multiprocessing
import os
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoo
from tests.trainers.test_data_builders import CASES, write
from trainers.data import augment, load_dataset
from trainers.data.stream import Stream, batches, measure_throughput, packed_batches


class Numbers:
    """Example i is {"i": i}; `read` remembers what was asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i):
        return {"i": np.int32(i), "x": np.full(3, i, np.float32)}


class Large:
    """A million examples of 64 KiB, made when asked for: 64 GiB in all."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, i):
        return {"x": np.full(16_384, i % 7, np.float32)}


class Documents:
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i):
        """Token values name their document and their place in it."""
        return {"tokens": (1000 * (i + 1) + np.arange(self.lengths[i])).astype(np.int32)}


def numbers_of(dataset, count=None) -> list[list[int]]:
    found = []
    for batch in Stream(dataset):
        found.append(batch["i"].tolist())
        if len(found) == count:
            break
    return found


def flattened(lists) -> list:
    return [x for part in lists for x in part]


def test_the_order_is_a_function_of_seed_and_epoch():
    def epochs(seed, count):
        flat = flattened(numbers_of(batches(Numbers(12), batch_size=4, seed=seed, epochs=count)))
        return [flat[i : i + 12] for i in range(0, len(flat), 12)]

    three = epochs(5, 3)
    assert three == epochs(5, 3)
    assert three[:2] == epochs(5, 2)
    assert all(sorted(epoch) == list(range(12)) for epoch in three)
    assert len({tuple(epoch) for epoch in three} | {tuple(epochs(6, 1)[0])}) == 4
    assert numbers_of(batches(Numbers(12), batch_size=4, seed=5), 9) == numbers_of(
        batches(Numbers(12), batch_size=4, seed=5, epochs=3)
    )


def test_an_example_does_not_depend_on_what_was_read_before():
    whole = numbers_of(batches(Numbers(20), batch_size=4, seed=1), 10)
    for skipped in (1, 4, 7):
        stream = Stream(batches(Numbers(20), batch_size=4, seed=1))
        stream.restore(json.dumps({"next_index": skipped}))
        assert next(stream)["i"].tolist() == whole[skipped]


def test_without_shuffling_the_order_is_the_source():
    assert numbers_of(batches(Numbers(5), batch_size=2, shuffle=False, epochs=2)) == [[0, 1], [2, 3]] * 2
    dataset = batches(Numbers(5), batch_size=2, shuffle=False, epochs=1, drop_remainder=False)
    assert numbers_of(dataset) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_are_disjoint_and_together_whole(processes):
    shards = [
        numbers_of(
            batches(
                Numbers(25),
                batch_size=6,
                seed=3,
                epochs=2,
                drop_remainder=False,
                process_index=p,
                process_count=processes,
            )
        )
        for p in range(processes)
    ]
    assert sorted(flattened(flattened(shards))) == sorted([*range(25)] * 2)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_take_the_steps_of_one(processes):
    # 23 = 3 x 6 + 5: a process with 12 examples must not take a fourth step of 3 where one alone takes three of 6.
    alone = numbers_of(batches(Numbers(23), batch_size=6, seed=3), 9)
    shards = [
        numbers_of(batches(Numbers(23), batch_size=6, seed=3, process_index=p, process_count=processes), 9)
        for p in range(processes)
    ]
    for step, batch in enumerate(alone):
        assert sorted(flattened(shard[step] for shard in shards)) == sorted(batch)


def streams():
    yield "plain", lambda workers: batches(Numbers(30), batch_size=4, seed=2, workers=workers)
    lengths = np.random.default_rng(0).integers(1, 30, 40).tolist()
    yield "packed", lambda workers: packed_batches(Documents(lengths), length=16, batch_size=3, workers=workers)


@pytest.mark.parametrize(("kind", "workers"), [("plain", 0), ("plain", 2), ("packed", 0), ("packed", 1)])
def test_resumes_exactly(kind, workers):
    make = dict(streams())[kind]
    stream = Stream(make(workers))
    before = [next(stream) for _ in range(3)]
    state = stream.state()
    after = [next(stream) for _ in range(9)]
    assert stream.state() != state
    again = Stream(make(workers))
    again.restore(state)
    chex.assert_trees_all_equal(after, [next(again) for _ in range(9)])
    again.close()
    if workers:  # the same order as without
        alone = Stream(make(0))
        chex.assert_trees_all_equal(before + after, [next(alone) for _ in range(12)])
        alone.restore(Stream(make(0)).state())  # also back
        chex.assert_trees_all_equal(before[0], next(alone))


def test_the_position_is_that_of_the_step_and_not_of_the_reader():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), "data"), PartitionSpec("data"))
    stream = Stream(batches(Numbers(40), batch_size=4), sharding=sharding)
    for _ in range(3):
        batch = next(stream)
    state, expected = stream.state(), [np.asarray(next(stream)["i"]) for _ in range(3)]
    assert batch["x"].sharding.is_equivalent_to(sharding, 2)
    again = Stream(batches(Numbers(40), batch_size=4), sharding=sharding)
    again.restore(state)
    chex.assert_trees_all_equal(expected, [np.asarray(next(again)["i"]) for _ in range(3)])


def test_batches_are_read_ahead_but_not_far():
    asked, reached = set(), threading.Event()

    class Watched(Numbers):
        def __getitem__(self, i):
            asked.add(i)
            if len(asked) >= 8:
                reached.set()
            return super().__getitem__(i)

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stream = Stream(batches(Watched(100_000), batch_size=2, shuffle=False), sharding=sharding)
    next(stream)
    assert reached.wait(20)  # three further batches without being asked
    assert len(asked) <= 2_000


@pytest.mark.parametrize("seed", range(3))
def test_packing_keeps_every_token_and_never_mixes_documents(seed):
    lengths = np.random.default_rng(seed).integers(0, 40, 50).tolist()
    rows = []
    for batch in Stream(packed_batches(Documents(lengths), length=16, batch_size=4, seed=seed, epochs=1)):
        assert all(value.shape[1:] == (16,) for value in batch.values())
        rows += list(zip(batch["tokens"], batch["segments"], batch["positions"], strict=True))
    found = []
    for tokens, segments, positions in rows:
        assert not tokens[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            piece = tokens[segments == segment]
            assert len({*(piece // 1000)}) == 1  # one document
            chex.assert_trees_all_equal(np.diff(piece), np.ones(len(piece) - 1, np.int32))  # in its order, unbroken
            chex.assert_trees_all_equal(positions[segments == segment], np.arange(len(piece), dtype=np.int32))
            found += piece.tolist()
    expected = [token for i in range(50) for token in Documents(lengths)[i]["tokens"].tolist()]
    assert sorted(found) == sorted(expected)
    filled = len(expected) / (16 * len(rows))
    assert filled > 0.75  # one document a row fills about half


def test_packing_by_process_loses_nothing_either():
    lengths = [7, 3, 20, 1, 9, 16, 17, 2, 5]
    found = []
    for p in range(2):
        dataset = packed_batches(Documents(lengths), length=8, batch_size=4, epochs=1, process_index=p, process_count=2)
        for batch in Stream(dataset):
            found += batch["tokens"][batch["segments"] > 0].tolist()
    assert sorted(found) == sorted(t for i in range(9) for t in Documents(lengths)[i]["tokens"].tolist())


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_constant_on_a_large_source():
    stream = Stream(
        batches(Large(), batch_size=16, seed=0), sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    for _ in range(100):
        next(stream)
    before = resident_bytes()
    total = 0
    for _ in range(1_000):
        total += next(stream)["x"].nbytes
    assert total > 1e9
    assert resident_bytes() - before < 50e6


def test_throughput_is_measured():
    found = measure_throughput(Stream(batches(Large(), batch_size=16)), seconds=0.5)
    # 64 KiB an example; any machine copies more than ten a second.
    assert found.examples_per_second > 10
    assert found.megabytes_per_second == pytest.approx(found.examples_per_second * 65_536 / 1e6)


def test_transforms_are_applied_to_examples():
    dataset = batches(Numbers(4), batch_size=2, shuffle=False, epochs=1, transform=lambda e: {"i": e["i"] * 10})
    assert numbers_of(dataset) == [[0, 10], [20, 30]]


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_a_tfds_data_source(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path / "cache"))
    split = load_dataset("mnist", write(tmp_path / "files", CASES["mnist"].files))["train"]
    batch = next(Stream(batches(split, batch_size=2, shuffle=False, workers=workers)))
    chex.assert_trees_all_equal(batch["image"], np.stack([example["image"] for example in split]))
    assert batch["label"].tolist() == [5, 9]


def test_closing_ends_the_workers():
    stream = Stream(batches(Numbers(30), batch_size=4, workers=1))
    next(stream)
    started = multiprocessing.active_children()
    assert started
    stream.close()
    for process in started:
        process.join(20)
        assert not process.is_alive()


def test_what_cannot_work_is_said():
    with pytest.raises(zoo.UserError, match="a batch of 8 is larger than the data, 5 examples"):
        batches(Numbers(5), batch_size=8)
    with pytest.raises(zoo.UserError, match="a batch of 4 cannot be shared by 3 processes"):
        batches(Numbers(50), batch_size=4, process_count=3)
    with pytest.raises(ValueError, match="process_index 2 is not one of 2 processes"):
        batches(Numbers(50), batch_size=4, process_index=2, process_count=2)
    for foreign in ("{}", "[1]", "not json"):
        with pytest.raises(zoo.UserError, match="does not belong to this stream"):
            Stream(batches(Numbers(50), batch_size=4)).restore(foreign)


IMAGES = jnp.arange(40 * 5 * 6 * 2, dtype=jnp.float32).reshape(40, 5, 6, 2) + 1


def test_crops_are_shifts():
    found = np.asarray(augment.random_crop(jax.random.key(0), IMAGES, padding=1))
    padded = np.pad(np.asarray(IMAGES), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = []
    for image, before in zip(found, padded, strict=True):
        shifts += [(i, j) for i in range(3) for j in range(3) if np.array_equal(image, before[i : i + 5, j : j + 6])]
    assert len(shifts) == 40  # each is exactly one of the nine
    assert len(set(shifts)) == 9
    chex.assert_trees_all_equal(augment.random_crop(jax.random.key(0), IMAGES, padding=0), IMAGES)


def test_flips_are_mirrors():
    found = np.asarray(augment.random_flip(jax.random.key(1), IMAGES))
    kept = [np.array_equal(a, b) for a, b in zip(found, IMAGES, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(found, np.asarray(IMAGES), strict=True)]
    assert [a != b for a, b in zip(kept, mirrored, strict=True)] == [True] * 40
    assert 8 < sum(kept) < 32


def test_noise_has_the_stated_size():
    series = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50, 3)), jnp.float32)
    noise = augment.jitter(jax.random.key(2), series, 0.5) - series
    assert float(noise.std()) == pytest.approx(0.5, rel=0.05)
    assert abs(float(noise.mean())) < 0.02
    factor = augment.random_scale(jax.random.key(3), series, 0.2) / series
    chex.assert_trees_all_close(factor, jnp.broadcast_to(factor[:, :1], factor.shape), rtol=1e-3)
    assert float(factor[:, 0].std()) == pytest.approx(0.2, rel=0.2)
