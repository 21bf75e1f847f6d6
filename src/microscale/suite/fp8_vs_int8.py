"""FP8 against INT8 on one model, after arXiv 2303.17951: which format of 8 bits loses least.

Every format gets the best of a grid of estimators (`microscale.suite.judge`), chosen on every
`EVERY`th batch of the task and measured on the others, which had no part in the choice. Ranges of
inputs are those of the network before any rounding. The layers whose inputs FP8-E4 holds better
than INT8 are named, and what helps INT8 there is tried: 16-bit inputs, ranges for groups of
channels, SmoothQuant.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from microscale.errors import MicroscaleError
from microscale.formats import ElementFormat
from microscale.recipes.batch import Batch, run
from microscale.recipes.groups import GROUPS, split_inputs
from microscale.recipes.smoothing import smooth
from microscale.suite.accuracy import ELEMENTS
from microscale.suite.contest import Contest, Remedy, Result
from microscale.suite.judge import Judge, decoded, output_of
from microscale.suite.measure import evaluating, measure_reference
from microscale.suite.outliers import Layer, layers_of
from microscale.suite.predictions import Predictions
from microscale.suite.rows import Figures, Row
from microscale.suite.size import Size, main_dtype
from microscale.suite.task import Evaluate, Evaluation, Task
from microscale.suite.trial import Progress, Trial

EVERY = 4
"""One batch of so many is for calibration."""

INT8, INT4 = ELEMENTS["INT8"], ElementFormat(0, 2, "finite", 0)


def fp8_vs_int8(
    model: nn.Module,
    evaluate: Evaluate | Task,
    *,
    name: str = "model",
    seed: int = 0,
    progress: Progress | None = None,
) -> Contest:
    """Compare INT8 and FP8 with 2 to 5 exponent bits on a model, which stays as it is.

    Args:
        model: any module; copies of it are quantized.
        evaluate: as in `compare`, in at least two batches.
        name: of the model, for the report.
        seed: of torch's random numbers during each evaluation.
        progress: told what runs.

    Returns:
        The table of formats, conversions of the FP8-E4 network, the layers' outliers, and what
        remedies win back of what INT8 loses.

    Raises:
        MicroscaleError: an evaluation that is not in batches, or that never calls the model.
    """
    trial = Trial.of(model, evaluate, seed, name)
    return _Run(trial, progress or (lambda *_: None)).contest(name)


@dataclass(frozen=True, slots=True, eq=False)
class _Rest:
    """The batches of an evaluation that are not for calibration."""

    evaluate: Evaluate

    def __call__(self, model: nn.Module) -> Evaluation:
        return _kept(_in_batches(self.evaluate(model)))


def _kept(batches: Iterator[Predictions]) -> Iterator[Predictions]:
    return (batch for number, batch in enumerate(batches) if number % EVERY)


def _in_batches(evaluation: Evaluation) -> Iterator[Predictions]:
    if isinstance(evaluation, (Mapping, Predictions)):
        raise MicroscaleError(
            f"evaluate gave a {type(evaluation).__name__} for all of its data; it must give "
            "batches one by one, some of which are for calibration."
        )
    return iter(evaluation)


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps of a contest."""

    trial: Trial
    progress: Progress

    def contest(self, name: str) -> Contest:
        trial, task = self.trial, self.trial.task
        self.progress("unquantized", 0, None)
        calls = _record(trial)
        rest = replace(task, evaluate=_Rest(task.evaluate), units=None)
        with evaluating(trial.model, trial.seed):
            base, known = measure_reference(trial.model, rest, lambda _: None)
            wide = [output_of(run(trial.model, call)) for call in calls]
        judge = Judge(rest, base, known, calls, wide, trial.seed, self.progress)
        size = Size.plain(trial.model)
        kind = str(main_dtype(trial.model)).removeprefix("torch.")
        self.progress("layers", 0, None)
        layers = layers_of(trial.model, calls, trial.seed)
        results = self._formats(judge)
        named = _outlying(layers)
        return Contest(
            model=name,
            metric=base.metric,
            unit=task.unit,
            units=base.units,
            about=f"{task.about or f'{base.units} {task.unit}s'}; one batch of {EVERY} calibrates",
            seed=trial.seed,
            base=Row(kind, size.bits_per_weight, size.megabytes, Figures.of(base), 0.0),
            results=tuple(results),
            layers=layers,
            outlying=named,
            remedies=tuple(self._remedies(judge, named, calls)),
            notes=task.notes,
        )

    def _formats(self, judge: Judge) -> Iterator[Result]:
        """The formats, and networks that are converted to others."""
        model = self.trial.model
        found = {
            label: judge.result(label, model, element, element)
            for label, element in ELEMENTS.items()
        }
        yield from (result for result, _ in found.values())
        narrow = decoded(found["E4"][1])
        rows: tuple[tuple[str, nn.Module, ElementFormat, ElementFormat | None], ...] = (
            ("E4 -> INT8", narrow, INT8, INT8),
            ("E4 -> W8A16", narrow, INT8, None),
            ("W8A16", model, INT8, None),
            ("W4A8", model, INT4, INT8),
        )
        for label, source, weight, given in rows:
            yield judge.result(label, source, weight, given)[0]

    def _remedies(
        self, judge: Judge, named: tuple[str, ...], calls: Sequence[Batch]
    ) -> Iterator[Remedy]:
        """INT8 with each remedy at the layers called `named`."""
        model, layers = self.trial.model, f"{len(named)} layer{'s' * (len(named) != 1)}"
        label = "INT8, A16 there"
        yield Remedy(judge.result(label, model, INT8, INT8, named)[0], f"16-bit inputs of {layers}")
        grouped = copy.deepcopy(model)
        split = split_inputs(grouped, named, calls)
        smoothed = copy.deepcopy(model)
        smoothing = smooth(smoothed, calls, names=named)
        if split:
            result, _ = judge.result("INT8, groups", grouped, INT8, INT8)
            words = f"inputs of {len(split)} of {layers} in {GROUPS} groups of channels by range"
            yield Remedy(result, words)
        if smoothing.folded or smoothing.at_run_time:
            result, _ = judge.result("INT8, smoothed", smoothed, INT8, INT8)
            yield Remedy(
                result, f"SmoothQuant of {layers} and what shares their input: {smoothing}"
            )


def _outlying(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Layers whose inputs FP8-E4 holds better than INT8; if there are none the worst for INT8."""
    inputs = [layer for layer in layers if layer.operand == "input"]
    found = tuple(layer.module for layer in inputs if layer.favours_floats)
    worst = min(inputs, key=lambda layer: layer.bits["INT8"], default=None)
    return found or (() if worst is None else (worst.module,))


def _record(trial: Trial) -> list[Batch]:
    """What the model is called with for the batches that calibrate."""
    calls: list[Batch] = []
    chosen: list[Batch] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_batch(args, kwargs))

    handle = trial.model.register_forward_pre_hook(note, with_kwargs=True)
    batches = 0
    try:
        with evaluating(trial.model, trial.seed):
            for number, _ in enumerate(_in_batches(trial.task.evaluate(trial.model))):
                chosen += calls if number % EVERY == 0 else []
                calls.clear()
                batches = number + 1
    finally:
        handle.remove()
    if batches < 2:
        raise MicroscaleError(
            f"evaluate gave {batches} batch(es); at least 2 are needed, one to calibrate with and "
            "one to measure on: use a smaller --batch-size or more samples."
        )
    if not chosen:
        raise MicroscaleError("evaluate never calls the model itself, so nothing calibrates it.")
    return chosen


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    if not args:
        return dict(kwargs)
    if not kwargs:
        return args
    return lambda model: model(*args, **kwargs)
