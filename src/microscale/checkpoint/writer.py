"""A safetensors file written a slice at a time, and a folder that appears whole or not at all.

A file's header is known before its data: names, types and shapes. So the data can be written in any
order, and memory holds a slice. A file is written under a temporary name, flushed to the disk and
renamed; a folder likewise, the manifest being its last file.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from microscale.checkpoint.folder import TAGS
from microscale.errors import MicroscaleError

MANIFEST = "microscale.json"
_RUN = "run.json"
_NAMES = {dtype: tag for tag, dtype in TAGS.items()}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

Spec = tuple[str, str, tuple[int, ...]]
"""Name, tag and shape of a tensor to be written."""


def tag_of(dtype: torch.dtype) -> str:
    """The tag of a type."""
    return _NAMES[dtype]


class ShardWriter:
    """One file to be; `write` takes pieces, `finish` gives it its name."""

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: Mapping[str, str]) -> None:
        """Lay the tensors out; the widest types come first, so that all are aligned."""
        self.path, self.temporary = path, path.with_name(f".{path.name}.partial")
        self.starts: dict[str, int] = {}
        table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, tag, shape in sorted(specs, key=lambda s: (-_bits(s[1]), s[0])):
            if name in self.starts:
                raise MicroscaleError(f"two tensors would be stored as {name!r}; rename one.")
            size = -(-_bits(tag) * _count(shape) // 8)
            self.starts[name] = offset
            table[name] = {
                "dtype": tag,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(table, separators=(",", ":"), sort_keys=True).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + offset
        self._fd = -1

    @property
    def is_finished(self) -> bool:
        """Whether the file is there: it only gets its name when it is whole."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self.header)) == self.header

    def __enter__(self) -> Self:
        """Begin."""
        self._fd = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._put(memoryview(self.header), 0)
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """Finish, or leave the temporary file to be written again."""
        try:
            if kind is None:
                os.ftruncate(self._fd, self.size)
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
        if kind is None:
            self.temporary.rename(self.path)
            sync_folder(self.path.parent)

    def write(self, name: str, data: Tensor, at: int = 0) -> None:
        """Write a piece of a tensor, `at` bytes after its start."""
        flat = data.contiguous().reshape(-1)
        if flat.numel():
            view = flat.view(torch.uint8).numpy().data
            self._put(view, len(self.header) + self.starts[name] + at)

    def _put(self, data: memoryview, at: int) -> None:
        while len(data):
            done = os.pwrite(self._fd, data[: 1 << 30], at)
            data, at = data[done:], at + done


def _bits(tag: str) -> int:
    return _BITS.get(tag) or TAGS[tag].itemsize * 8


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, text: str) -> None:
    """Write a small file whole, and have it on the disk before it gets its name."""
    temporary = path.with_name(f".{path.name}.partial")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    sync_folder(path.parent)


class NewFolder:
    """A folder being made at `.NAME.partial`; it becomes `NAME` when all is in it.

    `run` says what is being done (source, policy, version); a folder begun by another run is
    refused. Finished files in it are kept.
    """

    def __init__(self, path: Path, run: Mapping[str, object]) -> None:
        """Check, before anything is written, that the folder can be made."""
        self.path, self.run = path, json.loads(json.dumps(run))
        parent = path.absolute().parent
        self.partial = parent / f".{path.name}.partial"
        if path.name in {"", ".", ".."}:
            raise MicroscaleError(f"--out {str(path)!r} is not the name of a new folder.")
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise MicroscaleError(f"--out {str(path)!r} exists already; name a new folder.")
        if not parent.is_dir():
            raise MicroscaleError(
                f"--out {str(path)!r}: there is no folder {str(parent)!r}; make it first."
            )
        if not os.access(parent, os.W_OK):
            raise MicroscaleError(
                f"--out {str(path)!r}: the folder {str(parent)!r} may not be written to; "
                "name another one."
            )

    @contextmanager
    def opened(self, size: int) -> Iterator[Path]:
        """The folder to write to, held against other processes; `size` is what it will take."""
        with _refused(self.path):
            self._begin(size)
            fd = os.open(self.partial, os.O_RDONLY)
            try:
                self._lock(fd)
                yield self.partial
            finally:
                os.close(fd)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Begin anew in an opened folder, and leave nothing of it after an error."""
        for left in self.partial.iterdir():
            if left.name != _RUN:
                left.unlink()
        try:
            yield
        except BaseException:
            shutil.rmtree(self.partial)
            raise

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Write the manifest and give the folder its name."""
        write_durably(self.partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for left in (*self.partial.glob(".*.partial"), self.partial / _RUN):
            left.unlink(missing_ok=True)
        sync_folder(self.partial)
        self.partial.rename(self.path)
        sync_folder(self.path.absolute().parent)

    def _begin(self, size: int) -> None:
        record = self.partial / _RUN
        if (self.partial / MANIFEST).is_file() and not record.is_file():
            # Killed between the last two steps; the manifest holds the run too.
            begun = json.loads((self.partial / MANIFEST).read_text()).get("run")
        else:
            begun = json.loads(record.read_text()) if record.is_file() else None
        if begun is None:
            free = shutil.disk_usage(self.partial.parent).free
            if size > free:
                raise MicroscaleError(
                    f"--out {str(self.path)!r} needs {size / 1e6:.1f} MB, and its disk has "
                    f"{free / 1e6:.1f} MB left; make room or name another one."
                )
            self.partial.mkdir(exist_ok=True)
            write_durably(record, json.dumps(self.run) + "\n")
        elif begun != self.run:
            other = [key for key in self.run if begun.get(key) != self.run[key]]
            raise MicroscaleError(
                f"{str(self.partial)!r} was begun with another {' and '.join(other)}; go on with "
                "what it was begun with, or delete it."
            )

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MicroscaleError(
                f"{str(self.partial)!r} is being written by another process."
            ) from error


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """One error for a disk that is full or may not be written to."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        mend = "make room and give the same command again" if full else "name another folder"
        raise MicroscaleError(
            f"--out {str(path)!r} cannot be written: {error.strerror}; {mend}."
        ) from error
