"""The operands of a model's products, watched while the model runs.

A `Study` follows which module runs and is told of every cast (`microscale.watch`), so it sees what
really is multiplied: grouped channels apart, masked values zeroed, only those rows of an embedding
table that are looked up. Weights are counted once, activations at every call.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from microscale.ledger import Product
from microscale.nn.site import Site
from microscale.operands import PATHS, Forward, Matmul, Operand
from microscale.policy import Policy
from microscale.scope import site_of
from microscale.tally import Figures, Tally
from microscale.watch import watching
from microscale.weights import owner

PRODUCTS_APART = 4
"""Products of two activations in one forward that are told apart; a loop may run thousands."""

_SIDES = {"matmul.left": "left", "matmul.right": "right", "storage": "rows", "cache": "cached"}
_ATTENTION = {
    "scores": {"left": "query", "right": "key"},
    "values": {"left": "probabilities", "right": "value"},
}

Record = TypeVar("Record", bound=Policy | Forward | Matmul)


@dataclass(frozen=True, slots=True)
class Observed:
    """One operand of a module's products.

    Attributes:
        module: the qualified name.
        operand: "input"; a weight by its name in the module; "rows" of an embedding table, as often
            as they were looked up; "cached" keys and values; "query", "key", "probabilities" and
            "value" of attention; "left" and "right" of other products of two activations, numbered
            if there are several.
        format: and how values are cast.
        figures: of its values.
    """

    module: str
    operand: str
    format: str
    figures: Figures

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        names = {"module": self.module, "operand": self.operand, "format": self.format}
        return {**names, **self.figures.to_dict()}


def told_apart(policy: Policy) -> Policy:
    """The same policy, each operand of the forward pass an object of its own.

    So a cast can be traced to the place in the policy that asked for it.
    """
    overrides = tuple(
        (pattern, tuple((path, _copy(setting)) for path, setting in settings))
        for pattern, settings in policy.overrides
    )
    return replace(_copied(policy), overrides=overrides)


def _copied(record: Record) -> Record:
    copies: dict[str, Any] = {f.name: _copy(getattr(record, f.name)) for f in fields(record)}
    return replace(record, **copies)


def _copy(setting: Any) -> Any:
    if isinstance(setting, (Forward, Matmul)):
        return _copied(setting)
    return replace(setting) if isinstance(setting, Operand) else setting


@dataclass(slots=True)
class _Frame:
    """A module that runs: its site, and how often it has begun a product of two activations."""

    site: Site
    begun: Counter[str] = field(default_factory=Counter)


class Study:
    """The operands of a model that was converted by a policy from `told_apart`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(id(parameter), []).append(name)
        self._frames: list[_Frame] = []
        self._tallies: dict[tuple[str, str, int], Tally] = {}
        self._weights: set[tuple[object, ...]] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what the products inside are given."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if site := site_of(module):
                    self._follow(module, site, stack)
            stack.enter_context(watching(self._see))
            yield

    def observed(self, products: Iterable[Product]) -> tuple[Observed, ...]:
        """The operands, those of a module together, in the order in which modules first cast.

        `products` is what ran, as a ledger lists it; it says what is attention.
        """
        attention: dict[str, list[str]] = {}
        for product in products:
            names = attention.setdefault(product.module, [])
            if product.product in _ATTENTION and product.how != "skipped":
                names += [product.product] * (product.product not in names)
        numbers = Counter((module, side) for module, side, _ in self._tallies)
        found: dict[str, list[Observed]] = {}
        for (module, side, number), tally in self._tallies.items():
            label = side if numbers[module, side] == 1 else f"{side} {number}"
            if 0 < number <= len(attention.get(module, ())):
                label = _ATTENTION[attention[module][number - 1]][side]
            entry = Observed(module, label, str(tally.operand), tally.figures())
            found.setdefault(module, []).append(entry)
        return tuple(entry for entries in found.values() for entry in entries)

    def _follow(self, module: nn.Module, site: Site, stack: ExitStack) -> None:
        def enter(*_: object) -> None:
            self._frames.append(_Frame(site))

        def leave(*_: object) -> None:
            self._frames.pop()

        stack.enter_context(module.register_forward_pre_hook(enter))
        stack.enter_context(module.register_forward_hook(leave, always_call=True))

    def _see(self, x: Tensor, operand: Operand, axis: int, weight: bool) -> None:
        if not self._frames:
            return
        frame = self._frames[-1]
        module, number = frame.site.name, 0
        side = self._parameter(module, x) if weight else _side(frame.site.policy, operand)
        if weight:
            place = (module, side, x.storage_offset(), x.shape, x.stride(), axis)
            if place in self._weights:
                return
            self._weights.add(place)
        elif side in ("left", "right"):
            frame.begun[side] += 1
            number = min(frame.begun[side], PRODUCTS_APART)
        self._tallies.setdefault((module, side, number), Tally(operand)).add(x, axis)

    def _parameter(self, module: str, x: Tensor) -> str:
        """The name of a weight: in its module if it is one's own, else in the model."""
        names = self._parameters.get(id(owner(x)), ["weight"])
        prefix = f"{module}." if module else ""
        return next((n.removeprefix(prefix) for n in names if n.startswith(prefix)), names[0])


def _side(policy: Policy, operand: Operand) -> str:
    path = next((path for path in PATHS if policy.setting(path) is operand), "")
    return _SIDES.get(path, "input")
