"""GAI-GS's runs: `zoo train ga_wireless_splat` (stand-in: a room whose walls reflect).

No run has been measured yet.
"""

from trainers.recipe import Optimizer, Recipe


def _room(config: str) -> Recipe:
    return Recipe(
        paper="ga_wireless_splat",
        config=config,
        batch_size=4,
        epochs=10,
        optimizer=Optimizer(name="adamw", learning_rate=1e-2, schedule="cosine", weight_decay=0.0, clip_norm=1.0),
    )


RECIPES = {"tiny": _room("tiny"), "deaf": _room("deaf")}
