"""Microscaling formats: cast, pack, convert and compare.

`import microscale` is light: a name is loaded when it is first used, so neither `import
microscale` nor `microscale --help` imports torch. Inside the package, modules import each other by
full path and never through this file.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from microscale.version import __version__

if TYPE_CHECKING:
    from microscale.cast import cast
    from microscale.checkpoint.native import load, save
    from microscale.commands.info import info
    from microscale.convert import convert, revert
    from microscale.errors import MicroscaleError
    from microscale.formats import BlockFormat, ElementFormat
    from microscale.policy import Policy
    from microscale.spelling import get_format
    from microscale.suite.compare import compare
    from microscale.suite.inspect import inspect
    from microscale.tensor import BlockTensor, dequantize, quantize, quantize_both

__all__ = [
    "BlockFormat",
    "BlockTensor",
    "ElementFormat",
    "MicroscaleError",
    "Policy",
    "__version__",
    "cast",
    "compare",
    "convert",
    "dequantize",
    "get_format",
    "info",
    "inspect",
    "load",
    "quantize",
    "quantize_both",
    "revert",
    "save",
]

_HOMES = {
    "BlockFormat": "microscale.formats",
    "BlockTensor": "microscale.tensor",
    "ElementFormat": "microscale.formats",
    "MicroscaleError": "microscale.errors",
    "Policy": "microscale.policy",
    "cast": "microscale.cast",
    "compare": "microscale.suite.compare",
    "convert": "microscale.convert",
    "dequantize": "microscale.tensor",
    "get_format": "microscale.spelling",
    "info": "microscale.commands.info",
    "inspect": "microscale.suite.inspect",
    "load": "microscale.checkpoint.native",
    "quantize": "microscale.tensor",
    "quantize_both": "microscale.tensor",
    "revert": "microscale.convert",
    "save": "microscale.checkpoint.native",
}


def __getattr__(name: str) -> object:
    """A public name, loaded from its module at first use (PEP 562)."""
    if name == "recipes":
        return import_module("microscale.recipes")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__, "recipes"})


class _Package(ModuleType):
    """A package in which a public name wins over a submodule of the same name.

    The import system sets every submodule as an attribute of its package, so that importing
    the module `microscale.cast` (which any other module may do at any time) would replace the
    function `microscale.cast`. Here that one assignment is left out; the module stays
    reachable as `from microscale.cast import ...` and in `sys.modules`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
