"""A finetuned model beside the unquantized one and the one that was only cast."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from microscale.convert import convert
from microscale.policy import Policy
from microscale.suite.coverage import Recorder
from microscale.suite.measure import check_pairing, evaluating, measure, measure_reference
from microscale.suite.rows import Figures
from microscale.suite.task import Task

WIDE, CAST, FINETUNED = "unquantized", "cast", "finetuned"


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of the three models on a task, differences being from the unquantized one."""

    metric: str
    about: str
    unit: str
    figures: Mapping[str, Figures]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        rows = {name: figures.to_dict() for name, figures in self.figures.items()}
        return {"metric": self.metric, "about": self.about, "unit": self.unit, "models": rows}


def report_on(
    model: nn.Module, finetuned: nn.Module, policy: Policy, task: Task, seed: int
) -> Report:
    """Measure the unquantized `model`, a copy of it that is only cast, and the finetuned one."""
    with evaluating(model, seed):
        base, reference = measure_reference(model, task, lambda _: None)
    cast = copy.deepcopy(model)
    convert(cast, policy, verbose=False)
    figures = {WIDE: Figures.of(base)}
    for name, one in ((CAST, cast), (FINETUNED, finetuned)):
        with evaluating(one, seed):
            measured = measure(one, task, reference, Recorder(), lambda _: None)
        check_pairing(measured, base)
        figures[name] = Figures.of(measured, base)
    return Report(base.metric, task.about, task.unit, figures)
