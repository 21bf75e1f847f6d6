"""The main job: direct-cast a model to each of several formats and measure what that does.

For every format: convert, evaluate against the unquantized model's logits, revert. The model is
as it was afterwards, also when something is raised or the user interrupts.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat
from microscale.policy import POLICY_FILES, Policy
from microscale.suite.comparison import Comparison
from microscale.suite.coverage import Coverage, Recorder
from microscale.suite.extras import require
from microscale.suite.findings import judge
from microscale.suite.measure import Measured, Reference, evaluating
from microscale.suite.rows import Figures, Row
from microscale.suite.size import Size, main_dtype
from microscale.suite.task import Evaluate, Generation, Task
from microscale.suite.trial import Progress, Trial

DEFAULT_FORMATS = (
    "mxint8",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4/mxfp6_e2m3",
    "nvfp4",
)


def compare(
    model: nn.Module,
    evaluate: Evaluate | Task,
    formats: Sequence[str | BlockFormat | Policy] = DEFAULT_FORMATS,
    *,
    name: str = "model",
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare what formats do to a model, by direct cast.

    Args:
        model: any module; it is converted in place for each format, and reverted.
        evaluate: called with the model, without gradients and in eval mode, once per format. It
            returns `Predictions` (logits [units, ..., classes] and targets [units, ...]), an
            iterable of them (a generator keeps memory small), or a mapping of names to per-unit
            figures [units], of which the first is the headline metric and "loss", if there, the
            measure of the findings. It must walk the same data in the same order every time.
            A `Task` adds a metric and words.
        formats: spellings such as "mxfp4", "mxfp4/mxfp6_e2m3" (weight/activation) or "paper:mxfp4"
            (a profile's), block formats, policies, or names of policy files (`*.toml`, `*.json`).
        name: of the model, for the report.
        seed: of torch's random numbers during each evaluation.
        progress: told how far the work is.

    Returns:
        Rows, the unquantized model first, and the paper's findings (arXiv 2310.10537) put to
        paired tests. `print` shows it, `to_dict` gives plain data.

    Raises:
        MicroscaleError: unknown formats, before anything runs; evaluations that cannot be paired.
    """
    policies = read_formats(formats)
    require("scipy.stats", "a comparison's confidence intervals")
    run = _Run(Trial.of(model, evaluate, seed, name), progress or (lambda *_: None))
    return run.comparison(name, policies)


def read_formats(formats: Sequence[str | BlockFormat | Policy]) -> dict[str, Policy]:
    """The policy of every format, by its name; MicroscaleError for unknown and repeated ones.

    A policy file goes by its own name.
    """
    policies: dict[str, Policy] = {}
    for given in formats:
        if str(given).endswith(POLICY_FILES):
            name, policy = Path(str(given)).name, Policy.read(str(given))
        else:
            policy = given if isinstance(given, Policy) else Policy.parse(str(given))
            name = str(policy)
        if name in policies:
            raise MicroscaleError(f"formats name {name!r} twice; name each once.")
        policies[name] = policy
    if not policies:
        raise MicroscaleError("formats is empty; name at least one, such as mxfp4.")
    return policies


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The steps of a comparison."""

    trial: Trial
    progress: Progress

    def comparison(self, name: str, policies: dict[str, Policy]) -> Comparison:
        start = time.perf_counter()
        model, task = self.trial.model, self.trial.task
        base_name = str(main_dtype(model)).removeprefix("torch.")
        base, reference = self.trial.reference(self._advance(base_name))
        size = Size.plain(model)
        rows = [_row(base_name, size, Figures.of(base), time.perf_counter() - start)]
        measured: dict[str, Measured] = {}
        for spelling, policy in policies.items():
            row, measured[spelling] = self._format(spelling, policy, base, reference)
            rows.append(row)
        return Comparison(
            model=name,
            metric=base.metric,
            unit=task.unit,
            units=base.units,
            positions=base.positions,
            about=task.about or f"{base.units} {task.unit}s",
            seed=self.trial.seed,
            rows=tuple(rows),
            findings=judge(base, measured),
            notes=(*task.notes, *_notes(policies)),
        )

    def _format(
        self, spelling: str, policy: Policy, base: Measured, reference: Reference | None
    ) -> tuple[Row, Measured]:
        start = time.perf_counter()
        recorder = Recorder()
        with self.trial.converted(policy) as conversion:
            advance = self._advance(spelling)
            measured = self.trial.measured(base, reference, recorder, advance)
            seconds = time.perf_counter() - start
            size = Size.converted(conversion, self.trial.model)
            generation = self._generation()
        row = _row(spelling, size, Figures.of(measured, base), seconds)
        coverage = Coverage.of(recorder.products, conversion)
        other = self._values_unquantized(spelling, policy, base, reference)
        row = replace(row, values_unquantized=other, generation=generation, coverage=coverage)
        return row, measured

    def _values_unquantized(
        self, spelling: str, policy: Policy, base: Measured, reference: Reference | None
    ) -> Figures | None:
        """The figures with attention's product of probabilities and values left alone."""
        if not self.trial.task.causal or not policy.matmul.values:
            return None
        without = replace(policy, matmul=replace(policy.matmul, values=False))
        with self.trial.converted(without):
            advance = self._advance(f"{spelling}, values unquantized")
            measured = self.trial.measured(base, reference, Recorder(), advance)
        return Figures.of(measured, base)

    def _generation(self) -> Generation | None:
        model, check = self.trial.model, self.trial.task.generation
        if check is None:
            return None
        with evaluating(model, self.trial.seed):
            return check(model)

    def _advance(self, label: str) -> Callable[[int], None]:
        """Announce what runs now; the result is to be told of units done."""
        done = 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            self.progress(label, done, self.trial.task.units)

        advance(0)
        return advance


def _notes(policies: Mapping[str, Policy]) -> Iterator[str]:
    """What a reader must know of these formats."""
    operands = {name: (p.forward.input, p.matmul.left) for name, p in policies.items()}
    whole = [
        name
        for name, (first, second) in operands.items()
        if any(
            op and (op.format.block == "tensor" or op.format.tensor_scale) for op in (first, second)
        )
    ]
    if whole:
        yield (
            f"The scale of a whole activation tensor ({', '.join(whole)}) is shared by all that is "
            f"in one batch, so these figures depend on the batch size."
        )


def _row(name: str, size: Size, figures: Figures, seconds: float) -> Row:
    return Row(name, size.bits_per_weight, size.megabytes, figures, seconds)
