"""Vector operations in bfloat16: which results are rounded, to what, and which are not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_checks import tensors
from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.functional import linear, matmul, scaled_dot_product_attention
from microscale.functional.vector import deliver
from microscale.ledger import record_products
from microscale.policy import Policy

BF16 = Policy.of("mxfp8_e4m3", "mxfp8_e4m3", vector="bfloat16")
AWAY = Policy.of("mxfp8_e4m3", "mxfp8_e4m3", vector="bfloat16_away")
BARE = Policy.of(vector="bfloat16")
LARGEST = torch.finfo(torch.bfloat16).max


def on_grid(x: Tensor) -> bool:
    return torch.equal(x, x.bfloat16().to(x.dtype))


# ---------------------------------------------------------------- the rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_may_go_away_from_zero(dtype: torch.dtype) -> None:
    ties = torch.tensor([257.0, -257.0, 259.0, 2.0**-134, -(2.0**-134), 1.0, -0.0], dtype=dtype)
    expected = torch.tensor([258.0, -258.0, 260.0, 2.0**-133, -(2.0**-133), 1.0, -0.0], dtype=dtype)
    got = deliver(ties, AWAY)
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit(), ties.signbit())
    beyond = torch.tensor([3.4e38, -math.inf, math.nan], dtype=dtype)
    assert deliver(beyond, AWAY).tolist()[:2] == [LARGEST, -math.inf]
    assert deliver(beyond, AWAY)[2].isnan()
    x = torch.randn(1000, dtype=dtype, requires_grad=True)
    values = deliver(x, AWAY)
    assert torch.equal(values, x.bfloat16().to(dtype))  # no ties here
    values.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_values_are_rounded_to_bfloat16_in_their_own_type() -> None:
    x = torch.randn(1000) * torch.logspace(-40, 38, 1000)
    got = deliver(x, BF16)
    assert got.dtype == torch.float32
    assert torch.equal(got, x.bfloat16().float())
    assert deliver(x, Policy()) is x
    for half in (x.bfloat16(), x.half()):
        assert deliver(half, BF16) is half


def test_finite_values_stay_finite_and_others_what_they_are() -> None:
    smallest = torch.finfo(torch.float32).min
    got = deliver(torch.tensor([smallest, math.inf, -math.inf, math.nan, -0.0]), BF16)
    assert got[:3].tolist() == [-LARGEST, math.inf, -math.inf]
    assert got[3].isnan()
    assert math.copysign(1, got[4]) == -1


def test_float64_is_rounded_once() -> None:
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8], dtype=torch.float64)
    assert deliver(x, BF16).tolist() == [1 + 2.0**-7, 1.0]


def test_the_gradient_passes_as_it_is() -> None:
    x, upstream = torch.randn(50, requires_grad=True), torch.randn(50)
    deliver(x, BF16).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


# ---------------------------------------------------------------- functions


class Own(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        """Whatever the body does."""
        return self.body(x)


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "softmax method": lambda x: x.softmax(-1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (64,)),
    "rms_norm": lambda x: F.rms_norm(x, (64,)),
    "group_norm": lambda x: F.group_norm(x, 4),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(64), torch.ones(64) * 3),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "normalize": F.normalize,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid method": lambda x: x.sigmoid(),
    "relu": lambda x: F.relu(x * 1.01),
    "softplus": F.softplus,
    "glu": F.glu,
    "hardswish": F.hardswish,
    "in place": lambda x: F.silu(x * 1.01, inplace=True),
    "relu_": lambda x: torch.relu_(x * 1.01),
    "sigmoid_": lambda x: (x * 1.01).sigmoid_(),
    "+": lambda x: x + x.flip(0),
    "add": lambda x: torch.add(x, x.flip(0), alpha=3),
    "add method": lambda x: x.add(other=x.flip(0)),
    "+=": lambda x: (x * 1).__iadd__(x.flip(0)),
    "add_": lambda x: (x * 1).add_(x.flip(0)),
    "out": lambda x: torch.add(x, x.flip(0), out=torch.empty(8, 64)),
    "matmul": lambda x: x @ x.mT,
    "addmm": lambda x: torch.addmm(x[:, :8], x, x.mT),
    "baddbmm_": lambda x: x.new_ones(1, 8, 8).baddbmm_(x[None], x.mT[None]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "conv1d": lambda x: F.conv1d(x.mT, x[:, :, None]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "mul": lambda x: x * x.flip(0),
    "epsilon": lambda x: x + 1e-6,
    "reflected": lambda x: 1.01 + x,
    "mean": lambda x: x.mean(-1),
    "exp": torch.exp,
    "cat": lambda x: torch.cat([x, x]),
    "outer product": lambda x: x[:, :1] @ x[:1],
    "integers": lambda x: torch.arange(1000) + torch.arange(1000),
    "multi_dot, which is left": lambda x: torch.linalg.multi_dot([x, x.mT]),
}


@pytest.mark.parametrize("body", ROUNDED)
def test_these_results_are_rounded(body: str) -> None:
    module, x = Own(ROUNDED[body]), torch.randn(8, 64)
    wide = module(x.clone())
    convert(module, BARE, verbose=False)
    got = module(x.clone())
    assert on_grid(got)
    assert not on_grid(wide)
    torch.testing.assert_close(got, wide, rtol=2.0**-6, atol=2.0**-5)
    revert(module)
    assert torch.equal(module(x.clone()), wide)


@pytest.mark.parametrize("body", EXACT)
def test_these_results_are_as_they_were(body: str) -> None:
    module, x = Own(EXACT[body]), torch.randn(8, 64)
    wide = module(x)
    convert(module, BARE, verbose=False)
    assert torch.equal(module(x), wide)


def test_in_place_functions_can_be_trained_through() -> None:
    module = Own(lambda x: F.relu(x * 1, inplace=True) + (x * 3).sigmoid_())
    convert(module, BARE, verbose=False)
    x = torch.randn(8, 64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    s = (x.detach() * 3).sigmoid()
    torch.testing.assert_close(x.grad, 3 * s * (1 - s) + (x > 0), rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- modules


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


def grids(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Whether what each module gives is on the grid."""
    found: dict[str, bool] = {}
    hooks = []
    for name, module in model.named_modules():

        def hook(_: Any, __: Any, out: Any, name: str = name) -> None:
            found[name] = all(map(on_grid, tensors(out)))

        hooks.append(module.register_forward_hook(hook))
    model(x)
    for handle in hooks:
        handle.remove()
    return found


def test_a_block_computes_what_its_pieces_do() -> None:
    block, x = Block(), torch.randn(5, 64)
    convert(block, BF16, verbose=False)

    def r(y: Tensor) -> Tensor:
        return y.bfloat16().float()

    h = linear(r(F.layer_norm(x, (64,))), block.up.weight, block.up.bias, policy=BF16)
    expected = r(x + linear(r(F.gelu(h)), block.down.weight, block.down.bias, policy=BF16))
    assert on_grid(h)
    assert torch.equal(block(x), expected)


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    x = torch.randn(3, 5, 64)
    activations = nn.ReLU(inplace=True), nn.ELU(inplace=True)
    encoder = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    return {
        "sequential": (nn.Sequential(nn.Linear(64, 8), nn.Softmax(-1), nn.Linear(8, 4)), x),
        "in place": (nn.Sequential(nn.Linear(64, 8), *activations), x),
        "batch norm": (nn.Sequential(nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.Mish()), x),
        "encoder": (encoder, x),
        "frozen encoder": (nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False).eval(), x),
        "lstm": (nn.LSTM(64, 32, 2, bidirectional=True), x),
        "gru": (nn.GRU(64, 32), x),
        "rnn": (nn.RNN(64, 32, nonlinearity="relu"), x),
        "cell": (nn.LSTMCell(64, 32), x[0]),
        "upwards": (nn.ConvTranspose1d(5, 7, 3), x),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("policy", [BF16, BARE], ids=["mxfp8", "bare"])
def test_everything_that_modules_deliver_is_rounded(name: str, policy: Policy) -> None:
    model, x = layers()[name]
    convert(model, policy, verbose=False)
    found = grids(model, x)
    assert all(found.values()), found
    assert len(found) >= len([m for m in model.modules() if not list(m.children())]) - 2


def test_modules_have_settings_of_their_own() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    policy = Policy.of(
        "mxint8", "mxint8", vector="bfloat16", ignore=("1",), overrides={"2": {"vector": "float32"}}
    )
    convert(model, policy, verbose=False)
    found = grids(model, torch.randn(5, 64))
    assert {name for name, rounded in found.items() if rounded} == {
        "0", "0.norm", "0.up", "0.down"
    }  # fmt: skip
    other = nn.Sequential(Block(), Block())
    convert(other, Policy.of(overrides={"1": {"vector": "bfloat16"}}), verbose=False)
    found = grids(other, torch.randn(5, 64))
    assert {name for name, rounded in found.items() if rounded and name.startswith("0")} == set()
    assert found["1"]


def test_inner_modules_that_do_not_round_are_left_alone_by_outer_ones() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Own(F.gelu)
            self.left = Own(F.gelu)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.inner(x), self.left(x), F.gelu(x)

    model, x = Outer(), torch.randn(8, 64)
    policy = Policy.of(
        vector="bfloat16", ignore=("left",), overrides={"inner": {"vector": "float32"}}
    )
    convert(model, policy, verbose=False)
    inner, left, outer = model(x)
    assert torch.equal(inner, F.gelu(x))
    assert torch.equal(left, inner)
    assert torch.equal(outer, inner.bfloat16().float())


class MyRMSNorm(nn.Module):
    """A norm as models write it."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale to a mean square of one."""
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def test_norms_of_models_are_rounded_as_a_whole() -> None:
    norm, x = MyRMSNorm(), torch.randn(5, 64)
    expected = norm(x).bfloat16().float()
    convert(norm, BARE, verbose=False)
    assert torch.equal(norm(x), expected)


def test_attention_rounds_scores_probabilities_and_result() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 16).unbind(0)
    got = scaled_dot_product_attention(q, k, v, is_causal=True, policy=BARE)

    def r(y: Tensor) -> Tensor:
        return y.bfloat16().float()

    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    scores = r(q @ k.mT * 0.25).masked_fill(~mask, -math.inf)
    assert torch.equal(got, r(r(scores.softmax(-1)) @ v))


def test_reports_and_ledgers_tell() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
    conversion = convert(model, BARE, verbose=False)
    (entry,) = conversion.entries
    assert (entry.status, entry.notes) == ("quantized", ("delivers bfloat16",))
    assert conversion.scopes == {}
    with record_products() as ledger:
        model(torch.randn(2, 64))
    assert [row.reason for row in ledger] == ["the policy leaves both operands in the wider type"]
    assert not [e for e in convert(model, "mxfp4", verbose=False).entries if "delivers" in e.notes]


def test_the_setting_comes_back_from_files(tmp_path: Any) -> None:
    model, fresh, x = nn.Sequential(Block()), nn.Sequential(Block()), torch.randn(5, 64)
    convert(model, BF16, verbose=False)
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", fresh)
    assert torch.equal(fresh(x), model(x))
    assert on_grid(fresh(x))


def test_matmul_of_integers_is_left() -> None:
    x = torch.arange(9).reshape(3, 3)
    assert torch.equal(matmul(x, x, policy=BARE), x @ x)


@pytest.mark.parametrize("policy", [BF16, AWAY], ids=["even", "away"])
@pytest.mark.parametrize("name", ["sequential", "in place", "encoder", "cell", "block"])
def test_compiled_models_give_the_same_bits(name: str, policy: Policy) -> None:
    torch._dynamo.reset()
    model, x = (Block(), torch.randn(5, 64)) if name == "block" else layers()[name]
    model.eval()
    convert(model, policy, verbose=False)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, expected in zip(tensors(compiled(x)), tensors(model(x)), strict=True):
            assert torch.equal(got, expected)
    torch._dynamo.reset()
