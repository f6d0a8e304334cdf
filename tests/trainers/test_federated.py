"""Images that lie with clients: the partition, a round's batch, the stand-in, and what is refused."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.federated import dirichlet_partition, load_federated, patterned_images

SIZES = {"data_dir": None, "image_size": 16, "channels": 1, "num_classes": 10}


@pytest.fixture(scope="module")
def data():
    return load_federated("standin", **SIZES)


def test_every_example_lies_with_one_client():
    label = np.repeat(np.arange(10), 60)
    parts = dirichlet_partition(label, clients=8, alpha=0.3, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(600))
    assert min(map(len, parts)) >= 10
    chex.assert_trees_all_equal(parts, dirichlet_partition(label, clients=8, alpha=0.3, seed=1))
    assert any(len(a) != len(b) for a, b in zip(parts, dirichlet_partition(label, clients=8, alpha=0.3, seed=2),
                                                 strict=True))  # fmt: skip


def test_a_small_alpha_gives_clients_few_classes():
    label = np.repeat(np.arange(10), 100)

    def largest_share(alpha):
        parts = dirichlet_partition(label, clients=5, alpha=alpha, seed=0)
        return np.mean([np.bincount(label[p], minlength=10).max() / len(p) for p in parts])

    assert largest_share(0.1) > 0.4 > 0.2 > largest_share(100.0)


def test_a_rounds_batch_is_of_four_clients_in_turn(data):
    owner = np.full(len(data.train), -1)
    for client, (mine, count) in enumerate(zip(data.train.members, data.train.count, strict=True)):
        owner[np.asarray(mine[:count])] = client
    assert (owner >= 0).all()
    images = np.asarray(data.train.images.image).reshape(len(owner), -1)
    drawn = set()
    for seed in range(12):
        rows = np.random.default_rng(seed).permutation(len(data.train))[:40]
        batch = data.train.batch(jnp.asarray(rows))
        found = np.array([np.flatnonzero((images == x).all(axis=1))[0] for x in np.asarray(batch["x"]).reshape(40, -1)])
        clients = owner[found].reshape(10, 4)
        assert (clients == clients[0]).all()
        assert len(set(clients[0])) == 4
        share = np.asarray(data.train.count)[clients[0]] / len(owner)
        chex.assert_trees_all_close(np.asarray(batch["client_share"][:4]), share.astype(np.float32))
        drawn |= set(clients[0])
    assert drawn == set(range(10))


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct(data):
    image, label = patterned_images(0, 2400)
    assert image.shape == (2400, 16, 16, 1)
    assert 200 < np.bincount(label).min() < np.bincount(label).max() < 290
    assert not np.allclose(image, patterned_images(1, 2400)[0])
    assert [len(part) for part in (data.train, data.valid, data.test)] == [1800, 200, 400]
    chex.assert_trees_all_equal(data.test.image, jnp.asarray(image[2000:]))
    chex.assert_trees_all_equal(data.valid.label, jnp.asarray(label[9:2000:10]))


def test_a_class_is_a_pattern_wherever_it_is():
    image, label = patterned_images(3, 2000)
    cells = image.reshape(2000, 4, 4, 4, 4).swapaxes(2, 3).reshape(2000, 16, 16)
    pattern = np.stack([np.sign(cells[label == kind].mean(axis=(0, 1))) for kind in range(10)])
    chex.assert_trees_all_equal(pattern @ pattern.T, 16 * np.eye(10, dtype=np.float32))
    found = cells @ pattern.T
    # Averaged over cells the noise hides one class in ten; single cells tell nearly all.
    assert 0.85 < np.mean(found.sum(axis=1).argmax(axis=1) == label) < 0.95
    assert np.mean(np.exp(0.8 * found).sum(axis=1).argmax(axis=1) == label) > 0.98
    shown = (found[np.arange(2000), :, label] > 8).sum(axis=0) / 2000
    assert 0.15 < shown.min() < shown.max() < 0.23


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("digits", {}, "no federated set is called 'digits'; did you mean 'digits8x8'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("standin@none", {}, "what follows @ is the Dirichlet distribution's alpha, a positive number"),
        ("standin@-1", {}, "a positive number"),
        ("standin", {"channels": 3}, "images of standin are 16x16x1: set --model.image-size 16 and --model.channels 1"),
        ("standin", {"image_size": 8}, "a side that is a multiple of 4 from 16 on, not 8"),
        ("standin", {"num_classes": 7}, "standin has 10 classes: set --model.num-classes to that"),
    ],
)
def test_what_cannot_be_loaded(name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load_federated(name, **SIZES | changes)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (11, "alpha 0.001 leaves some of 11 clients with fewer than 10 examples: enlarge it"),
        (31, "300 examples are too few for 31 clients with 10 each"),
    ],
)
def test_partitions_that_leave_clients_with_nothing_are_refused(clients, message):
    with pytest.raises(zoo.UserError, match=message):
        dirichlet_partition(np.arange(300) % 10, clients=clients, alpha=0.001, seed=0)


def test_digits_are_divided_by_halves(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 17, (400, 64)), np.arange(400)[:, None] % 10], axis=1)
    np.savetxt(tmp_path / "digits.csv", rows, fmt="%d", delimiter=",")
    data = load_federated("digits8x8@10", **SIZES | {"data_dir": str(tmp_path), "image_size": 8})
    assert [len(part) for part in (data.train, data.valid, data.test)] == [180, 20, 200]
    chex.assert_shape(data.test.image, (200, 8, 8, 1))
    assert abs(float(data.train.images.image.mean())) < 0.1
    assert np.asarray(data.test.label).tolist() == [i % 10 for i in range(200, 400)]
