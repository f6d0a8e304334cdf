"""Recipes of the papers on images and video."""
