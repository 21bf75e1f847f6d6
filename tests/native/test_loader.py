"""Finding the compiled core, and the variable that chooses its instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from microscale.kernels.native import loader

SHOW = "from microscale.commands.info import info; print(info())"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != loader.VARIABLE} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def names() -> list[str]:
    library = loader.native().library
    return [] if library is None else loader.usable(library)


@pytest.mark.parametrize("isa", names())
def test_the_variable_forces_an_instruction_set(isa: str) -> None:
    done = run(SHOW, MICROSCALE_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert f"compiled core, {isa}" in done.stdout


def test_the_variable_forces_the_reference() -> None:
    done = run(SHOW, MICROSCALE_ISA="Reference")
    assert done.returncode == 0, done.stderr
    assert "reference (PyTorch): MICROSCALE_ISA=reference" in done.stdout


@pytest.mark.skipif(not names(), reason=loader.native().reason)
@pytest.mark.parametrize("isa", ["avx1024", "amx"])
def test_what_cannot_be_forced_is_refused_by_name(isa: str) -> None:
    if isa in names():
        pytest.skip(f"this machine runs {isa}")
    done = run("import torch, microscale; microscale.cast(torch.ones(32), 'mxfp4')",
               MICROSCALE_ISA=isa)  # fmt: skip
    assert done.returncode != 0
    assert f"MicroscaleError: MICROSCALE_ISA='{isa}'" in done.stderr
    assert "use one of reference, baseline" in done.stderr


def test_without_a_library_everything_runs_on_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "_places", lambda: iter([tmp_path / "none.so"]))
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    found = loader.native.__wrapped__()
    assert found.library is None
    assert "was not built" in found.reason


def test_a_file_that_is_no_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(loader, "_places", lambda: iter([broken]))
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    found = loader.native.__wrapped__()
    assert found.library is None
    assert str(broken) in found.reason


@pytest.mark.skipif(not names(), reason=loader.native().reason)
def test_info_names_what_the_processor_lacks() -> None:
    library = loader.native().library
    assert library is not None
    every = [*loader.usable(library), *loader.lacking(library)]
    assert every == ["baseline", "avx2", "avx512", "avx512_vnni", "amx"][: len(every)]
    found = run(SHOW, MICROSCALE_ISA="baseline").stdout
    assert "compiled core, baseline (of baseline" in found
    for name in loader.lacking(library):
        assert name in found.partition("not on this processor: ")[2]
