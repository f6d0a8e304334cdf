"""Social-Mamba's runs: `zoo train social_mamba` (stand-in) and the pedestrians of ETH/UCY, one scene left out.

zoo train social_mamba --config hotel_small --data eth_ucy/hotel --data-dir <folder with the recordings>

Measured, jax 0.10.2, float32, on two shared CPU cores: tiny, 12 epochs of 62 steps at 7 to 9 CPU seconds each, test
minADE of 4 guesses; constant velocity has 1.70 m. On an Intel Xeon 0.35 m (minFDE 0.67 m), on an AMD EPYC 0.66 m,
and 0.75 m with the neighbours hidden from it: where a run gets to depends on rounding, since it is cut short while
neighbours are being understood. The paper reports nothing on ETH/UCY.
hotel_small with --epochs 6 (240 steps), 1,197 test windows, trained without univ and zara02: minADE of 20 guesses 0.484
m and minFDE 0.844 m, still worse than constant velocity with its one guess (0.319 m and 0.614 m); on windows of the
scenes it was trained on 0.376 m and 0.706 m. That run is too short, and nothing turns the scenes to other headings.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _pedestrians(config: str, *, epochs: int, learning_rate: float) -> Recipe:
    """The official settings of the most similar set, SDD. Its loss is a hundred times ours, its gradients and Adam's
    epsilon with it: the norm they are cut to and that epsilon are a hundredth here, and every step is the same."""
    return Recipe(
        paper="social_mamba",
        config=config,
        data=f"eth_ucy/{config.removesuffix('_small')}",
        batch_size=128,
        epochs=epochs,
        optimizer=Optimizer(
            name="adam", learning_rate=learning_rate, schedule="tenth_in_last_fifth", epsilon=1e-10, clip_norm=0.01
        ),
        evaluation=Evaluation(patience=None),
    )


_SCENES = ("eth", "hotel", "univ", "zara01", "zara02")

RECIPES = {
    "tiny": Recipe(
        paper="social_mamba",
        batch_size=64,
        epochs=12,
        # The attention's key biases have no effect, so that their gradients are rounding noise. Adam's usual epsilon
        # would follow it, and no two meshes would train alike.
        optimizer=Optimizer(name="adam", learning_rate=5e-3, schedule="cosine", epsilon=1e-5, clip_norm=1.0),
    ),
    **{scene: _pedestrians(scene, epochs=150, learning_rate=5e-4) for scene in _SCENES},
    **{f"{scene}_small": _pedestrians(f"{scene}_small", epochs=15, learning_rate=5e-3) for scene in _SCENES},
}
