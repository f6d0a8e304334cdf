"""Several processes as one run: how they find each other, what only the first does, what all must agree on.

Every process runs the same program on its part of the devices. Only the first writes files and prints.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from trainers.sharding import replicated
from zoo.errors import UserError

__all__ = ["any_process", "barrier", "connect", "gathered", "is_first", "lost", "on_first", "replicate", "several"]

# A process that has not been heard of for so long ends the run of all.
_HEARTBEAT_SECONDS = 30
_MESSAGE_BYTES = 1 << 16


def connect(coordinator: str | None, process: str | None) -> None:
    """Joins the processes of a run; to be called before JAX looks for devices.

    On Cloud TPU, GKE, Slurm and Open MPI the processes find each other and neither argument is needed. Elsewhere
    `coordinator` is host:port of the first process, and `process` is "0/4" in the first of four, "1/4" in the next.
    """
    if (coordinator is None) != (process is None):
        missing = "--process, e.g. 0/4" if process is None else "--coordinator, host:port of process 0"
        raise UserError(f"several processes need --coordinator and --process together: {missing} is missing")
    options: dict[str, Any] = {}
    if coordinator is not None:
        found = re.fullmatch(r"(\d+)/([1-9]\d*)", process)
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"--process {process!r} must be index/number, the first of four being 0/4")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator {coordinator!r} must be host:port of process 0, e.g. 10.0.0.1:8476")
        options = {
            "coordinator_address": coordinator,
            "process_id": int(found[1]),
            "num_processes": int(found[2]),
            "initialization_timeout": 120,
        }
    elif not _in_a_cluster():
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **options)
    except (RuntimeError, ValueError) as error:
        if not options and not _told_of_others():
            return  # a single TPU machine, a hosted notebook for one, need not know of a cluster
        where = coordinator or "the cluster's coordinator"
        raise UserError(
            f"the processes of this run did not find each other through {where} ({str(error).splitlines()[0]}): "
            "start the same command on every worker within two minutes"
        ) from error


def _told_of_others() -> bool:
    """Whether the environment says that there are several processes."""
    counts = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    return any(int(os.environ.get(name) or 1) > 1 for name in counts) or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )


def _in_a_cluster() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu" and "SLURM_JOB_ID" not in os.environ:
        return False
    tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return _told_of_others() or tpu


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """function() in the first process; all get its result (what JSON can hold), or raise its `UserError`."""
    if not several():
        return function()
    outcome = {}
    if is_first():
        try:
            outcome = {"result": function()}
        except UserError as error:
            outcome = {"error": str(error)}
        except OSError as error:
            outcome = {"error": f"{error.filename} cannot be written ({error.strerror or error})"}
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = json.dumps(outcome).encode()
    message[: len(text)] = np.frombuffer(text, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(message))
    outcome = json.loads(bytes(received).rstrip(b"\0"))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if not several() else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def lost(error: BaseException) -> UserError | None:
    """What to say if the error means that another process has gone."""
    signs = r"[Gg]loo|[Cc]onnection (reset|closed|refused)|by peer|[Hh]eartbeat|[Cc]oordination service|[Bb]arrier|NCCL"
    if not several() or not (found := re.search(f"[^\n]*({signs})[^\n]*", str(error))):
        return None
    return UserError(
        f"another process of this run was lost ({found[0].strip()[:200]}): start the same command on every worker "
        "again, it goes on from the last checkpoint"
    )


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds, on all devices of the mesh."""
    sharding = replicated(mesh)
    if not several():
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def gathered(tree: Any) -> Any:
    """Arrays that lie split over all devices, whole in the memory of every process."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else jax.device_get(tree)
