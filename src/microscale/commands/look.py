"""`microscale inspect` of a packed checkpoint: what it holds, or how it differs from another."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from microscale.checkpoint.export import FILES, PLAIN, layout_of
from microscale.checkpoint.folder import Folder, open_folder, open_shard
from microscale.checkpoint.look import Difference, Look, difference, look
from microscale.commands.console import STANDARD_OUTPUT, console, write_json
from microscale.errors import MicroscaleError
from microscale.files import check_output
from microscale.ledger import text_table
from microscale.report.figures import check_picture, write_figure
from microscale.report.progress import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST = 40
"""Tensors that the picture of a difference shows."""


def is_packed(path: Path) -> bool:
    """Whether there is a packed checkpoint, or a file that can only be one."""
    if path.is_file():
        return path.suffix in {".safetensors", *(layout.suffix for layout in FILES.values())}
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        return False
    config = path / "config.json"
    if config.is_file() and b"quantization" in config.read_bytes():
        return layout_of(open_folder(path)) != PLAIN
    first = min(path.glob("*.safetensors"))
    return layout_of(Folder(path, {first.name: open_shard(first)})) != PLAIN


def run_look(path: Path, other: Path | None, json_file: Path | None, picture: Path | None) -> None:
    """Show a checkpoint, or with `other` how the two differ in values."""
    if json_file is not None and json_file != STANDARD_OUTPUT:
        check_output(json_file, "--json")
    if picture is not None:
        if other is None:
            raise MicroscaleError("--picture shows how two checkpoints differ; give --diff OTHER.")
        check_picture(picture)
    usual = json_file != STANDARD_OUTPUT
    terminal = console() if usual else Console(stderr=True, highlight=False)
    with bars(path.name) as report:
        if other is None:
            content, looks = look(path, report)
            record: dict[str, Any] = {"layout": content.layout, "tensors": [*map(asdict, looks)]}
            lines = [f"{path}: {content.layout}", "", *_shown(looks)]
        else:
            found = difference(path, other, report)
            record = {"tensors": [*map(asdict, found)]}
            lines = _differing(found)
            if picture is not None:
                write_figure(_draw(found, path.name, other.name), picture)
    terminal.print("\n".join(lines), markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, _finite(record))


def _finite(record: dict[str, Any]) -> Any:
    """JSON has no infinity: null stands for it."""
    return json.loads(json.dumps(record), parse_constant=lambda _: None)


def _shown(looks: Sequence[Look]) -> list[str]:
    head = ("tensor", "format", "shape", "bits/value", "scales 2^", "saturated", "zero")
    rows = [
        (
            one.name,
            one.format,
            "x".join(map(str, one.shape)),
            f"{one.bits:.2f}",
            _range(one.scales),
            "-" if one.saturated is None else f"{one.saturated:.1%}",
            "-" if one.zero is None else f"{one.zero:.1%}",
        )
        for one in looks
    ]
    values = sum(_count(one.shape) for one in looks)
    bits = sum(one.bits * _count(one.shape) for one in looks)
    total = f"{values} values in {bits / 8e6:.3f} MB, {bits / max(values, 1):.3f} bits each; "
    packed = sum(one.saturated is not None for one in looks)
    signs = [f"{one.name}: {sign}." for one in looks for sign in one.signs]
    return [
        text_table([head, *rows]),
        "",
        f"{total}{packed} of {len(looks)} tensors packed.",
        *(signs or ["Nothing looks wrong."]),
    ]


BARS = "▁▂▃▄▅▆▇█"


def _range(scales: dict[str, int]) -> str:
    """The exponents from the smallest to the largest, as a small histogram."""
    counts = {int(exponent): n for exponent, n in scales.items() if exponent != "NaN"}
    if not counts:
        return "NaN" if scales else "-"
    low, high = min(counts), max(counts)
    if high - low > 24:
        return f"{low} … {high}"
    most = max(counts.values())
    heights = (counts.get(e, 0) for e in range(low, high + 1))
    drawn = "".join(BARS[(7 * n) // most] if n else " " for n in heights)
    return f"{low} {drawn} {high}" if high > low else str(low)


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _differing(found: Sequence[Difference]) -> list[str]:
    head = ("tensor", "formats", "relative error", "largest difference")
    differ = [one for one in found if not one.equal]
    if not differ:
        return [f"All {len(found)} tensors hold the same values."]
    rows = [
        (
            one.name,
            " and ".join(dict.fromkeys(one.formats)),
            "-" if one.error is None else f"{one.error:.3g}",
            f"{one.largest:.3g}",
        )
        for one in differ
    ]
    signs = [f"{one.name}: {sign}." for one in differ for sign in one.signs]
    equal = f"{len(found) - len(differ)} of {len(found)} tensors hold the same values."
    return [text_table([head, *rows]), "", equal, *signs]


def _draw(found: Sequence[Difference], name: str, other: str) -> "Figure":
    from matplotlib.figure import Figure

    shown = [one for one in found if not one.equal and one.error][:WORST]
    figure = Figure(figsize=(9.0, 1.6 + 0.22 * max(len(shown), 1)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shown)), [one.error or 0 for one in shown], color="#4a6fa5", height=0.7)
    axes.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("relative error of the values")
    axes.set_title(f"{other} against {name}: {len(shown)} tensors that differ most", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
