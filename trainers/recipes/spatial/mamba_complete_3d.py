"""3DMambaComplete's runs: `zoo train mamba_complete_3d` (stand-in bodies; PCN and ShapeNet need a licence).

Measured on two CPU cores (AMD EPYC) that eight other jobs shared (load 7), jax 0.10.2, float32: tiny, 250 steps of 16
bodies. Chamfer distance (CD-L1, times 1000) 120.6 over 400 bodies not seen in training, against 182.4 for the points
seen alone; CD-L2 38.9 against 170.2. A step took 0.35 s there, and compiling it 217.
The paper's CD-L1 on PCN, of 16,384 points, is 6.907. Sparse clouds lie farther apart: 512 and 256 points drawn from the
same body, as tiny and its targets have, are 69.4 from each other (the mean of 100 bodies). For them the F-score within
0.01 says little: it is 0.017 of these two draws, and 0.003 once one of them is moved by noise of 0.03. `--data
pcn_demo_clouds` tests on real scans, and has not been run.
"""

from trainers.recipe import Optimizer, Recipe

RECIPES = {
    "tiny": Recipe(
        paper="mamba_complete_3d",
        batch_size=16,
        epochs=2,
        optimizer=Optimizer(name="adamw", learning_rate=5e-3, schedule="cosine", weight_decay=5e-4, clip_norm=10.0),
    ),
}
