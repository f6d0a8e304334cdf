"""MAGNET's runs: `zoo train magnet` (stand-in) and the ovarian cohort of TCGA as far as it is public.

zoo train magnet --config ov_rna --data-dir <folder of ov_omics>

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32, with the model, data and optimiser of `tiny` at a
constant learning rate: macro F1 of the stand-in's test patients 0.888 after 60 steps and 0.868 after 120 (everybody the
most frequent class: below 0.5). Officially L2 decay inside Adam and a step decay of 0.8 every 20 epochs; here decoupled
decay and a cosine. The paper's tables are not public in text form; `ov_rna` lacks the methylation block, so its figures
would be orientation only. It has not been run to its end yet.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _cohort(config: str, **changes) -> Recipe:
    """A step is an epoch: the whole cohort."""
    return Recipe(paper="magnet", config=config, batch_size=1, evaluation=Evaluation(every=10, batch_size=1), **changes)


RECIPES = {
    "tiny": _cohort("tiny", steps=300, optimizer=Optimizer(name="adamw", learning_rate=1e-2, weight_decay=1e-3)),
    "ov_rna": _cohort(
        "ov_rna",
        data="ov_omics/10",
        steps=200,
        optimizer=Optimizer(name="adamw", learning_rate=2.12e-4, weight_decay=1e-3),
    ),
}
