"""A checkpoint of any size cast directly, tensor by tensor, slice by slice.

Memory holds a slice for each thread, whatever the size of the model. A slice is a number of rows
of a tensor. Where a scale is shared by more than a row (a tensor scale, say) it is the
whole tensor. What is written is what `convert` and `save` would write, bit for bit.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch

from microscale.checkpoint.folder import INDEX, SINGLE, Entry, Folder, Shard, inside, open_folder
from microscale.checkpoint.header import DTYPES, KEY, Header, Packed
from microscale.checkpoint.matching import Match, Matched, match
from microscale.checkpoint.writer import (
    MANIFEST,
    NewFolder,
    ShardWriter,
    Spec,
    tag_of,
    write_durably,
)
from microscale.errors import MicroscaleError
from microscale.formats import row_dimension
from microscale.policy import Policy
from microscale.tensor import quantize
from microscale.version import __version__

SLICE = 16 << 20
"""Bytes of a source tensor that are read at once."""
THREADS = 4
"""Shards that are worked on at once, at most: each takes memory for a slice."""
POLICY = "policy.toml"
BESIDES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of a model directory that are copied: configuration and tokenizer."""

Report = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and of how many."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """One tensor to be written: its name, where its values are, what becomes of it."""

    name: str
    entry: Entry
    found: Match

    @property
    def packed(self) -> Packed | None:
        """How it is packed, if it is."""
        if self.found.operand is None:
            return None
        wide = "float64" if self.entry.dtype is torch.float64 else "float32"
        names = {dtype: name for name, dtype in DTYPES.items()}
        spelled, kind = str(self.found.operand.format), names[self.entry.dtype]
        return Packed(spelled, self.found.axis, wide, self.entry.shape, kind)

    @property
    def specs(self) -> Iterator[Spec]:
        """What is stored."""
        packed = self.packed
        if packed is None:
            yield self.name, self.entry.tag, self.entry.shape
            return
        expected = packed.expected()
        for part, place in packed.parts.items():
            x = expected[place]
            yield f"{self.name}.{part}", tag_of(x.dtype), tuple(x.shape)

    @property
    def step(self) -> int:
        """Rows of a slice; 0 where the tensor cannot be cut."""
        shape, operand = self.entry.shape, self.found.operand
        if len(shape) < 2 or not shape[0] or not self.entry.nbytes:
            return 0
        rows = max(1, SLICE * shape[0] // self.entry.nbytes)
        if operand is None:
            return rows
        fmt, axis = operand.format, self.found.axis
        if axis == 0 or fmt.tensor_scale is not None or fmt.block == "tensor":
            return 0
        if isinstance(fmt.block, tuple) and row_dimension(len(shape), axis) == 0:
            return max(rows // fmt.block[0], 1) * fmt.block[0]
        return rows


def quantize_folder(
    source: Path, policy: Policy, out: Path, *, report: Report | None = None
) -> dict[str, Any]:
    """Cast the weights of a safetensors directory as `policy` says, and write the directory `out`.

    `out` appears when all of it is on the disk. Until then the work is in `.NAME.partial` beside
    it; the same call goes on there, redoes no finished shard, and ends with the same bytes.

    Returns what stands in its manifest: every tensor with its format or why it was kept. Raises
    MicroscaleError, before anything is written, for a source or policy that does not fit, and
    for work that was begun with another source, policy or version.
    """
    folder = open_folder(source)
    if "quantization_config" in folder.config:
        raise MicroscaleError(
            f"{str(source)!r} is quantized already (config.json says so); microscale export "
            "changes its layout."
        )
    if policy.backward_operands:
        raise MicroscaleError(
            f"policy {policy.backward_operands[0]} is set; a checkpoint holds the forward pass."
        )
    settings = [("rotation", policy.rotation), *(s for _, each in policy.overrides for s in each)]
    if any(path == "rotation" and value != "off" for path, value in settings):
        raise MicroscaleError(
            "policy rotation is set, which turns the layers of a model; microscale quantize with "
            "--data does that. A direct cast reads tensors one by one."
        )
    matched = match(folder, policy)
    run = {"source": folder.fingerprint, "policy": policy.to_dict(), "version": __version__}
    new = NewFolder(out, run)
    plans = {name: list(_plan(shard, matched)) for name, shard in folder.shards.items()}
    writers = _writers(plans, matched, policy, new.partial)
    with new.opened(sum(writer.size for writer in writers.values())):
        _copy_besides(folder, new.partial, policy)
        _write_index(writers, new.partial)
        _run(folder, plans, writers, report)
        manifest = _manifest(run, matched, plans, writers)
        new.finish(manifest)
    return manifest


def _plan(shard: Shard, matched: Matched) -> Iterator[_Tensor]:
    for name, found in matched.matches.items():
        entry = shard.entries.get(matched.sources.get(name, name))
        if entry is not None:
            yield _Tensor(name, entry, found)


def _writers(
    plans: Mapping[str, list[_Tensor]], matched: Matched, policy: Policy, partial: Path
) -> dict[str, ShardWriter]:
    found = {}
    for name, tensors in plans.items():
        own = {tensor.name for tensor in tensors}
        packed = {t.name: p for t in tensors if (p := t.packed) is not None}
        aliases = {alias: of for alias, of in matched.aliases.items() if of in own}
        header = Header(packed, aliases, policy.to_dict())
        specs = [spec for tensor in tensors for spec in tensor.specs]
        found[name] = ShardWriter(partial / name, specs, {KEY: header.to_json(), "format": "pt"})
    return found


def _run(
    folder: Folder,
    plans: Mapping[str, list[_Tensor]],
    writers: Mapping[str, ShardWriter],
    report: Report | None,
) -> None:
    """Write every shard that is not finished, several at once; the first error ends all."""
    total = sum(t.entry.nbytes for tensors in plans.values() for t in tensors)
    done, lock, stopped = 0, Lock(), Event()

    def advance(size: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise MicroscaleError("stopped, since another shard failed.")
        with lock:
            done += size
            if report is not None:
                report(done, total)

    def work(name: str) -> None:
        if writers[name].is_finished:
            advance(sum(tensor.entry.nbytes for tensor in plans[name]))
            return
        with writers[name] as writer:
            for tensor in plans[name]:
                _write(folder.shards[name], tensor, writer, advance)

    threads = min(THREADS, len(writers), os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, name) for name in writers]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in ended:
                    future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write(
    shard: Shard, tensor: _Tensor, writer: ShardWriter, advance: Callable[[int], None]
) -> None:
    """Write one tensor, slice by slice."""
    entry, step = tensor.entry, tensor.step
    rows = entry.shape[0] if step else 1
    at: dict[str, int] = {}
    for first in range(0, rows, step or 1):
        count = min(step, rows - first) if step else None
        values = shard.read(entry, first, count)
        for name, part in _parts(tensor, values):
            writer.write(name, part, at.get(name, 0))
            at[name] = at.get(name, 0) + part.nbytes
        advance(values.nbytes)


def _parts(tensor: _Tensor, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    packed, operand = tensor.packed, tensor.found.operand
    if packed is None or operand is None:
        yield tensor.name, values
        return
    q = quantize(values, operand.format, tensor.found.axis, **operand.laws)
    for part, place in packed.parts.items():
        yield f"{tensor.name}.{part}", q.stored[place]


def _copy_besides(folder: Folder, partial: Path, policy: Policy) -> None:
    for pattern in BESIDES:
        for path in sorted(folder.path.glob(pattern)):
            if not path.name.endswith(".index.json") and path.name != MANIFEST:
                shutil.copyfile(inside(folder.path, path.name), partial / path.name)
    if folder.config:
        config = {**folder.config, "quantization_config": {"quant_method": KEY}}
        write_durably(partial / "config.json", json.dumps(config, indent=2) + "\n")
    write_durably(partial / POLICY, policy.to_toml())


def _write_index(writers: Mapping[str, ShardWriter], partial: Path) -> None:
    if list(writers) == [SINGLE]:
        return
    weight_map = {name: shard for shard, writer in writers.items() for name in writer.starts}
    total = sum(writer.size - len(writer.header) for writer in writers.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(partial / INDEX, json.dumps(index, indent=2) + "\n")


def _manifest(
    run: Mapping[str, object],
    matched: Matched,
    plans: Mapping[str, list[_Tensor]],
    writers: Mapping[str, ShardWriter],
) -> dict[str, Any]:
    tensors = {}
    for shard, planned in plans.items():
        for tensor in planned:
            operand = tensor.found.operand
            tensors[tensor.name] = {
                "file": shard,
                "shape": list(tensor.entry.shape),
                "format": None if operand is None else str(operand.format),
                "axis": None if operand is None else tensor.found.axis,
                "reason": tensor.found.reason,
                "matched_by": tensor.found.by,
                "bytes": _bytes(tensor),
            }
    return {
        "version": 1,
        "run": dict(run),
        "model": matched.model,
        "files": {name: writer.size for name, writer in writers.items()},
        "aliases": dict(matched.aliases),
        "tensors": tensors,
    }


def _bytes(tensor: _Tensor) -> int:
    packed = tensor.packed
    if packed is None:
        return tensor.entry.nbytes
    expected = packed.expected()
    return sum(expected[place].nbytes for place in packed.parts.values())
