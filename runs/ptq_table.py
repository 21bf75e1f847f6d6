"""What calibrated rounding wins back on real models: models by formats by methods, as a table.

    python runs/ptq_table.py --minutes 5      # measure cells that are not there yet, then write
    python runs/ptq_table.py --minutes 0      # write the table of the cells that are there

Models, their splits and sizes are those of `ptq_data.py`: methods see calibration data alone, which
three seeds draw, and figures are of evaluation data (`--part development` for choosing options).
Each cell (model, policy, method, seed) is a file of its own in `--cells`, so that a run that was
killed, or that ended after `--minutes`, goes on where it was. The table goes to `--out` as
Markdown, CSV and JSON.
"""

import argparse
import copy
import csv
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ptq_data
import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.files import write_file
from microscale.policy import Policy
from microscale.recipes.diffusion import error_diffusion
from microscale.suite import statistics as paired
from microscale.suite.coverage import Recorder
from microscale.suite.entry import Subject
from microscale.suite.measure import Measured, Reference, evaluating, measure, measure_reference
from microscale.suite.statistics import Verdict

FORMATS = ("mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
POLICIES = (*FORMATS, "mxfp4/fp32")
WIDE, DIRECT = "float32", "direct cast"
METHODS = ("error_diffusion", "gptq", "qronos")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured at once; `seed` draws calibration data."""

    model: str
    policy: str
    method: str
    seed: int = 0

    @property
    def file(self) -> str:
        """Where it is kept."""
        policy = self.policy.replace("/", "-with-").replace(":", "-")
        return f"{self.model}.{policy}.{self.method.replace(' ', '-')}.{self.seed}.json"


@dataclass(frozen=True, slots=True)
class Found:
    """A cell's figures; `loss`: of each unit, or its divergence from float32 without labels."""

    cell: Cell
    sizes: ptq_data.Sizes
    options: str
    metric_name: str
    measure: str
    metric: float
    divergence: float | None
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> float:
        """Over all units."""
        return float(paired.mean(*self.tensors()).value)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Losses and weights of all units."""
        losses, weights = (
            torch.tensor(x, dtype=torch.float64) for x in (self.losses, self.weights)
        )
        return losses, weights

    @classmethod
    def read(cls, path: Path) -> "Found":
        """Read what `write` wrote."""
        data = json.loads(path.read_text())
        data |= {"cell": Cell(**data["cell"]), "sizes": ptq_data.Sizes(**data["sizes"])}
        return cls(**data)


# ---------------------------------------------------------------- measuring


@cache
def _split(name: str) -> ptq_data.Split:
    torch.set_num_threads(1)
    return ptq_data.load(name)


@cache
def _reference(name: str, part: str) -> tuple[Subject, Measured, Reference | None]:
    split = _split(name)
    task = split.evaluation if part == "evaluation" else split.development
    with evaluating(split.subject.model, 0):
        measured, reference = measure_reference(split.subject.model, task, lambda _: None)
    return replace_task(split.subject, task), measured, reference


def replace_task(subject: Subject, task: Any) -> Subject:
    """The same model with another task."""
    return Subject(subject.name, subject.model, task)


def measured(cell: Cell, part: str, options: dict[str, Any], path: Path) -> Found:
    """Fill a cell and keep it."""
    subject, wide, reference = _reference(cell.model, part)
    start = time.perf_counter()
    if cell.method == WIDE:
        found = wide
    else:
        model = _quantized(subject.model, cell, options)
        seconds = time.perf_counter() - start
        with evaluating(model, 0):
            found = measure(model, subject.task, reference, Recorder(), lambda _: None)
    seconds = 0.0 if cell.method in (WIDE, DIRECT) else seconds
    split = _split(cell.model)
    divergence = torch.zeros_like(found.values) if cell.method == WIDE else found.divergence
    losses = divergence if wide.loss is None else found.loss
    assert losses is not None
    result = Found(
        cell,
        split.sizes,
        json.dumps(options, sort_keys=True) if cell.method in METHODS else "",
        found.metric,
        "divergence" if wide.loss is None else "loss",
        found.headline().value,
        None if divergence is None else float(paired.mean(divergence, found.weight).value),
        tuple(round(x, 7) for x in losses.tolist()),
        tuple(found.weight.tolist()),
        round(seconds, 2),
    )
    write_file(path, json.dumps(asdict(result)) + "\n")
    return result


def _quantized(model: nn.Module, cell: Cell, options: dict[str, Any]) -> nn.Module:
    model, policy = copy.deepcopy(model), policy_of(cell.policy)
    if cell.method == DIRECT:
        convert(model, policy, verbose=False)
        return model
    data = _split(cell.model).draw(cell.seed)
    error_diffusion(model, policy, data, method=cell.method, **options)  # type: ignore[arg-type]
    return model


def policy_of(spelling: str) -> Policy:
    """Weights and inputs of layers in the format; attention's products are left alone.

    No weight has a part in these, so no method can win back what they lose.
    """
    weight, _, activation = spelling.partition("/")
    given = None if activation == "fp32" else activation or weight
    return Policy.of(weight, given, scores=False, values=False)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All cells, model by model, one seed after another."""
    for model in options.models:
        yield Cell(model, "fp32", WIDE)
        for policy in options.policies:
            yield Cell(model, policy, DIRECT)
        for seed in range(options.seeds):
            for policy in options.policies:
                for method in options.methods:
                    yield Cell(model, policy, method, seed)


def _is_there(path: Path, cell: Cell, options: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    found = Found.read(path)
    wanted = json.dumps(options, sort_keys=True) if cell.method in METHODS else ""
    return found.sizes == ptq_data.SIZES[cell.model] and found.options == wanted


def fill(every: Sequence[Cell], arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Measure missing cells until the time is over; returns how many are left."""
    folder, part = arguments.cells, arguments.part
    missing = [c for c in every if not _is_there(folder / c.file, c, options)]
    end = time.monotonic() + 60 * arguments.minutes
    by_model: dict[str, list[Cell]] = {}
    for cell in missing:
        by_model.setdefault(cell.model, []).append(cell)
    if arguments.minutes <= 0:
        return len(missing)
    work = [(cells, part, options, folder, end) for cells in by_model.values()]
    if arguments.jobs == 1:
        return len(missing) - sum(map(_work, work))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        return len(missing) - sum(pool.map(_work, work))


def _work(work: tuple[list[Cell], str, dict[str, Any], Path, float]) -> int:
    """Measure cells of one model until the time is over; returns how many were."""
    some, part, options, folder, end = work
    for done, cell in enumerate(some):
        if time.monotonic() > end:
            return done
        found = measured(cell, part, options, folder / cell.file)
        print(
            f"{cell.model} {cell.policy} {cell.method} {cell.seed}: {found.loss:.4f} "
            f"{found.metric:.4f} ({found.seconds:.1f} s)",
            flush=True,
        )
    return len(some)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Row:
    """One model in one policy by one method: means over seeds, standard errors of these.

    `won`: the share of direct cast's loss that is won back; `verdict`: of the paired test against
    direct cast over the units of the evaluation, of means over seeds.
    """

    model: str
    policy: str
    method: str
    measure: str
    loss: float
    error: float | None
    metric_name: str
    metric: float
    metric_error: float | None
    divergence: float | None
    won: float | None
    verdict: str
    units: int
    unit_error: float
    seconds: float


def rows(every: Sequence[Found]) -> list[Row]:
    """The table of all cells that are there."""
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for found in every:
        cell = found.cell
        groups.setdefault((cell.model, cell.policy, cell.method), []).append(found)
    return [_row(groups, key) for key in groups]


def _row(groups: dict[tuple[str, str, str], list[Found]], key: tuple[str, str, str]) -> Row:
    model, policy, method = key
    found = groups[key]
    losses = torch.stack([one.tensors()[0] for one in found]).mean(0)
    weight = found[0].tensors()[1]
    estimate = paired.mean(losses, weight)
    won, verdict = None, ""
    wide, direct = groups.get((model, "fp32", WIDE)), groups.get((model, policy, DIRECT))
    if wide and direct and method == DIRECT:
        lost = paired.difference(losses, wide[0].tensors()[0], weight)
        verdict = "loses" if paired.sign(lost) is Verdict.HOLDS else "not distinguishable"
    elif wide and direct and method in METHODS:
        lost_by_cast = direct[0].loss - wide[0].loss
        won = (direct[0].loss - estimate.value) / lost_by_cast if lost_by_cast else None
        change = paired.difference(losses, direct[0].tensors()[0], weight)
        words = {Verdict.HOLDS: "worse", Verdict.FAILS: "better"}
        verdict = words.get(paired.sign(change), "not distinguishable")
    divergences = [one.divergence for one in found if one.divergence is not None]
    metrics = [one.metric for one in found]
    return Row(
        model=model,
        policy=policy,
        method=method,
        measure=found[0].measure,
        loss=estimate.value,
        error=_error([one.loss for one in found]),
        metric_name=found[0].metric_name,
        metric=statistics.mean(metrics),
        metric_error=_error(metrics),
        divergence=statistics.mean(divergences) if divergences else None,
        won=won,
        verdict=verdict,
        units=len(losses),
        unit_error=estimate.error,
        seconds=statistics.mean(one.seconds for one in found),
    )


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


MARKS = {"better": "+", "worse": "!", "not distinguishable": "", "loses": "", "": ""}
TITLES = {"mxfp4/fp32": "MXFP4, weights only"}


def markdown(table: Sequence[Row], head: str) -> str:
    """The table as text."""
    lines = [head]
    by_key = {(row.model, row.policy, row.method): row for row in table}
    models = list(dict.fromkeys(row.model for row in table))
    for policy in reversed(POLICIES):
        chosen = [m for m in models if (m, policy, DIRECT) in by_key]
        if not chosen:
            continue
        lines += [f"\n## {TITLES.get(policy, policy.upper())}\n"]
        lines += ["| model | units | float32 | direct cast | " + " | ".join(METHODS) + " |"]
        lines += ["| --- " * (4 + len(METHODS)) + "|"]
        for model in chosen:
            wide, direct = by_key[model, "fp32", WIDE], by_key[model, policy, DIRECT]
            name = f"{model} (KL)" if wide.measure == "divergence" else model
            first = [name, str(wide.units), f"{wide.loss:.4f}", f"{direct.loss:.4f}"]
            said = [_said(by_key.get((model, policy, m)), direct, wide) for m in METHODS]
            lines += [f"| {' | '.join([*first, *said])} |"]
    lines += _divergences(by_key)
    absent = {m: "not measured yet" for m in ptq_data.SIZES if m not in models}
    left = (ptq_data.NOT_RUN | absent).items()
    lines += ["\n## Not run\n", *(f"- {m}: {why}." for m, why in left)]
    return "\n".join(lines) + "\n"


DIVERGENCES = """
## How far from the float network

KL divergence of the outputs from those of the unquantized network, in nats. A loss on labels can
fall by quantizing where a network is too sure of itself (those of arm-kws have less in E4M3, E5M2
than in float32), and a method that restores the network then loses that again; what it was asked to
do is this:
"""


def _divergences(by_key: Mapping[tuple[str, str, str], Row]) -> list[str]:
    lines = [DIVERGENCES, "| model | format | direct cast | " + " | ".join(METHODS) + " |"]
    lines += ["| --- " * (3 + len(METHODS)) + "|"]
    for (model, policy, method), row in by_key.items():
        if method != DIRECT or row.divergence is None:
            continue
        given = (by_key.get((model, policy, m)) for m in (DIRECT, *METHODS))
        said = [f"{r.divergence:.3g}" if r and r.divergence is not None else "-" for r in given]
        lines += [f"| {' | '.join([model, policy, *said])} |"]
    return lines


def _said(row: Row | None, direct: Row, wide: Row) -> str:
    if row is None:
        return "not run"
    error = "" if row.error is None else f" ± {row.error:.4f}"
    share = ""
    if row.won is not None and direct.loss - wide.loss > 0 and direct.verdict == "loses":
        share = f" ({row.won:.0%})"
    return f"{row.loss:.4f}{error}{share} {MARKS[row.verdict]}".strip()


HEAD = """# Calibrated rounding on real models

`runs/ptq_table.py` writes this page; `runs/ptq_data.py` has the splits and sizes. Loss in nats on
evaluation data that nothing was chosen on (for models marked KL, which have no labels here: the
divergence from float32); mean over draws of calibration data (three, unless a run was cut short:
ptq.json) ± its standard error; in parentheses the share of what direct cast loses that is won back,
where it loses by a paired test. `+`: better than direct cast, `!`: worse, by a paired t-test over
the units (95 %); nothing: the two are not told apart. Weights and inputs of layers have the format
unless the title says weights only; attention's products, in which no weight has a part, are left
alone. The metrics of the tasks, divergences and times are in ptq.csv and ptq.json."""


def write(table: Sequence[Row], out: Path) -> None:
    """Write the table three times."""
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "ptq.md", markdown(table, HEAD))
    kept = [{k: _short(v) for k, v in asdict(row).items()} for row in table]
    content = ",\n".join(json.dumps(row) for row in kept)
    write_file(out / "ptq.json", f"[\n{content}\n]\n")
    with (out / "ptq.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build/ptq"))
    parser.add_argument("--cells", type=Path, default=Path("build/ptq/cells"))
    parser.add_argument("--models", nargs="+", default=list(ptq_data.SIZES))
    parser.add_argument("--policies", nargs="+", default=list(reversed(POLICIES)))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--part", choices=("evaluation", "development"), default="evaluation")
    parser.add_argument("--options", type=json.loads, default={}, help="of the recipe, as JSON")
    options = parser.parse_args()
    options.cells.mkdir(parents=True, exist_ok=True)
    every = list(cells(options))
    left = fill(every, options, options.options)
    there = [p for c in every if (p := options.cells / c.file).is_file()]
    if there:
        write(rows([Found.read(p) for p in there]), options.out)
    print(f"{left} of {len(every)} cells are left.")


if __name__ == "__main__":
    main()
