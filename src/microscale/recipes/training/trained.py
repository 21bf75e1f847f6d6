"""What came out of a training run."""

from dataclasses import dataclass, field
from typing import Any

from microscale.recipes.training.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses and figures of a run.

    Attributes:
        config: its settings, steps and learning rate written out.
        rows: of `losses.csv`, from the first step on.
        resumed: the step that this call began at.
        seconds: that this call took.
        tokens: that this call trained on.
        parameters: of the model.
        monitored: rows of `monitor.csv`.
    """

    config: TrainConfig
    rows: list[dict[str, str]]
    resumed: int
    seconds: float
    tokens: int
    parameters: int
    monitored: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Step and training loss."""
        return [(int(row["step"]), float(row["loss"])) for row in self.rows]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Step and validation loss."""
        kept = [row for row in self.rows if row["validation"]]
        return [(int(row["step"]), float(row["validation"])) for row in kept]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.config.to_dict(),
            "policy": self.config.read_policy().to_dict(),
            "parameters": self.parameters,
            "resumed": self.resumed,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "losses": self.losses,
            "validation": self.validation,
        }

    def __str__(self) -> str:
        """Return the figures as text."""
        validation = f"{self.validation[-1][1]:.4f}" if self.validation else "not measured"
        last = f"{self.losses[-1][1]:.4f}" if self.losses else "not measured"
        speed = f", {self.tokens / self.seconds:,.0f} tokens a second" if self.tokens else ""
        return (
            f"{self.parameters:,} parameters, policy {self.config.policy}, "
            f"{self.config.steps} steps{speed}\n"
            f"training loss {last}, validation loss {validation} nats a token\n"
            f"in {str(self.config.out)!r}"
        )
