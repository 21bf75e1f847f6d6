"""Where the outcome of a command that runs models goes: terminal, JSON and picture."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from microscale.commands.console import STANDARD_OUTPUT, console, write_json
from microscale.files import check_output
from microscale.report.figures import check_picture, write_figure
from microscale.suite.setting import Setting
from microscale.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Outcome:
    """The files that are asked for, and when the command began.

    With `json_file` "-" the JSON is all that stands on standard output, and what is for the reader
    goes to standard error.
    """

    json_file: Path | None
    picture: Path | None
    start: float = field(default_factory=time.perf_counter)

    @classmethod
    def checked(cls, json_file: Path | None, picture: Path | None) -> "Outcome":
        """Check, before any work, that the files can be written; raise MicroscaleError."""
        if json_file is not None and json_file != STANDARD_OUTPUT:
            check_output(json_file, "--json")
        if picture is not None:
            check_picture(picture)
        return cls(json_file, picture)

    def terminal(self, width: int) -> Console:
        """What is printed to: at least `width` columns; a table is better wrapped than cut."""
        usual = self.json_file != STANDARD_OUTPUT
        terminal = console() if usual else Console(stderr=True, highlight=False)
        terminal.width = max(terminal.width, width)
        return terminal

    def write(
        self,
        record: Mapping[str, object],
        draw: Callable[[], "Figure"],
        setting: Setting,
        terminal: Console,
    ) -> None:
        """Write the files, whole, and say how long all took."""
        seconds = time.perf_counter() - self.start
        if self.json_file is not None:
            write_json(self.json_file, _machine(setting, seconds) | dict(record))
        if self.picture is not None:
            write_figure(draw(), self.picture)
        terminal.print(f"{seconds:.0f} s on {setting.device}; threads: {torch.get_num_threads()}.")


def _machine(setting: Setting, seconds: float) -> dict[str, object]:
    return {
        "microscale": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
