"""RNN, GRU and LSTM as loops over steps, each of their products on cast operands.

The input's product is one for all steps; the hidden state's and the projection's are one a step.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.functional.flow import LINEAR, backward_of, flow
from microscale.functional.product import cast_right, note_product, plain
from microscale.functional.vector import deliver
from microscale.policy import Policy
from microscale.watch import tell_product
from microscale.weights import cast_operand

State = tuple[Tensor, Tensor]
States = tuple[Tensor, ...]
Weights = Sequence[Sequence[Tensor]]


def lstm(
    input: Tensor,  # noqa: A002  (the name in torch)
    state: State,
    weights: Weights,
    *,
    batch_sizes: Sequence[int] | None = None,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    policy: Policy,
    name: str = "",
) -> tuple[Tensor, State]:
    """Run an LSTM on operands cast along input and hidden features.

    Args:
        input: [T, N, in], or the data [sum of lengths, in] of a PackedSequence.
        state: h [layers x directions, N, out] and c [layers x directions, N, hidden].
        weights: for every layer and direction w_ih [4 hidden, in], w_hh [4 hidden, out], then
            b_ih and b_hh [4 hidden] if there are biases, then w_hr [out, hidden] if the hidden
            state is projected; as in `torch.nn.LSTM.all_weights`.
        batch_sizes: of a PackedSequence, one a step.
        bidirectional: whether layers have two directions.
        dropout_p: between layers.
        policy: `forward.input` and `forward.weight` are used.
        name: of the module, for ledgers.

    Returns:
        [T, N, directions x out], or data as `input` is, and the last state, shaped as the first.
    """
    cells = [_Cell("lstm", _lstm_step, w, policy, name) for w in weights]
    output, final = _layers(input, state, cells, (batch_sizes, bidirectional, dropout_p))
    return output, (final[0], final[1])


def gru(
    input: Tensor,  # noqa: A002
    state: Tensor,
    weights: Weights,
    *,
    batch_sizes: Sequence[int] | None = None,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    policy: Policy,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Run a GRU as `lstm` does; `state` is h alone, and weights have 3 x hidden rows."""
    cells = [_Cell("gru", _gru_step, w, policy, name) for w in weights]
    output, final = _layers(input, (state,), cells, (batch_sizes, bidirectional, dropout_p))
    return output, final[0]


def rnn(
    input: Tensor,  # noqa: A002
    state: Tensor,
    weights: Weights,
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Sequence[int] | None = None,
    bidirectional: bool = False,
    dropout_p: float = 0.0,
    policy: Policy,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Run an RNN with "tanh" or "relu" as `gru` does; weights have hidden rows."""
    cells = [_Cell("rnn", _SIMPLE[nonlinearity], w, policy, name) for w in weights]
    output, final = _layers(input, (state,), cells, (batch_sizes, bidirectional, dropout_p))
    return output, final[0]


def lstm_cell(
    input: Tensor,  # noqa: A002
    state: State,
    weights: Sequence[Tensor],
    *,
    policy: Policy,
    name: str = "",
) -> State:
    """Run one step of an LSTM: [N, in] with h and c [N, hidden]; returns both anew.

    `weights` are w_ih, w_hh and, if there are biases, b_ih and b_hh, as in `lstm`. Raises
    MicroscaleError for a state of another shape.
    """
    h, c = _once(_Cell("lstm_cell", _lstm_step, weights, policy, name), input, state)
    return h, c


def gru_cell(
    input: Tensor,  # noqa: A002
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """Run one step of a GRU as `lstm_cell` does; `state` and the result are h alone."""
    return _once(_Cell("gru_cell", _gru_step, weights, policy, name), input, (state,))[0]


def rnn_cell(
    input: Tensor,  # noqa: A002
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    policy: Policy,
    name: str = "",
) -> Tensor:
    """Run one step of an RNN with "tanh" or "relu" as `gru_cell` does."""
    cell = _Cell("rnn_cell", _SIMPLE[nonlinearity], weights, policy, name)
    return _once(cell, input, (state,))[0]


Round = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor, States, Round], States]
"""What becomes of the products of input and of hidden state, and of the state.

Every gate and every new state is rounded to what vector operations deliver.
"""


def _lstm_step(given: Tensor, fed: Tensor, state: States, r: Round) -> States:
    i, f, g, o = (given + fed).chunk(4, -1)
    c = r(r(f.sigmoid()) * state[1] + r(i.sigmoid()) * r(g.tanh()))
    return r(r(o.sigmoid()) * r(c.tanh())), c


def _gru_step(given: Tensor, fed: Tensor, state: States, r: Round) -> States:
    (given_r, given_z, given_n), (fed_r, fed_z, fed_n) = given.chunk(3, -1), fed.chunk(3, -1)
    n = r((given_n + r((given_r + fed_r).sigmoid()) * fed_n).tanh())
    return (r(n + r((given_z + fed_z).sigmoid()) * (state[0] - n)),)


def _tanh_step(given: Tensor, fed: Tensor, state: States, r: Round) -> States:  # noqa: ARG001
    return (r((given + fed).tanh()),)


def _relu_step(given: Tensor, fed: Tensor, state: States, r: Round) -> States:  # noqa: ARG001
    return (r((given + fed).relu()),)


_SIMPLE: dict[str, Step] = {"tanh": _tanh_step, "relu": _relu_step}


def _layers(
    x: Tensor,
    state: States,
    cells: "Sequence[_Cell]",
    options: tuple[Sequence[int] | None, bool, float],
) -> tuple[Tensor, States]:
    """Run cells layer by layer, one or two directions each."""
    batch_sizes, bidirectional, dropout_p = options
    directions = 2 if bidirectional else 1
    finals: list[States] = []
    with plain():
        for first in range(0, len(cells), directions):
            if first and dropout_p > 0:
                x = F.dropout(x, dropout_p)
            runs = []
            for i in range(first, first + directions):
                start = tuple(s[i] for s in state)
                output, final = cells[i].run(x, start, batch_sizes, backward=i > first)
                runs.append(output)
                finals.append(final)
            x = torch.cat(runs, -1)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _once(cell: "_Cell", x: Tensor, state: States) -> States:
    hidden = cell.w_hh.shape[1]
    for part in state:
        if part.shape != (*x.shape[:-1], hidden):
            raise MicroscaleError(
                f"{cell.product} {cell.name!r} was given a state of shape {tuple(part.shape)}; for "
                f"an input of {tuple(x.shape)} it has {(*x.shape[:-1], hidden)}."
            )
    with plain():
        return cell.run(x.unsqueeze(0), state, None, backward=False)[1]


class _Cell:
    """One direction of one layer, its weights cast once for all steps."""

    def __init__(
        self, product: str, step: Step, weights: Sequence[Tensor], policy: Policy, name: str
    ) -> None:
        self.product, self.step = product, step
        self.operands, self.policy, self.name = policy.forward, policy, name
        self.w_ih, self.w_hh = weights[:2]
        self.biases = weights[2:4] if len(weights) > 3 else (None, None)
        self.w_hr = weights[-1] if len(weights) in (3, 5) else None

    def run(
        self, x: Tensor, start: States, batch_sizes: Sequence[int] | None, *, backward: bool
    ) -> tuple[Tensor, States]:
        """Go through all steps, from the last to the first if `backward`.

        In a packed sequence the batch has as many rows as sequences last: rows leave the state on
        the way forward, and enter it on the way backward.
        """
        given = self._product(x, self.w_ih, self._cast(self.w_ih), self.biases[0])
        steps = list(given.unbind(0) if batch_sizes is None else given.split(list(batch_sizes)))
        w_hh, w_hr = (
            self._cast(self.w_hh),
            self.w_hr if self.w_hr is None else self._cast(self.w_hr),
        )
        outputs: list[Tensor] = []
        ended: list[States] = []
        state = tuple(s[: len(steps[-1])] for s in start) if backward and batch_sizes else start
        for step in reversed(steps) if backward else steps:
            rows, had = len(step), len(state[0])
            if batch_sizes and rows < had:
                ended.append(tuple(s[rows:] for s in state))
                state = tuple(s[:rows] for s in state)
            elif batch_sizes and rows > had:
                state = tuple(
                    torch.cat([s, t[had:rows]]) for s, t in zip(state, start, strict=True)
                )
            fed = self._product(state[0], self.w_hh, w_hh, self.biases[1])
            h, *rest = self.step(step, fed, state, self._round)
            if self.w_hr is not None and w_hr is not None:
                h = self._product(h, self.w_hr, w_hr, None)
            state = h, *rest
            outputs.append(h)
        final = tuple(torch.cat(parts) for parts in zip(state, *ended[::-1], strict=True))
        join = torch.stack if batch_sizes is None else torch.cat
        return join(outputs[::-1] if backward else outputs), final if ended else state

    def _cast(self, weight: Tensor) -> Tensor:
        return cast_right(weight, self.operands.weight, -1)

    def _product(self, x: Tensor, weight: Tensor, cast: Tensor, bias: Tensor | None) -> Tensor:
        operand = self.operands.input
        note_product(self.name, self.product, (x, operand), (weight, self.operands.weight))
        left = cast_operand(x, operand, -1)
        tell_product("matrix", x, left, weight, self.operands.weight, -1)
        backward = backward_of(x, weight, self.policy, self.name, self.product)
        return self._round(flow(LINEAR, left, cast, bias, (x, weight), backward))

    def _round(self, x: Tensor) -> Tensor:
        return deliver(x, self.policy)
