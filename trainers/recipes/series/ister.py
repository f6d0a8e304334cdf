"""Ister's runs: `zoo train ister` (stand-in) and the settings of the official scripts on the public sets.

zoo train ister --config etth1 --data ett_h1 --data-dir <folder with ETTh1.csv>

Measured on two shared CPU cores (AMD EPYC, AVX-512), jax 0.10.2, float32: early stop after 10 epochs, 62 s in all, test
MSE 0.386 and MAE 0.405 (official code on such a machine: 0.3925 and 0.4107 after 13 epochs). An epoch of 33 steps takes
3.9 to 4.2 s; the official script's, torch 2.13 with both cores, took 12.5 to 16.7 s in alternating runs. That model is
bound by its matrix products, 17 GFLOP a step; at the sizes of ETTm1 (one layer of 32, batches of 64, on the same file:
--config ettm1) the data on the device pay: 69 to 84 steps a second, the official script 11.6 a minute later on the same
machine.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _official(
    config: str,
    data: str,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float = 3e-4,
    schedule: str = "cosine_per_epoch",
) -> Recipe:
    return Recipe(
        paper="ister",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        seed=2021,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule=schedule),
        evaluation=Evaluation(patience=3),
    )


def _exchange(config: str) -> Recipe:
    return _official(config, "exchange_rate", batch_size=32, epochs=10, learning_rate=1e-4, schedule="halve_per_epoch")


RECIPES = {
    # Learns the stand-in to less than half of the naive error in under a minute on two CPU cores.
    "tiny": Recipe(
        paper="ister",
        batch_size=64,
        epochs=20,
        # The heads start by averaging tokens whose mean the layer norm has just removed, so the encoder's first
        # gradients are rounding noise. Adam's usual epsilon would follow it, and no two meshes would train alike.
        optimizer=Optimizer(name="adam", learning_rate=3e-3, schedule="cosine", epsilon=1e-5),
    ),
    "etth1": _official("etth1", "ett_h1", batch_size=256, epochs=20),
    "etth1_192": _official("etth1_192", "ett_h1", batch_size=512, epochs=20),
    "etth1_336": _official("etth1_336", "ett_h1", batch_size=256, epochs=20),
    "etth1_720": _official("etth1_720", "ett_h1", batch_size=256, epochs=20),
    **{c: _official(c, "ett_h2", batch_size=512, epochs=20) for c in ("etth2", "etth2_192", "etth2_336", "etth2_720")},
    **{c: _official(c, "ett_m1", batch_size=64, epochs=50) for c in ("ettm1", "ettm1_192", "ettm1_720")},
    "ettm1_336": _official("ettm1_336", "ett_m1", batch_size=64, epochs=35),
    **{c: _official(c, "ett_m2", batch_size=512, epochs=20) for c in ("ettm2", "ettm2_192", "ettm2_336", "ettm2_720")},
    **{c: _exchange(c) for c in ("exchange", "exchange_192", "exchange_336", "exchange_720")},
    # Not in the paper; the usual protocol of that set.
    "illness": _official("illness", "illness", batch_size=32, epochs=20, learning_rate=1e-3),
}
