"""The loops of probes.cpp, compiled for this machine when they are wanted.

Python cannot write past the caches or fill the multipliers, and torch's own operations are slower
than the memory: these loops are what casts and products are held against.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("probes.cpp")
PAGES = (1, 4)
"""Pages that a thread reads or writes side by side."""
ROUNDS = 1_000_000


class MissingProbesError(Exception):
    """Why the loops could not be compiled."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Compile and load the loops once. Raises MissingProbesError."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise MissingProbesError("there is no g++")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "probes.so")
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
        done = subprocess.run(
            [compiler, *flags, str(SOURCE), "-o", str(built)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise MissingProbesError(f"g++ does not compile {SOURCE.name}: {done.stderr[-300:]}")
        found = ctypes.CDLL(str(built))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.probe_read.argtypes = found.probe_write.argtypes = [pointer, size, number, number]
    found.probe_modify.argtypes = [pointer, size, number, ctypes.c_float, number]
    found.probe_copy.argtypes = [pointer, pointer, size, number, number]
    for name in ("float32", "bfloat16", "amx"):
        peak = getattr(found, f"probe_{name}")
        peak.argtypes, peak.restype = [size, number], size
    return found


def aligned(values: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that starts on a page and has been written."""
    size = values * dtype.itemsize
    raw = torch.zeros(size + 4096, dtype=torch.uint8)
    start = -raw.data_ptr() % 4096
    return raw[start : start + size].view(dtype)


def read(x: Tensor, pages: int = 4) -> None:
    """Read all of x."""
    library().probe_read(x.data_ptr(), x.nbytes, pages, torch.get_num_threads())


def write(y: Tensor, pages: int = 4) -> None:
    """Write all of y past the caches."""
    library().probe_write(y.data_ptr(), y.nbytes, pages, torch.get_num_threads())


def copy(x: Tensor, y: Tensor, pages: int = 4) -> None:
    """Copy x to y past the caches."""
    library().probe_copy(x.data_ptr(), y.data_ptr(), x.nbytes, pages, torch.get_num_threads())


def modify(x: Tensor, pages: int = 1) -> None:
    """Multiply x by 1 where it lies."""
    library().probe_modify(x.data_ptr(), x.nbytes, pages, 1.0, torch.get_num_threads())


def peaks() -> dict[str, tuple[Callable[[], object], int]]:
    """Products of registers alone: name, function, its operations; those that there are."""
    found: dict[str, tuple[Callable[[], object], int]] = {}
    for name in ("float32", "bfloat16", "amx"):
        threads = torch.get_num_threads()
        function = getattr(library(), f"probe_{name}")
        if operations := function(10, threads) * ROUNDS // 10:
            found[name] = (partial(function, ROUNDS, threads), operations)
    return found
