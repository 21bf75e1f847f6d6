"""`export`: a checkpoint from any layout to any other, and every value compared afterwards.

Memory holds a tensor and its like, but all of a GGUF or ONNX file. What is written appears whole or
not at all, and only after it has been read back and found equal. A packed tensor that the new
layout cannot carry is written as plain values where its type holds them exactly; where it does not,
the export is refused.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from microscale.checkpoint.direct import BESIDES
from microscale.checkpoint.folder import INDEX, SINGLE, Folder, inside, open_folder, open_shard
from microscale.checkpoint.header import DTYPES, KEY, Header, read_header
from microscale.checkpoint.layouts.base import (
    Content,
    Found,
    Item,
    Layout,
    Part,
    Parts,
    plain_values,
    same_values,
)
from microscale.checkpoint.layouts.compressed_tensors import CompressedTensors
from microscale.checkpoint.layouts.gguf import Gguf
from microscale.checkpoint.layouts.gpt_oss import GptOss
from microscale.checkpoint.layouts.microscale import Microscale
from microscale.checkpoint.layouts.mlx import Mlx
from microscale.checkpoint.layouts.modelopt import ModelOpt
from microscale.checkpoint.layouts.onnx import Onnx
from microscale.checkpoint.layouts.quark import Quark
from microscale.checkpoint.native import assemble
from microscale.checkpoint.writer import (
    MANIFEST,
    NewFolder,
    ShardWriter,
    Spec,
    tag_of,
    write_durably,
)
from microscale.errors import MicroscaleError, near_names
from microscale.files import check_output
from microscale.tensor import BlockTensor
from microscale.version import __version__

PLAIN = "plain"
FOLDERS: dict[str, Layout] = {
    layout.name: layout
    for layout in (Microscale(), CompressedTensors(), GptOss(), Quark(), ModelOpt(), Mlx())
}


class FileLayout(Protocol):
    """A layout of one file."""

    name: str
    suffix: str

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""

    def write(self, content: Content, carried: Mapping[str, Item], path: Path) -> None:
        """Write all of a checkpoint to a file."""

    def read(self, path: Path) -> Content:
        """Open a file; raises MicroscaleError."""


FILES: dict[str, FileLayout] = {layout.name: layout for layout in (Gguf(), Onnx())}
LAYOUTS = (*FOLDERS, *FILES)
_METHODS = {KEY: KEY, "compressed-tensors": "compressed-tensors", "mxfp4": "gpt-oss"}
_METHODS |= {"quark": "quark", "modelopt": "modelopt"}

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did.

    Attributes:
        source: the layout that was read.
        target: the layout that was written.
        packed: names of tensors that are packed in it.
        values: names of packed tensors that were written as values, with the reason.
        plain: the number of tensors that were plain and still are.
        notes: what is not carried besides.
    """

    source: str
    target: str
    packed: tuple[str, ...]
    values: Mapping[str, str]
    plain: int
    notes: tuple[str, ...]


# ---------------------------------------------------------------- reading


def open_checkpoint(path: Path) -> Content:
    """Open a checkpoint of any layout, without its values; raises MicroscaleError."""
    for layout in FILES.values():
        if path.suffix == layout.suffix and not path.is_dir():
            if not path.is_file():
                raise MicroscaleError(f"{path}: there is no such file.")
            with _named(path, "the file"):
                return _guarded(layout.read(path))
    if path.is_dir():
        with _named(path, "the folder"):
            return _guarded(_read_folder(open_folder(path)))
    shard = open_shard(path)
    with _named(path, "the file"):
        return _guarded(_read_folder(Folder(path.parent, {path.name: shard}), path))


def layout_of(folder: Folder) -> str:
    """The name of a folder's layout, by its headers and its configuration."""
    if any(KEY in shard.metadata for shard in folder.shards.values()):
        return KEY
    table = folder.config.get("quantization_config")
    if isinstance(table, dict):
        method = table.get("quant_method")
        if not isinstance(method, str) or method not in _METHODS:
            raise MicroscaleError(
                f"{str(folder.path)!r}: quantization method {method!r} is not read here; "
                f"known: {', '.join(_METHODS)}."
            )
        return _METHODS[method]
    affine = folder.config.get("quantization")
    return "mlx" if isinstance(affine, dict) and "mode" in affine else PLAIN


def _read_folder(folder: Folder, path: Path | None = None) -> Content:
    name, where = layout_of(folder), path or folder.path
    if name == KEY:
        return _read_own(folder, where)
    parts: Parts = {entry.name: Part(shard, entry) for shard, entry in folder.entries}
    found: dict[str, Found] = {}
    if name != PLAIN:
        found = dict(FOLDERS[name].find(parts, folder.config))
    items = {n: _item(n, f, parts, where) for n, f in found.items()}
    used = {part for f in found.values() for part in f.names}
    for stored, part in parts.items():
        if stored not in used:
            items[stored] = _plain(part)
    return Content(name, where, dict(sorted(items.items())), folder.config)


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Have an error say which file and tensor it is about."""
    try:
        yield
    except _DAMAGES as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, MicroscaleError) and str(path) in text:
            raise
        raise MicroscaleError(f"{path}: {what}: {text.rstrip('.')}.") from error


_DAMAGES = (
    *(RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(OverflowError, RecursionError, MemoryError),
)
"""What damaged files make the libraries raise."""


def _guarded(content: Content) -> Content:
    """The same, its errors naming file and tensor."""

    def guarded(item: Item) -> Item:
        def load() -> Tensor:
            with _named(content.path, f"tensor {item.name!r}"):
                return item.load()

        return replace(item, load=load)

    return replace(content, items={name: guarded(item) for name, item in content.items.items()})


def _item(name: str, found: Found, parts: Parts, where: Path) -> Item:
    def load() -> Tensor:
        return found.join(*(parts[part].read() for part in found.names))

    with _named(where, f"tensor {name!r}"):
        wanted = sum(part.nbytes for part in found.packed.expected())
        stored = sum(parts[part].entry.nbytes for part in found.names)
        if wanted > stored + 8 * 16 and wanted > 2 * stored:
            raise MicroscaleError(f"its parts hold {stored} bytes, not {wanted}")
    packed = found.packed
    file = parts[found.names[0]].shard.path.name
    return Item(name, file, packed.shape, DTYPES[packed.dtype], packed, load)


def _plain(part: Part) -> Item:
    entry = part.entry
    return Item(entry.name, part.shard.path.name, entry.shape, entry.dtype, None, part.read)


def _read_own(folder: Folder, where: Path) -> Content:
    items: dict[str, Item] = {}
    aliases: dict[str, str] = {}
    policy = None
    for file, shard in folder.shards.items():
        header = read_header(shard.metadata.get(KEY, ""), str(shard.path))
        parts = {name: Part(shard, entry) for name, entry in shard.entries.items()}
        for name, packed in header.packed.items():
            names = {f"{name}.{part}" for part in packed.parts}
            if lacking := names - parts.keys():
                raise MicroscaleError(f"{shard.path}: tensor {name!r} lacks {min(lacking)!r}.")
            stored = {part: parts.pop(part) for part in names}

            def load(name: str = name, packed: Any = packed, stored: Any = stored) -> Tensor:
                read = {key: part.read() for key, part in stored.items()}
                return assemble(name, packed, read, str(where))

            items[name] = Item(name, file, packed.shape, DTYPES[packed.dtype], packed, load)
        items |= {name: _plain(part) for name, part in parts.items()}
        aliases |= header.aliases
        policy = header.policy
    return Content(KEY, where, dict(sorted(items.items())), folder.config, aliases, policy)


# ---------------------------------------------------------------- writing


def export(source: Path, target: str, out: Path, *, report: Report | None = None) -> Exported:
    """Write the checkpoint `source`, of any layout, to `out` in the layout `target`.

    `out` is a new folder, or a file for gguf and onnx. Every tensor is read back and compared
    before `out` gets its name.

    Raises:
        MicroscaleError: a layout that is not known or carries none of the packed tensors, values
            that it cannot hold exactly, a source that is damaged.
    """
    if target not in LAYOUTS:
        raise MicroscaleError(f"layout {target!r} is not known.{near_names(target, LAYOUTS)}")
    content = open_checkpoint(source)
    layout = FOLDERS.get(target) or FILES[target]
    refusals = {n: layout.refusal(i) for n, i in content.items.items() if i.packed is not None}
    carried = {name: content.items[name] for name, reason in refusals.items() if not reason}
    if not carried:
        why = min(refusals.values(), default="packs weights, and there are none that are packed")
        raise MicroscaleError(f"{str(source)!r}: {target} {why}.")
    values = {name: reason for name, reason in refusals.items() if reason}
    tell = report or (lambda *_: None)
    if target in FOLDERS:
        _write_folder(content, FOLDERS[target], carried, out, tell)
    else:
        _write_file(content, FILES[target], carried, out, tell)
    plain = len(content.items) - len(refusals)
    notes = tuple(_notes(content, target))
    return Exported(content.layout, target, tuple(carried), values, plain, notes)


def _notes(content: Content, target: str) -> Iterator[str]:
    if target != KEY and content.policy is not None:
        yield "The formats of activations are not carried; weights alone are."
    if content.aliases and target != KEY:
        yield "Tied weights are stored once, as config.json says."


def _encoded(
    item: Item, layout: Layout, carried: Mapping[str, Item], x: Tensor
) -> dict[str, Tensor]:
    if item.name in carried:
        assert isinstance(x, BlockTensor)
        return layout.encode(item.name, x)
    return {item.name: plain_values(item, x)}


def _specs(item: Item, layout: Layout, carried: Mapping[str, Item]) -> Iterator[Spec]:
    empty = (
        torch.empty(item.shape, dtype=item.dtype, device="meta")
        if item.packed is None
        else item.outline
    )
    for name, x in _encoded(item, layout, carried, empty).items():
        yield name, tag_of(x.dtype), tuple(x.shape)


def _write_folder(
    content: Content, layout: Layout, carried: Mapping[str, Item], out: Path, report: Report
) -> None:
    new = NewFolder(out, {"export": layout.name, "version": __version__})
    writers = {}
    for file in sorted({item.file for item in content.items.values()}):
        items = [item for item in content.items.values() if item.file == file]
        specs = [spec for item in items for spec in _specs(item, layout, carried)]
        name = file if file.endswith(".safetensors") else SINGLE
        writers[file] = ShardWriter(new.partial / name, specs, _metadata(content, layout, items))
    with new.opened(sum(writer.size for writer in writers.values())), new.fresh():
        _copy_besides(content, layout, carried, new.partial)
        done = 0
        for file, writer in writers.items():
            with writer:
                for item in (i for i in content.items.values() if i.file == file):
                    report(f"writing {item.name}", done, 2 * len(content.items))
                    x = item.load()
                    for name, part in _encoded(item, layout, carried, x).items():
                        writer.write(name, part)
                    done += 1
        _write_index(writers, new.partial)
        _check(content, new.partial, done, report)
        new.finish({"layout": layout.name, "microscale": __version__})


def _metadata(content: Content, layout: Layout, items: list[Item]) -> dict[str, str]:
    if layout.name != KEY:
        return {"format": "mlx" if layout.name == "mlx" else "pt"}
    own = {item.name for item in items}
    packed = {item.name: item.packed for item in items if item.packed is not None}
    aliases = {alias: of for alias, of in content.aliases.items() if of in own}
    return {KEY: Header(packed, aliases, content.policy).to_json(), "format": "pt"}


def _copy_besides(
    content: Content, layout: Layout, carried: Mapping[str, Item], partial: Path
) -> None:
    folder = content.path if content.path.is_dir() else None
    for pattern in BESIDES if folder else ():
        for path in sorted(folder.glob(pattern)) if folder else ():
            if not path.name.endswith(".index.json") and path.name not in _OWN:
                shutil.copyfile(inside(path.parent, path.name), partial / path.name)
    plain = {k: v for k, v in content.config.items() if k not in _SAYS_QUANTIZED}
    for file, table in layout.describe(content, carried).items():
        merged = {**plain, **table} if file == "config.json" else table
        write_durably(partial / file, json.dumps(merged, indent=2) + "\n")


_OWN = {MANIFEST, "run.json", "hf_quant_config.json", "config.json", "calibration.json"}
_SAYS_QUANTIZED = {"quantization_config", "quantization"}


def _write_index(writers: Mapping[str, ShardWriter], partial: Path) -> None:
    if len(writers) == 1 and next(iter(writers.values())).path.name == SINGLE:
        return
    weight_map = {name: w.path.name for w in writers.values() for name in w.starts}
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(partial / INDEX, json.dumps(index, indent=2) + "\n")


def _write_file(
    content: Content, layout: FileLayout, carried: Mapping[str, Item], out: Path, report: Report
) -> None:
    check_output(out, "--out")
    if out.exists():
        raise MicroscaleError(f"--out {str(out)!r} exists already; name a new file.")
    if out.suffix != layout.suffix:
        raise MicroscaleError(f"--out {str(out)!r}: files of {layout.name} end in {layout.suffix}.")
    temporary = out.with_name(f".{out.stem}.partial{layout.suffix}")
    try:
        report("writing", 0, None)
        layout.write(content, carried, temporary)
        _check(content, temporary, len(content.items), report)
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)


def _check(content: Content, path: Path, done: int, report: Report) -> None:
    """Read back what was written and compare every value."""
    written = open_checkpoint(path)
    if odd := written.items.keys() ^ content.items.keys():
        raise MicroscaleError(f"{str(path)!r}: tensor {min(odd)!r} was not written as it was.")
    for n, (name, item) in enumerate(content.items.items()):
        report(f"comparing {name}", done + n, done + len(content.items))
        if not same_values(item.load(), written.items[name].load()):
            raise MicroscaleError(
                f"tensor {name!r} came back with other values, so nothing was written."
            )
