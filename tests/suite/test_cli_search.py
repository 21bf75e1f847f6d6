"""`microscale search` as a user meets it, and its policy in the other commands."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from microscale.cli import app
from microscale.policy import Policy
from microscale.suite import calibration, registry, trial
from suite.options import BAD_OPTIONS, not_loaded

FORMATS = ("--formats", "mxfp4,mxint8", "--limit", "1")


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="microscale")
    assert result.exit_code == code, result.output
    return result


def test_a_search_and_what_takes_its_policy(
    language_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, record, picture = (tmp_path / name for name in ("mix.toml", "s.json", "s.png"))
    files = ("--out", out, "--json", record, "--picture", picture)
    output = run(
        *("search", language_folder, "--budget", "6bits", "--data", text_file, *FORMATS, *files)
    ).output
    for words in ("transformer.wte = lm_head", "chosen", "mix.toml: ", "KL"):
        assert words in output
    content = json.loads(record.read_text())["search"]
    assert content["chosen"]["weight_bits"] <= 6
    policy = Policy.read(out)
    assert Policy.from_dict(content["chosen"]["policy"]) == policy
    assert picture.read_bytes().startswith(b"\x89PNG")
    both = ("--formats", f"mxfp4,{out}", "--text", text_file, "--limit", "1")
    compared = run("compare", language_folder, *both, "--json", "-").stdout
    rows = json.loads(compared)["comparisons"][0]["rows"]
    assert [row["format"] for row in rows] == ["float32", "mxfp4", "mix.toml"]
    assert rows[2]["bits_per_weight"] == content["chosen"]["weight_bits"]
    inspected = run("inspect", language_folder, "--format", out, "--text", text_file, "--limit", 1)
    assert "in mix.toml" in inspected.output
    folder = tmp_path / "packed"
    run("quantize", language_folder, "--policy", out, "--data", text_file, "--out", folder)
    assert Policy.read(folder / "policy.toml") == policy


def test_json_on_standard_output_stands_alone(language_folder: Path, text_file: Path) -> None:
    options = ("--budget", "5", "--data", text_file, *FORMATS, "--measure", "output")
    result = run("search", language_folder, *options, "--json", "-", "--solver", "greedy")
    assert json.loads(result.stdout)["search"]["measure"] == "output"
    assert "No --out FILE" in result.stderr


def test_a_named_model_has_data_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "mix.json"
    options = ("--budget", "4.6bits", "--measure", "gradient", "--activations", "fp32", *FORMATS)
    output = run("search", "stdlib-gpt", *options, "--out", out).output
    assert "These are data that `compare` evaluates on" in " ".join(output.split())
    assert Policy.read(out).forward.input is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "much"), "budget 'much' is not an amount"),
        (("--formats", "mxfp4,,mxint8"), "empty name"),
        (("--formats", "mxfp5"), "mxfp5"),
        (("--measure", "hessian"), "measure 'hessian' is not known"),
        (("--solver", "exakt"), "solver 'exakt' is not known"),
        (("--activations", "1KB"), "activations '1KB' are not stored"),
        (("--out", "mix.yaml"), "ends in '.yaml'; use .toml or .json"),
        (("--out", "/no/such/folder/mix.toml"), "there is no folder"),
        (("--data", "/no/such/text"), "does not exist"),
        *(pair for pair in BAD_OPTIONS if pair[0][0] != "--text"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_any_work(
    language_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str],
    words: str,
) -> None:
    for module in (registry, calibration):
        monkeypatch.setattr(module, "load_language_model", not_loaded)
    usual = {"--budget": "5bits", "--data": str(text_file)} | {options[0]: options[1]}
    flat = [word for pair in usual.items() for word in pair]
    result = run("search", language_folder, *flat, code=2)
    assert words in result.stderr
    assert result.stdout == ""


def test_a_directory_needs_data(language_folder: Path) -> None:
    assert "add --data FILE" in run("search", language_folder, "--budget", "5", code=2).stderr


def test_a_budget_that_cannot_be_met_writes_nothing(
    language_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mix.toml"
    options = ("--data", text_file, "--budget", "3bits", "--out", out, *FORMATS)
    result = run("search", language_folder, *options, code=2)
    assert "budget '3bits' cannot be met" in result.stderr
    assert not out.exists()


def test_an_interrupt_leaves_nothing_half_written(
    language_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "measure", interrupted)
    folder = tmp_path / "out"
    folder.mkdir()
    options = ("--data", text_file, "--budget", "5", *FORMATS, "--out", folder / "mix.toml")
    assert "interrupted" in run("search", language_folder, *options, code=130).stderr
    assert list(folder.iterdir()) == []
