"""SID-MLP's runs: `zoo train sid_mlp` (stand-in), MovieLens-100k and Amazon Beauty, teacher and student together.

zoo train sid_mlp --config movielens100k_small --data-dir <folder with u.data, u.item and u.user>
zoo train sid_mlp --config beauty --data-dir <folder with Beauty.txt and its attributes>

Measured: test NDCG@10 0.948 and HR@1 0.898 among 30 others; its teacher 0.950 and 0.895; popularity 0.175 and 0.045.
The runs on public sets have not been made.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _real(config: str, **changes) -> Recipe:
    """The official teacher's optimiser, for teacher and student together."""
    settings = {"epochs": 150, "batch_size": 256} | changes
    return Recipe(
        paper="sid_mlp",
        config=config,
        data="sequential_rec/Beauty" if config == "beauty" else "movielens100k",
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, weight_decay=0.05, warmup_steps=200, clip_norm=1.0),
        evaluation=Evaluation(every=500 if "steps" in settings else None),
        **settings,
    )


RECIPES = {
    "tiny": Recipe(
        paper="sid_mlp",
        batch_size=64,
        steps=1500,
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, weight_decay=0.01, warmup_steps=100, clip_norm=1.0),
        evaluation=Evaluation(every=250),
    ),
    **{name: _real(name) for name in ("movielens100k", "beauty")},
    "movielens100k_small": _real("movielens100k_small", steps=3000, batch_size=128),
}
