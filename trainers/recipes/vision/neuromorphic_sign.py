"""Sign language on a neuromorphic chip: `zoo train neuromorphic_sign` (stand-in), with attention, and letters.

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32. tiny, 750 steps: accuracy 0.977 on test recordings,
the most frequent class 0.125; 25 CPU seconds. On the simulated chip no letter fires within its 12 ms; of 300 recordings
of 35 ms the chip counts the network's own letter for 0.95, and 0.92 where letters do not hold each other back (weights
of batches of 64 at a rate of 3e-3).
The paper reports 0.923 (simulated) and 0.831 (on the chip) on ASL-DVS, which is not at hand; of Sign-Language MNIST a
fragment is (`--config letters --data sign_mnist_fragment --data-dir <folder>`), too small for an accuracy.
"""

from trainers.recipe import Optimizer, Recipe


def _official(
    config: str, *, epochs: int, data: str = "standin", batch_size: int = 64, learning_rate: float = 3e-3
) -> Recipe:
    """The official optimiser; its schedule begins anew at 25 and 75 epochs, here it goes down once."""
    return Recipe(
        paper="neuromorphic_sign",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        optimizer=Optimizer(name="adamw", learning_rate=learning_rate, schedule="cosine_per_epoch", weight_decay=1e-4),
    )


RECIPES = {
    "tiny": _official("tiny", epochs=5, batch_size=16, learning_rate=6e-3),
    "tiny_attended": _official("tiny_attended", epochs=5, batch_size=16, learning_rate=6e-3),
    "letters": _official("letters", epochs=25),
}
