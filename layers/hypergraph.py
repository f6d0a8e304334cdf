"""Hypergraphs: edges with any number of members. Convolution and attention on padded incidence matrices.

`incidence[b, i, e]` is not 0 where node i belongs to hyperedge e. A padded hyperedge is a column of zeros, an absent
node a row of zeros; neither changes anything. Projections stay outside.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

__all__ = ["hyperedge_gather", "hyperedge_read", "hypergraph_attention", "hypergraph_convolution"]

Incidence = Num[Array, "B N M"] | Bool[Array, "B N M"]


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _inverse(x, power):
    return jnp.where(x > 0, jnp.where(x > 0, x, 1.0) ** -power, 0.0)


@partial(jax.jit, static_argnames=("normalization",))
def hypergraph_convolution(
    x: Float[Array, "B N D"],
    incidence: Incidence,
    *,
    edge_weight: Float[Array, "B M"] | None = None,
    normalization: str = "symmetric",
) -> Float[Array, "B N D"]:
    """y = Dv^-1/2 H W De^-1 H^T Dv^-1/2 x, Dv = sum_e w_e H_ie, De = sum_i H_ie ("symmetric").

    "row" is Dv^-1 H W De^-1 H^T x: a node's mean over its hyperedges of their members' means. Incidence may be
    weighted, not negative. A node in no hyperedge gets 0. O(N M D). Source: arXiv:1809.09401, section 3; card
    dynamic_hypergraph, Mechanism B.
    """
    if normalization not in ("symmetric", "row"):
        raise ValueError(f"hypergraph_convolution: normalization {normalization!r} is not one of symmetric, row")
    member = incidence.astype(jnp.promote_types(x.dtype, jnp.float32))
    weight = jnp.ones_like(member[:, 0]) if edge_weight is None else _wide(edge_weight)
    degree = jnp.einsum("bnm,bm->bn", member, weight)
    power = 0.5 if normalization == "symmetric" else 1.0
    wide = _wide(x)
    if normalization == "symmetric":
        wide = wide * _inverse(degree, power)[..., None]
    edges = jnp.einsum("bnm,bnd->bmd", member, wide) * (weight * _inverse(jnp.sum(member, axis=1), 1.0))[..., None]
    return (jnp.einsum("bnm,bmd->bnd", member, edges) * _inverse(degree, power)[..., None]).astype(x.dtype)


def _weights(scores, incidence, axis):
    allowed = (incidence != 0)[..., None]
    scores = jnp.broadcast_to(_wide(scores), (*incidence.shape, scores.shape[-1]))
    top = jax.lax.stop_gradient(jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    powers = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top, 0.0)), 0.0)
    total = jnp.sum(powers, axis=axis, keepdims=True)
    return powers / jnp.where(total == 0, 1.0, total)


@jax.jit
def hyperedge_gather(
    scores: Float[Array, "B N #M H"], value: Float[Array, "B N H D"], incidence: Incidence
) -> Float[Array, "B M H D"]:
    """g_e = sum over members i of e of softmax_i(s_ie) v_i; an edge without members gets 0.

    `scores` may have one column for all hyperedges. O(N M H D). Source: card dynamic_hypergraph, Mechanism B.1.
    """
    return jnp.einsum("bnmh,bnhd->bmhd", _weights(scores, incidence, 1), _wide(value)).astype(value.dtype)


@jax.jit
def hyperedge_read(
    scores: Float[Array, "B #N M H"],
    edges: Float[Array, "B M H D"],
    incidence: Incidence,
    *,
    edge_weight: Float[Array, "B M"] | None = None,
) -> Float[Array, "B N H D"]:
    """o_i = sum over the hyperedges e of i of softmax_e(s_ie + log w_e) g_e; a node in none gets 0.

    A hyperedge of weight 0 is left out. O(N M H D). Source: card dynamic_hypergraph, Mechanism B.2.
    """
    scores = _wide(scores)
    member = incidence != 0
    if edge_weight is not None:
        member = member & (edge_weight > 0)[:, None]
        scores = scores + jnp.log(jnp.where(edge_weight > 0, _wide(edge_weight), 1.0))[:, None, :, None]
    return jnp.einsum("bnmh,bmhd->bnhd", _weights(scores, member, 2), _wide(edges)).astype(edges.dtype)


@partial(jax.jit, static_argnames=("negative_slope",))
def hypergraph_attention(
    value: Float[Array, "B N H D"],
    incidence: Incidence,
    member_score: Float[Array, "B N #M H"],
    node_score: Float[Array, "B N H"],
    edge_vector: Float[Array, "H D"],
    *,
    edge_weight: Float[Array, "B M"] | None = None,
    negative_slope: float = 0.2,
) -> Float[Array, "B N H D"]:
    """g_e = sum_i softmax_{i in e}(f(m_ie)) v_i, o_i = sum_e softmax_{e of i}(f(n_i + b.g_e) + log w_e) g_e.

    Nodes write into their hyperedges, then read from them (f: LeakyReLU). member_score m = a1.[v_i, s_ie], node_score n
    and edge_vector b are the halves of a2.[v_i, g_e]. O(N M H D). Source: card dynamic_hypergraph, Mechanism B.
    """
    edges = hyperedge_gather(jax.nn.leaky_relu(_wide(member_score), negative_slope), _wide(value), incidence)
    scores = _wide(node_score)[:, :, None] + jnp.einsum("bmhd,hd->bmh", edges, _wide(edge_vector))[:, None]
    scores = jax.nn.leaky_relu(scores, negative_slope)
    return hyperedge_read(scores, edges, incidence, edge_weight=edge_weight).astype(value.dtype)
