"""`finetune`: a model trained on with quantized forward passes, in place.

Casts pass gradients straight through (dgrad and wgrad are in the wider type unless the policy says
otherwise); weights are trained in the type they have. AdamW for the model, plain SGD for learned
ranges, both on a cosine from the learning rate to a thousandth of it (arXiv 2303.17951).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microscale.conversion import Conversion
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.ledger import text_table
from microscale.policy import Policy
from microscale.recipes.batch import Batch, read
from microscale.recipes.learned import LostRangeError
from microscale.recipes.loss import DivergedError, Loss, bad_gradient, origin, safely, usual_loss
from microscale.recipes.packing import Places
from microscale.recipes.preparation import (
    Learn,
    Preparation,
    check_words,
    prepare,
    range_parameters,
    ranges_of,
    settle,
)
from microscale.recipes.progress import digest
from microscale.recipes.snapshot import read_snapshot, write_snapshot
from microscale.report.progress import Report
from microscale.suite.measure import evaluating
from microscale.tensor import BlockTensor

SNAPSHOT = "state.bin"
END = 1e-3
"""What is left of the learning rate at the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is finetuned.

    Attributes:
        steps: number of batches that the model is trained with; the data is gone through in a new
            order each time.
        lr: learning rate of AdamW at the first step.
        learn: whether ranges, or ranges and exponent bits, are learned: see `prepare`.
        range_lr: learning rate of SGD for these; None: 0.01.
        gradient: of casts whose ranges are not learned, "identity" or "clipped".
        weight_decay: of AdamW.
        seed: of the order of the data, dropout and stochastic rounding.
    """

    steps: int = 200
    lr: float = 1e-4
    learn: Learn = "off"
    range_lr: float | None = None
    gradient: str = "identity"
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse words and numbers that make no sense."""
        check_words(self.learn, self.gradient)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise MicroscaleError(f"steps {self.steps!r} is not a positive whole number.")
        for name, value in (("lr", self.lr), ("range_lr", self.range_lr)):
            if value is not None and not 0 < value < math.inf:
                raise MicroscaleError(f"{name} {value!r} is not a positive number.")
        if not 0 <= self.weight_decay < math.inf:
            raise MicroscaleError(f"weight_decay {self.weight_decay!r} is negative or no number.")
        if self.range_lr is not None and self.learn == "off":
            raise MicroscaleError(
                f"range_lr {self.range_lr!r} without ranges to learn; add learn='ranges'."
            )
        if not 0 <= self.seed < 2**63:
            raise MicroscaleError(f"seed {self.seed!r} must be from 0 to 2^63 - 1.")

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step."""
        return END + (1 - END) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def batch(self, step: int, count: int) -> int:
        """The number of the batch of a step."""
        epoch, place = divmod(step, count)
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return int(torch.randperm(count, generator=draw)[place])


RANGE_LR = 1e-2


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What `finetune` did to a model; `str()` is a table of it.

    Attributes:
        conversion: what `convert` says of the model as it is now.
        plan: how it was trained.
        preparation: what was learned besides weights.
        losses: of each step, before it.
        ranges: by place, the first of the learned scales at the end, and the mantissa bits.
        before: mean loss on the development data of the model that was only cast; None without.
        after: that of the finetuned one, as it is now.
    """

    conversion: Conversion
    plan: Plan
    preparation: Preparation
    losses: tuple[float, ...]
    ranges: dict[str, dict[str, float]]
    before: float | None
    after: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "plan": asdict(self.plan),
            "conversion": self.conversion.to_dict(),
            "preparation": self.preparation.to_dict(),
            "losses": list(self.losses),
            "ranges": dict(self.ranges),
            "development": {"before": self.before, "after": self.after},
        }

    def __str__(self) -> str:
        """Return tables and sentences."""
        lines = [str(self.conversion)]
        if self.preparation.learned:
            lines += [str(self.preparation), ""]
        tenth = max(1, len(self.losses) // 10)
        first, last = (
            sum(part) / len(part) for part in (self.losses[:tenth], self.losses[-tenth:])
        )
        lines.append(
            f"{self.plan.steps} steps at learning rate {self.plan.lr:g}: mean training loss "
            f"{first:.4g} in the first tenth, {last:.4g} in the last."
        )
        if self.before is not None and self.after is not None:
            rows = [("development data", "loss"), ("cast", f"{self.before:.4f}")]
            lines.append(text_table([*rows, ("finetuned", f"{self.after:.4f}")]))
        return "\n".join(lines)


def finetune(
    model: nn.Module,
    policy: Policy | str,
    batches: Iterable[Batch],
    *,
    plan: Plan | None = None,
    loss: Loss = usual_loss,
    development: Iterable[Batch] | None = None,
    progress: Path | None = None,
    every: int = 50,
    report: Report = lambda *_: None,
) -> Finetuning:
    """Convert a model and train it on, its products running on cast operands.

    Args:
        model: any module, in float32 or wider as a rule; changed in place.
        policy: or its spelling.
        batches: pairs (inputs, targets), dictionaries, or whatever `loss` takes; kept in memory.
        plan: learning rate, steps and the like; `Plan()` by default.
        loss: of the model and a batch; `microscale.recipes.loss.usual_loss` by default.
        development: batches that are not trained on, to compare with the model that is only cast.
        progress: a folder for the state of the run: the same call, after this one was killed, goes
            on where it was and ends with the same bits. The last state stays there.
        every: steps between two states.
        report: called with what runs, the steps done, and how many there are.

    Returns:
        What was done. The model is ready to be evaluated and saved.

    Raises:
        MicroscaleError: bad data, settings or state, a policy that cannot be carried out, and a
            loss that is not finite, naming step, tensor and last state. The model is then as it
            was; the last state stays.
    """
    plan = plan or Plan()
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise MicroscaleError(f"every {every!r} is not a positive number of steps.")
    kept, held = read(batches), None if development is None else read(development)
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    run = "" if progress is None else digest(model, kept, (policy, plan))
    state = None if progress is None else read_snapshot(progress / SNAPSHOT, run)
    with _taken_back(model):
        convert(model, policy, verbose=False)
        before = None if held is None else mean_loss(model, held, loss)
        prepared = prepare(model, learn=plan.learn, gradient=plan.gradient)
        training = _Training(model, kept, plan, loss, report)
        if state is not None:
            training.restore(state)
        snapshot = None if progress is None else progress / SNAPSHOT
        training.run(snapshot, run, every)
        found = {name: _figures(one) for name, one in ranges_of(model).items() if one.started}
        conversion = settle(model)
        after = None if held is None else mean_loss(model, held, loss)
    losses = tuple(training.losses)
    return Finetuning(conversion, plan, prepared, losses, found, before, after)


def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss = usual_loss) -> float:
    """The mean of the losses of batches, each counted alike, in evaluation mode."""
    with evaluating(model, 0):
        found = [float(safely(loss, model, batch, i)) for i, batch in enumerate(batches)]
    return sum(found) / len(found)


class _Training:
    """The loop, and what it has to remember."""

    def __init__(
        self, model: nn.Module, batches: list[Batch], plan: Plan, loss: Loss, report: Report
    ) -> None:
        self.model, self.batches, self.plan, self.loss = model, batches, plan, loss
        self.report = report
        self.losses: list[float] = []
        self.optimizers = self._optimizers()
        self.random: list[Tensor] = []

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        plan, ranged = self.plan, range_parameters(self.model)
        apart = {id(p) for p in ranged}
        own = [p for p in self.model.parameters() if p.requires_grad and id(p) not in apart]
        if not own:
            raise MicroscaleError(
                "no parameter of the model takes a gradient: weights that are packed, or were "
                "frozen, are not trained. Load the unquantized model."
            )
        made: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(own, plan.lr, weight_decay=plan.weight_decay)
        ]
        if ranged:
            made.append(torch.optim.SGD(ranged, plan.range_lr or RANGE_LR))
        for optimizer in made:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return made

    def run(self, snapshot: Path | None, run: str, every: int) -> None:
        """All steps that are left."""
        plan = self.plan
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))), torch.enable_grad():
            torch.manual_seed(plan.seed)
            if self.random:
                torch.set_rng_state(self.random[0])
                torch.cuda.set_rng_state_all(self.random[1:])
            self.model.train()
            self.model.zero_grad()  # of what was done to it before
            for step in range(len(self.losses), plan.steps):
                self.report("training", step, plan.steps)
                self._step(step, snapshot)
                if snapshot is not None and ((step + 1) % every == 0 or step + 1 == plan.steps):
                    write_snapshot(snapshot, self._state(run))

    def _step(self, step: int, snapshot: Path | None) -> None:
        number = self.plan.batch(step, len(self.batches))
        batch = self.batches[number]
        try:
            loss = safely(self.loss, self.model, batch, number)
        except LostRangeError as error:
            raise self._diverged(step, snapshot, str(error)) from error
        value = float(loss.detach())
        if not math.isfinite(value):
            where = origin(self.model, self.loss, batch)
            raise self._diverged(step, snapshot, f"the loss is {value}, and began in {where}")
        loss.backward()
        if name := bad_gradient(self.model):
            raise self._diverged(step, snapshot, f"the gradient of {name} is not finite")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.plan.factor(step)
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(value)

    def _diverged(self, step: int, snapshot: Path | None, what: str) -> DivergedError:
        kept = f"the last good state is {str(snapshot)!r}" if snapshot and snapshot.exists() else ""
        return DivergedError(
            f"step {step + 1} of {self.plan.steps} (batch "
            f"{self.plan.batch(step, len(self.batches))}): {what}; "
            f"{kept or 'no state was written before'}. Lower the learning rate (now "
            f"{self.plan.lr:g}), or look at that batch."
        )

    def _state(self, run: str) -> dict[str, Any]:
        return {
            "run": run,
            "model": dict(self.model.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            "losses": list(self.losses),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that was written."""
        self.model.load_state_dict(state["model"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.random, self.losses = state["random"], list(state["losses"])


def _figures(one: Any) -> dict[str, float]:
    figures = {"step": float(one.step.detach().flatten()[0])}
    if one.mantissa is not None:
        figures["mantissa"] = float(one.mantissa.detach())
    return figures


@contextmanager
def _taken_back(model: nn.Module) -> Iterator[None]:
    """Put parameters, values, modes and classes back if something is raised inside."""
    places = Places(model)
    parameters = {name: places.parameter(name) for name, _ in model.named_parameters()}
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(x, x.detach().clone()) for _, x in named if not isinstance(x, BlockTensor)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    except BaseException:
        revert(model)
        for name, parameter in parameters.items():
            places.put(name, parameter)
        with torch.no_grad():
            for x, value in tensors:
                x.copy_(value)
                x.grad = None
        raise
    finally:
        for module, training in modes:
            module.training = training
