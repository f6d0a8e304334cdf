"""R-DMesh's card: attention of the shape for three streams, hops along the mesh, tokens, the flow and its sampling."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import zoo
from zoo.registry import variable_shapes
from zoo.spatial.r_dmesh import (
    Decoder,
    FlowTransformer,
    Triflow,
    flow_losses,
    hop_weights,
    sample_latents,
    sample_tokens,
    unwarped_time,
    warped_time,
)
from zoo.tasks import mesh_animation

KEY = jax.random.key(3)
PAPER = zoo.paper("r_dmesh")
SMALL = {
    "frames": 3, "num_vertices": 20, "num_edges": 34, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "head_dim": 8, "num_tokens": 8, "flow_width": 16, "flow_layers": 1, "flow_heads": 2, "sampling_steps": 4,
}  # fmt: skip


def noisy(shapes):
    """Variables of these shapes, away from zeros and symmetries; nothing is compiled for them."""
    rng = np.random.default_rng(4)

    def draw(path, leaf):
        if path[-1].key == "count":
            return jnp.zeros(leaf.shape, leaf.dtype)
        centre = 1.0 if path[-1].key in ("scale", "variance") else 0.0
        return jnp.asarray(rng.normal(centre, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("r_dmesh", "tiny", **SMALL)
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    return model, batch, noisy(variable_shapes(PAPER, model)), jax.jit(partial(model.apply, method="encode"))


def streams(count, width=6, *, key=KEY):
    return tuple(jax.random.normal(key, (3, 2, count, width)))


@pytest.fixture(scope="module")
def triflow():
    block = Triflow(zoo.create("r_dmesh", "tiny").config, 2, 5)
    variables = {"params": noisy(block.init(KEY, streams(4), context=streams(7))["params"])}
    return variables, jax.jit(lambda v, s, c: block.apply(v, s, context=c, mutable="intermediates"))


def test_equal_streams_with_equal_weights_stay_equal(triflow):
    variables, apply = triflow
    tokens, read = streams(4)[0], streams(7)[1]
    shared = {"value", "value_norm", "out", "ffn_norm", "ffn_in", "ffn_out"}
    same = {
        name: jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), part) if name in shared else part
        for name, part in variables["params"].items()
    }
    first, second, third = apply({"params": same}, (tokens,) * 3, (read,) * 3)[0]
    chex.assert_trees_all_close(first, second, third, atol=1e-6)
    first, second, _ = apply(variables, (tokens,) * 3, (read,) * 3)[0]
    assert not np.allclose(first, second, atol=0.1)


def test_attention_is_that_of_the_shape_alone(triflow):
    variables, apply = triflow
    tokens, read = streams(4), streams(7)
    others = streams(4, key=jax.random.key(8)), streams(7, key=jax.random.key(9))
    _, captured = apply(variables, tokens, read)
    _, changed = apply(variables, (tokens[0], *others[0][1:]), (read[0], *others[1][1:]))
    chex.assert_trees_all_equal(captured, changed)
    _, moved = apply(variables, tokens, (others[1][0], *read[1:]))
    weights, other = (c["intermediates"]["weights"][0] for c in (captured, moved))
    chex.assert_shape(weights, (2, 2, 4, 7))
    assert not np.allclose(weights, other, atol=1e-3)


def test_a_fresh_decoder_gives_the_mesh_moved_as_a_whole():
    c = zoo.create("r_dmesh", "tiny", **SMALL).config
    latents, base, vertices = (jax.random.normal(KEY, s) for s in ((2, 8, 20), (2, 5, 3), (2, 5, c.d_model)))
    (first, motion), variables = jax.jit(Decoder(c).init_with_output)(KEY, latents, base, vertices)
    bias = {name: variables["params"][f"{name}_out"]["bias"] for name in ("jump", "motion")}
    chex.assert_trees_all_close(first, base + bias["jump"], atol=1e-6)
    chex.assert_trees_all_close(motion, jnp.broadcast_to(bias["motion"].reshape(3, 1, 3), motion.shape), atol=1e-6)


def steps_between(edges, count):
    """Breadth first, from every vertex."""
    neighbours = {i: {int(b if a == i else a) for a, b in edges if i in (a, b)} for i in range(count)}
    found = np.full((count, count), -1)
    for start in range(count):
        edge, steps = {start}, 0
        while edge:
            found[start, list(edge)] = steps
            edge, steps = {n for i in edge for n in neighbours[i] if found[start, n] < 0}, steps + 1
    return found


def test_bands_of_hops_double():
    rng, count = np.random.default_rng(0), 24
    chain = np.stack([np.arange(count - 3), np.arange(1, count - 2)], axis=1)
    edges = np.concatenate([chain, rng.integers(0, count - 2, (3, 2)), [[-1, -1], [4, 4]]])
    steps = steps_between([e for e in edges if e[0] >= 0], count)
    c = zoo.create("r_dmesh", "tiny", hop_levels=4, hop_decay=0.7).config
    weights = hop_weights(jnp.asarray(edges[None], jnp.int32), count, c)[0]
    expected = np.zeros((count, count))
    for level, (least, most) in enumerate(((1, 1), (2, 2), (3, 4), (5, 8))):
        expected[(steps >= least) & (steps <= most)] = 0.7**level
    assert (expected > 0).sum() > 100
    assert (steps > 8).any()
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_vertices_have_no_order(setting):
    model, batch, variables, encode = setting
    batch = jax.tree.map(lambda a: a[:1], batch)
    # The first stays where it is: it is where sampling begins.
    order = np.concatenate([[0], 1 + np.random.default_rng(2).permutation(19)])
    place = np.argsort(order)
    moved = batch | {
        "base": batch["base"][:, order],
        "frames": batch["frames"][:, :, order],
        "edges": jnp.asarray(place)[batch["edges"]],
    }
    found, other = encode(variables, batch), encode(variables, moved)
    np.testing.assert_array_equal(order[np.asarray(other.tokens)], found.tokens)
    chex.assert_trees_all_close(other.latents(), found.latents(), atol=1e-4)
    decode = jax.jit(partial(model.apply, method=lambda m, *a: m.decoder(*a)))
    first, motion = decode(variables, found.latents(), batch["base"], found.vertices)
    first_moved, motion_moved = decode(variables, other.latents(), moved["base"], other.vertices)
    chex.assert_trees_all_close(first_moved, first[:, order], atol=1e-4)
    chex.assert_trees_all_close(motion_moved, motion[:, :, order], atol=1e-4)


def test_places_without_a_vertex_are_read_only_where_it_is_asked_for(setting):
    _, batch, variables, encode = setting
    absent = ~batch["vertex_mask"][..., None]
    assert absent.any()
    changed = batch | {"base": jnp.where(absent, 0.7, batch["base"])}
    chex.assert_trees_all_close(encode(variables, changed).latents(), encode(variables, batch).latents(), atol=1e-5)
    official = zoo.create("r_dmesh", "tiny", **SMALL, padding="attended")
    read = jax.jit(partial(official.apply, method="encode"))
    assert not np.allclose(read(variables, changed).latents(), read(variables, batch).latents(), atol=1e-3)


def test_tokens_are_vertices_far_apart_and_go_round():
    vertices = jax.random.normal(KEY, (2, 9, 4))
    mask = jnp.arange(9) < jnp.array([[9], [5]])
    tokens = np.asarray(sample_tokens(vertices, mask, 7))
    chosen = np.asarray(layers.farthest_point_sampling(vertices, 7, mask=mask))
    np.testing.assert_array_equal(tokens[0], chosen[0])
    np.testing.assert_array_equal(tokens[1], [*chosen[1, :5], *chosen[1, :2]])
    uniform = jnp.full((2, 7), 0.5)
    drawn = np.asarray(sample_tokens(vertices, mask, 7, uniform))
    np.testing.assert_array_equal(drawn, [[4, *chosen[0, 1:]], [2, *chosen[1, 1:5], 2, 2]])


def test_the_flow_begins_as_zero():
    model = zoo.create("r_dmesh", "tiny", **SMALL)
    flow = FlowTransformer(model.config)
    latents = jax.random.normal(KEY, (2, 8, 20))
    given = {"latents": latents, "time": jnp.array([0.1, 0.7]), "video": jax.random.normal(KEY, (2, 5, 32))}
    answer, _ = jax.jit(flow.init_with_output)(KEY, given)
    np.testing.assert_array_equal(answer, 0)


def test_the_shape_is_given_and_not_learned():
    c = zoo.create("r_dmesh", "tiny").config
    latents, noise, answer = jax.random.normal(KEY, (3, 2, 6, 20))
    tau, video, seen = jnp.array([0.2, 0.8]), jnp.zeros((2, 1, 1)), []

    def losses(answer, noise):
        def flow(given):
            seen.append(given["latents"])
            return answer

        return flow_losses(flow, latents, noise, tau, video, c)

    jump, motion = losses(answer, noise)
    chex.assert_trees_all_close((jump, motion), losses(answer.at[..., :8].add(9.0), noise.at[..., :8].add(9.0)))
    chex.assert_trees_all_close(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0][..., :8], latents[..., :8])
    assert not np.allclose(jump, losses(answer.at[..., 8:12].add(9.0), noise)[0])
    assert not np.allclose(motion, losses(answer.at[..., 12:].add(9.0), noise)[1])


def test_time_is_warped_evenly_about_the_middle():
    tau = jnp.linspace(0.0, 1.0, 41)
    warped = warped_time(tau)
    np.testing.assert_allclose(warped[jnp.array([0, 20, 40])], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(warped, 1 - 1 / (np.tan(np.pi * np.asarray(tau, np.float64) / 2) + 1), atol=1e-6)
    assert (np.diff(warped) > 0).all()
    np.testing.assert_allclose(unwarped_time(warped), tau, atol=1e-6)


@pytest.mark.parametrize("official", [True, False])
def test_sampling_follows_an_oracle_to_the_data(official):
    c = zoo.create("r_dmesh", "tiny", sampling_steps=33, official_time=official).config
    data, noise = jax.random.normal(KEY, (2, 2, 5, 20))
    told = (lambda time: time) if official else warped_time

    def straight(given):  # whatever the video
        return jnp.concatenate([data - noise] * 2)

    def bent(given):  # the same way, quadratically slow at first
        return 3 * jnp.square(told(given["time"]))[:, None, None] * straight(given)

    video = jnp.ones((2, 1, 1))
    known = data[..., :8]
    chex.assert_trees_all_close(sample_latents(straight, noise, known, video, c), data, atol=1e-5)
    # The midpoint rule's error of the integral of 3 t^2 over 32 steps is 1 / (4 * 32^2).
    chex.assert_trees_all_close(sample_latents(bent, noise, known, video, c), data, atol=2e-3)


def test_guidance_goes_beyond_what_the_video_adds():
    c = zoo.create("r_dmesh", "tiny", guidance_scale=1.5).config
    video, noise = jnp.ones((2, 1, 1)), jnp.zeros((2, 5, 20))
    drawn = sample_latents(
        lambda given: jnp.broadcast_to(2 + given["video"], (4, 5, 20)), noise, noise[..., :8], video, c
    )
    np.testing.assert_allclose(drawn[..., 8:], 2 + 1.5, rtol=1e-5)
    np.testing.assert_array_equal(drawn[..., :8], 0)


def test_a_flow_learns_by_itself_from_latents_it_does_not_change(setting):
    _, batch, variables, encode = setting
    model = zoo.create("r_dmesh", "tiny", **SMALL, stage="flow")

    def loss(params):
        outputs, updated = model.apply(
            variables | {"params": params}, batch, train=True, rngs={"dropout": KEY}, mutable=["latent_stats"]
        )
        return PAPER.compute_loss(outputs, batch)[0], updated["latent_stats"]

    gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert not any(np.any(g) for part in ("encoder", "decoder") for g in jax.tree.leaves(gradients[part]))
    assert all(np.any(g) for g in jax.tree.leaves(gradients["flow"]))
    assert int(stats["count"]) == 1
    # The first batch's own mean: of the shape, which no noise is added to, up to which tokens were drawn.
    shape = encode(variables, batch).shape
    assert np.abs(stats["mean"][:8] - jnp.mean(shape, axis=(0, 1))).max() < 0.2 * jnp.std(shape)
    alone = variable_shapes(PAPER, zoo.create("r_dmesh", "tiny", **SMALL, stage="autoencoder"))
    assert alone.keys() == {"params"}
    assert alone["params"].keys() == {"encoder", "decoder"}


def test_animating_needs_no_frames(setting):
    model, batch, variables, _ = setting
    outputs = jax.jit(model.apply)(variables, batch)
    without = {name: value for name, value in batch.items() if name != "frames"}
    first, motion = jax.jit(partial(model.apply, method="animate"))(variables, without)
    present = batch["vertex_mask"][..., None]
    chex.assert_trees_all_close(jnp.where(present, first - outputs["first"], 0), jnp.zeros_like(first), atol=1e-4)
    chex.assert_trees_all_close(
        jnp.where(present[:, None], motion - outputs["motion"], 0), jnp.zeros_like(motion), atol=1e-4
    )
    assert not np.allclose(outputs["first"], outputs["reconstructed_first"], atol=1e-3)


def test_sizes_are_the_papers():
    shapes = variable_shapes(PAPER, zoo.create("r_dmesh", "300m"))["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert (sizes["encoder"] + sizes["decoder"], sizes["flow"]) == (54_536_099, 288_949_392)


def test_errors_of_a_mesh_are_those_of_its_vertices():
    truth = jnp.zeros((2, 2, 3, 3)).at[..., 1, 0].set(1.0).at[..., 2, 1].set(1.0)
    batch = {
        "frames": truth,
        "vertex_mask": jnp.array([[True, True, True], [True, True, False]]),
        "edges": jnp.array([[[0, 1], [1, 2]], [[0, 1], [-1, -1]]]),
    }
    first = truth[:, 0].at[:, 1, 0].set(3.0).at[1, 2].set(50.0)
    scores = mesh_animation.metrics({"first": first, "motion": jnp.zeros_like(truth).at[:, 1, 0, 2].set(0.6)}, batch)
    np.testing.assert_allclose(scores["error"], [(2 + 2.6) / 6, (2 + 2.6) / 4], rtol=1e-6)
    np.testing.assert_allclose(scores["first_error"], [2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(scores["motion_error"], [0.1, 0.15], rtol=1e-6)
    np.testing.assert_allclose(scores["abnormal_edges"], [1.0, 1.0])
    assert scores["reconstruction_error"].tolist() == scores["error"].tolist()
    perfect = {"reconstructed_first": truth[:, 0], "reconstructed_motion": jnp.zeros_like(truth)}
    restored = mesh_animation.metrics({"first": first, "motion": jnp.zeros_like(truth), **perfect}, batch)
    assert restored.keys() == scores.keys()
    np.testing.assert_allclose(restored["reconstruction_error"], 0)
    values = jnp.array([[1.0, 2.0, 3.0], [4.0, 6.0, 9.0]])
    of_all = mesh_animation.mean_over_vertices(values, batch["vertex_mask"], per_instance=False)
    assert float(jnp.mean(of_all)) == pytest.approx(16 / 5)
    assert mesh_animation.mean_over_vertices(values, batch["vertex_mask"]).tolist() == [2.0, 5.0]


def test_a_picture_shows_the_mesh_and_three_frames(setting):
    _, batch, _, _ = setting
    figure = mesh_animation.picture(batch, mesh_animation.as_given(batch))
    assert len(figure.axes) == 12


def test_what_the_official_code_cannot_be():
    with pytest.raises(zoo.UserError, match="three numbers a frame"):
        zoo.from_official("r_dmesh", {"T": 4, "output_dim": 13}, {})
