"""PyTorch's recurrent layers and their cells on cast operands."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from microscale.functional.recurrent import (
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn,
    rnn_cell,
)
from microscale.nn.site import Site


class _Recurrent(nn.RNNBase):
    """A loop over steps; what comes before and after it is as in `torch.nn`."""

    microscale: Site

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:  # noqa: A002
        """Run over [T, N, in], [N, T, in] if `batch_first`, [T, in], or a PackedSequence."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        batched = input.dim() == 3
        sequence = 1 if batched and self.batch_first else 0
        steps = input.transpose(0, sequence) if batched else input.unsqueeze(1)
        if hx is None:
            hx = self._zeros(steps, steps.shape[1])
        elif not batched:
            hx = self._each(hx, lambda s: s.unsqueeze(1))
        self.check_forward_args(steps.transpose(0, 1) if self.batch_first else steps, hx, None)
        output, final = self._run(steps, hx, None)
        if batched:
            return output.transpose(0, sequence), final
        return output.squeeze(1), self._each(final, lambda s: s.squeeze(1))

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, sizes, order, back = packed
        hx = self._zeros(data, int(sizes[0])) if hx is None else self.permute_hidden(hx, order)
        self.check_forward_args(data, hx, sizes)
        output, final = self._run(data, hx, sizes.tolist())
        return PackedSequence(output, sizes, order, back), self.permute_hidden(final, back)

    def _zeros(self, like: Tensor, batch: int) -> Any:
        rows = self.num_layers * (2 if self.bidirectional else 1), batch
        h = like.new_zeros(*rows, self.proj_size or self.hidden_size)
        return (h, like.new_zeros(*rows, self.hidden_size)) if self.mode == "LSTM" else h

    def _each(self, state: Any, change: Any) -> Any:
        return tuple(map(change, state)) if self.mode == "LSTM" else change(state)

    def _run(self, steps: Tensor, state: Any, batch_sizes: Sequence[int] | None) -> Any:
        product: Any = {"LSTM": lstm, "GRU": gru}.get(self.mode, rnn)
        extra = {"nonlinearity": self.mode[4:].lower()} if product is rnn else {}
        return product(
            steps,
            state,
            self.all_weights,
            batch_sizes=batch_sizes,
            bidirectional=self.bidirectional,
            dropout_p=self.dropout if self.training else 0.0,
            policy=self.microscale.policy,
            name=self.microscale.name,
            **extra,
        )

    def extra_repr(self) -> str:
        """Describe the layer and its formats."""
        return f"{super().extra_repr()}, {self.microscale.policy}"


class LSTM(_Recurrent, nn.LSTM):
    """An LSTM as a loop over steps, with a cast for every product."""


class GRU(_Recurrent, nn.GRU):
    """A GRU as a loop over steps, with a cast for every product."""


class RNN(_Recurrent, nn.RNN):
    """An RNN as a loop over steps, with a cast for every product."""


class _Cell(RNNCellBase):
    microscale: Site

    @property
    def _weights(self) -> list[Tensor]:
        biases = [self.bias_ih, self.bias_hh] if self.bias else []
        return [self.weight_ih, self.weight_hh, *biases]

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(*like.shape[:-1], self.hidden_size)

    def extra_repr(self) -> str:
        """Describe the cell and its formats."""
        return f"{super().extra_repr()}, {self.microscale.policy}"


class LSTMCell(_Cell, nn.LSTMCell):
    """One step of an LSTM, with a cast for each product."""

    def forward(
        self,
        input: Tensor,  # noqa: A002
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return h and c for [N, in] or [in]; MicroscaleError for a state of another shape."""
        site, zeros = self.microscale, self._zeros(input)
        state = (zeros, zeros) if hx is None else hx
        return lstm_cell(input, state, self._weights, policy=site.policy, name=site.name)


class GRUCell(_Cell, nn.GRUCell):
    """One step of a GRU, with a cast for each product."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return h for [N, in] or [in]; MicroscaleError for a state of another shape."""
        site = self.microscale
        state = self._zeros(input) if hx is None else hx
        return gru_cell(input, state, self._weights, policy=site.policy, name=site.name)


class RNNCell(_Cell, nn.RNNCell):
    """One step of an RNN, with a cast for each product."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return h for [N, in] or [in]; MicroscaleError for a state of another shape."""
        site = self.microscale
        state = self._zeros(input) if hx is None else hx
        return rnn_cell(
            input,
            state,
            self._weights,
            nonlinearity=self.nonlinearity,
            policy=site.policy,
            name=site.name,
        )
