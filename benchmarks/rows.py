"""Groups of functions that are timed in turns, and the rows that come of them."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from interleaved import Timing, measure


@dataclass(frozen=True, slots=True)
class Goal:
    """What an entry is held against.

    `share`: its rate over that of the yardstick, at least `goal`. `time`: its time for one value
    over that of the yardstick, at most `goal`. The yardstick is the fastest entry of the group
    that is called so, or so and then a comma or a bracket. `seconds`: its time over `goal`, at most
    1; the yardstick is a name for that time.
    """

    yardstick: str
    kind: Literal["share", "time", "seconds"] = "time"
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A function, the values that one call works on, and what it moves or computes for each."""

    run: Callable[[], object]
    values: float = 1
    moved: float = 0
    unit: str = "B"
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """What is timed in turns, with so many threads (0: as many as there are)."""

    title: str
    entries: Mapping[str, Entry]
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside one yardstick; `ratio` is None where there is none."""

    section: str
    group: str
    name: str
    values: float
    timing: Timing
    rate: float
    unit: str
    kind: str = ""
    yardstick: str = ""
    ratio: float | None = None
    goal: float | None = None
    disturbed: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where none is set or nothing was undisturbed."""
        if self.ratio is None or self.goal is None or self.disturbed:
            return None
        return self.ratio >= self.goal if self.kind == "share" else self.ratio <= self.goal

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self) | {"reached": self.reached}


def rows(section: str, group: Group, repeats: int) -> Iterator[Row]:
    """Time a group: a row for each goal of each entry, or one without."""
    before = torch.get_num_threads()
    torch.set_num_threads(group.threads or before)
    try:
        times = measure({name: e.run for name, e in group.entries.items()}, repeats)
    finally:
        torch.set_num_threads(before)
    for name, entry in group.entries.items():
        median = times[name].median
        rate = entry.values * entry.moved / median
        row = Row(section, group.title, name, entry.values, times[name], rate, entry.unit)
        compared = [
            replace(
                row, kind=goal.kind, yardstick=beside, ratio=ratio, goal=aim, disturbed=not kept
            )
            for goal in entry.goals
            for beside, ratio, aim in _beside(goal, name, group, times)
            for kept in [times[name].kept and times.get(beside, times[name]).kept]
        ]
        yield from compared or [row]


def _beside(
    goal: Goal, name: str, group: Group, times: Mapping[str, Timing]
) -> Iterator[tuple[str, float, float | None]]:
    """The yardstick, the ratio and the goal for it; none where the group has no such yardstick."""
    entry, time = group.entries[name], times[name].median
    if goal.kind == "seconds":
        assert goal.goal is not None
        yield goal.yardstick, time / goal.goal, 1.0
    elif beside := _fastest(goal, group, times):
        ratio = _ratio(goal, entry, time, group.entries[beside], times[beside].median)
        yield beside, ratio, goal.goal


def _fastest(goal: Goal, group: Group, times: Mapping[str, Timing]) -> str | None:
    ends = (f"{goal.yardstick},", f"{goal.yardstick} (")
    names = [name for name in group.entries if name == goal.yardstick or name.startswith(ends)]
    return min(names, key=lambda n: times[n].median / group.entries[n].values, default=None)


def _ratio(goal: Goal, entry: Entry, time: float, beside: Entry, its_time: float) -> float:
    if goal.kind == "time":
        return (time / entry.values) / (its_time / beside.values)
    return (entry.values * entry.moved / time) / (beside.values * beside.moved / its_time)


def exponent(sizes: list[float], times: list[float]) -> float:
    """The slope of log(time) over log(size), by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
