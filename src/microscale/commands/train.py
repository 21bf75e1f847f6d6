"""`microscale train`: a small GPT trained from scratch, in any formats."""

import os
from pathlib import Path

from rich.console import Console

from microscale.commands.console import STANDARD_OUTPUT, console, write_json
from microscale.errors import MicroscaleError
from microscale.files import check_output
from microscale.recipes.training.config import AUTO, TrainConfig
from microscale.recipes.training.train import train
from microscale.recipes.training.trained import Trained
from microscale.report.figures import check_picture, write_figure
from microscale.report.monitor import draw as draw_monitor
from microscale.report.progress import bars
from microscale.report.training import draw
from microscale.suite.extras import require

MONITOR = "monitor.png"
"""The picture in the folder of the run."""


def run_train(
    config: Path,
    *,
    steps: str | None,
    policy: str | None,
    out: Path | None,
    monitor: int | None,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Train as the file says, options before it; go on where the run in `out` was stopped.

    With `json_file` "-" the JSON is all that stands on standard output. Of the processes that
    torchrun starts the first one alone prints and writes.
    """
    settings = TrainConfig.read(
        config, steps=_steps(steps), policy=policy, out=out, monitor_every=monitor
    )
    _check_files(settings, json_file, picture)
    first = os.environ.get("RANK", "0") == "0"
    terminal = Console(quiet=True) if not first or json_file == STANDARD_OUTPUT else console()
    if settings.steps == AUTO:
        terminal.print(str(settings.reckoning()))
    with bars(f"training {settings.size}") as report:
        trained = train(settings, report, terminal.print)
    if first:
        terminal.print(str(trained))
        _write(trained, json_file, picture)


def _check_files(settings: TrainConfig, json_file: Path | None, picture: Path | None) -> None:
    if json_file is not None and json_file != STANDARD_OUTPUT:
        check_output(json_file, "--json")
    if picture is not None:
        check_picture(picture)
    if settings.monitor_every:
        require("matplotlib", "--monitor")


def _write(trained: Trained, json_file: Path | None, picture: Path | None) -> None:
    if json_file is not None:
        write_json(json_file, trained.to_dict())
    if picture is not None:
        write_figure(draw(trained), picture)
    if trained.monitored:
        title = f"what the casts lost   policy {trained.config.policy}"
        write_figure(draw_monitor(trained.monitored, title), trained.config.out / MONITOR)


def _steps(text: str | None) -> int | str | None:
    if text is None or text == AUTO:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise MicroscaleError(f"--steps {text!r} must be a number of at least 1, or auto.")
    return int(text)
