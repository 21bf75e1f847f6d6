"""Mixtures of formats against single formats of the same size, on data that no search saw.

    python runs/search_table.py --out build --only stories260k-llama digits-vit

For each model one search on calibration data (the splits of `ptq_data.py`; of other models every
fourth batch of the task, the rest of which evaluates), then for each candidate format: the mixture
that the search chose within that format's bits for weights and for activations, against the format
itself, paired over the evaluation's units: difference of the KL divergence from float32, and of the
metric, with 95 % intervals.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ptq_data import draw_for
from torch import nn

from microscale.files import check_output, write_file
from microscale.policy import Policy
from microscale.recipes.budget import Budget
from microscale.recipes.search import CANDIDATES, search
from microscale.recipes.searched import Searched
from microscale.suite.calibration import Calibrated, calibration_task
from microscale.suite.coverage import Recorder
from microscale.suite.measure import Measured
from microscale.suite.predictions import Predictions
from microscale.suite.registry import ENTRIES, plan
from microscale.suite.setting import Setting
from microscale.suite.statistics import Estimate, Verdict, difference, sign
from microscale.suite.task import Task
from microscale.suite.trial import Trial

EVERY = 4
LARGEST = 32
"""More bits than any candidate has."""


@dataclass(frozen=True, slots=True)
class Row:
    """A mixture against the format whose bits it keeps within; differences are mixture - format."""

    model: str
    format: str
    weight_bits: float
    activation_bits: float | None
    mixture: str
    format_divergence: float
    mixture_divergence: float
    divergence: Estimate
    metric: Estimate

    @property
    def verdict(self) -> str:
        """Whether the mixture is better by the paired interval of the divergence."""
        if self.mixture == self.format:
            return "same"
        words = {Verdict.FAILS: "better", Verdict.HOLDS: "worse", Verdict.OPEN: "open"}
        return words[sign(self.divergence)]

    def line(self) -> str:
        """The row in Markdown."""
        wide = self.activation_bits is None
        cells = (
            self.model,
            self.format,
            f"{self.weight_bits:.3f}",
            "-" if wide else f"{self.activation_bits:.3f}",
            f"{self.format_divergence:.3g}",
            f"{self.mixture_divergence:.3g}",
            _spelled(self.divergence),
            _spelled(self.metric),
            self.verdict,
        )
        return f"| {' | '.join(cells)} |"


def _spelled(estimate: Estimate) -> str:
    return f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"


HEAD = (
    (
        "| model | format | bits/weight | bits/activation | KL, format | KL, mixture "
        "| difference [95 %] | metric, difference [95 %] | mixture is |"
    ),
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def share(task: Task, keep: Callable[[int], bool]) -> Task:
    """The task on some of its batches."""

    def evaluate(model: nn.Module) -> Iterator[Predictions]:
        found: Any = task.evaluate(model)
        batches = [found] if isinstance(found, Predictions) else found
        yield from (batch for number, batch in enumerate(batches) if keep(number))

    return replace(task, evaluate=evaluate)


def tasks(name: str, options: argparse.Namespace) -> tuple[nn.Module, Task, Task]:
    """The model, what it is searched on, and what it is judged by."""
    draw = draw_for(name, options.samples)
    size = None if draw else 4
    setting = Setting.parse(limit=options.limit, batch_size=size)
    subject = plan(name, None, setting)[0].load()
    model, task = subject.model, subject.task
    if draw is None:
        searched = share(task, lambda number: number % EVERY == 0)
        return model, searched, share(task, lambda number: number % EVERY != 0)
    batches = draw(0)
    about = f"{options.samples} samples of the calibration split"
    return model, calibration_task(Calibrated(model, batches, about, None)), task


def rows(found: Searched, trial: Trial) -> Iterator[Row]:
    """Each format against the mixture within its bits, on the data of `trial`."""
    base, reference = trial.reference(lambda _: None)

    def measured(policy: Policy) -> Measured:
        with trial.converted(policy):
            return trial.measured(base, reference, Recorder(), lambda _: None)

    for point in found.formats:
        best = found.within(point.weight_bits, point.activation_bits)
        alone, mixed = measured(point.policy), measured(best.policy)
        assert alone.divergence is not None
        assert mixed.divergence is not None
        yield Row(
            found.model,
            point.label,
            best.weight_bits,
            best.activation_bits,
            best.label,
            float((alone.divergence * alone.weight).sum() / alone.weight.sum()),
            float((mixed.divergence * mixed.weight).sum() / mixed.weight.sum()),
            difference(mixed.divergence, alone.divergence, base.weight),
            mixed.headline_difference(alone),
        )


def main() -> None:
    """Fill the table and write it as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--only", nargs="+", default=list(ENTRIES))
    parser.add_argument("--formats", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--activations", help="fp32 leaves them alone")
    parser.add_argument("--measure", default="divergence")
    parser.add_argument("--solver", default="exact")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--limit", type=int, help="evaluate on so many units")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    target = check_output(options.out / "search.md", "--out")
    made: list[Row] = []
    for name in options.only:
        start = time.perf_counter()
        model, searched, judged = tasks(name, options)
        found = search(
            model,
            searched,
            Budget.parse(LARGEST),
            activations=options.activations,
            formats=options.formats,
            measure=options.measure,
            solver=options.solver,
            name=name,
        )
        seconds = time.perf_counter() - start
        new = list(rows(found, Trial.of(model, judged, 0, name)))
        print(
            "\n".join([f"{name}: {seconds:.0f} s of search", *(r.line() for r in new)]), flush=True
        )
        made += new
    write_file(target, "\n".join([*HEAD, *(row.line() for row in made)]) + "\n")
    content = [asdict(row) | {"verdict": row.verdict} for row in made]
    write_file(options.out / "search.json", json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
