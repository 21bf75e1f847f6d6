"""`prepare` and `settle`: what a converted model learns besides its weights, and its end.

convert(model, "int8-channel/int8-tensor")
prepare(model, learn="ranges")      # parameters of the model like any other
...                                 # any training loop
settle(model)                       # scales fixed, weights packed: ready for `save`
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from microscale.cast import cast
from microscale.checkpoint.state import joined
from microscale.conversion import Conversion
from microscale.convert import convert
from microscale.errors import MicroscaleError, near_names
from microscale.ledger import text_table
from microscale.nn.site import ATTRIBUTE, LEARNED
from microscale.operands import PATHS, Operand
from microscale.policy import Policy
from microscale.recipes.learned import LearnedRange, count_scales, unlearnable
from microscale.recipes.packing import Places
from microscale.rounding import Gradient
from microscale.scope import Scope, site_of
from microscale.survey import weights as weights_of
from microscale.tensor import BlockTensor
from microscale.weights import OwnCast

Learn = Literal["off", "ranges", "exponents"]
LEARNS: tuple[Learn, ...] = ("off", "ranges", "exponents")
WEIGHT, INPUT = LEARNED


@dataclass(frozen=True, slots=True)
class Clipped:
    """Casts as the operand says, with no gradient where that saturates."""

    operand: Operand

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        """The values."""
        operand = self.operand
        clipped = Gradient.CLIPPED.value
        values: Tensor = cast(x, operand.format, axis, gradient=clipped, **operand.laws)
        return values


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a model learns besides its weights; `str()` is a table of it.

    `learned`: the operands ("fc.weight", "input of fc") whose ranges are learned, with their
    formats. `followed`: those whose scales follow their values, with the reason.
    """

    learn: Learn
    gradient: str
    learned: dict[str, str]
    followed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table and sentences."""
        lines = [text_table([("range of", "format"), *self.learned.items()])]
        lines += [f"Follows its values: {n}: {why}." for n, why in self.followed.items()]
        return "\n".join(lines)


def prepare(model: nn.Module, *, learn: Learn = "off", gradient: str = "identity") -> Preparation:
    """Give a converted model ranges to learn, and choose the gradient of its other casts.

    Learned are the scales of weights of linear layers and convolutions, and those of inputs of
    layers with one scale for the tensor, where scales are float32 numbers (INT8, INT4, FP8 with
    blocks "tensor", "channel" and the like). They are parameters of the layers, so optimizers,
    `state_dict` and `.to` know them; they begin with the first values that are cast.

    Args:
        model: that `convert` has changed; changed in place.
        learn: "off", "ranges", or "exponents" for ranges and the exponent bits of floats.
        gradient: of the casts whose ranges are not learned, as in `cast`: "identity" or "clipped".

    Raises:
        MicroscaleError: a model that is not converted or prepared already, unknown words, and
            nothing that could be learned. The model is then as it was.
    """
    check_words(learn, gradient)
    modules = [(name, module) for name, module in model.named_modules() if site_of(module)]
    if not modules:
        raise MicroscaleError("the model is not converted; call microscale.convert on it first.")
    if any(_is_prepared(module) for _, module in modules):
        raise MicroscaleError("the model is prepared already; settle it, or convert it anew.")
    ranges, followed = _ranges(model, learn) if learn != "off" else ({}, {})
    if learn == "exponents" and all(one.mantissa is None for one in ranges.values()):
        ranges = {}
    if learn != "off" and not ranges:
        reasons = "; ".join(sorted(set(followed.values()))) or "it has no such layers"
        raise MicroscaleError(
            f"learn={learn!r}: no operand of the model has what is to be learned ({reasons}). "
            "Formats with real-valued scales have ranges (int8-channel/int8-tensor), and floats "
            "among them exponents (fp8_e4m3-tensor)."
        )
    for name, module in modules:
        _install(module, ranges.get((name, WEIGHT)), ranges.get((name, INPUT)), gradient)
    learned = {one.name: str(one.operand) for one in ranges.values()}
    return Preparation(learn, gradient, learned, followed)


def settle(model: nn.Module) -> Conversion:
    """End what `prepare` began, in place: scales settled, weights with learned scales packed.

    Ranges of what was never used follow their values again. A model that was not prepared is left
    as it is. `save` then stores the values that the model has now.

    Returns:
        What `convert` says of the model with its final formats.

    Raises:
        MicroscaleError: a model that is not converted.
    """
    sites = {name: site for name, x in model.named_modules() if (site := site_of(x)) is not None}
    if not sites:
        raise MicroscaleError("the model is not converted; call microscale.convert on it first.")
    places, policies = Places(model), {}
    for name, site in sites.items():
        if site.reason:
            continue
        module = model.get_submodule(name)
        policies[name] = _settled(module, site.policy)
        ranged = getattr(module, WEIGHT, None)
        if ranged is not None and bool(ranged.started):
            _pack(places, f"{name}.weight" if name else "weight", ranged)
    ignored = tuple(name for name, site in sites.items() if site.reason)
    return convert(model, joined(policies, ignored), verbose=False)


def range_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of learned ranges, for an optimizer (or a learning rate) of their own."""
    return [p for one in ranges_of(model).values() for p in one.parameters()]


def ranges_of(model: nn.Module) -> dict[str, LearnedRange]:
    """The learned ranges of a model by their places."""
    return {n: module for n, module in model.named_modules() if isinstance(module, LearnedRange)}


def check_words(learn: str, gradient: str) -> None:
    """Refuse words that `prepare` does not know."""
    if learn not in LEARNS:
        raise MicroscaleError(f"learn={learn!r} is not known.{near_names(learn, LEARNS)}")
    Gradient(gradient)


def _is_prepared(module: nn.Module) -> bool:
    site = site_of(module)
    assert site is not None
    return any(isinstance(site.policy.setting(path), OwnCast) for path in PATHS)


# ---------------------------------------------------------------- what is learned

Ranges = dict[tuple[str, str], LearnedRange]


def _ranges(model: nn.Module, learn: Learn) -> tuple[Ranges, dict[str, str]]:
    """The ranges by module and place, and the operands that have none with the reason."""
    places = Places(model)
    made: Ranges = {}
    followed: dict[str, str] = {}
    for name, module in model.named_modules():
        site = site_of(module)
        tables = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if site is None or site.reason:
            continue
        weights = [weight for weight in weights_of(module, site.policy) if weight.operand]
        for weight in weights:
            path = f"{name}.{weight.name}" if name else weight.name
            operand = weight.operand
            assert operand is not None
            reason = _why_not(module, operand, places, path, learn)
            if reason:
                followed[path] = reason
                continue
            axis = places.axis(path)
            assert axis is not None
            made[name, WEIGHT] = _range(path, operand, weight.parameter, axis, learn)
        if weights and not tables and site.policy.forward.input is not None:
            label = f"input of {name or 'the model'}"
            reason = _why_not_input(site.policy.forward.input, learn)
            if reason:
                followed[label] = reason
            else:
                made[name, INPUT] = LearnedRange(
                    label,
                    site.policy.forward.input,
                    1,
                    weight=False,
                    exponents=_has_exponents(site.policy.forward.input, learn),
                )
    return made, followed


def _why_not(module: nn.Module, operand: Operand, places: Places, path: str, learn: Learn) -> str:
    if reason := unlearnable(operand, exponents=_has_exponents(operand, learn)):
        return reason
    hugging_face = type(module).__name__ == "Conv1D"
    if not (isinstance(module, (nn.Linear, _ConvNd)) or hugging_face):
        return f"weights of {type(module).__name__} are cast in parts"
    if path not in places.expected or places.is_shared(path):
        return "several modules use it"
    if isinstance(places.parameter(path), BlockTensor):
        return "it is packed already"
    return "" if places.axis(path) is not None else "it is not stored packed"


def _why_not_input(operand: Operand, learn: Learn) -> str:
    if operand.format.block != "tensor":
        return f"{operand.format} has more than one scale for a tensor"
    return unlearnable(operand, exponents=_has_exponents(operand, learn))


def _has_exponents(operand: Operand, learn: Learn) -> bool:
    return learn == "exponents" and not operand.format.element.is_integer


def _range(path: str, operand: Operand, weight: Tensor, axis: int, learn: Learn) -> LearnedRange:
    exponents, count = _has_exponents(operand, learn), count_scales(weight, operand, axis)
    return LearnedRange(path, operand, count, weight=True, exponents=exponents)


# ---------------------------------------------------------------- in and out of a module


def _install(
    module: nn.Module, weight: LearnedRange | None, given: LearnedRange | None, gradient: str
) -> None:
    site = site_of(module)
    assert site is not None
    for place, one in ((WEIGHT, weight), (INPUT, given)):
        if one is not None:
            device = next((p.device for p in module.parameters(recurse=False)), None)
            module.add_module(place, one.to(device))
    owned = {"forward.weight": weight, "forward.input": given}
    policy = site.policy
    for path in PATHS:
        operand = policy.setting(path)
        if not isinstance(operand, Operand) or path.startswith(("dgrad", "wgrad", "cache")):
            continue
        one = owned.get(path)
        if one is not None:
            policy = _replaced(policy, path, _own(operand, one.cast))
        elif gradient == Gradient.CLIPPED.value:
            policy = _replaced(policy, path, _own(operand, Clipped(operand)))
    changed = replace(site, policy=policy)
    held = module.__dict__[ATTRIBUTE]
    module.__dict__[ATTRIBUTE] = Scope(changed) if isinstance(held, Scope) else changed


def _own(operand: Operand, caster: Any) -> OwnCast:
    given = {field.name: getattr(operand, field.name) for field in fields(Operand)}
    return OwnCast(**given, caster=caster)


def _plain(operand: OwnCast) -> Operand:
    return Operand(**{field.name: getattr(operand, field.name) for field in fields(Operand)})


def _replaced(policy: Policy, path: str, operand: Operand) -> Policy:
    section, _, key = path.partition(".")
    inner: Any = getattr(policy, section)
    changed: Any = {section: replace(inner, **{key: operand}) if key else operand}
    return replace(policy, **changed)


def _settled(module: nn.Module, policy: Policy) -> Policy:
    """A module's policy for good."""
    for path in PATHS:
        operand = policy.setting(path)
        if not isinstance(operand, OwnCast):
            continue
        place = {"forward.weight": WEIGHT, "forward.input": INPUT}.get(path)
        one = None if place is None else getattr(module, place, None)
        plain = _plain(operand)
        if one is not None and bool(one.started):
            plain = one.settled() if place == INPUT else replace(plain, format=one.format)
        policy = _replaced(policy, path, plain)
    return policy


def _pack(places: Places, path: str, one: LearnedRange) -> None:
    axis = places.axis(path)
    assert axis is not None
    packed = one.packed(places.parameter(path).detach(), axis)
    places.put(path, nn.Parameter(packed, requires_grad=False))
