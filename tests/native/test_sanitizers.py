"""The core under AddressSanitizer and UndefinedBehaviorSanitizer, on random casts and products."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from microscale.kernels.native.loader import LIBRARY

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
BUILT = ROOT / "build" / "sanitized"
"""Kept: the next run compiles only what changed."""
NATIVE = ("microscale", "kernels", "native")
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the runtimes are preloaded as on Linux"),
    pytest.mark.skipif(
        shutil.which("cmake") is None or shutil.which("g++") is None,
        reason="building with sanitizers needs CMake and g++",
    ),
]


def _runtime(name: str) -> str:
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@pytest.fixture(scope="module")
def place() -> Path:
    """A folder where the package's library, built with sanitizers, is found first."""
    folder = BUILT.joinpath("site", *NATIVE)
    folder.mkdir(parents=True, exist_ok=True)
    output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILT), "-DMICROSCALE_SANITIZE=ON", output]
    with (BUILT / "lock").open("w") as lock:  # processes of one run build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(configure, check=True, capture_output=True)
        subprocess.run(["cmake", "--build", str(BUILT), "--parallel", "2"], check=True)
    assert (folder / LIBRARY).is_file()
    return BUILT / "site"


CODE = """
import native_casts, native_products
from microscale.kernels.native.loader import native
print(native().path, flush=True)
native_casts.main({casts}, {first})
native_products.main({products}, {first})
print("done")
"""


def _run(place: Path, *, casts: int, products: int, first: int) -> None:
    if not all(Path(_runtime(name)).is_absolute() for name in RUNTIMES):
        pytest.skip("g++ brings no sanitizer runtimes here")
    paths = [str(place), str(TESTS), *filter(None, sys.path)]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(_runtime, RUNTIMES)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep memory until the end
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment.pop("MICROSCALE_ISA", None)
    code = CODE.format(casts=casts, products=products, first=first)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert done.stdout.splitlines() == [str(place.joinpath(*NATIVE, LIBRARY)), "done"]
    assert "runtime error" not in done.stderr
    assert "Sanitizer" not in done.stderr


def test_random_calls_touch_no_foreign_memory(place: Path) -> None:
    _run(place, casts=10, products=40, first=0)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 9000, 1000))
def test_many_random_calls_touch_no_foreign_memory(place: Path, first: int) -> None:
    _run(place, casts=100, products=900, first=first)
