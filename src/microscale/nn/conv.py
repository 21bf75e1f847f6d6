"""`torch.nn.Conv1d` and `Conv2d` on cast operands."""

import torch.nn.functional as F
from torch import Tensor, nn

from microscale.functional.conv import conv1d, conv2d
from microscale.nn.site import Site


class Conv1d(nn.Conv1d):
    """A convolution of [N, in, L], cast along channels."""

    microscale: Site

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        site = self.microscale
        padded, padding = _pad(self, input)
        geometry = self.stride, padding, self.dilation, self.groups
        return conv1d(padded, weight, bias, *geometry, policy=site.policy, name=site.name)

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        geometry: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{geometry}, {self.microscale.policy}"


class Conv2d(nn.Conv2d):
    """A convolution of [N, in, H, W], cast along channels."""

    microscale: Site

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        site = self.microscale
        padded, padding = _pad(self, input)
        geometry = self.stride, padding, self.dilation, self.groups
        return conv2d(padded, weight, bias, *geometry, policy=site.policy, name=site.name)

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        geometry: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{geometry}, {self.microscale.policy}"


def _pad(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """Pad as modes other than zeros do, before the product; return the padding that is left."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    sizes = conv._reversed_padding_repeated_twice  # noqa: SLF001  (its base class')
    return F.pad(x, sizes, mode=conv.padding_mode), (0,) * (conv.weight.dim() - 2)
