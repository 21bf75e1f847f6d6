"""`torch.nn.LSTM` on cast operands."""

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from microscale.errors import MicroscaleError
from microscale.functional.recurrent import lstm
from microscale.nn.site import Site

State = tuple[Tensor, Tensor]


class LSTM(nn.LSTM):
    """An LSTM as a loop over steps, with a cast for every product."""

    microscale: Site

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002  (the name in torch)
        hx: State | None = None,
    ) -> tuple[Tensor, State]:
        """Run over [T, N, in], [N, T, in] if `batch_first`, or [T, in].

        Raises MicroscaleError for a PackedSequence.
        """
        site = self.microscale
        if isinstance(input, PackedSequence):
            raise MicroscaleError(
                f"LSTM {site.name!r} was given a PackedSequence, which is not quantized in this "
                "version; give a padded tensor, or leave the module out by `ignore`."
            )
        batched = input.dim() == 3
        sequence = 1 if batched and self.batch_first else 0
        steps = input.transpose(0, sequence) if batched else input.unsqueeze(1)
        state = self._state(steps, hx, batched=batched)
        output, (h, c) = lstm(
            steps,
            state,
            self.all_weights,
            bidirectional=self.bidirectional,
            dropout_p=self.dropout if self.training else 0.0,
            policy=site.policy,
            name=site.name,
        )
        if batched:
            return output.transpose(0, sequence), (h, c)
        return output.squeeze(1), (h.squeeze(1), c.squeeze(1))

    def _state(self, steps: Tensor, hx: State | None, *, batched: bool) -> State:
        """Return the state to begin with, [layers x directions, N, ...] each."""
        if hx is None:
            rows = self.num_layers * (2 if self.bidirectional else 1), steps.shape[1]
            h = steps.new_zeros(*rows, self.proj_size or self.hidden_size)
            hx = h, steps.new_zeros(*rows, self.hidden_size)
        elif not batched:
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        self.check_forward_args(steps.transpose(0, 1) if self.batch_first else steps, hx, None)
        return hx

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        return f"{super().extra_repr()}, {self.microscale.policy}"
