"""Which stored tensors are weights of products, found out as `convert` does, without their values.

Where transformers knows the model, it is built on the meta device, which takes no memory, and
converted: names, axes and formats are then those of `convert`. Tensors that it does not have under
their stored names (experts that are stored one by one), and models that it does not know, are
matched by names and shapes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from microscale.checkpoint.folder import Entry, Folder
from microscale.checkpoint.state import packed_weights
from microscale.convert import convert
from microscale.errors import MicroscaleError, near_names
from microscale.kernels.plan import FLOATS
from microscale.operands import Operand
from microscale.policy import Policy, covers

_TABLE = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings|position_embeddings|shared)$")
_ROUTERS = {"router", "gate"}
_EXPERTS = re.compile(r"(^|\.)experts\.\w+$")


@dataclass(frozen=True, slots=True)
class Match:
    """What becomes of one stored tensor.

    Attributes:
        operand: how it is cast, or None if it is kept as it is.
        axis: that blocks run along.
        reason: why it is kept.
        by: "model" or "names": what it was matched by.
    """

    operand: Operand | None
    axis: int = -1
    reason: str = ""
    by: str = "model"


@dataclass(frozen=True, slots=True)
class Matched:
    """What becomes of every tensor.

    Attributes:
        matches: by the name it is written under.
        sources: the names of those that are stored under another: tied weights that are packed
            in different formats.
        aliases: names of tied weights that share one that is written.
        model: the class that was built, if one was.
    """

    matches: Mapping[str, Match]
    sources: Mapping[str, str]
    aliases: Mapping[str, str]
    model: str | None


def match(folder: Folder, policy: Policy) -> Matched:
    """Match every tensor of a folder; raises MicroscaleError for policies that do not fit."""
    entries = {entry.name: entry for _, entry in folder.entries}
    model = build(folder.config)
    known: dict[str, Match] = {}
    aliases: dict[str, str] = {}
    if model is None:
        _check_patterns(policy, entries)
    else:
        known = _by_model(model, policy)
        known = {_stored_name(name, entries, model): found for name, found in known.items()}
        aliases = _aliases(model, entries)
    matches = {}
    for name, entry in entries.items():
        matches[name] = _checked(entry, known.get(name) or _by_name(entry, policy))
    apart = {name: _checked(entries[of], known[name]) for name, of in aliases.items()}
    apart = {name: m for name, m in apart.items() if _kind(m) != _kind(matches[aliases[name]])}
    sources = {name: aliases.pop(name) for name in apart}
    kind = None if model is None else type(model).__name__
    return Matched(matches | apart, sources, aliases, kind)


def _kind(found: Match) -> tuple[Operand | None, int]:
    return found.operand, found.axis if found.operand else 0


def build(config: Mapping[str, Any]) -> nn.Module | None:
    """The model that a config.json describes, without memory; None if transformers has no such.

    Code that comes with a checkpoint is never run.
    """
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or len(kinds) != 1 or not isinstance(kinds[0], str):
        return None
    try:
        import transformers
    except ImportError:
        return None
    kind = getattr(transformers, kinds[0], None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        made = kind.config_class.from_dict(plain)  # type: ignore[attr-defined]
        with torch.device("meta"):
            model: nn.Module = kind(made)
            tie = getattr(model, "tie_weights", None)
            if tie is not None:
                tie()
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise MicroscaleError(
            f"config.json: {kinds[0]} cannot be built of it: {type(error).__name__}: {text}"
        ) from error
    return model


def _by_model(model: nn.Module, policy: Policy) -> dict[str, Match]:
    """The match of every parameter and buffer of a model that is built."""
    conversion = convert(model, policy, verbose=False)
    reasons = {entry.name: entry.reason for entry in conversion.entries}
    packed = packed_weights(model)
    found = {}
    for name in model.state_dict():
        weight = packed.get(name)
        if weight is None:
            home, _, own = name.rpartition(".")
            factor = own.startswith("weight") and home in reasons
            reason = reasons.get(home) if factor else ""
            found[name] = Match(None, reason=reason or _kept(name, factor=factor))
        else:
            operand = weight.operand if weight.packable else None
            reason = "" if weight.packable else "its blocks are not those of its product"
            found[name] = Match(operand, weight.axis, reason)
    return found


def _kept(name: str, *, factor: bool) -> str:
    if factor:
        return "packed it would take no less room"
    return "a bias" if name.endswith("bias") else "no weight of a product that is packed"


def _stored_name(name: str, entries: Mapping[str, Entry], model: nn.Module) -> str:
    """A parameter's stored name: base models are saved without their prefix or with."""
    prefix = getattr(model, "base_model_prefix", "")
    if name in entries or not prefix:
        return name
    short = name.removeprefix(f"{prefix}.")
    return next((other for other in (short, f"{prefix}.{name}") if other in entries), name)


def _aliases(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Names of tied parameters that are not stored themselves, to the stored name."""
    state = model.state_dict(keep_vars=True)
    stored: dict[int, str] = {}
    for name, x in state.items():
        place = _stored_name(name, entries, model)
        if place in entries:
            stored.setdefault(id(x), place)
    found = {}
    for name, x in state.items():
        place = _stored_name(name, entries, model)
        if place not in entries and id(x) in stored:
            found[place] = stored[id(x)]
    return found


def _by_name(entry: Entry, policy: Policy) -> Match:
    """The match by name and shape alone: tables, linear and convolution weights, fused experts."""
    module, _, own = entry.name.rpartition(".")
    fused = bool(_EXPERTS.search(entry.name)) and len(entry.shape) == 3
    place = entry.name.rpartition(".experts.")[0] + ".experts" if fused else module
    if policy.ignores(place):
        return Match(None, reason="ignored by the policy", by="names")
    if not (own == "weight" or fused) or len(entry.shape) < 2:
        reason = "a bias" if own == "bias" else "no weight of a product by its name and shape"
        return Match(None, reason=reason, by="names")
    if module.rpartition(".")[2] in _ROUTERS:
        return Match(None, reason="a router", by="names")
    at = policy.at(place)
    operand = at.storage if _TABLE.search(module) else at.forward.weight
    if fused and operand and (operand.format.block == "tensor" or operand.format.tensor_scale):
        return Match(None, reason="its blocks are not those of its product", by="names")
    return Match(operand, 2 if fused else 1, by="names")


def _checked(entry: Entry, found: Match) -> Match:
    """A match as the stored tensor allows it: its type, and what it would take packed."""
    if found.operand is None:
        return found if found.reason else replace(found, reason="not quantized by the policy")
    if entry.dtype not in FLOATS:
        return replace(found, operand=None, reason=f"stored as {entry.tag}, no float to cast")
    if found.operand.format.storage_bits(entry.shape, found.axis) >= 8 * entry.nbytes:
        return replace(found, operand=None, reason="packed it would take no less room")
    if found.operand.laws.get("rounding") == "stochastic":
        raise MicroscaleError(
            f"{entry.name!r} is to be rounded stochastically, which would differ when a run goes "
            "on after a stop; use rounding even."
        )
    return replace(found, axis=found.axis % len(entry.shape))


def _check_patterns(policy: Policy, entries: Mapping[str, Entry]) -> None:
    modules = {name for entry in entries for name in _outer(entry)}
    for pattern in (*policy.ignore, *(pattern for pattern, _ in policy.overrides)):
        if not any(covers(pattern, name) for name in modules):
            raise MicroscaleError(
                f"policy has the pattern {pattern!r}, which matches no module of the checkpoint."
                f"{near_names(pattern, sorted(modules)[:20])}"
            )


def _outer(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    yield from (".".join(parts[: n + 1]) for n in range(len(parts)))
