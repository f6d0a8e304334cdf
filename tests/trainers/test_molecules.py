"""Molecules: reading SMILES, their faults, the stand-in, MoleculeNet's tables as batches, the task's scores."""

import csv
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import zoo
from trainers.data.molecules import load_molecules, molecule_standin, standin_property
from trainers.loop import RECIPE_FILE
from trainers.predict import predict_run
from trainers.recipe import Evaluation, Recipe
from zoo.tasks import molecules
from zoo.tasks.smiles import DESCRIPTORS, descriptors_of, fault, quality, symbols_of

CONFIG = zoo.paper("hyformer").config("tiny")


def test_symbols_are_atoms_bonds_rings_and_brackets():
    smiles = "[nH]1cc(Br)C%12Cl=N[C@@H](O)%12"
    assert symbols_of(smiles) == [
        "[nH]", "1", "c", "c", "(", "Br", ")", "C", "%12", "Cl", "=", "N", "[C@@H]", "(", "O", ")", "%12",
    ]  # fmt: skip
    assert "".join(symbols_of(smiles)) == smiles


@pytest.mark.parametrize(
    "smiles",
    [
        "C", "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "c1cc[nH]c1", "O=c1cc[nH]cc1", "C[N+](=O)[O-]",
        "CN(=O)=O", "c1ccc2c(c1)c1ccccc1C2", "[Na+].[Cl-]", "OS(=O)(=O)O", "FC(F)(F)C#N", "C%10CC%10", "c1ccsc1",
        "C/C=C/C", "[O-][n+]1ccccc1", "c1ccc(cc1)-c1ccccc1", "[2H]C([2H])[2H]", "C1CC1.C1CC1",
    ],
)  # fmt: skip
def test_molecules_have_no_fault(smiles):
    assert fault(smiles) is None


@pytest.mark.parametrize(
    ("smiles", "why"),
    [
        ("", "has no atom"),
        ("C(C", "ends within a bond, a branch or a ring"),
        ("CC)", "a branch is empty or was never opened"),
        ("C()C", "a branch is empty"),
        ("(C)C", "a branch has no atom before it"),
        ("C1CC", "ends within"),
        ("C11", "bound to each other twice"),
        ("C1C1", "bound to each other twice"),
        ("=CC", "the bond = has no atom before it"),
        ("C==C", "the bond = has no atom"),
        ("C=", "ends within a bond"),
        ("C=1CC-1", "two different bonds"),
        ("C[Xx", r"\[ is not an atom"),
        ("C[1x]", r"\[1x\] is not an atom"),
        ("C?C", r"\? is not a symbol"),
        ("C..C", "a dot has no molecule before it"),
        ("CC(C)(C)(C)C", "C 1 has 5 bonds"),
        ("FF=C", "F 1 has 3 bonds"),
        ("CO(C)C", "O 1 has 3 bonds"),
        ("CN(C)(C)C", "N 1 has 4 bonds"),
        ("cC", "the aromatic atom 0 is in no ring"),
        ("c1cccc1", "cannot have alternating double bonds"),
        ("c1ccnc1", "cannot have alternating double bonds"),
    ],
)
def test_a_fault_is_named(smiles, why):
    assert re.search(why, fault(smiles))


def test_descriptors_are_counts():
    found = dict(zip(DESCRIPTORS, descriptors_of("Clc1ccc2[nH]ccc2c1C(=O)OC#N"), strict=True))
    assert found == {
        "heavy atoms": 15, "carbons": 10, "nitrogens": 2, "oxygens": 2, "halogens": 1, "sulphur and phosphorus": 0,
        "aromatic atoms": 9, "rings": 2, "double and triple bonds": 2, "branchings": 1,
    }  # fmt: skip


def test_quality_counts_what_is_valid_different_and_new():
    shares = quality(["CC", "CC", "C(", "CO", "N"], ["CO"])
    assert shares == pytest.approx({"valid": 4 / 5, "unique": 3 / 4, "novel": 2 / 3})
    assert quality(["("], []) == {"valid": 0.0, "unique": 0.0, "novel": 0.0}


def test_the_stand_in_writes_different_molecules():
    made = molecule_standin(0, 400)
    assert made[:50] == molecule_standin(0, 50)
    assert made != molecule_standin(1, 400)
    assert len(set(made)) == 400
    assert not [s for s in made if fault(s)]
    assert {symbol for s in made for symbol in s} == set("CNOc12()=")
    assert max(map(len, made)) <= 30
    assert standin_property("c1ccccc1OCN") == 7 * 1 - 1.5 + 2 + 6 * 0.5 + 3


@pytest.fixture(scope="module")
def few():
    return load_molecules("standin_few", data_dir=None, config=CONFIG)


def test_batches_hold_the_strings_and_hide_some_symbols(few):
    assert [len(part) for part in (few.train, few.valid, few.test)] == [8 * 4000, 500, 1000]
    rows = np.arange(300)
    batch = jax.tree.map(np.asarray, few.train.batch(rows))
    assert [few.text(row) for row in batch["tokens"]] == list(few.strings[:300])
    asked, hidden = batch["asked"], batch["corrupted"] == CONFIG.mask_id
    symbols = batch["tokens"] >= 8
    assert not np.any(asked & ~symbols)
    assert not np.any(hidden & ~asked)
    assert np.array_equal(batch["corrupted"][~hidden], batch["tokens"][~hidden])
    assert asked.sum() / symbols.sum() == pytest.approx(0.15, abs=0.02)
    assert hidden.sum() / asked.sum() == pytest.approx(0.8, abs=0.05)
    again, later = (jax.tree.map(np.asarray, few.train.batch(rows + n)) for n in (0, 4000))
    assert np.array_equal(again["asked"], asked)
    assert not np.array_equal(later["asked"], asked)
    assert np.array_equal(later["tokens"], batch["tokens"])
    assert np.array_equal(batch["scored"], batch["mask"] & (np.arange(32) > 0))
    assert batch["known"].sum() == 100
    targets = np.array([standin_property(s) for s in few.strings[:100]])
    np.testing.assert_allclose(batch["targets"][:100, 0], (targets - targets.mean()) / targets.std(), atol=1e-4)
    np.testing.assert_allclose(few.train.unit, targets.std(), rtol=1e-5)
    parts = [{few.text(row) for row in np.asarray(part.tokens)} for part in (few.train, few.valid, few.test)]
    assert len(parts[0] | parts[1] | parts[2]) == 4000 + 500 + 1000
    np.testing.assert_allclose(np.exp(few.train.frequency).sum(), 1.0, rtol=1e-4)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("tables")
        made = [*molecule_standin(0, 18), "CBr", "CN(C)(C)C"]
        with (folder / "clintox.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["smiles", "FDA_APPROVED", "CT_TOX"])
            for i, smiles in enumerate(made):
                writer.writerow([smiles, "" if i == 1 else i % 2, int(i % 3 == 0)])
        parts = {"train": np.arange(12), "valid": np.arange(12, 15), "test": np.arange(15, 19)}
        np.savez(folder / "clintox_scaffold_split.npz", **{k: v.astype(np.int32) for k, v in parts.items()})
        yield str(folder)


def _changed(**changes):
    return zoo.paper("hyformer").config("tiny", **changes)


def test_tables_with_classes_are_divided_as_their_files_say(tables):
    config = _changed(targets="classes", num_targets=2, length=12)
    data = load_molecules("moleculenet/clintox", data_dir=tables, config=config)
    assert [part.tokens.shape[0] for part in (data.train, data.valid, data.test)] == [12, 3, 4]
    assert jnp.issubdtype(data.train.targets.dtype, jnp.integer)
    assert np.argwhere(~np.asarray(data.train.known)).tolist() == [[1, 0]]
    yes, total = 5, 11  # rows 3, 5, 7, 9, 11 of those that are known
    np.testing.assert_allclose(data.train.typical[0], np.log((yes + 0.5) / (total - yes + 0.5)), rtol=1e-5)
    last = data.test.batch(np.array([3]))
    assert CONFIG.unknown_id in last["tokens"][0]  # Br is not among the training symbols
    assert not last["scored"][0][last["tokens"][0] == CONFIG.unknown_id].any()
    assert data.train.lengths.max() == 12  # cut


def test_a_run_writes_new_strings_and_what_they_are(tables, tmp_path, capsys):
    config = _changed(targets="classes", num_targets=2, length=12)
    evaluation = Evaluation(batch_size=6)
    recipe = Recipe(
        paper="hyformer", model=config, data="moleculenet/clintox", data_dir=tables, steps=1, evaluation=evaluation
    )
    (tmp_path / RECIPE_FILE).write_text(recipe.to_yaml())
    model = zoo.paper("hyformer").model(config)
    batch = zoo.paper("hyformer").example(config, batch_size=1, key=jax.random.key(0))
    zoo.save(tmp_path / "model.safetensors", model, jax.jit(model.init)(jax.random.key(0), batch))
    output = predict_run(epath.Path(tmp_path), data_dir=None, output=tmp_path / "new" / "molecules.csv")
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["smiles", "fault", "known", "predicted 0", "predicted 1"]
    assert len(rows) == 6
    assert [row["fault"] for row in rows] == [fault(row["smiles"]) or "" for row in rows]
    assert all(0 < float(row["predicted 1"]) < 1 for row in rows)
    assert "6 strings in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("moleculenet/clintx", {}, "did you mean 'moleculenet/clintox'"),
        ("standin", {}, "the stand-in is generated and takes no --data-dir"),
        ("moleculenet/clintox", {"num_targets": 2}, "targets classes, the model measurements: set --model.targets"),
        ("moleculenet/clintox", {"targets": "classes"}, "num_targets 2, the model 1: set --model.num-targets 2"),
        (
            "moleculenet/clintox",
            {"targets": "classes", "num_targets": 2, "num_descriptors": 9},
            "num_descriptors 10, the model 9",
        ),
    ],
)
def test_what_cannot_be_loaded(tables, name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load_molecules(name, data_dir=tables, config=_changed(**changes))


def test_scores_of_a_set_equal_their_definitions():
    rng = np.random.default_rng(0)
    config = _changed(targets="classes", num_targets=2, length=6)
    batch = zoo.paper("hyformer").example(config, batch_size=60, key=jax.random.key(0))
    outputs = molecules.typical(batch) | {"predictions": jnp.asarray(rng.normal(size=(60, 2)), jnp.float32)}
    totals = jax.tree.map(lambda x: np.asarray(x).sum(0), molecules.metrics(outputs, batch))
    found = molecules.summarise(totals, None)
    known, label, score = (np.asarray(x) for x in (batch["known"], batch["targets"], outputs["predictions"]))
    areas, errors = [], []
    for k in range(2):
        p, n = (score[known[:, k] & (label[:, k] == kind), k] for kind in (1, 0))
        areas.append(np.mean(p[:, None] > n))
        both = np.concatenate([np.log1p(np.exp(-p)), np.log1p(np.exp(n))])
        errors.append(both.mean())
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=0.01)
    assert found["cross_entropy"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert found["nll"] == pytest.approx(np.log(17), rel=1e-4)

    numbers = dict(batch) | {
        "targets": jnp.asarray(rng.normal(size=(60, 2)), jnp.float32),
        "unit": jnp.full((60, 2), 3.0),
    }
    totals = jax.tree.map(lambda x: np.asarray(x).sum(0), molecules.metrics(outputs, numbers))
    squares = np.square(3 * (score - np.asarray(numbers["targets"])))
    expected = np.mean([np.sqrt(squares[known[:, k], k].mean()) for k in range(2)])
    assert molecules.summarise(totals, None)["rmse"] == pytest.approx(expected, rel=1e-4)


def test_what_is_not_known_costs_nothing_and_gives_no_gradient():
    batch = zoo.paper("hyformer").example(CONFIG, batch_size=6, key=jax.random.key(0))
    spoiled = batch | {"targets": jnp.where(batch["known"], batch["targets"], jnp.nan)}
    outputs = molecules.typical(batch)

    def error(predictions, batch):
        return molecules.losses(outputs | {"predictions": predictions}, batch)["prediction"]

    (value, gradient), (other, clean) = (jax.value_and_grad(error)(jnp.ones((6, 1)), b) for b in (spoiled, batch))
    assert value == other
    np.testing.assert_array_equal(gradient, clean)
    assert not np.any(np.asarray(gradient)[~np.asarray(batch["known"])])
    assert np.isfinite(molecules.losses(outputs, batch | {"known": jnp.zeros((6, 1), bool)})["prediction"])
