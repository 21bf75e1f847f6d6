"""`torch.nn.Bilinear` on cast operands."""

from torch import Tensor, nn

from microscale.functional.bilinear import bilinear
from microscale.nn.site import Site


class Bilinear(nn.Bilinear):
    """A bilinear layer, as two products on cast operands."""

    microscale: Site

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return [..., out] for inputs [..., in1] and [..., in2]."""
        site = self.microscale
        return bilinear(input1, input2, self.weight, self.bias, policy=site.policy, name=site.name)

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        return f"{super().extra_repr()}, {self.microscale.policy}"
