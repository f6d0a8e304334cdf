"""Papers whose claims are computed: that they hold, that a wrong one is noticed, and the `zoo demo` command."""

import json

import jax
import numpy as np
import pytest

import zoo
from tests.trainers.test_cli import one_line, run
from trainers.demo import plot
from zoo.demo import Check, Findings, exponent

DEMOS = [e.slug for e in zoo.papers(status="works") if zoo.paper(e.slug).demo is not None]


@pytest.mark.parametrize("slug", DEMOS)
def test_every_claim_holds(slug):
    demo = zoo.paper(slug).demo
    assert "tiny" in demo.configs
    with jax.enable_x64(True):
        findings = demo.run(demo.configs["tiny"], jax.random.key(0))
    assert [check.claim for check in findings.checks if not check.holds] == []
    assert plot(findings.checks) is not None
    assert len({check.claim for check in findings.checks}) == len(findings.checks)


def test_a_claim_holds_between_its_bounds_and_nowhere_else():
    assert Check("", 1.0, 0.5, 1.5).holds
    assert Check("", [1.0, 2.0], 0.5, [1.0, 2.0]).holds
    assert not Check("", [1.0, 2.1], 0.5, [1.0, 2.0]).holds
    assert not Check("", 0.4, 0.5).holds
    assert not Check("", np.nan).holds
    assert not Findings((Check("", 1.0), Check("", 1.0, high=0.0))).holds
    assert exponent([1, 10, 100], [3.0, 0.3, 0.03]) == pytest.approx(-1.0)


class TestTheCommand:
    @pytest.fixture
    def claims(self):
        """Two claims instead of a paper's own; the second can be made to fail."""
        found = [Check("one", 1.0, 0.0, 2.0, 1.0), Check("two", [1.0, 2.0], 0.0, 3.0, over=("n", [10, 20]))]
        demo = zoo.paper("partition_of_unity").demo
        object.__setattr__(demo, "run", lambda config, key: Findings(tuple(found)))
        return found

    @pytest.fixture(autouse=True)
    def _restore(self):
        demo = zoo.paper("partition_of_unity").demo
        before = demo.run
        yield
        object.__setattr__(demo, "run", before)

    def test_prints_and_writes(self, claims, tmp_path, capsys):
        assert run("demo", "partition_of_unity", "--seed", "3", "--output", str(tmp_path)) == 0
        printed = capsys.readouterr().out
        assert "holds  one" in printed
        assert "measured 1 2; must lie in [0, 3]" in printed
        written = json.loads((tmp_path / "partition_of_unity.json").read_text())
        assert [row["holds"] for row in written] == [True, True]
        assert written[1]["over"] == {"name": "n", "sizes": [10.0, 20.0]}
        assert (tmp_path / "partition_of_unity-claims.png").stat().st_size > 1000

    def test_what_does_not_hold_is_said_and_written_and_fails(self, claims, tmp_path, capsys):
        claims[1] = Check("two", float("nan"), 0.0, float("inf"))
        assert run("demo", "partition_of_unity", "--output", str(tmp_path)) == 1
        output = capsys.readouterr()
        assert "FAILS  two" in output.out
        assert "partition_of_unity: 1 of 2 claims do not hold: two" in output.err
        assert json.loads((tmp_path / "partition_of_unity.json").read_text())[1]["measured"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["demo"], "zoo demo needs the name of a paper, for example: zoo demo covariance_readout", 2),
        (["demo", "ister"], "ister has no demonstration: it is trained, with `zoo train ister`", 1),
        (["demo", "covariance_readot"], "no paper is called 'covariance_readot'; did you mean 'covariance_readout'", 1),
        (["demo", "covariance_readout", "--config", "crd"], "covariance_readout has no config 'crd'", 1),
        (["demo", "covariance_readout", "--seeed", "1"], "has no option --seeed; did you mean --seed", 2),
        (["train", "covariance_readout"], "covariance_readout has claims to compute and nothing to train: zoo demo", 1),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    assert sentence in one_line(capsys.readouterr())
    assert not list(tmp_path.iterdir())


def test_a_paper_without_a_model_says_so():
    with pytest.raises(zoo.UserError, match="covariance_readout has claims to compute and no model: zoo demo"):
        zoo.create("covariance_readout")
