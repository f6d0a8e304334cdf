"""ConvRec's runs: `zoo train convrec` (stand-in) and two public sets.

The stand-in, measured after 1000 steps: test NDCG@10 0.778 and HR@1 0.510 among 30 others (popularity: 0.175, 0.045):
brand and season are known, the order of categories only in part.

zoo train convrec --config movielens100k --data-dir <folder with u.data, u.item and u.user>

Measured on two shared CPU cores, float32, 800 steps: test HR@10 0.511 and NDCG@10 0.277 among 100 items the user never
took, drawn with replacement (popularity: 0.310 and 0.167). The paper has no number for this set. Not run: Beauty.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe

RECIPES = {
    # Knows brand and season after 300 steps; the order of categories takes longer.
    "tiny": Recipe(
        paper="convrec",
        batch_size=64,
        steps=1000,
        optimizer=Optimizer(name="adamw", learning_rate=2e-3, weight_decay=0.01),
        evaluation=Evaluation(every=200),
    ),
    # 200 passes over the users are the official number; sizes and learning rate suit the small set.
    "movielens100k": Recipe(
        paper="convrec",
        config="movielens100k",
        data="movielens100k",
        batch_size=128,
        steps=800,
        optimizer=Optimizer(name="adamw", learning_rate=2e-3, weight_decay=0.1),
        evaluation=Evaluation(every=100),
    ),
    # As the official code trains.
    "beauty": Recipe(
        paper="convrec",
        config="beauty",
        data="sequential_rec/Beauty",
        batch_size=128,
        epochs=200,
        optimizer=Optimizer(name="adamw", learning_rate=1e-4, schedule="constant", weight_decay=0.1),
        evaluation=Evaluation(batch_size=64),
    ),
}
