"""Which constant scaling biases a model bears in FP8, after arXiv 2309.17224.

A tensor is multiplied by 2^b before it is cast to FP8 and by 2^-b afterwards; b is its scaling
bias. FP8-AMAX takes b = floor(log2(largest / amax)) for each tensor, FP8-CSCALE one constant for
all weights and inputs of linear layers. All else stays in the wider type: products of attention,
embeddings, and the head of a language model.

A constant holds if it keeps `HOLDS` of the reference's score. Scores that are shares are taken as
they are; of an error rate, what is right (1 - rate); of a perplexity, its reciprocal.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat, settled_scale
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.rounding import ScaleRule
from microscale.spelling import get_block_format
from microscale.suite.coverage import Recorder
from microscale.suite.measure import Measured, Reference
from microscale.suite.rows import Figures
from microscale.suite.task import SHARES, Evaluate, Task
from microscale.suite.trial import Progress, Trial
from microscale.watch import watching

HOLDS = 0.995
BIASES = tuple(range(-8, 9))
ELEMENTS = {
    "e4m3fnuz": "fp8_e4m3fnuz-tensor-pow2-rceil",
    "e4m3": "fp8_e4m3-tensor-pow2-rceil",
}
"""FP8-AMAX by element: bias 8 and largest 240 as the paper has it, or OCP's with 7 and 448."""

WORST = {"character error rate", "phoneme error rate"}
"""Metrics of which 1 is the worst."""


@dataclass(frozen=True, slots=True)
class Constant:
    """One constant (`bias` None: FP8-AMAX), and the share of the reference's score that it keeps.

    The share is NaN where the score is no number.
    """

    bias: int | None
    policy: str
    figures: Figures
    kept: float

    @property
    def holds(self) -> bool:
        """Whether it keeps `HOLDS` of the score."""
        return self.kept >= HOLDS

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        kept = self.kept if math.isfinite(self.kept) else None
        names = {"bias": self.bias, "policy": self.policy, "kept": kept, "holds": self.holds}
        return {**names, **self.figures.to_dict()}


@dataclass(frozen=True, slots=True)
class Sweep:
    """FP8-AMAX and all constants on one model.

    `found` is how many weights and inputs (of a call) have which bias by FP8-AMAX; `left` names
    the linear layers that stay in the wider type.
    """

    model: str
    metric: str
    unit: str
    units: int
    about: str
    seed: int
    element: str
    base: Figures
    amax: Constant
    constants: tuple[Constant, ...]
    found: dict[str, dict[int, int]]
    left: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def range(self) -> tuple[int, int] | None:
        """The first and last of the longest run of constants that hold; None if none does."""
        return self._longest(HOLDS)

    @property
    def range_of_amax(self) -> tuple[int, int] | None:
        """The same against the score of FP8-AMAX: what a constant loses beside a scale for each."""
        return self._longest(HOLDS * self.amax.kept)

    def _longest(self, limit: float) -> tuple[int, int] | None:
        """The longest run of constants that keep so much, the first of equals."""
        runs = [
            [one.bias or 0 for one in run]
            for keeps, run in groupby(self.constants, lambda one: one.kept >= limit)
            if keeps
        ]
        longest = max(runs, key=len, default=None)
        return None if longest is None else (longest[0], longest[-1])

    @property
    def summary(self) -> str:
        """One line."""
        amax = f"FP8-AMAX keeps {self.amax.kept:.2%}"
        if self.range is None:
            ends = f"{self.constants[0].bias} to {self.constants[-1].bias}"
            beside = f"; {self._said(self.range_of_amax)} keep {HOLDS:.1%} of that"
            return f"No constant from {ends} keeps {HOLDS:.1%}; {amax}{beside}."
        return f"Constants {self._said(self.range)} keep {HOLDS:.1%}; {amax}."

    def _said(self, found: tuple[int, int] | None) -> str:
        """A range, with what it may not end at."""
        if found is None:
            return "none"
        edges = {self.constants[0].bias: "the least", self.constants[-1].bias: "the greatest"}
        ends = [f"{end} is {edges[end]} tried" for end in found if end in edges]
        return f"{found[0]} to {found[1]}" + (f" ({', '.join(ends)})" if ends else "")

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        found = {
            operand: {str(b): n for b, n in counts.items()}
            for operand, counts in self.found.items()
        }
        return {
            "model": self.model,
            "metric": self.metric,
            "unit": self.unit,
            "units": self.units,
            "about": self.about,
            "seed": self.seed,
            "element": self.element,
            "holds": HOLDS,
            "range": None if self.range is None else list(self.range),
            "range_of_amax": None if self.range_of_amax is None else list(self.range_of_amax),
            "base": self.base.to_dict(),
            "amax": self.amax.to_dict(),
            "constants": [constant.to_dict() for constant in self.constants],
            "found": found,
            "left": list(self.left),
            "notes": list(self.notes),
        }


def scaling_bias(
    model: nn.Module,
    evaluate: Evaluate | Task,
    *,
    element: str = "e4m3fnuz",
    biases: Sequence[int] = BIASES,
    name: str = "model",
    seed: int = 0,
    progress: Progress | None = None,
) -> Sweep:
    """Find the constant scaling biases that hold a model's score, beside FP8-AMAX.

    Args:
        model: any module; it is converted in place and reverted.
        evaluate: as in `compare`.
        element: "e4m3fnuz" (bias 8, largest 240) or "e4m3" (OCP: bias 7, largest 448).
        biases: the constants, rising one by one.
        name: of the model, for the report.
        seed: of torch's random numbers during each evaluation.
        progress: told what runs.

    Returns:
        The scores, the range that holds, and the biases that FP8-AMAX finds.

    Raises:
        MicroscaleError: an element or biases that are not known.
    """
    amax = check_element(element)
    if list(biases) != list(range(biases[0], biases[-1] + 1)) or not biases:
        raise MicroscaleError(f"biases are {list(biases)}; give integers that rise one by one.")
    trial = Trial.of(model, evaluate, seed, name)
    return _Run(trial, amax, head_of(model), progress or (lambda *_: None)).sweep(
        name, element, biases
    )


def check_element(element: str) -> BlockFormat:
    """The format of FP8-AMAX; MicroscaleError for other elements."""
    if element not in ELEMENTS:
        raise MicroscaleError(f"element {element!r} is not known; it is {' or '.join(ELEMENTS)}.")
    return get_block_format(ELEMENTS[element])


def constant_format(amax: BlockFormat, bias: int) -> BlockFormat:
    """The format of one constant scaling bias: its scale is 2^-bias, whatever the data is."""
    return replace(amax, scale=settled_scale(2.0**-bias, None), rule=ScaleRule.AMAX)


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The name of a language model's output layer, if it says which one that is."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return tuple(name for name, module in model.named_modules() if module is head)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The steps of a sweep."""

    trial: Trial
    amax: BlockFormat
    head: tuple[str, ...]
    progress: Progress

    def sweep(self, name: str, element: str, biases: Sequence[int]) -> Sweep:
        task = self.trial.task
        self.progress("unquantized", 0, None)
        base, known = self.trial.reference(lambda _: None)
        found: dict[str, Counter[int]] = {"weight": Counter(), "input": Counter()}
        weights: set[int] = set()

        def see(x: Tensor, operand: Operand, _: int, weight: bool) -> None:
            bias = _bias(x, operand)
            if weight and x.data_ptr() in weights:
                return
            weights.update((x.data_ptr(),) if weight else ())
            if bias is not None:
                found["weight" if weight else "input"][bias] += 1

        self.progress("FP8-AMAX", 0, len(biases) + 1)
        with watching(see):
            amax = self._measured(None, base, known)
        constants = []
        for number, bias in enumerate(biases, 1):
            self.progress(f"constant {bias}", number, len(biases) + 1)
            constants.append(self._measured(bias, base, known))
        return Sweep(
            model=name,
            metric=base.metric,
            unit=task.unit,
            units=base.units,
            about=task.about or f"{base.units} {task.unit}s",
            seed=self.trial.seed,
            element=element,
            base=Figures.of(base),
            amax=amax,
            constants=tuple(constants),
            found={operand: dict(sorted(counts.items())) for operand, counts in found.items()},
            left=self.head,
            notes=(*_too_few(base), *task.notes),
        )

    def _measured(self, bias: int | None, base: Measured, known: Reference | None) -> Constant:
        fmt = self.amax if bias is None else constant_format(self.amax, bias)
        profile = "fp8_amax" if bias is None else "fp8_cscale"
        policy = Policy.named(profile, fmt, fmt, ignore=self.head)
        with self.trial.converted(policy):
            measured = self.trial.measured(base, known, Recorder(), lambda _: None)
        figures = Figures.of(measured, base)
        kept = score(base.metric, figures.metric.value, base.headline().value)
        return Constant(bias, f"{profile}:{fmt}", figures, kept)


def _too_few(base: Measured) -> Iterator[str]:
    """A sentence if one unit more or less decides whether a share holds."""
    right = base.headline().value
    right = 1 - right if base.metric in WORST else right
    if base.metric in SHARES and right > 0 and 1 / (base.units * right) > 1 - HOLDS:
        yield (
            f"One of {base.units} units is {1 / (base.units * right):.1%} of the score, more than "
            f"the {1 - HOLDS:.1%} that may be lost: give more data."
        )


def score(metric: str, value: float, reference: float) -> float:
    """The share that is kept of a reference's score; NaN for what is no number."""
    if not math.isfinite(value) or not reference:
        return math.nan
    if metric == "perplexity":
        return reference / value
    if metric in WORST:
        return (1 - value) / (1 - reference) if reference < 1 else math.nan
    return value / reference


def _bias(x: Tensor, operand: Operand) -> int | None:
    """What FP8-AMAX takes for a tensor; None for one of zeros."""
    amax = float(x.detach().abs().max()) if x.numel() else 0.0
    if not amax or not math.isfinite(amax):
        return None
    significand, exponent = math.frexp(amax)
    largest, largest_exponent = math.frexp(operand.format.element.largest)
    return largest_exponent - exponent - (significand > largest)
