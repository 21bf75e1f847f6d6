"""Compare the default formats on every model that is there: make compare-all.

Writes docs/results.md (one table for people) and docs/results.json (the same figures with their
errors, intervals and findings). Models are those that `microscale compare` knows by name; what is
not there (MICROSCALE_DATA unset, a package missing) is named below the table. Each model runs in a
process of its own with one thread, `--jobs` at a time: most of them are so small that a second
thread would only wait.

    python runs/compare_all.py --limit 8 --out build --only mnist-mlp digits-cnn   # a quick look
"""

import argparse
import datetime as dt
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from microscale.errors import MicroscaleError
from microscale.files import check_output, write_file
from microscale.suite.compare import DEFAULT_FORMATS, compare, read_formats
from microscale.suite.registry import ENTRIES, plan
from microscale.suite.setting import Setting
from microscale.suite.task import SHARES

ABOUT = (
    "Weights and activations of every product are cast, without calibration or training; `a/b`: "
    "weights in a, activations in b. Every interval and error is in results.json."
)
STAR = (
    "`*`: the 95 % interval of the paired difference from the unquantized model leaves out zero. "
    "Error rates and perplexity: less is better. Agreement is with the unquantized model, on "
    "pictures or pairs without labels."
)
DIVERGENCE = "KL divergence from the unquantized model, in nats:"
VERDICTS = (
    "The findings of arXiv 2310.10537, put to paired tests (yes: holds; no: does not; open: not "
    "distinguishable; empty: not tested), and the seconds of all rows together:"
)

ROOT = Path(__file__).parents[1]
FINDINGS = {"holds": "yes", "does not hold": "no", "not distinguishable": "open", "not tested": ""}
"""Verdicts as the table has them."""

Comparison = dict[str, Any]
"""What `Comparison.to_dict` gives."""


@dataclass(frozen=True, slots=True)
class Machine:
    """On what, and of which commit, the figures are."""

    commit: str
    date: str
    cores: int
    cpu: str
    jobs: int
    python: str
    torch: str

    @classmethod
    def here(cls, jobs: int) -> "Machine":
        """This machine, in general words."""
        capability = torch.backends.cpu.get_cpu_capability()
        return cls(
            commit=_commit(),
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            cores=os.cpu_count() or 1,
            cpu=f"{platform.machine()}, {capability}",
            jobs=jobs,
            python=platform.python_version(),
            torch=torch.__version__,
        )

    def words(self, seconds: float) -> str:
        """One sentence."""
        return (
            f"Written by `make compare-all` at commit {self.commit} on {self.date}: {self.cores} "
            f"cores ({self.cpu}), {self.jobs} models at a time, torch {self.torch}, Python "
            f"{self.python}; {seconds / 60:.1f} minutes."
        )


def _commit() -> str:
    """The commit, and whether files differ from it (the results themselves apart)."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!docs/results.*")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run(name: str, formats: Sequence[str], limit: int | None) -> Comparison | str:
    """Compare the formats on one model; a sentence where it cannot be had."""
    torch.set_num_threads(1)
    setting = Setting.parse(limit=limit)
    try:
        (found,) = plan(name, None, setting)
        subject = found.load()
        comparison = compare(subject.model, subject.task, formats, name=name, seed=setting.seed)
    except MicroscaleError as error:
        return str(error)
    content: Comparison = comparison.to_dict()
    for row in content["rows"]:
        # The list of every product is long; what it comes to is one line.
        row["coverage"] = row["coverage"] and row["coverage"]["summary"]
    return content


def table(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The rows of the table: the metric of each model in each format."""
    formats = [row["format"] for row in comparisons[0]["rows"][1:]]
    yield _line(["model", "metric", "units", "unquantized", *formats])
    yield _line(["---", "---", "---:"] + ["---:"] * (len(formats) + 1))
    for one in comparisons:
        share = one["metric"] in SHARES
        cells = [_cell(row, share=share) for row in one["rows"]]
        title = f"{one['metric']}, %" if share else one["metric"]
        yield _line([one["model"], title, f"{one['units']:,} {one['unit']}s", *cells])


def _cell(row: dict[str, Any], *, share: bool) -> str:
    """The metric, with a star where the paired interval of the difference leaves out zero."""
    value = row["metric"]["value"]
    if value is None:
        return "no number"
    difference = row["difference"]
    low, high = (difference or {}).get("low"), (difference or {}).get("high")
    apart = low is not None and high is not None and not low <= 0 <= high
    return f"{100 * value if share else value:.{1 if share else 3}f}{'*' if apart else ''}"


def divergences(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The rows of the second table: how far each format's predictions are from float32's."""
    formats = [row["format"] for row in comparisons[0]["rows"][1:]]
    yield _line(["model", *formats])
    yield _line(["---"] + ["---:"] * len(formats))
    for one in comparisons:
        found = [(row["divergence"] or {}).get("value") for row in one["rows"][1:]]
        yield _line([one["model"], *("" if v is None else f"{v:.2g}" for v in found)])


def findings(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The rows of the third table: whether the paper's findings hold, model by model."""
    names = [finding["finding"] for finding in comparisons[0]["findings"]]
    yield _line(["model", *names, "seconds"])
    yield _line(["---"] + ["---"] * len(names) + ["---:"])
    for one in comparisons:
        verdicts = [FINDINGS[finding["verdict"]] for finding in one["findings"]]
        seconds = sum(row["seconds"] for row in one["rows"])
        yield _line([one["model"], *verdicts, f"{seconds:.0f}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(comparisons: Sequence[Comparison], absent: Sequence[str], about: str) -> str:
    """docs/results.md."""
    parts = ["# What direct casting does to small models", about, ABOUT]
    if comparisons:
        parts += ["\n".join(table(comparisons)), STAR]
        parts += [DIVERGENCE, "\n".join(divergences(comparisons))]
        parts += [VERDICTS, "\n".join(findings(comparisons))]
    if absent:
        parts.append(f"Not compared: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def compare_all(
    names: Sequence[str], formats: Sequence[str], limit: int | None, jobs: int
) -> Iterator[tuple[str, Comparison | str]]:
    """Run the models, `jobs` at a time; each with what `run` gives, in their order."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        results = pool.map(partial(run, formats=formats, limit=limit), names)
        yield from zip(names, results, strict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, then write both files."""
    options = _parser().parse_args(arguments)
    formats = options.formats.split(",") if options.formats else list(DEFAULT_FORMATS)
    read_formats(formats)
    Setting.parse(limit=options.limit)
    paths = [check_output(options.out / f"results.{kind}", "--out") for kind in ("md", "json")]
    machine, start = Machine.here(options.jobs), time.perf_counter()
    found: list[Comparison] = []
    absent: list[str] = []
    for name, result in compare_all(options.only, formats, options.limit, options.jobs):
        if isinstance(result, str):
            absent.append(name)
        else:
            found.append(result)
        word = f"not compared: {result}" if isinstance(result, str) else "done"
        print(f"{time.perf_counter() - start:6.0f} s  {name}: {word}", flush=True)
    seconds = time.perf_counter() - start
    content = {**asdict(machine), "seconds": seconds, "limit": options.limit}
    content |= {"comparisons": found, "absent": absent}
    write_file(paths[0], page(found, absent, machine.words(seconds)))
    write_file(paths[1], json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"wrote {paths[0]} and {paths[1]} after {seconds:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(ENTRIES), choices=ENTRIES, metavar="NAME")
    parser.add_argument("--formats", help="separated by commas; the defaults of compare")
    parser.add_argument("--limit", type=int, help="units of each model, in place of its own number")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the results")
    return parser


if __name__ == "__main__":
    try:
        main()
    except MicroscaleError as problem:
        sys.exit(str(problem))
