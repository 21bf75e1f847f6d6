"""Rounding a weight so that the layer's output errs least: one pass over its columns.

All methods round one column after another (a column of W^T: what one input feature contributes to
all outputs) and carry what was lost on into columns that are not rounded yet. Written for the
matrix W [K, N], columns of X being features, each is a substitution with a unit lower-triangular
matrix L:

    z_t = target_t - sum_{j<t} L_tj c_j,    q_t = Q(z_t)

    rtn              target = W                             L = 0
    error_diffusion  target = diag(H)^-1 tril(G) W          L = diag(H)^-1 tril(H)   c_j = q_j
    gptq             target = W                             L = (U / diag U)^T       c_j = z_j - q_j
    qronos           target = (H + d)^-1 (G + d) W          L = (U / diag U)^T       c_j = z_j - q_j

`error_diffusion` is GPFQ (arXiv 2201.11113): q_t is the best coefficient of X~_t for what is left
of sum_{j<=t} X_j w_j. `gptq` is OPTQ (arXiv 2210.17323), U the upper Cholesky factor of
(H + d)^-1: columns that follow are always the least-squares solution for X = X~. `qronos` (arXiv
2505.11695) first solves for the inputs that the layer really gets, and rounds the first column by
its own best coefficient.

The substitution is recursive: solve the first half, subtract its part L_21 c_1 from the second
half as one GEMM, solve that. So nearly all of the K^2 N multiplications are in large GEMMs; leaves
are single blocks. The cost does not depend on the number of samples.

`correction` c says how much of the difference between the networks a weight is to make up for: G is
c G + (1 - c) H wherever it stands above. At 1 the aim is what the float network gives; but the part
of X~ that is noise (the activations' own rounding) draws that least-squares solution towards zero,
and recurrent layers, which see it many times over, most of all. At 0 the layer is solved for X~
alone. Half is what this library recommends for its own method (docs/log.md).

`sweeps` go over the columns again afterwards: each is rounded anew to what is best for it beside
all others as they now are, q_t = Q((aim_t - sum_{j != t} H_tj q_j) / H_tt) with aim = G W, which
never raises the error (coordinate descent, as in QuantEase, arXiv 2309.01885). Scales stay.

Everything is in float64: the GEMMs take twice the time of float32, and a layer is solved once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from microscale.errors import MicroscaleError, near_names
from microscale.recipes.grid import Grid
from microscale.recipes.statistics import Statistics

Method = Literal["error_diffusion", "gptq", "qronos", "rtn"]
METHODS: tuple[str, ...] = get_args(Method)

Settle = Literal["entered", "original"]
"""When a block's scale is settled: when its turn comes, from its corrected weights, or from the
original ones."""

LEAF = 32
"""Columns that are rounded one by one between GEMMs, where a block has more."""

DAMPING = {"gptq": 0.01, "qronos": 0.01}
"""What is added to the diagonal of H before it is inverted, in units of its mean."""


SWEEPS = {"error_diffusion": 4}
"""How often columns are gone over again unless said otherwise: the other methods are as published,
error diffusion is what this library recommends (docs/log.md has what was measured)."""


CORRECTION = {"error_diffusion": 0.5}
"""How far a method's aim goes towards the float network unless said otherwise; else all the way."""


@dataclass(frozen=True, slots=True)
class Solver:
    """How weights are rounded.

    Attributes:
        method: one of METHODS.
        settle: when scales are settled.
        order: whether blocks, and the columns in each, go by falling diagonal of H.
        damping: of inverses, in units of the mean of H's diagonal; None: the method's own.
        sweeps: how often all columns are gone over again; None: the method's own.
        correction: how far the aim goes from what the weight gives for the inputs that the layer
            gets (0) to what it gives in the float network (1); None: the method's own.
    """

    method: Method = "error_diffusion"
    settle: Settle = "entered"
    order: bool = False
    damping: float | None = None
    sweeps: int | None = None
    correction: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is not known."""
        if self.method not in METHODS:
            raise MicroscaleError(
                f"method {self.method!r} is not known.{near_names(str(self.method), METHODS)}"
            )
        if self.settle not in get_args(Settle):
            raise MicroscaleError(
                f"settle {self.settle!r} is not known; write 'entered' or 'original'."
            )
        if self.damping is not None and not 0 <= self.damping < 1e6:
            raise MicroscaleError(f"damping {self.damping!r} is not a number from 0 on.")
        if self.sweeps is None:
            object.__setattr__(self, "sweeps", SWEEPS.get(self.method, 0))
        elif self.sweeps < 0:
            raise MicroscaleError(f"sweeps {self.sweeps!r} is not a number from 0 on.")
        if self.correction is None:
            object.__setattr__(self, "correction", CORRECTION.get(self.method, 1.0))
        elif not 0 <= self.correction <= 1:
            raise MicroscaleError(f"correction {self.correction!r} is not a number from 0 to 1.")


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A rounded weight.

    Attributes:
        elements: [groups, K, N], numbers on the element's grid.
        scales: [groups, K, N], the scale of each element (the same within a block).
        values: [groups, K, N], what they decode to.
        damping: that was needed, in units of the mean of H's diagonal.
        dead: how many of the groups x K inputs were zero in all samples; they are rounded to
            nearest.
    """

    elements: Tensor
    scales: Tensor
    values: Tensor
    damping: float = 0.0
    dead: int = 0


def solve(
    weight: Tensor, statistics: Statistics, grid: Grid, segments: list[int], solver: Solver
) -> Solution:
    """Round `weight` [groups, K, N].

    Args:
        weight: finite.
        statistics: of the layer's inputs.
        grid: of the whole parameter that this is (a part of).
        segments: sizes of the runs of columns that share a scale, in order; they sum to K.
        solver: the method and its options.
    """
    W = weight.double()
    statistics = _aimed(statistics, solver.correction)
    order = _order(statistics.H, segments) if solver.order else None
    if order is not None:
        columns, sizes = order
        W = W[:, columns]
        statistics = _reordered(statistics, columns)
    else:
        columns, sizes = None, segments
    problem = _PROBLEMS[solver.method](W, statistics, solver)
    pass_ = _Pass(problem, W, grid, solver.settle)
    leaves = list(_leaves(sizes))
    pass_.run(leaves)
    if solver.sweeps and solver.method != "rtn":
        _Sweep(pass_, statistics).run(leaves, solver.sweeps)
    elements, scales = pass_.elements, pass_.scales
    if columns is not None:
        back = columns.argsort()
        elements, scales = elements[:, back], scales[:, back]
    values = grid.decode(elements, scales)
    return Solution(elements, scales, values, problem.damping, int(problem.dead.sum()))


# ---------------------------------------------------------------- what is substituted


@dataclass(slots=True, eq=False)
class _Problem:
    """A target [groups, K, N] and a strictly lower L [groups, K, K]; see the top of the file.

    `cost` [groups, K]: what an error in each column costs, once it is carried on. `carries_values`:
    whether c is q, not z - q. `first`: what z_0 is instead of the target's.
    """

    target: Tensor
    lower: Tensor | None
    dead: Tensor
    cost: Tensor
    carries_values: bool = False
    first: Tensor | None = None
    damping: float = 0.0


def _nearest(W: Tensor, statistics: Statistics, solver: Solver) -> _Problem:  # noqa: ARG001
    return _Problem(W.clone(), None, _dead(statistics.H), _diagonal(statistics.H))


def _diffusion(W: Tensor, statistics: Statistics, solver: Solver) -> _Problem:
    damping = solver.damping or 0.0
    H, G = _damped(statistics, damping)
    diagonal = _diagonal(H)
    dead = diagonal == 0
    scale = diagonal.masked_fill(dead, 1.0).unsqueeze(-1)
    target = G.tril() @ W / scale
    lower = H.tril(-1) / scale
    # An input that was never there says nothing about its weight: that is rounded to nearest.
    target = torch.where(dead.unsqueeze(-1), W, target)
    return _Problem(target, lower, dead, diagonal, carries_values=True, damping=damping)


def _optq(W: Tensor, statistics: Statistics, solver: Solver) -> _Problem:
    damping = DAMPING["gptq"] if solver.damping is None else solver.damping
    factor, damping = _factor(statistics, damping)
    cost = _diagonal(factor).square()
    return _Problem(W.clone(), _unit_lower(factor), _dead(statistics.H), cost, damping=damping)


def _qronos(W: Tensor, statistics: Statistics, solver: Solver) -> _Problem:
    damping = DAMPING["qronos"] if solver.damping is None else solver.damping
    factor, damping = _factor(statistics, damping)
    H, G = _damped(statistics, damping)
    dead = _dead(statistics.H)
    aim = G @ W + dead.unsqueeze(-1) * W
    # H + d = R R^T with R upper: two triangular solves.
    half = torch.linalg.solve_triangular(factor, aim, upper=True)
    target = torch.linalg.solve_triangular(factor.mT, half, upper=False)
    own = H[:, :1, :1] + dead[:, :1, None]
    first = (aim[:, :1] - H[:, :1, 1:] @ W[:, 1:]) / own
    cost, lower = _diagonal(factor).square(), _unit_lower(factor)
    return _Problem(target, lower, dead, cost, first=first[:, 0], damping=damping)


_PROBLEMS = {
    "rtn": _nearest,
    "error_diffusion": _diffusion,
    "gptq": _optq,
    "qronos": _qronos,
}


def _aimed(statistics: Statistics, correction: float | None) -> Statistics:
    """Statistics whose G goes only so far from H."""
    assert correction is not None
    if correction == 1:
        return statistics
    G = torch.lerp(statistics.H, statistics.G, correction)
    return Statistics(statistics.H, G, statistics.F, statistics.rows)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _dead(H: Tensor) -> Tensor:
    return _diagonal(H) == 0


def _damped(statistics: Statistics, damping: float) -> tuple[Tensor, Tensor]:
    """H and G with the same added to both diagonals, which draws solutions to W."""
    added = damping * _diagonal(statistics.H).mean(-1)
    identity = torch.eye(statistics.H.shape[-1], dtype=torch.float64, device=statistics.H.device)
    extra = added[:, None, None] * identity
    return statistics.H + extra, statistics.G + extra


def _factor(statistics: Statistics, damping: float) -> tuple[Tensor, float]:
    """The upper triangular R with R R^T = H + d, and the damping it took to have one.

    Features that are zero in all samples get a diagonal of one: nothing is carried to or from them.
    """
    dead = _dead(statistics.H)
    while True:
        H, _ = _damped(statistics, damping)
        H = H + torch.diag_embed(dead.double())
        # The factor of the reversed matrix, reversed again, is upper: no inverse is needed for it.
        found, info = torch.linalg.cholesky_ex(H.flip(-1, -2))
        if not info.any() and found.isfinite().all():
            return found.flip(-1, -2), damping
        damping = max(10 * damping, 1e-10)


def _unit_lower(factor: Tensor) -> Tensor:
    """(U / diag U)^T without its diagonal; U = R^-1 is the upper Cholesky factor of (H + d)^-1."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    U = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
    lower: Tensor = (U / _diagonal(U).unsqueeze(-1)).mT.tril(-1)
    return lower


# ---------------------------------------------------------------- the substitution


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Columns start to stop; `segment` is the end of the run with one scale that begins here."""

    start: int
    stop: int
    segment: int | None


def _leaves(segments: list[int]) -> Iterator[_Leaf]:
    begin = 0
    for size in segments:
        end = begin + size
        for start in range(begin, end, LEAF):
            yield _Leaf(start, min(start + LEAF, end), end if start == begin else None)
        begin = end


class _Pass:
    """The substitution, leaf by leaf."""

    def __init__(self, problem: _Problem, W: Tensor, grid: Grid, settle: Settle) -> None:
        self.problem, self.W, self.grid, self.settle = problem, W, grid, settle
        self.target = problem.target
        self.carried = torch.zeros_like(W)
        self.elements = torch.zeros_like(W, dtype=grid.compute)
        self.scales = torch.zeros_like(self.elements)

    def run(self, leaves: list[_Leaf]) -> None:
        """Solve for all leaves: the first half, what it leaves to the second, the second."""
        if len(leaves) == 1:
            self._enter(leaves[0])
            return
        half = len(leaves) // 2
        first, second = leaves[:half], leaves[half:]
        self.run(first)
        if self.problem.lower is not None:
            done, rest = _span(first), _span(second)
            self.target[:, rest] -= self.problem.lower[:, rest, done] @ self.carried[:, done]
        self.run(second)

    def _enter(self, leaf: _Leaf) -> None:
        if leaf.segment is not None:
            columns = slice(leaf.start, leaf.segment)
            source = self.W[:, columns] if self.settle == "original" else self._corrected(columns)
            scale = self.grid.settle(source, self._cost(columns))
            self.scales[:, columns] = scale
        self._round(leaf)

    def _cost(self, columns: slice) -> Tensor:
        """What errors cost in a search; where nothing was ever seen, all cost the same."""
        cost = self.problem.cost[:, columns]
        return torch.where(cost.any(-1, keepdim=True), cost, 1.0)

    def _corrected(self, columns: slice) -> Tensor:
        """What the columns would be if they were not rounded."""
        problem, target = self.problem, self.target[:, columns]
        if not problem.carries_values or problem.lower is None:
            return target
        block = problem.lower[:, columns, columns]
        solved: Tensor = torch.linalg.solve_triangular(
            block, target, upper=False, unitriangular=True
        )
        return solved

    def _round(self, leaf: _Leaf) -> None:
        problem, span = self.problem, slice(leaf.start, leaf.stop)
        carried = self.carried[:, span]
        lower = None if problem.lower is None else problem.lower[:, span, span]
        for i, t in enumerate(range(leaf.start, leaf.stop)):
            z = self.target[:, t : t + 1]
            if lower is not None and i:
                z = z - lower[:, i : i + 1, :i] @ carried[:, :i]
            aim = z if t or problem.first is None else problem.first.unsqueeze(1)
            scale = self.scales[:, t : t + 1]
            element = self.grid.round(aim, scale)
            self.elements[:, t : t + 1] = element
            q = self.grid.decode(element, scale).double()
            carried[:, i : i + 1] = q if problem.carries_values else z - q


class _Sweep:
    """Coordinate descent on elements, scales as they are.

    gap = G W - H q is what is left to correct. It is brought up to date as the substitution is:
    each half of the columns hears of the other's changes by one GEMM.
    """

    def __init__(self, done: _Pass, statistics: Statistics) -> None:
        self.done, self.H = done, statistics.H
        self.values = done.grid.decode(done.elements, done.scales).double()
        self.gap = statistics.G @ done.W - statistics.H @ self.values
        self.change = torch.zeros_like(self.gap)

    def run(self, leaves: list[_Leaf], sweeps: int) -> None:
        """Go over all columns; stop when a sweep changes nothing."""
        for _ in range(sweeps):
            self._over(leaves)
            if not self.change.any():
                return

    def _over(self, leaves: list[_Leaf]) -> None:
        if len(leaves) == 1:
            self._visit(slice(leaves[0].start, leaves[0].stop))
            return
        half = len(leaves) // 2
        first, second = _span(leaves[:half]), _span(leaves[half:])
        self._over(leaves[:half])
        self.gap[:, second] -= self.H[:, second, first] @ self.change[:, first]
        self._over(leaves[half:])
        self.gap[:, first] -= self.H[:, first, second] @ self.change[:, second]

    def _visit(self, span: slice) -> None:
        H, grid, change = self.H[:, span, span], self.done.grid, self.change[:, span]
        diagonal = _diagonal(H)
        for i, t in enumerate(range(span.start, span.stop)):
            own = diagonal[:, i, None, None]
            q, element = self.values[:, t : t + 1], self.done.elements[:, t : t + 1]
            gap = self.gap[:, t : t + 1]
            if i:
                gap = gap - H[:, i : i + 1, :i] @ change[:, :i]
            scale = self.done.scales[:, t : t + 1]
            found = grid.round(q + gap / own.masked_fill(own == 0, 1.0), scale)
            # What was never seen stays as it was rounded.
            found = torch.where(own == 0, element, found)
            new = grid.decode(found, scale).double()
            change[:, i : i + 1] = new - q
            element.copy_(found)
            q.copy_(new)
        self.gap[:, span] -= H @ change


def _span(leaves: list[_Leaf]) -> slice:
    return slice(leaves[0].start, leaves[-1].stop)


# ---------------------------------------------------------------- order


def _order(H: Tensor, segments: list[int]) -> tuple[Tensor, list[int]]:
    """Columns by falling diagonal of H (summed over groups), whole blocks first by their means.

    Cutting a block would mix columns of several scales, so blocks move as they are.
    """
    weight = H.diagonal(dim1=-2, dim2=-1).sum(0)
    runs = list(torch.arange(len(weight), device=H.device).split(segments))
    means = torch.stack([weight[run].mean() for run in runs])
    order = means.argsort(descending=True, stable=True).tolist()
    inner = [runs[i][weight[runs[i]].argsort(descending=True, stable=True)] for i in order]
    return torch.cat(inner), [segments[i] for i in order]


def _reordered(statistics: Statistics, columns: Tensor) -> Statistics:
    H, G, F = (m[:, columns][:, :, columns] for m in (statistics.H, statistics.G, statistics.F))
    return Statistics(H, G, F, statistics.rows)
