"""`microscale quantize` without data: a checkpoint of any size, cast directly."""

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from microscale.checkpoint.direct import quantize_folder
from microscale.commands.console import console
from microscale.errors import MicroscaleError
from microscale.ledger import text_table
from microscale.policy import Policy
from microscale.report.progress import byte_bar


def cast_directly(model: str, policy: Policy, out: Path) -> None:
    """Cast the directory `model` to the directory `out`, and say what became of each tensor."""
    source = Path(model)
    if not source.is_dir():
        raise MicroscaleError(
            f"{model!r} is no directory. Without --data a directory of safetensors is cast; "
            "other models need --data."
        )
    start = time.perf_counter()
    with byte_bar(source.name) as report:
        manifest = quantize_folder(source, policy, out, report=report)
    seconds = time.perf_counter() - start
    terminal = console()
    terminal.print(text_table([_HEAD, *_lines(manifest["tensors"])]), markup=False, soft_wrap=True)
    built = manifest["model"]
    by = f"the model that convert sees ({built})" if built else "names and shapes alone"
    size = sum(manifest["files"].values())
    terminal.print(f"Matched by {by}; cast directly, without calibration data.", markup=False)
    for alias, name in manifest["aliases"].items():
        terminal.print(f"{alias} shares {name}.", markup=False)
    terminal.print(f"{out}: {size / 1e6:.3f} MB in {seconds:.1f} s.", markup=False)


_HEAD = ("tensor", "count", "format", "axis", "bits/value", "notes")


def _lines(tensors: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """Tensors that differ in numbers of their names alone share a line."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for name, tensor in tensors.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        axis = "-" if tensor["axis"] is None else str(tensor["axis"])
        by = "; by its name" if tensor["matched_by"] == "names" else ""
        note = (tensor["reason"] + by).removeprefix("; ")
        groups.setdefault((pattern, tensor["format"] or "as it is", axis, note), []).append(tensor)
    for (pattern, fmt, axis, note), found in groups.items():
        values = sum(_count(tensor["shape"]) for tensor in found)
        bits = f"{8 * sum(t['bytes'] for t in found) / values:.2f}" if values else "-"
        yield pattern, str(len(found)), fmt, axis, bits, note


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
