"""XCTFormer's runs: forecasts, gaps filled, anomalies found.

zoo train xctformer [--config etth1 --data ett_h1 --data-dir <folder with ETTh1.csv>]
zoo train xctformer --config tiny_imputation
zoo train xctformer --config smap --data smap_msl/SMAP --data-dir <folder with train, test and the table of labels>

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32.
Stand-ins: tiny, 34 s, test MSE 0.044 (repeating the last value 1.842); tiny_anomaly, 55 s, AUROC of steps 0.780 and
adjusted F1 0.738 (distance from the window's mean 0.495 and 0.200).
ETTh1, 96 steps from 96, 10 epochs on one core: test MSE 0.388 and MAE 0.400 (repeating the last value 1.294 and 0.713).
The paper's tables of forecasts and anomalies could not be had.
A training step at the paper's config of ETTh1 (batch 32, L = 96): 7.4 to 9.3 ms; the official code, torch 2.13, same
minutes: 17.8 to 18.9 ms (2.0 to 2.4 times).
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _official(
    config: str, data: str, *, learning_rate: float, batch_size: int = 32, patience: int | None = None
) -> Recipe:
    return Recipe(
        paper="xctformer",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=10,
        seed=2021,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="one_cycle"),
        evaluation=Evaluation(patience=patience),
    )


def _tiny(config: str, *, epochs: int, learning_rate: float = 1e-2) -> Recipe:
    return Recipe(
        paper="xctformer",
        config=config,
        batch_size=64,
        epochs=epochs,
        # Biases before a batch norm have no effect: their gradients are rounding noise, which Adam's usual epsilon
        # would follow, and no two meshes would train alike.
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="one_cycle", epsilon=1e-5),
    )


_SETS = {"etth1": ("ett_h1", 1e-3), "etth2": ("ett_h2", 1e-2), "ettm1": ("ett_m1", 5e-3), "ettm2": ("ett_m2", 5e-3)}
_ALSO = {"exchange": ("exchange_rate", 1e-3)}
_HORIZONS = ("", "_192", "_336", "_720")
_GAPS = {"etth1": 1e-2, "etth2": 5e-3, "ettm1": 5e-3, "ettm2": 1e-3}
_ANOMALIES = {"msl": ("smap_msl/MSL", 1e-2), "smap": ("smap_msl/SMAP", 5e-3), "smd": ("smd/machine-2-1", 1e-3)}

RECIPES = {
    "tiny": _tiny("tiny", epochs=10),
    "tiny_imputation": _tiny("tiny_imputation", epochs=10),
    "tiny_anomaly": _tiny("tiny_anomaly", epochs=10),
    **{
        f"{config}{horizon}": _official(f"{config}{horizon}", data, learning_rate=rate)
        for config, (data, rate) in (_SETS | _ALSO).items()
        for horizon in _HORIZONS
    },
    "cross_channel": _official("cross_channel", "cross_channel", learning_rate=5e-3),
    "illness": _official("illness", "illness", learning_rate=1e-2),
    **{
        f"{config}_imputation": _official(f"{config}_imputation", _SETS[config][0], learning_rate=rate)
        for config, rate in _GAPS.items()
    },
    **{
        config: _official(config, data, learning_rate=rate, batch_size=128, patience=6)
        for config, (data, rate) in _ANOMALIES.items()
    },
    **{
        f"{config}_small": Recipe(
            paper="xctformer",
            config=f"{config}_small",
            data=data,
            batch_size=32,
            steps=300,
            optimizer=Optimizer(name="adam", learning_rate=5e-3, schedule="one_cycle"),
            evaluation=Evaluation(every=100, batch_size=32),
        )
        for config, (data, _) in _ANOMALIES.items()
    },
}
