"""PyTorch's convolutions, transposed ones too, on cast operands."""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from microscale.functional.conv import conv1d, conv2d, conv3d
from microscale.functional.conv_transpose import (
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from microscale.nn.site import Site


class _Shown(_ConvNd):
    microscale: Site
    _product: ClassVar[Callable[..., Tensor]]

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        geometry: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{geometry}, {self.microscale.policy}"


class _Direct(_Shown):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        site = self.microscale
        padded, padding = _pad(self, input)
        geometry = self.stride, padding, self.dilation, self.groups
        return self._product(padded, weight, bias, *geometry, policy=site.policy, name=site.name)


class _Transposed(_Shown, _ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Return what `input` is a convolution of; `output_size` says which of several sizes."""
        site = self.microscale
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]  # (annotated as a list)
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            self.weight.dim() - 2,
            self.dilation,  # type: ignore[arg-type]
        )
        geometry = self.stride, self.padding, output_padding, self.groups, self.dilation
        return self._product(
            input, self.weight, self.bias, *geometry, policy=site.policy, name=site.name
        )


class Conv1d(_Direct, nn.Conv1d):
    """A convolution of [N, in, L], cast along channels."""

    _product = staticmethod(conv1d)


class Conv2d(_Direct, nn.Conv2d):
    """A convolution of [N, in, H, W], cast along channels."""

    _product = staticmethod(conv2d)


class Conv3d(_Direct, nn.Conv3d):
    """A convolution of [N, in, D, H, W], cast along channels."""

    _product = staticmethod(conv3d)


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """A transposed convolution of [N, in, L], cast along in-channels."""

    _product = staticmethod(conv_transpose1d)


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """A transposed convolution of [N, in, H, W], cast along in-channels."""

    _product = staticmethod(conv_transpose2d)


class ConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """A transposed convolution of [N, in, D, H, W], cast along in-channels."""

    _product = staticmethod(conv_transpose3d)


def _pad(conv: _ConvNd, x: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """Pad as modes other than zeros do, before the product; return the padding that is left."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    sizes = conv._reversed_padding_repeated_twice  # noqa: SLF001  (its base class')
    return F.pad(x, sizes, mode=conv.padding_mode), (0,) * (conv.weight.dim() - 2)
