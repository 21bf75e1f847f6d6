"""What an evaluation hands over, and its measures for each unit.

A *unit* is what is counted as one independent observation: a window of text, a sentence, a clip.
All measures of one unit are means over its valid positions, in float64; a unit's weight is the
number of those positions, so that weighted means are means over positions (perplexity is the
exponential of the mean over tokens). A task whose metric is not the share of right positions, such
as an error rate of decoded words, gives `Marks` along.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microscale.errors import MicroscaleError

IGNORE = -100
"""Target of a position that is not counted, as in `torch.nn.functional.cross_entropy`."""

_CHUNK = 2**22
"""Logits that are held in float64 at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """A task's own figures of the units of a batch, each [units], in place of those of targets.

    `values`: what the headline metric is the weighted mean of. `weight`: of each unit, in place of
    its number of positions (such as the length of the reference, for an error rate). `loss`: in
    nats, in place of the cross entropy.
    """

    values: Tensor
    weight: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """One batch: `logits` [units, ..., classes], floating; `targets` [units, ...], integer.

    Targets equal to `IGNORE` (-100) are not counted. Without targets (None) all positions count,
    and there is neither accuracy nor cross entropy. `marks` are the task's own figures.
    """

    logits: Tensor
    targets: Tensor | None = None
    marks: Marks | None = None

    def __post_init__(self) -> None:
        """Check that the shapes, dtypes and targets fit together."""
        if self.targets is not None:
            self._check_targets(self.logits, self.targets)
        elif self.logits.dim() < 2 or not self.logits.is_floating_point():
            raise MicroscaleError(
                f"Predictions: logits are {self.logits.dtype} of shape {tuple(self.logits.shape)}; "
                f"give floating-point logits [units, ..., classes]."
            )
        if self.marks is not None:
            self._check_marks(self.marks)

    def _check_marks(self, marks: Marks) -> None:
        for name in ("values", "weight", "loss"):
            figures: Tensor | None = getattr(marks, name)
            if figures is not None and figures.shape != (self.units,):
                raise MicroscaleError(
                    f"Predictions: marks.{name} has shape {tuple(figures.shape)}; give one number "
                    f"for each of the {self.units} units."
                )

    @staticmethod
    def _check_targets(logits: Tensor, targets: Tensor) -> None:
        if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
            raise MicroscaleError(
                f"Predictions: logits of shape {tuple(logits.shape)} do not go with targets of "
                f"shape {tuple(targets.shape)}; give logits [units, ..., classes] and targets "
                f"[units, ...]."
            )
        if not logits.is_floating_point() or targets.is_floating_point() or targets.is_complex():
            raise MicroscaleError(
                f"Predictions: logits are {logits.dtype} and targets {targets.dtype}; "
                f"give floating-point logits and integer targets."
            )
        counted = targets[targets != IGNORE]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[-1]:
            raise MicroscaleError(
                f"Predictions: targets reach from {int(counted.min())} to {int(counted.max())}, "
                f"but the logits have {logits.shape[-1]} classes (not counted: {IGNORE})."
            )

    @property
    def units(self) -> int:
        """Number of units in the batch."""
        return len(self.logits)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Measures of units, each a float64 tensor [units] on the CPU.

    weight: valid positions, or the task's own. loss: cross entropy in nats, or the task's own.
    accuracy: share of positions whose largest logit is the target. divergence: KL(reference ||
    this) in nats. agreement: share of positions whose largest logit is the reference's. values:
    the task's own headline figures. None: there are no targets, no reference, no marks.
    """

    weight: Tensor
    loss: Tensor | None = None
    accuracy: Tensor | None = None
    divergence: Tensor | None = None
    agreement: Tensor | None = None
    values: Tensor | None = None


def score(predictions: Predictions, reference: Tensor | None = None) -> Scores:
    """Measure every unit of a batch, against `reference` logits of the same shape if given."""
    logits = predictions.logits
    if reference is not None and reference.shape != logits.shape:
        raise MicroscaleError(
            f"evaluate gave logits of shape {tuple(logits.shape)} where the reference model gave "
            f"{tuple(reference.shape)}; it must walk the same data in the same order at every call."
        )
    scores = join([_score(*part) for part in _chunks(predictions, reference)])
    marks = predictions.marks
    return scores if marks is None else _mark(scores, marks)


def _mark(scores: Scores, marks: Marks) -> Scores:
    def own(figures: Tensor | None, other: Tensor | None) -> Tensor | None:
        return other if figures is None else figures.detach().double().cpu()

    weight = own(marks.weight, scores.weight)
    assert weight is not None
    loss = own(marks.loss, scores.loss)
    return replace(scores, weight=weight, loss=loss, values=own(marks.values, None))


def join(parts: Iterable[Scores]) -> Scores:
    """The units of several batches one after the other."""
    parts = list(parts)

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(figures is None for figures in found) else torch.cat(found)

    optional = ("loss", "accuracy", "divergence", "agreement", "values")
    weight = torch.cat([part.weight for part in parts])
    return Scores(weight, **{name: joined(name) for name in optional})


def _chunks(
    predictions: Predictions, reference: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The batch in groups of whole units, [units, positions, classes], of bounded size."""
    units, classes = predictions.units, predictions.logits.shape[-1]
    logits = predictions.logits.reshape(units, -1, classes)
    targets = None if predictions.targets is None else predictions.targets.reshape(units, -1)
    step = max(1, _CHUNK // max(1, logits[:1].numel()))
    for start in range(0, max(units, 1), step):
        rows = slice(start, start + step)
        other = None if reference is None else reference.reshape(logits.shape)[rows]
        yield logits[rows], None if targets is None else targets[rows], other


def _score(logits: Tensor, targets: Tensor | None, reference: Tensor | None) -> Scores:
    valid = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if targets is not None:
        valid = targets != IGNORE
    weight = valid.sum(1).double()
    log_q = logits.double().log_softmax(-1)
    top = logits.argmax(-1)

    def mean(values: Tensor) -> Tensor:
        # where, not a product: an ignored position may hold NaN or infinity.
        kept = torch.where(valid, values.double(), 0.0)
        return (kept.sum(1) / weight.clamp(min=1)).cpu()

    scores = Scores(weight.cpu())
    if targets is not None:
        picked = log_q.gather(-1, targets.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
        scores = replace(scores, loss=mean(-picked), accuracy=mean(top == targets))
    if reference is None:
        return scores
    reference = reference.to(logits.device)
    divergence = mean(_divergence(reference.double().log_softmax(-1), log_q))
    return replace(scores, divergence=divergence, agreement=mean(top == reference.argmax(-1)))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; a class that p excludes (logit -inf) adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
