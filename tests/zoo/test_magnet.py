"""MAGNET's card: what attention over present blocks, message passing and the graph's loss imply."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.weights import drawn
from trainers.data.cohorts import load_cohort
from zoo.graphs import magnet
from zoo.tasks import patient_classification as task

KEY = jax.random.key(3)
PAPER = zoo.paper("magnet")
close = chex.assert_trees_all_close


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("magnet", "tiny")
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    leaves, tree = jax.tree.flatten(drawn(PAPER, model)["params"])
    keys = jax.random.split(KEY, len(leaves))
    params = tree.unflatten([v + 0.1 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])
    return model, batch, {"params": params}, jax.jit(model.apply)


def test_weights_sum_to_one_over_the_blocks_there_are(setting):
    _, batch, variables, apply = setting
    weights = apply(variables, batch)["weights"]
    close(jnp.sum(weights, axis=-1), jnp.ones(weights.shape[:-1]), atol=1e-6)
    absent = jnp.broadcast_to(~batch["block_mask"][:, :, None], weights.shape)
    assert bool(absent.any())
    assert not np.any(np.asarray(weights)[np.asarray(absent)])


def test_what_stands_in_a_missing_block_has_no_effect(setting):
    model, batch, variables, apply = setting
    missing = ~jnp.repeat(batch["block_mask"], np.array(model.config.block_widths), axis=-1)
    noise = jax.random.normal(KEY, batch["x"].shape)
    close(apply(variables, batch | {"x": jnp.where(missing, noise, batch["x"])}), apply(variables, batch), atol=1e-6)


def test_blocks_may_come_in_any_order_with_their_encoders(setting):
    model, batch, variables, apply = setting
    widths = model.config.block_widths
    order = (2, 0, 1)
    blocks = jnp.split(batch["x"], np.cumsum(widths)[:-1], axis=-1)
    permuted = zoo.create("magnet", "tiny", block_widths=tuple(widths[m] for m in order))
    params = variables["params"] | {f"encoder_{i}": variables["params"][f"encoder_{m}"] for i, m in enumerate(order)}
    changed = {
        "x": jnp.concatenate([blocks[m] for m in order], axis=-1),
        "block_mask": batch["block_mask"][..., jnp.array(order)],
    }
    outputs, expected = permuted.apply({"params": params}, batch | changed), apply(variables, batch)
    close(outputs["logits"], expected["logits"], atol=1e-5)
    close(outputs["weights"], expected["weights"][..., jnp.array(order)], atol=1e-6)


def test_a_single_block_passes_as_it_is(setting):
    model, batch, variables, apply = setting
    only = jnp.zeros_like(batch["block_mask"]).at[..., 1].set(True)
    params, (first, second, _) = variables["params"], model.config.block_widths
    block = batch["x"][..., first : first + second]
    encoded = magnet.Encoder(model.config).apply({"params": params["encoder_1"]}, block, train=False)
    attention = params["attention"]
    expected = encoded @ attention["projection"]["kernel"] @ attention["out"]["kernel"]
    close(apply(variables, batch | {"block_mask": only})["fused"], expected, atol=1e-5)


def test_messages_equal_a_loop_over_edges(setting):
    model, batch, variables, _ = setting
    x = jax.random.normal(KEY, (2, 12, model.config.d_model))
    graph = batch["graph"]
    assert bool(jnp.any(jnp.sum(graph, axis=2) == 0))  # somebody is alone
    ours = magnet.EdgeSage(model.config).apply({"params": variables["params"]["layers_0"]}, x, graph)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["layers_0"])
    for b in range(2):
        rows = np.asarray(x[b], np.float64)
        sent = np.maximum(rows @ p["source"]["kernel"] + p["source"]["bias"], 0)
        for i in range(12):
            edges = [(j, float(graph[b, i, j])) for j in range(12) if graph[b, i, j] > 0]
            messages = [
                np.maximum(sent[j] @ p["message"]["kernel"] + a * p["edge_kernel"] + p["message"]["bias"], 0)
                for j, a in edges
            ]
            mean = np.mean(messages, axis=0) if edges else np.zeros(model.config.d_model)
            y = mean @ p["neighbours"]["kernel"] + p["neighbours"]["bias"] + rows[i] @ p["self"]["kernel"]
            np.testing.assert_allclose(ours[b, i], y, atol=1e-5)


def test_the_graph_keeps_apart_what_is_tested():
    config = magnet.Config(block_widths=(5, 4))
    x = jax.random.uniform(KEY, (20, 9))
    groups = jnp.arange(20) % 2
    graph = magnet.patient_graph(x, jnp.ones((20, 2), bool), groups, config)
    assert not np.any(np.asarray(graph)[np.asarray(groups[:, None] != groups)])
    chex.assert_trees_all_equal(graph, graph.T)
    assert np.all(np.asarray(graph > 0).any(1))


def test_divergence_is_zero_only_for_proportional_embeddings_and_falls():
    at = jnp.array([[0.0], [1.0], [3.0]])
    near = 1 / (1 + jnp.square(at - at.T)) * (1 - jnp.eye(3))
    near = near.at[0, 2].set(0).at[2, 0].set(0)
    divergence = jax.jit(lambda f, graph: magnet.graph_divergence(f[None], graph[None], epsilon=1e-12)[0])
    assert float(divergence(at, 0.3 * near)) == pytest.approx(0, abs=1e-6)
    other = jnp.where(near > 0, 0.5, 0).at[0, 1].set(0.1).at[1, 0].set(0.1)
    before = divergence(at, other)
    assert before > 0.01
    f = at
    for _ in range(20):
        f = f - 0.2 * jax.grad(divergence)(f, other)
    assert divergence(f, other) < before / 2


def test_metrics_equal_counts_by_hand():
    logits = jnp.log(jnp.array([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6], [0.1, 0.9]]]))
    batch = {"label": jnp.array([[0, 1, 1, 0, 0]]), "scored_mask": jnp.array([[True] * 4 + [False]])}
    found = jax.tree.map(lambda a: float(a[0]), task.metrics(logits, batch))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(0.5)
    assert found["mcc"] == pytest.approx(0.0, abs=1e-6)
    assert found["auroc"] == pytest.approx(0.75)  # 0.8 beats both, 0.4 beats one
    assert found["auprc"] == pytest.approx((1 + 2 / 3) / 2)


def test_learns_the_stand_in_and_trusts_the_clean_block():
    """A short version of the recipe: F1 of the unseen, and where the attention of complete patients lies."""
    import optax

    config = PAPER.config("tiny")
    data = load_cohort("standin", data_dir=None, config=config)
    model, optimizer = PAPER.model(config), optax.adamw(1e-2, weight_decay=1e-3)
    batches = [split.batch(jnp.zeros(1, jnp.int32)) for split in (data.train, data.test)]
    params = jax.jit(model.init)(KEY, batches[0])["params"]

    def objective(params, key, batch):
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        return PAPER.compute_loss(outputs, batch)[0]

    @jax.jit
    def train(params, batch):
        def step(carry, key):
            updates, state = optimizer.update(jax.grad(objective)(carry[0], key, batch), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 80))[0][0]

    outputs = jax.jit(model.apply)({"params": train(params, batches[0])}, batches[1])
    scores = task.metrics(outputs, batches[1])
    baseline = task.metrics(task.majority(batches[1]), batches[1])
    assert scores["macro_f1"] > 0.85 > 0.5 > baseline["macro_f1"]
    complete = np.asarray(batches[1]["block_mask"].all(-1))
    mass = np.asarray(outputs["weights"]).mean(2)[complete].mean(0)
    assert mass[0] > mass[1] > mass[2]
