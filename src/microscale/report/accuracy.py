"""Bits of accuracy as tables: of distributions, and of layers."""

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from microscale.suite.accuracy import ELEMENTS, Accuracy
from microscale.suite.outliers import FAR, Layer

LEGEND = (
    "Bits of accuracy: log2(standard deviation / root mean squared error) with the best scale for "
    "the whole tensor. Crest: largest magnitude over root mean square. Kurtosis: 3 if normal. "
    f"Outliers: more than {FAR:g} standard deviations from the mean, per million values; in "
    "channels: how many have any, and the share of all of them that is in the worst."
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
    titles = ("crest", "kurtosis", "outliers", "in channels")
    table = _table("layer", "operand", *titles, *ELEMENTS, "best")
    for one in found:
        figures = (*(_number(x, 1) for x in (one.crest, one.kurtosis)), *_outliers(one))
        bits = (_number(one.bits[name], 2) for name in ELEMENTS)
        table.add_row(escape(one.module or "(model)"), one.operand, *figures, *bits, one.best)
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    for title in titles:
        words = title in (titles[0], "operand", "best")
        table.add_column(title, justify="left" if words else "right", no_wrap=True)
    return table


def _outliers(layer: Layer) -> tuple[str, str]:
    if not layer.worst:
        return "0", ""
    share = layer.worst[0][1] / (layer.outliers * layer.channels)
    places = f"{layer.reached} of {layer.channels}, {share:.0%}"
    return f"{1e6 * layer.outliers:.3g}", places


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
