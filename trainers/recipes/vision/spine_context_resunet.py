"""SpineContextResUNet's runs: `zoo train spine_context_resunet` (stand-in), and the official settings.

Measured on two CPU cores (AMD EPYC) that other jobs shared (load 6), jax 0.10.2, float32. tiny, 160 steps: Dice 0.953
over all test voxels, 0.951 the mean of volumes; all that is bright (Otsu's threshold) 0.573. A step of four volumes
took a second there, and compiling it 52.
The paper reports a mean Dice of 0.881 on VerSe2020 and 0.882 on CTSpine1K (its ResUNet 0.865 and 0.864); these volumes
are not at hand.

A training step at `zoo bench spine_context_resunet --config verse --batch-size 1`, on two cores of that kind with
nothing beside it: 20.1 s, of which the forward pass would be 11.1: XLA's convolutions of volumes come to 27 GFLOP/s
there. A plain PyTorch equivalent, torch 2.13, two hours earlier: 13.2 s.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _official(config: str, *, batch_size: int = 4, epochs: int = 50, **changes) -> Recipe:
    """Adam at 1e-3; officially a tenth of it after six epochs in which the validation loss has not fallen."""
    return Recipe(
        paper="spine_context_resunet",
        config=config,
        batch_size=batch_size,
        epochs=epochs,
        optimizer=Optimizer(name="adam", **{"learning_rate": 1e-3, "schedule": "constant"} | changes),
        evaluation=Evaluation(batch_size=4),
    )


RECIPES = {
    "tiny": _official("tiny", epochs=10, learning_rate=1e-2, schedule="cosine"),
    "verse": _official("verse"),
    "verse_resunet": _official("verse_resunet"),
}
