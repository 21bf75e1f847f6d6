"""One of several options for each item, at the least loss that a limit of costs allows.

The multiple-choice knapsack problem: minimise sum_i loss[i][c_i] under sum_i cost[i][c_i] <= limit.
`exact` is integer programming (HiGHS through scipy's `milp`); `greedy` starts with the cheapest
options and takes, as long as one fits, the change that lowers the loss most for its cost. Costs are
integers, and the limit is kept in exact arithmetic whatever the solver's tolerances.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from microscale.errors import MicroscaleError, near_names
from microscale.suite.extras import require

Way = Literal["exact", "greedy"]
WAYS = get_args(Way)

_SCALE = 1e4
"""Largest loss that the solver is given: its absolute gap of 1e-6 must be nothing beside it."""


@dataclass(frozen=True, slots=True)
class Knapsack:
    """Items with options: `costs` and `losses` [items][options], no option dearer than it needs be.

    Options of one item at which another costs no more and loses no more are never chosen.
    """

    costs: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]

    @property
    def smallest(self) -> int:
        """What the cheapest options cost together."""
        return sum(map(min, self.costs))

    @property
    def largest(self) -> int:
        """What the dearest options cost together."""
        return sum(map(max, self.costs))

    def cost(self, choice: tuple[int, ...]) -> int:
        """What a choice costs."""
        return sum(costs[c] for costs, c in zip(self.costs, choice, strict=True))

    def loss(self, choice: tuple[int, ...]) -> float:
        """The summed loss of a choice."""
        return math.fsum(losses[c] for losses, c in zip(self.losses, choice, strict=True))

    def sensible(self) -> list[list[int]]:
        """Of each item the options worth choosing, dearer and better ones later."""
        found = []
        for costs, losses in zip(self.costs, self.losses, strict=True):
            kept: list[int] = []
            for option in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o], o)):
                if not kept or losses[option] < losses[kept[-1]]:
                    kept.append(option)
            found.append(kept)
        return found


def solve(problem: Knapsack, limit: int, way: Way = "exact") -> tuple[int, ...]:
    """The option of each item. Raises MicroscaleError for a limit below the smallest cost."""
    if limit < problem.smallest:
        raise MicroscaleError(
            f"limit {limit} is below {problem.smallest}, what the cheapest options cost together."
        )
    return _WAYS[check_way(way)](problem, limit)


def check_way(way: str) -> Way:
    """Return the name of a solver; MicroscaleError for one that is not known."""
    if way in WAYS:
        return cast("Way", way)
    raise MicroscaleError(f"solver {way!r} is not known.{near_names(way, WAYS)}")


def greedy(problem: Knapsack, limit: int) -> tuple[int, ...]:
    """The choice reached step by step, each the best for its cost."""
    options = problem.sensible()
    choice = [kept[0] for kept in options]
    left = limit - problem.cost(tuple(choice))
    while steps := list(_steps(problem, options, choice, left)):
        _, item, option, cost = max(steps)
        choice[item] = option
        left -= cost
    return tuple(choice)


def _steps(
    problem: Knapsack, options: list[list[int]], choice: list[int], left: int
) -> Iterator[tuple[float, int, int, int]]:
    """The changes that fit: loss saved for the cost, item, option, cost."""
    for item, kept in enumerate(options):
        costs, losses, now = problem.costs[item], problem.losses[item], choice[item]
        for option in kept[kept.index(now) + 1 :]:
            cost = costs[option] - costs[now]
            if cost <= left:
                yield (losses[now] - losses[option]) / cost, item, option, cost


def exact(problem: Knapsack, limit: int) -> tuple[int, ...]:
    """The best choice of all; where the solver oversteps the limit, of all a millionth below it."""
    options = problem.sensible()
    least = problem.smallest
    unit = math.gcd(*(c - min(costs) for costs in problem.costs for c in costs)) or 1
    room = (limit - least) // unit
    while True:
        choice = _integer_program(problem, options, unit, room)
        over = -((limit - problem.cost(choice)) // unit)
        if over <= 0:
            return choice
        # The solver's tolerance of a millionth let this through, so as much is taken away.
        room -= max(over, room // 10**6)


def _integer_program(
    problem: Knapsack, options: list[list[int]], unit: int, room: int
) -> tuple[int, ...]:
    """Binary variables, one for each option: one of each item, together within `room` units."""
    optimize = require("scipy.optimize", "the exact search")
    sparse = require("scipy.sparse", "the exact search")
    pairs = [(item, option) for item, kept in enumerate(options) for option in kept]
    losses = np.array([problem.losses[i][o] for i, o in pairs])
    costs = np.array([(problem.costs[i][o] - min(problem.costs[i])) // unit for i, o in pairs])
    largest = losses.max()
    rows = [item for item, _ in pairs]
    one = sparse.csr_array((np.ones(len(pairs)), (rows, range(len(pairs)))))
    with _silence():
        found = optimize.milp(
            losses * (_SCALE / largest) if largest > 0 else losses,
            integrality=np.ones(len(pairs)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one, 1, 1),
                # In units of the room, so that the solver's absolute tolerance is a relative one.
                optimize.LinearConstraint(costs[None] / max(room, 1), -np.inf, float(room > 0)),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise MicroscaleError(
            f"the exact search over {len(options)} parts found nothing ({found.message}); use the "
            "solver 'greedy'."
        )
    best: dict[int, tuple[float, int]] = {}
    for (item, option), x in zip(pairs, found.x, strict=True):
        best[item] = max(best.get(item, (-1.0, 0)), (float(x), option))
    return tuple(best[item][1] for item in range(len(options)))


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output, not from C++ either.

    HiGHS prints a line there whenever it mends a solution, whatever its options say, and standard
    output may be a command's JSON.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # else what is buffered comes out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


_WAYS: dict[Way, Callable[[Knapsack, int], tuple[int, ...]]] = {"exact": exact, "greedy": greedy}
