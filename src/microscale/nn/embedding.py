"""`torch.nn.Embedding` with a cast table."""

from torch import Tensor, nn

from microscale.functional.embedding import embedding
from microscale.nn.site import Site


class Embedding(nn.Embedding):
    """A table whose rows are cast along features."""

    microscale: Site

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name in torch)
        """Return [..., features] for integers of any shape."""
        site = self.microscale
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
            policy=site.policy,
            name=site.name,
        )

    def extra_repr(self) -> str:
        """Describe the table and its format."""
        return f"{super().extra_repr()}, {self.microscale.policy.storage}"
