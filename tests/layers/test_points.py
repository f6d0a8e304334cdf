"""Point sets against loops in numpy: sampling, neighbours, Chamfer, frames, alignment; masks never leak."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import points

KEYS = jax.random.split(jax.random.key(5), 12)
normal = jax.random.normal
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
B, N, Q = 2, 17, 7
POINTS, QUERY = normal(KEYS[0], (B, N, 3)), normal(KEYS[1], (B, Q, 3))
FEATURES = normal(KEYS[2], (B, N, 4))
PRESENT = jnp.arange(N)[None] < jnp.array([[N], [9]])
POISONED = jnp.where(PRESENT[..., None], POINTS, jnp.nan)


def exact(x):
    return np.asarray(x, np.float64)


def squares(a, b):
    return ((exact(a)[:, None] - exact(b)[None]) ** 2).sum(-1)


# ---- sampling --------------------------------------------------------------------------------------------------------


def farthest_loop(x, count, first, allowed):
    chosen = [first]
    for _ in range(count - 1):
        distance = squares(x, x[np.array(chosen)]).min(1)
        distance[~np.asarray(allowed)] = -1
        chosen.append(int(np.argmax(distance)))
    return chosen


@pytest.mark.parametrize("start", [None, 3, "each"])
def test_farthest_points_are_the_greedy_definition(start):
    given = jnp.array([2, 5]) if start == "each" else start
    ours = points.farthest_point_sampling(POINTS, 8, start=given, mask=PRESENT)
    firsts = [0, 0] if start is None else [2, 5] if start == "each" else [start] * 2
    expected = [farthest_loop(POINTS[i], 8, firsts[i], PRESENT[i]) for i in range(B)]
    assert ours.tolist() == expected


def test_absent_points_are_skipped_even_in_front():
    """pointnet2_ops starts at 0 whatever it is and then skips zero rows (card mamba_complete_3d)."""
    padded = POINTS.at[:, :4].set(0.0)
    solid = jnp.sum(padded**2, -1) > 1e-3
    ours = points.farthest_point_sampling(padded, 6, start=0, mask=solid)
    assert jnp.all(ours[:, 0] == 0)
    assert jnp.all(ours[:, 1:] >= 4)
    assert jnp.all(points.farthest_point_sampling(padded, 6, mask=solid) >= 4)


def test_exhausted_sets_repeat_and_the_whole_set_is_a_permutation():
    assert sorted(points.farthest_point_sampling(POINTS[:1], N)[0].tolist()) == list(range(N))
    few = points.farthest_point_sampling(POINTS, 12, mask=PRESENT)[1]
    assert sorted(few[:9].tolist()) == list(range(9))
    assert few[9:].tolist() == [0, 0, 0]
    assert points.farthest_point_sampling(POINTS, 3, mask=jnp.zeros((B, N), bool)).shape == (B, 3)
    with pytest.raises(ValueError, match="count 0 is not at least 1"):
        points.farthest_point_sampling(POINTS, 0)


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1024, 3])
def test_nearest_points_are_the_sorted_distances(chunk):
    index, square = points.nearest_points(QUERY, POISONED, 5, mask=PRESENT, chunk=chunk)
    for i in range(B):
        table = squares(QUERY[i], POINTS[i])
        table[:, ~np.asarray(PRESENT[i])] = np.inf
        order = np.argsort(table, axis=1, kind="stable")[:, :5]
        chex.assert_trees_all_equal(index[i], jnp.asarray(order, jnp.int32))
        close(square[i], jnp.asarray(np.take_along_axis(table, order, 1), jnp.float32))


def test_ties_go_to_the_lower_index_and_self_can_be_left_out():
    lattice = jnp.array([[[0.0], [1.0], [2.0], [1.0], [3.0]]])
    index, square = points.nearest_points(lattice, lattice, 3)
    assert index[0].tolist() == [[0, 1, 3], [1, 3, 0], [2, 1, 3], [1, 3, 0], [4, 2, 1]]
    without, _ = points.nearest_points(lattice, lattice, 2, exclude_self=True, chunk=2)
    assert without[0].tolist() == [[1, 3], [3, 0], [1, 3], [1, 0], [2, 1]]
    assert square[0, 0].tolist() == [0, 1, 1]


def test_missing_neighbours_repeat_the_nearest_at_infinity():
    two = jnp.zeros((B, N), bool).at[:, jnp.array([4, 6])].set(True)
    index, square = points.nearest_points(QUERY, POISONED, 4, mask=two & PRESENT)
    assert jnp.all((index == 4) | (index == 6))
    assert jnp.all(index[..., 2:] == index[..., :1])
    assert jnp.all(jnp.isinf(square[..., 2:]))
    nobody, far = points.nearest_points(QUERY, POINTS, 2, mask=jnp.zeros((B, N), bool))
    assert not jnp.any(nobody)
    assert jnp.all(jnp.isinf(far))


def test_gradients_of_distances_pass_to_both_sets_but_not_to_absent_points():
    def loss(query, source):
        square = points.nearest_points(query, source, 3, mask=PRESENT, chunk=4)[1]
        return jnp.sum(jnp.sin(square))

    check_grads(loss, (QUERY, POINTS), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    assert not jnp.any(jax.grad(loss, argnums=1)(QUERY, POINTS)[1, 9:])


@pytest.mark.parametrize("chunk", [1024, 3])
def test_ball_query_takes_the_first_hits_and_repeats_the_first(chunk):
    index, found = points.ball_query(QUERY, POISONED, 1.2, 4, mask=PRESENT, chunk=chunk)
    short, nothing = False, False
    for i, q in np.ndindex(B, Q):
        hits = [j for j in range(N) if PRESENT[i, j] and squares(QUERY[i, q : q + 1], POINTS[i, j : j + 1]) < 1.44][:4]
        first = hits[0] if hits else 0
        assert index[i, q].tolist() == hits + [first] * (4 - len(hits))
        assert found[i, q].tolist() == [True] * len(hits) + [False] * (4 - len(hits))
        short, nothing = short or 0 < len(hits) < 4, nothing or not hits
    assert short
    assert nothing


def test_grouping_reads_rows_and_edges_are_differences():
    index = jax.random.randint(KEYS[3], (B, Q, 3), 0, N)
    groups = points.gather_points(FEATURES, index)
    chex.assert_trees_all_equal(groups[1, 2, 1], FEATURES[1, index[1, 2, 1]])
    edges = points.edge_features(FEATURES[:, :Q], FEATURES, index)
    close(edges[..., :4] + edges[..., 4:], groups)
    close(edges[..., 4:], jnp.broadcast_to(FEATURES[:, :Q, None], (B, Q, 3, 4)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pooling_takes_the_greatest_of_each_group_and_its_slope_goes_to_the_first(dtype):
    tied = FEATURES.astype(dtype).at[:, 5].set(FEATURES[:, 2].astype(dtype))
    groups = jax.random.randint(KEYS[4], (B, N), 0, 3).at[:, 5].set(0).at[:, 2].set(0)
    pool = partial(points.pool_points, num_groups=4)
    ours, slopes = pool(tied, groups), jax.grad(lambda x: jnp.sum(pool(x, groups)[:, :, 1] ** 2))(tied)
    assert not jnp.any(ours[:, 3])  # nobody's group
    for i, g in np.ndindex(B, 3):
        rows = np.flatnonzero(groups[i] == g)
        table = exact(tied[i])[rows]
        chex.assert_trees_all_equal(exact(ours[i, g]), table.max(0))
        expected = np.zeros((N, 4))
        expected[rows[table[:, 1].argmax()], 1] = 2 * table[:, 1].max()
        chex.assert_trees_all_equal(exact(slopes[i])[rows], expected[rows])
    chex.assert_trees_all_equal(points.pool_points(tied)[:, 0], tied.max(axis=1))
    each = jax.vmap(lambda x, g: pool(x[None], g[None])[0])(tied, groups)
    chex.assert_trees_all_equal(each, ours)


@pytest.mark.parametrize("power", [1, 2])
def test_interpolation_is_the_weighted_mean_of_the_nearest(power):
    ours = points.inverse_distance_interpolation(QUERY, POISONED, FEATURES, power=power, mask=PRESENT)
    for i, q in np.ndindex(B, Q):
        square = squares(QUERY[i, q : q + 1], POINTS[i])[0]
        square[~np.asarray(PRESENT[i])] = np.inf
        near = np.argsort(square)[:3]
        weight = 1 / (square[near] ** (power / 2) + 1e-8)
        close(ours[i, q], jnp.asarray(weight @ exact(FEATURES[i])[near] / weight.sum(), jnp.float32), atol=1e-4)


def test_interpolation_at_a_point_gives_its_feature_and_without_points_zero():
    run = partial(points.inverse_distance_interpolation, POINTS, POINTS)
    close(run(FEATURES), FEATURES, atol=1e-4)
    assert not jnp.any(run(FEATURES, mask=jnp.zeros((B, N), bool)))
    slopes = jax.grad(lambda x: jnp.sum(points.inverse_distance_interpolation(x, x, FEATURES) ** 2))(POINTS)
    assert jnp.all(jnp.isfinite(slopes))
    one = points.inverse_distance_interpolation(QUERY, POINTS[:, :1], FEATURES[:, :1])
    close(one, jnp.broadcast_to(FEATURES[:, :1], (B, Q, 4)))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_chamfer_is_its_definition_with_masks_and_in_chunks(norm):
    ours = points.chamfer_distance(QUERY, POISONED, norm=norm, b_mask=PRESENT)
    expected = []
    for i in range(B):
        table = squares(QUERY[i], POINTS[i][PRESENT[i]])
        sides = (table.min(1), table.min(0))
        expected.append(sum(s.mean() for s in sides) if norm == "l2" else sum(np.sqrt(s).mean() for s in sides) / 2)
    close(ours, jnp.asarray(expected, jnp.float32))
    close(points.chamfer_distance(POISONED, QUERY, norm=norm, a_mask=PRESENT, chunk=3), ours)
    nobody = points.chamfer_distance(QUERY, POINTS, norm=norm, b_mask=jnp.zeros((B, N), bool))
    assert not jnp.any(nobody)


def test_gradients_of_chamfer_are_finite_where_sets_touch():
    run = partial(points.chamfer_distance, b_mask=PRESENT)
    check_grads(lambda a, b: run(a, b), (QUERY, POINTS), order=1, modes=["rev"], rtol=3e-2, atol=3e-2)
    assert not jnp.any(jax.grad(lambda a: jnp.sum(points.chamfer_distance(a, POINTS)))(POINTS))
    slopes = jax.grad(lambda b: jnp.sum(run(QUERY, b)))(POISONED)
    assert jnp.all(jnp.isfinite(slopes))


# ---- frames and alignment --------------------------------------------------------------------------------------------


def rotations(key, shape, d=3):
    q, r = jnp.linalg.qr(normal(key, (*shape, d, d)))
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return q.at[..., 0].multiply(jnp.linalg.det(q)[..., None])


def test_frames_are_right_handed_eigenvectors_that_turn_with_the_points():
    cloud = normal(KEYS[4], (B, 40, 3)) * jnp.array([3.0, 1.5, 0.5]) + 0.3 * normal(KEYS[4], (B, 40, 3)) ** 2
    axes, variances = points.pca_frames(cloud)
    covariance = np.stack([np.cov(exact(c).T, bias=True) for c in cloud])
    rebuilt = jnp.einsum("bij,bj,bkj->bik", axes, variances, axes)
    close(rebuilt, jnp.asarray(covariance, jnp.float32), rtol=1e-4, atol=1e-4)
    close(jnp.linalg.det(axes), jnp.ones(B))
    assert jnp.all(jnp.diff(variances) < 0)
    turn = rotations(KEYS[5], (B,))
    moved, same = points.pca_frames(jnp.einsum("bij,bnj->bni", turn, cloud) + 5)
    close(moved, turn @ axes, atol=1e-3)
    close(same, variances, rtol=1e-3)


def test_weights_mask_the_points_of_a_frame():
    weights = PRESENT.astype(jnp.float32)
    axes, variances = points.pca_frames(POISONED, weights=weights)
    alone, spread = points.pca_frames(POINTS[1:, :9])
    close((axes[1:], variances[1:]), (alone, spread), atol=1e-4)


def test_frames_of_symmetric_and_single_points_have_finite_gradients():
    corners = jnp.stack(jnp.meshgrid(*[jnp.array([-1.0, 1.0])] * 3), -1).reshape(1, 8, 3)
    for cloud in (corners, jnp.zeros((1, 4, 3))):
        slopes = jax.grad(lambda x: sum(jnp.sum(jnp.sin(z)) for z in points.pca_frames(x)))(cloud)
        assert jnp.all(jnp.isfinite(slopes))
        close(jnp.linalg.det(points.pca_frames(cloud)[0]), jnp.ones(1))


def test_gradients_of_frames():
    cloud = normal(KEYS[6], (8, 3)) * jnp.array([3.0, 1.5, 0.5])
    check_grads(lambda x: points.pca_frames(x), (cloud,), order=1, modes=["rev"], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("d", [2, 3])
def test_alignment_recovers_the_similarity_it_was_given(d):
    x = normal(KEYS[7], (B, 9, d))
    rotation, scale, shift = rotations(KEYS[8], (B,), d), jnp.array([0.5, 3.0]), normal(KEYS[9], (B, d))
    y = points.apply_similarity(x, scale, rotation, shift)
    close(points.similarity_alignment(x, y), (scale, rotation, shift), atol=1e-4)
    # Two points spoilt, with no weight; the rest decides.
    weights = jnp.ones((B, 9)).at[:, :2].set(0.0)
    close(
        points.similarity_alignment(x, y.at[:, :2].set(jnp.nan), weights=weights), (scale, rotation, shift), atol=1e-4
    )


def test_alignment_is_the_best_of_many_and_never_a_reflection_unless_allowed():
    x, y = normal(KEYS[7], (6, 3)), normal(KEYS[9], (6, 3))

    def error(scale, rotation, shift):
        return jnp.sum((points.apply_similarity(x, scale, rotation, shift) - y) ** 2)

    scale, rotation, shift = points.similarity_alignment(x, y)
    close(jnp.linalg.det(rotation), jnp.asarray(1.0))
    best = error(scale, rotation, shift)
    for key in jax.random.split(KEYS[10], 20):
        other = points.procrustes_rotation(rotation + 0.1 * normal(key, (3, 3)))
        centred = jnp.mean(y, 0) - scale * other @ jnp.mean(x, 0)
        assert error(scale, other, centred) >= best
        assert error(scale * (1 + 0.1 * normal(key)), rotation, shift) >= best
    mirrored = x * jnp.array([1.0, 1, -1])
    close(jnp.linalg.det(points.similarity_alignment(x, mirrored)[1]), jnp.asarray(1.0))
    scale, flip, shift = points.similarity_alignment(x, mirrored, reflection=True)
    close((scale, flip, shift), (jnp.asarray(1.0), jnp.diag(jnp.array([1.0, 1, -1])), jnp.zeros(3)), atol=1e-4)
    rigid = points.similarity_alignment(x, 2 * x, with_scale=False)
    close(rigid[0], jnp.asarray(1.0))


def test_gradients_of_alignment():
    x, y = normal(KEYS[7], (6, 3)), normal(KEYS[9], (6, 3))
    weights = jax.random.uniform(KEYS[10], (6,), minval=0.5)
    check_grads(
        lambda x, y, w: points.similarity_alignment(x, y, weights=w), (x, y, weights), order=1, modes=["rev"],
        rtol=5e-2, atol=5e-2,
    )  # fmt: skip
    matrix = normal(KEYS[11], (3, 3))
    close(jax.grad(lambda m: jnp.sum(points.procrustes_rotation(5 * m) ** 2))(matrix), jnp.zeros((3, 3)), atol=1e-4)


def test_singular_alignments_have_finite_values_and_gradients():
    line = jnp.linspace(-1, 1, 5)[:, None] * jnp.array([1.0, 0, 0])
    for x in (line, jnp.ones((5, 3)), jnp.eye(3)):
        for weights in (jnp.ones(len(x)), jnp.zeros(len(x))):
            value, slope = jax.value_and_grad(
                lambda x, w: sum(jnp.sum(jnp.sin(z)) for z in points.similarity_alignment(x, 2 * x, weights=w))
            )(x, weights)
            assert jnp.isfinite(value)
            assert jnp.all(jnp.isfinite(slope))
    close(points.procrustes_rotation(jnp.eye(3)), jnp.eye(3))


def test_point_functions_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"nearest_points: neighbors 18 is not in 1\.\.17"):
        points.nearest_points(QUERY, POINTS, 18)
    with pytest.raises(ValueError, match=r"ball_query: neighbors 0 is not in 1\.\.17"):
        points.ball_query(QUERY, POINTS, 1.0, 0)
    with pytest.raises(ValueError, match="norm 'linf' is not one of l1, l2"):
        points.chamfer_distance(QUERY, POINTS, norm="linf")
    with pytest.raises(ValueError, match="power 3 is not 1 or 2"):
        points.inverse_distance_interpolation(QUERY, POINTS, FEATURES, power=3)


# ---- what holds for every function -----------------------------------------------------------------------------------

INDEX = jax.random.randint(KEYS[3], (B, Q, 3), 0, N)
SWEEP = {
    "farthest_point_sampling": (partial(points.farthest_point_sampling, count=4), (POINTS,)),
    "nearest_points": (partial(points.nearest_points, neighbors=3), (QUERY, POINTS)),
    "ball_query": (partial(points.ball_query, radius=1.0, neighbors=3), (QUERY, POINTS)),
    "edge_features": (points.edge_features, (FEATURES[:, :Q], FEATURES, INDEX)),
    "interpolation": (points.inverse_distance_interpolation, (QUERY, POINTS, FEATURES)),
    "chamfer_distance": (points.chamfer_distance, (QUERY, POINTS)),
    "pca_frames": (points.pca_frames, (POINTS * jnp.array([3.0, 1.5, 0.5]),)),
    "similarity_alignment": (points.similarity_alignment, (POINTS, POINTS + 0.1 * FEATURES[..., :3])),
}


@pytest.mark.parametrize("name", SWEEP)
def test_every_function_under_jit_vmap_eval_shape_and_bfloat16(name):
    function, arguments = SWEEP[name]
    y = function(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(function, *arguments), jax.eval_shape(lambda: y))
    with jax.disable_jit():
        close(function(*arguments), y, atol=1e-4)
    twice = jax.vmap(function)(*(jnp.stack([a, a[::-1]]) for a in arguments))
    close(jax.tree.map(lambda z: z[0], twice), y, atol=1e-4)
    low = [a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arguments]
    # The same function of the same rounded numbers, without compiling again.
    widened = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in low]
    for ours, wide in zip(jax.tree.leaves(function(*low)), jax.tree.leaves(function(*widened)), strict=True):
        close(ours.astype(jnp.float32), wide.astype(jnp.float32), atol=0.03, rtol=0.02)


# ---- evenness --------------------------------------------------------------------------------------------------------


def tree_of(x):
    """(edges, lengths) of the minimum spanning tree, by Kruskal's rule."""
    distance = np.sqrt(squares(x, x))
    pairs = sorted((distance[i, j], i, j) for i in range(len(x)) for j in range(i))
    group, edges = list(range(len(x))), []
    for length, i, j in pairs:
        if group[i] != group[j]:
            edges.append((i, j, length))
            group = [group[i] if g == group[j] else g for g in group]
    return edges


def penalties(x, factor):
    """(sum of all penalties, on whom each point hangs) of one block."""
    edges, holder = tree_of(x), {}
    mean = np.mean([e[2] for e in edges])
    left = {(i, j): length for i, j, length in edges}
    while left:
        degree = np.bincount(np.array(list(left)).ravel(), minlength=len(x))
        for i, j in list(left):
            leaf = max((k for k in (i, j) if degree[k] == 1), default=None)
            if leaf is not None:
                holder[leaf] = (j if leaf == i else i, left.pop((i, j)))
    return {k: (h, length if length > factor * mean else 0.0) for k, (h, length) in holder.items()}


@pytest.mark.parametrize("slope", ["length", "square"])
def test_expansion_is_that_of_spanning_trees_and_moves_leaves_alone(slope):
    cloud = normal(KEYS[9], (2, 32, 3))
    ours = points.expansion_penalty(cloud, 1.1, block=16, slope=slope)
    slopes = jax.grad(lambda x: jnp.sum(points.expansion_penalty(x, 1.1, block=16, slope=slope)))(cloud)
    for b, part in np.ndindex(2, 2):
        rows = slice(16 * part, 16 * part + 16)
        x = exact(cloud[b, rows])
        expected, moved = np.zeros(16), np.zeros((16, 3))
        for leaf, (holder, penalty) in penalties(x, 1.1).items():
            expected[leaf] = penalty
            away = x[leaf] - x[holder]
            moved[leaf] = (penalty > 0) * away * (2.0 if slope == "square" else 1 / np.linalg.norm(away))
        close(ours[b, rows], expected.astype(np.float32))
        close(slopes[b, rows], moved.astype(np.float32))
    assert 0 < int(jnp.sum(ours == 0)) < 64


def test_an_even_line_does_not_expand_and_blocks_have_to_fit():
    line = jnp.arange(8.0)[None, :, None] * jnp.array([1.0, 2.0, -1.0])
    assert not jnp.any(points.expansion_penalty(line, 1.01, block=8))
    assert float(jnp.sum(points.expansion_penalty(line, 0.99, block=8))) == pytest.approx(7 * 6**0.5, rel=1e-5)
    together = jnp.zeros((1, 8, 3))
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(points.expansion_penalty(x, 0.5, block=4)))(together))
    low = points.expansion_penalty(line.astype(jnp.bfloat16), 0.5, block=4)
    assert low.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="8 points are not cut into blocks of 3"):
        points.expansion_penalty(line, 1.0, block=3)
    with pytest.raises(ValueError, match="slope 'cube' is not one of length, square"):
        points.expansion_penalty(line, 1.0, block=4, slope="cube")
