"""Freed memory stays with the process: told by the page faults of an operation that is repeated."""

import glob
import json
import subprocess
import sys

import pytest

from trainers.host_memory import keep_freed_memory

SCRIPT = """
import json, resource, sys
from trainers.host_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp
x, step = jnp.zeros(2**24), jax.jit(lambda x: x + 1)  # 64 MiB: more than glibc ever keeps by itself
for i in range(50):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def page_faults(how: str) -> tuple[bool | None, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_large_arrays_reuse_the_pages_of_freed_ones():
    _, ordinary = page_faults("leave")
    kept, few = page_faults("keep")
    assert kept
    assert few < 0.25 * ordinary, (few, ordinary)


def test_hosts_of_accelerators_are_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert not keep_freed_memory()
