"""Text to windows of token ids, so that every token is predicted exactly once.

A file is one document, or several where lines `<|endoftext|>` part it. A document begins with
the tokenizer's beginning-of-sequence token if there is one, and is cut into windows of `length`
positions that follow each other: position i of a window predicts the next token, the last
position predicts the first token of the next window. Windows of different lengths never share a
batch, so nothing is padded.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from microscale.errors import MicroscaleError

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids `inputs` and, for each, the next token in `targets`; same length."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        """Number of predicted tokens."""
        return len(self.inputs)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; MicroscaleError where it is missing, empty or not UTF-8."""
    if not path.is_file():
        raise MicroscaleError(f"text file {str(path)!r} does not exist (or is no file).")
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MicroscaleError(
            f"text file {str(path)!r} is not UTF-8: byte {data[error.start]:#04x} at offset "
            f"{error.start} ({error.reason}); convert it to UTF-8."
        ) from error
    if not text.strip():
        raise MicroscaleError(
            f"text file {str(path)!r} is empty ({len(data)} bytes, no words); give one with text."
        )
    return text


def documents(text: str) -> list[str]:
    """The documents of a text: what stands between lines `<|endoftext|>`, without empty ones."""
    parts = re.split(rf"^{re.escape(SEPARATOR)}$", text, flags=re.MULTILINE)
    if len(parts) == 1:
        return parts
    return [part.strip() for part in parts if part.strip()]


def windows(tokens: Sequence[int], length: int) -> Iterator[Window]:
    """Cut one document into windows of at most `length` predicted tokens."""
    for start in range(0, len(tokens) - 1, length):
        stop = min(start + length, len(tokens) - 1)
        yield Window(tuple(tokens[start:stop]), tuple(tokens[start + 1 : stop + 1]))


def batches(items: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Group windows of one length, at most `size` of them, longest first."""
    by_length: dict[int, list[Window]] = {}
    for window in items:
        by_length.setdefault(len(window), []).append(window)
    for length in sorted(by_length, reverse=True):
        group = by_length[length]
        for start in range(0, len(group), size):
            yield group[start : start + size]
