"""`microscale inspect` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from microscale.cli import app
from microscale.suite import registry, trial
from suite.options import BAD_OPTIONS, not_loaded


def run(*arguments: str | Path, code: int = 0) -> Result:
    """Run `microscale inspect` in this process."""
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], prog_name="microscale")
    assert result.exit_code == code, result.output
    return result


def test_a_model_directory_with_a_text(
    language_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    record, picture = tmp_path / "i.json", tmp_path / "i.png"
    arguments = ("--text", text_file, "--format", "mxfp4/mxint8", "--limit", "2", "--sort", "sqnr")
    output = run(
        language_folder, *arguments, "--json", record, "--picture", picture, "--batch-size", "1"
    ).output
    for words in ("text.txt: 2 of 3 windows", "probabilities", "lm_head", "All layers together"):
        assert words in output
    content = json.loads(record.read_text())
    assert {"microscale", "torch", "device", "dtype", "seconds", "inspection"} <= {*content}
    layers = {layer["module"]: layer for layer in content["inspection"]["layers"]}
    operands = [o["operand"] for o in layers["transformer.h.0.attn"]["operands"]]
    assert operands == ["query", "key", "probabilities", "value"]
    assert layers["lm_head"]["alone"]["divergence"]["value"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_name_is_cut(language_folder: Path, text_file: Path) -> None:
    output = run(language_folder, "--text", text_file, "--limit", "1").output
    assert "transformer.h.1.attn.c_attn " in output
    assert "…" not in output


def test_json_on_standard_output_stands_alone(language_folder: Path, text_file: Path) -> None:
    result = run(language_folder, "--text", text_file, "--limit", "1", "--json", "-")
    assert json.loads(result.stdout)["inspection"]["format"] == "mxfp4"
    assert "All layers together" in result.stderr


def test_few_samples_unless_told_otherwise() -> None:
    output = run("stdlib-gpt", "--format", "mxint8/fp32", "--batch-size", "16").output
    assert "16 of 285 windows" in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "mxfp5"), "mxfp5"),
        (("--format", "mxfp4,mxint8"), "mxfp4,mxint8"),
        (("--sort", "sqn"), "--sort 'sqn' is not known. Did you mean sqnr?"),
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


def test_an_interrupt_leaves_nothing_half_written(
    language_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "measure", interrupted)
    folder = tmp_path / "out"
    folder.mkdir()
    files = ("--json", folder / "i.json", "--picture", folder / "i.png")
    result = run(language_folder, "--text", text_file, *files, code=130)
    assert "interrupted" in result.stderr
    assert list(folder.iterdir()) == []
