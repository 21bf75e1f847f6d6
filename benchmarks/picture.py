"""The picture of a run: ratios beside their goals, and growth."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEN, RED, GREY = "#2a9d5c", "#c8443a", "#9aa5b1"


def draw(rows: list[Row], growth: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Write it: shares of limits, times beside others, and time against elements."""
    from matplotlib.figure import Figure

    shares = [row for row in rows if row.goal is not None and row.kind == "share"]
    times = [row for row in rows if row.goal is not None and row.kind != "share"]
    grown = [row for row in rows if row.section == "growth"]
    parts = [part for part in (shares, times, grown) if part]
    if not parts:
        return
    tallest = max([len(part) for part in (shares, times) if part] or [20])
    figure = Figure(figsize=(7.5 * len(parts), max(5, 1.2 + 0.2 * tallest)), layout="constrained")
    axes = iter(figure.subplots(1, len(parts), squeeze=False)[0])
    if shares:
        _bars(next(axes), shares, "share of the yardstick's speed: right of the mark is better")
    if times:
        _bars(next(axes), times, "time over the yardstick's: left of the mark is better")
    if grown:
        _lines(next(axes), grown, growth)
    figure.savefig(file, dpi=110)


def _bars(axis: "Axes", rows: list[Row], title: str) -> None:
    """A bar for each ratio, a mark at each goal."""
    places = range(len(rows), 0, -1)
    ratios = [row.ratio or 0.0 for row in rows]
    widest = max(row.goal or 0.0 for row in rows) * 1.6
    colors = [{True: GREEN, False: RED, None: GREY}[row.reached] for row in rows]
    axis.barh(places, [min(ratio, widest) for ratio in ratios], color=colors, height=0.7)
    for place, row, ratio in zip(places, rows, ratios, strict=True):
        axis.vlines(row.goal or 0.0, place - 0.45, place + 0.45, color="black", linewidth=1.6)
        axis.text(min(ratio, widest), place, f" {ratio:.2f}", va="center", fontsize=6.5)
    labels = [f"{_short(row)}  / {row.yardstick.partition(',')[0]}" for row in rows]
    axis.set_yticks(list(places), labels, fontsize=6.5)
    axis.set_ylim(0.3, len(rows) + 0.7)
    axis.set_xlim(0, widest * 1.08)
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _short(row: Row) -> str:
    parts = row.group.replace(":", ",").split(", ")
    where = {"gemv": parts[0], "gemm": parts[1], "layers": parts[-1]} if len(parts) > 1 else {}
    return f"{where.get(row.section, row.section)}: {row.name}"


def _lines(axis: "Axes", rows: list[Row], growth: Mapping[str, Mapping[str, float]]) -> None:
    """Time against size, both logarithmic."""
    for name in dict.fromkeys(row.name for row in rows):
        some = [row for row in rows if row.name == name]
        beyond = growth.get(name, {}).get("beyond")
        label = name if beyond is None else f"{name}: ^{beyond:.2f} from 64 MB"
        axis.loglog(
            [row.values * 4 / 2**20 for row in some], [row.timing.median * 1e3 for row in some],
            marker="o", markersize=3, linewidth=1, label=label,
        )  # fmt: skip
    axis.set_xlabel("MB of float32", fontsize=8)
    axis.set_ylabel("ms", fontsize=8)
    axis.set_title("time against elements, mxfp4", fontsize=9, loc="left")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
