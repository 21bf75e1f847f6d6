"""`BlockTensor`: a tensor stored as packed codes and shared scales.

Storage: the block axis is last. `codes` (uint8) holds each row's codes as a bit stream, least
significant bit first, padded with zero codes to whole blocks; `scales` holds one scale a block.
The other dimensions keep their order, so everything that happens away from the block axis
(indexing, slicing, transposing, viewing) happens on the two parts alike, without unpacking.

Products take a BlockTensor and decode it first: it saves memory, not time, in this version.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from microscale.cast import result_dtype, to_tensor
from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat, get_block_format
from microscale.kernels.plan import plan
from microscale.kernels.storage import Stored
from microscale.rounding import make_options


class BlockTensor(Tensor):
    """A tensor of `shape` and `dtype` whose values are stored packed in `format` along `axis`.

    Attributes:
        codes: uint8, the other dimensions and then the packed rows.
        scales: the other dimensions (or 1 where they share a scale) and then the blocks; uint8
            codes of 8-bit scale formats, else int16 exponents, bfloat16 or float32.
        tensor_scale: float32, one value, or none where the format has no tensor scale.
        format: the block format.
        axis: the logical axis of the blocks, 0 or more.

    `dtype` is the type that `dequantize` gives unless told otherwise.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    format: BlockFormat
    axis: int

    def __new__(
        cls, stored: Stored, fmt: BlockFormat, axis: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Self:
        """Wrap stored parts; `quantize` makes them from values."""
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=stored[0].device
        )
        self.codes, self.scales, self.tensor_scale = stored
        self.format, self.axis = fmt, axis
        return self

    @property
    def stored(self) -> Stored:
        """Codes, scales and tensor scale."""
        return self.codes, self.scales, self.tensor_scale

    @property
    def length(self) -> int:
        """Number of values along the block axis."""
        return self.shape[self.axis] if self.dim() else 1

    @property
    def storage_bytes(self) -> int:
        """Bytes that the parts take."""
        return sum(part.numel() * part.element_size() for part in self.stored)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded values, contiguous, in `dtype` (by default this tensor's)."""
        return dequantize(self, dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe the tensor without its values."""
        shape = tuple(self.shape)
        return (
            f"BlockTensor({self.format}, shape={shape}, axis={self.axis}, dtype={self.dtype}, "
            f"device='{self.device}', {self.storage_bytes} bytes)"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, int, torch.dtype]]:
        """Name the parts, for torch.compile."""
        return ["codes", "scales", "tensor_scale"], (str(self.format), self.axis, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor],
        context: tuple[str, int, torch.dtype],
        shape: Sequence[int],
        stride: Sequence[int],
    ) -> "BlockTensor":
        """Rebuild from the parts, for torch.compile."""
        spelling, axis, dtype = context
        stored = (parts["codes"], parts["scales"], parts["tensor_scale"])
        return BlockTensor(stored, get_block_format(spelling), axis, shape, dtype)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for PyTorch's cache of compiled graphs."""
        return f"{self.format} {self.axis} {self.dtype} {tuple(self.shape)}"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickle the parts and the spelling, which torch.load(weights_only=True) accepts."""
        is_parameter = isinstance(self, torch.nn.Parameter)
        record = (str(self.format), self.axis, tuple(self.shape), self.dtype)
        return rebuild, (*self.stored, record, self.requires_grad, is_parameter)

    def __deepcopy__(self, memo: dict[int, object]) -> "BlockTensor":
        """Copy the parts; a parameter stays one."""
        function, arguments = self.__reduce_ex__(4)
        parts = (part.clone() for part in arguments[:3])
        copied: BlockTensor = function(*parts, *arguments[3:])
        memo[id(self)] = copied
        return copied

    # Operators see the wrapped tensor below autograd, in __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run an operator on the parts, decode for a product, or refuse by name."""
        from microscale.tensor_ops import dispatch  # it needs this class

        return dispatch(func, args, kwargs or {})


def rebuild(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    record: tuple[str, int, Sequence[int], torch.dtype],
    requires_grad: bool,
    is_parameter: bool,
) -> BlockTensor:
    """Make a BlockTensor again from what `__reduce_ex__` gave."""
    spelling, axis, shape, dtype = record
    stored = (codes, scales, tensor_scale)
    tensor = BlockTensor(stored, get_block_format(spelling), axis, shape, dtype)
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
) -> BlockTensor:
    """Cast `x` and keep codes and scales, truly packed. The arguments are those of `cast`.

    Returns a BlockTensor of x's shape and dtype, without a gradient;
    `dequantize(quantize(x, ...)) == cast(x, ...)` bit for bit. Raises MicroscaleError.
    """
    tensor = to_tensor(x)
    options = make_options(rounding, overflow, nonfinite, flush_subnormals)
    checked = plan(tensor, fmt, axis, options)
    spelled = (str(checked.format), checked.axis, str(options))
    stored = torch.ops.microscale.quantize(tensor.detach(), *spelled)
    return BlockTensor(stored, checked.format, checked.axis, tensor.shape, tensor.dtype)


def dequantize(
    q: BlockTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The decoded values of `q`, contiguous, in `dtype` (by default q's), or written to `out`.

    Raises MicroscaleError if `q` is no BlockTensor or `out` does not fit.
    """
    if not isinstance(q, BlockTensor):
        raise MicroscaleError(f"q is a {type(q).__name__}, not a BlockTensor; quantize it first.")
    dtype = result_dtype(q, dtype, out)
    values: Tensor = torch.ops.microscale.dequantize(
        list(q.stored), str(q.format), q.axis, q.length, dtype
    ).reshape(q.shape)
    return values if out is None else out.copy_(values)
