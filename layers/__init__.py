"""Stateless attention primitives: pure, jitted functions of arrays.

`from layers import dot_attention` works for every public primitive; the module names group them by mechanism.
"""

from layers.activations import gelu
from layers.dropout import dropout, dropout_mask
from layers.linear import dot_attention
from layers.series import (
    InstanceStatistics,
    SeasonalTrend,
    instance_denormalize,
    instance_normalize,
    moving_average,
    series_decomposition,
)

__all__ = [
    "InstanceStatistics",
    "SeasonalTrend",
    "dot_attention",
    "dropout",
    "dropout_mask",
    "gelu",
    "instance_denormalize",
    "instance_normalize",
    "moving_average",
    "series_decomposition",
]
