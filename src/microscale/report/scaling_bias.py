"""Constant scaling biases: the table and the picture."""

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from microscale.report.quality import GREY, PAIR, PLAIN
from microscale.report.table import short, with_error
from microscale.suite.scaling_bias import HOLDS, Constant, Sweep
from microscale.suite.task import SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def table(sweep: Sweep) -> Group:
    """The constants, FP8-AMAX first."""
    factor, unit = (100.0, ", %") if sweep.metric in SHARES else (1.0, "")
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    found.add_column("scaling bias")
    for title in (f"{sweep.metric}{unit}", "kept, %", "KL, nats", f"{HOLDS:.1%}"):
        found.add_column(escape(title), justify="right", no_wrap=True)
    found.add_row("float", with_error(sweep.base.metric, factor), "100.00", "", "")
    for one in (sweep.amax, *sweep.constants):
        found.add_row(
            _name(one),
            with_error(one.figures.metric, factor),
            "" if math.isnan(one.kept) else f"{100 * one.kept:.2f}",
            short(one.figures.divergence),
            "holds" if one.holds else "",
        )
    left = f"; left in the wider type: {', '.join(sweep.left)}" if sweep.left else ""
    spread = (
        f"{operand}s {min(counts)} to {max(counts)}"
        for operand, counts in sweep.found.items()
        if counts
    )
    return Group(
        Text.assemble((sweep.model, "bold"), f"  {sweep.about}"),
        Text(f"fp8 {sweep.element}, linear layers and convolutions{left}"),
        Text(),
        found,
        Text(),
        Text(sweep.summary),
        Text(f"Biases that FP8-AMAX takes: {', '.join(spread)}."),
        *(Text(note, style="dim") for note in sweep.notes),
    )


def _name(constant: Constant) -> str:
    return "FP8-AMAX" if constant.bias is None else f"{constant.bias:+d}"


def draw(sweep: Sweep) -> "Figure":
    """Draw what each constant keeps, and the biases that FP8-AMAX takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_kept(upper, sweep)
    _draw_found(lower, sweep)
    for one in (upper, lower):
        one.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["right", "top"]].set_visible(False)
    lower.set_xlabel("scaling bias b: tensors are multiplied by 2^b before the cast")
    return figure


def _draw_kept(axes: "Axes", sweep: Sweep) -> None:
    from matplotlib.ticker import MaxNLocator

    known = [one for one in sweep.constants if not math.isnan(one.kept)]
    axes.plot(
        [one.bias or 0 for one in known],
        [100 * (1 - one.kept) for one in known],
        "o-",
        color=PLAIN,
        label="one constant",
    )
    lost = 100 * (1 - HOLDS)
    axes.axhline(lost, color=GREY, linewidth=1, linestyle="--", label=f"{lost:.1f} %")
    amax = 100 * (1 - sweep.amax.kept)
    axes.axhline(amax, color=PAIR, linewidth=1, label="FP8-AMAX")
    if sweep.range is not None:
        low, high = sweep.range
        axes.axvspan(low - 0.5, high + 0.5, color=PLAIN, alpha=0.1, linewidth=0)
    # Linear up to what may be lost, so that gains and small losses are seen beside large ones.
    axes.set_yscale("symlog", linthresh=2 * lost)
    axes.set_ylim(top=100)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"lost of the score ({sweep.metric}), %")
    axes.set_title(f"{sweep.model}: {sweep.summary}", fontsize=10, loc="left", wrap=True)
    axes.legend(frameon=False, fontsize=8, loc="upper center")


def _draw_found(axes: "Axes", sweep: Sweep) -> None:
    for operand, color, shift in (("weight", GREY, -0.2), ("input", PLAIN, 0.2)):
        counts = sweep.found[operand]
        total = sum(counts.values())
        if total:
            places = [bias + shift for bias in counts]
            shares = [100 * n / total for n in counts.values()]
            axes.bar(places, shares, width=0.4, color=color, label=f"{operand}s")
    axes.set_ylabel("biases that FP8-AMAX takes, %")
    axes.legend(frameon=False, fontsize=8)
