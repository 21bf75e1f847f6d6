"""FP8 against INT8: the picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from microscale.report.quality import GREY, interval
from microscale.suite.accuracy import ELEMENTS, Accuracy
from microscale.suite.contest import Contest
from microscale.suite.outliers import EDGES, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


COLORS = dict(zip(ELEMENTS, ("#1f5fa8", "#3a8a5b", "#c9a227", "#d1622b", "#8b5aa5"), strict=True))


def draw(found: Sequence[Accuracy], contest: Contest | None) -> "Figure":
    """Draw the distributions and, of a model, what formats lose and why."""
    from matplotlib.figure import Figure

    if contest is None:
        figure = Figure(figsize=(6.0, 4.6), layout="constrained")
        _draw_distributions(figure.subplots(), found)
        plain = figure.axes
    else:
        inputs, weights = (
            [layer for layer in contest.layers if layer.operand == operand]
            for operand in ("input", "weight")
        )
        tall = 1.4 + 0.16 * max(len(inputs), len(weights), 8)
        figure = Figure(figsize=(18.0, 4.6 + tall), layout="constrained")
        upper, lower = _halves(figure, 4.6, tall)
        plain = list(upper.subplots(1, 3))
        _draw_distributions(plain[0], found)
        _draw_results(plain[1], contest)
        _draw_layers(plain[2], contest)
        maps = lower.subplots(1, 2)
        _draw_histograms(maps[0], inputs, "inputs", contest.outlying)
        _draw_histograms(maps[1], weights, "weights", ())
    for one in plain:
        one.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["right", "top"]].set_visible(False)
    return figure


def _halves(figure: "Figure", *heights: float) -> "tuple[SubFigure, SubFigure]":
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    return halves[0], halves[1]


def _draw_histograms(
    axes: "Axes", layers: Sequence[Layer], what: str, outlying: Sequence[str]
) -> None:
    """One row for each layer: how many of its values have which magnitude."""
    import numpy as np
    from matplotlib.colors import LogNorm

    axes.set_title(
        f"{what}: share of values; | one step of INT8 if its range ends at the largest value, o",
        fontsize=10,
        loc="left",
    )
    axes.set_xlabel("magnitude in standard deviations")
    axes.set_xscale("log", base=2)
    if not layers:
        return
    below, above = EDGES[0] / 2**0.5, EDGES[-1] * 2**0.5
    shares = np.array([layer.histogram for layer in layers])
    mesh = axes.pcolormesh(
        [below, *EDGES, above],
        np.arange(len(layers) + 1) - 0.5,
        np.ma.masked_less_equal(shares, 0),
        norm=LogNorm(1e-6, 1),
        cmap="Blues",
    )
    rows = range(len(layers))
    crests = np.array([layer.crest for layer in layers])
    axes.plot(crests, rows, "o", color="#d1622b", markersize=3.5)
    axes.plot(crests / 127, rows, "|", color="#d1622b", markersize=7)
    axes.set_xlim(below, above)
    axes.set_yticks(rows, [layer.module or "(model)" for layer in layers], fontsize=7)
    for label, layer in zip(axes.get_yticklabels(), layers, strict=True):
        label.set_fontweight("bold" if layer.module in outlying else "normal")
    axes.invert_yaxis()
    axes.figure.colorbar(mesh, ax=axes, label="share of the layer's values", pad=0.01)


def _draw_distributions(axes: "Axes", found: Sequence[Accuracy]) -> None:
    wide = 1 / (len(ELEMENTS) + 1)
    for place, name in enumerate(ELEMENTS):
        at = [i + (place - 2) * wide for i in range(len(found))]
        heights = [one.bits[name] for one in found]
        axes.bar(at, heights, width=0.9 * wide, color=COLORS[name], label=name)
    for i, one in enumerate(found):
        label = "any 256 levels" if not i else "_"
        axes.hlines(one.bound, i - 0.45, i + 0.45, color="#222222", linewidth=1, label=label)
    axes.set_xticks(range(len(found)), [one.distribution for one in found])
    axes.set_ylabel("bits of accuracy, log2(sigma / RMSE)")
    axes.set_ylim(0, 9.6)
    axes.legend(ncols=6, frameon=False, fontsize=8, loc="upper center", columnspacing=1.0)


def _draw_results(axes: "Axes", contest: Contest) -> None:
    results = [*contest.results, *(remedy.result for remedy in contest.remedies)]
    losses = ((r.row.format, r.row.figures.loss_of_quality) for r in results)
    known = [(n, loss) for n, loss in losses if loss is not None and math.isfinite(loss.value)]
    logarithmic = bool(known) and all(loss.value > 0 for _, loss in known)
    for place, (name, loss) in enumerate(known):
        below, above = interval(loss, logarithmic=logarithmic)
        color = COLORS.get(name, GREY)
        reach = [[below], [above]]
        axes.errorbar(place, loss.value, yerr=reach, fmt="o", color=color, capsize=3, markersize=7)
    axes.set_xticks(range(len(known)), [name for name, _ in known], rotation=30, ha="right")
    if logarithmic:
        axes.set_yscale("log")
    some = contest.results[0].row.figures.divergence is not None
    axes.set_ylabel("KL from unquantized, nats" if some else f"change of {contest.metric}")
    axes.set_title(
        f"{contest.model}: {contest.units} {contest.unit}s (95 %)", fontsize=10, loc="left"
    )


def _draw_layers(axes: "Axes", contest: Contest) -> None:
    from matplotlib.ticker import LogFormatter

    for name in ELEMENTS:
        for operand, marker in (("input", "o"), ("weight", "x")):
            points = [
                (layer.kurtosis, layer.bits[name])
                for layer in contest.layers
                if layer.operand == operand and not math.isnan(layer.bits[name] + layer.kurtosis)
            ]
            if points:
                x, y = zip(*points, strict=True)
                label = name if operand == "input" else "_"
                axes.scatter(x, y, s=18, color=COLORS[name], marker=marker, label=label, alpha=0.8)
    axes.set_xscale("log")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.set_xlabel("kurtosis of a layer's inputs (o) and weight (x); 3 if normal")
    axes.set_ylabel("bits of accuracy, one scale for the tensor")
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", columnspacing=1.0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))
