"""A model's weights solved one after another, in the order in which its products run.

For each stage (weights with the same input) every batch is run twice up to there: through the
quantized network, in which all earlier weights are solved, and through the float network, in which
these are what they were. The two give X~ and X, of which three small matrices are kept. Then the
stage is solved, and its weights are replaced.

Memory: the statistics of one stage, the float weights of one block of the model beside the packed
ones, and one batch of activations; finished blocks' outputs go to disk beyond a budget. A product
that is not needed any more stops its pass.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.recipes.batch import Batch, mask_of, run
from microscale.recipes.calibration import Outcome
from microscale.recipes.grid import Grid, Search
from microscale.recipes.packing import Places, Solved
from microscale.recipes.parallel import all_agree, check_alike
from microscale.recipes.part import Parameters, Part, masked
from microscale.recipes.shelf import Shelf
from microscale.recipes.solve import Solution, Solver, solve
from microscale.recipes.stacks import Stacks, Stopped
from microscale.recipes.statistics import Statistics
from microscale.recipes.trace import Stage, Trace
from microscale.rotation import rotated
from microscale.tensor import BlockTensor
from microscale.watch import Product, watching_products
from microscale.weights import forget, uncast

Rows = dict[Part, list[Tensor]]
Report = Callable[[str, int, int], None]


@dataclass(slots=True, eq=False)
class Walk:
    """One calibration of one converted model."""

    model: nn.Module
    batches: Sequence[Batch]
    solver: Solver
    search: Search
    budget: int
    report: Report
    outcomes: list[Outcome] = field(default_factory=list)
    places: Places = field(init=False)
    trace: Trace = field(init=False)
    stacks: Stacks = field(init=False)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    known: dict[str, nn.Parameter] = field(default_factory=dict)
    """The solved weights by name."""

    def __post_init__(self) -> None:
        """Look at the model, without running it."""
        self.places = Places(self.model)
        self.trace = Trace(Parameters(self.model.named_parameters()))
        self.stacks = Stacks(self.model, Shelf(self.budget))

    def explore(self) -> list[Stage]:
        """Run all data through the float network once; find what is to be solved, in order."""
        with torch.no_grad(), uncast(), watching_products(self.trace.see):
            for number, batch in enumerate(self.batches):
                self.trace.begin()
                found = self.stacks.finding(lambda: self.trace.index) if not number else None
                with found or nullcontext(), _refusals(number):
                    run(self.model, batch)
        self.trace.end()
        for name in {part.parameter for part in self.trace.operands}:
            if not self.places.parameter(name).isfinite().all():
                self.trace.unsolvable[name] = "it holds values that are NaN or infinite"
        check_alike([repr(stage.parameters) for stage in self.trace.stages()])
        with torch.no_grad(), uncast():
            self.stacks.verify(lambda: run(self.model, self.batches[0]))
        return self.trace.stages()

    def tables(self) -> None:
        """Round the tables that are only looked up: each of their rows is used as it is."""
        for part in self.trace.tables:
            parameter = self.places.parameter(part.parameter)
            grid = Grid.of(parameter.detach(), self.trace.operands[part], self.search)
            W = part.matrices(part.view(parameter))
            alike = Statistics.alike(1, part.width, W.device)
            segments = part.segments(grid.format)
            solution = solve(W, alike, grid, segments, Solver("rtn"))
            nearest = solve(
                W, alike, Grid.of(parameter.detach(), grid.operand), segments, Solver("rtn")
            )
            self._put(part.parameter, [(part, solution)], grid)
            energy = alike.energy(W)
            errors = [_ratio(alike.lost(W, s.values), energy) for s in (nearest, solution)]
            self._note(part.parameter, "rtn", 0, part.width, errors, ["looked up, row by row"])

    def stage(self, stage: Stage) -> None:
        """Gather the statistics of one stage and solve it."""
        self._advance(stage)
        statistics, notes = self._gather(stage)
        for name in stage.parameters:
            self._solve(name, stage, statistics, notes)

    def skip(self, stage: Stage | None, parameters: dict[str, nn.Parameter]) -> None:
        """Put weights in place that were solved before."""
        if stage is not None:
            self._advance(stage)
        for name, parameter in parameters.items():
            self._replace(name, parameter)

    def close(self) -> None:
        """Forget everything that was kept for the passes."""
        self.stacks.shelf.close()
        self.originals.clear()

    def restore(self) -> None:
        """Put back the weights that are still known as they were."""
        for name, parameter in self.originals.items():
            self.places.put(name, parameter)

    # ------------------------------------------------------------ passes

    def _advance(self, stage: Stage) -> None:
        """Finish the blocks that come before a stage, and drop their float weights."""
        if stage.early:
            return
        moved = self.stacks.advance(stage.first, self._capture)
        for name in list(self.originals) if moved else ():
            if self.stacks.is_finished(self.trace.span(name)):
                del self.originals[name]

    def _capture(self, block: nn.Module) -> None:
        for number, batch in enumerate(self.batches):
            for wide in (False, True):
                with self.stacks.keeping(block, (wide, number)):
                    self._run(number, batch, None, wide=wide)

    def _gather(self, stage: Stage) -> tuple[dict[Part, Statistics], list[str]]:
        """The statistics of each part; parts with one input share theirs."""
        matched = not stage.early
        found = self._summed(stage, matched=matched)
        if found is None:
            found = self._summed(stage, matched=False)
            assert found is not None
            return found, ["the two networks route samples differently: X~ alone was used"]
        return found, ["solved first: it is looked up too"] if stage.early else []

    def _summed(self, stage: Stage, *, matched: bool) -> dict[Part, Statistics] | None:
        """Sums over all batches; None if the two networks give numbers of rows that differ."""
        sums = {
            shared[0]: Statistics.empty(shared[0].groups, shared[0].width, self._device(shared[0]))
            for shared in stage.inputs
        }
        agree = True
        for number, batch in enumerate(self.batches):
            self.report(stage.parameters[0], number, len(self.batches))
            quantized = self._rows(stage, number, batch, wide=stage.early)
            wide = self._rows(stage, number, batch, wide=True) if matched else quantized
            for shared in stage.inputs:
                part = shared[0]
                agree &= _add(sums[part], quantized[part], wide[part], part, number)
        if not all_agree(agree):
            return None
        for one in sums.values():
            one.reduce()
        return {part: sums[shared[0]] for shared in stage.inputs for part in shared}

    def _rows(self, stage: Stage, number: int, batch: Batch, *, wide: bool) -> Rows:
        """The inputs of a stage in one of the networks, [groups, rows, K] for each product."""
        firsts = {shared[0] for shared in stage.inputs}
        parts = set(stage.parts)
        mask = mask_of(batch)
        found: Rows = defaultdict(list)

        def watch(product: Product) -> None:
            part = self.trace.parameters.part(product)
            if part in stage.after:
                raise Stopped
            if part in firsts and part in parts:
                assert part is not None
                rows = masked(part.rows(product.left), product.left, mask)
                found[part].append(_thinned(rows, part, number, len(found[part])))

        self._run(number, batch, watch, wide=wide)
        return found

    def _run(
        self, number: int, batch: Batch, watch: Callable[[Product], None] | None, *, wide: bool
    ) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if wide:
                stack.enter_context(uncast())
                stack.enter_context(self._float())
            stack.enter_context(self.stacks.still((wide, number)))
            if watch is not None:
                stack.enter_context(watching_products(watch))
            with suppress(Stopped):
                run(self.model, batch)

    @contextmanager
    def _float(self) -> Iterator[None]:
        """The weights as they were, where they are still needed."""
        for name, parameter in self.originals.items():
            self.places.put(name, parameter)
        try:
            yield
        finally:
            for name in self.originals:
                self.places.put(name, self.known[name])

    def _device(self, part: Part) -> torch.device:
        return self.places.parameter(part.parameter).device

    # ------------------------------------------------------------ solving

    def _solve(
        self, name: str, stage: Stage, statistics: dict[Part, Statistics], notes: list[str]
    ) -> None:
        parameter = self.places.parameter(name)
        parts = [part for part in stage.parts if part.parameter == name]
        operand = self.trace.operands[parts[0]]
        turned = rotated(parameter.detach(), parts[0].rotation, parts[0].axis)
        grid = Grid.of(turned, operand, self.search)
        plain = Grid.of(turned, operand)
        found: list[tuple[Part, Solution]] = []
        before = after = energy = 0.0
        used = set()
        for part in parts:
            known = statistics[part]
            W = rotated(part.matrices(part.view(parameter)), part.rotation, 1)
            segments = part.segments(grid.format)
            nearest = solve(W, known, plain, segments, Solver("rtn"))
            solution = solve(W, known, grid, segments, self.solver)
            lost = known.lost(W, nearest.values), known.lost(W, solution.values)
            method = self.solver.method
            if lost[1] > lost[0]:
                method, solution, lost = "rtn", nearest, (lost[0], lost[0])
            found.append((part, solution))
            used.add(method)
            before, after = before + lost[0], after + lost[1]
            energy += known.energy(W)
        self._put(name, found, grid)
        rows = min(statistics[part].rows for part in parts)
        errors = [_ratio(before, energy), _ratio(after, energy)]
        said = [*notes, *_remarks(found, rows, parts[0].width, self.solver)]
        method = self.solver.method if self.solver.method in used else "rtn"
        self._note(name, method, rows, parts[0].width, errors, said)

    def _put(self, name: str, found: list[tuple[Part, Solution]], grid: Grid) -> None:
        original = self.places.parameter(name)
        solved = Solved.of(original, grid)
        for part, solution in found:
            # What is stored as values is turned at every use.
            values = rotated(solution.values, part.rotation, 1)
            solved.write(part, replace(solution, values=values))
        self._replace(name, solved.parameter(original, grid, self.places.axis(name)))

    def _replace(self, name: str, parameter: nn.Parameter) -> None:
        original = self.places.parameter(name)
        self.originals[name] = original
        self.known[name] = parameter
        self.places.put(name, parameter)
        forget([original])

    def _note(
        self, name: str, method: str, rows: int, width: int, errors: list[float], notes: list[str]
    ) -> None:
        packed = isinstance(self.places.parameter(name), BlockTensor)
        said = notes if packed else [*notes, "stored as values"]
        self.outcomes.append(
            Outcome(name, method, rows, width, errors[0], errors[1], packed, tuple(said))
        )


def _ratio(lost: float, energy: float) -> float:
    return lost / energy if energy else float(lost > 0)


def _remarks(
    found: list[tuple[Part, Solution]], rows: int, width: int, solver: Solver
) -> Iterator[str]:
    if not rows:
        yield "no sample: rounded to nearest"
    elif rows < width:
        yield f"{rows} samples for {width} inputs: too few, H is singular"
    dead = sum(solution.dead for _, solution in found)
    if rows and dead:
        yield f"{dead} inputs always zero"
    damping = max(solution.damping for _, solution in found)
    if solver.damping is not None and damping > solver.damping:
        yield f"damped by {damping:g} until H had an inverse"


def _add(
    sums: Statistics, quantized: list[Tensor], wide: list[Tensor], part: Part, number: int
) -> bool:
    """Add the rows of a batch; False if the networks' do not pair."""
    if [x.shape for x in quantized] != [x.shape for x in wide]:
        return False
    for xq, x in zip(quantized, wide, strict=True):
        if not xq.numel():
            continue
        try:
            sums.add(xq, x)
        except MicroscaleError as error:
            raise MicroscaleError(f"batch {number}, {part.parameter!r}: {error}.") from error
    return True


ENOUGH = 32
"""Samples per input that a batch of a convolution contributes at most, unless that is cheaper than
the convolution itself."""


def _thinned(rows: Tensor, part: Part, batch: int, call: int) -> Tensor:
    """Fewer rows where a convolution has very many: neighbouring windows say much the same.

    The same rows in both networks: they are drawn by the numbers of batch and call.
    """
    if part.kind in ("matrix", "table"):
        return rows
    outputs = part.size[0] // part.groups if part.axis else part.size[1]
    count = rows.shape[1]
    kept = max(count * outputs // part.width, ENOUGH * part.width)
    if kept >= count:
        return rows
    generator = torch.Generator().manual_seed(2**32 * batch + call)
    chosen = torch.randperm(count, generator=generator)[:kept].sort().values
    return rows[:, chosen.to(rows.device)]


@contextmanager
def _refusals(number: int) -> Iterator[None]:
    """Say which batch a model refuses."""
    try:
        yield
    except MicroscaleError as error:
        raise MicroscaleError(f"batch {number}: {error}") from error
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MicroscaleError(
            f"batch {number} does not fit the model ({type(error).__name__}: {reason})."
        ) from error
