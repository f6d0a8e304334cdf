"""DSTAN-Med's runs: `zoo train dstan_med` (a stand-in) and intensive care of PhysioNet 2012, readings falsified.

zoo train dstan_med --config physionet --data physionet2012/L1 --data-dir <folder with set-a and its outcomes>

Measured on two shared CPU cores (AMD EPYC, others at work on them), jax 0.10.2, float32: tiny, 113 s in all and 67 s
of CPU time, compiling included: test F1 0.917 and AUROC 0.951; an alarm at every window has F1 0.813, the largest
reading of the window 0.827 and 0.849. The rules leave only certain alarms and few of them: precision 0.954 becomes
1.000, sensitivity 0.882 becomes 0.069. They look at the last two samples, a window is falsified if any of its 15 is,
and most falsified readings stay within what a body shows. The paper reports four points of precision and two of F1
gained by them. PhysioNet has not been run.
A training step of physionet (batch 64) takes 33 to 35 ms, of a plain PyTorch equivalent, torch 2.13, in the same
minutes 50 to 70 ms (1.4 to 2.1 times).
"""

from trainers.recipe import Evaluation, Optimizer, Recipe

_ABLATIONS = ("dam_only", "time_only", "sensors_only", "no_skip", "convolution_only")


def _tiny(config: str) -> Recipe:
    return Recipe(
        paper="dstan_med",
        config=config,
        data="standin/L4",
        batch_size=64,
        epochs=6,
        optimizer=Optimizer(name="adam", learning_rate=3e-3, schedule="cosine", clip_norm=1.0),
    )


def _official(config: str, data: str, *, learning_rate: float = 1e-4) -> Recipe:
    """The official settings; instead of halving the learning rate where validation stalls, it falls along a cosine."""
    return Recipe(
        paper="dstan_med",
        config=config,
        data=data,
        batch_size=64,
        epochs=100,
        seed=42,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="cosine", clip_norm=1.0),
        evaluation=Evaluation(patience=10),
    )


_PHYSIONET = ("physionet", "physionet_no_rules", *(f"physionet_{name}" for name in _ABLATIONS))

RECIPES = {
    "tiny": _tiny("tiny"),
    **{f"tiny_{name}": _tiny(f"tiny_{name}") for name in _ABLATIONS},
    **{config: _official(config, "physionet2012") for config in _PHYSIONET},
    "tranad_proxy": _official("tranad_proxy", "physionet2012", learning_rate=1e-3),
}
