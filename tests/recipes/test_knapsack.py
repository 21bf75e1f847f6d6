"""Options of least loss within a limit: greedy and exact against every choice there is."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microscale.errors import MicroscaleError
from microscale.recipes.knapsack import WAYS, Knapsack, Way, check_way, exact, greedy, solve

problems = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
).map(
    lambda items: Knapsack(
        tuple(tuple(cost for cost, _ in options) for options in items),
        tuple(tuple(loss / 7.0 for _, loss in options) for options in items),
    )
)


def best_of_all(problem: Knapsack, limit: int) -> float:
    """The least loss within the limit, by trying every choice."""
    every = product(*(range(len(costs)) for costs in problem.costs))
    return min(problem.loss(choice) for choice in every if problem.cost(choice) <= limit)


@settings(deadline=None, max_examples=60)
@given(problems, st.integers(0, 100))
def test_exact_is_the_best_of_all_and_greedy_keeps_the_limit(problem: Knapsack, more: int) -> None:
    limit = problem.smallest + more
    best = best_of_all(problem, limit)
    found, quick = exact(problem, limit), greedy(problem, limit)
    assert problem.cost(found) <= limit
    assert problem.cost(quick) <= limit
    assert problem.loss(found) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert problem.loss(quick) >= best - 1e-9


def test_greedy_may_be_worse() -> None:
    # The step that saves most for its cost leaves no room for the one that saves most.
    problem = Knapsack(((0, 1, 10), (0, 10)), ((12.0, 10.0, 9.0), (10.0, 0.0)))
    assert problem.loss(greedy(problem, 10)) == 19.0
    assert problem.loss(exact(problem, 10)) == best_of_all(problem, 10) == 12.0


@pytest.mark.parametrize("way", WAYS)
def test_the_ends(way: Way) -> None:
    problem = Knapsack(((4, 8), (40, 80)), ((1.0, 0.9), (3.0, 0.1)))
    assert solve(problem, problem.smallest, way) == (0, 0)
    assert solve(problem, problem.largest, way) == (1, 1)
    assert solve(problem, 84, way) == (0, 1)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_paid_for_nothing(way: Way) -> None:
    problem = Knapsack(((8, 4, 6), (9, 3, 3)), ((0.0, 0.0, 0.0), (2.0, 1.0, 0.5)))
    assert solve(problem, 1000, way) == (1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_large_costs_keep_the_limit_to_the_bit(way: Way) -> None:
    costs = tuple((10**10 + 7 * i, 2 * 10**10 + 3 * i + 1) for i in range(20))
    problem = Knapsack(costs, tuple((1.0 + 1e-3 * i, 0.0) for i in range(20)))
    for limit in (problem.smallest + 5 * 10**10, problem.largest - 1, problem.largest):
        assert problem.cost(solve(problem, limit, way)) <= limit
    assert problem.cost(solve(problem, problem.largest, way)) == problem.largest


def test_bad_input() -> None:
    problem = Knapsack(((4, 8),), ((1.0, 0.5),))
    with pytest.raises(MicroscaleError, match="limit 3 is below 4"):
        solve(problem, 3)
    with pytest.raises(MicroscaleError, match=r"solver 'exakt' is not known. Did you mean exact"):
        check_way("exakt")


def test_the_solver_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    # Sizes and losses like a model's, for which HiGHS has something to say in most of these.
    draw = random.Random(0)
    for _ in range(8):
        sizes = [draw.choice([64 * 64, 64 * 172, 64 * 32, 512 * 64]) for _ in range(80)]
        problem = Knapsack(
            tuple(tuple(size * bits // 4 for bits in (13, 17, 18, 21, 25, 33)) for size in sizes),
            tuple(
                tuple(10 ** draw.gauss(-3, 1) * 2.0 ** -(bits / 2) for bits in range(6, 12))
                for _ in sizes
            ),
        )
        limit = problem.smallest + int((problem.largest - problem.smallest) * draw.random())
        assert problem.loss(exact(problem, limit)) <= problem.loss(greedy(problem, limit))
    assert capfd.readouterr().out == ""
