"""`BlockTensor` in use: products, parameters, copies, files."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.formats import NAMED
from microscale.tensor import BlockTensor, quantize
from oracle import VARIETY
from samples import integers, same, sample

NAMES = sorted({*VARIETY, *NAMED})


# ---------------------------------------------------------------- products


def exact_weight(name: str, shape: tuple[int, ...] = (5, 40)) -> BlockTensor:
    """Packed weights with few bits: products are exact in float32, added in whatever order."""
    values = integers(shape, 6, seed=7)
    if name == "nvfp4":
        values.view(-1)[0] = 2688.0  # the tensor scale is 1
    if name == "int8-channel":
        values[:, 0] = 127.0
        values = values / 64  # so is each channel's
    return quantize(values, name)


PRODUCTS: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("linear", F.linear),
    ("linear with a bias", lambda x, w: F.linear(x, w, torch.arange(5.0))),
    ("linear of batches", lambda x, w: F.linear(x.expand(2, 3, 40), w)),
    ("linear of a vector", lambda x, w: F.linear(x[0], w)),
    ("matmul", lambda x, w: x @ w.t()),
    ("matmul of batches", lambda x, w: x.expand(2, 3, 40) @ w.t()),
    ("packed on the left", lambda x, w: w @ x.t()),
    ("packed on both sides", lambda x, w: w[2:] @ w[2:].t()),
    ("vector", lambda x, w: w @ x[0]),
    ("mm", lambda x, w: torch.mm(x, w.t())),
    ("bmm", lambda x, w: torch.bmm(x[None], w.t()[None])),
    ("addmm", lambda x, w: torch.addmm(torch.ones(3, 5), x, w.t())),
]


@pytest.mark.parametrize(("how", "product"), PRODUCTS, ids=[how for how, _ in PRODUCTS])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8-channel"])
def test_products_take_packed_operands(
    how: str, product: Callable[[Tensor, Tensor], Tensor], name: str
) -> None:
    x, packed = integers((3, 40), 8), exact_weight(name)
    result = product(x, packed)
    assert type(result) is Tensor, how
    assert torch.equal(result, product(x, packed.dequantize()))


def test_gradients_flow_past_packed_weights() -> None:
    x = sample((3, 40)).requires_grad_()
    packed = quantize(sample((5, 40), seed=1), "mxfp4")
    F.linear(x, packed).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, 40))


def test_embedding_and_convolution_take_packed_weights() -> None:
    table = quantize(sample((7, 40)), "mxfp4")
    indices = torch.tensor([[1, 6], [0, 1]])
    same(F.embedding(indices, table), F.embedding(indices, table.dequantize()))
    kernel = quantize(integers((4, 33, 3, 3), 6), "mxfp4", 1)
    images = integers((2, 33, 8, 8), 8)
    same(F.conv2d(images, kernel), F.conv2d(images, kernel.dequantize()))


# ---------------------------------------------------------------- parameters, copies, files


def packed_layer(name: str = "mxfp4") -> torch.nn.Linear:
    layer = torch.nn.Linear(40, 5)
    layer.weight = torch.nn.Parameter(exact_weight(name), requires_grad=False)
    torch.nn.init.zeros_(layer.bias)
    return layer


def is_copy(copied: object, packed: BlockTensor) -> None:
    assert isinstance(copied, BlockTensor)
    assert (copied.format, copied.axis, copied.dtype) == (packed.format, packed.axis, packed.dtype)
    assert copied.codes.data_ptr() != packed.codes.data_ptr()
    same(copied.dequantize(), packed.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_files(name: str) -> None:
    packed = quantize(sample((4, 37), torch.bfloat16), name, 0)
    is_copy(copy.deepcopy(packed), packed)
    is_copy(packed.clone(), packed)
    buffer = io.BytesIO()
    torch.save({"weight": packed}, buffer)
    buffer.seek(0)
    is_copy(torch.load(buffer, weights_only=True)["weight"], packed)


def test_files_are_small(tmp_path: Path) -> None:
    path = tmp_path / "weight.pt"
    torch.save(quantize(sample((1024, 1024)), "mxfp4"), path)
    assert path.stat().st_size < 1024 * 1024 * 4.25 / 8 + 4096


def test_a_parameter_holds_it() -> None:
    layer = packed_layer()
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert isinstance(layer.weight, BlockTensor)
    assert dict(layer.named_parameters())["weight"] is layer.weight
    x = integers((3, 40), 8)
    same(layer(x).detach(), F.linear(x, layer.weight.dequantize(), layer.bias).detach())


def test_state_dicts_go_there_and_back() -> None:
    layer, other = packed_layer(), packed_layer()
    state = layer.state_dict()
    assert isinstance(state["weight"], BlockTensor)
    other.weight = torch.nn.Parameter(
        quantize(sample((5, 40), seed=9), "mxfp4"), requires_grad=False
    )
    other.load_state_dict(state)
    same(other.weight.dequantize(), layer.weight.dequantize())
    is_copy(other.weight, layer.weight)  # type: ignore[arg-type]
    third = packed_layer()
    third.load_state_dict(state, assign=True)
    same(third.weight.dequantize(), layer.weight.dequantize())


def test_plain_state_dicts_are_packed_when_they_are_loaded() -> None:
    layer, plain = packed_layer(), torch.nn.Linear(40, 5)
    layer.load_state_dict(plain.state_dict())
    assert isinstance(layer.weight, BlockTensor)
    same(layer.weight.dequantize(), cast(plain.weight.detach(), "mxfp4"))


def test_models_can_be_copied_and_saved() -> None:
    layer = packed_layer("nvfp4")
    copied = copy.deepcopy(layer)
    assert isinstance(copied.weight, torch.nn.Parameter)
    assert not copied.weight.requires_grad
    is_copy(copied.weight, layer.weight)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    copied.load_state_dict(torch.load(buffer, weights_only=True))
    same(copied.weight.dequantize(), layer.weight.dequantize())


def test_models_can_change_their_type() -> None:
    layer = packed_layer().to(torch.bfloat16)
    assert isinstance(layer.weight, BlockTensor)
    assert layer.weight.dtype == torch.bfloat16
    assert layer(sample((2, 40), torch.bfloat16)).dtype == torch.bfloat16


def test_it_describes_itself_without_its_values() -> None:
    text = repr(quantize(sample((4, 64)), "mxfp4"))
    assert text == (
        "BlockTensor(mxfp4, shape=(4, 64), axis=1, dtype=torch.float32, device='cpu', 136 bytes)"
    )


def test_compiled_functions_take_it() -> None:
    packed = exact_weight("mxfp4")
    torch._dynamo.reset()
    run = torch.compile(F.linear, backend="aot_eager", fullgraph=True)
    x = integers((3, 40), 8)
    same(run(x, packed), F.linear(x, packed.dequantize()))


def test_equal_compares_values() -> None:
    x = sample((4, 40))
    packed = quantize(x, "mxfp4")
    assert torch.equal(packed, packed.clone())
    assert torch.equal(packed, cast(x, "mxfp4"))
    assert not torch.equal(packed, quantize(x, "mxfp6_e2m3"))


def test_what_torch_would_crash_on_works_or_is_refused() -> None:
    packed = quantize(sample((4, 40)), "mxfp4")
    # torch's own share_memory_ ends the process for a tensor without storage.
    assert BlockTensor.share_memory_ is not Tensor.share_memory_
    assert packed.share_memory_() is packed
    assert all(part.is_shared() for part in packed.stored)
    calls: list[Callable[[], object]] = [packed.numpy, packed.tolist]
    for call in calls:
        with pytest.raises(MicroscaleError, match=r"BlockTensor.*dequantize\(\)"):
            call()
