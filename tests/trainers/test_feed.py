"""Examples on the devices, on the host, or read one by one: the same batches, the same training."""

import contextlib
import dataclasses
import json
import os
import signal
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file

from trainers import feed as feeding
from trainers.faults import Interrupted, Preemption
from trainers.feed import HostSplit, evaluate, place
from trainers.loop import prepare, train
from trainers.recipe import recipe_for
from trainers.sharding import make_mesh

RECIPE = dataclasses.replace(
    recipe_for("ister"), mesh="data=1", steps=50, log_every=10, batch_size=32, epochs=None, data_on="device"
)
ON_HOST = dataclasses.replace(RECIPE, data_on="host")
QUIET = Console(quiet=True)
CPU = jax.devices("cpu")[0]


@pytest.fixture(scope="module")
def runs():
    return {"device": prepare(RECIPE), "host": prepare(ON_HOST)}


def fifty_steps(run, *, first=0, state=None):
    """Over the end of an epoch of forty."""
    state = run.program.init() if state is None else state
    with contextlib.closing(run.feed()) as feed:
        history = []
        for step in range(first, 50, 10):
            state, scalars = feed.advance(state, step, 10)
            history.append(scalars["loss"])
    return np.concatenate(history), jax.device_get(state.params)


@pytest.fixture(scope="module")
def on_device(runs):
    return fifty_steps(runs["device"])


def test_training_from_the_host_is_training_on_the_device(runs, on_device):
    losses, params = fifty_steps(runs["host"])
    np.testing.assert_allclose(losses, on_device[0], atol=1e-5)
    chex.assert_trees_all_close(params, on_device[1], atol=1e-4)


def test_batches_go_in_pieces_to_a_mesh(on_device):
    run = prepare(dataclasses.replace(ON_HOST, mesh="data=2,fsdp=2,sequence=2"))
    losses, params = fifty_steps(run)
    np.testing.assert_allclose(losses, on_device[0], atol=1e-5)
    chex.assert_trees_all_close(params, on_device[1], atol=1e-4)
    batch = run.feed().batch(0)
    assert len({shard.device for shard in batch["x"].addressable_shards}) == 8
    assert all(shard.data.size == batch["x"].size // 8 for shard in batch["x"].addressable_shards)


def test_a_feed_starts_at_any_step(runs):
    with contextlib.closing(runs["host"].feed()) as feed:
        batches = iter(feed.batches(37))
        for step in range(37, 43):  # over the end of the epoch
            chex.assert_trees_all_equal(next(batches), runs["device"].feed().batch(step))


def test_scores_are_those_on_the_device(runs):
    variables = runs["device"].program.init().variables
    ours, theirs = (evaluate(run.program, variables, run.splits.test) for run in (runs["host"], runs["device"]))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5)
    picture, expected = (
        feeding.predict(run.program, variables, run.splits.test, np.asarray([7]))
        for run in (runs["host"], runs["device"])
    )
    chex.assert_trees_all_close(picture, expected, atol=1e-6)


def test_reads_no_more_ahead_than_it_says(runs, monkeypatch):
    read = []
    gather = HostSplit.gather
    monkeypatch.setattr(HostSplit, "gather", lambda self, indices: read.append(1) or gather(self, indices))
    with contextlib.closing(runs["host"].feed()) as feed:
        batches = feed.batches(0)
        for taken in range(1, 31):
            jax.block_until_ready(next(batches))
            # Read, waiting to be sent, sent, and in the hands of either thread.
            assert len(read) <= taken + 3 * feeding._READ_AHEAD + 2


class Pictures:
    """A source as TFDS gives them: an example at a time, decoded when asked for."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"image": np.full((4, 4), index, np.float32), "label": np.int32(index)}


def test_examples_from_a_source():
    mesh = make_mesh("data=4,fsdp=2", batch_size=8)
    (split,) = place((Pictures(),), mesh, "device")
    assert isinstance(split, HostSplit)
    batch = split.fetch(np.asarray([3, 1, 4, 1, 5, 9, 2, 6]))
    np.testing.assert_array_equal(batch["label"], [3, 1, 4, 1, 5, 9, 2, 6])
    np.testing.assert_array_equal(batch["image"][:, 2, 1], [3, 1, 4, 1, 5, 9, 2, 6])
    shapes = jax.eval_shape(split.batch, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert jax.tree.map(lambda s: s.shape, shapes) == {"image": (8, 4, 4), "label": (8,)}


def test_only_what_fits_goes_to_the_devices(runs, monkeypatch):
    mesh = make_mesh("data=1", batch_size=8)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(runs["device"].splits.train))
    for limit, where in ((4 * size, "device"), (4 * size - 1, "host")):
        device = types.SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit})
        monkeypatch.setattr(feeding.jax, "local_devices", lambda backend=None, d=device: [d if not backend else CPU])
        (split,) = place((runs["device"].splits.train,), mesh, "auto")
        assert isinstance(split, HostSplit) == (where == "host")


def test_a_run_goes_on_with_its_data_on_the_host(tmp_path, compiled_once):
    workdir = epath.Path(tmp_path / "run")
    recipe = dataclasses.replace(RECIPE, evaluation=dataclasses.replace(RECIPE.evaluation, every=10))
    with pytest.raises(Interrupted):
        interrupted(recipe, workdir, at=20)
    train(dataclasses.replace(recipe, data_on="host"), workdir, console=QUIET)
    whole = epath.Path(tmp_path / "whole")
    train(recipe, whole, console=QUIET)
    ours, theirs = (load_file(w / "model.safetensors") for w in (workdir, whole))
    chex.assert_trees_all_close(ours, theirs, atol=1e-4)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [10, 20, 30, 40, 50]


def interrupted(recipe, workdir, *, at):
    """Trains until the preemption that is asked for at that step."""
    asked = Preemption.requested_anywhere
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(10, 10**6, 10))
        patch.setattr(
            Preemption,
            "requested_anywhere",
            lambda self: (next(steps) == at and os.kill(os.getpid(), signal.SIGTERM)) or asked(self),
        )
        train(recipe, workdir, console=QUIET)
