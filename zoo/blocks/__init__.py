"""Flax modules that several papers use."""

from zoo.blocks.basic import ActivationDropout, Dropout, Linear

__all__ = ["ActivationDropout", "Dropout", "Linear"]
