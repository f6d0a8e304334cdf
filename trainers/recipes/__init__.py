"""Recipes, one module per paper: `trainers/recipes/<room>/<slug>.py` with a dictionary `RECIPES`."""
