"""Timing of jitted functions: the median of repeated calls, compile time, peak memory, and the machine's own limits."""

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError

__all__ = ["Limits", "Measurement", "machine_limits", "measure", "output_folder", "slope", "write_table"]


@dataclass(frozen=True)
class Measurement:
    """Of one function at one size."""

    seconds: float
    """Median of the calls."""
    compile_seconds: float
    peak_bytes: int
    """Arguments, results and the largest working memory in between, as the compiler planned them."""
    bytes: int
    """Arguments and results: the least that has to be moved."""


def measure(function: Callable, arguments: Sequence, *, repeats: int = 5, budget: float = 2.0) -> Measurement:
    """Compiles `function` for these arguments and calls it `repeats` times, or until `budget` seconds are over."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    jax.block_until_ready(compiled(*arguments))
    times = []
    while len(times) < repeats and sum(times) < budget:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return Measurement(float(np.median(times)), compile_seconds, moved + memory.temp_size_in_bytes, moved)


@dataclass(frozen=True)
class Limits:
    """What the machine reaches on the two things that all programs consist of."""

    flops: float
    """Of a large matrix product, a second."""
    bytes: float
    """Read and written by an elementwise operation on a large array, a second."""

    def seconds(self, flops: float, bytes: float) -> float:
        """The least time for so much arithmetic and so much memory traffic."""
        return max(flops / self.flops, bytes / self.bytes)


def machine_limits(dtype: jnp.dtype) -> Limits:
    """Measured now, on the default device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = measure(lambda a: a @ a, [matrix])
    vector = jnp.zeros(2**26, jnp.float32)
    copy = measure(lambda a: a + 1, [vector])
    return Limits(2 * size**3 / product.seconds, copy.bytes / copy.seconds)


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of time ~ size^p: least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def output_folder(path: Path) -> Path:
    """The folder of `--output`, made if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): choose another folder") from error
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A new csv with a line a row; all rows have the fields of the first."""
    with open(path, "x", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
