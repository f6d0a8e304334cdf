"""Electricity transformer temperature (Zhou et al., arXiv:2012.07436)."""
