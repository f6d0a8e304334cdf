"""`zoo bench PAPER`: time, rate and memory of a paper's forward pass and training step on this machine's devices."""

import datetime
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import zoo
from trainers.compile import recipe_step
from trainers.devices import accelerator
from trainers.flops import matmul_flops
from trainers.measure import measure, output_folder, write_table
from trainers.recipe import Recipe
from trainers.sharding import batch_sharding

__all__ = ["bench_paper"]


def bench_paper(recipe: Recipe, *, output: Path, console: Console | None = None) -> list[dict]:
    """Measures, prints a table and writes a csv; returns the rows.

    The batch is the paper's example, already on the devices. GFLOP/s and MFU are of the matrix products that the model
    asks for, on all devices; memory is of each device, with the state before and after the step side by side.
    """
    console = console or Console()
    paper, devices = zoo.paper(recipe.paper).serving(recipe.model), jax.devices()
    model, program = recipe_step(recipe, devices)
    output = output_folder(output)
    key = jax.random.key(recipe.seed)
    batch = paper.example(model.config, batch_size=recipe.batch_size, key=key)
    batch = jax.device_put(batch, jax.tree.map(lambda x: batch_sharding(program.mesh, x.shape), batch))
    state = program.init()
    passes = {
        "forward": (program.forward, (state.variables, batch)),
        "training step": (program.step, (state, batch)),
    }
    chip = accelerator(devices)
    rows = []
    for name, (function, arguments) in passes.items():
        m = measure(function, arguments)
        flops = matmul_flops(function, *arguments).count
        peak = chip.peak(recipe.precision) * program.mesh.size if chip else None
        rows.append(
            {
                "paper": recipe.paper,
                "config": recipe.config,
                "device": devices[0].device_kind,
                "devices": program.mesh.size,
                "mesh": ",".join(f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1) or "data=1",
                "precision": recipe.precision,
                "batch_size": recipe.batch_size,
                "pass": name,
                "median_ms": round(m.seconds * 1e3, 4),
                "examples_per_second": round(recipe.batch_size / m.seconds, 1),
                "gflop": float(f"{flops / 1e9:.5g}"),
                "gflop_per_s": float(f"{flops / m.seconds / 1e9:.4g}"),
                "mfu": round(flops / m.seconds / peak, 4) if peak else None,
                "compile_s": round(m.compile_seconds, 2),
                "peak_mib": round(m.peak_bytes / 2**20, 2),
            }
        )
    first = rows[0]
    table = Table(
        title=f"{recipe.paper} {recipe.config}, batch {recipe.batch_size}, {recipe.precision}: "
        f"{first['devices']} x {first['device']}, mesh {first['mesh']}"
    )
    columns = {"pass": "", "median_ms": "ms", "examples_per_second": "examples/s", "gflop_per_s": "GFLOP/s",
               "mfu": "MFU", "compile_s": "compile s", "peak_mib": "peak MiB"}  # fmt: skip
    for title in columns.values():
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(*("-" if row[c] is None else f"{row[c]:,}" if c != "pass" else row[c] for c in columns))
    console.print(table)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    path = output / f"{recipe.paper}-{recipe.config}-{stamp}.csv"
    write_table(path, rows)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return rows
