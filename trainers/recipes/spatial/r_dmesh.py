"""R-DMesh's runs: `zoo train r_dmesh` (stand-in), and the authors' settings for sequences of one's own.

zoo train r_dmesh --config 300m --data sequences --data-dir <folder of train/*.npz and test/*.npz>
zoo train r_dmesh --model.stage autoencoder --workdir A; zoo train r_dmesh --model.stage flow --init-from A

The second line is the paper's order; `tiny` trains both at once. Measured on two CPU cores (AMD EPYC) that several
other jobs shared, jax 0.10.2, float32, after 800 steps, over the bodies of the test part: restored vertices are off by
0.064 of the body's largest coordinate and their motions by 0.033; those drawn from the video by 0.266 and 0.122. Bodies
that stay as they were given are off by 0.348, those that stay in their first frame, which they are told, by 0.198. The
run took twenty minutes beside the other jobs, five of them to compile. Twice the learning rate restores better and
draws worse (0.325 after 600 steps, of validation bodies). The paper's tables are not public in text form, nor are its
sequences.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe

RECIPES = {
    "tiny": Recipe(
        paper="r_dmesh",
        steps=800,
        batch_size=16,
        optimizer=Optimizer(name="adam", learning_rate=3e-3, clip_norm=1.0, warmup_steps=20),
        evaluation=Evaluation(every=400, batch_size=100),
    ),
    "300m": Recipe(
        paper="r_dmesh",
        config="300m",
        data="sequences",
        batch_size=128,
        epochs=500,
        # The autoencoder's weights do not decay, not even where they rest.
        optimizer=Optimizer(
            name="adamw",
            learning_rate=1e-4,
            schedule="constant",
            weight_decay=0.01,
            no_decay=r"^(encoder|decoder)/",
            clip_norm=1.0,
        ),
        evaluation=Evaluation(batch_size=16),
    ),
}
