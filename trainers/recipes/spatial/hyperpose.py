"""HYPERPOSE's runs: `zoo train hyperpose` (stand-in), recorded motions, and the paper's settings for clips.

zoo train hyperpose --data cmu_mocap --data-dir <folder with walking.npz and the others>
zoo train hyperpose --config h36m --data-dir <folder with train.npz and test.npz>

Measured, jax 0.10.2, float32, on shared cores of an AMD EPYC. tiny, 450 steps: MPJPE on people not seen is 0.0382 of
half the picture's width, 19 % of a joint's mean distance from the root (0.2055) and 60 % of the error of keypoints
taken for flat (0.0638); best aligned 0.0266, velocity 0.0076 (flat 0.0177), bones stray by 0.0045 (flat 0.0128).
--data cmu_mocap, 1,014 steps (one core, 327 s of CPU time), the test sequences of walking, running and soccer: MPJPE
0.0306 (flat 0.0688), best aligned 0.0254 (flat 0.0535), velocity 0.0043 (flat 0.0146). The paper's figure, 47.42
thousandths of the same unit (v2, from the repository's log), is of Human3.6M and of keypoints that a detector found;
here they are projected. That set needs a licence: its clips are read, and have not been here.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _small(config: str) -> Recipe:
    return Recipe(
        paper="hyperpose",
        config=config,
        batch_size=32,
        epochs=6,
        optimizer=Optimizer(name="adamw", learning_rate=3e-3, weight_decay=0.01, clip_norm=1.0, warmup_steps=20),
    )


RECIPES = {
    "tiny": _small("tiny"),
    "tiny_v2": _small("tiny_v2"),
    "h36m": Recipe(
        paper="hyperpose",
        config="h36m",
        data="clips",
        batch_size=8,
        epochs=60,
        precision="bfloat16",
        optimizer=Optimizer(name="adamw", learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0, warmup_steps=11_090),
        evaluation=Evaluation(batch_size=16),
    ),
}
