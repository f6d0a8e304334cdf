"""RCTEA's runs: `zoo train rctea` (stand-in) and the four stages on BETA.

zoo train rctea --config beta_structural --data-dir <folder of beta_kg> --workdir runs/a
zoo train rctea --config beta_temporal --data-dir <...> --workdir runs/b --init-from runs/a
zoo train rctea --config beta_consensus --data-dir <...> --workdir runs/c --init-from runs/b
zoo train rctea --config beta --data-dir <...> --workdir runs/d --init-from runs/c

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, float32: the stand-in's 100 steps take 94 s, 34 of them
compiling; of 120 test pairs Hits@1 0.967 by cosine and 0.983 after Sinkhorn, mean reciprocal rank 0.974 (by degree:
0.008 and 0.082). The paper's figures are not public in text form; the stages on BETA have not been run to their end.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _stage(config: str, *, epochs: int, learning_rate: float = 5e-3) -> Recipe:
    """Lists of 512 of the first 2,000 seed pairs; officially RMSprop, here Adam without momentum, which is the same but
    for a correction in the first steps."""
    return Recipe(
        paper="rctea",
        config=config,
        data="beta_kg",
        batch_size=1,
        epochs=epochs,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="constant", b1=0.0, b2=0.99),
        evaluation=Evaluation(every=4 * epochs, batch_size=1),
    )


RECIPES = {
    "tiny": Recipe(
        paper="rctea",
        batch_size=1,
        steps=100,
        optimizer=Optimizer(name="adam", learning_rate=5e-3, schedule="constant"),
        evaluation=Evaluation(every=25, batch_size=1),
    ),
    "beta_structural": _stage("beta_structural", epochs=25),
    "beta_temporal": _stage("beta_temporal", epochs=60),
    "beta_consensus": _stage("beta_consensus", epochs=22, learning_rate=1e-3),
    "beta": _stage("beta", epochs=5),
}
