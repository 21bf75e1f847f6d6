"""`microscale compare` as a user meets it."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from microscale.cli import app
from microscale.suite import registry, trial
from suite.options import BAD_OPTIONS, not_loaded

FORMATS = "mxint8,mxfp4,mxfp4/mxfp6_e2m3"


def run(*arguments: str | Path, code: int = 0) -> Result:
    """Run `microscale compare` in this process."""
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], prog_name="microscale")
    assert result.exit_code == code, result.output
    return result


def test_a_model_directory_with_a_text(
    language_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    record, picture = tmp_path / "c.json", tmp_path / "c.png"
    arguments = ("--text", text_file, "--formats", FORMATS, "--limit", "2", "--batch-size", "1")
    files = ("--json", record, "--picture", picture)
    output = run(language_folder, *arguments, *files).output
    assert "perplexity" in output
    assert "text.txt: 2 of 3 windows of up to 64 tokens" in output
    for name in ("float32", *FORMATS.split(","), "MXINT8 at parity"):
        assert name in output
    assert re.search("E4M3 over E5M2 +not tested +mxfp8_e4m3 and mxfp8_e5m2 not compared", output)
    content = json.loads(record.read_text())
    assert {"microscale", "torch", "device", "dtype", "seconds", "comparisons"} <= {*content}
    (comparison,) = content["comparisons"]
    assert [row["format"] for row in comparison["rows"]] == ["float32", *FORMATS.split(",")]
    assert comparison["rows"][1]["values_unquantized"]["divergence"]["value"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(picture.read_bytes()) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.png", "text.txt"]


def test_json_on_standard_output_stands_alone(language_folder: Path, text_file: Path) -> None:
    arguments = ("--text", text_file, "--formats", "mxfp4", "--limit", "1", "--json", "-")
    result = run(language_folder, *arguments)
    assert json.loads(result.stdout)["comparisons"][0]["model"] == language_folder.name
    assert "perplexity" in result.stderr


def test_other_types_and_seeds(language_folder: Path, text_file: Path) -> None:
    arguments = ("--text", text_file, "--formats", "mxfp4", "--limit", "1", "--json", "-")
    result = run(language_folder, *arguments, "--dtype", "bfloat16", "--seed", "3")
    content = json.loads(result.stdout)
    assert content["dtype"] == "bfloat16"
    assert content["comparisons"][0]["seed"] == 3
    assert content["comparisons"][0]["rows"][0]["format"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--formats", "mxfp5"), "mxfp5"),
        (("--formats", "mxfp4,,mxint8"), "empty name"),
        (("--formats", "mxfp4,mxfp4"), "twice"),
        *BAD_OPTIONS,
    ],
)
def test_bad_options_are_refused_before_any_work(
    language_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str],
    words: str,
) -> None:
    monkeypatch.setattr(registry, "load_language_model", not_loaded)
    result = run(language_folder, "--text", text_file, *options, code=2)
    assert words in result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("microscale: ")


def test_texts_that_cannot_be_read(language_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, words in ((b"", "is empty (0 bytes"), (b"ab\xffc", "byte 0xff at offset 2")):
        path.write_bytes(content)
        assert words in run(language_folder, "--text", path, code=2).stderr


def test_a_directory_that_lacks_files(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    stderr = run(folder, "--text", text_file, code=2).stderr
    assert "lacks config.json; and weights" in stderr


def test_an_interrupt_leaves_nothing_half_written(
    language_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "measure", interrupted)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "c.json").write_text("old")
    files = ("--json", folder / "c.json", "--picture", folder / "c.png")
    result = run(language_folder, "--text", text_file, *files, code=130)
    assert "interrupted" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["c.json"]
    assert (folder / "c.json").read_text() == "old"
