"""`BlockTensor`: what is stored, what decodes, which operators work and which are refused."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.formats import (
    E8M0,
    ELEMENTS,
    NAMED,
    BlockFormat,
    ElementFormat,
    Specials,
    float_format,
    get_block_format,
    integer_format,
)
from microscale.tensor import BlockTensor, dequantize, quantize
from oracle import VARIETY, Options
from oracle_arrays import assert_same, split_blocks, to_numpy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = sorted({*VARIETY, *NAMED})


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    powers = torch.randint(-6, 7, shape, generator=generator, dtype=torch.float64)
    return (values * torch.exp2(powers)).to(dtype)


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert_same(a, to_numpy(b))


# ---------------------------------------------------------------- decoding is casting


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40,), (3, 37), (2, 5, 33), (64, 2), (1, 1), ()], ids=str)
def test_decoding_what_was_packed_is_casting(name: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = sample(shape, dtype)
        for axis in range(-max(len(shape), 1), max(len(shape), 1)):
            packed = quantize(x, name, axis)
            assert (packed.shape, packed.dtype) == (shape, dtype)
            assert packed.axis == axis % max(len(shape), 1)
            same(dequantize(packed), cast(x, name, axis))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_to_every_type_is_casting_to_it(name: str) -> None:
    for dtype in DTYPES:
        x = sample((3, 37), dtype, seed=1)
        for wanted in DTYPES:
            same(dequantize(quantize(x, name, 0), wanted), cast(x, name, 0, dtype=wanted))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nonfinite", ["block", "element"])
@pytest.mark.parametrize("rounding", ["even", "away", "zero"])
def test_options_reach_the_codes(name: str, nonfinite: str, rounding: str) -> None:
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**-149, -(2.0**-127), 3.4028234e38]
    x = sample((12, 18), seed=2)
    x[1:9, 3] = torch.tensor(special)
    x[9] = torch.tensor([2.0**-149, -(2.0**-130), 0.0] * 6)
    x[10] = math.inf
    x[11] = -0.0
    element = get_block_format(name).element
    for overflow in ("saturate", "nonfinite") if element.has_nan else ("saturate",):
        for flush in ("off", "element", "block"):
            for axis in (0, 1):
                options: dict[str, Any] = {
                    "rounding": rounding,
                    "overflow": overflow,
                    "nonfinite": nonfinite,
                    "flush_subnormals": flush,
                }
                same(dequantize(quantize(x, name, axis, **options)), cast(x, name, axis, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 33), (2, 0, 5)], ids=str)
def test_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        packed = quantize(torch.empty(shape, dtype=torch.bfloat16), name, axis)
        decoded = dequantize(packed)
        assert (decoded.shape, decoded.dtype) == (shape, torch.bfloat16)
        for scales in (packed.scales, packed.tensor_scale):
            if scales.is_floating_point():
                assert (scales == 1).all()


def test_numpy_arrays_can_be_packed() -> None:
    x = sample((3, 40))
    same(dequantize(quantize(x.numpy(), "mxfp4")), cast(x, "mxfp4"))


def test_decoding_into_out() -> None:
    packed = quantize(sample((3, 40)), "mxfp4")
    out = torch.empty(3, 40, dtype=torch.float64)
    assert dequantize(packed, out=out) is out
    same(out, packed.dequantize(torch.float64))


def test_packing_takes_no_gradient() -> None:
    assert not quantize(sample((3, 40)).requires_grad_(), "mxfp4").requires_grad


# ---------------------------------------------------------------- the bits in storage


def every_element() -> dict[str, tuple[ElementFormat, oracle.Element]]:
    kinds: tuple[Specials, ...] = ("finite", "fnuz")
    pairs = [
        (float_format(e, m, s), oracle.float_element(e, m, s))
        for e in range(1, 8)
        for m in range(8 - e)
        for s in kinds
    ]
    pairs += [
        (float_format(4, 3, "fn"), oracle.float_element(4, 3, "fn")),
        (float_format(5, 2, "ieee"), oracle.float_element(5, 2, "ieee")),
    ]
    pairs += [(integer_format(n), oracle.int_element(n)) for n in range(2, 9)]
    return {str(element): (element, twin) for element, twin in pairs}


EVERY_ELEMENT = every_element()


@pytest.mark.parametrize("name", sorted(EVERY_ELEMENT))
def test_every_code_is_stored_as_itself(name: str) -> None:
    element, twin = EVERY_ELEMENT[name]
    # Rows of every finite value, the largest first, so that the scale is 1.
    codes = [c for c, v in enumerate(twin.values) if math.isfinite(v) and abs(v) <= twin.largest]
    codes.sort(key=lambda code: -abs(twin.values[code]))
    values = torch.tensor([[twin.values[code] for code in codes]])
    packed = quantize(values, BlockFormat(element, E8M0, len(codes)))
    assert packed.scales.tolist() == [[127]]
    assert packed.codes.dtype == torch.uint8
    assert bytes(packed.codes[0].tolist()) == oracle.pack_row(codes, twin.bits, len(codes))
    same(dequantize(packed), values)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2"])
def test_nan_and_infinity_have_their_codes(name: str) -> None:
    x = torch.tensor([[math.nan, 1.0, math.inf, -math.inf]])
    packed = quantize(x, name, nonfinite="element")
    decoded = [packed.format.element.values[c] for c in packed.codes[0, :4].tolist()]
    largest = packed.format.element.largest
    ends = [math.inf, -math.inf] if name.endswith("e5m2") else [largest, -largest]
    assert math.isnan(decoded[0])
    assert decoded[2:] == ends
    assert packed.codes[0, 4:].sum() == 0
    poisoned = quantize(x, name)
    assert poisoned.scales.tolist() == [[255]]


@pytest.mark.parametrize("name", sorted(VARIETY))
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 37), 1), ((37, 3), 0), ((2, 21, 3), 1), ((35,), 0)]
)
def test_rows_are_the_oracles_stream(name: str, shape: tuple[int, ...], axis: int) -> None:
    fmt = VARIETY[name]
    x = sample(shape, seed=3)
    packed = quantize(x, name, axis)
    flat = to_numpy(x).reshape(-1)
    places = split_blocks(shape, axis, fmt.block)
    blocks = oracle.cast_blocks(
        [flat[place].tolist() for place in places], fmt, Options(), compute="float32", out="float32"
    )
    codes = np.zeros(flat.size, np.int64)
    for place, block in zip(places, blocks, strict=True):
        codes[place] = block.codes
    rows = np.moveaxis(codes.reshape(shape), axis, -1).reshape(-1, shape[axis])
    stored = packed.codes.reshape(len(rows), -1).tolist()
    padding = fmt.block if isinstance(fmt.block, int) else 1
    for row, held in zip(rows.tolist(), stored, strict=True):
        assert bytes(held) == oracle.pack_row(row, fmt.element.bits, padding)


def test_streams_by_hand() -> None:
    four = quantize(torch.tensor([[4.0, 0.5, -6.0, 1.0]]), "mxfp4")
    assert four.codes[0, :2].tolist() == [0x1 << 4 | 0x6, 0x2 << 4 | 0xF]
    assert four.codes.shape == (1, 16)
    assert four.codes[0, 2:].sum() == 0
    six = quantize(torch.tensor([[4.0, 0.125, -7.5, 1.0]]), "mxfp6_e2m3")
    codes = [0b011000, 0b000001, 0b111111, 0b001000]
    word = sum(code << (6 * place) for place, code in enumerate(codes))
    assert six.codes[0, :3].tolist() == [word & 255, word >> 8 & 255, word >> 16]
    assert six.codes.shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        ("mxfp4", torch.uint8, 127),
        ("nvfp4", torch.uint8, 0x7E),
        ("e2m1-16-ue5m3", torch.uint8, 15 << 3),
        ("e2m1-16-pow2", torch.int16, 0),
        ("e2m1-16-bf16", torch.bfloat16, 1.0),
        ("fp4_e2m1-tensor", torch.float32, 1.0),
    ],
)
def test_scales_by_hand(name: str, dtype: torch.dtype, scale: float) -> None:
    packed = quantize(torch.tensor([[6.0] * 16]), name)
    assert packed.scales.dtype == dtype
    assert packed.scales.flatten().tolist() == [scale]
    poisoned = quantize(torch.tensor([[math.nan] * 16]), name)
    nan = {"mxfp4": 255, "nvfp4": 0x7F, "e2m1-16-pow2": -(2**15)}.get(name)
    if nan is not None:
        assert poisoned.scales.flatten().tolist() == [nan]
    assert dequantize(poisoned).isnan().all()


def test_zero_blocks_by_hand() -> None:
    x = torch.zeros(1, 16)
    assert quantize(x, "mxfp4").scales.tolist() == [[0]]
    assert quantize(x, "mxfp4").codes.sum() == 0
    assert quantize(x, "e2m1-16-pow2").scales.tolist() == [[0]]
    assert quantize(x, "int8-tensor").scales.flatten().tolist() == [1.0]
    nvfp4 = quantize(x, "nvfp4")
    assert (nvfp4.scales.tolist(), nvfp4.tensor_scale.tolist()) == ([[0x38]], [1.0])
    assert quantize(-x, "mxfp4").codes.tolist() == [[0x88] * 8 + [0] * 8]


def test_nvfp4_scales_by_hand() -> None:
    x = torch.full((2, 16), 12.0)
    x[0, 0] = 2688.0
    packed = quantize(x, "nvfp4")
    assert packed.tensor_scale.tolist() == [1.0]
    assert packed.tensor_scale.dtype == torch.float32
    assert packed.scales.tolist() == [[0x7E], [0x40]]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp6_e3m2", 6.25),
        ("mxfp8_e4m3", 8.25),
        ("mxfp8_e5m2", 8.25),
        ("mxint8", 8.25),
    ],
)
def test_bits_per_value(name: str, bits: float) -> None:
    for shape, axis in (((6, 64), 1), ((96, 5), 0), ((2, 32, 3), 1)):
        packed = quantize(sample(shape), name, axis)
        assert packed.storage_bytes * 8 == math.prod(shape) * bits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "axis"), [((3, 37), 1), ((37, 3), 0), ((2, 21, 3), 1), ((), 0)])
def test_storage_is_what_the_format_says(name: str, shape: tuple[int, ...], axis: int) -> None:
    packed = quantize(sample(shape), name, axis)
    assert packed.storage_bytes * 8 == packed.format.storage_bits(shape, axis)


# ---------------------------------------------------------------- away from the block axis

VIEWS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("index", lambda x: x[1]),
    ("negative index", lambda x: x[-1]),
    ("two indices", lambda x: x[1, 2]),
    ("slice", lambda x: x[1:3]),
    ("open slice", lambda x: x[1:]),
    ("slice from the end", lambda x: x[-2:]),
    ("stepped slice", lambda x: x[::2]),
    ("empty slice", lambda x: x[2:2]),
    ("slice of the second", lambda x: x[:, 1:4]),
    ("whole slice of the axis", lambda x: x[:, :, :]),
    ("ellipsis", lambda x: x[..., 2, :]),
    ("new dimension", lambda x: x[None]),
    ("new dimension inside", lambda x: x[:, None]),
    ("unsqueeze", lambda x: x.unsqueeze(2)),
    ("unsqueeze last", lambda x: x.unsqueeze(-1)),
    ("squeeze", lambda x: x[:1].squeeze(0)),
    ("squeeze all", lambda x: x[:1, :1].squeeze()),
    ("select", lambda x: x.select(1, 3)),
    ("select by negative dimension", lambda x: x.select(-2, 3)),
    ("narrow", lambda x: x.narrow(1, 1, 2)),
    ("narrow by negative dimension", lambda x: x.narrow(-2, 1, 2)),
    ("transpose", lambda x: x.transpose(0, 2)),
    ("transpose by negative dimensions", lambda x: x.transpose(-1, -2)),
    ("transpose the others", lambda x: x.transpose(0, 1)),
    ("permute", lambda x: x.permute(2, 0, 1)),
    ("permute by negative dimensions", lambda x: x.permute(-1, 0, 1)),
    ("movedim", lambda x: x.movedim(-1, 0)),
    ("t of a matrix", lambda x: x[0].t()),
    ("T of a matrix", lambda x: x[0].T),
    ("mT", lambda x: x.mT),
    ("transposed slice", lambda x: x.transpose(0, 1)[1:3]),
    ("view", lambda x: x.view(20, 40)),
    ("view with a hole", lambda x: x.view(2, 2, -1, 40)),
    ("reshape", lambda x: x.reshape(5, 4, 40)),
    ("flatten the others", lambda x: x.flatten(0, 1)),
    ("unflatten", lambda x: x.unflatten(1, (5, 1))),
    ("expand", lambda x: x[:1].expand(3, 5, 40)),
    ("expand by a dimension", lambda x: x.expand(2, 4, 5, 40)),
    ("index by a tensor", lambda x: x[torch.tensor([2, 0, 2])]),
    ("index by a mask", lambda x: x[torch.tensor([True, False, True, False])]),
    ("index by a matrix", lambda x: x[torch.tensor([[2, 0], [1, 1]])]),
    ("index_select", lambda x: x.index_select(1, torch.tensor([3, 0]))),
    ("index_select negative dimension", lambda x: x.index_select(-2, torch.tensor([3, 0]))),
    ("unbind", lambda x: x.unbind(0)[2]),
    ("unbind second", lambda x: x.unbind(1)[2]),
    ("chunk", lambda x: x.chunk(3)[1]),
    ("split", lambda x: x.split(2)[1]),
    ("split sizes", lambda x: x.split([1, 4], dim=1)[1]),
    ("iteration", lambda x: list(x)[3]),
    ("detach", lambda x: x.detach()),
    ("clone", lambda x: x.clone()),
    ("contiguous", lambda x: x.contiguous()),
    ("to bfloat16", lambda x: x.to(torch.bfloat16)),
    ("double", lambda x: x.double()),
    ("half", lambda x: x.half()),
    ("to the device", lambda x: x.to("cpu")),
    ("cpu", lambda x: x.cpu()),
]
WHOLE = ["mxfp4", "nvfp4", "int8-tensor", "int8-channel", "int8-token", "mxfp6_e3m2"]


@pytest.mark.parametrize(("how", "view"), VIEWS, ids=[how for how, _ in VIEWS])
@pytest.mark.parametrize("name", WHOLE)
def test_views_away_from_the_block_axis(
    how: str, view: Callable[[Tensor], Tensor], name: str
) -> None:
    packed = quantize(sample((4, 5, 40), seed=4), name)
    expected = view(packed.dequantize())
    viewed = view(packed)
    assert isinstance(viewed, BlockTensor), how
    assert viewed.format == packed.format
    assert viewed.shape == expected.shape
    same(viewed.dequantize(), expected)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("axis", [0, 1])
def test_views_when_the_block_axis_is_not_the_last(name: str, axis: int) -> None:
    packed = quantize(sample((40, 5, 6) if axis == 0 else (5, 40, 6), seed=5), name, axis)
    decoded = packed.dequantize()
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[..., 1],
        lambda x: x[..., 1:4],
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(2, 1, 0),
        lambda x: x.select(2, -1),
        lambda x: x.transpose(0, 2)[2],
        lambda x: x.unsqueeze(0),
        lambda x: x.unsqueeze(-1),
        lambda x: x.movedim(axis, -1).reshape(-1, 40),
        lambda x: x.movedim(axis, -1)[1],
    ]
    for view in views:
        viewed = view(packed)
        assert isinstance(viewed, BlockTensor)
        same(viewed.dequantize(), view(decoded))


def test_views_share_their_storage() -> None:
    packed = quantize(sample((4, 64)), "mxfp4")
    row = packed[1]
    assert isinstance(row, BlockTensor)
    packed.codes[1].zero_()
    assert (row.dequantize() == 0).all()
    transposed = packed.t()
    assert isinstance(transposed, BlockTensor)
    assert transposed.codes.data_ptr() == packed.codes.data_ptr()


REFUSED_VIEWS: list[tuple[str, Callable[[Tensor], object]]] = [
    ("slice", lambda x: x[:, :, 1:32]),
    ("select", lambda x: x[0, 0, 3]),
    ("select", lambda x: x.select(2, 0)),
    ("select", lambda x: x.select(-1, 0)),
    ("index", lambda x: x[:, :, torch.tensor([1])]),
    ("index", lambda x: x[x.dequantize() > 0]),
    ("view", lambda x: x.view(-1)),
    ("view", lambda x: x.view(4, 5, 8, 5)),
    ("view", lambda x: x.flatten()),
    ("split", lambda x: x.split(20, dim=-1)),
    ("unbind", lambda x: x.unbind(-1)),
    ("index_select", lambda x: x.index_select(2, torch.tensor([0]))),
]


@pytest.mark.parametrize(("operator", "view"), REFUSED_VIEWS, ids=str)
def test_views_that_would_cut_blocks_are_refused(
    operator: str, view: Callable[[Tensor], object]
) -> None:
    packed = quantize(sample((4, 5, 40)), "mxfp4")
    with pytest.raises(MicroscaleError, match=r"BlockTensor\(mxfp4.*dequantize\(\)"):
        view(packed)
    assert operator


def test_masks_of_several_dimensions_are_right_or_refused() -> None:
    packed = quantize(sample((3, 4, 40)), "mxfp4")
    mask = torch.arange(12).reshape(3, 4) % 5 == 0
    try:
        rows = packed[mask]
    except MicroscaleError:
        return
    same(rows.dequantize(), packed.dequantize()[mask])


UNSUPPORTED: list[tuple[str, Callable[[Tensor], object]]] = [
    ("aten.add.Tensor", lambda x: x + x),
    ("aten.mul.Tensor", lambda x: x * 2.0),
    ("aten.neg", lambda x: -x),
    ("aten.sum", lambda x: x.sum()),
    ("aten.relu", torch.relu),
    ("aten.cat", lambda x: torch.cat([x, x])),
    ("aten.zero_", lambda x: x.zero_()),
    ("aten.fill_", lambda x: x.fill_(1.0)),
    ("aten.gt", lambda x: x > 0),
    ("aten.normal_", lambda x: x.normal_()),
    ("aten.mul_", lambda x: x.mul_(2)),
    ("aten.sort", lambda x: x.sort()),
]


@pytest.mark.parametrize(("operator", "call"), UNSUPPORTED, ids=[name for name, _ in UNSUPPORTED])
def test_other_operators_are_refused_by_name(
    operator: str, call: Callable[[Tensor], object]
) -> None:
    packed = quantize(sample((4, 40)), "mxfp4")
    with pytest.raises(MicroscaleError, match=rf"{operator}.*does not support a BlockTensor"):
        call(packed)


def test_integer_types_are_refused() -> None:
    with pytest.raises(MicroscaleError, match=r"torch\.int32"):
        quantize(sample((4, 40)), "mxfp4").to(torch.int32)


def test_dequantize_wants_a_block_tensor() -> None:
    with pytest.raises(MicroscaleError, match="Tensor, not a BlockTensor"):
        dequantize(sample((4, 40)))  # type: ignore[arg-type]


# ---------------------------------------------------------------- products


def integers(shape: tuple[int, ...], most: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


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


def test_named_elements_are_all_here() -> None:
    assert {"mxfp4", "nvfp4", "mxint8"} <= set(NAMES)
    assert set(ELEMENTS) <= set(EVERY_ELEMENT)
