"""Next-item data: its protocol, its draws, and what a model takes from it as a whole."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.splits import Rows
from trainers import datasets
from trainers.data.recommendation import calendar_contexts, load_recommendation
from trainers.data.standins import BRANDS, CATEGORIES, SEASONS, recommendation_standin
from trainers.loop import prepare
from trainers.recipe import recipe_for


def test_contexts_of_a_date():
    times = np.array(["2020-12-31T23:00:00", "2021-07-04T00:00:00"], "datetime64[s]")
    expected = [[0, 1, 1, 3 / 7, 1, 1], [0.5, 7 / 12, 4 / 31, 6 / 7, 185 / 366, 27 / 53]]
    np.testing.assert_allclose(calendar_contexts(times, (2020, 2022)), expected, rtol=1e-6)


def test_the_standin_follows_brand_order_and_season():
    raw = recommendation_standin(0)
    items = np.stack(raw.sequences) - 1
    category, season, brand = np.unravel_index(items, (CATEGORIES, SEASONS, BRANDS))
    months = np.stack(raw.times).astype("datetime64[M]").astype(int) % 12
    assert (brand == brand[:, :1]).all()
    assert (season == months // 6).all()
    assert np.mean(np.diff(category) % CATEGORIES == 1) == pytest.approx(0.9625, abs=0.01)
    assert np.array_equal(items, np.stack(recommendation_standin(0).sequences) - 1)
    assert not np.array_equal(items, np.stack(recommendation_standin(1).sequences) - 1)


def test_the_last_item_is_for_test_and_the_one_before_for_validation():
    data = load_recommendation("standin", data_dir=None, history=5, num_items=48)
    whole = np.asarray(data.test.items)
    for split, end in ((data.valid, 18), (data.test, 19)):
        batch = jax.device_get(split.batch(jnp.arange(7)))
        assert np.array_equal(batch["candidates"][:, 0], whole[:7, end])
        assert np.array_equal(batch["items"], whole[:7, end - 5 : end])
        assert (batch["candidates"][:, 1:] != batch["candidates"][:, :1]).all()
        chex.assert_trees_all_equal(batch, jax.device_get(split.batch(jnp.arange(7))))
    train = jax.device_get(data.train.batch(jnp.arange(len(data.train))))
    # Cut anywhere, often with padding in front, and never at what is held out.
    place = np.array(
        [
            [r for r in range(18) if row[r] == t]
            for row, t in zip(whole[train["user"]], train["candidates"][:, 0], strict=True)
        ],
        object,
    )
    assert all(place)
    lengths = (train["items"] > 0).sum(1)
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert len(data.train) == 600 * 7


def test_candidates_are_drawn_evenly_from_what_a_user_does_not_know():
    data = load_recommendation("standin", data_dir=None, history=5, num_items=48)
    split = dataclasses.replace(
        data.train, returns=False, negatives=20_000, known=jnp.array([[2, 3, 47, 48, 146, 148]] * 600)
    )
    drawn = np.asarray(split.batch(jnp.arange(1))["candidates"][0, 1:])
    counts = np.bincount(drawn, minlength=49)
    assert set(np.flatnonzero(counts)) == set(range(1, 49)) - {2, 3, 47, 48}
    assert counts[counts > 0].min() > 0.8 * 20_000 / 44


def test_wrong_names_and_sizes_are_refused():
    with pytest.raises(
        zoo.UserError, match="no recommendation data set is called 'movielens'; did you mean 'movielens100k'"
    ):
        load_recommendation("movielens", data_dir=None, history=5, num_items=48)
    with pytest.raises(zoo.UserError, match=r"standin has 48 items, the model is made for 47: set --model\.num-items"):
        load_recommendation("standin", data_dir=None, history=5, num_items=47)


def write_movielens(folder):
    films = [
        f"{i}|Film {i}|01-Jan-1995||url|" + "|".join("1" if g == i else "0" for g in range(19)) for i in (1, 2, 3, 4)
    ]
    (folder / "u.item").write_text("\n".join(films), encoding="latin-1")
    (folder / "u.user").write_text("1|20|M|student|1\n2|30|F|artist|2")
    ratings = [(1, 4, 10), (1, 2, 20), (1, 3, 30), (1, 1, 40), (2, 4, 5), (2, 3, 6)]
    (folder / "u.data").write_text("\n".join(f"{u}\t{i}\t5\t{86_400 * t}" for u, i, t in ratings))


def test_films_are_numbered_by_frequency_in_training(tmp_path):
    write_movielens(tmp_path)
    data = load_recommendation("movielens100k", data_dir=str(tmp_path), history=3, num_items=4)
    # Film 4 is taken twice in training; 2 and 3 once each: 3 by the user too young to be tested; 1 never.
    assert [np.flatnonzero(row).tolist() for row in data.attributes] == [[], [4], [2], [3], [1]]
    assert [s.tolist() for s in data.sequences] == [[1, 2], [1, 3]]
    batch = data.test.batch(jnp.arange(1))
    assert batch["items"].tolist() == [[1, 2, 3]]
    assert batch["candidates"][0, 0] == 4
    np.testing.assert_allclose(batch["candidate_contexts"][0, 0, 2], 10 / 31, rtol=1e-6)  # the tenth of February
    assert (len(data.test), len(data.valid)) == (1, 1)


def test_undated_sets_have_zero_contexts(tmp_path):
    (tmp_path / "Beauty.txt").write_text("1 1 2 3\n2 1 2\n")
    (tmp_path / "Beauty_item2attributes.json").write_text('{"1": [1, 2], "2": [3], "3": [1]}')
    data = load_recommendation("sequential_rec/Beauty", data_dir=str(tmp_path), history=4, num_items=3)
    assert data.times is None
    assert data.attributes.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]]
    batch = data.train.batch(jnp.arange(40))
    assert not batch["contexts"].any()
    assert batch["items"].shape == (40, 4)
    assert set(np.asarray(batch["user"])) == {1}  # the other user's only training item has nothing before it


RECIPE = dataclasses.replace(recipe_for("convrec"), steps=10, log_every=10)


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=4"])
def test_a_state_begins_with_the_constants_of_the_data(mesh):
    run = prepare(dataclasses.replace(RECIPE, mesh=mesh))
    state = run.program.init()
    table = state.collections["constants"]["encoder"]["attribute_table"]
    attributes = datasets.load(run.paper, run.recipe).attributes
    np.testing.assert_array_equal(table, attributes)
    again = run.program.begin(state.params, jax.tree.map(jnp.zeros_like, state.collections))
    np.testing.assert_array_equal(again.collections["constants"]["encoder"]["attribute_table"], attributes)
    split = Rows(run.splits.train.batch(jnp.arange(64)))
    after, _ = run.program.run(run.program.init(), split, jnp.arange(64), 0, 1)
    np.testing.assert_array_equal(after.collections["constants"]["encoder"]["attribute_table"], attributes)


def test_constants_of_another_size_are_refused():
    model = dataclasses.replace(RECIPE.model, num_attributes=13)
    with pytest.raises(zoo.UserError, match=r"the data makes constants of shapes .*\(49, 12\).*wants .*\(49, 13\)"):
        prepare(dataclasses.replace(RECIPE, model=model))
