"""`zoo bench backbones`: time and memory of the forward pass and of the gradients of pretrained architectures."""

import datetime
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import zoo
from trainers.flops import matmul_flops
from trainers.measure import measure, output_folder, write_table
from zoo.errors import UserError
from zoo.registry import variable_shapes

__all__ = ["bench_backbones"]


def bench_backbones(
    *,
    only: Sequence[str] = (),
    batch_size: int = 2,
    length: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
    output: Path = Path("runs/bench"),
    console: Any = None,
) -> list[dict]:
    """Measures, prints a line a measurement and writes a csv; returns the rows.

    `only` are names, each with a configuration after a colon or without ("tiny"). Parameters are drawn, since time does
    not depend on them; GFLOP/s is of the matrix products that the model asks for.
    """
    from rich.console import Console

    console = console or Console()
    names = [word.partition(":") for word in only or [entry.name for entry in zoo.backbones(status="works")]]
    chosen = [(zoo.backbone(name), config or "tiny") for name, _, config in names]
    chosen = [(record, name, record.config(name)) for record, name in chosen]
    for option, size in {"batch-size": batch_size, "length": length, "image-size": image_size}.items():
        if size is not None and size < 1:
            raise UserError(f"--{option} {size} must be at least 1")
    cases = [
        (record, name, *_inputs(record, name, config, batch_size, length, image_size, jnp.dtype(dtype)))
        for record, name, config in chosen
    ]
    output = output_folder(output)
    console.print(
        f"{jax.devices()[0].device_kind}, {dtype}\n{'backbone':<40}{'parameters':>15}  {'pass':<18}{'ms':>11}"
        f"{'GFLOP/s':>10}{'peak MiB':>11}{'compile s':>11}  inputs",
        highlight=False,
        soft_wrap=True,
    )
    rows = []
    for record, name, model, needed, given in cases:
        variables = _drawn(needed)
        count = sum(x.size for x in jax.tree.leaves(variables["params"]))
        shapes = ", ".join(f"{k} {'x'.join(map(str, np.shape(v)))}" for k, v in given.items() if np.ndim(v))

        def forward(variables, given, model=model):
            return model.apply(variables, **given)

        def gradients(variables, given, model=model):
            rest = {k: v for k, v in variables.items() if k != "params"}

            def loss(params):
                outputs = jax.tree.leaves(model.apply({"params": params, **rest}, **given))
                floats = [x for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)]
                return sum(jnp.mean(jnp.square(x.astype(jnp.float32))) for x in floats)

            return jax.value_and_grad(loss)(variables["params"])

        for direction, function in (("forward", forward), ("forward+backward", gradients)):
            m = measure(function, (variables, given))
            flops = matmul_flops(function, variables, given).count
            row = {
                "backbone": record.name,
                "config": name,
                "parameters": count,
                "device": jax.devices()[0].device_kind,
                "dtype": dtype,
                "inputs": shapes,
                "pass": direction,
                "median_ms": round(m.seconds * 1e3, 3),
                "gflop": float(f"{flops / 1e9:.5g}"),
                "gflop_per_s": float(f"{flops / m.seconds / 1e9:.4g}"),
                "compile_s": round(m.compile_seconds, 2),
                "peak_mib": round(m.peak_bytes / 2**20, 1),
            }
            rows.append(row)
            console.print(
                f"{record.name + ' ' + name:<40}{count:>15,}  {direction:<18}{row['median_ms']:>11,.2f}"
                f"{row['gflop_per_s']:>10,.1f}{row['peak_mib']:>11,.1f}{row['compile_s']:>11,.1f}  {shapes}",
                highlight=False,
                soft_wrap=True,
            )
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    path = output / f"backbones-{stamp}.csv"
    write_table(path, rows)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return rows


def _inputs(record, name, config, batch_size, length, image_size, kind) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(model, shapes of its variables, arguments of its call), found to fit one another before anything is timed."""
    model, wanted = record.model(config), {"length": length, "image_size": image_size}
    sizes = {k: v for k, v in wanted.items() if v is not None and k in inspect.signature(record.example).parameters}

    def cast(x: Any) -> Any:
        return x.astype(kind) if jnp.issubdtype(x.dtype, jnp.floating) else x

    given = jax.tree.map(cast, record.example(config, batch_size=batch_size, key=jax.random.key(0), **sizes))
    needed = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, kind) if jnp.issubdtype(s.dtype, jnp.floating) else s,
        variable_shapes(record, model),
    )
    try:
        jax.eval_shape(lambda variables, given: model.apply(variables, **given), needed, given)
    except ValueError as error:
        raise UserError(f"{record.name} {name} does not take these inputs: {error}") from error
    return model, needed, given


def _drawn(shapes: Mapping[str, Any]) -> Any:
    """Quicker than compiling the initialisers. What passes through keeps its scale: denormal numbers are slow."""
    rng = np.random.default_rng(0)

    def one(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key in ("scale", "var"):
            return jnp.ones(shape.shape, shape.dtype)
        inputs = max(1, int(np.prod(shape.shape[:-1])))
        return jnp.asarray(rng.standard_normal(shape.shape, np.float32) * inputs**-0.5).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)
