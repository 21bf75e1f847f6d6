"""Packed weights in PyTorch's products: read from storage where the core serves them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.kernels.native import products
from microscale.kernels.native.loader import native
from microscale.packed_ops import unserved
from microscale.tensor import BlockTensor, quantize

if native().library is None:
    pytest.skip(f"needs the compiled core: {native().reason}", allow_module_level=True)


CALLS: list[tuple[str, Callable[[Tensor, BlockTensor], Tensor]]] = [
    ("linear", F.linear),
    ("linear with a bias", lambda x, w: F.linear(x, w, torch.arange(48.0))),
    ("linear of batches", lambda x, w: F.linear(x.repeat(2, 3, 1, 1), w)),
    ("linear of a vector", lambda x, w: F.linear(x[0], w)),
    ("matmul", lambda x, w: x @ w.T),
    ("packed on the left", lambda x, w: w @ x.T),
    ("matrix times vector", lambda x, w: torch.mv(w, x[0])),
    ("addmm", lambda x, w: torch.addmm(torch.arange(48.0), x, w.T)),
    ("both packed", lambda x, w: quantize(x, "mxint8") @ w.T),
]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
@pytest.mark.parametrize("rows", [4, 12])
def test_products_read_the_storage(
    name: str, call: Callable[..., Tensor], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, x = quantize(torch.randn(48, 64), "mxfp4"), torch.randn(rows, 64)
    x = x[:4] if "batches" in name else x
    ran: list[str] = []
    for function in (products.linear, products.linear_packed):

        def watched(*given: Any, run: Callable[..., Tensor] = function) -> Tensor:
            ran.append(run.__name__)
            return run(*given)

        monkeypatch.setattr(products, function.__name__, watched)
    got = call(x, weight)
    assert ran == ["linear_packed" if name == "both packed" else "linear"]
    left = quantize(x, "mxint8").dequantize() if name == "both packed" else x
    want = (
        call(left, weight.dequantize()) if name != "both packed" else left @ weight.dequantize().T
    )
    torch.testing.assert_close(got, want)


def test_gradients_pass_through() -> None:
    weight = quantize(torch.randn(48, 64), "mxfp4")
    x, twin = (torch.ones(4, 64, requires_grad=True) for _ in range(2))
    F.linear(x, weight, torch.ones(48)).square().sum().backward()
    F.linear(twin, weight.dequantize(), torch.ones(48)).square().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)


def test_what_is_not_served_is_decoded_and_says_why() -> None:
    torch.manual_seed(0)
    cases = {
        "mxfp4": torch.randn(8, 64).double(),
        "int5-32": torch.randn(8, 64),
        "fp4_e2m1-32-pow2": torch.randn(8, 64),
    }
    for name, values in cases.items():
        weight = quantize(values, name)
        assert unserved(weight)
        x = torch.randn(3, 64, dtype=values.dtype)
        torch.testing.assert_close(F.linear(x, weight), F.linear(x, weight.dequantize()))


def test_a_packed_model_gives_what_its_decoded_twin_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    x = torch.randn(5, 64)
    for name in ("mxfp4", "mxfp8_e5m2", "nvfp4", "int8-channel"):
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            values = torch.randn(layer.weight.shape)
            layer.weight = nn.Parameter(quantize(values, name), requires_grad=False)
        packed = model(x)
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(layer.get_parameter("weight").dequantize())
        torch.testing.assert_close(packed, model(x), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
