"""XCTFormer's card: what the paper's mechanisms imply."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data import load_forecasting
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.series.xctformer import (
    CompressedAttention,
    Config,
    CrossRelationalAttention,
    normalize_observed,
    relation_scores,
    signed_weights,
)

KEY = jax.random.key(3)
PAPER = zoo.paper("xctformer")
SMALL = Config(lookback=16, variates=3, patch_length=8, stride=8, d_model=8, num_heads=2)  # 2 patches, 6 tokens
CONSTANTS = {"shift": SMALL.score_shift, "epsilon": SMALL.score_epsilon}


def noisy(model, *inputs):
    """Variables away from zeros and symmetries; nothing is compiled for them."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs), KEY)
    draw = lambda s: jnp.asarray(rng.normal(1.0 if s.ndim == 1 else 0.0, 0.4, s.shape), s.dtype)  # noqa: E731
    return jax.tree.map(draw, {name: shapes[name] for name in shapes if name != "intermediates"})


class Frozen:
    """A module called for evaluation."""

    def __init__(self, kind, config):
        self.module = kind(config)
        self.init = lambda key, x: self.module.init(key, x, train=False)
        self.apply = jax.jit(lambda variables, x: self.module.apply(variables, x, train=False))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.normal(KEY, (2, 6, 8))


def projections(params, x, names):
    return [np.asarray(x, np.float64) @ np.asarray(params[n]["kernel"]) + np.asarray(params[n]["bias"]) for n in names]


def test_weights_are_signed_and_sum_to_one_in_absolute_value():
    scores = jax.random.normal(KEY, (5, 7))
    weights = signed_weights(scores, **CONSTANTS)
    chex.assert_trees_all_close(jnp.sum(jnp.abs(weights), axis=-1), jnp.ones(5), atol=1e-5)
    assert float(weights.min()) < -0.01
    chex.assert_trees_all_close(signed_weights(300.0 * scores, **CONSTANTS), weights, atol=2e-3)
    exact = {"shift": 0.0, "epsilon": 0.0}
    chex.assert_trees_all_close(signed_weights(3.0 * scores, **exact), signed_weights(scores, **exact), rtol=1e-5)


@pytest.mark.parametrize("min_scope", ["batch", "sample", "row"])
def test_relational_attention_is_that_of_a_loop(tokens, min_scope):
    attention = Frozen(CrossRelationalAttention, dataclasses.replace(SMALL, min_scope=min_scope))
    variables = noisy(attention, tokens)
    params = variables["params"]
    query, key, value = projections(params, tokens, ("query", "key", "value"))
    raw = np.zeros((2, 2, 6, 6))
    for b, h, i, j in np.ndindex(raw.shape):
        raw[b, h, i, j] = query[b, i, 4 * h : 4 * h + 4] @ key[b, j, 4 * h : 4 * h + 4]
    mixed = np.zeros((2, 6, 8))
    for b, h, i in np.ndindex(2, 2, 6):
        least = {"batch": raw, "sample": raw[b], "row": raw[b, h, i]}[min_scope].min()
        row = (raw[b, h, i] - least) * np.asarray(params["relation_table"])[h, i] + 1e-4
        row /= np.abs(row).sum() + 1e-8
        mixed[b, i, 4 * h : 4 * h + 4] = sum(row[j] * value[b, j, 4 * h : 4 * h + 4] for j in range(6))
    expected = mixed @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    np.testing.assert_allclose(attention.apply(variables, tokens), expected, atol=2e-5)


@pytest.mark.parametrize(("min_scope", "depends"), [("batch", True), ("sample", False), ("row", False)])
def test_only_the_official_minimum_sees_the_other_windows(min_scope, depends):
    raw = jax.random.normal(KEY, (3, 2, 4, 4))
    relations = jax.random.normal(jax.random.key(1), (2, 4, 4))
    alone = relation_scores(raw[1:2], relations, min_scope)
    assert np.allclose(relation_scores(raw, relations, min_scope)[1:2], alone, atol=1e-6) != depends


def test_the_gradient_flows_through_the_minimum():
    raw, relations = jax.random.normal(KEY, (1, 1, 3, 3)), jnp.full((1, 3, 3), 2.0)
    gradient = jax.grad(lambda raw: jnp.sum(relation_scores(raw, relations, "sample")))(raw)
    place = np.unravel_index(np.argmin(raw), raw.shape)
    assert float(gradient[place]) == 2.0 - 9 * 2.0
    assert float(gradient.sum()) == 0.0


@pytest.mark.parametrize("layout", ["code", "transpose"])
def test_compressed_attention_is_the_dense_formula(tokens, layout):
    attention = Frozen(CompressedAttention, dataclasses.replace(SMALL, slots=3, value_layout=layout))
    variables = noisy(attention, tokens)
    params = variables["params"]
    query, key = (p.reshape(2, 6, 2, 4) for p in projections(params, tokens, ("query", "key")))
    # q (k^T R) without compression: the T x T scores, then T x k relations.
    dense = np.einsum("blhe,bshe->bhls", query, key)
    scores = np.einsum("bhls,shr->bhlr", dense, np.asarray(params["relation_table"])) + 1e-4
    weights = scores / (np.abs(scores).sum(-1, keepdims=True) + 1e-8)
    value = np.swapaxes(tokens, 1, 2) @ np.asarray(params["value"]["kernel"]) + np.asarray(params["value"]["bias"])
    rows = np.zeros((2, 3, 8))
    for b, r, d in np.ndindex(rows.shape):
        rows[b, r, d] = value[b].ravel()[r * 8 + d] if layout == "code" else value[b, d, r]
    mixed = np.einsum("bhlr,brhd->blhd", weights, rows.reshape(2, 3, 2, 4)).reshape(2, 6, 8)
    expected = mixed @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    np.testing.assert_allclose(attention.apply(variables, tokens), expected, atol=2e-5)


def test_compression_makes_nothing_of_all_tokens_by_all():
    def largest(slots):
        config = dataclasses.replace(SMALL, variates=40, slots=slots)
        attention = (CrossRelationalAttention if slots is None else CompressedAttention)(config)
        x = jnp.zeros((1, 80, 8))
        text = jax.make_jaxpr(lambda key: attention.init_with_output(key, x, train=False)[0])(KEY)
        return "80,80]" in str(text)

    assert largest(None)
    assert not largest(3)


@pytest.mark.parametrize(("lookback", "patch", "stride"), [(96, 16, 8), (100, 16, 8), (48, 8, 4), (16, 16, 8)])
def test_the_number_of_patches(lookback, patch, stride):
    model = zoo.create("xctformer", "tiny", lookback=lookback, patch_length=patch, stride=stride)
    assert model.config.patches == (lookback - patch) // stride + 2
    shapes = jax.eval_shape(model.init, KEY, PAPER.example(model.config, batch_size=1, key=KEY))
    assert shapes["params"]["position"].shape == (model.config.patches, 8)


def test_the_last_patch_is_the_series_and_a_stride_of_its_last_value():
    """All but the end of the last variate hidden from the head: what it reads of the last patch."""
    model = zoo.create("xctformer", "tiny", num_layers=0)
    x = jax.random.normal(KEY, (1, 48, 7))
    variables = noisy(model, {"x": x})
    before = jax.jit(model.apply)(variables, {"x": x})
    series = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
    patch = jnp.concatenate([series[0, 44:], jnp.repeat(series[0, -1:], 4, axis=0)])  # 4 steps and 4 copies
    params = variables["params"]
    embedded = (
        patch.T @ params["patch_embedding"]["kernel"] + params["patch_embedding"]["bias"] + params["position"][-1]
    )
    part = embedded @ params["head"]["kernel"][-8:]
    # Without the last patch's part the forecast is what the other patches say.
    variables["params"]["head"]["kernel"] = params["head"]["kernel"].at[-8:].set(0.0)
    rest = jax.jit(model.apply)(variables, {"x": x})
    scale = jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
    chex.assert_trees_all_close(before - rest, (part.T * scale[0])[None], atol=1e-4)


def test_the_ablation_hears_of_no_other_variate():
    x = jax.random.normal(KEY, (1, 48, 7))
    for scope, heard in (("all", True), ("variate", False)):
        model = zoo.create("xctformer", "tiny", attention_scope=scope, min_scope="row")
        variables = noisy(model, {"x": x})
        apply = jax.jit(model.apply)
        change = apply(variables, {"x": x.at[..., 2].multiply(jnp.linspace(-1, 1, 48))}) - apply(variables, {"x": x})
        assert bool(jnp.any(jnp.abs(change[..., [0, 1, 3, 4, 5, 6]]) > 1e-5)) == heard


def test_gaps_do_not_count_in_the_statistics_and_hidden_values_do_not_matter():
    y = 3.0 + 2.0 * jax.random.normal(KEY, (2, 48, 7))
    mask = jax.random.uniform(jax.random.key(1), y.shape) > 0.3
    mask = mask.at[0, :, 1].set(False)  # nothing seen at all
    normal, statistics = normalize_observed(y, mask, epsilon=1e-5)
    seen = np.asarray(y[1, :, 3])[np.asarray(mask[1, :, 3])]
    np.testing.assert_allclose(statistics.mean[1, 0, 3], seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics.scale[1, 0, 3], seen.std(), rtol=1e-4)
    assert not np.any(normal[~mask])
    model = zoo.create("xctformer", "tiny_imputation")
    variables = noisy(model, {"x": y, "mask": mask})
    apply = jax.jit(model.apply)
    filled = apply(variables, {"x": y, "mask": mask})
    chex.assert_tree_all_finite(filled)
    chex.assert_trees_all_close(apply(variables, {"x": jnp.where(mask, y, -9.0), "mask": mask}), filled, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task", "length"),
    [("tiny", "forecasting", 24), ("tiny_imputation", "imputation", 48), ("tiny_anomaly", "reconstruction", 48)],
)
def test_each_mode_serves_its_task(name, task, length):
    model = zoo.create("xctformer", name)
    paper = PAPER.serving(model.config)
    assert paper.task.name == task
    batch = paper.example(model.config, batch_size=2, key=KEY)
    outputs = jax.jit(model.apply)(noisy(model, batch), batch)
    assert outputs.shape == (2, length, 7)
    assert np.isfinite(paper.compute_loss(outputs, batch)[0])
    for baseline in paper.task.baselines.values():
        chex.assert_trees_all_equal_shapes(
            paper.task.metrics(outputs, batch), paper.task.metrics(baseline(batch), batch)
        )
    assert paper.task.picture(batch, outputs).axes


def test_the_data_must_have_the_variates_of_the_model():
    model = zoo.create("xctformer", "tiny")
    with pytest.raises(
        zoo.UserError, match=r"built for 7 variates of 48 steps, the data has 8 of 48: set --model.vari"
    ):
        jax.eval_shape(model.init, KEY, {"x": jnp.zeros((1, 48, 8))})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention_scope", "variate", "attention_scope 'variate' goes with slots None and min_scope 'row' alone"),
        ("lookback", 7, "a lookback of 7 steps holds no patch of 8"),
        ("num_heads", 3, "d_model 8 is not a multiple of num_heads 3"),
    ],
)
def test_what_makes_no_model(field, value, message):
    with pytest.raises(zoo.UserError, match=message):
        zoo.create("xctformer", "tiny", **{field: value})


def test_other_channels_tell_the_target():
    """The official generator: a copy that sees the target's own past alone is clearly worse."""
    errors = {}
    for scope in ("all", "variate"):
        recipe = recipe_for("xctformer")
        sizes = {"horizon": 16, "patch_length": 16, "stride": 8, "d_model": 16, "d_ff": 32}
        model = dataclasses.replace(recipe.model, attention_scope=scope, min_scope="row", **sizes)
        recipe = dataclasses.replace(recipe, model=model, data="cross_channel", steps=200, mesh="data=1", log_every=100)
        run = prepare(recipe)
        state = run.program.init()
        for epoch in range(2):
            order = epoch_order(0, epoch, len(run.splits.train))
            state, _ = run.program.run(state, run.splits.train, order, 0, 100)
        errors[scope] = float(run.program.evaluate(state.variables, run.splits.test)["mse"])
    assert errors["all"] < 0.85 * errors["variate"], errors


def test_in_the_generated_series_the_target_follows_the_waves():
    data = load_forecasting("cross_channel", data_dir=None, lookback=48, horizon=8, seed=2021)
    assert data.columns[-1] == "target"
    values = data.unscale(np.asarray(data.train.values))
    assert values.shape == (10_000, 7)

    def patch(source, number):
        return values[8 * number : 8 * number + 16, source]

    def blend(k, w):
        first = w * patch(0, k - 1) + (1 - w) * patch(1, k - 2)
        return 0.5 * (first + w * patch(2, k - 2) + (1 - w) * patch(3, k - 3))

    # The weight is at its highest, 1, at patch 30: 8 steps of it overlap with the patch before.
    k = 30
    expected = 0.5 * (blend(k, 1.0)[:8] + blend(k - 1, 0.9)[8:])
    np.testing.assert_allclose(values[8 * k : 8 * k + 8, 6], expected, atol=0.09)
    batch = data.test.batch(jnp.array([0, 5]))
    chex.assert_shape((batch["x"], batch["y"]), ((2, 48, 7), (2, 8, 1)))
    with pytest.raises(zoo.UserError, match="cross_channel is generated and takes no --data-dir"):
        load_forecasting("cross_channel", data_dir="somewhere", lookback=48, horizon=8)
