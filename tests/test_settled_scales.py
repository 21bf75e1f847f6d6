"""Scales that calibration settled: part of a format's spelling, the same for all data."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.formats import settled_scale
from microscale.policy import Policy
from microscale.spelling import get_block_format
from microscale.tensor import quantize

SPELLINGS = (
    "int8-tensor-at0.5",
    "int8-tensor-at0.0371",
    "int4-tensor-at0.25z7-zero_point",
    "int8-tensor-at0.0625z0-zero_point",
    "int8-tensor-at3z255-zero_point",
    "fp8_e4m3fnuz-tensor-at0.0000000000000000000000000000123",
    "fp8_e5m2-tensor-at123456790000000000000",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_is_read_back(spelling: str) -> None:
    fmt = get_block_format(spelling)
    assert str(fmt) == spelling
    assert get_block_format(str(fmt)) == fmt


def test_value_is_float32_and_spelled_shortly() -> None:
    assert str(settled_scale(0.1)) == "at0.1"
    assert settled_scale(0.1).value == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("spelling", "what"),
    [
        ("int8-32-at0.5", "whole tensor"),
        ("int8-channel-at0.5", "whole tensor"),
        ("int8-tensor-at0", "not a positive"),
        ("int8-tensor-at0.5-zero_point", "go together"),
        ("int8-tensor-at0.5z3", "go together"),
        ("int4-tensor-at0.5z16-zero_point", "one of the 16 codes"),
        ("fp8_e4m3-tensor-at0.5z3-zero_point", "for integers"),
        ("int8-tensor-atlas", "not known"),
    ],
)
def test_refusals(spelling: str, what: str) -> None:
    with pytest.raises(MicroscaleError, match=what):
        get_block_format(spelling)


def test_integers_by_hand() -> None:
    x = torch.tensor([0.0, 0.26, -0.76, 1.5, 99.0, -99.0])
    scale = 0.5 * 64  # one step is 1/64 of the scale
    expected = torch.tensor([0.0, 0.5, -1.0, 1.5, 63.5, -63.5])
    assert torch.equal(cast(x, f"int8-tensor-at{scale:g}"), expected)


def test_zero_point_by_hand() -> None:
    # Steps of 0.5; code 4 of 16 is zero, so that values go from -2 to 5.5.
    x = torch.tensor([0.0, 0.26, -0.76, -99.0, 99.0])
    expected = torch.tensor([0.0, 0.5, -1.0, -2.0, 5.5])
    assert torch.equal(cast(x, "int4-tensor-at2z4-zero_point"), expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_is_cast(spelling: str, dtype: torch.dtype) -> None:
    value = get_block_format(spelling).scale.value
    assert value is not None
    x = (torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 * value).to(dtype)
    assert torch.equal(quantize(x, spelling).dequantize(), cast(x, spelling))
    assert quantize(x[:0], spelling).dequantize().shape == (0, 7)


def test_does_not_depend_on_the_data() -> None:
    x = torch.linspace(-1, 1, 50)
    alone = torch.cat([cast(part, "int8-tensor-at0.9") for part in x.split(1)])
    assert torch.equal(cast(x, "int8-tensor-at0.9"), alone)


def test_nan_makes_the_tensor_nan() -> None:
    x = torch.tensor([1.0, torch.nan])
    assert cast(x, "int8-tensor-at1").isnan().all()
    assert (
        cast(torch.tensor([1.0, torch.inf]), "int8-tensor-at1", nonfinite="element")
        .isfinite()
        .all()
    )


def test_gradient_is_clipped_beyond_the_range() -> None:
    x = torch.tensor([0.5, 1.9, 2.1, -3.0], requires_grad=True)
    cast(x, "int8-tensor-at1", gradient="clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.usefixtures("weights_decoded_first")
def test_policy_and_model_are_read_back(tmp_path: Path) -> None:
    policy = Policy.of("int8-channel", overrides={"0": "int8-channel/int8-tensor-at0.25"})
    assert Policy.from_toml(policy.to_toml()) == policy
    assert Policy.from_json(policy.to_json()) == policy
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    fresh = copy.deepcopy(model)
    convert(model, policy, verbose=False)
    save(model, tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors", fresh)
    x = torch.randn(4, 8)
    assert torch.equal(fresh(x), model(x))
