"""`torch.nn.Embedding` and `EmbeddingBag` with cast tables."""

from torch import Tensor, nn

from microscale.functional.embedding import embedding, embedding_bag
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


class EmbeddingBag(nn.EmbeddingBag):
    """A table whose rows are cast along features, and joined in bags."""

    microscale: Site

    def forward(
        self,
        input: Tensor,  # noqa: A002
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return [N, features] for integers [N, bag], or [n] with `offsets` [N]."""
        site = self.microscale
        return embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            policy=site.policy,
            name=site.name,
        )

    def extra_repr(self) -> str:
        """Describe the table and its format."""
        return f"{super().extra_repr()}, {self.microscale.policy.storage}"
