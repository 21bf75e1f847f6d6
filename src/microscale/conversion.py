"""The report of a conversion: what became of every module that holds products."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from microscale.ledger import text_table
from microscale.policy import Policy

Status = Literal["quantized", "left"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One module that holds products.

    Attributes:
        name: the qualified name.
        kind: the class.
        status: whether its products run on cast operands.
        reason: why it was left, or "".
        formats: by role ("weight", "input", "scores", "values", "table"); empty if left.
        weights: number of values in its weights, biases not counted.
        weight_bits: bits that these take, packed, scales and padding included.
        notes: what a reader of results should know.
    """

    name: str
    kind: str
    status: Status
    reason: str = ""
    formats: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    weight_bits: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did to a model; `str()` is a table of it.

    Attributes:
        policy: that was applied.
        entries: one for each module that holds products.
        scopes: how many modules of each other class have products that are written as operators
            quantized as they run, if there are any.
        weights: number of values in all quantized weights; tied ones count once.
        weight_bits: bits that these take.
        size_bits: bits of the whole model: packed weights, and the rest as it is.
    """

    policy: Policy
    entries: tuple[Entry, ...]
    scopes: dict[str, int]
    weights: int
    weight_bits: int
    size_bits: int

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The entries of modules that were converted."""
        return tuple(entry for entry in self.entries if entry.status == "quantized")

    @property
    def left(self) -> tuple[Entry, ...]:
        """The entries of modules that were left in the wider type."""
        return tuple(entry for entry in self.entries if entry.status == "left")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and padding included; 0 if there are none."""
        return self.weight_bits / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "policy": self.policy.to_dict(),
            "entries": [asdict(entry) for entry in self.entries],
            "scopes": dict(self.scopes),
            "weights": self.weights,
            "weight_bits": self.weight_bits,
            "bits_per_weight": self.bits_per_weight,
            "size_bits": self.size_bits,
        }

    def __str__(self) -> str:
        """Return a table; modules that differ in numbers of their names alone share a line."""
        head = ("module", "kind", "count", "status", "formats", "bits/weight", "notes")
        return "\n".join([text_table([head, *self._lines()]), "", *self._remarks()])

    def _lines(self) -> Iterator[tuple[str, ...]]:
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name)
            look = (pattern, entry.kind, entry.status, _spelled(entry.formats), _said(entry))
            groups.setdefault(look, []).append(entry)
        for (pattern, kind, status, formats, said), entries in groups.items():
            name = pattern if len(entries) > 1 else entries[0].name
            weights, bits = sum(e.weights for e in entries), sum(e.weight_bits for e in entries)
            density = f"{bits / weights:.2f}" if weights else "-"
            yield name or "(model)", kind, str(len(entries)), status, formats, density, said

    def _remarks(self) -> Iterator[str]:
        counts = Counter(entry.status for entry in self.entries)
        yield (
            f"{counts['quantized']} modules quantized, {counts['left']} left; "
            f"{self.weights} weights at {self.bits_per_weight:.3f} bits, "
            f"model {self.size_bits / 8e6:.3f} MB."
        )
        if self.scopes:
            classes = ", ".join(f"{name} x{count}" for name, count in self.scopes.items())
            yield textwrap.fill(
                "Products written as operators are quantized as they run in: "
                f"{classes}. record_products() lists them.",
                width=100,
            )


def _spelled(formats: dict[str, str]) -> str:
    """The formats as text: roles of the same format together."""
    roles: dict[str, list[str]] = {}
    for role, fmt in formats.items():
        roles.setdefault(fmt, []).append(role)
    return ", ".join(f"{'+'.join(names)} {fmt}" for fmt, names in roles.items()) or "-"


def _said(entry: Entry) -> str:
    return "; ".join(filter(None, (entry.reason, *entry.notes)))
