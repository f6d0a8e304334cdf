"""Recipes of the papers on time series."""
