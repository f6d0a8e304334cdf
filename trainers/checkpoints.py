"""Orbax checkpoints of a run: asynchronous, the newest and the best kept, restored onto any mesh."""

import logging
import math
import os
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from zoo.errors import UserError

__all__ = ["RunCheckpoints"]

_METRIC = "decisive"


class RunCheckpoints:
    """The `checkpoints/` folder of a run. A checkpoint is the train state and a small dictionary of progress."""

    def __init__(self, folder: epath.Path, *, keep_best: int, lower_is_better: bool):
        # Orbax's own log lines speak to its developers; what a user should know is said by the trainer.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = epath.Path(os.path.abspath(folder)) if "://" not in os.fspath(folder) else folder
        self.interrupted = self._clear_interrupted()

        def score(metrics: dict[str, float]) -> float:
            value = metrics[_METRIC]
            if math.isnan(value):
                return -math.inf
            return -value if lower_is_better else value

        policies = [LatestN(1)]
        if keep_best:
            policies.append(BestN(get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False))
        self._manager = ocp.CheckpointManager(
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
        if not self.folder.exists():
            return []
        # Orbax writes to a name with this infix and renames it when all is on disk.
        partial = [path for path in self.folder.iterdir() if ".orbax-checkpoint-tmp" in path.name]
        for path in partial:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return sorted(path.name.split(".")[0] for path in partial)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], metric: float | None) -> None:
        """Starts a save and returns; the state may be changed at once."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)),
            metrics=None if metric is None else {_METRIC: metric},
        )

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """(state, progress) of a step, laid out as `shardings` say."""
        target = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax, TensorStore and the file system each have their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged or belongs to another model ({reason}); "
                "remove that folder to go on from the one before, or choose another --workdir"
            ) from error
        return restored["state"], restored["progress"]

    def close(self) -> None:
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
