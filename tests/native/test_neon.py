"""The core on 64-bit Arm, run by qemu: every call as the baseline of x86 makes it, bit for bit.

Needs a cross compiler and qemu (Debian: g++-aarch64-linux-gnu, qemu-user). The baseline is compiled
without any -m flag, so on Arm the compiler makes NEON of its loops.
"""

import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microscale.formats import NAMED
from microscale.kernels.native import casts, products
from microscale.kernels.native.loader import native
from microscale.kernels.storage import Layout
from microscale.tensor import quantize
from native_calls import Recorder, differences
from native_casts import FORMATS, Case, draw

ROOT = Path(__file__).parents[2]
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
ABSENT = [tool for tool in (COMPILER, QEMU, "cmake") if shutil.which(tool) is None]
CASES, MOST = 300, 6000

pytestmark = [
    pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)}"),
    pytest.mark.skipif(native().library is None, reason=native().reason),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program for Arm that repeats recorded calls, and the core beside it."""
    built = tmp_path_factory.mktemp("aarch64")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    compiler = [f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DMICROSCALE_WERROR=ON"]
    run(["cmake", "-S", str(ROOT), "-B", str(built), *target, *compiler])
    run(["cmake", "--build", str(built), "--parallel", "2"])
    program = built / "replay"
    library = ["-L", str(built), "-lmicroscale_native", "-Wl,-rpath,$ORIGIN"]
    source = ROOT / "tests" / "native" / "replay.cpp"
    run([COMPILER, "-O1", str(source), "-o", str(program), *library])
    return program


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The core of this machine on its baseline, recording."""
    library = native().library
    assert library is not None
    recorder = Recorder(library)
    products._library()  # sets the types of arguments
    monkeypatch.setattr(products, "_library", lambda: recorder)
    before = library.ms_isa()
    assert library.ms_set_isa(0) == 0
    yield recorder
    library.ms_set_isa(before)


def check(recorder: Recorder, replay: Path, folder: Path) -> None:
    given, left = folder / "calls", folder / "left"
    given.write_bytes(recorder.file())
    sysroot = Path(run([COMPILER, "-print-file-name=libc.so.6"]).strip()).resolve().parents[1]
    run([QEMU, "-L", str(sysroot), str(replay), str(given), str(left)])
    found = bytearray(left.read_bytes())
    assert differences(recorder.calls, found) == []
    found[4] ^= 1  # the first value of the first call
    assert len(differences(recorder.calls, found)) == 1


def record(recorder: Recorder, case: Case) -> None:
    served = casts.served(case.fmt, *case.options)
    assert served is not None
    found = replace(served, library=recorder)  # type: ignore[arg-type]
    x, axis = case.x, case.axis
    with recorder.watching():
        casts.cast(x, found, axis, case.dtype, case.seed)
        if casts.packs(x):
            stored = casts.quantize(x, found, axis, case.seed)
            layout = Layout(found.format, axis, torch.float32)
            length = x.shape[axis] if x.dim() else 1
            casts.dequantize(stored, found, layout, length, case.dtype)


def test_random_casts(recorder: Recorder, replay: Path, tmp_path: Path) -> None:
    for i in range(CASES):
        case = draw(random.Random(i))
        if case.x.numel() <= MOST:
            record(recorder, case)
    check(recorder, replay, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(
    recorder: Recorder, replay: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    mixed = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for fmt in FORMATS:
        options = ("even", "saturate", "element", "off", "off")
        for x in (every, mixed.view(64, 1024)):
            record(recorder, Case(fmt, options, "", x, x.dim() - 1, dtype, None, 1))
    check(recorder, replay, tmp_path)


def test_products(recorder: Recorder, replay: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in NAMED:
        if isinstance(products.numbers(name), str):
            continue
        for rows, length, batch in [(7, 96, 1), (9, 100, 3), (20, 160, 20), (5, 0, 2)]:
            weight = quantize(torch.randn(rows, length, generator=generator), name)
            given = quantize(torch.randn(batch, length, generator=generator), name)
            with recorder.watching():
                w = products.Matrix(weight.stored, name, length)
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(batch, length, generator=generator).to(dtype)
                    products.linear(x, w, torch.randn(rows, generator=generator))
                left = products.Matrix(given.stored, name, length)
                products.linear_packed(left, w, torch.float32)
    check(recorder, replay, tmp_path)
