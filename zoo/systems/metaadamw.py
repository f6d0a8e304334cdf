"""MetaAdamW: AdamW whose learning rate and decay a small transformer sets, group by group (arXiv:2605.04055).

Official code: qq150078158-lab/MetaAdamW@ae00fc1 (MIT). Fidelity: exact (with `strict_official`).
New: parameters are grouped by kind and depth, and each group is a token of statistics of its gradients, moments and
weights; an encoder turns the tokens into one factor for the learning rate and one for the decay of each group; it
learns while training goes on, by differentiating through one step that is not taken, with three objectives weighed by
learned uncertainties.
Differs: the decay factor learns, feature gates learn, and the "plus" features are what their name says; the official
code loses all three to faults, which `strict_official` brings back. `update` makes the meta-update before the step, on
data that the weights have not been trained on yet; the official loop makes it after. Losses of the meta-update are
computed without dropout by the trainer.

`meta_adamw(...)` is an optax transformation for any model; the model of this module is the paper's smallest task, the
next value of one series, which is what its recipes train.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import layers
from zoo.blocks import Dropout, Linear, stack
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import forecasting
from zoo.tasks.task import Batch
from zoo.weights.convert import backwards
from zoo.weights.table import Table, layer_norm, linear, multihead_attention, parameter

Features = Literal["basic", "basic_plus", "norm_basic", "norm_basic_plus", "enhanced"]
_DEVIATIONS = 4  # "plus" appends a deviation for each of the four statistics that "basic" begins with


@dataclass(frozen=True)
class Settings:
    """Of the meta-optimiser; the defaults are the paper's on ETTh1."""

    features: Features = "basic"
    feature_dim: int | None = 6  # D_f, rounded up to a multiple of the heads; None: as many as the features need
    num_layers: int = 8
    num_heads: int = 6
    d_ff: int = 16
    alpha_range: float = 1.0  # r: the learning rate's factor lies in [1 - r/2, 1 + r/2]
    beta_range: float = 1.0  # likewise, of the decay's
    use_second_moments: bool = True  # "basic" has the norms of v
    include_time: bool = True
    total_steps: int | None = None  # of the run, the unit of time; None: it saturates over thousands
    embedding_dim: int = 4  # of each group, learned ("enhanced" only)
    gated: bool = True  # a learned sigmoid gate on each feature
    gate_penalty: float = 1e-4  # on the sum of the gates' absolute logits
    meta_every: int = 217  # K, steps between meta-updates; 0: none
    meta_after: int = 0  # steps before the first one; the paper waits for an epoch
    meta_learning_rate: float = 1e-4  # of plain gradient descent on the encoder
    meta_penalty: float = 1e-4  # on the sum of the norms (not squared) of the encoder's tensors
    objective: Literal["combined", "gradient", "decrease", "gap"] = "combined"
    weights: tuple[float, float, float] | None = None  # of the objectives when combined; None: learned uncertainties
    priorities: tuple[float, float, float] = (1.0, 1.0, 1.0)  # pi, of gradient, decrease and gap
    kinds: tuple[str, str, str] = ("regression",) * 3  # "classification" drops the halves of the uncertainty weighting
    sparsity_threshold: float = 1e-8  # entries below it count as zeros ("enhanced"; inferred)
    layer_norm_epsilon: float = 1e-5
    strict_official: bool = False  # reproduces the faults named in `PAPER.quirks`

    @property
    def statistics(self) -> int:
        """How many numbers describe a group, without embedding and padding."""
        if self.enhanced:
            return 9 + self.include_time
        return self.time_column + self.include_time + _DEVIATIONS * self.features.endswith("plus")

    @property
    def plus_is_lost(self) -> bool:
        """An official fault: what should append deviations falls through to the other one, less embeddings."""
        return self.strict_official and self.features.endswith("plus")

    @property
    def enhanced(self) -> bool:
        return self.features == "enhanced" or self.plus_is_lost

    @property
    def learns_weights(self) -> bool:
        return self.objective == "combined" and self.weights is None

    @property
    def time_column(self) -> int:
        return 4 + self.use_second_moments

    @property
    def width(self) -> int:
        """D_f in use."""
        needed = self.statistics + self.embedding_dim * self.enhanced
        wanted = needed if self.feature_dim is None else self.feature_dim
        width = -(-wanted // self.num_heads) * self.num_heads
        if width < needed and not self.enhanced:
            raise ValueError(f"feature_dim {self.feature_dim} is too small: {self.features} features are {needed}")
        return width


@dataclass(frozen=True)
class Config:
    """Of the forecaster that the paper trains on ETTh1."""

    lookback: int = 96
    horizon: int = 1
    d_model: int = 128
    d_ff: int = 512
    num_layers: int = 2
    num_heads: int = 4
    dropout_rate: float = 0.2
    layer_norm_epsilon: float = 1e-5


# --- the network: a pre-norm encoder, for tokens of time in the task and for groups of parameters in the optimiser ----


def xavier_packed(parts: int) -> nn.initializers.Initializer:
    """Xavier-uniform for one of several projections of the same size that are drawn as one matrix."""

    def init(key, shape, dtype=jnp.float32):
        bound = (6 / (shape[0] + parts * shape[1])) ** 0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class EncoderLayer(nn.Module):
    """Pre-norm: x = x + Attn(LN(x)); x = x + W_2 relu(W_1 LN(x)); dropout on weights, activations and both outputs."""

    num_heads: int
    d_ff: int
    dropout_rate: float
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        drop = Dropout(self.dropout_rate)
        xavier, zeros = xavier_packed(1), nn.initializers.zeros
        normed = nn.LayerNorm(epsilon=self.epsilon, name="norm1")(x)

        def project(name: str) -> Float[Array, "B T H d"]:
            projected = Linear(width, kernel_init=xavier_packed(3), bias_init=zeros, name=name)(normed)
            return projected.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        query, key, value = project("query"), project("key"), project("value")
        if train and self.dropout_rate:
            _, weights = layers.dot_product_attention(query, key, value, return_weights=True)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", drop(weights, train=train), value)
        else:
            mixed = layers.dot_product_attention(query, key, value)
        mixed = Linear(width, kernel_init=xavier, bias_init=zeros, name="out")(mixed.reshape(x.shape))
        x = x + drop(mixed, train=train)
        normed = nn.LayerNorm(epsilon=self.epsilon, name="norm2")(x)
        hidden = drop(jax.nn.relu(Linear(self.d_ff, kernel_init=xavier, name="ffn_in")(normed)), train=train)
        return x + drop(Linear(width, kernel_init=xavier, name="ffn_out")(hidden), train=train)


class Model(nn.Module):
    """Each series by itself: its values are tokens, and the last one's state is the forecast."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B P N"]:
        c = self.config
        x = batch["x"]
        tokens = Linear(c.d_model, kernel_init=xavier_packed(1), name="embedding")(
            jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 1)
        )
        places = layers.sinusoidal_encoding(jnp.arange(x.shape[1]), dim=c.d_model)
        tokens = Dropout(c.dropout_rate)(tokens + places.astype(tokens.dtype), train=train)
        layer = partial(EncoderLayer, c.num_heads, c.d_ff, c.dropout_rate, c.layer_norm_epsilon)
        tokens = stack(self, layer, c.num_layers, tokens, train=train)
        forecast = Linear(c.horizon, kernel_init=xavier_packed(1), name="head")(tokens[:, -1])
        return jnp.swapaxes(forecast.reshape(x.shape[0], x.shape[2], c.horizon), 1, 2)


class Factors(NamedTuple):
    """What the encoder says of each group: factors of learning rate and decay, weights of two terms of an objective."""

    alpha: Float[Array, " G"]
    beta: Float[Array, " G"]
    lambda1: Float[Array, " G"]
    lambda2: Float[Array, " G"]


class Policy(nn.Module):
    """Phi: from the statistics of each group to its factors. Groups are exchangeable, but for their embeddings."""

    config: Settings
    num_groups: int

    def setup(self):
        c = self.config
        if c.enhanced and not c.plus_is_lost:
            shape = (self.num_groups, c.embedding_dim)
            self.group_table = self.param("group_table", nn.initializers.normal(0.1), shape)
        if c.gated:
            self.gates = self.param("gates", nn.initializers.ones, (c.width,))
        if c.learns_weights:
            self.log_variances = self.param("log_variances", nn.initializers.zeros, (3,))
        self.encoder = [
            EncoderLayer(c.num_heads, c.d_ff, 0.0, c.layer_norm_epsilon, name=f"layers_{i}")
            for i in range(c.num_layers)
        ]
        self.output = Linear(4, kernel_init=xavier_packed(1), bias_init=nn.initializers.zeros, name="output")

    def tokens(self, statistics: Float[Array, "G S"]) -> Float[Array, "G D"]:
        """The statistics in their place: cut or filled up with zeros to the width, embeddings in the last columns."""
        c = self.config
        room = c.width - c.embedding_dim * c.enhanced
        placed = statistics[:, :room]
        placed = jnp.pad(placed, ((0, 0), (0, room - placed.shape[1])))
        if not c.enhanced:
            return placed
        embeddings = jnp.zeros((self.num_groups, c.embedding_dim)) if c.plus_is_lost else self.group_table
        return jnp.concatenate([placed, embeddings], axis=1)

    def __call__(self, statistics: Float[Array, "G S"]) -> Factors:
        c = self.config
        x = self.tokens(statistics)
        gates = jax.nn.sigmoid(self.gates) if c.gated else 1.0
        if c.strict_official:
            x = x * gates  # before the columns are standardised, which undoes it
        if c.features.startswith("norm"):
            x = _standardized(x, c)
        if not c.strict_official:
            x = x * gates
        x = x[None]
        for layer in self.encoder:
            x = layer(x, train=False)
        raw = jax.nn.sigmoid(self.output(x[0]))
        alpha = 1 + c.alpha_range * (raw[:, 0] - 0.5)
        beta = 1 + c.beta_range * (raw[:, 1] - 0.5)
        return Factors(alpha, beta, raw[:, 2], raw[:, 3])


def _standardized(x: Float[Array, "G D"], settings: Settings) -> Float[Array, "G D"]:
    """Every column but the time's over the groups, by the unbiased deviation; a single group is left as it is."""
    if x.shape[0] == 1 and not settings.strict_official:
        return x
    scaled = (x - x.mean(axis=0)) / (x.std(axis=0, ddof=1) + 1e-8)
    time = settings.include_time & (np.arange(x.shape[1]) == settings.time_column)
    return jnp.where(time, x, scaled)


# --- groups of parameters ---------------------------------------------------------------------------------------------

_KINDS = (
    ("embedding", ("embed",)),
    ("attention", ("attn", "attention")),
    ("ffn", ("ffn", "mlp", "feed_forward")),
    ("norm", ("norm",)),
)


@dataclass(frozen=True)
class Groups:
    """The group of every parameter, in the order of the tree's leaves, and what the names say about each."""

    labels: tuple[int, ...]
    depths: tuple[float, ...]  # between 0 and 1
    biases: tuple[bool, ...]

    @property
    def count(self) -> int:
        return 1 + max(self.labels)


def fine_grained(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The group of each parameter by (kind of its layer, third of the depth, bias or not), in the order of the names.

    The kind is read from the name, or else from the shape of the layer's weight. Vectors count as biases. A name is a
    path whose parts are separated by dots or slashes; its first number, which may end a part, is the depth.
    """
    depths = {name: _depth(name) for name in shapes}
    deepest = max((d for d in depths.values() if d is not None), default=0)

    def bucket(depth: int | None) -> int:
        if depth is None or deepest <= 1:
            return 1
        return 0 if depth < deepest / 3 else 2 if depth > 2 * deepest / 3 else 1

    keys = {n: (_kind(n, shapes), bucket(depths[n]), _is_bias(n, shapes[n])) for n in shapes}
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: numbers[key] for name, key in keys.items()}


def _depth(name: str) -> int | None:
    found = re.search(r"(?<![^./_])(\d+)(?=[./])", name)
    return int(found[1]) if found else None


def _kind(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    for kind, words in _KINDS:
        if any(word in name.lower() for word in words):
            return kind
    layer = re.sub(r"[^./]*$", "", name)
    axes = max(len(shapes.get(f"{layer}{weight}", ())) for weight in ("weight", "kernel", "scale"))
    return {0: "other", 1: "norm", 2: "linear"}.get(axes, "conv")


def _is_bias(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or name.endswith("bias")


def group(params: Any, how: Any = "fine_grained") -> Groups:
    """Groups of a tree of parameters: "fine_grained", "one" for all together, or a tree of their numbers."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in found}
    if how == "fine_grained":
        labels = tuple(fine_grained(names).values())
    elif how == "one":
        labels = (0,) * len(names)
    else:
        labels = tuple(map(int, jax.tree.leaves(how)))
        if len(labels) != len(names):
            raise UserError(f"meta_adamw: groups number {len(labels)} parameters of {len(names)}")
    depths = {name: _depth(name) or 0 for name in names}
    deepest = max(1, *depths.values())
    return Groups(labels, tuple(d / deepest for d in depths.values()), tuple(_is_bias(n, s) for n, s in names.items()))


def _norm(x: Array) -> Float[Array, ""]:
    """|x|, with the gradient 0 where x is 0."""
    square = jnp.sum(jnp.square(x))
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _cosine(dot: Array, first: Array, second: Array) -> Array:
    """Of a product and two norms; 0 where one of them is."""
    return dot / (jnp.maximum(first, 1e-8) * jnp.maximum(second, 1e-8))


def statistics(
    settings: Settings, groups: Groups, gradients: Any, mu: Any, nu: Any, params: Any, step: Array
) -> Float[Array, "G S"]:
    """What describes each group: means over its parameters, `step` counted from 1."""
    g, m, v, p = (jax.tree.leaves(tree) for tree in (gradients, mu, nu, params))
    member = np.asarray(groups.labels) == np.arange(groups.count)[:, None]
    share = jnp.asarray(member / member.sum(axis=1, keepdims=True), jnp.float32)  # (G, number of parameters)

    def each(function: Callable[..., Array], *trees: list[Array]) -> Float[Array, " T"]:
        return jnp.stack([function(*(x.astype(jnp.float32) for x in row)) for row in zip(*trees, strict=True)])

    def variance(values: Float[Array, " T"]) -> Float[Array, " G"]:
        """Over the parameters of a group; 0 in a group of one."""
        mean = share @ values
        return share @ jnp.square(values - mean[jnp.asarray(groups.labels)])

    g_norm, m_norm = each(_norm, g), each(_norm, m)
    if settings.total_steps is None:
        time = 2 * jax.nn.sigmoid(step / 1000) - 1
    else:
        time = step / settings.total_steps
    times = [jnp.full(groups.count, time, jnp.float32)] if settings.include_time else []

    if settings.enhanced:

        def zeros(x: Array) -> Array:
            return jnp.mean(jnp.abs(x) < settings.sparsity_threshold)

        means = [each(zeros, g), each(zeros, m), each(lambda x: jnp.log(x.size + 1.0), g)]
        means += [jnp.asarray(groups.biases, jnp.float32), jnp.asarray(groups.depths, jnp.float32)]
        columns = [share @ g_norm, variance(g_norm), share @ m_norm, variance(m_norm), *(share @ x for x in means)]
        return jnp.stack([*columns, *times], axis=1)

    p_norm = each(_norm, p)
    cosine = _cosine(each(lambda a, b: jnp.sum(a * b), g, m), g_norm, m_norm)
    four = (g_norm, m_norm, p_norm, cosine)
    columns = [share @ x for x in four]
    columns += [share @ each(_norm, v)] if settings.use_second_moments else []
    columns += times
    columns += [jnp.sqrt(variance(x)) for x in four] if settings.features.endswith("plus") else []
    return jnp.stack(columns, axis=1)


# --- the optimiser ----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """`count` steps taken, the moments, and the encoder with its gates, embeddings and uncertainties."""

    count: Array
    mu: Any
    nu: Any
    phi: Any


class MetaReport(NamedTuple):
    """What a meta-update saw: the three objectives, their combination, the factors and the gradient of `phi`."""

    objectives: Float[Array, "3"]  # gradient, decrease, gap
    combined: Float[Array, ""]
    factors: Factors
    gradients: Any


def _missing(decay: float, count: Array) -> Array:
    """1 - decay^count, whose digits float32 would lose for a decay near 1."""
    return -jnp.expm1(count * math.log(decay))


Objective = Callable[[Any, Any], Array]  # (parameters, batch) -> loss


@dataclass(frozen=True)
class MetaAdamW:
    """AdamW with factors for each group. Hyper-parameters are numbers, or trees of numbers like the parameters'; the
    learning rate may be a schedule, the decay a function of the parameters that gives a tree."""

    learning_rate: Any
    b1: Any = 0.9
    b2: Any = 0.999
    epsilon: float = 1e-8
    weight_decay: Any = 1e-2
    settings: Settings = field(default_factory=Settings)
    groups: Any = "fine_grained"
    seed: int = 0

    def init(self, params: Any) -> State:
        groups = group(params, self.groups)
        policy = self._policy(groups)
        phi = policy.init(jax.random.key(self.seed), jnp.zeros((groups.count, self.settings.statistics)))["params"]
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return State(jnp.zeros((), jnp.int32), zeros, zeros, phi)

    def _policy(self, groups: Groups) -> Policy:
        return Policy(self.settings, groups.count)

    def _leaves(self, value: Any, params: Any) -> list[Any]:
        count = len(jax.tree.leaves(params))
        found = jax.tree.leaves(value)
        return found if len(found) == count else found * count

    def _direction(self, state: State, params: Any, factors: Factors, groups: Groups, count: Array) -> list[Array]:
        """Of every parameter: -eta_t alpha (m / (sqrt v_hat + epsilon) + lambda beta p). The decay is inside, so that
        alpha and the correction of the first moment scale it too."""
        rate = self.learning_rate(count - 1) if callable(self.learning_rate) else self.learning_rate
        decay = self.weight_decay(params) if callable(self.weight_decay) else self.weight_decay
        mu, nu, p = (jax.tree.leaves(tree) for tree in (state.mu, state.nu, params))
        hyper = (self._leaves(value, params) for value in (rate, self.b1, self.b2, decay))
        steps = []
        for m, v, x, label, eta, b1, b2, wd in zip(mu, nu, p, groups.labels, *hyper, strict=True):
            root = jnp.sqrt(v / _missing(b2, count))
            change = m / (root + self.epsilon) + wd * factors.beta[label] * x
            steps.append(-eta / _missing(b1, count) * factors.alpha[label] * change)
        return steps

    def factors(self, state: State, params: Any, gradients: Any, step: Array) -> Factors:
        """What the encoder says now, of these gradients."""
        groups = group(params, self.groups)
        tokens = statistics(self.settings, groups, gradients, state.mu, state.nu, params, step)
        return self._policy(groups).apply({"params": state.phi}, tokens)

    def step(self, gradients: Any, state: State, params: Any) -> tuple[Any, State]:
        """(updates, state) of one step; the statistics are those of before it."""
        count = state.count + 1
        factors = self.factors(state, params, gradients, count)
        tree = jax.tree.structure(params)
        g, mu, nu = (jax.tree.leaves(t) for t in (gradients, state.mu, state.nu))
        b1, b2 = (self._leaves(value, params) for value in (self.b1, self.b2))
        mu = tree.unflatten([b * m + (1 - b) * x for b, m, x in zip(b1, mu, g, strict=True)])
        nu = tree.unflatten([b * v + (1 - b) * jnp.square(x) for b, v, x in zip(b2, nu, g, strict=True)])
        state = State(count, mu, nu, state.phi)
        steps = self._direction(state, params, factors, group(params, self.groups), count)
        steps = [s.astype(p.dtype) for s, p in zip(steps, jax.tree.leaves(params), strict=True)]
        return tree.unflatten(steps), state

    def meta_update(
        self, state: State, params: Any, gradients: Any, objective: Objective, batches: Sequence[Any]
    ) -> tuple[State, MetaReport]:
        """One step of the encoder: `batches` are two for training and two for validation, `gradients` those of the
        last step, which the statistics are taken of. At least one step must have been taken."""
        c = self.settings
        first, second, valid, other_valid = batches
        frozen = jax.lax.stop_gradient
        loss, g = jax.value_and_grad(objective)(params, first)
        gap = jnp.abs(loss - objective(params, other_valid))
        before = objective(params, valid)
        groups = group(params, self.groups)

        def total(phi: Any) -> tuple[Array, tuple]:
            factors = self.factors(state._replace(phi=phi), params, gradients, state.count)
            # An official fault: the decay's factor enters as a plain number.
            used = factors._replace(beta=frozen(factors.beta)) if c.strict_official else factors
            steps = self._direction(state, params, used, groups, state.count)
            ahead = jax.tree.structure(params).unflatten(
                [p + s for p, s in zip(jax.tree.leaves(params), steps, strict=True)]
            )
            alignment = _alignment(groups, factors, g, jax.grad(objective)(ahead, second))
            objectives = jnp.stack([alignment, objective(ahead, valid) - before, gap])
            combined = _combine(c, objectives, phi)
            combined = combined + _penalty(c, phi)
            return combined, (objectives, combined, factors)

        slopes, (objectives, combined, factors) = jax.grad(total, has_aux=True)(state.phi)
        moved = jax.tree.map(lambda w, s: w - c.meta_learning_rate * s, state.phi, slopes)
        if c.strict_official and c.gated:
            moved["gates"] = state.phi["gates"]  # an official fault: they are given a gradient and never a step
        return state._replace(phi=moved), MetaReport(objectives, combined, factors, slopes)

    def update(
        self,
        updates: Any,
        state: State,
        params: Any = None,
        *,
        objective: Objective | None = None,
        batches: Sequence[Any] | None = None,
        **_: Any,
    ) -> tuple[Any, State]:
        """optax's: with an objective and four batches that the weights have not seen, every K-th call also moves the
        encoder, before the step."""
        if params is None:
            raise UserError("meta_adamw needs the parameters: optimizer.update(gradients, state, params)")
        if objective is not None and self.settings.meta_every:
            due = (state.count % self.settings.meta_every == 0) & (state.count >= max(self.settings.meta_after, 1))
            state = jax.lax.cond(
                due,
                lambda s: self.meta_update(s, params, updates, objective, batches)[0],
                lambda s: s,
                state,
            )
        return self.step(updates, state, params)


def meta_adamw(
    learning_rate: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    epsilon: float = 1e-8,
    weight_decay: Any = 1e-2,
    settings: Settings | None = None,
    groups: Any = "fine_grained",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """MetaAdamW as an optax transformation: see `MetaAdamW` for the arguments and `MetaAdamW.update` for the extras."""
    made = MetaAdamW(learning_rate, b1, b2, epsilon, weight_decay, settings or Settings(), groups, seed)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def _alignment(groups: Groups, factors: Factors, before: Any, ahead: Any) -> Float[Array, ""]:
    """mean_g of lambda1 |g'|^2 - lambda2 cos(g, g'): short gradients after the step, in the direction of before."""
    labels = jnp.asarray(groups.labels)

    def sums(first: Any, second: Any) -> Float[Array, " G"]:
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        return jnp.zeros(groups.count).at[labels].add(jnp.stack([jnp.sum(a * b) for a, b in pairs]))

    def root(x: Array) -> Array:
        return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)

    square = sums(ahead, ahead)
    cosine = _cosine(sums(before, ahead), root(sums(before, before)), root(square))
    return jnp.mean(factors.lambda1 * square - factors.lambda2 * cosine)


def _combine(settings: Settings, objectives: Float[Array, "3"], phi: Any) -> Float[Array, ""]:
    if settings.objective != "combined":
        return objectives[("gradient", "decrease", "gap").index(settings.objective)]
    if settings.weights is not None:
        return jnp.dot(jnp.asarray(settings.weights), objectives)
    half = jnp.asarray([1.0 if kind == "classification" else 0.5 for kind in settings.kinds])
    s = phi["log_variances"]
    return jnp.sum(half * (jnp.exp(-s) * objectives + jnp.asarray(settings.priorities) * s))


def _penalty(settings: Settings, phi: Any) -> Float[Array, ""]:
    """On the norms of the encoder's tensors, a packed projection being one, and of the output's weight."""
    total = _norm(phi["output"]["kernel"])
    for i in range(settings.num_layers):
        layer = dict(phi[f"layers_{i}"])
        packed = [layer.pop(name) for name in ("query", "key", "value")]
        for part in ("kernel", "bias"):
            total += _norm(jnp.concatenate([one[part] for one in packed], axis=-1))
        total += sum(map(_norm, jax.tree.leaves(layer)))
    penalty = settings.meta_penalty * total
    return penalty + settings.gate_penalty * jnp.sum(jnp.abs(phi["gates"])) if settings.gated else penalty


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return forecasting.example(
        lookback=config.lookback, horizon=config.horizon, batch_size=batch_size, key=key, variates=1, marks=0
    )


# --- the official code: a run of the optimiser, step by step ----------------------------------------------------------


@dataclass(frozen=True)
class Replay(Settings):
    """A run of the official optimiser on given gradients, or on a small residual network."""

    num_groups: int = 1
    steps: int = 1
    network: tuple[int, int, int, int] | None = None  # widths in, hidden and out, number of layers
    official_groups: tuple[tuple[str, ...], ...] = ()  # of the constructor; none: all parameters are one
    group_options: tuple[tuple[float, float, float, float], ...] = ()  # of each: rate, decay, b1, b2
    options: tuple[float, float, float, float] = (1e-3, 1e-2, 0.9, 0.999)
    epsilon: float = 1e-8
    by_name: bool = False  # groups are the optimiser's own, or "fine_grained"

    def labels(self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        if self.by_name:
            return fine_grained({name: shapes[name] for name in names})
        return {name: i for i, names in enumerate(self.official_groups) for name in names} or dict.fromkeys(names, 0)


_OBJECTIVES = {"combined": "combined", "gradient": "gradient", "loss": "decrease", "gap": "gap"}
_HPARAMS = {
    "attn_hidden_dim": "d_ff",
    "attn_layers": "num_layers",
    "attn_heads": "num_heads",
    "alpha_range": "alpha_range",
    "beta_range": "beta_range",
    "meta_update_freq": "meta_every",
    "meta_lr": "meta_learning_rate",
    "meta_weight_decay": "meta_penalty",
    "total_steps": "total_steps",
    "feature_version": "features",
    "feature_dim": "feature_dim",
    "include_time_step": "include_time",
    "group_embed_dim": "embedding_dim",
    "use_v_norms": "use_second_moments",
    "use_feature_gating": "gated",
    "feature_gating_sparsity": "gate_penalty",
    "steps": "steps",
    "eps": "epsilon",
}


def network_shapes(network: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
    """Of the residual network's parameters, in torch's names, layouts and order."""
    inputs, width, outputs, depth = network
    shapes = {"embed.weight": (width, inputs), "embed.bias": (width,)}
    for i in range(depth):
        layer = {"norm.weight": (width,), "norm.bias": (width,)}
        layer |= {"ffn.weight": (width, width), "ffn.bias": (width,), "proj.weight": (width, width)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"head.weight": (outputs, width), "head.bias": (outputs,)}


def network_loss(params: Mapping[str, Array], batch: tuple[Array, Array]) -> Float[Array, ""]:
    """Mean squared error of h + W tanh(W' LN(h) + b), layer by layer, between two linear layers."""
    x, y = batch
    h = x @ params["embed.weight"].T + params["embed.bias"]
    for i in range(sum(name.endswith("ffn.bias") for name in params)):
        p = {name.removeprefix(f"layers.{i}."): value for name, value in params.items()}
        centred = h - h.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) * p["norm.weight"] + p["norm.bias"]
        h = h + jnp.tanh(normed @ p["ffn.weight"].T + p["ffn.bias"]) @ p["proj.weight"].T
    return jnp.mean(jnp.square(h @ params["head.weight"].T + params["head.bias"] - y))


def replay_from_official(hparams: Mapping[str, Any]) -> Replay:
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    rate, decay, betas = hparams["lr"], hparams["weight_decay"], hparams["betas"]
    given = hparams.get("param_groups") or ()
    network = hparams.get("model") and tuple(hparams["model"][k] for k in ("d_in", "d", "d_out", "n_layers"))
    learned = hparams.get("use_huw", False)
    replay = Replay(
        **ours,
        # Inferred: the cases at hand name combined and gradient only.
        objective=next(o for name, o in _OBJECTIVES.items() if name in hparams.get("meta_objective", "combined")),
        weights=None if learned else tuple(hparams.get("aux_loss_fixed_weights") or (1.0, 0.3, 0.3)),
        kinds=tuple(hparams["task_types"]),
        priorities=tuple(hparams["huw_priorities"]),
        strict_official=True,
        network=network,
        official_groups=tuple(tuple(g["names"]) for g in given),
        group_options=tuple(
            tuple(map(float, (g.get("lr", rate), g.get("weight_decay", decay), *g.get("betas", betas)))) for g in given
        ),
        options=tuple(map(float, (rate, decay, *betas))),
        by_name=hparams.get("group_strategy") == "fine_grained",
    )
    shapes = network_shapes(network) if network else {n: () for names in replay.official_groups for n in names}
    labels = replay.labels(tuple(shapes), shapes)
    return replace(replay, num_groups=1 + max(labels.values(), default=0))


def replay_to_official(config: Replay) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    rate, decay, *betas = config.options
    groups = [
        {"names": list(names), "lr": lr, "weight_decay": wd, "betas": [b1, b2]}
        for names, (lr, wd, b1, b2) in zip(config.official_groups, config.group_options, strict=True)
    ]
    return named | {
        "lr": rate,
        "weight_decay": decay,
        "betas": betas,
        "meta_objective": {v: k for k, v in _OBJECTIVES.items()}[config.objective],
        "use_huw": config.weights is None,
        "aux_loss_fixed_weights": config.weights and list(config.weights),
        "task_types": list(config.kinds),
        "huw_priorities": list(config.priorities),
        "group_strategy": "fine_grained" if config.by_name else "original",
        "param_groups": groups or None,
        "model": config.network and dict(zip(("d_in", "d", "d_out", "n_layers"), config.network, strict=True)),
    }


def policy_table(config: Settings) -> Table:
    for i in range(config.num_layers):
        theirs, ours = f"_attention_encoder.layers.{i}", f"layers_{i}"
        yield from multihead_attention(f"{theirs}.self_attn", ours, config.width)
        yield from linear(f"{theirs}.linear1", f"{ours}/ffn_in")
        yield from linear(f"{theirs}.linear2", f"{ours}/ffn_out")
        yield from layer_norm(f"{theirs}.norm1", f"{ours}/norm1")
        yield from layer_norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from linear("_output_proj", "output")
    if config.gated:
        yield from parameter("_feature_gates", "gates")
    if config.enhanced and not config.plus_is_lost:
        yield from parameter("group_embeddings", "group_table")
    if config.learns_weights:
        yield from parameter("huw.log_vars", "log_variances")


def policy_example(config: Settings, *, batch_size: int, key: jax.Array) -> Float[Array, "G S"]:
    return jax.random.normal(key, (config.num_groups, config.statistics))


def replay(model: Policy, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Step after step, the meta-update after every K-th, and all that happens on the way."""
    c = model.config

    def part(prefix: str) -> dict[str, jax.Array]:
        return {name.removeprefix(prefix): x for name, x in inputs.items() if name.startswith(prefix)}

    params = part("params/")
    labels = c.labels(tuple(params), {name: x.shape for name, x in params.items()})
    own = {name: o for names, o in zip(c.official_groups, c.group_options, strict=True) for name in names}
    rate, decay, b1, b2 = ({n: own.get(n, c.options)[i] for n in params} for i in range(4))
    optimizer = MetaAdamW(rate, b1, b2, c.epsilon, decay, c, labels)
    pairs = {name: (inputs.get(f"{name}_x"), inputs.get(f"{name}_y")) for name in ("train", "val")}
    pairs |= {name: (inputs.get(f"meta_x{i}"), inputs.get(f"meta_y{i}")) for i, name in enumerate("ab", 1)}
    taken = {"combined": 2, "decrease": 1, "gap": 1, "gradient": 0}[c.objective]  # validation batches a meta-update

    def at(pair: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        return jax.tree.map(lambda x: x[index % len(x)], pair)

    def tokens(state: State, params: Any, gradients: Any, step: Array) -> tuple[Array, Factors]:
        found = statistics(c, group(params, labels), gradients, state.mu, state.nu, params, step)
        phi = {"params": state.phi}
        return model.apply(phi, found, method=Policy.tokens), model.apply(phi, found)

    def one(carry: tuple[State, Any], step: Array) -> tuple[tuple[State, Any], dict[str, Any]]:
        state, params = carry
        if c.network:
            loss, gradients = jax.value_and_grad(network_loss)(params, at(pairs["train"], step))
        else:
            loss, gradients = jnp.zeros(()), {name: x[step] for name, x in part("grads/").items()}
        seen = tokens(state, params, gradients, state.count + 1)
        updates, state = optimizer.step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        report = {"loss": loss, "seen": seen}
        if c.meta_every and c.network:
            turn = step // c.meta_every
            valid = at(pairs["val"], taken * turn), at(pairs["val"], taken * turn + taken - 1)
            batches = (at(pairs["a"], turn), at(pairs["b"], turn), *valid)
            report["meta_tokens"] = tokens(state, params, gradients, state.count)[0]
            moved, report["meta"] = optimizer.meta_update(state, params, gradients, network_loss, batches)
            due = (step + 1) % c.meta_every == 0
            state = jax.tree.map(lambda new, old: jnp.where(due, new, old), moved, state)
        return (state, params), report | {"params": params, "phi": state.phi}

    # optimizer.init would draw another encoder.
    start = jax.tree.map(jnp.zeros_like, params)
    state = State(jnp.zeros((), jnp.int32), start, start, variables["params"])
    _, history = jax.lax.scan(one, (state, params), jnp.arange(c.steps))
    features, factors = history["seen"]
    outputs = {"features": features, "alpha": factors.alpha, "beta": factors.beta, "train_loss": history["loss"]}
    outputs |= {f"params/{name}": x for name, x in history["params"].items()}
    if "meta" not in history:
        return outputs
    every = slice(c.meta_every - 1, None, c.meta_every)
    report, meta_tokens, phi = jax.tree.map(
        lambda x: x[every], (history["meta"], history["meta_tokens"], history["phi"])
    )
    outputs |= {f"meta_{name}": x for name, x in report.factors._asdict().items()}
    outputs |= {"meta_features": meta_tokens, "meta_aux_loss": report.combined}
    for i, name in enumerate(("gradient", "decrease", "gap")):
        outputs[f"meta_loss_{name}"] = report.objectives[:, i]
    official = jax.vmap(lambda tree: backwards(policy_table(c), {"params": tree}))
    outputs |= {f"meta_grad/{name}": x for name, x in official(report.gradients).items()}
    return outputs | {f"phi/{name}": x for name, x in official(phi).items()}


# --- the paper's settings: its table where the scripts differ from it -------------------------------------------------

SETTINGS: dict[str, Settings] = {
    "etth1": Settings(),
    "wikitext2": Settings(meta_every=123, gated=False),
    "multi30k": Settings(meta_every=454, num_layers=128, d_ff=64, gated=False, priorities=(2.0, 5.0, 1.0)),
    "cifar10": Settings(meta_every=190, num_layers=64, d_ff=64, gated=False, priorities=(5.0, 2.0, 1.0)),
    "imdb": Settings(
        features="basic_plus",
        feature_dim=11,
        meta_every=39,
        num_layers=64,
        num_heads=11,
        d_ff=64,
        priorities=(1.0, 3.0, 5.0),
    ),
    # Not in the paper: a shallow encoder that moves often, for short runs.
    "tiny": Settings(num_layers=2, meta_every=5, meta_learning_rate=1e-2),
}

PAPER = Paper(
    slug="metaadamw",
    task=forecasting.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(lookback=24, horizon=4, d_model=16, d_ff=32, num_heads=2, dropout_rate=0.0),
        "etth1": Config(),
    },
    officials=(
        Official(
            module="experiments/meta_adamw.py:MetaAdamW",
            config=replay_from_official,
            hparams=replay_to_official,
            table=policy_table,
            call=replay,
            model=lambda config: Policy(config, config.num_groups),
            example=policy_example,
        ),
    ),
    reported={"ett_h1": {"mse": 0.005885}},  # of OT alone, one step ahead, on the validation part; AdamW 0.006147
    quirks=(
        "decay and its factor stand inside the bias-corrected step, unlike in AdamW",
        "strict_official: the decay's factor gets no gradient from the objectives",
        "strict_official: feature gates get gradients and are never moved",
        "strict_official: basic_plus and norm_basic_plus give the enhanced statistics, cut, without embeddings",
        "strict_official: gates come before the columns are standardised; a single group then is not a number",
        "the gap objective does not depend on the encoder and only trains its own uncertainty",
        "the official meta-update pairs parameters by position; ours by name",
    ),
)
