"""Biases of attention logits from where query and key stand: offsets, windows, hops on graphs, distances, spectra.

Every bias has the shape (..., H, Lq, Lk) that `dot_product_attention` adds to its logits.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from layers.spectral import nonuniform_fourier_sum, nonuniform_fourier_values

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "clipped_relative_bias",
    "distance_bias",
    "gaussian_spectrum",
    "hop_band_weights",
    "laplace_spectrum",
    "lookup_bias",
    "radial_basis",
    "radial_basis_bias",
    "relative_position_bias",
    "relative_position_index",
    "skewed_relative_logits",
    "spectral_linear_attention",
    "t5_relative_bias",
    "t5_relative_buckets",
    "tree_hops",
    "tree_relations",
    "walk_reachability",
]


@jax.jit
def lookup_bias(table: Float[Array, "K H"], index: Int[Array, "*batch Lq Lk"]) -> Float[Array, "*batch H Lq Lk"]:
    """b[h, i, j] = table[index[i, j], h]: one learned number per head and class of pair.

    Source: arXiv:2106.05234, equation 6 (Graphormer); card atomic_motion, Kinematic Attention.
    """
    return jnp.moveaxis(table[index], -1, -3)


@partial(jax.jit, static_argnames=("bidirectional", "num_buckets", "max_distance"))
def t5_relative_buckets(
    offset: Int[Array, "*shape"], *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "*shape"]:
    """Bucket of an offset = key - query position: one each for near offsets, logarithmic ones up to `max_distance`.

    `bidirectional` keeps half of the buckets for keys after the query; otherwise those share bucket 0 with the query's
    own. All offsets beyond `max_distance` share the last bucket. Source: arXiv:1910.10683, section 2.1, official code.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"t5_relative_buckets: num_buckets {num_buckets} and max_distance {max_distance} leave no far bucket"
        )
    # A table, in the float32 arithmetic of the published models: a logarithm on the device may round differently.
    distances = np.arange(max_distance + 1)
    logs = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (logs * np.float32(side - exact)).astype(np.int32), side - 1)
    table = jnp.asarray(np.where(distances < exact, distances, far))
    distance = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    bucket = table[jnp.minimum(distance, max_distance)]
    return bucket + side * (offset > 0) if bidirectional else bucket


@partial(jax.jit, static_argnames=("bidirectional", "max_distance"))
def t5_relative_bias(
    table: Float[Array, "K H"],
    query_positions: Int[Array, "*batch Lq"],
    key_positions: Int[Array, "*batch Lk"],
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> Float[Array, "*batch H Lq Lk"]:
    """b[h, i, j] = table[bucket(key_j - query_i), h]; the table's K rows are the buckets.

    T5 has no 1/sqrt(D) in its attention: give it `scale=1`. Source: arXiv:1910.10683, section 2.1.
    """
    buckets = t5_relative_buckets(
        _offsets(query_positions, key_positions), bidirectional=bidirectional, num_buckets=table.shape[0],
        max_distance=max_distance,
    )  # fmt: skip
    return lookup_bias(table, buckets)


def _offsets(query_positions, key_positions):
    return key_positions[..., None, :] - query_positions[..., :, None]


@jax.jit
def clipped_relative_bias(
    table: Float[Array, "K H"], query_positions: Int[Array, "*batch Lq"], key_positions: Int[Array, "*batch Lk"]
) -> Float[Array, "*batch H Lq Lk"]:
    """b[h, i, j] = table[clip(key_j - query_i, -R, R) + R, h], K = 2 R + 1.

    Source: arXiv:1803.02155, section 3.2; cards atomic_motion, cubridge (which counts query - key: flip its table).
    """
    reach = table.shape[0] // 2
    if table.shape[0] % 2 == 0:
        raise ValueError(f"clipped_relative_bias: table of {table.shape[0]} rows is not one of 2 R + 1")
    return lookup_bias(table, jnp.clip(_offsets(query_positions, key_positions), -reach, reach) + reach)


def relative_position_index(shape: tuple[int, ...]) -> Int[np.ndarray, "N N"]:
    """index[i, j] = row of a table over offsets query_i - key_j of cells of a window of any number of dimensions.

    Offsets run from -(s - 1) to s - 1 along an axis of size s and are flattened row-major, as cells are: prod(2 s - 1)
    rows, in Swin's order. Source: arXiv:2103.14030, equation 4; card stepwise_breast.
    """
    cells = np.stack(np.meshgrid(*(np.arange(s) for s in shape), indexing="ij"), axis=-1).reshape(-1, len(shape))
    offsets = cells[:, None] - cells[None] + np.asarray(shape) - 1
    return np.ravel_multi_index(np.moveaxis(offsets, -1, 0), [2 * s - 1 for s in shape])


@partial(jax.jit, static_argnames=("shape",))
def relative_position_bias(table: Float[Array, "K H"], *, shape: tuple[int, ...]) -> Float[Array, "1 H N N"]:
    """The learned bias of a window of N = prod(shape) cells from a table of K = prod(2 s - 1) offsets.

    For a smaller window, MONAI's Swin takes the corner [..., :n, :n] of the full window's bias, which is not the bias
    of those offsets unless only the first axis shrank. Source: arXiv:2103.14030, equation 4; cards stepwise_breast,
    mambarain.
    """
    rows = math.prod(2 * s - 1 for s in shape)
    if table.shape[0] != rows:
        raise ValueError(f"relative_position_bias: table of {table.shape[0]} rows is not {rows}, of a window {shape}")
    return lookup_bias(table, jnp.asarray(relative_position_index(shape)))[None]


@partial(jax.jit, static_argnames=("causal", "implementation"))
def skewed_relative_logits(
    query: Float[Array, "B L H D"],
    embedding: Float[Array, "K H D"],
    *,
    causal: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B H L L"]:
    """S[l, m] = q_l . E[m - l], the content-to-offset logits of Shaw's attention; add to q k^T before scaling.

    The last row of E is offset 0 if `causal` (K >= L rows, S = 0 above the diagonal), its middle row otherwise
    (K >= 2 L - 1, odd); offsets that do not occur are ignored. implementation: "reference" gathers an (L, L, H, D)
    table; "skew" (the default) multiplies by E once and shears the product by a reshape, O(L D) beside the logits.
    Source: arXiv:1809.04281, section 3.4; card musical_attention, Mechanism.
    """
    if implementation not in (None, "reference", "skew"):
        raise ValueError(f"skewed_relative_logits: implementation {implementation!r} is not one of reference, skew")
    batch, length, num_heads, _ = query.shape
    rows = embedding.shape[0]
    if rows < (length if causal else 2 * length - 1) or not (causal or rows % 2):
        needed = f"at least {length}" if causal else f"an odd number of at least {2 * length - 1}"
        raise ValueError(f"skewed_relative_logits: embedding of {rows} rows is not {needed}")
    zero = rows - 1 if causal else rows // 2
    if causal:
        used = jnp.pad(embedding[zero - length + 1 :], ((0, length - 1), (0, 0), (0, 0)))
    else:
        used = embedding[zero - length + 1 : zero + length]
    if implementation == "reference":
        where = jnp.arange(length)
        return jnp.einsum("blhd,lmhd->bhlm", query, used[_offsets(where, where) + length - 1])
    sheared = jnp.einsum("blhd,khd->bhlk", query, used)
    # Row l starts at column L-1-l: padding by one column makes rows of 2L-1 in the flat array slip by one each.
    sheared = jnp.pad(sheared, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(batch, num_heads, -1)
    sheared = sheared[..., length - 1 : length - 1 + length * (2 * length - 1)]
    return sheared.reshape(batch, num_heads, length, 2 * length - 1)[..., :length]


def alibi_slopes(num_heads: int) -> Float[Array, " H"]:
    """2^(-8 h / H), h = 1..H, for H a power of two; else those of the next lower power and every other of the next.

    Source: arXiv:2108.12409, section 3, official code for other head counts.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads {num_heads} is not positive")
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-4 * h / power) for h in range(1, 2 * (num_heads - power), 2)]
    return jnp.asarray(slopes, jnp.float32)


@jax.jit
def alibi_bias(
    slopes: Float[Array, " H"], query_positions: Real[Array, "*batch Lq"], key_positions: Real[Array, "*batch Lk"]
) -> Float[Array, "*batch H Lq Lk"]:
    """b[h, i, j] = -slope_h |key_j - query_i|: farther keys count less. Mask the future separately.

    Source: arXiv:2108.12409, section 3 (both sides for encoders).
    """
    distance = jnp.abs(_offsets(query_positions, key_positions))[..., None, :, :].astype(jnp.float32)
    return -slopes.astype(jnp.float32)[:, None, None] * distance


@partial(jax.jit, static_argnames=("max_length",))
def walk_reachability(adjacency: Bool[Array, "*batch N N"], *, max_length: int) -> Bool[Array, "*batch K N N"]:
    """[(A^k)_ij > 0 and i != j] for k = 1..K: is there a walk of exactly k edges, edges taken again allowed.

    A weighted sum over k is hyperpose's topology bias. O(K N^3). Source: card hyperpose, HKPSA 4.
    """
    step = adjacency.astype(jnp.float32)
    walks, tables = adjacency, []
    for length in range(max_length):
        if length:
            walks = walks.astype(jnp.float32) @ step > 0
        tables.append(walks & ~jnp.eye(adjacency.shape[-1], dtype=bool))
    return jnp.stack(tables, axis=-3)


@partial(jax.jit, static_argnames=("num_levels",))
def hop_band_weights(
    adjacency: Bool[Array, "*batch N N"], *, num_levels: int, decay: Float[Array, ""] | float = 0.5
) -> Float[Array, "*batch N N"]:
    """decay^(l-1) for pairs first reached at level l = 1..num_levels, where level l reaches 2^(l-1) hops, else 0.

    Bands 1, 2, 3-4, 5-8 hops ... of an undirected graph; 0 on the diagonal. r_dmesh biases its logits by log(this +
    1e-9). O(num_levels N^3). Source: card r_dmesh, Mechanism 3.
    """
    diagonal = jnp.eye(adjacency.shape[-1], dtype=bool)
    covered = adjacency & ~diagonal
    weights = covered.astype(jnp.float32)
    for level in range(1, num_levels):
        wide = covered.astype(jnp.float32)
        wider = (covered | (wide @ wide > 0)) & ~diagonal
        weights = weights + decay**level * (wider & ~covered)
        covered = wider
    return weights


def _ancestors(parents: tuple[int, ...]) -> list[list[int]]:
    """Each node's path to its root, itself first."""
    paths = []
    for node in range(len(parents)):
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
            if len(path) > len(parents):
                raise ValueError(f"tree_hops: parents {parents} is not a tree, node {node} has no root")
        paths.append(path)
    return paths


def tree_hops(parents: tuple[int, ...]) -> Int[np.ndarray, "N N"]:
    """Number of edges between two nodes of a tree given by each node's parent (-1 for a root).

    Nodes of different trees are N apart. Source: card atomic_motion, Kinematic Attention.
    """
    paths = _ancestors(parents)
    hops = np.full((len(parents), len(parents)), len(parents), np.int32)
    for i, up in enumerate(paths):
        for j, down in enumerate(paths):
            meeting = next((node for node in up if node in down), None)
            if meeting is not None:
                hops[i, j] = up.index(meeting) + down.index(meeting)
    return hops


def tree_relations(parents: tuple[int, ...], *, groups: tuple[int, ...] | None = None) -> Int[np.ndarray, "N N"]:
    """What j is to i, as an index: self, parent, child, ancestor, descendant, sibling, same group, other (0..7).

    The first that holds; `groups` is a label per node (clusters of joints). For `lookup_bias`. Source: card
    atomic_motion, Kinematic Attention.
    """
    paths = _ancestors(parents)
    relations = np.empty((len(parents), len(parents)), np.int32)
    for i in range(len(parents)):
        for j in range(len(parents)):
            holds = (
                i == j,
                parents[i] == j,
                parents[j] == i,
                j in paths[i],
                i in paths[j],
                parents[i] == parents[j] >= 0,
                groups is not None and groups[i] == groups[j],
                True,
            )
            relations[i, j] = holds.index(True)
    return relations


@partial(jax.jit, static_argnames=("epsilon",))
def radial_basis(
    distance: Float[Array, "*shape"],
    centers: Float[Array, " R"],
    widths: Float[Array, " R"],
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*shape R"]:
    """g_r(x) = exp(-(x - mu_r)^2 / (|sigma_r| + epsilon)^2), without a factor 2. Float32 inside.

    `epsilon` is in the units of x. Source: card gelgt, Mechanism 4.
    """
    scaled = (distance.astype(jnp.float32)[..., None] - centers) / (jnp.abs(widths) + epsilon)
    return jnp.exp(-jnp.square(scaled)).astype(distance.dtype)


@partial(jax.jit, static_argnames=("epsilon",))
def radial_basis_bias(
    query_positions: Float[Array, "*batch Lq"],
    key_positions: Float[Array, "*batch Lk"],
    centers: Float[Array, " R"],
    widths: Float[Array, " R"],
    weights: Float[Array, "R H"],
    offset: Float[Array, " H"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*batch H Lq Lk"]:
    """b[h, i, j] = sum_r W[r, h] g_r(|t_i - t_j|) + c_h: a learned curve of time lag or distance for every head.

    Positions of both sides share a unit (gelgt: days). O(Lq Lk R) memory. Source: card gelgt, Mechanism 4.
    """
    distance = jnp.abs(_offsets(query_positions, key_positions))
    bias = jnp.einsum("...qkr,rh->...hqk", radial_basis(distance, centers, widths, epsilon=epsilon), weights)
    return bias if offset is None else bias + offset[:, None, None]


@partial(jax.jit, static_argnames=("epsilon",))
def distance_bias(
    query_points: Float[Array, "*batch Lq P"],
    key_points: Float[Array, "*batch Lk P"],
    strength: Float[Array, " H"],
    *,
    length_scale: Float[Array, ""] | float = 1.0,
    overlap: Float[Array, "*batch Lq Lk"] | None = None,
    overlap_strength: Float[Array, " H"] | None = None,
    epsilon: float = 1e-3,
) -> Float[Array, "*batch H Lq Lk"]:
    """b[h, i, j] = -strength_h |p_i - p_j|^2 / (2 length_scale^2) + overlap_strength_h log(overlap_ij + epsilon).

    The overlap term (share of region j inside region i) is left out without `overlap`; its strength is 1 by default.
    Source: card geovista, Geography-aware bias (strength = softplus(gamma)).
    """
    offsets = query_points[..., :, None, :].astype(jnp.float32) - key_points[..., None, :, :].astype(jnp.float32)
    squared = jnp.sum(jnp.square(offsets / length_scale), axis=-1)[..., None, :, :]
    bias = -strength.astype(jnp.float32)[:, None, None] * squared / 2
    if overlap is not None:
        logs = jnp.log(overlap.astype(jnp.float32) + epsilon)[..., None, :, :]
        bias = bias + (logs if overlap_strength is None else overlap_strength[:, None, None] * logs)
    return bias.astype(query_points.dtype)


def _squared_frequency(modes: int, dims: int, period: float) -> np.ndarray:
    axis = np.arange(-(modes // 2), modes - modes // 2) / period
    return sum(np.square(a) for a in np.meshgrid(*[axis] * dims, indexing="ij"))


@partial(jax.jit, static_argnames=("modes", "dims", "period"))
def gaussian_spectrum(
    amplitudes: Float[Array, "H R"], widths: Float[Array, "H R"], *, modes: int, dims: int, period: float
) -> Float[Array, "H *lattice"]:
    """Weights on the lattice n / period that make sum_r a_r exp(-|x|^2 / (2 sigma_r^2)) of offsets x.

    tau(xi) period^-dims with tau = sum_r a_r (2 pi sigma_r^2)^(dims/2) exp(-2 pi^2 sigma_r^2 |xi|^2); n runs over
    -modes/2 .. modes/2 - 1 along each axis. Source: card relflexformer, Mechanism 2-3.
    """
    squared = jnp.asarray(_squared_frequency(modes, dims, period), jnp.float32)[..., None]
    shape = (widths.shape[0], *(1,) * dims, widths.shape[1])
    amplitudes, variances = amplitudes.reshape(shape), jnp.square(widths).reshape(shape)
    waves = amplitudes * (2 * math.pi * variances) ** (dims / 2) * jnp.exp(-2 * math.pi**2 * variances * squared)
    return jnp.sum(waves, axis=-1) / period**dims


@partial(jax.jit, static_argnames=("modes", "period"))
def laplace_spectrum(lengths: Float[Array, " H"], *, modes: int, period: float) -> Float[Array, "H M M M"]:
    """Weights that make exp(-|x| / l) of offsets x in three dimensions: 8 pi l^3 / (1 + 4 pi^2 l^2 |xi|^2)^2 period^-3.

    Source: card relflexformer, Mechanism 2-3.
    """
    squared = jnp.asarray(_squared_frequency(modes, 3, period), jnp.float32)
    length = lengths[:, None, None, None]
    spectrum = 8 * math.pi * length**3 / jnp.square(1 + 4 * math.pi**2 * jnp.square(length) * squared)
    return spectrum / period**3


@partial(jax.jit, static_argnames=("period", "normalize", "epsilon", "width", "implementation"))
def spectral_linear_attention(
    query_features: Float[Array, "B Lq H M"],
    key_features: Float[Array, "B Lk H M"],
    value: Float[Array, "B Lk H V"],
    query_points: Float[Array, "B Lq P"],
    key_points: Float[Array, "B Lk P"],
    spectrum: Float[Array, "H *lattice"],
    *,
    period: float,
    token_mask: Bool[Array, "B Lk"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-6,
    width: int = 6,
    implementation: str | None = None,
) -> Float[Array, "B Lq H V"]:
    """o_i = sum_j A_ij v_j / (sum_j A_ij + epsilon), A_ij = f(r_i - r_j) phi(q_i).phi(k_j).

    Linear attention (give it `favor_features` or the like) whose kernel is multiplied by a function of the offset in
    P dimensions, f(x) = Re sum_n c_n e^(2 pi i n.x / T), known by real weights c_n on a lattice of P axes of one size
    (`gaussian_spectrum`). f is periodic: `period` T should be twice the extent of the points. No Lq x Lk table. No
    gradient flows to points. `token_mask` (True = present) leaves keys out; a query without any gives 0.

    implementation: "reference" writes the table out; "direct" sums over the lattice, O((Lq + Lk) M V N); "gridding"
    uses fast transforms, O(M V ((Lq + Lk) width^P + N log N)), to a relative error of about 10^(1 - width). None takes
    "direct" on small lattices (N <= 216), "gridding" beyond. Source: card relflexformer, Mechanism 3-6.
    """
    if implementation not in (None, "reference", "direct", "gridding"):
        raise ValueError(
            f"spectral_linear_attention: implementation {implementation!r} is not one of reference, direct, gridding"
        )
    modes, dims = spectrum.shape[1], spectrum.ndim - 1
    if dims != query_points.shape[-1] or set(spectrum.shape[1:]) != {modes}:
        raise ValueError(
            f"spectral_linear_attention: spectrum of shape {spectrum.shape} is not heads and {query_points.shape[-1]} "
            "axes of one size"
        )
    if implementation is None:
        implementation = "direct" if modes**dims <= 216 else "gridding"
    dtype = value.dtype
    phi_q, phi_k, value = (x.astype(jnp.float32) for x in (query_features, key_features, value))
    if token_mask is not None:
        phi_k = jnp.where(token_mask[:, :, None, None], phi_k, 0.0)
        value = jnp.where(token_mask[:, :, None, None], value, 0.0)
    # A column of ones beside the values makes the denominator one more output.
    wide = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    spectrum = spectrum.astype(jnp.float32)
    query_points, key_points = (jax.lax.stop_gradient(p.astype(jnp.float32)) for p in (query_points, key_points))
    if implementation == "reference":
        sums = _dense_spectral_sums(phi_q, phi_k, wide, query_points, key_points, spectrum, period)
    else:
        sums = _spectral_sums(phi_q, phi_k, wide, query_points, key_points, spectrum, period, width, implementation)
    if not normalize:
        return sums[..., :-1].astype(dtype)
    return (sums[..., :-1] / (sums[..., -1:] + epsilon)).astype(dtype)


def _dense_spectral_sums(phi_q, phi_k, wide, query_points, key_points, spectrum, period):
    offsets = query_points[:, :, None] - key_points[:, None]
    waves = nonuniform_fourier_values(spectrum.astype(jnp.complex64)[None], offsets.reshape(1, -1, offsets.shape[-1]),
                                      period=period, implementation="direct")  # fmt: skip
    modulation = jnp.real(waves).reshape(spectrum.shape[0], *offsets.shape[:-1])
    scores = jnp.einsum("bqhm,bkhm->hbqk", phi_q, phi_k) * modulation
    return jnp.einsum("hbqk,bkhv->bqhv", scores, wide)


def _spectral_sums(phi_q, phi_k, wide, query_points, key_points, spectrum, period, width, implementation):
    modes = spectrum.shape[1]
    batch, num_queries, num_heads, _ = phi_q.shape
    options = {"period": period, "width": width, "implementation": implementation}

    # One feature at a time, recomputed in the backward pass: memory does not grow with the number of features.
    @jax.checkpoint
    def add_feature(total, features):
        of_queries, of_keys = features
        carried = of_keys[..., None] * wide
        rows = jnp.moveaxis(carried, 1, -1).reshape(batch, -1, carried.shape[1])
        transform = nonuniform_fourier_sum(rows, key_points, modes=modes, **options)
        transform = transform.reshape(batch, num_heads, -1, *spectrum.shape[1:]) * spectrum[:, None]
        back = nonuniform_fourier_values(transform.reshape(batch, -1, *spectrum.shape[1:]), query_points, **options)
        back = jnp.real(back).reshape(batch, num_heads, -1, num_queries)
        return total + jnp.einsum("bqh,bhvq->bqhv", of_queries, back), None

    start = jnp.zeros((batch, num_queries, num_heads, wide.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add_feature, start, (jnp.moveaxis(phi_q, -1, 0), jnp.moveaxis(phi_k, -1, 0)))
    return total
