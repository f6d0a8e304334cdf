"""Recipes of the papers on agents."""
