"""CC-ISAC's runs: `zoo train camera_isac` (stand-in flights; the paper's recordings need a registration).

Measured on one core of two shared ones (AMD EPYC), jax 0.10.2, float32: tiny, 1,332 steps, 180 CPU seconds on a busy
machine, of which 38 compile the step: more than two minutes. Root mean square errors of the two angles on flights not
seen are 0.99 degrees for the fused prediction, 1.11 for the camera alone and 1.68 for the last echo; 2.1 beams are
probed until the target is found, of 448, and 3.8 from the last echo. A Kalman filter on the echoes, which knows how the
stand-in's targets fly and how wrong its echoes are, has 0.61 degrees and 1.5 beams. The card's target of 1 degree for
the camera is not reached; the detector's own errors leave 0.43. The paper's figures, 71 % less overhead of beam
steering and 2 to 11 % less of tracking, are of other recordings and beams.
A training step of the release's networks (three quantities, batch 32 of 7 frames): 38 ms, images then still halved by
a window reduction, which took 13 ms where `halved` takes 2; the official modules in one step, torch 2.13, same minutes:
64 ms (1.7 times).
"""

from trainers.recipe import Optimizer, Recipe


def _standin(config: str = "tiny", *, epochs: int = 12, learning_rate: float = 5e-3) -> Recipe:
    return Recipe(
        paper="camera_isac",
        config=config,
        batch_size=32,
        epochs=epochs,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="cosine"),
    )


RECIPES = {"tiny": _standin(), "robust": _standin("robust")}
