"""`zoo compile`, utilisation and the table of accelerators, on eight virtual devices of this machine."""

import dataclasses
import functools
import json
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.trainers.test_cli import one_line, run
from trainers import compile as compiling
from trainers.compile import compile_step, model_flops, needless_gathers, recipe_step, report_text
from trainers.devices import Accelerator, accelerator
from trainers.hlo import Hlo
from trainers.recipe import recipe_for
from trainers.sharding import make_mesh, placements

RECIPE = dataclasses.replace(recipe_for("ister"), batch_size=32)
CHIP = Accelerator("test", bfloat16=4e9, float32=1e9, memory=2**20, bandwidth=1e8, interconnect=1e7)


def compiled(mesh: str, **changes):
    return compile_step(dataclasses.replace(RECIPE, mesh=mesh, **changes))


once = functools.cache(compiled)


@pytest.fixture(scope="module")
def data_parallel():
    return once("data=8")


def test_parameter_memory_falls_as_one_over_n_under_fsdp():
    whole = split = None
    for n in (1, 8):
        report, _, program = once(f"fsdp={n}")
        rows = placements(program.state_shapes.params, program.mesh)
        vectors = sum(r.bytes for r in rows if len(r.shape) < 2)
        assert report.memory.parameters == sum(r.bytes_per_device for r in rows)
        if n == 1:
            whole, split = report.memory, report.memory.parameters - vectors
            assert whole.parameters == 4 * report.parameters
        # Vectors stay whole by rule; everything else is cut into n equal parts, Adam's two moments with it.
        assert report.memory.parameters == vectors + split / n
        assert report.memory.optimizer_state == pytest.approx(2 * report.memory.parameters, abs=8)


def test_memory_adds_up(data_parallel):
    memory = data_parallel[0].memory
    named = memory.parameters + memory.optimizer_state + memory.collections + memory.batch
    assert 0 <= memory.arguments - named <= 64  # the step's number
    assert memory.peak == memory.arguments + memory.outputs - memory.reused + memory.temporaries
    # The state before is given up for the state after.
    assert memory.reused >= memory.parameters + memory.optimizer_state
    assert memory.fits is None


def test_products_are_shared_out_among_devices(data_parallel):
    report, step, _ = data_parallel
    of_all = 8 * Hlo(step.as_text(), devices=8).matmul_flops()
    assert report.exact
    assert of_all == report.model_flops
    assert report.flops * 8 > report.model_flops
    assert report.flops * 8 < 2 * report.model_flops


def test_data_parallelism_sums_every_gradient_once(data_parallel):
    (exchange,) = data_parallel[0].exchanges
    assert (exchange.kind, exchange.group) == ("all-reduce", 8)
    gradients = 4 * data_parallel[0].parameters
    assert gradients <= exchange.bytes <= gradients + 64  # and the loss
    assert exchange.sent == exchange.bytes * 2 * 7 / 8
    assert data_parallel[0].warnings == ()


def test_one_device_sends_nothing():
    report = once("fsdp=1").report
    assert report.exchanges == ()
    assert "none" in report_text(report)


def test_fsdp_brings_parameters_together_and_tensor_does_not():
    for mesh, expected in (("fsdp=8", True), ("tensor=8", False)):
        found = Hlo(once(mesh)[1].as_text(), devices=8).collectives()
        sources = {c.source for c in found if c.kind == "all-gather" and c.source}
        assert any(name.startswith("state.params") for name in sources) == expected, mesh


def test_parts_of_a_batch_count_like_the_whole():
    (whole, step, _), (parts, loop, _) = once("fsdp=1"), compiled("fsdp=1", accumulate=4)
    assert parts.exact
    assert parts.model_flops == whole.model_flops
    assert Hlo(loop.as_text()).matmul_flops() == Hlo(step.as_text()).matmul_flops()
    assert parts.flops == pytest.approx(whole.flops, rel=0.1)
    assert parts.memory.temporaries < whole.memory.temporaries


def test_model_flops_leave_out_what_is_computed_again():
    (plain, step, _), (report, again, _) = once("fsdp=1"), compiled("fsdp=1", remat="full")
    assert report.model_flops == plain.model_flops
    assert Hlo(again.as_text()).matmul_flops() > Hlo(step.as_text()).matmul_flops()


class State(NamedTuple):
    params: Any


def gathers(mesh, spec, times):
    """Warnings for a step that brings one split parameter together so many times."""
    mesh = make_mesh(mesh, batch_size=8, devices=jax.devices()[:8])
    whole = NamedSharding(mesh, PartitionSpec())

    def step(state: State, x):
        for _ in range(times):
            w, x = jax.lax.optimization_barrier((state.params["head"]["kernel"], x))
            x = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole))
        return x

    params = {"head": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))}}
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=whole)
    hlo = Hlo(jax.jit(step).lower(State(params), x).compile().as_text(), devices=8)
    shares = {name: math.prod(shape.dims) for name, shape in hlo.arguments}
    return needless_gathers(hlo.collectives(), params, shares, mesh.shape)


def test_needless_gathers_are_named():
    assert gathers("fsdp=8", PartitionSpec("fsdp"), 1) == []
    (twice,) = gathers("fsdp=8", PartitionSpec("fsdp"), 2)
    assert twice.startswith("head/kernel: gathered 2 times a step, once would do")
    (tensor,) = gathers("data=2,tensor=4", PartitionSpec(None, "tensor"), 1)
    assert tensor.startswith("head/kernel: gathered 1 time a step, although the mesh has no fsdp axis")


def test_a_gather_that_cannot_be_traced_is_known_by_its_shape():
    mesh = make_mesh("tensor=8", batch_size=8, devices=jax.devices()[:8])
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("tensor", None))

    def step(state: State, x):
        return state.params["kernel"] @ jax.lax.with_sharding_constraint(jnp.sin(x) + jnp.cos(x), whole)

    params = {"kernel": jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=whole)}
    x = jax.ShapeDtypeStruct((48, 64), jnp.float32, sharding=split)
    hlo = Hlo(jax.jit(step).lower(State(params), x).compile().as_text(), devices=8)
    (sentence,) = needless_gathers(hlo.collectives(), params, {}, mesh.shape)
    assert sentence == "of the shape of kernel: gathered 1 time a step, although the mesh has no fsdp axis"


def test_the_slowest_resource_decides(data_parallel):
    plain, step, _ = data_parallel
    _, program = recipe_step(dataclasses.replace(RECIPE, mesh="data=8"), jax.devices())
    report = compiling._report(RECIPE, "local", program, step, CHIP)
    assert report.flops == plain.flops
    sent = sum(e.sent for e in report.exchanges)
    times = {"compute": report.flops / 1e9, "memory bandwidth": report.bytes / 1e8, "communication": sent / 1e7}
    assert report.parts == pytest.approx(times)
    assert report.step_seconds == pytest.approx(max(times.values()))
    assert times[report.limit] == max(times.values())
    assert report.examples_per_second == pytest.approx(32 / report.step_seconds)
    assert report.memory.capacity == 2**20
    assert report.memory.fits == (report.memory.peak <= 2**20)
    assert f"limited by {report.limit}" in report_text(report)
    assert ("does NOT fit" in report_text(report)) == (report.memory.peak > 2**20)


def test_utilisation_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    assert compiling.utilisation(RECIPE, 8)(3.0) == {}  # of a machine whose peak is not known
    monkeypatch.setattr(compiling, "accelerator", lambda devices: CHIP)
    assert compiling.utilisation(RECIPE, 8)(3.0) == {"train/mfu": pytest.approx(3 * model_flops(RECIPE).count / 8e9)}


def device(kind, *coords):
    return types.SimpleNamespace(device_kind=kind, **({"coords": coords} if coords else {}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"), ("TPU v5e", "TPU v5e"), ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"), ("TPU v6 lite", "TPU v6e"), ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB PCIe"), ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"), ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100"),
    ],
)  # fmt: skip
def test_kinds_of_accelerators(kind, name):
    assert accelerator([device(kind)]).name == name


def test_what_is_not_in_the_table_is_not_guessed():
    for kind in ("cpu", "TPU v99", "NVIDIA L400", "NVIDIA GeForce GTX 1080", "Radeon"):
        assert accelerator([device(kind)]) is None


def test_cores_of_one_chip_share_it():
    whole, half = accelerator([device("TPU v4", 0, 0, 0)]), accelerator([device("TPU v4", 0, 0, 0)] * 2)
    assert half.bfloat16 == whole.bfloat16 / 2
    assert half.memory == whole.memory / 2


def test_the_table_keeps_the_order_of_things():
    for kind in ("TPU v4", "TPU v5e", "TPU v6e", "NVIDIA H100 80GB HBM3", "Tesla T4"):
        chip = accelerator([device(kind)])
        assert chip.bfloat16 >= chip.float32 > chip.bandwidth > chip.interconnect
        assert chip.memory < chip.bandwidth


def test_the_command_leaves_text_and_json(tmp_path, capsys):
    command = ["compile", "ister", "--mesh", "fsdp=4", "--batch-size", "8", "--optimizer.name", "sgd"]
    assert run(*command, "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    (text,), (data,) = tmp_path.glob("ister-tiny-local-*.txt"), tmp_path.glob("ister-tiny-local-*.json")
    assert text.read_text() in printed
    values = json.loads(data.read_text())
    assert values["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert values["batch_size"] == 8
    assert values["memory"]["optimizer_state"] < 2 * values["memory"]["parameters"]  # one moment, not two
    assert values["step_seconds"] is None
    assert "no roofline: the peak rates of 'cpu' are not known" in printed
    assert run(*command, "--output", str(tmp_path)) == 0
    assert len(list(tmp_path.iterdir())) == 4


BAD = {
    "unknown paper": (["istr"], "no paper is called 'istr'; did you mean 'ister'", 1),
    "no paper": ([], "zoo compile needs the name of a paper", 2),
    "unknown field": (["ister", "--batch-sise", "3"], "has no option --batch-sise; did you mean --batch-size?", 2),
    "not a topology": (["ister", "--topology", "16"], "--topology '16' is neither local nor a TPU slice such as", 1),
    "devices": (["ister", "--mesh", "data=3"], "needs 3 devices, which does not divide the 8 there are", 1),
    "batch": (["ister", "--mesh", "data=8", "--batch-size", "30"], "use a batch size of 24 or 32", 1),
    "sizes": (["ister", "--model.moving-average", "24"], "window 24 is not a positive odd number", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message, code = BAD[name]
    assert run("compile", *arguments) == code
    assert message in one_line(capsys.readouterr())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run("compile", "ister", "--output", str(tmp_path / "file")) == 1
    assert "choose another folder" in one_line(capsys.readouterr())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("JAX TPU support not installed; cannot generate TPU topology.", "pip install 'attention-zoo[tpu]'"),
        (
            "INVALID_ARGUMENT: Invalid TPU external name: TPU v9",
            "libtpu makes nothing of --topology v9:2x2: INVALID_ARGUMENT",
        ),
    ],
)
def test_without_the_compiler_or_the_slice(error, message, monkeypatch, tmp_path, capsys):
    from jax.experimental import topologies

    def fails(**_):
        raise RuntimeError(error)

    monkeypatch.setattr(topologies, "get_topology_desc", fails)
    assert run("compile", "ister", "--topology", "v9:2x2", "--output", str(tmp_path)) == 1
    assert message in one_line(capsys.readouterr())


def test_a_step_that_does_not_fit_says_what_helps(monkeypatch, tmp_path, capsys):
    def fails(self, *_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 21.50G of 15.75G hbm. Exceeded")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fails)
    assert run("compile", "ister", "--output", str(tmp_path)) == 1
    line = one_line(capsys.readouterr())
    assert "needs 21.50G, 15.75G are there" in line
    assert "--remat full" in line


def test_one_step_is_the_step_that_training_takes():
    """The compiled step, run, does what a dispatch of one step does."""
    from trainers.feed import epoch_order
    from trainers.loop import prepare

    ready = prepare(dataclasses.replace(RECIPE, mesh="data=2"))
    order = epoch_order(0, 0, len(ready.splits.train))
    ours, scalars = ready.program.step(ready.program.init(), ready.splits.train.batch(order[:32]))
    theirs, history = ready.program.run(ready.program.init(), ready.splits.train, order, 0, 1)
    np.testing.assert_allclose(scalars["loss"], history["loss"][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours.params, theirs.params)
