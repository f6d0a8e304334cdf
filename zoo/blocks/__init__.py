"""Flax modules that several papers use."""

from zoo.blocks.basic import Dropout, Linear, activation_function

__all__ = ["Dropout", "Linear", "activation_function"]
