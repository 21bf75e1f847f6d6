"""Weights are cast once, again when they change, and never kept beyond their lives."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale.weights as weights_module
from microscale.cast import cast
from microscale.formats import MXFP4, NVFP4
from microscale.operands import Operand
from microscale.weights import cast_operand, cast_weight, forget, is_weight

FP4 = Operand(MXFP4)


class Counter:
    """Counts the casts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        result: Tensor = cast(x, *args, **options)
        return result


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    monkeypatch.setattr(weights_module, "cast", counter)
    return counter


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 64))


def check(weight: nn.Parameter) -> None:
    assert torch.equal(cast_weight(weight, FP4, -1), cast(weight.detach(), MXFP4))


@pytest.mark.parametrize("grad", [True, False])
def test_an_unchanged_weight_is_cast_once(casts: Counter, weight: nn.Parameter, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        values = [cast_weight(weight, FP4, -1) for _ in range(3)]
    assert casts.calls == 1
    for value in values:
        assert torch.equal(value, cast(weight.detach(), MXFP4))
        assert value.requires_grad == grad


def test_operands_and_axes_are_kept_apart(casts: Counter, weight: nn.Parameter) -> None:
    for _ in range(2):
        for operand, axis in ((FP4, 0), (FP4, 1), (Operand(NVFP4), 1)):
            expected = cast_operand(weight.detach(), operand, axis)
            assert torch.equal(cast_weight(weight, operand, axis), expected)
    assert casts.calls == 2 * 3 + 3


def test_views_share_their_parameter(casts: Counter, weight: nn.Parameter) -> None:
    for _ in range(2):
        assert torch.equal(cast_weight(weight.t(), FP4, 0), cast(weight.detach().t(), MXFP4, 0))
        assert torch.equal(cast_weight(weight[2:4], FP4, 1), cast(weight.detach()[2:4], MXFP4))
        assert torch.equal(cast_weight(weight[3:5], FP4, 1), cast(weight.detach()[3:5], MXFP4))
    assert casts.calls == 3
    with torch.no_grad():
        weight.mul_(3)
    cast_weight(weight.t(), FP4, 0)
    assert casts.calls == 4


def test_ever_new_views_do_not_fill_memory(weight: nn.Parameter) -> None:
    for width in range(1, 65):
        cast_weight(weight[:, :width], FP4, 1)
    assert len(weights_module._kept[weight]) <= weights_module._VIEWS


def sgd(weight: nn.Parameter, **options: bool) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5, **options).step()


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda w: w.data_ptr() and torch.no_grad()(w.add_)(1),
    "copy_": lambda w: torch.no_grad()(w.copy_)(torch.randn(8, 64)),
    "element": lambda w: torch.no_grad()(w.__setitem__)((0, 0), 100.0),
    "view": lambda w: torch.no_grad()(w[0].fill_)(7),
    "data": lambda w: setattr(w, "data", torch.randn(8, 64)),
    "SGD": sgd,
    "SGD, foreach": lambda w: sgd(w, foreach=True),
    "init": nn.init.normal_,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_again(casts: Counter, weight: nn.Parameter, change: str) -> None:
    check(weight)
    before = casts.calls
    CHANGES[change](weight)
    check(weight)
    assert casts.calls == before + 1


def test_a_change_of_type_is_seen(weight: nn.Parameter) -> None:
    check(weight)
    weight.data = weight.data.double()
    assert cast_weight(weight, FP4, -1).dtype == torch.float64
    check(weight)


def test_a_gradient_makes_a_weight_forgotten(casts: Counter, weight: nn.Parameter) -> None:
    # PyTorch's fused SGD and every optimizer that writes to `.data` leave the version counter.
    cast_weight(weight, FP4, -1).sum().backward()
    version = weight._version
    sgd(weight, fused=True)
    assert weight._version == version, "the counter is kept now; the note in weights.py is old"
    check(weight)
    assert casts.calls == 2


def test_writing_through_data_is_the_blind_spot(weight: nn.Parameter) -> None:
    stale = cast_weight(weight, FP4, -1).detach().clone()
    weight.data.mul_(5)
    assert torch.equal(cast_weight(weight, FP4, -1), stale)
    forget([weight])
    check(weight)


def test_gradient_is_straight_through(weight: nn.Parameter) -> None:
    upstream = torch.randn(8, 64)
    (cast_weight(weight, FP4, -1) * upstream).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)
    view = torch.autograd.grad((cast_weight(weight[1:3], FP4, -1) * upstream[1:3]).sum(), weight)[0]
    assert torch.equal(view[1:3], upstream[1:3])
    assert not view[0].any()


def test_values_made_in_inference_mode_serve_training(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        check(weight)
    (cast_weight(weight, FP4, -1) * weight).sum().backward()
    assert weight.grad is not None


def test_inference_parameters_are_cast_each_time(casts: Counter) -> None:
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(4, 64))
        check(weight)
        check(weight)
    assert casts.calls == 2


def test_tensors_that_are_no_parameters_are_cast_each_time(casts: Counter) -> None:
    x = torch.randn(4, 64)
    cast_weight(x, FP4, -1)
    cast_weight(x, FP4, -1)
    assert casts.calls == 2
    assert not is_weight(x)
    assert not is_weight(x[0])


def test_a_dead_weight_is_not_kept() -> None:
    weight = nn.Parameter(torch.randn(8, 64))
    cast_weight(weight, FP4, -1)
    (entry,) = weights_module._kept[weight].values()
    value, alive = weakref.ref(entry[1]), weakref.ref(weight)
    del entry, weight
    gc.collect()
    assert alive() is None
    assert value() is None


def test_copies_have_their_own_casts(weight: nn.Parameter) -> None:
    check(weight)
    twin = copy.deepcopy(weight)
    with torch.no_grad():
        twin.mul_(-2)
    check(twin)
    check(weight)


def test_threads_may_cast_together() -> None:
    parameters = [nn.Parameter(torch.randn(8, 64)) for _ in range(50)]
    failures: list[int] = []

    def work() -> None:
        for i, parameter in enumerate(parameters):
            if not torch.equal(cast_weight(parameter, FP4, -1), cast(parameter.detach(), MXFP4)):
                failures.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
