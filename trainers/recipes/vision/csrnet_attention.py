"""Crowd counting with attention: `zoo train csrnet_attention`, and --model.attention none, simam, pfca, sa, se, ...

zoo train csrnet_attention --config pfcasa --data-dir <folder with ShanghaiTech's part_B> --init-from start.safetensors
(with VGG-16's front end, see `with_vgg_front`). CSRNet's own optimiser, on quarters of photographs instead of whole
ones: --batch-size 1 --epochs 400 --optimizer.name sgd --optimizer.b1 0.95 --optimizer.learning-rate 3e-4, which is 1e-7
for a sum over 3,072 cells. ShanghaiTech was not at hand; the paper's numbers are not published.

Measured on two shared CPU cores (AMD EPYC, beside two other trainings), jax 0.10.2, float32, 7 epochs (259 steps) on
the stand-in: heads are counted with a mean absolute error of 1.74 in test images of 1 to 60, the mean number
everywhere errs by 13.08; 3.7 minutes, 35 s of them compiling.

A training step at `zoo bench csrnet_attention --config pfcasa --batch-size 1 --model.height 384 --model.width 512`, on
two cores of that kind with nothing beside it: 5.5 s; the official CSRNet with PFCASA from the card, torch 2.13, two
hours earlier: 5.5 s. These are 474 GFLOP, and products came to some 100 GFLOP/s: nobody takes less than 4.7 s there.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _shanghaitech(config: str) -> Recipe:
    return Recipe(
        paper="csrnet_attention",
        config=config,
        data="shanghaitech/part_B",
        batch_size=8,
        epochs=50,
        optimizer=Optimizer(name="adam", learning_rate=1e-5, schedule="constant"),
        evaluation=Evaluation(batch_size=4),
    )


RECIPES = {
    "tiny": Recipe(
        paper="csrnet_attention",
        batch_size=16,
        epochs=7,
        optimizer=Optimizer(name="adam", learning_rate=2e-3, schedule="cosine"),
    ),
    "csrnet": _shanghaitech("csrnet"),
    "pfcasa": _shanghaitech("pfcasa"),
}
