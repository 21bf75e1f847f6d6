"""The state of a training run, on disk: a kill at any moment leaves the last one whole.

One file, replaced in one step. It begins with a line that names what it is and the SHA-256 of the
rest, so that a foreign or a damaged file is known before anything of it is used.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from microscale.errors import MicroscaleError
from microscale.files import write_file

_MAGIC = b"microscale training state 1 "


def write_snapshot(path: Path, content: dict[str, Any]) -> None:
    """Write plain values and tensors, in the place of what was there."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _MAGIC + digest + b"\n" + payload)


def read_snapshot(path: Path, run: str) -> dict[str, Any] | None:
    """What was written for the run with that digest; None if there is no file.

    Raises MicroscaleError for a file that is foreign, damaged, or of another run.
    """
    if not path.exists():
        return None
    try:
        head, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise MicroscaleError(f"checkpoint {str(path)!r} cannot be read: {error}.") from error
    if not head.startswith(_MAGIC):
        raise MicroscaleError(
            f"{str(path)!r} is no checkpoint of this program; name another folder, or delete it."
        )
    if head.removeprefix(_MAGIC).decode(errors="replace") != hashlib.sha256(payload).hexdigest():
        raise MicroscaleError(
            f"checkpoint {str(path)!r} is damaged: {len(payload)} bytes that do not have the "
            "digest they were written with; delete it to begin anew."
        )
    content: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
    if content["run"] != run:
        raise MicroscaleError(
            f"checkpoint {str(path)!r} is of another run (another model, data or setting); name "
            "another folder, or delete it."
        )
    return content
