"""`zoo compile`: the train step of a recipe compiled ahead of time, and what that tells without running it.

The step is compiled alone, one step of it. Its batch has the shapes of the paper's example, which are those of the
model's configuration; no data is read.
"""

import collections
import dataclasses
import datetime
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

import zoo
from trainers.devices import Accelerator, accelerator
from trainers.flops import Flops, matmul_flops
from trainers.hlo import Collective, Hlo
from trainers.recipe import Recipe
from trainers.sharding import batch_sharding, make_mesh
from trainers.step import Program, recipe_program
from zoo.errors import UserError

__all__ = [
    "Compilation",
    "Report",
    "compile_recipe",
    "compile_step",
    "example_batch",
    "model_flops",
    "recipe_step",
    "utilisation",
]


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: int
    optimizer_state: int
    collections: int
    batch: int
    arguments: int
    """All of the above, as laid out in memory."""
    outputs: int
    reused: int
    """Of the outputs, what takes the place of an argument."""
    temporaries: int
    peak: int
    """Arguments, outputs that take no argument's place, and temporaries."""
    capacity: int | None
    """Of the device; None where it is not known."""

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.peak <= self.capacity


@dataclass(frozen=True)
class Exchange:
    """All collectives of one kind and group size in a step."""

    kind: str
    group: int
    count: float
    bytes: float
    """Gathered, reduced or sent, on each device."""
    sent: float
    """Sent by each device, if the groups are rings."""


@dataclass(frozen=True)
class Report:
    """What the compiled step of a recipe needs. FLOPs, bytes and seconds are of one step on one device."""

    paper: str
    config: str
    topology: str
    device: str
    mesh: dict[str, int]
    batch_size: int
    precision: str
    parameters: int
    memory: Memory
    model_flops: float
    """Of the matrix products of one step on all devices together, without rematerialisation."""
    flops: float
    bytes: float
    exact: bool
    """False: some loop's number of iterations is not known, and counts are lower bounds."""
    exchanges: tuple[Exchange, ...]
    compute_seconds: float | None
    memory_seconds: float | None
    communication_seconds: float | None
    warnings: tuple[str, ...]

    @property
    def intensity(self) -> float:
        """FLOPs a byte of main memory."""
        return self.flops / self.bytes if self.bytes else math.inf

    @property
    def parts(self) -> dict[str, float]:
        named = {
            "compute": self.compute_seconds,
            "memory bandwidth": self.memory_seconds,
            "communication": self.communication_seconds,
        }
        return {name: seconds for name, seconds in named.items() if seconds is not None}

    @property
    def step_seconds(self) -> float | None:
        """The least time of a step: of its slowest resource, were all of them used at once and perfectly."""
        return max(self.parts.values()) if self.parts else None

    @property
    def limit(self) -> str | None:
        return max(self.parts, key=self.parts.get) if self.parts else None

    @property
    def examples_per_second(self) -> float | None:
        return self.batch_size / self.step_seconds if self.step_seconds else None

    def to_json(self) -> str:
        derived = ("intensity", "step_seconds", "limit", "examples_per_second")
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        values["memory"]["fits"] = self.memory.fits
        return json.dumps(values, indent=2) + "\n"


def topology_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice such as "v5e:4x4", none of which need exist, or ("local") of this machine."""
    if topology == "local":
        return jax.devices()
    from jax.experimental import topologies

    if not re.fullmatch(r"[A-Za-z0-9]+:\d+(x\d+)*", topology):
        raise UserError(f"--topology {topology!r} is neither local nor a TPU slice such as v5e:4x4, v5p:2x2x1, v6e:4x4")
    # Without it libtpu looks for a cloud machine's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling takes no chip, so it may go on beside other processes.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A host has four chips unless it is told otherwise.
    sizes = [int(n) for n in topology.partition(":")[2].split("x")]
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices
    except Exception as error:  # what libtpu raises differs from release to release
        if "not installed" in str(error) or "libtpu.so" in str(error):
            raise UserError(
                "compiling for a TPU needs its compiler: pip install 'attention-zoo[tpu]' (or use --topology local)"
            ) from error
        raise UserError(f"libtpu makes nothing of --topology {topology}: {str(error).splitlines()[0]}") from error


def recipe_step(recipe: Recipe, devices: Sequence[Any], *, mesh: str | None = None) -> tuple[Any, Program]:
    """The model of a recipe and its program on these devices, without data."""
    paper = zoo.paper(recipe.paper).serving(recipe.model)
    placed = make_mesh(mesh or recipe.mesh, batch_size=recipe.batch_size // recipe.accumulate, devices=devices)
    model = paper.model(recipe.model)
    # The schedule's length changes a constant of the step and nothing that is counted here.
    steps = recipe.steps or recipe.epochs
    return model, recipe_program(recipe, paper, model, placed, total_steps=steps, steps_per_epoch=1)


def example_batch(recipe: Recipe, model: Any) -> Any:
    """The shapes of a batch."""
    example = zoo.paper(recipe.paper).example
    key = jax.random.key(0)
    return jax.eval_shape(lambda key: example(model.config, batch_size=recipe.batch_size, key=key), key)


def model_flops(recipe: Recipe) -> Flops:
    """FLOPs of the matrix products of one training step, without rematerialisation."""
    plain = dataclasses.replace(recipe, remat="none", accumulate=1)
    model, program = recipe_step(plain, jax.devices()[:1], mesh="data=1")
    return matmul_flops(program.step, program.state_shapes, example_batch(plain, model))


def utilisation(recipe: Recipe, devices: int) -> Callable[[float], dict[str, float]]:
    """From steps a second on so many of this machine's devices to {"train/mfu": share of their peak}.

    Empty where the peak is not known.
    """
    chip = accelerator(jax.devices())
    if chip is None:
        return lambda rate: {}
    least = model_flops(recipe).count / (chip.peak(recipe.precision) * devices)
    return lambda rate: {"train/mfu": rate * least}


class Compilation(NamedTuple):
    report: Report
    step: jax.stages.Compiled
    program: Program


def compile_step(recipe: Recipe, topology: str = "local") -> Compilation:
    """Compiles one training step of the recipe for the devices of a topology."""
    devices = topology_devices(topology)
    chip = accelerator(devices)
    model, program = recipe_step(recipe, devices)
    if topology != "local" and program.mesh.size not in (1, len(devices)):
        # libtpu knows no programs for a part of a slice, and ends the process.
        raise UserError(
            f"mesh {recipe.mesh!r} uses {program.mesh.size} of the {len(devices)} devices of {topology}: "
            "let one axis take the rest with -1, or choose a smaller slice"
        )

    def placed(shapes, shardings):
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)

    batch = example_batch(recipe, model)
    batch = placed(batch, jax.tree.map(lambda x: batch_sharding(program.mesh, x.shape), batch))
    try:
        compiled = program.step.lower(placed(program.state_shapes, program.state_shardings), batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        need = re.findall(r"\b\d+(?:\.\d+)?[KMGT]\b", str(error))
        raise UserError(
            f"the step of {recipe.paper} {recipe.config} does not fit the memory of a {devices[0].device_kind}"
            + (f": it needs {need[0]}, {need[1]} are there" if len(need) > 1 else "")
            + "; a smaller --batch-size, --accumulate, --remat full or --mesh fsdp=-1 saves memory"
        ) from error
    return Compilation(_report(recipe, topology, program, compiled, chip), compiled, program)


def _report(
    recipe: Recipe, topology: str, program: Program, compiled: jax.stages.Compiled, chip: Accelerator | None
) -> Report:
    hlo = Hlo(compiled.as_text(), devices=program.mesh.size)
    exchanged = hlo.collectives()
    flops = hlo.flops()
    moved = hlo.bytes()
    by_kind: dict[tuple[str, int], list[Collective]] = collections.defaultdict(list)
    for c in exchanged:
        by_kind[c.kind, c.group].append(c)
    exchanges = tuple(
        Exchange(
            kind,
            group,
            sum(c.times for c in rows),
            sum(c.times * c.bytes for c in rows),
            sum(c.times * c.sent for c in rows),
        )
        for (kind, group), rows in sorted(by_kind.items())
    )
    sent = sum(e.sent for e in exchanges)
    model = model_flops(recipe)
    shares = {name: math.prod(shape.dims) for name, shape in hlo.arguments}
    return Report(
        paper=recipe.paper,
        config=recipe.config,
        topology=topology,
        device=program.mesh.devices.flat[0].device_kind,
        mesh=dict(program.mesh.shape),
        batch_size=recipe.batch_size,
        precision=recipe.precision,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(program.state_shapes.params)),
        memory=_memory(hlo, compiled, chip),
        model_flops=model.count,
        flops=flops,
        bytes=moved,
        exact=hlo.exact and model.exact,
        exchanges=exchanges,
        compute_seconds=flops / chip.peak(recipe.precision) if chip else None,
        memory_seconds=moved / chip.bandwidth if chip else None,
        communication_seconds=sent / chip.interconnect if chip else None,
        warnings=tuple(needless_gathers(exchanged, program.state_shapes.params, shares, program.mesh.shape)),
    )


def _memory(hlo: Hlo, compiled: jax.stages.Compiled, chip: Accelerator | None) -> Memory:
    parts: dict[str, float] = collections.defaultdict(float)
    for name, shape in hlo.arguments:
        parts[re.match(r"state\.(\w+)|(\w*)", name)[1] or "batch"] += shape.bytes
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    reused, temporaries = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    return Memory(
        parameters=int(parts["params"]),
        optimizer_state=int(parts["opt_state"]),
        collections=int(parts["collections"]),
        batch=int(parts["batch"]),
        arguments=arguments,
        outputs=outputs,
        reused=reused,
        temporaries=temporaries,
        peak=arguments + outputs - reused + temporaries,
        capacity=int(chip.memory) if chip else None,
    )


def needless_gathers(
    exchanged: Sequence[Collective], params: Any, shares: Mapping[str, int], mesh: Mapping[str, int]
) -> list[str]:
    """What a step brings together more often than its mesh asks for; `shares` are elements on a device, by argument.

    With fsdp once a step is enough, if there is memory to keep what was gathered; without fsdp, never.
    """
    gathered: dict[str, float] = collections.defaultdict(float)
    alike: dict[str, float] = collections.defaultdict(float)
    sizes = {
        "state.params" + jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    plain = lambda shape: tuple(sorted(n for n in shape if n > 1))  # noqa: E731
    by_shape = {plain(shape): name for name, shape in sizes.items() if len(plain(shape)) > 1}
    for c in exchanged:
        if c.kind != "all-gather":
            continue
        if c.source in sizes:
            # Layer by layer, a loop gathers the slices of a stack.
            part = sum(map(math.prod, c.shapes)) / (shares[c.source] * c.group)
            gathered[c.source] += c.times * part
        else:
            for shape in c.shapes:
                if plain(shape) in by_shape:
                    alike[by_shape[plain(shape)]] += c.times

    def sentence(times: dict[str, float], start: str, end: str) -> list[str]:
        groups: dict[int, list[str]] = collections.defaultdict(list)
        for name, n in times.items():
            groups[round(n)].append("/".join(re.findall(r"\['([^']*)'\]", name)))
        return [
            f"{start}{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: "
            f"gathered {n} time{'s' if n > 1 else ''} a step, {end}"
            for n, names in sorted(groups.items())
        ]

    if mesh["fsdp"] > 1:
        often = {name: n for name, n in gathered.items() if round(n) > 1}
        return sentence(often, "", "once would do where a device has memory for the whole of them")
    against = "although the mesh has no fsdp axis"
    alike = {name: n for name, n in alike.items() if name not in gathered}
    return [
        *sentence(gathered, "", f"{against}: their rule does not go with how the model uses them"),
        *sentence(alike, "of the shape of ", against),
    ]


def _si(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _bytes(value: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"


def _seconds(value: float) -> str:
    return f"{value * 1e6:.3g} us" if value < 1e-3 else f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"


def report_text(r: Report) -> str:
    """The report for people."""
    m = r.memory
    mesh = ",".join(f"{axis}={size}" for axis, size in r.mesh.items() if size > 1) or "one device"
    at_least = "" if r.exact else " or more: the iterations of some loop are not known, and count once"
    lines = [
        f"{r.paper} {r.config}: {r.parameters:,} parameters, batch {r.batch_size}, {r.precision}",
        f"{r.topology}: {math.prod(r.mesh.values())} x {r.device}, mesh {mesh}",
        "",
        "memory of each device",
        f"  parameters         {_bytes(m.parameters):>12}",
        f"  optimiser state    {_bytes(m.optimizer_state):>12}",
        *([f"  other state        {_bytes(m.collections):>12}"] if m.collections else []),
        f"  batch              {_bytes(m.batch):>12}",
        f"  arguments, in all  {_bytes(m.arguments):>12}",
        f"  outputs            {_bytes(m.outputs):>12}   of them in the place of arguments: {_bytes(m.reused)}",
        f"  temporaries        {_bytes(m.temporaries):>12}",
        f"  peak               {_bytes(m.peak):>12}   "
        + ("" if m.fits is None else f"{'fits' if m.fits else 'does NOT fit'} the {_bytes(m.capacity)} of the chip"),
        "",
        "work of each device, a step",
        f"  arithmetic         {_si(r.flops, 'FLOP'):>12}{at_least}",
        f"  main memory        {_si(r.bytes, 'B'):>12}",
        f"  intensity          {r.intensity:>12.1f} FLOP/B",
        f"  matrix products of the model, all devices together: {_si(r.model_flops, 'FLOP')}",
        "",
        "communication of each device, a step",
        *(
            f"  {e.kind:<20}{e.count:>6g} x among {e.group:<5}{_bytes(e.bytes):>12}{_bytes(e.sent):>14} sent"
            for e in r.exchanges
        ),
        *([] if r.exchanges else ["  none"]),
        "",
    ]
    if r.step_seconds is None:
        lines.append(f"no roofline: the peak rates of {r.device!r} are not known")
    else:
        lines += [
            "least time of a step",
            *(f"  {name:<19}{_seconds(seconds):>12}" for name, seconds in r.parts.items()),
            f"  limited by {r.limit}: {_seconds(r.step_seconds)}, {r.examples_per_second:,.0f} examples/s at most",
        ]
    lines += [f"warning: {warning}" for warning in r.warnings]
    return "\n".join(lines).rstrip() + "\n"


def compile_recipe(recipe: Recipe, *, topology: str, output: Path, console: Console | None = None) -> Report:
    """Compiles, prints the report and saves it as text and json; earlier ones stay."""
    console = console or Console()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): choose another folder") from error
    report = compile_step(recipe, topology).report
    text = report_text(report)
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    stem = f"{recipe.paper}-{recipe.config}-{topology.replace(':', '-')}-{stamp}"
    for name, content in ((f"{stem}.txt", text), (f"{stem}.json", report.to_json())):
        with open(output / name, "x", encoding="utf-8") as file:
            file.write(content)
    console.print(f"wrote {output / stem}.txt and .json", highlight=False, soft_wrap=True)
    return report
