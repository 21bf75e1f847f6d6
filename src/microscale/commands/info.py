"""`microscale info`: versions, devices, which kernels run, and which extras are there."""

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from rich.table import Table

from microscale.commands.console import STANDARD_OUTPUT, console, write_json
from microscale.kernels.native.loader import current, lacking, native, usable
from microscale.version import __version__

LIBRARIES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "matplotlib")
_OF_EXTRA = re.compile(r"([\w.-]+).*extra == ['\"](\w+)['\"]")


@dataclass(frozen=True, slots=True)
class Info:
    """What this installation is and how it computes. `str()` is readable; `to_dict()` is data."""

    microscale: str
    python: str
    machine: str
    libraries: Mapping[str, str | None]
    devices: Mapping[str, str]
    kernels: Mapping[str, str]
    threads: int
    missing: Mapping[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, object]:
        """The same as plain data for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of every line."""
        libraries = [(name, found or "not installed") for name, found in self.libraries.items()]
        kernels = [(f"kernels on {device}", name) for device, name in self.kernels.items()]
        extras = [
            (f"extra {name}", f"missing {', '.join(gone)}" if gone else "complete")
            for name, gone in self.missing.items()
        ]
        return [
            ("microscale", self.microscale),
            ("python", f"{self.python} on {self.machine}"),
            *libraries,
            *self.devices.items(),
            *kernels,
            ("threads", str(self.threads)),
            *extras,
        ]

    def __str__(self) -> str:
        """Return the lines as text."""
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.rows())


def info() -> Info:
    """Look up versions, devices and kernels of this installation."""
    devices = {"cpu": _processor()}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return Info(
        microscale=__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        libraries={name: _version(name) for name in LIBRARIES},
        devices=devices,
        kernels=dict.fromkeys(devices, REFERENCE) | {"cpu": _core()},
        threads=torch.get_num_threads(),
        missing=_extras(),
    )


REFERENCE = "reference (PyTorch)"


def _core() -> str:
    """Which kernels run on the CPU, and why no others."""
    found = native()
    if found.library is None:
        return f"{REFERENCE}: {found.reason}"
    usable_here = ", ".join(usable(found.library))
    lacks = ", ".join(lacking(found.library))
    not_here = f"; not on this processor: {lacks}" if lacks else ""
    return (
        f"compiled core, {current(found.library)} (of {usable_here}{not_here}) from {found.path}; "
        "reference for float64, pow2 scales and what docs/numerics.md names"
    )


def _processor() -> str:
    """The processor as it calls itself, which Linux knows better than Python."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(errors="replace").splitlines() if listed.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _extras() -> dict[str, tuple[str, ...]]:
    """What is missing of each extra, by the requirements that the installation recorded."""
    try:
        requirements = requires("microscale") or []
    except PackageNotFoundError:  # run from its sources
        return {}
    missing: dict[str, tuple[str, ...]] = {}
    for requirement in requirements:
        if match := _OF_EXTRA.match(requirement):
            distribution, extra = match.groups()
            gone = () if _version(distribution) else (distribution,)
            missing[extra] = missing.get(extra, ()) + gone
    return missing


def show_info(*, json_file: Path | None) -> None:
    """Print `info()`, or write it as JSON (`-`: to standard output)."""
    found = info()
    if json_file is not None:
        write_json(json_file, found.to_dict())
    if json_file == STANDARD_OUTPUT:
        return
    grid = Table.grid(padding=(0, 3))
    for row in found.rows():
        grid.add_row(*row)
    console().print(grid)
