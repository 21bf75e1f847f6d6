"""Remedies for outliers: what they change nothing of, and what they win."""

import copy

import pytest
import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.recipes.groups import Grouped, split_inputs
from microscale.recipes.smoothing import smooth


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A norm with two readers, a linear layer after another, and one whose input is added too."""

    def __init__(self, *, residual: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 16)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.left(y).relu() + self.right(y)
        z = self.down(self.up(z))
        out: Tensor = z + y if self.residual else z
        return out


def block(*, residual: bool = False) -> Block:
    torch.manual_seed(0)
    model = Block(residual=residual).eval()
    with torch.no_grad():
        model.norm.weight[3] = 60.0
        model.norm.bias.copy_(draw(16, seed=1))
    return model


def error(model: nn.Module, wanted: Tensor, x: Tensor, policy: str) -> float:
    converted = copy.deepcopy(model)
    convert(converted, policy, verbose=False)
    with torch.no_grad():
        return float((converted(x) - wanted).square().sum())


def test_smoothing_changes_nothing_but_where_outliers_are() -> None:
    model, x = block(), draw(32, 16)
    with torch.no_grad():
        wanted = model(x)
    smoothed = copy.deepcopy(model)
    report = smooth(smoothed, [x])
    # The norm goes to `left` and `right` alone, `up` to `down`; what `up` gets is a sum.
    assert set(report.folded) == {"left", "right", "down"}
    assert report.at_run_time == ("up",)
    with torch.no_grad():
        assert torch.allclose(smoothed(x), wanted, atol=1e-4)
        before, after = (one.norm(x).abs().amax(0) for one in (model, smoothed))
    assert before.max() / before.median() > 5 * after.max() / after.median()
    policy = "int8-tensor"
    assert error(smoothed, wanted, x, policy) < error(model, wanted, x, policy) / 2


def test_scales_are_those_of_the_paper() -> None:
    model, x = block(), draw(32, 16)
    with torch.no_grad():
        largest = model.norm(x).abs().amax(0)
        weights = torch.stack([model.left.weight, model.right.weight]).abs().amax((0, 1))
        expected = model.norm.weight / (largest**0.75 / weights**0.25)
    smooth(model, [x], strength=0.75)
    assert torch.allclose(model.norm.weight, expected, rtol=1e-5)


def test_an_input_that_goes_elsewhere_is_divided_at_run_time() -> None:
    model, x = block(residual=True), draw(32, 16)
    smoothed = copy.deepcopy(model)
    report = smooth(smoothed, [x], names=["left"])
    assert (report.folded, report.at_run_time) == ((), ("left", "right"))
    assert torch.equal(smoothed.norm.weight, model.norm.weight)
    with torch.no_grad():
        wanted = model(x)
        # Copies and conversions keep the division.
        assert torch.allclose(copy.deepcopy(smoothed)(x), wanted, atol=1e-4)
    assert error(smoothed, wanted, x, "int8-tensor") < error(model, wanted, x, "int8-tensor") / 1.5


def test_shared_weights_and_repeated_layers_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 8)
            self.again, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.again(self.again(self.table(x))))
            return out

    model, x = Twice().eval(), torch.arange(8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = smooth(model, [x])
    assert (report.folded, report.at_run_time) == ((), ())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_not_as_it_seems_is_undone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.weight)

    model = nn.Sequential(OddRMSNorm(), nn.Linear(8, 4)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MicroscaleError, match="moved the model's outputs"):
        smooth(model, [draw(16, 8) * 30])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_groups_change_nothing_but_ranges() -> None:
    model, x = block(), draw(32, 16)
    with torch.no_grad():
        wanted = model(x)
    split = copy.deepcopy(model)
    assert split_inputs(split, ["left", "right", "norm", "nothing"], [x]) == ("left", "right")
    left = split.get_submodule("left")
    assert isinstance(left, Grouped)
    assert [part.get_parameter("weight").shape[1] for part in left.parts] == [4, 4, 4, 4]
    # The channel of the outliers is in the last group.
    assert 3 in left.get_buffer("channels3")
    with torch.no_grad():
        assert torch.allclose(split(x), wanted, atol=1e-5)
    policy = "int8-tensor"
    assert error(split, wanted, x, policy) < error(model, wanted, x, policy) / 1.3


def test_refusals() -> None:
    with pytest.raises(MicroscaleError, match="strength is 2; it lies"):
        smooth(block(), [draw(4, 16)], strength=2.0)
    with pytest.raises(MicroscaleError, match="groups is 1"):
        split_inputs(block(), ["left"], [draw(4, 16)], groups=1)
