"""Attention-Mamba's runs: `zoo train attention_mamba` (stand-in), and the official settings of its data sets.

Measured on two CPU cores (AMD EPYC) that other jobs shared (load 5), jax 0.10.2, float32. tiny, 125 steps: Dice 0.884,
the mean of three classes over all test pixels; what is bright (Otsu's threshold), taken for the most frequent class,
0.159. A step of 16 images took 1.4 s there, and compiling it 89.
The paper reports a Dice of 0.856 on Synapse, 0.920 on ACDC, 0.901 on ISIC 2018 and 0.916 on PH2, which are not at hand;
nor is the backbone trained on ImageNet that its runs start from.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _official(
    config: str,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    weight_decay: float = 1e-2,
    data: str = "standin",
    schedule: str = "cosine_per_epoch",
    evaluation_batch: int = 8,
) -> Recipe:
    """The official optimiser; its learning rate rises again after a third of the epochs, here it goes down once."""
    return Recipe(
        paper="attention_mamba",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        optimizer=Optimizer(
            name="adamw", learning_rate=learning_rate, schedule=schedule, weight_decay=weight_decay, no_decay="^$"
        ),
        evaluation=Evaluation(batch_size=evaluation_batch),
    )


RECIPES = {
    "tiny": _official("tiny", batch_size=16, epochs=5, learning_rate=3e-3, schedule="cosine", evaluation_batch=50),
    "synapse": _official("synapse", batch_size=24, epochs=300, learning_rate=5e-4),
    "acdc": _official("acdc", batch_size=24, epochs=150, learning_rate=5e-4, weight_decay=5e-2),
    "isic": _official("isic", batch_size=12, epochs=150, learning_rate=1.5e-4),
    # Not in the paper: the usual division of that set, in as many steps as two CPU cores take in minutes.
    "vessels": _official(
        "vessels",
        batch_size=8,
        epochs=3,
        learning_rate=3e-3,
        data="chase_db1",
        schedule="cosine",
        evaluation_batch=32,
    ),
}
