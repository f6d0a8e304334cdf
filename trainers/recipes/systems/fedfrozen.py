"""FedFrozen's runs: `zoo train fedfrozen` (stand-in), digits and CIFAR-10 among ten clients, and `zoo demo fedfrozen`.

zoo train fedfrozen --config digits --data-dir <folder with digits.csv>

A step is a round: four of the ten clients, five local steps of plain gradient descent each; Dirichlet's alpha is 0.5,
of cifar10 0.1. Measured on two shared CPU cores (AMD EPYC), jax 0.10.2, float32, compilation included. tiny: 120
rounds, queries and keys frozen after 40, 64 CPU seconds: accuracy 0.993 on test images; the most frequent class has
0.105, all cells averaged and compared with the patterns themselves 0.90. digits: 200 rounds, frozen after 50, 75 CPU
seconds: accuracy 0.888, the most frequent class 0.101; both times with gradients of the whole round beside those of its
clients, which are no longer computed. No numbers of the paper are known. cifar10 has the card's sizes: about 940 GFLOP
of matrix products a round, nine seconds or more at the 100 GFLOP/s that a large product reached on such cores; it has
not been run.
"""

from trainers.recipe import Evaluation, Optimizer, Recipe


def _federated(config: str, data: str, *, rounds: int, local: int, warmup: int, learning_rate: float = 0.05) -> Recipe:
    return Recipe(
        paper="fedfrozen",
        config=config,
        data=data,
        batch_size=4 * 5 * local,
        steps=rounds,
        optimizer=Optimizer(
            name="fed_frozen",
            learning_rate=learning_rate,
            schedule="constant",
            weight_decay=1e-4,
            warmup_rounds=warmup,
        ),
        evaluation=Evaluation(every=max(rounds // 10, 1)),
    )


RECIPES = {
    "tiny": _federated("tiny", "standin@0.5", rounds=120, local=16, warmup=40, learning_rate=0.3),
    "digits": _federated("digits", "digits8x8@0.5", rounds=200, local=16, warmup=50, learning_rate=0.3),
    "cifar10": _federated("cifar10", "cifar10_sample", rounds=100, local=32, warmup=25),
}
