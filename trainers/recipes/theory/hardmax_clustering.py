"""The hardmax classifier: `zoo train hardmax_clustering` (stand-in), and the paper's settings on IMDb.

zoo train hardmax_clustering --config imdb --data-dir <folder with imdb_sample.jsonl or the aclImdb files>

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32, other programs at work: 48 s, test accuracy 0.996 (the
most frequent class: 0.488). After 12 epochs, in every review whose logit is above 2 a word of sentiment leads; 53 % of
the leaders there are such words, 19 % of all words are. The IMDb runs have not been made.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _imdb(config: str) -> Recipe:
    return Recipe(
        paper="hardmax_clustering",
        config=config,
        data="imdb_sample",
        batch_size=64,
        epochs=101,
        optimizer=Optimizer(name="adam", learning_rate=1e-3, schedule="constant", clip_norm=5.0),
        evaluation=Evaluation(patience=None),
    )


RECIPES = {
    "tiny": Recipe(
        paper="hardmax_clustering",
        data="standin_polar",
        batch_size=64,
        epochs=30,
        optimizer=Optimizer(name="adam", learning_rate=3e-2, schedule="cosine", clip_norm=5.0),
    ),
    **{config: _imdb(config) for config in ("imdb", "imdb_4", "imdb_8", "imdb_16")},
}
