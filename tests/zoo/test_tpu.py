"""Every paper's train step compiles for a TPU slice, without a TPU. Needs the `tpu` extra: `pytest -m tpu`."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without it libtpu looks for a cloud machine's metadata server

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies

import zoo
from tests.splits import Rows
from trainers.sharding import batch_sharding, make_mesh, replicated
from trainers.step import make_program

BATCH = 16


@pytest.mark.tpu
@pytest.mark.parametrize("slug", [e.slug for e in zoo.papers(status="works")])
def test_the_train_step_compiles_for_a_slice_of_sixteen(slug):
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = make_mesh("data=2,fsdp=4,tensor=2", batch_size=BATCH, devices=topology.devices)
    paper = zoo.paper(slug)
    model = zoo.create(slug, "tiny")
    program = make_program(
        paper, model, optax.adam(1e-3), mesh, seed=0, batch_size=BATCH, max_steps=4, eval_batch_size=BATCH
    )

    def placed(shapes, shardings):
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)

    example = jax.eval_shape(lambda key: paper.example(model.config, batch_size=BATCH, key=key), jax.random.key(0))
    split = Rows(placed(example, jax.tree.map(lambda _: batch_sharding(mesh), example)))
    numbers = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=replicated(mesh)) for s in ((4 * BATCH,), (), ())]
    compiled = program.run.lower(placed(program.state_shapes, program.state_shardings), split, *numbers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    assert "all-reduce" in compiled.as_text()
