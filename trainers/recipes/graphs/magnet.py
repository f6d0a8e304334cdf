"""MAGNET's runs: `zoo train magnet` (stand-in) and the ovarian cohort of TCGA as far as it is public.

zoo train magnet --config ov_rna --data-dir <folder of ov_omics>

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, float32. Stand-in, 300 steps: macro F1 of the test
patients 0.867 at the best validation step, 110 (everybody the most frequent class: 0.181). `ov_rna`, 200 steps: of
63 test patients accuracy 0.683, AUROC 0.718, AUPRC 0.742, Matthews correlation 0.370 (one class: 0.524, 0.5, 0.5, 0)
at the best of 20 validations, step 150, where the training loss is 0.03. Officially L2 decay inside Adam and a step
decay of 0.8 every 20 epochs; here decoupled decay and a cosine. The paper's tables are not public in text form, and
this cohort lacks the methylation block: its figures would be orientation only.
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
