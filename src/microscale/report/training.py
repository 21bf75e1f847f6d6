"""The course of a training run: losses over steps."""

from itertools import pairwise
from typing import TYPE_CHECKING

from microscale.recipes.training.trained import Trained
from microscale.report.quality import GREY, PAIR, PLAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED = 0.02
"""Share of the run that the drawn training loss is averaged over, exponentially."""


def draw(trained: Trained) -> "Figure":
    """Draw training loss, thin as it was and averaged, and validation loss as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*trained.losses, strict=True)
    axes.plot(steps, losses, color=GREY, linewidth=0.5, alpha=0.5)
    axes.plot(steps, averaged(list(losses)), color=PLAIN, linewidth=1.3, label="training")
    if trained.validation:
        axes.plot(*zip(*trained.validation, strict=True), "o-", color=PAIR, markersize=4,
                  linewidth=1, label="validation")  # fmt: skip
    config = trained.config
    axes.set_title(f"{config.size} model   policy {config.policy}", loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def averaged(losses: list[float]) -> list[float]:
    """The losses, each averaged with those before it."""
    share = 1 / max(1.0, SMOOTHED * len(losses))
    found = losses[:1]
    for _, loss in pairwise(losses):
        found.append(found[-1] + share * (loss - found[-1]))
    return found
