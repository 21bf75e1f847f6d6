"""A module imports from its own layer or a lower one, without cycles, never through the package."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import microscale

ROOT = Path(microscale.__file__).parent
LAYERS = (
    # Data and files: the standard library only.
    (
        "version",
        "errors",
        "rounding",
        "formats",
        "spelling",
        "operands",
        "profiles",
        "policy",
        "files",
    ),
    ("kernels",),
    ("ops",),
    ("seed", "mapped", "cast", "tensor", "packed", "packed_ops"),
    ("products", "ledger", "watch", "rotation", "weights", "functional", "nn"),
    (
        "survey",
        "handlers",
        "scope",
        "conversion",
        "convert",
        "cache",
        "tally",
        "ranges",
        "analysis",
        "checkpoint",
    ),
    ("suite", "report", "recipes"),
    ("commands", "cli", "__main__"),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
BESIDES = {"tomli_w"}
"""What the lowest layer may import besides."""


def modules() -> dict[str, Path]:
    """Every module of the package except the package's own `__init__`, by dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("microscale", *(part for part in parts if part != "__init__")))
        if name != "microscale":
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: write the full path"
            module = node.module or ""
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield submodule if submodule in MODULES else module


def layer(module: str) -> int:
    """The layer that a module of the package is in."""
    name = module.split(".")[1]
    assert name in LAYER, f"{module} is in no layer; add it to LAYERS"
    return LAYER[name]


@pytest.mark.parametrize("module", MODULES)
def test_imports_from_lower_layers_only(module: str) -> None:
    for imported in imports(MODULES[module]):
        assert imported != "microscale", f"{module} imports through the package's __init__"
        if imported.startswith("microscale."):
            assert imported in MODULES, f"{module} imports {imported}, which is no module"
            assert layer(imported) <= layer(module), f"{module} imports {imported} from above"


@pytest.mark.parametrize("name", LAYERS[0])
def test_data_layer_needs_the_standard_library_only(name: str) -> None:
    tops = {imported.split(".")[0] for imported in imports(MODULES[f"microscale.{name}"])}
    assert tops <= sys.stdlib_module_names | BESIDES | {"microscale"}


def test_no_cycles() -> None:
    graph = {
        name: {imported for imported in imports(path) if imported in MODULES}
        for name, path in MODULES.items()
    }
    assert list(TopologicalSorter(graph).static_order())
