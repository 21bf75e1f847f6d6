"""What all layouts of safetensors folders have in common."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from microscale.checkpoint.folder import Entry, Shard
from microscale.checkpoint.header import DTYPES, Packed
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor

SCALE_NAN = 255


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One tensor of a checkpoint: where it is stored, how it is packed if it is, how to load it."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: Packed | None
    load: Callable[[], Tensor]

    @property
    def outline(self) -> BlockTensor:
        """The packed tensor without its values."""
        assert self.packed is not None
        return BlockTensor(self.packed.expected(), self.packed.layout, self.shape, self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A checkpoint of any layout, read tensor by tensor."""

    layout: str
    path: Path
    items: Mapping[str, Item]
    config: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    policy: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that is a part of a packed one."""

    shard: Shard
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.entry.shape

    def read(self) -> Tensor:
        """Its values."""
        return self.shard.read(self.entry)


Parts = Mapping[str, Part]
"""Every stored tensor of a folder, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A packed tensor in a folder: how it is packed, the names of its parts, how to join them."""

    packed: Packed
    names: tuple[str, ...]
    join: Callable[..., BlockTensor]


class Layout(Protocol):
    """How packed tensors are stored in a folder of safetensors files."""

    name: str

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """What is stored of a packed tensor; also called without values, for shapes and types."""

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
        """The packed tensors among what is stored."""

    def describe(self, content: Content, carried: Mapping[str, Item]) -> dict[str, dict[str, Any]]:
        """What JSON files are to hold, besides what they hold now, by file name."""


def outline(fmt: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int = -1) -> Packed:
    """How a tensor is packed along its last axis."""
    names = {kind: name for name, kind in DTYPES.items()}
    return Packed(fmt, axis % max(len(shape), 1), "float32", shape, names[dtype])


def put_together(
    packed: Packed, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None = None
) -> BlockTensor:
    """A packed tensor of parts that must have the sizes that it expects; raises MicroscaleError."""
    wanted = packed.expected()
    parts = [part.contiguous() for part in (codes, scales)]
    if tensor_scale is not None:
        parts.append(tensor_scale.reshape(1).float())
    whole = []
    for expected, part in zip(wanted, parts, strict=False):
        data = part if part.dtype == expected.dtype else part.view(expected.dtype)
        if data.numel() != expected.numel():
            raise MicroscaleError(
                f"{packed.format} of shape {packed.shape} has {expected.numel()} stored values, "
                f"not {data.numel()}"
            )
        whole.append(data.reshape(expected.shape))
    whole += [torch.empty(0, dtype=empty.dtype) for empty in wanted[len(whole) :]]
    codes_, scales_, outer, zero = whole
    layout, dtype = packed.layout, DTYPES[packed.dtype]
    return BlockTensor((codes_, scales_, outer, zero), layout, packed.shape, dtype)


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type that a configuration gives its model."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return DTYPES.get(str(name).removeprefix("torch."), torch.float32)


def not_along_last(item: Item, *formats: str) -> str:
    """Why a tensor is not packed in one of the formats, in whole blocks along its last axis."""
    assert item.packed is not None
    fmt, axis = item.packed.layout.format, item.packed.axis
    if base_name(item.packed) not in formats:
        return f"carries {', '.join(formats)}, not {fmt}"
    if axis != len(item.shape) - 1 or len(item.shape) < 2:
        return f"has blocks along the last axis of a matrix, not along axis {axis}"
    if fmt.counted and item.shape[axis] % fmt.counted:
        return f"has whole blocks; {item.shape[axis]} is no multiple of {fmt.counted}"
    return ""


def base_name(packed: Packed) -> str:
    """The format without its scale rule, which stored values do not tell."""
    fmt = packed.layout.format
    return str(fmt).removesuffix(f"-{fmt.rule}")


def is_weight(item: Item) -> str:
    """Why a tensor is not the matrix of a linear layer, by its name and shape, or ""."""
    if not item.name.endswith(".weight") or len(item.shape) != 2:
        return "carries matrices called *.weight"
    return ""


def refuse_nan(name: str, q: BlockTensor, layout: str) -> None:
    """Refuse a NaN scale where the layout's readers take it for a number."""
    if not q.codes.is_meta and bool((q.scales == SCALE_NAN).any()):
        raise MicroscaleError(
            f"tensor {name!r} has blocks that are NaN, which readers of {layout} take for numbers."
        )


def as_type(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes seen as another type."""
    return codes.contiguous().view(dtype)


def formats_of(carried: Mapping[str, Item]) -> dict[str, str]:
    """The format of each module that is carried."""
    return {
        name.removesuffix(".weight"): base_name(item.packed)
        for name, item in carried.items()
        if item.packed is not None
    }


def left_modules(content: Content, carried: Mapping[str, Item]) -> list[str]:
    """Modules whose matrices stay as they are."""
    matrices = (n for n, item in content.items.items() if n not in carried and not is_weight(item))
    return sorted(name.removesuffix(".weight") for name in matrices)


def usual_format(formats: Mapping[str, str]) -> str:
    """The format that most modules have."""
    names = list(formats.values())
    return max(sorted(set(names)), key=names.count)


def byte_scaled(name: str, suffix: str, fmt: str, parts: Parts, dtype: torch.dtype) -> Found:
    """A weight under its own name beside scales of a byte each."""
    block = 16 if fmt == "nvfp4" else 32
    scales = parts[f"{name}{suffix}"].shape
    shape = (*scales[:-1], scales[-1] * block) if scales else ()
    packed = outline(fmt, shape, dtype)

    def join(w: Tensor, s: Tensor, *outer: Tensor) -> BlockTensor:
        codes = w.contiguous().view(torch.uint8)
        return put_together(packed, codes, s.contiguous().view(torch.uint8), *outer)

    return Found(packed, (name, f"{name}{suffix}"), join)


def plain_values(item: Item, x: Tensor) -> Tensor:
    """A packed tensor as values of its own type, which must hold them exactly."""
    if not isinstance(x, BlockTensor):
        return x
    values = x.dequantize(item.dtype)
    if not values.is_meta and not same_values(values, x):
        raise MicroscaleError(
            f"tensor {item.name!r}: {item.dtype} does not hold the values of {x.format} exactly."
        )
    return values


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same values, bit for bit; NaN is NaN."""
    left, right = (_decoded(x) for x in (a, b))
    if left.shape != right.shape:
        return False
    if not left.is_floating_point() or not right.is_floating_point() or left.itemsize == 1:
        return left.dtype == right.dtype and torch.equal(
            left.contiguous().reshape(-1).view(torch.uint8),
            right.contiguous().reshape(-1).view(torch.uint8),
        )
    left, right = left.double(), right.double()
    equal = (left == right) & (left.signbit() == right.signbit())
    return bool((equal | (left.isnan() & right.isnan())).all())


def _decoded(x: Tensor) -> Tensor:
    if not isinstance(x, BlockTensor):
        return x
    return x.dequantize(x.packing.compute)
