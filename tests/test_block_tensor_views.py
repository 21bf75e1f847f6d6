"""`BlockTensor`: operators that work without unpacking, and those that are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor, dequantize, quantize
from samples import same, sample

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
WHOLE += ["int8-channel-zero_point", "int4-8-zero_point"]
TILED = ["mxfp4-2x32", "int8-3x4-zero_point"]


@pytest.mark.parametrize(("how", "view"), VIEWS, ids=[how for how, _ in VIEWS])
@pytest.mark.parametrize("name", [*WHOLE, *TILED])
def test_views_away_from_the_block_axis(
    how: str, view: Callable[[Tensor], Tensor], name: str
) -> None:
    packed = quantize(sample((4, 5, 40), seed=4), name)
    expected = view(packed.dequantize())
    viewed = view(packed)
    assert isinstance(viewed, BlockTensor), how
    # Tiles that a view takes apart become blocks of each row.
    assert viewed.format in (packed.format, packed.with_row_scales().format)
    assert viewed.shape == expected.shape
    same(viewed.dequantize(), expected)


@pytest.mark.parametrize("name", [*WHOLE, *TILED])
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
    ("index", lambda x: x[0, 0, 3]),
    ("select", lambda x: x.select(2, 0)),
    ("select by negative dimension", lambda x: x.select(-1, 0)),
    ("index by a tensor", lambda x: x[:, :, torch.tensor([1])]),
    ("index by a mask", lambda x: x[x.dequantize() > 0]),
    ("view as a vector", lambda x: x.view(-1)),
    ("view that splits", lambda x: x.view(4, 5, 8, 5)),
    ("view that joins", lambda x: x.view(4, 200)),
    ("flatten", lambda x: x.flatten()),
    ("split", lambda x: x.split(20, dim=-1)),
    ("unbind", lambda x: x.unbind(-1)),
    ("index_select", lambda x: x.index_select(2, torch.tensor([0]))),
]


@pytest.mark.parametrize(("how", "view"), REFUSED_VIEWS, ids=[how for how, _ in REFUSED_VIEWS])
def test_views_that_would_cut_blocks_are_refused(
    how: str, view: Callable[[Tensor], object]
) -> None:
    packed = quantize(sample((4, 5, 40)), "mxfp4")
    assert how
    with pytest.raises(MicroscaleError, match=r"BlockTensor\(mxfp4.*dequantize\(\)"):
        view(packed)


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
