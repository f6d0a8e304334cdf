"""OPTNet's runs: `zoo train optnet` (stand-in towns; 3DAeroRelief has no copy that can be fetched).

Measured with `zoo train optnet` on two CPU cores (AMD EPYC) that several other jobs shared, jax 0.10.2, float32: after
640 steps of 8 towns mean IoU 0.625 and accuracy 0.783 over the test part, where the commonest class has 0.061 and
0.304. 280 s of processor time, compilation (half of it) included. The paper's mean IoU on 3DAeroRelief cannot be
compared with a stand-in's.
"""

from trainers.recipe import Optimizer, Recipe

RECIPES = {
    "tiny": Recipe(
        paper="optnet",
        batch_size=8,
        epochs=8,
        optimizer=Optimizer(name="adamw", learning_rate=4e-3, schedule="cosine", weight_decay=0.05, clip_norm=10.0),
    ),
}
