"""Test-wide set-up: eight virtual CPU devices, quick compilation, and jaxtyping signatures turned into checks."""

import gc
import os
from importlib.metadata import version

# Both must be set before jax and the packages under test are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time goes into compiling programs that run once. Without LLVM's optimisations, without the emitters
# that write fusions by way of MLIR and without splitting a small program for several threads, it takes a quarter of it.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if version("jaxlib").startswith("0.10."):  # XLA aborts at a flag it does not know, and these two come and go
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
# What XLA_FLAGS says already stays.
for _flag in _FLAGS:
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

from tests.signatures import check_signatures  # noqa: E402

check_signatures(["layers", "zoo", "trainers.data"])
# Tracing makes millions of short-lived objects and few cycles: the usual threshold costs 5 % of the time.
gc.set_threshold(50_000, 20, 50)

import jax  # noqa: E402
import pytest  # noqa: E402

# The longest, longest first: with `--no-loadscope-reorder` one of them is not the last that one worker is left with.
LONG = ["sweep", "backbones", "parity", "run", "meshes", "distributed", "kill", "notebooks", "demo", "faults"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """What a module compiled goes with it: a worker would otherwise end with many gigabytes of programs."""
    yield
    jax.clear_caches()
