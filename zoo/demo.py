"""Claims that are computed, not trained: what a paper states, as numbers beside the bounds they must keep to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Check", "Demo", "Findings", "exponent"]


@dataclass(frozen=True)
class Check:
    """One measured quantity, or one for each size of `over`, which must lie between `low` and `high`.

    `predicted` is what the theory says where that is a number; bounds then say how far from it counts as agreement.
    """

    claim: str
    measured: Any
    low: Any = -np.inf
    high: Any = np.inf
    predicted: Any = None
    over: tuple[str, Sequence[float | int]] | None = None

    @property
    def holds(self) -> bool:
        """NaN is between no bounds."""
        measured = np.asarray(self.measured)
        return bool(np.all((np.asarray(self.low) <= measured) & (measured <= np.asarray(self.high))))


@dataclass(frozen=True)
class Findings:
    """What a demonstration found; `picture` draws what its checks do not show."""

    checks: tuple[Check, ...]
    picture: Callable[[], "Figure"] | None = None

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)


@dataclass(frozen=True)
class Demo:
    """`run(config, key)` computes a paper's claims, in float64: callers enable it with `jax.enable_x64(True)`."""

    run: Callable[[Any, jax.Array], Findings]
    configs: Mapping[str, Any] = field(default_factory=dict)  # named sizes, `tiny` (seconds) among them


def exponent(sizes: Any, values: Any) -> float:
    """The p of the least-squares fit values = c sizes^p, on logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])
