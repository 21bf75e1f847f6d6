"""FP8 against INT8 on one model: what was found."""

import math
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from microscale.report import accuracy, table
from microscale.suite.accuracy import Layer
from microscale.suite.rows import Row


@dataclass(frozen=True, slots=True)
class Result:
    """One format under the best of its estimators.

    `words` name these; `error` is the squared error of the outputs on the calibration data,
    relative to their variance, by which they were chosen.
    """

    row: Row
    words: str
    error: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        error = self.error if math.isfinite(self.error) else None
        return {**self.row.to_dict(), "estimators": self.words, "calibration_error": error}


@dataclass(frozen=True, slots=True)
class Contest:
    """The results by format, the unquantized model (`base`) and its layers."""

    model: str
    metric: str
    unit: str
    units: int
    about: str
    seed: int
    base: Row
    results: tuple[Result, ...]
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "metric": self.metric,
            "unit": self.unit,
            "units": self.units,
            "about": self.about,
            "seed": self.seed,
            "base": self.base.to_dict(),
            "results": [result.to_dict() for result in self.results],
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        """Return the tables for a rich console."""
        rows = [self.base, *(result.row for result in self.results)]
        words = [
            Text(f"{r.row.format}: {r.words} (error of outputs {r.error:.3g})")
            for r in self.results
        ]
        return Group(
            Text.assemble((self.model, "bold"), f"  {self.about}"),
            Text(),
            table.quality(rows, self.metric),
            Text(),
            *words,
            Text(),
            accuracy.layers(self.layers),
            Text(accuracy.LEGEND),
            *(Text(note, style="dim") for note in self.notes),
        )

    def __str__(self) -> str:
        """Return the same as plain text."""
        return table.plain(self)
