"""CC-ISAC's runs: `zoo train camera_isac` (stand-in flights)."""

from trainers.recipe import Optimizer, Recipe


def _standin(config: str = "tiny", *, epochs: int = 12, learning_rate: float = 5e-3) -> Recipe:
    return Recipe(
        paper="camera_isac",
        config=config,
        batch_size=32,
        epochs=epochs,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="cosine"),
    )


RECIPES = {"tiny": _standin(), "robust": _standin("robust")}
