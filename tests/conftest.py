"""Test-wide set-up: eight virtual CPU devices, quick compilation, and jaxtyping signatures turned into checks."""

import os

# Both must be set before jax and the packages under test are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is LLVM's, on programs that run once: without its optimisations they compile three times as
# fast. What XLA_FLAGS says already stays.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
):
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["layers", "zoo", "trainers.data"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """What a module compiled goes with it: a worker would otherwise end with many gigabytes of programs."""
    yield
    jax.clear_caches()
