"""`torch.nn.Linear` on cast operands."""

from torch import Tensor, nn

from microscale.functional.linear import linear
from microscale.nn.site import Site
from microscale.rotation import rotation_of


class Linear(nn.Linear):
    """A linear layer, input and weight cast along in-features."""

    microscale: Site

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name in torch)
        """Return [..., out] for an input [..., in]."""
        site = self.microscale
        return linear(
            input,
            self.weight,
            self.bias,
            policy=site.policy,
            name=site.name,
            rotation=rotation_of(site.policy),
        )

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        return f"{super().extra_repr()}, {self.microscale.policy}"
