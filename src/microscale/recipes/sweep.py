"""`sweep`: learning rates and numbers of steps tried, and chosen on development data alone."""

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from microscale.errors import MicroscaleError
from microscale.files import write_file
from microscale.ledger import text_table
from microscale.policy import Policy
from microscale.recipes.batch import Batch, read
from microscale.recipes.finetune import Plan, finetune
from microscale.recipes.loss import DivergedError, Loss, usual_loss
from microscale.recipes.progress import digest
from microscale.report.progress import Report

LRS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


@dataclass(frozen=True, slots=True)
class Trial:
    """One plan, and the mean loss on the development data after it; None with the `failure`."""

    plan: Plan
    loss: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials in order, and the loss of the model that is only cast; `str()` is a table."""

    trials: tuple[Trial, ...]
    before: float

    @property
    def best(self) -> Trial:
        """The trial with the least loss; the first of equals. MicroscaleError if all failed."""
        done = [trial for trial in self.trials if trial.loss is not None]
        if not done:
            raise MicroscaleError(f"every trial failed, the first so: {self.trials[0].failure}")
        return min(done, key=lambda trial: trial.loss or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = asdict(self.best.plan)
        return {"before": self.before, "best": best, "trials": [asdict(t) for t in self.trials]}

    def __str__(self) -> str:
        """Return a table; the best is marked."""
        rows = [("learning rate", "of ranges", "steps", "development loss", "")]
        best = self.best
        for trial in self.trials:
            plan, loss = trial.plan, "-" if trial.loss is None else f"{trial.loss:.4f}"
            mark = "best" if trial is best else trial.failure[:60]
            ranged = "-" if plan.range_lr is None else f"{plan.range_lr:g}"
            rows.append((f"{plan.lr:g}", ranged, str(plan.steps), loss, mark))
        return f"{text_table(rows)}\n\nOnly cast: {self.before:.4f}."


def sweep(
    model: nn.Module,
    policy: Policy | str,
    batches: Iterable[Batch],
    development: Iterable[Batch],
    *,
    plan: Plan | None = None,
    lrs: Sequence[float] = LRS,
    steps: Sequence[int] = (),
    range_lrs: Sequence[float] = (),
    loss: Loss = usual_loss,
    progress: Path | None = None,
    report: Report = lambda *_: None,
) -> Sweep:
    """Finetune a copy of the model with each combination of settings.

    Args:
        model: left as it is.
        policy: as for `finetune`.
        batches: what is trained on.
        development: what is chosen on; to be no part of what the result is reported on.
        plan: everything that is not varied.
        lrs: learning rates.
        steps: numbers of steps; the plan's alone if empty.
        range_lrs: learning rates of learned ranges; the plan's alone if empty.
        loss: as for `finetune`.
        progress: a folder for the trials that are finished, and the state of the one that runs.
        report: called with what runs, the steps done, and how many there are.

    Raises:
        MicroscaleError: as `finetune`, but a trial whose loss stops being finite is one that
            failed; and where all of them did.
    """
    plan = plan or Plan()
    kept, held = read(batches), read(development)
    plans = _plans(plan, lrs, steps, range_lrs)
    key = "" if progress is None else digest(model, [*kept, *held], (policy, plans))
    trials, before = [], 0.0
    for number, one in enumerate(plans):
        record = None if progress is None else progress / f"trial-{number:03}.json"
        found = None if record is None else _recorded(record, key)
        if found is None:
            folder = None if progress is None else progress / f"trial-{number:03}"
            prefix = f"trial {number + 1} of {len(plans)}, "
            found = _try(
                model,
                policy,
                (kept, held),
                one,
                loss,
                folder,
                lambda label, *rest, prefix=prefix: report(prefix + label, *rest),
            )
            if record is not None:
                write_file(record, json.dumps({"sweep": key, **found}) + "\n")
        before = found["before"] or before
        trials.append(Trial(one, found["loss"], found["failure"]))
    result = Sweep(tuple(trials), before)
    _ = result.best
    return result


def _plans(
    plan: Plan, lrs: Sequence[float], steps: Sequence[int], range_lrs: Sequence[float]
) -> list[Plan]:
    ranged: Sequence[float | None] = range_lrs or (plan.range_lr,)
    return [
        replace(plan, steps=count, lr=lr, range_lr=other)
        for count, other, lr in itertools.product(steps or (plan.steps,), ranged, lrs)
    ]


def _try(  # noqa: PLR0917  (the arguments of finetune)
    model: nn.Module,
    policy: Policy | str,
    data: tuple[list[Batch], list[Batch]],
    plan: Plan,
    loss: Loss,
    folder: Path | None,
    report: Report,
) -> dict[str, Any]:
    train, development = data
    twin = copy.deepcopy(model)
    try:
        done = finetune(
            twin,
            policy,
            train,
            plan=plan,
            loss=loss,
            development=development,
            progress=folder,
            report=report,
        )
    except DivergedError as error:
        return {"before": None, "loss": None, "failure": str(error)}
    return {"before": done.before, "loss": done.after, "failure": ""}


def _recorded(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise MicroscaleError(f"{str(path)!r} is damaged ({error}); delete its folder.") from error
    if found.get("sweep") != key:
        raise MicroscaleError(
            f"{str(path)!r} is of another sweep (another model, data or setting); name another "
            "folder, or delete it."
        )
    return found


def remove(progress: Path) -> None:
    """Delete what sweeps and runs left in a folder, and the folder if nothing else is in it."""
    for path in _left(progress):
        path.unlink(missing_ok=True)
    for folder in (*progress.glob("trial-*"), progress):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _left(progress: Path) -> Iterator[Path]:
    yield from progress.glob("trial-*.json")
    yield from progress.glob("trial-*/state.bin")
    yield progress / "state.bin"
