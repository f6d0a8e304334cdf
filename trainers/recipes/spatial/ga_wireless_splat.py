"""GAI-GS's runs: `zoo train ga_wireless_splat` (stand-in: a room whose walls reflect).

`tiny`, 500 steps: SSIM 0.889 and mean absolute error 0.020 on 60 transmitters of the test part; the mean of training
spectra has 0.381 and 0.050. 221 s of processor time, compilation included, on two CPU cores (AMD EPYC) under several
times their load. `deaf`, which knows nothing of the transmitter, has not been run. The paper's tables were not at hand;
the median SSIM of its forerunner WRF-GS+ on measured spectra is about 0.90. A training step of `rfid` with 1,024 of its
20,000 Gaussians, one spectrum, on two cores alone (AMD EPYC): 3.26 s; the official network with splatting in plain
PyTorch, every Gaussian on every pixel, torch 2.13, same minutes: 7.64 s (2.3 times).
"""

from trainers.recipe import Optimizer, Recipe


def _room(config: str) -> Recipe:
    return Recipe(
        paper="ga_wireless_splat",
        config=config,
        batch_size=4,
        epochs=10,
        optimizer=Optimizer(name="adamw", learning_rate=1e-2, schedule="cosine", weight_decay=0.0, clip_norm=1.0),
    )


RECIPES = {"tiny": _room("tiny"), "deaf": _room("deaf")}
