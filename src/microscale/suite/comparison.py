"""One model in several formats: what a comparison found."""

from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from microscale.report import table
from microscale.suite.findings import Finding
from microscale.suite.rows import Row


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model in several formats: rows (the unquantized model first) and findings.

    `units` observations of kind `unit`, with `positions` predictions together; `about` and
    `notes` are sentences for the reader.
    """

    model: str
    metric: str
    unit: str
    units: int
    positions: int
    about: str
    seed: int
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; what is not a finite number is None."""
        return {
            "model": self.model,
            "metric": self.metric,
            "unit": self.unit,
            "units": self.units,
            "positions": self.positions,
            "about": self.about,
            "seed": self.seed,
            "rows": [row.to_dict() for row in self.rows],
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        """Return the table, the findings and the notes for a rich console."""
        blank = Text()
        return Group(
            Text.assemble((self.model, "bold"), f"  {self.about}"),
            blank,
            table.quality(self.rows, self.metric),
            blank,
            table.verdicts(self.findings),
            blank,
            *table.coverage(self.rows),
            *table.generation(self.rows),
            *(Text(note, style="dim") for note in self.notes),
        )

    def __str__(self) -> str:
        """Return the same as plain text."""
        return table.plain(self)
