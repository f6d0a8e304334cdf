"""What a run leaves to read: metrics.jsonl, TensorBoard events, a progress line, curves."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["METRICS_FILE", "MetricsLog", "TrainingProgress", "plot_curves", "read_metrics"]

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard event files; each line is on disk before `write` returns."""

    def __init__(self, folder: epath.Path, *, resume_step: int):
        """Lines and events after `resume_step` belong to steps that will be run again, and go."""
        from tensorboardX import SummaryWriter

        self._path = folder / METRICS_FILE
        rows = read_metrics(self._path)
        # Test lines close a run; one that goes on, or is only run again, writes its own.
        kept = [row for row in rows if row["step"] <= resume_step and not any(k.startswith("test/") for k in row)]
        part = folder / f".{METRICS_FILE}.part"
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(os.fspath(folder / "tensorboard"), purge_step=resume_step + 1, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN: a diverged run must still leave a file that every parser reads.
        finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
    figure.savefig(folder / "curves.png", dpi=110)
