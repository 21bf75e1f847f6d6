"""One layer of an inspection, and the orders in which operands are shown."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from microscale.analysis import Observed
from microscale.errors import MicroscaleError, near_names
from microscale.suite.rows import Figures
from microscale.suite.statistics import Estimate


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with products: its class, its operands, and the quality when it alone is quantized.

    `alone` is measured against the unquantized model, on the same units.
    """

    module: str
    kind: str
    operands: tuple[Observed, ...]
    alone: Figures

    @property
    def error(self) -> Estimate | None:
        """What quantizing this layer alone costs: KL divergence, else the change of the metric."""
        return self.alone.loss_of_quality

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "module": self.module,
            "kind": self.kind,
            "alone": self.alone.to_dict(),
            "operands": [operand.to_dict() for operand in self.operands],
        }


Pair = tuple[Layer, Observed]


def _magnitude(pair: Pair) -> float:
    error = pair[0].error
    return -abs(error.value) if error is not None else 0.0


SORTS: dict[str, Callable[[Pair], float]] = {
    "error": _magnitude,
    "order": lambda _: 0.0,
    "sqnr": lambda pair: pair[1].figures.sqnr,
    "saturated": lambda pair: -pair[1].figures.saturated,
    "flushed": lambda pair: -pair[1].figures.flushed,
    "crest": lambda pair: -pair[1].figures.crest,
    "kurtosis": lambda pair: -pair[1].figures.kurtosis,
    "outliers": lambda pair: -len(pair[1].figures.outliers),
}
"""What operands can be sorted by, the worst first; "order" is the model's own."""


def check_sort(sort: str) -> str:
    """Return the name of an order; MicroscaleError for one that is not known."""
    if sort not in SORTS:
        raise MicroscaleError(f"--sort {sort!r} is not known.{near_names(sort, SORTS)}")
    return sort


def pairs(layers: Iterable[Layer], sort: str) -> list[Pair]:
    """Every operand with its layer, the worst first; figures that do not exist come last."""
    key = SORTS[check_sort(sort)]
    found = [(layer, operand) for layer in layers for operand in layer.operands]
    return sorted(found, key=lambda pair: (math.isnan(key(pair)), key(pair)))
