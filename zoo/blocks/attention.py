"""Multi-head attention between projections, as torch.nn.MultiheadAttention has it."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks.basic import Dropout, Linear

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    """W_o [softmax(q_h k_h^T / sqrt(D / H)) v_h]_h + b_o with q = W_q x + b_q, and k, v likewise of `context` (or x).

    `mask` is True where a query may look. Weights are dropped out at `dropout_rate`, and are the intermediate
    `weights`. `packed` starts as torch does where the three projections are one matrix with the fans of one.
    """

    num_heads: int
    dropout_rate: float = 0.0
    packed: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Lq D"],
        context: Float[Array, "B Lk D"] | None = None,
        *,
        mask: Bool[Array, "*mask_shape"] | None = None,
        train: bool,
    ) -> Float[Array, "B Lq D"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"attention of width {width} cannot have {self.num_heads} heads")
        context = x if context is None else context
        start, zeros = {}, {}
        if self.packed:
            zeros = {"bias_init": nn.initializers.zeros}
            start = {"kernel_init": nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"), **zeros}
        query, key, value = (
            Linear(width, **start, name=name)(y).reshape(*y.shape[:2], self.num_heads, -1)
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        drops = train and self.dropout_rate > 0
        if drops or self.is_mutable_collection("intermediates"):
            mixed, weights = layers.dot_product_attention(query, key, value, mask=mask, return_weights=True)
            self.sow("intermediates", "weights", weights)
            if drops:
                kept = Dropout(self.dropout_rate)(weights, train=train)
                mixed = jnp.einsum("bhqk,bkhd->bqhd", kept.astype(value.dtype), value)
        else:
            mixed = layers.dot_product_attention(query, key, value, mask=mask)
        return Linear(width, **zeros, name="out")(mixed.reshape(x.shape))
