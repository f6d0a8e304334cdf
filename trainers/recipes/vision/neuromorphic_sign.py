"""Sign language on a neuromorphic chip: `zoo train neuromorphic_sign` (stand-in), with attention, and letters."""

from trainers.recipe import Optimizer, Recipe


def _official(config: str, *, epochs: int, data: str = "standin", batch_size: int = 64) -> Recipe:
    """The official optimiser; its schedule begins anew at 25 and 75 epochs, here it goes down once."""
    return Recipe(
        paper="neuromorphic_sign",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, schedule="cosine_per_epoch", weight_decay=1e-4),
    )


RECIPES = {
    "tiny": _official("tiny", epochs=5),
    "tiny_attended": _official("tiny_attended", epochs=5),
    "letters": _official("letters", epochs=25),
}
