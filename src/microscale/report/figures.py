"""Figures as files: refused before any work, written whole, the same bytes for the same data."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from microscale.errors import MicroscaleError
from microscale.files import check_output, write_file
from microscale.suite.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What would put the date of drawing into the file, for each kind of file.
_DATES = {".png": "Creation Time", ".svg": "Date", ".pdf": "CreationDate"}


def check_picture(path: Path) -> None:
    """Check that a figure can be drawn to `path`, which came as `--picture`.

    Raises MicroscaleError for a kind of file that is not drawn, a folder that cannot be written
    to, or where matplotlib is missing.
    """
    if path.suffix.lower() not in _DATES:
        raise MicroscaleError(
            f"--picture {str(path)!r} ends in {path.suffix!r}; use {', '.join(_DATES)}."
        )
    check_output(path, "--picture")
    require("matplotlib", f"--picture {str(path)!r}")


def write_figure(figure: "Figure", path: Path) -> None:
    """Write `figure` to `path`, as the kind of file that the suffix says."""
    from matplotlib import rc_context

    kind = path.suffix.lower()
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "microscale"}):  # else the ids of an SVG are random
        figure.savefig(content, format=kind[1:], dpi=144, metadata={_DATES[kind]: None})
    write_file(path, content.getvalue())
