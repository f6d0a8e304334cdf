"""SID-MLP's run: `zoo train sid_mlp` (stand-in), teacher and student together.

Measured: test NDCG@10 0.948 and HR@1 0.898 among 30 others; its teacher 0.950 and 0.895; popularity 0.175 and 0.045.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe

RECIPES = {
    "tiny": Recipe(
        paper="sid_mlp",
        batch_size=64,
        steps=1500,
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, weight_decay=0.01, warmup_steps=100, clip_norm=1.0),
        evaluation=Evaluation(every=250),
    ),
}
