"""What a search found: the policy, what each layer loses, and the front of quality against bits."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.recipes.parts import Side
from microscale.report.table import plain, short, with_error
from microscale.suite.statistics import Estimate

WIDTH = 120
Kind = Literal["format", "mixture"]


@dataclass(frozen=True, slots=True)
class Point:
    """One policy for the whole model.

    Attributes:
        label: the format, or the budget in bits that a mixture was made for.
        kind: whether it is one format everywhere, or a mixture.
        weight_bits: average of a weight, scales and padding included.
        activation_bits: average of an activation; None where these are left alone.
        megabytes: of the whole model (10^6 bytes).
        predicted: summed loss of the parts, in the unit of the measure.
        divergence: KL(unquantized || quantized) in nats of all together, measured.
        policy: itself.
    """

    label: str
    kind: Kind
    weight_bits: float
    activation_bits: float | None
    megabytes: float
    predicted: float
    divergence: Estimate
    policy: Policy

    @property
    def rank(self) -> tuple[float, float]:
        """What the best point has least of: divergence, then bits."""
        found = self.divergence.value
        return found if math.isfinite(found) else math.inf, self.weight_bits

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "kind": self.kind,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "megabytes": self.megabytes,
            "predicted": self.predicted,
            "divergence": self.divergence.to_dict(),
            "policy": self.policy.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Assigned:
    """What one part was given, and what it would lose in each candidate."""

    side: Side
    modules: tuple[str, ...]
    values: int
    format: str
    losses: dict[str, float]
    reached: bool

    @property
    def name(self) -> str:
        """The modules, as text."""
        return " = ".join(module or "(model)" for module in self.modules)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "side": self.side,
            "modules": list(self.modules),
            "values": self.values,
            "format": self.format,
            "losses": dict(self.losses),
            "reached": self.reached,
        }


@dataclass(frozen=True, slots=True)
class Searched:
    """The result of a search; `policy` is what other verbs take.

    `front` holds the mixtures from the smallest size up, and `formats` each candidate alone;
    `chosen` is the point that was asked for. `measure` and `solver` say how it was found.
    """

    model: str
    budget: str
    activations: str
    measure: str
    solver: str
    about: str
    seed: int
    chosen: Point
    parts: tuple[Assigned, ...]
    front: tuple[Point, ...]
    formats: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def policy(self) -> Policy:
        """The formats of every layer."""
        return self.chosen.policy

    def within(self, weight_bits: float, activation_bits: float | None) -> Point:
        """Of all points that keep within so many bits the one of the smallest divergence.

        Raises MicroscaleError if there is none.
        """
        room = math.inf if activation_bits is None else activation_bits
        fit = [
            point
            for point in (*self.front, *self.formats)
            if point.weight_bits <= weight_bits * (1 + 1e-9)
            and (point.activation_bits or 0.0) <= room * (1 + 1e-9)
        ]
        if not fit:
            raise MicroscaleError(
                f"no point keeps within {weight_bits:g} bits of a weight and {room:g} of an "
                "activation; the front begins above."
            )
        return min(fit, key=lambda point: point.rank)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "budget": self.budget,
            "activations": self.activations,
            "measure": self.measure,
            "solver": self.solver,
            "about": self.about,
            "seed": self.seed,
            "chosen": self.chosen.to_dict(),
            "parts": [part.to_dict() for part in self.parts],
            "front": [point.to_dict() for point in self.front],
            "formats": [point.to_dict() for point in self.formats],
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        """Return the tables for a rich console."""
        return Group(*self._report())

    def __str__(self) -> str:
        """Return the same as plain text."""
        return plain(self, WIDTH)

    def _report(self) -> Iterator[RenderableType]:
        yield Text.assemble((self.model, "bold"), f" within {self.budget}  {self.about}")
        yield Text()
        yield self._layers()
        yield Text()
        yield self._points()
        yield Text()
        for note in self.notes:
            yield Text(note, style="dim")

    def _layers(self) -> Table:
        """Every part with its format; parts that differ in numbers of names alone share a line."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
        table.add_column("part")
        table.add_column("count", justify="right")
        table.add_column("values", justify="right")
        table.add_column("format")
        table.add_column(f"{self.measure}\nalone", justify="right", vertical="bottom")
        groups: dict[tuple[str, str, str], list[Assigned]] = {}
        for part in self.parts:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", part.name)
            groups.setdefault((pattern, part.side, part.format), []).append(part)
        for (pattern, side, fmt), parts in groups.items():
            name = pattern if len(parts) > 1 else parts[0].name
            loss = sum(part.losses[fmt] for part in parts)
            values = sum(part.values for part in parts)
            cells = (f"{name}, {side}", str(len(parts)), str(values), fmt, f"{loss:.3g}")
            table.add_row(*map(escape, cells))
        return table

    def _points(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
        titles = ("", "bits/\nweight", "bits/\nactivation", "MB", "predicted", "KL, nats", "")
        for title in titles:
            side: Literal["left", "right"] = "right" if title else "left"
            table.add_column(title, justify=side, no_wrap=True, vertical="bottom")
        for point in sorted((*self.front, *self.formats), key=lambda p: (p.weight_bits, p.kind)):
            wide = point.activation_bits is None
            cells = (
                point.label,
                f"{point.weight_bits:.3f}",
                "-" if wide else f"{point.activation_bits:.3f}",
                f"{point.megabytes:.3g}",
                f"{point.predicted:.3g}",
                with_error(point.divergence),
                "chosen" if point is self.chosen else "",
            )
            table.add_row(*map(escape, cells), style="bold" if point is self.chosen else None)
        return table

    @property
    def summary(self) -> str:
        """One line: what was chosen."""
        point = self.chosen
        wide = point.activation_bits is None
        other = "activations left alone" if wide else f"{point.activation_bits:.3f} per activation"
        return (
            f"{point.weight_bits:.3f} bits per weight, {other}, {point.megabytes:.3g} MB; "
            f"KL {short(point.divergence)} nats."
        )
