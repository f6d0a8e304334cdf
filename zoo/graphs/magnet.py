"""MAGNET: missing-modality-aware graph network for cancer classification (Tabakhi et al., arXiv:2506.22901).

Official code: SinaTabakhi/MAGNET@a93f325 (no licence). Fidelity: exact.
New: attention over whichever kinds of measurements a patient has, at a cost linear in their number; a graph of patients
that are alike in the kinds they share; a loss that keeps the fused embeddings true to that graph.
Differs: in the test graph only test patients have edges (officially, while tuning, validation patients keep theirs,
which no test patient sees). The graph comes with the batch, made once by `patient_graph`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.blocks import Dropout, Linear
from zoo.blocks.basic import torch_uniform
from zoo.paper import Official, Paper
from zoo.tasks import patient_classification
from zoo.tasks.task import Batch
from zoo.weights.table import Row, Table, Transform, linear, parameter


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    block_widths: tuple[int, ...] = (1000, 1000, 1000)  # F_m, features of each kind of measurement
    num_classes: int = 5  # C, kinds of patients
    d_model: int = 128  # D, of embeddings throughout
    num_heads: int = 2  # H, of the attention over blocks
    num_layers: int = 2  # graph layers
    dropout_rate: float = 0.1  # of encoders and decoder
    fusion: Literal["attention", "mean"] = "attention"  # mean: equal weights of the blocks there are, to compare with
    sparsity: float = 0.6  # rho, share of the pairs of patients that the graph leaves out
    graph_loss_weight: float = 0.1  # of the loss that keeps the graph
    negative_slope: float = 0.2  # of the encoders' LeakyReLU
    similarity_epsilon: float = 1e-8  # added to the product of norms
    share_epsilon: float = 1e-12  # added to the sum over pairs; and the least share of a pair

    def __post_init__(self):
        if self.fusion not in ("attention", "mean"):
            raise ValueError(f"fusion {self.fusion!r} is not attention or mean")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")


def patient_graph(
    x: Float[Array, "N F"], block_mask: Bool[Array, "N M"], groups: Int[Array, " N"], config: Config
) -> Float[Array, "N N"]:
    """Edges between patients of one group (0, 1, 2: of a part; negative: nobody) that are alike in what they share."""
    similarity = layers.block_cosine_similarity(
        x, block_mask, widths=config.block_widths, epsilon=config.similarity_epsilon
    )
    return layers.similarity_graph(similarity, groups, num_groups=3, sparsity=config.sparsity)


class Encoder(nn.Module):
    """W_2 drop(LeakyReLU(W_1 x + b_1)) + b_2."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N F"], *, train: bool) -> Float[Array, "B N D"]:
        c, start = self.config, {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.zeros}
        hidden = jax.nn.leaky_relu(Linear(c.d_model, **start, name="fc1")(x), c.negative_slope)
        return Linear(c.d_model, **start, name="fc2")(Dropout(c.dropout_rate)(hidden, train=train))


def _score_init(key, shape, dtype=jnp.float32):
    bound = (6 / (1 + shape[-1])) ** 0.5  # of one row a head
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class BlockAttention(nn.Module):
    """W_o concat_h sum_m w_hm p_hm, w = softmax over the blocks there are of <p_hm, a_h>, p = W_p e: no query."""

    config: Config

    @nn.compact
    def __call__(
        self, e: Float[Array, "B N M D"], present: Bool[Array, "B N M"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N H M"]]:
        c = self.config
        p = Linear(c.d_model, use_bias=False, name="projection")(e).reshape(*e.shape[:3], c.num_heads, -1)
        direction = self.param("block_queries", _score_init, p.shape[-2:])
        scores = jnp.einsum("bnmhd,hd->bnhm", p, direction)
        if c.fusion == "mean":
            scores = jnp.zeros_like(scores)
        weights = layers.masked_normalize(scores, jnp.broadcast_to(present[:, :, None], scores.shape))
        fused = jnp.einsum("bnhm,bnmhd->bnhd", weights, p).reshape(*e.shape[:2], c.d_model)
        return Linear(c.d_model, use_bias=False, name="out")(fused), weights


_PATIENTS = 4  # whose messages are looked at at once: those of all, (B, N, N, D), do not fit a cache


def _mean_message(
    sent: Float[Array, "B N D"], edge: Float[Array, " D"], graph: Float[Array, "B N N"]
) -> Float[Array, "B N D"]:
    """Mean over the edges j -> i of ReLU(s_j + a_ij w)."""
    linked = graph > 0
    shares = linked / jnp.maximum(jnp.sum(linked, axis=2, keepdims=True), 1).astype(sent.dtype)

    @jax.checkpoint  # messages are made again in the backward pass instead of kept
    def mean(row: tuple[Float[Array, "B N"], Float[Array, "B N"]]) -> Float[Array, "B D"]:
        weights, share = row
        return jnp.einsum("bj,bjd->bd", share, jax.nn.relu(sent + weights[..., None] * edge))

    rows = jnp.moveaxis(graph, 1, 0), jnp.moveaxis(shares, 1, 0)
    return jnp.moveaxis(jax.lax.map(mean, rows, batch_size=_PATIENTS), 0, 1)


class EdgeSage(nn.Module):
    """y_i = W_l mean_j ReLU(W_m [u_j, a_ji] + b_m) + b_l + W_r x_i, u = ReLU(W_s x + b_s)."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], graph: Float[Array, "B N N"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        sent = jax.nn.relu(Linear(width, name="source")(x))
        # W_m has a row for the edge's weight, which makes the message a sum of a node's and an edge's part.
        start = torch_uniform(width + 1)
        edge = self.param("edge_kernel", start, (width,))
        message = Linear(width, kernel_init=start, bias_init=start, name="message")
        mean = _mean_message(message(sent), edge, graph)
        return Linear(width, name="neighbours")(mean) + Linear(width, use_bias=False, name="self")(x)


def graph_divergence(
    fused: Float[Array, "B N D"], graph: Float[Array, "B N N"], *, epsilon: float
) -> Float[Array, " B"]:
    """sum_ij p log(p / q): p the shares of the edges' weights, q those of 1 / (1 + |f_i - f_j|^2) on the same edges."""
    wide, graph = fused.astype(jnp.float32), graph.astype(jnp.float32)
    squares = jnp.sum(jnp.square(wide), axis=-1)
    distance = squares[:, :, None] + squares[:, None] - 2 * jnp.einsum("bid,bjd->bij", wide, wide)
    near = jnp.where(graph > 0, 1 / (1 + jnp.maximum(distance, 0.0)), 0.0)

    def shares(weights):
        return jnp.maximum(weights / (jnp.sum(weights, axis=(1, 2), keepdims=True) + epsilon), epsilon)

    p, q = shares(graph), shares(near)
    return jnp.sum(p * jnp.log(p / q), axis=(1, 2))


class Model(nn.Module):
    """Encode the blocks, fuse them by attention, pass messages among like patients, classify."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c, present, graph = self.config, batch["block_mask"], batch["graph"]
        starts = [sum(c.block_widths[:m]) for m in range(1, len(c.block_widths))]
        encoded = [
            Encoder(c, name=f"encoder_{m}")(block, train=train)
            for m, block in enumerate(jnp.split(batch["x"], starts, axis=-1))
        ]
        # Whatever stands where nothing was measured is left behind here.
        encoded = jnp.where(present[..., None], jnp.stack(encoded, axis=2), 0)
        fused, weights = BlockAttention(c, name="attention")(encoded, present)
        hidden = fused
        for layer in range(c.num_layers):
            hidden = jax.nn.relu(EdgeSage(c, name=f"layers_{layer}")(hidden, graph))
            hidden = Dropout(c.dropout_rate)(hidden, train=train)
        hidden = Dropout(c.dropout_rate)(jax.nn.relu(Linear(c.d_model, name="hidden")(hidden)), train=train)
        divergence = graph_divergence(fused, graph, epsilon=c.share_epsilon)
        return {
            "logits": Linear(c.num_classes, name="head")(hidden),
            "fused": fused,
            "weights": weights,
            "graph_loss": c.graph_loss_weight * divergence,
        }


def loss(outputs: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the scored patients plus the weighted divergence between embeddings and graph."""
    classes, _ = patient_classification.loss(outputs, batch)
    graph = jnp.mean(outputs["graph_loss"])
    return classes + graph, {"class_loss": classes, "graph_loss": graph}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return patient_classification.example(
        block_widths=config.block_widths, num_classes=config.num_classes, batch_size=batch_size, key=key
    )


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "in_dims": "block_widths",
    "hid_dims": "d_model",
    "num_heads": "num_heads",
    "out_dims": "num_classes",
    "num_layers": "num_layers",
    "dropout_rate": "dropout_rate",
    "sparsity_rate": "sparsity",
}


@dataclass(frozen=True)
class OfficialConfig(Config):
    """A configuration with what the official trainer is told besides."""

    part: str = "train"  # train | val | test: whose graph and labels its loss is of
    validates: bool = False  # validation patients are a group of their own, else they are among the training ones


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    ours["block_widths"] = tuple(ours["block_widths"])
    if "mode" not in hparams:
        return Config(**ours)
    return OfficialConfig(**ours, part=hparams["mode"], validates=hparams.get("tune_hyperparameters", False))


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    return named | {"in_dims": list(config.block_widths)}


# (H, 1, d) with one row a head; and the weights of a node's and of an edge's part of a message.
_HEADS = Transform(lambda x: (x[:, 0],), lambda x: (x[:, None],))
_EDGE_APART = Transform(
    lambda x: (x[:, :-1].T, x[:, -1]),
    lambda kernel, edge: ((np if isinstance(kernel, np.ndarray) else jnp).concatenate([kernel.T, edge[:, None]], 1),),
)


def official_table(config: Config) -> Table:
    for m in range(len(config.block_widths)):
        for theirs, ours in (("0", "fc1"), ("3", "fc2")):
            yield from linear(f"unimodal_encoders.{m}.encoder_layers.{theirs}", f"encoder_{m}/{ours}")
    yield from parameter("attention_layer.att_lin", "attention/block_queries", _HEADS)
    yield from linear("attention_layer.lin_proj", "attention/projection", bias=False)
    yield from linear("attention_layer.out_proj", "attention/out", bias=False)
    for i in range(config.num_layers):
        theirs, ours = f"gnn_decoder.conv_layers.{i}", f"layers_{i}"
        yield Row(
            (f"{theirs}.lin_msg.weight",),
            (f"params/{ours}/message/kernel", f"params/{ours}/edge_kernel"),
            _EDGE_APART,
        )
        yield from parameter(f"{theirs}.lin_msg.bias", f"{ours}/message/bias")
        yield from linear(f"{theirs}.lin", f"{ours}/source")
        yield from linear(f"{theirs}.lin_l", f"{ours}/neighbours")
        yield from linear(f"{theirs}.lin_r", f"{ours}/self", bias=False)
    yield from linear("gnn_decoder.decoder_layers.0", "hidden")
    yield from linear("gnn_decoder.final_layer", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`inputs` has the rows that were measured, block by block, and which patients' they are."""
    c, present = model.config, inputs["modality_mask"] > 0
    blocks = [
        jnp.zeros((present.shape[0], width)).at[inputs[f"rows_{m}"]].set(inputs[f"data_{m}"])
        for m, width in enumerate(c.block_widths)
    ]
    x = jnp.concatenate(blocks, axis=1)
    part, validates = (c.part, c.validates) if isinstance(c, OfficialConfig) else ("train", False)
    train, test = inputs["train_mask"], inputs["test_mask"]
    valid = ~train & ~test
    groups = jnp.where(test, 2, jnp.where(valid & validates, 1, 0))
    whole = patient_graph(jax.lax.stop_gradient(x), present, groups, c)
    seen = {"train": train, "val": valid, "test": ~train}[part]
    graph = jnp.where(seen[:, None] & seen, whole, 0.0)
    scored = {"train": train, "val": valid, "test": test}[part]
    patients = {"x": x, "block_mask": present, "graph": graph, "label": inputs["labels"], "scored_mask": scored}
    batch = jax.tree.map(lambda a: a[None], patients)
    outputs = model.apply(variables, batch)
    total, parts = loss(outputs, batch)
    return {
        "logits": outputs["logits"][0],
        "fused": outputs["fused"][0],
        "att_weights": outputs["weights"][0],
        "adj_mat": whole,
        "similarities": graph,
        "kl_loss": graph_divergence(outputs["fused"], batch["graph"], epsilon=c.share_epsilon)[0],
        "cls_loss": parts["class_loss"],
        "loss": total,
    }


PAPER = Paper(
    slug="magnet",
    task=patient_classification.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": Config(block_widths=(20, 16, 12), num_classes=3, d_model=16, num_heads=4),
        "brca": Config(),
        "blca": Config(d_model=256, num_heads=8, dropout_rate=0.2, num_classes=2, block_widths=(1000, 1000, 471)),
        "ov": Config(
            d_model=256, num_heads=8, dropout_rate=0.2, sparsity=0.8, num_classes=2, block_widths=(1000, 1000, 448)
        ),
        "ov_rna": Config(  # the two kinds of measurements that can be had: without methylation
            d_model=256, num_heads=8, dropout_rate=0.2, sparsity=0.8, num_classes=2, block_widths=(1000, 448)
        ),
    },
    officials=(
        Official(
            module="trainer/trainer.py:MAGNETTrainer (+ dataloader/dataloader.py:MultiomicsDataset graph, "
            "model/base_models.py)",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
    ),
    parameter_counts={"brca": 3 * 144_640 + 32_896 + 149_253, "ov_rna": 322_048 + 180_736 + 131_328 + 592_642},
    quirks=(
        "the attention's scores are neither scaled nor passed through a non-linearity, and no query takes part",
        "a patient left without an edge is linked to its most similar one, in the order of patients: an earlier one's "
        "new edge can serve a later one",
        "while tuning, the official test graph keeps edges among validation patients; ours does not",
    ),
)
