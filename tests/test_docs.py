"""The documentation says what the program does: its Python runs, its commands and files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from microscale.cli import app
from microscale.report.formats_page import page

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def text(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks() -> list[tuple[str, str]]:
    """Every block of Python of every page, with the page's name."""
    found = []
    for name in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE)
        found += [(name, block) for block in blocks]
    return found


def test_formats_page_is_in_step() -> None:
    assert text("docs/formats.md") == page(), "run python runs/formats_page.py"


@pytest.mark.parametrize(("name", "block"), python_blocks())
def test_python_runs(name: str, block: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", block]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, f"{name}: {done.stderr}"


def test_readme_has_python() -> None:
    assert [name for name, _ in python_blocks()].count("README.md") == 1


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_exist(name: str) -> None:
    for line in re.findall(r"(?:`|^ {4})microscale ([a-z][^`#\n]*)", text(name), re.MULTILINE):
        command, *rest = shlex.split(line)
        help_text = CliRunner().invoke(app, [command, "--help"])
        assert help_text.exit_code == 0, f"{name}: no command {command!r}"
        for option in (word for word in rest if word.startswith("--")):
            assert option in help_text.output, f"{name}: {command} has no option {option}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text(name)):
        assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("target", ["demo", "test", "test-full", "lint", "clean"])
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", text("Makefile"), re.MULTILINE)
