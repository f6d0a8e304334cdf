"""Cohorts of patients: parts, links, the stand-in, and what is refused."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.cohorts import PARTS, cohort_standin, load_cohort

SIZES = {"block_widths": (6, 5), "num_classes": 2}
CONFIG = zoo.paper("magnet").config("tiny", **SIZES)


def test_the_stand_in_is_a_function_of_its_seed():
    first, again, other = (cohort_standin(seed, **SIZES) for seed in (1, 1, 2))
    for name in ("x", "block_mask", "label", "part"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.x, other.x)
    assert first.block_mask.any(1).all()
    assert not first.block_mask.all()
    assert not first.x[:, :6][~first.block_mask[:, 0]].any()
    assert set(first.label) == {0, 1}


def test_parts_are_disjoint_complete_and_linked_within():
    data = load_cohort("standin", data_dir=None, config=CONFIG)
    batches = [getattr(data, part).batch(jnp.zeros(2, jnp.int32)) for part in PARTS]
    scored = jnp.stack([batch["scored_mask"][0] for batch in batches])
    chex.assert_trees_all_equal(jnp.sum(scored, axis=0), jnp.ones(scored.shape[1], int))
    shares = jnp.mean(scored.astype(float), axis=1)
    chex.assert_trees_all_close(shares, jnp.array([0.7, 0.1, 0.2]), atol=0.03)
    for batch in batches:
        chex.assert_shape(batch["x"], (2, 500, 11))
        linked = np.asarray(batch["graph"][1] > 0)
        inside = np.asarray(batch["scored_mask"][1])
        assert linked[inside].any(1).all()
        assert not linked[~inside].any()
        chex.assert_trees_all_equal(batch["x"][0], batches[0]["x"][0])


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("ov_omic/10", None, "no set of cohorts is called 'ov_omic/10'; did you mean 'ov_omics/10'"),
        ("standin", "somewhere", "the stand-in is generated and takes no --data-dir"),
    ],
)
def test_wrong_names_are_refused(name, data_dir, message):
    with pytest.raises(zoo.UserError, match=message):
        load_cohort(name, data_dir=data_dir, config=CONFIG)


def test_real_cohorts_of_other_sizes_are_refused(tmp_path):
    folder = tmp_path / "10"
    folder.mkdir()
    (folder / "mRNA.csv").write_text("sample,a,b\n" + "".join(f"p{i},0.1,0.{i}\n" for i in range(9)))
    (tmp_path / "miRNA.csv").write_text("sample,c\n" + "".join(f"p{i},0.{i}\n" for i in range(3, 12)))
    for number, part in enumerate(("train", "val", "test")):
        rows = [f"p{i},{i % 2}" for i in range(12) if i % 3 == number]
        (folder / f"label_{part}_paired.csv").write_text("\n".join([",Class", *rows[:2]]) + "\n")
        (folder / f"label_{part}_unpaired.csv").write_text("\n".join([",Class", *rows[2:]]) + "\n")
    fits = zoo.paper("magnet").config("tiny", block_widths=(2, 1), num_classes=2)
    data = load_cohort("ov_omics/10", data_dir=str(tmp_path), config=fits)
    assert data.train.cohort["x"].shape == (12, 3)
    assert int(jnp.sum(data.test.cohort["scored_mask"])) == 4
    assert not data.train.cohort["block_mask"].all()
    with pytest.raises(zoo.UserError, match=r"has blocks of .*ov_rna"):
        load_cohort("ov_omics/10", data_dir=str(tmp_path), config=CONFIG)
