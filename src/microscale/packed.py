"""What a packed tensor holds and decodes to: the part of `BlockTensor` that operators build on.

Storage: the block axis is last. `codes` (uint8) holds each row's codes as a bit stream, least
significant bit first, padded with zero codes to whole blocks; `scales` holds one scale a block.
The other dimensions keep their order, so everything that happens away from the block axis
(indexing, slicing, transposing, viewing) happens on the two parts alike, without unpacking.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat, row_dimension
from microscale.kernels.storage import Layout, Stored
from microscale.ops import decode


class Packed(Tensor):
    """A tensor of `shape` and `dtype` whose values are stored packed in `format` along `axis`.

    Attributes:
        codes: uint8, the other dimensions and then the packed rows.
        scales: the other dimensions (or 1 where they share a scale) and then the blocks; uint8
            codes of 8-bit scale formats, else int16 exponents, bfloat16 or float32.
        tensor_scale: float32, one value, or none where the format has no tensor scale.
        zero_point: int8, of the shape of `scales`, or none where the format has no zero points.
        packing: format, axis and the type that decoding computes in.

    `dtype` is the type that `dequantize` gives unless told otherwise.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    zero_point: Tensor
    packing: Layout

    def __new__(
        cls, stored: Stored, layout: Layout, shape: Sequence[int], dtype: torch.dtype
    ) -> Self:
        """Wrap stored parts; `quantize` makes them from values."""
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=stored[0].device
        )
        self.codes, self.scales, self.tensor_scale, self.zero_point = stored
        self.packing = layout
        return self

    @property
    def format(self) -> BlockFormat:
        """The block format."""
        return self.packing.format

    @property
    def axis(self) -> int:
        """The logical axis of the blocks, 0 or more."""
        return self.packing.axis

    @property
    def stored(self) -> Stored:
        """Codes, scales, tensor scale and zero points."""
        return self.codes, self.scales, self.tensor_scale, self.zero_point

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
        return self.decoded(dtype or self.dtype)

    def decoded(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The decoded values, contiguous in `dtype`, or written to `out` of this shape and type."""
        values = decode(self.stored, self.packing, self.length, dtype, out)
        return values if out is not None else values.reshape(self.shape)

    def with_row_scales(self) -> Self:
        """The same values without tiles: every row has scales of its own (no other bit changes)."""
        if not isinstance(self.format.block, tuple):
            return self
        height, width = self.format.block
        rows = row_dimension(self.dim(), self.axis)
        stored = list(self.stored)
        if rows is not None:
            place = rows - (rows > self.axis)
            for part in (1, 3) if self.format.zero_point else (1,):
                repeated = stored[part].repeat_interleave(height, place)
                stored[part] = repeated.narrow(place, 0, self.shape[rows])
        packing = self.packing._replace(format=replace(self.format, block=width))
        codes, scales, tensor_scale, zero_point = stored
        return type(self)(
            (codes, scales, tensor_scale, zero_point), packing, self.shape, self.dtype
        )

    def share_memory_(self) -> Self:
        """Move the parts to shared memory, for other processes."""
        for part in self.stored:
            part.share_memory_()
        return self

    def numpy(self, *, force: bool = False) -> Any:  # noqa: ARG002  (torch's signature)
        """Refuse: a packed tensor has no plain memory to show."""
        raise MicroscaleError(f"{self!r} has no NumPy form; call x.dequantize().numpy().")

    def tolist(self) -> Any:
        """Refuse, as `numpy` does."""
        raise MicroscaleError(f"{self!r} has no list of values; call x.dequantize().tolist().")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe the tensor without its values."""
        shape = tuple(self.shape)
        return (
            f"{type(self).__name__}({self.format}, shape={shape}, axis={self.axis}, "
            f"dtype={self.dtype}, device='{self.device}', {self.storage_bytes} bytes)"
        )
