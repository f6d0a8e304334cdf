"""Cubit's runs: `zoo train cubit` (recall), Tiny Shakespeare, and captions packed into rows."""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _recipe(config: str, *, learning_rate: float, warmup_steps: int, **changes) -> Recipe:
    return Recipe(
        paper="cubit",
        config=config,
        optimizer=Optimizer(
            name="adamw",
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            b2=0.95,
            weight_decay=0.1,
            no_decay=r"(^|/)(scale|reference_scale|log_ridge|rescale_low|rescale_range)$",
            clip_norm=1.0,
        ),
        **changes,
    )


_STANDIN = {"batch_size": 16, "steps": 400, "learning_rate": 3e-3, "warmup_steps": 20,
            "evaluation": Evaluation(every=100)}  # fmt: skip
_SMALL = {"batch_size": 32, "steps": 3000, "learning_rate": 1e-3, "warmup_steps": 100,
          "evaluation": Evaluation(every=500, batch_size=64)}  # fmt: skip

RECIPES = {
    "tiny": _recipe("tiny", **_STANDIN),
    "tiny_transformer": _recipe("tiny_transformer", **_STANDIN),
    "shakespeare": _recipe("shakespeare", data="tiny_shakespeare", **_SMALL),
    "captions": _recipe("captions", data="multi30k_de_en", **_SMALL),
}
