"""Representative attention's runs: `zoo train rpattention` (stand-in), and small images, in any host."""

from trainers.recipe import Optimizer, Recipe


def _run(config: str, *, epochs: int, data: str = "standin", learning_rate: float = 2e-3) -> Recipe:
    return Recipe(
        paper="rpattention",
        config=config,
        data=data,
        batch_size=64,
        epochs=epochs,
        optimizer=Optimizer(
            name="adamw", learning_rate=learning_rate, warmup_steps=100, weight_decay=0.05, clip_norm=1
        ),
    )


RECIPES = {
    "tiny": _run("tiny", epochs=20, learning_rate=3e-3),
    "digits": _run("digits", epochs=60, data="digits8x8"),
    "mnist": _run("mnist", epochs=10, data="mnist"),
}
