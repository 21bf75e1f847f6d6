"""What a converted model is stored as: which weights are packed how, and its policy."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from microscale.operands import SETTINGS
from microscale.policy import Policy
from microscale.scope import site_of
from microscale.survey import Weight, weights


def packed_weights(model: nn.Module) -> dict[str, Weight]:
    """The weights of a converted model that its products cast, by their names in its state dict.

    A weight that would take more room packed than as it is stays as it is: depthwise kernels,
    whose blocks of one are padded to whole blocks.
    """
    found: dict[str, Weight] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        site = site_of(module)
        if site is None or site.reason:
            continue
        for weight in weights(module, site.policy):
            if weight.operand is not None and weight.bits < weight.parameter.nbytes * 8:
                found[f"{prefix}.{weight.name}" if prefix else weight.name] = weight
    return found


def policy_of(model: nn.Module) -> Policy | None:
    """One policy that converts `model`, or one built like it, as it was; None if it was not.

    Modules remember their own policies; where these differ, overrides name the modules.
    """
    sites = {name: site for name, x in model.named_modules() if (site := site_of(x)) is not None}
    if not sites:
        return None
    kept = {name: site.policy for name, site in sites.items() if not site.reason}
    return joined(kept, tuple(name for name, site in sites.items() if site.reason))


def joined(kept: Mapping[str, Policy], ignore: tuple[str, ...]) -> Policy:
    """One policy of those of single modules by name, outer modules first."""
    base = next(iter(kept.values()), Policy())
    if all(policy == base for policy in kept.values()):
        return replace(base, ignore=ignore)
    # Of several overrides that cover a module the last one wins, so that of the innermost.
    overrides = tuple(
        (n, tuple((p, policy.setting(p)) for p in SETTINGS)) for n, policy in kept.items()
    )
    return replace(base, ignore=ignore, overrides=overrides)
