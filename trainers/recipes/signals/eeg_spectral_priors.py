"""Spectral priors against attention: `zoo train eeg_spectral_priors` (stand-in), and Medformer's settings on APAVA.

zoo train eeg_spectral_priors --config tiny_spectral
zoo train eeg_spectral_priors --config spectral --data-dir <folder with feature_*.npy and label.npy>

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32, all on subjects that training has not seen. Stand-in:
tiny_spectral, 600 steps in 27 s with compilation, accuracy 0.913 and AUROC 0.973; tiny_transformer, attention over raw
samples, as many steps in 44 CPU seconds, 0.538 and 0.527; a coin has 0.5. Logistic regression (L-BFGS) on the same
features 0.914, on wavelet features 0.918, on features of frames 0.913, on raw samples 0.476, eight folds of five
subjects each.
APAVA, the first 15 windows of each of its 23 subjects (of 5,967 in all, 339 could be had). Medformer's division, four
test subjects with 60 windows: spectral 0.967 and AUROC 1.000, 19 CPU seconds; four subjects are too few to rank
by, and one subject left out at a time, by logistic regression, band powers have 0.724 (0.718 with the logarithms of
shares alone), every fourth raw sample 0.532. medformer and apava have not been run on it. The paper's tables could not
be had.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _standin(config: str, *, epochs: int, learning_rate: float) -> Recipe:
    # The key biases of attention have no effect, so that their gradients are rounding noise; see the epsilon.
    optimizer = Optimizer(name="adam", learning_rate=learning_rate, schedule="cosine", epsilon=1e-5)
    return Recipe(paper="eeg_spectral_priors", config=config, batch_size=32, epochs=epochs, optimizer=optimizer)


def _official(config: str, data: str, *, batch_size: int = 32) -> Recipe:
    """Medformer's settings; its average of all weights is one over the last thousand steps here."""
    return Recipe(
        paper="eeg_spectral_priors",
        config=config,
        data=data,
        batch_size=batch_size,
        epochs=100,
        seed=41,
        optimizer=Optimizer(name="adam", learning_rate=1e-4, schedule="constant", clip_norm=4.0, average_decay=0.999),
        evaluation=Evaluation(patience=10),
    )


RECIPES = {
    "tiny": _standin("tiny", epochs=20, learning_rate=1e-3),
    "tiny_filterbank": _standin("tiny_filterbank", epochs=20, learning_rate=1e-3),
    "tiny_transformer": _standin("tiny_transformer", epochs=20, learning_rate=1e-3),
    "tiny_spectral": _standin("tiny_spectral", epochs=20, learning_rate=1e-2),
    "tiny_stft": _standin("tiny_stft", epochs=20, learning_rate=1e-2),
    "tiny_wavelet": _standin("tiny_wavelet", epochs=20, learning_rate=1e-2),
    "spectral": _official("spectral", "apava"),
    "spectral_mlp": _official("spectral_mlp", "apava"),
    "transformer": _official("transformer", "apava"),
    "medformer": _official("medformer", "apava"),
    "apava": _official("apava", "apava"),
    "apava_filterbank": _official("apava_filterbank", "apava"),
}
