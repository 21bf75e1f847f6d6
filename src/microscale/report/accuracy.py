"""Bits of accuracy as tables: of distributions, and of layers."""

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from microscale.suite.accuracy import ELEMENTS, Accuracy, Layer

LEGEND = (
    "Bits of accuracy: log2(standard deviation / root mean squared error) with the best scale for "
    "the whole tensor. Crest: largest magnitude over root mean square. Kurtosis: 3 if normal."
)


def distributions(found: Sequence[Accuracy]) -> Table:
    """Bits of accuracy by distribution and format."""
    table = _table("bits of accuracy", *ELEMENTS, "256 levels", "best")
    for one in found:
        bits = (f"{one.bits[name]:.2f}" for name in ELEMENTS)
        table.add_row(one.distribution, *bits, f"{one.bound:.2f}", one.best)
    return table


def layers(found: Sequence[Layer]) -> Table:
    """Outliers of layers, and the bits of accuracy that formats have for them."""
    table = _table("layer", "operand", "crest", "kurtosis", *ELEMENTS, "best")
    for one in found:
        figures = (_number(x, 1) for x in (one.crest, one.kurtosis))
        bits = (_number(one.bits[name], 2) for name in ELEMENTS)
        table.add_row(escape(one.module or "(model)"), one.operand, *figures, *bits, one.best)
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    for title in titles:
        words = title in (titles[0], "operand", "best")
        table.add_column(title, justify="left" if words else "right", no_wrap=True)
    return table


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
