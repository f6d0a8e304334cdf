"""Flax modules that several papers use."""

from zoo.blocks.attention import MultiHeadAttention
from zoo.blocks.basic import ActivationDropout, BatchNorm, CausalConv, Dropout, Linear, RMSNorm
from zoo.blocks.mamba import Mamba, Mamba2, MambaState
from zoo.blocks.ss2d import SS2D
from zoo.blocks.stack import Execution, execution, stack

__all__ = [
    "SS2D",
    "ActivationDropout",
    "BatchNorm",
    "CausalConv",
    "Dropout",
    "Execution",
    "Linear",
    "Mamba",
    "Mamba2",
    "MambaState",
    "MultiHeadAttention",
    "RMSNorm",
    "execution",
    "stack",
]
