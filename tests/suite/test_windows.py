"""Windows cover the text exactly once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import MicroscaleError
from microscale.suite.sampling import sample
from microscale.suite.windows import Window, batches, documents, read_text, windows


@given(st.integers(0, 200), st.integers(1, 50))
def test_every_token_but_the_first_is_predicted_once(count: int, length: int) -> None:
    tokens = list(range(count))
    cut = list(windows(tokens, length))
    assert [token for window in cut for token in window.targets] == tokens[1:]
    assert [token for window in cut for token in window.inputs] == tokens[:-1]
    assert all(len(window) == length for window in cut[:-1])
    assert all(0 < len(window) <= length for window in cut)
    assert all(len(window.inputs) == len(window.targets) for window in cut)


@given(st.lists(st.integers(2, 9), max_size=30), st.integers(1, 4))
def test_batches_hold_every_window_once_and_one_length(lengths: list[int], size: int) -> None:
    every = [Window((number,) * n, (number,) * n) for number, n in enumerate(lengths)]
    grouped = list(batches(every, size))
    assert sorted(w.inputs for group in grouped for w in group) == sorted(w.inputs for w in every)
    assert all(len({len(window) for window in group}) == 1 for group in grouped)
    assert all(1 <= len(group) <= size for group in grouped)


def test_documents_are_parted_by_separator_lines() -> None:
    text = (
        "one\n\nmore\n<|endoftext|>\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree <|endoftext|> x\n"
    )
    assert documents(text) == ["one\n\nmore", "two", "three <|endoftext|> x"]


def test_a_plain_text_is_one_document_as_it_is() -> None:
    assert documents("  a\nb\n") == ["  a\nb\n"]


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(MicroscaleError, match=rf"text\.txt' is empty \({len(content)} bytes"):
        read_text(path)


def test_a_text_that_is_not_utf8_is_refused_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("grün".encode() + b" \xff and more")
    with pytest.raises(MicroscaleError, match=r"byte 0xff at offset 6 .*convert it to UTF-8"):
        read_text(path)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match=r"none\.txt' does not exist"):
        read_text(tmp_path / "none.txt")


def test_sample_is_seeded_and_keeps_the_order() -> None:
    items = list(range(100))
    chosen = sample(items, 20, seed=3)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 20
    assert chosen == sample(items, 20, seed=3) != sample(items, 20, seed=4)
    assert sample(items, None, 0) == sample(items, 100, 0) == sample(items, 500, 0) == items
