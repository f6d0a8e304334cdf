"""HYPERPOSE's runs: `zoo train hyperpose` (stand-in), recorded motions, and the paper's settings for clips."""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _small(config: str) -> Recipe:
    return Recipe(
        paper="hyperpose",
        config=config,
        batch_size=32,
        epochs=6,
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, weight_decay=0.01, clip_norm=1.0, warmup_steps=20),
    )


RECIPES = {
    "tiny": _small("tiny"),
    "tiny_v2": _small("tiny_v2"),
    "h36m": Recipe(
        paper="hyperpose",
        config="h36m",
        data="clips",
        batch_size=8,
        epochs=60,
        precision="bfloat16",
        optimizer=Optimizer(name="adamw", learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0, warmup_steps=11_090),
        evaluation=Evaluation(batch_size=16),
    ),
}
