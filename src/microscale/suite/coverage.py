"""Which products ran quantized during an evaluation, and what was left alone."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from microscale.conversion import Conversion
from microscale.ledger import Row, record_products


@dataclass(frozen=True, slots=True)
class Coverage:
    """Every product that ran under one format, and what the conversion left alone or noted.

    `left` are (module, kind, reason), `notes` (module, note).
    """

    products: tuple[Row, ...]
    left: tuple[tuple[str, str, str], ...]
    notes: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, products: tuple[Row, ...], conversion: Conversion) -> "Coverage":
        """Join what ran with what the conversion reported."""
        left = tuple((entry.name, entry.kind, entry.reason) for entry in conversion.left)
        notes = tuple((entry.name, note) for entry in conversion.entries for note in entry.notes)
        return cls(products, left, notes)

    @property
    def summary(self) -> str:
        """One line: how many products of which kinds ran how, and what was skipped and why."""
        ran = [product for product in self.products if product.how != "skipped"]
        ways = Counter(str(product.how) for product in ran)
        done = " and ".join(f"{count} {how}" for how, count in sorted(ways.items()))
        kinds = ", ".join(sorted({product.product for product in ran}))
        left = [f"{kind} ({reason})" for _, kind, reason in self.left]
        skipped = [
            f"{row.product} ({row.reason or 'by the policy'})"
            for row in self.products
            if row.how == "skipped"
        ]
        return (
            f"{done or 'none'} of {len(self.products)} products"
            f"{f' ({kinds})' if kinds else ''}; skipped: {_counted(skipped)}; "
            f"modules left alone: {_counted(left)}"
            f"{_noted(self.notes)}"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "summary": self.summary,
            "products": [asdict(product) for product in self.products],
            "left": [{"module": m, "kind": kind, "reason": why} for m, kind, why in self.left],
            "notes": [{"module": name, "note": note} for name, note in self.notes],
        }


def _counted(things: Iterable[str]) -> str:
    """Each different thing with how often it is there; "none" for nothing."""
    counts = Counter(things)
    return ", ".join(f"{count} {thing}" for thing, count in sorted(counts.items())) or "none"


def _noted(notes: tuple[tuple[str, str], ...]) -> str:
    """Short blocks, which change what a format means; other notes stand in the JSON alone."""
    short = [f"weights with {note}" for _, note in notes if "block" in note]
    return f"; {_counted(short)}" if short else ""


class Recorder:
    """Adds up the ledgers of the stretches in which a quantized model runs.

    Stretches, because the unquantized model may run between them as the reference.
    """

    def __init__(self) -> None:
        self._calls: Counter[Row] = Counter()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside."""
        with record_products() as ledger:
            yield
        for row in ledger:
            self._calls[replace(row, calls=0)] += row.calls

    @property
    def products(self) -> tuple[Row, ...]:
        """Every product, in the order of its first call."""
        return tuple(replace(row, calls=calls) for row, calls in self._calls.items())
