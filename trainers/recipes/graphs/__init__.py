"""Recipes of the papers on graphs."""
