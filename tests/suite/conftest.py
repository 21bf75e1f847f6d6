"""Fixtures of the suite's tests."""

from pathlib import Path

import pytest

from suite.tiny import TEXT, save_language_model


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny causal language model."""
    return save_language_model(tmp_path_factory.mktemp("tiny-gpt"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text that the tiny tokenizer knows all words of."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
