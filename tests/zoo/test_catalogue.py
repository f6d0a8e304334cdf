"""The map of the 109 papers, and finding one's way on it."""

import importlib.util
import subprocess
import sys

import pytest

import zoo
from zoo.catalogue import entries

ENTRIES = entries()


def test_all_papers_are_known():
    assert len(ENTRIES) == 109
    assert len({e.slug for e in ENTRIES}) == 109
    assert {e.kind for e in ENTRIES} == {"model", "intervention", "theory", "optimizer", "system"}
    assert {e.fidelity for e in ENTRIES} <= {"", "exact", "partial", "reading"}


@pytest.mark.parametrize("row", ENTRIES, ids=lambda e: e.slug)
def test_a_paper_works_if_and_only_if_it_has_a_module(row):
    has_room = importlib.util.find_spec(f"zoo.{row.room}") is not None
    assert (row.status == "works") == (has_room and importlib.util.find_spec(row.module) is not None)


def test_papers_are_found_by_their_properties():
    assert "ister" in {e.slug for e in zoo.papers(room="series", task="forecasting", kind="model", fidelity="exact")}
    assert len(zoo.papers(kind="theory")) == 8
    assert len(zoo.papers(status="works")) + len(zoo.papers(status="planned")) == 109
    assert zoo.papers(fidelity="partial", kind="optimizer") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.paper("istr"), "no paper is called 'istr'; did you mean 'ister'"),
        (lambda: zoo.papers(room="sereis"), "no paper has room 'sereis'; did you mean 'series'?"),
        (lambda: zoo.paper("gatp"), "gatp .* is planned but not implemented yet; these work: .*ister"),
        (lambda: zoo.create("ister", "eth1"), "ister has no config 'eth1'; did you mean 'etth1'"),
        (lambda: zoo.create("ister", d_modle=3), "the config of ister has no field 'd_modle'; did you mean 'd_model'"),
    ],
)
def test_misspelt_names_are_answered_by_the_closest(call, message):
    with pytest.raises(zoo.UserError, match=message):
        call()


def test_create_replaces_fields():
    model = zoo.create("ister", "etth1", d_model=64)
    assert (model.config.d_model, model.config.d_ff) == (64, 2048)


def test_importing_the_zoo_costs_little_beyond_flax_and_no_model():
    program = (
        "import time, sys, flax.linen; start = time.process_time(); import zoo; zoo.papers();"
        "print(time.process_time() - start, 'zoo.series.ister' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert all(run.stdout.split()[1] == "False" for run in runs)
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.1
