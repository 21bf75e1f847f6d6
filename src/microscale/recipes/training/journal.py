"""What a run writes down as it goes: a table of losses, samples, and a TensorBoard log."""

import csv
import os
from pathlib import Path
from typing import Any

from microscale.errors import MicroscaleError
from microscale.files import write_file

COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "validation")


class Journal:
    """`losses.csv`, a row a step, and scalars for TensorBoard if wanted."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        """Open it; rows of steps that will be done again are dropped."""
        self.path = folder / "losses.csv"
        self.rows = [row for row in _read(self.path) if int(row["step"]) <= step]
        write_file(self.path, _text(self.rows))
        self._file = self.path.open("a", newline="")
        self._board = _board(folder, step) if tensorboard else None

    def write(self, row: dict[str, Any], further: dict[str, float] | None = None) -> None:
        """Add the row of a step; `further` scalars are for TensorBoard alone."""
        kept = {name: _cell(row.get(name)) for name in COLUMNS}
        self.rows.append(kept)
        csv.DictWriter(self._file, COLUMNS, lineterminator="\n").writerow(kept)
        self._file.flush()
        if self._board is not None:
            scalars = {k: v for k, v in row.items() if k != "step" and v is not None}
            for name, value in (scalars | (further or {})).items():
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush everything to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def _text(rows: list[dict[str, str]]) -> str:
    return "".join(",".join(line) + "\n" for line in [COLUMNS, *(tuple(r.values()) for r in rows)])


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # The last line may have been cut off when the program was killed.
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MicroscaleError(
            "tensorboard = true needs the package tensorboard: pip install 'microscale[train]'."
        ) from error
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)
