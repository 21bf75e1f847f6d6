"""Models and policies out of the ordinary: what `convert` leaves, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from microscale.cast import cast
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.scope import site_of
from microscale.weights import cast_operand
from zoo import IDS, Zoo, classes


@pytest.fixture
def zoo() -> Zoo:
    return Zoo().eval()


# ---------------------------------------------------------------- unusual models


def test_a_module_under_two_names_is_converted_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    conversion = convert(model, "mxfp4", verbose=False)
    assert [entry.name for entry in conversion.entries] == ["0"]
    x = torch.randn(2, 32)
    once = F.linear(cast(x, "mxfp4"), cast(shared.weight.detach(), "mxfp4"), shared.bias).relu()
    assert torch.equal(model(x), shared(once))


class Sub(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the layer."""
        return 2 * super().forward(x)


def test_subclasses_are_quantized_as_they_call() -> None:
    layer, x = Sub(64, 8), torch.randn(3, 64)
    conversion = convert(layer, "mxfp4", verbose=False)
    (entry,) = conversion.entries
    assert (entry.kind, entry.status, entry.notes) == (
        "Sub",
        "quantized",
        ("as its forward calls them",),
    )
    expected = 2 * F.linear(cast(x, "mxfp4"), cast(layer.weight.detach(), "mxfp4"), layer.bias)
    assert torch.equal(layer(x), expected)


def test_parametrized_weights_are_weights() -> None:
    layer, x = nn.Linear(64, 8), torch.randn(3, 64)
    parametrizations.weight_norm(layer)
    convert(layer, "mxfp4/mxfp6_e2m3", verbose=False)
    weight = cast(layer.weight.detach(), "mxfp4")
    assert torch.equal(layer(x), F.linear(cast(x, "mxfp6_e2m3"), weight, layer.bias))


def test_replaced_forwards_are_left_and_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].__dict__["forward"] = lambda x: x
    (entry,) = convert(model, "mxfp4", verbose=False).entries
    assert entry.status == "left"
    assert "forward is replaced on the instance" in entry.reason
    x = torch.randn(2, 8)
    assert model(x) is x
    revert(model)


class Final(nn.Module):
    """A class that refuses subclasses."""

    def __init_subclass__(cls) -> None:
        message = "no subclasses, please"
        raise TypeError(message)

    def forward(self, x: Tensor) -> Tensor:
        """Give it back."""
        return x


def test_classes_without_subclasses_are_left_and_named() -> None:
    (entry,) = convert(nn.Sequential(Final()), "mxfp4", verbose=False).left
    assert entry.reason == "its class cannot be subclassed: no subclasses, please"


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_left_and_named() -> None:
    (entry,) = convert(nn.Sequential(nn.LazyLinear(8)), "mxfp4", verbose=False).left
    assert entry.reason.startswith("it has no shape yet; run a batch")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_left_and_named() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)))
    left = convert(model, "mxfp4", verbose=False).left
    assert [entry.reason for entry in left] == ["TorchScript cannot be looked into"]


def test_tables_that_rescale_are_left_and_named() -> None:
    model, ids = nn.Sequential(nn.Embedding(5, 8, max_norm=1.0)), torch.tensor([1, 2])
    expected = copy.deepcopy(model)(ids)
    (entry,) = convert(model, "mxfp4", verbose=False).left
    assert entry.reason == "max_norm rescales the table while it is read"
    assert torch.equal(model(ids), expected)


# ---------------------------------------------------------------- bad input


_OVERFLOWING = {"format": "mxfp4", "overflow": "nonfinite"}


def refused(model: Any, policy: Any) -> str:
    """The message, after making sure that nothing was changed."""
    before = classes(model) if isinstance(model, nn.Module) else None
    with pytest.raises(MicroscaleError) as raised:
        convert(model, policy, verbose=False)
    if before is not None:
        assert classes(model) == before
    return str(raised.value)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("mxpf4", "Did you mean mxfp4"),
        (Policy.of("mxfp4", ignore=("haed",)), "'haed', which matches no module of the model. Did"),
        (Policy.of("mxfp4", overrides={"x.*": "mxfp8"}), "policy overrides has the pattern 'x.*'"),
        (Policy.of("mxfp4", overflow="nonfinite"), "policy forward.weight: overflow='nonfinite'"),
        (
            Policy.of(overrides={"head": {"forward": {"input": _OVERFLOWING}}}),
            "policy overrides.'head'.forward.input: ",
        ),
    ],
)
def test_policies_that_cannot_be_carried_out_are_refused(
    zoo: Zoo, policy: Policy | str, says: str
) -> None:
    assert says in refused(zoo, policy)


def test_what_is_no_model_is_refused() -> None:
    assert refused([1], "mxfp4") == "model is a list; give a torch.nn.Module."
    with pytest.raises(MicroscaleError, match="model is a function"):
        revert(refused)  # type: ignore[arg-type]


def test_what_is_no_policy_is_refused(zoo: Zoo) -> None:
    assert refused(zoo, 4) == "policy is a int; give a Policy or a spelling."


def test_refused_policies_leave_a_converted_model_as_it_is(zoo: Zoo) -> None:
    convert(zoo, "mxfp4", verbose=False)
    refused(zoo, Policy.of("mxfp4", ignore=("nothing",)))
    site = site_of(zoo)
    assert site is not None
    assert site.policy == Policy.parse("mxfp4")


def test_operand_none_is_left(zoo: Zoo) -> None:
    expected = zoo(IDS)
    conversion = convert(zoo, "fp32", verbose=False)
    assert not [entry for entry in conversion.quantized if entry.weights]
    torch.testing.assert_close(zoo(IDS), expected)
    x = torch.randn(3, 4)
    assert cast_operand(x, None, -1) is x
