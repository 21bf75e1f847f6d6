"""Inputs split into groups of channels of like range, each with a range of its own.

A layer whose input has a few channels of large values is replaced by a sum of layers, one for each
group of channels, ordered by their range (per-embedding-group quantization, arXiv 2109.12948, with
the permutation). Nothing changes in the unquantized model but the order of sums; quantized, each
group has its own scale, and so has its part of the weight.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.recipes.batch import Batch, run
from microscale.recipes.matrices import linear_of, matrices, matrix_of, parent_of
from microscale.suite.measure import evaluating

GROUPS = 4
"""Into how many groups the channels of an input are split."""


class Grouped(nn.Module):
    """A linear layer as a sum over groups of input channels."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, groups: Sequence[Tensor]) -> None:
        """Take a weight [out, in] apart by the channels of each group."""
        super().__init__()
        self.parts = nn.ModuleList(linear_of(weight[:, channels]) for channels in groups)
        self.bias = bias
        for number, channels in enumerate(groups):
            self.register_buffer(f"channels{number}", channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for an input [..., in]."""
        given = (
            x.index_select(-1, self.get_buffer(f"channels{i}")) for i in range(len(self.parts))
        )
        terms = [part(x) for part, x in zip(self.parts, given, strict=True)]
        total: Tensor = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
        return total if self.bias is None else total + self.bias


def split_inputs(
    model: nn.Module, names: Collection[str], batches: Sequence[Batch], *, groups: int = GROUPS
) -> tuple[str, ...]:
    """Split the inputs of the linear layers called `names` into groups of like range, in place.

    Args:
        model: any module, not converted.
        names: of modules; those that are no linear layers, share their weight or are not reached
            stay as they are.
        batches: what the model is called with, from which the ranges of channels are.
        groups: how many; at most as many as a layer has channels.

    Returns:
        The names of what was split.

    Raises:
        MicroscaleError: fewer than 2 groups.
    """
    if groups < 2:
        raise MicroscaleError(f"groups is {groups}; at least 2 make a difference.")
    layers = {name: layer for name, layer in matrices(model).items() if name in names}
    found = channel_ranges(model, layers, batches)
    for name, (low, high) in found.items():
        layer = layers[name]
        order = (high - low).argsort(stable=True)
        bias = getattr(layer, "bias", None)
        apart = [chunk.sort().values for chunk in order.chunk(groups)]
        parent, own = parent_of(model, name)
        setattr(parent, own, Grouped(matrix_of(layer), bias, apart))
    return tuple(found)


def channel_ranges(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and greatest value of each channel of the inputs of those layers that run."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            if not len(rows):
                return
            low, high = rows.amin(0), rows.amax(0)
            before = found.get(name, (low, high))
            found[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

        return note

    handles = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    try:
        with evaluating(model, 0):
            for batch in batches:
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in layers if name in found}
