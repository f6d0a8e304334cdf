"""The papers of the zoo as Flax models, and the backbones they build on.

`zoo.papers()`, `zoo.paper(slug)`, `zoo.create(slug, config, **overrides)`; `zoo.backbones()`, `zoo.backbone(name)`;
`zoo.load(source)` and `zoo.save(path, model, variables)`.
"""

import zoo.backbones  # noqa: F401  first: the function of that name takes the place of the package on purpose
from zoo.backbone import Backbone
from zoo.errors import UserError
from zoo.paper import Paper
from zoo.registry import backbone, backbones, create, paper, papers  # likewise `backbone` and `paper`
from zoo.weights.convert import from_official, to_official
from zoo.weights.io import load, save

__all__ = [
    "Backbone",
    "Paper",
    "UserError",
    "backbone",
    "backbones",
    "create",
    "from_official",
    "load",
    "paper",
    "papers",
    "save",
    "to_official",
]
