"""The command line: what it prints, what it writes, how it fails."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from microscale.cli import app
from microscale.errors import MicroscaleError
from microscale.formats import ELEMENTS, NAMED, SCALES
from microscale.report.format_words import number
from microscale.report.number_line import positive_values, text_lines
from microscale.spelling import get_format
from microscale.version import __version__

PNG = b"\x89PNG\r\n"


def run(*arguments: str, code: int = 0) -> str:
    """Run the command line in this process; return what it printed, standard error included."""
    result = CliRunner().invoke(app, arguments, prog_name="microscale")
    assert result.exit_code == code, result.output
    return result.output


def test_help_names_every_command() -> None:
    output = run("--help")
    assert all(command in output for command in ("formats", "info", "compare"))


def test_version() -> None:
    assert run("--version") == f"{__version__}\n"


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "microscale", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['microscale', '--help']\n"
        "from microscale.cli import main\n"
        "try: main()\n"
        "finally: print('heavy:', {'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: set()\n")


def test_formats_lists_all() -> None:
    lines = run("formats").splitlines()
    first_words = {line.split()[0] for line in lines if line.strip()}
    assert {*NAMED, *ELEMENTS, *SCALES} <= first_words


def test_formats_without_a_name_draws_nothing(tmp_path: Path) -> None:
    output = run("formats", "--picture", str(tmp_path / "x.png"), code=2)
    assert "draws one format; name it" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*NAMED, *ELEMENTS, "e3m0", "e4m3fnuz", "int2", "e1m0", "E2M1"])
def test_format_in_full(name: str) -> None:
    fmt = get_format(name)
    element = fmt if name.lower() not in NAMED else NAMED[name.lower()].element
    output = run("formats", name)
    assert output.startswith(f"{fmt}: ")
    assert f"Codes of {element}" in output
    assert f"Number line of {element}" in output


def test_format_in_full_shows_its_law_and_bits() -> None:
    output = run("formats", "mxfp4-rceil")
    assert "rceil: exponent = ceil(log2(amax / largest))" in output
    assert re.search(r"bits per value +4\.25\b", output)
    assert "8.91 MB" in output  # 4096 x 4096 x 4.25 / 8 bytes


def test_code_table_is_complete() -> None:
    table = run("formats", "e2m1").partition("Codes of e2m1")[2].partition("Number line")[0]
    cells = re.findall(r"^[01]{3}\. +(\S+) +(\S+)", table, flags=re.MULTILINE)
    assert [float(value) for row in cells for value in row] == list(ELEMENTS["e2m1"].values)


@pytest.mark.parametrize("name", ["mxfp4", "e5m2", "nvfp4", "int8-channel"])
def test_json_of_one_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / "format.json"
    run("formats", name, "--json", str(path))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["name"] == name
    element = content.get("element", content)
    values = [float(value) for value in element["values"]]
    expected = ELEMENTS[element["name"]].values
    assert [str(value) for value in values] == [str(value) for value in expected]
    assert content == json.loads(run("formats", name, "--json", "-"))


def test_json_of_all_formats() -> None:
    assert json.loads(run("formats", "--json", "-")).keys() == NAMED.keys() | ELEMENTS.keys()


@pytest.mark.parametrize(("suffix", "start"), [("png", PNG), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_picture(suffix: str, start: bytes, tmp_path: Path) -> None:
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        run("formats", "mxfp6_e2m3", "--picture", str(path))
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("name", ["int2", "e1m0", "e3m0", "int8", "e5m2"])
def test_picture_of_any_element(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    run("formats", name, "--picture", str(path))
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["formats", "mxfp5"], "format 'mxfp5' is not known. Did you mean"),
        (["formats", "mxfp4-even-x"], "option 'x' is not known"),
        (["formats", "mxfp4", "--picture", "x.bmp"], "--picture 'x.bmp' ends in '.bmp'; use .png"),
        (["formats", "mxfp4", "--picture", "none/x.png"], "there is no folder 'none'"),
        (["formats", "mxfp4", "--json", "none/x.json"], "--json 'none/x.json': there is no folder"),
        (["formats", "mxfp4", "--json", "."], "--json '.' is a folder"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = run(*arguments, code=2)
    assert output.startswith("microscale: ")
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_bad_input_in_a_process() -> None:
    command = [sys.executable, "-m", "microscale", "formats", "mxfp5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MicroscaleError("x"), 2)])
def test_compare_fails_cleanly(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("microscale.commands.compare.run_compare", fail)
    output = run("compare", code=code)
    assert output.startswith("microscale: ")
    assert "Traceback" not in output


def test_compare_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setattr(
        "microscale.commands.compare.run_compare", lambda *a, **k: calls.append((a, k))
    )
    run("compare", "model", "--formats", "mxfp4", "--text", "t.txt", "--limit", "3", "--batch-size",
        "2", "--seed", "5", "--device", "cuda", "--dtype", "bfloat16", "--json", "j", "--picture",
        "p.png")  # fmt: skip
    (arguments, options), = calls  # fmt: skip
    assert arguments == ("model",)
    assert options == {
        "formats": "mxfp4", "text": Path("t.txt"), "limit": 3, "batch_size": 2, "seed": 5,
        "device": "cuda", "dtype": "bfloat16", "json_file": Path("j"), "picture": Path("p.png"),
    }  # fmt: skip


def test_info() -> None:
    import torch

    output = run("info")
    assert re.search(rf"^microscale +{__version__}", output, flags=re.MULTILINE)
    from microscale.kernels.native.loader import native

    kernels = "compiled core" if native().library else "reference"
    assert re.search(rf"^kernels on cpu +{kernels}", output, flags=re.MULTILINE)
    content = json.loads(run("info", "--json", "-"))
    assert torch.__version__.startswith(content["libraries"]["torch"])
    assert content["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "-0"),
        (1.75, "1.75"),
        (448.0, "448"),
        (57344.0, "57344"),
        (2.0**-9, "2^-9"),
        (-(2.0**-20), "-2^-20"),
        (3 * 2.0**-16, "3 x 2^-16"),
        (1.984375, "1.984375"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("name", ELEMENTS)
def test_number_line_shows_every_value(name: str) -> None:
    # Wide enough that no two values of a small format share a column.
    element = ELEMENTS[name]
    width = 4001
    lines = text_lines(element, width).splitlines()
    assert all(len(line) <= width for line in lines)
    count = len(positive_values(element))
    weights = {"┴": 1, "┻": 2, "█": 3}
    linear = sum(weights.get(mark, 0) for mark in lines[1])
    assert linear <= count + 1
    if element.bits < 8:
        assert (linear, lines[5].count("┴")) == (count + 1, count)
