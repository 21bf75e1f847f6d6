"""The rows of a comparison: quality, size, and what ran quantized, for each format."""

from dataclasses import asdict, dataclass

from microscale.suite import statistics
from microscale.suite.coverage import Coverage
from microscale.suite.measure import Measured
from microscale.suite.statistics import Estimate
from microscale.suite.task import Generation


@dataclass(frozen=True, slots=True)
class Figures:
    """Quality of one row. Differences are from the unquantized model, paired over units.

    `metric` is the headline metric; `loss` in nats; `divergence` KL(unquantized || quantized) in
    nats; `agreement` the share of positions with the same most likely class. None where the
    evaluation gives nothing of the kind, and differences in the unquantized row.
    """

    metric: Estimate
    difference: Estimate | None = None
    loss: Estimate | None = None
    loss_difference: Estimate | None = None
    divergence: Estimate | None = None
    agreement: Estimate | None = None

    @classmethod
    def of(cls, measured: Measured, base: Measured | None = None) -> "Figures":
        """Summarise per-unit figures, against those of the unquantized model if given."""
        weight = measured.weight
        loss, divergence, agreement = measured.loss, measured.divergence, measured.agreement
        paired = None if base is None or loss is None or base.loss is None else base.loss
        return cls(
            metric=measured.headline(),
            difference=None if base is None else measured.headline_difference(base),
            loss=None if loss is None else statistics.mean(loss, weight),
            loss_difference=None
            if loss is None or paired is None
            else statistics.difference(loss, paired, weight),
            divergence=None if divergence is None else statistics.mean(divergence, weight),
            agreement=None if agreement is None else statistics.mean(agreement, weight),
        )

    @property
    def loss_of_quality(self) -> Estimate | None:
        """What a picture shows: the divergence, else the change of the metric."""
        return self.divergence if self.divergence is not None else self.difference

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        names = ("metric", "difference", "loss", "loss_difference", "divergence", "agreement")
        estimates = {name: getattr(self, name) for name in names}
        return {name: e.to_dict() if e is not None else None for name, e in estimates.items()}


@dataclass(frozen=True, slots=True)
class Row:
    """One format. The first row is the unquantized model, whose `coverage` is None.

    `bits_per_weight` counts quantized weights with their scales; `megabytes` (10^6 bytes) all
    parameters and buffers. `values_unquantized` repeats the figures with the product of
    probabilities and values left alone (causal models). `seconds` is conversion and evaluation.
    """

    format: str
    bits_per_weight: float
    megabytes: float
    figures: Figures
    seconds: float
    values_unquantized: Figures | None = None
    generation: Generation | None = None
    coverage: Coverage | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        other = self.values_unquantized
        return {
            "format": self.format,
            "bits_per_weight": self.bits_per_weight,
            "megabytes": self.megabytes,
            **self.figures.to_dict(),
            "values_unquantized": other.to_dict() if other else None,
            "generation": asdict(self.generation) if self.generation else None,
            "seconds": self.seconds,
            "coverage": self.coverage.to_dict() if self.coverage else None,
        }
