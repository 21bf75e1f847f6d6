"""Learned ranges and exponents: gradients, starts, and what is left when they are settled."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.recipes.learned import LearnedRange
from microscale.recipes.preparation import prepare, range_parameters, ranges_of, settle
from microscale.scope import site_of
from microscale.spelling import get_block_format
from microscale.tensor import BlockTensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranged(spelling: str, count: int = 1, *, weight: bool = True, **more: Any) -> LearnedRange:
    return LearnedRange("x", Operand(get_block_format(spelling)), count, weight=weight, **more)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_gradients_are_those_of_lsq(bits: int, most: int) -> None:
    """The closed form of arXiv 1902.08153, equations 1 to 5, written out."""
    one, x = ranged(f"int{bits}-tensor"), draw(40, 30).requires_grad_()
    one.cast(x, -1)
    step = 2 * float(x.detach().abs().mean()) / math.sqrt(most)
    assert float(one.step.detach()) == pytest.approx(step, rel=1e-6)
    with torch.no_grad():
        one.step.fill_(1.5 / most)  # so that some are beyond
    grad = draw(40, 30, seed=1)
    (one.cast(x, -1) * grad).sum().backward()
    v = x.detach().double() / float(one.step.detach())
    inside = v.abs() < most
    assert 0 < int(inside.sum()) < v.numel()
    slope = torch.where(inside, v.round() - v, v.sign() * most)
    gain = 1 / math.sqrt(v.numel() * most)
    assert one.step.grad is not None
    assert float(one.step.grad) == pytest.approx(float((slope * grad).sum() * gain), rel=1e-4)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, grad, 0.0))


def test_the_gain_of_inputs_counts_the_features_of_a_sample() -> None:
    gains = []
    for weight in (True, False):
        one, x = ranged("int8-tensor", weight=weight), draw(16, 3, 5)
        one.cast(x, 1).sum().backward()
        assert one.step.grad is not None
        gains.append(float(one.step.grad))
    assert gains[1] / gains[0] == pytest.approx(math.sqrt(16), rel=1e-5)


@pytest.mark.parametrize("spelling", ["int8-channel", "fp8_e4m3-channel", "int4-16-fp32"])
def test_each_scale_has_its_own_gradient(spelling: str) -> None:
    """Rows cast together are rows cast alone."""
    x = draw(3, 16) * torch.tensor([[1.0], [10.0], [0.1]])
    whole, grad = ranged(spelling, 3), draw(3, 16, seed=1)
    values = whole.cast(x, 1)
    (values * grad).sum().backward()
    assert whole.step.grad is not None
    for row in range(3):
        alone = ranged(spelling, 1)
        one = alone.cast(x[row : row + 1], 1)
        (one * grad[row : row + 1]).sum().backward()
        assert torch.equal(one[0], values[row])
        assert alone.step.grad is not None
        assert torch.allclose(alone.step.grad[0], whole.step.grad[row], rtol=1e-5)


def by_formula(x: Tensor, maxval: Tensor, m: Tensor, bits: int) -> Tensor:
    """The authors' code of arXiv 2208.09225, differentiated by autograd."""
    ste = (m.round() - m).detach() + m
    M = ste.clamp(1, bits - 1)
    E = bits - 1 - M
    bias = 2**E - maxval.log2() + (2 - 2**-M).log2() - 1
    xc = torch.minimum(torch.maximum(x, -maxval), maxval)
    p = (xc.detach().abs().log2() + bias.detach()).floor().clamp(min=1.0)
    s = 2 ** (p - M - bias)
    quotient = xc / s
    return s * ((quotient.round() - quotient).detach() + quotient)


@pytest.mark.parametrize("mantissa", [2, 3, 4, 5])
def test_gradients_of_exponents_are_those_of_the_authors(mantissa: int) -> None:
    x = draw(50, 20)
    one = ranged(f"fp8_e{7 - mantissa}m{mantissa}-tensor", exponents=True)
    one.cast(x, -1)
    maxval = 2.2  # so that some are beyond
    largest = one.format.element.largest
    with torch.no_grad():
        one.step.fill_(maxval / largest)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    grad = draw(50, 20, seed=1)
    values = one.cast(ours, -1)
    (values * grad).sum().backward()
    most = torch.tensor(float(one.step.detach()) * largest, dtype=torch.float64)
    m = torch.tensor(float(mantissa), dtype=torch.float64)
    most.requires_grad_()
    m.requires_grad_()
    expected = by_formula(theirs, most, m, 8)
    (expected * grad).sum().backward()
    assert torch.allclose(values.double(), expected, atol=1e-6)
    assert theirs.grad is not None
    assert most.grad is not None
    assert m.grad is not None
    assert one.mantissa is not None
    assert one.mantissa.grad is not None
    assert one.step.grad is not None
    assert ours.grad is not None
    assert torch.allclose(ours.grad.double(), theirs.grad)
    assert float(one.mantissa.grad) == pytest.approx(float(m.grad), rel=1e-3)
    gain = 1 / math.sqrt(x.numel() * largest)
    assert float(one.step.grad) == pytest.approx(float(most.grad) * largest * gain, rel=1e-3)


def test_the_gradient_of_a_scale_is_that_of_the_error_it_makes() -> None:
    """Where no code changes, dv^/ds of the saturated values is exact: a finite difference."""
    one, x = ranged("int4-tensor"), draw(64).abs() + 2.0
    one.cast(x, -1)
    with torch.no_grad():
        one.step.fill_(0.125)  # the last code stands for 0.875: everything saturates
    (one.cast(x, -1)).sum().backward()
    steps = torch.tensor([0.125 - 2**-10, 0.125 + 2**-10])
    sums = []
    for step in steps:
        with torch.no_grad():
            one.step.fill_(float(step))
            sums.append(float(one.cast(x, -1).double().sum()))
    slope = (sums[1] - sums[0]) / float(steps[1] - steps[0])
    assert one.step.grad is not None
    assert float(one.step.grad) == pytest.approx(slope / math.sqrt(64 * 7), rel=1e-5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 5)
    )


def trained(policy: str, learn: Any = "ranges", steps: int = 6) -> nn.Sequential:
    """A user's own loop."""
    model = network()
    convert(model, policy, verbose=False)
    prepare(model, learn=learn)
    apart = range_parameters(model)
    names = {id(p) for p in apart}
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in names], 1e-2),
        torch.optim.SGD(apart, 1e-2),
    ]
    x, y = draw(32, 3, 6, 6), torch.arange(32) % 5
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.mark.usefixtures("weights_decoded_first")
@pytest.mark.parametrize(
    ("policy", "learn"),
    [
        ("int8-channel/int8-tensor", "ranges"),
        ("int4-channel/int8-tensor-zero_point", "ranges"),
        ("int4-tensor/int4-tensor", "ranges"),
        ("fp8_e4m3-tensor", "ranges"),
        ("fp8_e4m3-channel/fp8_e5m2-tensor", "exponents"),
    ],
)
def test_settled_saved_and_loaded_it_is_what_was_trained(
    policy: str, learn: str, tmp_path: Path
) -> None:
    model, fresh, x = trained(policy, learn), network().eval(), draw(9, 3, 6, 6, seed=5)
    with pytest.raises(MicroscaleError, match="still learning its ranges"):
        save(model, tmp_path / "model.safetensors")
    start = copy.deepcopy(ranges_of(model))
    assert len(start) == 6
    with torch.no_grad():
        before = model(x)
        conversion = settle(model)
        assert torch.equal(model(x), before)
        assert not ranges_of(model)
        save(model, tmp_path / "model.safetensors")
        load(tmp_path / "model.safetensors", fresh)
        assert torch.equal(fresh(x), before)
    assert all(isinstance(model[i].weight, BlockTensor) for i in (0, 3, 5))
    assert all("-at" in entry.formats["input"] for entry in conversion.quantized)
    if learn == "exponents":
        assert all("finite" in entry.formats["weight"] for entry in conversion.quantized)


def test_the_model_is_copied_and_moved_with_its_ranges() -> None:
    model, x = trained("int8-channel/int8-tensor"), draw(4, 3, 6, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for one in ranges_of(twin).values():
            one.step.mul_(3)
        assert not torch.equal(twin(x), model(x))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), model(x))
    revert(twin)
    assert set(twin.state_dict()) == set(network().state_dict())


def test_a_clipped_gradient_is_that_of_the_cast() -> None:
    model, x = nn.Linear(64, 8, bias=False), 3 * draw(5, 64)
    convert(model, "mxfp4/fp32", verbose=False)
    prepare(model, gradient="clipped")
    model(x).sum().backward()
    weight = model.weight.detach().clone().requires_grad_()
    F.linear(x, cast(weight, "mxfp4", gradient="clipped")).sum().backward()
    assert model.weight.grad is not None
    assert weight.grad is not None
    assert torch.equal(model.weight.grad, weight.grad)
    assert (weight.grad == 0).any()
    settle(model)
    site = site_of(model)
    assert site is not None
    assert type(site.policy.forward.weight) is Operand


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)
        self.memory = nn.GRU(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.memory(self.used(x))[0]
        return out


def test_what_is_not_learned_is_said_and_follows_its_values() -> None:
    model = Spare()
    convert(model, "int8-channel/int8-tensor", verbose=False)
    report = prepare(model, learn="ranges")
    assert "used.weight" in report.learned
    assert "cast in parts" in report.followed["memory.weight_ih_l0"]
    assert "Follows its values" in str(report)
    model(draw(3, 2, 8)).sum().backward()
    settle(model)
    assert isinstance(model.used.weight, BlockTensor)
    # No value ever reached it.
    assert not isinstance(model.spare.weight, BlockTensor)
    site = site_of(model.spare)
    assert site is not None
    assert str(site.policy.forward.input) == "int8-tensor"


@pytest.mark.parametrize(
    ("policy", "learn", "gradient", "message"),
    [
        ("mxfp4", "ranges", "identity", "no operand of the model has what is to be learned"),
        ("int8-tensor", "exponents", "identity", "exponents"),
        ("int8-tensor", "scales", "identity", "learn='scales'"),
        ("int8-tensor", "off", "soft", "gradient='soft'"),
    ],
)
def test_refusals(policy: str, learn: Any, gradient: str, message: str) -> None:
    model = network()
    with pytest.raises(MicroscaleError, match="not converted"):
        prepare(model)
    convert(model, policy, verbose=False)
    with pytest.raises(MicroscaleError, match=message):
        prepare(model, learn=learn, gradient=gradient)
    assert not ranges_of(model)


def test_a_range_that_is_lost_is_named() -> None:
    model = trained("int8-channel/int8-tensor")
    with pytest.raises(MicroscaleError, match="prepared already"):
        prepare(model, learn="ranges")
    ranges_of(model)["3.microscale_weight_range"].step.data[2] = -1.0
    with pytest.raises(MicroscaleError, match=r"3\.weight: learned steps reach from -1 "):
        model(draw(2, 3, 6, 6))


def test_a_first_batch_that_is_not_finite_is_refused() -> None:
    with pytest.raises(MicroscaleError, match="1 of the first values are NaN"):
        ranged("int8-tensor").cast(torch.tensor([1.0, math.nan]), -1)
    assert ranged("int8-tensor").cast(torch.empty(0), -1).numel() == 0
