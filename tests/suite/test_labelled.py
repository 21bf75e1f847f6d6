"""Files of sentences and pairs: what is read, how it is split, what is refused."""

import json
from pathlib import Path

import pytest

from microscale.errors import MicroscaleError
from microscale.suite.labelled import (
    Example,
    Examples,
    Pair,
    Pairs,
    Sentence,
    Sentences,
    read_table,
)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_sentences_as_json(tmp_path: Path) -> None:
    rows = [{"text": "a b", "label": 1, "name": "x"}, {"text": "c", "label": "0"}]
    found = read_table(write(tmp_path / "s.jsonl", *rows))
    assert found == Examples((Example("a b", "1"), Example("c", "0")))


def test_sentences_parted_by_tabs(tmp_path: Path) -> None:
    path = tmp_path / "s.tsv"
    path.write_text('label\ttext\tsplit\npos\tsaid "so\ttrain\nneg\tno\ttest\n', encoding="utf-8")
    rows = (Example('said "so', "pos", "train"), Example("no", "neg", "test"))
    assert read_table(path) == Examples(rows)


def test_pairs(tmp_path: Path) -> None:
    rows = (("a", "b", 1.5), ("c", "d", 0.0), ("e", "f", 5.0))
    tabs = tmp_path / "p.tsv"
    lines = ["first\tsecond\tscore", *("\t".join(map(str, row)) for row in rows)]
    tabs.write_text("\n".join(lines), encoding="utf-8")
    objects = [dict(zip(("first", "second", "score"), row, strict=True)) for row in rows]
    expected = Pairs(tuple(Pair(*row) for row in rows))
    assert read_table(tabs) == expected
    assert read_table(write(tmp_path / "p.jsonl", *objects)) == expected


def test_splits_of_the_file_are_kept() -> None:
    examples = [
        Example(f"{label}{i}", label, "train" if i < 2 else "test")
        for i in range(3)
        for label in "ba"
    ]
    found = Sentences.of(examples, 0)
    assert found.labels == ("a", "b")
    assert found.train == tuple(Sentence(t, "ab".index(t[0])) for t in ("b0", "a0", "b1", "a1"))
    assert found.test == (Sentence("b2", 1), Sentence("a2", 0))


def test_without_splits_half_of_each_class_trains() -> None:
    examples = [Example(f"a{i}", "a") for i in range(7)] + [Example(f"b{i}", "b") for i in range(4)]
    found = Sentences.of(examples, 3)
    counts = [
        [s.label for s in part].count(n) for part in (found.train, found.test) for n in (0, 1)
    ]
    assert counts == [4, 2, 3, 2]
    assert {s.text for s in found.train + found.test} == {e.text for e in examples}
    assert found == Sentences.of(examples, 3)
    assert found != Sentences.of(examples, 4)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], r"line 1 has no field 'label' \(it has text\); sentences have text and"),
        ([{"first": "a", "second": "b"}], "line 1 has no field 'text'"),
        ([{"text": "", "label": "x"}], "line 1 has the text ''"),
        ([{"text": "a", "label": True}], "line 1 has the label True"),
        ([{"text": "a", "label": "x", "split": "dev"}], "the split 'dev'; write train or test"),
        (
            [{"text": "a", "label": "x", "split": "test"}, {"text": "a", "label": "x"}],
            "line 2 has no 'split', but others",
        ),
        (["a"], "line 1 is a str, not an object"),
        ([{"first": "a", "second": "b", "score": "high"}], "line 1 has the score 'high'"),
        ([{"first": "a", "second": "b", "score": 1e999}], "line 1 has the score inf"),
        ([{"first": "a", "second": "b", "score": 1}] * 3, "3 pairs with 1 different scores"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, rows: list[object], words: str) -> None:
    with pytest.raises(MicroscaleError, match=words):
        read_table(write(tmp_path / "s.jsonl", *rows))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("s.jsonl", '{"text": "a"', "line 1 is not JSON"),
        ("s.tsv", "text\tlabel\na\n", "line 2 has 1 fields, the first line 2"),
        ("s.tsv", "a\tb\nc\td\n", r"line 2 has no field 'text' \(it has a, b\)"),
        ("s.tsv", "text\tlabel\n", "no rows below its line of names"),
        ("s.tsv", " \n", "is empty"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(MicroscaleError, match=words):
        read_table(path)


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([Example("a", "x")] * 4, "all sentences are of the class 'x'"),
        ([Example("a", "x"), Example("b", "y"), Example("c", "y")], "class 'x' has 1 train"),
        ([Example("a", c, "train") for c in "xxyy"], "the split 'test' is empty"),
    ],
)
def test_splits_that_are_refused(examples: list[Example], words: str) -> None:
    with pytest.raises(MicroscaleError, match=words):
        Sentences.of(examples, 0)
