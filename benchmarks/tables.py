"""The rows as tables for the terminal."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from growth import BEYOND, LINEAR
from rows import Row

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _rate(row: Row) -> str:
    if not row.rate:
        return ""
    if row.unit in {"call", "token"}:
        return f"{row.rate:.1f} {row.unit}s/s"
    factor, prefix = next((p for p in _PREFIXES if row.rate >= p[0]), (1.0, ""))
    return f"{row.rate / factor:.3g} {prefix}{row.unit}/s"


def _beside(row: Row) -> str:
    if row.ratio is None:
        return ""
    words = {"share": "of", "time": "x", "seconds": "x"}[row.kind]
    return f"{row.ratio:.3g} {words} {row.yardstick}"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    sign = "≥" if row.kind == "share" else "≤"
    color, word = {True: ("green", "yes"), False: ("red", "no"), None: ("yellow", "disturbed")}[
        row.reached
    ]
    return f"{sign} {row.goal:g} [{color}]{word}[/]"


def _empty(title: str) -> Table:
    return Table(
        title=escape(title), box=None, padding=(0, 2, 0, 0), title_justify="left",
        header_style="underline",
    )  # fmt: skip


def table(rows: list[Row]) -> Table:
    """The rows of one group."""
    found = _empty(f"{rows[0].section}: {rows[0].group}")
    for title, side in (("", "left"), ("ms", "right"), ("lowest to highest", "right"),
                        ("kept + lost", "right"), ("rate", "right"), ("beside", "left"),
                        ("goal", "left")):  # fmt: skip
        found.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    before = ""
    for row in rows:
        t, same = row.timing, row.name == before
        first = (
            escape(row.name), f"{t.median * 1e3:.4g}", f"{t.low * 1e3:.4g} to {t.high * 1e3:.4g}",
            f"{t.kept} + {t.disturbed}", _rate(row),
        )  # fmt: skip
        found.add_row(*([""] * 5 if same else first), escape(_beside(row)), _goal(row))
        before = row.name
    return found


def growth_table(growth: Mapping[str, Mapping[str, float]]) -> Table:
    """The fitted exponents."""
    found = _empty("growth: time ~ values ^ exponent")
    for title in ("", "all sizes", f"from {BEYOND} MB", "linear"):
        found.add_column(title, justify="left" if not title else "right")
    for name, exponents in growth.items():
        beyond = exponents.get("beyond")
        verdict = ""
        if beyond is not None:
            verdict = "[green]yes[/]" if LINEAR[0] <= beyond <= LINEAR[1] else "[red]no[/]"
        cells = [f"{exponents[key]:.3f}" if key in exponents else "" for key in ("all", "beyond")]
        found.add_row(name, *cells, verdict)
    return found
