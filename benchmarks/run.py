"""Speed beside the machine's limits and beside others, in one process: python benchmarks/run.py.

Every group of functions is timed in turns; a figure is the median of the repetitions that no other
process disturbed, and how many were thrown away is shown. A ratio is held against the goal that
was set for it, if any. `--only casts gemv` measures some sections. Two peers are found by paths in
the environment: MICROSCALE_MICROXCALING (a checkout) and MICROSCALE_GGML (a built libggml.so).
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import peers
import probes
from growth import SIZES, doublings, fits
from microscale.commands.info import info
from picture import draw
from rows import Row, rows
from sections import SECTIONS
from tables import growth_table, table


def main() -> None:
    """Measure, print, write."""
    options = _options()
    started = time.perf_counter()
    console = Console(width=160 if not Console().is_terminal else None, highlight=False)
    machine = _machine()
    console.print(" · ".join(f"{name} {value}" for name, value in machine.items()))
    found: list[Row] = []
    for part in _measured(options):
        found += part
        console.print(table(part))
    growth = fits([row for row in found if row.section == "growth"])
    if growth:
        console.print(growth_table(growth))
    missing = peers.missing()
    for name, why in missing.items():
        console.print(f"not measured: {name}: {why}", markup=False)
    seconds = time.perf_counter() - started
    console.print(_summary(found, seconds))
    result = {
        "machine": machine, "seconds": seconds, "rows": [row.to_dict() for row in found],
        "growth": growth, "missing": missing,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(found, growth, options.picture)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--largest", type=int, choices=SIZES, default=1024, metavar="MB",
        help="of float32 in the section growth: 1024, or 4096, which needs 16 GB of memory",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        probes.library()
    except probes.MissingProbesError as error:
        parser.error(f"the limits of this machine cannot be measured: {error}")
    return options


def _measured(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one group after the other."""
    sections = SECTIONS | {"growth": partial(doublings, options.largest)}
    for name in options.only:
        for group in sections[name]():
            yield list(rows(name, group, options.repeats))


def _machine() -> dict[str, str]:
    here = info()
    return {
        "processor": here.devices["cpu"],
        "threads": str(torch.get_num_threads()),
        "kernels": here.kernels["cpu"].partition(" from ")[0],
        "torch": torch.__version__,
        "microscale": here.microscale,
    }


def _summary(found: list[Row], seconds: float) -> str:
    goals = [row for row in found if row.reached is not None]
    reached = sum(row.reached is True for row in goals)
    disturbed = {(row.group, row.name): row.timing.disturbed for row in found}
    spoilt = {(row.group, row.name) for row in found if not row.timing.kept}
    return (
        f"{reached} of {len(goals)} goals reached; {sum(disturbed.values())} repetitions lost to "
        f"other processes; {len(spoilt)} of {len(disturbed)} functions were never undisturbed, and "
        f"their goals are open; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
