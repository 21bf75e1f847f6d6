"""The compute flow of training against a twin in float64 that casts the same six operands.

The twin is PyTorch's own product, differentiated once for each factor with the other operands cast
as the policy says: nothing of it is shared with the package but `cast`.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layer_checks import doubles
from microscale.cast import cast
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.functional import addmm, linear, matmul, scaled_dot_product_attention
from microscale.ledger import record_products
from microscale.policy import Policy

SIX = Policy.from_dict(
    {
        "forward": {"input": "mxfp6_e2m3", "weight": "mxfp4"},
        "dgrad": {"grad": "mxfp8_e5m2", "weight": "mxfp6_e3m2"},
        "wgrad": {"input": "mxint8", "grad": "mxfp8_e4m3"},
        "matmul": {"left": "mxfp6_e2m3", "right": "mxfp8_e4m3"},
    }
)
"""All six operands of a weight's product in six formats."""


def close(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None
    assert expected is not None
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [nn.Parameter(doubles(*shape)) for shape in shapes]


def gradient(function: Callable[[Tensor], Tensor], at: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of a linear function; `at` gives its shape alone."""
    x = torch.zeros_like(at, requires_grad=True)
    return torch.autograd.grad(function(x), x, upstream)[0]


def along(x: Tensor, fmt: str, axis: int, groups: int = 1) -> Tensor:
    """Cast groups of that axis, each for itself."""
    return torch.cat([cast(part, fmt, axis) for part in x.detach().chunk(groups, axis)], axis)


def flat(x: Tensor, fmt: str) -> Tensor:
    """Cast [N, channels, ...] along batch and positions."""
    rows = x.detach().transpose(0, 1).flatten(1)
    return cast(rows, fmt, 1).view(x.transpose(0, 1).shape).transpose(0, 1)


# ---------------------------------------------------------------- linear layers and products


@pytest.mark.parametrize("shape", [(64,), (40, 64), (3, 13, 64), (2, 3, 5, 64)])
def test_linear(shape: tuple[int, ...]) -> None:
    x, w, b = leaves(shape, (48, 64), (48,))
    y = linear(x, w, b, policy=SIX)
    close(y, F.linear(cast(x.detach(), "mxfp6_e2m3"), cast(w.detach(), "mxfp4"), b))
    e = doubles(*y.shape)
    y.backward(e)
    rows, tokens = e.reshape(-1, 48), x.detach().reshape(-1, 64)
    close(x.grad, cast(e, "mxfp8_e5m2") @ cast(w.detach(), "mxfp6_e3m2", 0))
    close(w.grad, cast(rows, "mxfp8_e4m3", 0).mT @ cast(tokens, "mxint8", 0))
    close(b.grad, rows.sum(0))


def test_an_operand_that_is_not_set_stays_in_the_wider_type() -> None:
    policy = Policy.from_dict(
        {"forward": {"input": "mxfp4", "weight": "mxfp4"}, "dgrad": {"grad": "mxfp8_e5m2"}}
    )
    x, w = leaves((40, 64), (48, 64))
    e = doubles(40, 48)
    linear(x, w, policy=policy).backward(e)
    close(x.grad, cast(e, "mxfp8_e5m2") @ w.detach())
    close(w.grad, e.mT @ x.detach())


def test_blocks_of_wgrad_can_end_with_a_sample() -> None:
    policy = Policy.of("mxint8", "mxfp6_e2m3", "mxfp8_e4m3", tokens="sample")
    assert Policy.from_toml(policy.to_toml()) == policy
    x, w = leaves((3, 40, 64), (48, 64))
    e = doubles(3, 40, 48)
    linear(x, w, policy=policy).backward(e)
    left, right = cast(x.detach(), "mxfp6_e2m3", 1), cast(e, "mxfp8_e4m3", 1)
    close(w.grad, torch.einsum("btn,btk->nk", right, left))
    close(x.grad, cast(e, "mxfp8_e4m3") @ cast(w.detach(), "mxint8", 0))


PAIRS = [
    ((40, 64), (64, 48)),
    ((3, 40, 64), (3, 64, 48)),
    ((3, 40, 64), (64, 48)),
    ((40, 64), (3, 64, 48)),
    ((2, 1, 40, 64), (3, 64, 48)),
    ((64,), (64, 48)),
    ((40, 64), (64,)),
    ((64,), (64,)),
]


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_products_of_two_activations(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = (doubles(*shape).requires_grad_() for shape in (left, right))
    y = matmul(a, b, policy=SIX)
    e = torch.randn_like(y)
    y.backward(e)
    p, q = a.detach(), b.detach()
    p = p.unsqueeze(0) if p.dim() == 1 else p
    q = q.unsqueeze(1) if q.dim() == 1 else q
    batch = torch.broadcast_shapes(p.shape[:-2], q.shape[:-2])
    g = e.reshape(*batch, p.shape[-2], q.shape[-1])
    if p.dim() == 2 < g.dim():  # one matrix for a batch: summed over the batch too
        gs, qs = (x.movedim(-2, 0).flatten(1) for x in (g, q))
        of_left = cast(gs, "mxfp8_e5m2", 1) @ cast(qs, "mxfp8_e4m3", 1).mT
    else:
        of_left = cast(g, "mxfp8_e5m2", -1) @ cast(q, "mxfp8_e4m3", -1).mT
    if q.dim() == 2:
        ps, gs = p.flatten(0, -2), g.flatten(0, -2)
        of_right = cast(ps, "mxfp6_e2m3", 0).mT @ cast(gs, "mxfp8_e4m3", 0)
    else:
        of_right = cast(p, "mxfp6_e2m3", -2).mT @ cast(g, "mxfp8_e4m3", -2)
    close(a.grad, of_left.sum_to_size(p.shape).reshape(left))
    close(b.grad, of_right.sum_to_size(q.shape).reshape(right))


def test_a_weight_on_the_left_has_its_own_operands() -> None:
    (w,), x = leaves((48, 64)), doubles(64, 40).requires_grad_()
    y = matmul(w, x, policy=SIX)
    e = doubles(48, 40)
    y.backward(e)
    close(w.grad, cast(e, "mxfp8_e4m3", 1) @ cast(x.detach(), "mxint8", 1).mT)
    close(x.grad, cast(w.detach(), "mxfp6_e3m2", 0).mT @ cast(e, "mxfp8_e5m2", 0))


@pytest.mark.parametrize("beta", [0, 0.5])
def test_addmm(beta: float) -> None:
    c, x, w = leaves((40, 48), (40, 64), (64, 48))
    x = x.detach().requires_grad_()
    e = doubles(40, 48)
    addmm(c, x, w, beta=beta, alpha=2, policy=SIX).backward(e)
    close(x.grad, 1 * cast(2 * e, "mxfp8_e5m2") @ cast(w.detach(), "mxfp6_e3m2", 1).mT)
    close(w.grad, cast(x.detach(), "mxint8", 0).mT @ cast(2 * e, "mxfp8_e4m3", 0))
    if beta:
        close(c.grad, beta * e)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    q, k, v = (doubles(2, 3, n, 32).requires_grad_() for n in (40, 40, 40))
    e = doubles(2, 3, 40, 32)
    scaled_dot_product_attention(q, k, v, is_causal=causal, policy=SIX).backward(e)

    def left(x: Tensor, axis: int) -> Tensor:
        return cast(x.detach(), "mxfp6_e2m3", axis)

    def right(x: Tensor, axis: int) -> Tensor:
        return cast(x.detach(), "mxfp8_e4m3", axis)

    scores = (left(q, -1) @ right(k, -1).mT / 32**0.5).requires_grad_()
    everything = torch.ones(40, 40, dtype=torch.bool)
    open_ = everything.tril() if causal else everything
    probabilities = scores.masked_fill(~open_, -torch.inf).softmax(-1)
    of_probabilities = cast(e, "mxfp8_e5m2", -1) @ right(v, -1).mT
    close(v.grad, left(probabilities, -2).mT @ cast(e, "mxfp8_e4m3", -2))
    (g,) = torch.autograd.grad(probabilities, scores, of_probabilities)
    g = g / 32**0.5
    close(q.grad, cast(g, "mxfp8_e5m2", -1) @ right(k, -2))
    close(k.grad, cast(g, "mxfp8_e4m3", -2).mT @ left(q, -2))


# ---------------------------------------------------------------- convolutions

DIRECT = [
    (stride, padding, dilation, groups)
    for stride, padding, dilation, groups in product(
        (1, 2), (0, 2, "same", "valid"), (1, 2), (1, 2)
    )
    if not (padding == "same" and stride > 1)  # which PyTorch refuses
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), DIRECT)
@pytest.mark.parametrize("kernel", [(3,), (2, 3)])
def test_convolutions(
    kernel: tuple[int, ...], stride: int, padding: Any, dilation: int, groups: int
) -> None:
    n = len(kernel)
    kind: Any = (nn.Conv1d, nn.Conv2d)[n - 1]
    made = kind(64, 48, kernel, stride, padding, dilation, groups, dtype=torch.float64)
    check_convolution(made, doubles(2, 64, *(9, 8)[:n]), groups, 0)


def check_convolution(layer: Any, x: Tensor, groups: int, outputs: int) -> None:
    """`outputs` is the weight's dimension of out-channels."""
    function: Any = getattr(F, type(layer).__name__.lower().replace("transpose", "_transpose"))
    geometry = [layer.stride, layer.padding, layer.dilation, layer.groups]
    if layer.transposed:
        geometry = [*geometry[:2], layer.output_padding, layer.groups, layer.dilation]
    convert(layer, SIX, verbose=False)
    x.requires_grad_()
    y = layer(x)
    e = doubles(*y.shape)
    y.backward(e)
    w = layer.weight.detach()
    dgrad = along(e, "mxfp8_e5m2", 1, groups), along(w, "mxfp6_e3m2", outputs, (groups, 1)[outputs])
    wgrad = flat(x, "mxint8"), flat(e, "mxfp8_e4m3")
    close(x.grad, gradient(lambda a: function(a, dgrad[1], None, *geometry), x, dgrad[0]))
    close(
        layer.weight.grad, gradient(lambda v: function(wgrad[0], v, None, *geometry), w, wgrad[1])
    )
    close(layer.bias.grad, e.sum([i for i in range(e.dim()) if i != 1]))


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("kernel", [(3,), (2, 3)])
def test_transposed_convolutions(kernel: tuple[int, ...], stride: int, groups: int) -> None:
    n = len(kernel)
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)[n - 1]
    extra = {"output_padding": stride - 1, "groups": groups, "dtype": torch.float64}
    made = kind(64, 48 * groups, kernel, stride, 1, **extra)
    check_convolution(made, doubles(2, 64, *(7, 5)[:n]), groups, 1)


def test_three_dimensions_and_no_batch() -> None:
    layer = nn.Conv3d(32, 40, 2, padding=1, dtype=torch.float64)
    check_convolution(layer, doubles(2, 32, 3, 4, 3), 1, 0)
    convert(layer, SIX, verbose=False)
    x = doubles(32, 3, 4, 3)
    gradients = []
    for one in (x, x[None]):
        layer.zero_grad()
        layer(one).square().sum().backward()
        gradients.append(layer.weight.grad)
    close(gradients[0], gradients[1])


@pytest.mark.parametrize("groups", [1, 2])
def test_windows(groups: int) -> None:
    """As one matrix product: windows times weights, flattened."""
    policy = Policy.from_dict({**SIX.to_dict(), "convolution": "window"})
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=2, groups=groups, dtype=torch.float64)
    convert(layer, policy, verbose=False)
    x = doubles(2, 16, 9, 8).requires_grad_()
    y = layer(x)
    e = doubles(*y.shape)
    y.backward(e)
    w = layer.weight.detach()
    of_input, of_weight = [], []
    for part, weight, upstream in zip(
        x.detach().chunk(groups, 1), w.chunk(groups), e.chunk(groups, 1), strict=True
    ):
        windows = F.unfold(part, 3, padding=1, stride=2).movedim(1, -1)
        rows, matrix = upstream.flatten(2).mT, weight.flatten(1)
        back = cast(rows, "mxfp8_e5m2") @ cast(matrix, "mxfp6_e3m2", 0)
        of_input.append(F.fold(back.mT, (9, 8), 3, padding=1, stride=2))
        grads = cast(rows.flatten(0, 1), "mxfp8_e4m3", 0).mT
        of_weight.append((grads @ cast(windows.flatten(0, 1), "mxint8", 0)).view_as(weight))
    close(x.grad, torch.cat(of_input, 1))
    close(layer.weight.grad, torch.cat(of_weight))


# ---------------------------------------------------------------- recurrent layers


class Twin(torch.autograd.Function):
    """A linear layer, its six operands cast by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(cast(x, "mxfp6_e2m3"), cast(w, "mxfp4"), b)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        x, w = ctx.saved_tensors
        rows, tokens = e.flatten(0, -2), x.flatten(0, -2)
        dgrad = cast(e, "mxfp8_e5m2") @ cast(w, "mxfp6_e3m2", 0)
        return dgrad, cast(rows, "mxfp8_e4m3", 0).mT @ cast(tokens, "mxint8", 0), rows.sum(0)


def test_lstm() -> None:
    layer = nn.LSTM(40, 36, dtype=torch.float64)
    x = doubles(5, 33, 40).requires_grad_()
    w_ih, w_hh, b_ih, b_hh = (p.detach().clone().requires_grad_() for p in layer.parameters())
    twin = x.detach().clone().requires_grad_()
    given: Any = Twin.apply(twin, w_ih, b_ih)  # type: ignore[no-untyped-call]
    h = c = torch.zeros(33, 36, dtype=torch.float64)
    outputs = []
    for step in given:
        fed: Any = Twin.apply(h, w_hh, b_hh)  # type: ignore[no-untyped-call]
        i, f, g, o = (step + fed).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    expected = torch.stack(outputs)
    convert(layer, SIX, verbose=False)
    got = layer(x)[0]
    close(got, expected)
    e = doubles(5, 33, 36)
    expected.backward(e)
    got.backward(e)
    assert twin.grad is not None
    close(x.grad, twin.grad)
    for parameter, of_twin in zip(layer.parameters(), (w_ih, w_hh, b_ih, b_hh), strict=True):
        assert of_twin.grad is not None
        close(parameter.grad, of_twin.grad)


# ---------------------------------------------------------------- how models are trained


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over [B, T, 64]."""
        q, k, v = self.inner(x).view(*x.shape[:-1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(attended.transpose(-2, -3).flatten(-2)).relu() + x
        return result


def gradients(model: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> list[Tensor]:
    block.zero_grad()
    x = x.detach().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]


INSIDE_DYNAMO = "ignore:.*Function'> should not be instantiated:DeprecationWarning"
SR = Policy.of("mxfp4", "mxfp6_e3m2", {"format": "mxfp4", "rounding": "stochastic"})


@pytest.mark.parametrize("policy", [SIX, SR])
def test_activation_checkpointing_changes_no_bit(policy: Policy) -> None:
    block, x = Block(), torch.randn(2, 40, 64)
    convert(block, policy, verbose=False)
    outcomes = []
    for model in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(3)
        outcomes.append(gradients(model, block, x))
    assert all(map(torch.equal, *outcomes))


@pytest.mark.filterwarnings(INSIDE_DYNAMO)
def test_compiled_gradients_are_the_same_bits() -> None:
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 40, 64)
    convert(block, SIX, verbose=False)
    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, block, x), gradients(block, block, x)))
    torch._dynamo.reset()


@pytest.mark.filterwarnings(INSIDE_DYNAMO, "ignore:.*script_method:DeprecationWarning")
def test_compiled_rotations_are_one_for_both_operands() -> None:
    """The partition of the graph into forward and backward must not draw the signs twice."""
    torch._dynamo.reset()
    x, e = torch.randn(128, 64, requires_grad=True), torch.randn(128, 48)
    layer = nn.Linear(64, 48)
    convert(layer, Policy.named("mxfp4"), verbose=False)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    compiled(x).backward(e)
    exact = e.mT @ x.detach()
    assert layer.weight.grad is not None
    assert (layer.weight.grad - exact).norm() < 0.4 * exact.norm()
    torch._dynamo.reset()


@pytest.mark.filterwarnings(INSIDE_DYNAMO)
def test_compiled_convolution() -> None:
    torch._dynamo.reset()
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=2), torch.randn(2, 8, 5, 5)
    convert(layer, SIX, verbose=False)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, layer, x), gradients(layer, layer, x)))
    torch._dynamo.reset()


def test_accumulated_gradients_are_sums_and_see_new_weights() -> None:
    block = Block()
    convert(block, SIX, verbose=False)
    parts = torch.randn(2, 3, 40, 64)
    each = [gradients(block, block, x)[1:] for x in parts]
    block.zero_grad()
    for x in parts:
        block(x).square().sum().backward()
    for p, a, b in zip(block.parameters(), *each, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, a + b)
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    x, w, b = parts[0], block.inner.weight.detach(), block.inner.bias.detach()
    assert torch.equal(block.inner(x), F.linear(cast(x, "mxfp6_e2m3"), cast(w, "mxfp4"), b))


def test_autocast() -> None:
    """Operands are cast from float32 and multiplied in bfloat16, forward and backward."""
    layer, x = nn.Linear(64, 48), torch.randn(40, 64, requires_grad=True)
    convert(layer, SIX, verbose=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    e = torch.randn(40, 48, dtype=torch.bfloat16)
    y.backward(e)
    w = layer.weight.detach()
    of_input = cast(e, "mxfp8_e5m2") @ cast(w, "mxfp6_e3m2", 0).bfloat16()
    of_weight = cast(e, "mxfp8_e4m3", 0).mT @ cast(x.detach(), "mxint8", 0).bfloat16()
    torch.testing.assert_close(x.grad, of_input.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.weight.grad, of_weight.float(), rtol=1e-2, atol=1e-2)
    assert x.grad is not None
    assert x.grad.dtype is torch.float32


def test_backward_products_are_in_the_ledger() -> None:
    block = Block()
    convert(block, SIX, verbose=False)
    with record_products() as ledger:
        block(torch.randn(2, 40, 64)).sum().backward()
    rows = {(row.module, row.product): row for row in ledger}
    assert rows["inner", "linear wgrad"].how == "emulated"
    assert rows["inner", "linear wgrad"].formats == ("mxint8", "mxfp8_e4m3")
    assert rows["out", "linear dgrad"].formats == ("mxfp8_e5m2", "mxfp6_e3m2")
    assert {product for name, product in rows if not name} >= {"scores dgrad", "values wgrad"}


# ---------------------------------------------------------------- rotations and prescaling


@pytest.mark.parametrize("tokens", [64, 40])
def test_a_rotation_alone_changes_no_gradient(tokens: int) -> None:
    x, w = leaves((tokens, 50), (48, 50))
    e = doubles(tokens, 48)
    policy = Policy.from_dict(
        {
            "dgrad": {"grad": "mxint8", "hadamard": 32},
            "wgrad": {"grad": "mxint8", "hadamard": 16},
        }
    )
    linear(x, w, policy=policy).backward(e)
    # int8 of normal values errs by about 1 %; without the inverse of the rotation all is noise.
    for got, exact in ((x.grad, e @ w.detach()), (w.grad, e.mT @ x.detach())):
        assert got is not None
        assert (got - exact).norm() < 0.02 * exact.norm()


def test_rotations_are_of_the_seed() -> None:
    x, w = leaves((64, 64), (64, 64))
    policy = Policy.from_dict({"wgrad": {"input": "mxfp4", "grad": "mxfp4", "hadamard": 16}})
    found: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = linear(x, w, policy=policy)
        found += torch.autograd.grad(y, [w], x.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_prescaled_operands_are_divided_out() -> None:
    x, w = leaves((40, 64), (48, 64))
    e = doubles(40, 48)
    scaled = {"format": "mxfp4", "prescale": 0.75}
    policy = Policy.from_dict(
        {"dgrad": {"grad": scaled, "weight": scaled}, "wgrad": {"grad": scaled}}
    )
    linear(x, w, policy=policy).backward(e)
    left, right = (cast(0.75 * t, "mxfp4", a) for t, a in ((e, -1), (w.detach(), 0)))
    close(x.grad, left @ right / 0.75**2)
    close(w.grad, cast(0.75 * e, "mxfp4", 0).mT @ x.detach() / 0.75)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_gradients_of_stochastic_policies_are_unbiased(name: str) -> None:
    """Their mean is the gradient of the forward product that is not rounded: of wgrad, all of it.

    NVFP4 casts inputs and weights to nearest, so only gradients' own errors vanish there.
    """
    policy = Policy.named(name)
    x, w = torch.randn(64, 64, requires_grad=True), nn.Parameter(torch.randn(48, 64))
    e = torch.randn(64, 48)
    draws = [torch.autograd.grad(linear(x, w, policy=policy), (x, w), e) for _ in range(200)]
    found = [torch.stack(each).mean(0) for each in zip(*draws, strict=True)]
    exact = e @ w.detach(), e.mT @ x.detach()
    for got, true in zip(found, exact, strict=True):
        slope = (got * true).sum() / true.square().sum()
        error = (got - slope * true).norm() / true.norm()
        assert abs(slope - 1) < (0.005 if name == "mxfp4" else 0.03)
        assert error < (0.05 if name == "mxfp4" else 0.12)


def test_convolutions_cannot_be_rotated() -> None:
    layer = nn.Conv1d(32, 32, 3)
    policy = Policy.from_dict({"wgrad": {"grad": "mxfp4", "hadamard": 16}})
    convert(layer, policy, verbose=False)
    with pytest.raises(MicroscaleError, match="cannot be rotated"):
        layer(torch.randn(1, 32, 9))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"wgrad": {"hadamard": 12}}, "power of two"),
        ({"wgrad": {"hadamard": True}}, "power of two"),
        ({"forward": {"input": {"format": "mxfp4", "prescale": 0.75}}}, "only operands of dgrad"),
        ({"dgrad": {"grad": {"format": "mxfp4", "prescale": 2}}}, "in \\(0, 1\\]"),
    ],
)
def test_refusals(data: Any, words: str) -> None:
    with pytest.raises(MicroscaleError, match=words):
        Policy.from_dict(data)


def test_a_policy_with_all_of_it_is_read_back() -> None:
    grad = {"format": "mxfp4", "rounding": "stochastic", "prescale": 0.75}
    policy = Policy.from_dict({"dgrad": {"grad": grad, "hadamard": 32}})
    assert Policy.from_toml(policy.to_toml()) == policy
    assert Policy.from_json(policy.to_json()) == policy
