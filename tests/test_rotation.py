"""Block Hadamard rotation: products stay, casts see turned values, packed weights are turned."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.recipes.diffusion import error_diffusion
from microscale.rotation import rotated
from microscale.tensor import BlockTensor


def policy(*formats: str | None, **further: Any) -> Policy:
    return Policy.of(*formats, rotation="hadamard", **further)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.inner(self.table(ids))))
        return y


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("length", [0, 7, 16, 32, 33, 80])
@pytest.mark.parametrize("axis", [0, 1])
def test_turned_twice_is_itself_and_products_stay(size: int, length: int, axis: int) -> None:
    shape = (length, 5) if axis == 0 else (5, length)
    x, w = torch.randn(2, *shape, dtype=torch.float64)
    turned = rotated(x, size, axis)
    torch.testing.assert_close(rotated(turned, size, axis), x)
    torch.testing.assert_close((turned * rotated(w, size, axis)).sum(axis), (x * w).sum(axis))
    whole = length // size * size
    rest = [slice(None), slice(None)]
    rest[axis] = slice(whole, None)
    assert torch.equal(turned[tuple(rest)], x[tuple(rest)])
    if whole:
        assert not torch.equal(turned, x)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 64)
    x[0, 3] = 32.0
    turned = rotated(x, 32)
    torch.testing.assert_close(turned[0, :32].abs(), torch.full((32,), 32 / 32**0.5))
    assert not turned[0, 32:].any()


@pytest.mark.parametrize(
    ("formats", "size"), [(("mxfp4", "mxfp4"), 32), (("nvfp4", "nvfp4"), 16), (("mxfp4", None), 32)]
)
def test_a_linear_layer_casts_turned_operands(formats: tuple[str, str | None], size: int) -> None:
    layer, x = nn.Linear(80, 24), torch.randn(6, 80)
    model = nn.Sequential(layer)
    w, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    convert(model, policy(*formats), verbose=False)
    left = rotated(x, size)
    if formats[1] is not None:
        left = cast(left, formats[1])
    expected = left @ cast(rotated(w, size), formats[0]).T + bias
    torch.testing.assert_close(model(x), expected)


def test_without_formats_nothing_changes() -> None:
    model, x = nn.Sequential(nn.Linear(64, 24)), torch.randn(6, 64)
    wide = model(x)
    convert(model, policy("mxint8", "mxint8"), verbose=False)
    torch.testing.assert_close(model(x), wide, rtol=0.05, atol=0.05)
    revert(model)
    assert torch.equal(model(x), wide)


def test_gradients_are_turned_back() -> None:
    layer, x = nn.Linear(64, 24), torch.randn(6, 64)
    model = nn.Sequential(layer)
    convert(model, policy("mxfp4", "mxfp4"), verbose=False)
    model(x).sum().backward()
    left = cast(rotated(x, 32), "mxfp4")
    expected = rotated(torch.ones(24, 6) @ left, 32)
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("method", ["error_diffusion", "gptq", "qronos", "rtn"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "mxfp4/fp32"])
def test_solved_turned_and_saved_turned(method: Any, fmt: str, tmp_path: Any) -> None:
    model, data = (
        nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 8)),
        torch.randn(200, 80),
    )
    fresh = copy.deepcopy(model)
    wide = model(data)
    report = error_diffusion(model, fmt, [data], method=method, rotation="hadamard")
    assert [outcome.method for outcome in report.outcomes] == [method] * 2
    assert isinstance(model[0].weight, BlockTensor)
    solved = model(data)
    assert (solved - wide).square().mean() < 0.1 * wide.square().mean()
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", fresh)
    assert torch.equal(fresh(data), solved)
    revert(model)
    assert not any(isinstance(p, BlockTensor) for p in model.parameters())
    if fmt == "mxfp4/fp32":
        torch.testing.assert_close(model(data), solved)


def test_the_solver_sees_what_the_product_sees() -> None:
    """Rounded to nearest, what is packed is the cast of the turned weight."""
    layer = nn.Linear(96, 8)
    model = nn.Sequential(layer)
    expected = cast(rotated(layer.weight.detach(), 32), "mxfp4")
    data = [torch.randn(64, 96)]
    error_diffusion(model, "mxfp4", data, method="rtn", scales="rule", rotation="hadamard")
    packed: Any = layer.weight
    assert torch.equal(packed.dequantize(), expected)


def test_saving_a_converted_model_packs_turned_weights(tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(80, 24)), torch.randn(6, 80)
    fresh = copy.deepcopy(model)
    convert(model, policy("mxfp4", "mxfp4"), verbose=False)
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", fresh)
    torch.testing.assert_close(fresh(x), model(x))


def test_what_is_not_rotated_is_said() -> None:
    convolution = nn.Sequential(nn.Conv2d(32, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4))
    report = convert(convolution, policy("mxfp4", "mxfp4"), verbose=False)
    notes = {entry.name: entry.notes for entry in report.entries}
    assert "not rotated" in notes["0"]
    assert "rotated by 32" in notes["2"]
    attention = nn.MultiheadAttention(64, 2, batch_first=True)
    x = torch.randn(2, 5, 64)
    report = convert(attention, policy("mxfp4", "mxfp4"), verbose=False)
    notes = {entry.name: entry.notes for entry in report.entries}
    assert "not rotated" in notes[""]
    assert "rotated by 32" not in notes["out_proj"]
    plain = copy.deepcopy(attention)
    convert(plain, Policy.of("mxfp4", "mxfp4"), verbose=False)
    assert torch.equal(attention(x, x, x)[0], plain(x, x, x)[0])


def test_a_tied_table_is_left_as_it_is(tmp_path: Any) -> None:
    model, ids = Tied(), torch.randint(0, 50, (8, 12))
    fresh = Tied()
    report = convert(model, policy("mxfp4", "mxfp4"), verbose=False)
    notes = {entry.name: entry.notes for entry in report.entries}
    assert not notes["head"]
    assert "rotated by 32" in notes["inner"]
    error_diffusion(model, policy("mxfp4", "mxfp4"), [ids])
    assert model.head.weight is model.table.weight
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", fresh)
    assert torch.equal(fresh(ids), model(ids))


def test_a_policy_with_a_rotation_is_read_back() -> None:
    written = policy("mxfp4", "mxfp4", overrides={"a": {"rotation": "off"}})
    assert Policy.from_toml(written.to_toml()) == written
    assert Policy.from_json(written.to_json()) == written
    with pytest.raises(MicroscaleError, match="rotation is 'spin'"):
        Policy.of("mxfp4", rotation="spin")
