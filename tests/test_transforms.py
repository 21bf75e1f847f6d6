"""Converted models under vmap, export, checkpointing, weight norm and parametrizations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from microscale.cast import cast
from microscale.convert import convert, revert
from microscale.ledger import record_products
from product_spy import ProductSpy

SPELLING = "mxfp4/mxfp6_e2m3"


class Net(nn.Module):
    """A layer of each common kind, and a product written as an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """[4, 64] or [N, 4, 64] to [8, 64] or [N, 8, 64]."""
        x = x + self.down(self.norm(self.up(x)).relu())
        y: Tensor = self.conv(x) @ self.mix
        return y


@pytest.fixture
def net() -> Net:
    net = Net()
    convert(net, SPELLING, verbose=False)
    return net


# ---------------------------------------------------------------- torch.func


def test_vmap_over_the_batch(net: Net) -> None:
    x = torch.randn(5, 4, 64)
    mapped = torch.func.vmap(net)(x)
    torch.testing.assert_close(mapped, torch.stack([net(one) for one in x]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int8-token", "int8-tensor", "int8-channel"])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("dim", [0, 2])
def test_each_sample_is_cast_for_itself(fmt: str, axis: int, dim: int) -> None:
    x = torch.randn(5, 40, 6) * torch.tensor([1.0, 2, 4, 8, 16])[:, None, None]
    mapped = torch.func.vmap(lambda one: cast(one, fmt, axis), in_dims=dim, out_dims=dim)(x)
    assert torch.equal(mapped, torch.stack([cast(y, fmt, axis) for y in x.unbind(dim)], dim))
    twice = torch.func.vmap(torch.func.vmap(lambda one: cast(one, fmt)))(x)
    assert torch.equal(twice, torch.stack([torch.stack([cast(z, fmt) for z in y]) for y in x]))


def test_gradients_of_each_sample(net: Net) -> None:
    x, parameters = torch.randn(5, 4, 64), dict[str, Any](net.named_parameters())

    def loss(values: dict[str, Any], one: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(net, values, (one,))
        return out.square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        net.zero_grad()
        net(one).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(got[name][i], parameter.grad, rtol=1e-3, atol=1e-3)


def test_an_ensemble_of_weights() -> None:
    # Each member is a row of what is mapped over, and is cast with scales of its own.
    layers = [nn.Linear(64, 8) for _ in range(3)]
    values, _ = torch.func.stack_module_state(layers)
    layer, x = layers[0], torch.randn(5, 64)
    convert(layer, SPELLING, verbose=False)

    def call(state: dict[str, Tensor], given: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, state, (given,))
        return out

    mapped = torch.func.vmap(call, (0, None))(values, x)
    for i, other in enumerate(layers):
        revert(other)
        convert(other, SPELLING, verbose=False)
        torch.testing.assert_close(mapped[i], other(x))


# ---------------------------------------------------------------- export, checkpointing


def test_exported_programs_compute_the_same(net: Net) -> None:
    x = torch.randn(2, 4, 64)
    program = torch.export.export(net.eval(), (x,))
    casts = [n for n in program.graph.nodes if "microscale.cast" in str(n.target)]
    assert len(casts) == 2 * 4
    with torch.no_grad():
        assert torch.equal(program.module()(x), net(x))


def test_exported_programs_take_any_batch(net: Net) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        net.eval(), (torch.randn(3, 4, 64),), dynamic_shapes=({0: batch},)
    )
    x = torch.randn(7, 4, 64)
    with torch.no_grad():
        assert torch.equal(program.module()(x), net(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(net: Net, reentrant: bool) -> None:
    x = torch.randn(2, 4, 64, requires_grad=True)
    grads = []
    again: Any = checkpoint
    runs: list[Any] = [net, lambda given: again(net, given, use_reentrant=reentrant)]
    for run in runs:
        net.zero_grad()
        x.grad = None
        result: Tensor = run(x)
        torch.autograd.backward(result.square().sum())
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


# ---------------------------------------------------------------- parametrizations


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Twice the weight."""
        return 2 * weight


def parametrized() -> dict[str, tuple[nn.Module, Tensor]]:
    x = torch.randn(2, 8, 64)
    return {
        "weight norm": (parametrizations.weight_norm(nn.Linear(64, 32)), x),
        "weight norm of conv": (parametrizations.weight_norm(nn.Conv1d(8, 32, 3)), x),
        "spectral norm": (parametrizations.spectral_norm(nn.Linear(64, 32)).eval(), x),
        "orthogonal": (parametrizations.orthogonal(nn.Linear(64, 32)), x),
        "own": (parametrize.register_parametrization(nn.Linear(64, 32), "weight", Double()), x),
        "transposed": (parametrizations.weight_norm(nn.ConvTranspose1d(8, 32, 3)), x),
    }


@pytest.mark.parametrize("name", parametrized())
def test_parametrized_weights_are_cast_as_they_come(name: str) -> None:
    layer, x = parametrized()[name]
    model = nn.Sequential(layer)
    convert(model, SPELLING, verbose=False)
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        model(x)
    product = spy.seen[-1]
    product.check_result()
    weight: Any = layer.weight
    axis = 0 if name == "transposed" else 1
    expected = cast(weight.detach(), "mxfp4", axis)
    assert torch.equal(product.right.mT if not product.geometry else product.right, expected)
    assert ("mxfp6_e2m3", "mxfp4") in {row.formats for row in ledger}


@pytest.mark.parametrize("name", parametrized())
def test_what_parametrized_weights_are_made_of_can_be_trained(name: str) -> None:
    layer, x = parametrized()[name]
    convert(layer, SPELLING, verbose=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer(x).detach()
    layer(x).square().mean().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    assert not torch.equal(layer(x), before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_of_old_is_cast_too() -> None:
    layer: Any = torch.nn.utils.weight_norm(nn.Linear(64, 32))
    x = torch.randn(5, 64)
    convert(layer, SPELLING, verbose=False)
    with torch.no_grad(), ProductSpy() as spy:
        layer(x)
        assert torch.equal(spy.seen[-1].right.mT, cast(layer.weight.detach(), "mxfp4"))
        layer.weight_g.mul_(3.0)
        layer(x)
        assert torch.equal(spy.seen[-1].right.mT, cast(layer.weight.detach(), "mxfp4"))
