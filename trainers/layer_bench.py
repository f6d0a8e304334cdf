"""`zoo bench layers`: time, rate, compile time and memory of every primitive against its length."""

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

import layers
from trainers.measure import Limits, Measurement, machine_limits, measure, output_folder, slope, write_table
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["CASES", "Case", "bench_layers"]

B, H, D = 1, 4, 64  # batch, heads and head width of all cases of tokens
N = 16  # states a channel
KEY = jax.random.key(0)


@dataclass(frozen=True)
class Case:
    """A primitive at a length: `build(length)` gives the function and its arguments."""

    build: Callable[[int], tuple[Callable, tuple]]
    flops: Callable[[int], float] | None = None
    """The forward pass's arithmetic in matrix products, by the equation (not by the implementation)."""
    linear: bool = True
    """Whether time should grow in proportion to length."""
    gradient: bool = True
    """Whether the backward pass is timed too."""


def normal(index: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.fold_in(KEY, index), shape)


def heads(length: int, index: int = 0, width: int = D) -> Array:
    return normal(index, B, length, H, width)


def log_decay(length: int, index: int = 5) -> Array:
    return jax.nn.log_sigmoid(normal(index, B, length, H) + 3)


def unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def attention(length: int, **options):
    return partial(layers.dot_product_attention, **options), tuple(heads(length, i) for i in range(3))


def dense(length: int) -> float:
    return 4.0 * B * H * length**2 * D


def grid(length: int, index: int = 0) -> Array:
    """About `length` tokens on a square."""
    side = round(length**0.5)
    return normal(index, B, side, side, H, D)


BLOCK = 64


def block_sparse(length: int):
    """Each block of queries sees four blocks of keys."""
    blocks = -(-length // BLOCK)
    keys = jax.random.split(KEY, B * H * blocks)
    index = jax.vmap(lambda key: jax.random.permutation(key, blocks)[:4])(keys).reshape(B, H, blocks, -1)

    def function(query, key, value, index):
        return layers.block_sparse_attention(query, key, value, index, query_block=BLOCK, key_block=BLOCK)

    return function, (*(heads(length, i) for i in range(3)), index)


def serialized(length: int):
    def function(query, key, value, order):
        return layers.serialized_attention(query, key, value, order, patch_size=128)

    return function, (*(heads(length, i) for i in range(3)), jax.random.permutation(KEY, length)[None])


def spectral(length: int):
    """Points of the unit cube, a Gaussian of their distance, 16 features."""
    points = jax.random.uniform(KEY, (B, length, 3))
    features = [jnp.exp(0.1 * heads(length, i, 16)) for i in range(2)]
    spectrum = layers.gaussian_spectrum(jnp.ones((H, 1)), jnp.full((H, 1), 0.2), modes=8, dims=3, period=2.0)
    function = partial(layers.spectral_linear_attention, period=2.0)
    return function, (*features, heads(length, 2, 16), points, points, spectrum)


def graph_edges(length: int):
    """A graph of `length` nodes with eight incoming edges each."""
    senders = jax.random.randint(KEY, (8 * length,), 0, length)
    receivers = jnp.repeat(jnp.arange(length), 8)
    scores = normal(0, length, H), normal(1, length, H)
    return layers.graph_attention, (*scores, normal(2, length, H, D), senders, receivers)


CASES: dict[str, Case] = {
    "attention": Case(attention, dense, linear=False),
    "attention (causal)": Case(partial(attention, mask=layers.CausalMask()), lambda n: dense(n) / 2, linear=False),
    "attention (window 256)": Case(
        partial(attention, mask=layers.WindowMask(left=128, right=128)), lambda n: 4.0 * B * H * n * 257 * D
    ),
    "attention (jax.nn)": Case(
        lambda n: (jax.nn.dot_product_attention, tuple(heads(n, i) for i in range(3))), dense, linear=False
    ),
    "linear_attention": Case(
        lambda n: (layers.linear_attention, tuple(heads(n, i) for i in range(3))), lambda n: 4.0 * B * H * n * D**2
    ),
    "linear_attention (causal)": Case(
        lambda n: (partial(layers.linear_attention, causal=True), tuple(heads(n, i) for i in range(3))),
        lambda n: 4.0 * B * H * n * D**2,
    ),
    "favor_features": Case(
        lambda n: (partial(layers.favor_features, is_query=True), (heads(n), normal(1, D, D))),
        lambda n: 2.0 * B * H * n * D**2,
    ),
    "dot_attention": Case(lambda n: (layers.dot_attention, tuple(normal(i, B, n, H * D) for i in range(3)))),
    "agent_attention": Case(
        lambda n: (layers.agent_attention, (*(heads(n, i) for i in range(3)), heads(64, 3))),
        lambda n: 8.0 * B * H * n * 64 * D,
    ),
    "gather_representatives": Case(
        lambda n: (layers.gather_representatives, (heads(n, 0, 49), heads(n, 1), heads(n, 2))),
        lambda n: 4.0 * B * H * n * 49 * D,
    ),
    "latent_read": Case(
        lambda n: (layers.latent_read, (heads(64), heads(n, 1), heads(n, 2), heads(64, 3), heads(64, 4))),
        lambda n: 4.0 * B * H * n * 64 * D,
    ),
    "gated_linear_attention": Case(
        lambda n: (layers.gated_linear_attention, (*(heads(n, i) for i in range(3)), log_decay(n))),
        lambda n: 4.0 * B * H * n * D**2,
    ),
    "delta_rule": Case(
        lambda n: (
            layers.delta_rule,
            (heads(n), unit(heads(n, 1)), heads(n, 2), jax.nn.sigmoid(normal(3, B, n, H)), log_decay(n)),
        ),
        lambda n: 6.0 * B * H * n * D**2,
    ),
    "neural_memory": Case(
        lambda n: (
            layers.neural_memory,
            (
                heads(n), unit(heads(n, 1)), heads(n, 2), log_decay(n), log_decay(n, 6),
                0.1 * jax.nn.sigmoid(normal(7, B, n, H)),
            ),
        ),
        lambda n: 6.0 * B * H * n * D**2,
    ),
    "selective_scan": Case(
        lambda n: (
            layers.selective_scan,
            (
                normal(0, B, n, H * D), jax.nn.softplus(normal(1, B, n, H * D) - 3),
                -jnp.exp(normal(2, H * D, N)), normal(3, B, n, N), normal(4, B, n, N),
            ),
        )
    ),
    "state_space_dual": Case(
        lambda n: (
            layers.state_space_dual,
            (
                heads(n), jax.nn.softplus(normal(1, B, n, H) - 3), -jnp.exp(normal(2, H)),
                normal(3, B, n, 1, N), normal(4, B, n, 1, N),
            ),
        ),
        lambda n: 4.0 * B * H * n * D * N,
    ),
    "linear_recurrence": Case(
        lambda n: (layers.linear_recurrence, (normal(0, B, n, H * D), -jax.nn.softplus(normal(1, B, n, H * D))))
    ),
    "causal_depthwise_conv": Case(
        lambda n: (layers.causal_depthwise_conv, (normal(0, B, n, H * D), normal(1, 4, H * D)))
    ),
    "damped_ema": Case(
        lambda n: (
            layers.damped_ema,
            (normal(0, B, n, H * D), jax.nn.sigmoid(normal(1, H * D)), jax.nn.sigmoid(normal(2, H * D))),
        )
    ),
    "neighborhood_attention_1d": Case(
        lambda n: (partial(layers.neighborhood_attention_1d, kernel_size=63), tuple(heads(n, i) for i in range(3))),
        lambda n: 4.0 * B * H * n * 63 * D,
    ),
    "neighborhood_attention_2d": Case(
        lambda n: (partial(layers.neighborhood_attention_2d, kernel_size=7), tuple(grid(n, i) for i in range(3))),
        lambda n: 4.0 * B * H * n * 49 * D,
    ),
    "window_attention": Case(
        lambda n: (
            partial(layers.window_attention, window=8, shift=4), tuple(grid(n, i) for i in range(3))
        ),
        lambda n: 4.0 * B * H * n * 64 * D,
    ),
    "block_sparse_attention (4 of 64)": Case(block_sparse, lambda n: 16.0 * B * H * n * BLOCK * D),
    "serialized_attention": Case(serialized, lambda n: 4.0 * B * H * n * 128 * D),
    "spectral_linear_attention": Case(spectral),
    "apply_rope": Case(
        lambda n: (layers.apply_rope, (heads(n), layers.rope_angles(jnp.arange(n)[None], layers.rope_frequencies(D))))
    ),
    "graph_attention (8 edges a node)": Case(graph_edges),
    "wavelet_transform": Case(lambda n: (partial(layers.wavelet_transform, wavelet="db2"), (normal(0, 64, n),))),
    "hilbert_encode": Case(
        lambda n: (
            partial(layers.hilbert_encode, depth=10),
            (jax.random.randint(KEY, (B, n, 3), 0, 1024),),
        ),
        gradient=False,
    ),
    "series_decomposition": Case(lambda n: (partial(layers.series_decomposition, window=25), (normal(0, B, n, 64),))),
}  # fmt: skip


def gradient_of(function: Callable, arguments: Sequence) -> Callable:
    """Forward and backward: the gradient of the outputs' sum for all float arguments."""
    positions = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))

    def loss(*arguments):
        parts = [x for x in jax.tree.leaves(function(*arguments)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(jnp.sum(jnp.abs(x).astype(jnp.float32)) for x in parts)

    return jax.grad(loss, argnums=positions)


def _row(name: str, direction: str, length: int, dtype: str, case: Case, m: Measurement, limits: Limits) -> dict:
    # Two products in the backward pass for each of the forward one.
    flops = (case.flops(length) if case.flops else 0.0) * (1 if direction == "forward" else 3)
    limit = limits.seconds(flops, m.bytes)
    return {
        "primitive": name,
        "pass": direction,
        "length": length,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "median_ms": round(m.seconds * 1e3, 4),
        "compile_s": round(m.compile_seconds, 2),
        "gflop_per_s": round(flops / m.seconds / 1e9, 2) if flops else "",
        "gb_per_s": round(m.bytes / m.seconds / 1e9, 3),
        "peak_mib": round(m.peak_bytes / 2**20, 2),
        "limit_ms": round(limit * 1e3, 4),
        "of_limit": round(limit / m.seconds, 3),
        "slope": "",
    }


def bench_layers(
    *,
    only: Sequence[str] = (),
    sizes: Sequence[int] = (1024, 4096, 16384, 65536),
    dtype: str = "float32",
    seconds: float = 10.0,
    output: Path = Path("runs/bench"),
    console=None,
) -> list[dict]:
    """Measures, prints a line a measurement, writes a csv and a plot; returns the rows.

    A length whose call is expected to take more than `seconds`, by what the shorter ones took, is left out and named.
    """
    from rich.console import Console

    console = console or Console()
    names = _chosen(only)
    if not sizes or min(sizes) < 2:
        raise UserError(f"--sizes {' '.join(map(str, sizes))} must be lengths of at least 2 tokens")
    output = output_folder(output)
    kind = jnp.dtype(dtype)
    limits = machine_limits(kind)
    console.print(
        f"{jax.devices()[0].device_kind}, {dtype}: matrix product {limits.flops / 1e9:,.0f} GFLOP/s, "
        f"elementwise {limits.bytes / 1e9:,.1f} GB/s",
        highlight=False,
    )
    console.print(
        f"{'primitive':<30}{'pass':<18}{'length':>8}{'ms':>11}{'GFLOP/s':>10}{'GB/s':>8}{'peak MiB':>10}"
        f"{'compile s':>10}{'of limit':>10}",
        highlight=False,
        soft_wrap=True,
    )
    rows = []
    for name in names:
        case = CASES[name]
        for direction in ("forward", "forward+backward") if case.gradient else ("forward",):
            rows += _measure_case(name, direction, case, sorted(sizes), kind, seconds, limits, console)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    table, picture = output / f"layers-{stamp}.csv", output / f"layers-{stamp}.png"
    write_table(table, rows)
    plot(rows, picture)
    steep = sorted({r["primitive"] for r in rows if CASES[r["primitive"]].linear and r["slope"] and r["slope"] > 1.1})
    if len(sizes) > 1:
        console.print(
            f"steeper than length^1.1 though linear: {', '.join(steep)}" if steep else "all linear ones: slope <= 1.1",
            highlight=False,
        )
    console.print(f"wrote {table} and {picture}", highlight=False, soft_wrap=True)
    return rows


def _chosen(only: Sequence[str]) -> list[str]:
    chosen = [name for name in CASES if not only or any(name == o or name.split(" ")[0] == o for o in only)]
    for o in only:
        if not any(name == o or name.split(" ")[0] == o for name in CASES):
            raise UserError(f"--only {o}: no such primitive is measured{closest(o, CASES)}")
    return chosen


def _measure_case(name, direction, case: Case, sizes, kind, seconds: float, limits: Limits, console) -> list[dict]:
    rows, last = [], None
    for length in sizes:
        if last is not None:
            # Time grows at least linearly, and quadratically where the mechanism is quadratic.
            expected = last[1] * (length / last[0]) ** (1 if case.linear else 2)
            if expected > seconds:
                console.print(
                    f"{name:<30}{direction:<18}{length:>8}  left out: about {expected:.0f} s", highlight=False
                )
                continue
        function, arguments = case.build(length)
        arguments = [a.astype(kind) if a.dtype == jnp.float32 else a for a in arguments]
        if direction != "forward":
            function = gradient_of(function, arguments)
        m = measure(function, arguments)
        last = length, m.seconds
        row = _row(name, direction, length, str(kind), case, m, limits)
        rows.append(row)
        console.print(
            f"{name:<30}{direction:<18}{length:>8}{row['median_ms']:>11.3f}{row['gflop_per_s'] or '':>10}"
            f"{row['gb_per_s']:>8.2f}{row['peak_mib']:>10.1f}{row['compile_s']:>10.2f}{row['of_limit']:>10.0%}",
            highlight=False,
            soft_wrap=True,
        )
    if len(rows) > 1:
        steepness = round(slope([r["length"] for r in rows], [r["median_ms"] for r in rows]), 3)
        rows = [r | {"slope": steepness} for r in rows]
        console.print(f"{name:<30}{direction:<18}   slope {steepness:.2f}", highlight=False)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Time against length, forward and backward side by side, one line a primitive."""
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(7.5 * len(directions), 7), layout="constrained")
    names = list(dict.fromkeys(row["primitive"] for row in rows))
    styles = ["-", "--", ":", "-."]
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        for i, name in enumerate(names):
            points = [(r["length"], r["median_ms"]) for r in rows if (r["primitive"], r["pass"]) == (name, direction)]
            if points:
                axes.plot(
                    *zip(*points, strict=True), styles[i // 10 % 4], marker="o", ms=3, color=f"C{i % 10}", label=name
                )
        axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="milliseconds", title=direction)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=math.ceil(len(names) / 24))
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}: {B} x length x {H} heads x {D}")
    figure.savefig(path, dpi=110)
