"""`microscale search`: formats for each layer within a budget, as a policy file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from microscale.commands.compare import split
from microscale.commands.outcome import Outcome
from microscale.errors import MicroscaleError
from microscale.files import check_output, write_file
from microscale.operands import WIDE
from microscale.policy import POLICY_FILES, Policy
from microscale.recipes.budget import Budget
from microscale.recipes.knapsack import check_way
from microscale.recipes.search import CANDIDATES, read_activations, read_candidates, search
from microscale.recipes.searched import WIDTH
from microscale.recipes.sensitivity import check_measure
from microscale.report.front import draw
from microscale.report.progress import bars
from microscale.suite.calibration import calibration_task, read_calibration
from microscale.suite.entry import Subject
from microscale.suite.registry import ENTRIES, check_name, plan
from microscale.suite.setting import Setting

SAMPLES = 16
"""Samples that are used unless `--limit` says otherwise: they run for every layer and format."""


def run_search(  # noqa: PLR0913  (the command's options)
    model: str,
    *,
    budget: str,
    out: Path | None,
    activations: str | None,
    formats: str | None,
    measure: Any,
    solver: Any,
    data: Path | None,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Search formats for a model within `budget`, and write the policy to `out`.

    Everything is checked first; files are written whole, after all the work.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    setting = replace(setting, limit=setting.limit or SAMPLES)
    names = CANDIDATES if formats is None else split(formats)
    Budget.parse(budget)
    read_candidates(names, wide=read_activations(activations) == WIDE)
    check_measure(measure)
    check_way(solver)
    outcome = Outcome.checked(json_file, picture)
    if out is not None:
        _check_out(out)
    with bars(model) as report:
        report("loading", 0, None)
        subject = _subject(model, data, setting)
        found = search(
            subject.model,
            subject.task,
            budget,
            activations=activations,
            formats=names,
            measure=measure,
            solver=solver,
            name=subject.name,
            seed=setting.seed,
            progress=report,
        )
    if out is not None:
        write_file(out, _written(found.policy, out))
    terminal = outcome.terminal(WIDTH)
    terminal.print(found)
    terminal.print(f"{out or 'No --out FILE for the policy'}: {found.summary}", markup=False)
    outcome.write({"search": found.to_dict()}, lambda: draw(found), setting, terminal)


def _check_out(out: Path) -> None:
    if out.suffix not in POLICY_FILES:
        raise MicroscaleError(
            f"--out {str(out)!r} ends in {out.suffix!r}; use {' or '.join(POLICY_FILES)}."
        )
    check_output(out, "--out")


def _written(policy: Policy, out: Path) -> str:
    return policy.to_json() if out.suffix == ".json" else policy.to_toml()


def _subject(model: str, data: Path | None, setting: Setting) -> Subject:
    """The model with calibration data, or with what `compare` tries it on."""
    if data is not None:
        found = read_calibration(model, data, setting)
        return Subject(Path(model).name, found.model, calibration_task(found))
    check_name(model)
    if model not in ENTRIES:
        raise MicroscaleError(f"model {model!r} has no data of its own: add --data FILE.")
    (one,) = plan(model, None, setting)
    subject = one.load()
    note = (
        "These are data that `compare` evaluates on: to judge the result, search on others "
        "(--data FILE)."
    )
    task = replace(subject.task, notes=(*subject.task.notes, note))
    return replace(subject, task=task)
