"""One model in one format, layer by layer: what an inspection found."""

from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from microscale.report import operands
from microscale.report.table import plain, short
from microscale.suite.layer import Layer, Pair, pairs
from microscale.suite.rows import Figures
from microscale.suite.statistics import Estimate


@dataclass(frozen=True, slots=True)
class Inspection:
    """One model in one format: its layers in the order in which they ran.

    `base` is the unquantized model's metric, `whole` the quality with every layer quantized;
    `units` observations of kind `unit`, with `positions` predictions together; `about`, `summary`
    (what ran how) and `notes` are sentences for the reader.
    """

    model: str
    format: str
    metric: str
    unit: str
    units: int
    positions: int
    about: str
    seed: int
    base: Estimate
    whole: Figures
    layers: tuple[Layer, ...]
    summary: str
    notes: tuple[str, ...] = ()

    @property
    def measure(self) -> str:
        """What the errors of layers are, in words."""
        if self.whole.divergence is not None:
            return "KL, nats"
        return f"change of {self.metric}"

    def rows(self, sort: str = "error") -> list[Pair]:
        """Every operand with its layer, the worst first.

        `sort` is one of microscale.suite.layer.SORTS. Raises MicroscaleError.
        """
        return pairs(self.layers, sort)

    @property
    def width(self) -> int:
        """Columns of text that the report needs."""
        return operands.width(self.rows(), self.measure)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; what is not a finite number is None."""
        return {
            "model": self.model,
            "format": self.format,
            "metric": self.metric,
            "unit": self.unit,
            "units": self.units,
            "positions": self.positions,
            "about": self.about,
            "seed": self.seed,
            "base": self.base.to_dict(),
            "whole": self.whole.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "summary": self.summary,
            "notes": list(self.notes),
        }

    def report(self, sort: str = "error") -> Group:
        """The table and what belongs to it, for a rich console; `sort` as in `rows`."""
        whole = short(self.whole.loss_of_quality)
        return Group(
            Text.assemble((self.model, "bold"), f" in {self.format}  {self.about}"),
            Text(),
            operands.table(self.rows(sort), self.measure),
            Text(),
            Text(f"All layers together: {whole} ({self.measure}). {operands.LEGEND}"),
            Text(f"{self.summary}."),
            *(Text(note, style="dim") for note in self.notes),
        )

    def __rich__(self) -> Group:
        """Return the report for a rich console, the layers with the largest errors first."""
        return self.report()

    def __str__(self) -> str:
        """Return the same as plain text."""
        return plain(self, self.width)
