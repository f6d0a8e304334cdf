"""Every mask against the sentence that defines it, evaluated pair by pair."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

LQ, LK = 5, 7
SEGMENTS_Q, SEGMENTS_K = (
    np.array([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]),
    np.array([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1]]),
)
PRESENT = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], bool)
TABLE = np.array([[[[1, 0, 1], [0, 1, 1]]]], bool)

CASES = {
    "full": (layers.FullMask(), lambda b, q, k: True),
    "causal": (layers.CausalMask(), lambda b, q, k: k <= q),
    "causal after a cache": (layers.CausalMask(offset=2), lambda b, q, k: k <= q + 2),
    "window": (layers.WindowMask(left=2, right=1), lambda b, q, k: q - 2 <= k <= q + 1),
    "open window": (layers.WindowMask(left=1), lambda b, q, k: k >= q - 1),
    "shifted window": (layers.WindowMask(left=0, right=0, offset=2), lambda b, q, k: k == q + 2),
    "prefix": (layers.PrefixMask(3), lambda b, q, k: k < 3 or k <= q),
    "prefix per row": (layers.PrefixMask(jnp.array([1, 4])), lambda b, q, k: k < (1, 4)[b] or k <= q),
    "segments": (
        layers.SegmentMask(jnp.asarray(SEGMENTS_Q), jnp.asarray(SEGMENTS_K)),
        lambda b, q, k: SEGMENTS_Q[b, q] == SEGMENTS_K[b, k],
    ),
    "lengths": (layers.LengthMask(jnp.array([4, 0])), lambda b, q, k: k < (4, 0)[b]),
    "keys": (layers.KeyMask(jnp.asarray(PRESENT)), lambda b, q, k: PRESENT[b, k]),
    "blocks": (layers.BlockMask(jnp.asarray(TABLE), 3, 3), lambda b, q, k: TABLE[0, 0, q // 3, k // 3]),
    "dense": (layers.DenseMask(jnp.asarray(PRESENT)[:, None, None, :]), lambda b, q, k: PRESENT[b, k]),
    "both": (layers.CausalMask() & layers.KeyMask(jnp.asarray(PRESENT)), lambda b, q, k: k <= q and PRESENT[b, k]),
    "either": (layers.CausalMask() | layers.WindowMask(left=0, right=2), lambda b, q, k: k <= q or k <= q + 2),
    "not": (~layers.CausalMask(), lambda b, q, k: k > q),
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_its_sentence_says(name):
    mask, rule = CASES[name]
    expected = np.array([[[[bool(rule(b, q, k)) for k in range(LK)] for q in range(LQ)]] for b in range(2)])
    table = mask.materialize(LQ, LK)
    assert table.dtype == bool
    chex.assert_trees_all_equal(np.broadcast_to(table, expected.shape), expected)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_cut_from_the_whole(name):
    mask, _ = CASES[name]
    whole = mask.materialize(LQ, LK)
    chex.assert_trees_all_equal(mask.allows(jnp.arange(1, 4), jnp.arange(2, 7)), whole[:, :, 1:4, 2:7])


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
