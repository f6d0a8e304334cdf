"""Baikal-GVD's runs: `zoo train baikal_gvd` (stand-in events; the telescope's simulations are not public).

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32: tiny, 600 steps, 104 CPU seconds with compilation, 108
seconds beside other work. On test events F1 of the signal hits 0.852 (precision 0.851, recall 0.866) and accuracy of
events 0.938; hits of more than 1.5 photoelectrons, and how their height changes over time, have 0.539 and 0.588. The
residuals of the stand-in's signal are noise of 3 ns, of which nothing can be learned: mean absolute error 2.38 ns, that
of always saying 0 is 2.37. The group reports about 0.90 precision and recall of its hits, on simulations of the real
detector and with a larger network. Controls: "raw", N3 on all hits and not on those N2 keeps, has an accuracy of
events of 0.787 after as many steps; "adapted" has domain classifiers, for "standin_shifted".
"""

from trainers.recipe import Optimizer, Recipe


def _standin(config: str, *, data: str = "standin") -> Recipe:
    return Recipe(
        paper="baikal_gvd",
        config=config,
        data=data,
        batch_size=32,
        epochs=4,
        optimizer=Optimizer(name="adam", learning_rate=4e-3, schedule="cosine"),
    )


RECIPES = {
    "tiny": _standin("tiny"),
    "raw": _standin("raw"),
    "adapted": _standin("adapted", data="standin_shifted"),
}
