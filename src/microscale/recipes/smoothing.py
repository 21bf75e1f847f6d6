"""SmoothQuant: outliers of an input are moved into the weight that it is multiplied with.

Each channel of the input is divided by s = max|x|^a / max|w|^(1 - a), each column of the weight
multiplied by it (arXiv 2211.10438; a = 0.5). Layers with the same input have the same s, from the
largest of their weights. Where the input comes from a normalisation or a linear layer and goes
nowhere else, the division is folded into what that layer computes; elsewhere it is a division at
run time. What goes where is found by running the model, and the outcome is compared with what the
model gave before.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from microscale.errors import MicroscaleError
from microscale.recipes.batch import Batch, run
from microscale.recipes.groups import channel_ranges
from microscale.recipes.matrices import is_transposed, matrices, matrix_of, tensors_in
from microscale.suite.measure import evaluating

STRENGTH = 0.5
"""The a of SmoothQuant: how much of the outliers moves into the weight."""

TOLERANCE = 1e-3
"""How far outputs may move, relative to their largest magnitude: rounding of float32 alone."""

_LOOKS = frozenset({"__get__", "size", "dim", "stride", "is_contiguous", "numel"})
"""Functions of a tensor that use no value of it."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Layers whose inputs are divided: by what comes before them, or at run time.

    A division at run time is no part of the state dict.
    """

    folded: tuple[str, ...]
    at_run_time: tuple[str, ...]

    def __str__(self) -> str:
        """Return how many of either."""
        return f"{len(self.folded)} folded, {len(self.at_run_time)} divided at run time"


def smooth(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    names: Collection[str] | None = None,
    strength: float = STRENGTH,
) -> Smoothing:
    """Move outliers of the inputs of linear layers into their weights, in place.

    Args:
        model: any module, not converted.
        batches: what the model is called with.
        names: of linear layers, and with them all that share their input; None: all. What shares
            its weight, runs more than once in a call or is not reached stays as it is.
        strength: between 0 (weights are left alone) and 1.

    Returns:
        What was smoothed, and where the division went.

    Raises:
        MicroscaleError: a strength beyond 0 to 1; outputs that moved by more than rounding (the
            model is then as it was).
    """
    if not 0 <= strength <= 1:
        raise MicroscaleError(f"strength is {strength:g}; it lies between 0 and 1.")
    layers = matrices(model)
    trace, before = _traced(model, layers, batches)
    ranges = channel_ranges(model, layers, batches)
    folded: list[str] = []
    divided: list[str] = []
    change = _Change()
    for source, group in trace.groups():
        if names is not None and not set(names) & set(group):
            continue
        largest = torch.stack([torch.maximum(-ranges[n][0], ranges[n][1]) for n in group]).amax(0)
        weights = torch.stack([matrix_of(layers[n]).abs().amax(0) for n in group]).amax(0)
        scale = _scale(largest, weights, strength)
        for name in group:
            change.multiply(layers[name], scale)
        producer = trace.producer(source, group)
        if producer is not None and change.divide(producer, scale):
            folded += group
        else:
            divided += group
            for name in group:
                change.divide_input(layers[name], scale)
    with evaluating(model, 0):
        moved = _distance(list(tensors_in(run(model, batches[0]))), before)
    if not moved <= TOLERANCE:
        change.undo()
        raise MicroscaleError(
            f"smoothing moved the model's outputs by {moved:.2g} of their largest magnitude, so "
            "its layers are not what they seem; leave it out."
        )
    return Smoothing(tuple(folded), tuple(divided))


def _scale(largest: Tensor, weights: Tensor, strength: float) -> Tensor:
    known = (largest > 0) & (weights > 0)
    scale = largest.clamp(min=1e-5) ** strength / weights.clamp(min=1e-5) ** (1 - strength)
    return torch.where(known, scale, 1.0)


def _distance(found: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """The largest difference of two outputs, relative to the largest magnitude."""
    floats = [(x, y) for x, y in zip(found, before, strict=True) if y.is_floating_point()]
    most = max((float(y.abs().max()) for _, y in floats if y.numel()), default=0.0)
    lost = max((float((x - y).abs().max()) for x, y in floats if y.numel()), default=0.0)
    return lost / most if most else lost


# ---------------------------------------------------------------- what goes where


@dataclass(slots=True, eq=False)
class _Trace(TorchFunctionMode):
    """Inputs of matrix layers, who made them, and who else uses them, in one call of the model."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    uses: list[Tensor] = field(default_factory=list)
    calls: Counter[int] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    inside: int = 0

    def __post_init__(self) -> None:
        """Make it a mode."""
        TorchFunctionMode.__init__(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note which tensors are used outside of matrix layers."""
        result = func(*args, **(kwargs or {}))
        if not self.inside and getattr(func, "__name__", "") not in _LOOKS:
            self.uses += [x for x in tensors_in((args, kwargs)) if x is not result]
        return result

    def groups(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Inputs with the layers that have them, of layers that run once."""
        found: dict[int, tuple[Tensor, list[str]]] = {}
        for name, x in self.inputs.items():
            if self.runs[name] == 1:
                found.setdefault(id(x), (x, []))[1].append(name)
        yield from found.values()

    def producer(self, x: Tensor, group: list[str]) -> nn.Module | None:
        """The module whose output goes to these layers alone, if it runs once."""
        made = [module for module, y in self.outputs if y is x]
        # Layers that run more than once are no part of a group, but use the tensor all the same.
        others = any(y is x for n, y in self.inputs.items() if n not in group)
        if not made or others or self.calls[id(made[0])] != 1:
            return None
        return None if any(y is x for y in self.uses) else made[0]


def _traced(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Batch]
) -> tuple[_Trace, list[Tensor]]:
    """One call of the model with everything noted, and what it gave."""
    trace = _Trace()
    with ExitStack() as stack:
        for module in model.modules():
            if not _is_scaled(module):
                continue
            stack.enter_context(_following(module, trace))
        for name, layer in layers.items():
            stack.enter_context(_entering(name, layer, trace))
        with evaluating(model, 0), trace:
            result = run(model, batches[0])
    # What the model gives away is used.
    trace.uses += list(tensors_in(result))
    return trace, [x.clone() for x in tensors_in(result)]


@contextmanager
def _following(module: nn.Module, trace: _Trace) -> Iterator[None]:
    def leave(_: nn.Module, __: object, output: object) -> None:
        trace.calls[id(module)] += 1
        if isinstance(output, Tensor):
            trace.outputs.append((module, output))

    handle = module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _entering(name: str, layer: nn.Module, trace: _Trace) -> Iterator[None]:
    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        trace.inside += 1
        trace.runs[name] += 1
        trace.inputs[name] = args[0]

    def leave(*_: object) -> None:
        trace.inside -= 1

    handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_scaled(module: nn.Module) -> bool:
    """Whether what a module gives is proportional to its weight and bias, by channels."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    norm = type(module) is nn.LayerNorm or name.endswith("RMSNorm")
    return (norm and weight.dim() == 1) or type(module) is nn.Linear or is_transposed(module)


# ---------------------------------------------------------------- changes that can be undone


class _DivideInput:
    """A hook that divides the input of a layer."""

    def __init__(self, scale: Tensor) -> None:
        """Keep the divisors [in]."""
        self.scale = scale

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the arguments, the first divided."""
        return args[0] / self.scale.to(args[0].dtype), *args[1:]


@dataclass(slots=True, eq=False)
class _Change:
    """Values of parameters as they were, and hooks that were added."""

    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hooks: list[Callable[[], None]] = field(default_factory=list)

    def multiply(self, layer: nn.Module, scale: Tensor) -> None:
        """Multiply the columns of a matrix layer's weight."""
        weight = matrix_of(layer)
        self._hold(weight)
        weight.mul_(scale)

    def divide(self, producer: nn.Module, scale: Tensor) -> bool:
        """Divide what a module gives by changing its parameters; False if they are shared."""
        bias = getattr(producer, "bias", None)
        weight = producer.get_parameter("weight").detach()
        rows = matrix_of(producer) if weight.dim() == 2 else weight
        if len(rows) != len(scale):
            return False
        self._hold(rows)
        rows.div_(scale.unsqueeze(1) if rows.dim() == 2 else scale)
        if isinstance(bias, nn.Parameter):
            self._hold(bias.detach())
            bias.detach().div_(scale)
        return True

    def divide_input(self, layer: nn.Module, scale: Tensor) -> None:
        """Divide what a layer is given, at run time."""
        self.hooks.append(layer.register_forward_pre_hook(_DivideInput(scale)).remove)

    def undo(self) -> None:
        """Put back what was there."""
        for x, before in reversed(self.held):
            x.copy_(before)
        for remove in self.hooks:
            remove()

    def _hold(self, x: Tensor) -> None:
        self.held.append((x, x.clone()))
