"""Stateless attention primitives: pure, jitted functions of arrays.

`from layers import dot_attention` works for every public primitive; the module names group them by mechanism.
"""

from layers.activations import (
    gelu,
)
from layers.dropout import (
    dropout,
    dropout_mask,
)
from layers.linear import (
    dot_attention,
)
from layers.masks import (
    BlockMask,
    CausalMask,
    DenseMask,
    FullMask,
    KeyMask,
    LengthMask,
    Mask,
    PrefixMask,
    SegmentMask,
    WindowMask,
)
from layers.series import (
    InstanceStatistics,
    SeasonalTrend,
    instance_denormalize,
    instance_normalize,
    moving_average,
    series_decomposition,
)
from layers.softmax import (
    attend,
    dot_product_attention,
    masked_normalize,
)

__all__ = [
    "BlockMask",
    "CausalMask",
    "DenseMask",
    "FullMask",
    "InstanceStatistics",
    "KeyMask",
    "LengthMask",
    "Mask",
    "PrefixMask",
    "SeasonalTrend",
    "SegmentMask",
    "WindowMask",
    "attend",
    "dot_attention",
    "dot_product_attention",
    "dropout",
    "dropout_mask",
    "gelu",
    "instance_denormalize",
    "instance_normalize",
    "masked_normalize",
    "moving_average",
    "series_decomposition",
]
