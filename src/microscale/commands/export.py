"""`microscale export`: a checkpoint in another layout, every value compared."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from microscale.checkpoint.export import export
from microscale.commands.console import STANDARD_OUTPUT, console, write_json
from microscale.files import check_output
from microscale.report.progress import bars


def run_export(source: Path, *, target: str, out: Path, json_file: Path | None) -> None:
    """Write `source` to `out` in the layout `target`, and say what it carries."""
    if json_file is not None and json_file != STANDARD_OUTPUT:
        check_output(json_file, "--json")
    start = time.perf_counter()
    with bars(source.name) as report:
        done = export(source, target, out, report=report)
    record: dict[str, Any] = asdict(done)
    if json_file is not None:
        write_json(json_file, record)
    usual = json_file != STANDARD_OUTPUT
    terminal = console() if usual else Console(stderr=True, highlight=False)
    counts = f"{len(done.packed)} packed tensors, {done.plain} that were plain"
    lines = [
        f"{source} ({done.source}) to {out} ({done.target}): {counts}.",
        *(f"As values: {name}; {target} {why}." for name, why in done.values.items()),
        *done.notes,
        f"Every value was read back and is the same; {time.perf_counter() - start:.1f} s.",
    ]
    for line in lines:
        terminal.print(line, markup=False, soft_wrap=True)
