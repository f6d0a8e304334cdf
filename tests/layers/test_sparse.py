"""Sparse attention: choices against sorting by hand, gathered attention against masks, straight-through windows."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import sparse
from layers.masks import CausalMask, WindowMask
from layers.softmax import dot_product_attention

KEYS = jax.random.split(jax.random.key(0), 6)
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def tokens(length, key_length=None, heads=4, key_heads=2, width=3, batch=2):
    key_length = length if key_length is None else key_length
    shapes = (batch, length, heads, width), *[(batch, key_length, key_heads, width)] * 2
    return tuple(jax.random.normal(k, shape) for k, shape in zip(KEYS, shapes, strict=False))


def softmax_by_hand(q, k, v, allowed):
    """Float64 attention under a (B, H, Lq, Lk) table; heads are repeated; rows without keys give 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])) * allowed
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def check_dtypes_vmap_and_eager(run, arguments):
    expected = run(*arguments)
    low = run(*(x.astype(jnp.bfloat16) for x in arguments))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), expected, atol=0.05)
    close(jax.vmap(run)(*(x[:, None] for x in arguments))[:, 0], expected)
    with jax.disable_jit():
        close(run(*arguments), expected)


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_strided_masks_are_those_of_the_sparse_transformer():
    length, c = 11, 4
    mask = CausalMask() & (WindowMask(left=c - 1) | sparse.StridedMask(c))
    expected = [[m <= q and (q - m < c or (q - m) % c == 0) for m in range(length)] for q in range(length)]
    np.testing.assert_array_equal(mask.materialize(length, length)[0, 0], expected)
    # The last three queries of a longer sequence see what they saw in it.
    np.testing.assert_array_equal(mask.materialize(3, length)[0, 0], expected[-3:])
    assert mask.covers(0, 2, 4, 2) is False


def test_types_see_the_types_they_depend_on():
    types = jnp.array([[0, 2, 1, 2], [1, 1, 0, 2]])
    table = jnp.array([[True, False, False], [True, True, False], [False, True, False]])
    mask = sparse.TypeMask(types[:, 1:], types, table).materialize(3, 4)
    for b, q, k in np.ndindex(2, 3, 4):
        assert mask[b, 0, q, k] == table[types[b, q + 1], types[b, k]]
    q, k, v = tokens(4)
    output = dot_product_attention(q, k, v, mask=sparse.TypeMask(types, types, table) & CausalMask())
    assert not np.any(output[0, 1])


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_top_k_is_the_head_of_the_sorted_scores():
    scores = jax.random.normal(KEYS[0], (2, 3, 9)).at[0, 0].set(1.0)
    index, valid = sparse.select_top_k(scores, k=4)
    np.testing.assert_array_equal(index, np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :4])
    assert valid.all()
    present = jnp.arange(9) < jnp.array([2, 9])[:, None, None]
    index, valid = sparse.select_top_k(scores, k=4, present=present, count=jnp.array([[4], [3]]))
    np.testing.assert_array_equal(valid.sum(-1), [[2, 2, 2], [3, 3, 3]])
    assert (index[0][valid[0]] < 2).all()
    index, _ = sparse.select_top_k(scores, k=2, always=jnp.arange(9) == 7)
    assert (index[..., 0] == 7).all()
    assert sparse.select_top_k(scores, k=0)[0].shape == (2, 3, 0)
    assert not np.any(
        jax.grad(lambda s: jnp.sum(jnp.take_along_axis(s * 0, sparse.select_top_k(s, k=2)[0], -1)))(scores)
    )


def top_p_by_hand(weights, p, rule):
    shares = np.asarray(weights, np.float64) / max(np.sum(weights), 1e-300)
    keep, reached = np.zeros(len(shares), bool), 0.0
    for rank, i in enumerate(np.argsort(-shares, kind="stable")):
        before, reached = reached, reached + shares[i]
        keep[i] = rank == 0 or (before if rule == "include_crossing" else reached) <= p
    return keep


@pytest.mark.parametrize("rule", ["include_crossing", "exclude_crossing"])
def test_top_p_is_the_smallest_set_that_reaches_p(rule):
    weights = jax.random.uniform(KEYS[0], (3, 2, 13)) ** 3
    for p in (0.0, 0.3, 0.9, 0.99):
        keep = sparse.select_top_p(weights, p, rule=rule)
        for row in np.ndindex(3, 2):
            np.testing.assert_array_equal(keep[row], top_p_by_hand(weights[row], p, rule))
    assert sparse.select_top_p(weights, 1.0, rule=rule).all()
    assert sparse.select_top_p(jnp.zeros(4), 0.5, rule=rule)[0]
    with pytest.raises(ValueError, match="rule 'half' is not one of"):
        sparse.select_top_p(weights, 0.5, rule="half")


def test_top_fractions_are_per_group():
    scores = jax.random.normal(KEYS[0], (2, 20))
    groups = jax.random.randint(KEYS[1], (2, 20), -1, 3)
    fractions = jnp.array([0.3, 0.0, 1.0])
    always = jnp.arange(20) >= 18
    chosen = sparse.select_top_fraction(scores, groups, fractions, always=jnp.broadcast_to(always, (2, 20)))
    for b in range(2):
        expected = np.asarray(always).copy()
        for g, fraction in enumerate([0.3, 0.0, 1.0]):
            members = np.flatnonzero(groups[b] == g)
            best = members[np.argsort(-np.asarray(scores[b])[members], kind="stable")]
            expected[best[: int(np.ceil(round(fraction * len(members), 6)))]] = True
        np.testing.assert_array_equal(chosen[b], expected)
    # 0.3 of ten are three, though 0.3 in float32 is a little more.
    ten = sparse.select_top_fraction(scores[:1, :10], jnp.zeros((1, 10), jnp.int32), jnp.array([0.3]))
    assert ten.sum() == 3


def test_compacted_tokens_keep_their_order():
    keep = jnp.array([[False, True, True, False, True], [False] * 5])
    index, count = sparse.compact_tokens(keep)
    assert index.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4]]
    assert count.tolist() == [3, 0]


# ---- attention to chosen keys ----------------------------------------------------------------------------------------


def random_choice(rows, count, k):
    rng = np.random.default_rng(0)
    index = np.stack([rng.permutation(count)[:k] for _ in range(int(np.prod(rows)))]).reshape(*rows, k)
    valid = rng.random(index.shape) > 0.3
    valid[0, 0, 0] = False
    table = np.zeros((*rows, count), bool)
    np.put_along_axis(table, index, valid, axis=-1)
    return jnp.asarray(index), jnp.asarray(valid), table


@pytest.mark.parametrize("implementation", ["reference", "gather"])
def test_gathered_keys_are_all_that_a_query_sees(implementation):
    q, k, v = tokens(5, 9)
    index, valid, table = random_choice((2, 4, 5), 9, 4)
    output = sparse.sparse_gather_attention(q, k, v, index, valid, implementation=implementation)
    close(output, softmax_by_hand(q, k, v, table))
    assert not np.any(output[0, 0, 0])


def test_gathering_everything_is_dense_attention():
    q, k, v = tokens(1, 9)
    index = jnp.broadcast_to(jnp.arange(9)[::-1], (2, 4, 1, 9))
    close(sparse.sparse_gather_attention(q, k, v, index), softmax_by_hand(q, k, v, 1.0))


def block_case():
    """Lengths that are no multiples of the blocks."""
    index, valid, table = random_choice((2, 4, 4), 5, 3)
    allowed = np.repeat(np.repeat(table, 3, axis=2)[:, :, :11], 4, axis=3)[..., :18]
    return tokens(11, 18), index, valid, allowed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "gather", "masked"])
def test_chosen_blocks_are_all_that_a_block_sees(implementation, causal):
    (q, k, v), index, valid, allowed = block_case()
    present = jax.random.uniform(KEYS[4], (2, 18)) > 0.3
    output = sparse.block_sparse_attention(
        q, k, v, index, valid, query_block=3, key_block=4, causal=causal, token_mask=present,
        implementation=implementation,
    )  # fmt: skip
    allowed = allowed & np.asarray(present)[:, None, None]
    if causal:
        allowed = allowed & (np.arange(18) <= np.arange(11)[:, None] + 7)
    close(output, softmax_by_hand(q, k, v, allowed))


def test_gradients_of_gathered_attention():
    (q, k, v), index, valid, _ = block_case()
    tokens_chosen = random_choice((2, 4, 11), 18, 4)[:2]

    def loss(q, k, v, implementation):
        blocks = sparse.block_sparse_attention(
            q, k, v, index, valid, query_block=3, key_block=4, implementation=implementation
        )
        few = sparse.sparse_gather_attention(q, k, v, *tokens_chosen, implementation=implementation)
        return jnp.sum(jnp.sin(blocks) + jnp.cos(few))

    gradients = [jax.grad(loss, (0, 1, 2))(q, k, v, name) for name in ("reference", "gather")]
    close(*gradients)
    chex.assert_tree_all_finite(gradients)


def test_gathered_attention_in_bfloat16_vmap_and_eager():
    arguments, index, valid, _ = block_case()
    chosen, kept, _ = random_choice((2, 4, 11), 18, 4)

    def run(q, k, v):
        rows = slice(0, q.shape[0])
        options = {"query_block": 3, "key_block": 4, "implementation": "gather"}
        blocks = sparse.block_sparse_attention(q, k, v, index[rows], valid[rows], **options)
        return blocks + sparse.sparse_gather_attention(q, k, v, chosen[rows], kept[rows])

    first = tuple(x[:1] for x in arguments)
    check_dtypes_vmap_and_eager(run, first)


def test_block_means_skip_what_is_absent():
    x = jax.random.normal(KEYS[0], (2, 11, 2, 3))
    present = (jax.random.uniform(KEYS[1], (2, 11)) > 0.4).at[0, 4:8].set(False)
    pooled = sparse.pool_blocks(x, block_size=4, token_mask=present)
    for b, block in np.ndindex(2, 3):
        here = np.flatnonzero(present[b, block * 4 : block * 4 + 4]) + block * 4
        expected = np.asarray(x[b])[here].mean(0) if len(here) else np.zeros((2, 3))
        close(pooled[b, block], expected)
    close(sparse.pool_blocks(x[:, :8], block_size=8)[:, 0], x[:, :8].mean(1))


@pytest.mark.parametrize("implementation", ["reference", "gather"])
@pytest.mark.parametrize("padded", [False, True])
def test_compressed_attention_and_the_blocks_it_selects(implementation, padded):
    q, k, v = tokens(11, key_heads=4)
    present = np.ones((2, 11), bool)
    if padded:
        present[0, 6:] = False
        present[1, 2] = False
    compressed, selected = sparse.compressed_block_attention(
        q, k, v, block_size=4, num_selected=2, token_mask=jnp.asarray(present) if padded else None,
        implementation=implementation,
    )  # fmt: skip
    means = np.zeros((3, 2, 3, 4, 3))
    filled = np.zeros((2, 3), bool)
    for b, block in np.ndindex(2, 3):
        here = np.flatnonzero(present[b, block * 4 : block * 4 + 4]) + block * 4
        filled[b, block] = len(here) > 0
        for i, x in enumerate((q, k, v)):
            means[i, b, block] = np.asarray(x)[b, here].mean(0) if len(here) else 0
    coarse = softmax_by_hand(*means, filled[:, None, None])
    close(compressed, np.repeat(coarse, 4, axis=1)[:, :11])
    scores = np.where(filled[:, None, None], np.einsum("bqhd,bkhd->bhqk", means[0], means[1]), -np.inf)
    best = np.argsort(-scores, axis=-1)[..., :2]
    table = np.zeros(scores.shape, bool)
    np.put_along_axis(table, best, True, axis=-1)
    allowed = np.repeat(np.repeat(table, 4, axis=2), 4, axis=3)[:, :, :11, :11] & present[:, None, None]
    close(selected, softmax_by_hand(q, k, v, allowed))


def test_selecting_all_blocks_is_dense_and_one_block_is_the_mean():
    q, k, v = tokens(10, key_heads=4)
    close(sparse.compressed_block_attention(q, k, v, block_size=4, num_selected=3)[1], softmax_by_hand(q, k, v, 1.0))
    compressed, _ = sparse.compressed_block_attention(q, k, v, block_size=10, num_selected=1)
    close(compressed, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape))


# ---- which tokens matter ---------------------------------------------------------------------------------------------


def received_by_hand(q, k, last, lengths):
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    total = np.zeros(q.shape[:2])
    for b, length in enumerate(lengths):
        for h in range(q.shape[2]):
            for i in range(max(length - last, 0), length):
                weights = np.exp(k[b, : i + 1, h // 2] @ q[b, i, h] / np.sqrt(q.shape[-1]))
                total[b, : i + 1] += weights / weights.sum()
    return total


@pytest.mark.parametrize("last", [None, 4, 30])
def test_attention_received_is_a_column_sum_of_the_last_rows(last):
    q, k, _ = tokens(13)
    lengths = [13, 3]
    rows = 13 if last is None else last
    close(sparse.attention_received(q, k, last=last, lengths=jnp.array(lengths)), received_by_hand(q, k, rows, lengths))
    close(sparse.attention_received(q, k, last=last), received_by_hand(q, k, rows, [13, 13]))
    gradient = jax.grad(lambda q: jnp.sum(sparse.attention_received(q, k, lengths=jnp.array(lengths)) ** 2))(q)
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("rule", ["include_crossing", "exclude_crossing"])
@pytest.mark.parametrize("level", ["token", "block"])
def test_top_p_blocks_with_sinks_and_tail(rule, level):
    # Both equal the official masks of the uniprefill golden cases (checked when this was written).
    size, sink, tail, p = 4, 3, 5, 0.6
    lengths = [27, 30, 4]
    scores = jax.random.uniform(KEYS[0], (3, 30)) ** 4
    keep = sparse.block_top_p_mask(
        scores, p, block_size=size, sink=sink, tail=tail, lengths=jnp.array(lengths), rule=rule, level=level
    )
    for b, length in enumerate(lengths):
        count = -(-length // size)
        sums = [np.asarray(scores[b, i * size : min(i * size + size, length)], np.float64).sum() for i in range(count)]
        blocks = top_p_by_hand(sums, p, rule)
        expected = np.zeros(30, bool)
        for j in range(length):
            if level == "token":
                always = j < sink or j >= length - tail
            else:
                always = j // size < -(-sink // size) or j // size >= count - -(-tail // size)
            expected[j] = blocks[j // size] or always
        np.testing.assert_array_equal(keep[b], expected)
    everything = sparse.block_top_p_mask(scores, 1.0, block_size=size, lengths=jnp.array(lengths), rule=rule)
    np.testing.assert_array_equal(everything.sum(1), lengths)
    with pytest.raises(ValueError, match="level 'row' is not one of token, block"):
        sparse.block_top_p_mask(scores, p, block_size=size, level="row")


def test_heavy_hitters_weigh_attention_and_deviation():
    _, k, v = tokens(7)
    old_k, old_v = k + 0.1, v.at[0, 3].add(2.0)
    deviation = sparse.cache_deviation(k, v, old_k, old_v)
    expected = np.full((2, 7), 0.1 * 6)
    expected[0, 3] += 2.0 * 6
    close(deviation, expected)
    received = jax.random.uniform(KEYS[0], (2, 7))
    candidates = jnp.arange(7) < jnp.array([7, 4])[:, None]
    scores = sparse.heavy_hitter_scores(received, deviation, candidates, balance=0.25)
    for b, count in enumerate((7, 4)):
        a, d = np.asarray(received[b, :count]), np.asarray(deviation[b, :count])
        close(scores[b, :count], 0.75 * a / a.mean() + 0.25 * d / d.mean())
        assert not np.any(scores[b, count:])
    assert not np.any(sparse.heavy_hitter_scores(received * 0, deviation * 0, candidates))


# ---- whole windows ---------------------------------------------------------------------------------------------------


def windows():
    q, k, v = (jax.random.normal(key, (2, 5, 4, 2, 3)) for key in KEYS[:3])
    return q, k, v, jax.random.normal(KEYS[3], (2, 5)), jax.random.normal(KEYS[4], (2, 4, 4))


@pytest.mark.parametrize("implementation", ["reference", "gather"])
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_only_the_best_windows_attend(implementation, kept):
    q, k, v, scores, bias = windows()
    output, gate = sparse.top_window_attention(q, k, v, scores, num_kept=kept, bias=bias, implementation=implementation)
    for b in range(2):
        best = set(np.argsort(-np.asarray(scores[b]))[:kept].tolist())
        for w in range(5):
            assert gate[b, w] == pytest.approx(float(w in best), abs=1e-6)
            if w in best:
                logits = np.einsum("qhd,khd->hqk", q[b, w], k[b, w]) / np.sqrt(3) + np.asarray(bias)
                weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
                close(output[b, w], np.einsum("hqk,khd->qhd", weights, v[b, w]))
            else:
                assert not np.any(output[b, w])


def test_the_gate_passes_gradients_straight_through():
    q, k, v, scores, _ = windows()

    def loss(q, scores, implementation=None):
        output, gate = sparse.top_window_attention(q, k, v, scores, num_kept=2, implementation=implementation)
        return jnp.sum(jnp.sin(output)) + jnp.sum(gate * jnp.arange(5.0))

    for_queries, for_scores = jax.grad(loss, (0, 1))(q, scores)
    slope = jax.nn.sigmoid(scores) * (1 - jax.nn.sigmoid(scores))
    close(for_scores, slope * jnp.arange(5.0))
    close(for_queries, jax.grad(partial(loss, implementation="reference"))(q, scores))
    check_dtypes_vmap_and_eager(lambda *x: sparse.top_window_attention(*x, num_kept=2)[0], (q, k, v, scores))


def test_few_blocks_are_gathered_and_many_masked():
    q, k, v = tokens(8, 64)
    for chosen, gathered in ((2, True), (9, False)):
        index = jnp.broadcast_to(jnp.arange(chosen), (2, 4, 2, chosen))
        run = partial(sparse.block_sparse_attention, query_block=4, key_block=4)
        program = str(jax.make_jaxpr(partial(run, q, k, v))(index))
        # The masked form has a score for every query and key.
        assert ("f32[2,4,8,64]" in program) != gathered
        close(run(q, k, v, index), run(q, k, v, index, implementation="reference"))


def test_errors_name_the_argument():
    (q, k, v), index, valid, _ = block_case()
    with pytest.raises(ValueError, match="k 4 is not in"):
        sparse.select_top_k(jnp.zeros(3), k=4)
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, gather"):
        sparse.sparse_gather_attention(q[:, :4], k, v, index, implementation="fast")
    with pytest.raises(ValueError, match="index for 4 query blocks is not one for 2"):
        sparse.block_sparse_attention(q, k, v, index, valid, query_block=6, key_block=4)
    with pytest.raises(ValueError, match="num_kept 6 is not in"):
        sparse.top_window_attention(*windows()[:4], num_kept=6)
