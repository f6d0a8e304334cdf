"""Recipes of the papers on language."""
