"""A task: an evaluation function and what is to be known about it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from microscale.suite.predictions import Predictions

Evaluation = Predictions | Iterable[Predictions] | Mapping[str, Tensor]
"""What an evaluation returns: one batch, several (a generator is best), or per-unit figures.

A mapping holds one tensor [units] for each name; its first name is the headline metric, and
`"loss"`, where present, the continuous measure by which formats are told apart.
"""

Evaluate = Callable[[nn.Module], Evaluation]
"""Walks the same data in the same order at every call; called without gradients, in eval mode."""


PITCH = "within 25 cents"
CHARACTERS = "character error rate"
PHONEMES = "phoneme error rate"
SHARES = frozenset({"accuracy", "agreement", PITCH, CHARACTERS, PHONEMES})
"""Metrics that are shares of a whole."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Generation with a cache against the full pass of the same quantized model.

    `divergence` is the mean KL(full || cached) in nats, `agreement` the share of positions with
    the same most likely token, over `tokens` positions fed one by one.
    """

    divergence: float
    agreement: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An evaluation with its headline metric and its words.

    `metric`: "accuracy", "perplexity", "agreement" (with the unquantized model, where there are no
    targets), or the name of what the predictions' `marks` hold; an evaluation that returns a
    mapping names its own. One of `SHARES` is shown in percent.
    `unit`: what one independent observation is called. `units`: how many there are, if known
    beforehand. `about`: one line on the data. `causal`: each position sees only earlier ones, so
    the product of probabilities and values is also measured unquantized. `generation`: checks
    generation with a cache against the full pass (None: the model keeps no cache). `notes`:
    sentences for the report.
    """

    evaluate: Evaluate
    metric: str = "accuracy"
    unit: str = "example"
    units: int | None = None
    about: str = ""
    causal: bool = False
    generation: Callable[[nn.Module], Generation | None] | None = None
    notes: tuple[str, ...] = ()
