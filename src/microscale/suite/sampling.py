"""Which units are used when not all are."""

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def sample(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` of the items, drawn without replacement by `seed`, in their order; all if None."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))  # noqa: S311 (no secret)
    return [items[index] for index in chosen]
