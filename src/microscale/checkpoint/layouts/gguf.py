"""GGUF, through the `gguf` package: MXFP4 and NVFP4 tensors.

A block of MXFP4 is 17 bytes: the E8M0 byte, then 16 bytes with element j low and j + 16 high. NVFP4
is 36 bytes for 64 elements: four E4M3 bytes, then for each 16 elements 8 bytes with j low and j + 8
high; its tensor scale is a tensor of its own, `NAME.scale`. Tensors keep the names that the
checkpoint gives them; llama.cpp wants its own names and a tokenizer, which its converter adds.
ggml decodes the code of -0 as +0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microscale.checkpoint.header import DTYPES
from microscale.checkpoint.layouts.base import (
    Content,
    Item,
    not_along_last,
    outline,
    plain_values,
    put_together,
    refuse_nan,
)
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor

LONGEST = 63
"""Bytes of a name, as ggml allows them."""
SCALE = ".scale"


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MicroscaleError("GGUF needs the package gguf: pip install gguf.") from error
    return gguf


class Gguf:
    """The layout."""

    name, suffix = "gguf", ".gguf"

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        if len(item.name.encode()) > LONGEST:
            return f"has names of at most {LONGEST} bytes, not {item.name!r}"
        reason = not_along_last(item, "mxfp4", "nvfp4")
        if not reason and "nvfp4" in str(item.packed) and item.shape[-1] % 64:
            return f"has NVFP4 in blocks of 64; {item.shape[-1]} is no multiple"
        return reason

    def write(self, content: Content, carried: Mapping[str, Item], path: Path) -> None:
        """Write all tensors to a file."""
        gguf = _package()
        kinds = gguf.GGMLQuantizationType
        kind = content.config.get("model_type")
        writer = gguf.GGUFWriter(path, kind if isinstance(kind, str) else "unknown")
        try:
            for name, item in content.items.items():
                x = item.load()
                if name not in carried:
                    _add_plain(writer, kinds, name, plain_values(item, x))
                    continue
                assert isinstance(x, BlockTensor)
                if x.format.tensor_scale is None:
                    refuse_nan(name, x, self.name)
                    writer.add_tensor(name, _mxfp4(x), raw_dtype=kinds.MXFP4)
                else:
                    writer.add_tensor(name, _nvfp4(name, x), raw_dtype=kinds.NVFP4)
                    writer.add_tensor(f"{name}{SCALE}", x.tensor_scale.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def read(self, path: Path) -> Content:
        """Open a file."""
        gguf = _package()
        try:
            reader = gguf.GGUFReader(path)
            tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise MicroscaleError(f"{path} is not a GGUF file, or damaged: {text}.") from error
        scales = {f"{n}{SCALE}" for n, t in tensors.items() if t.tensor_type.name == "NVFP4"}
        items = {n: _item(n, tensors, path) for n in tensors if n not in scales}
        return Content(self.name, path, dict(sorted(items.items())))


def _add_plain(writer: Any, kinds: Any, name: str, x: Tensor) -> None:
    if not x.dim():
        raise MicroscaleError(f"tensor {name!r} has no dimension, which GGUF cannot hold.")
    if len(name.encode()) > LONGEST:
        raise MicroscaleError(f"tensor {name!r}: names of GGUF have at most {LONGEST} bytes.")
    if x.dtype is torch.bfloat16:
        raw = x.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=kinds.BF16)
        return
    known = (torch.float32, torch.float16, torch.float64, torch.int8, torch.int16, torch.int32)
    if x.dtype not in (*known, torch.int64):
        raise MicroscaleError(f"tensor {name!r} is {x.dtype}, which GGUF cannot hold.")
    writer.add_tensor(name, x.contiguous().numpy())


def _halves(codes: Tensor, half: int) -> Tensor:
    """Codes of neighbours in one byte to codes that are `half` apart, and back."""
    flat = torch.stack((codes & 15, codes >> 4), -1).reshape(-1, 2, half)
    return flat[:, 0] | flat[:, 1] << 4


def _neighbours(packed: Tensor, half: int) -> Tensor:
    flat = torch.cat((packed & 15, packed >> 4), -1).reshape(-1, half, 2)
    return flat[..., 0] | flat[..., 1] << 4


def _mxfp4(q: BlockTensor) -> Any:
    blocks = torch.cat((q.scales.reshape(-1, 1), _halves(q.codes.reshape(-1, 16), 16)), 1)
    return blocks.reshape(*q.shape[:-1], -1).numpy()


def _nvfp4(name: str, q: BlockTensor) -> Any:
    if bool((q.scales >= 127).any()):
        raise MicroscaleError(f"tensor {name!r} has scales that ggml does not decode (NaN, < 0).")
    codes = _halves(q.codes.reshape(-1, 8), 8).reshape(-1, 32)
    blocks = torch.cat((q.scales.reshape(-1, 4), codes), 1)
    return blocks.reshape(*q.shape[:-1], -1).numpy()


def _item(name: str, tensors: Mapping[str, Any], path: Path) -> Item:
    tensor = tensors[name]
    shape, kind = tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name
    file = "model.safetensors"
    if kind in {"MXFP4", "NVFP4"}:
        packed = outline(kind.lower(), shape, torch.float32)
        outer = tensors.get(f"{name}{SCALE}")
        return Item(name, file, shape, torch.float32, packed, lambda: _load(packed, tensor, outer))
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    if kind in dtypes:
        dtype = DTYPES[dtypes[kind]]
    elif kind in {"I8", "I16", "I32", "I64"}:
        dtype = getattr(torch, f"int{kind[1:]}")
    else:
        raise MicroscaleError(f"{path}: tensor {name!r} is {kind}, which is not read here.")

    def load() -> Tensor:
        raw = np.ascontiguousarray(tensor.data).view(np.uint8)
        return torch.from_numpy(raw.copy()).reshape(-1).view(dtype).reshape(shape)

    return Item(name, file, shape, dtype, None, load)


def _load(packed: Any, tensor: Any, outer: Any) -> BlockTensor:
    data = torch.from_numpy(np.ascontiguousarray(tensor.data).view(np.uint8).copy())
    if packed.format == "mxfp4":
        blocks = data.reshape(-1, 17)
        return put_together(packed, _neighbours(blocks[:, 1:], 16), blocks[:, 0])
    blocks = data.reshape(-1, 36)
    scale = torch.ones(1) if outer is None else torch.from_numpy(np.array(outer.data))
    return put_together(packed, _neighbours(blocks[:, 4:].reshape(-1, 8), 8), blocks[:, :4], scale)
