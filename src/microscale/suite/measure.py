"""Run an evaluation and gather what it gives, unit by unit.

The logits of the unquantized model are the reference of every format. They are kept if all of
them together stay under `KEPT_BYTES`; otherwise a copy of the unquantized model computes them
again beside each format, batch by batch, so that memory stays bounded for any vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite import statistics
from microscale.suite.coverage import Recorder
from microscale.suite.predictions import Predictions, Scores, join, score
from microscale.suite.statistics import Estimate
from microscale.suite.task import Task

KEPT_BYTES = 2**30

Advance = Callable[[int], None]
"""Called with the number of units just done."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Figures of every unit under one format, float64 tensors [units] on the CPU.

    `values` are what the headline `metric` is the mean of; for a perplexity, the losses.
    """

    metric: str
    weight: Tensor
    values: Tensor
    loss: Tensor | None = None
    divergence: Tensor | None = None
    agreement: Tensor | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.weight)

    @property
    def positions(self) -> int:
        """Number of counted positions: tokens, or the units themselves."""
        return int(self.weight.sum())

    def headline(self) -> Estimate:
        """The metric."""
        if self.metric == "perplexity":
            return statistics.perplexity(self.values, self.weight)
        return statistics.mean(self.values, self.weight)

    def headline_difference(self, base: "Measured") -> Estimate:
        """The metric minus that of `base`, paired over units."""
        if self.metric == "perplexity":
            return statistics.perplexity_difference(self.values, base.values, self.weight)
        return statistics.difference(self.values, base.values, self.weight)


class Reference:
    """The unquantized model's logits, batch by batch: kept, or recomputed by a copy of it."""

    def __init__(self, logits: list[Tensor] | None, model: nn.Module | None, task: Task) -> None:
        self._logits = logits
        self._model = model
        self._task = task

    @property
    def is_kept(self) -> bool:
        """Whether the logits are held in memory."""
        return self._model is None

    def batches(self) -> Iterator[Tensor]:
        """Walk the logits in the order of the evaluation."""
        if self._model is None:
            yield from self._logits or ()
            return
        for predictions in _batches(self._task.evaluate(self._model)):
            yield predictions.logits


def measure_reference(
    model: nn.Module, task: Task, advance: Advance, kept_bytes: int = KEPT_BYTES
) -> tuple[Measured, Reference | None]:
    """Measure the unquantized model; the reference is None where the evaluation gives no logits."""
    evaluation = task.evaluate(model)
    if isinstance(evaluation, Mapping):
        return _of_mapping(evaluation, advance), None
    parts: list[Scores] = []
    kept: list[Tensor] = []
    for predictions in _batches(evaluation):
        parts.append(score(predictions))
        if kept_bytes >= 0:
            kept.append(predictions.logits.cpu())
            kept_bytes -= predictions.logits.nbytes
        if kept_bytes < 0:
            kept.clear()
        advance(predictions.units)
    measured = _of_scores(parts, task)
    if kept_bytes < 0:
        return measured, Reference(None, copy.deepcopy(model), task)
    return measured, Reference(kept, None, task)


def measure(
    model: nn.Module,
    task: Task,
    reference: Reference | None,
    recorder: Recorder,
    advance: Advance,
) -> Measured:
    """Measure the model as it stands against the reference's logits, in lockstep."""
    with recorder.recording():
        evaluation = task.evaluate(model)
    if isinstance(evaluation, Mapping):
        return _of_mapping(evaluation, advance)
    if reference is None:
        raise MicroscaleError(
            "evaluate gave a mapping for the unquantized model and logits for a quantized one; "
            "it must return the same kind at every call."
        )
    parts: list[Scores] = []
    batches, expected = _batches(evaluation), reference.batches()
    while True:
        with recorder.recording():
            predictions = next(batches, None)
        # The reference may run the unquantized model, which is no part of the record.
        logits = next(expected, None)
        if predictions is None:
            break
        if logits is None:
            raise MicroscaleError(
                f"evaluate gave more than the {len(parts)} batches it gave for the unquantized "
                f"model; it must walk the same data at every call."
            )
        parts.append(score(predictions, logits))
        advance(predictions.units)
    return _of_scores(parts, task)


def check_pairing(measured: Measured, base: Measured) -> None:
    """Refuse figures that are not of the same units as the reference's: pairing would lie."""
    if measured.metric != base.metric or not torch.equal(measured.weight, base.weight):
        raise MicroscaleError(
            f"evaluate gave {measured.units} units with {measured.positions} positions "
            f"({measured.metric}), but {base.units} with {base.positions} ({base.metric}) for the "
            f"unquantized model; it must walk the same data at every call."
        )


@contextmanager
def evaluating(model: nn.Module, seed: int) -> Iterator[None]:
    """No gradients, eval mode and seeded random numbers; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count()))
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _batches(evaluation: object) -> Iterator[Predictions]:
    """The batches of what an evaluation returned, of which nothing is taken on trust."""
    if isinstance(evaluation, Predictions):
        yield evaluation
        return
    if not isinstance(evaluation, Iterable) or isinstance(evaluation, Mapping):
        raise _not_an_evaluation(evaluation)
    for predictions in evaluation:
        if not isinstance(predictions, Predictions):
            raise _not_an_evaluation(predictions)
        yield predictions


def _not_an_evaluation(thing: object) -> MicroscaleError:
    return MicroscaleError(
        f"evaluate gave {type(thing).__name__} {thing!r:.60}; it must return Predictions(logits, "
        f"targets), an iterable of them, or a mapping of names to tensors [units]."
    )


def _of_scores(parts: list[Scores], task: Task) -> Measured:
    if not parts:
        raise MicroscaleError("evaluate gave no batch at all: there is nothing to measure.")
    scores = join(parts)
    return Measured(
        task.metric,
        scores.weight,
        _headline(scores, task.metric),
        scores.loss,
        scores.divergence,
        scores.agreement,
    )


def _headline(scores: Scores, metric: str) -> Tensor:
    """What the metric is the mean of, unit by unit."""
    if metric == "agreement" and scores.agreement is None:
        # This is the unquantized model, which agrees with itself.
        return torch.ones_like(scores.weight)
    kinds = {"perplexity": scores.loss, "agreement": scores.agreement, "accuracy": scores.accuracy}
    values = kinds.get(metric, scores.values)
    if values is None:
        raise MicroscaleError(
            f"evaluate gave Predictions without what {metric!r} is made of: targets for accuracy "
            f"and perplexity, marks for a metric of the task's own."
        )
    return values


def _of_mapping(evaluation: Mapping[str, Tensor], advance: Advance) -> Measured:
    figures = {name: _figures(name, values) for name, values in evaluation.items()}
    if not figures:
        raise MicroscaleError("evaluate returned an empty mapping: there is nothing to measure.")
    metric = next(iter(figures))
    lengths = {name: len(values) for name, values in figures.items()}
    if len(set(lengths.values())) > 1:
        raise MicroscaleError(
            f"evaluate returned figures of different numbers of units: {lengths}."
        )
    values = figures[metric]
    advance(len(values))
    return Measured(metric, torch.ones_like(values), values, figures.get("loss"))


def _figures(name: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.dim() != 1 or not len(values) or values.is_complex():
        raise MicroscaleError(
            f"evaluate returned {name!r} with shape {tuple(values.shape)} and dtype "
            f"{values.dtype}; give one real number for each unit, [units], to pair formats by."
        )
    return values.double()
