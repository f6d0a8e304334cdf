"""SID-MLP: what the paper's mechanism implies."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import zoo
from tests.weights import drawn
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.recommendation.sid_mlp import (
    Config,
    MixerEncoder,
    Model,
    distillation_losses,
    k_means,
    semantic_ids,
    tree_tables,
)
from zoo.registry import variable_shapes

KEY = jax.random.key(5)
PAPER = zoo.paper("sid_mlp")


def spread(variables):
    """The same parameters moved away from zeros and ones."""
    rng = np.random.default_rng(5)
    move = lambda v: jnp.asarray(v + 0.3 * rng.normal(size=v.shape), jnp.float32)  # noqa: E731
    return dict(variables) | {"params": jax.tree.map(move, jax.device_get(variables["params"]))}


@pytest.fixture(scope="module")
def setting():
    """A student over given states and a catalogue of 30 items of random digits."""
    model = zoo.create("sid_mlp", encoder="given", num_items=30, beam_size=40, top=30)
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    batch["encoded_present"] = jnp.arange(8) < jnp.array([[8], [5], [1]])
    variables = spread(drawn(PAPER, model))
    rng = np.random.default_rng(0)
    ids = np.unique(np.concatenate([rng.integers(0, 3, (80, 3)), rng.integers(1, 3, (80, 1))], axis=1), axis=0)
    ids = rng.permutation(ids)[:30].astype(np.int32)
    return model, batch, variables | {"constants": tree_tables(ids, 16)}, ids


def test_padded_states_never_matter(setting):
    model, batch, variables, _ = setting
    noise = jnp.where(batch["encoded_present"][..., None], 0.0, 5.0)
    chex.assert_trees_all_close(
        model.apply(variables, batch | {"encoded": batch["encoded"] + noise}), model.apply(variables, batch), atol=1e-5
    )


class TestBeamSearch:
    @pytest.fixture(scope="class")
    def found(self, setting):
        model, batch, variables, _ = setting
        items, scores = model.apply(variables, batch["encoded"], batch["encoded_present"], method="beam_search")
        return np.asarray(items), np.asarray(scores)

    def test_wide_beams_equal_scoring_every_item(self, setting, found):
        model, batch, variables, _ = setting
        everything = jnp.broadcast_to(jnp.arange(1, 31), (3, 30))
        scores = np.asarray(model.apply(variables, batch | {"candidates": everything})["scores"])
        items, totals = found
        assert np.array_equal(items, 1 + np.argsort(-scores, axis=1))
        np.testing.assert_allclose(totals, -np.sort(-scores, axis=1), rtol=1e-5, atol=1e-5)

    def test_scores_are_log_probabilities_among_what_exists(self, setting):
        model, batch, variables, ids = setting
        scores = model.apply(variables, batch | {"candidates": jnp.broadcast_to(jnp.arange(1, 31), (3, 30))})["scores"]

        def logits(model, prefix):
            read = model.student.read_out(batch["encoded"], batch["encoded_present"], train=False)[1]
            return model.student.logits(read, model.embedding[1 + 16 * jnp.arange(len(prefix)) + prefix])

        for item in (0, 11, 29):
            total = 0.0
            for t in range(4):
                prefix = jnp.asarray(ids[item, :t])
                found = np.asarray(nn.apply(lambda m, p=prefix: logits(m, p), model)(variables), np.float64)
                same = (ids[:, :t] == ids[item, :t]).all(1)
                allowed = np.arange(16) if t == 0 else np.unique(ids[same, t])
                total += found[ids[item, t]] - np.log(np.exp(found[allowed]).sum())
            assert scores[1, item] == pytest.approx(total, abs=1e-4)

    def test_an_only_continuation_is_certain(self):
        ids = np.array([[0, 1, 2, 1], [1, 3, 3, 1]], np.int32)
        model = zoo.create("sid_mlp", encoder="given", num_items=2, beam_size=4, top=5)
        batch = PAPER.example(model.config, batch_size=2, key=KEY)
        variables = spread(model.init(KEY, batch)) | {"constants": tree_tables(ids, 16)}
        items, scores = model.apply(variables, batch["encoded"], batch["encoded_present"], method="beam_search")
        read = lambda m: m.student.read_out(batch["encoded"], batch["encoded_present"], train=False)  # noqa: E731
        first = nn.apply(lambda m: m.student.logits(read(m), jnp.zeros((2, 0, 32))), model)(variables)
        log = np.asarray(jax.nn.log_softmax(first))
        for row in range(2):
            # Both items, or none where the first digit fell out of the beam, and nothing else.
            real = items[row][items[row] > 0]
            np.testing.assert_allclose(scores[row][: len(real)], log[row, ids[np.asarray(real) - 1, 0]], rtol=1e-5)
            assert np.isneginf(scores[row][len(real) :]).all()

    def test_every_result_is_an_item_once(self, found):
        for row in found[0]:
            assert sorted(row) == list(range(1, 31))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(setting):
    config = Config(alpha=1.0, temperature=2.0)
    logits, labels = jax.random.normal(KEY, (3, 4, 16)), jnp.zeros((3, 4), jnp.int32)
    losses, gradient = jax.value_and_grad(lambda x: jnp.sum(distillation_losses(x, logits, labels, config)))(logits)
    assert abs(losses) < 1e-5
    assert np.abs(gradient).max() < 1e-6
    other = distillation_losses(logits + jax.random.normal(KEY, logits.shape), logits, labels, config)
    assert (other > 0.1).all()


def test_the_student_leaves_teacher_and_tokens_alone():
    model = zoo.create("sid_mlp", encoder="mlp")
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = spread(drawn(PAPER, model))

    def gradients(name):
        def total(params):
            return jnp.sum(model.apply(dict(variables) | {"params": params}, batch, train=True)[name])

        found = jax.jit(jax.grad(total))(variables["params"])
        return {part for part, tree in found.items() if any(np.any(leaf) for leaf in jax.tree.leaves(tree))}

    assert gradients("loss_student") == {"student"}
    assert gradients("loss_encoder") == {"mixer"}
    assert gradients("loss_teacher") == {"embedding", "teacher_encoder", "teacher_decoder"}
    frozen = Model(dataclasses.replace(model.config, train_teacher=False))
    assert not np.any(frozen.apply(variables, batch)["loss_teacher"])


class TestTokens:
    def test_a_history_becomes_user_digits_and_end(self, setting):
        _, _, variables, ids = setting
        model = zoo.create("sid_mlp", encoder="mlp", num_items=30, history=3)
        batch = PAPER.example(model.config, batch_size=1, key=KEY)
        own = dict(model.init(KEY, batch)) | {"constants": variables["constants"]}
        tokens = model.apply(own, jnp.array([[0, 4, 9], [2, 4, 9], [0, 0, 0]]), method="tokens")
        digits = lambda item: [1 + 16 * t + d for t, d in enumerate(ids[item - 1])]  # noqa: E731
        assert tokens.tolist() == [
            [65, *digits(4), *digits(9), 66, 0, 0, 0, 0],
            [65, *digits(2), *digits(4), *digits(9), 66],
            [65, 66, *[0] * 12],
        ]

    def test_clusters_come_before_counters(self):
        rng = np.random.default_rng(0)
        centres = 10 * rng.normal(size=(4, 5))
        features = np.repeat(centres, 6, axis=0) + 0.01 * rng.normal(size=(24, 5))
        features[1] = features[0]
        ids = semantic_ids(features, (4, 2, 2), 16)
        groups = ids[:, 0].reshape(4, 6)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0])) == 4
        assert len({tuple(row) for row in ids}) == 24
        assert ids[:, 3].min() == 1
        assert np.array_equal(ids[0, :3], ids[1, :3])
        with pytest.raises(zoo.UserError, match="24 items share three digits and a digit has 16 values"):
            semantic_ids(np.ones((24, 2)), (4, 2, 2), 16)

    def test_k_means_of_few_points_are_the_points(self):
        points = np.random.default_rng(0).normal(size=(4, 3))
        found = k_means(points, 9, np.random.default_rng(1))
        np.testing.assert_allclose(np.sort(found, axis=0), np.sort(points, axis=0))


class TestMixer:
    config = Config(mixer_layers=2, mixer_ffn_dim=16, mixer_length=14, d_model=6)

    @pytest.fixture(scope="class")
    def encoder(self):
        module = MixerEncoder(self.config)
        x, present = jax.random.normal(KEY, (2, 14, 6)), jnp.arange(14) < jnp.array([[14], [10]])
        return module, spread(module.init(KEY, x, present, train=False)), x, present

    def test_padding_does_not_reach_what_is_present(self, encoder):
        module, variables, x, present = encoder
        other = jnp.where(present[..., None], x, 7.0)
        first, second = (module.apply(variables, a, present, train=False) for a in (x, other))
        chex.assert_trees_all_close(jnp.where(present[..., None], first - second, 0.0), jnp.zeros_like(x), atol=1e-5)

    def test_items_are_exchangeable_without_positions(self, encoder):
        module, variables, x, present = encoder
        plain = {"params": variables["params"] | {"position_table": jnp.zeros((14, 6))}}
        order = jnp.array([0, 5, 6, 7, 8, 1, 2, 3, 4, 9, 10, 11, 12, 13])
        swapped = module.apply(plain, x[:, order], present, train=False)
        chex.assert_trees_all_close(swapped, module.apply(plain, x, present, train=False)[:, order], atol=1e-5)
        by_one = jnp.roll(jnp.arange(14), 1)
        moved = module.apply(plain, x[:, by_one], present, train=False)
        assert not np.allclose(moved, module.apply(plain, x, present, train=False)[:, by_one], atol=1e-2)

    def test_user_and_end_have_the_last_expert(self, encoder):
        _, variables, x, present = encoder
        params = flatten_dict(variables["params"], sep="/")
        changed = {k: v.at[:3].multiply(-1.0) if k.endswith("in/kernel") else v for k, v in params.items()}
        one = MixerEncoder(dataclasses.replace(self.config, mixer_layers=1))

        def run(flat):
            kept = {k: v for k, v in flat.items() if "layers_1" not in k}
            return one.apply({"params": unflatten_dict(kept, sep="/")}, x, present, train=False)

        differs = np.abs(run(params) - run(changed)).max(-1) > 1e-4
        last = [[0, 4, 8, 12, 13], [0, 4, 8, 9, 12]]
        for row, places in zip(differs, last, strict=True):
            assert np.flatnonzero(~row).tolist() == places


def test_sizes_are_the_official_ones():
    shapes = variable_shapes(PAPER, PAPER.model(PAPER.configs["beauty_plus"]))["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes["student"]) == 1_663_744
    assert count(shapes["mixer"]) == 12_716_288
    assert count([shapes[k] for k in ("embedding", "teacher_encoder", "teacher_decoder")]) == 4_591_104


def test_the_student_ranks_as_its_teacher_does_for_a_fifth_of_the_work():
    run = prepare(dataclasses.replace(recipe_for("sid_mlp"), log_every=60, mesh="data=1"))
    state = run.program.init()
    for part in range(8):  # a third of the recipe's steps
        state, _ = run.program.run(state, run.splits.train, epoch_order(0, part, len(run.splits.train)), 0, 60)
    batch = run.splits.test.batch(jnp.arange(len(run.splits.test)))
    student = run.program.forward(state.variables, batch)
    teacher = jax.jit(lambda v, b: run.model.apply(v, b, method="teacher_scores"))(state.variables, batch)
    gains = [float(jnp.mean(PAPER.task.metrics(s, batch)["ndcg10"])) for s in (student, teacher)]
    popular = float(jnp.mean(PAPER.task.metrics(PAPER.task.baselines["popularity"](batch), batch)["ndcg10"]))
    assert gains[0] > 4 * popular
    assert gains[0] > 0.92 * gains[1]


def test_the_heads_do_a_fifth_of_the_decoders_work():
    """For a beam of fifty: both read the encoder's states once, and then there are prefixes."""
    model = PAPER.model(dataclasses.replace(PAPER.configs["beauty"], num_items=300))
    batch = jax.eval_shape(lambda: PAPER.example(model.config, batch_size=1, key=KEY))
    variables = jax.eval_shape(model.init, KEY, batch)
    states = jax.ShapeDtypeStruct((1, 82, 128), jnp.float32), jax.ShapeDtypeStruct((1, 82), bool)

    def heads(variables, states, present, prefixes):
        def run(model):
            read = model.student.read_out(states, present, train=False)
            wide = jnp.broadcast_to(read, (50, 128))
            embedded = model.embedding[prefixes]
            later = [model.student.logits(wide, embedded[:, :t]) for t in (1, 2, 3)]
            return model.student.logits(read, jnp.zeros((1, 0, 128))), later

        return nn.apply(run, model)(variables)

    def decoder(variables, states, present, prefixes):
        def one(variables, prefix):
            return nn.apply(lambda m: m.teacher_logits(prefix[None], states, present), model)(variables)

        return jax.vmap(one, in_axes=(None, 0))(variables, prefixes)

    prefixes = jax.ShapeDtypeStruct((50, 3), jnp.int32)
    work = [jax.jit(f).lower(variables, *states, prefixes).cost_analysis()["flops"] for f in (heads, decoder)]
    assert work[1] > 5 * work[0]
