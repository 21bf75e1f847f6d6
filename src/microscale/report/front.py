"""The front of a search: measured divergence against stored bits."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from microscale.recipes.searched import Point, Searched
from microscale.report.quality import GREY, PAIR, PLAIN, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(searched: Searched) -> "Figure":
    """Draw the mixtures as a line, each format alone as a square, and what was chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 5.0), layout="constrained")
    axes = figure.subplots()
    every = [*searched.front, *searched.formats]
    logarithmic = all(point.divergence.value > 0 for point in _known(every))
    _dotted(axes, searched.front, logarithmic=logarithmic)
    _squares(axes, searched.formats, logarithmic=logarithmic)
    chosen = searched.chosen
    if math.isfinite(chosen.divergence.value):
        axes.plot(
            chosen.weight_bits,
            chosen.divergence.value,
            marker="o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor="#222222",
            linestyle="",
            label=f"chosen within {searched.budget}",
        )
    if logarithmic:
        axes.set_yscale("log")
    axes.set_title(
        f"{searched.model}   formats mixed by {searched.measure}", loc="left", fontsize=10
    )
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel("KL divergence from the unquantized model, nats")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.margins(x=0.08, y=0.1)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def _known(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.divergence.value)]


def _dotted(axes: "Axes", points: Sequence[Point], *, logarithmic: bool) -> None:
    """The mixtures, joined in the order of their sizes."""
    known = sorted(_known(points), key=lambda point: point.weight_bits)
    if not known:
        return
    axes.errorbar(
        [point.weight_bits for point in known],
        [point.divergence.value for point in known],
        yerr=list(
            zip(*(interval(p.divergence, logarithmic=logarithmic) for p in known), strict=True)
        ),
        fmt="o-",
        color=PLAIN,
        markersize=4,
        capsize=2,
        linewidth=1,
        label="mixtures",
    )


def _squares(axes: "Axes", points: Sequence[Point], *, logarithmic: bool) -> None:
    """The formats alone, with their names."""
    known = _known(points)
    for number, point in enumerate(known):
        below, above = interval(point.divergence, logarithmic=logarithmic)
        axes.errorbar(
            point.weight_bits,
            point.divergence.value,
            yerr=[[below], [above]],
            fmt="s",
            color=PAIR,
            markersize=5,
            capsize=2,
            linewidth=1,
            label="one format everywhere" if number == 0 else None,
        )
        axes.annotate(
            point.label,
            (point.weight_bits, point.divergence.value),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )
