"""Safetensors files and folders of them, read a slice at a time and never outside their folder.

safetensors itself checks a file's header; tensors are then read with plain reads instead of a map
of the file, whose pages would count as memory of the process.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from microscale.errors import MicroscaleError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TAGS: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
}
"""Types by their tags in safetensors; tensors of others are read as bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its name, tag, shape, and where its bytes lie in its file."""

    name: str
    tag: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The type as torch has it; bytes where it has none."""
        return TAGS.get(self.tag, torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One safetensors file: its tensors and its metadata."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    fingerprint: str
    """Digest of header, size and time of change: a cheap sign that the file is the same."""

    def read(self, entry: Entry, first: int = 0, count: int | None = None) -> Tensor:
        """A tensor, or `count` of its rows from `first`; raises MicroscaleError if cut short."""
        whole = count is None or not entry.shape
        rows = 1 if whole else entry.shape[0]
        size = entry.nbytes if whole else entry.nbytes // max(rows, 1) * (count or 0)
        start = entry.start + (0 if whole else entry.nbytes // max(rows, 1) * first)
        data = self.read_bytes(start, size, entry.name)
        shape = entry.shape if whole else (count or 0, *entry.shape[1:])
        if entry.tag not in TAGS:
            return data
        return data.view(entry.dtype).reshape(shape)

    def read_bytes(self, start: int, size: int, name: str = "") -> Tensor:
        """Bytes of the file, as uint8."""
        data = torch.empty(size, dtype=torch.uint8)
        view, done = memoryview(data.numpy().data), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                while done < size and (read := file.readinto(view[done : done + (1 << 30)])):
                    done += read
        except OSError as error:
            raise MicroscaleError(f"{str(self.path)!r} cannot be read: {error}.") from error
        if done < size:
            raise MicroscaleError(
                f"{str(self.path)!r}: tensor {name!r} ends early; the file was changed."
            )
        return data


def open_shard(path: Path) -> Shard:
    """Read the header of a safetensors file; raises MicroscaleError for anything else."""
    if not path.is_file():
        raise MicroscaleError(f"{path}: there is no such file.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            state = os.fstat(file.fileno())
    except (safetensors.SafetensorError, OSError) as error:
        raise MicroscaleError(f"{path} is not a safetensors file, or damaged: {error}.") from error
    try:
        table = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise MicroscaleError(f"{path} has a header that is not JSON: {error}.") from error
    table.pop("__metadata__", None)
    entries = {
        name: Entry(
            name,
            item["dtype"],
            tuple(item["shape"]),
            8 + size + item["data_offsets"][0],
            item["data_offsets"][1] - item["data_offsets"][0],
        )
        for name, item in sorted(table.items())
    }
    mark = header + f"{state.st_size} {state.st_mtime_ns}".encode()
    return Shard(path, entries, metadata, hashlib.sha256(mark).hexdigest())


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """A Hugging Face model directory whose weights are safetensors: its shards by file name."""

    path: Path
    shards: Mapping[str, Shard]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entries(self) -> Iterator[tuple[Shard, Entry]]:
        """Every tensor of every shard."""
        for shard in self.shards.values():
            for entry in shard.entries.values():
                yield shard, entry

    @property
    def fingerprint(self) -> str:
        """Digest of what the shards and the configuration are."""
        marks = {name: shard.fingerprint for name, shard in self.shards.items()}
        text = json.dumps([marks, dict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def open_folder(path: Path) -> Folder:
    """Open a model directory: model.safetensors, or the shards that its index names.

    Nothing outside the directory is opened. Raises MicroscaleError for what is missing, damaged,
    pickled, or leads elsewhere.
    """
    if not path.is_dir():
        raise MicroscaleError(f"{str(path)!r} is no directory; give one of safetensors.")
    names = _shard_names(path)
    shards = {name: open_shard(inside(path, name)) for name in names}
    seen: dict[str, str] = {}
    for name, shard in shards.items():
        for entry in shard.entries:
            if seen.setdefault(entry, name) != name:
                raise MicroscaleError(
                    f"{str(path)!r}: tensor {entry!r} stands in both {seen[entry]!r} and {name!r}."
                )
    config = path / "config.json"
    if not os.path.lexists(config):
        return Folder(path, shards)
    return Folder(path, shards, read_json(inside(path, "config.json")))


def _shard_names(path: Path) -> list[str]:
    index = path / INDEX
    if os.path.lexists(index):
        weight_map = read_json(inside(path, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise MicroscaleError(f"{str(index)!r}: weight_map is no table of names to files.")
        return sorted(set(weight_map.values()))
    if os.path.lexists(path / SINGLE):
        return [SINGLE]
    found = sorted(p.name for p in path.glob("*.safetensors") if not p.name.startswith("."))
    if found:
        return found
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise MicroscaleError(
            f"{str(path)!r} holds {pickles[0]!r}, a pickle, which can run any code when it is "
            "read; save the model as safetensors first (save_pretrained does)."
        )
    raise MicroscaleError(f"{str(path)!r} lacks weights: {SINGLE}, or shards and {INDEX}.")


def inside(folder: Path, name: str) -> Path:
    """The file called `name` directly in `folder`; raises MicroscaleError if it lies elsewhere.

    A link may lead elsewhere in the folder, or as the hub's cache has it: from
    `models--X/snapshots/REVISION` to `models--X/blobs`.
    """
    bad = {"/", "\\", "\0", ":"} & set(name)
    if bad or name in {"", ".", ".."} or name != name.strip():
        raise MicroscaleError(
            f"{str(folder)!r}: {name!r} is not the plain name of a file in this folder."
        )
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
        there, usual = real.exists(), real.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise MicroscaleError(f"{str(path)!r} cannot be followed: {error}.") from error
    cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    blobs = home.parent.parent / "blobs"
    if home not in real.parents and not (cached and real.parent == blobs):
        raise MicroscaleError(
            f"{str(path)!r} is a link that leads out of its folder; copy the file there instead."
        )
    if not usual:
        kind = "is no ordinary file" if there else "does not exist"
        raise MicroscaleError(f"{str(path)!r} {kind}.")
    return real


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; MicroscaleError where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise MicroscaleError(f"{str(path)!r} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise MicroscaleError(f"{str(path)!r} holds {type(content).__name__}, not an object.")
    return content
