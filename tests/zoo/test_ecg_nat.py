"""ECG-NAT's card: the neighbourhood rule, what pre-training may see, the contrastive loss, and that it learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layers
import zoo
from tests.weights import drawn
from trainers.data.signal_standins import ecg_records
from trainers.flops import matmul_flops
from zoo.registry import variable_shapes
from zoo.signals.ecg_nat import (
    Decoder,
    Encoder,
    LayerConfig,
    NATLayer,
    NeighborhoodAttention,
    augmented,
    hidden_units,
    loss,
    supervised_contrastive_loss,
)
from zoo.tasks import classification

KEY = jax.random.key(5)
PAPER = zoo.paper("ecg_nat")
SMALL = {"depths": (1, 1), "num_heads": (1, 2), "dilations": (1, 1)}  # units of 8 samples


def window(i, length, size, dilation):
    """The reference kernels' rule, query by query."""
    group, members = i % dilation, -(-(length - i % dilation) // dilation)
    place, left, right = i // dilation, size // 2, size // 2 + size % 2 - 1
    start = max(place - left, 0) + (members - right - place - 1 if place + right >= members else 0)
    return [group + dilation * (start + j) for j in range(size)]


@pytest.mark.parametrize(("length", "size", "dilation"), [(7, 3, 1), (7, 3, 2), (12, 5, 2), (33, 7, 1), (33, 7, 2)])
def test_attention_is_dense_attention_under_the_rule(length, size, dilation):  # Acceptance 1 and 3
    mask = np.zeros((length, length), bool)
    for i in range(length):
        mask[i, window(i, length, size, dilation)] = True
    assert (mask.sum(1) == size).all()
    np.testing.assert_array_equal(layers.neighborhood_mask(length, size, dilation=dilation), mask)
    q, k, v, c = jax.random.normal(KEY, (4, 2, length, 2, 3))
    table = jax.random.normal(KEY, (2, 2 * size - 1))
    apart = np.clip((np.arange(length) - np.arange(length)[:, None]) // dilation, 1 - size, size - 1) + size - 1

    def ours(q, k, v, table):
        options = {"kernel_size": size, "dilation": dilation, "bias": table}
        return jnp.sum(c * layers.neighborhood_attention_1d(q, k, v, **options))

    def dense(q, k, v, table):
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) * 3**-0.5 + table[:, apart]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.sum(c * jnp.einsum("bhij,bjhd->bihd", weights, v))

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(q, k, v, table) for f in (ours, dense))
    chex.assert_trees_all_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_window_as_long_as_the_sequence_is_plain_attention():  # Acceptance 2
    config = LayerConfig(dim=8, num_heads=2, kernel_size=9, relative_bias=False)
    x = jax.random.normal(KEY, (2, 9, 8))
    module = NeighborhoodAttention(config)
    variables = jax.jit(module.init)(KEY, x)
    p = variables["params"]
    parts = [(x @ p[n]["kernel"] + p[n]["bias"]).reshape(2, 9, 2, 4) for n in ("query", "key", "value")]
    mixed = layers.dot_product_attention(*parts).reshape(x.shape)
    expected = mixed @ p["out"]["kernel"] + p["out"]["bias"]
    chex.assert_trees_all_close(module.apply(variables, x), expected, atol=1e-6)


def test_a_layer_looks_at_its_window_and_nowhere_else():  # Acceptance 3
    layer = NATLayer(LayerConfig(dim=8, num_heads=2, kernel_size=5))
    x = jax.random.normal(KEY, (1, 12, 8))
    variables = jax.jit(layer.init)(KEY, x)
    variables = jax.tree.map(lambda v: 8.0 * v, variables)  # weights of 0.02 hide everything
    reach = jax.jit(jax.jacobian(lambda x: jnp.sum(layer.apply(variables, x[None])[0], axis=-1)))(x[0])
    seen = np.abs(reach).sum(-1) > 0
    for i in range(12):
        assert set(np.flatnonzero(seen[i])) == set(window(i, 12, 5, 1))


def test_short_sequences_are_padded_only_where_the_official_module_does():
    x = jax.random.normal(KEY, (1, 4, 8))
    layer = NATLayer(LayerConfig(dim=8, num_heads=2, kernel_size=5))
    with pytest.raises(ValueError, match="kernel_size 5 times dilation 1 is not at most the length 4"):
        layer.init(KEY, x)
    padded = NATLayer(LayerConfig(dim=8, num_heads=2, kernel_size=5, pad_short=True))
    assert padded.apply(jax.jit(padded.init)(KEY, x), x).shape == x.shape


@pytest.fixture(scope="module")
def pretraining():
    model = zoo.create("ecg_nat", "tiny_pretrain", max_shift=0, channels=2, length=64, **SMALL)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = drawn(PAPER, model)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(KEY, len(leaves))
    variables = tree.unflatten([v + 0.1 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])

    @jax.jit
    def run(variables, x):
        return model.apply(variables, batch | {"x": x}, train=True, rngs={"dropout": KEY})

    return model, batch, variables, run


def test_hidden_samples_do_not_leak_and_shown_ones_cost_nothing(pretraining):  # Acceptance 4
    model, batch, variables, _ = pretraining

    @jax.jit
    def filled(x, hidden):
        encoder, decoder = Encoder(model.config), Decoder(model.config)
        tokens = encoder.apply({"params": variables["params"]["encoder"]}, x, hidden, train=False)
        return decoder.apply({"params": variables["params"]["decoder"]}, tokens, train=False)

    hidden = hidden_units(KEY, 2, 8, 0.75)
    samples = jnp.repeat(hidden, 8, axis=1)[..., None]
    predictions = filled(batch["x"], hidden)
    other = jnp.where(samples, 50.0 - 3.0 * batch["x"], batch["x"])
    chex.assert_trees_all_equal(filled(other, hidden), predictions)  # bit for bit
    shown = jnp.where(samples, batch["x"], batch["x"] + 0.5)
    assert not np.allclose(filled(shown, hidden), predictions, atol=1e-4)


def test_only_hidden_units_are_scored(pretraining):  # Acceptance 4
    _, batch, variables, run = pretraining
    outputs = run(variables, batch["x"])
    zeros = jax.tree.map(jnp.zeros_like, variables["params"]["decoder"]["out"])
    blank = {"params": variables["params"] | {"decoder": variables["params"]["decoder"] | {"out": zeros}}}
    found = np.asarray(run(blank, batch["x"])["hidden_error"])
    # With every prediction 0, the error is the mean square of 6 of the 8 units.
    energy = np.square(batch["x"]).reshape(2, 8, -1).mean(-1)
    for row in range(2):
        choices = [energy[row].sum() - energy[row, i] - energy[row, j] for i in range(8) for j in range(i)]
        assert np.abs(np.asarray(choices) / 6 - found[row]).min() < 1e-5
    assert outputs["hidden_error"].shape == (2,)
    value, parts = loss(outputs, batch)
    assert float(value) == pytest.approx(float(parts["hidden_error"] + parts["probe"]), rel=1e-6)


def test_the_probe_teaches_the_encoder_nothing(pretraining):
    model, batch, variables, _ = pretraining

    def probe(params):
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": KEY})
        return classification.loss(outputs, batch)[0]

    gradients = jax.jit(jax.grad(probe))(variables["params"])
    assert all(not np.any(g) for g in jax.tree.leaves(gradients["encoder"]))
    assert np.any(gradients["probe"]["kernel"])
    # Nor what comes after: its labels are more than the few of fine-tuning.
    shapes = variable_shapes(PAPER, zoo.create("ecg_nat", "tiny"))["params"]
    assert shapes.keys() & variables["params"].keys() == {"encoder"}


def test_the_hidden_share_is_exact_and_evenly_drawn():
    drawn = np.asarray(hidden_units(KEY, 4000, 8, 0.75))
    assert (drawn.sum(1) == 6).all()
    np.testing.assert_allclose(drawn.mean(0), 0.75, atol=0.03)


def test_the_contrastive_loss_equals_its_double_loop():  # Acceptance 5
    z = np.asarray(jax.random.normal(KEY, (7, 4)))
    label = np.array([0, 1, 0, 2, 1, 0, 3])  # 2 and 3 are alone
    terms = []
    for i in range(7):
        positives = [j for j in range(7) if j != i and label[j] == label[i]]
        if positives:
            total = sum(np.exp(z[i] @ z[a]) for a in range(7) if a != i)
            terms.append(-np.mean([np.log(np.exp(z[i] @ z[j]) / total) for j in positives]))
    found = supervised_contrastive_loss(jnp.asarray(z), jnp.asarray(label))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)
    order = np.random.default_rng(0).permutation(7)
    shuffled = supervised_contrastive_loss(jnp.asarray(z[order]), jnp.asarray(label[order]))
    assert float(shuffled) == pytest.approx(float(found), rel=1e-5)
    several = jax.nn.one_hot(label, 4, dtype=jnp.int32)
    assert float(supervised_contrastive_loss(jnp.asarray(z), several)) == pytest.approx(float(found), rel=1e-5)


def test_a_batch_without_pairs_has_no_contrast():  # Acceptance 5
    value, gradient = jax.value_and_grad(supervised_contrastive_loss)(jnp.eye(3), jnp.arange(3))
    assert float(value) == 0
    chex.assert_trees_all_equal(gradient, jnp.zeros((3, 3)))


def test_sizes_are_those_of_the_card():
    def encoder(name, **changes):
        shapes = variable_shapes(PAPER, zoo.create("ecg_nat", name, **changes))
        return sum(s.size for s in jax.tree.leaves(shapes["params"]["encoder"]))

    assert encoder("mini") == pytest.approx(18.40e6, rel=1e-3)
    assert encoder("small") == pytest.approx(2.55e6, rel=2e-3)
    assert encoder("tiny") == pytest.approx(0.21e6, rel=0.03)


def test_attention_costs_in_proportion_to_the_length():  # Acceptance 7
    def cost(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        attend = lambda q, k, v: layers.neighborhood_attention_1d(q, k, v, kernel_size=7)  # noqa: E731
        return matmul_flops(attend, x, x, x).count

    for length in (256, 1024):
        assert 1.9 < cost(2 * length) / cost(length) < 2.2


def test_long_records_are_the_mean_of_their_crops():
    model = zoo.create("ecg_nat", "tiny", channels=2, length=64, **SMALL)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = jax.jit(model.init)(KEY, batch)
    apply = jax.jit(model.apply)
    long = jnp.concatenate([batch["x"], 2 * batch["x"] + 1, batch["x"][:, :30]], axis=1)
    parts = [apply(variables, batch | {"x": x})["logits"] for x in (batch["x"], 2 * batch["x"] + 1)]
    chex.assert_trees_all_close(apply(variables, batch | {"x": long})["logits"], sum(parts) / 2, atol=1e-6)
    lengths = jnp.linalg.norm(apply(variables, batch)["embedding"], axis=-1)
    np.testing.assert_allclose(lengths, 0.1**-0.5, rtol=1e-4)


def test_augmentations_move_scale_and_drop_leads():
    config = PAPER.config("tiny", max_shift=9, amplitude=0.2, lead_dropout=0.3)
    x = jax.random.normal(KEY, (50, 64, 12))
    y = np.asarray(augmented(x, config, KEY))
    gone = (y == 0).all(axis=1)
    assert gone.mean() == pytest.approx(0.3, abs=0.05)
    gain = np.where(gone, np.nan, np.abs(y).sum(1) / np.abs(x).sum(1))
    assert 0.79 < np.nanmin(gain) < 0.85 < 1.15 < np.nanmax(gain) < 1.21
    np.testing.assert_allclose(np.nanmax(gain, axis=1), np.nanmin(gain, axis=1), rtol=1e-4)
    moved = [min(np.abs(np.roll(x[i], s, 0) * np.nanmean(gain[i]) - y[i])[:, ~gone[i]].max() for s in range(-9, 10))
             for i in range(5)]  # fmt: skip
    assert max(moved) < 1e-4


def test_learns_rhythm_and_shape():  # Acceptance 6 in small: the recipe has the numbers of a whole run
    x, label = ecg_records(np.random.default_rng(0), 400, length=256, leads=2)
    test_x, test_label = map(jnp.asarray, ecg_records(np.random.default_rng(1), 200, length=256, leads=2))
    x, label = jnp.asarray(x), jnp.asarray(label)
    model = zoo.create("ecg_nat", "tiny", channels=2, **SMALL)
    params = jax.jit(model.init)(KEY, {"x": x[:2]})["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def trained(params):
        def objective(params, rows):
            return loss(model.apply({"params": params}, {"x": x[rows]}, train=True), {"label": label[rows]})[0]

        def step(i, carry):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(KEY, i), (16,), 0, len(x))
            updates, state = optimizer.update(jax.grad(objective)(params, rows), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 100, step, (params, optimizer.init(params)))[0]

    logits = jax.jit(model.apply)({"params": trained(params)}, {"x": test_x})["logits"]
    assert float(jnp.mean(jnp.argmax(logits, -1) == test_label)) > 0.5  # of five classes
