"""The card of representative attention: an oracle of loops, symmetries, limits, cost, and its hosts."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import zoo
from zoo.backbones import pvt_v2, swin, vit
from zoo.backbones.encoder import LayerConfig
from zoo.registry import variable_shapes
from zoo.vision.rpattention import Config, RepresentativeAttention, picture
from zoo.weights.convert import forwards
from zoo.weights.table import conv, fused_linear, layer_norm, linear, parameter, squeezed

KEY = jax.random.key(4)
PAPER = zoo.paper("rpattention")
GRID, HEADS, DIM = (4, 5), 2, 6
TINY = {"image_size": 32, "num_classes": 5, "layer_norm_epsilon": 1e-6}
HOSTS = {
    "deit": Config(patch=8, widths=(12,), depths=(2,), num_heads=(3,), mlp_ratios=(2.0,), representatives=(4,), **TINY),
    "pvt": Config(
        host="pvt", patch=4, widths=(8, 12), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2.0, 2.0),
        representatives=(3, 4), **TINY,
    ),
    "pvt_v2": Config(
        host="pvt_v2", widths=(8, 12), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2.0, 2.0),
        representatives=(3, 4), class_token=False, **TINY,
    ),
    "swin": Config(
        host="swin", patch=4, widths=(8, 16), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2.0, 2.0),
        representatives=(3, 0), window=2, class_token=False, **TINY,
    ),
}  # fmt: skip


def module(representatives=5, grid=GRID, **options):
    return RepresentativeAttention(Config(representatives=(representatives,), **options), 0, grid)


def tokens(prefix=0, heads=HEADS, dim=DIM, length=GRID[0] * GRID[1], seed=0):
    return jax.random.normal(jax.random.key(seed), (3, 2, prefix + length, heads, dim))


def drawn(shapes, seed=0, scale=0.5):
    """Random values of these shapes: zeros of the initialisation would hide what is not there."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def attended(qkv, weights=None, **options):
    m = module(**options)
    variables = weights or drawn(jax.eval_shape(m.init, KEY, *qkv))
    return (*jax.jit(m.apply)(variables, *qkv), variables["params"])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "options", [{}, {"routing_scale": False, "normalize_gather": False, "interact": "plain"}], ids=["card", "sums"]
)
def test_it_is_what_loops_over_heads_and_tokens_compute(options):  # Acceptance 1
    prefix, count = 1, 5
    qkv = tokens(prefix)
    found, _, params = attended(qkv, **options)
    p = {path: np.asarray(v, np.float64) for path, v in flatten_dict(params, sep="/").items()}
    q, k, v = np.asarray(qkv, np.float64)
    batch, length, _, _ = q.shape
    scale = DIM**-0.5
    expected = np.zeros_like(q)
    for b in range(batch):
        reps, gathered = np.zeros((HEADS, count, DIM)), np.zeros((count, HEADS, DIM))
        for h in range(HEADS):
            share = np.zeros((length, count))
            for n in range(length):
                logit = k[b, n, h] @ p["route/kernel"] + p["route/bias"]
                share[n] = softmax(logit * (scale if "routing_scale" not in options else 1))
            mass = share.sum(0) + 1e-6 if "normalize_gather" not in options else np.ones(count)
            for m in range(count):
                for n in range(length):
                    reps[h, m] += share[n, m] / mass[m] * k[b, n, h]
                    gathered[m, h] += share[n, m] / mass[m] * v[b, n, h]
        inner = [gathered] * 3
        if "interact" not in options:
            flat = gathered.reshape(count, -1)
            names = [f"interact_{name}" for name in ("query", "key", "value")]
            inner = [(flat @ p[f"{n}/kernel"] + p[f"{n}/bias"]).reshape(gathered.shape) for n in names]
        for h in range(HEADS):
            refined = softmax(scale * inner[0][:, h] @ inner[1][:, h].T) @ inner[2][:, h]
            for n in range(length):
                expected[b, n, h] = softmax(scale * q[b, n, h] @ reps[h].T) @ refined
        kernel, places = p["depthwise/kernel"], v[b, prefix:].reshape(*GRID, HEADS * DIM)
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                total = p["depthwise/bias"].copy()
                for i in range(3):
                    for j in range(3):
                        r, c = row + i - 1, column + j - 1
                        if 0 <= r < GRID[0] and 0 <= c < GRID[1]:
                            total += kernel[i, j, 0] * places[r, c]
                expected[b, prefix + row * GRID[1] + column] += total.reshape(HEADS, DIM)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branches", ["global", "both"])
def test_only_the_convolution_knows_where_tokens_are(branches):  # Acceptance 2
    qkv, order = tokens(), jax.random.permutation(KEY, GRID[0] * GRID[1])
    plain, _, params = attended(qkv, branches=branches)
    moved, _, _ = attended(qkv[:, :, order], {"params": params}, branches=branches)
    assert np.allclose(moved, plain[:, order], atol=1e-5) == (branches == "global")


def test_each_token_gives_itself_away_once():  # Acceptance 3
    qkv = tokens()
    _, (reads, shares), _ = attended(qkv, interact="skipped")
    _, (_, sums), params = attended(qkv, interact="skipped", normalize_gather=False)
    np.testing.assert_allclose(sums.sum(2), 1, rtol=1e-5)  # a token's, over representatives
    mass = sums.sum(3)
    np.testing.assert_allclose(shares.sum(3), mass / (mass + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(reads.sum(3), 1, rtol=1e-5)
    flat = jax.tree_util.tree_map_with_path(lambda path, v: 0 * v if "route" in str(path) else v, params)
    for interact in ("skipped", "plain"):
        found, (reads, shares), _ = attended(qkv, {"params": flat}, interact=interact, branches="global")
        np.testing.assert_allclose(shares, 1 / 20, rtol=1e-5)
        np.testing.assert_allclose(reads, 1 / 5, rtol=1e-5)  # they hold the same keys
        np.testing.assert_allclose(found, jnp.broadcast_to(qkv[2].mean(1, keepdims=True), found.shape), atol=1e-5)


def test_a_representative_for_each_token_makes_it_dense_attention():  # Acceptance 4
    size = 20
    anchors = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0].astype(np.float32)
    q, _, v = tokens(dim=size)
    k = jnp.broadcast_to(anchors[:, None], q.shape)
    route = {"kernel": jnp.asarray(1e3 * anchors.T), "bias": jnp.zeros(size)}
    options = {"representatives": size, "interact": "skipped", "branches": "global"}
    found, _, _ = attended((q, k, v), {"params": {"route": route}}, **options)
    scores = np.einsum("bqhd,bkhd->bhqk", *np.float64([q, k])) * size**-0.5
    expected = np.einsum("bhqk,bkhd->bqhd", softmax(scores), np.float64(v))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


def arrays_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


def test_it_grows_with_the_number_of_tokens_and_not_with_its_square():  # Acceptance 5
    largest = {}
    for side in (16, 64):
        length, m = side * side, module(49, (side, side))
        qkv = [jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32)] * 3
        variables = jax.eval_shape(m.init, KEY, *qkv)
        shapes = list(arrays_of(jax.make_jaxpr(lambda v, *x, m=m: m.apply(v, *x)[0])(variables, *qkv).jaxpr))
        assert len(shapes) > 20
        assert not [shape for shape in shapes if sum(n >= length for n in shape) > 1]
        largest[length] = max(map(np.prod, shapes))
    assert largest[4096] == 16 * largest[256]


def test_outputs_lie_between_the_values():  # Acceptance 6
    qkv = tokens()
    found, _, _ = attended(qkv, interact="skipped", branches="global")
    low, high = (f(np.asarray(qkv[2]), axis=1, keepdims=True) for f in (np.min, np.max))
    # The tokens' shares are divided by a little more than their sum.
    assert (found >= low - 1e-5 * np.abs(low)).all()
    assert (found <= high + 1e-5 * np.abs(high)).all()


# --- hosts ------------------------------------------------------------------------------------------------------------


@functools.cache
def built(host):
    model = PAPER.model(HOSTS[host])
    return model, {"params": drawn(variable_shapes(PAPER, model)["params"], scale=0.2)}


def images(size=(32, 32), count=2):
    return jax.random.normal(KEY, (count, *size, 3))


def host_of(config):
    c, sizes = config, {"num_classes": 5}
    stages = {"depths": c.depths, "num_heads": c.num_heads, "mlp_ratios": c.mlp_ratios}
    if c.host == "deit":
        layer = LayerConfig(width=12, num_heads=3, hidden=24)
        return vit.Model(vit.Config(family="deit", num_layers=2, layer=layer, **sizes))
    if c.host == "pvt_v2":
        return pvt_v2.Model(pvt_v2.Config(widths=c.widths, reductions=(1, 1), **sizes, **stages))
    return swin.Model(swin.Config(width=8, windows=((2, 2), (2, 2)), **sizes, **stages))


@pytest.mark.parametrize("host", ["deit", "pvt_v2", "swin"])
def test_without_representatives_it_is_the_host_itself(host):
    config = PAPER.config_class(**{**vars(HOSTS[host]), "representatives": (0,) * len(HOSTS[host].depths)})
    model, theirs, x = PAPER.model(config), host_of(config), images()
    shapes = jax.eval_shape(theirs.init, KEY, x)
    chex.assert_trees_all_equal_shapes(variable_shapes(PAPER, model), shapes)
    variables = drawn(shapes, scale=0.2)
    found = jax.jit(model.apply)(variables, {"x": x})
    assert found.keys() == {"logits"}
    chex.assert_trees_all_close(found["logits"], jax.jit(theirs.apply)(variables, x).logits, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_keeps_its_weights_and_gets_new_ones(host):
    model, variables = built(host)
    found = set(flatten_dict(variables["params"], sep="/"))
    new = {path for path in found if "/representatives/" in path}
    per_layer = {f"{n}/{w}" for n in ("route", "depthwise", *(f"interact_{i}" for i in ("query", "key", "value")))
                 for w in ("kernel", "bias")}  # fmt: skip
    layers_with = sum(d for d, m in zip(model.config.depths, model.config.representatives, strict=True) if m)
    assert {path.split("/representatives/")[1] for path in new} == per_layer
    assert len(new) == len(per_layer) * layers_with
    if host != "pvt":
        theirs = flatten_dict(jax.eval_shape(host_of(model.config).init, KEY, images())["params"], sep="/")
        # Where the window is the whole map, nothing reads a table of biases.
        assert found - new == {path for path in theirs if path != "stage0_layer_0/attention/bias_table"}


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_answers_at_any_size_and_shows_what_is_attended_to(host):
    model, variables = built(host)
    x = images((48, 40) if host == "pvt_v2" else (48, 64))
    outputs, shown = jax.jit(functools.partial(model.apply, mutable=["attention_weights"]))(variables, {"x": x})
    chex.assert_tree_all_finite(outputs)
    weights = flatten_dict(shown["attention_weights"])
    assert len(weights) == sum(model.config.depths)
    for value in weights.values():
        np.testing.assert_allclose(value.sum(-1), 1, atol=1e-4)
    stage = max(i for i, m in enumerate(model.config.representatives) if m)
    grid, prefix = model.config.grid(stage, x.shape[1:3]), model.config.prefix(stage)
    last = list(weights.values())[sum(model.config.depths[: stage + 1]) - 1].mean(1)[:, prefix:, prefix:]
    assert last.shape[1] == grid[0] * grid[1]
    chosen = jnp.take_along_axis(last, outputs["queries"][..., None], axis=1)
    chex.assert_trees_all_close(outputs["attention"], chosen.reshape(2, -1, *grid), atol=1e-5)
    assert picture({"x": x, "label": jnp.zeros(2, int)}, outputs).axes


def test_the_places_that_are_shown_stand_out():
    model, variables = built("deit")
    x = 0.01 * images()
    for place in ((0, 1), (2, 2), (3, 0)):
        x = x.at[1, 8 * place[0] : 8 * place[0] + 8, 8 * place[1] : 8 * place[1] + 8, 1].add(1.0)
    found = jax.jit(model.apply)(variables, {"x": x})["queries"][1]
    assert set(found.tolist()) == {1, 10, 12}


def pyramid_table(depths):
    """Where whai362/PVT@57e2dfa has what."""
    number = 0
    for stage, depth in enumerate(depths):
        theirs, ours = f"patch_embed{stage + 1}", f"stage{stage}_embedding"
        yield from conv(f"{theirs}.proj", ours)
        yield from layer_norm(f"{theirs}.norm", f"{ours}_norm")
        yield from parameter(f"pos_embed{stage + 1}", f"stage{stage}_positions", squeezed(1))
        for i in range(depth):
            theirs, ours = f"block{stage + 1}.{i}", f"layers_{number}"
            number += 1
            yield from layer_norm(f"{theirs}.norm1", f"{ours}/attention_norm")
            yield from layer_norm(f"{theirs}.norm2", f"{ours}/mlp_norm")
            yield from linear(f"{theirs}.attn.q", f"{ours}/attention/query")
            names = f"{ours}/attention/key", f"{ours}/attention/value"
            yield from fused_linear(f"{theirs}.attn.kv", names, (4, 6, 8, 12)[stage])
            yield from linear(f"{theirs}.attn.proj", f"{ours}/attention/out")
            for name in ("fc1", "fc2"):
                yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{name}")
    yield from parameter("cls_token", "class_token", squeezed(1))
    yield from layer_norm("norm", "norm")
    yield from linear("head", "head")


def test_the_pyramid_is_the_official_one():
    """Numbers of whai362/PVT@57e2dfa (Apache-2.0), float64, with keys and values of all tokens (sr_ratios 1)."""
    config = Config(
        host="pvt", image_size=64, num_classes=5, patch=4, widths=(4, 6, 8, 12), depths=(1, 2, 1, 1),
        num_heads=(1, 2, 2, 3), mlp_ratios=(2.0,) * 4, representatives=(0,) * 4,
    )  # fmt: skip
    with np.load(Path(__file__).parent / "data" / "pvt.npz") as stored:
        case = dict(stored)
    tensors = {name.removeprefix("param/"): value for name, value in case.items() if name.startswith("param/")}
    rows = list(pyramid_table(config.depths))
    assert {name for row in rows for name in row.official} == tensors.keys()
    variables, model = forwards(rows, tensors), PAPER.model(config)
    chex.assert_trees_all_equal_shapes(variables, variable_shapes(PAPER, model))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.apply)(variables, {"x": jnp.moveaxis(jnp.asarray(case["x"]), 1, -1)})
    np.testing.assert_allclose(found["logits"], case["y"], rtol=1e-4, atol=1e-4)


def test_the_pyramid_has_the_published_size():
    config = PAPER.config("pvt_t", representatives=(0, 0, 0, 0))
    count = sum(s.size for s in jax.tree.leaves(variable_shapes(PAPER, PAPER.model(config))["params"]))
    # The published one makes grids smaller by convolutions with norms, 8, 4 and 2 on a side, two layers a stage.
    reducing = sum(2 * (w * w * r * r + 3 * w) for w, r in ((64, 8), (128, 4), (320, 2)))
    assert round((count + reducing) / 1e6, 1) == 13.2


def test_sizes_follow_the_hosts_and_the_cards_formula():
    def count(name, **changes):
        shapes = variable_shapes(PAPER, PAPER.model(PAPER.config(name, **changes)))
        return sum(s.size for s in jax.tree.leaves(shapes["params"]))

    added = {  # d M + M, 3 C^2 + 3 C and 10 C for each layer
        name: sum(
            depth * (w // h * m + m + 3 * w * w + 3 * w + 10 * w)
            for depth, w, h, m in zip(c.depths, c.widths, c.num_heads, c.representatives, strict=True)
            if m
        )
        for name, c in PAPER.configs.items()
    }
    tables = 13 * 13 * (2 * 3 + 2 * 6 + 6 * 12)
    assert count("swin_t") == 28_288_354 - tables + added["swin_t"]
    assert count("deit_t") == 5_717_416 + added["deit_t"] == PAPER.parameter_counts["deit_t"]


def test_examples_skip_branches_more_often_the_deeper():
    model, variables = built("deit")
    dropped = PAPER.model(PAPER.config_class(**{**vars(model.config), "drop_path_rate": 0.9}))
    batch = {"x": images(count=32)}
    found = jax.jit(functools.partial(dropped.apply, train=True))(variables, batch, rngs={"dropout": KEY})
    # The second of two layers is the last: most examples pass it by, and what is left is ten times as large.
    without = jax.tree_util.tree_map_with_path(
        lambda path, v: 0 * v if "layers_1" in str(path) and any(n in str(path) for n in ("out", "fc2")) else v,
        variables,
    )
    apply = jax.jit(model.apply)
    skipped = np.isclose(found["logits"], apply(without, batch)["logits"], atol=1e-5).all(-1)
    assert 0.6 < skipped.mean() < 0.95  # 0.9 squared
    still = jax.jit(dropped.apply)(variables, batch)
    chex.assert_trees_all_close(still, apply(variables, batch), atol=1e-6)
    assert found.keys() == {"logits"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (48, 96)}, r"widths \(48, 96\) has not 1 entries"),
        ({"host": "swin", "depths": (1, 1), "widths": (8, 8), "num_heads": (1, 1), "mlp_ratios": (2.0, 2.0),
          "representatives": (4, 4)}, r"the widths of swin double from stage to stage, unlike \(8, 8\)"),
    ],
)  # fmt: skip
def test_configurations_that_fit_no_host_are_refused(change, message):
    with pytest.raises(zoo.UserError, match=message):
        PAPER.config("tiny", **change)
