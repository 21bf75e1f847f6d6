"""Formats module by module, as a policy."""

from collections.abc import Iterator, Mapping
from glob import escape

from torch import nn

from microscale.operands import Forward, Matmul, Operand, Settings
from microscale.policy import Policy

Formats = tuple[Operand | None, Operand | None]
"""Of the weights of a module, and of its activations; None leaves them in the wider type."""


def mixture(model: nn.Module, usual: Formats, chosen: Mapping[str, Formats]) -> Policy:
    """The policy that gives the modules named in `chosen` their formats, and others the usual ones.

    A module inside another has its own formats, or the usual ones. Overrides that say nothing new
    are left out.
    """
    weight, activation = usual
    return Policy(
        forward=Forward(input=activation, weight=weight),
        matmul=Matmul(left=activation, right=activation),
        storage=weight,
        overrides=tuple(_overrides(model, usual, chosen)),
    )


def _overrides(
    model: nn.Module, usual: Formats, chosen: Mapping[str, Formats]
) -> Iterator[tuple[str, Settings]]:
    reigning: dict[str, Formats] = {}
    for name, _ in model.named_modules():
        wanted = chosen.get(name, usual)
        # Parents come before what is inside them, so the nearest override is the one that holds.
        holds = next((reigning[parent] for parent in _inside(name) if parent in reigning), usual)
        if _differ(wanted, holds):
            reigning[name] = wanted
            yield escape(name), _settings(wanted)


def _differ(formats: Formats, others: Formats) -> bool:
    """Whether they are not the very same objects: equal ones may be told apart by a watcher."""
    return any(one is not other for one, other in zip(formats, others, strict=True))


def _inside(name: str) -> Iterator[str]:
    """The names of the modules that a module is inside of, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _settings(formats: Formats) -> Settings:
    weight, activation = formats
    return (
        ("forward.input", activation),
        ("forward.weight", weight),
        ("matmul.left", activation),
        ("matmul.right", activation),
        ("storage", weight),
    )
