"""One model with its task, measured as it is and under policies: what every study of formats does.

The model is as it was afterwards, also when something is raised or the user interrupts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from microscale.conversion import Conversion
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.scope import site_of
from microscale.suite.coverage import Recorder
from microscale.suite.measure import (
    Advance,
    Measured,
    Reference,
    check_pairing,
    evaluating,
    measure,
    measure_reference,
)
from microscale.suite.task import Evaluate, Task

Progress = Callable[[str, int, int | None], None]
"""Called with what runs, the units done, and how many there are (None: not known)."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A model, its task, and the seed of torch's random numbers during each evaluation."""

    model: nn.Module
    task: Task
    seed: int

    @classmethod
    def of(cls, model: nn.Module, evaluate: Evaluate | Task, seed: int, name: str) -> "Trial":
        """Check the model; raise MicroscaleError if it is converted already."""
        if any(site_of(module) for module in model.modules()):
            raise MicroscaleError(
                f"model {name!r} is converted already; it is needed as it was: revert(model) first."
            )
        task = evaluate if isinstance(evaluate, Task) else Task(evaluate=evaluate)
        return cls(model, task, seed)

    def reference(self, advance: Advance) -> tuple[Measured, Reference | None]:
        """Measure the unquantized model."""
        with evaluating(self.model, self.seed):
            return measure_reference(self.model, self.task, advance)

    def measured(
        self, base: Measured, reference: Reference | None, recorder: Recorder, advance: Advance
    ) -> Measured:
        """Measure the model as it stands, on the same units as the reference."""
        with evaluating(self.model, self.seed):
            measured = measure(self.model, self.task, reference, recorder, advance)
        check_pairing(measured, base)
        return measured

    @contextmanager
    def converted(self, policy: Policy) -> Iterator[Conversion]:
        """Convert the model for a while."""
        conversion = convert(self.model, policy, verbose=False)
        try:
            yield conversion
        finally:
            revert(self.model)
