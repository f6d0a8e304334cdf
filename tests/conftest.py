"""Test-wide set-up: eight virtual CPU devices for the sharding tests, and jaxtyping signatures turned into checks."""

import os

# Both must be set before jax and the packages under test are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["layers", "zoo", "trainers.data"], "beartype.beartype")
