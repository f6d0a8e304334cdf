"""Social-Mamba's card: what the paper's mechanism implies."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.feed import epoch_order
from trainers.flops import matmul_flops
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.blocks import Execution, Mamba, execution
from zoo.decision.social_mamba import (
    BiMambaBlock,
    Config,
    CycleMambaBlock,
    Encoding,
    FeedForward,
    PairwiseBranch,
    agent_order,
)
from zoo.registry import variable_shapes

KEY = jax.random.key(4)
PAPER = zoo.paper("social_mamba")
SMALL = Config(d_model=12, dropout_rate=0.0)


def noisy(model, *inputs, **arguments):
    """Variables of the module, away from zeros and symmetries; nothing is compiled for them."""
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs, **arguments), KEY)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "D") else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, leaf.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(model):
    return jax.jit(model.apply, static_argnames=("train", "mutable"))


def run(model, *inputs, **arguments):
    """The module's output, compiled once."""
    return compiled(model)(*inputs, **arguments)


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("social_mamba", "tiny")
    batch = PAPER.example(model.config, batch_size=4, key=KEY)
    return model, batch, noisy(model, batch), compiled(model)


@pytest.fixture(scope="module")
def cycle():
    block, x = CycleMambaBlock(SMALL), jax.random.normal(KEY, (2, 7, 12))
    return block, x, noisy(block, x)


def test_the_first_output_of_a_cycle_sees_the_last_input(cycle):
    block, x, variables = cycle
    change = run(block, variables, x.at[:, -1].set(-x[:, -1])) - run(block, variables, x)
    assert float(jnp.min(jnp.max(jnp.abs(change[:, 0]), axis=-1))) > 1e-3


def test_a_cycle_is_one_scan_there_and_back(cycle):
    block, x, variables = cycle
    params = variables["params"]
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + SMALL.layer_norm_epsilon)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    step = jax.jit(lambda u, state: Mamba().apply({"params": params["mamba"]}, u, state, return_state=True))
    state, outputs = None, dict.fromkeys(range(7), 0.0)
    for t in (*range(7), *reversed(range(7))):
        y, state = step(normed[:, t : t + 1], state)
        outputs[t] = outputs[t] + y
    context = jnp.concatenate([outputs[t] for t in range(7)], axis=1)
    expected = x + FeedForward(SMALL).apply({"params": params["ffn"]}, context, train=False)
    chex.assert_trees_all_close(run(block, variables, x), expected, atol=1e-5)


def test_a_cycle_of_one_token_is_the_sum_of_two_steps(cycle):
    block, x, variables = cycle
    one = x[:, :1]
    params = variables["params"]
    normed = (one - one.mean(-1, keepdims=True)) / jnp.sqrt(one.var(-1, keepdims=True) + SMALL.layer_norm_epsilon)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    twice = Mamba().apply({"params": params["mamba"]}, jnp.concatenate([normed, normed], axis=1))
    expected = one + FeedForward(SMALL).apply({"params": params["ffn"]}, twice.sum(1, keepdims=True), train=False)
    chex.assert_trees_all_close(run(block, variables, one), expected, atol=1e-5)


def test_a_cycle_has_a_direction_and_two_tied_scans_have_none(cycle):
    block, x, variables = cycle
    flip = lambda a: jnp.flip(a, axis=1)  # noqa: E731
    assert not np.allclose(run(block, variables, flip(x)), flip(run(block, variables, x)), atol=1e-3)
    both = BiMambaBlock(SMALL)
    tied = noisy(both, x)
    tied["params"]["backward_mamba"] = tied["params"]["forward_mamba"]
    chex.assert_trees_all_close(run(both, tied, flip(x)), flip(run(both, tied, x)), atol=1e-5)


def test_a_cycle_of_given_lengths_is_that_of_the_cut_sequences(cycle):
    block, x, variables = cycle
    found = run(block, variables, x, lengths=jnp.array([3, 7]))
    chex.assert_trees_all_close(found[:1, :3], run(block, variables, x[:1, :3]), atol=1e-5)
    chex.assert_trees_all_close(found[1:], run(block, variables, x[1:]), atol=1e-5)


def test_work_grows_in_proportion_to_the_agents():
    model = zoo.create("social_mamba", "nba_score")

    def flops(agents):
        batch = jax.eval_shape(
            lambda key: PAPER.example(dataclasses.replace(model.config, num_agents=agents), batch_size=1, key=key), KEY
        )
        variables = jax.eval_shape(model.init, {"params": KEY, "dropout": KEY}, batch)
        return matmul_flops(model.apply, variables, batch).count

    assert flops(64) / flops(8) == pytest.approx(8, rel=0.1)


def test_a_moved_scene_has_a_moved_future(setting):
    _, batch, variables, apply = setting
    shift = jnp.array([3.0, -2.0])
    moved = apply(variables, batch | {"x": batch["x"] + shift})
    chex.assert_trees_all_close(moved, apply(variables, batch) + shift, atol=2e-5)


@pytest.mark.parametrize("mask_absent", [True, False])
def test_absent_agents_matter_in_the_official_code_alone(setting, mask_absent):
    model, batch, variables, _ = setting
    model = zoo.create("social_mamba", "tiny", mask_absent=mask_absent)
    assert not bool(jnp.all(batch["agent_mask"]))
    ghosts = jnp.where(batch["agent_mask"][:, None, :, None], batch["x"], 5.0)
    before, after = (run(model, variables, batch | {"x": x}) for x in (batch["x"], ghosts))
    changed = jnp.max(jnp.abs(before - after), axis=(1, 2, 3)) > 1e-5
    expected = jnp.zeros(4, bool) if mask_absent else ~jnp.all(batch["agent_mask"], axis=1)
    chex.assert_trees_all_equal(changed, expected)


@pytest.mark.parametrize(("block", "place"), [(BiMambaBlock, 9), (CycleMambaBlock, 4)], ids=["goal", "ego"])
def test_a_pairwise_view_changes_one_token(block, place):
    x = jax.random.normal(KEY, (2, 3, 9, 12))
    branch = PairwiseBranch(SMALL, block, 1)
    arguments = (x, x[:, 0, place - 1], place, jnp.ones((2, 3), bool))
    variables = noisy(branch, *arguments, train=False)
    view = jax.jit(lambda x: branch.apply(variables, x, *arguments[1:], train=False))
    found = view(x)
    changed = jnp.any(found != x, axis=-1)
    expected = jnp.zeros_like(changed).at[:, 0, -1].set(True)
    chex.assert_trees_all_equal(changed, expected)
    # That token hears of every agent.
    for agent in range(3):
        heard = view(x.at[:, agent, 2].set(-x[:, agent, 2]))[:, 0, -1]
        assert not np.allclose(heard, found[:, 0, -1], atol=1e-4)


def numbered_tables(width):
    """Tables in which a row's number can be read off its entries; all far shorter than 1."""
    sizes = {"past_table": 200, "future_table": 300, "agent_table": 1000}
    return {name: jnp.repeat(1e-4 * jnp.arange(size)[:, None], width // 2, axis=1) for name, size in sizes.items()}


def test_frames_and_agents_have_the_official_rows():
    encoding = Encoding().apply({"params": numbered_tables(4)}, 3, 8, 12, 4)
    rows = np.round(np.asarray(encoding) * 1e4).astype(int)
    chex.assert_shape(rows, (3, 20, 4))
    chex.assert_trees_all_equal(rows[1, :8, 0], np.array([79, 69, 59, 49, 39, 29, 19, 9]))
    chex.assert_trees_all_equal(rows[2, 8:, 2], 10 * np.arange(12))
    chex.assert_trees_all_equal(rows[:, 5, 1], np.arange(3))
    chex.assert_trees_all_equal(rows[:, 5, 3], np.arange(3))


def test_long_rows_are_cut_in_value_and_not_in_gradient():
    tables = {name: jnp.full_like(table, 3.0) for name, table in numbered_tables(4).items()}
    look_up = lambda tables: Encoding().apply({"params": tables}, 2, 3, 3, 4)  # noqa: E731
    chex.assert_trees_all_close(look_up(tables), jnp.full((2, 6, 4), 0.5**0.5), rtol=1e-6)
    gradient = jax.grad(lambda tables: jnp.sum(look_up(tables)))(tables)
    assert float(gradient["agent_table"][1, 0]) == 6.0  # once a frame, as if the row had been read as it is


def test_too_many_frames_for_the_tables():
    model = zoo.create("social_mamba", "tiny", lookback=21)
    batch = PAPER.example(model.config, batch_size=1, key=KEY)
    with pytest.raises(ValueError, match=r"21 of the past_table are more than its 200 rows serve"):
        model.init(KEY, batch)


def test_a_past_that_leaves_no_future():
    model = zoo.create("social_mamba", "tiny")
    batch = PAPER.example(dataclasses.replace(model.config, lookback=10), batch_size=1, key=KEY)
    with pytest.raises(ValueError, match="10 frames are no past where 10 are past and future together"):
        model.init(KEY, batch)


@pytest.mark.parametrize("order", ["none", "distance", "random", "kinematic", "risk", "intent"])
def test_the_ego_comes_first_and_the_absent_last(order):
    x = jax.random.normal(KEY, (5, 3, 6, 2))
    present = jnp.array([[1, 0, 1, 1, 0, 1]] * 5, bool)
    found = agent_order(x, present, order, KEY)
    chex.assert_trees_all_equal(jnp.sort(found, axis=1), jnp.broadcast_to(jnp.arange(6), (5, 6)))
    chex.assert_trees_all_equal(found[:, 0], jnp.zeros(5, jnp.int32))
    chex.assert_trees_all_equal(jnp.sort(found[:, 4:], axis=1), jnp.array([[1, 4]] * 5))


def test_orders_are_what_they_are_called():
    still, east = jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0])
    # The ego, and a near one that waits, a far one that runs away, one that comes, one that parts slowly.
    places = jnp.array([[0.0, 0.0], [0.5, 0.0], [9.0, 0.0], [4.0, 0.0], [2.0, 0.0]])
    velocities = jnp.stack([still, still, 5 * east, -east, 0.5 * east])
    x = jnp.stack([places - velocities, places])[None]
    everyone = jnp.ones((1, 5), bool)
    first = {"distance": 1, "kinematic": 2, "risk": 2, "intent": 3}
    for order, agent in first.items():
        assert int(agent_order(x, everyone, order)[0, 1]) == agent, order
    with pytest.raises(ValueError, match="agent_order 'risk' needs two frames"):
        agent_order(x[:, :1], everyone, "risk")


def test_the_model_sees_agents_in_the_order_it_asks_for(setting):
    _, batch, variables, apply = setting
    sorting = zoo.create("social_mamba", "tiny", agent_order="distance")
    order = agent_order(batch["x"], batch["agent_mask"], "distance")
    sorted_batch = batch | {
        "x": jnp.take_along_axis(batch["x"], order[:, None, :, None], axis=2),
        "agent_mask": jnp.take_along_axis(batch["agent_mask"], order, axis=1),
    }
    expected = apply(variables, sorted_batch)
    assert not np.allclose(expected, apply(variables, batch), atol=1e-3)
    chex.assert_trees_all_close(run(sorting, variables, batch), expected, atol=1e-5)


def test_all_of_the_official_model_is_there():
    shapes = variable_shapes(PAPER, zoo.create("social_mamba", "nba"))
    assert sum(s.size for s in jax.tree.leaves(shapes)) == 4_339_374
    assert sum(s.size for s in jax.tree.leaves(shapes["unused"])) == 387
    assert sum(s.size for s in jax.tree.leaves(shapes["params"]["encoding"])) == 96_000


def test_the_three_views_are_weighed(setting):
    model, batch, variables, _ = setting
    _, captured = run(model, variables, batch, mutable="intermediates")
    gate = captured["intermediates"]["gate"]["gate"][0]
    chex.assert_shape(gate, (4, 4, 10, 3))
    chex.assert_trees_all_close(gate.sum(-1), jnp.ones((4, 4, 10)), rtol=1e-5)


def test_stacks_can_be_scanned_and_recomputed(setting):
    _, batch, _, _ = setting
    model = zoo.create("social_mamba", "tiny", temporal_layers=2, global_layers=2)
    variables = noisy(model, batch)

    def loss(variables):
        return PAPER.compute_loss(model.apply(variables, batch), batch)[0]

    expected = jax.jit(jax.value_and_grad(loss))(variables)
    with execution(Execution(scan=True, remat="full")):
        chex.assert_trees_all_close(jax.jit(jax.value_and_grad(loss))(variables), expected, rtol=1e-4, atol=1e-5)
        text = str(jax.make_jaxpr(loss)(variables))
    assert text.count("remat") >= 2


def test_learns_in_an_epoch():
    prepared = prepare(dataclasses.replace(recipe_for("social_mamba"), mesh="data=1", log_every=62))
    order = epoch_order(0, 0, len(prepared.splits.train))
    state, _ = prepared.program.run(prepared.program.init(), prepared.splits.train, order, 0, prepared.steps_per_epoch)
    scores = prepared.program.evaluate(state.variables, prepared.splits.test)
    assert float(scores["min_ade"]) < 0.7 * float(scores["constant_velocity/min_ade"])
