"""Cubit's runs: `zoo train cubit` (recall), Tiny Shakespeare, and captions packed into rows.

zoo train cubit --config shakespeare --data-dir <folder with input.txt>
zoo train cubit --config captions --data-dir <folder of multi30k_de_en>

Measured on two shared CPU cores (AMD EPYC, beside other work), jax 0.10.2, float32, 300 steps of 32 rows: on the
stand-in's test rows the value that a key had before is named in 0.9996 of the cases, after 1.9 minutes and 25 s of
compiling; `tiny_transformer`, the same but for its mixer, comes to 0.9403 in the same steps, tokens by their frequency
to 0.1146. The paper's tables are not public in text form; it trains on arXiv, Books3 and FineWeb, which are not here,
and claims a lower loss than attention's there.
"""

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


_STANDIN = {"batch_size": 32, "steps": 300, "learning_rate": 3e-3, "warmup_steps": 20,
            "evaluation": Evaluation(every=75)}  # fmt: skip
_SMALL = {"batch_size": 32, "steps": 3000, "learning_rate": 1e-3, "warmup_steps": 100,
          "evaluation": Evaluation(every=500, batch_size=64)}  # fmt: skip

RECIPES = {
    "tiny": _recipe("tiny", **_STANDIN),
    "tiny_transformer": _recipe("tiny_transformer", **_STANDIN),
    "shakespeare": _recipe("shakespeare", data="tiny_shakespeare", **_SMALL),
    "captions": _recipe("captions", data="multi30k_de_en", **_SMALL),
}
