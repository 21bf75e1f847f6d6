"""Calls of the compiled core, recorded with all memory they touch, so that others can repeat them.

A file is the number of calls, then for each: the function's number; its regions of memory, each as
size, distance from a cache line, whether it is a tensor's, and bytes; the pointers in them, each as
region, offset, region and offset pointed to; eight arguments, each as region (or -1) and offset (or
number). tests/native/replay.cpp reads it.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microscale.kernels.native.products import PackedRecord
from microscale.kernels.native.records import Job

Record = type[ctypes.Structure]
TABLE_BYTES = 256 * 4  # of a table of values by code

# By name: its arguments, as a record, a pointer to a tensor (None) or a number.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ms_cast": (Job, None, None, None),
    "ms_quantize": (Job, None, None, None, None, None),
    "ms_dequantize": (Job, None, None, None, None),
    "ms_linear": (PackedRecord, None, int, int, None, None, int, int),
    "ms_linear_packed": (PackedRecord, PackedRecord, None, None, int, int),
}


@dataclass
class Region:
    """Memory of one object, by its address; the type of its values if it is a tensor's."""

    address: int
    before: bytes
    dtype: torch.dtype | None = None

    @property
    def size(self) -> int:
        return len(self.before)

    def now(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


@dataclass
class Call:
    """A call, and what it left in the memory of its tensors."""

    function: str
    regions: list[Region] = field(default_factory=list)
    pointers: list[tuple[int, int, int, int]] = field(default_factory=list)
    arguments: list[tuple[int, int]] = field(default_factory=list)
    after: list[tuple[torch.dtype, bytes]] = field(default_factory=list)
    status: int = 0

    def packed(self) -> bytes:
        """The call as it stands in the file."""
        parts = [_numbers(list(FUNCTIONS).index(self.function), len(self.regions))]
        for r in self.regions:
            parts += [_numbers(r.size, r.address % 64, r.dtype is not None), r.before]
        parts.append(_numbers(len(self.pointers), *(n for p in self.pointers for n in p)))
        filled = [*self.arguments, *[(-1, 0)] * (8 - len(self.arguments))]
        return b"".join([*parts, _numbers(*(n for a in filled for n in a))])


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


class Recorder:
    """Stands for the library, passes calls on and keeps them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.calls = library, list[Call]()
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.dtype]] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        return self._recording(name, function) if name in FUNCTIONS else function

    def _recording(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            call = Call(name)
            for kind, given in zip(FUNCTIONS[name], arguments, strict=True):
                call.arguments.append(self._argument(call, kind, given))
            call.status = function(*arguments)
            call.after = [(r.dtype, r.now()) for r in call.regions if r.dtype is not None]
            self.calls.append(call)
            return call.status

        return run

    def _argument(self, call: Call, kind: Any, given: Any) -> tuple[int, int]:
        if kind is int or not given:
            return -1, given or 0
        if kind is None:
            return self._tensor(call, given)
        address = given if isinstance(given, int) else ctypes.addressof(given)
        return self._record(call, kind, address), 0

    def _record(self, call: Call, kind: Record, address: int) -> int:
        """A record, and everything that it points to."""
        here = len(call.regions)
        call.regions.append(Region(address, ctypes.string_at(address, ctypes.sizeof(kind))))
        record = kind.from_address(address)
        for name, of, *_ in kind._fields_:
            value, offset = getattr(record, name), getattr(kind, name).offset
            if of is ctypes.c_void_p and value:
                found = self._table(call, value) if "values" in name else self._tensor(call, value)
                call.pointers.append((here, offset, *found))
            elif hasattr(value, "contents"):
                target = ctypes.addressof(value.contents)
                inner = self._record(call, type(value.contents), target)
                call.pointers.append((here, offset, inner, 0))
        return here

    def _table(self, call: Call, address: int) -> tuple[int, int]:
        call.regions.append(Region(address, ctypes.string_at(address, TABLE_BYTES)))
        return len(call.regions) - 1, 0

    def _tensor(self, call: Call, address: int) -> tuple[int, int]:
        """The storage that an address lies in, once for each call."""
        for number, region in enumerate(call.regions):
            inside = region.address <= address <= region.address + region.size
            if region.dtype is not None and inside:
                return number, address - region.address
        for base, (storage, dtype) in self.storages.items():
            if base <= address <= base + storage.nbytes():
                size = storage.nbytes()
                call.regions.append(Region(base, ctypes.string_at(base, size), dtype))
                return len(call.regions) - 1, address - base
        raise AssertionError(f"{address:#x} is in no tensor")

    def file(self) -> bytes:
        """All calls."""
        return b"".join([_numbers(len(self.calls)), *(call.packed() for call in self.calls)])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note every tensor whose address is asked for, and keep its memory meanwhile."""
        original = torch.Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage, tensor.dtype
            return original(tensor)

        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del torch.Tensor.data_ptr
            self.storages.clear()


def differences(calls: list[Call], replayed: bytes | bytearray) -> list[str]:
    """What the memory held otherwise after the repeated calls; every NaN is one."""
    found, at = [], 0
    for number, call in enumerate(calls):
        status = int.from_bytes(replayed[at : at + 4], "little", signed=True)
        at += 4
        same = status == call.status
        for dtype, expected in call.after:
            same &= _equal(dtype, expected, replayed[at : at + len(expected)])
            at += len(expected)
        if not same:
            found.append(f"call {number}, {call.function}")
    if at != len(replayed):
        found.append(f"{len(replayed) - at} bytes too many")
    return found


def _equal(dtype: torch.dtype, a: bytes, b: bytes | bytearray) -> bool:
    if a == b:
        return True
    if len(a) != len(b) or not dtype.is_floating_point:
        return False
    x, y = (torch.from_numpy(np.frombuffer(part, np.uint8).copy()).view(dtype) for part in (a, b))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return bool(((x.view(bits) == y.view(bits)) | (x.isnan() & y.isnan())).all())
