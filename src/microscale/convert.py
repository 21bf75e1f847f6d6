"""`convert` makes a model's products run on cast operands, in place; `revert` undoes it.

Modules of exactly the classes in `survey.SWAPS` become the subclass of the same name in
`microscale.nn`. Every other module with a forward of its own gets a scope, in which products that
are written as operators are seen (`microscale.scope`). Nothing of PyTorch is replaced, and a module
keeps its parameters, hooks, name and state dict.
"""

import sys
from collections import Counter
from dataclasses import replace
from glob import escape

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from microscale.conversion import Conversion
from microscale.errors import MicroscaleError, near_names
from microscale.nn.site import ATTRIBUTE, LEARNED
from microscale.operands import PATHS, Operand
from microscale.policy import Policy, covers
from microscale.rotation import rotated, tied_to_others
from microscale.scope import Scope, site_of
from microscale.survey import SWAPS, Finding, examine, stored_bits, weights
from microscale.tensor import BlockTensor
from microscale.weights import cast_operand, forget


def convert(model: nn.Module, policy: Policy | str, *, verbose: bool = True) -> Conversion:
    """Make the products of `model` run on operands cast as `policy` says, in place.

    A converted model can be called, trained, copied, saved, loaded and compiled as before; its
    state dict is that of the original. One that is converted already is reverted first. Cast
    weights are kept until the weights change; `microscale.weights` says what counts as a change.

    Args:
        model: any module.
        policy: or its spelling, such as "mxfp8_e4m3", "mxfp4/mxfp6_e2m3" (weight/activation) or
            "paper:mxfp4" (a profile's).
        verbose: print the report.

    Returns:
        What was converted and what was left, and why.

    Raises:
        MicroscaleError: a policy that cannot be carried out, with a pattern that matches no
            module, before anything is changed.
    """
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    if not isinstance(policy, Policy):
        raise MicroscaleError(f"policy is a {type(policy).__name__}; give a Policy or a spelling.")
    _check_model(model)
    names = [name for name, _ in model.named_modules()]
    _check_patterns(policy, names)
    _check_operands(policy)
    revert(model)
    policy = _sparing_tables(model, policy)
    findings = [examine(name, module, policy) for name, module in model.named_modules()]
    found = [finding for finding in findings if finding is not None]
    conversion = _report(model, policy, found)
    for finding in found:
        _swap(finding)
    if verbose:
        print(conversion)  # noqa: T201  (the report is what this verb says)
    return conversion


def revert(model: nn.Module) -> None:
    """Undo `convert` in place: every module gets its class back. Raises MicroscaleError."""
    _check_model(model)
    for module in model.modules():
        site = site_of(module)
        if site is not None:
            _turn_back(module, site.policy)
            module.__class__ = site.original
            del module.__dict__[ATTRIBUTE]
            for name in LEARNED:
                module._modules.pop(name, None)  # noqa: SLF001  (delattr refuses what is not there)
    forget(model.parameters())


def _sparing_tables(model: nn.Module, policy: Policy) -> Policy:
    """The policy with no rotation of layers whose weight is looked up, too: it is one weight."""
    if not policy.rotates:
        return policy
    tied = tuple((escape(name), (("rotation", "off"),)) for name in tied_to_others(model))
    return replace(policy, overrides=(*policy.overrides, *tied))


def _turn_back(module: nn.Module, policy: Policy) -> None:
    """Decode the weights that are stored turned: nothing turns inputs any more."""
    for weight in weights(module, policy):
        if weight.rotation and isinstance(weight.parameter, BlockTensor):
            values = rotated(weight.parameter.dequantize(), weight.rotation, weight.axis)
            setattr(module, weight.name, nn.Parameter(values, requires_grad=False))


def _swap(finding: Finding) -> None:
    if finding.target is None:
        return
    swapped = finding.target is SWAPS.get(type(finding.module))
    held = finding.site if swapped else Scope(finding.site)
    finding.module.__dict__[ATTRIBUTE] = held
    finding.module.__class__ = finding.target


def _report(model: nn.Module, policy: Policy, found: list[Finding]) -> Conversion:
    quantized: dict[int, tuple[int, int]] = {}
    for finding in found:
        if finding.entry is None or finding.entry.status == "left":
            continue
        for weight in weights(finding.module, finding.site.policy):
            # A tied weight is stored once, in the wider of its formats.
            _, bits = quantized.get(id(weight.parameter), (0, 0))
            quantized[id(weight.parameter)] = weight.parameter.numel(), max(bits, weight.bits)
    held = (t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t))
    rest = {id(t): stored_bits(t) for t in held if id(t) not in quantized}
    weight_bits = sum(bits for _, bits in quantized.values())
    written = (f for f in found if f.entry is None and f.multiplies and not f.site.reason)
    scopes = (type(f.module).__name__ for f in written)
    return Conversion(
        policy,
        tuple(f.entry for f in found if f.entry is not None),
        dict(Counter(scopes)),
        sum(count for count, _ in quantized.values()),
        weight_bits,
        weight_bits + sum(rest.values()),
    )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise MicroscaleError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        raise MicroscaleError(
            "model was made by torch.compile; convert the model that was given to it, then "
            "compile that."
        )


def _check_patterns(policy: Policy, names: list[str]) -> None:
    patterns = [("ignore", pattern) for pattern in policy.ignore]
    patterns += [("overrides", pattern) for pattern, _ in policy.overrides]
    for place, pattern in patterns:
        if not any(covers(pattern, name) for name in names):
            # Large models have thousands of names; what was meant has about as many letters.
            alike = sorted(names[1:] or ["*"], key=lambda name: abs(len(name) - len(pattern)))
            raise MicroscaleError(
                f"policy {place} has the pattern {pattern!r}, which matches no module of the "
                f"model.{near_names(pattern, alike[:20])}"
            )


def _check_operands(policy: Policy) -> None:
    """Refuse casts that `cast` refuses."""
    settings = [(path, policy.setting(path)) for path in PATHS]
    for pattern, overridden in policy.overrides:
        settings += [(f"overrides.{pattern!r}.{path}", setting) for path, setting in overridden]
    for path, setting in settings:
        if isinstance(setting, Operand):
            try:
                cast_operand(torch.zeros(2, 2), setting, -1)
            except MicroscaleError as error:
                raise MicroscaleError(f"policy {path}: {error}") from error
