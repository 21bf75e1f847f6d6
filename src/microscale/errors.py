"""The one exception type that users meet."""

from collections.abc import Iterable
from difflib import get_close_matches


class MicroscaleError(ValueError):
    """Bad input. The message says what was wrong (with the value), where, and how to mend it."""


def near_names(name: str, known: Iterable[str]) -> str:
    """`' Did you mean ...?'` for the known names closest to `name`, else a list of some of them."""
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" Known: {', '.join(names)}."
