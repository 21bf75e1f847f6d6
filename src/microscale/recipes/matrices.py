"""Layers that are one matrix product: found by class, their weights seen as [out, in]."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

TRANSPOSED = "Conv1D"
"""A class of transformers: a linear layer whose weight is stored [in, out]."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is exactly a linear layer, of PyTorch or of GPT-2."""
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out]."""
    kind = type(module)
    return kind.__name__ == TRANSPOSED and kind.__module__.startswith("transformers.")


def matrix_of(module: nn.Module) -> Tensor:
    """The weight as [out, in], a view."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The matrix layers of a model whose weights are used by nothing else, by name."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if is_matrix(module) and uses[id(module.get_parameter("weight"))] == 1
    }


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer without bias, of a weight [out, in]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=torch.device("meta"))
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return made


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the one called `name`, and its attribute there."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def tensors_in(things: object) -> Iterator[Tensor]:
    """The tensors among arguments, nested lists and dictionaries included."""
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, dict):
        for value in things.values():
            yield from tensors_in(value)
    elif isinstance(things, (tuple, list)):
        for value in things:
            yield from tensors_in(value)
