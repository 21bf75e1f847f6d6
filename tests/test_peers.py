"""What other programs do, as docs/peers.md says it: our name for it, or our side of the difference.

Thresholds: amax = m x 2^k with m in [1, 2); where a rule's scale byte leaves that of the rule
`floor`, exactly. Nothing foreign is called here; tests/referees does that.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microscale.cast import cast
from microscale.formats import NAMED
from microscale.spelling import get_block_format
from microscale.tensor import dequantize, quantize

FP4, FP8 = "mxfp4", "mxfp8_e4m3"


def byte(amax: float, spelling: str) -> int:
    return int(quantize(torch.tensor([[amax]]), spelling).scales.item())


def bytes_of(amax: Tensor, spelling: str) -> Tensor:
    return quantize(amax[:, None], spelling).scales[:, 0].int()


# Rule, format, the threshold, and whether the threshold itself already raises the byte.
THRESHOLDS = [
    ("ceil", FP4, 1.0, False),
    ("ceil", FP8, 1.0, False),
    ("rceil", FP4, 1.5, False),
    ("rceil", FP8, 1.75, False),
    ("even", FP4, 1.75, True),
    ("even", FP8, 1.9375, True),
    ("even", "mxfp8_e5m2", 1.875, True),
    ("even", "mxfp6_e2m3", 1.9375, True),
    ("even", "mxfp6_e3m2", 1.875, True),
    *(("seven_quarters", name, 1.75, True) for name in NAMED if name.startswith("mx")),
]


@pytest.mark.parametrize(("rule", "name", "threshold", "included"), THRESHOLDS)
def test_thresholds_and_both_their_neighbours(
    rule: str, name: str, threshold: float, included: bool
) -> None:
    emax = get_block_format(name).element.emax
    for k in (-60, -1, 0, 7, 100):
        at = torch.tensor(threshold)
        above, below = torch.nextafter(at, torch.tensor(2.0)), torch.nextafter(at, at * 0)
        amax = torch.stack([below, at, above]) * 2.0**k
        floor = [127 + math.frexp(value)[1] - 1 - emax for value in amax.tolist()]
        assert bytes_of(amax, name).tolist() == floor
        raised = bytes_of(amax, f"{name}-{rule}").tolist()
        first = 1 if threshold == 1 else 0  # below 1 begins the binade below, all of it raised
        assert raised == [floor[0] + first, floor[1] + included, floor[2] + 1]


def test_rules_that_are_the_same_for_one_format() -> None:
    amax = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 1
    amax[:3] = torch.tensor([1.0, 1.5, 1.75])
    assert torch.equal(bytes_of(amax, f"{FP4}-even"), bytes_of(amax, f"{FP4}-seven_quarters"))
    rceil, quarters = bytes_of(amax, f"{FP8}-rceil"), bytes_of(amax, f"{FP8}-seven_quarters")
    assert (rceil != quarters).nonzero().flatten().tolist() == [2]  # the tie at 1.75 alone


SHARES = [
    (FP4, "rceil", 0.298),
    (FP4, "even", 0.168),
    (FP4, "seven_quarters", 0.168),
    (FP4, "ceil", 1.0),
    (FP8, "rceil", 0.168),
    (FP8, "seven_quarters", 0.168),
    (FP8, "even", 0.049),
]


@pytest.mark.parametrize(("name", "rule", "share"), SHARES)
def test_share_of_gaussian_blocks_with_another_byte(name: str, rule: str, share: float) -> None:
    x = torch.randn((20_000, 32), generator=torch.Generator().manual_seed(1))
    amax = x.abs().amax(1)
    raised = bytes_of(amax, f"{name}-{rule}") - bytes_of(amax, name)
    assert raised.unique().tolist() in ([1], [0, 1])
    assert raised.float().mean().item() == pytest.approx(share, abs=0.01)


# ---------------------------------------------------------------- blocks without an ordinary scale

RULES = ("floor", "ceil", "even", "rceil", "seven_quarters", "mse")
by_rule = pytest.mark.parametrize("rule", RULES)


@by_rule
def test_blocks_of_zeros_infinity_and_nan(rule: str) -> None:
    """Bytes 0, 255, 255; elsewhere also 126 to 128 for zeros, 127, 253 or 254 for infinity."""
    for name in (FP4, FP8):
        spelling = f"{name}-{rule}"
        assert [byte(x, spelling) for x in (0.0, math.inf, math.nan)] == [0, 255, 255]
        block = torch.tensor([[math.inf, 1.0], [math.nan, 1.0]])
        assert cast(block, spelling).isnan().all()


def test_blocks_at_the_ends_of_float32() -> None:
    """3e38 is 1.76 x 2^127, 3.4e38 is 1.998 x 2^127; 2^-130 is below every scale."""
    expected = {"floor": (252, 252), "ceil": (253, 253), "even": (253, 253), "rceil": (253, 253)}
    for rule, (below, above) in expected.items():
        assert [byte(x, f"{FP4}-{rule}") for x in (3e38, 3.4e38)] == [below, above]
    assert [byte(x, f"{FP8}-even") for x in (3e38, 3.4e38)] == [246, 247]
    for rule in RULES:
        assert byte(2.0**-130, f"{FP4}-{rule}") == 0
    assert torch.equal(cast(torch.full((1, 32), 2.0**-128), FP4), torch.full((1, 32), 2.0**-128))


def test_byte_255_decodes_as_nan() -> None:
    """compressed-tensors decodes it as infinity."""
    packed = quantize(torch.full((1, 32), math.nan), FP4)
    assert packed.scales.tolist() == [[255]]
    assert dequantize(packed).isnan().all()


# ---------------------------------------------------------------- elements


@pytest.mark.parametrize(
    ("rounding", "expected"), [("even", [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
                               ("away", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
                               ("zero", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])]
)  # fmt: skip
def test_ties_of_fp4(rounding: str, expected: list[float]) -> None:
    """ModelOpt and ggml take 0.75 to 0.5: a tie towards zero, which no rounding here has."""
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    assert cast(ties, FP4, rounding=rounding).tolist() == [expected]
    negative = quantize(-ties, FP4, rounding=rounding)
    assert dequantize(negative).tolist() == [[-x for x in expected]]


def test_signs_of_zeros() -> None:
    """compressed-tensors and ggml drop both signs; ModelOpt makes the code 8 of +0."""
    packed = quantize(torch.tensor([[0.0, -0.0, -0.1, 4.0]]), FP4)
    codes = packed.codes[0, :2].tolist()
    assert [codes[0] & 15, codes[0] >> 4, codes[1] & 15, codes[1] >> 4] == [0, 8, 8, 6]


# ---------------------------------------------------------------- named differences of rules


def test_difference_fbgemm_leaves_the_tie() -> None:
    """FBGEMM's even rule raises the byte above 1.75 alone; here it is 1.75 and above."""
    assert byte(1.75, f"{FP4}-even") - byte(1.75, FP4) == 1


def test_difference_auto_round_has_a_threshold_of_its_own() -> None:
    """auto-round's variant takes amax to 7.25 and raises above 1.8125: here `even`, from 1.75."""
    assert byte(1.78, f"{FP4}-even") - byte(1.78, FP4) == 1


def test_difference_ceil_of_log2_of_a_quotient() -> None:
    """ModelOpt takes ceil(log2(amax / 6)), in float32, which misses most of what lies above 6."""
    amax = torch.nextafter(6.0 * torch.exp2(torch.arange(-120.0, 125.0)), torch.tensor(math.inf))
    exponents = torch.arange(-120, 125) + 1
    assert torch.equal(bytes_of(amax, f"{FP4}-rceil"), (exponents + 127).int())
    assert ((amax / 6).log2().ceil() != exponents).float().mean() > 0.9


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="since PyTorch 2.7")
def test_difference_torch_rounds_scales_to_nearest() -> None:
    """PyTorch's own cast to float8_e8m0fnu: 1.5 becomes 2, 3e38 NaN, and -1 loses its sign."""
    values = torch.tensor([1.5, 3e38, -1.0]).to(torch.float8_e8m0fnu).view(torch.uint8)
    assert values.tolist() == [128, 255, 127]
    assert byte(1.5 * 4, FP4) == 127  # the scale of an amax of 6 is 1: a rule, not a rounding


# ---------------------------------------------------------------- the page


def test_the_page_names_every_test_of_a_deviation() -> None:
    root = Path(__file__).parents[1]
    written = (root / "docs" / "peers.md").read_text(encoding="utf-8")
    tests = (root / "tests" / "test_paper.py").read_text(encoding="utf-8")
    named = re.findall(r"`(test_difference_\w+)`", written)
    assert sorted(named) == sorted(re.findall(r"^def (test_difference_\w+)", tests, re.MULTILINE))
