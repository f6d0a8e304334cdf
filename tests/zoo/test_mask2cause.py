"""Mask2Cause's card: what the paper's mechanism implies."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.systems import generate_var
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.series.mask2cause import AdjacencyAttention, Config, edge_penalty, edge_probabilities
from zoo.tasks import causal_discovery

KEY = jax.random.key(6)
PAPER = zoo.paper("mask2cause")
SMALL = Config(variates=5, d_model=8, num_heads=2)


def noisy(model, *inputs):
    """Variables away from zeros and symmetries; nothing is compiled for them."""
    rng = np.random.default_rng(6)
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs), KEY)
    draw = lambda s: jnp.asarray(rng.normal(1.0 if s.ndim == 1 else 0.0, 0.5, s.shape), s.dtype)  # noqa: E731
    return jax.tree.map(draw, {"params": shapes["params"]})


@pytest.fixture(scope="module")
def attention():
    module, x = AdjacencyAttention(SMALL), jax.random.normal(KEY, (2, 5, 8))
    variables = noisy(module, x, jnp.ones((5, 5)))
    return variables["params"], x, jax.jit(lambda graph: module.apply(variables, x, graph))


def by_hand(params, x, weigh):
    """The layer in float64, with weights `weigh(scores)` a head."""
    x = np.asarray(x, np.float64)
    line = lambda v, name: v @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])  # noqa: E731
    query, key, value = (line(x, name).reshape(2, 5, 2, 4) for name in ("query", "key", "value"))
    weights = weigh(np.einsum("bihd,bjhd->bhij", query, key) / 2.0)
    return line(np.einsum("bhij,bjhd->bihd", weights, value).reshape(2, 5, 8), "out")


def test_with_every_edge_open_it_is_ordinary_attention(attention):
    params, x, apply = attention

    def softmax(scores):
        powers = np.exp(scores)
        return powers / powers.sum(-1, keepdims=True)

    np.testing.assert_allclose(apply(jnp.ones((5, 5))), by_hand(params, x, softmax), atol=2e-5)


def test_the_logarithm_of_a_graph_multiplies_the_weights(attention):
    params, x, apply = attention
    graph = np.random.default_rng(0).uniform(0, 1, (5, 5)).astype(np.float32)
    graph[2, 3] = 0.0

    def multiplied(scores):
        weights = (graph.astype(np.float64) + 1e-6) * np.exp(scores)
        return weights / weights.sum(-1, keepdims=True)

    np.testing.assert_allclose(apply(jnp.asarray(graph)), by_hand(params, x, multiplied), atol=2e-5)


def test_a_closed_edge_lets_nothing_through():
    model = zoo.create("mask2cause", "tiny", variates=5, num_layers=1)
    x = jax.random.normal(KEY, (1, 3, 5))
    variables = noisy(model, {"x": x})

    def influence(logit):
        """Largest change of variable 1's forecast by variable 3's past."""
        edges = jnp.zeros((5, 5)).at[1, 3].set(logit)
        params = variables["params"] | {"edge_table": edges}
        return gradient(params)

    slope = jax.grad(lambda x, params: model.apply({"params": params}, {"x": x})["mean"][0, 1])
    gradient = jax.jit(lambda params: jnp.max(jnp.abs(slope(x, params)[0, :, 3])))
    assert float(influence(5.0)) > 1e-3
    assert float(influence(-100.0)) < 1e-5 * float(influence(5.0))


def test_a_forced_diagonal_is_open_or_shut_and_costs_nothing():
    logits = jax.random.normal(KEY, (5, 5))
    assert float(jnp.min(jnp.diag(edge_probabilities(logits, 100.0)))) == 1.0
    assert float(jnp.max(jnp.diag(edge_probabilities(logits, -100.0)))) < 1e-40
    chex.assert_trees_all_close(edge_probabilities(logits, 0.0), jax.nn.sigmoid(logits), rtol=1e-6)
    penalties = [float(edge_penalty(edge_probabilities(logits, force), 1e-5)) for force in (100.0, 0.0, -100.0)]
    assert penalties[0] == penalties[1] == penalties[2]
    probabilities = np.asarray(jax.nn.sigmoid(logits))
    assert penalties[0] == pytest.approx(probabilities[~np.eye(5, dtype=bool)].mean(), rel=1e-5)


def test_two_graphs_run_through_the_same_weights():
    model = zoo.create("mask2cause", "tiny", variant="dual", variates=5)
    batch = {"x": jax.random.normal(KEY, (3, 3, 5))}
    variables = noisy(model, batch)
    apply = jax.jit(model.apply)
    both = apply(variables, batch)
    assert both["graphs"].shape == (3, 2, 5, 5)
    single = zoo.create("mask2cause", "tiny", variant="nll", variates=5)
    one = jax.jit(single.apply)
    for logits, name in (("edge_table", "mean"), ("variance_edge_table", "variance")):
        params = {k: v for k, v in variables["params"].items() if k != "variance_edge_table"}
        params["edge_table"] = variables["params"][logits]
        chex.assert_trees_all_close(one({"params": params}, batch)[name], both[name], rtol=1e-5)


def test_a_new_model_has_the_same_two_graphs():
    model = zoo.create("mask2cause", "mixed_dual")
    shapes = PAPER.example(model.config, batch_size=1, key=KEY)
    params = jax.jit(model.init)(KEY, shapes)["params"]
    chex.assert_trees_all_equal(params["edge_table"], params["variance_edge_table"])
    assert float(params["edge_table"][0, 1]) == 1.0


def test_read_outs_of_an_earlier_version():
    batch = {"x": jax.random.normal(KEY, (2, 3, 5))}
    shared = zoo.create("mask2cause", "tiny", variates=5)
    own = zoo.create("mask2cause", "tiny", variates=5, readout="decoupled", residual=True)
    variables = noisy(shared, batch)
    head = variables["params"]["mean_head"]["linear"]
    repeated = {"kernel": jnp.tile(head["kernel"].T, (5, 1)), "bias": jnp.repeat(head["bias"], 5)}
    params = variables["params"] | {"mean_head": repeated}
    expected = shared.apply(variables, batch)["mean"] + batch["x"][:, -1]
    chex.assert_trees_all_close(own.apply({"params": params}, batch)["mean"], expected, atol=1e-5)


def test_the_penalty_warms_up():
    model = zoo.create("mask2cause", "tiny", variates=5, sparsity_warmup=4, sparsity=2.0, dropout_rate=0.0)
    batch = {"x": jax.random.normal(KEY, (2, 3, 5))}
    variables = model.init(KEY, batch)
    step = jax.jit(lambda v: model.apply(v, batch, train=True, mutable=["schedule"]))
    seen = []
    for _ in range(6):
        outputs, changed = step(variables)
        variables = {**variables, **changed}
        seen.append(float(outputs["penalty"][0]))
    full = 2.0 * float(jax.nn.sigmoid(-1.0))
    np.testing.assert_allclose(seen, [full * share for share in (0.25, 0.5, 0.75, 1, 1, 1)], rtol=1e-4)


def test_scores_of_a_graph_are_those_of_pairs_and_curves():
    rng = np.random.default_rng(1)
    truth = rng.random((6, 6)) < 0.4
    probability = rng.random((6, 6)).round(1).astype(np.float32)  # with ties
    found = jax.jit(causal_discovery.graph_scores)(jnp.asarray(probability), jnp.asarray(truth))
    off = ~np.eye(6, dtype=bool)
    edges, gaps = probability[off & truth], probability[off & ~truth]
    pairs = [(a > b) + 0.5 * (a == b) for a in edges for b in gaps]
    assert float(found["auroc"]) == pytest.approx(np.mean(pairs), rel=1e-5)
    curve = [(0.0, 1.0)]
    for threshold in sorted(set(probability[off]), reverse=True):
        true, alarms = (edges >= threshold).sum(), (probability[off] >= threshold).sum()
        curve.append((true / len(edges), true / alarms))
    recall, precision = np.array(curve).T
    assert float(found["auprc"]) == pytest.approx(np.trapezoid(precision, recall), rel=1e-5)
    guess = probability > 0.5
    wrong = (guess != truth)[off].sum()
    assert float(found["shd"]) == wrong
    assert float(found["f1"]) == pytest.approx(2 * (guess & truth)[off].sum() / (guess[off].sum() + len(edges)))
    assert int(causal_discovery.strongest_edges(jnp.asarray(probability), len(edges)).sum()) == len(edges)
    assert not np.any(np.diag(causal_discovery.strongest_edges(jnp.asarray(probability), 30)))


def test_the_graph_and_not_the_diagonal_is_scored():
    truth = jnp.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]])
    off = jnp.where(jnp.eye(3, dtype=bool), 0.0, truth.astype(jnp.float32))
    outputs = {"mean": jnp.zeros((1, 3)), "graphs": off[None, None], "penalty": jnp.zeros(1)}
    scores = causal_discovery.metrics(outputs, {"y": jnp.zeros((1, 3)), "graph": truth[None]})
    assert (float(scores["auroc"][0]), float(scores["f1"][0]), float(scores["shd"][0])) == (1.0, 1.0, 0.0)


def test_edges_are_told_apart_by_kind():
    truth = jnp.array([[1, 2, 1], [2, 1, 3], [1, 0, 1]])
    mean = jnp.array([[1, 0.2, 0.9], [0.3, 1, 0.9], [0.1, 0.5, 1]])
    outputs = {"mean": jnp.zeros((1, 3)), "graphs": jnp.stack([mean, jnp.full((3, 3), 0.4)])[None]}
    scores = causal_discovery.metrics(outputs, {"y": jnp.zeros((1, 3)), "graph": truth[None]})
    assert float(scores["edge_type_accuracy"][0]) == 0.75  # (2, 0) is mistaken, (1, 2) is both


def trained(name, data, *, epochs, **changes):
    """Scores of the graph after so many epochs, and of the baseline."""
    recipe = recipe_for("mask2cause", name)
    recipe = dataclasses.replace(recipe, data=data, data_dir=None, mesh="data=1", log_every=200, **changes)
    run = prepare(recipe)
    state = run.program.init()
    for epoch in range(epochs):
        order = epoch_order(recipe.seed, epoch, len(run.splits.train))
        state, _ = run.program.run(state, run.splits.train, order, 0, run.steps_per_epoch)
    tables = [state.params[name] for name in ("edge_table", "variance_edge_table") if name in state.params]
    graphs = jnp.stack([edge_probabilities(table, recipe.model.diagonal_force) for table in tables])
    batch = run.splits.test.batch(jnp.arange(len(run.splits.test)))
    simple = causal_discovery.lagged_correlation(batch)["graphs"][0]
    truth, scores = run.splits.test.graph[None], {}
    for who, found in (("", graphs), ("baseline/", simple)):
        outputs = {"mean": jnp.zeros((1, 10)), "graphs": found[None], "penalty": jnp.zeros(1)}
        values = causal_discovery.metrics(outputs, {"y": jnp.zeros((1, 10)), "graph": truth})
        scores |= {f"{who}{metric}": float(value[0]) for metric, value in values.items()}
    return scores


def test_finds_the_parents_of_an_autoregression():
    scores = trained("var", "standin", epochs=10)
    assert scores["auroc"] > 0.9, scores


def test_finds_the_parents_of_a_chaotic_system():
    scores = trained("lorenz_10_500", "standin/lorenz96", epochs=15)
    assert scores["auroc"] > 0.85, scores
    assert scores["auroc"] > scores["baseline/auroc"] + 0.1, scores


@pytest.mark.slow
def test_causes_of_the_variance_are_found_by_likelihood_alone_and_told_apart_by_two_graphs():
    mean, likelihood, dual = (
        trained(name, "standin/mixed_100", epochs=3, batch_size=64) for name in ("mixed", "mixed_nll", "mixed_dual")
    )
    assert likelihood["auroc"] > mean["auroc"] + 0.2
    assert likelihood["auroc"] > 0.9
    assert dual["edge_type_accuracy"] > 0.8, dual


def test_a_forecaster_needs_the_parents_alone():
    system = generate_var(0, steps=2_000)
    found = causal_discovery.pruned_forecast(system.series, system.graph > 0, lag=3)
    assert found.pruned_coefficients < 0.35 * found.coefficients
    assert found.pruned_error < found.error
    wrong = causal_discovery.pruned_forecast(system.series, np.eye(10, dtype=bool), lag=3)
    assert wrong.pruned_error > 1.1 * found.pruned_error


def test_the_data_must_have_the_variates_of_the_model():
    model = zoo.create("mask2cause", "tiny")
    with pytest.raises(
        zoo.UserError, match=r"built for 10 variates of 3 steps, the data has 15 of 3: set --model.vari"
    ):
        jax.eval_shape(model.init, KEY, {"x": jnp.zeros((1, 3, 15))})
    with pytest.raises(zoo.UserError, match="d_model 16 is not a multiple of num_heads 3"):
        zoo.create("mask2cause", "tiny", num_heads=3)
