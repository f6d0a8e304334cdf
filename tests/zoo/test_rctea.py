"""RCTEA's card: what richness-guided attention, the seed loss and the consensus imply."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layers
import zoo
from trainers.data.alignment import load_alignment
from zoo.graphs import rctea
from zoo.tasks import entity_alignment as task

KEY = jax.random.key(7)
PAPER = zoo.paper("rctea")
CONFIG = PAPER.config("tiny")
RANDOM = np.random.default_rng(0)
close = chex.assert_trees_all_close
# (i, j): i looks at j; every node has a neighbour.
EDGES = jnp.asarray(
    np.array([(i, j) for i in range(7) for j in range(7) if (i * j + i + j) % 3 == 0 or j == (i + 1) % 7])
)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def test_weights_are_shares_that_depend_on_the_angle_to_the_reference_alone():
    f, reference = draw(7, 5), draw(5)
    weights = rctea.richness_weights(f, reference, EDGES, None, CONFIG)
    close(jax.ops.segment_sum(weights, EDGES[:, 0], 7), jnp.ones(7), atol=1e-6)
    lengths = jnp.abs(draw(7, 1)) + 0.1
    close(rctea.richness_weights(f * lengths, 3.0 * reference, EDGES, None, CONFIG), weights, atol=1e-5)
    poor = f.at[2].set(reference)
    weights = rctea.richness_weights(poor, reference, EDGES, None, CONFIG)
    for i in range(7):
        own = np.asarray(EDGES[:, 0]) == i
        if 2 in EDGES[own, 1]:
            assert int(EDGES[own, 1][jnp.argmin(weights[own])]) == 2


def test_without_attention_propagation_is_a_mean_over_neighbours():
    f, c = draw(7, 5), CONFIG
    adjacency = np.zeros((7, 7))
    adjacency[EDGES[:, 0], EDGES[:, 1]] = 1
    adjacency /= adjacency.sum(1, keepdims=True)
    expected = [np.tanh(np.asarray(f, np.float64))]
    for _ in range(c.depth):
        expected.append(np.tanh(adjacency @ expected[-1]))
    ours = rctea.propagate(f, f[0], EDGES, None, c, False)
    close(ours, jnp.asarray(np.concatenate(expected, axis=1), jnp.float32), atol=1e-5)


def test_the_seed_loss_equals_a_softmax_over_both_sides():
    left, right = draw(5, 4), draw(5, 4)
    mask = jnp.array([True, True, True, True, False])
    z, y = (np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True), np.float64) for x in (left, right))
    total = 0.0
    for own, other in ((z, y), (y, z)):
        for i in range(4):
            others = [own[i] @ other[j] for j in range(4)] + [own[i] @ own[j] for j in range(4) if j != i]
            total += np.log(np.sum(np.exp(np.array(others) / 0.1))) - own[i] @ other[i] / 0.1
    loss = task.seed_loss(left, right, mask, temperature=0.1)
    assert float(loss) == pytest.approx(total / 8, rel=1e-5)
    close(task.seed_loss(right, left, mask, temperature=0.1), loss, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: task.seed_loss(x, right, mask, temperature=0.1))(0 * left)).all()


@pytest.fixture(scope="module")
def consensus():
    """(module, its variables, arguments) with every target a candidate."""
    module = rctea.Consensus(CONFIG)
    views = ((draw(5, 6), draw(6, 6)), (draw(5, 6), draw(6, 6)))
    candidates = jnp.tile(jnp.arange(6), (5, 1))
    edges = (jnp.array([[0, 1], [1, 2], [0, 1], [4, 3]]), jnp.array([[0, 5], [2, 3], [3, 1]]))
    noise = draw(1, 5, CONFIG.consensus_width)
    arguments = (views, candidates, edges, (None, None), noise)
    return module, module.init(KEY, *arguments), arguments


def test_consensus_over_all_targets_equals_the_dense_form(consensus):
    module, variables, (views, candidates, edges, masks, noise) = consensus
    p = variables["params"]
    psi = rctea.Psi(CONFIG)
    scores = [left @ right.T for left, right in views]
    source = psi.apply({"params": p["psi"]}, noise[0], edges[0], None)
    expected = []
    for score in scores:
        target = psi.apply({"params": p["psi"]}, jax.nn.softmax(score, axis=1).T @ noise[0], edges[1], None)
        hidden = jax.nn.relu((source[:, None] - target) @ p["fc1"]["kernel"] + p["fc1"]["bias"])
        expected.append(score + (hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"])[..., 0])
    ours = module.apply(variables, views, candidates, edges, masks, noise)
    close(ours, jax.nn.softmax((expected[0] + expected[1]) / 2, axis=1), atol=1e-5)


def test_a_silent_consensus_leaves_the_scores(consensus):
    module, variables, arguments = consensus
    silent = {"params": variables["params"] | {"fc2": jax.tree.map(jnp.zeros_like, variables["params"]["fc2"])}}
    views = arguments[0]
    mean = sum(left @ right.T for left, right in views) / 2
    close(module.apply(silent, *arguments), jax.nn.softmax(mean, axis=1), atol=1e-6)


def test_numbering_targets_anew_permutes_the_consensus(consensus):
    module, variables, (views, candidates, edges, masks, noise) = consensus
    order = jnp.array([3, 1, 5, 0, 2, 4])
    renamed = tuple((left, right[order]) for left, right in views)
    changed = module.apply(variables, renamed, candidates, (edges[0], jnp.argsort(order)[edges[1]]), masks, noise)
    close(changed, module.apply(variables, views, candidates, edges, masks, noise)[:, order], atol=1e-5)


def test_the_truth_is_among_the_candidates():
    left, right = draw(4, 3), draw(9, 3)
    truth = jnp.array([0, -1, 5, 8])
    found = np.asarray(rctea.nearest(left, right, 3, truth))
    best = np.argsort(-np.asarray(left @ right.T), axis=1)[:, :3]
    for i in range(4):
        assert found[i, :2].tolist() == best[i, :2].tolist()
        assert truth[i] < 0 or truth[i] in found[i]


def test_sinkhorn_shares_both_sides_and_keeps_the_diagonal_first():
    plan = layers.sinkhorn_normalize(50 * (0.5 * jnp.eye(8) + 0.02 * draw(8, 8)), num_iterations=10, epsilon=1e-6)
    for axis in (0, 1):
        close(jnp.sum(plan, axis=axis), jnp.ones(8), atol=1e-3)
    chex.assert_trees_all_equal(jnp.argmax(plan, axis=1), jnp.arange(8))


def test_metrics_rank_the_right_entity_among_those_asked_for():
    left = jnp.eye(4)[None]
    right = jnp.array([[[1, 0, 0, 0], [0, 1, 2, 0], [0, 2, 1, 0], [1, 1, 1, 1]]], jnp.float32)
    batch = {"pair_mask": jnp.array([[True, True, True, False]])}
    found = {k: float(v[0]) for k, v in task.metrics({"left": left, "right": right}, batch).items()}
    assert found["hits1"] == pytest.approx(1 / 3)  # the second and the third are taken for each other
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert found["hits10"] == 1


@pytest.fixture(scope="module")
def training():
    """(data, config, eighty steps of the fused stage as a function, fresh parameters)."""
    config = PAPER.config("tiny", stage="fused")
    data = load_alignment("standin", data_dir=None, config=config)
    model, optimizer = PAPER.model(config), optax.adam(5e-3)
    batch = data.train.batch(jnp.zeros(1, jnp.int32))
    params = jax.jit(model.init)({"params": KEY, "dropout": KEY}, batch)["params"]

    def objective(params, key, batch):
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        return PAPER.compute_loss(outputs, batch)[0]

    @jax.jit
    def train(params, batch):
        def step(carry, key):
            updates, state = optimizer.update(jax.grad(objective)(carry[0], key, batch), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 80))[0][0]

    return data, config, train, params


def weights_of(params, batches):
    """(both views, weights) of all entities."""
    batch, one = jax.tree.map(lambda a: a[0], batches), params["one"]
    graph = {k: rctea.Counts(batch[f"{k}_index"], batch[f"{k}_value"]) for k in task.KINDS}
    views = rctea.Views(CONFIG).apply(
        {"params": one["views"]}, graph | {"edges": batch["edges"], "edge_mask": batch["edge_mask"]}
    )
    return views, rctea.RichnessWeight().apply({"params": one["weight"]}, views["distances"])


def test_learns_the_stand_in_and_the_fused_view_is_no_worse(training):
    data, _, train, params = training
    batches = data.test.batch(jnp.zeros(1, jnp.int32))
    batch = jax.tree.map(lambda a: a[0], batches)
    views, weight = weights_of(train(params, data.train.batch(jnp.zeros(1, jnp.int32))), batches)
    structural, temporal = views["structural"], views["temporal"]
    hits = {}
    for name, x in {
        "structural": structural,
        "temporal": temporal,
        "fused": jnp.concatenate([weight * structural, (1 - weight) * temporal], axis=-1),
    }.items():
        sides = {
            side: x[batch[part][batch["pairs"][:, i]]][None]
            for i, (side, part) in enumerate((("left", "sources"), ("right", "targets")))
        }
        hits[name] = float(task.metrics(sides, batches)["hits1"][0])
    baseline = float(task.metrics(task.same_degree(batches), batches)["hits1"][0])
    assert hits["fused"] > 0.8 > 0.3 > baseline
    assert hits["fused"] >= max(hits["structural"], hits["temporal"]) - 0.01


def test_the_weight_learns_to_trust_the_view_that_knows_something(training):
    """Of a third of the entities the structural view is that of nothing known, of another third the temporal one."""
    data, _, train, params = training
    batch = data.train.batch(jnp.zeros(1, jnp.int32))
    params = train(params, batch)
    views, _ = weights_of(params, batch)
    sources, targets = batch["sources"][0], batch["targets"][0]
    kind = np.full(401, -1)
    for side in (sources, targets):
        kind[np.asarray(side)] = np.arange(200) % 3
    p = params["one"]["views"]
    half = CONFIG.num_relations // 2
    nowhere = (p["relation_table"][-1] + p["relation_table"][half - 1]) / 2
    distances, parts = views["distances"], []
    for column, (name, reference, bare) in enumerate(
        (
            ("entity", p["entity_table"][-1], 0),
            ("relation", nowhere, 0),
            ("time", p["time_table"][0], 1),
            ("interval", p["interval_table"][0], 1),
        )
    ):
        poor = kind == bare
        parts.append(jnp.where(poor[:, None], jnp.tile(reference, CONFIG.depth + 1), views[name]))
        distances = distances.at[:, column].set(jnp.where(poor, 0.0, distances[:, column]))
    structural, temporal = (jnp.concatenate(pair, axis=-1) for pair in (parts[:2], parts[2:]))
    module, optimizer = rctea.RichnessWeight(), optax.adam(2e-2)

    def objective(params):
        weight = module.apply({"params": params}, distances)
        z = jnp.concatenate([weight * structural, (1 - weight) * temporal], axis=-1)
        return task.seed_loss(z[sources], z[targets], jnp.ones(200, bool), temperature=0.1)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return optax.apply_updates(params, updates), state

    params = params["one"]["weight"]
    state = optimizer.init(params)
    for _ in range(150):
        params, state = step(params, state)
    weight = np.asarray(module.apply({"params": params}, distances))[:, 0]
    means = [weight[kind == k].mean() for k in (0, 2, 1)]
    assert means[0] + 0.1 < means[1] < means[2] - 0.1
