"""Every paper's train step compiles for a TPU slice, without a TPU. Needs the `tpu` extra: `pytest -m tpu`."""

import dataclasses
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without it libtpu looks for a cloud machine's metadata server

import jax
import jax.numpy as jnp
import pytest

import zoo
from tests.splits import Rows
from trainers.compile import compile_step, example_batch, recipe_step, report_text, topology_devices
from trainers.recipe import recipe_for
from trainers.sharding import batch_sharding, placements, replicated
from zoo.errors import UserError

pytestmark = pytest.mark.tpu
SLUGS = [e.slug for e in zoo.papers(status="works") if zoo.paper(e.slug).model is not None]
SLICE = "v5e:4x4"
BATCH = 80  # divides among the chips of all slices, and suffices for the five local steps of each of four clients


@pytest.fixture(autouse=True)
def quick_compilation():
    """What is asserted does not depend on how long the compiler looks for the fastest program."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


def recipe(slug, mesh, **changes):
    return dataclasses.replace(recipe_for(slug), batch_size=BATCH, mesh=mesh, accumulate=1, **changes)


# Half a minute and more of libtpu's time each, and a third of all: CI lowers these and leaves compiling to `-m tpu`.
SLOW = {
    "attention_mamba", "camera_isac", "csrnet_attention", "ecg_nat", "ga_wireless_splat", "heterogenmanip", "hyperpose",
    "mamba_complete_3d", "optnet", "r_dmesh", "rpattention", "spine_context_resunet",
}  # fmt: skip


@pytest.mark.parametrize("slug", sorted(SLOW))
def test_the_train_step_lowers_for_a_slice_of_sixteen(slug):
    tiny = recipe(slug, "data=2,fsdp=4,tensor=2")
    model, program = recipe_step(tiny, topology_devices(SLICE))
    batch = example_batch(tiny, model)
    batch = placed(batch, jax.tree.map(lambda x: batch_sharding(program.mesh, x.shape), batch))
    text = program.step.lower(placed(program.state_shapes, program.state_shardings), batch).as_text()
    rows = placements(program.state_shapes.params, program.mesh)
    assert sum(r.bytes_per_device for r in rows) < sum(r.bytes for r in rows)
    assert "mhlo.num_partitions = 16" in text
    assert "sharding" in text


def placed(shapes, shardings):
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)


@pytest.mark.parametrize("slug", [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in SLUGS])
def test_the_train_step_compiles_for_a_slice_of_sixteen(slug):
    tiny = recipe(slug, "data=2,fsdp=4,tensor=2")
    report, _, program = compile_step(tiny, SLICE)
    rows = placements(program.state_shapes.params, program.mesh)
    # Falls as 1/N: of what the rules split, each device holds its part and no more.
    assert report.memory.parameters == sum(r.bytes_per_device for r in rows) < sum(r.bytes for r in rows)
    assert report.device == "TPU v5 lite"
    assert report.memory.fits
    kinds = {e.kind for e in report.exchanges}
    assert "all-reduce" in kinds
    # What is split over fsdp is gathered; the hardmax classifier's two channels are not.
    assert "all-gather" in kinds or not any("fsdp" in r.spec for r in rows)
    assert 0 < report.step_seconds < 1
    assert report.limit in report_text(report)
    assert report.model_flops <= 16 * report.flops


def test_memory_falls_as_one_over_the_slice():
    split = []
    for n, topology in ((1, "v5e:1x1"), (4, "v5e:2x2"), (16, SLICE)):
        report, _, program = compile_step(recipe("ister", f"fsdp={n}", precision="bfloat16"), topology)
        assert report.memory.temporaries > 0  # of the smallest papers a chip's share needs none
        vectors = sum(r.bytes for r in placements(program.state_shapes.params, program.mesh) if len(r.shape) < 2)
        split.append(n * (report.memory.parameters - vectors))
    assert split[0] == split[1] == split[2] > 0


def test_a_part_of_a_slice_is_refused():
    with pytest.raises(
        UserError, match="mesh 'fsdp=4' uses 4 of the 16 devices of v5e:4x4: let one axis take the rest"
    ):
        compile_step(recipe("ister", "fsdp=4"), SLICE)


def test_the_loop_over_steps_compiles():
    model, program = recipe_step(recipe("ister", "data=2,fsdp=4,tensor=2"), topology_devices(SLICE))
    batch = example_batch(recipe("ister", "data=-1"), model)
    split = Rows(placed(batch, jax.tree.map(lambda x: batch_sharding(program.mesh, x.shape), batch)))
    numbers = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=replicated(program.mesh)) for s in ((4 * BATCH,), (), ())]
    state = placed(program.state_shapes, program.state_shardings)
    assert "all-reduce" in program.run.lower(state, split, *numbers).compile().as_text()


def test_loops_over_layers_are_counted_in_tpu_programs_too():
    model = dataclasses.replace(recipe_for("ister").model, num_layers=2)
    loop, row = (
        compile_step(recipe("ister", "data=16", model=model, scan_layers=scan), SLICE).report for scan in (True, False)
    )
    assert loop.exact
    assert loop.flops == pytest.approx(row.flops, rel=0.1)


def test_a_step_that_does_not_fit_says_what_helps():
    wide = dataclasses.replace(recipe_for("ister").model, d_model=2**15)
    with pytest.raises(UserError, match=r"does not fit the memory of a TPU v5 lite: it needs [\d.]+G, .* saves memory"):
        compile_step(recipe("ister", "data=1", model=wide), "v5e:1x1")


@pytest.mark.parametrize("name", ["v5e:3x3", "v99:2x2"])
def test_slices_that_do_not_exist(name):
    with pytest.raises(UserError, match=f"libtpu makes nothing of --topology {name}"):
        topology_devices(name)
