"""Products from packed weights: every instruction set against float64 with a derived bound.

The bound (docs/numerics.md, section 10): n roundings on the way of each product to the result give
an error of at most gamma_n sum |x w| (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., section 3.1), gamma_n = n u / (1 - n u), u = 2^-24; the result's own rounding comes on top.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from microscale.formats import NAMED
from microscale.kernels import reference
from microscale.kernels.native import products
from microscale.kernels.native.loader import native, usable
from microscale.kernels.storage import Stored
from microscale.tensor import BlockTensor, quantize

LIBRARY = native().library
if LIBRARY is None:
    pytest.skip(f"needs the compiled core: {native().reason}", allow_module_level=True)

SETS = usable(LIBRARY)
NAMES = sorted({*NAMED, "fp4_e2m1-64", "int4-128-bf16", "fp8_e4m3-7", "fp8_e4m3fnuz-32",
                "fp8_e4m3-16-ue5m3", "fp6_e3m2-48"})  # fmt: skip
SHAPES = [(7, 4096, 1), (9, 100, 3), (5, 17, 8), (33, 320, 5), (49, 1, 2), (50, 100, 30),
          (5, 17, 9), (133, 320, 17), (50, 1000, 530)]  # fmt: skip


@pytest.fixture(params=SETS, autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine runs."""
    assert LIBRARY is not None
    before = LIBRARY.ms_isa()
    assert LIBRARY.ms_set_isa(SETS.index(request.param)) == 0
    yield request.param
    LIBRARY.ms_set_isa(before)


def decoded(q: BlockTensor) -> Tensor:
    """The weights that count: float32 by the reference, as float64."""
    return reference.dequantize(q.stored, q.packing, q.length, torch.float32).double()


def linear(
    x: Tensor,
    stored: Stored,
    name: str,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return products.linear(x, products.Matrix(stored, name, x.shape[1]), bias, dtype)


def linear_packed(
    parts: tuple[Stored, Stored], names: tuple[str, str], length: int, dtype: torch.dtype
) -> Tensor:
    x, w = (products.Matrix(p, name, length) for p, name in zip(parts, names, strict=True))
    return products.linear_packed(x, w, dtype)


def check(got: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None = None) -> None:
    """Hold a result against float64: same NaN and infinities, else within the bound."""
    x = x.double()
    added = torch.zeros(weights.shape[0]).double() if bias is None else bias.double()
    known = [t.abs().nan_to_num(0.0, 0.0, 0.0) for t in (x, weights)]
    terms = known[0] @ known[1].T + added.abs()
    exact = x @ weights.T + added
    roundings = 16 + (-(-x.shape[1] // 64) if x.shape[0] <= 8 else x.shape[1])
    gamma = roundings * 2.0**-24 / (1 - roundings * 2.0**-24)
    limit = gamma * terms + x.shape[1] * 2.0**-126
    unit = torch.finfo(got.dtype).eps / 2
    limit += unit * (exact.abs() + limit) + torch.finfo(got.dtype).smallest_normal
    wide = got.double()
    assert got.shape == exact.shape
    # Sums that pass the largest value on the way may become infinite or NaN.
    certain = terms < torch.finfo(got.dtype).max / 2
    assert wide.isnan()[exact.isnan()].all()
    assert not wide.isnan()[certain & ~exact.isnan()].any()
    infinite = certain & exact.isinf()
    assert torch.equal(wide[infinite], exact[infinite])
    finite = certain & exact.isfinite()
    assert (wide - exact).abs()[finite].le(limit[finite]).all()


def sample(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Values whose rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(shape[0], 1, generator=generator).mul(2).exp()
    return torch.randn(shape, generator=generator) * sizes


# ---------------------------------------------------------------- against float64


@pytest.mark.parametrize("name", NAMES)
def test_products_are_within_the_bound(name: str) -> None:
    assert isinstance(products.numbers(name), products.Numbers)
    for rows, length, batch in SHAPES:
        weight, bias = quantize(sample((rows, length)), name), sample((1, rows), 1)[0]
        values = decoded(weight)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = sample((batch, length), 2).clamp(-1e3, 1e3).to(dtype)
            got = linear(x, weight.stored, name, bias, torch.float32)
            check(got, x, values, bias)
            check(linear(x, weight.stored, name), x, values)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxint8", "mxfp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("left", ["mxint8", "mxfp6_e2m3", "mxfp8_e5m2", "nvfp4"])
def test_both_factors_may_be_packed(name: str, left: str) -> None:
    for rows, length, batch in [(7, 512, 1), (9, 100, 2), (33, 96, 3), (20, 100, 20)]:
        weight, x = (
            quantize(sample((rows, length)), name),
            quantize(sample((batch, length), 1), left),
        )
        parts = (x.stored, weight.stored)
        got = linear_packed(parts, (left, name), length, torch.float32)
        check(got, decoded(x), decoded(weight))


def test_blocks_of_integers_are_summed_exactly(instructions: str) -> None:
    weight, x = quantize(sample((9, 32)), "mxfp4"), quantize(sample((2, 32), 1), "mxint8")
    got = linear_packed((x.stored, weight.stored), ("mxint8", "mxfp4"), 32, torch.float32)
    terms = decoded(x)[:, None] * decoded(weight)
    exact = [[math.fsum(row) for row in rows] for rows in terms.tolist()]
    if instructions in ("avx512_vnni", "amx"):
        assert torch.equal(got, torch.tensor(exact))
    check(got, decoded(x), decoded(weight))


@pytest.mark.parametrize("batch", [1, 8, 20])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp4", "mxint8"])
def test_every_code_and_every_scale(name: str, batch: int) -> None:
    weight = quantize(torch.zeros(256, 128), name)
    generator = torch.Generator().manual_seed(3)
    weight.codes.copy_(torch.randint(256, weight.codes.shape, generator=generator))
    weight.scales.copy_(torch.arange(256)[:, None].expand(-1, 4))
    values = decoded(weight)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, 128, generator=generator).to(dtype)
        check(linear(x, weight.stored, name, dtype=torch.float32), x, values)


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "int8-channel"])
def test_unusual_numbers_in_x(name: str, batch: int) -> None:
    weight = quantize(sample((40, 64)), name)
    values = decoded(weight)
    for number in (math.nan, math.inf, -math.inf, 2.0**-130, 2.0**-110, 2.0**118, 3e38):
        for dtype in (torch.float32, torch.bfloat16):
            x = sample((batch, 64), 4).to(dtype)
            x[0, 5] = x[-1, 40] = number
            check(linear(x, weight.stored, name, dtype=torch.float32), x, values)
        x = torch.full((batch, 64), number)
        check(linear(x, weight.stored, name), x, values)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37, math.inf, math.nan, 0.0, -1.0])
@pytest.mark.parametrize("name", ["nvfp4", "int8-channel", "fp8_e4m3-tensor"])
def test_unusual_real_scales(name: str, scale: float) -> None:
    weight = quantize(sample((40, 64)).clamp(-100, 100), name)
    (weight.tensor_scale if name == "nvfp4" else weight.scales).fill_(scale)
    for batch in (1, 20):
        for dtype in (torch.float32, torch.bfloat16):
            x = sample((batch, 64), 4).to(dtype)
            got = linear(x, weight.stored, name, dtype=torch.float32)
            check(got, x, decoded(weight))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp8_e5m2", "mxint8", "int8-channel"])
def test_the_kernels_for_tiles_over_a_model_of_tiles(instructions: str, name: str) -> None:
    assert LIBRARY is not None
    if LIBRARY.ms_model_tiles(1):
        LIBRARY.ms_model_tiles(0)
        pytest.skip(f"{instructions} does not decode for them")
    try:
        for rows, length, batch in [(7, 96, 9), (65, 300, 17), (130, 520, 48)]:
            weight, x = quantize(sample((rows, length)), name), sample((batch, length), 1)
            x = x.bfloat16()
            got = linear(x, weight.stored, name, dtype=torch.float32)
            check(got, x, decoded(weight))
    finally:
        LIBRARY.ms_model_tiles(0)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp4", "nvfp4"])
def test_what_pads_a_row_does_not_matter(name: str) -> None:
    for batch in (2, 20):
        weight, x = quantize(sample((11, 37)), name), sample((batch, 37), 1)
        before = linear(x, weight.stored, name)
        used = 37 * weight.format.element.bits
        weight.codes[:, -(-used // 8) :] = 255
        assert torch.equal(linear(x, weight.stored, name), before)


@pytest.mark.parametrize("batch", [3, 20])
def test_strides(batch: int) -> None:
    whole = quantize(sample((40, 96)), "mxfp6_e3m2")
    wide = sample((batch, 200), 1)
    weight = whole[::3]
    assert isinstance(weight, BlockTensor)
    assert not weight.codes.is_contiguous()
    for x in (
        wide[:, 3:99],
        wide[:, :192:2],
        wide[:, :96].T.contiguous().T,
        wide[:1, :96].expand(batch, -1),
    ):
        got = linear(x, weight.stored, "mxfp6_e3m2")
        check(got, x, decoded(weight))
    codes = torch.empty(weight.codes.shape[::-1], dtype=torch.uint8).T.copy_(weight.codes)
    stored = (codes, weight.scales.T.contiguous().T, *weight.stored[2:])
    assert torch.equal(linear(x, stored, "mxfp6_e3m2"), got)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8-channel"])
@pytest.mark.parametrize("shape", [(0, 64, 3), (5, 0, 3), (5, 64, 0), (5, 0, 20)], ids=str)
def test_nothing(name: str, shape: tuple[int, int, int]) -> None:
    rows, length, batch = shape
    weight, bias = quantize(torch.zeros(rows, length), name), torch.ones(rows)
    got = linear(torch.zeros(batch, length), weight.stored, name, bias)
    assert torch.equal(got, torch.ones(batch, rows))


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "int8-channel"])
def test_threads_give_the_same_bits(name: str, batch: int) -> None:
    threads = torch.get_num_threads()
    weight, x = quantize(sample((301, 512)), name), sample((batch, 512), 1)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear(x, weight.stored, name))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_do_not_depend_on_the_batch() -> None:
    weight, x = quantize(sample((64, 256)), "mxfp4"), sample((8, 256), 1)
    whole = linear(x, weight.stored, "mxfp4")
    for row in range(8):
        assert torch.equal(linear(x[row : row + 1], weight.stored, "mxfp4")[0], whole[row])
