"""The compiled core: found beside this file or where an installation put it, loaded once.

It is one library with a C interface; ctypes calls it, so it fits every version of Python and
PyTorch. Where it is missing (no compiler at installation) everything runs on the reference kernels.
The variable MICROSCALE_ISA forces an instruction set, or the reference kernels.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  (first, so that the core shares the OpenMP that torch brings)

from microscale.errors import MicroscaleError
from microscale.kernels.native.records import SIZES

VARIABLE = "MICROSCALE_ISA"
REFERENCE = "reference"
LIBRARY = {"win32": "microscale_native.dll", "darwin": "libmicroscale_native.dylib"}.get(
    sys.platform, "libmicroscale_native.so"
)
_PACKAGE_FOLDER = Path("microscale", "kernels", "native")


class Native(NamedTuple):
    """The core, or why there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    reason: str


@lru_cache(maxsize=1)
def native() -> Native:
    """Find, load and check the core once. Raises MicroscaleError for a bad MICROSCALE_ISA."""
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if wanted == REFERENCE:
        return Native(None, None, f"{VARIABLE}={REFERENCE}")
    reason = "the compiled core was not built (no C++ compiler or CMake at installation)"
    for path in _places():
        if path.is_file():
            found = _load(path)
            if found.library is not None:
                if wanted:
                    _force(found.library, wanted)
                return found
            reason = found.reason
    if wanted:
        raise MicroscaleError(
            f"{VARIABLE}={wanted!r}, but {reason}; unset it or set {VARIABLE}={REFERENCE}."
        )
    return Native(None, None, reason)


def _places() -> Iterator[Path]:
    """Where the library may lie: wherever the package might be imported from.

    An editable installation has the sources in one place and the library in another.
    """
    for entry in sys.path:
        yield Path(entry) / _PACKAGE_FOLDER / LIBRARY
    yield Path(__file__).parent / LIBRARY


def _load(path: Path) -> Native:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Native(None, path, f"{path} could not be loaded: {error}")
    if library.ms_sizes() != SIZES:
        return Native(None, path, f"{path} belongs to another version; install the package again")
    library.ms_isa_name.restype = ctypes.c_char_p
    pointers = {"ms_cast": 4, "ms_quantize": 6, "ms_quantize_both": 10, "ms_dequantize": 5}
    for name, count in pointers.items():
        getattr(library, name).argtypes = [ctypes.c_void_p] * count
    return Native(library, path, "")


def _names(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := library.ms_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def usable(library: ctypes.CDLL) -> list[str]:
    """The instruction sets of the core that this machine runs, the least first."""
    return [name for i, name in enumerate(_names(library)) if library.ms_isa_usable(i)]


def lacking(library: ctypes.CDLL) -> list[str]:
    """Those that it does not run."""
    return [name for i, name in enumerate(_names(library)) if not library.ms_isa_usable(i)]


def current(library: ctypes.CDLL) -> str:
    """The instruction set in use."""
    name: str = _names(library)[library.ms_isa()]
    return name


def _force(library: ctypes.CDLL, wanted: str) -> None:
    names = _names(library)
    if wanted in names and library.ms_set_isa(names.index(wanted)) == 0:
        return
    known = ", ".join([REFERENCE, *usable(library)])
    what = "this machine does not run it" if wanted in names else "it is not known"
    raise MicroscaleError(f"{VARIABLE}={wanted!r}: {what}; use one of {known}, or unset it.")
