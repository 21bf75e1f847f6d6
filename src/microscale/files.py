"""Output files: refused before any work, written whole or not at all."""

import os
from pathlib import Path

from microscale.errors import MicroscaleError


def check_output(path: Path, argument: str) -> Path:
    """Check that a file can be written at `path`, which came as `argument`; return the path.

    Meant to be called before the work whose result goes there. Raises MicroscaleError where the
    path is a folder, or its folder is missing or may not be written to.
    """
    folder = path.parent
    if path.is_dir():
        raise MicroscaleError(f"{argument} {str(path)!r} is a folder; name a file in it.")
    if not folder.is_dir():
        raise MicroscaleError(
            f"{argument} {str(path)!r}: there is no folder {str(folder)!r}; make it first."
        )
    if not os.access(folder, os.W_OK):
        raise MicroscaleError(
            f"{argument} {str(path)!r}: the folder {str(folder)!r} may not be written to; "
            "name another one."
        )
    return path


def write_file(path: Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path` in one step.

    The bytes go to a temporary file beside `path`, which then takes its name: whoever
    interrupts the program finds the old file or the new one, never a part. Devices, pipes and
    links are written through instead, for there the name must stay what it is.
    """
    content = data.encode() if isinstance(data, str) else data
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
