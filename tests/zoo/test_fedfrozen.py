"""The card of FedFrozen: what is frozen and sent, what the two stages are in their limits, and the theory's formulas.

That its claims hold on the simulation, test_demo says.
"""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import zoo
from trainers.sharding import make_mesh
from trainers.step import make_program
from zoo.systems.fedfrozen import (
    Settings,
    features,
    fed_frozen,
    federate,
    federated_round,
    kernel_gradient,
    local_training,
    objective,
    profile,
    simulate,
    split_message,
    start_controls,
)

KEY = jax.random.key(9)
PAPER = zoo.paper("fedfrozen")


# --- a small problem that any stage can train -------------------------------------------------------------------------


def small_loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["layer"]["query"]["kernel"] + params["layer"]["key"]["bias"])
    mixed = hidden @ params["layer"]["value"]["kernel"]
    return jnp.mean(jnp.square(mixed @ params["head"]["kernel"] - y))


@pytest.fixture(scope="module")
def small():
    keys = jax.random.split(KEY, 8)
    params = {
        "layer": {
            "query": {"kernel": jax.random.normal(keys[0], (3, 4))},
            "key": {"bias": jax.random.normal(keys[1], (4,))},
            "value": {"kernel": jax.random.normal(keys[2], (4, 4))},
        },
        "head": {"kernel": jax.random.normal(keys[3], (4, 2))},
    }
    x, y = jax.random.normal(keys[4], (5, 20, 3)), jax.random.normal(keys[5], (5, 20, 2))
    weights = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])

    def draw(client, key):
        rows = jax.random.randint(key, (3, 4), 0, 20)
        return x[client][rows], y[client][rows]

    return params, draw, weights


QUERY_KEY = ("layer/query/kernel", "layer/key/bias")


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        ("query_key", set(QUERY_KEY)),
        ("value", {"layer/value/kernel"}),
        ("all_but_value", {*QUERY_KEY, "head/kernel"}),
        ("nothing", set()),
    ],
)
def test_the_second_stage_leaves_these_alone(small, frozen, names):
    for stage, kept in ((1, set()), (2, names)):
        moving, fixed = split_message(small[0], Settings(frozen=frozen), stage=stage)
        assert fixed.keys() == kept
        assert moving.keys() | fixed.keys() == flatten_dict(small[0], sep="/").keys()


def test_frozen_parameters_are_the_same_bits_and_not_sent(small):
    params, draw, weights = small
    settings = Settings(warmup_rounds=2, weight_decay=0.1)
    watch = lambda p: flatten_dict(p, sep="/")  # noqa: E731
    done = federate(small_loss, params, draw, weights, settings, rounds=6, sampled=3, watch=watch, key=KEY)
    for name, values in done.history.items():
        moves = [bool(np.any(values[i] != values[i + 1])) for i in range(5)]
        assert moves == ([True, False, False, False, False] if name in QUERY_KEY else [True] * 5), name
    assert done.sent == (12 + 4 + 16 + 8, 16 + 8)


def test_the_vision_transformer_sends_less_by_its_queries_and_keys():
    config = PAPER.configs["cifar10"]
    shapes = jax.eval_shape(
        partial(PAPER.model(config).init, KEY), jax.eval_shape(partial(PAPER.example, config, batch_size=1), key=KEY)
    )["params"]
    sizes = [sum(v.size for v in split_message(shapes, Settings(), stage=stage)[0].values()) for stage in (1, 2)]
    assert sizes[0] - sizes[1] == config.num_layers * 2 * (192 * 192 + 192)
    assert sizes[0] == pytest.approx(2.7e6, rel=0.01)


def test_a_first_stage_of_all_rounds_is_plain_averaging(small):
    params, draw, weights = small
    settings = Settings(warmup_rounds=4)
    done = federate(small_loss, params, draw, weights, settings, rounds=4, key=KEY)
    expected = params
    for key in jax.random.split(KEY, 4):
        _, how = jax.random.split(key)
        ends = []
        for client, own in zip(range(5), jax.random.split(how, 5), strict=True):
            theirs, (x, y) = expected, draw(client, own)
            for step in range(3):
                gradient = jax.grad(small_loss)(theirs, (x[step], y[step]))
                theirs = jax.tree.map(lambda p, g: p - 0.05 * (g + 1e-4 * p), theirs, gradient)
            ends.append(theirs)
        expected = jax.tree.map(lambda *p: sum(w * v for w, v in zip(weights / 15, p, strict=True)), *ends)
    chex.assert_trees_all_close(done.params, expected, rtol=1e-4, atol=1e-6)


def test_one_client_is_central_training(small):
    params, draw, _ = small
    settings = Settings(warmup_rounds=1, weight_decay=0.0)
    done = federate(small_loss, params, draw, jnp.ones(1), settings, rounds=3, key=KEY)
    expected = params
    for number, key in enumerate(jax.random.split(KEY, 3)):
        x, y = draw(0, jax.random.split(jax.random.split(key)[1], 1)[0])
        for step in range(3):
            gradient = jax.grad(small_loss)(expected, (x[step], y[step]))
            if number:
                gradient["layer"]["query"], gradient["layer"]["key"] = jax.tree.map(
                    jnp.zeros_like, (gradient["layer"]["query"], gradient["layer"]["key"])
                )
            expected = jax.tree.map(lambda p, g: p - 0.05 * g, expected, gradient)
    chex.assert_trees_all_close(done.params, expected, rtol=1e-4, atol=1e-6)


def test_the_proximal_rule_pulls_towards_the_server(small):
    params, draw, _ = small
    moving, fixed = split_message(params, Settings(), stage=2)
    batches = draw(0, KEY)

    def distance(mu):
        after = local_training(small_loss, moving, fixed, batches, Settings(proximal=mu, weight_decay=0.0))
        return sum(float(jnp.sum(jnp.square(after[n] - moving[n]))) for n in moving)

    assert distance(0.0) > distance(5.0) > distance(15.0) > 0


def test_controls_are_mean_gradients_and_vanish_between_equal_clients(small):
    params, draw, _ = small
    settings, chosen = Settings(weight_decay=0.0, variance_reduced=True), jnp.array([0, 1])
    batches = jax.tree.map(lambda *a: jnp.stack(a), draw(0, KEY), draw(0, KEY))
    _, controls = federated_round(
        small_loss, params, batches, jnp.ones(2), settings, stage=1, controls=start_controls(params, 2), chosen=chosen
    )
    for name, server in controls.server.items():
        # Equal clients: the correction, server minus own, is nothing.
        chex.assert_trees_all_close(controls.clients[name], jnp.stack([server, server]), rtol=1e-5, atol=1e-6)
    one = jax.tree.map(lambda a: a[:, :1], batches)
    _, controls = federated_round(
        small_loss, params, one, jnp.ones(2), settings, stage=1, controls=start_controls(params, 2), chosen=chosen
    )
    gradient = flatten_dict(jax.grad(small_loss)(params, jax.tree.map(lambda a: a[0, 0], one)), sep="/")
    chex.assert_trees_all_close(controls.server, gradient, rtol=1e-3, atol=1e-4)


def test_variance_reduction_removes_the_drift_of_unlike_clients():
    """Quadratics of different curvature: averaging ends beside the optimum, the corrected rule at it."""
    curvature, target = jnp.array([0.2, 1.0, 3.0]), jnp.array([4.0, -1.0, 1.0])

    def loss(params, batch):
        return 0.5 * batch[0] * jnp.square(params["value"] - batch[1])

    def draw(client, key):
        return jnp.broadcast_to(curvature[client], 10), jnp.broadcast_to(target[client], 10)

    best = jnp.sum(curvature * target) / jnp.sum(curvature)
    ends = [
        federate(
            loss, {"value": jnp.zeros(())}, draw, jnp.ones(3),
            Settings(300, learning_rate=0.1, weight_decay=0.0, variance_reduced=reduced), rounds=300, key=KEY,
        ).params["value"]
        for reduced in (False, True)
    ]  # fmt: skip
    assert abs(ends[0] - best) > 0.05
    assert abs(ends[1] - best) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 5}, "warmup_rounds 10 is not between 0 and the 5 rounds"),
        ({"rounds": 20, "sampled": 6}, "6 clients cannot be sampled of 5"),
    ],
)
def test_what_cannot_be_federated(small, arguments, message):
    with pytest.raises(zoo.UserError, match=message):
        federate(small_loss, *small, Settings(), **arguments, key=KEY)


# --- the theory -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_linear_attention():
    x, kernel = jax.random.normal(KEY, (3, 6, 4)), jax.random.normal(jax.random.key(1), (4, 4))
    for own, found in zip(x, features(kernel, x), strict=True):
        chex.assert_trees_all_close(found, (own @ kernel @ own.T) @ own / 6, rtol=1e-4, atol=1e-4)


def test_the_envelope_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        config = replace(PAPER.demo.configs["tiny"], clients=2, samples=4)
        x, y = (a.reshape(-1, *a.shape[2:]) for a in simulate(config, KEY))
        kernel = jax.random.normal(KEY, (8, 8))
        ridge = 0.1
        value = jnp.linalg.solve(
            sum(features(kernel, a).T @ features(kernel, a) for a in x) / len(x) + ridge * jnp.eye(8),
            sum(features(kernel, a).T @ b for a, b in zip(x, y, strict=True)) / len(x),
        )
        found = kernel_gradient(kernel, value, x, y)
        direction = jax.random.normal(jax.random.key(2), (8, 8))
        step = 1e-5
        ends = [profile(kernel + sign * step * direction, x, y, ridge=ridge) for sign in (1, -1)]
        chex.assert_trees_all_close(jnp.sum(found * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
        chex.assert_trees_all_close(profile(kernel, x, y, ridge=ridge), objective(kernel, value, x, y, ridge=ridge),
                                    rtol=1e-10)  # fmt: skip
        assert objective(kernel, value + 0.01, x, y, ridge=ridge) > profile(kernel, x, y, ridge=ridge)


def test_without_heterogeneity_clients_have_the_same_problem():
    config = PAPER.demo.configs["tiny"]
    x, y = simulate(replace(config, heterogeneity=0.0), KEY)
    chex.assert_trees_all_close((x[1:], y[1:]), (x[:-1], y[:-1]))
    x, y = simulate(config, KEY)
    assert float(jnp.std(x[0] - x[1])) > 0.1


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    """(model, batch, program) with rounds of the trainer, the first of two stages one round long."""
    model = zoo.create("fedfrozen", "digits", num_layers=1)
    batch = PAPER.example(model.config, batch_size=16, key=KEY)
    optimizer = fed_frozen(Settings(1, learning_rate=0.1, weight_decay=0.01), local_steps=2)
    mesh = make_mesh("data=1", batch_size=16, devices=jax.devices()[:1])
    sizes = {"seed": 0, "batch_size": 16, "max_steps": 3, "eval_batch_size": 16, "own_gradients": True}
    return model, batch, make_program(PAPER, model, optimizer, mesh, **sizes)


def test_a_step_of_the_trainer_is_a_round(program):
    model, batch, program = program
    share = jnp.array([1.0, 2.0, 3.0, 4.0])[jnp.arange(16) % 4]
    state, params = program.init(), []
    for _ in range(2):
        params.append(jax.device_get(state.params))
        state, _ = program.step(state, batch | {"client_share": share})
    after = jax.device_get(state.params)

    def loss(params, batch):
        return PAPER.compute_loss(model.apply({"params": params}, batch), batch)[0]

    parts = {name: jnp.stack([v[i::4].reshape(2, 2, *v.shape[1:]) for i in range(4)]) for name, v in batch.items()}
    settings = Settings(1, learning_rate=0.1, weight_decay=0.01)
    expected, _ = jax.jit(partial(federated_round, loss, settings=settings, stage=2))(
        params[1], parts, jnp.arange(1.0, 5.0)
    )
    chex.assert_trees_all_close(after, expected, rtol=1e-3, atol=1e-4)  # the moves are 1e-2
    first, second = (p["layers_0"]["attention"] for p in params)
    assert all(np.any(first[name]["kernel"] != second[name]["kernel"]) for name in ("query", "key", "value"))
    flat, before = flatten_dict(after, sep="/"), flatten_dict(params[1], sep="/")
    for name, value in flat.items():
        same = np.array_equal(value, before[name])
        assert same == ("/query/" in name or "/key/" in name), name


def test_a_probes_attention_drifts_less_between_clients_when_the_kernel_is_frozen():
    model = zoo.create("fedfrozen", "digits", num_layers=1)
    batch = PAPER.example(model.config, batch_size=8, key=KEY)
    params = jax.jit(model.init)(KEY, batch)["params"]

    def loss(params, batch):
        return PAPER.compute_loss(model.apply({"params": params}, batch), batch)[0]

    @partial(jax.jit, static_argnames="stage")
    def drift(stage):
        """Mean squared distance between the clients' attention maps of one input, after a round."""
        moving, fixed = split_message(params, Settings(), stage=stage)
        # Clients of one class each.
        batches = [batch | {"label": jnp.full(8, kind)} for kind in range(3)]

        def maps(own):
            repeated = jax.tree.map(lambda v: jnp.broadcast_to(v, (5, *v.shape)), own)
            after = local_training(loss, moving, fixed, repeated, Settings(learning_rate=0.1))
            state = {"params": unflatten_dict({**after, **fixed}, sep="/")}
            _, seen = model.apply(state, batch, mutable=["intermediates"])
            return seen["intermediates"]["layers_0"]["attention"]["weights"][0]

        found = jax.lax.map(maps, jax.tree.map(lambda *v: jnp.stack(v), *batches))
        return jnp.mean(jnp.var(found, axis=0))

    first, second = float(drift(stage=1)), float(drift(stage=2))
    assert 0 < second < first


def test_a_batch_too_small_for_the_local_steps_is_refused():
    parts = [{"x": jnp.zeros((3, 2))}] * 4
    params = {"head": {"kernel": jnp.zeros((2, 2))}}
    optimizer = fed_frozen(Settings(), local_steps=5)
    with pytest.raises(zoo.UserError, match="a client has 3 examples for 5 local steps"):
        optimizer.update(params, optimizer.init(params), params, objective=None, batches=parts)
