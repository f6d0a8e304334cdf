"""ECG-NAT's runs on its stand-in: from scratch, pre-training, and fine-tuning with few labels.

zoo train ecg_nat
zoo train ecg_nat --config tiny_pretrain --workdir runs/pretrained
zoo train ecg_nat --data standin@5 --batch-size 25 --epochs 100 --init-from runs/pretrained --workdir runs/few

Measured on one core of two shared ones (AMD EPYC), jax 0.10.2, float32. tiny, 620 steps: accuracy 0.992 on test
records, any one class 0.200; 157 CPU seconds, 51 of them to compile. tiny_pretrain, 1,500 steps without labels: a
linear probe has 0.746; 516 CPU seconds. Five labels a class, 100 steps, evaluated every tenth: 0.860 from those weights
and 0.614 from scratch.
small and mini are the card's fine-tuning, with its layer decay, of weights of small_pretrain and mini_pretrain; none of
these has been run.
The best weights of pre-training are those whose linear probe is best on the validation part.
The paper's abstract has 88.1 % with 1 % of the labels of a set it does not name; PTB-XL and CPSC2018 are not at hand.
"""

from trainers.recipe import Optimizer, Recipe

# Relative biases are not decayed, as in NAT.
_NO_DECAY = r"(^|/)(bias|scale|relative_positions|gain\d|positions|mask_token)$"


def _layer_decay(depths: tuple[int, ...], decay: float = 0.75) -> dict[str, float]:
    """Rates of fine-tuning: the head's is 1, a layer's `decay` times that of the next; a level takes its end along."""
    layers, rates = [(level, layer) for level, depth in enumerate(depths) for layer in range(depth)], {}
    for before, (level, layer) in enumerate(reversed(layers), start=1):
        rates[f"encoder/level_{level}_{layer}/"] = decay**before
        if layer == depths[level] - 1 and level < len(depths) - 1:
            rates[f"encoder/down_(norm_)?{level}/"] = decay**before
    return rates | {"encoder/tokenizer": decay ** (len(layers) + 1)}


def _fine_tune(
    config: str,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 5e-4,
    depths: tuple[int, ...] = (),
) -> Recipe:
    return Recipe(
        paper="ecg_nat",
        config=config,
        batch_size=batch_size,
        epochs=epochs,
        optimizer=Optimizer(
            name="adamw",
            learning_rate=learning_rate,
            schedule="cosine",
            weight_decay=0.05,
            no_decay=_NO_DECAY,
            rates=_layer_decay(depths) if depths else {},
        ),
    )


def _pretrain(config: str, *, epochs: int, batch_size: int = 256, warmup_steps: int = 0) -> Recipe:
    return Recipe(
        paper="ecg_nat",
        config=config,
        batch_size=batch_size,
        epochs=epochs,
        optimizer=Optimizer(
            name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=warmup_steps, b2=0.95,
            weight_decay=0.05, no_decay=_NO_DECAY,
        ),
    )  # fmt: skip


RECIPES = {
    "tiny": _fine_tune("tiny", epochs=20, batch_size=32, learning_rate=2e-3),
    "tiny_pretrain": _pretrain("tiny_pretrain", epochs=100, batch_size=64, warmup_steps=100),
    "small": _fine_tune("small", epochs=50, depths=(2, 2, 6, 2)),
    "small_pretrain": _pretrain("small_pretrain", epochs=100, warmup_steps=40),
    "mini": _fine_tune("mini", epochs=50, depths=(3, 4, 6, 5)),
    "mini_pretrain": _pretrain("mini_pretrain", epochs=100, warmup_steps=40),
}
