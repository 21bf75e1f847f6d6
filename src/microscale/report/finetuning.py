"""Finetuning as a table and a picture: quality of the three models, the losses, the sweep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from microscale.recipes.finetune import Finetuning
from microscale.recipes.sweep import Sweep
from microscale.report.quality import GREY, PAIR, PLAIN
from microscale.report.table import with_error, with_interval
from microscale.suite.task import SHARES
from microscale.suite.trained import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def quality(report: Report) -> Table:
    """The three models with the task's metric."""
    percent, unit = (100.0, ", %") if report.metric in SHARES else (1.0, "")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    table.add_column("model")
    for title in (f"{report.metric}{unit}", "from unquantized\n[95 %]", "loss"):
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    for name, figures in report.figures.items():
        loss = "" if figures.loss is None else with_error(figures.loss)
        paired = with_interval(figures.difference, percent)
        table.add_row(name, with_error(figures.metric, percent), paired, loss)
    return table


def draw(name: str, done: Finetuning, sweep: Sweep | None) -> "Figure":
    """Draw the loss of each step, and beside it the sweep's losses if there was one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4 if sweep is None else 11.0, 4.2), layout="constrained")
    axes = figure.subplots(1, 1 if sweep is None else 2, squeeze=False)[0]
    _losses(axes[0], done)
    axes[0].set_title(
        f"{name}   {done.conversion.policy}"[:70] if sweep is None else name,
        loc="left",
        fontsize=10,
    )
    if sweep is not None:
        _trials(axes[1], sweep)
    for one in axes:
        one.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["right", "top"]].set_visible(False)
    return figure


def _losses(axes: "Axes", done: Finetuning) -> None:
    steps = range(1, len(done.losses) + 1)
    axes.plot(steps, done.losses, color=GREY, linewidth=0.6, alpha=0.6, label="each step")
    window = max(1, len(done.losses) // 20)
    axes.plot(steps, _smooth(done.losses, window), color=PLAIN, label=f"mean of {window} steps")
    for value, label, style in (
        (done.before, "development data, cast", ":"),
        (done.after, "development data, finetuned", "--"),
    ):
        if value is not None:
            axes.axhline(value, color=PAIR, linestyle=style, linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if all(loss > 0 for loss in done.losses):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)


def _smooth(losses: Sequence[float], window: int) -> list[float]:
    """Means of up to `window` losses that end at each step."""
    parts = (losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def _trials(axes: "Axes", sweep: Sweep) -> None:
    lines: dict[tuple[int, float | None], list[tuple[float, float]]] = {}
    for trial in sweep.trials:
        if trial.loss is not None:
            key = trial.plan.steps, trial.plan.range_lr
            lines.setdefault(key, []).append((trial.plan.lr, trial.loss))
    for (steps, ranged), points in lines.items():
        label = f"{steps} steps" + ("" if ranged is None else f", ranges {ranged:g}")
        rates, losses = zip(*sorted(points), strict=True)
        axes.plot(rates, losses, marker="o", label=label)
    axes.axhline(sweep.before, color=PAIR, linestyle=":", label="cast")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss on development data")
    axes.legend(frameon=False, fontsize=8)
