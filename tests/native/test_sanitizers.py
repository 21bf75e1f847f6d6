"""The core under AddressSanitizer and UndefinedBehaviorSanitizer, on random casts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from microscale.kernels.native.loader import LIBRARY

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the package's library, built with sanitizers, is found first."""
    built = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-S", str(ROOT), "-B", str(built / "build"), "-DMICROSCALE_SANITIZE=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(built / "build"), "--parallel", "2"], check=True)
    folder = built / "site" / "microscale" / "kernels" / "native"
    folder.mkdir(parents=True)
    shutil.copy(built / "build" / LIBRARY, folder)
    return built / "site"


def _run(place: Path, script: str, *arguments: str) -> None:
    if not all(Path(_runtime(name)).is_absolute() for name in RUNTIMES):
        pytest.skip("g++ brings no sanitizer runtimes here")
    paths = [str(place), str(TESTS), *filter(None, sys.path)]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(_runtime, RUNTIMES)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep memory until the end
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment.pop("MICROSCALE_ISA", None)
    check = "from microscale.kernels.native.loader import native; print(native().path)"
    found = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False
    )
    assert str(place) in found.stdout, found.stderr
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "runtime error" not in done.stderr
    assert "Sanitizer" not in done.stderr


def test_random_casts_touch_no_foreign_memory(place: Path) -> None:
    _run(place, "native_casts.py", "60")


@pytest.mark.slow
def test_many_random_casts_touch_no_foreign_memory(place: Path) -> None:
    _run(place, "native_casts.py", "2000")
