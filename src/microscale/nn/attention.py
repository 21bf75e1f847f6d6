"""`torch.nn.MultiheadAttention` on cast operands, without its fused fast path."""

from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.functional.multihead import Projections, multi_head_attention
from microscale.nn.site import Site


class MultiheadAttention(nn.MultiheadAttention):
    """Attention whose projections, scores and values are products on cast operands.

    The output projection is a module of its own with its own policy.
    """

    microscale: Site

    def forward(  # noqa: PLR0917  (as in torch)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `torch.nn.MultiheadAttention` does, all of whose arguments are taken.

        Raises MicroscaleError if `is_causal` comes without the mask it is a hint about.
        """
        if is_causal and attn_mask is None:
            raise MicroscaleError(
                f"attention {self.microscale.name!r} was called with is_causal=True, a hint about "
                "attn_mask, but without attn_mask."
            )
        swap = self.batch_first and query.dim() == 3
        if swap:
            query, key, value = _swapped(query, key, value)
        heads, probabilities = multi_head_attention(
            query,
            key,
            value,
            self.projections,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            policy=self.microscale.policy,
            name=self.microscale.name,
        )
        output = self.out_proj(heads)
        output = output.transpose(0, 1) if swap else output
        if not need_weights:
            return output, None
        return output, probabilities.mean(-3) if average_attn_weights else probabilities

    @property
    def projections(self) -> Projections:
        """The weights before the output projection."""
        separate = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weight = self.in_proj_weight if self._qkv_same_embed_dim else separate
        biases = self.in_proj_bias, self.bias_k, self.bias_v
        return Projections(self.num_heads, weight, *biases, self.add_zero_attn)


def _swapped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the sequence first; what was one tensor stays one, so that it is cast once."""
    query_ = query.transpose(0, 1)
    key_ = query_ if key is query else key.transpose(0, 1)
    return query_, key_, key_ if value is key else value.transpose(0, 1)
