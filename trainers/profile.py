"""A profiler trace of a few training steps, for `zoo train --profile`."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath
from rich.console import Console

__all__ = ["StepTrace"]

STEPS = 5


class StepTrace:
    """Traces the second dispatch of a run, the first one that does not compile. Without a folder it does nothing."""

    def __init__(self, workdir: epath.Path | None, console: Console):
        self._folder = workdir and workdir / "profile"
        self._console = console
        self._dispatches = 0

    def limit(self, steps: int) -> int:
        """How many of these steps the next dispatch should take: one to compile, then few enough for a trace."""
        if self._folder is None or self._dispatches > 1:
            return steps
        return min(steps, STEPS if self._dispatches else 1)

    def report(self) -> None:
        """Says so if the run was over before anything could be traced."""
        if self._folder is not None and self._dispatches < 2:
            self._console.print("--profile: no trace, since it needs two steps and fewer were left", highlight=False)

    @contextlib.contextmanager
    def dispatch(self, step: int) -> Iterator[None]:
        """Around the dispatch that begins after `step` steps."""
        self._dispatches += 1
        if self._folder is None or self._dispatches != 2:
            yield
            return
        # The profiler writes local files only, and a run folder may lie in a bucket.
        with tempfile.TemporaryDirectory() as local:
            with jax.profiler.trace(local, create_perfetto_trace=True):
                yield
            for path in Path(local).rglob("*"):
                if path.is_file():
                    target = self._folder / os.fspath(path.relative_to(local))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    epath.Path(path).copy(target, overwrite=True)
        self._console.print(
            f"traced the steps after {step}: {self._folder}; open perfetto_trace.json.gz of it at "
            f"https://ui.perfetto.dev, or: pip install xprof && tensorboard --logdir {self._folder}",
            highlight=False,
            soft_wrap=True,
        )
