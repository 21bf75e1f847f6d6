"""Optional packages, imported where they are used."""

from importlib import import_module
from types import ModuleType

from microscale.errors import MicroscaleError


def require(module: str, purpose: str) -> ModuleType:
    """Import `module`, or raise MicroscaleError that says which installation brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MicroscaleError(
            f"{purpose} needs the package {module.partition('.')[0]!r}, which cannot be imported "
            f"here ({error}); install microscale[demo]."
        ) from error
