"""What a converted layer is held to: PyTorch's function, and products on cast operands."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from microscale.convert import convert
from product_spy import ProductSpy

SPELLING = "mxfp4/mxfp6_e2m3"


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a layer's result, however nested."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors(part)


def converted(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    convert(twin, SPELLING, verbose=False)
    assert type(twin) is not type(layer)
    return twin


def assert_same_function(layer: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    """Results and all gradients agree with PyTorch's; needs casts that change nothing."""
    twin = converted(layer)
    outcomes = []
    for module in (layer, twin):
        torch.manual_seed(1)
        module.zero_grad()
        results = list(tensors(call(module)))
        sum(x.square().sum() for x in results).backward()  # type: ignore[union-attr]
        outcomes.append(results + [p.grad for p in module.parameters() if p.grad is not None])
    assert len(outcomes[0]) == len(outcomes[1])
    for expected, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def assert_products(
    layer: nn.Module, call: Callable[[nn.Module], Any], left: str | None = "mxfp6_e2m3"
) -> int:
    """Every product is on cast operands and within its bound; returns their number."""
    twin = converted(layer)
    with torch.no_grad(), ProductSpy() as spy:
        call(twin)
    for seen in spy.seen:
        seen.check_result()
        seen.check_operands(left, None)
    return len(spy.seen)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
