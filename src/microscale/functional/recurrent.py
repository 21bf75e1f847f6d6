"""The LSTM as a loop over steps, each of its products on cast operands.

The input's product is one for all steps; the hidden state's and the projection's are one a step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.functional.product import cast_right, note_product, plain
from microscale.policy import Policy
from microscale.weights import cast_operand

State = tuple[Tensor, Tensor]


def lstm(
    input: Tensor,  # noqa: A002  (the name in torch)
    state: State,
    weights: Sequence[Sequence[Tensor]],
    *,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    policy: Policy,
    name: str = "",
) -> tuple[Tensor, State]:
    """Run an LSTM on operands cast along input and hidden features.

    Args:
        input: [T, N, in].
        state: h [layers x directions, N, out] and c [layers x directions, N, hidden].
        weights: for every layer and direction w_ih [4 hidden, in], w_hh [4 hidden, out], then
            b_ih and b_hh [4 hidden] if there are biases, then w_hr [out, hidden] if the hidden
            state is projected; as in `torch.nn.LSTM.all_weights`.
        bidirectional: whether layers have two directions.
        dropout_p: between layers.
        policy: `forward.input` and `forward.weight` are used.
        name: of the module, for ledgers.

    Returns:
        [T, N, directions x out], and the last state, shaped as the first.
    """
    directions = 2 if bidirectional else 1
    finals: list[State] = []
    with plain():
        for first in range(0, len(weights), directions):
            if first and dropout_p > 0:
                input = F.dropout(input, dropout_p)  # noqa: A001
            runs = []
            for i in range(first, first + directions):
                start = state[0][i], state[1][i]
                cell = _Cell(weights[i], policy, name)
                output, final = cell.run(input, start, backward=i > first)
                runs.append(output)
                finals.append(final)
            input = torch.cat(runs, -1)  # noqa: A001
    h, c = zip(*finals, strict=True)
    return input, (torch.stack(h), torch.stack(c))


class _Cell:
    """One direction of one layer, its weights cast once for all steps."""

    def __init__(self, weights: Sequence[Tensor], policy: Policy, name: str) -> None:
        self.operands, self.name = policy.forward, name
        self.w_ih, self.w_hh = weights[:2]
        self.biases = weights[2:4] if len(weights) > 3 else (None, None)
        self.w_hr = weights[-1] if len(weights) in (3, 5) else None

    def run(self, x: Tensor, state: State, *, backward: bool) -> tuple[Tensor, State]:
        """Go through all steps, from the last to the first if `backward`."""
        given = self._product(x, self.w_ih, self._cast(self.w_ih), self.biases[0])
        w_hh = self._cast(self.w_hh)
        w_hr = None if self.w_hr is None else self._cast(self.w_hr)
        steps = given.unbind(0)
        outputs: list[Tensor] = []
        h, c = state
        for step in reversed(steps) if backward else steps:
            gates = step + self._product(h, self.w_hh, w_hh, self.biases[1])
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if self.w_hr is not None and w_hr is not None:
                h = self._product(h, self.w_hr, w_hr, None)
            outputs.append(h)
        return torch.stack(outputs[::-1] if backward else outputs), (h, c)

    def _cast(self, weight: Tensor) -> Tensor:
        return cast_right(weight, self.operands.weight, -1)

    def _product(self, x: Tensor, weight: Tensor, cast: Tensor, bias: Tensor | None) -> Tensor:
        operand = self.operands.input
        note_product(self.name, "lstm", (x, operand), (weight, self.operands.weight))
        return F.linear(cast_operand(x, operand, -1), cast, bias)
