"""Where a format hurts: every layer's operands under it, and what each layer alone costs.

One pass runs the unquantized model, one the model with every layer quantized, its operands watched,
and one for each layer the model with that layer alone quantized.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from glob import escape
from itertools import islice

from torch import nn

from microscale.analysis import Observed, Study, told_apart
from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat
from microscale.operands import SETTINGS
from microscale.policy import Policy
from microscale.suite.compare import read_formats
from microscale.suite.coverage import Coverage, Recorder
from microscale.suite.extras import require
from microscale.suite.inspection import Inspection
from microscale.suite.layer import Layer
from microscale.suite.measure import Measured, Reference
from microscale.suite.rows import Figures
from microscale.suite.task import Evaluate, Evaluation, Task
from microscale.suite.trial import Progress, Trial


def inspect(
    model: nn.Module,
    evaluate: Evaluate | Task,
    fmt: str | BlockFormat | Policy = "mxfp4",
    *,
    batches: int | None = 4,
    name: str = "model",
    seed: int = 0,
    progress: Progress | None = None,
) -> Inspection:
    """Show what a format does to each operand of each layer, and what each layer alone costs.

    Args:
        model: any module; it is converted in place, and reverted.
        evaluate: as in `compare`. It runs once for each layer and twice more, so it should give
            its batches one by one (a generator).
        fmt: a spelling such as "mxfp4", "mxfp4/mxfp6_e2m3" (weight/activation) or "paper:mxfp4" (a
            profile's), a block format, a policy, or the name of a policy file.
        batches: how many of the first batches are used; None for all.
        name: of the model, for the report.
        seed: of torch's random numbers during each evaluation.
        progress: told how many passes are done.

    Returns:
        The layers with their operands and errors. `print` shows it, `to_dict` gives plain data;
        microscale.tally defines the figures.

    Raises:
        MicroscaleError: an unknown format, before anything runs; a model without any product that
            the policy quantizes; evaluations that cannot be paired.
    """
    ((spelling, policy),) = read_formats([fmt]).items()
    if batches is not None and batches < 1:
        raise MicroscaleError(f"batches={batches} must be at least 1, or None for all.")
    require("scipy.stats", "an inspection's confidence intervals")
    trial = Trial.of(model, evaluate, seed, name)
    if batches is not None:
        trial = replace(trial, task=_shortened(trial.task, batches))
    return _Run(trial, policy, progress or (lambda *_: None)).inspection(name, spelling)


def _shortened(task: Task, batches: int) -> Task:
    about = f"{task.about}; the first {batches} batches" if task.about else ""
    return replace(task, evaluate=_First(task.evaluate, batches), about=about)


@dataclass(frozen=True, slots=True, eq=False)
class _First:
    """The first batches of an evaluation."""

    evaluate: Evaluate
    batches: int

    def __call__(self, model: nn.Module) -> Evaluation:
        found = self.evaluate(model)
        if isinstance(found, Iterable) and not isinstance(found, Mapping):
            return islice(found, self.batches)
        return found


def alone(model: nn.Module, policy: Policy, module: str) -> Policy:
    """The policy that quantizes the products of one module as `policy` does, and nothing else."""
    here = policy.at(module)
    settings = tuple((path, here.setting(path)) for path in SETTINGS)
    nothing = tuple((path, Policy().setting(path)) for path in SETTINGS)
    prefix = f"{module}." if module else ""
    inside = [f"{prefix}{child}" for child, _ in model.get_submodule(module).named_children()]
    overrides = ((escape(module), settings), *((escape(child), nothing) for child in inside))
    return Policy(overrides=overrides)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The passes of an inspection."""

    trial: Trial
    policy: Policy
    progress: Progress

    def inspection(self, name: str, spelling: str) -> Inspection:
        task = self.trial.task
        self.progress("unquantized", 0, None)
        base, reference = self.trial.reference(lambda _: None)
        self.progress(spelling, 1, None)
        whole, operands, coverage = self._watch(base, reference)
        if not operands:
            raise MicroscaleError(
                f"model {name!r}: no operand was cast to {spelling!r}; {coverage.summary}."
            )
        return Inspection(
            model=name,
            format=spelling,
            metric=base.metric,
            unit=task.unit,
            units=base.units,
            positions=base.positions,
            about=task.about or f"{base.units} {task.unit}s",
            seed=self.trial.seed,
            base=base.headline(),
            whole=Figures.of(whole, base),
            layers=tuple(self._layers(operands, base, reference)),
            summary=coverage.summary,
            notes=task.notes,
        )

    def _watch(
        self, base: Measured, reference: Reference | None
    ) -> tuple[Measured, tuple[Observed, ...], Coverage]:
        model, recorder = self.trial.model, Recorder()
        with self.trial.converted(told_apart(self.policy)) as conversion:
            study = Study(model)
            with study.watching():
                measured = self.trial.measured(base, reference, recorder, lambda _: None)
        coverage = Coverage.of(recorder.products, conversion)
        return measured, study.observed(recorder.products), coverage

    def _layers(
        self, operands: tuple[Observed, ...], base: Measured, reference: Reference | None
    ) -> Iterator[Layer]:
        model = self.trial.model
        names = list(dict.fromkeys(operand.module for operand in operands))
        for done, name in enumerate(names, 2):
            self.progress(name or "(model)", done, len(names) + 2)
            with self.trial.converted(alone(model, self.policy, name)):
                measured = self.trial.measured(base, reference, Recorder(), lambda _: None)
            yield Layer(
                name,
                type(model.get_submodule(name)).__name__,
                tuple(operand for operand in operands if operand.module == name),
                Figures.of(measured, base),
            )
