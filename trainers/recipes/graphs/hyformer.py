"""Hyformer's runs: `zoo train hyformer` (stand-in), and small models on MoleculeNet and SMILES with logP.

zoo train hyformer --config freesolv --data-dir <folder of moleculenet>
zoo predict hyformer --workdir <run> --output molecules.csv    (generates strings and says how many can be molecules)

Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32, 700 steps on the stand-in at about 500 molecules a
second (1.5 minutes, 14 s more to compile): on test molecules the property's root mean squared error is 0.125 (the mean
for everybody: 9.09; R^2 0.9998), and -log p a symbol 0.994 (symbols by their frequency: 1.943). Of 256 strings drawn at
temperature 1, 0.789 can be molecules, of these 0.990 differ and 0.895 of them are new; 0.95 were hoped for, and
unclosed rings are most of the rest. That the other tasks help prediction is seen with 8 and 20 labels and not with 12
or 38 (tests/zoo/test_hyformer.py). The paper's tables are not public in text form. The recipes on real data train from
nothing, without the paper's millions of molecules; they have not been run.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _recipe(config: str, *, learning_rate: float, **changes) -> Recipe:
    optimizer = Optimizer(
        name="adamw",
        learning_rate=learning_rate,
        warmup_steps=50,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    return Recipe(paper="hyformer", config=config, optimizer=optimizer, **changes)


def _real(config: str, data: str, *, steps: int, every: int) -> Recipe:
    return _recipe(
        config,
        data=data,
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        evaluation=Evaluation(every=every, batch_size=256),
    )


RECIPES = {
    "tiny": _recipe("tiny", steps=700, batch_size=64, learning_rate=4e-3, evaluation=Evaluation(every=175)),
    "freesolv": _real("freesolv", "moleculenet/FreeSolv_SAMPL", steps=800, every=50),
    "lipophilicity": _real("lipophilicity", "moleculenet/Lipophilicity", steps=3000, every=250),
    "bbbp": _real("bbbp", "moleculenet/BBBP", steps=800, every=50),
    "clintox": _real("clintox", "moleculenet/clintox", steps=800, every=50),
    "logp": _real("logp", "smiles_logp", steps=4000, every=500),
}
