"""Words spelled in other symbols: edit distance, and groups of words that need no padding."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.suite.predictions import Marks
from microscale.suite.windows import read_text

BATCH = 128
UNKNOWN = -1
"""A symbol that no vocabulary has, so that it is never spelled right."""


@dataclass(frozen=True, slots=True)
class Word:
    """Symbol ids of a word and of what it is to become; several `targets` are all right.

    The first target is what losses are of, and its length the weight of the word.
    """

    source: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of a word, a tab and what it is to become."""
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        source, tab, target = line.strip().partition("\t")
        if not (source and tab and target):
            raise MicroscaleError(
                f"{str(path)!r}, line {number}: {line!r} is not a word, a tab and its spelling."
            )
        pairs.append((source, target))
    return pairs


def by_length(words: Sequence[Word], size: int, *, of_target: bool = False) -> Iterator[list[Word]]:
    """Groups of at most `size` words whose sources (or first targets) have the same length."""
    groups: defaultdict[int, list[Word]] = defaultdict(list)
    for word in words:
        groups[len(word.targets[0] if of_target else word.source)].append(word)
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), size):
            yield group[start : start + size]


def sources(words: Sequence[Word], device: torch.device) -> Tensor:
    """The ids [words, letters] of words of the same length."""
    return torch.tensor([word.source for word in words], device=device)


def until(ids: Sequence[int], end: int) -> tuple[int, ...]:
    """The symbols before the first `end`, all if there is none."""
    return tuple(ids[: ids.index(end)]) if end in ids else tuple(ids)


def marks(
    words: Sequence[Word], guesses: Sequence[Sequence[int]], loss: Tensor | None = None
) -> Marks:
    """The error rates of guesses: edits to the nearest target over the length of the first."""
    lengths = torch.tensor([len(word.targets[0]) for word in words], dtype=torch.float64)
    edits = [
        min(edit_distance(guess, target) for target in word.targets)
        for word, guess in zip(words, guesses, strict=True)
    ]
    return Marks(torch.tensor(edits, dtype=torch.float64) / lengths, lengths, loss)


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """The fewest insertions, deletions and replacements between two sequences (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
            diagonal, row[j] = row[j], best
    return row[-1]
