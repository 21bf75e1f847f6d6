"""The parts of a comparison as text: table, findings, and lines on what ran how."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from microscale.suite.findings import Finding
from microscale.suite.rows import Figures, Row
from microscale.suite.statistics import Estimate, Verdict
from microscale.suite.task import SHARES, Generation

WIDTH = 130
"""Columns that the widest table needs; on a narrower terminal it is better wrapped than cut."""

COLORS = {Verdict.HOLDS: "green", Verdict.FAILS: "red", Verdict.OPEN: "yellow"}

Column = tuple[str, Callable[[Row], str]]


def plain(content: RenderableType, width: int = WIDTH) -> str:
    """What rich would print, as plain text."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, color_system=None)
    console.print(content)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def quality(rows: Sequence[Row], metric: str) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    columns = list(_columns(rows, metric))
    for title, _ in columns:
        side: Literal["left", "right"] = "left" if title == "format" else "right"
        table.add_column(escape(title), justify=side, no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(*(escape(cell(row)) for _, cell in columns))
    return table


def _columns(rows: Sequence[Row], metric: str) -> Iterator[Column]:
    """The columns that have anything to show."""
    percent = 100.0 if metric in SHARES else 1.0
    unit = ", %" if metric in SHARES else ""
    title = metric.replace(" error", "\nerror")
    base = rows[0].format
    yield "format", lambda row: row.format
    yield "bits/\nweight", lambda row: f"{row.bits_per_weight:.2f}"
    yield (
        "MB",
        lambda row: f"{row.megabytes:.3g}" if row.megabytes < 100 else f"{row.megabytes:.0f}",
    )
    yield f"{title}{unit}", lambda row: with_error(row.figures.metric, percent)
    yield f"from {base}\n[95 %]", lambda row: with_interval(row.figures.difference, percent)
    if _any(rows, lambda figures: figures.divergence):
        yield "KL,\nnats", lambda row: short(row.figures.divergence)
    if any(row.values_unquantized for row in rows):
        yield "KL, values\nunquantized", _values_divergence
    if _any(rows, lambda figures: figures.agreement):
        yield "same\ntop-1, %", lambda row: _share(row.figures.agreement)
    yield "seconds", lambda row: f"{row.seconds:.1f}"


def _values_divergence(row: Row) -> str:
    return short(row.values_unquantized.divergence) if row.values_unquantized else ""


def _any(rows: Iterable[Row], figure: Callable[[Figures], Estimate | None]) -> bool:
    return any(figure(row.figures) is not None for row in rows)


def with_error(estimate: Estimate, factor: float = 1.0) -> str:
    """`value ± standard error`, to two digits of the error."""
    value, error = estimate.value * factor, estimate.error * factor
    if not math.isfinite(error):
        return f"{value:.4g}"
    digits = _decimals(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def with_interval(estimate: Estimate | None, factor: float = 1.0) -> str:
    """`+value [low, high]`, to two digits of the error; empty for None."""
    if estimate is None:
        return ""
    if not math.isfinite(estimate.error):
        return f"{estimate.value * factor:+.4g}"
    digits = _decimals(estimate.error * factor)
    value, low, high = (
        f"{x * factor:+.{digits}f}" for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def short(estimate: Estimate | None) -> str:
    """The value alone, three digits; empty for None."""
    return "" if estimate is None else f"{estimate.value:.3g}"


def _share(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.2%}".removesuffix("%")


def _decimals(error: float) -> int:
    """Decimals that show two digits of `error`."""
    if error <= 0:
        return 2
    return min(max(1 - math.floor(math.log10(error)), 0), 8)


def coverage(rows: Iterable[Row]) -> Iterator[Text]:
    """What ran how: one line for the formats of which the same is to be said."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.coverage:
            groups.setdefault(row.coverage.summary, []).append(row.format)
    for summary, names in groups.items():
        yield Text(f"{'Every format' if len(groups) == 1 else ', '.join(names)}: {summary}.")


def generation(rows: Iterable[Row]) -> Iterator[Text]:
    """Generation with a cache against the full pass: one line, if it was checked."""
    checks = {row.format: row.generation for row in rows if row.generation}
    for check in list(checks.values())[:1]:
        yield Text(
            f"Generation with a cache against the full pass, {check.tokens} tokens, KL in nats "
            f"(same top-1): {', '.join(f'{name} {_check(c)}' for name, c in checks.items())}."
        )


def _check(check: Generation) -> str:
    return f"{check.divergence:.2g} ({check.agreement:.1%})"


def verdicts(findings: Iterable[Finding]) -> Table:
    """The findings with their verdicts and what these rest on."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        verdict = Text(str(finding.verdict), style=COLORS.get(finding.verdict, "dim"))
        table.add_row(finding.name, verdict, Text(finding.detail))
    return table
