"""What the casts of a run lost, as one picture: noise, flushed values, scales, gradients."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

GROUPS = {
    "weight": "weights, forward",
    "input": "activations, forward",
    "dgrad grad": "gradients, dgrad",
    "dgrad weight": "weights, dgrad",
    "wgrad input": "activations, wgrad",
    "wgrad grad": "gradients, wgrad",
}
"""Operands whose layers are drawn as one line, by the end of their names."""


def draw(rows: Rows, title: str) -> "Figure":
    """Draw the rows of `monitor.csv`: the median over layers as a line, all layers as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes = figure.subplots(2, 2)
    _panel(axes[0, 0], rows, "sqnr", "signal-to-quantization-noise ratio, dB")
    _panel(axes[0, 1], rows, "flushed", "share of values that become zero")
    _panel(axes[1, 0], rows, "scale_median", "median exponent of the scales")
    _gradients(axes[1, 1], rows)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def _panel(axes: "Axes", rows: Rows, name: str, label: str) -> None:
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        group = _group(str(row["operand"]))
        value = _number(row.get(name))
        if group and math.isfinite(value):
            found[group][int(row["step"])].append(value)
    for number, group in enumerate(GROUPS.values()):
        _band(axes, found.get(group, {}), f"C{number}", group)
    _finish(axes, label)


def _band(axes: "Axes", steps: Mapping[int, list[float]], colour: str, label: str) -> None:
    if not steps:
        return
    places = sorted(steps)
    axes.fill_between(
        places,
        [min(steps[s]) for s in places],
        [max(steps[s]) for s in places],
        color=colour,
        alpha=0.12,
        linewidth=0,
    )
    medians = [statistics.median(steps[s]) for s in places]
    axes.plot(places, medians, "o-", color=colour, markersize=3, linewidth=1.2, label=label)


def _gradients(axes: "Axes", rows: Rows) -> None:
    for name, colour, label in (
        ("cosine", "C0", "cosine with the gradient without casts"),
        ("norm_ratio", "C3", "ratio of their norms"),
    ):
        found: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            value = _number(row.get(name))
            if math.isfinite(value):
                found[int(row["step"])].append(value)
        _band(axes, found, colour, label)
    _finish(axes, "gradients of parameters")
    axes.legend(loc="lower left", frameon=False, fontsize=8)


def _finish(axes: "Axes", label: str) -> None:
    axes.set_title(label, loc="left", fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)


def _group(operand: str) -> str:
    endings = sorted(GROUPS, key=len, reverse=True)
    backward = "grad " in operand
    for ending in endings:
        if operand.endswith(ending) and backward == (" " in ending):
            return GROUPS[ending]
    return ""


def _number(value: object) -> float:
    return float(str(value)) if value not in (None, "") else math.nan
