"""What became of each weight in a calibration: the report that recipes return."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from microscale.conversion import Conversion
from microscale.ledger import text_table


@dataclass(frozen=True, slots=True)
class Outcome:
    """One parameter.

    Attributes:
        name: qualified.
        method: that its values come from; "rtn" where another was asked for but erred more.
        samples: rows of its input that were seen.
        inputs: K, how many values each output sums over.
        before: ||X W - X~ Q||^2 / ||X W||^2 on the calibration data, rounded to nearest.
        after: the same for what was solved.
        packed: whether it is stored as codes and scales.
        notes: what a reader should know.
    """

    name: str
    method: str
    samples: int
    inputs: int
    before: float
    after: float
    packed: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a recipe did to a model; `str()` is a table of it.

    Attributes:
        conversion: what `convert` did.
        method: that was asked for.
        outcomes: one for each parameter that was solved.
        unreached: parameters that modules would cast but that no product of the calibration used,
            with the reason; they are rounded to nearest at each use.
        warnings: about the whole.
    """

    conversion: Conversion
    method: str
    outcomes: tuple[Outcome, ...]
    unreached: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def scarce(self) -> tuple[Outcome, ...]:
        """Parameters with fewer samples than inputs, whose statistics are singular."""
        return tuple(o for o in self.outcomes if 0 < o.samples < o.inputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "conversion": self.conversion.to_dict(),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "unreached": dict(self.unreached),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        """Return a table, and what is to be said."""
        head = ("weight", "method", "samples", "inputs", "error, nearest", "error, solved", "notes")
        return "\n".join([text_table([head, *self._lines()]), "", *self._remarks()])

    def _lines(self) -> Iterator[tuple[str, ...]]:
        for o in self.outcomes:
            errors = f"{o.before:.3e}", f"{o.after:.3e}"
            yield o.name, o.method, str(o.samples), str(o.inputs), *errors, "; ".join(o.notes)

    def _remarks(self) -> Iterator[str]:
        yield f"{len(self.outcomes)} weights solved by {self.method}."
        for name, reason in self.unreached.items():
            yield f"Rounded to nearest: {name}: {reason}."
        yield from self.warnings
