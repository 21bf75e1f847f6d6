"""Quality against bits: one panel for each model, one point for each format."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from microscale.suite.comparison import Comparison
from microscale.suite.rows import Row
from microscale.suite.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

PLAIN, PAIR, GREY = "#1f5fa8", "#d1622b", "#777777"

# Where a label may stand around its point, in points of print, best first: offset, alignments.
PLACES = [
    (dx, dy, ha, va)
    for reach in (0, 8, 16, 26, 38, 52)
    for dx, dy, ha, va in (
        (7, reach, "left", "center"),
        (7, -reach, "left", "center"),
        (-7, reach, "right", "center"),
        (-7, -reach, "right", "center"),
        (0, 6 + reach, "center", "bottom"),
        (0, -6 - reach, "center", "top"),
    )
]


def draw(comparisons: Sequence[Comparison]) -> "Figure":
    """Draw all models side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(comparisons), 5.0), layout="constrained")
    panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        _panel(axes, comparison)
    # Labels are placed by what is drawn where, so everything else must have its place by then.
    figure.draw_without_rendering()
    for axes, comparison in zip(panels, comparisons, strict=True):
        _label(axes, comparison)
    return figure


def _points(comparison: Comparison) -> Iterator[tuple[Row, Estimate]]:
    for row in comparison.rows[1:]:
        loss = row.figures.loss_of_quality
        if loss is not None and math.isfinite(loss.value):
            yield row, loss


def _panel(axes: "Axes", comparison: Comparison) -> None:
    points = list(_points(comparison))
    logarithmic = bool(points) and all(loss.value > 0 for _, loss in points)
    for row, loss in points:
        below, reach = interval(loss, logarithmic=logarithmic)
        axes.errorbar(
            row.bits_per_weight,
            loss.value,
            yerr=[[below], [reach]],
            fmt="s" if "/" in row.format else "o",
            color=PAIR if "/" in row.format else PLAIN,
            markersize=5,
            capsize=2.5,
            linewidth=1,
        )
    if logarithmic:
        axes.set_yscale("log")
    _dress(axes, comparison)


def interval(estimate: Estimate, *, logarithmic: bool) -> tuple[float, float]:
    """How far the interval of an estimate is drawn below and above it; not at all if unknown."""
    reach = estimate.value - estimate.low if math.isfinite(estimate.error) else 0.0
    # Half of an interval that reaches below zero has no place on a logarithmic axis.
    return min(reach, 0.9 * estimate.value) if logarithmic else reach, reach


def _dress(axes: "Axes", comparison: Comparison) -> None:
    base = comparison.rows[0].format
    has_divergence = any(row.figures.divergence is not None for row in comparison.rows[1:])
    what = (
        f"KL divergence from {base}, nats"
        if has_divergence
        else f"{comparison.metric} minus {base}"
    )
    axes.set_title(
        f"{comparison.model}   {comparison.units} {comparison.unit}s", loc="left", fontsize=11
    )
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"{what} (95 % interval)")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.margins(x=0.16, y=0.12)
    _legend(axes, [row.format for row in comparison.rows[1:]])


def _legend(axes: "Axes", names: Sequence[str]) -> None:
    """Say what a square is, if there is one. Below the points of few bits there is room."""
    from matplotlib.lines import Line2D

    if any("/" in name for name in names):
        kinds = (("o", PLAIN, "weights and activations alike"), ("s", PAIR, "weights/activations"))
        handles = [
            Line2D([], [], marker=m, color=c, linestyle="", label=text) for m, c, text in kinds
        ]
        axes.legend(handles=handles, loc="lower left", frameon=False, fontsize=9)


def _label(axes: "Axes", comparison: Comparison) -> None:
    """Name every point, each label at the first place where it covers nothing."""
    points = list(_points(comparison))
    taken = [_box_of_point(axes, row, loss) for row, loss in points]
    for row, loss in sorted(points, key=lambda point: (point[0].bits_per_weight, point[1].value)):
        taken.append(_place(axes, row, loss, taken))


def _box_of_point(axes: "Axes", row: Row, loss: Estimate) -> "Bbox":
    """The marker and its interval, in pixels."""
    from matplotlib.transforms import Bbox

    known = math.isfinite(loss.error)
    low, high = (loss.low, loss.high) if known else (loss.value, loss.value)
    if axes.get_yscale() == "log":
        low = max(low, 0.1 * loss.value)
    x, bottom = axes.transData.transform((row.bits_per_weight, low))
    top = axes.transData.transform((row.bits_per_weight, high))[1]
    return Bbox.from_extents(x - 4, bottom - 2, x + 4, top + 2)


def _place(axes: "Axes", row: Row, loss: Estimate, taken: Sequence["Bbox"]) -> "Bbox":
    """Write one label where it costs least, with a leader if that is far; its box in pixels."""
    point = (row.bits_per_weight, loss.value)
    inside = axes.get_window_extent()
    best: tuple[float, Annotation, Bbox] | None = None
    for dx, dy, ha, va in PLACES:
        label = axes.annotate(
            row.format, point, (dx, dy), ha=ha, va=va, fontsize=9, textcoords="offset points"
        )
        box = label.get_window_extent()
        cost = sum(_overlap(box, other) for other in taken) + _outside(box, inside)
        if best is not None and best[0] <= cost:
            label.remove()
            continue
        if best is not None:
            best[1].remove()
        best = (cost, label, box)
        if cost == 0:
            break
    assert best is not None
    _lead(axes, point, best[1])
    return best[2]


def _lead(axes: "Axes", point: tuple[float, float], label: "Annotation") -> None:
    """Join a label that stands far from its point to it."""
    dx, dy = label.xyann
    if abs(dy) > 14:
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", point, (dx, dy), textcoords="offset points", arrowprops=line)


def _overlap(first: "Bbox", second: "Bbox") -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: "Bbox", frame: "Bbox") -> float:
    inside = _overlap(box, frame)
    return box.width * box.height - inside
