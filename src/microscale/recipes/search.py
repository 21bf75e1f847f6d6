"""`search`: formats for the layers of a model, so that least is lost within a budget of bits.

What each part (the weights of a layer, the activations of a layer) loses in each candidate is
measured with that part alone quantized. These losses are taken to add up, which makes the best
assignment a knapsack problem, one for the weights and one for the activations. They do not quite
add up, so whole models are measured too: the front of mixtures, and each candidate alone; of all
that keep within the budget the best measured one is chosen.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from microscale.errors import MicroscaleError
from microscale.operands import WIDE, Operand
from microscale.policy import Policy
from microscale.recipes.budget import Budget
from microscale.recipes.knapsack import Knapsack, Way, check_way, solve
from microscale.recipes.mixture import Formats, mixture
from microscale.recipes.parts import Census, Marked, Part, Side, activation_parts, weight_parts
from microscale.recipes.searched import Assigned, Kind, Point, Searched
from microscale.recipes.sensitivity import Losses, Measure, Sensitivity, check_measure
from microscale.suite.extras import require
from microscale.suite.size import Size
from microscale.suite.task import Evaluate, Task
from microscale.suite.trial import Progress, Trial

CANDIDATES = ("fp3_e2m0-32", "mxfp4", "nvfp4", "fp5_e2m2-32", "mxfp6_e2m3", "mxint8")
STEPS = 8
"""How many equal steps the front has, besides the sizes of the candidates alone."""


def search(
    model: nn.Module,
    evaluate: Evaluate | Task,
    budget: str | float | Budget,
    *,
    activations: str | float | Budget | None = None,
    formats: Sequence[str] = CANDIDATES,
    measure: Measure = "divergence",
    solver: Way = "exact",
    name: str = "model",
    seed: int = 0,
    progress: Progress | None = None,
) -> Searched:
    """Choose a format for the weights and for the activations of each layer.

    Args:
        model: any module; it is converted in place many times, and reverted.
        evaluate: as in `compare`, giving logits. What the result is to be judged by should be
            other data.
        budget: average bits of a stored weight, scales and padding included ("4.6bits", 4.6), or
            the size of the whole model ("250KB").
        activations: average bits of an activation; None: as many as a weight may have; "fp32":
            leave them alone.
        formats: the candidates, each a format or a pair weight/activation.
        measure: "divergence", "output" or "gradient"; see `microscale.recipes.sensitivity`.
        solver: "exact" or "greedy"; see `microscale.recipes.knapsack`.
        name: of the model, for the report.
        seed: of everything random.
        progress: told what runs.

    Returns:
        The policy, with the layers' losses and the front. `print` shows it, `to_dict` gives plain
        data, `policy.to_toml()` a policy file.

    Raises:
        MicroscaleError: words that are not known; a budget that no assignment meets, with the
            smallest that can be met; an evaluation without logits; a model without products.
    """
    limits = Budget.parse(budget), read_activations(activations)
    candidates = read_candidates(formats, wide=limits[1] == WIDE)
    check_measure(measure)
    check_way(solver)
    require("scipy.stats", "a search's standard errors")
    trial = Trial.of(model, evaluate, seed, name)
    told = progress or (lambda *_: None)
    return _Run(trial, candidates, *limits, measure, solver, told).searched(name)


def read_candidates(formats: Sequence[str], *, wide: bool) -> dict[str, Formats]:
    """Operands for weights and activations by spelling; `wide` leaves the activations out.

    Raises MicroscaleError for what is no format or pair, and for repetitions.
    """
    found: dict[str, Formats] = {}
    for spelling in formats:
        policy = Policy.parse(spelling)
        weight, activation = policy.forward.weight, policy.forward.input
        if weight is None or (activation is None and not wide):
            raise MicroscaleError(
                f"candidate {spelling!r} leaves an operand in the wider type; name a format. (The "
                f"activations alone are left by activations={WIDE!r}.)"
            )
        if policy != Policy.of(weight, activation):
            raise MicroscaleError(
                f"candidate {spelling!r} is a profile; a search assigns formats and pairs alone."
            )
        activation = None if wide else activation
        label = str(Policy.of(weight, activation))
        if label in found:
            raise MicroscaleError(f"candidates name {label!r} twice; name each once.")
        found[label] = weight, activation
    if not found:
        raise MicroscaleError("candidates are empty; name at least one format, such as mxfp4.")
    return found


def read_activations(given: str | float | Budget | None) -> Budget | str | None:
    """The budget of the activations: average bits, "fp32", or None; MicroscaleError for others."""
    if given is None or (isinstance(given, str) and given.strip().lower() == WIDE):
        return None if given is None else WIDE
    budget = Budget.parse(given)
    if not budget.is_average:
        raise MicroscaleError(
            f"activations {str(budget)!r} are not stored with the model; give them average bits, "
            f"as in 6.25bits, or {WIDE!r}."
        )
    return budget


@dataclass(frozen=True, slots=True)
class _Side:
    """The parts of one side with their problem; costs are bits times `unit`."""

    parts: tuple[Part, ...]
    operands: tuple[Operand, ...]
    problem: Knapsack
    unit: int

    @classmethod
    def of(cls, parts: Sequence[Part], operands: Sequence[Operand], losses: Losses) -> "_Side":
        """State the problem in integers."""
        unit = math.lcm(*(bits.denominator for part in parts for bits in part.bits))
        costs = tuple(tuple(int(bits * unit) for bits in part.bits) for part in parts)
        return cls(tuple(parts), tuple(operands), Knapsack(costs, losses), unit)

    @property
    def values(self) -> int:
        """Number of all values."""
        return sum(part.values for part in self.parts)

    def average(self, cost: int) -> Fraction:
        """Bits of a value on average."""
        return Fraction(cost, self.unit * self.values)

    def of_candidates(self) -> list[Fraction]:
        """Bits of a value on average with each candidate everywhere."""
        return [self.average(sum(column)) for column in zip(*self.problem.costs, strict=True)]

    def limit(self, average: Fraction) -> int:
        """The cost that so many bits on average may come to."""
        return math.floor(average * self.unit * self.values)


Choice = tuple[int, ...]
"""The candidate of each part of one side."""


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The steps of a search."""

    trial: Trial
    candidates: dict[str, Formats]
    budget: Budget
    activations: Budget | str | None
    measure: Measure
    solver: Way
    progress: Progress

    def searched(self, name: str) -> Searched:
        task = self.trial.task
        parts = self._parts()
        rest = self._rest()
        limits = self._limits(parts, rest)
        self.progress("unquantized", 0, None)
        base, reference = self.trial.reference(lambda _: None)
        operands = {side: self._operands(side) for side in parts}
        probe = Sensitivity(self.trial, base, reference, operands, self.progress)
        every = [part for each in parts.values() for part in each]
        losses = dict(zip(every, probe.losses(every, self.measure), strict=True))
        sides = {
            side: _Side.of(each, operands[side], tuple(losses[part] for part in each))
            for side, each in parts.items()
        }
        points = _Points(self.trial, sides, probe, tuple(self.candidates))
        formats = list(points.formats())
        front = list(points.front(self._targets(sides, limits), self.solver))
        chosen = self._best([*front, *formats], sides, limits)
        return Searched(
            model=name,
            budget=str(self.budget),
            activations=str(self.activations or "as weights"),
            measure=self.measure,
            solver=self.solver,
            about=task.about or f"{base.units} {task.unit}s",
            seed=self.trial.seed,
            chosen=chosen,
            parts=tuple(_assigned(sides, chosen.policy)),
            front=tuple(front),
            formats=tuple(formats),
            notes=tuple(_notes(every, chosen)) + task.notes,
        )

    def _operands(self, side: Side) -> list[Operand]:
        place = 0 if side == "weights" else 1
        return [op for pair in self.candidates.values() if (op := pair[place]) is not None]

    def _parts(self) -> dict[Side, list[Part]]:
        """The parts of either side; one pass over the data finds what it uses."""
        self.progress("counting", 0, None)
        weight, activation = next(iter(self.candidates.values()))
        assert weight is not None
        census = Census(Marked(self.trial.model, weight, activation))
        with census.marked.watching(census):
            self.trial.reference(lambda _: None)
        parts: dict[Side, list[Part]] = {
            "weights": weight_parts(self.trial.model, self._operands("weights"), census.weights)
        }
        if not parts["weights"]:
            raise MicroscaleError("the model has no weights of products: nothing is to be chosen.")
        found = activation_parts(self._operands("activations"), census.activations)
        return parts | ({"activations": found} if found and activation else {})

    def _rest(self) -> int:
        """Bits of the model besides the weights that are assigned."""
        with self.trial.converted(mixture(self.trial.model, self._smallest(), {})) as conversion:
            return conversion.size_bits - conversion.weight_bits

    def _smallest(self) -> Formats:
        """The candidate of the fewest bits."""
        return min(self.candidates.values(), key=lambda pair: _density(pair[0]))

    def _limits(self, parts: Mapping[Side, Sequence[Part]], rest: int) -> dict[Side, Fraction]:
        """Average bits that either side may have. Raises MicroscaleError if they are too few."""
        values, least = _least(parts["weights"])
        room = self.budget.bits(values, rest)
        if room < least:
            raise MicroscaleError(
                f"budget {str(self.budget)!r} cannot be met: with these candidates the "
                f"weights take at least {self.budget.said(values, rest, math.ceil(least))}; give "
                "more, or name smaller formats."
            )
        limits: dict[Side, Fraction] = {"weights": Fraction(room, values)}
        if self.budget.is_average:
            limits["weights"] = self.budget.amount
        if "activations" in parts:
            own = self.activations if isinstance(self.activations, Budget) else None
            limits["activations"] = own.amount if own else limits["weights"]
            values, least = _least(parts["activations"])
            if limits["activations"] * values < least:
                raise MicroscaleError(
                    f"activations {float(limits['activations']):g}bits cannot be met: with these "
                    f"candidates they take at least {float(least / values):g}bits; give them more, "
                    f"or {WIDE!r} to leave them alone."
                )
        return limits

    def _targets(
        self, sides: Mapping[Side, _Side], limits: Mapping[Side, Fraction]
    ) -> Iterator[dict[Side, Fraction]]:
        """The budgets of the front: equal steps, the candidates' own sizes, and what was asked."""
        side, other = sides["weights"], sides.get("activations")
        low, high = (side.average(c) for c in (side.problem.smallest, side.problem.largest))
        steps = {low + (high - low) * step / STEPS for step in range(STEPS + 1)}
        wanted = [(average, average) for average in sorted({*steps, limits["weights"]})]
        wanted += zip(side.of_candidates(), (other or side).of_candidates(), strict=True)
        for weights, activations in sorted(wanted):
            target: dict[Side, Fraction] = {"weights": weights}
            if other is not None:
                follows = self.activations is None
                least = other.average(other.problem.smallest)
                own = activations if follows else limits["activations"]
                target["activations"] = max(own, least)
            yield target

    def _best(
        self, points: Sequence[Point], sides: Mapping[Side, _Side], limits: Mapping[Side, Fraction]
    ) -> Point:
        """The point of the smallest measured divergence among those within the limits."""

        def fits(point: Point) -> bool:
            choices = _choices(sides, point.policy)
            return all(
                side.problem.cost(choices[name]) <= side.limit(limits[name])
                for name, side in sides.items()
            )

        within = [point for point in points if fits(point)]
        return min(within, key=lambda point: point.rank)


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
    """Makes policies of choices, and measures them."""

    trial: Trial
    sides: Mapping[Side, _Side]
    probe: Sensitivity
    labels: tuple[str, ...]

    def formats(self) -> Iterator[Point]:
        """Each candidate everywhere."""
        for column, label in enumerate(self.labels):
            whole = {name: (column,) * len(side.parts) for name, side in self.sides.items()}
            yield self._point(label, "format", whole)

    def front(self, targets: Iterator[dict[Side, Fraction]], way: Way) -> Iterator[Point]:
        """The best mixture of each budget, those that are the same once."""
        known: set[tuple[Choice, ...]] = set()
        for target in targets:
            choices = {
                name: solve(side.problem, side.limit(target[name]), way)
                for name, side in self.sides.items()
            }
            if tuple(choices.values()) not in known:
                known.add(tuple(choices.values()))
                yield self._point(f"{float(target['weights']):.4g} bits", "mixture", choices)

    def _point(self, label: str, kind: Kind, choices: Mapping[Side, Choice]) -> Point:
        self.probe.progress(label, 0, None)
        model = self.trial.model
        policy = _policy(model, self.sides, choices)
        with self.trial.converted(policy) as conversion:
            divergence = self.probe.divergence()
            size = Size.converted(conversion, model)
        bits = None
        if "activations" in self.sides:
            side = self.sides["activations"]
            bits = float(side.average(side.problem.cost(choices["activations"])))
        return Point(
            label,
            kind,
            size.bits_per_weight,
            bits,
            size.megabytes,
            sum(side.problem.loss(choices[name]) for name, side in self.sides.items()),
            divergence,
            policy,
        )


def _policy(
    model: nn.Module, sides: Mapping[Side, _Side], choices: Mapping[Side, Choice]
) -> Policy:
    """The policy of a choice; modules that are no part take the smallest format of either side."""
    given: dict[str, dict[Side, Operand]] = {}
    usual: dict[Side, Operand] = {}
    for name, side in sides.items():
        usual[name] = min(side.operands, key=_density)
        for part, column in zip(side.parts, choices[name], strict=True):
            for module in part.modules:
                given.setdefault(module, {})[name] = side.operands[column]
    chosen = {module: _pair({**usual, **operands}) for module, operands in given.items()}
    return mixture(model, _pair(usual), chosen)


def _pair(operands: Mapping[Side, Operand]) -> Formats:
    return operands["weights"], operands.get("activations")


def _choices(sides: Mapping[Side, _Side], policy: Policy) -> dict[Side, Choice]:
    """The candidate that a policy gives each part."""
    found: dict[Side, Choice] = {}
    for name, side in sides.items():
        path = "forward.weight" if name == "weights" else "forward.input"
        given = [policy.at(part.modules[0]).setting(path) for part in side.parts]
        found[name] = tuple(
            next(c for c, operand in enumerate(side.operands) if operand is setting)
            for setting in given
        )
    return found


def _assigned(sides: Mapping[Side, _Side], policy: Policy) -> Iterator[Assigned]:
    for name, choice in _choices(sides, policy).items():
        side = sides[name]
        spelled = [str(operand) for operand in side.operands]
        for part, column, losses in zip(side.parts, choice, side.problem.losses, strict=True):
            by_format = dict(zip(spelled, losses, strict=True))
            yield Assigned(
                name, part.modules, part.values, spelled[column], by_format, part.reached
            )


def _notes(parts: Sequence[Part], chosen: Point) -> Iterator[str]:
    unreached = [part.name for part in parts if not part.reached]
    if unreached:
        yield (
            f"No product of the data uses the weights of {', '.join(unreached)}: these have the "
            "smallest format."
        )
    if chosen.kind == "format":
        yield "On this data no mixture within the budget is better than one format everywhere."


def _least(parts: Sequence[Part]) -> tuple[int, Fraction]:
    """Number of values, and the bits that they take at least."""
    return sum(p.values for p in parts), sum((min(p.bits) for p in parts), Fraction())


def _density(operand: Operand | None) -> float:
    return operand.format.bits_per_value if operand else math.inf
