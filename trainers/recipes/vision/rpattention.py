"""Representative attention's runs: `zoo train rpattention` (stand-in), and small images, in any host.

Measured on two shared CPU cores (AMD EPYC, beside two other jobs), jax 0.10.2, float32, 1,240 steps on the stand-in:
accuracy 0.822 on test images (each class as often as it is: 0.132); 300 s of CPU time, of which 20 compiled. When it
begins to look marks up varies from draw to draw of the data, and so does what it comes to. `digits` (digits8x8, its
first half trains; 720 steps, one core, 135 s of CPU time): accuracy 0.952 on the 899 images of the second half, each
class as often as it is 0.101. The run on MNIST has not been finished; the paper's numbers are not public.
"""

from trainers.recipe import Optimizer, Recipe


def _run(config: str, *, epochs: int, data: str = "standin", learning_rate: float = 2e-3) -> Recipe:
    return Recipe(
        paper="rpattention",
        config=config,
        data=data,
        batch_size=64,
        epochs=epochs,
        optimizer=Optimizer(
            name="adamw", learning_rate=learning_rate, warmup_steps=100, weight_decay=0.05, clip_norm=1
        ),
    )


RECIPES = {
    "tiny": _run("tiny", epochs=20, learning_rate=3e-3),
    "digits": _run("digits", epochs=60, data="digits8x8"),
    "mnist": _run("mnist", epochs=10, data="mnist"),
}
