"""A solved weight put into a model: packed where it can be, else as values.

What a solver rounds to lies on the format's grid, but a cast of these values need not find the
scales again that they were rounded with. Packed as codes and scales they decode to exactly what
was solved. Weights that `save` would not pack either (depthwise kernels, groups that are cut
across) stay plain values that every use casts again, as ever: what is saved and what is evaluated
is then the same cast of the same values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.kernels import reference
from microscale.kernels.plan import Plan
from microscale.kernels.reference import Scales
from microscale.kernels.storage import Layout
from microscale.operands import Operand
from microscale.recipes.grid import Grid
from microscale.recipes.part import Part
from microscale.recipes.solve import Solution
from microscale.scope import site_of
from microscale.survey import Weight, weights
from microscale.tensor import BlockTensor


class Places:
    """Where each parameter of a converted model is held, and how modules would pack it."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[str, list[tuple[nn.Module, str]]] = {}
        self._weights: dict[str, list[Weight]] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._held.setdefault(names[id(parameter)], []).append((module, name))
            site = site_of(module)
            if site is not None and not site.reason:
                for weight in weights(module, site.policy):
                    if weight.operand is not None and id(weight.parameter) in names:
                        self._weights.setdefault(names[id(weight.parameter)], []).append(weight)

    @property
    def expected(self) -> tuple[str, ...]:
        """The parameters that modules of known classes cast."""
        return tuple(self._weights)

    def parameter(self, name: str) -> nn.Parameter:
        """What is held now."""
        module, attribute = self._held[name][0]
        found: nn.Parameter = getattr(module, attribute)
        return found

    def put(self, name: str, parameter: nn.Parameter) -> None:
        """Hold another parameter, wherever this one is held."""
        for module, attribute in self._held[name]:
            setattr(module, attribute, parameter)

    def is_shared(self, name: str) -> bool:
        """Whether more than one module holds it."""
        return len(self._held[name]) > 1

    def operand(self, name: str) -> Operand | None:
        """How a parameter is cast; None if modules differ, or none is known to cast it."""
        found = {weight.operand for weight in self._weights.get(name, [])}
        return found.pop() if len(found) == 1 else None

    def axis(self, name: str) -> int | None:
        """The axis along which a parameter is packed; None if it is not."""
        found = self._weights.get(name, [])
        axes = {weight.axis % weight.parameter.dim() for weight in found}
        packed = all(w.packable and w.bits < w.parameter.nbytes * 8 for w in found)
        return axes.pop() if len(axes) == 1 and packed else None


@dataclass(slots=True, eq=False)
class Solved:
    """Elements, scales and values of a whole parameter, put together from its parts."""

    elements: Tensor
    scales: Tensor
    values: Tensor
    covered: Tensor

    @classmethod
    def of(cls, parameter: Tensor, grid: Grid) -> "Solved":
        """Nothing solved yet: the values are the parameter's."""
        empty = torch.zeros_like(parameter, dtype=grid.compute)
        covered = torch.zeros_like(parameter, dtype=torch.bool)
        return cls(empty, empty.clone(), parameter.detach().clone(), covered)

    def write(self, part: Part, solution: Solution) -> None:
        """Put a part's solution in its place."""
        part.write(solution.elements, self.elements)
        part.write(solution.scales, self.scales)
        part.write(solution.values, self.values)
        part.view(self.covered).fill_(value=True)

    def parameter(self, original: nn.Parameter, grid: Grid, axis: int | None) -> nn.Parameter:
        """What takes the place of the original."""
        if axis is None or not self.covered.all():
            return nn.Parameter(self.values, requires_grad=original.requires_grad)
        return nn.Parameter(self._packed(original, grid, axis), requires_grad=False)

    def _packed(self, original: nn.Parameter, grid: Grid, axis: int) -> BlockTensor:
        fmt = grid.format
        plan = Plan.of(fmt, axis)
        blocks = reference.split(self.scales, plan)
        # Within a block all scales are the same, and the padding of the last one is zero.
        dims = (axis + 1,) if isinstance(fmt.block, int) else plan.reduced(blocks.dim())
        scales = Scales(blocks.amax(dims, keepdim=True), grid.outer)
        elements = reference.split(self.elements, plan)
        stored = reference.store(elements, scales, tuple(original.shape), plan)
        return BlockTensor(stored, Layout.of(plan, original.dtype), original.shape, original.dtype)


def decoded(parameter: Tensor) -> Tensor:
    """The values of a parameter, packed or not."""
    return parameter.dequantize() if isinstance(parameter, BlockTensor) else parameter.detach()
