"""FP8 against INT8 on one model: what was found."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from microscale.report import accuracy, table
from microscale.suite.outliers import Layer
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
class Remedy:
    """INT8 with something done about outliers, which `about` says."""

    result: Result
    about: str

    def won_back(self, plain: Row) -> float:
        """The share that it wins back of what INT8 alone (`plain`) loses; NaN if nothing is lost.

        By the divergence; of tasks without logits by the metric.
        """
        lost, left = (row.figures.loss_of_quality for row in (plain, self.result.row))
        if lost is None or left is None or not lost.value:
            return math.nan
        return 1 - left.value / lost.value

    def to_dict(self, plain: Row) -> dict[str, object]:
        """Plain values for JSON."""
        won = self.won_back(plain)
        share = {"won_back": won if math.isfinite(won) else None, "about": self.about}
        return {**self.result.to_dict(), **share}


HARDWARE = (
    "Hardware: gate counts are not computed yet; until then what a format costs in a chip is no "
    "part of this report."
)
"""What stands in the place of the hardware side."""


@dataclass(frozen=True, slots=True)
class Contest:
    """The results by format, the unquantized model (`base`) and its layers.

    `outlying` names the layers whose inputs INT8 holds worst; `remedies` are tried there.
    """

    model: str
    metric: str
    unit: str
    units: int
    about: str
    seed: int
    base: Row
    results: tuple[Result, ...]
    layers: tuple[Layer, ...]
    outlying: tuple[str, ...]
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...] = ()

    @property
    def int8(self) -> Row:
        """The row of INT8."""
        return self.results[0].row

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
            "outlying": list(self.outlying),
            "remedies": [remedy.to_dict(self.int8) for remedy in self.remedies],
            "hardware": None,
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        """Return the tables for a rich console."""
        results = [*self.results, *(remedy.result for remedy in self.remedies)]
        rows = [self.base, *(result.row for result in results)]
        words = [
            Text(f"{r.row.format}: {r.words} (error of outputs {r.error:.3g})") for r in results
        ]
        return Group(
            Text.assemble((self.model, "bold"), f"  {self.about}"),
            Text(),
            table.quality(rows, self.metric),
            Text(),
            *words,
            Text(),
            *map(Text, self._remedies()),
            Text(),
            accuracy.layers(self.layers),
            Text(accuracy.LEGEND),
            Text(HARDWARE),
            *(Text(note, style="dim") for note in self.notes),
        )

    def __str__(self) -> str:
        """Return the same as plain text."""
        return table.plain(self)

    def _remedies(self) -> Iterator[str]:
        """What remedies win back, in sentences."""
        if any(layer.favours_floats for layer in self.layers if layer.operand == "input"):
            yield f"FP8-E4 holds the inputs of {', '.join(self.outlying)} better than INT8 does."
        elif self.outlying:
            yield (
                "No layer has outliers so far out that FP8-E4 holds its inputs better than INT8; "
                f"remedies were tried where INT8 has the fewest bits: {self.outlying[0]}."
            )
        for remedy in self.remedies:
            won = remedy.won_back(self.int8)
            said = "nothing was lost" if math.isnan(won) else f"wins back {won:.0%}"
            yield f"{remedy.result.row.format}: {said} ({remedy.about})"
        if len(self.remedies) == 1:
            yield (
                "Groups of channels and SmoothQuant are for linear layers with weights of their "
                "own, and none of these is one."
            )
