"""Recipes of the papers on signals."""
