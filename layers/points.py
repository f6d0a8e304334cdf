"""Point sets: sampling, neighbours, grouping, Chamfer distance, evenness, local frames and similarity alignment.

Masks are True where a point is present. Distances are computed in float32 as sums of squared differences.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

__all__ = [
    "apply_similarity",
    "ball_query",
    "chamfer_distance",
    "edge_features",
    "expansion_penalty",
    "farthest_point_sampling",
    "gather_points",
    "inverse_distance_interpolation",
    "nearest_points",
    "pca_frames",
    "pool_points",
    "procrustes_rotation",
    "similarity_alignment",
]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _square(x: Array, y: Array) -> Array:
    return jnp.sum(jnp.square(x - y), axis=-1)


def _squares(x: Array, y: Array) -> Array:
    """(B, Q, N) squared distances of all x from all y."""
    if x.shape[-1] > 4:
        return _square(x[:, :, None], y[:, None])
    # Coordinate by coordinate: sums over an axis of three are not fused on a CPU, and take ten times as long.
    return sum(jnp.square(x[:, :, None, i] - y[:, None, :, i]) for i in range(x.shape[-1]))


def _blank(points: Array, present: Array | None) -> Array:
    """Zeros for absent points, which may hold anything: a NaN times a zero cotangent would be NaN."""
    return _wide(points) if present is None else jnp.where(present[..., None], _wide(points), 0.0)


def _root(square: Array) -> Array:
    """sqrt with slope 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@partial(jax.jit, static_argnames=("count",))
def farthest_point_sampling(
    points: Float[Array, "B N D"],
    count: int,
    *,
    start: Int[Array, " B"] | Int[Array, ""] | int | None = None,
    mask: Bool[Array, "B N"] | None = None,
) -> Int[Array, "B K"]:
    """i_k = argmax over points of the distance to {i_1 ... i_{k-1}}, ties to the lowest index; K = `count` indices.

    i_1 is `start`, taken as it is, or else the first point present. Points with `mask` False are never chosen later;
    once all others are, the first point present is repeated. Any D, features too. No gradient. O(K N D), memory O(N).
    Source: card mamba_complete_3d, Model 1 (there mask = |x|^2 > 1e-3, start 0); card r_dmesh, Mechanism 4.
    """
    points = jax.lax.stop_gradient(_wide(points))
    batch, total, _ = points.shape
    if not count >= 1:
        raise ValueError(f"farthest_point_sampling: count {count} is not at least 1")
    present = jnp.ones((batch, total), bool) if mask is None else mask
    first = jnp.argmax(present, axis=1) if start is None else jnp.broadcast_to(jnp.asarray(start), (batch,))
    first = first.astype(jnp.int32)

    def add(carry, _):
        distance, last = carry
        chosen = jnp.take_along_axis(points, last[:, None, None], axis=1)
        distance = jnp.minimum(distance, _square(points, chosen))
        following = jnp.argmax(distance, axis=1).astype(jnp.int32)
        return (distance, following), following

    begin = (jnp.where(present, jnp.inf, -1.0), first)
    _, later = jax.lax.scan(add, begin, length=count - 1)
    return jnp.concatenate([first[:, None], later.T], axis=1)


@jax.jit
def gather_points(points: Shaped[Array, "B N C"], index: Int[Array, "B *I"]) -> Shaped[Array, "B *I C"]:
    """y[b, i...] = x[b, index[b, i...]]: rows by index, as groups of neighbours or samples. O(outputs).

    Source: card mamba_complete_3d, Model 1 (grouping).
    """
    picked = jnp.take_along_axis(points, index.reshape(index.shape[0], -1, 1), axis=1)
    return picked.reshape(*index.shape, points.shape[-1])


@partial(jax.jit, static_argnames=("num_groups",))
def pool_points(
    x: Float[Array, "B N C"], groups: Int[Array, "B N"] | None = None, *, num_groups: int = 1
) -> Float[Array, "B {num_groups} C"]:
    """y_gc = max of x_nc over the points n of group g (of all, without `groups`); 0 where a group has none.

    The slope goes to the first of the greatest. That of `jnp.max` is shared among all that equal the maximum, which is
    0 / 0 once a compiler computes x twice and rounds it differently. O(G N C), memory O(N C). Source: card
    heterogenmanip, Mechanism (PN, tokens).
    """
    number = jnp.arange(x.shape[1])[:, None]

    def one(group):
        inside = jnp.ones(x.shape[:2], bool) if groups is None else groups == group
        kept = jnp.where(inside[..., None], jax.lax.stop_gradient(x), -jnp.inf)
        first = (number == jnp.argmax(kept, axis=1, keepdims=True)) & inside[..., None]
        return jnp.sum(jnp.where(first, x, 0), axis=1)

    if num_groups == 1:
        return one(0)[:, None]
    return jnp.moveaxis(jax.lax.map(one, jnp.arange(num_groups)), 0, 1)


def _in_chunks(function, query: Array, chunk: int, *more: Array):
    """`function` of (B, chunk, ...) pieces of `query` one after another, so that memory stays linear."""
    count = query.shape[1]
    if count <= chunk:
        return function(query, *more)
    pieces = -(-count // chunk)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - count), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    outputs = jax.lax.map(lambda piece: function(*piece), tuple(cut(x) for x in (query, *more)))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :count], outputs)


def _smallest(values: Array, count: int) -> tuple[Array, Array]:
    """The `count` smallest of the last axis by rising value, ties to the lower index: (values, index)."""

    def one_by_one(values):
        def take(rest, _):
            index = jnp.argmin(rest, axis=-1).astype(jnp.int32)
            chosen = jnp.arange(rest.shape[-1]) == index[..., None]
            return jnp.where(chosen, jnp.inf, rest), (jnp.min(rest, axis=-1), index)

        least, index = jax.lax.scan(take, values, length=count)[1]
        return jnp.moveaxis(least, 0, -1), jnp.moveaxis(index, 0, -1)

    def at_once(values):
        top, index = jax.lax.top_k(-values, count)
        return -top, index

    # XLA's top_k sorts whole rows on a CPU, twenty times as long for a handful.
    if count == 1:
        return jnp.min(values, axis=-1, keepdims=True), jnp.argmin(values, axis=-1, keepdims=True)
    return jax.lax.platform_dependent(values, cpu=one_by_one if count <= 32 else at_once, default=at_once)


def _positions(query: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])


@partial(jax.jit, static_argnames=("neighbors", "exclude_self", "chunk"))
def nearest_points(
    query: Float[Array, "B Q D"],
    points: Float[Array, "B N D"],
    neighbors: int,
    *,
    mask: Bool[Array, "B N"] | None = None,
    exclude_self: bool = False,
    chunk: int = 1024,
) -> tuple[Int[Array, "B Q K"], Float[Array, "B Q K"]]:
    """The K = `neighbors` nearest points of each query by rising distance, ties to the lower index: (index, |.|^2).

    `exclude_self` leaves out point q for query q. Where fewer are left the squared distance is inf and the index that
    of the nearest (0 if there is none). Float32 distances with a gradient in both sets, the choice has none.
    O(Q N D), memory O(`chunk` N). Source: card mamba_complete_3d, Model 1; card optnet, 5; card angle_i2p, 5.
    """
    available = points.shape[1]
    if not 1 <= neighbors <= available:
        raise ValueError(f"nearest_points: neighbors {neighbors} is not in 1..{available}, the points")
    points = _blank(points, mask)
    fixed = jax.lax.stop_gradient(points)
    present = jnp.ones(points.shape[:2], bool) if mask is None else mask

    def search(piece, position):
        square = _squares(piece, fixed)
        allowed = present[:, None]
        if exclude_self:
            allowed = allowed & (position[..., None] != jnp.arange(available))
        least, index = _smallest(jnp.where(allowed, square, jnp.inf), neighbors)
        found = least < jnp.inf
        return jnp.where(found, index, jnp.where(found[..., :1], index[..., :1], 0)), found

    wide = _wide(query)
    index, found = _in_chunks(search, jax.lax.stop_gradient(wide), chunk, _positions(query))
    square = _square(wide[:, :, None], gather_points(points, index))
    return index, jnp.where(found, square, jnp.inf)


@partial(jax.jit, static_argnames=("neighbors", "chunk"))
def ball_query(
    query: Float[Array, "B Q D"],
    points: Float[Array, "B N D"],
    radius: Float[Array, ""] | float,
    neighbors: int,
    *,
    mask: Bool[Array, "B N"] | None = None,
    chunk: int = 1024,
) -> tuple[Int[Array, "B Q K"], Bool[Array, "B Q K"]]:
    """The first K = `neighbors` points by index with |x - q| < `radius`: (index, found), PointNet++'s grouping.

    Places without a hit repeat the first one, so that a maximum over the group is unchanged; with no hit at all they
    are 0. No gradient. O(Q N D), memory O(`chunk` N). Source: arXiv:1706.02413, section 3.2; card heterogenmanip.
    """
    available = points.shape[1]
    if not 1 <= neighbors <= available:
        raise ValueError(f"ball_query: neighbors {neighbors} is not in 1..{available}, the points")
    fixed = jax.lax.stop_gradient(_wide(points))
    present = jnp.ones(points.shape[:2], bool) if mask is None else mask

    def search(piece):
        inside = (_squares(piece, fixed) < radius**2) & present[:, None]
        order = jnp.where(inside, jnp.arange(available), available)
        index = -jax.lax.top_k(-order, neighbors)[0]
        found = index < available
        first = jnp.where(found[..., :1], index[..., :1], 0)
        return jnp.where(found, index, first), found

    return _in_chunks(search, jax.lax.stop_gradient(_wide(query)), chunk)


@jax.jit
def edge_features(
    query: Float[Array, "B Q C"], features: Float[Array, "B N C"], index: Int[Array, "B Q K"]
) -> Float[Array, "B Q K E"]:
    """[f_j - q_i, q_i] for each neighbour j of query i, E = 2 C: what EdgeConv's shared map sees. O(Q K C).

    Source: arXiv:1801.07829, equation 8; card mamba_complete_3d, Model 1.
    """
    center = jnp.broadcast_to(query[:, :, None], (*index.shape, query.shape[-1]))
    return jnp.concatenate([gather_points(features, index) - center, center], axis=-1)


@partial(jax.jit, static_argnames=("neighbors", "power", "chunk"))
def inverse_distance_interpolation(
    query: Float[Array, "B Q D"],
    points: Float[Array, "B N D"],
    features: Float[Array, "B N C"],
    *,
    neighbors: int = 3,
    power: int = 1,
    epsilon: float = 1e-8,
    mask: Bool[Array, "B N"] | None = None,
    chunk: int = 1024,
) -> Float[Array, "B Q C"]:
    """f(q) = sum_k w_k f_k / sum_k w_k, w_k = 1 / (d_k^`power` + epsilon) over the nearest `neighbors` points.

    PointNet++'s feature propagation; its paper squares the distance (`power` 2), its kernels do not. A query without
    any point gives 0. O(Q N D). Source: arXiv:1706.02413, equation 2; card heterogenmanip, Mechanism.
    """
    if power not in (1, 2):
        raise ValueError(f"inverse_distance_interpolation: power {power} is not 1 or 2")
    index, square = nearest_points(query, points, min(neighbors, points.shape[1]), mask=mask, chunk=chunk)
    found = square < jnp.inf
    square = jnp.where(found, square, 0.0)
    weight = jnp.where(found, 1 / ((square if power == 2 else _root(square)) + epsilon), 0.0)
    total = jnp.sum(weight, -1, keepdims=True)
    share = weight / jnp.where(total > 0, total, 1.0)
    picked = _wide(gather_points(features, index))
    # An absent neighbour may hold anything, NaN included.
    return jnp.sum(jnp.where(found[..., None], picked * share[..., None], 0.0), axis=-2).astype(features.dtype)


def _masked_mean(values: Array, mask: Array | None) -> Array:
    present = jnp.ones(values.shape, bool) if mask is None else mask
    counted = present & (values < jnp.inf)
    return jnp.sum(jnp.where(counted, values, 0.0), -1) / jnp.maximum(jnp.sum(counted, -1), 1)


@partial(jax.jit, static_argnames=("norm", "chunk"))
def chamfer_distance(
    a: Float[Array, "B N D"],
    b: Float[Array, "B M D"],
    *,
    norm: str = "l1",
    a_mask: Bool[Array, "B N"] | None = None,
    b_mask: Bool[Array, "B M"] | None = None,
    chunk: int = 1024,
) -> Float[Array, " B"]:
    """ "l1": (mean_a min_b |a - b| + mean_b min_a |a - b|) / 2; "l2": the sum of both means of |a - b|^2.

    The conventions of point completion (CD-L1, CD-L2). Means are over points present; a set without points adds 0.
    The slope of |a - b| at 0 is 0. Float32. O(N M D), memory O(`chunk` (N + M)).
    Source: card mamba_complete_3d, Training and Reported results; card polycubenet.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"chamfer_distance: norm {norm!r} is not one of l1, l2")
    a, b = _blank(a, a_mask), _blank(b, b_mask)
    there = nearest_points(a, b, 1, mask=b_mask, chunk=chunk)[1][..., 0]
    back = nearest_points(b, a, 1, mask=a_mask, chunk=chunk)[1][..., 0]
    sides = ((there, a_mask), (back, b_mask))
    if norm == "l2":
        return sum(_masked_mean(square, mask) for square, mask in sides)
    # inf marks a point without a partner, and has to stay.
    roots = [jnp.where(square < jnp.inf, _root(jnp.where(square < jnp.inf, square, 0)), jnp.inf) for square, _ in sides]
    return sum(_masked_mean(root, mask) for root, (_, mask) in zip(roots, sides, strict=True)) / 2


def _spanning_tree(square: Array) -> Array:
    """Adjacency (n, n) of the tree of least length, from squared distances (Prim's, grown from point 0)."""
    count = square.shape[0]

    def add(carry, _):
        distance, anchor, inside = carry
        best = jnp.argmin(jnp.where(inside, jnp.inf, distance))
        inside = inside.at[best].set(True)
        closer = ~inside & (square[best] < distance)
        return (jnp.where(closer, square[best], distance), jnp.where(closer, best, anchor), inside), None

    start = square[0], jnp.zeros(count, jnp.int32), jnp.arange(count) == 0
    anchor = jax.lax.scan(add, start, length=count - 1)[0][1]
    edges = (anchor[:, None] == jnp.arange(count)) & (jnp.arange(count) > 0)[:, None]
    return edges | edges.T


def _peel(adjacency: Array) -> Array:
    """(n,): on whom each point hangs as leaves are taken off in rounds, and -1 for the one that is left."""
    place = jnp.arange(adjacency.shape[0])

    def peel(carry):
        adjacency, holder, rounds = carry
        neighbour = jnp.argmax(adjacency, axis=1)
        leaf = jnp.sum(adjacency, axis=1) == 1
        # Of the last edge both ends are leaves: the second one goes.
        leaf = leaf & ~(leaf[neighbour] & (place < neighbour))
        return adjacency & ~leaf[:, None] & ~leaf, jnp.where(leaf, neighbour, holder), rounds + 1

    # A tree is gone after half as many rounds as it has points; what NaNs make is none.
    start = adjacency, jnp.full(place.shape, -1), 0
    going = lambda carry: jnp.any(carry[0]) & (carry[2] <= place.size // 2)  # noqa: E731
    return jax.lax.while_loop(going, peel, start)[1]


@partial(jax.jit, static_argnames=("block", "slope"))
def expansion_penalty(
    points: Float[Array, "B N D"], factor: Float[Array, ""] | float, *, block: int, slope: str = "length"
) -> Float[Array, "B N"]:
    """e_i = |x_i - x_h(i)| where that exceeds `factor` times the mean edge of i's spanning tree, else 0.

    Each `block` consecutive points have a minimum spanning tree of their own, from which leaves are taken off in
    rounds; h(i) is what i hung on then, so that every edge counts once. Only x_i gets a gradient: that of the "length",
    or, as the released kernel's, that of its "square", which is less for short edges. Float32. O(N block D).
    Source: arXiv:1912.00280 (MSN), section 3.2; card mamba_complete_3d, Training.
    """
    batch, total, width = points.shape
    if block < 2 or total % block:
        raise ValueError(f"expansion_penalty: {total} points are not cut into blocks of {block}")
    if slope not in ("length", "square"):
        raise ValueError(f"expansion_penalty: slope {slope!r} is not one of length, square")
    wide = _wide(points).reshape(-1, block, width)
    fixed = jax.lax.stop_gradient(wide)
    holder = jax.vmap(lambda square: _peel(_spanning_tree(square)))(_squares(fixed, fixed))
    hangs = holder >= 0
    square = jnp.where(hangs, _square(wide, gather_points(fixed, jnp.maximum(holder, 0))), 0.0)
    length = _root(square)
    mean = jax.lax.stop_gradient(jnp.sum(length, axis=1, keepdims=True)) / (block - 1)
    if slope == "square":
        length = jax.lax.stop_gradient(length) + square - jax.lax.stop_gradient(square)
    penalty = jnp.where(length > factor * mean, length, 0.0)
    return penalty.reshape(batch, total).astype(points.dtype)


def _reciprocal(x: Array, scale: Array) -> Array:
    """1 / x, and 0 where x vanishes against `scale`: the directions in which the answer is free get no gradient."""
    solid = jnp.abs(x) > 1e-6 * scale + jnp.finfo(x.dtype).tiny
    return jnp.where(solid, 1 / jnp.where(solid, x, 1.0), 0.0)


@jax.custom_jvp
def _symmetric_eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, largest first, and eigenvectors in columns, with finite gradients where eigenvalues coincide."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[..., ::-1], vectors[..., ::-1]


@_symmetric_eigen.defjvp
def _symmetric_eigen_jvp(primals, tangents):
    values, vectors = _symmetric_eigen(*primals)
    turned = jnp.swapaxes(vectors, -1, -2) @ tangents[0] @ vectors
    turned = (turned + jnp.swapaxes(turned, -1, -2)) / 2
    gap = values[..., None, :] - values[..., :, None]
    scale = jnp.max(jnp.abs(values), axis=-1)[..., None, None]
    change = vectors @ (_reciprocal(gap, scale) * turned)
    return (values, vectors), (jnp.diagonal(turned, axis1=-2, axis2=-1), change)


@jax.jit
def pca_frames(
    points: Float[Array, "*B K D"], *, weights: Float[Array, "*B K"] | None = None
) -> tuple[Float[Array, "*B D D"], Float[Array, "*B D"]]:
    """Principal axes of each group of points, in columns by falling variance, and the variances: (axes, variances).

    Signs: an axis points to the side of the larger third moment, a symmetric one so that its largest entry is positive;
    the last is then turned to make a right-handed frame. `weights` >= 0 serve as masks. The last axis estimates the
    normal. Where variances coincide axes are arbitrary, their gradient finite. O(K D^2 + D^3).
    Source: card polycubenet, Mechanism (axis snapping).
    """
    wide = _blank(points, None if weights is None else weights > 0)
    share = jnp.ones(wide.shape[:-1], wide.dtype) if weights is None else weights.astype(wide.dtype)
    share = share / jnp.maximum(jnp.sum(share, -1, keepdims=True), jnp.finfo(wide.dtype).tiny)
    offset = wide - jnp.sum(wide * share[..., None], -2, keepdims=True)
    covariance = jnp.einsum("...ki,...kj,...k->...ij", offset, offset, share, precision=jax.lax.Precision.HIGHEST)
    variances, axes = _symmetric_eigen(covariance)
    along = jax.lax.stop_gradient(offset @ axes)
    skew = jnp.sum(along**3 * share[..., None], -2)
    spread = jnp.sum(jnp.abs(along) ** 3 * share[..., None], -2)
    largest = jnp.take_along_axis(axes, jnp.argmax(jnp.abs(axes), -2)[..., None, :], axis=-2)[..., 0, :]
    sign = jax.lax.stop_gradient(jnp.where(jnp.abs(skew) > 1e-4 * spread, jnp.sign(skew), jnp.sign(largest)))
    axes = axes * sign[..., None, :]
    hand = jax.lax.stop_gradient(jnp.sign(jnp.linalg.det(axes)))
    last = jnp.arange(axes.shape[-1]) == axes.shape[-1] - 1
    axes = axes * jnp.where(last, hand[..., None], 1.0)[..., None, :]
    return axes.astype(points.dtype), jnp.maximum(variances, 0).astype(points.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _nearest_orthogonal(matrix: Array, reflection: bool) -> Array:
    left, right, _ = _signed_svd(matrix, reflection)
    return left @ jnp.swapaxes(right, -1, -2)


def _signed_svd(matrix: Array, reflection: bool) -> tuple[Array, Array, Array]:
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    right = jnp.swapaxes(right, -1, -2)
    if not reflection:
        hand = jnp.sign(jnp.linalg.det(left) * jnp.linalg.det(right))
        last = jnp.arange(values.shape[-1]) == values.shape[-1] - 1
        flip = jnp.where(last, hand[..., None], 1.0)
        values, right = values * flip, right * flip[..., None, :]
    return left, right, values


@_nearest_orthogonal.defjvp
def _nearest_orthogonal_jvp(reflection, primals, tangents):
    # With M = U S V^T and R = U V^T the singular values enter only as sums s_i + s_j: no trouble where they coincide.
    left, right, values = _signed_svd(primals[0], reflection)
    turned = jnp.swapaxes(left, -1, -2) @ tangents[0] @ right
    sums = values[..., None, :] + values[..., :, None]
    twist = (turned - jnp.swapaxes(turned, -1, -2)) * _reciprocal(sums, values[..., :1, None])
    return left @ jnp.swapaxes(right, -1, -2), left @ twist @ jnp.swapaxes(right, -1, -2)


@partial(jax.jit, static_argnames=("reflection",))
def procrustes_rotation(matrix: Float[Array, "*B D D"], *, reflection: bool = False) -> Float[Array, "*B D D"]:
    """argmax_R tr(R^T M) over rotations (over all orthogonal matrices with `reflection`): U diag(1 .. det) V^T.

    Also the rotation nearest to M. The gradient is exact, and finite (0 along what is free) where R is not unique.
    O(D^3). Source: Umeyama 1991, equation 40; card angle_i2p, Model (pose).
    """
    return _nearest_orthogonal(_wide(matrix), reflection).astype(matrix.dtype)


@partial(jax.jit, static_argnames=("with_scale", "reflection"))
def similarity_alignment(
    source: Float[Array, "*B N D"],
    target: Float[Array, "*B N D"],
    *,
    weights: Float[Array, "*B N"] | None = None,
    with_scale: bool = True,
    reflection: bool = False,
) -> tuple[Float[Array, "*B"], Float[Array, "*B D D"], Float[Array, "*B D"]]:
    """(s, R, t) with the least sum_n w_n |s R x_n + t - y_n|^2: Umeyama's; Kabsch's with `with_scale` False.

    `weights` >= 0 serve as masks; R is a rotation, or may be a reflection with `reflection`. Closed form, gradients
    finite everywhere; without any weight, or with all points in one place, s = 1. PA-MPJPE aligns so. O(N D^2 + D^3).
    Source: Umeyama 1991, equations 34-42; card angle_i2p, Model (pose); card hyperpose, metrics.
    """
    x, y = (_blank(z, None if weights is None else weights > 0) for z in (source, target))
    share = jnp.ones(x.shape[:-1], x.dtype) if weights is None else weights.astype(x.dtype)
    share = share / jnp.maximum(jnp.sum(share, -1, keepdims=True), jnp.finfo(x.dtype).tiny)
    center_x, center_y = (jnp.sum(z * share[..., None], -2) for z in (x, y))
    x, y = x - center_x[..., None, :], y - center_y[..., None, :]
    highest = jax.lax.Precision.HIGHEST
    covariance = jnp.einsum("...ni,...nj,...n->...ij", y, x, share, precision=highest)
    rotation = _nearest_orthogonal(covariance, reflection)
    scale = jnp.ones(x.shape[:-2], x.dtype)
    if with_scale:
        variance = jnp.sum(jnp.sum(jnp.square(x), -1) * share, -1)
        spread = variance > 0
        fitted = jnp.sum(rotation * covariance, (-1, -2)) / jnp.where(spread, variance, 1.0)
        scale = jnp.where(spread, fitted, 1.0)
    moved = jnp.einsum("...ij,...j->...i", rotation, center_x, precision=highest)
    translation = center_y - scale[..., None] * moved
    return tuple(z.astype(source.dtype) for z in (scale, rotation, translation))


@jax.jit
def apply_similarity(
    points: Float[Array, "*B N D"],
    scale: Float[Array, "*B"],
    rotation: Float[Array, "*B D D"],
    translation: Float[Array, "*B D"],
) -> Float[Array, "*B N D"]:
    """y_n = s R x_n + t. Source: Umeyama 1991, equation 33; card angle_i2p, Model (pose)."""
    turned = jnp.einsum("...ij,...nj->...ni", rotation, points, precision=jax.lax.Precision.HIGHEST)
    return (scale[..., None, None] * turned + translation[..., None, :]).astype(points.dtype)
