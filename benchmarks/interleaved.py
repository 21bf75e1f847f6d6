"""Timing several functions in one process, in turns, without the repetitions that were disturbed.

A repetition counts as disturbed where this process's threads waited for a core for more than 3 % of
its time, which Linux tells in /proc/self/task/*/schedstat. Elsewhere every repetition counts.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

WAITING = 0.03
ATTEMPTS = 5
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class Timing:
    """The median of what was measured in seconds, its spread, and how much was thrown away."""

    median: float
    low: float
    high: float
    kept: int
    disturbed: int

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


def waited() -> int:
    """Nanoseconds that the threads of this process have waited for a core so far."""
    if not _TASKS.exists():
        return 0
    found = 0
    for task in _TASKS.iterdir():
        try:
            found += int((task / "schedstat").read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return found


def _once(function: Callable[[], object], calls: int) -> tuple[float, bool]:
    before, start = waited(), time.perf_counter()
    for _ in range(calls):
        function()
    taken = time.perf_counter() - start
    return taken / calls, (waited() - before) > WAITING * taken * 1e9


def measure(
    functions: Mapping[str, Callable[[], object]], repeats: int, *, shortest: float = 2e-3
) -> dict[str, Timing]:
    """Time each function `repeats` times, all of them in every round, after a warm-up.

    A call shorter than `shortest` seconds is repeated within a repetition. Where every repetition
    of a function was disturbed in ATTEMPTS times as many rounds, all count: `kept` is then 0.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, round(shortest / max(_once(function, 1)[0], 1e-7)))
    kept: dict[str, list[float]] = {name: [] for name in functions}
    disturbed: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats * ATTEMPTS):
        missing = [name for name in functions if len(kept[name]) < repeats]
        if not missing:
            break
        for name in missing:
            taken, bad = _once(functions[name], calls[name])
            (disturbed if bad else kept)[name].append(taken)
    return {name: _timing(kept[name], disturbed[name]) for name in functions}


def _timing(kept: list[float], disturbed: list[float]) -> Timing:
    times = kept or disturbed
    return Timing(
        statistics.median(times), min(times), max(times), len(kept), len(disturbed)
    )  # fmt: skip
