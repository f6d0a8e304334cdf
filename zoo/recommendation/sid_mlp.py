"""SID-MLP: MLPs are efficient distilled generative recommenders (arXiv:2605.12617).

Official code: ztguo715/SID-MLP@02d9d8e (no licence). Fidelity: exact.
New: an item is four digits, and a generative recommender's transformer decoder is needed for none of them: one read-out
of the encoder's states with a single query, then an MLP a digit that sees the digits before, learn the decoder's
distributions. In SID-MLP++ the encoder too becomes MLPs, one for each place of a token within its item.
Differs: teacher (a T5, as in TIGER), encoder and student may learn in one run, each from the frozen outputs of the one
before; `train_teacher=False` with weights to start from is the paper's order. Digits come from item attributes and
transitions by residual k-means: text embeddings need a language model. Candidates are scored as by an exhaustive beam.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import layers
from zoo.blocks import Dropout, Linear
from zoo.blocks.basic import torch_uniform
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import recommendation
from zoo.tasks.task import Batch
from zoo.weights.table import Row, Table, end_to_end, layer_norm, linear, parameter

DIGITS = 4


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the defaults are the official ones."""

    num_items: int = 48  # of the catalogue; 0 stands for no item
    history: int = 20  # items of a user that are seen
    codes: int = 256  # values of a digit
    embed_dim: int = 128  # of a token
    d_model: int = 128  # of the encoder's states
    num_heads: int = 4  # of the read-out
    attn_dim: int = 384  # inner width of the read-out; 0: d_model
    ffn_dim: int = 1024  # of the read-out's feed-forward layer
    head_hidden: int = 512  # of each digit's MLP
    head_layers: int = 1  # hidden layers of it
    dropout_rate: float = 0.2  # of the student
    encoder: Literal["t5", "mlp", "given"] = "t5"  # given: the batch holds `encoded` states, and there is no teacher
    mixer_layers: int = 4  # of the MLP encoder
    mixer_ffn_dim: int = 2048  # of each of its MLPs
    mixer_places: int = 4  # MLPs of a layer; a token's place in its item chooses
    mixer_length: int = 256  # positions with an embedding of their own
    mixer_dropout_rate: float = 0.1  # of the MLP encoder
    teacher_layers: int = 4  # of encoder and of decoder
    teacher_heads: int = 6  # of every attention of the teacher
    teacher_head_dim: int = 64  # width of one of them
    teacher_ffn_dim: int = 1024  # hidden width of its feed-forward layers
    teacher_buckets: int = 32  # of relative positions
    teacher_distance: int = 128  # from which on all are alike
    teacher_dropout_rate: float = 0.1  # of the teacher
    train_teacher: bool = True  # False: it stays as it is, and only the others learn
    distillation: Literal["combined", "kl", "ce"] = "combined"  # from the teacher and the truth, or one of them
    alpha: float = 0.7  # share of the teacher in it
    temperature: float = 1.0  # tau of its softmaxes
    beam_size: int = 50  # prefixes kept at each digit of a beam search
    top: int = 50  # items that it returns
    cluster_sizes: tuple[int, ...] = (256, 256, 256)  # of the first digits; the last tells equal ones apart
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root

    def __post_init__(self):
        object.__setattr__(self, "cluster_sizes", tuple(self.cluster_sizes))
        if (self.attn_dim or self.d_model) % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide {self.attn_dim or self.d_model}")
        if len(self.cluster_sizes) != DIGITS - 1 or max(self.cluster_sizes) > self.codes:
            raise ValueError(f"cluster_sizes {self.cluster_sizes} are not {DIGITS - 1} sizes of at most {self.codes}")

    @property
    def vocabulary(self) -> int:
        """0 is padding and start; then the values of each digit; the user; the end."""
        return 3 + DIGITS * self.codes


# --- the read-out and the heads, which are the paper ------------------------------------------------------------------


class ReadOut(nn.Module):
    """One vector of the encoder's states: their mean asks, they answer, and a feed-forward layer follows."""

    config: Config

    @nn.compact
    def __call__(
        self, states: Float[Array, "B L D"], present: Bool[Array, "B L"], *, train: bool
    ) -> Float[Array, "B D"]:
        c = self.config
        width = c.attn_dim or c.d_model
        mean = masked_mean(states, present)
        query = Linear(c.d_model, name="query")(mean)

        def heads(x, name):
            return Linear(width, use_bias=False, name=name)(x).reshape(*x.shape[:2], c.num_heads, -1)

        q, k, v = (
            heads(query[:, None], "attention_query"),
            heads(states, "attention_key"),
            heads(states, "attention_value"),
        )
        _, weights = layers.dot_product_attention(
            q, k, v, mask=present[:, None, None, :], return_weights=True, implementation="xla"
        )
        weights = Dropout(c.dropout_rate)(weights.astype(v.dtype), train=train)
        read = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(-1, width)
        norm = lambda name: nn.LayerNorm(epsilon=c.layer_norm_epsilon, name=name)  # noqa: E731
        x = norm("norm1")(query + Linear(c.d_model, use_bias=False, name="attention_out")(read))
        hidden = jax.nn.relu(Linear(c.ffn_dim, name="ffn_in")(x))
        hidden = Linear(c.d_model, name="ffn_out")(Dropout(c.dropout_rate)(hidden, train=train))
        return norm("norm2")(x + hidden)


def masked_mean(x: Float[Array, "B L D"], present: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    count = jnp.maximum(jnp.sum(present, axis=1, keepdims=True), 1).astype(x.dtype)
    return jnp.einsum("bl,bld->bd", present.astype(x.dtype), x) / count


class Head(nn.Module):
    """The logits of one digit from the read-out and the digits before."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], *, train: bool) -> Float[Array, "*B K"]:
        c = self.config
        for i in range(c.head_layers):
            x = Linear(c.head_hidden, name=f"fc{i}")(x)
            x = layers.gelu(nn.LayerNorm(epsilon=c.layer_norm_epsilon, name=f"norm{i}")(x))
            x = Dropout(c.dropout_rate)(x, train=train)
        return Linear(c.codes, name="out")(x)


class Student(nn.Module):
    """A read-out and a head for each digit; digits are embedded as the teacher does, which is not changed by it."""

    config: Config

    def setup(self):
        self.read_out = ReadOut(self.config)
        self.heads = [Head(self.config) for _ in range(DIGITS)]

    def logits(
        self, read: Float[Array, "*B D"], embedded: Float[Array, "*B P E"], *, train: bool = False
    ) -> Float[Array, "*B K"]:
        """Of the digit that comes after the embedded ones."""
        digits = embedded.reshape(*embedded.shape[:-2], -1)
        return self.heads[embedded.shape[-2]](jnp.concatenate([read, digits], axis=-1), train=train)


# --- SID-MLP++: an encoder without attention --------------------------------------------------------------------------


class MixerEncoder(nn.Module):
    """x + MLP_p([x; mean of all x]) with an MLP for each place p of a token in its item, several times."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], present: Bool[Array, "B L"], *, train: bool) -> Float[Array, "B L D"]:
        c = self.config
        table = self.param("position_table", nn.initializers.normal(1.0), (c.mixer_length, x.shape[-1]))
        x = x + table[: x.shape[1]]
        for i in range(c.mixer_layers):
            mean = jnp.broadcast_to(masked_mean(x, present)[:, None], x.shape)
            x = x + PlaceMLPs(c, name=f"layers_{i}")(jnp.concatenate([x, mean], axis=-1), present, train=train)
        return nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)


class PlaceMLPs(nn.Module):
    """Linear, norm, GELU, dropout, linear, with the weights of expert (position - 1) mod P.

    The last expert also has the user in front and the end, the last token present. Where a token stands is known before
    the program runs, but for the end: so each expert sees its own tokens only, and the end is computed once more.
    """

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], present: Bool[Array, "B L"], *, train: bool) -> Float[Array, "B L D"]:
        c = self.config
        places, width = c.mixer_places, x.shape[-1] // 2
        into = ExpertLinear(places, c.mixer_ffn_dim, name="experts_in")
        norm = ExpertNorm(places, c.layer_norm_epsilon, name="experts_norm")
        out = ExpertLinear(places, width, name="experts_out")

        def experts(x, chosen):
            y = layers.gelu(norm(into(x, chosen), chosen))
            return out(Dropout(c.mixer_dropout_rate)(y, train=train), chosen)

        batch, length = x.shape[:2]
        body = jnp.pad(x[:, 1:], ((0, 0), (0, -(length - 1) % places), (0, 0)))
        body = experts(body.reshape(batch, -1, places, x.shape[-1]), slice(None))
        body = body.reshape(batch, -1, width)[:, : length - 1]
        last = jnp.maximum(jnp.sum(present, axis=1) - 1, 0)
        ends = jnp.stack([x[:, 0], x[jnp.arange(batch), last]], axis=1)[:, :, None]
        ends = experts(ends, slice(places - 1, places))[:, :, 0]
        y = jnp.concatenate([ends[:, :1], body], axis=1)
        return jnp.where((jnp.arange(length) == last[:, None])[..., None], ends[:, 1:], y)


class ExpertLinear(nn.Module):
    """x_p W_p + b_p for the experts p of the third axis, which are those of the slice `chosen`."""

    experts: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N P E"], chosen: slice) -> Float[Array, "B N P F"]:
        start = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", start, (self.experts, x.shape[-1], self.features))
        bias = self.param("bias", start, (self.experts * self.features,)).reshape(self.experts, -1)
        return jnp.einsum("bnpe,pef->bnpf", x, kernel[chosen]) + bias[chosen]


class ExpertNorm(nn.Module):
    """Layer norm with each expert's scale and shift. Float32 inside."""

    experts: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B N P E"], chosen: slice) -> Float[Array, "B N P E"]:
        size = (self.experts * x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, size).reshape(self.experts, -1)
        bias = self.param("bias", nn.initializers.zeros, size).reshape(self.experts, -1)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale[chosen] + bias[chosen]).astype(x.dtype)


# --- the teacher: T5, as TIGER uses it --------------------------------------------------------------------------------


class TeacherAttention(nn.Module):
    """Attention with added position biases and neither scale nor linear biases."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B Q D"], memory: Float[Array, "B L D"], *, bias: Any, mask: Any) -> Any:
        c = self.config

        def heads(name, x):
            y = Linear(c.teacher_heads * c.teacher_head_dim, use_bias=False, name=name)(x)
            return y.reshape(*x.shape[:2], c.teacher_heads, -1)

        q, k, v = heads("query", x), heads("key", memory), heads("value", memory)
        y = layers.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return Linear(c.d_model, use_bias=False, name="out")(y.reshape(*x.shape[:2], -1))


class TeacherLayer(nn.Module):
    """Pre-norm attention, attention to the encoder's states if there are any, and a ReLU feed-forward layer."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B Q D"], *, bias: Any, mask: Any, memory: Any, train: bool) -> Any:
        c = self.config
        drop = Dropout(c.teacher_dropout_rate)
        norm = partial(nn.RMSNorm, epsilon=1e-6)
        y = norm(name="norm1")(x)
        x = x + drop(TeacherAttention(c, name="attention")(y, y, bias=bias, mask=mask), train=train)
        if memory is not None:
            states, present = memory
            y = norm(name="norm2")(x)
            cross = TeacherAttention(c, name="cross")
            x = x + drop(cross(y, states, bias=None, mask=present[:, None, None, :]), train=train)
        y = Linear(c.teacher_ffn_dim, use_bias=False, name="ffn_in")(norm(name="norm3")(x))
        y = Linear(c.d_model, use_bias=False, name="ffn_out")(drop(jax.nn.relu(y), train=train))
        return x + drop(y, train=train)


class TeacherStack(nn.Module):
    """The layers of an encoder (without `memory`) or of a causal decoder; one table of position biases for all."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B Q D"], *, mask: Any, memory: Any, train: bool) -> Float[Array, "B Q D"]:
        c = self.config
        table = self.param("bias_table", nn.initializers.normal(0.1), (c.teacher_buckets, c.teacher_heads))
        positions = jnp.arange(x.shape[1])
        bias = layers.t5_relative_bias(
            table, positions, positions, bidirectional=memory is None, max_distance=c.teacher_distance
        )
        drop = Dropout(c.teacher_dropout_rate)
        x = drop(x, train=train)
        for i in range(c.teacher_layers):
            x = TeacherLayer(c, name=f"layers_{i}")(x, bias=bias, mask=mask, memory=memory, train=train)
        return drop(nn.RMSNorm(epsilon=1e-6, name="norm")(x), train=train)


# --- digits and their tree, made once of the data, in NumPy -----------------------------------------------------------


def semantic_ids(features: np.ndarray, cluster_sizes: tuple[int, ...], codes: int) -> np.ndarray:
    """(I, 4) digits: residual k-means of the items' features, then a number, from 1, among equal ones."""
    rng = np.random.Generator(np.random.PCG64(0))
    left, digits = features.astype(np.float64), []
    for size in cluster_sizes:
        centres = k_means(left, size, rng)
        digit = np.argmin(_distances(left, centres), axis=1)
        left = left - centres[digit]
        digits.append(digit)
    seen: dict[tuple[int, ...], int] = {}
    numbers = []
    for prefix in zip(*digits, strict=True):
        seen[prefix] = seen.get(prefix, 0) + 1
        numbers.append(seen[prefix])
    ids = np.stack([*digits, numbers], axis=1).astype(np.int32)
    if ids[:, -1].max() >= codes:
        raise UserError(
            f"{ids[:, -1].max()} items share three digits and a digit has {codes} values: use more clusters"
        )
    return ids


def _distances(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.sum(x**2, axis=1)[:, None] - 2 * x @ centres.T + np.sum(centres**2, axis=1)


def k_means(x: np.ndarray, size: int, rng: np.random.Generator, *, rounds: int = 20) -> np.ndarray:
    """Centres, each first a row drawn in proportion to its squared distance from those before."""
    centres = x[rng.integers(len(x))][None]
    nearest = _distances(x, centres)[:, 0]
    while len(centres) < size and (share := np.maximum(nearest, 0)).sum() > 1e-9:
        centres = np.concatenate([centres, x[rng.choice(len(x), p=share / share.sum())][None]])
        nearest = np.minimum(nearest, _distances(x, centres[-1:])[:, 0])
    for _ in range(rounds):
        own = np.argmin(_distances(x, centres), axis=1)
        counts = np.bincount(own, minlength=len(centres))[:, None]
        sums = np.zeros_like(centres)
        np.add.at(sums, own, x)
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
    return centres


def item_features(attributes: np.ndarray, sequences: Any, *, width: int = 32) -> np.ndarray:
    """Principal components of the attributes beside those of which items follow on each other, of equal weight."""
    rng = np.random.Generator(np.random.PCG64(0))
    first = np.concatenate([s[:-1] for s in sequences]) - 1
    second = np.concatenate([s[1:] for s in sequences]) - 1
    counts = np.maximum(
        np.bincount(first, minlength=len(attributes)) + np.bincount(second, minlength=len(attributes)), 1
    )
    weight = 1 / np.sqrt(counts[first] * counts[second])[:, None]
    basis = rng.normal(size=(len(attributes), min(width, len(attributes))))
    for _ in range(4):  # of a subspace iteration with the normalised matrix of transitions
        product = np.zeros_like(basis)
        np.add.at(product, first, weight * basis[second])
        np.add.at(product, second, weight * basis[first])
        basis = np.linalg.qr(product)[0]
    parts = []
    for part in (attributes.astype(np.float64), product):
        centred = part - part.mean(axis=0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        components = centred @ vectors[:, -128:]
        parts.append(components / max(np.sqrt(np.mean(np.sum(components**2, axis=1))), 1e-9))
    return np.concatenate(parts, axis=1)


def tree_tables(ids: np.ndarray, codes: int) -> dict[str, np.ndarray]:
    """The tree of all items' digits: `sid_table` (I + 1, 4) the digits; `node_table` (I + 1, 4) the node before each
    of them; `tree_table` (4, I + 1, K) where a digit leads from a node, 0: nowhere. Nodes count from 1 at each depth,
    the root is 0, and the last depth's nodes are the items. Of items with the same digits the first is found."""
    count = len(ids)
    digits = np.concatenate([np.zeros((1, DIGITS), np.int32), ids])
    nodes, tree = np.zeros((count + 1, DIGITS), np.int32), np.zeros((DIGITS, count + 1, codes), np.int32)
    for depth in range(DIGITS):
        last = 0
        for item in range(1, count + 1):
            place = depth, nodes[item, depth], digits[item, depth]
            if not tree[place]:
                last += 1
                tree[place] = item if depth == DIGITS - 1 else last
            if depth < DIGITS - 1:
                nodes[item, depth + 1] = tree[place]
    return {"sid_table": digits, "node_table": nodes, "tree_table": tree}


# --- all together -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Scores of the candidates: the log-probabilities of their digits, each among those that lead to some item."""

    config: Config

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (c.vocabulary, c.embed_dim))
        self.student = Student(c)
        if c.encoder != "given":
            self.teacher_encoder, self.teacher_decoder = TeacherStack(c), TeacherStack(c)
        if c.encoder == "mlp":
            self.mixer = MixerEncoder(c)
        plain = _plain_tables(c) if self.is_initializing() else {}
        names = ("sid_table", "node_table", "tree_table")
        held = {name: self.variable("constants", name, lambda name=name: jnp.asarray(plain[name])) for name in names}
        self.tables = {name: jnp.asarray(variable.value) for name, variable in held.items()}

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *M"]]:
        c = self.config
        true = self.tables["sid_table"][batch["candidates"][:, 0]]
        states, present, encoded, mismatch = self.encoded(batch, train=train)
        read = self.student.read_out(states, present, train=train)
        embedded = jax.lax.stop_gradient(self.embedding)[self._tokens_of(true)]
        student = jnp.stack([self.student.logits(read, embedded[:, :t], train=train) for t in range(DIGITS)], axis=1)
        outputs = {}
        if encoded is None:
            losses = {"loss_student": cross_entropies(student, true)}
        else:
            every = self.teacher_logits(self._tokens_of(true)[:, :-1], encoded, present, train=train)
            slices = jax.lax.stop_gradient(self._of_digits(every))
            losses = {
                "loss_student": distillation_losses(student, slices, true, c),
                "loss_teacher": cross_entropies(every, self._tokens_of(true)) / DIGITS * float(c.train_teacher),
            }
        if mismatch is not None:
            losses["loss_encoder"] = mismatch
        if not train:
            outputs["scores"] = self.scores(read, batch["candidates"])
        return outputs | losses

    def encoded(self, batch: Batch, *, train: bool = False) -> tuple[Any, Any, Any, Any]:
        """(states for the student, which are present, the teacher's states, each example's distance between both)."""
        c = self.config
        if c.encoder == "given":
            return batch["encoded"], batch["encoded_present"], None, None
        tokens = self.tokens(batch["items"])
        present, x = tokens > 0, self.embedding[tokens]
        encoded = self.teacher_encoder(x, mask=present[:, None, None, :], memory=None, train=train and c.train_teacher)
        if not c.train_teacher:
            encoded = jax.lax.stop_gradient(encoded)
        states, mismatch = jax.lax.stop_gradient(encoded), None
        if c.encoder == "mlp":
            mixed = self.mixer(jax.lax.stop_gradient(x), present, train=train)
            error = jnp.mean(jnp.square((mixed - states).astype(jnp.float32)), axis=-1)
            mismatch = jnp.sum(error * present, axis=1) / jnp.sum(present, axis=1)
            states = jax.lax.stop_gradient(mixed)
        return states, present, encoded, mismatch

    def tokens(self, items: Int[Array, "B L"]) -> Int[Array, "B T"]:
        """The user, four digits an item, the end, then padding."""
        c, (batch, length) = self.config, items.shape
        count = jnp.sum(items > 0, axis=1, keepdims=True)
        moved = jnp.arange(length) + length - count  # histories stand on the right, tokens on the left
        items = jnp.take_along_axis(items, jnp.minimum(moved, length - 1), axis=1)
        digits = self._tokens_of(self.tables["sid_table"][items]).reshape(batch, -1)
        place = jnp.arange(DIGITS * length)
        user, end = DIGITS * c.codes + 1, DIGITS * c.codes + 2
        digits = jnp.where(place < DIGITS * count, digits, jnp.where(place == DIGITS * count, end, 0))
        full = jnp.where(count == length, end, 0)
        return jnp.concatenate([jnp.full((batch, 1), user), digits, full], axis=1)

    def _tokens_of(self, digits: Int[Array, "*B P"]) -> Int[Array, "*B P"]:
        return digits + 1 + self.config.codes * jnp.arange(digits.shape[-1])

    def _of_digits(self, logits: Float[Array, "B P V"]) -> Float[Array, "B P K"]:
        """Of every place, the part of the vocabulary that its digit comes from."""
        codes = self.config.codes
        parts = [logits[:, t, 1 + t * codes : 1 + (t + 1) * codes] for t in range(logits.shape[1])]
        return jnp.stack(parts, axis=1)

    def teacher_logits(
        self,
        prefix: Int[Array, "B P"],
        encoded: Float[Array, "B L D"],
        present: Bool[Array, "B L"],
        *,
        train: bool = False,
    ) -> Float[Array, "B _ V"]:
        """Of the token after each of the prefix, and before it, by the decoder."""
        c = self.config
        x = self.embedding[jnp.pad(prefix, ((0, 0), (1, 0)))]
        mask = layers.CausalMask()
        y = self.teacher_decoder(x, mask=mask, memory=(encoded, present), train=train and c.train_teacher)
        logits = (y * c.d_model**-0.5) @ self.embedding.T
        return logits if c.train_teacher else jax.lax.stop_gradient(logits)

    def scores(self, read: Float[Array, "B D"], candidates: Int[Array, "B M"]) -> Float[Array, "B M"]:
        """The student's log-probabilities of items."""
        digits, nodes = (self.tables[name][candidates] for name in ("sid_table", "node_table"))
        embedded = self.embedding[self._tokens_of(digits)]
        many = jnp.broadcast_to(read[:, None], (*candidates.shape, read.shape[-1]))
        total = jnp.zeros(candidates.shape, jnp.float32)
        for t in range(DIGITS):
            logits = self.student.logits(many, embedded[..., :t, :])
            total += self._step(t, logits, nodes[..., t], digits[..., t])
        return total

    def teacher_scores(self, batch: Batch) -> Float[Array, "B M"]:
        """The teacher's log-probabilities of the candidates."""
        _, present, encoded, _ = self.encoded(batch)
        candidates, total = batch["candidates"], 0.0
        digits, nodes = (self.tables[name][candidates] for name in ("sid_table", "node_table"))
        many = candidates.shape[1]
        prefix = self._tokens_of(digits)[..., :-1].reshape(-1, DIGITS - 1)
        states, mask = (jnp.repeat(a, many, axis=0) for a in (encoded, present))
        logits = self._of_digits(self.teacher_logits(prefix, states, mask)).reshape(-1, many, DIGITS, self.config.codes)
        for t in range(DIGITS):
            total += self._step(t, logits[:, :, t], nodes[..., t], digits[..., t])
        return total

    def _step(self, depth: int, logits: Any, nodes: Any, digits: Any) -> Float[Array, "B M"]:
        chosen = self._log_probabilities(depth, logits, nodes)
        return jnp.take_along_axis(chosen, digits[..., None], axis=-1)[..., 0]

    def _log_probabilities(
        self, depth: int, logits: Float[Array, "*B K"], nodes: Int[Array, "*B"]
    ) -> Float[Array, "*B K"]:
        """Among the digits that lead on from a node; the first digit's are not told apart, as in the official code."""
        logits = logits.astype(jnp.float32)
        if depth == 0:
            return jax.nn.log_softmax(logits, axis=-1)
        leads = self.tables["tree_table"][depth][nodes] > 0
        # Not -inf, of which a node without children would make NaN.
        return jax.nn.log_softmax(jnp.where(leads, logits, _NEVER), axis=-1)

    def beam_search(
        self, states: Float[Array, "B L D"], present: Bool[Array, "B L"]
    ) -> tuple[Int[Array, "B _"], Float[Array, "B _"]]:
        """(items, log-probabilities) of the best, digit by digit; item 0: there are no more."""
        c = self.config
        batch, codes = len(states), c.codes
        read = self.student.read_out(states, present, train=False)
        nodes, totals = jnp.zeros((batch, 1), jnp.int32), jnp.zeros((batch, 1))
        prefix = jnp.zeros((batch, 1, 0), jnp.int32)
        for t in range(DIGITS):
            wide = jnp.broadcast_to(read[:, None], (*nodes.shape, read.shape[-1]))
            logits = self.student.logits(wide, self.embedding[self._tokens_of(prefix)])
            leads = self.tables["tree_table"][t][nodes]
            scores = totals[..., None] + self._log_probabilities(t, logits, nodes)
            if t > 0:
                scores = jnp.where(leads > 0, scores, -jnp.inf)
            keep = min(c.beam_size if t < DIGITS - 1 else c.top, nodes.shape[1] * codes)
            totals, place = jax.lax.top_k(scores.reshape(batch, -1), keep)
            nodes = jnp.take_along_axis(leads.reshape(batch, -1), place, axis=1)
            before = jnp.take_along_axis(prefix, (place // codes)[..., None], axis=1)
            prefix = jnp.concatenate([before, (place % codes)[..., None]], axis=-1)
        return jnp.where(jnp.isfinite(totals), nodes, 0), totals


_NEVER = -1e30


def _plain_tables(config: Config) -> dict[str, np.ndarray]:
    """A tree for a model without data: items are numbered through the digits."""
    item, places = np.arange(config.num_items), []
    for size in config.cluster_sizes:
        places.append(item % size)
        item = item // size
    ids = np.stack([*places, 1 + item % (config.codes - 1)], axis=1).astype(np.int32)
    return tree_tables(ids, config.codes)


def cross_entropies(logits: Float[Array, "B P K"], labels: Int[Array, "B P"]) -> Float[Array, " B"]:
    """Summed over the digits."""
    log = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.take_along_axis(log, labels[..., None], axis=-1)[..., 0], axis=1)


def distillation_losses(
    student: Float[Array, "B P K"], teacher: Float[Array, "B P K"], labels: Int[Array, "B P"], config: Config
) -> Float[Array, " B"]:
    """sum_t alpha tau^2 KL(softmax(teacher / tau), softmax(student / tau)) + (1 - alpha) cross-entropy, or one."""
    tau = config.temperature
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / tau, axis=-1) for x in (student, teacher))
    divergence = tau**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=(1, 2))
    share = {"combined": config.alpha, "kl": 1.0, "ce": 0.0}[config.distillation]
    return share * divergence + (1 - share) * cross_entropies(student, labels)


def loss(outputs: Mapping[str, jax.Array], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The student's loss, and the teacher's and the MLP encoder's where they learn as well."""
    parts = {name: jnp.mean(value) for name, value in outputs.items() if name.startswith("loss_")}
    return sum(parts.values()), parts


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    batch = recommendation.example(history=config.history, num_items=config.num_items, batch_size=batch_size, key=key)
    if config.encoder == "given":
        batch["encoded"] = jax.random.normal(key, (batch_size, 8, config.d_model))
        batch["encoded_present"] = jnp.ones((batch_size, 8), bool)
    return batch


def constants(config: Config, data: Any) -> dict[str, Any]:
    """The digits of the data set's items and their tree."""
    ids = semantic_ids(item_features(data.attributes[1:], data.sequences), config.cluster_sizes, config.codes)
    return tree_tables(ids, config.codes)


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "embed_dim": "embed_dim",
    "d_model": "d_model",
    "num_heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "dropout": "dropout_rate",
    "head_hidden": "head_hidden",
    "head_layers": "head_layers",
    "attn_dim": "attn_dim",
    "loss": "distillation",
    "temperature": "temperature",
    "alpha": "alpha",
}
_BEAM_HPARAMS = _HPARAMS | {"beam_size": "beam_size", "final_top_n": "top"}
_ENCODER_HPARAMS = {
    "d_model": "d_model",
    "ffn_dim": "mixer_ffn_dim",
    "num_layers": "mixer_layers",
    "dropout": "mixer_dropout_rate",
    "max_seq_len": "mixer_length",
    "num_positions": "mixer_places",
}


def _reads(names: Mapping[str, str], **fixed: Any):
    def config(hparams: Mapping[str, Any]) -> Config:
        return Config(**{ours: hparams[theirs] for theirs, ours in names.items() if theirs in hparams}, **fixed)

    return config


def _writes(names: Mapping[str, str]):
    return lambda config: {theirs: getattr(config, ours) for theirs, ours in names.items()}


def student_table(config: Config) -> Table:
    yield from parameter("embedding.weight", "embedding")
    read = "student/read_out"
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        yield from linear(f"cross_attn.{theirs}_proj", f"{read}/attention_{ours}", bias=False)
    yield from linear("query_proj", f"{read}/query")
    yield from layer_norm("norm1", f"{read}/norm1")
    yield from layer_norm("norm2", f"{read}/norm2")
    yield from linear("ffn.0", f"{read}/ffn_in")
    yield from linear("ffn.3", f"{read}/ffn_out")
    for t in range(DIGITS):
        theirs, ours, more = f"head{t + 1}", f"student/heads_{t}", config.head_layers - 1
        yield from linear(f"{theirs}.0", f"{ours}/fc0")
        yield from layer_norm(f"{theirs}.1", f"{ours}/norm0")
        for i in range(1, more + 1):
            yield from linear(f"{theirs}.{3 + i}.fc", f"{ours}/fc{i}")
            yield from layer_norm(f"{theirs}.{3 + i}.norm", f"{ours}/norm{i}")
        yield from linear(f"{theirs}.{4 + more}", f"{ours}/out")


def encoder_table(config: Config) -> Table:
    yield from parameter("pos_embed.weight", "mixer/position_table")
    yield from layer_norm("norm", "mixer/norm")
    names = {"0.weight": "in/kernel", "0.bias": "in/bias", "1.weight": "norm/scale", "1.bias": "norm/bias"}
    names |= {"4.weight": "out/kernel", "4.bias": "out/bias"}
    for i in range(config.mixer_layers):
        for theirs, ours in names.items():
            official = tuple(f"layers.{i}.{p}.{theirs}" for p in range(config.mixer_places))
            axes = {"stack": True} if ours.endswith("kernel") else {}
            join = end_to_end(config.mixer_places, *((1, 0) if axes else (0,)), **axes)
            yield Row(official, (f"params/mixer/layers_{i}/experts_{ours}",), join)


class EncoderOnly(nn.Module):
    """The encoder of SID-MLP++ by itself."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B L D"]:
        return MixerEncoder(self.config, name="mixer")(batch["encoded"], batch["encoded_present"], train=train)


def student_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Digits that are not given are the likeliest of the head before."""
    c = model.config

    def run(model: Model) -> dict[str, jax.Array]:
        read = model.student.read_out(inputs["enc_seq"], jnp.logical_not(inputs["enc_mask"]), train=False)
        frozen, prefix, logits = jax.lax.stop_gradient(model.embedding), [], []
        for t in range(DIGITS):
            embedded = frozen[jnp.stack(prefix, axis=1)] if prefix else jnp.zeros((len(read), 0, c.embed_dim))
            logits.append(model.student.logits(read, embedded))
            given = inputs.get(f"d{t + 1}_ids")
            prefix.append(jnp.argmax(logits[-1], axis=-1) + 1 + t * c.codes if given is None else jnp.asarray(given))
        found = {f"logits{t + 1}": value for t, value in enumerate(logits)}
        if "teacher_logits" not in inputs:
            return found
        losses = distillation_losses(
            jnp.stack(logits, axis=1), inputs["teacher_logits"], jnp.asarray(inputs["labels"]), c
        )
        return found | {"loss": jnp.mean(losses)}

    return nn.apply(run, model)(jax.tree.map(jnp.asarray, {**variables, "constants": _plain_tables(c)}))


def beam_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    c = model.config
    offsets = 1 + c.codes * np.arange(DIGITS)
    ids = np.asarray(inputs["items"]) - offsets
    tables = tree_tables(ids.astype(np.int32), c.codes)
    variables = jax.tree.map(jnp.asarray, {**variables, "constants": tables})
    states = jnp.asarray(inputs["enc_seq"]), jnp.logical_not(inputs["enc_mask"])
    items, scores = model.apply(variables, *states, method="beam_search")
    numbers = {tuple(row): i for i, row in reversed([*enumerate(ids.tolist())])}
    true = np.array([numbers[tuple(row)] for row in (np.asarray(inputs["labels"]) - offsets).tolist()])
    hit = items[:, :10] - 1 == true[:, None]
    gains = jnp.sum(hit / np.log2(2.0 + np.arange(hit.shape[1])), axis=1)
    return {
        "item_ids": items - 1,
        "scores": scores,
        "recall10": jnp.mean(jnp.any(hit, axis=1).astype(jnp.float32)),
        "ndcg10": jnp.mean(gains),
    }


def encoder_call(
    model: nn.Module, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    padding = inputs.get("src_key_padding_mask")
    present = jnp.ones(inputs["x"].shape[:2], bool) if padding is None else jnp.logical_not(padding)
    variables = jax.tree.map(jnp.asarray, variables)
    return {"y": model.apply(variables, {"encoded": inputs["x"], "encoded_present": present})}


PAPER = Paper(
    slug="sid_mlp",
    task=recommendation.TASK,
    model=Model,
    example=example,
    loss=loss,
    constants=constants,
    configs={
        "tiny": Config(
            history=8,
            codes=16,
            embed_dim=32,
            d_model=32,
            num_heads=2,
            attn_dim=48,
            ffn_dim=64,
            head_hidden=64,
            dropout_rate=0.0,
            mixer_layers=2,
            mixer_ffn_dim=64,
            mixer_dropout_rate=0.0,
            teacher_layers=2,
            teacher_heads=2,
            teacher_head_dim=16,
            teacher_ffn_dim=64,
            teacher_dropout_rate=0.0,
            cluster_sizes=(8, 8, 8),
        ),
        # The paper's sizes on public sets; its own are Amazon's reviews of 2023.
        "beauty": Config(num_items=12_101),
        "beauty_plus": Config(num_items=12_101, encoder="mlp"),
        "movielens100k": Config(num_items=1_682),
        "movielens100k_plus": Config(num_items=1_682, encoder="mlp"),
        "movielens100k_small": Config(  # for two CPU cores
            num_items=1_682,
            embed_dim=64,
            d_model=64,
            attn_dim=64,
            ffn_dim=256,
            head_hidden=128,
            teacher_layers=2,
            teacher_heads=4,
            teacher_head_dim=16,
            teacher_ffn_dim=256,
            cluster_sizes=(64, 64, 64),
        ),
    },
    officials=(
        Official(
            module="sid_mlp/models.py:SIDMLP (+ sid_mlp/losses.py:loss_fn)",
            config=_reads(_HPARAMS, encoder="given"),
            hparams=_writes(_HPARAMS),
            table=student_table,
            call=student_call,
        ),
        Official(
            module="sid_mlp/inference.py:evaluate_loader (constrained beam search)",
            config=_reads(_BEAM_HPARAMS, encoder="given"),
            hparams=_writes(_BEAM_HPARAMS),
            table=student_table,
            call=beam_call,
        ),
        Official(
            module="sid_mlp/pretrain_encoder.py:SIDMLPPlusPlusEncoder",
            config=_reads(_ENCODER_HPARAMS, encoder="given"),
            hparams=_writes(_ENCODER_HPARAMS),
            table=encoder_table,
            call=encoder_call,
            model=EncoderOnly,
        ),
    ),
    reported={
        "musical_instruments": {"ndcg10": 0.0332},
        "industrial_scientific": {"ndcg10": 0.0250},
        "video_games": {"ndcg10": 0.0512},
    },
    quirks=(
        "a beam's log-probabilities are those among the digits that lead to an item; the first digit's are not",
        "padded positions of the MLP encoder are updated too, and left out of its mean",
    ),
)
