"""`microscale finetune`: a model trained on with quantized forward passes, written packed."""

import copy
import json
from pathlib import Path
from typing import Any

from microscale.checkpoint.direct import POLICY
from microscale.checkpoint.native import load, save
from microscale.commands.outcome import Outcome
from microscale.commands.quantize import (
    PROGRESS,
    WEIGHTS,
    check_folder,
    copy_besides,
    read_policy,
)
from microscale.errors import MicroscaleError
from microscale.files import write_file
from microscale.recipes.finetune import RANGE_LR, Plan, finetune
from microscale.recipes.sweep import LRS, Sweep, remove, sweep
from microscale.report.finetuning import draw, quality
from microscale.report.progress import bars
from microscale.suite.extras import require
from microscale.suite.lessons import read_lesson
from microscale.suite.setting import Setting
from microscale.suite.trained import report_on

REPORT = "finetuning.json"
STEPS = 200
WIDTH = 110


def run_finetune(  # noqa: PLR0913  (the command's options)
    model: str,
    *,
    fmt: str | None,
    policy: Path | None,
    data: Path | None,
    text: Path | None,
    out: Path,
    steps: str | None,
    lr: str | None,
    learn: Any,
    range_lr: str | None,
    gradient: str,
    weight_decay: float,
    sweeping: bool,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Finetune a model and write it to the folder `out`.

    Everything is checked first. While it runs, the folder holds the state of the run, so that the
    same command goes on where it was killed.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    outcome = Outcome.checked(json_file, picture)
    require("scipy.stats", "confidence intervals")
    rates = _numbers("--lr", lr, float) or (list(LRS) if sweeping else [1e-4])
    counts = _numbers("--steps", steps, int) or [STEPS]
    usual = [RANGE_LR] if learn != "off" else []
    ranged = _numbers("--range-lr", range_lr, float) or usual
    _check_single(sweeping, {"--lr": rates, "--steps": counts, "--range-lr": ranged})
    plans = [
        Plan(
            steps=count,
            lr=rate,
            learn=learn,
            range_lr=other,
            gradient=gradient,
            weight_decay=weight_decay,
            seed=seed,
        )
        for count in counts
        for rate in rates
        for other in ranged or [None]
    ]
    chosen = read_policy(fmt, policy)
    check_folder(out)
    swept: Sweep | None = None
    with bars(model) as report:
        report("loading", 0, None)
        lesson = read_lesson(model, data, text, setting)
        original, plan = copy.deepcopy(lesson.model), plans[0]
        if sweeping:
            swept = sweep(
                lesson.model,
                chosen,
                lesson.train,
                lesson.development,
                plan=plan,
                lrs=rates,
                steps=counts,
                range_lrs=ranged,
                progress=out / PROGRESS,
                report=report,
            )
            plan = swept.best.plan
        done = finetune(
            lesson.model,
            chosen,
            lesson.train,
            plan=plan,
            development=lesson.development,
            progress=out / PROGRESS,
            report=report,
        )
        save(lesson.model, out / WEIGHTS)
        report("evaluating", 0, None)
        # What is reported on is what the file holds.
        stored = copy.deepcopy(original)
        load(out / WEIGHTS, stored, device=str(setting.device))
        measured = report_on(original, stored, chosen, lesson.task, setting.seed)
    if lesson.folder is not None:
        copy_besides(lesson.folder, out)
    write_file(out / POLICY, done.conversion.policy.to_toml())
    record = {
        "model": model,
        "data": lesson.about,
        "policy": chosen.to_dict(),
        "sweep": None if swept is None else swept.to_dict(),
        "evaluation": measured.to_dict(),
        **done.to_dict(),
    }
    write_file(out / REPORT, json.dumps(record, indent=2, allow_nan=False) + "\n")
    remove(out / PROGRESS)
    terminal = outcome.terminal(WIDTH)
    if swept is not None:
        terminal.print(f"{swept}\n", markup=False)
    terminal.print(f"{done}\n", markup=False)
    terminal.print(quality(measured))
    terminal.print(f"\nTrained with {lesson.about}. Evaluated on {measured.about}.", markup=False)
    bits = done.conversion.bits_per_weight
    terminal.print(f"{out / WEIGHTS}: {bits:.3f} bits per weight.", markup=False)
    outcome.write({"finetuning": record}, lambda: draw(model, done, swept), setting, terminal)


def _numbers(option: str, given: str | None, kind: Any) -> list[Any]:
    """The numbers of an option, separated by commas."""
    try:
        return [kind(part) for part in given.split(",")] if given is not None else []
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise MicroscaleError(
            f"{option} {given!r} is not {what}, or several separated by commas."
        ) from None


def _check_single(sweeping: bool, options: dict[str, list[Any]]) -> None:
    for option, values in options.items():
        if len(values) > 1 and not sweeping:
            shown = ",".join(map(str, values))
            raise MicroscaleError(f"{option} {shown} names several; add --sweep to try them all.")
