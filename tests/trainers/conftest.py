"""Fixtures of the trainer's tests."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as cache


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """Runs of the same recipe in one session compile once: for tests that start many of them."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()
