"""What formats are assigned to: the weights of a layer, and the activations of a layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from torch import Tensor, nn

from microscale.convert import convert, revert
from microscale.operands import Forward, Operand
from microscale.policy import Policy
from microscale.recipes.mixture import Formats, mixture
from microscale.survey import examine, weights
from microscale.watch import Watcher, watching

Side = Literal["weights", "activations"]


@dataclass(frozen=True, slots=True)
class Part:
    """What gets one format.

    Attributes:
        side: whether these are weights or activations.
        modules: whose they are; several where a weight is tied.
        values: number of them, tied weights once; of activations, as many as were cast in one pass
            over the data.
        bits: that they take in each candidate; of stored weights with scales and padding.
        reached: whether the data uses them.
    """

    side: Side
    modules: tuple[str, ...]
    values: int
    bits: tuple[Fraction, ...]
    reached: bool = True

    @property
    def name(self) -> str:
        """The modules, as text."""
        return " = ".join(module or "(model)" for module in self.modules)


@dataclass(slots=True)
class _Group:
    """Modules with weights in common, and for each weight its values and bits by candidate."""

    modules: list[str] = field(default_factory=list)
    sizes: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def add(self, key: int, values: int, place: int, bits: int, candidates: int) -> None:
        """Note a weight in one candidate; of several uses the wider is stored, as by `convert`."""
        _, known = self.sizes.setdefault(key, (values, [0] * candidates))
        known[place] = max(known[place], bits)

    def merge(self, other: "_Group") -> None:
        """Take over another group's modules and weights."""
        self.modules += other.modules
        for key, (values, bits) in other.sizes.items():
            for place, each in enumerate(bits):
                self.add(key, values, place, each, len(bits))

    def part(self, seen: set[str]) -> Part:
        """The group as a part."""
        values = sum(count for count, _ in self.sizes.values())
        bits = zip(*(each for _, each in self.sizes.values()), strict=True)
        reached = any(module in seen for module in self.modules)
        sums = tuple(Fraction(sum(column)) for column in bits)
        return Part("weights", tuple(self.modules), values, sums, reached)


def weight_parts(model: nn.Module, operands: Sequence[Operand], seen: set[str]) -> list[Part]:
    """The weights that `convert` counts, those that share a parameter together.

    `seen` are the modules whose weights the data uses.
    """
    found: dict[str, _Group] = {}
    for place, operand in enumerate(operands):
        policy = Policy(forward=Forward(weight=operand), storage=operand)
        for name, module in model.named_modules():
            finding = examine(name, module, policy)
            if finding is None or finding.entry is None or finding.entry.status == "left":
                continue
            for weight in weights(module, finding.site.policy):
                group = found.setdefault(name, _Group([name]))
                key, count = id(weight.parameter), weight.parameter.numel()
                group.add(key, count, place, weight.bits, len(operands))
    return [group.part(seen) for group in _joined(list(found.values()))]


def _joined(groups: Sequence[_Group]) -> list[_Group]:
    """Groups that have a parameter in common as one, at the place of the first."""
    apart: list[_Group] = []
    for group in groups:
        sharing = [other for other in apart if other.sizes.keys() & group.sizes.keys()]
        if not sharing:
            apart.append(group)
            continue
        for other in (*sharing[1:], group):
            sharing[0].merge(other)
        apart = [other for other in apart if other not in sharing[1:]]
    return apart


def activation_parts(operands: Sequence[Operand], counts: dict[str, int]) -> list[Part]:
    """The activations of each module, by how many values were cast."""
    each = [Fraction(op.format.bits_per_value).limit_denominator(2**20) for op in operands]
    return [
        Part("activations", (name,), count, tuple(count * bits for bits in each))
        for name, count in counts.items()
        if count
    ]


class Marked:
    """A model in one format whose casts can be traced to the module and the side they are of."""

    def __init__(self, model: nn.Module, weight: Operand, activation: Operand | None) -> None:
        self._model = model
        self._homes: dict[int, tuple[str, Side]] = {}
        chosen: dict[str, Formats] = {}
        for name, _ in model.named_modules():
            one = Operand(weight.format, weight.options)
            other = activation and Operand(activation.format, activation.options)
            chosen[name] = one, other
            self._homes[id(one)] = name, "weights"
            self._homes[id(other)] = name, "activations"
        self._policy = mixture(model, (None, None), chosen)
        self._chosen = chosen  # the operands must live as long as their ids are asked for

    def home(self, operand: Operand) -> tuple[str, Side] | None:
        """The module and the side that an operand is of."""
        return self._homes.get(id(operand))

    @contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        """Convert the model for a while, and tell of its casts."""
        convert(self._model, self._policy, verbose=False)
        try:
            with watching(watcher):
                yield
        finally:
            revert(self._model)


@dataclass(slots=True)
class Census:
    """A watcher: which weights are cast, and how many values of activations."""

    marked: Marked
    weights: set[str] = field(default_factory=set)
    activations: dict[str, int] = field(default_factory=dict)

    def __call__(self, x: Tensor, operand: Operand, axis: int, weight: bool) -> None:  # noqa: ARG002
        """Count a cast."""
        home = self.marked.home(operand)
        if home is None:
            return
        name, side = home
        if side == "weights":
            self.weights.add(name)
        else:
            self.activations[name] = self.activations.get(name, 0) + x.numel()
