"""FP8 against INT8 on one model, after arXiv 2303.17951: which format of 8 bits loses least.

Every format gets the best of a grid of estimators: scales of weights per tensor or per channel, by
minmax or least squared error; inputs per tensor, by minmax, running minmax or least squared error,
integers with and without a zero point; batch norms as they are or estimated again. The best is the
one with the least squared error of the model's outputs on calibration data, which are every
`EVERY`th batch of the task; it is then measured on the others, which had no part in the choice.
Ranges of inputs are those of the network before any rounding.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from microscale.conversion import Conversion
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.formats import FP32, BlockFormat, ElementFormat, WholeBlock
from microscale.kernels import reference
from microscale.kernels.reference import Scales
from microscale.policy import Policy
from microscale.ranges import Sample, least_error
from microscale.recipes.batch import Batch, run
from microscale.recipes.ranges import (
    gather,
    reestimate_batch_norms,
    settle_inputs,
    settle_weights,
)
from microscale.suite.accuracy import ELEMENTS, Layer
from microscale.suite.contest import Contest, Result
from microscale.suite.coverage import Recorder
from microscale.suite.measure import Measured, Reference, evaluating, measure, measure_reference
from microscale.suite.predictions import Predictions
from microscale.suite.rows import Figures, Row
from microscale.suite.size import Size, main_dtype
from microscale.suite.task import Evaluate, Evaluation, Task
from microscale.suite.trial import Progress, Trial
from microscale.tensor import BlockTensor

EVERY = 4
"""One batch of so many is for calibration."""

WEIGHT_BLOCKS: tuple[WholeBlock, ...] = ("tensor", "channel")
WEIGHT_ESTIMATORS = ("mse", "minmax")
INPUT_ESTIMATORS = ("mse", "minmax", "running")


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
        The table of formats, conversions of the FP8-E4 network, and the layers' outliers.

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
class _Choice:
    """One point of the grid."""

    weight: BlockFormat
    input: BlockFormat | None
    weights: str
    batch_norm: bool

    def words(self, inputs: str) -> str:
        """The estimators as the report names them."""
        said = [f"weights per {self.weight.block}, {self.weights}"]
        if self.input is not None:
            said.append(f"inputs {inputs}{', zero point' if self.input.zero_point else ''}")
        return "; ".join([*said, *(["batch norms again"] * self.batch_norm)])


@dataclass(slots=True, eq=False)
class _Best:
    """The best so far: a converted model, how it was made, and its error."""

    model: nn.Module
    conversion: Conversion
    words: str
    error: float


@dataclass(slots=True, eq=False)
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
            wide = [_output(run(trial.model, call)) for call in calls]
        judge = _Judge(trial, rest, base, known, calls, wide, self.progress)
        kind = str(main_dtype(trial.model)).removeprefix("torch.")
        plain = Row(kind, *_size(Size.plain(trial.model)), Figures.of(base), 0.0)
        found = {
            label: judge.result(label, trial.model, element, element)
            for label, element in ELEMENTS.items()
        }
        results = [result for result, _ in found.values()]
        narrow = _decoded(found["E4"][1])
        int8, int4 = ELEMENTS["INT8"], ElementFormat(0, 2, "finite", 0)
        for label, source, weight, given in (
            ("E4 -> INT8", narrow, int8, int8),
            ("E4 -> W8A16", narrow, int8, None),
            ("W8A16", trial.model, int8, None),
            ("W4A8", trial.model, int4, int8),
        ):
            results.append(judge.result(label, source, weight, given)[0])
        return Contest(
            model=name,
            metric=base.metric,
            unit=task.unit,
            units=base.units,
            about=f"{task.about or f'{base.units} {task.unit}s'}; one batch of {EVERY} calibrates",
            seed=trial.seed,
            base=plain,
            results=tuple(results),
            layers=tuple(_layers(trial, calls)),
            notes=task.notes,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Judge:
    """Chooses estimators on calibration data and measures on the other."""

    trial: Trial
    task: Task
    base: Measured
    known: Reference | None
    calls: list[Batch]
    wide: list[Tensor]
    progress: Progress
    samples: dict[int, dict[str, Sample]] = field(default_factory=dict)
    """The inputs of layers by the identity of the network they are of."""

    def result(
        self,
        label: str,
        source: nn.Module,
        weight: ElementFormat,
        given: ElementFormat | None,
    ) -> tuple[Result, nn.Module]:
        """The best of the grid, measured, and the model."""
        start = time.perf_counter()
        best = self._best(label, source, list(_grid(source, weight, given)))
        with evaluating(best.model, self.trial.seed):
            measured = measure(best.model, self.task, self.known, Recorder(), lambda _: None)
        size = _size(Size.converted(best.conversion, best.model))
        figures = Figures.of(measured, self.base)
        row = Row(label, *size, figures, time.perf_counter() - start)
        return Result(row, best.words, best.error), best.model

    def _best(self, label: str, source: nn.Module, grid: list[_Choice]) -> _Best:
        best: _Best | None = None
        if id(source) not in self.samples:
            self.samples[id(source)] = _inputs(source, self.calls, self.trial.seed)
        samples = self.samples[id(source)]
        for number, choice in enumerate(grid):
            self.progress(label, number, len(grid))
            for one in self._tried(source, choice, samples):
                if best is None or one.error < best.error:
                    best = one
        assert best is not None
        return best

    def _tried(
        self, source: nn.Module, choice: _Choice, samples: dict[str, Sample]
    ) -> Iterator[_Best]:
        model = copy.deepcopy(source)
        policy = Policy.of(choice.weight, choice.input)
        conversion = convert(model, policy, verbose=False)
        with evaluating(model, self.trial.seed):
            settle_weights(model, choice.weights)
            if choice.batch_norm:
                reestimate_batch_norms(model, self.calls)
            if choice.input is None:
                yield _Best(model, conversion, choice.words(""), self._error(model))
                return
            policies = {e: settle_inputs(model, samples, e)[0] for e in INPUT_ESTIMATORS}
        for estimator, settled in policies.items():
            one = copy.deepcopy(model)
            conversion = convert(one, settled, verbose=False)
            with evaluating(one, self.trial.seed):
                error = self._error(one)
            yield _Best(one, conversion, choice.words(estimator), error)

    def _error(self, model: nn.Module) -> float:
        """Squared error of the outputs on calibration data, relative to their variance."""
        lost = energy = 0.0
        for call, wide in zip(self.calls, self.wide, strict=True):
            wanted = wide.double()
            lost += float((_output(run(model, call)).double() - wanted).square().sum())
            energy += float((wanted - wanted.mean()).square().sum())
        error = lost / energy if energy else lost
        return error if math.isfinite(error) else math.inf


def _grid(
    model: nn.Module, weight: ElementFormat, given: ElementFormat | None
) -> Iterator[_Choice]:
    norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    inputs: list[BlockFormat | None] = [None if given is None else _whole(given)]
    if given is not None and given.is_integer:
        inputs.append(BlockFormat(given, FP32, "tensor", zero_point=True))
    for block, one, estimator, again in product(
        WEIGHT_BLOCKS, inputs, WEIGHT_ESTIMATORS, (False, True) if norms else (False,)
    ):
        yield _Choice(replace(_whole(weight), block=block), one, estimator, again)


def _whole(element: ElementFormat) -> BlockFormat:
    return BlockFormat(element, FP32, "tensor")


def _size(size: Size) -> tuple[float, float]:
    return size.bits_per_weight, size.megabytes


def _decoded(model: nn.Module) -> nn.Module:
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


def _output(result: Any) -> Tensor:
    """The first tensor of floats of what a model gave."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, Tensor) and result.is_floating_point():
        return result.detach()
    for part in result if isinstance(result, (tuple, list)) else ():
        if isinstance(part, Tensor) and part.is_floating_point():
            return part.detach()
    raise MicroscaleError(f"the model gave a {type(result).__name__} without a tensor of floats.")


def _layers(trial: Trial, calls: list[Batch]) -> Iterator[Layer]:
    """Weights and inputs of the unquantized model, by layer."""
    for name, sample in _inputs(trial.model, calls, trial.seed).items():
        yield _layer(name, "input", sample)
        weight = getattr(trial.model.get_submodule(name), "weight", None)
        if isinstance(weight, nn.Parameter):
            whole = Sample()
            whole.add(weight)
            yield _layer(name, "weight", whole)


def _inputs(source: nn.Module, calls: list[Batch], seed: int) -> dict[str, Sample]:
    """What the inputs of layers are, without any rounding."""
    model = copy.deepcopy(source)
    convert(model, str(_whole(ELEMENTS["INT8"])), verbose=False)
    with evaluating(model, seed):
        return gather(model, calls)


def _layer(name: str, operand: str, sample: Sample) -> Layer:
    x, weights = sample.values.double(), sample.weights
    total = float(weights.sum())
    mean = float((x * weights).sum()) / total
    square = float((x.square() * weights).sum()) / total
    variance = float(((x - mean).square() * weights).sum()) / total
    fourth = float(((x - mean) ** 4 * weights).sum()) / total
    most = max(abs(sample.low), abs(sample.high))
    bits = {label: _bits(sample, element, variance) for label, element in ELEMENTS.items()}
    return Layer(
        module=name,
        operand=operand,
        crest=most / math.sqrt(square) if square else math.nan,
        kurtosis=fourth / variance**2 if variance else math.nan,
        bits=bits,
    )


def _bits(sample: Sample, element: ElementFormat, variance: float) -> float:
    """Bits of accuracy, log2(sigma / RMSE), of the best range per tensor."""
    rows, fmt = sample.values.unsqueeze(0), _whole(element)
    scales: Scales = least_error(rows, fmt, sample.weights)
    quotient = reference.round_to_grid(rows / scales.block, element)
    errors = (rows.double() - (quotient * scales.block).double()).square()
    error = float((errors * sample.weights).sum() / sample.weights.sum())
    if not variance or not error:
        return math.nan
    return math.log2(math.sqrt(variance / error))
