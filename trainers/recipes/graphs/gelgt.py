"""GelGT's runs: `zoo train gelgt` (stand-in) and rel-f1's driver-position.

zoo train gelgt --config f1_small --data f1_relational/driver_position --data-dir <folder of f1_relational>

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, float32: 300 steps in 6.3 minutes while other programs
ran, 2.3 of them compiling; of the stand-in's 200 test questions 0.920 are answered rightly at the step of the best
validation (all alike: 0.565), with a cross-entropy of 0.208 (0.685). Without the lag bias (`--model.lag-bias False`) it
does no worse, AUROC after 200 steps 0.979 against 0.978: lags from the seed's moment are in every token's time encoding
as well, and products of such encodings are functions of the time between two tokens.

The paper's 3.7345 MAE on driver-position is of the configuration `f1_paper` with word vectors of names; none of the
`f1` configurations has been run to its end yet.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _driver_position(config: str, *, batch_size: int, epochs: int, learning_rate: float = 1e-4) -> Recipe:
    return Recipe(
        paper="gelgt",
        config=config,
        data="f1_relational/driver_position",
        batch_size=batch_size,
        epochs=epochs,
        seed=42,
        optimizer=Optimizer(
            name="adamw", learning_rate=learning_rate, schedule="constant", weight_decay=1e-5, clip_norm=1.0
        ),
        evaluation=Evaluation(batch_size=128),
    )


RECIPES = {
    "tiny": Recipe(
        paper="gelgt",
        batch_size=64,
        epochs=12,
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, schedule="cosine", weight_decay=1e-5, clip_norm=1.0),
        evaluation=Evaluation(batch_size=200),
    ),
    "f1": _driver_position("f1", batch_size=512, epochs=10),
    "f1_paper": _driver_position("f1_paper", batch_size=64, epochs=10),
    "f1_small": _driver_position("f1_small", batch_size=64, epochs=5, learning_rate=1e-3),
}
