"""Tensors as blocks: the axis split, joined again, and what each block has one of.

The cast's axis is split in place into (blocks, values of a block), so that any axis is cast without
moving memory; a ragged last block is padded with zeros, which change no maximum.
"""

import math

import torch
from torch import Tensor

from microscale.formats import BlockFormat
from microscale.kernels.plan import Plan


def working(dtype: torch.dtype, fmt: BlockFormat) -> torch.dtype:
    """The type to compute in. Exponents without a bound need float64's range for any input."""
    unbounded = fmt.scale.exponents is not None and fmt.scale.exponents[0] < -149
    return torch.float64 if unbounded or dtype is torch.float64 else torch.float32


def widen(x: Tensor, fmt: BlockFormat) -> Tensor:
    """The values in the type to compute in, with at least one dimension."""
    return x.detach().reshape(x.shape or (1,)).to(working(x.dtype, fmt))


def split(x: Tensor, plan: Plan) -> Tensor:
    """Split the axis into (blocks, values of a block); whole blocks stay as they are.

    Tiles become (..., blocks of rows, rows of a tile, blocks, values of a row).
    """
    if isinstance(plan.format.block, tuple):
        return _split_tiles(x, plan)
    if not isinstance(plan.format.block, int):
        return x
    # An axis shorter than a block is one block: padding it would multiply depthwise kernels.
    size = min(plan.format.block, x.shape[plan.axis])
    ragged = -x.shape[plan.axis] % size
    if ragged:
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - plan.axis) + (0, ragged))
    blocks: Tensor = x.unflatten(plan.axis, (-1, size))
    return blocks


def _split_tiles(x: Tensor, plan: Plan) -> Tensor:
    assert isinstance(plan.format.block, tuple)
    rows = plan.rows(x.dim())
    x = x.unsqueeze(0) if rows is None else x.movedim((rows, plan.axis), (-2, -1))
    height, width = (min(s, n) for s, n in zip(plan.format.block, x.shape[-2:], strict=True))
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height))
    tiles: Tensor = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    return tiles


def merge(blocks: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor:
    """Undo `split`: join the axis, cut the padding, restore zero dimensions."""
    if isinstance(plan.format.block, tuple):
        blocks = _merge_tiles(blocks, shape, plan)
    if isinstance(plan.format.block, int):
        joined = blocks.flatten(plan.axis, plan.axis + 1)
        blocks = joined.narrow(plan.axis, 0, shape[plan.axis] if shape else 1)
    return blocks.reshape(shape)


def _merge_tiles(tiles: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor:
    joined = tiles.flatten(-2).flatten(-3, -2)
    rows = plan.rows(len(shape))
    if rows is None:
        return joined.flatten()[: math.prod(shape)]
    cut = joined[..., : shape[rows], : shape[plan.axis]]
    return cut.movedim((-2, -1), (rows, plan.axis))


def block_maximum(magnitudes: Tensor, plan: Plan) -> Tensor:
    """The largest value of each block, with the reduced dimensions kept."""
    return magnitudes.amax(shared_dimensions(magnitudes, plan), keepdim=True)


def shared_dimensions(blocks: Tensor, plan: Plan) -> tuple[int, ...]:
    """The dimensions of split blocks that share a scale."""
    if isinstance(plan.format.block, tuple):
        return (blocks.dim() - 3, blocks.dim() - 1)
    counted = isinstance(plan.format.block, int)
    return (plan.axis + 1,) if counted else plan.reduced(blocks.dim())


def gather_shared(shared: Tensor, plan: Plan, dimensions: int) -> Tensor:
    """What each block has one of, as it is stored: without the values, the axis last."""
    if isinstance(plan.format.block, tuple):
        tiles = shared.squeeze(-1).squeeze(-2)
        rows = plan.rows(dimensions)
        tiles = tiles.squeeze(0) if rows is None else tiles.movedim(-2, rows - (rows > plan.axis))
        return tiles.contiguous()
    if isinstance(plan.format.block, int):
        shared = shared.squeeze(plan.axis + 1)
    return shared.movedim(plan.axis, -1).contiguous()


def spread_shared(stored: Tensor, plan: Plan) -> Tensor:
    """Undo `gather_shared`."""
    if isinstance(plan.format.block, tuple):
        rows = plan.rows(stored.dim())
        tiles = (
            stored.unsqueeze(0) if rows is None else stored.movedim(rows - (rows > plan.axis), -2)
        )
        return tiles.unsqueeze(-2).unsqueeze(-1)
    shared = stored.movedim(-1, plan.axis)
    return shared.unsqueeze(plan.axis + 1) if isinstance(plan.format.block, int) else shared
