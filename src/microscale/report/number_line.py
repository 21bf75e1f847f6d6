"""The values of an element format as a number line: text for terminals, a figure for pages.

Both show the positive half twice, on a linear and on a logarithmic axis: the first shows where
the values are, the second how finely they resolve a magnitude. The negative half mirrors it.
"""

import math
from typing import TYPE_CHECKING

from microscale.formats import ElementFormat
from microscale.report.format_words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NORMAL, SUBNORMAL, GREY = "#1f5fa8", "#d1622b", "#777777"


def positive_values(element: ElementFormat) -> list[float]:
    """The finite positive values in ascending order."""
    return sorted({value for value in element.values if 0 < value < math.inf})


def text_lines(element: ElementFormat, width: int) -> str:
    """Two number lines of `width` columns, linear and logarithmic, with labels below the ticks.

    A tick is one value; where several fall on one column it is bold, where they fill it, a block.
    """
    values = positive_values(element)
    low, high = math.log2(values[0]), math.log2(values[-1])
    # A format of one positive value (int2, e1m0) has no length on a logarithmic axis.
    length = (high - low) or 1.0
    last = width - 1
    linear = {value: round(value / values[-1] * last) for value in [0.0, *values]}
    logarithmic = {value: round((math.log2(value) - low) / length * last) for value in values}
    return "\n".join(
        ["linear, from 0", *_line(linear, width), "", "logarithmic", *_line(logarithmic, width)]
    )


def _line(columns: dict[float, int], width: int) -> tuple[str, str]:
    counts = [0] * width
    for column in columns.values():
        counts[column] += 1
    return "".join("─┴┻█"[min(count, 3)] for count in counts), _labels(columns, width)


def _labels(columns: dict[float, int], width: int) -> str:
    """As many labels as fit: the ends first, then powers of two, then the other values."""
    row = [" "] * width
    ends = (min(columns), max(columns))
    order = sorted(columns, key=lambda v: (v not in ends, v == 0 or math.frexp(v)[0] != 0.5, v))
    for value in order:
        label = number(value)
        start = min(max(columns[value] - len(label) // 2, 0), width - len(label))
        if all(cell == " " for cell in row[max(start - 1, 0) : start + len(label) + 1]):
            row[start : start + len(label)] = label
    return "".join(row).rstrip()


def draw(element: ElementFormat, title: str) -> "Figure":
    """Draw the number lines and, below them, the relative error of rounding to nearest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    linear, logarithmic, error = figure.subplots(3, 1, height_ratios=[0.8, 0.8, 1.9])
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    _draw_linear(linear, element)
    _draw_logarithmic(logarithmic, element)
    _draw_error(error, element)
    return figure


def _ticks(axes: "Axes", element: ElementFormat, values: list[float]) -> None:
    edge = element.smallest_normal or 0.0
    width = 0.9 if len(values) > 100 else 1.6
    small = [value for value in values if 0 < abs(value) < edge]
    axes.vlines(sorted({*values} - {*small}), 0, 1, color=NORMAL, linewidth=width, label="normal")
    if small:
        axes.vlines(small, 0, 1, color=SUBNORMAL, linewidth=width, label="subnormal")
    axes.set_ylim(0, 1.15)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)


def _draw_linear(axes: "Axes", element: ElementFormat) -> None:
    values = positive_values(element)
    every = [-value for value in reversed(values)] + [0.0, *values]
    _ticks(axes, element, every)
    axes.set_title(f"All {len(every)} values", loc="left", fontsize=10)
    if element.smallest_subnormal is not None:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=2,
            frameon=False,
            fontsize=9,
            borderaxespad=0.1,
        )
    if len(every) <= 15:
        axes.set_xticks(every, [number(value) for value in every])


def _draw_logarithmic(axes: "Axes", element: ElementFormat) -> None:
    values = positive_values(element)
    _ticks(axes, element, values)
    _magnitudes(axes, values)
    axes.set_title("Positive values, logarithmic", loc="left", fontsize=10)


def _magnitudes(axes: "Axes", values: list[float]) -> None:
    """A logarithmic axis, the same for all panels, marked at powers of two."""
    low, high = math.floor(math.log2(values[0])) - 1, math.ceil(math.log2(values[-1])) + 1
    step = -(-(high - low) // 14)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**low, 2.0**high)
    powers = [power for power in range(low, high + 1) if power % step == 0]
    labels = [f"{2.0**p:g}" if -4 < p < 11 else f"$2^{{{p}}}$" for p in powers]
    axes.set_xticks([2.0**power for power in powers], labels)
    axes.minorticks_off()


def _draw_error(axes: "Axes", element: ElementFormat) -> None:
    import numpy as np

    positive = positive_values(element)
    _magnitudes(axes, positive)
    low, high = axes.get_xlim()
    values, samples = np.array([0.0, *positive]), np.geomspace(low, high, 8000)
    above = np.searchsorted(values, samples).clip(1, len(values) - 1)
    distance = np.minimum(np.abs(samples - values[above - 1]), np.abs(values[above] - samples))
    axes.plot(samples, distance / samples * 100, color=NORMAL, linewidth=0.9)
    bound = 50 / (2**element.mantissa_bits + 0.5)
    if not element.is_integer:
        axes.axhline(bound, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(f"{bound:.2g} %", (low, bound), (4, 3), textcoords="offset points")
    top = 25 if element.is_integer else min(5 * bound, 100)
    axes.set_ylim(0, top)
    axes.annotate("saturates", (high, top), (-4, -14), textcoords="offset points", ha="right")
    axes.set_ylabel("error, %")
    axes.set_xlabel("magnitude, in units of the scale")
    axes.set_title("Relative error of rounding to nearest", loc="left", fontsize=10)
    axes.spines[["right", "top"]].set_visible(False)
