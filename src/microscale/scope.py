"""Products written as operators: a scope around one module's own forward.

`torch.matmul`, `@`, `F.linear` and the like in the forward of a user's module are seen by a
`TorchFunctionMode` that is entered around that forward and left after it, so nothing of PyTorch is
replaced and code outside of converted models never meets it. `scoped(cls)` makes the subclass whose
forward enters the mode; an instance's class is swapped for it. A module inside another has a scope
of its own, which answers first; what it deals with, the outer ones do not see.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from microscale.errors import MicroscaleError
from microscale.functional.attention import scaled_dot_product_attention
from microscale.functional.conv import conv1d, conv2d
from microscale.functional.embedding import embedding
from microscale.functional.linear import linear, matmul
from microscale.functional.multihead import Projections, multi_head_attention
from microscale.functional.product import cast_pair, plain
from microscale.ledger import skip
from microscale.nn.site import ATTRIBUTE, Site
from microscale.products import PRODUCTS

Handler = Callable[..., Any]

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
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        if foreign := _foreign(types):
            # Such a tensor is not what its data says, so it must be asked.
            skip(self.site.name, func, f"{foreign} has its own way with PyTorch's functions")
            return func(*args, **kwargs)
        handler = None if self.site.reason else _HANDLERS.get(func)
        if handler is None:
            return self.leave(func, *args, **kwargs)
        return handler(self, func, *args, **kwargs)

    def leave(self, func: Any, *args: Any, reason: str = "", **kwargs: Any) -> Any:
        """Run a product as PyTorch does, and note why."""
        skip(self.site.name, func, reason or self.site.reason)
        with plain():
            return func(*args, **kwargs)


def _foreign(types: Sequence[type]) -> str:
    """The name of a tensor class that overrides PyTorch's functions, or ""."""
    if torch.compiler.is_compiling():
        return ""
    return next((kind.__name__ for kind in types if _override(kind) not in _USUAL), "")


def _override(kind: type) -> object:
    function = getattr(kind, "__torch_function__", None)
    return getattr(function, "__func__", function)


_USUAL = _override(Tensor), _override(nn.Parameter)


def _two(*names: str) -> Handler:
    """Handle a product of two operands, the second of which may be given by one of these names."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
        left, right, *rest = _leading(args, kwargs, ("input",), names)
        site, product = scope.site, PRODUCTS[func]
        with plain():
            pair = cast_pair(left, right, policy=site.policy, name=site.name, product=product)
            return func(*pair, *rest, **kwargs)

    return handle


def _three(*names: str) -> Handler:
    """Handle a product of two operands that is added to a first argument."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
        added, left, right, *rest = _leading(args, kwargs, ("input",), names[:1], names[1:])
        site, product = scope.site, PRODUCTS[func]
        with plain():
            pair = cast_pair(left, right, policy=site.policy, name=site.name, product=product)
            return func(added, *pair, *rest, **kwargs)

    return handle


def _leading(args: Sequence[Any], kwargs: dict[str, Any], *parameters: Sequence[str]) -> list[Any]:
    """Return the arguments by position, first those of `parameters` that were given by name."""
    found = list(args)
    for names in parameters[len(found) :]:
        found += [kwargs.pop(name) for name in names if name in kwargs]
    return found


def _reflected(scope: Scope, func: Any, right: Tensor, left: Tensor) -> Tensor:  # noqa: ARG001
    return matmul(left, right, policy=scope.site.policy, name=scope.site.name)


def _same(function: Callable[..., Tensor]) -> Handler:
    """Handle a function of torch by the one of the same arguments here."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        return function(*args, **kwargs, policy=scope.site.policy, name=scope.site.name)

    return handle


def _embedding(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
    max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
    if max_norm is not None:
        return scope.leave(func, *args, reason="max_norm rescales the table", **kwargs)
    return _same(embedding)(scope, func, *args, **kwargs)


def _multi_head_attention(  # noqa: PLR0913, PLR0917  (the signature of torch)
    scope: Scope,
    func: Any,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    average_attn_weights: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Handle `F.multi_head_attention_forward`, which subclasses of its module end up in."""
    separate = q_proj_weight, k_proj_weight, v_proj_weight
    weight: Any = separate if use_separate_proj_weight else in_proj_weight
    policy, name = scope.site.policy, scope.site.name
    heads, probabilities = multi_head_attention(
        query,
        key,
        value,
        Projections(num_heads, weight, in_proj_bias, bias_k, bias_v, add_zero_attn),
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p if training else 0.0,
        policy=policy,
        name=name,
    )
    output = linear(heads, out_proj_weight, out_proj_bias, policy=policy, name=name)
    if not need_weights:
        return output, None
    return output, probabilities.mean(-3) if average_attn_weights else probabilities


_HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _two("other")),
    **dict.fromkeys((torch.linalg.matmul,), _two("other")),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _two("mat2")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, Tensor.addmm_), _three("mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_), _three("batch1", "batch2")),
    Tensor.__rmatmul__: _reflected,
    torch.conv1d: _same(conv1d),
    torch.conv2d: _same(conv2d),
    F.linear: _same(linear),
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _same(scaled_dot_product_attention),
    F.multi_head_attention_forward: _multi_head_attention,
}


FUSED_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoder: "use_nested_tensor",
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
}
"""Attributes of PyTorch's modules that allow a fused path around the modules inside.

In a scope they read 0 whatever the instance holds, so that reverting has nothing to restore. (In
eager mode an active scope blocks these paths by itself; in compiled code it does not.)
"""


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
    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not _COMPILES:
            raise MicroscaleError(
                f"torch.compile of a converted model needs torch 2.10 or later, this is "
                f"{torch.__version__}: its fused paths would go around the casts."
            )
        with self.__dict__[ATTRIBUTE]:
            return cls.forward(self, *args, **kwargs)

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
