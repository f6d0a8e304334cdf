"""MetaAdamW's card: what the step and the meta-update are, and what they need not be."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from trainers.sharding import make_mesh
from trainers.step import make_program
from zoo.systems.metaadamw import (
    MetaAdamW,
    Policy,
    Settings,
    State,
    _combine,
    fine_grained,
    group,
    meta_adamw,
    network_shapes,
    statistics,
)

KEY = jax.random.key(3)
SHAPES = {"ffn": {"bias": (3,), "kernel": (4, 3)}, "head": {"bias": (2,), "kernel": (3, 2)}}
RNG = np.random.default_rng(3)


def draw(shape, scale=0.5):
    return jnp.asarray(RNG.normal(0, scale, shape).astype(np.float32))


def tree():
    return {layer: {name: draw(shape) for name, shape in leaves.items()} for layer, leaves in SHAPES.items()}


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["ffn"]["kernel"] + params["ffn"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["head"]["kernel"] + params["head"]["bias"] - batch["y"]))


def four_batches():
    return [{"x": draw((5, 4), 1.0), "y": draw((5, 2), 1.0)} for _ in range(4)]


def filled(shapes, scale=0.5):
    return jax.tree.map(lambda leaf: draw(leaf.shape, scale), shapes)


SETTINGS = {
    strict: Settings(num_layers=1, meta_penalty=0.0, gate_penalty=0.0, strict_official=strict)
    for strict in (True, False)
}


@functools.cache
def meta_updates(strict):
    """(state, its meta-update as a function of phi, compiled once) somewhere in the middle of training."""
    optimizer = MetaAdamW(0.3, weight_decay=0.5, settings=SETTINGS[strict])
    params, gradients, batches = tree(), tree(), four_batches()
    state = State(
        jnp.int32(3), tree(), jax.tree.map(jnp.square, tree()), filled(jax.eval_shape(optimizer.init, params).phi)
    )

    @jax.jit
    def update(phi):
        return optimizer.meta_update(state._replace(phi=phi), params, gradients, loss, batches)

    return state, update


def test_without_ranges_a_step_is_adam_with_the_decay_inside_the_correction():
    optimizer = MetaAdamW(
        0.1, 0.8, 0.99, weight_decay=0.3, settings=Settings(num_layers=1, alpha_range=0.0, beta_range=0.0)
    )
    params = tree()
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    m = v = jax.tree.map(np.zeros_like, expected)
    for t in (1, 2, 3):
        gradients = tree()
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * np.asarray(g, np.float64), m, gradients)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * np.asarray(g, np.float64) ** 2, v, gradients)
        first, second = 1 - 0.8**t, 1 - 0.99**t
        root = jax.tree.map(lambda v, c=second: np.sqrt(v / c) + 1e-8, v)
        expected = jax.tree.map(
            lambda p, m, r, c=first: p - 0.1 / c * (m / r + 0.3 * p),
            expected,
            m,
            root,
        )
    chex.assert_trees_all_close(params, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("features", ["norm_basic_plus", "enhanced"])
def test_factors_keep_to_their_ranges_and_follow_their_groups(features):
    settings = Settings(features=features, feature_dim=None, num_layers=1, alpha_range=0.5, beta_range=0.2)
    policy, tokens = Policy(settings, 5), draw((5, settings.statistics), 3.0)
    variables, apply = filled(jax.eval_shape(policy.init, KEY, tokens)), jax.jit(policy.apply)
    factors = apply(variables, tokens)
    assert np.all(np.abs(factors.alpha - 1) <= 0.25 + 1e-6)
    assert np.all(np.abs(factors.beta - 1) <= 0.1 + 1e-6)
    variables = jax.tree.map(lambda v: 0.3 * v, variables)  # away from the ends of the ranges
    factors, order = apply(variables, tokens), np.array([3, 0, 4, 2, 1])
    assert np.ptp(factors.alpha) > 1e-3
    permuted = apply(variables, tokens[order])
    for ours, theirs in ((permuted.alpha, factors.alpha), (permuted.beta, factors.beta)):
        # The embeddings of enhanced stay where they are.
        assert np.allclose(ours, theirs[order], atol=1e-5) == (features != "enhanced")


def test_the_meta_gradient_is_that_of_the_objectives_after_the_step_not_taken():
    state, update = meta_updates(False)
    slopes = update(state.phi)[1].gradients
    length = float(optax.global_norm(slopes))

    def at(distance):
        """Along the gradient, where the difference is largest against float32's rounding."""
        return float(update(jax.tree.map(lambda w, s: w + distance * s / length, state.phi, slopes))[1].combined)

    # Central differences at two distances, their errors of second order removed.
    near, far = ((at(e) - at(-e)) / (2 * e) for e in (0.005, 0.01))
    assert (4 * near - far) / 3 == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("strict", [True, False])
def test_the_official_faults_are_there_when_asked_for(strict):
    state, update = meta_updates(strict)
    moved, report = update(state.phi)
    kernel = report.gradients["output"]["kernel"]
    assert np.any(kernel[:, 0])
    assert np.any(kernel[:, 1]) != strict  # the decay's factor
    assert np.any(report.gradients["gates"])
    assert np.array_equal(moved.phi["gates"], state.phi["gates"]) == strict
    # The gap is of the weights as they are: it moves nothing but its own uncertainty.
    assert np.all(report.gradients["log_variances"])


@pytest.mark.parametrize("strict", [True, False])
def test_plus_features_are_four_deviations_unless_the_official_fault_is_asked_for(strict):
    settings = Settings(
        features="basic_plus", feature_dim=11, num_heads=11, gated=False, objective="gap", strict_official=strict
    )
    params, gradients = tree(), tree()
    groups = group(params, {"ffn": {"bias": 0, "kernel": 1}, "head": {"bias": 0, "kernel": 1}})
    zeros = jax.tree.map(jnp.zeros_like, params)
    found = statistics(settings, groups, gradients, zeros, zeros, params, jnp.ones(()))
    tokens = Policy(settings, 2).apply({}, found, method=Policy.tokens)
    chex.assert_shape(tokens, (2, 11))
    norms = [np.linalg.norm(gradients[layer]["bias"]) for layer in SHAPES]
    if strict:
        assert float(tokens[0, 1]) == pytest.approx(np.var(norms), rel=1e-4)
        assert not np.any(tokens[:, -4:])
    else:
        assert float(tokens[0, 6]) == pytest.approx(np.std(norms), rel=1e-4)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="feature_dim 4 is too small: basic features are 6"):
        _ = Settings(feature_dim=4, num_heads=2).width
    assert Settings(feature_dim=None, num_heads=4).width == 8


def test_learned_uncertainties_settle_at_the_objectives_over_their_priorities():
    objectives, priorities = jnp.array([0.3, 2.0, 5.0]), (2.0, 5.0, 1.0)
    for kind in ("regression", "classification"):
        settings = Settings(priorities=priorities, kinds=(kind,) * 3)
        slope = jax.grad(lambda s: _combine(settings, objectives, {"log_variances": s}))  # noqa: B023
        chex.assert_trees_all_close(slope(jnp.log(objectives / jnp.array(priorities))), jnp.zeros(3), atol=1e-6)
        assert np.all(slope(jnp.log(objectives)) != 0)


def test_groups_are_kind_depth_and_bias():
    shapes = network_shapes((3, 5, 1, 4))
    found = fine_grained(shapes)
    assert found["embed.weight"] != found["embed.bias"]
    assert found["layers.1.ffn.weight"] == found["layers.2.ffn.weight"] != found["layers.3.ffn.weight"]
    assert found["layers.0.norm.weight"] == found["layers.0.norm.bias"]  # vectors are biases
    assert found["layers.1.proj.weight"] == found["head.weight"]  # a name without a number lies in the middle
    assert list(dict.fromkeys(found.values())) == list(range(15))
    ours = fine_grained({"layers_0/query/kernel": (4, 4), "layers_3/query/kernel": (4, 4), "head/kernel": (4, 1)})
    assert len(set(ours.values())) == 3


def test_it_trains_about_as_well_as_adamw_and_its_encoder_moves():
    inputs = draw((1024, 4), 1.0)
    target = jnp.stack([jnp.sin(inputs[:, 0]) * inputs[:, 1], jnp.cos(inputs[:, 2])], axis=1)
    train, valid = ({"x": inputs[part], "y": target[part]} for part in (slice(0, 768), slice(768, None)))
    params = {
        "ffn": {"bias": jnp.zeros(24), "kernel": draw((4, 24))},
        "head": {"bias": jnp.zeros(2), "kernel": draw((24, 2), 0.2)},
    }
    rate = optax.cosine_decay_schedule(0.03, 300)

    def trained(optimizer, **extras):
        def step(carry, t):
            params, state = carry
            batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, 64 * (t % 12), 64), train)
            quarters = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
            extra = {**extras, "batches": quarters} if extras else {}
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        (end, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(300))
        return loss(end, valid), state

    plain, _ = jax.jit(lambda: trained(optax.adamw(rate, weight_decay=1e-2)))()
    optimizer = meta_adamw(rate, settings=Settings(num_layers=1, meta_every=5, meta_learning_rate=1e-2))
    ours, state = jax.jit(lambda: trained(optimizer, objective=loss))()
    print("adamw", float(plain), "meta_adamw", float(ours))
    assert float(plain) < 0.3 * float(jnp.mean(jnp.square(valid["y"] - valid["y"].mean(axis=0))))
    assert float(ours) <= 1.1 * float(plain)
    # Uncertainties start at 0.
    assert float(jnp.max(jnp.abs(state.phi["log_variances"]))) > 1e-2


def test_the_trainer_gives_four_parts_of_its_batch_to_learn_from():
    paper, model = zoo.paper("metaadamw"), zoo.create("metaadamw")
    batch = paper.example(model.config, batch_size=8, key=KEY)

    def update(updates, state, params, *, objective, batches):
        parts = jnp.concatenate([part["x"].ravel() for part in batches])
        return updates, {"parts_bias": parts, "losses_bias": jnp.stack([objective(params, part) for part in batches])}

    # Names that a rule of sharding fits.
    start = {"parts_bias": jnp.zeros(batch["x"].size), "losses_bias": jnp.zeros(4)}
    optimizer = optax.GradientTransformationExtraArgs(lambda params: start, update)
    mesh = make_mesh("data=1", batch_size=8, devices=jax.devices()[:1])
    sizes = {"seed": 0, "batch_size": 8, "max_steps": 3, "eval_batch_size": 8}
    program = make_program(paper, model, optimizer, mesh, **sizes)
    state = program.init()
    before = jax.device_get(state.params)
    seen = jax.device_get(program.step(state, batch)[0].opt_state)
    whole = np.asarray(batch["x"])
    rows = seen["parts_bias"].reshape(whole.shape)
    assert sorted(row.tobytes() for row in rows) == sorted(row.tobytes() for row in whole)
    # Without dropout, at the weights of before the step.
    expected = jax.jit(lambda params: paper.compute_loss(model.apply({"params": params}, batch), batch)[0])(before)
    np.testing.assert_allclose(np.mean(seen["losses_bias"]), expected, rtol=1e-5)


def test_no_meta_update_comes_before_its_time():
    optimizer = MetaAdamW(0.1, settings=dataclasses.replace(SETTINGS[False], meta_every=2, meta_after=3))
    state, _ = meta_updates(False)
    params, gradients, batches = tree(), tree(), four_batches()
    update = jax.jit(lambda s: optimizer.update(gradients, s, params, objective=loss, batches=batches)[1].phi)
    moves = [bool(np.any(update(state._replace(count=jnp.int32(t)))["gates"] != state.phi["gates"])) for t in range(7)]
    assert moves == [False, False, False, False, True, False, True]
