"""`make compare-all` on few models and units."""

import json
import os
import subprocess
import sys
from pathlib import Path

from microscale.suite.entry import DATA_VARIABLE

SCRIPT = Path(__file__).parents[2] / "runs/compare_all.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script without other people's models."""
    environment = {name: value for name, value in os.environ.items() if name != DATA_VARIABLE}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_results_are_written_as_a_page_and_as_json(tmp_path: Path) -> None:
    few = ("--only", "mnist-mlp", "digits-cnn", "--limit", "8", "--formats", "mxint8,mxfp4")
    done = run(*few, "--jobs", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| model | metric | units | unquantized | mxint8 | mxfp4 |" in page
    assert "| digits-cnn | accuracy, % | 8 pictures |" in page
    assert page.count("| digits-cnn |") == 3
    assert "Not compared: mnist-mlp." in page
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["absent"] == ["mnist-mlp"]
    assert content["commit"]
    (comparison,) = content["comparisons"]
    assert [row["format"] for row in comparison["rows"]] == ["float32", "mxint8", "mxfp4"]
    assert comparison["rows"][1]["coverage"].startswith("4 emulated of 4 products")


def test_bad_input_is_refused_before_any_work(tmp_path: Path) -> None:
    for arguments, words in (
        (("--out", tmp_path / "none"), "there is no folder"),
        (("--formats", "mxfp5"), "mxfp5"),
        (("--limit", "0"), "--limit 0 must be at least 1"),
        (("--only", "resnet"), "invalid choice: 'resnet'"),
    ):
        done = run("--out", tmp_path, *arguments)
        assert done.returncode != 0
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
