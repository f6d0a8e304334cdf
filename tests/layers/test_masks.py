"""Every mask against the sentence that defines it, evaluated pair by pair."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.masks import ShiftedMask

LQ, LK = 5, 7
SEGMENTS_Q, SEGMENTS_K = (
    np.array([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]),
    np.array([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1]]),
)
PRESENT = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], bool)
TABLE = np.array([[[[1, 0, 1], [0, 1, 1]]]], bool)

# Query q stands on key q + 2, so that the last query meets the last key.
CASES = {
    "full": (layers.FullMask(), lambda b, q, k: True),
    "causal": (layers.CausalMask(), lambda b, q, k: k <= q + 2),
    "causal after a cache": (layers.CausalMask(offset=3), lambda b, q, k: k <= q + 3),
    "causal after caches": (layers.CausalMask(offset=jnp.array([0, 4])), lambda b, q, k: k <= q + (0, 4)[b]),
    "window": (layers.WindowMask(left=2, right=1), lambda b, q, k: q <= k <= q + 3),
    "open window": (layers.WindowMask(left=1), lambda b, q, k: k >= q + 1),
    "shifted window": (layers.WindowMask(left=0, right=0, offset=1), lambda b, q, k: k == q + 1),
    "prefix": (layers.PrefixMask(4), lambda b, q, k: k < 4 or k <= q + 2),
    "prefix per row": (layers.PrefixMask(jnp.array([1, 4]), 0), lambda b, q, k: k < (1, 4)[b] or k <= q),
    "segments": (
        layers.SegmentMask(jnp.asarray(SEGMENTS_Q), jnp.asarray(SEGMENTS_K)),
        lambda b, q, k: SEGMENTS_Q[b, q] == SEGMENTS_K[b, k],
    ),
    "lengths": (layers.LengthMask(jnp.array([4, 0])), lambda b, q, k: k < (4, 0)[b]),
    "keys": (layers.KeyMask(jnp.asarray(PRESENT)), lambda b, q, k: PRESENT[b, k]),
    "blocks": (layers.BlockMask(jnp.asarray(TABLE), 3, 3), lambda b, q, k: TABLE[0, 0, q // 3, k // 3]),
    "dense": (layers.DenseMask(jnp.asarray(PRESENT)[:, None, None, :]), lambda b, q, k: PRESENT[b, k]),
    "both": (layers.CausalMask() & layers.KeyMask(jnp.asarray(PRESENT)), lambda b, q, k: k <= q + 2 and PRESENT[b, k]),
    "either": (layers.CausalMask(0) | layers.WindowMask(left=0), lambda b, q, k: k <= q or q + 2 <= k),
    "not": (~layers.CausalMask(), lambda b, q, k: k > q + 2),
    # Four keys from the third on: inside, the last of the five queries stands on the last of the four keys.
    "stream": (ShiftedMask(layers.CausalMask(), 2, 4, LK), lambda b, q, k: 2 <= k < 6 and k - 2 <= q - 1),
    "masked stream": (
        ShiftedMask(layers.KeyMask(jnp.asarray(PRESENT[:, :4])), 3, 4, LK),
        lambda b, q, k: k >= 3 and PRESENT[b, k - 3],
    ),
}


def table_of(rule) -> np.ndarray:
    return np.array([[[[bool(rule(b, q, k)) for k in range(LK)] for q in range(LQ)]] for b in range(2)])


@pytest.mark.parametrize("name", CASES)
def test_is_what_its_sentence_says(name):
    mask, rule = CASES[name]
    expected = table_of(rule)
    table = mask.materialize(LQ, LK)
    assert table.dtype == bool
    chex.assert_trees_all_equal(np.broadcast_to(table, expected.shape), expected)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_cut_from_the_whole(name):
    mask, rule = CASES[name]
    whole = table_of(rule)
    places = jnp.array([3, 0, 4]), jnp.array([6, 1, 2, 5])
    some = np.broadcast_to(mask.allows(*places, shift=LK - LQ), (2, 1, 3, 4))
    chex.assert_trees_all_equal(some, whole[:, :, places[0]][:, :, :, places[1]])
    # The start of a block may be traced, its size may not.
    block = jax.jit(lambda q, k: mask.block(q, 3, k, 5, shift=LK - LQ))(1, 2)
    chex.assert_trees_all_equal(np.broadcast_to(block, (2, 1, 3, 5)), whole[:, :, 1:4, 2:7])


@pytest.mark.parametrize("name", CASES)
def test_what_is_known_of_a_block_is_true(name):
    mask, rule = CASES[name]
    whole = table_of(rule)
    for q, nq, k, nk in itertools.product(range(LQ), range(1, LQ), range(LK), range(1, LK)):
        if q + nq <= LQ and k + nk <= LK:
            block = whole[:, :, q : q + nq, k : k + nk]
            known = mask.covers(q, nq, k, nk, shift=LK - LQ)
            assert known is None or (block.all() if known else not block.any())


def test_blocks_that_position_alone_decides_are_known():
    shift = LK - LQ
    assert layers.FullMask().covers(0, 2, 0, 2) is True
    causal, window = layers.CausalMask(), layers.WindowMask(left=1, right=1)
    assert causal.covers(2, 3, 0, 5, shift=shift) is True
    assert causal.covers(2, 3, 0, 6, shift=shift) is None
    assert causal.covers(0, 3, 5, 2, shift=shift) is False
    assert window.covers(4, 1, 0, 5, shift=shift) is False
    assert window.covers(1, 2, 3, 2, shift=shift) is True
    assert (causal & window).covers(0, 3, 5, 2, shift=shift) is False
    assert (causal | layers.FullMask()).covers(0, 3, 5, 2, shift=shift) is True
    assert (causal | window).covers(2, 1, 0, 5, shift=shift) is True
    assert (~causal).covers(2, 3, 0, 5, shift=shift) is False
    assert layers.CausalMask(offset=2).covers(0, 3, 5, 2) is None
    assert ShiftedMask(causal, 2, 4, LK).covers(0, LQ, 0, 2, shift=shift) is False
    assert ShiftedMask(causal, 2, 4, LK).covers(4, 1, 2, 4, shift=shift) is True


def test_is_an_argument_of_a_jitted_function():
    traces = []

    @jax.jit
    def materialize(mask):
        traces.append(mask)
        return mask.materialize(LQ, LK)

    for offset in (0, 2):
        mask = layers.CausalMask(jnp.asarray(offset)) & layers.WindowMask(left=3)
        chex.assert_trees_all_equal(materialize(mask), mask.materialize(LQ, LK))
    assert len(traces) == 1


def test_as_mask_takes_masks_tables_and_none():
    mask = layers.CausalMask()
    assert layers.as_mask(mask) is mask
    assert layers.as_mask(None) is None
    table = jnp.eye(3, dtype=bool)
    chex.assert_trees_all_equal(layers.as_mask(table).materialize(3, 3)[0, 0], table)
