"""Hyformer's runs: `zoo train hyformer` (stand-in), and small models on MoleculeNet and SMILES with logP.

zoo train hyformer --config freesolv --data-dir <folder of moleculenet>
zoo predict hyformer --workdir <run> --output molecules.csv    (generates strings and says how many can be molecules)
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
