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
    ShiftedMask,
    WindowMask,
    as_mask,
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
    KeyValueCache,
    attend,
    concatenate_streams,
    decode_step,
    dot_product_attention,
    empty_cache,
    extend_cache,
    masked_normalize,
    normalize_heads,
)

__all__ = [
    "BlockMask",
    "CausalMask",
    "DenseMask",
    "FullMask",
    "InstanceStatistics",
    "KeyMask",
    "KeyValueCache",
    "LengthMask",
    "Mask",
    "PrefixMask",
    "SeasonalTrend",
    "SegmentMask",
    "ShiftedMask",
    "WindowMask",
    "as_mask",
    "attend",
    "concatenate_streams",
    "decode_step",
    "dot_attention",
    "dot_product_attention",
    "dropout",
    "dropout_mask",
    "empty_cache",
    "extend_cache",
    "gelu",
    "instance_denormalize",
    "instance_normalize",
    "masked_normalize",
    "moving_average",
    "normalize_heads",
    "series_decomposition",
]
