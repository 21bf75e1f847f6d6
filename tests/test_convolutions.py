"""Convolutions of three dimensions and transposed ones: operands, bounds, layers, checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microscale.weights as weights_module
from layer_checks import assert_products, assert_same_function, doubles
from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from product_spy import ProductSpy

MIXED = Policy.parse("mxfp4/mxfp6_e2m3")
Function = Callable[..., Tensor]
TRANSPOSED: dict[int, tuple[Function, Function]] = {
    1: (conv_transpose1d, F.conv_transpose1d),
    2: (conv_transpose2d, F.conv_transpose2d),
    3: (conv_transpose3d, F.conv_transpose3d),
}


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts that change nothing."""

    def unchanged(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * 1

    monkeypatch.setattr(weights_module, "cast", unchanged)


def in_groups(x: Tensor, fmt: str, axis: int, groups: int) -> Tensor:
    """Cast along channels, the blocks of each group anew."""
    return torch.cat([cast(part, fmt, axis) for part in x.detach().chunk(groups, axis)], axis)


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (96, 3), (40, 1), (16, 16)])
def test_conv3d(channels: int, groups: int, padding: int | str) -> None:
    x = torch.randn(2, channels, 5, 4, 3)
    weight = nn.Parameter(torch.randn(2 * groups, channels // groups, 3, 1, 3))
    geometry: Any = (torch.randn(2 * groups), 1, padding, 1, groups)
    left, right = in_groups(x, "mxfp6_e2m3", 1, groups), cast(weight.detach(), "mxfp4", 1)
    assert torch.equal(conv3d(x, weight, *geometry, policy=MIXED), F.conv3d(left, right, *geometry))
    with torch.no_grad(), ProductSpy() as spy:
        conv3d(x, weight, *geometry, policy=MIXED)
    (seen,) = spy.seen
    seen.check_result()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (96, 3), (40, 1), (80, 2), (8, 8)])
def test_transposed_convolutions(channels: int, groups: int, dims: int) -> None:
    ours, torchs = TRANSPOSED[dims]
    x = torch.randn(2, channels, *(5, 4, 3)[:dims])
    weight = nn.Parameter(torch.randn(channels, 6, *(3, 2, 3)[:dims]))
    geometry: Any = (torch.randn(6 * groups), 2, 1, 1, groups, 2)
    left, right = (
        in_groups(a, f, i, groups) for a, f, i in ((x, "mxfp6_e2m3", 1), (weight, "mxfp4", 0))
    )
    expected = torchs(left, right, *geometry)
    assert torch.equal(ours(x, weight, *geometry, policy=MIXED), expected)
    assert torch.equal(
        ours(x[0], weight, *geometry, policy=MIXED), torchs(left[0], right, *geometry)
    )
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        ours(x, weight, *geometry, policy=MIXED, name="up")
    (seen,) = spy.seen
    seen.check_result()
    assert [(r.module, r.product, r.formats) for r in ledger] == [
        ("up", f"conv_transpose{dims}d", ("mxfp6_e2m3", "mxfp4"))
    ]


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_straight_through(groups: int) -> None:
    x, weight = torch.randn(2, 64, 9, requires_grad=True), nn.Parameter(torch.randn(64, 4, 3))
    conv_transpose1d(x, weight, stride=2, groups=groups, policy=MIXED).square().sum().backward()
    i = in_groups(x, "mxfp6", 1, groups).requires_grad_()
    w = in_groups(weight, "mxfp4", 0, groups).requires_grad_()
    F.conv_transpose1d(i, w, stride=2, groups=groups).square().sum().backward()
    for got, expected in ((x, i), (weight, w)):
        assert got.grad is not None
        assert expected.grad is not None
        assert torch.equal(got.grad, expected.grad)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_channel_is_an_output_channel(groups: int) -> None:
    weight = nn.Parameter(torch.randn(8, 3, 5))
    policy = Policy.parse("int8-channel/fp32")
    with torch.no_grad(), ProductSpy() as spy:
        conv_transpose1d(torch.randn(2, 8, 9), weight, groups=groups, policy=policy)
    apart = spy.seen[0].right.unflatten(0, (groups, -1))
    scales = weight.detach().unflatten(0, (groups, -1)).abs().amax((1, 3), keepdim=True) / 127
    codes = apart / scales
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_what_torch_refuses_torch_refuses() -> None:
    with pytest.raises(RuntimeError, match="groups"):
        conv_transpose1d(torch.randn(2, 5, 9), torch.randn(5, 3, 5), groups=2, policy=MIXED)


# ---------------------------------------------------------------- layers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"groups": 4, "bias": False, "dilation": 2},
    {"stride": 3, "output_padding": 2, "groups": 2},
]


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_layers_are_torchs(dims: int, options: dict[str, Any]) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer, x = kind(8, 12, 3, **options).double(), doubles(2, 8, *(5, 4, 3)[:dims])
    assert_same_function(layer, lambda m: m(x))
    assert_same_function(layer, lambda m: m(x[0]))


@pytest.mark.usefixtures("identity")
def test_transposed_layers_take_a_size() -> None:
    layer, x = nn.ConvTranspose2d(4, 3, 3, stride=2).double(), doubles(2, 4, 5, 5)
    assert_same_function(layer, lambda m: m(x, output_size=(12, 11)))


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular", "reflect"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_conv3d_is_torchs(mode: str, padding: Any) -> None:
    options: Any = {"padding": padding, "padding_mode": mode, "groups": 2}
    layer, x = nn.Conv3d(4, 6, 3, **options).double(), doubles(2, 4, 5, 4, 3)
    assert_same_function(layer, lambda m: m(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv3d(40, 5, 3), (2, 40, 4, 4, 4)),
        (nn.ConvTranspose1d(40, 5, 3), (2, 40, 4)),
        (nn.ConvTranspose2d(40, 5, 3, groups=5), (2, 40, 4, 4)),
        (nn.ConvTranspose3d(64, 6, 3, groups=2), (2, 64, 4, 4, 4)),
    ],
    ids=str,
)
def test_layers_multiply_cast_operands(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, groups = torch.randn(shape), getattr(layer, "groups", 1)
    assert assert_products(layer, lambda m: m(x), left=None) == 1
    with torch.no_grad(), ProductSpy() as spy:
        convert(layer, MIXED, verbose=False)
        layer(x)
    (seen,) = spy.seen
    assert torch.equal(seen.left, in_groups(x, "mxfp6_e2m3", 1, groups))
    assert "mxfp4/mxfp6_e2m3" in repr(layer)


class Decoder(nn.Module):
    """Transposed convolutions whose packed form is theirs, and two whose is not."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(32, 64, 2)
        self.up = nn.ConvTranspose2d(64, 64, 3, stride=2)
        self.apart = nn.ConvTranspose2d(64, 80, 3, groups=2)
        self.ragged = nn.ConvTranspose2d(80, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """Images of volumes [N, 32, 2, H, W]."""
        images: Tensor = self.ragged(self.apart(self.up(self.volume(x)[:, :, 0])))
        return images


@pytest.mark.parametrize("spelling", ["mxfp4/mxfp6_e2m3", "int8-channel/int8-token", "nvfp4"])
def test_layers_come_back_from_files(spelling: str, tmp_path: Path) -> None:
    model, fresh, x = Decoder().eval(), Decoder().eval(), torch.randn(2, 32, 2, 3, 3)
    conversion = convert(model, spelling, verbose=False)
    assert conversion.left == ()
    with torch.no_grad():
        expected = model(x)
        save(model, tmp_path / "m.safetensors")
        tensors = load(tmp_path / "m.safetensors", fresh)
        assert torch.equal(fresh(x), expected)
    packed = {name.partition(".")[0] for name, t in tensors.items() if isinstance(t, BlockTensor)}
    by_channel = spelling.startswith("int8-channel")
    assert packed == ({"volume"} if by_channel else {"volume", "up", "apart"})
    revert(model)
    assert not torch.equal(expected, model(x))


def test_reports_say_how_long_the_blocks_of_a_group_are() -> None:
    conversion = convert(Decoder(), "mxfp4", verbose=False)
    notes = {entry.name: entry.notes for entry in conversion.entries}
    assert notes["ragged"] == ("stored as it is", "last block of 8")
    assert notes["apart"] == ()


# ---------------------------------------------------------------- blocks along windows

WINDOW = Policy.of("mxfp4", "mxfp6_e2m3", convolution="window")
DIRECT: dict[int, tuple[Function, Function]] = {
    1: (conv1d, F.conv1d),
    2: (conv2d, F.conv2d),
    3: (conv3d, F.conv3d),
}
GEOMETRY: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2, "stride": (2,)},
    {"groups": 4, "dilation": 2, "padding": 3},
]


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("options", GEOMETRY, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_products_of_windows_are_convolutions(dims: int, options: dict[str, Any]) -> None:
    ours, torchs = DIRECT[dims]
    x = doubles(2, 4, *(7, 8, 9)[:dims]).requires_grad_()
    weight = doubles(12, 4 // options.get("groups", 1), *(3, 2, 3)[:dims]).requires_grad_()
    if options.get("padding") == "same":
        weight = doubles(12, 4, *(3, 1, 3)[:dims]).requires_grad_()
    bias = doubles(12).requires_grad_()
    got = ours(x, weight, bias, **options, policy=WINDOW)
    expected = torchs(x, weight, bias, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    alone = ours(x[0], weight, None, **options, policy=WINDOW)
    torch.testing.assert_close(alone, torchs(x[0], weight, None, **options))
    upstream = torch.randn_like(expected)
    grads = (torch.autograd.grad(out, (x, weight, bias), upstream) for out in (got, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_windows_are_cast_as_the_gemm_sees_them(groups: int) -> None:
    x, weight = torch.randn(2, 10, 6, 7), torch.randn(4, 10 // groups, 3, 3)
    with ProductSpy() as spy:
        conv2d(x, weight, padding=1, groups=groups, policy=WINDOW)
    (seen,) = spy.seen
    seen.check_result()
    seen.check_operands("mxfp6_e2m3", "mxfp4")
    parts = [F.unfold(part, 3, padding=1).mT for part in x.chunk(groups, 1)]
    windows = cast(torch.stack(parts, 1), "mxfp6_e2m3")
    kernels = cast(weight.flatten(1), "mxfp4").unflatten(0, (groups, -1))
    assert torch.equal(seen.left.reshape(windows.shape), windows)
    assert torch.equal(seen.right.mT[:groups].reshape(kernels.shape), kernels)


class Windows(nn.Module):
    """Convolutions of every kind, whose blocks may be packed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 64, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(64, 64, 1)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        """Images of images [N, 3, H, W]."""
        images: Tensor = self.depthwise(self.pointwise(self.wide(x)))
        return images


@pytest.mark.parametrize("weight", ["mxfp4", "int8-channel"])
def test_windows_are_a_setting_of_the_policy(weight: str, tmp_path: Path) -> None:
    policy = Policy.of(weight, "int8-token", convolution="window")
    model, fresh, x = Windows(), Windows(), torch.randn(2, 3, 6, 6)
    conversion = convert(model, policy, verbose=False)
    notes = {entry.name: entry.notes for entry in conversion.entries}
    if weight == "mxfp4":
        assert notes["wide"] == ("stored as it is", "blocks of 27")
        assert notes["depthwise"] == ("stored as it is", "blocks of 9")
    with torch.no_grad():
        expected = model(x)
        save(model, tmp_path / "m.safetensors")
        stored = load(tmp_path / "m.safetensors", fresh)
        assert torch.equal(fresh(x), expected)
        revert(model)
        convert(model, Policy.of(weight, "int8-token"), verbose=False)
        assert not torch.equal(model(x), expected)
    packed = {name.partition(".")[0] for name, t in stored.items() if isinstance(t, BlockTensor)}
    assert packed == ({"pointwise"} if weight == "mxfp4" else set(notes))
