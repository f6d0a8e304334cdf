"""Exchange rates (Lai et al., arXiv:1703.07015)."""
