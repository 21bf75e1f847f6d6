"""Where a loss that is no longer finite began: the first module, or the parameter's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def blame_forward(model: nn.Module, again: Callable[[], None]) -> str:
    """Run `again` and name the first tensor that is not finite: of a weight, input or output."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weight {name!r} is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            for what, tensors in (("input", inputs), ("output", output)):
                if not found and any(not _finite(x) for x in _tensors(tensors)):
                    found.append(f"the {what} of {name!r} is the first that is not finite")

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        again()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "it is finite when the step is run again"


def blame_gradient(model: nn.Module) -> str:
    """Name the gradient that is not finite and was computed first: the backward pass runs up."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name!r} is the first that is not finite"
    return "the norm of the gradient is beyond the largest number"


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for part in x for t in _tensors(part)] if isinstance(x, (tuple, list)) else []
