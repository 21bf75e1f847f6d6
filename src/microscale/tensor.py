"""`BlockTensor`: a tensor stored as packed codes and shared scales, and the verbs that make it.

Products of matrices on the CPU read it as it is stored; all other products decode it first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microscale.cast import result_dtype, to_tensor
from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat
from microscale.kernels.native import casts as native
from microscale.kernels.plan import check_axis, plan
from microscale.kernels.storage import PARTS, Layout
from microscale.ops import straight
from microscale.packed import Packed
from microscale.packed_ops import dispatch, quick_linear
from microscale.rounding import make_options
from microscale.seed import Seed, seed_tensor
from microscale.spelling import get_block_format


class BlockTensor(Packed):
    """A tensor whose values are stored packed in a block format: codes and shared scales.

    Attributes: `codes`, `scales`, `tensor_scale`, `zero_point`, `format`, `axis` (see `Packed`);
    `shape` and `dtype` are those of the values it stands for. It goes wherever a weight goes: into
    torch.nn.functional.linear and the matrix products, nn.Parameter, state_dict, torch.save and
    torch.load(weights_only=True). What it does not support it refuses by name.
    """

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, torch.dtype]]:
        """Name the parts, for torch.compile."""
        return list(PARTS), (self.packing, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor],
        context: tuple[Layout, torch.dtype],
        shape: Sequence[int],
        stride: Sequence[int],
    ) -> "BlockTensor":
        """Rebuild from the parts, for torch.compile."""
        codes, scales, tensor_scale, zero_point = (parts[name] for name in PARTS)
        stored = (codes, scales, tensor_scale, zero_point)
        return BlockTensor(stored, context[0], shape, context[1])

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for PyTorch's cache of compiled graphs."""
        return f"{self.packing.spelled} {self.dtype} {tuple(self.shape)}"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickle the parts and the spelling, which torch.load(weights_only=True) accepts."""
        is_parameter = isinstance(self, torch.nn.Parameter)
        record = (*self.packing.spelled, tuple(self.shape), self.dtype)
        return rebuild, (*self.stored, record, self.requires_grad, is_parameter)

    def __deepcopy__(self, memo: dict[int, object]) -> "BlockTensor":
        """Copy the parts; a parameter stays one."""
        function, arguments = self.__reduce_ex__(4)
        parts = (part.clone() for part in arguments[: len(PARTS)])
        copied: BlockTensor = function(*parts, *arguments[len(PARTS) :])
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do a linear layer at once if nothing watches; all else is seen below autograd."""
        if func is torch.nn.functional.linear:
            result = quick_linear(*args, **(kwargs or {}))
            if result is not None:
                return result
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run an operator on the parts, decode for a product, or refuse by name."""
        return dispatch(func, args, kwargs or {})


def rebuild(  # noqa: PLR0917  (pickled arguments have no names)
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    zero_point: Tensor,
    record: tuple[str, int, torch.dtype, Sequence[int], torch.dtype],
    requires_grad: bool,
    is_parameter: bool,
) -> BlockTensor:
    """Make a BlockTensor again from what `__reduce_ex__` gave."""
    spelling, axis, compute, shape, dtype = record
    layout = Layout(get_block_format(spelling), axis, compute)
    tensor = BlockTensor((codes, scales, tensor_scale, zero_point), layout, shape, dtype)
    if is_parameter:
        parameter: Any = torch.nn.Parameter(tensor, requires_grad)
        return parameter  # type: ignore[no-any-return]
    tensor.requires_grad_(requires_grad)
    return tensor


torch.serialization.add_safe_globals([rebuild])


def quantize(
    x: Any,
    fmt: str | BlockFormat,
    axis: int = -1,
    *,
    rounding: str = "even",
    overflow: str = "saturate",
    nonfinite: str = "block",
    flush_subnormals: str = "off",
    prerounding: str = "off",
    seed: Seed = None,
) -> BlockTensor:
    """Cast `x` and keep codes and scales, truly packed. The arguments are those of `cast`.

    Returns a BlockTensor of x's shape and dtype, without a gradient;
    `dequantize(quantize(x, ...)) == cast(x, ...)` bit for bit. Raises MicroscaleError.
    """
    laws = (rounding, overflow, nonfinite, flush_subnormals, prerounding)
    values = x.detach() if type(x) is torch.nn.Parameter or type(x) is Tensor else x
    if straight(values):
        spelling = fmt if isinstance(fmt, str) else get_block_format(fmt).name
        found = native.served(spelling, *laws)
        if found is not None and native.packs(values):
            key = None if seed is None and found.seedless else seed_tensor(seed, rounding)
            at = check_axis(axis, values.dim())
            layout = Layout(found.format, at, torch.float32)
            stored = native.quantize(values, found, at, key)
            return BlockTensor(stored, layout, values.shape, values.dtype)
    tensor = to_tensor(x)
    options = make_options(*laws)
    checked = plan(tensor, fmt, axis, options)
    spelled = (str(checked.format), checked.axis, str(options))
    key = seed_tensor(seed, rounding)
    stored = torch.ops.microscale.quantize(tensor.detach(), *spelled, key)
    return BlockTensor(stored, Layout.of(checked, tensor.dtype), tensor.shape, tensor.dtype)


def quantize_both(
    x: Any,
    fmt: str | BlockFormat,
    axes: tuple[int, int] = (-1, -2),
    *,
    rounding: str = "even",
    overflow: str = "saturate",
    nonfinite: str = "block",
    flush_subnormals: str = "off",
    prerounding: str = "off",
    seed: Seed = None,
) -> tuple[BlockTensor, BlockTensor]:
    """Quantize `x` along each of two axes: row-wise and column-wise blocks of one matrix.

    Training needs both: the forward product reduces along one axis, that of the gradient along the
    other. Each result equals `quantize` along that axis bit for bit; stochastic rounding draws one
    seed for both, so each value meets the same random word twice. On the CPU the compiled core
    reads `x` once if the axes are neighbours (twice with a tensor scale, whose amax comes first).

    Raises MicroscaleError as `quantize` does, and for axes that are not two different ones.
    """
    laws = (rounding, overflow, nonfinite, flush_subnormals, prerounding)
    tensor = to_tensor(x)
    first, second = _two_axes(axes, tensor.dim())
    key = seed_tensor(seed, rounding)
    values = tensor.detach()
    if straight(values):
        found = native.served(str(get_block_format(fmt)), *laws)
        if found is not None and native.packs(values):
            both = native.quantize_both(values, found, (first, second), key)
            a, b = (
                BlockTensor(
                    stored, Layout(found.format, at, torch.float32), values.shape, values.dtype
                )
                for stored, at in zip(both, (first, second), strict=True)
            )
            return a, b
    options: Any = make_options(*laws).by_name()
    return (
        quantize(values, fmt, first, seed=key, **options),
        quantize(values, fmt, second, seed=key, **options),
    )


def _two_axes(axes: tuple[int, int], dimensions: int) -> tuple[int, int]:
    found = tuple(check_axis(axis, dimensions) for axis in axes)
    if len(set(found)) != 2 or len(found) != 2:
        raise MicroscaleError(
            f"axes {axes} of a tensor of {dimensions} dimension(s); give two different axes."
        )
    return found[0], found[1]


def dequantize(
    q: BlockTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The decoded values of `q`, contiguous, in `dtype` (by default q's), or written to `out`.

    Raises MicroscaleError if `q` is no BlockTensor or `out` does not fit.
    """
    if not isinstance(q, BlockTensor):
        raise MicroscaleError(f"q is a {type(q).__name__}, not a BlockTensor; quantize it first.")
    with torch._C.DisableTorchFunctionSubclass():  # q's shape and type are read here, no more
        return q.decoded(result_dtype(q, dtype, out), out)
