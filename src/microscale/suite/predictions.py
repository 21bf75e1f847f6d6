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
    logits, targets = predictions.logits, predictions.targets
    if reference is not None and reference.shape != logits.shape:
        raise MicroscaleError(
            f"evaluate gave logits of shape {tuple(logits.shape)} where the reference model gave "
            f"{tuple(reference.shape)}; it must walk the same data in the same order at every call."
        )
    valid = (targets != IGNORE).reshape(len(targets), -1).cpu()
    weight = valid.sum(1).double()

    def mean(positions: Tensor) -> Tensor:
        # where, not a product: an ignored position may hold NaN or infinity.
        kept = torch.where(valid, positions.reshape(valid.shape), 0.0)
        return kept.sum(1) / weight.clamp(min=1)

    parts = [_positions(*rows) for rows in _rows(logits, targets, reference)]
    measures = [mean(torch.cat(columns)) for columns in zip(*parts, strict=True)]
    return Scores(weight, *measures)


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


def _rows(
    logits: Tensor, targets: Tensor, reference: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Positions in groups of bounded size: logits [rows, classes], targets [rows], reference."""
    classes = logits.shape[-1]
    step = max(1, _CHUNK // max(1, classes))
    flat, wanted = logits.reshape(-1, classes), targets.reshape(-1)
    other = None if reference is None else reference.reshape(-1, classes)
    for start in range(0, max(len(flat), 1), step):
        rows = slice(start, start + step)
        yield flat[rows], wanted[rows], None if other is None else other[rows]


def _positions(logits: Tensor, targets: Tensor, reference: Tensor | None) -> tuple[Tensor, ...]:
    """Loss, accuracy and, against a reference, divergence and agreement of every position."""
    if logits.device.type == "mps":  # which has no float64
        logits, targets = logits.cpu(), targets.cpu()
    log_q = logits.double().log_softmax(-1)
    picked = log_q.gather(-1, targets.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    top = logits.argmax(-1)
    measures = [-picked, (top == targets).double()]
    if reference is not None:
        reference = reference.to(logits.device)
        measures.append(_divergence(reference.double().log_softmax(-1), log_q))
        measures.append((top == reference.argmax(-1)).double())
    return tuple(measure.cpu() for measure in measures)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; a class that p excludes (logit -inf) adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
