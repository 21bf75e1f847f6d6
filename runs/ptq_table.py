"""What calibrated rounding wins back on real models: formats by methods, as a table.

    python runs/ptq_table.py --out build --only stories260k-llama digits-cnn --formats mxfp4

For every model and format: direct cast, then each method with calibration data drawn by several
seeds; the mean over seeds with its standard error, and the share of the loss that direct cast has
against float32 which is won back. Calibration and evaluation never share a sample:

- stories260k-llama, babyllama-tok105: evaluated as `microscale compare` does, on openings of the
  first 400 stories; calibrated with stories after these.
- stdlib-gpt: evaluated on the held-out excerpt; calibrated with source files of this interpreter's
  standard library that the split of `stdlib_sources.py` does not hold out.
- digits-cnn, digits-vit: evaluated on the 500 test digits; calibrated with training digits.

Models for which no split is written down are named and left out.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stdlib_sources import library_root, read_library, split
from torch import nn

from microscale.convert import convert
from microscale.files import check_output, write_file
from microscale.recipes.batch import Batch
from microscale.recipes.diffusion import error_diffusion
from microscale.recipes.solve import METHODS
from microscale.suite.digits import Digits
from microscale.suite.entry import EMBEDDED, Subject
from microscale.suite.hub import load_language_model
from microscale.suite.language import encode
from microscale.suite.measure import evaluating, measure_reference
from microscale.suite.registry import ENTRIES, STORIES, plan
from microscale.suite.setting import Setting
from microscale.suite.windows import documents, read_text

FORMATS = ("mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
EVALUATED_STORIES = 400
SOURCE_FILES = 300
BATCH = 16
Draw = Callable[[int, int], list[Batch]]
"""Calibration batches of so many samples, by a seed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: the loss in nats (or the metric) of each seed; direct cast and float32 have one."""

    model: str
    format: str
    method: str
    losses: tuple[float, ...]
    metrics: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> str:
        """Mean and standard error."""
        return _spelled(self.losses)

    @property
    def metric(self) -> str:
        """Mean and standard error."""
        return _spelled(self.metrics)


def _spelled(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def draw_text(source: Path, text: list[str], length: int) -> Draw:
    """The first `length` tokens of some of the documents that are so long."""
    setting = Setting.parse()
    language = load_language_model(str(source), dtype=setting.dtype, device=setting.device)
    encoded = [encode(language.tokenizer, document) for document in text]
    whole = [tokens for tokens in encoded if len(tokens) >= length]

    def draw(samples: int, seed: int) -> list[Batch]:
        chosen = random.Random(seed).sample(whole, min(samples, len(whole)))
        ids = torch.tensor([tokens[:length] for tokens in chosen])
        return [{"input_ids": part} for part in ids.split(BATCH)]

    return draw


def draw_digits(name: str) -> Draw:
    """Training digits."""
    images, _ = Digits.read().train
    assert name in ENTRIES

    def draw(samples: int, seed: int) -> list[Batch]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return list(images[order[:samples]].split(BATCH))

    return draw


def draw_for(name: str) -> Draw | None:
    """The calibration data of a model; None where no split is written down."""
    if name in ("stories260k-llama", "babyllama-tok105"):
        folder = ENTRIES[name].folder()
        stories = documents(read_text(folder.parent / STORIES))[EVALUATED_STORIES:]
        return draw_text(folder, stories, 256 if name.startswith("stories") else 192)
    if name == "stdlib-gpt":
        files = split(read_library(library_root())).train[:SOURCE_FILES]
        return draw_text(EMBEDDED / name, [file.section for file in files], 256)
    if name in ("digits-cnn", "digits-vit"):
        return draw_digits(name)
    return None


def evaluated(subject: Subject, model: nn.Module) -> tuple[float, float]:
    """The loss (if the task gives one) and the metric."""
    with evaluating(model, 0):
        measured, _ = measure_reference(model, subject.task, lambda _: None, kept_bytes=0)
    metric = measured.headline().value
    if measured.loss is None:
        return metric, metric
    loss = float((measured.loss * measured.weight).sum() / measured.weight.sum())
    return loss, metric


def rows_of(name: str, draw: Draw, options: argparse.Namespace) -> list[Row]:
    """All cells of one model."""
    setting = Setting.parse(limit=options.limit)
    subject = plan(name, None, setting)[0].load()
    found = [_row(name, "float32", "", [evaluated(subject, subject.model)], 0.0)]
    for fmt in options.formats:
        direct = copy.deepcopy(subject.model)
        convert(direct, fmt, verbose=False)
        found.append(_row(name, fmt, "direct cast", [evaluated(subject, direct)], 0.0))
        for method in options.methods:
            start = time.perf_counter()
            each = []
            for seed in range(options.seeds):
                model = copy.deepcopy(subject.model)
                data = draw(options.samples, seed)
                error_diffusion(model, fmt, data, method=method, scales=options.scales)
                each.append(evaluated(subject, model))
            seconds = (time.perf_counter() - start) / options.seeds
            found.append(_row(name, fmt, method, each, seconds))
        print("\n".join(lines(found)[-len(options.methods) - 1 :]), flush=True)
    return found


def _row(name: str, fmt: str, method: str, each: list[tuple[float, float]], seconds: float) -> Row:
    losses, metrics = zip(*each, strict=True)
    return Row(name, fmt, method, losses, metrics, seconds)


def lines(rows: Sequence[Row]) -> list[str]:
    """The table in Markdown, without its head."""
    wide = {row.model: statistics.mean(row.losses) for row in rows if row.format == "float32"}
    direct = {
        (row.model, row.format): statistics.mean(row.losses)
        for row in rows
        if row.method == "direct cast"
    }
    made = []
    for row in rows:
        lost = direct.get((row.model, row.format), wide[row.model]) - wide[row.model]
        won = direct.get((row.model, row.format), wide[row.model]) - statistics.mean(row.losses)
        share = f"{won / lost:.0%}" if row.method in METHODS and lost else ""
        cells = (
            row.model,
            row.format,
            row.method,
            row.loss,
            row.metric,
            share,
            f"{row.seconds:.1f}",
        )
        made.append(f"| {' | '.join(cells)} |")
    return made


HEAD = (
    "| model | format | method | loss | metric | won back | seconds |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    """Fill the table and write it as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--only", nargs="+", default=list(ENTRIES))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "rtn"])
    parser.add_argument("--scales", default="mse")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="evaluate on so many units")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    target = check_output(options.out / "ptq.md", "--out")
    rows: list[Row] = []
    left: list[str] = []
    for name in options.only:
        draw = draw_for(name)
        if draw is None:
            left.append(name)
        else:
            rows += rows_of(name, draw, options)
    said = f"\nNo split is written down for: {', '.join(left)}.\n" if left else ""
    write_file(target, "\n".join([*HEAD, *lines(rows)]) + "\n" + said)
    content: dict[str, Any] = {"rows": [asdict(row) for row in rows], "left": left}
    write_file(options.out / "ptq.json", json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
