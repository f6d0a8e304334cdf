"""OPTNet's runs: `zoo train optnet` (stand-in towns; 3DAeroRelief has no copy that can be fetched).

No run has been measured yet.
"""

from trainers.recipe import Optimizer, Recipe

RECIPES = {
    "tiny": Recipe(
        paper="optnet",
        batch_size=8,
        epochs=8,
        optimizer=Optimizer(name="adamw", learning_rate=4e-3, schedule="cosine", weight_decay=0.05, clip_norm=10.0),
    ),
}
