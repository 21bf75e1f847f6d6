"""Products written as operators: a scope around one module's own forward.

`torch.matmul`, `@`, `F.linear` and the like in the forward of a user's module are seen by a
`TorchFunctionMode` that is entered around that forward and left after it, so nothing of PyTorch is
replaced and code outside of converted models never meets it. `scoped(cls)` makes the subclass whose
forward enters the mode; an instance's class is swapped for it. A module inside another has a scope
of its own, which answers first; what it deals with, the outer ones do not see.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from microscale.errors import MicroscaleError
from microscale.functional.product import plain
from microscale.functional.vector import deliver
from microscale.handlers import GATHERS, HANDLERS, gather, vector_operation
from microscale.ledger import skip
from microscale.nn.site import ATTRIBUTE, Site
from microscale.products import PRODUCTS, VECTOR
from microscale.tensor import BlockTensor
from microscale.weights import mark_weight

_COMPILES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
"""Whether this torch traces scopes without losing products (docs/log.md has what was tried)."""


class Scope(TorchFunctionMode):
    """Quantizes the products that one module's forward calls, as its site says."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass vector operations on, products to their handlers."""
        kwargs = kwargs or {}
        if self.site.rounds and func in VECTOR and not _foreign(types):
            return vector_operation(self.site, func, args, kwargs)
        if func in GATHERS:
            return gather(func, args, kwargs)
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        if foreign := _foreign(types):
            # Such a tensor is not what its data says, so it must be asked.
            skip(self.site.name, func, f"{foreign} has its own way with PyTorch's functions")
            return func(*args, **kwargs)
        handler = None if self.site.reason else HANDLERS.get(func)
        if handler is None:
            return self.leave(func, *args, **kwargs)
        return handler(self, func, *args, **kwargs)

    def leave(self, func: Any, *args: Any, reason: str = "", **kwargs: Any) -> Any:
        """Run a product as PyTorch does, and note why."""
        skip(self.site.name, func, reason or self.site.reason)
        with plain():
            return func(*args, **kwargs)

    def delivered(self, result: Any) -> Any:
        """Round what a module that is one vector operation gives, if that is wanted."""
        if self.site.reason or not isinstance(result, Tensor):
            return result
        return deliver(result, self.site.policy)


COMPOSED = ("Norm", "Activation")
"""Modules of models whose names hold one of these are vector operations, however they are written:
their results are rounded where a policy says so."""


def _foreign(types: Sequence[type]) -> str:
    """The name of a tensor class that overrides PyTorch's functions, or ""."""
    if torch.compiler.is_compiling():
        return ""
    return next((kind.__name__ for kind in types if _override(kind) not in _USUAL), "")


def _override(kind: type) -> object:
    function = getattr(kind, "__torch_function__", None)
    return getattr(function, "__func__", function)


_USUAL = tuple(map(_override, (Tensor, nn.Parameter, BlockTensor)))


FUSED_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoder: "use_nested_tensor",
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
}
"""Attributes of PyTorch's modules that allow a fused path around the modules inside.

In a scope they read 0 whatever the instance holds, so that reverting has nothing to restore. (In
eager mode an active scope blocks these paths by itself; in compiled code it does not.)
"""


def _check_compiles() -> None:
    if not _COMPILES:
        raise MicroscaleError(
            f"torch.compile of a converted model needs torch 2.10 or later, this is "
            f"{torch.__version__}: its fused paths would go around the casts."
        )


def scoped(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `cls` whose forward runs in the scope of the instance.

    It goes by the name of `cls`, and pickles as `cls` with a note to put the scope back. Raises
    TypeError for a class that refuses to be subclassed.
    """
    if cls not in _SCOPED:
        _SCOPED[cls] = _subclass(cls)
    return _SCOPED[cls]


_SCOPED: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    composed = not cls.__module__.startswith("torch.") and any(n in cls.__name__ for n in COMPOSED)

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope: Scope = self.__dict__[ATTRIBUTE]
        if torch.compiler.is_compiling():
            _check_compiles()
            _check_visible(self)
        else:
            _mark_stand_ins(self)
        with scope:
            result = cls.forward(self, *args, **kwargs)
        return scope.delivered(result) if composed else result

    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        parts: Any = cls.__reduce_ex__(self, protocol)
        function, args, *state = parts
        args = tuple(cls if arg is type(self) else arg for arg in args)
        return _rebuild, (function, args), *state

    names = {"forward": forward, "__reduce_ex__": reduce_ex, "__doc__": cls.__doc__}
    names |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    for kind, switch in FUSED_SWITCHES.items():
        if issubclass(cls, kind):
            names[switch] = property(lambda _: 0)
    make: Any = type(cls)
    made: type[nn.Module] = make(cls.__name__, (cls,), names)
    return made


def _check_visible(module: nn.Module) -> None:
    """Refuse experts of transformers that compiled code would run around the scope."""
    way = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if way == "grouped_mm" and hasattr(module, "is_transposed"):
        raise MicroscaleError(
            "torch.compile hides grouped_mm from the casts; before compiling, call "
            "model.set_experts_implementation('batched_mm')."
        )


def _mark_stand_ins(module: nn.Module) -> None:
    """Have what `torch.func.functional_call` puts in the place of parameters count as weights."""
    held: Iterable[Tensor | None] = module._parameters.values()  # noqa: SLF001
    for parameter in held:
        if parameter is not None and not isinstance(parameter, nn.Parameter):
            mark_weight(parameter)


def _rebuild(function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = function(*args)
    module.__class__ = scoped(type(module))
    return module


def site_of(module: nn.Module) -> Site | None:
    """Return what `convert` left in a module, or None if it was not converted."""
    held = module.__dict__.get(ATTRIBUTE)
    if isinstance(held, Scope):
        return held.site
    return held if isinstance(held, Site) else None
