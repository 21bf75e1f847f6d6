"""What each part of a model loses in each candidate, by one of three measures.

- `divergence`: KL(unquantized || quantized) in nats with this part alone quantized. One pass for
  each part and candidate: the dearest measure, and the one that sees what the model makes of an
  error.
- `output`: squared error of what the layer gives from unquantized inputs, over its squared norm.
  Two passes for each candidate and side.
- `gradient`: what the first-order gradients say of the divergence, 1/2 sum (g (x - cast(x)))^2 with
  g the gradient of the negative log-likelihood of labels drawn from the model itself: the diagonal
  of the Fisher information. One backward pass; gradients are those of the network in MXINT8.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError, near_names
from microscale.operands import Operand
from microscale.recipes.mixture import Formats, mixture
from microscale.recipes.parts import Marked, Part, Side
from microscale.spelling import get_block_format
from microscale.suite.coverage import Recorder
from microscale.suite.measure import Measured, Reference, evaluating
from microscale.suite.predictions import IGNORE, Predictions
from microscale.suite.statistics import mean
from microscale.suite.trial import Progress, Trial
from microscale.weights import cast_values, is_uncast, uncast

Measure = Literal["divergence", "output", "gradient"]
MEASURES = get_args(Measure)
PROBE = "mxint8"
"""A format so fine that the model in it stands for the unquantized one."""

Losses = tuple[tuple[float, ...], ...]
"""[parts][candidates]"""


def check_measure(measure: str) -> Measure:
    """Return the name of a measure; MicroscaleError for one that is not known."""
    if measure in MEASURES:
        return cast("Measure", measure)
    raise MicroscaleError(f"measure {measure!r} is not known.{near_names(measure, MEASURES)}")


def formats_of(part: Part, operand: Operand) -> dict[str, Formats]:
    """The formats of the part's modules with the part in one candidate."""
    pair = (operand, None) if part.side == "weights" else (None, operand)
    return dict.fromkeys(part.modules, pair)


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """The measures of one model: its reference and the candidates of either side."""

    trial: Trial
    base: Measured
    reference: Reference | None
    candidates: Mapping[Side, Sequence[Operand]]
    progress: Progress

    def losses(self, parts: Sequence[Part], measure: Measure) -> Losses:
        """The loss of every part in every candidate; 0 where the data does not use the part."""
        ways: dict[Measure, Callable[[Sequence[Part]], Losses]] = {
            "divergence": self._divergences,
            "output": self._outputs,
            "gradient": self._gradients,
        }
        return _finite(ways[measure](parts))

    def _divergences(self, parts: Sequence[Part]) -> Losses:
        model, found = self.trial.model, []
        for done, part in enumerate(parts):
            self.progress(part.name, done, len(parts))
            row = []
            for operand in self.candidates[part.side]:
                policy = mixture(model, (None, None), formats_of(part, operand))
                if part.reached:
                    with self.trial.converted(policy):
                        row.append(self.divergence().value)
                else:
                    row.append(0.0)
            found.append(tuple(row))
        return tuple(found)

    def divergence(self) -> Any:
        """The divergence of the model as it stands, an Estimate."""
        measured = self.trial.measured(self.base, self.reference, Recorder(), lambda _: None)
        if measured.divergence is None:
            raise MicroscaleError(
                "a search compares logits, and evaluate gave figures alone; have it return "
                "Predictions(logits, targets)."
            )
        return mean(measured.divergence, measured.weight)

    def _outputs(self, parts: Sequence[Part]) -> Losses:
        model, total = self.trial.model, sum(map(len, self.candidates.values()))
        columns: dict[str, list[dict[str, float]]] = {}
        done = 0
        for side, operands in self.candidates.items():
            for operand in operands:
                self.progress(f"outputs, {side} {operand}", done, total)
                pair = (operand, None) if side == "weights" else (None, operand)
                names = [name for part in parts if part.side == side for name in part.modules]
                with self.trial.converted(mixture(model, pair, {})):
                    columns.setdefault(side, []).append(self._errors(names))
                done += 1
        return tuple(
            tuple(sum(each.get(m, 0.0) for m in part.modules) for each in columns[part.side])
            for part in parts
        )

    def _errors(self, names: Sequence[str]) -> dict[str, float]:
        """The relative squared error of each module's output with unquantized inputs."""
        outputs = _Outputs({name: _enclosing(name, names) for name in names})
        with evaluating(self.trial.model, self.trial.seed), ExitStack() as stack:
            for name in names:
                stack.enter_context(outputs.following(name, self.trial.model.get_submodule(name)))
            _in_step(self.trial)
        return outputs.errors()

    def _gradients(self, parts: Sequence[Part]) -> Losses:
        self.progress("gradients", 0, None)
        model = self.trial.model
        probe = Operand(get_block_format(PROBE))
        wide = "activations" not in self.candidates
        marked = Marked(model, probe, None if wide else probe)
        homes = {(m, part.side): place for place, part in enumerate(parts) for m in part.modules}
        taylor = _Taylor(marked, homes, self.candidates)
        generator = torch.Generator().manual_seed(self.trial.seed)
        with evaluating(model, self.trial.seed), marked.watching(taylor), _trainable(model):
            for predictions in _walk(self.trial):
                taylor.backward(_drawn(predictions, generator))
        positions = max(self.base.positions, 1)
        return tuple(
            tuple(
                taylor.sums.get((place, c), 0.0) / positions
                for c in range(len(self.candidates[part.side]))
            )
            for place, part in enumerate(parts)
        )


def _finite(losses: Losses) -> Losses:
    """Losses that can be added: what is not finite is worse than all the others together."""
    worst = sum(loss for row in losses for loss in row if math.isfinite(loss))
    return tuple(
        tuple(max(loss, 0.0) if math.isfinite(loss) else 10 * worst + 1 for loss in row)
        for row in losses
    )


def _enclosing(name: str, names: Sequence[str]) -> str | None:
    """The nearest of `names` that a module is inside of; None for none."""
    around = [other for other in names if other != name and name.startswith(f"{other}.")]
    around += [""] if name and "" in names else []
    return max(around, key=len, default=None)


def _walk(trial: Trial) -> Iterator[Predictions]:
    """The batches of a task."""
    evaluation = trial.task.evaluate(trial.model)
    if isinstance(evaluation, Predictions):
        yield evaluation
    elif isinstance(evaluation, Mapping):
        raise MicroscaleError(
            "this measure runs batches, and evaluate gave figures alone; have it return "
            "Predictions(logits, targets)."
        )
    else:
        yield from evaluation


def _in_step(trial: Trial) -> None:
    """Run each batch twice, first with nothing cast."""
    with uncast():
        wide = _walk(trial)
    quantized = _walk(trial)
    while True:
        with uncast():
            if next(wide, None) is None:
                return
        next(quantized, None)


@dataclass(slots=True)
class _Outputs:
    """What modules get and give with nothing cast, and how far that is from it when they cast.

    Unquantized values go on, into a module and out of it, so that each error is of one module: what
    comes to a module inside another differs by the other's own products alone.
    """

    parents: Mapping[str, str | None]
    kept: dict[str, deque[Any]] = field(default_factory=dict)
    sums: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    @contextmanager
    def following(self, name: str, module: nn.Module) -> Iterator[None]:
        """Compare a module's inputs and outputs call by call."""

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            wide = self._in_step(f"{name} in", (args, kwargs))
            if wide is None:
                return None
            self._compare(self.parents[name], f"{name} in", (args, kwargs), wide)
            return _with_tensors((args, kwargs), iter(_tensors(wide)))

        def after(_: nn.Module, __: object, output: Any) -> Any:
            wide = self._in_step(f"{name} out", output)
            if wide is not None:
                self._compare(name, f"{name} out", output, wide)
            return wide

        handles = (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _in_step(self, place: str, now: Any) -> Any:
        """Keep what is unquantized; give it back when the same call is made quantized."""
        queue = self.kept.setdefault(place, deque())
        if is_uncast():
            queue.append(now)
            return None
        return queue.popleft()

    def _compare(self, name: str | None, place: str, now: Any, wide: Any) -> None:
        if name is None:
            return
        totals = self.sums.setdefault((name, place), [0.0, 0.0])
        for one, other in zip(_tensors(now), _tensors(wide), strict=True):
            totals[0] += float((one.double() - other.double()).square().sum())
            totals[1] += float(other.double().square().sum())

    def errors(self) -> dict[str, float]:
        """The relative squared errors, added over the places where a module's products show."""
        found: dict[str, float] = {}
        for (name, _), (error, norm) in self.sums.items():
            found[name] = found.get(name, 0.0) + (error / norm if norm else 0.0)
        return found


def _with_tensors(given: Any, tensors: Iterator[Tensor]) -> Any:
    """The same arguments with other floating-point tensors; caches and the like stay."""
    if isinstance(given, Tensor):
        return next(tensors) if given.is_floating_point() else given
    if type(given) is dict:
        return {key: _with_tensors(x, tensors) for key, x in given.items()}
    if type(given) in (tuple, list):
        return type(given)(_with_tensors(x, tensors) for x in given)
    return given


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors among what a module is given or returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if type(output) is dict:
        output = list(output.values())
    if type(output) in (tuple, list):
        return [x for item in output for x in _tensors(item)]
    return []


@dataclass(slots=True, eq=False)
class _Taylor:
    """A watcher that asks every operand for its gradient and adds up 1/2 (g (x - cast(x)))^2."""

    marked: Marked
    homes: Mapping[tuple[str, Side], int]
    candidates: Mapping[Side, Sequence[Operand]]
    sums: dict[tuple[int, int], float] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _asked: set[tuple[int, int]] = field(default_factory=set)

    def __call__(self, x: Tensor, operand: Operand, axis: int, weight: bool) -> None:  # noqa: ARG002
        """Ask an operand that is about to be cast for its gradient."""
        home = self.marked.home(operand)
        place = None if home is None else self.homes.get(home)
        # A tied weight gets the gradient of all its uses at once.
        if home is None or place is None or not x.requires_grad or (place, id(x)) in self._asked:
            return
        self._asked.add((place, id(x)))
        found, operands = place, self.candidates[home[1]]

        def add(grad: Tensor) -> None:
            for column, candidate in enumerate(operands):
                error = cast_values(x.detach(), candidate, axis) - x.detach()
                term = 0.5 * float((grad.double() * error).square().sum())
                self.sums[found, column] = self.sums.get((found, column), 0.0) + term

        self._handles.append(x.register_hook(add))

    def backward(self, loss: Tensor) -> None:
        """Add the terms of one batch."""
        if not loss.requires_grad:
            raise MicroscaleError(
                "evaluate gave logits without a gradient; use the measure 'divergence'."
            )
        loss.backward()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._asked.clear()


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Gradients for all parameters and for what the model is given; afterwards all is as it was."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters() if p.is_floating_point()]
    for parameter, _, _ in kept:
        parameter.requires_grad_().grad = None

    def ask(_: nn.Module, args: Any, kwargs: Any) -> Any:
        given = {key: _asking(x) for key, x in kwargs.items()}
        return tuple(_asking(x) for x in args), given

    handle = model.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, requires, grad in kept:
            parameter.requires_grad_(requires).grad = grad


def _asking(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
        return x.detach().requires_grad_()
    return x


def _drawn(predictions: Predictions, generator: torch.Generator) -> Tensor:
    """The negative log-likelihood of labels drawn from the model, summed over valid positions."""
    logits = predictions.logits
    log_p = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    losses = -log_p.gather(1, drawn)[:, 0]
    if predictions.targets is not None:
        losses = losses[predictions.targets.reshape(-1) != IGNORE]
    return losses.sum()
