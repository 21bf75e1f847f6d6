"""Random casts by the compiled core beside the reference kernels; also run under sanitizers."""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.kernels import reference
from microscale.kernels.native import casts
from microscale.kernels.native.loader import native
from microscale.kernels.plan import Plan, plan
from microscale.kernels.storage import PARTS, Layout
from microscale.rounding import make_options
from microscale.spelling import get_block_format
from samples import sample

FORMATS = (
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4"),
    *("mxfp4-mse", "mxfp8_e5m2-mse", "nvfp4-four_over_six", "fp4_e2m1-16-ue5m3-four_over_six"),
    *("fp8_e4m3-5-rceil", "fp8_e5m2-3000", "e4m3fnuz-32-even", "e2m3-33-ceil"),
    *("int8-token", "int4-channel", "fp8_e4m3-tensor", "fp8_e5m2-channel", "int8-tensor"),
    *("fp8_e4m3-token-e8m0-ceil", "int8-channel-bf16-tensor_fp32", "e5m2-token-ue5m3"),
    *("int8-7-fp32", "int8-16-bf16", "int4-32-e4m3-tensor_fp32", "e2m3-7-bf16", "int5-3"),
    *("e3m0-32", "int2-8", "int3-5-even", "e1m1-32", "e4m0-1", "e5m2b64-16", "e3m3b12-16-fp32"),
)
SHAPES = (
    *((), (1,), (5,), (32,), (33,), (3, 40), (40, 3), (2, 3, 35), (4, 1, 7), (2, 2, 2, 17)),
    *((70, 300), (3, 64, 130), (128, 64), (2, 5000), (5000, 3), (9, 600, 9)),
)
AWKWARD = (
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 2.0**-149, -(2.0**-127)),
    *(3.4028234e38, 1e-38, -(2.0**-126)),
)
TYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "also contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1),
    "stepped": lambda x: x[..., ::2],
    "rows apart": lambda x: x.repeat_interleave(2, 0)[1::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "misaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape),
}


@dataclass(frozen=True)
class Case:
    """A cast, and how it is called."""

    fmt: str
    options: tuple[str, ...]
    view: str
    x: Tensor
    axis: int
    dtype: torch.dtype
    seed: Tensor | None
    threads: int

    def __str__(self) -> str:
        """Say everything but the values."""
        x = self.x
        return (
            f"{self.fmt} {self.options} {x.dtype} {tuple(x.shape)} {self.view} axis {self.axis} "
            f"to {self.dtype}, {self.threads} threads"
        )


def draw(random_case: random.Random) -> Case:
    """A random case."""
    pick = random_case.choice
    fmt = pick(FORMATS)
    rounding = pick(["even", "even", "away", "zero", "stochastic"])
    options = (rounding, "saturate", "block", "off", "off")
    if random_case.random() < 0.6:
        has_nan = get_block_format(fmt).element.has_nan
        overflow = pick(["saturate", "nonfinite"]) if has_nan else "saturate"
        options = (
            rounding, overflow, pick(["block", "element"]), pick(["off", "element", "block"]), "off"
        )  # fmt: skip
    x = _awkward(sample(pick(SHAPES), seed=random_case.randrange(10**6)), random_case)
    view = pick(list(VIEWS)) if x.dim() > 1 else "contiguous"
    x = VIEWS[view](x.to(pick(TYPES)))
    seed = None
    if rounding == "stochastic":
        offset = pick([0, 5, 2**33 + 1])
        seed = torch.tensor([random_case.randrange(-(2**63), 2**63), pick([0, 7]), 3, offset])
    return Case(
        fmt, options, view, x,
        random_case.randrange(max(x.dim(), 1)), pick([*TYPES, torch.float64]), seed,
        pick([1, 2, 3]),
    )  # fmt: skip


def _awkward(x: Tensor, random_case: random.Random) -> Tensor:
    values = x.flatten().clone()
    if random_case.random() < 0.4:
        for _ in range(max(1, values.numel() // 7)):
            values[random_case.randrange(values.numel())] = random_case.choice(AWKWARD)
    if random_case.random() < 0.2:
        values *= random_case.choice([0.0, 2.0**-140, 2.0**-120, 2.0**100, 2.0**118])
    return values.reshape(x.shape)


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal types, shapes and bits; every NaN is one."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    same = (a == b) & (a.signbit() == b.signbit())
    return bool((same | (a.isnan() & b.isnan())).all())


def differences(case: Case) -> list[str]:
    """What the core computes otherwise than the reference."""
    found = casts.served(case.fmt, *case.options)
    assert found is not None, f"the core does not serve {case}"
    x, axis, seed = case.x, case.axis, case.seed
    asked = plan(x, case.fmt, axis, make_options(*case.options))
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        different = []
        if not equal(
            reference.cast(x, asked, case.dtype, seed),
            casts.cast(x, found, axis, case.dtype, seed),
        ):
            different.append(f"cast of {case}")
        return different + _packing(case, asked, found)
    finally:
        torch.set_num_threads(threads)


def _packing(case: Case, asked: Plan, found: casts.Served) -> list[str]:
    if not casts.packs(case.x):
        return []
    expected = reference.quantize(case.x, asked, case.seed)
    stored = casts.quantize(case.x, found, asked.axis, case.seed)
    pairs = zip(PARTS, expected, stored, strict=True)
    different = [f"{part} of {case}" for part, a, b in pairs if not equal(a, b)]
    length = case.x.shape[case.axis] if case.x.dim() else 1
    layout = Layout(asked.format, case.axis, torch.float32)
    assert casts.decodes(expected, found, length, torch.float32)
    if not equal(
        reference.dequantize(expected, layout, length, case.dtype),
        casts.dequantize(expected, found, layout, length, case.dtype),
    ):
        different.append(f"dequantize of {case}")
    return different


def check(first: int, cases: int) -> list[str]:
    """The differences of so many cases, drawn from the seed `first` on."""
    return [d for i in range(cases) for d in differences(draw(random.Random(first + i)))]


def main(cases: int, first: int) -> None:
    """So many casts with every instruction set. Ends the program where one is wrong."""
    library = native().library
    assert library is not None, native().reason
    wrong = []
    for number in range(5):
        if library.ms_set_isa(number) == 0:
            wrong += check(first + number * 10**6, cases)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
