"""ml_dtypes, the number types of JAX and TensorFlow, as referee for single elements."""

from typing import Any

import numpy as np
import pytest
import torch

from microscale.formats import ElementFormat
from microscale.spelling import get_format
from microscale.tensor import quantize
from oracle_arrays import all_halves, bits, to_numpy
from referees.anchored import cast_elements, inputs

ml_dtypes: Any = pytest.importorskip("ml_dtypes")

TWINS = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e2m1": "float4_e2m1fn",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
    "e4m3b11fnuz": "float8_e4m3b11fnuz",
    "e4m3ieee": "float8_e4m3",
    "e3m4ieee": "float8_e3m4",
}
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

by_element = pytest.mark.parametrize("name", TWINS)


def element(name: str) -> ElementFormat:
    found = get_format(name)
    assert isinstance(found, ElementFormat)
    return found


def twin(name: str) -> Any:
    return getattr(ml_dtypes, TWINS[name])


def to_referee(x: torch.Tensor) -> Any:
    """A torch tensor as a numpy array of the same type, bfloat16 included."""
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@by_element
def test_every_code_has_the_same_value(name: str) -> None:
    codes = np.arange(2 ** element(name).bits, dtype=np.uint8)
    theirs = codes.view(twin(name)).astype(np.float64)
    assert (bits(np.array(element(name).values)) == bits(theirs)).all()


@by_element
def test_their_limits_are_ours(name: str) -> None:
    info = ml_dtypes.finfo(twin(name))
    ours = element(name)
    assert ours.largest == float(info.max)
    assert ours.smallest_normal == float(info.smallest_normal)
    assert ours.smallest_subnormal == float(info.smallest_subnormal)
    assert ours.bits == info.bits


@by_element
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_rounds_to_the_same_value(name: str, dtype: str) -> None:
    ours = element(name)
    x = inputs(ours, getattr(torch, dtype))
    assert len(x) > 10_000
    overflow = "nonfinite" if ours.has_nan else "saturate"
    theirs = to_referee(x).astype(twin(name)).astype(np.float64)
    got = cast_elements(x, ours, overflow=overflow)
    if not ours.has_negative_zero:
        theirs = theirs + 0.0
    wrong = np.flatnonzero(bits(got) != bits(theirs))
    assert len(wrong) == 0, [(float(x[i]), got[i], theirs[i]) for i in wrong[:5]]


@pytest.mark.parametrize(("name", "theirs"), [("int4", "int4"), ("int2", "int2")])
def test_integer_codes_are_two_complement(name: str, theirs: str) -> None:
    ours = element(name)
    codes = np.arange(2**ours.bits, dtype=np.uint8)
    signed = codes.view(getattr(ml_dtypes, theirs)).astype(np.float64)
    assert (np.array(ours.values) == signed / 2**ours.mantissa_bits).all()


def test_e8m0_scale_codes_have_the_same_value() -> None:
    theirs = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    x = torch.from_numpy(theirs)[:, None] * 4  # 4 = 2^emax of E2M1
    packed = quantize(x, "mxfp4")
    assert packed.scales.flatten().tolist() == list(range(255))
    assert np.isnan(np.uint8(255).view(ml_dtypes.float8_e8m0fnu).astype(np.float64))


def test_difference_e8m0_casts_round_to_nearest_and_scales_round_down() -> None:
    # A plain cast of amax / 2^emax to E8M0 is no scale rule of MX: it rounds to nearest.
    amax = torch.tensor([1.0, 1.25, 1.5, 1.75, 3.0, 3.0e38])
    theirs = amax.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    torchs = amax.to(torch.float8_e8m0fnu).view(torch.uint8)
    assert theirs.tolist() == [127, 127, 128, 128, 129, 255]
    assert torchs.tolist() == theirs.tolist()
    floor = quantize(amax.double()[:, None] * 4, "mxfp4").scales.flatten()
    assert floor.tolist() == [127, 127, 127, 127, 128, 254]


def test_difference_torch_loses_the_sign_of_what_becomes_e8m0() -> None:
    assert torch.tensor(-1.0).to(torch.float8_e8m0fnu).view(torch.uint8).item() == 127
    assert quantize(torch.tensor([-4.0]), "mxfp4").scales.item() == 127


@pytest.mark.parametrize("name", ["e2m3", "e3m2", "e2m1"])
def test_difference_nan_has_no_code_in_narrow_floats(name: str) -> None:
    # ml_dtypes turns NaN into -0; here it poisons the block.
    theirs = np.array([np.nan], np.float32).astype(twin(name)).astype(np.float32)
    assert theirs[0] == 0
    assert np.signbit(theirs[0])
    assert np.isnan(cast_elements(torch.tensor([float("nan")]), element(name))).all()


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_torchs_own_float8_types_agree(name: str) -> None:
    ours = element(name)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    theirs = codes.view(dtype).to(torch.float32)
    assert (bits(np.array(ours.values)) == bits(to_numpy(theirs))).all()
    for half in ("bfloat16", "float16"):
        x = all_halves(half)
        x = x[x.abs() <= ours.largest]
        assert (bits(cast_elements(x, ours)) == bits(to_numpy(x.to(dtype)))).all()
