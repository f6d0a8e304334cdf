"""Orbax checkpoints of a run: asynchronous, the newest and the best kept, damaged ones skipped, any mesh."""

import contextlib
import errno
import functools
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from trainers import distributed
from zoo.errors import UserError

__all__ = ["FORMAT", "RunCheckpoints", "read_variables", "stored_steps"]

FORMAT = 1  # changes when a reader of the old format would misunderstand the new one
_METRIC = "decisive"
# If the newest turns out to be damaged, the one before is still there, be it the best or not.
_NEWEST = 2
_SYSTEM = "|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)))


class RunCheckpoints:
    """The `checkpoints/` folder of a run.

    A checkpoint is the train state and a small dictionary of progress, which also holds the format's version and the
    recipe.
    """

    def __init__(
        self,
        folder: epath.Path,
        *,
        keep_best: int,
        lower_is_better: bool,
        keep_every: int | None = None,
        recipe: str = "",
    ):
        _quieten()
        self.folder = _absolute(folder)
        self.interrupted = self._clear_interrupted()
        self._keep_best, self._keep_every, self._lower_is_better = keep_best, keep_every, lower_is_better
        self._recipe = recipe
        self._failed = False

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made at the first save: it reads every checkpoint's metric, and damaged ones should be out of the way by then.
        def score(metrics: dict[str, float]) -> float:
            value = metrics[_METRIC]
            if math.isnan(value):
                return -math.inf
            return -value if self._lower_is_better else value

        policies = [LatestN(_NEWEST)]
        if self._keep_best:
            policies.append(BestN(get_metric_fn=score, n=self._keep_best, keep_checkpoints_without_metrics=False))
        if self._keep_every:
            policies.append(EveryNSteps(self._keep_every))
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=score,  # the policy decides; this makes Orbax store the metric and read it back on resuming
                enable_async_checkpointing=True,
                create=True,
            ),
        )

    def _clear_interrupted(self) -> list[str]:
        """Removes saves that were cut off before Orbax renamed them into place, and says which."""
        if not self.folder.exists() or not distributed.is_first():
            return []
        # Orbax writes to a name with this infix and renames it when all is on disk.
        partial = [path for path in self.folder.iterdir() if ".orbax-checkpoint-tmp" in path.name]
        for path in partial:
            path.rmtree() if path.is_dir() else path.unlink()
        return sorted(path.name.split(".")[0] for path in partial)

    @property
    def latest_step(self) -> int | None:
        """The newest step whose save is complete."""
        return max(stored_steps(self.folder), default=None)

    def save(self, step: int, state: Any, progress: dict[str, Any], metric: float | None) -> None:
        """Starts a save and returns; the state may be changed at once. An earlier save's failure is raised here."""
        inside = progress | {"format": FORMAT, "recipe": self._recipe}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(inside)),
                metrics=None if metric is None else {_METRIC: metric},
            )

    def wait(self) -> None:
        """Returns when the saves under way are on disk."""
        if "_manager" in self.__dict__:
            with self._writing():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong in a save, on a full disk above all, as one sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # of the computation that made the state, not of writing it
        except Exception as error:  # Orbax, TensorStore and the file system each have their own
            self._failed = True
            # Orbax drops the rest of its writing, and Python would say so after our own message, now or at the end.
            warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
            if gone := distributed.lost(error):
                raise gone from error
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()  # an earlier save may still succeed
            newest = self.latest_step
            kept = (
                "no checkpoint is complete yet" if newest is None else f"the last good checkpoint is of step {newest}"
            )
            raise UserError(
                f"a checkpoint could not be written to {self.folder} ({_reason(error)}): make room or give access, and "
                f"run the same command again; {kept}"
            ) from error

    def restore_newest(self, shapes: Any, shardings: Any) -> tuple[int, Any, dict[str, Any], list[str]] | None:
        """(step, state, progress, skipped) of the newest checkpoint that can be read; None if there is none at all.

        Those that cannot are left in place under another name and described in `skipped`, a line each. If none can be
        read nothing is touched, and the newest one's error is raised.
        """
        damaged: dict[int, _Damaged] = {}
        for step in sorted(stored_steps(self.folder), reverse=True):
            try:
                state, progress = self._read(step, shapes, shardings)
                break
            except _Damaged as error:
                damaged[step] = error
        else:
            if damaged:
                raise self._error(max(damaged), damaged[max(damaged)])
            return None
        for older in stored_steps(self.folder):
            if older < step and (error := self._unreadable_metric(older)):
                damaged[older] = error
        distributed.barrier("checkpoints are read")
        lines = [
            f"skipped checkpoint {s}, damaged ({e}), and renamed it {self._set_aside(s)}" for s, e in damaged.items()
        ]
        return step, state, progress, lines

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """(state, progress) of a step, laid out as `shardings` say."""
        self.wait()
        try:
            return self._read(step, shapes, shardings)
        except _Damaged as error:
            raise self._error(step, error) from error

    def _error(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"checkpoint {self.folder / str(step)} is damaged or belongs to another model ({error}); "
            "remove that folder to go on from the one before, or choose another --workdir"
        )

    def _read(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        path = self.folder / str(step)
        target = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
        )
        with _damage():
            progress = _items(path, progress=ocp.args.JsonRestore())["progress"]
            version = progress.pop("format", FORMAT)  # the first checkpoints did not state it
            progress.pop("recipe", None)
        if version > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {version}, this version reads {FORMAT}: update attention-zoo"
            )
        with _damage():
            stored = _shapes(path)
        if stored["params"] != (wanted := _flat_shapes(shapes.params)):
            other = next(iter(sorted(set(stored["params"].items()) ^ set(wanted.items()))))
            raise self._error(step, ValueError(f"its parameters differ, first in {other[0]}"))
        with _damage():
            return _items(path, state=ocp.args.StandardRestore(target))["state"], progress

    def _unreadable_metric(self, step: int) -> "_Damaged | None":
        file = self.folder / str(step) / "metrics" / "metrics"  # where Orbax's manager looks for it
        try:
            with _damage():
                json.loads(file.read_text() if file.exists() else "{}")
        except _Damaged as error:
            return error
        return None

    def _set_aside(self, step: int) -> str:
        names = [f"{step}.damaged", *(f"{step}.damaged.{i}" for i in range(2, 1000))]
        name = next(name for name in names if not (self.folder / name).exists())
        if distributed.is_first():
            (self.folder / str(step)).rename(self.folder / name)
        return name

    def close(self) -> None:
        """Waits for the saves under way; a failure that has been raised is not raised again."""
        try:
            self.wait()
        except UserError:
            if not self._failed:
                raise
        finally:
            if "_manager" in self.__dict__:
                with contextlib.suppress(Exception if self._failed else ()):
                    self._manager.close()
            if self._failed:
                with contextlib.suppress(OSError):
                    self._clear_interrupted()  # it may be what fills the disk


@functools.cache
def _quieten() -> None:
    """Keeps to itself what Orbax tells its developers: what a user should know is said by the trainer."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # The many parts of a save that failed each complain again, to an event loop that is closed by then.
    logging.getLogger("asyncio").addFilter(lambda record: ".orbax-checkpoint-tmp" not in record.getMessage())
    before = sys.unraisablehook

    def hook(what: Any) -> None:
        if (what.exc_type, str(what.exc_value)) != (RuntimeError, "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook


class _Damaged(Exception):
    """A checkpoint cannot be read; the message is a short reason."""


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax, TensorStore and the file system each have their own
        raise _Damaged(_reason(error)) from error


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if known := re.search(_SYSTEM, text):  # what TensorStore wraps in three sentences of its own
        return known[0]
    return text.splitlines()[0][:200]


def _absolute(folder: epath.Path) -> epath.Path:
    return epath.Path(os.path.abspath(folder)) if "://" not in os.fspath(folder) else folder


def _items(path: epath.Path, **items: Any) -> Any:
    """Parts of one checkpoint, read without a manager, which would look at all the others too."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(path, args=ocp.args.Composite(**items))


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _metadata(path: epath.Path) -> Any:
    with ocp.StandardCheckpointer() as reader:
        return reader.metadata(path / "state").item_metadata.tree


def _shapes(path: epath.Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the parameters and of the other collections in a checkpoint, from its metadata."""
    tree = _metadata(path)
    return {name: _flat_shapes(tree.get(name, {})) for name in ("params", "collections")}


def stored_steps(folder: epath.Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, in order."""
    folder = _absolute(epath.Path(folder))
    return sorted(ocp.path.step.checkpoint_steps(folder)) if folder.exists() else []


def read_variables(path: epath.Path) -> dict[str, Any]:
    """The variables being trained in one checkpoint of any run, {"params": ..., collection: ...}, in host memory."""
    path = _absolute(path)
    try:
        with _damage():
            tree = _metadata(path)
            wanted = {name: tree[name] for name in ("params", "collections") if tree.get(name)}
            item = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
                found = reader.restore(path / "state", args=args)
    except _Damaged as error:
        raise UserError(f"{path} is damaged or not a checkpoint of the zoo ({error}): choose another one") from error
    return {"params": found["params"], **found.get("collections", {})}
