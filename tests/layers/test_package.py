"""What holds for every public name of `layers`: found, cheap to import, described, typed, tested, compiled once."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import layers
from trainers.layer_bench import CASES, gradient_of

FUNCTIONS = [n for n in layers.__all__ if not isinstance(getattr(layers, n), type)]
INTERNAL = {"__init__", "blocked", "kernels"}


def test_the_package_exports_what_its_modules_do():
    modules = {path.stem for path in Path(layers.__file__).parent.glob("*.py")} - INTERNAL
    table = {name: tuple(sorted(importlib.import_module(f"layers.{name}").__all__)) for name in modules}
    assert table == layers._MODULES
    assert layers.__all__ == sorted(name for names in table.values() for name in names)
    assert set(layers.__all__) <= set(dir(layers))
    # A module of the same name would hide the function, or the other way round.
    assert not modules & set(layers.__all__)
    text = Path(layers.__file__).read_text()
    assert all(f"from layers.{name} import *" in text for name in modules)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'layers' has no attribute 'flash'"):
        layers.flash  # noqa: B018


def test_importing_costs_less_than_50_ms_beyond_jax():
    code = "import jax, jax.numpy, time; t = time.process_time(); import layers; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_shapes_a_line_of_what_it_computes_and_a_source(name):
    function = inspect.unwrap(getattr(layers, name))
    signature = inspect.signature(function)
    missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not missing
    assert signature.return_annotation is not signature.empty
    lines = inspect.getdoc(function).splitlines()
    assert len(lines[0]) > 20
    assert "Source:" in function.__doc__


def test_every_function_is_used_in_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    assert [name for name in FUNCTIONS if name not in text] == []


COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILATIONS.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.mark.parametrize("name", CASES)
def test_the_same_shapes_again_compile_nothing(name):
    function, arguments = CASES[name].build(64)
    before = len(COMPILATIONS)
    jax.block_until_ready(function(*arguments))
    first = len(COMPILATIONS) - before
    jax.block_until_ready(function(*arguments))
    assert len(COMPILATIONS) - before == first
    assert first >= 1 or name.startswith("attention")  # others may share a compiled function


@pytest.mark.parametrize(
    "name",
    [
        "attention", "linear_attention (causal)", "gated_linear_attention", "delta_rule", "selective_scan",
        "neighborhood_attention_1d", "window_attention", "block_sparse_attention (4 of 64)",
    ],
)  # fmt: skip
def test_memory_of_the_backward_pass_is_linear_in_length(name):
    def peak(length):
        function, arguments = CASES[name].build(length)
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
        memory = jax.jit(gradient_of(function, arguments)).lower(*shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    assert peak(16384) < 4.5 * peak(4096)
