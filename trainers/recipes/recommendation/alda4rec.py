"""ALDA4Rec's run: `zoo train alda4rec` (stand-in).

Measured: test NDCG@10 0.611, HR@10 1.000 and HR@1 0.267 among 30 others (popularity: 0.175, 0.378, 0.045). The model
knows a user's brand and, as it sums over a history, not which of four categories comes next: hence a quarter.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe

RECIPES = {
    "tiny": Recipe(
        paper="alda4rec",
        batch_size=64,
        steps=600,
        optimizer=Optimizer(name="adam", learning_rate=5e-3),
        evaluation=Evaluation(every=100),
    ),
}
