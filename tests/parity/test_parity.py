"""The official code's numbers, one test per golden case.

`PARITY_GOLDENS=<folder> pytest tests/parity` also runs the cases of another folder, of any sizes and options.
"""

import os
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.parity.harness import Case, find_cases, gradient_tolerance, load_case, mismatches
from zoo.registry import record

KEPT = Path(__file__).parent / "goldens"
EXTRA = os.environ.get("PARITY_GOLDENS")
PATHS = {f"{p.parent.name}/{p.stem}": p for folder in filter(None, [KEPT, EXTRA]) for p in find_cases(Path(folder))}
WORKING = {e.slug for e in zoo.papers(status="works")} | {f"backbone_{e.name}" for e in zoo.backbones(status="works")}


def test_the_extra_folder_holds_cases():
    assert EXTRA is None or find_cases(Path(EXTRA)), f"PARITY_GOLDENS={EXTRA} holds no .npz cases"


@pytest.mark.parametrize("name", PATHS)
def test_equals_the_official_code(name):
    case = load_case(PATHS[name])
    slug, module = case.meta["slug"], case.meta["module"]
    if slug not in WORKING or module not in {o.module for o in record(slug).officials}:
        pytest.skip(f"not implemented yet: {slug} {module}" if slug in WORKING else f"not implemented yet: {slug}")
    faults = list(mismatches(case))
    assert not faults, "\n".join(faults)


def test_everything_that_works_and_has_a_bridge_keeps_a_case():
    kept = {path.parent.name for path in find_cases(KEPT)}
    assert {slug for slug in WORKING if record(slug).officials} <= kept


class TestTheHarnessNotices:
    """The harness itself must fail on each kind of difference."""

    @pytest.fixture
    def case(self):
        return load_case(KEPT / "ister" / "open_b.npz")

    @staticmethod
    def changed(case: Case, name: str) -> list[str]:
        value = case.arrays[name].copy()
        value.flat[0] += 0.01 * max(1.0, np.abs(value).max())
        return list(mismatches(Case(case.meta, case.arrays | {name: value})))

    def test_a_wrong_output(self, case):
        assert [f for f in self.changed(case, "output/y") if f.startswith("output y")]

    def test_a_wrong_input_gradient(self, case):
        assert [f for f in self.changed(case, "grad_input/x_mark_enc") if "input x_mark_enc" in f]

    def test_a_wrong_parameter_gradient(self, case):
        name = next(k for k in case.arrays if k.startswith("grad_param/"))
        assert [f for f in self.changed(case, name) if "gradient of parameter" in f]

    def test_a_wrong_weight(self, case):
        assert self.changed(case, "param/Linear_Trend.bias")

    def test_reads_the_tolerances_as_they_are_written(self):
        assert gradient_tolerance({"grad_tol": "max|diff| <= 5e-5 * max|reference| per gradient array"}) == (5e-5, 0.0)
        assert gradient_tolerance({"grad_tol": "with max|diff| <= 2e-4*max|ref| + 1e-6"}) == (2e-4, 1e-6)
        assert gradient_tolerance({"grad_rtol": 1e-3, "atol": 1e-6}) == (1e-3, 1e-6)
        assert gradient_tolerance({"grad_rtol": "1e-3 of max|grad| of each array", "atol": 2e-5}) == (1e-3, 0.0)
