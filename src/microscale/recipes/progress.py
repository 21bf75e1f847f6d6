"""Weights solved so far, on disk, so that a calibration that was killed goes on where it was.

A folder holds `run.json`, which says what was asked for by a digest of everything that has a part
in the result, and for each finished unit a file of weights and one of outcomes. The second is
written last: a unit without it is done again. Weights are read back bit for bit and everything
else is computed as before, so the result is the same to the last bit.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microscale.checkpoint.native import load, save
from microscale.errors import MicroscaleError
from microscale.files import write_file
from microscale.recipes.batch import Batch
from microscale.recipes.calibration import Outcome
from microscale.tensor import BlockTensor
from microscale.version import __version__

_RUN = "run.json"


def digest(model: nn.Module, batches: Sequence[Batch], settings: object) -> str:
    """A digest of a model's values, the data and the settings.

    Of batches that are functions only the number is known.
    """
    found = hashlib.sha256()
    found.update(repr((__version__, torch.__version__, settings)).encode())
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        _digest_tensor(found, name, x)
    for number, batch in enumerate(batches):
        items = batch.items() if isinstance(batch, Mapping) else enumerate(_items(batch))
        for key, value in items:
            if isinstance(value, Tensor):
                _digest_tensor(found, f"{number}.{key}", value)
            else:
                found.update(f"{number}.{key} {type(value).__name__}".encode())
                found.update(repr(value).encode() if isinstance(value, (int, float, str)) else b"")
    return found.hexdigest()


def _items(batch: Batch) -> Sequence[Any]:
    return batch if isinstance(batch, (tuple, list)) else (batch,)


def _digest_tensor(found: "hashlib._Hash", name: str, x: Tensor) -> None:
    found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
    parts = x.stored if isinstance(x, BlockTensor) else (x,)
    for part in parts:
        whole = part.detach().cpu().contiguous().reshape(-1)
        found.update(whole.view(torch.uint8).numpy().data if whole.numel() else b"")


class Progress:
    """A folder of finished units."""

    def __init__(self, folder: Path, run: str, *, writes: bool = True) -> None:
        """Open or make it; raises MicroscaleError if it is of another run."""
        self.folder, self.writes = folder, writes
        record = folder / _RUN
        if record.is_file():
            if _read(record).get("digest") != run:
                raise MicroscaleError(
                    f"{str(folder)!r} holds the progress of another run (another model, data or "
                    "setting); name another folder, or delete it."
                )
        elif writes:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps({"digest": run}) + "\n")

    def has(self, unit: int) -> bool:
        """Whether a unit is finished."""
        return self._record(unit).is_file()

    def read(self, unit: int) -> tuple[dict[str, nn.Parameter], list[Outcome]]:
        """The weights and outcomes of a finished unit."""
        outcomes = [
            Outcome(**{**record, "notes": tuple(record["notes"])})
            for record in _read(self._record(unit))["outcomes"]
        ]
        tensors = load(self._weights(unit)) if self._weights(unit).is_file() else {}
        made = {name: nn.Parameter(x, requires_grad=False) for name, x in tensors.items()}
        return made, outcomes

    def write(
        self, unit: int, parameters: Mapping[str, nn.Parameter], outcomes: Sequence[Outcome]
    ) -> None:
        """Keep what was solved."""
        if not self.writes:
            return
        if parameters:
            save(dict(parameters), self._weights(unit))
        content = {"outcomes": [asdict(outcome) for outcome in outcomes]}
        write_file(self._record(unit), json.dumps(content) + "\n")

    def remove(self) -> None:
        """Delete the folder's files and, if nothing else is in it, the folder."""
        if not self.writes:
            return
        for path in (*self.folder.glob("unit-*"), self.folder / _RUN):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _record(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:05}.json"

    def _weights(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:05}.safetensors"


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise MicroscaleError(f"{str(path)!r} is damaged ({error}); delete its folder.") from error
    return found
