"""The operands of a model's layers as a table, the worst first."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from microscale.report.table import short
from microscale.suite.layer import Pair
from microscale.tally import OUTLIER, Figures

LEGEND = (
    "SQNR: signal-to-quantization-noise ratio. Saturated, flushed: shares of values beyond the "
    "largest element times their scale, and of those that become zero. Crest: largest magnitude "
    "over root mean square, of all values and of a block (mean). Kurtosis: 3 if normal. Outliers: "
    f"channels with more than {OUTLIER:g} times the median channel's root mean square, and the "
    "largest such ratio. Scales: exponents of the shared scales and how often each occurs."
)

SPARKS = " ▁▂▃▄▅▆▇█"
BINS = 16

Column = tuple[str, Callable[[Pair], str]]


def table(rows: Sequence[Pair], measure: str) -> Table:
    """The rows as a table; what stands above in the same layer is not repeated."""
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    columns = list(_columns(rows, measure))
    for title, _ in columns:
        words = title in ("layer", "operand", "format", "scales, 2^")
        side: Literal["left", "right"] = "left" if words else "right"
        found.add_column(title, justify=side, no_wrap=True, vertical="bottom")
    above = None
    for pair in rows:
        layer = pair[0].module
        cells = [cell(pair) for _, cell in columns]
        if layer == above:
            cells[0] = cells[1] = ""
        found.add_row(*map(escape, cells))
        above = layer
    return found


def width(rows: Sequence[Pair], measure: str) -> int:
    """Columns of text that the table needs; cut, it would lose names or numbers."""
    console = Console(width=1000)
    return Measurement.get(console, console.options, table(rows, measure)).maximum


def _columns(rows: Sequence[Pair], measure: str) -> Iterator[Column]:
    yield "layer", lambda pair: pair[0].module or "(model)"
    yield f"alone:\n{measure}", lambda pair: short(pair[0].error)
    yield "operand", lambda pair: pair[1].operand
    if len({operand.format for _, operand in rows}) > 1:
        yield "format", lambda pair: pair[1].format
    yield "SQNR,\ndB", lambda pair: number(pair[1].figures.sqnr, 1)
    yield "satu-\nrated, %", lambda pair: _percent(pair[1].figures.saturated)
    yield "flushed,\n%", lambda pair: _percent(pair[1].figures.flushed)
    yield "crest", lambda pair: number(pair[1].figures.crest, 1)
    yield "block\ncrest", lambda pair: number(pair[1].figures.block_crest, 2)
    yield "kurtosis", lambda pair: number(pair[1].figures.kurtosis, 1)
    yield "outlier\nchannels", lambda pair: _outliers(pair[1].figures)
    if any(operand.figures.nonfinite for _, operand in rows):
        yield "not\nfinite", lambda pair: str(pair[1].figures.nonfinite)
    yield "scales, 2^", lambda pair: _scales(pair[1].figures.scales)


def number(value: float, digits: int) -> str:
    """A number with so many digits behind the point; empty for one that does not exist."""
    if math.isnan(value):
        return ""
    return "exact" if math.isinf(value) else f"{value:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}" if 0 < share < 0.001 else f"{share:.1%}".removesuffix("%")


def _outliers(figures: Figures) -> str:
    if figures.channels is None:
        return ""
    if not figures.outliers:
        return "0"
    return f"{len(figures.outliers)} of {figures.channels}, {figures.outliers[0][1]:.0f}x"


def _scales(scales: Sequence[tuple[int, int]]) -> str:
    """The range of exponents, and a small histogram from the lowest to the highest."""
    if not scales:
        return ""
    low, high = scales[0][0], scales[-1][0]
    step = -(-(high - low + 1) // BINS)
    heights = [0] * ((high - low) // step + 1)
    for exponent, count in scales:
        heights[(exponent - low) // step] += count
    top = max(heights)
    sparks = "".join(SPARKS[math.ceil(8 * height / top)] for height in heights)
    return f"{low}" if low == high else f"{low}..{high} {sparks}"
