"""ALDA4Rec's runs: `zoo train alda4rec` (stand-in) and MovieLens-100k.

zoo train alda4rec --config movielens100k --data-dir <folder with u.data, u.item and u.user>

Measured: test NDCG@10 0.611, HR@10 1.000 and HR@1 0.267 among 30 others (popularity: 0.175, 0.378, 0.045). The model
knows a user's brand and, as it sums over a history, not which of four categories comes next: hence a quarter.
MovieLens-100k has not been run; its graphs of 943 users, 1,682 items and 6 intervals have 331,161 edges, 3.5 % of all.
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
    # As the official code trains, but for its learning rate's steps down by 0.96 an epoch.
    "movielens100k": Recipe(
        paper="alda4rec",
        config="movielens100k",
        data="movielens100k",
        batch_size=512,
        steps=1000,
        optimizer=Optimizer(name="adam", learning_rate=1e-3),
        evaluation=Evaluation(every=100),
    ),
}
