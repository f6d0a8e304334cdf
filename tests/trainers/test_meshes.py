"""Twenty steps on eight devices, split in every way, against twenty steps on one."""

import dataclasses
import functools
import re

import chex
import jax
import numpy as np
import pytest

from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for

MESHES = ["data=8", "fsdp=8", "tensor=8", "sequence=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=2,sequence=2"]
# A kernel of each, both of whose axes eight devices divide.
KERNELS = {
    "ister": ("layers_0", "ffn_in"),
    "social_mamba": ("temporal_0", "ffn", "ffn_in"),
    "convrec": ("encoder", "item"),
}


# One layer of each of its towers has all that Social-Mamba has and compiles in a third of the time.
TOWERS = {f"{tower}_layers": 1 for tower in ("temporal", "goal", "ego", "global")}


def recipe(slug="ister", **changes):
    start = dataclasses.replace(recipe_for(slug), mesh="data=1", steps=20, log_every=20, batch_size=32)
    if slug == "social_mamba":
        start = dataclasses.replace(start, model=dataclasses.replace(start.model, **TOWERS), batch_size=8)
    return dataclasses.replace(start, **changes)


@functools.cache
def weights(slug):
    """What one device begins with: compiling `init` for every mesh would take longer than the twenty steps."""
    state = prepare(recipe(slug)).program.init()
    return jax.device_get((state.params, state.collections))


def twenty_steps(recipe):
    run = prepare(recipe)
    order = epoch_order(0, 0, len(run.splits.train))
    state, history = run.program.run(run.program.begin(*weights(recipe.paper)), run.splits.train, order, 0, 20)
    return jax.device_get((history["loss"], state.params)), state


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_every_mesh_begins_with_the_same_weights(mesh):
    state = prepare(recipe(mesh=mesh)).program.init()
    chex.assert_trees_all_close((state.params, state.collections), weights("ister"), atol=1e-6)


@functools.cache
def alone(slug):
    return twenty_steps(recipe(slug))[0]


# Compiling is what takes long. The sweep trains every paper on data x fsdp x tensor; what else splits a convolution and
# a scan is here, and the rest is slow.
QUICK = {
    "ister": MESHES, "convrec": ["fsdp=8", "sequence=8", "data=2,tensor=2,sequence=2"], "social_mamba": ["sequence=8"],
}  # fmt: skip
PAIRS = [
    pytest.param(slug, mesh, marks=[] if mesh in QUICK[slug] else [pytest.mark.slow])
    for slug in KERNELS for mesh in MESHES
]  # fmt: skip


@pytest.mark.parametrize(("slug", "mesh"), PAIRS)
def test_every_mesh_trains_the_same_model(slug, mesh):
    (losses, params), state = twenty_steps(recipe(slug, mesh=mesh))
    expected = alone(slug)
    assert state.step == 20
    np.testing.assert_allclose(losses, expected[0], atol=1e-5)
    chex.assert_trees_all_close(params, expected[1], atol=1e-4)
    kernel = functools.reduce(lambda tree, name: tree[name], KERNELS[slug], state.params)["kernel"]
    sizes = dict(part.split("=") for part in mesh.split(","))
    shards = int(sizes.get("fsdp", 1)) * int(sizes.get("tensor", 1))
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size // shards


def test_parts_of_a_batch_give_the_step_of_the_whole():
    # Dropout draws other numbers for each part: without it the two are the same sum.
    model = dataclasses.replace(recipe().model, dropout_rate=0.0, trend_dropout_rate=0.0)
    whole = twenty_steps(recipe(model=model))[0]
    for changes in ({"accumulate": 4}, {"accumulate": 4, "mesh": "data=4,fsdp=2"}):
        chex.assert_trees_all_close(twenty_steps(recipe(model=model, **changes))[0], whole, atol=1e-5)


def test_time_lies_along_the_sequence_axis():
    run = prepare(recipe(mesh="data=2,sequence=4"))
    state, split = run.program.init(), run.splits.train
    text = str(jax.make_jaxpr(lambda *a: run.program.run(*a, epoch_order(0, 0, 64), 0, 1))(state, split))
    assert re.search(r"spec=P\(\('data', 'fsdp'\), 'sequence'\)", text.replace("PartitionSpec", "P"))
