"""What an evaluation hands over, and its measures for each unit.

A *unit* is what is counted as one independent observation: a window of text, a sentence, a clip.
All measures of one unit are means over its valid positions, in float64; a unit's weight is the
number of those positions, so that weighted means are means over positions (perplexity is the
exponential of the mean over tokens).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.errors import MicroscaleError

IGNORE = -100
"""Target of a position that is not counted, as in `torch.nn.functional.cross_entropy`."""

_CHUNK = 2**22
"""Logits that are held in float64 at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """One batch: `logits` [units, ..., classes], floating; `targets` [units, ...], integer.

    Targets equal to `IGNORE` (-100) are not counted.
    """

    logits: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        """Check that the shapes, dtypes and targets fit together."""
        logits, targets = self.logits, self.targets
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
        return len(self.targets)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Measures of units, each a float64 tensor [units] on the CPU; the last two need a reference.

    weight: valid positions. loss: cross entropy in nats. accuracy: share of positions whose
    largest logit is the target. divergence: KL(reference || this) in nats. agreement: share of
    positions whose largest logit is the reference's.
    """

    weight: Tensor
    loss: Tensor
    accuracy: Tensor
    divergence: Tensor | None = None
    agreement: Tensor | None = None


def score(predictions: Predictions, reference: Tensor | None = None) -> Scores:
    """Measure every unit of a batch, against `reference` logits of the same shape if given."""
    if reference is not None and reference.shape != predictions.logits.shape:
        raise MicroscaleError(
            f"evaluate gave logits of shape {tuple(predictions.logits.shape)} where the reference "
            f"model gave {tuple(reference.shape)}; it must walk the same data in the same order "
            f"at every call."
        )
    parts = [_score(*part) for part in _chunks(predictions, reference)]
    return join(parts)


def join(parts: Iterable[Scores]) -> Scores:
    """The units of several batches one after the other."""
    parts = list(parts)
    names = ("weight", "loss", "accuracy")
    base = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    divergences = [part.divergence for part in parts if part.divergence is not None]
    agreements = [part.agreement for part in parts if part.agreement is not None]
    if not divergences:
        return Scores(**base)
    return Scores(**base, divergence=torch.cat(divergences), agreement=torch.cat(agreements))


def _chunks(
    predictions: Predictions, reference: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The batch in groups of whole units, [units, positions, classes], of bounded size."""
    units, classes = predictions.units, predictions.logits.shape[-1]
    logits = predictions.logits.reshape(units, -1, classes)
    targets = predictions.targets.reshape(units, -1)
    step = max(1, _CHUNK // max(1, logits[:1].numel()))
    for start in range(0, max(units, 1), step):
        rows = slice(start, start + step)
        other = None if reference is None else reference.reshape(logits.shape)[rows]
        yield logits[rows], targets[rows], other


def _score(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Scores:
    valid = targets != IGNORE
    weight = valid.sum(1).double()
    log_q = logits.double().log_softmax(-1)
    picked = log_q.gather(-1, targets.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    top = logits.argmax(-1)

    def mean(values: Tensor) -> Tensor:
        # where, not a product: an ignored position may hold NaN or infinity.
        kept = torch.where(valid, values.double(), 0.0)
        return (kept.sum(1) / weight.clamp(min=1)).cpu()

    loss, accuracy = mean(-picked), mean(top == targets)
    if reference is None:
        return Scores(weight.cpu(), loss, accuracy)
    reference = reference.to(logits.device)
    divergence = mean(_divergence(reference.double().log_softmax(-1), log_q))
    agreement = mean(top == reference.argmax(-1))
    return Scores(weight.cpu(), loss, accuracy, divergence, agreement)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; a class that p excludes (logit -inf) adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
