"""What a converted module remembers: its name, its policy and what it was."""

from dataclasses import dataclass

from torch import nn

from microscale.policy import Policy

ATTRIBUTE = "microscale"
"""Where a converted module keeps its site (or its scope, which has one)."""

LEARNED = ("microscale_weight_range", "microscale_input_range")
"""Where a module that is finetuned keeps the ranges that are learned (`recipes.learned`)."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model.

    Attributes:
        name: the module's qualified name when it was converted.
        policy: of this module, without overrides.
        original: the class to go back to.
        reason: why products here are left in the wider type, or "".
        rounds: whether any module of the model rounds what vector operations deliver.
    """

    name: str
    policy: Policy
    original: type[nn.Module]
    reason: str = ""
    rounds: bool = False
