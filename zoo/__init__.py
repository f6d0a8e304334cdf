"""The papers of the zoo as Flax models: `zoo.papers()`, `zoo.paper(slug)`, `zoo.create(slug, config, **overrides)`."""

from zoo.errors import UserError
from zoo.paper import Paper
from zoo.registry import create, paper, papers  # `paper` the function takes the place of the submodule on purpose
from zoo.weights.convert import from_official, to_official
from zoo.weights.io import load, save

__all__ = ["Paper", "UserError", "create", "from_official", "load", "paper", "papers", "save", "to_official"]
