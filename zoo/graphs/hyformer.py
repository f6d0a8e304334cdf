"""Hyformer: joint generation of molecules and prediction of their properties (szczurek-lab, arXiv:2504.16559).

Official code: szczurek-lab/hyformer@34d72f8 (BSD-3-Clause). Fidelity: exact.
New: one transformer is a causal decoder or a bidirectional encoder of SMILES; a token in front says which task it is,
and the task picks the mask and the head, all weights in between being shared. It learns to continue strings, restore
hidden symbols, count descriptors and predict properties at once.
Differs: the loss is the weighted sum of the tasks' (`objective="summed"`) as in the paper, or of one task drawn for a
batch as in the official code ("drawn"); sampling keeps keys and values.
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
from zoo.backbones.generation import sample
from zoo.blocks import Dropout, Linear, RMSNorm, stack
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import molecules
from zoo.tasks.task import Batch, Task
from zoo.tasks.tokens import masked_mean, token_errors
from zoo.weights.table import Table, fused_linear, layer_norm, linear, shared

TASKS = ("generation", "reconstruction", "descriptors", "prediction")


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    length: int = 127  # L, places of a string with its beginning and end; the task's token stands before them
    vocabulary: int = 122  # V, tokens, special ones among them
    num_targets: int = 0  # K, properties to predict; 0: no head for them
    targets: Literal["measurements", "classes"] = "measurements"  # numbers, or yes and no
    num_descriptors: int = 200  # C, further numbers that are known of every molecule
    d_model: int = 256  # D, width of a token
    d_ff: int = 1024  # width of the gated layer
    num_layers: int = 8  # of the trunk
    num_heads: int = 8  # of the attention
    use_bias: bool = False  # of the attention's projections
    descriptor_width: int = 256  # of the descriptor head's hidden layer
    norm_epsilon: float = 1e-5  # of the trunk's norms
    head_norm_epsilon: float = 1e-5  # of the descriptor head's norm
    rope_base: float = 10_000.0  # of the rotary frequencies
    attention_dropout_rate: float = 0.0  # of attention weights
    dropout_rate: float = 0.0  # of the prediction head
    objective: Literal["summed", "drawn"] = "drawn"  # of all tasks on every batch, or of one drawn by its weight
    task_weights: tuple[float, float, float, float] = (90.0, 5.0, 5.0, 0.0)  # of TASKS; only their ratios count
    pad_id: int = 0  # the token that fills strings up
    unknown_id: int = 11  # that of other symbols, which nothing learns to write
    mask_id: int = 14  # that of hidden symbols
    bos_id: int = 117  # the beginning
    eos_id: int = 118  # the end
    generate_id: int = 119  # the task: write
    predict_id: int = 120  # the task: predict
    restore_id: int = 121  # the task: restore

    def __post_init__(self):
        if self.d_model % (2 * self.num_heads):
            raise ValueError(f"d_model {self.d_model} is not num_heads {self.num_heads} times an even width")
        if self.objective not in ("summed", "drawn") or self.targets not in ("measurements", "classes"):
            raise ValueError(f"objective {self.objective!r} or targets {self.targets!r} is unknown")
        if len(self.task_weights) != 4 or min(self.task_weights) < 0 or not sum(self.task_weights):
            raise ValueError(f"task_weights {self.task_weights} are not four shares of {', '.join(TASKS)}")
        if self.task_weights[3] > 0 and not self.num_targets:
            raise ValueError("task_weights give prediction a share, and num_targets is 0")
        if len(set(self.special.values())) < 8 or max(self.special.values()) >= self.vocabulary:
            raise ValueError(f"the special tokens {self.special} are not eight below vocabulary {self.vocabulary}")

    @property
    def special(self) -> dict[str, int]:
        """The tokens that stand for no symbol."""
        return {
            "pad": self.pad_id, "unknown": self.unknown_id, "mask": self.mask_id, "bos": self.bos_id,
            "eos": self.eos_id, "generate": self.generate_id, "predict": self.predict_id, "restore": self.restore_id,
        }  # fmt: skip

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights of TASKS, as shares of one."""
        return tuple(weight / sum(self.task_weights) for weight in self.task_weights)


_NORMAL = nn.initializers.normal(0.02)
_projection = partial(Linear, kernel_init=_NORMAL, bias_init=nn.initializers.zeros)


class Attention(nn.Module):
    """Softmax attention with rotary positions, under the mask of each row's task."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        causal: Bool[Array, " B"] | None,
        present: Bool[Array, "B T"] | None,
        cache: layers.KeyValueCache | None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], layers.KeyValueCache | None]:
        c = self.config
        query, key, value = (
            _projection(c.d_model, use_bias=c.use_bias, name=name)(x).reshape(*x.shape[:2], c.num_heads, -1)
            for name in ("query", "key", "value")
        )
        place = jnp.arange(x.shape[1])[None] + (0 if cache is None else cache.length[:, None])
        angles = layers.rope_angles(place, layers.rope_frequencies(query.shape[-1], base=c.rope_base))
        query, key = (layers.apply_rope(y, angles, interleaved=True) for y in (query, key))
        if cache is not None:
            mixed, cache = layers.decode_step(query, key, value, cache)
        else:
            # Behind a string's end nothing is looked at: a causal row needs no mask of what is present.
            writes = layers.DenseMask(causal[:, None, None, None])
            mask = (writes & layers.CausalMask()) | (~writes & layers.KeyMask(present))
            if train and c.attention_dropout_rate > 0:
                _, weights = layers.dot_product_attention(query, key, value, mask=mask, return_weights=True)
                kept = Dropout(c.attention_dropout_rate)(weights, train=train)
                mixed = jnp.einsum("bhqk,bkhd->bqhd", kept.astype(value.dtype), value)
            else:
                mixed = layers.dot_product_attention(query, key, value, mask=mask)
        return _projection(c.d_model, use_bias=c.use_bias, name="out")(mixed.reshape(x.shape)), cache


class Layer(nn.Module):
    """x + Attention(norm(x)), then x + W_2 (SiLU(W_1 y) * W_3 y) of y = norm(x); what else it gets it passes on."""

    config: Config

    @nn.compact
    def __call__(self, state: tuple, *, train: bool) -> tuple:
        c, (x, causal, present, cache) = self.config, state
        normal = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        mixed, cache = Attention(c, name="attention")(normal, causal, present, cache, train=train)
        x = x + mixed
        normal = RMSNorm(c.norm_epsilon, name="feed_forward_norm")(x)
        gate, up = (_projection(c.d_ff, use_bias=False, name=name)(normal) for name in ("gate", "up"))
        hidden = layers.gated_linear_unit(up, gate, activation="silu")
        return x + _projection(c.d_model, use_bias=False, name="down")(hidden), causal, present, cache


class Trunk(nn.Module):
    """(states of the tokens, the table of embeddings, whose rows also name tokens; the caches if there are any)."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        causal: Bool[Array, " B"] | None = None,
        present: Bool[Array, "B T"] | None = None,
        caches: tuple[layers.KeyValueCache, ...] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], tuple]:
        c = self.config
        table = self.param("embedding", _NORMAL, (c.vocabulary, c.d_model))
        x, grown = table[tokens], []
        if caches is None:
            x = stack(self, partial(Layer, c), c.num_layers, (x, causal, present, None), train=train)[0]
        for i, cache in enumerate(caches or ()):
            x, _, _, cache = Layer(c, name=f"layers_{i}")((x, None, None, cache), train=train)
            grown.append(cache)
        return RMSNorm(c.norm_epsilon, name="norm")(x), table, tuple(grown)


class DescriptorHead(nn.Module):
    """W_2 LayerNorm(GELU(W_1 x + b_1)) + b_2."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B C"]:
        c = self.config
        hidden = layers.gelu(_projection(c.descriptor_width, name="hidden")(x))
        hidden = nn.LayerNorm(epsilon=c.head_norm_epsilon, name="norm")(hidden)
        return _projection(c.num_descriptors, name="out")(hidden)


class PredictionHead(nn.Module):
    """W_2 drop(GELU(W_1 drop(x) + b_1)) + b_2; one class has two logits. Starts as torch's layers do by default."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, train: bool) -> Float[Array, "B _"]:
        c, drop = self.config, Dropout(self.config.dropout_rate)
        hidden = drop(layers.gelu(Linear(c.d_model, name="hidden")(drop(x, train=train))), train=train)
        return Linear(2 if c.targets == "classes" and c.num_targets == 1 else c.num_targets, name="out")(hidden)


def draw_task(key: jax.Array, config: Config) -> Int[Array, ""]:
    """The number in TASKS of the one that a batch is trained on, each as likely as its weight says."""
    return jax.random.categorical(key, jnp.log(jnp.array(config.shares)))


class Model(nn.Module):
    """The tasks' outputs, each from a row of its own whose first token names the task."""

    config: Config

    def setup(self):
        self.trunk = Trunk(self.config)
        self.descriptor_head = DescriptorHead(self.config)
        if self.config.num_targets:
            self.prediction_head = PredictionHead(self.config)

    def embed(
        self, tokens: Int[Array, "B T"], causal: Bool[Array, " B"], present: Bool[Array, "B T"], *, train: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        """States of whole rows, task's token included, and the table that gives their logits."""
        x, table, _ = self.trunk(tokens, causal, present, train=train)
        return x, table

    def decode(self, tokens: Int[Array, "B T"], caches: tuple) -> tuple[Float[Array, "B V"], tuple]:
        """Logits of what comes after these further tokens."""
        x, table, caches = self.trunk(tokens, caches=caches)
        return x[:, -1] @ table.T, caches

    def describe(self, first: Float[Array, "B D"]) -> Float[Array, "B C"]:
        return self.descriptor_head(first)

    def score(self, first: Float[Array, "B D"], *, train: bool = False) -> Float[Array, "B _"]:
        """The prediction head's own outputs: two logits where there is one class."""
        return self.prediction_head(first, train=train)

    def _predict(self, first: Float[Array, "B D"], train: bool) -> Float[Array, "B K"]:
        if not self.config.num_targets:
            return jnp.zeros((first.shape[0], 0), first.dtype)
        raw = self.score(first, train=train)
        return raw if raw.shape[-1] == self.config.num_targets else raw[:, 1:] - raw[:, :1]  # log odds of two logits

    def predict(self, tokens: Int[Array, "B L"], present: Bool[Array, "B L"]) -> Float[Array, "B K"]:
        """Properties of strings: in standard units, or log odds."""
        rows, there = self._rows(tokens, present, self.config.predict_id)
        return self._predict(self.embed(rows, jnp.zeros(len(rows), bool), there)[0][:, 0], False)

    @staticmethod
    def _rows(tokens, present, first):
        front = jnp.broadcast_to(jnp.asarray(first, tokens.dtype), (tokens.shape[0], 1))
        return jnp.concatenate([front, tokens], axis=1), jnp.pad(present, ((0, 0), (1, 0)), constant_values=True)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        c, tokens, present = self.config, batch["tokens"], batch["mask"]
        size, weights = tokens.shape[0], jnp.array(c.shares)
        if train and c.objective == "drawn" and not self.is_initializing():
            number = draw_task(self.make_rng("dropout"), c)
            first = jnp.array([c.generate_id, c.restore_id, c.predict_id, c.predict_id])[number]
            rows, there = self._rows(jnp.where(number == 1, batch["corrupted"], tokens), present, first)
            x, table = self.embed(rows, jnp.broadcast_to(number == 0, (size,)), there, train=train)
            # One row does for every head: those of the tasks that were not drawn count nothing.
            writing, restoring, predicting = x, x, x
            weights = jax.nn.one_hot(number, 4)
        else:
            kinds = ((c.generate_id, tokens), (c.restore_id, batch["corrupted"]), (c.predict_id, tokens))
            rows, there = (
                jnp.concatenate(parts)
                for parts in zip(*(self._rows(row, present, first) for first, row in kinds), strict=True)
            )
            x, table = self.embed(rows, jnp.arange(3 * size) < size, there, train=train)
            writing, restoring, predicting = jnp.split(x, 3)
        return {
            "next": writing[:, 1:] @ table.T,
            "restored": restoring[:, 1:] @ table.T,
            "described": self.describe(predicting[:, 0]),
            "predictions": self._predict(predicting[:, 0], train),
            "embedding": predicting[:, 0],
            "weights": jnp.broadcast_to(weights, (size, 4)),
        }

    def generate(
        self,
        variables: Mapping[str, Any],
        key: jax.Array,
        *,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = 25,
        length: int | None = None,
        cached: bool = True,
    ) -> Int[Array, "B L"]:
        """`count` new strings of at most `length` tokens (None: the model's), from the beginning to the end, then
        filled up; drawn from the `top_k` likeliest tokens. `cached` changes nothing but how long it takes."""
        if count < 1 or temperature <= 0 or (top_k is not None and top_k < 1):
            raise UserError(
                f"count {count} and top_k {top_k} should be at least 1, and temperature {temperature} above 0"
            )
        length = self.config.length if length is None else length
        return _generate(self, dict(variables), key, jnp.float32(temperature), count, top_k, length, cached)

    def generate_towards(
        self, variables: Mapping[str, Any], key: jax.Array, *, wanted: float, keep: int, count: int, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of `count` generated strings the `keep` different ones whose first property the same network predicts
        nearest to `wanted`, and these predictions (standard units, or log odds)."""
        if not self.config.num_targets:
            raise UserError("generation towards a property needs a model with num_targets of at least 1")
        strings = np.unique(np.asarray(self.generate(variables, key, count=count, **options)), axis=0)
        tokens = jnp.asarray(strings)
        found = np.asarray(self.apply(variables, tokens, tokens != self.config.pad_id, method="predict"))[:, 0]
        best = np.argsort(np.abs(found - wanted), kind="stable")[:keep]
        return strings[best], found[best]


@partial(jax.jit, static_argnames=("model", "count", "top_k", "length", "cached"))
def _generate(model, variables, key, temperature, count, top_k, length, cached):
    c, total = model.config, length + 1
    variables = jax.lax.stop_gradient(variables)
    start = jnp.array([c.generate_id, c.bos_id], jnp.int32)
    tokens = jnp.full((count, total), c.pad_id, jnp.int32).at[:, :2].set(start)
    dtype = variables["params"]["trunk"]["embedding"].dtype
    empty = layers.empty_cache(count, total, c.num_heads, c.d_model // c.num_heads, dtype=dtype)
    caches = (empty,) * c.num_layers if cached else ()

    def write(i, tokens, logits, done):
        drawn = sample(logits, jax.random.fold_in(key, i), temperature=temperature, top_k=top_k)
        drawn = jnp.where(done, c.pad_id, drawn).astype(tokens.dtype)
        return tokens.at[:, i].set(drawn), done | (drawn == c.eos_id) | (drawn == c.pad_id)

    def step(i, state):
        tokens, done, caches = state
        if cached:
            last = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
            logits, caches = model.apply(variables, last, caches, method="decode")
        else:
            everyone = jnp.ones(count, bool)
            x, table = model.apply(variables, tokens, everyone, jnp.ones(tokens.shape, bool), method="embed")
            logits = x[:, i - 1] @ table.T
        return *write(i, tokens, logits, done), caches

    if cached:  # the task's token is read before the loop, which reads one token a step
        _, caches = model.apply(variables, tokens[:, :1], caches, method="decode")
    tokens, _, _ = jax.lax.fori_loop(2, total, step, (tokens, jnp.zeros(count, bool), caches))
    ended = jnp.any(tokens == c.eos_id, axis=1)
    return tokens.at[:, -1].set(jnp.where(ended, tokens[:, -1], c.eos_id))[:, 1:]


def loss(outputs: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The tasks' mean errors by their weights."""
    found = molecules.losses(outputs, batch)
    weights = dict(zip(TASKS, jnp.mean(outputs["weights"].astype(jnp.float32), axis=0), strict=True))
    return sum((weights[name] * error for name, error in found.items()), jnp.zeros(())), found


def task_of(config: Config) -> Task:
    if not config.num_targets:
        return molecules.LANGUAGE
    return molecules.CLASSES if config.targets == "classes" else molecules.MEASUREMENTS


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return molecules.example(
        length=config.length,
        vocabulary=config.vocabulary,
        num_targets=config.num_targets,
        num_descriptors=config.num_descriptors,
        classes=config.targets == "classes",
        special=config.special,
        batch_size=batch_size,
        key=key,
    )


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "vocab_size": "vocabulary",
    "embedding_dim": "d_model",
    "embedding_hidden_dim": "d_ff",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "layer_norm_eps": "norm_epsilon",
    "attention_dropout": "attention_dropout_rate",
    "num_physchem_tasks": "num_descriptors",
    "num_tasks": "num_targets",
    "pooler_dropout": "dropout_rate",
}
_TOKENS = {
    "PAD": "pad_id",
    "UNK": "unknown_id",
    "MASK": "mask_id",
    "BOS": "bos_id",
    "EOS": "eos_id",
    "GEN": "generate_id",
    "PRED": "predict_id",
    "REC": "restore_id",
}
_KINDS = {"regression": "measurements", "classification": "classes"}


@dataclass(frozen=True)
class OfficialConfig(Config):
    """A configuration with how strings are generated: length with the task's token, number, temperature, top k."""

    generation: tuple[int, int, float, int] | None = None


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    vocabulary = ours.get("vocabulary", Config.vocabulary)
    # The five tokens that are added at run time come last, in the order of their names here.
    added = {name: vocabulary - 5 + i for i, name in enumerate(("BOS", "EOS", "GEN", "PRED", "REC"))}
    tokens = added | dict(hparams.get("token_ids", {}))
    ours |= {_TOKENS[name]: number for name, number in tokens.items()}
    if "UNK" not in tokens and not (Config.unknown_id < vocabulary and Config.unknown_id not in tokens.values()):
        ours["unknown_id"] = next(i for i in range(vocabulary) if i not in tokens.values())
    ours["use_bias"] = bool(hparams.get("bias", False))
    ours["length"] = hparams.get("max_seq_len", Config.length + 1) - 1
    if "downstream_task" in hparams:
        ours["targets"] = _KINDS[hparams["downstream_task"]]
    if "generate" not in hparams:
        return Config(**ours)
    how = hparams["generate"]
    generation = (how["max_molecule_length"], how["batch_size"], how["temperature"], how["top_k"])
    return OfficialConfig(**ours, generation=generation)


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    named |= {"bias": config.use_bias, "max_seq_len": config.length + 1, "feed_forward_dropout": 0.0}
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    return named | {
        "downstream_task": kinds[config.targets],
        "token_ids": {theirs: getattr(config, ours) for theirs, ours in _TOKENS.items()},
    }


def official_table(config: Config) -> Table:
    yield from shared(("token_embedding.weight", "lm_head.weight", "mlm_head.weight"), "trunk/embedding")
    for i in range(config.num_layers):
        theirs, ours = f"layers.{i}", f"trunk/layers_{i}"
        packed = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
        yield from fused_linear(f"{theirs}.attention_layer.qkv", packed, config.d_model, bias=config.use_bias)
        yield from linear(f"{theirs}.attention_layer.out", f"{ours}/attention/out", bias=config.use_bias)
        for name, own in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            yield from linear(f"{theirs}.feed_forward.{name}", f"{ours}/{own}", bias=False)
        for name, own in (("attention_layer", "attention"), ("feed_forward", "feed_forward")):
            yield from layer_norm(f"{theirs}.{name}_normalization", f"{ours}/{own}_norm", bias=False)
    yield from layer_norm("layer_norm", "trunk/norm", bias=False)
    yield from linear("physchem_head.net.0", "descriptor_head/hidden")
    yield from layer_norm("physchem_head.net.2", "descriptor_head/norm")
    yield from linear("physchem_head.net.3", "descriptor_head/out")
    if config.num_targets:
        yield from linear("prediction_head.dense", "prediction_head/hidden")
        yield from linear("prediction_head.out_proj", "prediction_head/out")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Every task's outputs and loss, of rows that have their task's token in front and labels of -100 left out."""
    c, present, found = model.config, inputs["attention_mask"] > 0, {}

    def rows(name: str, causal: bool):
        tokens = inputs[f"input_ids_{name}"]
        x, table = model.apply(variables, tokens, jnp.full(len(tokens), causal), present, method="embed")
        return x, x @ table.T

    def error(logits, labels):
        return masked_mean(token_errors(logits, jnp.maximum(labels, 0)), labels >= 0)

    found["embeddings_generation"], logits = rows("generation", True)
    found["logits_generation"] = logits[:, 1:]
    found["loss_generation"] = error(logits[:, 1:-1], inputs["labels_generation"][:, 1:])
    if "input_ids_reconstruction" in inputs:
        logits = rows("reconstruction", False)[1][:, 1:]
        found["logits_reconstruction"] = logits
        found["loss_reconstruction"] = error(logits, inputs["labels_reconstruction"])
    first = rows("prediction", False)[0][:, 0]
    found["cls_embeddings"] = first
    properties = inputs["properties"]
    if not c.num_targets:
        found["logits_physchem"] = model.apply(variables, first, method="describe")
        found["loss_physchem"] = jnp.mean(jnp.square(found["logits_physchem"] - properties))
    else:
        logits = model.apply(variables, first, method="score")
        found["logits_prediction"] = logits
        if c.targets == "measurements":
            found["predict"], errors, known = logits, jnp.square(logits - properties), jnp.full(logits.shape, True)
        else:
            odds = logits if logits.shape[1] == c.num_targets else logits[:, 1:] - logits[:, :1]
            found["predict"], known = jax.nn.sigmoid(odds), properties >= 0
            errors = jax.nn.softplus(odds) - odds * properties
        found["loss_prediction"] = masked_mean(errors, known)
    if isinstance(c, OfficialConfig) and c.generation is not None:
        length, count, temperature, top_k = c.generation
        made = model.generate(
            variables, jax.random.key(0), count=count, temperature=temperature, top_k=top_k, length=length - 1
        )
        found["generated"] = jnp.pad(made, ((0, 0), (1, 0)), constant_values=c.generate_id)
    return found


def _official(name: str) -> Official:
    return Official(
        module=f"hyformer/models/hyformer.py:{name}",
        config=config_from_official,
        hparams=config_to_official,
        table=official_table,
        call=official_call,
    )


_PLAIN = {  # the special tokens first
    "pad_id": 0, "unknown_id": 1, "mask_id": 2, "bos_id": 3, "eos_id": 4,
    "generate_id": 5, "predict_id": 6, "restore_id": 7, "num_descriptors": 10,
}  # fmt: skip
_TINY = Config(
    length=32, vocabulary=17, num_targets=1, d_model=48, d_ff=128, num_layers=2, num_heads=4, descriptor_width=64,
    objective="summed", task_weights=(1.0, 0.5, 1.0, 4.0), **_PLAIN,
)  # fmt: skip
# Of MoleculeNet and a list of logP, without pre-training: as much as two cores train.
_SMALL = {
    "vocabulary": 64, "num_targets": 1, "d_model": 96, "d_ff": 256, "num_layers": 4, "num_heads": 4,
    "dropout_rate": 0.1, "objective": "summed", "task_weights": (1.0, 0.5, 1.0, 4.0), **_PLAIN,
}  # fmt: skip

PAPER = Paper(
    slug="hyformer",
    task=molecules.MEASUREMENTS,
    task_of=task_of,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": _TINY,
        "freesolv": Config(length=63, **_SMALL),
        "lipophilicity": Config(length=95, **_SMALL),
        "bbbp": Config(length=95, **_SMALL | {"targets": "classes"}),
        "clintox": Config(length=95, **_SMALL | {"targets": "classes", "num_targets": 2}),
        "logp": Config(length=63, **_SMALL),
        "8m": Config(),
        "50m": Config(
            vocabulary=596,
            d_model=512,
            d_ff=2048,
            num_layers=12,
            bos_id=591,
            eos_id=592,
            generate_id=593,
            predict_id=594,
            restore_id=595,
        ),
    },
    officials=(_official("HyformerForDownstreamPrediction"), _official("Hyformer")),
    parameter_counts={"8m": 8_541_896, "50m": 50_832_840},
    quirks=(
        "rows behind a string's end attend to the string and hold numbers that nothing uses",
        "the rescaled start of residual projections matches no parameter's name and never happens",
        "the prediction head is made after all weights are initialised, and starts as torch's layers do by default",
        "feed_forward_dropout is read and not used",
        "the descriptor loss of the downstream class fails, since its predict returns a tensor; ours works",
        "a generated row without an end has its last token replaced by one",
    ),
)
