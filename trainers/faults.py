"""What goes wrong around a run and what becomes of it: signals, a second writer, full memory, an unwritable folder."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from trainers import distributed
from trainers.recipe import Recipe
from zoo.errors import UserError

__all__ = ["LOCK_FILE", "Interrupted", "Preemption", "explained", "locked"]

LOCK_FILE = "run.lock"


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run, everything done so far is saved. `exit_code` is what the process should end with."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Preemption:
    """While entered, SIGTERM (preemption) and SIGINT (Ctrl-C) are only noted once training is `deferring` them.

    The trainer asks `requested` whenever it could save and leave. A second signal does not wait for that.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.deferring = False
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the trainer asks."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    def requested_anywhere(self) -> bool:
        """Whether this process, or any other of the run, is to stop. All must ask together."""
        # A signal may arrive while the processes agree: what counts is what they agreed on.
        anywhere = distributed.any_process(self.requested is not None)
        if anywhere:
            self.requested = self.requested or signal.SIGTERM
        return anywhere

    def _note(self, number: int, _frame: object) -> None:
        again = self.requested is not None
        self.requested = signal.Signals(number)
        if again or not self.deferring:
            raise self.interrupted("stopped before anything new could be saved")

    def interrupted(self, what: str) -> Interrupted:
        """The exception to raise: a preempted job has done nothing wrong and ends with 0, Ctrl-C with 130."""
        return Interrupted(f"{self.requested.name}: {what}", 0 if self.requested is signal.SIGTERM else 130)


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Makes the folder if need be, and this process its only writer.

    The lock is the kernel's and ends with its process, however that ends; the file says whose it is. Object stores
    have no locks: there nothing is checked.
    """
    if "://" in os.fspath(folder):
        yield
        return
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked_file(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another --workdir") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)


def _locked_file(path: epath.Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file)
            os.close(file)
            raise UserError(
                f"{path.parent} is being written by {owner}: wait for that run, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # some network file systems
                os.close(file)
                raise
        if path.exists() and os.stat(path).st_ino == os.fstat(file).st_ino:
            break
        os.close(file)  # its owner has just finished and removed it
    with contextlib.suppress(OSError):  # on a full disk, which cut-off saves may be filling: those are removed next
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return file


def _owner(file: int) -> str:
    try:
        owner = json.loads(os.pread(file, 1000, 0))
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError):
        return "another process"


@contextlib.contextmanager
def explained(recipe: Recipe, workdir: epath.Path) -> Iterator[None]:
    """Full memory and an unwritable run folder as one sentence with the remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error).strip().splitlines()[0]
        # The CPU's runtime reports it as an internal error.
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            if gone := distributed.lost(error):
                raise gone from error
            raise
        text = re.sub(r"^(RESOURCE_EXHAUSTED|INTERNAL): ", "", text).rstrip(".")[:200]
        raise UserError(f"out of memory ({text}): try {', '.join(_memory_knobs(recipe))}") from error
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written ({error.strerror or error}): make room or give access, and run the same "
            "command again"
        ) from error


def _memory_knobs(recipe: Recipe) -> list[str]:
    """The options that lower memory and are not in use yet, the harmless ones first."""
    knobs = {
        "--remat full": recipe.remat != "full",
        "--scan-layers": not recipe.scan_layers,
        "--mesh fsdp=-1": "fsdp" not in recipe.mesh,
        "--precision bfloat16": recipe.precision != "bfloat16",
        f"--accumulate {2 * recipe.accumulate}": recipe.batch_size % (2 * recipe.accumulate) == 0,
        f"a --batch-size below {recipe.batch_size}": recipe.batch_size > 1,
    }
    return [knob for knob, helps in knobs.items() if helps]
