"""Weights as matrices and activations as rows multiply to what the layer gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.policy import Policy
from microscale.recipes.part import Parameters, Part, masked
from microscale.watch import Product, watching_products
from microscale.weights import uncast


def seen(
    model: nn.Module, *inputs: Any, policy: str | Policy = "mxfp4"
) -> list[tuple[Part, Product]]:
    convert(model, policy, verbose=False)
    found: list[tuple[Part, Product]] = []
    parameters = Parameters(model.named_parameters())

    def watch(product: Product) -> None:
        part = parameters.part(product)
        assert part is not None
        found.append((part, product))

    with watching_products(watch), uncast(), torch.no_grad():
        model(*inputs)
    return found


def product(model: nn.Module, part: Part, left: Tensor) -> Tensor:
    """[groups, rows, N]."""
    weight = model.get_parameter(part.parameter)
    matrices = part.matrices(part.view(weight))
    back = torch.zeros_like(weight)
    part.write(matrices, back)
    assert torch.equal(part.view(back), part.view(weight.detach()))
    return part.rows(left) @ matrices


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(5, 6, 3, padding=1), (2, 5, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 7, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 5, 5)),
    "same": (nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 6, 5)),
    "3d": (nn.Conv3d(3, 2, 2), (1, 3, 4, 3, 4)),
    "unbatched": (nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "transposed 1d": (nn.ConvTranspose1d(5, 4, 3, stride=2, padding=1), (2, 5, 6)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 3, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2)),
        (2, 4, 5, 4),
    ),
    "transposed grouped": (
        nn.ConvTranspose2d(6, 4, 3, groups=2, dilation=2, padding=5),
        (2, 6, 7, 7),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("convolution", ["channels", "window"])
def test_convolutions_are_products_of_matrices(name: str, convolution: str) -> None:
    model: Any
    model, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    ((part, told),) = seen(model, x, policy=Policy.of("mxfp4", "mxfp4", convolution=convolution))
    if convolution == "channels" or "transposed" in name:
        assert part.run == part.channels
    with uncast(), torch.no_grad():
        expected = model(x)
    expected = expected if len(shape) == model.weight.dim() else expected.unsqueeze(0)
    expected = expected - model.bias.detach().reshape(-1, *[1] * (expected.dim() - 2))
    ours = product(model, part, told.left)
    apart = expected.flatten(2).unflatten(1, (part.groups, -1)).permute(1, 0, 3, 2)
    torch.testing.assert_close(ours, apart.flatten(1, 2))


def test_linear_layers_and_thirds_of_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    found = seen(attention, x, x, x)
    assert [part.offset for part, _ in found] == [0, 64, 128, 0]
    assert len({id(told.source) for _, told in found[:3]}) == 1
    for i, (part, told) in enumerate(found[:3]):
        expected = (
            x.transpose(0, 1).reshape(-1, 8) @ attention.in_proj_weight.detach()[8 * i :][:8].T
        )
        torch.testing.assert_close(product(attention, part, told.left)[0], expected)


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(8, 4))
        self.left = nn.Parameter(torch.randn(3, 4))
        self.experts = nn.Parameter(torch.randn(2, 4, 3))
        self.vector = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.right
        z = self.left @ y.T
        both = torch.stack([y, y])
        return torch.bmm(both, self.experts).sum() + (z.T @ self.vector).sum()


def test_products_written_as_operators() -> None:
    model, x = Written(), torch.randn(6, 8)
    found = seen(model, x)
    y = x @ model.right.detach()
    outcomes = [product(model, part, told.left) for part, told in found]
    torch.testing.assert_close(outcomes[0][0], y)
    torch.testing.assert_close(outcomes[1][0], y @ model.left.detach().T)
    torch.testing.assert_close(outcomes[2], torch.stack([y, y]) @ model.experts.detach())
    assert outcomes[3].shape == (1, 6, 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_show_every_step(kind: Any) -> None:
    found = seen(kind(4, 6, num_layers=2), torch.randn(5, 3, 4))
    names = [part.parameter for part, _ in found]
    assert names.count("weight_ih_l0") == names.count("weight_ih_l1") == 1
    assert names.count("weight_hh_l0") == names.count("weight_hh_l1") == 5


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 2, 4), (6, 4)])
def test_masked_rows_are_left_out(shape: tuple[int, ...]) -> None:
    left = torch.arange(24.0).reshape(shape)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    rows = masked(left.reshape(1, -1, 4), left, mask)
    kept = mask.T.bool() if shape[0] == 3 else mask.bool()
    assert torch.equal(rows[0], left.reshape(-1, 4)[kept.reshape(-1)])
    other = torch.zeros(1, 5, 4)
    assert masked(other, torch.zeros(5, 4), mask) is other
