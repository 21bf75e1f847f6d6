"""Tokens a second of a decoder of 8 layers of 1024, packed in each format and in bfloat16."""

from collections.abc import Iterator
from functools import partial

from products import FORMATS, Decoder, packed
from rows import Entry, Goal, Group

TOKENS = 8


def section_decoder() -> Iterator[Group]:
    """Greedy generation with a cache, batch 1."""
    dense = Decoder().bfloat16().requires_grad_(requires_grad=False)
    entries = {"bfloat16": _entry(dense, None)}
    for fmt in FORMATS:
        entries[fmt] = _entry(packed(fmt), 2.5 if fmt == "mxfp4" else None)
    yield Group("decoder of 8 layers of 1024, vocabulary 32000", entries)


def _entry(model: Decoder, goal: float | None) -> Entry:
    goals = (Goal("bfloat16", "share", goal),)
    return Entry(partial(model.generate, TOKENS), TOKENS, 1, "token", goals)
