"""Which entity of one knowledge graph is which of another, given some pairs?

An example is a pair of temporal graphs with a list of pairs. Batch: counts of each of the n entities as sparse
matrices, `entity_index`, `relation_index`, `time_index`, `interval_index` (B, C, 2) row and column, with `..._value`
(B, C), 0 for padding; `edges` (B, E, 2) from every entity to its neighbours, in the order of the first, and `edge_mask`
(B, E); `sources` and `targets` (B, N) the entities of either graph among which pairs are sought; `source_links`,
`target_links` (B, L, 2) facts among them, head and tail as places in those lists, with `..._links_mask`; `pairs`
(B, P, 2) places in `sources` and `targets` of what is the same, and `pair_mask` (B, P). Output: a mapping with `left`
and `right` (B, P, F), vectors of both sides of each pair that are alike by their cosine.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["KINDS", "TASK", "example", "loss", "metrics", "pad", "picture", "same_degree", "seed_loss", "unit"]

KINDS = ("entity", "relation", "time", "interval")
_TEMPERATURE = 0.1
_SHARPNESS = 50.0  # the factor of cosines before Sinkhorn's iterations
_MOST_FOR_SINKHORN = 5_000  # pairs; the matrix of more would not fit
_ROWS = 512  # of a matrix of similarities that are looked at at once


def unit(x: Float[Array, "*B D"], epsilon: float = 1e-12) -> Float[Array, "*B D"]:
    """x / max(|x|, epsilon), with gradient 0 at 0."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    norm = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    return x / jnp.maximum(norm, epsilon)


def seed_loss(
    left: Float[Array, "P D"], right: Float[Array, "P D"], mask: Bool[Array, " P"], *, temperature: float
) -> Float[Array, ""]:
    """Half the cross-entropy of each side: the pair among the others of the other side and of its own."""
    z = [unit(x.astype(jnp.float32)) for x in (left, right)]
    own_place = jnp.eye(len(left), dtype=bool)

    def one_way(own: Float[Array, "P D"], other: Float[Array, "P D"]) -> Float[Array, ""]:
        logits = jnp.concatenate([own @ other.T, jnp.where(own_place, -1e9, own @ own.T)], axis=1) / temperature
        errors = jax.nn.logsumexp(jnp.where(jnp.tile(mask, 2), logits, -1e9), axis=1) - jnp.diagonal(logits)
        return jnp.sum(jnp.where(mask, errors, 0.0)) / jnp.maximum(jnp.sum(mask), 1)

    return (one_way(*z) + one_way(*z[::-1])) / 2


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The seed loss of the vectors."""
    one = jax.vmap(lambda left, right, mask: seed_loss(left, right, mask, temperature=_TEMPERATURE))
    return jnp.mean(one(outputs["left"], outputs["right"], batch["pair_mask"])), {}


def _ranks(similarity: Float[Array, "R P"], true: Int[Array, " R"], mask: Bool[Array, " P"]) -> Int[Array, " R"]:
    own = jnp.take_along_axis(similarity, true[:, None], axis=1)
    # Ties count against; what is no number ranks last.
    others = jnp.sum((similarity >= own) & mask, axis=1)
    return jnp.where(jnp.isfinite(own[:, 0]), others, mask.shape[0])


def metrics(outputs: Mapping[str, Array], batch: Batch) -> dict[str, Float[Array, " B"]]:
    """From left to right among the right sides of all pairs: hits within 1 and 10, mean of 1 / rank, by cosine.

    And hits1 after ten iterations of Sinkhorn, which let the right sides choose, too; not of more than 5,000 pairs.
    """

    def one(left: Float[Array, "P D"], right: Float[Array, "P D"], mask: Bool[Array, " P"]) -> dict[str, Array]:
        left, right = unit(left.astype(jnp.float32)), unit(right.astype(jnp.float32))
        places = jnp.arange(len(left))

        def row(pair):
            return _ranks((pair[0] @ right.T)[None], pair[1][None], mask)[0]

        def mean(values):
            return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)

        rank = jax.lax.map(row, (left, places), batch_size=_ROWS)
        found = {"hits1": mean(rank <= 1), "hits10": mean(rank <= 10), "mrr": mean(1 / jnp.maximum(rank, 1))}
        if len(left) <= _MOST_FOR_SINKHORN:
            pairs = mask[:, None] & mask
            plan = layers.sinkhorn_normalize(_SHARPNESS * left @ right.T, mask=pairs, epsilon=1e-6)
            found["sinkhorn_hits1"] = mean(_ranks(plan, places, mask) <= 1)
        return found

    return jax.vmap(one)(outputs["left"], outputs["right"], batch["pair_mask"])


def same_degree(batch: Batch) -> dict[str, Array]:
    """Entities are the more alike the closer their numbers of neighbours are."""

    def one(edges, mask, sources, targets, pairs):
        first = jnp.where(mask, edges[:, 0], jnp.iinfo(jnp.int32).max)

        def angles(entity):
            degree = jnp.searchsorted(first, entity, side="right") - jnp.searchsorted(first, entity)
            angle = jnp.log1p(degree.astype(jnp.float32)) / 10
            return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)

        return {"left": angles(sources[pairs[:, 0]]), "right": angles(targets[pairs[:, 1]])}

    names = ("edges", "edge_mask", "sources", "targets", "pairs")
    return jax.vmap(one)(*(batch[name] for name in names))


def example(
    *, widths: dict[str, int], batch_size: int, key: jax.Array, num_pairs: int = 6, num_links: int = 20
) -> Batch:
    """Random pairs of graphs, each of half the entities but the last; `widths` is how many columns each count has."""
    keys = iter(jax.random.split(key, 16))
    n = widths["entity"]
    half = (n - 1) // 2
    count = min(10, half)
    batch = {}
    for kind in KINDS:
        rows = jnp.tile(jnp.arange(n), (batch_size, 3))
        columns = jax.random.randint(next(keys), rows.shape, 0, widths[kind])
        batch[f"{kind}_index"] = jnp.stack([rows, columns], axis=-1)
        batch[f"{kind}_value"] = jax.random.uniform(next(keys), rows.shape)
    ends = jax.random.randint(next(keys), (batch_size, 4 * n), 0, n)
    batch["edges"] = jnp.stack([jnp.sort(jnp.tile(jnp.arange(n), (batch_size, 4)), axis=1), ends], axis=-1)
    batch["edge_mask"] = jnp.tile(jnp.arange(4) < 3, (batch_size, n))
    for side, offset in (("source", 0), ("target", half)):
        order = jax.vmap(lambda key: jax.random.permutation(key, half))(jax.random.split(next(keys), batch_size))
        batch[f"{side}s"] = order[:, :count] + offset
        batch[f"{side}_links"] = jax.random.randint(next(keys), (batch_size, num_links, 2), 0, count)
        batch[f"{side}_links_mask"] = jnp.tile(jnp.arange(num_links) % 5 > 0, (batch_size, 1))
    places = jnp.stack([jnp.arange(num_pairs) % count] * 2, axis=-1)
    batch["pairs"] = jnp.tile(places, (batch_size, 1, 1))
    batch["pair_mask"] = jnp.tile(jnp.arange(num_pairs) < num_pairs - 1, (batch_size, 1))
    return batch


def pad(batch: Batch):
    """(the batch with three more places in every list but those of entities, how to take pairs out of outputs)."""
    many, padded = batch["pairs"].shape[1], dict(batch)
    for name, array in batch.items():
        if name not in ("sources", "targets"):
            padded[name] = jnp.pad(array, ((0, 0), (0, 3)) + ((0, 0),) * (array.ndim - 2))
    last = batch["entity_index"].max()
    padded["edges"] = padded["edges"].at[:, -3:].set(last)

    def unpad(outputs):
        return {name: x[:, :many] if name in ("left", "right") else x for name, x in outputs.items()}

    return padded, unpad


def picture(batch: Batch, outputs: Mapping[str, Array]) -> "Figure":
    """Cosines between the sides of the first forty pairs, which should be largest on the diagonal."""
    from matplotlib.figure import Figure

    left, right = (unit(outputs[side][0].astype(jnp.float32))[:40] for side in ("left", "right"))
    figure = Figure(figsize=(5.5, 4.6), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(jax.device_get(left @ right.T), cmap="viridis"), label="cosine")
    axes.set_xlabel("entity of the second graph")
    axes.set_ylabel("entity of the first graph")
    return figure


TASK = Task(
    name="entity_alignment",
    loss=loss,
    metrics=metrics,
    metric="hits1",
    lower_is_better=False,
    baselines={"same_degree": same_degree},
    pad=pad,
    picture=picture,
    picture_name="similarity.png",
)
