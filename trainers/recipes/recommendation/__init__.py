"""Recipes of the papers on recommendation."""
