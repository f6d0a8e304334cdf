"""Recipes of papers that prove, where they also train."""
