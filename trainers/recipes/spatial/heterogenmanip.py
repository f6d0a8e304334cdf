"""HeteroGenManip's runs: `zoo train heterogenmanip` (stand-in; the paper's demonstrations are of a simulator).

`tiny`, 2000 steps: on 200 scenes of the test part the eighth action is within 0.05 of the demonstrated one in 91.5 %
(mean distance 0.027; staying, and going on as before, 0.800 and 0 %); acting in turn until the end, `python -m
trainers.recipes.spatial.heterogenmanip runs/heterogenmanip`, the hand ends within 0.05 of the goal in 73.5 %. 282 s of
processor time, compilation included, on two CPU cores (AMD EPYC) under five times their load; on two free cores it was
not timed. The paper's rates of success are of simulated and real robots.
"""

import sys

import jax
import jax.numpy as jnp

import zoo
from trainers.data.manipulation import load_scenes, roll_out
from trainers.recipe import Evaluation, Optimizer, Recipe
from zoo.tasks.manipulation import REACH


def _standin(config: str) -> Recipe:
    return Recipe(
        paper="heterogenmanip",
        config=config,
        batch_size=32,
        steps=2000,
        optimizer=Optimizer(
            name="adamw", learning_rate=2e-3, b1=0.95, weight_decay=1e-6, warmup_steps=50, average_decay=0.99
        ),
        evaluation=Evaluation(every=500),
    )


RECIPES = {"tiny": _standin("tiny"), "tiny_official": _standin("tiny_official")}


def success(workdir: str) -> float:
    """Share of the test scenes in which a trained policy, seeing and acting in turn, ends within reach of the goal."""
    model, variables = zoo.load(workdir)
    scenes = load_scenes("standin", data_dir=None, config=model.config).test
    policy = jax.jit(lambda seen: model.apply(variables, seen, method="policy"))
    ends, goals = roll_out(policy, scenes)
    return float(jnp.mean(jnp.linalg.norm(ends - goals, axis=-1) < REACH))


if __name__ == "__main__":
    print(f"success: {success(sys.argv[1]):.1%}")
