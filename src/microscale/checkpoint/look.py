"""What is in a packed checkpoint: formats, scales, and signs that something is wrong with it.

Of one file alone much can be seen: NaN scales, scales that are all the same, blocks none of whose
elements reaches half of the largest power of two. A scale is chosen so that one does, whatever the
rule; so such codes and scales do not belong together (blocks along another axis, or in another
order). What cannot be seen there (a wrong bias, swapped nibbles) a comparison shows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from microscale.checkpoint.export import open_checkpoint
from microscale.checkpoint.layouts.base import Content, Item, same_values
from microscale.errors import MicroscaleError
from microscale.kernels.reference.codes import decode, decode_scale, unpack
from microscale.tensor import BlockTensor

Report = Callable[[str, int, int | None], None]
UNREACHED = 0.05
"""Share of blocks with an unused upper half that is worth a word; casts give next to none."""


@dataclass(frozen=True, slots=True)
class Look:
    """One tensor of a checkpoint.

    Attributes:
        format: of a packed one, else its type.
        bits: per value, scales and padding included.
        scales: number of scales by floor(log2) of their values; NaN ones apart.
        saturated: share of elements of the largest magnitude; None of a tensor that is not packed.
        zero: share of elements that are zero.
        signs: what looks wrong.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bits: float
    scales: dict[str, int]
    saturated: float | None
    zero: float | None
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """How a tensor differs from that of the other checkpoint.

    Attributes:
        equal: whether all values are the same bits.
        error: sqrt(sum (other - this)^2 / sum this^2), or None where this is all zero.
        largest: the largest difference of two values.
        signs: what explains it.
    """

    name: str
    formats: tuple[str, str]
    equal: bool
    error: float | None
    largest: float
    signs: tuple[str, ...]


def look(path: Path, report: Report) -> tuple[Content, list[Look]]:
    """Look at every tensor of a checkpoint of any layout; raises MicroscaleError."""
    content, looks = open_checkpoint(path), []
    for n, item in enumerate(content.items.values()):
        report(item.name, n, len(content.items))
        looks.append(_look(item))
    return content, looks


def _look(item: Item) -> Look:
    x = item.load()
    if not isinstance(x, BlockTensor):
        signs = ("holds NaN or infinity",) if _nonfinite(x) else ()
        kind, bits = str(x.dtype).removeprefix("torch."), 8.0 * x.element_size()
        return Look(item.name, kind, item.shape, bits, {}, None, None, signs)
    fmt, count = x.format, x.numel()
    codes = unpack(x.codes, fmt.element.bits, x.length)
    elements = decode(codes, fmt.element, torch.float32)
    scales = decode_scale(x.scales, fmt.scale, torch.float32)
    exponents = torch.frexp(scales[scales.isfinite()].abs())[1] - 1
    histogram = dict(sorted(Counter(exponents.flatten().tolist()).items()))
    counts = {str(exponent): n for exponent, n in histogram.items()}
    if nans := int(scales.isnan().sum()):
        counts["NaN"] = nans
    return Look(
        item.name,
        str(fmt),
        item.shape,
        8.0 * x.storage_bytes / count if count else 0.0,
        counts,
        _share(elements.abs() == fmt.element.largest),
        _share(elements == 0),
        tuple(_signs(x, elements, scales)),
    )


def _share(found: Tensor) -> float:
    return float(found.double().mean()) if found.numel() else 0.0


def _nonfinite(x: Tensor) -> bool:
    return x.is_floating_point() and x.itemsize > 1 and not bool(x.isfinite().all())


def _signs(x: BlockTensor, elements: Tensor, scales: Tensor) -> Iterator[str]:
    if nans := int(scales.isnan().sum()):
        yield f"{nans} of {scales.numel()} scales are NaN"
    if scales.numel() > 8 and bool((scales == scales.flatten()[0]).all()):
        yield "all scales are the same"
    if x.numel() and bool((elements == 0).all()):
        yield "all values are zero"
    block = x.format.block
    if not isinstance(block, int) or x.format.zero_point or x.length % block:
        return
    # Scales that are clamped at the small end leave blocks below their range rightly.
    largest = elements.unflatten(-1, (-1, block)).abs().amax(-1)
    usual = (largest > 0) & scales.isfinite() & (scales > 4 * x.format.scale.smallest)
    if usual.any():
        unreached = _share(largest[usual] < 2.0 ** (x.format.element.emax - 1))
        if unreached > UNREACHED:
            yield (
                f"{unreached:.0%} of blocks leave the upper half of their range unused: codes and "
                "scales may not belong together (other axis, other order of blocks)"
            )


def difference(path: Path, other: Path, report: Report) -> list[Difference]:
    """Compare two checkpoints tensor by tensor in values, the worst first.

    Raises MicroscaleError where they hold other tensors, or of other shapes.
    """
    left, right = open_checkpoint(path), open_checkpoint(other)
    if odd := sorted(left.items.keys() ^ right.items.keys()):
        where = path if odd[0] in left.items else other
        raise MicroscaleError(
            f"tensor {odd[0]!r} is in {str(where)!r} alone ({len(odd)} such in all)."
        )
    found = []
    for n, (name, item) in enumerate(left.items.items()):
        report(name, n, len(left.items))
        against = right.items[name]
        if item.shape != against.shape:
            raise MicroscaleError(
                f"tensor {name!r} has shape {item.shape} in {str(path)!r} and {against.shape} in "
                f"{str(other)!r}."
            )
        found.append(_difference(item, against))
    return sorted(found, key=lambda d: (d.equal, -(d.error or 0.0), d.name))


def _difference(item: Item, against: Item) -> Difference:
    a, b = item.load(), against.load()
    formats = tuple(
        str(x.format) if isinstance(x, BlockTensor) else str(x.dtype).removeprefix("torch.")
        for x in (a, b)
    )
    left, right = (_wide(x) for x in (a, b))
    change = (left - right).abs().nan_to_num(float("inf"))
    change[left.isnan() & right.isnan()] = 0
    norm = float(left.square().sum())
    error = float(change.square().sum() / norm) ** 0.5 if norm else None
    both = (formats[0], formats[1])
    largest = float(change.max()) if change.numel() else 0.0
    equal = bool(torch.equal(left, right)) or same_values(a, b)
    signs = () if equal else tuple(_explained(left, right, b))
    return Difference(item.name, both, equal, error, largest, signs)


def _wide(x: Tensor) -> Tensor:
    return x.dequantize(torch.float64) if isinstance(x, BlockTensor) else x.double()


def _explained(left: Tensor, right: Tensor, other: Tensor) -> Iterator[str]:
    """What one change, made to the other, would make it much like this one."""
    norm = float(left.square().sum())
    here = float((left - right).square().sum())
    if not norm or not here < float("inf") or here < 0.04 * norm:
        return
    ratio = float((left * right).sum() / right.square().sum().clamp_min(1e-300))
    power = 2.0 ** round(torch.tensor(abs(ratio) or 1.0).log2().item())
    if power != 1 and float((left - right * power).square().sum()) < 0.04 * norm:
        yield f"all values are {1 / power:g} times as large: scales read with another bias?"
    if isinstance(other, BlockTensor) and other.format.element.bits == 4:
        stored = (other.codes << 4 | other.codes >> 4, *other.stored[1:])
        swapped = BlockTensor(stored, other.packing, other.shape, other.dtype)
        if float((left - _wide(swapped)).square().sum()) < 0.04 * norm:
            yield "nibbles are swapped within their bytes"
