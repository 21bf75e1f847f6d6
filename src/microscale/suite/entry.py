"""A model known by name: where its files are, and how it is loaded together with its task."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from microscale.errors import MicroscaleError
from microscale.suite.setting import Setting
from microscale.suite.task import Task

EMBEDDED = Path(__file__).parent / "embedded"
DATA_VARIABLE = "MICROSCALE_DATA"


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model and its task."""

    name: str
    model: nn.Module
    task: Task


@dataclass(frozen=True, slots=True)
class Entry:
    """A model known by name; `load` takes its folder, the setting and a text that replaces its own.

    `needs`: packages besides the required ones. `source`: the folder among MICROSCALE_DATA's
    models, "" for the package's own.
    """

    name: str
    about: str
    load: Callable[[Path, Setting, Path | None], Subject]
    needs: tuple[str, ...] = ()
    source: str = ""
    takes_text: bool = False

    def folder(self) -> Path:
        """Where its files are; MicroscaleError if they are not there."""
        if not self.source:
            return EMBEDDED
        root = os.environ.get(DATA_VARIABLE)
        if not root:
            raise MicroscaleError(
                f"model {self.name!r} ({self.about}) is not part of the package: set "
                f"{DATA_VARIABLE} to the folder that holds models/{self.source}."
            )
        folder = Path(root) / "models" / self.source
        if not folder.is_dir():
            raise MicroscaleError(
                f"model {self.name!r}: {DATA_VARIABLE} is {root!r}, but {str(folder)!r} does not "
                f"exist."
            )
        return folder
