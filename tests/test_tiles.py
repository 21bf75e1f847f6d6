"""Tiles: one scale for a block of rows and columns of a matrix."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert
from microscale.functional import conv2d, conv_transpose2d, embedding, linear, matmul
from microscale.policy import Policy
from microscale.tensor import BlockTensor, quantize
from samples import same, sample

TILES = ["mxfp4-4x8", "nvfp4-16x16", "mxfp6_e2m3-32x32-rceil", "mxint8-2x16-mse", "mxfp4-3x5-e4m0"]


def tile_by_tile(x: Tensor, fmt: str, tile: tuple[int, int]) -> Tensor:
    """Cast a matrix tile by tile, each as one block of a row vector."""
    name = fmt.replace(f"-{tile[0]}x{tile[1]}", f"-{tile[0] * tile[1]}")
    parts = []
    for rows in x.split(tile[0], 0):
        pieces = rows.split(tile[1], 1)
        parts.append(torch.cat([cast(p.reshape(1, -1), name).reshape(p.shape) for p in pieces], 1))
    return torch.cat(parts)


@pytest.mark.parametrize("shape", [(8, 16), (9, 37), (1, 5), (33, 1)], ids=str)
@pytest.mark.parametrize(
    ("fmt", "tile"),
    [("mxfp4-4x8", (4, 8)), ("mxint8-2x16-mse", (2, 16)), ("mxfp6_e2m3-32x32-rceil", (32, 32))],
)
def test_a_tile_is_one_block(fmt: str, tile: tuple[int, int], shape: tuple[int, int]) -> None:
    x = sample(shape, seed=1)
    same(cast(x, fmt), tile_by_tile(x, fmt, tile))


@pytest.mark.parametrize("fmt", ["mxfp4-32x32", "nvfp4-16x16", "int8-16x16-bf16-zero_point"])
def test_square_tiles_are_those_of_the_transposed_matrix(fmt: str) -> None:
    x = sample((70, 45))
    same(cast(x, fmt, 0), cast(x, fmt, 1))
    same(cast(x.t(), fmt).t(), cast(x, fmt))
    packed = quantize(x, fmt)
    turned = packed.t()
    assert isinstance(turned, BlockTensor)
    assert turned.format == packed.format
    same(turned.dequantize(), cast(x.t(), fmt))


@pytest.mark.parametrize("fmt", TILES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_each_matrix_of_a_stack_for_itself(fmt: str, axis: int) -> None:
    x = sample((2, 3, 20, 40), seed=2)
    if fmt.startswith("nvfp4"):  # one tensor scale for all
        x[...] = x[0, 0]
    each = torch.stack([torch.stack([cast(m, fmt, axis) for m in row]) for row in x])
    same(cast(x, fmt, axis), each)


def test_a_kernel_is_tiled_over_out_and_in_channels() -> None:
    kernel = sample((40, 20, 3, 3))
    columns = kernel.permute(2, 3, 0, 1)
    same(cast(kernel, "mxfp4-8x16", 1), cast(columns, "mxfp4-8x16").permute(2, 3, 0, 1))
    same(cast(kernel, "mxfp4-8x16", 0), cast(columns, "mxfp4-8x16", -2).permute(2, 3, 0, 1))


@pytest.mark.parametrize("fmt", TILES)
@pytest.mark.parametrize("shape", [(), (0, 8), (7,), (64,), (3, 0, 5)], ids=str)
def test_shapes_without_a_matrix(fmt: str, shape: tuple[int, ...]) -> None:
    x = sample(shape)
    packed = quantize(x, fmt)
    same(packed.dequantize(), cast(x, fmt))
    assert packed.format.storage_bits(shape) == packed.storage_bytes * 8


@pytest.mark.parametrize("fmt", TILES)
@pytest.mark.parametrize("axis", [0, 1])
def test_storage_has_one_scale_a_tile(fmt: str, axis: int) -> None:
    packed = quantize(sample((50, 70)), fmt, axis)
    assert isinstance(packed.format.block, tuple)
    rows, columns = packed.format.block
    lengths = (70, 50) if axis == 0 else (50, 70)
    assert packed.scales.shape == (-(-lengths[0] // rows), -(-lengths[1] // columns))
    assert packed.format.storage_bits((50, 70), axis) == packed.storage_bytes * 8
    same(packed.with_row_scales().dequantize(), packed.dequantize())


def test_a_checkpoint_holds_tiles_and_zero_points(tmp_path: Path) -> None:
    tensors = {
        "tiles": quantize(sample((50, 70)), "mxfp4-16x32"),
        "zero": quantize(sample((50, 70)), "int4-16-zero_point"),
        "both": quantize(sample((50, 70)), "int8-8x8-bf16-zero_point", 0),
    }
    save(tensors, tmp_path / "t.safetensors")
    for name, x in load(tmp_path / "t.safetensors").items():
        assert isinstance(x, BlockTensor)
        assert x.packing == tensors[name].packing
        for part, stored in zip(x.stored, tensors[name].stored, strict=True):
            assert torch.equal(part, stored)


# ---------------------------------------------------------------- layers


def policy(fmt: str) -> Policy:
    return Policy.of(fmt, "mxfp8_e4m3-4x32")


@pytest.mark.parametrize("fmt", ["mxfp4-16x16", "int8-8x32-zero_point", "nvfp4-16x16"])
def test_products_are_those_of_the_cast_operands(fmt: str) -> None:
    x, weight = torch.randn(3, 10, 48), nn.Parameter(torch.randn(20, 48))
    left, right = cast(x, "mxfp8_e4m3-4x32"), cast(weight.detach(), fmt)
    expected = (left.double() @ right.double().t()).float()
    got = linear(x, weight, policy=policy(fmt))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    # A packed weight holds the same values.
    same(F.linear(left, quantize(weight, fmt)), F.linear(left, right))
    a, b = torch.randn(2, 3, 10, 48), torch.randn(2, 3, 48, 7)
    both = Policy.of(fmt, "mxfp8_e4m3-4x32")
    expected = (cast(a, "mxfp8_e4m3-4x32") @ cast(b, "mxfp8_e4m3-4x32", -2)).detach()
    assert torch.equal(matmul(a, b, policy=both), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_tile_positions_and_channels(groups: int) -> None:
    x, weight = torch.randn(2, 48, 5, 6), nn.Parameter(torch.randn(20, 48 // groups, 3, 3))
    got = conv2d(x, weight, groups=groups, policy=policy("mxfp4-16x16"))
    parts = [
        cast(part.flatten(2), "mxfp8_e4m3-4x32", 1).reshape(part.shape)
        for part in x.chunk(groups, 1)
    ]
    right = cast(weight.detach().permute(2, 3, 0, 1), "mxfp4-16x16").permute(2, 3, 0, 1)
    assert torch.equal(got, F.conv2d(torch.cat(parts, 1), right, groups=groups))


def test_no_tile_spans_two_samples() -> None:
    x, weight = torch.randn(2, 48, 5, 6), nn.Parameter(torch.randn(48, 8, 3, 3))
    other = x.clone()
    other[1] *= 1000
    for function in (conv2d, conv_transpose2d):
        kernel = weight.transpose(0, 1).contiguous() if function is conv2d else weight
        first, second = (
            function(y, nn.Parameter(kernel), policy=policy("mxfp4-4x4")) for y in (x, other)
        )
        assert torch.equal(first[0], second[0])


def test_rows_of_a_table_are_those_of_the_cast_table() -> None:
    table, rows = nn.Parameter(torch.randn(40, 48)), torch.tensor([[3, 39, 3], [0, 7, 8]])
    got = embedding(rows, table, policy=Policy.of("mxfp4-16x16"))
    same(got.detach(), F.embedding(rows, cast(table.detach(), "mxfp4-16x16")))
    same(F.embedding(rows, quantize(table, "mxfp4-16x16")), got.detach())


@pytest.mark.parametrize("fmt", ["mxfp4-16x16", "int4-16-zero_point", "int8-channel-zero_point"])
def test_a_model_computes_the_same_from_its_file(fmt: str, tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 20, 3, groups=1),
            nn.Conv2d(20, 20, 1),
            nn.ConvTranspose2d(20, 12, 2, groups=2),
            nn.Flatten(),
            nn.Linear(12 * 49, 40),
            nn.Linear(40, 7),
        ).eval()

    model, x = made(), torch.randn(2, 3, 8, 8)
    convert(model, Policy.of(fmt, "mxfp8"), verbose=False)
    expected = model(x)
    save(model, tmp_path / "m.safetensors")
    fresh = made()
    load(tmp_path / "m.safetensors", fresh)
    assert any(isinstance(p, BlockTensor) for p in fresh.parameters())
    assert torch.equal(fresh(x), expected)
