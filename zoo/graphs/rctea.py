"""RCTEA: richness-guided co-training for temporal entity alignment (arXiv:2605.18255).

Official code: uqwhua/RCTEA@f15f520 (no licence). Fidelity: exact.
New: neighbours of whom more is known weigh more, by their distance from a learned "nothing known"; a structural and a
temporal view of two knowledge graphs, taught in turn and matched by a consensus of neighbourhoods in both; a weight for
each entity between the views, from how much each view knows of it.
Differs: the interval that stands for "no time" is looked up, where the official code has its number in one data set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.blocks import Dropout, Linear
from zoo.paper import Official, Paper
from zoo.tasks import entity_alignment
from zoo.tasks.entity_alignment import seed_loss, unit
from zoo.tasks.task import Batch
from zoo.weights.table import Table, linear, parameter


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    num_entities: int  # n, of both graphs, with a last one of which nothing is known
    num_relations: int  # 2R, each in both directions
    num_times: int  # P, points in time
    num_intervals: int  # Q, spans of time
    null_interval: int = 0  # which of them is "no time"
    d_model: int = 50  # d, of the vectors of entities, relations and times
    depth: int = 2  # rounds of propagation
    num_proxies: int = 64  # vectors of the gate that entities are compared with
    structural_attention: bool = True  # False: all neighbours weigh the same
    structural_gate: bool = True
    temporal_attention: bool = True
    temporal_gate: bool = True
    adaptive_weight: bool = True  # False: both views count the same
    stage: Literal["structural", "temporal", "consensus", "fused", "joint"] = "joint"
    """Whose loss is taught and whose vectors are matched. Officially in this order, each stage going on from the one
    before (`init_from`); joint: the sum of all losses at once, the fused vectors."""
    detach_temporal: bool = False  # the consensus does not teach the temporal view
    dropout_rate: float = 0.3  # of both views' vectors
    temperature: float = 0.1  # tau, of the seed loss
    consensus_width: int = 32  # of the noise that tells how well neighbours agree
    consensus_layers: int = 3  # rounds of propagation of that noise
    consensus_steps: int = 5  # L, refinements of the matching
    num_candidates: int = 15  # k, at most as many as there are targets
    norm_epsilon: float = 1e-12  # least norm in a cosine
    choice_epsilon: float = 1e-8  # added to the probability of the right candidate

    def __post_init__(self):
        if self.stage not in ("structural", "temporal", "consensus", "fused", "joint"):
            raise ValueError(f"stage {self.stage!r} is not structural, temporal, consensus, fused or joint")


_ROWS = 512  # of a table of scores that are looked at at once


class Counts(NamedTuple):
    """A sparse matrix: rows and columns (N, 2), and values (N,), 0 for padding."""

    index: Int[Array, "N 2"]
    value: Float[Array, " N"]

    def times(self, table: Float[Array, "C D"], rows: int) -> Float[Array, "R D"]:
        products = self.value[:, None].astype(table.dtype) * jnp.asarray(table)[self.index[:, 1]]
        return jax.ops.segment_sum(products, self.index[:, 0], rows)


def richness_weights(
    f: Float[Array, "N D"],
    reference: Float[Array, " D"],
    edges: Int[Array, "E 2"],
    mask: Bool[Array, " E"] | None,
    config: Config,
) -> Float[Array, " E"]:
    """softmax over the neighbours j of i of -cos(f_j, reference), for the edges (i, j)."""
    scores = -unit(f, config.norm_epsilon) @ unit(reference, config.norm_epsilon)
    return layers.segment_softmax(scores[edges[:, 1]], edges[:, 0], num_segments=f.shape[0], mask=mask)


def propagate(
    features: Float[Array, "N D"],
    reference: Float[Array, " D"],
    edges: Int[Array, "E 2"],
    mask: Bool[Array, " E"] | None,
    config: Config,
    attention: bool,
) -> Float[Array, "N F"]:
    """[f_0, f_1, ..]: f_0 = tanh(features), f_l,i = tanh(sum_j w_ij f_(l-1),j), side by side."""
    found = [jnp.tanh(features)]
    for _ in range(config.depth):
        f = found[-1]
        if attention:
            weights = richness_weights(f, reference, edges, mask, config)
        else:
            zeros = jnp.zeros(edges.shape[0], f.dtype)
            weights = layers.segment_softmax(zeros, edges[:, 0], num_segments=f.shape[0], mask=mask)
        mixed = jax.ops.segment_sum(weights[:, None] * f[edges[:, 1]], edges[:, 0], f.shape[0])
        found.append(jnp.tanh(mixed))
    return jnp.concatenate(found, axis=-1)


class Gate(nn.Module):
    """g x + (1 - g) p, p = x - softmax(cos(x, Pi)) Pi, g = sigmoid(p M + b): what proxies do not say."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "N F"]) -> Float[Array, "N F"]:
        c, start = self.config, nn.initializers.xavier_normal()
        proxies = self.param("proxy_table", start, (c.num_proxies, x.shape[-1]))
        kernel = self.param("kernel", start, (x.shape[-1], x.shape[-1]))
        bias = self.param("bias_table", start, (1, x.shape[-1]))
        shares = jax.nn.softmax(unit(x, c.norm_epsilon) @ unit(proxies, c.norm_epsilon).T, axis=-1)
        rest = x - shares @ proxies
        gate = jax.nn.sigmoid(rest @ kernel + bias)
        return gate * x + (1 - gate) * rest


class Views(nn.Module):
    """Both views of one pair of graphs, each (n, 2 (depth + 1) d), and how far each half lies from nothing known."""

    config: Config

    @nn.compact
    def __call__(self, graph: Mapping[str, Any]) -> dict[str, Array]:
        c, start = self.config, nn.initializers.xavier_normal()
        n, width, mask = c.num_entities, c.d_model, graph.get("edge_mask")
        entity = self.param("entity_table", start, (n, width))
        relation = self.param("relation_table", start, (c.num_relations, width))
        time = self.param("time_table", start, (c.num_times, width))
        interval = self.param("interval_table", start, (c.num_intervals, width))
        nowhere = (relation[-1] + relation[c.num_relations // 2 - 1]) / 2
        time_gate = Gate(c, name="time_gate")
        kinds = {
            "entity": (entity, entity[-1], Gate(c, name="entity_gate")),
            "relation": (relation, nowhere, Gate(c, name="relation_gate")),
            "time": (time, time[0], time_gate),
            "interval": (interval, interval[c.null_interval], time_gate),
        }
        encoded: dict[str, Array] = {}
        distances = []
        for names, attends, gated in (
            (("entity", "relation"), c.structural_attention, c.structural_gate),
            (("time", "interval"), c.temporal_attention, c.temporal_gate),
        ):
            features = jnp.stack([graph[name].times(kinds[name][0], n) for name in names])
            references = jnp.stack([kinds[name][1] for name in names])
            spread = jax.vmap(lambda f, r, attends=attends: propagate(f, r, graph["edges"], mask, c, attends))
            for name, x, reference in zip(names, spread(features, references), references, strict=True):
                if gated or self.is_initializing():
                    x = kinds[name][2](x)
                encoded[name] = x
                squared = jnp.sum(jnp.square(x - jnp.tile(reference, c.depth + 1)), axis=-1)
                distances.append(jnp.sqrt(squared))
        return {
            **encoded,
            "structural": jnp.concatenate([encoded["entity"], encoded["relation"]], axis=-1),
            "temporal": jnp.concatenate([encoded["time"], encoded["interval"]], axis=-1),
            "distances": jnp.stack(distances, axis=-1),
        }


class RichnessWeight(nn.Module):
    """w = sigmoid(W_2 ReLU(W_1 distances)), the structural view's share."""

    @nn.compact
    def __call__(self, distances: Float[Array, "N 4"]) -> Float[Array, "N 1"]:
        return jax.nn.sigmoid(Linear(1, name="fc2")(jax.nn.relu(Linear(4, name="fc1")(distances))))


class Psi(nn.Module):
    """Layers ReLU(W_r x + b + mean_in W_1 x + mean_out W_2 x), all of them side by side through one map.

    An edge counts as often as it is given.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "N R"], edges: Int[Array, "E 2"], mask: Bool[Array, " E"] | None
    ) -> Float[Array, "N R"]:
        found, width = [x], self.config.consensus_width
        for i in range(self.config.consensus_layers):
            x = found[-1]
            ends = (edges[:, 0], edges[:, 1])
            incoming = Linear(width, use_bias=False, name=f"in_{i}")(x)
            outgoing = Linear(width, use_bias=False, name=f"out_{i}")(x)
            y = Linear(width, name=f"root_{i}")(x)
            y = y + layers.graph_aggregate(incoming, *ends, reduction="mean", edge_mask=mask)
            y = y + layers.graph_aggregate(outgoing, *ends[::-1], reduction="mean", edge_mask=mask)
            found.append(jax.nn.relu(y))
        return Linear(width, name="final")(jnp.concatenate(found, axis=-1))


class Consensus(nn.Module):
    """S = softmax over candidates of the mean of both views' scores, which neighbours that agree have raised."""

    config: Config

    @nn.compact
    def __call__(
        self,
        views: tuple[tuple[Float[Array, "N D"], Float[Array, "M D"]], ...],
        candidates: Int[Array, "N k"],
        edges: tuple[Int[Array, "E 2"], Int[Array, "F 2"]],
        masks: tuple[Bool[Array, " E"] | None, Bool[Array, " F"] | None],
        noise: Float[Array, "L N R"],
    ) -> Float[Array, "N k"]:
        psi = Psi(self.config, name="psi")
        fc1, fc2 = Linear(self.config.consensus_width, name="fc1"), Linear(1, name="fc2")
        targets = views[0][1].shape[0]
        scores = [jnp.einsum("nd,nkd->nk", left, right[candidates]) for left, right in views]
        for r in noise:
            source = psi(r, edges[0], masks[0])
            updated = []
            for score in scores:
                sent = jax.nn.softmax(score, axis=-1)[..., None] * r[:, None]
                received = jnp.zeros((targets, r.shape[-1]), r.dtype).at[candidates].add(sent)
                target = psi(received, edges[1], masks[1])
                gap = source[:, None] - target[candidates]
                updated.append(score + fc2(jax.nn.relu(fc1(gap)))[..., 0])
            scores = updated
        return jax.nn.softmax(sum(scores) / len(scores), axis=-1)


def nearest(
    left: Float[Array, "N D"], right: Float[Array, "M D"], k: int, truth: Int[Array, " N"] | None = None
) -> Int[Array, "N _"]:
    """Of each row the k targets of largest inner product, best first; `truth` (-1: unknown) takes the last place if it
    is not among them."""
    left, right, count = jax.lax.stop_gradient(left), jax.lax.stop_gradient(right), min(k, right.shape[0])
    # Some rows at a time: the whole table of a real set has more than a thousand million entries.
    found = jax.lax.map(lambda row: jax.lax.top_k(right @ row, count)[1], left, batch_size=_ROWS)
    if truth is None:
        return found
    missing = (truth >= 0) & ~jnp.any(found == truth[:, None], axis=1)
    return found.at[:, -1].set(jnp.where(missing, truth, found[:, -1]))


class One(nn.Module):
    """The model for one pair of graphs."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, batch: Batch) -> dict[str, Array]:
        c = self.config
        graph: dict[str, Any] = {
            kind: Counts(batch[f"{kind}_index"], batch[f"{kind}_value"]) for kind in entity_alignment.KINDS
        }
        views = Views(c, name="views")(graph | {"edges": batch["edges"], "edge_mask": batch["edge_mask"]})
        drop = Dropout(c.dropout_rate)
        structural, temporal = (drop(views[name], train=self.train) for name in ("structural", "temporal"))
        weight = RichnessWeight(name="weight")(views["distances"])
        fused = [weight * structural, (1 - weight) * temporal] if c.adaptive_weight else [structural, temporal]
        vectors = {"structural": structural, "temporal": temporal, "fused": jnp.concatenate(fused, axis=-1)}
        sources, targets = batch["sources"], batch["targets"]
        pairs, mask = batch["pairs"], batch["pair_mask"]
        sides = {k: (x[sources[pairs[:, 0]]], x[targets[pairs[:, 1]]]) for k, x in vectors.items()}

        taught = ("structural", "temporal", "consensus", "fused") if c.stage == "joint" else (c.stage,)
        losses = {k: seed_loss(*sides[k], mask, temperature=c.temperature) for k in sides if k in taught}
        if "consensus" in taught or self.is_initializing():
            losses["consensus"] = self._consensus(batch, structural, temporal)
        matched = "fused" if c.stage in ("joint", "consensus") else c.stage
        left, right = sides[matched]
        return {
            "left": left,
            "right": right,
            "loss": sum(losses[name] for name in taught),
            "weight": weight[sources, 0],
        }

    def _consensus(self, batch: Batch, structural: Float[Array, "N D"], temporal: Float[Array, "N D"]) -> Array:
        """-log of the share that the consensus gives to what is right, a mean over pairs."""
        c, pairs, mask = self.config, batch["pairs"], batch["pair_mask"]
        sources, targets = batch["sources"], batch["targets"]
        if c.detach_temporal:
            temporal = jax.lax.stop_gradient(temporal)
        both = tuple((view[sources], view[targets]) for view in (temporal, structural))
        left, right = (jnp.concatenate([view[side] for view in both], axis=-1) for side in (0, 1))
        # Places beyond the list are dropped: padding tells nothing.
        place = jnp.where(mask, pairs[:, 0], len(sources))
        truth = jnp.full(len(sources), -1).at[place].set(pairs[:, 1], mode="drop")
        candidates = nearest(left, right, c.num_candidates, truth)
        key = self.make_rng("dropout") if self.train else jax.random.key(0)
        noise = jax.random.normal(key, (c.consensus_steps, len(sources), c.consensus_width), left.dtype)
        links = (batch["source_links"], batch["target_links"])
        masks = (batch["source_links_mask"], batch["target_links_mask"])
        chosen = Consensus(c, name="consensus")(both, candidates, links, masks, noise)
        right_ones = candidates[pairs[:, 0]] == pairs[:, 1:]
        share = jnp.sum(jnp.where(right_ones, chosen[pairs[:, 0]], 0.0), axis=1).astype(jnp.float32)
        return jnp.sum(jnp.where(mask, -jnp.log(share + c.choice_epsilon), 0.0)) / jnp.maximum(jnp.sum(mask), 1)


class Model(nn.Module):
    """See `One`; several pairs of graphs share the tables, which makes sense for several lists of pairs of one."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        each = nn.vmap(One, in_axes=0, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True})
        return each(self.config, train, name="one")(dict(batch))


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """That of the stage, which the model has computed."""
    return jnp.mean(outputs["loss"].astype(jnp.float32)), {}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    widths = {
        "entity": config.num_entities,
        "relation": config.num_relations,
        "time": config.num_times,
        "interval": config.num_intervals,
    }
    return entity_alignment.example(widths=widths, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_NAMES = {"entity": "ent_emb", "relation": "rel_emb", "time": "time_emb", "interval": "time_int_emb"}
_GATES = {"entity": "e", "relation": "r", "time": "t"}
_HPARAMS = {"node_hidden": "d_model", "depth": "depth", "num_proxies": "num_proxies", "tau": "temperature"}


def _sized(config: Config, tensors: Mapping[str, Any]) -> Config:
    """Sizes of the data stand in no official setting, only in the tables."""
    temporal, structural = ("psi_1.", "psi_2.") if "psi_1.time_emb" in tensors else ("", "")
    return replace(
        config,
        num_entities=tensors[f"{structural}ent_emb"].shape[0],
        num_relations=tensors[f"{structural}rel_emb"].shape[0],
        num_times=tensors[f"{temporal}time_emb"].shape[0],
        num_intervals=tensors[f"{temporal}time_int_emb"].shape[0],
    )


def _config(hparams: Mapping[str, Any], **switches: Any) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    return Config(2, 2, 1, 1, null_interval=hparams["null_interval"], **ours, **switches)


def fused_config(hparams: Mapping[str, Any]) -> Config:
    att, gate = hparams["att"], hparams["gate"]
    return _config(
        hparams,
        structural_attention=att,
        temporal_attention=att,
        structural_gate=gate,
        temporal_gate=gate,
        adaptive_weight=hparams["use_mlp"],
    )


def consensus_config(hparams: Mapping[str, Any]) -> Config:
    return _config(
        hparams,
        structural_attention=hparams["att_rel"],
        structural_gate=hparams["gate_rel"],
        temporal_attention=hparams["att_time"],
        temporal_gate=hparams["gate_time"],
        consensus_width=hparams["rnd_dim"],
        consensus_layers=hparams["num_layers"],
        consensus_steps=hparams["num_steps"],
        num_candidates=hparams["k"],
    )


def _graph_of(inputs: Mapping[str, Array]) -> dict[str, Any]:
    pairs = {"entity": "ent", "relation": "rel", "time": "time", "interval": "time_int"}
    counts = {ours: Counts(inputs[f"{t}_matrix"], inputs[f"{t}_val"]) for ours, t in pairs.items()}
    return counts | {"edges": inputs["adj_matrix"]}


class FusedPart(nn.Module):
    """The fused model by itself: vectors of all entities and their weights."""

    config: Config

    @nn.compact
    def __call__(self, graph: Mapping[str, Any]) -> tuple[Float[Array, "N F"], Float[Array, "N 1"], dict[str, Array]]:
        views = Views(self.config, name="views")(graph)
        w = RichnessWeight(name="weight")(views["distances"])
        structural, temporal = views["structural"], views["temporal"]
        if self.config.adaptive_weight:
            structural, temporal = w * structural, (1 - w) * temporal
        self.variable("unused", "null_table", jnp.zeros, (1, self.config.d_model))
        return jnp.concatenate([structural, temporal], axis=-1), w, views


def fused_table(config: Config) -> Table:
    for ours, theirs in _NAMES.items():
        yield from parameter(theirs, f"views/{ours}_table")
    for ours, theirs in _GATES.items():
        yield from _gate_table(f"{theirs}_encoder", f"views/{ours}_gate")
    yield from linear("weight_mlp.mlp.0", "weight/fc1")
    yield from linear("weight_mlp.mlp.2", "weight/fc2")
    yield from parameter("try_emb", "null_table", collection="unused")


def _gate_table(theirs: str, ours: str) -> Table:
    yield from parameter(f"{theirs}.gate_kernel", f"{ours}/kernel")
    yield from parameter(f"{theirs}.proxy", f"{ours}/proxy_table")
    yield from parameter(f"{theirs}.bias", f"{ours}/bias_table")


def fused_call(model: FusedPart, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c = model.config
    out, w, _ = model.apply(variables, _graph_of(inputs))
    pairs = inputs["train_pairs"]
    unit = out / (jnp.linalg.norm(out, axis=-1, keepdims=True) + 1e-5)
    left, right = (unit[inputs["dev_pairs"][:, i]] for i in (0, 1))
    sim = left @ right.T
    return {
        "out_feature": out,
        "loss": seed_loss(out[pairs[:, 0]], out[pairs[:, 1]], jnp.ones(len(pairs), bool), temperature=c.temperature),
        "w": w,
        "sim": sim,
        "sinkhorn": layers.sinkhorn_normalize(50 * sim, num_iterations=10, epsilon=1e-6),
    }


class ConsensusPart(nn.Module):
    """The consensus by itself: candidates of every row, and their shares."""

    config: Config

    @nn.compact
    def __call__(self, graph: Mapping[str, Any]) -> tuple[Int[Array, "N k"], Float[Array, "N k"], dict[str, Array]]:
        """`graph` also has `rows` and `links` of both sides, the true places `truth` and the `noise`."""
        c, rows = self.config, graph["rows"]
        views = Views(c, name="views")(graph)
        pairs = tuple((views[name][rows[0]], views[name][rows[1]]) for name in ("temporal", "structural"))
        left, right = (jnp.concatenate([pair[side] for pair in pairs], axis=-1) for side in (0, 1))
        candidates = nearest(left, right, c.num_candidates, graph["truth"])
        chosen = Consensus(c, name="consensus")(pairs, candidates, graph["links"], (None, None), graph["noise"])
        for name, (shape, counts) in _unread(c).items():
            self.variable("unused", f"table_{name}", jnp.zeros, shape, jnp.int32 if counts else jnp.float32)
        return candidates, chosen, views


def _unread(config: Config) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Tensors that nothing reads: shape, and whether it is a count."""
    d, width = config.d_model, config.consensus_width
    found = {
        "psi_1.ent_emb": (config.num_entities, d),
        "psi_1.rel_emb": (config.num_relations, d),
        "psi_1.try_emb": (1, d),
        "psi_2.try_emb": (1, d),
        "weight_mlp.mlp.0.weight": (4, 1),
        "weight_mlp.mlp.0.bias": (4,),
        "weight_mlp.mlp.2.weight": (1, 4),
        "weight_mlp.mlp.2.bias": (1,),
    }
    for i in range(config.consensus_layers):
        norm = f"psi_3.batch_norms.{i}"
        found |= {f"{norm}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
        found[f"{norm}.num_batches_tracked"] = ()
    return {name: (shape, name.endswith("tracked")) for name, shape in found.items()}


def consensus_table(config: Config) -> Table:
    for ours, theirs in _NAMES.items():
        yield from parameter(f"psi_{2 if ours in ('entity', 'relation') else 1}.{theirs}", f"views/{ours}_table")
    for ours, theirs in _GATES.items():
        yield from _gate_table(f"psi_{1 if ours == 'time' else 2}.{theirs}_encoder", f"views/{ours}_gate")
    for i in range(config.consensus_layers):
        theirs, ours = f"psi_3.convs.{i}", "consensus/psi"
        yield from linear(f"{theirs}.lin1", f"{ours}/in_{i}", bias=False)
        yield from linear(f"{theirs}.lin2", f"{ours}/out_{i}", bias=False)
        yield from linear(f"{theirs}.root", f"{ours}/root_{i}")
    yield from linear("psi_3.final", "consensus/psi/final")
    yield from linear("mlp.0", "consensus/fc1")
    yield from linear("mlp.2", "consensus/fc2")
    for name in _unread(config):
        yield from parameter(name, f"table_{name}", collection="unused")


def consensus_call(
    model: ConsensusPart, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    c, y = model.config, inputs["y"]
    rows = (inputs["index_n1"], inputs["index_n2"])
    truth = jnp.full(rows[0].shape, -1).at[y[0]].set(y[1])
    edges = (inputs["edge_index_s"].T, inputs["edge_index_t"].T)
    graph = _graph_of(inputs) | {"rows": rows, "links": edges, "truth": truth, "noise": inputs["noise"]}
    candidates, chosen, views = model.apply(variables, graph)
    right = candidates[y[0]] == y[1][:, None]
    each = -jnp.log(jnp.sum(jnp.where(right, chosen[y[0]], 0.0), axis=1) + c.choice_epsilon)
    best = jax.lax.top_k(chosen[y[0]], min(5, chosen.shape[1]))[1]
    return {
        "S_idx": candidates,
        "S_val": chosen,
        "loss": jnp.mean(each),
        "loss_none": each,
        "hits5": jnp.mean(jnp.any(jnp.take_along_axis(right, best, axis=1), axis=1)),
        "time_emb": views["temporal"],
        "rel_emb": views["structural"],
    }


def fused_hparams(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()} | {"ab_weight": 0.5}
    return named | {
        "att": config.structural_attention,
        "gate": config.structural_gate,
        "use_mlp": config.adaptive_weight,
        "null_interval": config.null_interval,
    }


def consensus_hparams(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()} | {"ab_weight": 0.5}
    return named | {
        "att_rel": config.structural_attention,
        "gate_rel": config.structural_gate,
        "att_time": config.temporal_attention,
        "gate_time": config.temporal_gate,
        "rnd_dim": config.consensus_width,
        "num_layers": config.consensus_layers,
        "num_steps": config.consensus_steps,
        "k": config.num_candidates,
        "null_interval": config.null_interval,
    }


def _small_graph(config: Config, key: jax.Array) -> dict[str, Any]:
    batch = jax.tree.map(lambda a: a[0], example(config, batch_size=1, key=key))
    counts = {k: Counts(batch[f"{k}_index"], batch[f"{k}_value"]) for k in entity_alignment.KINDS}
    return counts | {"edges": batch["edges"]}


def fused_example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, Any]:
    return _small_graph(config, key)


def consensus_example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, Any]:
    count = max(2, config.num_candidates)
    rows, links = jnp.zeros(count, jnp.int32), jnp.zeros((3, 2), jnp.int32)
    noise = jax.random.normal(key, (config.consensus_steps, count, config.consensus_width))
    found = {"rows": (rows, rows), "links": (links, links), "truth": rows, "noise": noise}
    return _small_graph(config, key) | found


_STANDIN = Config(num_entities=401, num_relations=34, num_times=21, num_intervals=58)
_BETA = Config(num_entities=85_875, num_relations=606, num_times=655, num_intervals=3_799)

PAPER = Paper(
    slug="rctea",
    task=entity_alignment.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": replace(
            _STANDIN,
            d_model=16,
            num_proxies=16,
            consensus_width=8,
            consensus_layers=2,
            consensus_steps=1,
            num_candidates=5,
        ),
        # The stages of the official protocol, each going on from the one before.
        "beta_structural": replace(_BETA, stage="structural", structural_gate=False),
        "beta_temporal": replace(_BETA, stage="temporal", temporal_gate=False),
        "beta_consensus": replace(
            _BETA, stage="consensus", structural_attention=False, temporal_gate=False, detach_temporal=True
        ),
        "beta": replace(_BETA, stage="fused", structural_attention=False, temporal_attention=False),
    },
    officials=(
        Official(
            module="model_o.py:OverAll (+ utils_n.py features, seu_tkg.py cal_sims and sinkhorn)",
            config=fused_config,
            hparams=fused_hparams,
            refine=_sized,
            table=fused_table,
            call=fused_call,
            model=FusedPart,
            example=fused_example,
        ),
        Official(
            module="dgl_dual.py:DGMC with psi_1 = model_t.OverAll, psi_2 = model_r.OverAll, "
            "psi_3 = models/rel.py:RelCNN",
            config=consensus_config,
            hparams=consensus_hparams,
            refine=_sized,
            table=consensus_table,
            call=consensus_call,
            model=ConsensusPart,
            example=consensus_example,
        ),
    ),
    quirks=(
        "a neighbour's score does not depend on who looks: one score for each entity, normalised per neighbourhood",
        "means in the consensus count repeated edges",
        "the last entities' time features are officially zero where numbers of entities have gaps; ours are right",
        "the number of the interval that means no time is officially that of one data set",
    ),
)
