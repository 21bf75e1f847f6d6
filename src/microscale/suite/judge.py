"""The best of a grid of estimators for one format of weights and one of inputs.

Weights get a scale per tensor or per channel, by minmax, percentile or least squared error, and
batch norms are as they are or estimated again; of these, the best with inputs left alone is kept.
Then inputs get a scale per tensor by minmax, running minmax, percentile or least squared error,
integers with and without a zero point. Best is the least squared error of the model's outputs on
the calibration data. The two choices are made one after the other because the errors of weights and
inputs add up, nearly; the whole grid would take several times as long (docs/log.md compares them).
"""

import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from microscale.conversion import Conversion
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.formats import FP32, BlockFormat, ElementFormat, WholeBlock
from microscale.policy import Policy
from microscale.ranges import Sample
from microscale.recipes.batch import Batch, run
from microscale.recipes.ranges import (
    gather,
    reestimate_batch_norms,
    settle_inputs,
    settle_weights,
)
from microscale.suite.accuracy import ELEMENTS
from microscale.suite.contest import Result
from microscale.suite.coverage import Recorder
from microscale.suite.measure import Measured, Reference, evaluating, measure
from microscale.suite.outliers import whole
from microscale.suite.rows import Figures, Row
from microscale.suite.size import Size
from microscale.suite.task import Task
from microscale.suite.trial import Progress
from microscale.tensor import BlockTensor

WEIGHT_BLOCKS: tuple[WholeBlock, ...] = ("tensor", "channel")
WEIGHT_ESTIMATORS = ("mse", "minmax", "percentile")
INPUT_ESTIMATORS = ("mse", "minmax", "running", "percentile")

ENOUGH = 64
"""Estimators are chosen on the first batches that hold so many samples; ranges are from all."""


@dataclass(slots=True, eq=False)
class Candidate:
    """A converted model, how it was made, and its error on the calibration data."""

    model: nn.Module
    conversion: Conversion
    words: str
    error: float
    weight: BlockFormat


@dataclass(slots=True, eq=False)
class Judge:
    """Chooses estimators on calibration data and measures on the other.

    Attributes:
        task: the data to measure on.
        base: the unquantized model on them.
        known: its logits.
        calls: what the model is called with to calibrate.
        wide: what the unquantized model gives for these.
        seed: of torch's random numbers.
        progress: told what runs.
    """

    task: Task
    base: Measured
    known: Reference | None
    calls: Sequence[Batch]
    wide: Sequence[Tensor]
    seed: int
    progress: Progress
    _weights: dict[tuple[nn.Module, ElementFormat], Candidate] = field(default_factory=dict)
    _samples: dict[nn.Module, dict[str, Sample]] = field(default_factory=dict)

    def result(
        self,
        label: str,
        source: nn.Module,
        weight: ElementFormat,
        given: ElementFormat | None,
        wide: Collection[str] = (),
    ) -> tuple[Result, nn.Module]:
        """The best of the grid, measured, and the model.

        Args:
            label: in the report.
            source: an unquantized model.
            weight: the element of all weights.
            given: that of all inputs; None leaves them alone.
            wide: modules whose inputs are left alone nevertheless.
        """
        start = time.perf_counter()
        best = self._best_weights(label, source, weight)
        if given is not None:
            best = self._best_inputs(label, source, best, given, wide)
        with evaluating(best.model, self.seed):
            measured = measure(best.model, self.task, self.known, Recorder(), lambda _: None)
        size = Size.converted(best.conversion, best.model)
        figures = Figures.of(measured, self.base)
        seconds = time.perf_counter() - start
        row = Row(label, size.bits_per_weight, size.megabytes, figures, seconds)
        return Result(row, best.words, best.error), best.model

    def _best_weights(self, label: str, source: nn.Module, element: ElementFormat) -> Candidate:
        key = source, element
        if key not in self._weights:
            norms = any(isinstance(module, _BatchNorm) for module in source.modules())
            blocks = [replace(whole(element), block=block) for block in WEIGHT_BLOCKS]
            grid = list(product(blocks, WEIGHT_ESTIMATORS, (False, True) if norms else (False,)))
            self._weights[key] = self._best(
                f"{label}, weights", len(grid), (self._rounded(source, *one) for one in grid)
            )
        return self._weights[key]

    def _rounded(
        self, source: nn.Module, fmt: BlockFormat, estimator: str, again: bool
    ) -> Candidate:
        model = copy.deepcopy(source)
        conversion = convert(model, Policy.of(fmt), verbose=False)
        words = f"weights per {fmt.block}, {estimator}" + "; batch norms again" * again
        with evaluating(model, self.seed):
            settle_weights(model, estimator)
            if again:
                reestimate_batch_norms(model, self.calls)
            return Candidate(model, conversion, words, self._error(model), fmt)

    def _best_inputs(
        self,
        label: str,
        source: nn.Module,
        weights: Candidate,
        element: ElementFormat,
        wide: Collection[str],
    ) -> Candidate:
        if source not in self._samples:
            self._samples[source] = inputs_of(source, self.calls, self.seed)
        samples = self._samples[source]
        formats = [whole(element)]
        if element.is_integer:
            formats.append(BlockFormat(element, FP32, "tensor", zero_point=True))
        grid = list(product(formats, INPUT_ESTIMATORS))
        model = copy.deepcopy(weights.model)
        settle = self._settle(model, weights, samples, wide)
        found = self._best(f"{label}, inputs", len(grid), (settle(*one) for one in grid))
        # All of the grid is one model; it is made again as it was best.
        conversion = convert(model, found.conversion.policy, verbose=False)
        return replace(found, model=model, conversion=conversion)

    def _settle(
        self,
        model: nn.Module,
        weights: Candidate,
        samples: Mapping[str, Sample],
        wide: Collection[str],
    ) -> Callable[[BlockFormat, str], Candidate]:
        def settled(fmt: BlockFormat, estimator: str) -> Candidate:
            convert(model, Policy.of(weights.weight, fmt), verbose=False)
            policy, _ = settle_inputs(model, samples, estimator, wide)
            conversion = convert(model, policy, verbose=False)
            words = f"{weights.words}; inputs {estimator}" + ", zero point" * fmt.zero_point
            with evaluating(model, self.seed):
                return Candidate(model, conversion, words, self._error(model), weights.weight)

        return settled

    def _best(self, label: str, count: int, candidates: Iterator[Candidate]) -> Candidate:
        best: Candidate | None = None
        self.progress(label, 0, count)
        for number, one in enumerate(candidates, 1):
            if best is None or one.error < best.error:
                best = one
            self.progress(label, number, count)
        assert best is not None
        return best

    def _error(self, model: nn.Module) -> float:
        """Squared error of the outputs on `ENOUGH` samples, relative to their variance."""
        lost = energy = 0.0
        seen = 0
        for call, wide in zip(self.calls, self.wide, strict=True):
            if seen >= ENOUGH:
                break
            seen += len(wide) if wide.dim() else 1
            wanted = wide.double()
            lost += float((output_of(run(model, call)).double() - wanted).square().sum())
            energy += float((wanted - wanted.mean()).square().sum())
        error = lost / energy if energy else lost
        return error if math.isfinite(error) else math.inf


def inputs_of(source: nn.Module, calls: Sequence[Batch], seed: int) -> dict[str, Sample]:
    """What the inputs of an unquantized model's layers are."""
    model = copy.deepcopy(source)
    convert(model, str(whole(ELEMENTS["INT8"])), verbose=False)
    with evaluating(model, seed):
        return gather(model, calls)


def output_of(result: Any) -> Tensor:
    """The first tensor of floats of what a model gave. Raises MicroscaleError if there is none."""
    parts = result
    if isinstance(result, Mapping):
        parts = tuple(result.values())
    if isinstance(result, Tensor):
        parts = (result,)
    for part in parts if isinstance(parts, (tuple, list)) else ():
        if isinstance(part, Tensor) and part.is_floating_point():
            return part.detach()
    raise MicroscaleError(f"the model gave a {type(result).__name__} without a tensor of floats.")


def decoded(model: nn.Module) -> nn.Module:
    """A copy that is not converted, its packed weights as the values they stand for."""
    model = copy.deepcopy(model)
    revert(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, BlockTensor):
                made.setdefault(id(parameter), nn.Parameter(parameter.dequantize()))
                setattr(module, name, made[id(parameter)])
    return model
