"""What the casts of a training step lose: every operand, and the gradients that come of it.

At a step that is looked at, forward and backward passes run twice more on the step's first part,
once as they are and once without any cast; the run itself is not touched. Of every operand that is
cast: the share of values that saturate, the share that becomes zero, the signal-to-quantization-
noise ratio, and the exponents of the scales, with how far their median has drifted since the first
look. Of every weight's gradient: the cosine with the gradient without casts, and the ratio of their
norms, whose distance from 1 is the multiplicative bias of arXiv 2506.20752. Norms, whose parameters
that paper found to be the trouble, are not quantized by this package.
"""

import csv
import io
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microscale.files import write_file
from microscale.operands import Operand
from microscale.recipes.training.world import World
from microscale.scope import site_of
from microscale.tally import Figures, Tally
from microscale.watch import backward_place, watching
from microscale.weights import forget_all, uncast

COLUMNS = (
    "step", "module", "operand", "format", "saturated", "flushed", "sqnr", "scale_low",
    "scale_median", "scale_high", "drift", "cosine", "norm_ratio",
)  # fmt: skip
FILE = "monitor.csv"

LOW_COSINE = 0.5
"""A gradient that points less than this in the true direction is warned of."""

SPIKE, REMEMBERED = 5.0, 50
"""A gradient norm that is so many times the median of so many before is warned of."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was found at one step: rows of the table, and what is to be warned of."""

    step: int
    rows: list[dict[str, Any]]
    cosine: float
    worst: tuple[str, float]

    def scalars(self) -> dict[str, float]:
        """What TensorBoard is to show."""
        found = {"gradient/cosine": self.cosine}
        for row in self.rows:
            place = f"{row['module']} {row['operand']}"
            for name in ("sqnr", "saturated", "flushed", "scale_median", "cosine", "norm_ratio"):
                if isinstance(row.get(name), float) and math.isfinite(row[name]):
                    found[f"{name}/{place}"] = row[name]
        return found


@dataclass(slots=True)
class Monitor:
    """Looks at a converted model every so many steps, and keeps `monitor.csv`."""

    folder: Path
    model: nn.Module
    world: World
    medians: dict[tuple[str, str], float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def resume(self, step: int) -> None:
        """Read what was written until that step."""
        path = self.folder / FILE
        if path.is_file() and step:
            read = csv.DictReader(io.StringIO(path.read_text()))
            self.rows = [row for row in read if int(row["step"]) <= step]
        for row in self.rows:
            if row["scale_median"]:
                place = row["module"], row["operand"]
                self.medians.setdefault(place, float(row["scale_median"]))

    def look(self, step: int, backward: Callable[[], None]) -> Look:
        """Run `backward`, a forward and backward pass, with and without casts."""
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        study = _Study(self.model)
        with torch.random.fork_rng(devices):
            with study.watching():
                narrow = self._gradients(backward)
            with uncast():
                true = self._gradients(backward)
        forget_all()
        rows = [self._operand_row(step, place, tally) for place, tally in study.tallies.items()]
        gradients, cosine = self._compare(step, narrow, true)
        rows += gradients
        self.rows += rows
        if self.world.first:
            write_file(self.folder / FILE, _text(self.rows))
        known = [(r["module"], r["cosine"]) for r in gradients if math.isfinite(r["cosine"])]
        return Look(step, rows, cosine, min(known, key=lambda pair: pair[1], default=("", 1.0)))

    def warn(self, look: Look) -> str:
        """A line about gradients that no longer point where they should, or ""."""
        if look.worst[1] >= LOW_COSINE:
            return ""
        return (
            f"step {look.step}: the gradient of {look.worst[0]!r} has a cosine of "
            f"{look.worst[1]:.2f} with the gradient without casts; that of all is {look.cosine:.2f}"
        )

    def warn_of_norm(self, step: int, norm: float) -> str:
        """A line about a gradient that is suddenly large, with the layer that it is of, or ""."""
        usual = statistics.median(self.norms) if len(self.norms) >= REMEMBERED // 5 else math.inf
        self.norms.append(norm)
        if not norm > SPIKE * usual:
            return ""
        sizes = {name: self._dot(g, g) for name, g in _named_gradients(self.model)}
        largest = max(sizes, key=lambda name: sizes[name])
        return (
            f"step {step}: the norm of the gradient is {norm:.3g}, {norm / usual:.1f} times the "
            f"median of the last {len(self.norms) - 1} steps; most of it is of {largest!r}"
        )

    def _gradients(self, backward: Callable[[], None]) -> dict[str, Tensor]:
        self.model.zero_grad()
        backward()
        found = {name: gradient.clone() for name, gradient in _named_gradients(self.model)}
        self.model.zero_grad()
        return found

    def _operand_row(self, step: int, place: tuple[str, str], tally: Tally) -> dict[str, Any]:
        figures = tally.figures()
        low, median, high = _exponents(figures)
        first = self.medians.setdefault(place, median) if math.isfinite(median) else median
        return {
            "step": step,
            "module": place[0],
            "operand": place[1],
            "format": str(tally.operand),
            "saturated": figures.saturated,
            "flushed": figures.flushed,
            "sqnr": figures.sqnr,
            "scale_low": low,
            "scale_median": median,
            "scale_high": high,
            "drift": median - first,
        }

    def _compare(
        self, step: int, narrow: dict[str, Tensor], true: dict[str, Tensor]
    ) -> tuple[list[dict[str, Any]], float]:
        rows, sums = [], [0.0, 0.0, 0.0]
        for name, gradient in narrow.items():
            pairs = ((gradient, true[name]), (gradient, gradient), (true[name], true[name]))
            dots = [self._dot(a, b) for a, b in pairs]
            sums = [total + dot for total, dot in zip(sums, dots, strict=True)]
            rows.append(
                {
                    "step": step,
                    "module": name,
                    "operand": "gradient",
                    "cosine": _cosine(*dots),
                    "norm_ratio": math.sqrt(dots[1] / dots[2]) if dots[2] else math.nan,
                }
            )
        return rows, _cosine(sums[0], sums[1], sums[2])

    def _dot(self, a: Tensor, b: Tensor) -> float:
        """The sum over all processes, each of which has a shard."""
        parts = [x.to_local() if hasattr(x, "to_local") else x for x in (a, b)]
        dot = (parts[0].double() * parts[1].double()).sum()
        sharded = hasattr(a, "to_local")
        return float(self.world.total(dot) if sharded else dot)


class _Study:
    """Adds up every cast, forward and backward, by module and operand."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tallies: dict[tuple[str, str], Tally] = {}
        self._running: list[str] = []
        self._products: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.model.modules():
                if site := site_of(module):
                    self._follow(module, site.name, stack)
            stack.enter_context(watching(self._see))
            yield

    def _follow(self, module: nn.Module, name: str, stack: ExitStack) -> None:
        def enter(*_: object) -> None:
            self._running.append(name)
            self._products[name] = 0

        def leave(*_: object) -> None:
            self._running.pop()

        stack.enter_context(module.register_forward_pre_hook(enter))
        stack.enter_context(module.register_forward_hook(leave, always_call=True))

    def _see(self, x: Tensor, operand: Operand, axis: int, weight: bool) -> None:
        place = backward_place()
        if place is not None:
            name, label = place.module, f"{place.product} {place.operands.pop(0)}"
        else:
            name = self._running[-1] if self._running else ""
            label = "weight" if weight else self._activation(name)
        self.tallies.setdefault((name, label), Tally(operand)).add(x, axis)

    def _activation(self, name: str) -> str:
        """The inputs of a layer, or the factors of attention's two products in their order."""
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            return "rows"
        if not list(module.children()):
            return "input"
        names = ("query", "key", "probabilities", "value")
        number = self._products[name]
        self._products[name] += 1
        return names[number] if number < len(names) else f"factor {number}"


def _named_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def _exponents(figures: Figures) -> tuple[float, float, float]:
    """The lowest, median and highest exponent of the scales; NaN where there are none."""
    total = sum(count for _, count in figures.scales)
    if not total:
        return math.nan, math.nan, math.nan
    seen = 0
    for exponent, count in figures.scales:
        seen += count
        if 2 * seen >= total:
            return float(figures.scales[0][0]), float(exponent), float(figures.scales[-1][0])
    raise AssertionError(figures.scales)


def _cosine(dot: float, first: float, second: float) -> float:
    return dot / math.sqrt(first * second) if first and second else math.nan


def _text(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(cells)
    return text.getvalue()
