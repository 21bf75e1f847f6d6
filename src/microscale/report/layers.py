"""Layer by layer: what the operands lose, beside what each layer alone costs."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from microscale.report.quality import GREY, PAIR, PLAIN, interval
from microscale.report.table import short
from microscale.suite.inspection import Inspection
from microscale.suite.layer import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK = "#222222"

MOST = 60
"""Layers that one picture shows; of more, those with the largest errors."""

SIDES = {
    "weight": ("o", PLAIN),
    "input": ("s", PAIR),
    "query, probabilities, left": (">", "#3a8a5b"),
    "key, value, right": ("<", "#8b5aa5"),
}


def draw(inspection: Inspection) -> "Figure":
    """Draw the layers in the order in which they ran, from top to bottom."""
    from matplotlib.figure import Figure

    layers = _chosen(inspection)
    height = 1.9 + 0.21 * len(layers)
    figure = Figure(figsize=(11.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_ratios(left, layers)
    _draw_errors(right, layers, inspection)
    for axes in (left, right):
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(visible=True, axis="both", which="major", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    left.set_yticks(range(len(layers)), [layer.module or "(model)" for layer in layers], fontsize=8)
    several = f"   {len(layers)} of {len(inspection.layers)} layers"
    some = several if len(layers) < len(inspection.layers) else ""
    title = (
        f"{inspection.model} in {inspection.format}   {inspection.units} {inspection.unit}s{some}"
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _chosen(inspection: Inspection) -> Sequence[Layer]:
    worst = list(dict.fromkeys(layer.module for layer, _ in inspection.rows("error")))[:MOST]
    return [layer for layer in inspection.layers if layer.module in worst]


def _side(operand: str) -> str:
    """The name in `SIDES` of an operand; what is none of the others is a parameter."""
    word = operand.partition(" ")[0]
    return next((side for side in SIDES if word in side.split(", ")), "weight")


def _points(layers: Sequence[Layer]) -> Iterator[tuple[str, float, int]]:
    for place, layer in enumerate(layers):
        for operand in layer.operands:
            yield _side(operand.operand), operand.figures.sqnr, place


def _draw_ratios(axes: "Axes", layers: Sequence[Layer]) -> None:
    points = [point for point in _points(layers) if math.isfinite(point[1])]
    for side, (marker, color) in SIDES.items():
        found = [(ratio, place) for kind, ratio, place in points if kind == side]
        if found:
            x, y = zip(*found, strict=True)
            axes.scatter(
                x, y, s=26, color=color, marker=marker, label=side, alpha=0.85, linewidths=0
            )
    axes.set_xlabel("signal-to-quantization-noise ratio, dB (left is worse)")
    if points:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=4,
            frameon=False,
            fontsize=8,
            handletextpad=0.1,
            columnspacing=1.0,
            borderpad=0.1,
        )


def _draw_errors(axes: "Axes", layers: Sequence[Layer], inspection: Inspection) -> None:
    errors = [layer.error for layer in layers]
    known = [
        (place, error)
        for place, error in enumerate(errors)
        if error is not None and math.isfinite(error.value)
    ]
    logarithmic = bool(known) and all(error.value > 0 for _, error in known)
    for place, error in known:
        below, above = interval(error, logarithmic=logarithmic)
        axes.errorbar(
            error.value,
            place,
            xerr=[[below], [above]],
            fmt="o",
            color=BLACK,
            markersize=5,
            capsize=2,
            linewidth=1,
        )
    if logarithmic:
        axes.set_xscale("log")
    whole = inspection.whole.loss_of_quality
    words = "this layer alone quantized"
    if whole is not None and math.isfinite(whole.value):
        axes.axvline(whole.value, color=GREY, linewidth=1, linestyle="--")
        words += f"; dashed: all layers, {short(whole)}"
    axes.set_xlabel(f"{inspection.measure} (95 % interval)")
    axes.set_title(words, loc="left", fontsize=8, color=BLACK)
