"""Files of labelled sentences, or of pairs of sentences with a score, for encoders.

A file ending in `.jsonl` holds one JSON object a line; one ending in `.tsv` fields parted by tabs,
the first line naming them. Sentences have the fields `text` and `label`, and may have `split`,
which is `train` or `test`; pairs have `first`, `second` and `score`. Other fields are left alone.
"""

import csv
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from microscale.errors import MicroscaleError
from microscale.suite.windows import read_text

SUFFIXES = (".jsonl", ".tsv")
SENTENCE = ("text", "label")
PAIR = ("first", "second", "score")
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """A text, the name of its class, and its split, if the file says it."""

    text: str
    label: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts and how alike they are, in any unit."""

    first: str
    second: str
    score: float


@dataclass(frozen=True, slots=True)
class Examples:
    """Labelled sentences as a file has them."""

    rows: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scored pairs as a file has them."""

    rows: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Sentences:
    """Labelled sentences in two splits; `labels` names the classes."""

    labels: tuple[str, ...]
    train: tuple[Sentence, ...]
    test: tuple[Sentence, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], seed: int) -> "Sentences":
        """Split as the examples say, else half of each class (rounded up), drawn by `seed`, trains.

        Raises MicroscaleError for fewer than two classes, a class with fewer than two sentences to
        train on, or nothing to test on.
        """
        labels = tuple(sorted({example.label for example in examples}))
        if all(example.split is None for example in examples):
            examples = tuple(_halved(examples, seed))
        splits: dict[str, list[Sentence]] = {name: [] for name in SPLITS}
        for example in examples:
            sentence = Sentence(example.text, labels.index(example.label))
            splits[example.split or ""].append(sentence)
        found = cls(labels, tuple(splits["train"]), tuple(splits["test"]))
        found.check()
        return found

    def check(self) -> None:
        """Refuse what no centroids can be made of, or nothing is left to try them on."""
        if len(self.labels) < 2:
            raise MicroscaleError(f"all sentences are of the class {self.labels[0]!r}; give two.")
        for number, label in enumerate(self.labels):
            count = sum(sentence.label == number for sentence in self.train)
            if count < 2:
                raise MicroscaleError(
                    f"class {label!r} has {count} train sentences; a centroid needs two, so that "
                    f"it can be tried on one that is left out."
                )
        if not self.test:
            raise MicroscaleError("the split 'test' is empty; nothing is left to measure on.")


def _halved(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    """Give each class its splits, the examples in their order."""
    draw = random.Random(seed)  # noqa: S311  (no secret)
    train: set[int] = set()
    for label in sorted({example.label for example in examples}):
        places = [i for i, example in enumerate(examples) if example.label == label]
        train |= set(draw.sample(places, -(-len(places) // 2)))
    for place, example in enumerate(examples):
        yield Example(example.text, example.label, SPLITS[place not in train])


def is_table(path: Path) -> bool:
    """Whether a file is one of sentences or pairs, by its name."""
    return path.suffix.lower() in SUFFIXES


def read_table(path: Path) -> Examples | Pairs:
    """Read a file of sentences or pairs.

    Raises MicroscaleError that names the line for whatever is not as the top of this file says.
    """
    text = read_text(path)
    rows = list(_json_rows(path, text) if path.suffix.lower() == ".jsonl" else _rows(path, text))
    if not rows:
        raise MicroscaleError(f"{str(path)!r} has no rows below its line of names.")
    if all(name in rows[0][1] for name in PAIR):
        return _pairs(path, rows)
    return _examples(path, rows)


Row = tuple[int, Mapping[str, object]]


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _wrong(path, number, f"is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _wrong(path, number, f"is a {type(row).__name__}, not an object")
        yield number, row


def _rows(path: Path, text: str) -> Iterator[Row]:
    lines = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    names = [name.strip() for name in lines[0]]
    for number, fields in enumerate(lines[1:], 2):
        if not fields:
            continue
        if len(fields) != len(names):
            raise _wrong(path, number, f"has {len(fields)} fields, the first line {len(names)}")
        yield number, dict(zip(names, fields, strict=True))


def _pairs(path: Path, rows: list[Row]) -> Pairs:
    pairs = tuple(
        Pair(_text(path, row, "first"), _text(path, row, "second"), _score(path, row))
        for row in rows
    )
    if len(pairs) < 3 or len({pair.score for pair in pairs}) < 2:
        raise MicroscaleError(
            f"{str(path)!r} has {len(pairs)} pairs with {len({pair.score for pair in pairs})} "
            f"different scores; a correlation needs three pairs and two scores."
        )
    return Pairs(pairs)


def _examples(path: Path, rows: list[Row]) -> Examples:
    examples = tuple(
        Example(_text(path, row, "text"), _text(path, row, "label"), _split(path, row))
        for row in rows
    )
    without = [number for (number, row) in rows if "split" not in row]
    if 0 < len(without) < len(rows):
        raise _wrong(path, without[0], "has no 'split', but others have one; give all or none")
    return Examples(examples)


def _text(path: Path, row: Row, name: str) -> str:
    number, fields = row
    if name not in fields:
        known = ", ".join(fields) or "none"
        raise _wrong(
            path,
            number,
            f"has no field {name!r} (it has {known}); sentences have {' and '.join(SENTENCE)}, "
            f"pairs {', '.join(PAIR)}",
        )
    value = fields[name]
    # Labels are often numbers; True and 1 would be two spellings of one class.
    if isinstance(value, int) and not isinstance(value, bool) and name == "label":
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(path, number, f"has the {name} {value!r}; some text is expected")
    return value


def _split(path: Path, row: Row) -> str | None:
    number, fields = row
    if "split" not in fields:
        return None
    if fields["split"] not in SPLITS:
        raise _wrong(path, number, f"has the split {fields['split']!r}; write train or test")
    return str(fields["split"])


def _score(path: Path, row: Row) -> float:
    number, fields = row
    value = fields.get("score")
    try:
        score = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise _wrong(path, number, f"has the score {value!r}; a number is expected")
    return score


def _wrong(path: Path, number: int, what: str) -> MicroscaleError:
    return MicroscaleError(f"{str(path)!r} line {number} {what}.")
