"""The card of Baikal-GVD: sets without order or padding, reversed gradients, the physics of light, and learning."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.parity.harness import load_case
from trainers.data.event_reconstruction import event_standin, padded_events
from zoo.registry import variable_shapes
from zoo.signals.baikal_gvd import (
    DomainHead,
    DroppingPipeline,
    MaskedBatchNorm,
    Part,
    SetEncoder,
    TorchPart,
    adaptation_factor,
    event_losses,
    penalised_entropy,
    pipeline,
    pool,
    torch_from_official,
)
from zoo.tasks import event_reconstruction
from zoo.tasks.event_reconstruction import (
    cherenkov_time,
    exposure_at_suppression,
    focal_loss,
    suppression_at_exposure,
)

KEY = jax.random.key(7)
PAPER = zoo.paper("baikal_gvd")
ENCODER = PAPER.configs["tiny"].fast  # the smallest
SMALL = {"num_hits": 12, "denoiser": ENCODER, "candidate": ENCODER, "head_widths": (8, 8), "domain_width": 8}


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("baikal_gvd", "adapted", **SMALL)
    batch = PAPER.example(model.config, batch_size=6, key=KEY)
    # Random weights in the shapes of the initial ones, which need not be compiled for that.
    shapes = jax.eval_shape(model.init, {"params": KEY, "dropout": KEY}, batch)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(KEY, len(leaves))
    variables = tree.unflatten(
        _random(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, key)
        for (path, leaf), key in zip(leaves, keys, strict=True)
    )
    constants = {"mean": jnp.arange(5.0), "deviation": jnp.array([1.0, 300.0, 40.0, 40.0, 150.0])}
    return model, batch, {**variables, "constants": constants}, jax.jit(model.apply)


def _random(path, leaf, key):
    if not path.startswith("params/"):
        return jnp.full(leaf.shape, float(path.endswith("/var")), leaf.dtype)
    return 0.3 * jax.random.normal(key, leaf.shape) + float(path.endswith("/scale"))


def test_the_order_of_hits_has_no_meaning(setting):
    _, batch, variables, apply = setting
    order = jax.random.permutation(KEY, 12)
    per_hit = {name: batch[name][:, order] for name in ("hits", "hit_mask", "signal", "residual")}
    before, after = apply(variables, batch), apply(variables, batch | per_hit)
    present = per_hit["hit_mask"]
    for name in ("hits", "residual"):
        moved = before.pop(name)[:, order]
        shape = present.reshape(*present.shape, *(1,) * (moved.ndim - 2))
        chex.assert_trees_all_close(jnp.where(shape, after.pop(name), 0), jnp.where(shape, moved, 0), atol=1e-4)
    chex.assert_trees_all_close(after, before, rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing_in_training_either():
    """Batch statistics and gradients; the sweep only looks at evaluation."""
    encoder, x = SetEncoder(ENCODER), jax.random.normal(KEY, (3, 8, 5))
    present = jnp.arange(8) < jnp.array([8, 5, 2])[:, None]
    variables = encoder.init(KEY, x, present, train=False)

    def total(params, x, present):
        tokens, changed = encoder.apply(
            {**variables, "params": params}, x, present, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(pool(tokens, present))), changed

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    longer = jnp.concatenate([x, 50.0 + x[:, :3]], axis=1), jnp.pad(present, ((0, 0), (0, 3)))
    chex.assert_trees_all_close(step(variables["params"], *longer), step(variables["params"], x, present), atol=1e-4)


def test_masked_statistics_are_those_of_the_hits_there_are():
    x, present = jax.random.normal(KEY, (3, 5, 4)), jnp.arange(5) < jnp.array([5, 2, 0])[:, None]
    for mask, rows in ((present, np.asarray(x)[np.asarray(present)]), (None, np.asarray(x).reshape(-1, 4))):
        norm = MaskedBatchNorm(1e-3, 0.01)
        variables = norm.init(KEY, x, mask, train=False)
        y, changed = norm.apply(variables, x, mask, train=True, mutable=["batch_stats"])
        expected = (np.asarray(x) - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3)
        chex.assert_trees_all_close(np.asarray(y), expected, atol=1e-5)
        chex.assert_trees_all_close(changed["batch_stats"]["mean"], 0.01 * rows.mean(0), atol=1e-6)
        chex.assert_trees_all_close(changed["batch_stats"]["var"], 0.99 + 0.01 * rows.var(0), atol=1e-6)


def test_an_event_without_hits_is_finite(setting):
    _, batch, variables, apply = setting
    empty = batch | {"hit_mask": jnp.zeros_like(batch["hit_mask"]), "hits": jnp.full_like(batch["hits"], jnp.nan)}
    chex.assert_tree_all_finite(apply(variables, empty))


def test_the_old_mask_leaks_and_the_proper_one_is_torchs_without_gradients():
    """Weights of a golden case with the other mask: both agree where nothing is padded only."""
    folder = zoo.__path__[0] + "/../tests/parity/goldens/baikal_gvd/open_no_grad.npz"
    case = load_case(folder)
    model, variables = zoo.from_official("baikal_gvd", case.meta["hparams"], case.group("param"))
    x, mask = jnp.asarray(case.arrays["input/x"]), jnp.asarray(case.arrays["input/mask"], bool)
    legacy = TorchPart(torch_from_official(case.meta["hparams"] | {"no_grad": False}))
    proper, leaking = (m.apply(variables, {"x": x, "mask": mask}) for m in (model, legacy))
    chex.assert_trees_all_close(proper, case.arrays["output/y"], atol=1e-5)
    assert not np.all(mask)
    assert float(jnp.max(jnp.abs(jnp.where(mask[..., None], leaking - proper, 0)))) > 0.01
    full = jnp.ones_like(mask)
    chex.assert_trees_all_close(*(m.apply(variables, {"x": x, "mask": full}) for m in (model, legacy)), atol=1e-5)


@pytest.mark.parametrize(
    ("hparams", "count"),
    [
        ({"hidden_size": 16, "num_layers": 2, "dim_feedforward_size": 32, "n_heads": 2}, 4_578),
        ({"hidden_size": 1024, "num_layers": 5, "dim_feedforward_size": 1024, "n_heads": 1}, 31_516_674),
    ],
)
def test_the_torch_encoders_have_the_official_sizes(hparams, count):
    part = torch_from_official(hparams | {"in_features": 5, "out_size": 2, "dropout_p": 0.0})
    bridge = PAPER.bridge()
    shapes = variable_shapes(PAPER, bridge.model(part), bridge.example)
    assert sum(s.size for s in jax.tree.leaves(shapes)) == count


def test_the_class_token_is_read_where_there_is_one():
    tokens, present = jax.random.normal(KEY, (2, 4, 6)), jnp.array([[True, True, False], [False, False, False]])
    chex.assert_trees_all_equal(pool(tokens, present), tokens[:, 0])
    mean = jnp.stack([jnp.mean(tokens[0, 1:3], axis=0), jnp.zeros(6)])
    chex.assert_trees_all_close(pool(tokens[:, 1:], present), mean, rtol=1e-6)
    encoder = SetEncoder(dataclasses.replace(ENCODER, class_token=True))
    shapes = jax.eval_shape(lambda: encoder.init_with_output(KEY, tokens[:, 1:], present, train=False))
    assert shapes[0].shape == (2, 4, ENCODER.d_model)
    assert shapes[1]["params"]["class_token"].shape == (1, 1, ENCODER.d_model)


def test_second_heads_add_outputs():
    part = Part(dataclasses.replace(ENCODER, norm="layer"), second_out_size=3)
    batch = PAPER.bridge().example(part, batch_size=2, key=KEY)
    outputs, _ = jax.eval_shape(lambda: TorchPart(part).init_with_output(KEY, batch))
    assert outputs.shape == (2, 6, 5)


def test_a_domain_classifier_learns_and_its_features_unlearn():
    head, x = DomainHead(8), jax.random.normal(KEY, (4, 6))
    variables = head.init(KEY, x, jnp.float32(1.0))

    def total(variables, x, factor):
        return jnp.sum(head.apply(variables, x, jnp.float32(factor)) ** 2)

    plain = jax.grad(total, argnums=(0, 1))(variables, x, -1.0)
    turned = jax.grad(total, argnums=(0, 1))(variables, x, 0.3)
    chex.assert_trees_all_close(turned[0], plain[0])
    chex.assert_trees_all_close(turned[1], -0.3 * plain[1], rtol=1e-5)


def test_the_factor_of_the_reversed_gradient_grows_with_the_steps_trained(setting):
    model, batch, variables, _ = setting
    chex.assert_trees_all_close(adaptation_factor(jnp.array([0.0, 1.0])), jnp.array([0.0, 1.0]), atol=1e-4)
    assert np.all(np.diff(adaptation_factor(jnp.linspace(0, 1, 20))) > 0)

    @jax.jit
    def encoder_gradient(steps):
        def domain_loss(params):
            state = {**variables, "params": params, "progress": {"steps": steps}}
            outputs, changed = model.apply(
                state, batch, train=True, mutable=["progress", "batch_stats"], rngs={"dropout": KEY}
            )
            return jnp.sum(outputs["losses"]["domain"]), changed["progress"]["steps"]

        gradients, after = jax.grad(domain_loss, has_aux=True)(variables["params"])
        return gradients["fast"]["embedding"]["kernel"], gradients["domain_heads_fast"]["out"]["kernel"], after

    (none, head, one), (full, same, more) = (encoder_gradient(jnp.int32(steps)) for steps in (0, 5000))
    assert (int(one), int(more)) == (1, 5001)
    assert not np.any(none)
    assert np.any(full)
    chex.assert_trees_all_close(head, same)


def test_measured_events_teach_the_domain_classifiers_only(setting):
    model, batch, variables, apply = setting
    measured = batch["domain"] == 1
    losses = apply(variables, batch)["losses"]
    others = batch | {"event": 1 - batch["event"], "signal": 1 - batch["signal"], "residual": batch["residual"] + 9}
    for name, values in apply(variables, others)["losses"].items():
        chex.assert_trees_all_equal(values[measured], losses[name][measured])
        if name == "domain":
            assert np.all(values > 0)
        else:
            assert not np.any(values[measured])
            assert np.any(values[~measured] != losses[name][~measured])
    assert np.any(measured)
    assert model.config.adaptation > 0


def test_hits_on_the_light_cone_are_on_time_and_late_ones_are_negative():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(200, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    point, length, beside = rng.normal(size=(200, 3)) * 50, rng.uniform(-200, 200, 200), rng.uniform(0, 80, 200)
    aside = np.cross(direction, rng.normal(size=(200, 3)))
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    # Light leaves the track at the Cherenkov angle: its path and the muon's up to there, by geometry.
    angle = np.arccos(1 / 1.37)
    place = point + direction * length[:, None] + aside * beside[:, None]
    leaves = length - beside / np.tan(angle)
    arrival = 7.0 + leaves / 0.299792458 + np.hypot(beside, length - leaves) / 0.218826621
    expected = cherenkov_time(place, point, direction, 7.0)
    np.testing.assert_allclose(expected, arrival, atol=1e-3)
    assert np.all(expected - (arrival + 5) < 0)
    on_device = cherenkov_time(*(jnp.asarray(a, jnp.float32) for a in (place, point, direction)), 7.0)
    np.testing.assert_allclose(on_device, arrival, atol=0.05)


def test_focal_loss_is_cross_entropy_for_gamma_zero():
    logits, label = 3 * jax.random.normal(KEY, (20, 2)), jnp.arange(20) % 2
    chance = np.asarray(jax.nn.softmax(logits))[np.arange(20), label]
    chex.assert_trees_all_close(focal_loss(logits, label, gamma=0.0), -np.log(chance), rtol=1e-4, atol=1e-6)
    weighed = focal_loss(logits, label, gamma=2.0, weights=(10.0, 1.0))
    expected = -np.where(label == 0, 10.0, 1.0) * (1 - chance) ** 2 * np.log(chance)
    chex.assert_trees_all_close(weighed, expected, rtol=1e-3, atol=1e-6)


def test_noise_that_is_called_signal_costs_the_more_the_later_it_is():
    chance, label = jnp.array([0.9, 0.9, 0.4, 0.9]), jnp.array([0, 1, 0, 1])
    late = jnp.array([-20.0, 20.0, 20.0, 5.0])
    cost = penalised_entropy(chance, label, late, jnp.ones(4), factors=(0.75, 0.3))
    chex.assert_trees_all_close(cost, 0.75 * jnp.array([1 + 0.3 * 0.9 * 20, 1, 1, 1]), rtol=1e-6)
    cost = penalised_entropy(chance, label, late, jnp.ones(4), factors=(0.75, 0.3), signal_limit=10.0)
    chex.assert_trees_all_close(cost, 0.75 * jnp.array([1 + 5.4, 1 + 5.4, 1, 1]), rtol=1e-6)


def test_the_penalty_is_an_option_of_the_hits_loss(setting):
    model, batch, variables, apply = setting
    outputs = apply(variables, batch)
    other = dataclasses.replace(model.config, hit_loss="residual_penalty")
    chance = jax.nn.softmax(outputs["hits"])[..., 1]
    entropy = focal_loss(outputs["hits"], batch["signal"], gamma=0.0)
    cost = penalised_entropy(chance, batch["signal"], batch["residual"], entropy, factors=other.penalty)
    mean = jnp.sum(jnp.where(batch["hit_mask"], cost, 0), axis=1) / jnp.sum(batch["hit_mask"], axis=1)
    expected = jnp.where(batch["domain"] == 1, 0.0, mean)
    chex.assert_trees_all_close(event_losses(other, outputs, batch)["hits"], expected, rtol=1e-5)


def test_how_far_domains_are_apart_is_what_pairs_and_histograms_say():
    rng = np.random.default_rng(3)
    domain, event = np.arange(400) % 2, rng.integers(0, 2, 400)
    logit = rng.normal(size=400) + domain
    outputs = {"event": np.stack([np.zeros(400), logit], axis=1), "domain": np.stack([logit, -domain], axis=1)}
    batch = {"domain": jnp.asarray(domain), "event": jnp.asarray(event)}
    found = event_reconstruction.report(outputs, batch)
    pairs = [a > b for a in logit[domain == 1] for b in logit[domain == 0]]
    assert found["domain_auroc"] == pytest.approx((np.mean(pairs) + 0) / 2)  # the second is always wrong
    shares = []
    for kind in (1, 0):
        bins = np.floor(20 / (1 + np.exp(-logit[domain == kind]))).astype(int)
        shares.append((np.bincount(bins, minlength=20) + 0.5) / 210)
    assert found["domain_kl"] == pytest.approx(np.sum(shares[0] * np.log(shares[0] / shares[1])))
    assert found["measured_accuracy"] == np.mean((logit > 0)[domain == 1] == event[domain == 1])
    plain = event_reconstruction.report({"event": outputs["event"]}, batch)
    assert np.isnan(plain["domain_auroc"])
    assert event_reconstruction.report(outputs, batch | {"domain": 0 * batch["domain"]}) == {}


@pytest.mark.parametrize("background", [0.01, 0.001])
def test_exposure_is_what_a_sort_says(background):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 5000)
    score = np.clip(0.9 + 0.1 * rng.beta(1 + 3 * label, 2), 0, 1)
    cuts = np.linspace(0.9, 1, 2000)
    first = next(c for c in cuts if np.mean(score[label == 0] >= c) < background)
    expected = np.mean(score[label == 1] >= first)
    found = exposure_at_suppression(score, label, background=background, thresholds=2000)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 < found < 1
    assert exposure_at_suppression(np.ones(10), np.arange(10) % 2, background=0.1) == 0.0


def test_suppression_keeps_the_share_it_promises():
    rng = np.random.default_rng(2)
    label = rng.integers(0, 2, 20_000)
    score = rng.normal(2.0 * label)
    cut = np.quantile(score[label == 1], 0.01, method="lower")
    assert suppression_at_exposure(score, label) == pytest.approx(1 / np.mean(score[label == 0] >= cut), rel=0.02)


def test_dropping_events_gives_what_masks_give(setting):
    model, batch, variables, apply = setting
    fast = np.asarray(jax.nn.softmax(apply(variables, batch)["fast"])[:, 1])
    threshold = float(np.median(fast))
    model = zoo.create("baikal_gvd", "adapted", **SMALL, fast_threshold=threshold)
    masked = jax.jit(lambda v, b: pipeline(model, v, b))(variables, batch)
    dropped = DroppingPipeline(model)(variables, batch)
    kept = fast >= threshold
    assert 0 < kept.sum() < len(kept)
    assert not np.any(dropped["p_nu"][~kept])
    for name, values in dropped.items():
        there = np.asarray(batch["hit_mask"])[kept] if values.ndim == 2 else True
        chex.assert_trees_all_close(values[kept] * there, np.asarray(masked[name])[kept] * there, atol=1e-5)
    chex.assert_trees_all_close(np.asarray(masked["p_nu"])[~kept], np.zeros((~kept).sum()))


def test_the_candidates_network_sees_the_hits_that_are_kept_only(setting):
    model, batch, variables, _ = setting
    features, present = jax.random.normal(KEY, (6, 12, 5)), batch["hit_mask"]
    logits = jnp.stack([jnp.zeros((6, 12)), jnp.where(jnp.arange(12) % 2 == 0, 5.0, -5.0) + jnp.zeros((6, 12))], -1)
    late = jax.random.normal(KEY, (6, 12))

    @jax.jit
    def decide(features, late):
        return model.apply(variables, features, present, logits, late, method="decide")[0]

    before = decide(features, late)
    odd = jnp.arange(12)[:, None] % 2 == 1
    chex.assert_trees_all_equal(decide(jnp.where(odd, 99.0, features), jnp.where(odd[:, 0], 99.0, late)), before)
    assert np.all(decide(jnp.where(odd, features, 9.0), late)[0] != before[0])


def test_training_noise_moves_the_residuals_with_the_times(setting):
    _, batch, variables, _ = setting
    model = zoo.create("baikal_gvd", "adapted", **SMALL, additive_noise=(0.0, 50.0, 0.0, 0.0, 0.0))
    noisy, shift = model.apply(variables, batch["hits"], method="_noisy", rngs={"dropout": KEY})
    chex.assert_trees_all_close(noisy[..., 1] - batch["hits"][..., 1], shift, atol=1e-3)
    chex.assert_trees_all_equal(noisy[..., 2:], batch["hits"][..., 2:])
    assert 20 < float(jnp.std(shift)) < 90


def test_learns_which_hits_are_the_particles():
    """N2 with one layer, against hits of much charge. Events need two layers and an epoch: see the recipe."""
    config = PAPER.config("tiny", **SMALL | {"num_hits": 64})
    train, test = (padded_events(event_standin(seed, count), 64) for seed, count in ((0, 1000), (1, 200)))
    model, optimizer = PAPER.model(config), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
    fixed = {"constants": jax.tree.map(jnp.asarray, PAPER.constants(config, train))}

    def denoise(model, batch, train):
        present = batch["hit_mask"]
        features = jnp.where(present[..., None], model.normalize(batch["hits"]), 0)
        logits, residual, _ = model.denoise(features, present, train=train)
        return {"hits": logits, "residual": residual, "event": jnp.zeros((len(logits), 2))}

    def step(carry, key):
        params, others, state = carry
        batch = train.batch(jax.random.randint(key, (16,), 0, len(train)))

        def loss(params):
            variables = {"params": params, **others, **fixed}
            outputs, changed = model.apply(variables, batch, True, method=denoise, mutable=["batch_stats"])
            return event_reconstruction.loss(outputs, batch)[0], changed

        gradients, others = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), others, state), None

    @jax.jit
    def trained(key):
        variables = model.init(key, test.batch(jnp.arange(1)), False, method=denoise)
        start = variables["params"], {"batch_stats": variables["batch_stats"]}, optimizer.init(variables["params"])
        (params, others, _), _ = jax.lax.scan(step, start, jax.random.split(key, STEPS))
        batch = test.batch(jnp.arange(len(test)))
        found = model.apply({"params": params, **others, **fixed}, batch, False, method=denoise)
        scores = [event_reconstruction.metrics(o, batch) for o in (found, event_reconstruction.charge_and_slope(batch))]
        return jax.tree.map(jnp.mean, scores)

    found, baseline = ({name: float(v) for name, v in scores.items()} for scores in trained(KEY))
    assert found["hit_f1"] > baseline["hit_f1"] + 0.1, (found, baseline)


STEPS = 150
