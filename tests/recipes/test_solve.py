"""The blocked solvers against columns one by one, and what must hold of any of them."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.recipes.grid import Grid
from microscale.recipes.solve import METHODS, Method, Settle, Solver, solve
from microscale.recipes.statistics import Statistics
from microscale.spelling import get_block_format

FORMATS = (
    "mxfp4",
    "mxfp6_e2m3",
    "mxint8",
    "nvfp4",
    "nvfp4-four_over_six",
    "int8-channel",
    "int4-tensor",
    "fp8_e4m3-token",
    "e3m0-8",
)
CALIBRATED: tuple[Method, ...] = ("error_diffusion", "gptq", "qronos")


def problem(
    columns: int = 80, outputs: int = 24, samples: int = 400, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Statistics]:
    """Correlated inputs, a perturbed copy of them, a weight, and the statistics."""
    mixing = torch.randn(columns, columns) / columns**0.5 + 0.5 * torch.eye(columns)
    wide = torch.randn(groups, samples, columns) @ mixing
    quantized = wide + 0.05 * torch.randn_like(wide)
    statistics = Statistics.empty(groups, columns)
    statistics.add(quantized, wide)
    return torch.randn(groups, columns, outputs), quantized, wide, statistics


def error(statistics: Statistics, W: Tensor, values: Tensor) -> float:
    return statistics.lost(W, values) / statistics.energy(W)


def segments(spelling: str, columns: int) -> list[int]:
    block = get_block_format(spelling).block
    if not isinstance(block, int):
        return [columns]
    return [min(block, columns - start) for start in range(0, columns, block)]


def quantizers(W: Tensor, spelling: str) -> list[Callable[[Tensor], Tensor]]:
    """The rounding of each column of W [K, N], with scales from the original weights."""
    grid = Grid.of(W, Operand(get_block_format(spelling)))
    found: list[Callable[[Tensor], Tensor]] = []
    start = 0
    for size in segments(spelling, len(W)):
        scale = grid.settle(W[None, start : start + size])

        def rounded(z: Tensor, scale: Tensor = scale) -> Tensor:
            return grid.decode(grid.round(z[None, None], scale), scale)[0, 0].double()

        found += [rounded] * size
        start += size
    return found


def diffused(W: Tensor, quantized: Tensor, wide: Tensor, spelling: str) -> Tensor:
    """GPFQ as it is written down: the residual u of every output, carried along (section 2)."""
    rounds = quantizers(W, spelling)
    residual = torch.zeros(len(wide), W.shape[1], dtype=torch.float64)
    values = torch.zeros_like(W, dtype=torch.float64)
    X, Y, w = wide.double(), quantized.double(), W.double()
    for t in range(len(W)):
        residual += X[:, t : t + 1] * w[t]
        values[t] = rounds[t](Y[:, t] @ residual / Y[:, t].square().sum())
        residual -= Y[:, t : t + 1] * values[t]
    return values


def compensated(
    W: Tensor, statistics: Statistics, spelling: str, damping: float, *, mismatch: bool
) -> Tensor:
    """OPTQ and Qronos by definition: after each column, least squares for all that follow."""
    rounds = quantizers(W, spelling)
    added = damping * statistics.H[0].diagonal().mean() * torch.eye(len(W), dtype=torch.float64)
    H, G = statistics.H[0] + added, statistics.G[0] + added
    w = W.double()
    aim = G @ w if mismatch else H @ w
    values = torch.zeros_like(w)
    current = w.clone()
    for t in range(len(W)):
        if t == 0 and mismatch:
            current[0] = (aim[0] - H[0, 1:] @ w[1:]) / H[0, 0]
        values[t] = rounds[t](current[t])
        if t + 1 < len(W):
            left = aim[t + 1 :] - H[t + 1 :, : t + 1] @ values[: t + 1]
            current[t + 1 :] = torch.linalg.solve(H[t + 1 :, t + 1 :], left)
    return values


@pytest.mark.parametrize("spelling", FORMATS)
def test_diffusion_is_that_of_the_paper(spelling: str) -> None:
    W, quantized, wide, statistics = problem()
    grid = Grid.of(W, Operand(get_block_format(spelling)))
    solver = Solver("error_diffusion", settle="original", sweeps=0, correction=1.0)
    found = solve(W, statistics, grid, segments(spelling, 80), solver)
    expected = diffused(W[0], quantized[0], wide[0], spelling)
    # The statistics' float32 may move a value across the middle between two codes.
    assert (found.values[0].double() != expected).double().mean() < 2e-3


@pytest.mark.parametrize("method", CALIBRATED)
def test_half_a_correction_aims_half_way(method: Method) -> None:
    W, _, _, found = problem()
    grid, runs = Grid.of(W, Operand(get_block_format("mxfp4"))), segments("mxfp4", 80)
    aims = {0.0: found.H, 0.5: (found.H + found.G) / 2, 1.0: found.G}
    for correction, G in aims.items():
        ours = solve(W, found, grid, runs, Solver(method, sweeps=1, correction=correction))
        aimed = Statistics(found.H, G, found.F, found.rows)
        same = solve(W, aimed, grid, runs, Solver(method, sweeps=1, correction=1.0))
        assert torch.equal(ours.values, same.values)


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_compensation_is_least_squares_for_what_follows(method: Method, spelling: str) -> None:
    W, _, _, statistics = problem()
    grid = Grid.of(W, Operand(get_block_format(spelling)))
    solver = Solver(method, settle="original", damping=0.01)
    found = solve(W, statistics, grid, segments(spelling, 80), solver)
    expected = compensated(W[0], statistics, spelling, 0.01, mismatch=method == "qronos")
    assert torch.equal(found.values[0].double(), expected)


@pytest.mark.parametrize("spelling", FORMATS)
def test_nearest_is_the_cast(spelling: str) -> None:
    W, _, _, statistics = problem()
    grid = Grid.of(W, Operand(get_block_format(spelling)))
    found = solve(W, statistics, grid, segments(spelling, 80), Solver("rtn"))
    assert torch.equal(found.values[0], cast(W[0].T, spelling, 1).T)


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("settle", ["entered", "original"])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("method", CALIBRATED)
def test_the_error_falls(method: Method, order: bool, settle: Settle, spelling: str) -> None:
    W, _, _, statistics = problem(outputs=64)
    grid = Grid.of(W, Operand(get_block_format(spelling)))
    runs = segments(spelling, 80)
    nearest = solve(W, statistics, grid, runs, Solver("rtn"))
    found = solve(W, statistics, grid, runs, Solver(method, settle, order))
    assert error(statistics, W, found.values) < error(statistics, W, nearest.values)


def test_the_error_is_that_of_the_outputs() -> None:
    W, quantized, wide, statistics = problem(groups=2)
    values = W + 0.1 * torch.randn_like(W)
    ours = (wide.double() @ W.double() - quantized.double() @ values.double()).square().sum()
    expected = ours / (wide.double() @ W.double()).square().sum()
    assert error(statistics, W, values) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [False, True])
def test_groups_are_solved_apart(method: Method, order: bool) -> None:
    W, quantized, wide, statistics = problem(columns=24, groups=3)
    if order:
        # One order serves all groups, so make it the same for each.
        scale = torch.linspace(2, 1, 24)
        statistics = Statistics.empty(3, 24)
        statistics.add(quantized * scale, wide * scale)
    grid = Grid.of(W, Operand(get_block_format("mxfp4")))
    solver = Solver(method, order=order)
    together = solve(W, statistics, grid, [8, 8, 8], solver).values
    for i in range(3):
        part = slice(i, i + 1)
        alone = Statistics(statistics.H[part], statistics.G[part], statistics.F[part])
        one = solve(W[part], alone, grid, [8, 8, 8], solver).values
        if not order:
            assert torch.equal(together[part], one)
        else:
            assert error(alone, W[part], together[part]) < 1.5 * error(alone, W[part], one)


@pytest.mark.parametrize("method", CALIBRATED)
def test_values_lie_on_the_grid_with_their_scales(method: Method) -> None:
    W, _, _, statistics = problem(columns=72)
    grid = Grid.of(W, Operand(get_block_format("mxfp4")))
    found = solve(W, statistics, grid, [32, 32, 8], Solver(method, order=True))
    codes = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.isin(found.elements.abs(), codes).all()
    assert torch.equal(found.values, found.elements * found.scales)
    for start, stop in ((0, 32), (32, 64), (64, 72)):
        assert (found.scales[:, start:stop] == found.scales[:, start : start + 1]).all()


@pytest.mark.parametrize("method", CALIBRATED)
def test_inputs_that_were_never_there_are_rounded_to_nearest(method: Method) -> None:
    W, quantized, wide, _ = problem(columns=64)
    quantized[..., 5], quantized[..., 40:] = 0, 0
    statistics = Statistics.empty(1, 64)
    statistics.add(quantized, wide)
    grid = Grid.of(W, Operand(get_block_format("mxfp4")))
    found = solve(W, statistics, grid, [32, 32], Solver(method, settle="original"))
    nearest = solve(W, statistics, grid, [32, 32], Solver("rtn"))
    assert found.dead == 25
    assert torch.equal(found.values[:, 5], nearest.values[:, 5])
    assert torch.equal(found.values[:, 40:], nearest.values[:, 40:])
    assert not torch.equal(found.values[:, :40], nearest.values[:, :40])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_is_nearest(method: Method) -> None:
    W = torch.randn(1, 40, 8)
    statistics = Statistics.empty(1, 40)
    grid = Grid.of(W, Operand(get_block_format("nvfp4")), "mse")
    found = solve(W, statistics, grid, [16, 16, 8], Solver(method))
    nearest = solve(W, statistics, grid, [16, 16, 8], Solver("rtn"))
    assert torch.equal(found.values, nearest.values)


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("damping", [0.0, None])
def test_a_singular_matrix_is_damped_until_it_has_a_factor(
    method: Method, damping: float | None
) -> None:
    W, quantized, wide, _ = problem(columns=64, samples=10)
    statistics = Statistics.empty(1, 64)
    statistics.add(quantized, wide)
    grid = Grid.of(W, Operand(get_block_format("mxfp4")))
    found = solve(W, statistics, grid, [32, 32], Solver(method, damping=damping))
    assert found.values.isfinite().all()
    if damping == 0 and method != "error_diffusion":
        assert found.damping > 0


@pytest.mark.parametrize("spelling", ["mxfp4", "nvfp4", "int4-channel", "int4-tensor"])
@pytest.mark.parametrize("method", METHODS)
def test_searched_scales_err_less(method: Method, spelling: str) -> None:
    W, _, _, statistics = problem(outputs=128)
    operand, runs = Operand(get_block_format(spelling)), segments(spelling, 80)
    plain = solve(W, statistics, Grid.of(W, operand), runs, Solver(method))
    found = solve(W, statistics, Grid.of(W, operand, "mse"), runs, Solver(method))
    assert error(statistics, W, found.values) < error(statistics, W, plain.values)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    _, quantized, wide, whole = problem(columns=32)
    parts = Statistics.empty(1, 32)
    for start in range(0, 400, 100):
        rows = slice(start, start + 100)
        parts.add(quantized[:, rows], wide[:, rows])
    assert parts.rows == whole.rows == 400
    for a, b in ((parts.H, whole.H), (parts.G, whole.G), (parts.F, whole.F)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-3)


def test_tiles_make_the_same_square(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quantized, wide, plain = problem(columns=50)
    monkeypatch.setattr("microscale.recipes.statistics._TILE", 16)
    tiled = Statistics.empty(1, 50)
    tiled.add(quantized, wide)
    assert torch.allclose(tiled.H, plain.H, rtol=1e-5, atol=1e-3)
    assert torch.equal(tiled.H, tiled.H.mT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(1, 4, 8)
    y = x.clone()
    y[0, 1, 2] = bad
    statistics = Statistics.empty(1, 8)
    with pytest.raises(MicroscaleError, match=r"1 of 32 values .* the float network"):
        statistics.add(x, y)
    with pytest.raises(MicroscaleError, match=r"1 of 32 values .* the quantized network"):
        statistics.add(y, x)


def test_options_that_are_not_known_are_refused() -> None:
    with pytest.raises(MicroscaleError, match=r"'gptp'.*gptq"):
        Solver("gptp")  # type: ignore[arg-type]
    with pytest.raises(MicroscaleError, match="'later'"):
        Solver("gptq", "later")  # type: ignore[arg-type]
    with pytest.raises(MicroscaleError, match="correction 1"):
        Solver("gptq", correction=1.5)
    with pytest.raises(MicroscaleError, match="sweeps -1"):
        Solver("gptq", sweeps=-1)
    with pytest.raises(MicroscaleError, match="damping -1"):
        Solver("gptq", damping=-1)


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("method", CALIBRATED)
def test_sweeps_never_raise_the_error(method: Method, spelling: str) -> None:
    W, _, _, statistics = problem()
    grid, runs = Grid.of(W, Operand(get_block_format(spelling))), segments(spelling, 80)
    errors = [
        error(
            statistics,
            W,
            solve(W, statistics, grid, runs, Solver(method, sweeps=n, correction=1)).values,
        )
        for n in range(4)
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] < errors[0]


def test_a_sweep_leaves_each_column_best_where_nothing_changes_any_more() -> None:
    W, _, _, statistics = problem(columns=16, outputs=4)
    grid = Grid.of(W, Operand(get_block_format("mxfp4")))
    found = solve(W, statistics, grid, [16], Solver("gptq", sweeps=100))
    least = statistics.lost(W, found.values)
    for t in range(16):
        for code in (-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6):
            for n in range(4):
                other = found.elements.clone()
                other[0, t, n] = code
                assert statistics.lost(W, other * found.scales) >= least * (1 - 1e-9)
