"""Which weights a model multiplies with and in what order: found out by running it once.

The order in which products run is the order in which weights are solved. What shares an input
shares its statistics and is solved together: queries, keys and values, gate and up projections,
and all parts of one parameter (thirds of an attention's projections, experts of a fused weight).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.recipes.part import Parameters, Part, solvable
from microscale.watch import Product

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stage:
    """Weights that are solved from one pass over the data.

    Attributes:
        inputs: parts by shared input, so by shared statistics.
        first: the number of the first product among all, in the first batch that has one.
        early: whether one of the parameters is looked up before, as a table: it is solved for its
            product, but before everything else, since everything else hears of its rounding.
        after: parts that run only when all products of this stage are done.
    """

    inputs: tuple[tuple[Part, ...], ...]
    first: int
    early: bool
    after: frozenset[Part]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts."""
        return tuple(part for shared in self.inputs for part in shared)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that are solved, once each."""
        return tuple(dict.fromkeys(part.parameter for part in self.parts))


class Trace:
    """Watches the products of one whole pass over the data."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.operands: dict[Part, Operand] = {}
        self.spans: list[dict[Part, Span]] = []
        self.unsolvable: dict[str, str] = {}
        self.index = 0
        self._inputs: dict[Part, int] = defaultdict(int)
        self._source: Tensor | None = None
        self._sources = 0

    def begin(self) -> None:
        """A new batch."""
        self.spans.append({})
        self.index = 0

    def see(self, product: Product) -> None:
        """Note one product."""
        self.index += 1
        if product.source is not self._source:
            # Held on to, lest another tensor takes its place in memory and is taken for it.
            self._source = product.source
            self._sources += 1
        part = self.parameters.part(product)
        if part is None or product.operand is None:
            return
        if not solvable(part, product.left):
            self.unsolvable[part.parameter] = "a batch of matrices times what is no batch of rows"
            return
        known = self.operands.setdefault(part, product.operand)
        if known != product.operand:
            self.unsolvable[part.parameter] = f"it is used as {known} and as {product.operand}"
        if product.kind != "table":
            _check_finite(part, product.left)
        span = self.spans[-1]
        span[part] = span[part][0] if part in span else self.index, self.index
        self._inputs[part] = hash((self._inputs[part], self._sources))

    def end(self) -> None:
        """No more batches."""
        self._source = None

    @property
    def tables(self) -> list[Part]:
        """Parts that are looked up, of parameters that are never multiplied with."""
        multiplied = {p.parameter for p in self.operands if p.kind != "table"}
        every = (p for p in self.operands if p.kind == "table" and p.parameter not in multiplied)
        return [part for part in every if part.parameter not in self.unsolvable]

    def first(self, part: Part) -> int:
        """The number of the first product with a part, in the first batch that has one."""
        return next(span[part][0] for span in self.spans if part in span)

    def span(self, parameter: str) -> Span:
        """First and last product with a parameter, lookups included, in all batches."""
        found = [span[part] for span in self.spans for part in span if part.parameter == parameter]
        return min(first for first, _ in found), max(last for _, last in found)

    def stages(self) -> list[Stage]:
        """What is solved together, in the order of execution."""
        self._check_ties()
        multiplied = [
            part
            for part in sorted(self.operands, key=self.first)
            if part.kind != "table" and part.parameter not in self.unsolvable
        ]
        groups = _connected(multiplied, self._inputs)
        stages = [self._stage(group, multiplied) for group in groups]
        return sorted(stages, key=lambda stage: (not stage.early, stage.first))

    def _check_ties(self) -> None:
        formats: dict[str, set[Operand]] = defaultdict(set)
        for part, operand in self.operands.items():
            formats[part.parameter].add(operand)
        for name, operands in formats.items():
            if len(operands) > 1:
                spelled = " and as ".join(sorted(map(str, operands)))
                self.unsolvable[name] = f"it is used as {spelled}"
        for name in formats:
            if len({p.rotation for p in self.operands if p.parameter == name}) > 1:
                self.unsolvable[name] = "it is rotated in one product and not in another"

    def _stage(self, group: Sequence[Part], multiplied: Sequence[Part]) -> Stage:
        shared: dict[int, list[Part]] = defaultdict(list)
        for part in group:
            shared[self._inputs[part]].append(part)
        tables = {part.parameter for part in self.operands if part.kind == "table"}
        return Stage(
            tuple(map(tuple, shared.values())),
            min(map(self.first, group)),
            any(part.parameter in tables for part in group),
            self._after(group, multiplied),
        )

    def _after(self, group: Sequence[Part], multiplied: Sequence[Part]) -> frozenset[Part]:
        """The parts that in no batch run before the last product of a group."""
        early = set(group)
        for span in self.spans:
            last = max((span[own][1] for own in group if own in span), default=0)
            early.update(part for part, (first, _) in span.items() if first < last)
        return frozenset(multiplied) - early


def _connected(parts: Iterable[Part], inputs: dict[Part, int]) -> list[list[Part]]:
    """Join parts of one parameter, and parts of one input, and what these join."""
    home: dict[object, list[Part]] = {}
    for part in parts:
        keys = part.parameter, inputs[part]
        first, second = (home.get(key) for key in keys)
        group = first if first is not None else [] if second is None else second
        if first is not None and second is not None and first is not second:
            first += second
            for other in second:
                home[other.parameter] = home[inputs[other]] = first
        group.append(part)
        home[keys[0]] = home[keys[1]] = group
    return list({id(group): group for group in home.values()}.values())


def _check_finite(part: Part, left: Tensor) -> None:
    if not left.isfinite().all():
        raise MicroscaleError(
            f"{part.parameter!r} is multiplied with {int((~left.isfinite()).sum())} values that "
            "are NaN or infinite, already in the float network; leave such samples out."
        )
