"""What a run leaves to read: metrics.jsonl, TensorBoard events, a progress line, curves."""

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainers import distributed

__all__ = ["METRICS_FILE", "TIMES", "MetricsLog", "Speed", "TrainingProgress", "plot_curves", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
# What differs between two runs that compute the same bits.
TIMES = frozenset({"compile_seconds", "examples_per_second", "tokens_per_second", "train/mfu"})


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _ObjectFile(io.StringIO):
    """A file in an object store, which cannot append: each flush writes it anew, at once and as a whole."""

    def __init__(self, path: epath.Path, text: str):
        super().__init__()
        self._path = path
        self.write(text)
        self.flush()

    def flush(self) -> None:
        if not self.closed:
            self._path.write_text(self.getvalue())


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard event files; each line is stored before `write` returns."""

    def __init__(self, folder: epath.Path, *, resume_step: int):
        """Lines and events after `resume_step` belong to steps that will be run again, and go.

        Of several processes only the first writes.
        """
        self._file = self._board = None
        if not distributed.is_first():
            return
        from tensorboardX import SummaryWriter

        self._path = folder / METRICS_FILE
        rows = read_metrics(self._path)
        # Test lines close a run; one that goes on, or is only run again, writes its own.
        kept = [row for row in rows if row["step"] <= resume_step and not any(k.startswith("test/") for k in row)]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if "://" in os.fspath(folder):
            self._file = _ObjectFile(self._path, text)
        else:
            part = folder / f".{METRICS_FILE}.part"
            part.write_text(text)
            part.replace(self._path)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(os.fspath(folder / "tensorboard"), purge_step=resume_step + 1, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        # JSON has no NaN: a diverged run must still leave a file that every parser reads.
        finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if not isinstance(self._file, _ObjectFile):
            os.fsync(self._file.fileno())
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def pictures(self, folder: epath.Path, step: int) -> None:
        """The pictures that lie in the folder, to TensorBoard."""
        if self._board is None:
            return
        from matplotlib.image import imread

        for path in sorted(folder.glob("*.png")):
            with path.open("rb") as file:
                pixels = imread(file, format="png")
            self._board.add_image(path.stem, pixels[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Speed:
    """How long compiling took, and how fast training is since: examples a second, and tokens where there are any."""

    def __init__(self, split: Any, batch_size: int):
        """`split` gives the training batches; those of tasks on tokens hold `tokens` (B, L)."""
        batch = jax.eval_shape(split.batch, jax.ShapeDtypeStruct((batch_size,), "int32"))
        self._batch_size = batch_size
        self._tokens = math.prod(batch["tokens"].shape) if "tokens" in batch else None
        self.compiled = False
        self._once: dict[str, float] = {}

    def compile(self, say: Callable[[str], None], function: Callable, *arguments: Any) -> Any:
        """The result of a jitted function's first call, which should compute next to nothing; says how long it took."""
        started = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds = time.perf_counter() - started
        self.compiled, self._once = True, {"compile_seconds": seconds}
        say(f"compiled the training step in {seconds:.1f} s")
        return result

    def line(self, steps_per_second: float) -> dict[str, float]:
        """The rates for a line of metrics.jsonl; with the first one, the time of compilation."""
        values = {"examples_per_second": steps_per_second * self._batch_size, **self._once}
        if self._tokens is not None:
            values["tokens_per_second"] = steps_per_second * self._tokens
        self._once = {}
        return values

    def note(self, steps_per_second: float) -> str:
        if self._tokens is not None:
            return f"{steps_per_second * self._tokens:,.0f} tokens/s"
        return f"{steps_per_second * self._batch_size:,.0f} examples/s"


class TrainingProgress:
    """A bar with steps, loss, rate and time to go; plain lines where the output is not a terminal."""

    def __init__(self, console: Console, *, total: int, done: int):
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, note="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, note: str) -> None:
        self._bar.update(self._task, completed=step, note=note)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def plot_curves(folder: epath.Path, metric: str) -> None:
    """curves.png: training loss and validation metric over the steps."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder / METRICS_FILE)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in (
        ("train/loss", {"color": "0.5"}),
        (f"valid/{metric}", {"color": "tab:red", "marker": "o", "ms": 3}),
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", yscale="log")
    axes.legend(frameon=False)
    with (folder / "curves.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
