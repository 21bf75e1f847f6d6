"""What commands print to: the terminal, and JSON for other programs."""

import json
import sys
from pathlib import Path

from rich.console import Console

from microscale.files import check_output, write_file

WIDTH_OF_FILES = 160
"""Columns where the output is no terminal: wide enough that no table loses one."""

STANDARD_OUTPUT = Path("-")
"""The file name that stands for standard output."""


def console() -> Console:
    """Standard output, with tables as wide as they need where it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES, highlight=False)


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON to the file given with `--json`, or to standard output.

    Raises MicroscaleError where the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        write_file(check_output(path, "--json"), text)
