"""GelGT's card: what the Gaussian bias, the filter and the symmetries of its tokens imply."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.weights import drawn
from zoo.graphs import gelgt

KEY = jax.random.key(5)
PAPER = zoo.paper("gelgt")
TABLES = (gelgt.Columns("user", 9, numerical=2), gelgt.Columns("event", 40, numerical=1, timestamp=1))
SIZES = {"tables": TABLES, "num_tokens": 10, "num_kept": 7, "d_model": 16, "table_width": 8, "gin_layers": 2}
close = chex.assert_trees_all_close


def spread(params, scale):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return tree.unflatten([v + scale * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("gelgt", "tiny", **SIZES)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = drawn(PAPER, model)
    variables |= {"params": spread(variables["params"], 0.1)}
    return model, batch, variables, jax.jit(lambda v, b: model.apply(v, b, mutable=["intermediates"]))


@pytest.fixture(scope="module")
def local():
    config = PAPER.config("tiny", **SIZES)
    model = gelgt.LocalPart(config)
    batch = gelgt.local_example(config, batch_size=2, key=KEY)
    batch |= {"lag": 20 * jax.random.uniform(KEY, batch["lag"].shape)}
    variables = {k: v for k, v in model.init(KEY, batch).items() if k != "intermediates"}
    variables |= {"params": spread(variables["params"], 0.2)}
    return batch, variables, jax.jit(lambda v, b: model.apply(v, b, mutable=["intermediates"]))


def bias_of(captured):
    return captured["intermediates"]["local"]["bias"][0]


def test_the_bias_equals_four_loops_and_is_symmetric(local):
    batch, variables, apply = local
    bias = bias_of(apply(variables, batch)[1])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["local"])
    lag = np.asarray(batch["lag"], np.float64)
    expected = np.zeros(bias.shape)
    for b, h, i, j in np.ndindex(bias.shape):
        distance = abs(lag[b, i] - lag[b, j])
        gaussians = np.exp(-((distance - p["centers"]) ** 2) / (np.abs(p["widths"]) + 1e-5) ** 2)
        expected[b, h, i, j] = gaussians @ p["to_heads"]["kernel"][:, h] + p["to_heads"]["bias"][h]
    np.testing.assert_allclose(bias, expected, atol=2e-6)
    close(bias, jnp.swapaxes(bias, 2, 3), atol=1e-6)


def test_only_differences_of_lags_count_in_attention(local):
    batch, variables, apply = local
    moved = apply(variables, batch | {"lag": batch["lag"] + 3.0})[0]
    close(moved, apply(variables, batch)[0], atol=1e-4)
    stretched = apply(variables, batch | {"lag": 2 * batch["lag"]})[0]
    assert not np.allclose(stretched[1], moved[1], atol=1e-3)


def test_without_kernel_weights_attention_is_plain(local):
    batch, variables, _ = local
    outputs = []
    for bias, lag_bias in ((0.0, True), (1.7, True), (0.0, False)):
        params = jax.tree.map(lambda a: a, variables["params"])
        heads = params["local"]["to_heads"]
        params["local"]["to_heads"] = {"kernel": 0 * heads["kernel"], "bias": bias + 0 * heads["bias"]}
        model = gelgt.LocalPart(PAPER.config("tiny", **SIZES, lag_bias=lag_bias))
        outputs.append(model.apply(variables | {"params": params}, batch)[1])
    close(outputs[1], outputs[0], atol=1e-5)
    close(outputs[2], outputs[0], atol=1e-5)


@pytest.mark.parametrize("width", [1e6, 0.05])
def test_kernels_are_constant_when_wide_and_choose_a_lag_when_narrow(local, width):
    batch, variables, apply = local
    lag = jnp.tile(jnp.array([0.0, 7.5, 3.0, 1.0, 10.5, 12.0, 20.0]), (2, 1))
    params = jax.tree.map(lambda a: a, variables["params"])
    count = params["local"]["centers"].shape[0]
    params["local"] |= {"centers": jnp.full(count, 7.5), "widths": jnp.full(count, width)}
    params["local"]["to_heads"] = {"kernel": jnp.full((count, count), 30.0 / count), "bias": jnp.zeros(count)}
    bias = np.asarray(bias_of(apply(variables | {"params": params}, batch | {"lag": lag})[1]))
    if width > 1:
        assert np.ptp(bias) < 1e-3
    else:
        matches = np.abs(np.abs(lag[0, :, None] - lag[0]) - 7.5) < 0.01
        assert matches.sum() == 4  # 0 and 7.5, 3 and 10.5
        assert bias[0, 0][matches].min() > 29
        assert bias[0, 0][~matches].max() < 1e-3


def test_the_filter_keeps_seed_neighbours_and_the_most_similar(setting):
    _, batch, variables, apply = setting
    hop = jnp.array([[0, 2, 1, 2, 2, 1, 2, 2, 1, 3], [0, 1, 2, 2, 2, 2, 2, 2, 2, 2]])
    x = jax.random.normal(KEY, (2, 10, 4))
    present = jnp.ones((2, 10), bool).at[1, 9].set(False)
    kept = np.asarray(gelgt.keep_similar(x, hop, present, 7))
    for b in range(2):
        near = [j for j in range(10) if hop[b, j] <= 1]
        far = sorted(
            (j for j in range(10) if hop[b, j] == 2 and present[b, j]), key=lambda j: -float(x[b, j] @ x[b, 0])
        )
        assert kept[b].tolist() == sorted(near + far[: 7 - len(near)])
    _, captured = apply(variables, batch)
    kept, edges, linked = (np.asarray(a) for a in captured["intermediates"]["kept"][0])
    for b in range(2):
        place = {old: new for new, old in enumerate(kept[b].tolist())}
        assert place[0] == 0
        whole = [
            (place[int(i)], place[int(j)])
            for (i, j), there in zip(batch["edges"][b], batch["edge_mask"][b], strict=True)
            if there and int(i) in place and int(j) in place
        ]
        assert [tuple(pair) for pair in edges[b][linked[b]].tolist()] == whole
    assert 0 < linked.sum() < np.asarray(batch["edge_mask"]).sum()


def test_the_order_of_tokens_does_not_matter(setting):
    _, batch, variables, apply = setting
    order = jnp.array([0, 4, 2, 9, 1, 7, 3, 5, 8, 6])
    names = ("table", "row", "hop", "lag", "token_mask")
    changed = batch | {name: batch[name][:, order] for name in names}
    changed["edges"] = jnp.argsort(order)[batch["edges"]]
    close(apply(variables, changed)[0], apply(variables, batch)[0], atol=1e-5)


def test_missing_cells_have_values_of_their_own():
    columns = gelgt.Columns("t", 3, numerical=1, categorical=(4,), timestamp=1)
    encoder = gelgt.TableEncoder(PAPER.config("tiny", **SIZES), columns)
    cells = {
        "numerical": jnp.array([[jnp.nan], [0.0], [jnp.inf]]),
        "categorical": jnp.array([[-1], [0], [3]]),
        "timestamp": jnp.array([[[-1] * 7], [[2020, 0, 0, 2, 0, 0, 0]], [[2021, 11, 30, 4, 23, 59, 59]]]),
    }
    variables = encoder.init(KEY, cells, train=False)
    variables["constants"]["median_table"] = cells["timestamp"][1]
    same = cells | {"categorical": jnp.array([[0], [0], [3]])}
    said = encoder.apply(variables, same, train=False)
    chex.assert_tree_all_finite(said)
    close(said[0], said[1], atol=1e-6)  # NaN is read as 0, no date as the middle one
    assert not np.allclose(encoder.apply(variables, cells, train=False)[0], said[0], atol=1e-6)


def test_amounts_are_brought_within_limits_and_chances_are_not():
    from zoo.tasks import row_prediction as task

    known = {"limits": jnp.array([[1.0, 4.0], [1.0, 4.0]]), "typical": jnp.array([0.25, 0.25])}
    amounts = known | {"label": jnp.array([2.0, 5.0])}
    found = task.metrics(jnp.array([[-3.0], [9.0]]), amounts)
    close(found["mae"], jnp.array([1.0, 1.0]))
    assert float(task.loss(jnp.array([[-3.0], [9.0]]), amounts)[0]) == 4.5
    chances = known | {"label": jnp.array([0, 1])}
    found = task.metrics(task.typical(chances), chances)
    close(found["mae"], jnp.array([0.25, 0.75]), atol=1e-6)
    close(found["accuracy"], jnp.array([1.0, 0.0]))
    close(found["cross_entropy"], -jnp.log(jnp.array([0.75, 0.25])), atol=1e-6)
