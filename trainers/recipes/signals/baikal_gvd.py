"""Baikal-GVD's runs: `zoo train baikal_gvd` (stand-in events)."""

from trainers.recipe import Optimizer, Recipe


def _standin(config: str, *, data: str = "standin") -> Recipe:
    return Recipe(
        paper="baikal_gvd",
        config=config,
        data=data,
        batch_size=32,
        epochs=7,
        optimizer=Optimizer(name="adam", learning_rate=4e-3, schedule="cosine"),
    )


RECIPES = {
    "tiny": _standin("tiny"),
    "raw": _standin("raw"),
    "adapted": _standin("adapted", data="standin_shifted"),
}
