"""Whole models: what is solved, in what order, from what data, and what is left behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.recipes.diffusion import error_diffusion
from microscale.scope import site_of
from microscale.tensor import BlockTensor


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 3, stride=2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(32 * 9, 10),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 48, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(96, 32, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(self.lstm(self.table(x))[0])[0])
        return y


class Attentive(nn.Module):
    """A tied table, a stack of encoder layers, a product written as an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.turn = nn.Parameter(torch.randn(32, 32) / 32**0.5)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        padding = None if attention_mask is None else ~attention_mask.bool()
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        y: Tensor = self.head(x @ self.turn)
        return y


def pictures(count: int = 3) -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) for _ in range(count)]


def words(count: int = 3) -> list[Tensor]:
    return [torch.randint(0, 50, (16, 12)) for _ in range(count)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "perceptron": (perceptron, lambda: [torch.randn(128, 64) for _ in range(3)]),
    "convolutional": (convolutional, pictures),
    "recurrent": (Recurrent, words),
    "attentive": (Attentive, words),
}


def outputs(model: nn.Module, data: list[Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x).flatten() for x in data])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["mxfp4", "mxfp4/fp32", "nvfp4", "int8-channel/int8-token"])
def test_nearest_is_direct_cast(name: str, policy: str) -> None:
    make, draw = MODELS[name]
    model, data = make(), draw()
    expected = copy.deepcopy(model)
    convert(expected, policy, verbose=False)
    error_diffusion(model, policy, data, method="rtn", scales="rule")
    # Decoded weights lie otherwise in memory, so that convolutions add in another order.
    torch.testing.assert_close(outputs(model, data), outputs(expected, data))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["error_diffusion", "qronos"])
@pytest.mark.parametrize("policy", ["mxfp4/fp32", "nvfp4/mxfp8_e4m3"])
def test_the_network_errs_less(name: str, method: Any, policy: str) -> None:
    make, draw = MODELS[name]
    model, data = make(), draw()
    wide = outputs(model, data)
    direct = copy.deepcopy(model)
    convert(direct, policy, verbose=False)
    report = error_diffusion(model, policy, data, method=method)
    solved, nearest = (F.mse_loss(outputs(m, data), wide) for m in (model, direct))
    assert solved < nearest
    assert not report.unreached
    assert all(outcome.after <= outcome.before for outcome in report.outcomes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["mxfp4", "nvfp4", "int4-channel/fp32", "mxint8"])
def test_what_is_saved_is_what_was_evaluated(name: str, policy: str, tmp_path: Any) -> None:
    make, draw = MODELS[name]
    model, data = make(), draw()
    error_diffusion(model, policy, data, method="qronos", scales="mse")
    save(model, tmp_path / "model.safetensors")
    again = make()
    load(tmp_path / "model.safetensors", again)
    assert torch.equal(outputs(again, data), outputs(model, data))


def test_packed_weights_decode_to_values_on_the_grid() -> None:
    model, data = perceptron(), [torch.randn(128, 64)]
    error_diffusion(model, "mxfp6_e2m3", data, scales="mse")
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert isinstance(parameter, BlockTensor)
            values = parameter.dequantize()
            assert torch.equal(cast(values, "mxfp6_e2m3", 1), values)


def test_only_one_layer_at_a_time_is_solved_by_the_inputs_that_it_gets() -> None:
    """The first layer's statistics are of the data itself, the second's of what the first gives."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    layers: Any = model
    first, second = (layers[i].weight.detach().clone() for i in (0, 1))
    x = torch.randn(200, 32)
    report = error_diffusion(model, "mxfp4/fp32", [x[:50], x[50:]])
    solved = layers[0].weight.dequantize(), layers[1].weight.dequantize()
    for outcome, layer, given, got in (
        (report.outcomes[0], (first, solved[0]), x, x),
        (report.outcomes[1], (second, solved[1]), x @ first.T, x @ solved[0].T),
    ):
        lost = (given @ layer[0].T - got @ layer[1].T).square().sum()
        expected = lost / (given @ layer[0].T).square().sum()
        assert outcome.after == pytest.approx(float(expected), rel=1e-3)
        assert outcome.samples == 200


@pytest.mark.parametrize("budget", [0, 2**30])
def test_blocks_stand_still_without_a_change(
    budget: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """With and without finished blocks standing still, in memory and on disk: the same weights."""
    plain, quick, data = Attentive(), Attentive(), words()
    quick.load_state_dict(plain.state_dict())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error_diffusion(quick, "mxfp4", data, cache_bytes=budget)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("microscale.recipes.stacks._lists", lambda _: iter(()))
    error_diffusion(plain, "mxfp4", data)
    for a, b in zip(plain.parameters(), quick.parameters(), strict=True):
        assert torch.equal(*(p.dequantize() if isinstance(p, BlockTensor) else p for p in (a, b)))


class Skipping(nn.Module):
    """A stack whose last block sees what the first one gave: nothing may stand still here."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x).relu()
        y: Tensor = self.layers[2](self.layers[1](first).relu() + first)
        return y


def test_skipped_blocks_are_run_again() -> None:
    model, data = Skipping(), [torch.randn(100, 32)]
    wide = outputs(model, data)
    direct = copy.deepcopy(model)
    convert(direct, "mxfp4/fp32", verbose=False)
    error_diffusion(model, "mxfp4/fp32", data)
    solved, nearest = (F.mse_loss(outputs(m, data), wide) for m in (model, direct))
    assert solved < nearest
    assert "forward" not in {name for layer in model.layers for name in layer.__dict__}


def test_padding_says_nothing() -> None:
    plain, padded = Attentive(), Attentive()
    padded.load_state_dict(plain.state_dict())
    ids = torch.randint(1, 50, (8, 10))
    wider = F.pad(ids, (0, 6))
    mask = (torch.arange(16) < 10).expand(8, 16).long()
    policy = "mxfp4/fp32"
    report = error_diffusion(plain, policy, [{"ids": ids, "attention_mask": mask[:, :10]}])
    other = error_diffusion(padded, policy, [{"ids": wider, "attention_mask": mask}])
    rows = [outcome.samples for outcome in report.outcomes]
    assert rows == [outcome.samples for outcome in other.outcomes]
    assert max(rows) == 80
    for a, b in zip(report.outcomes, other.outcomes, strict=True):
        assert a.after == pytest.approx(b.after, rel=0.05)


def test_the_tied_table_is_solved_first_and_stays_tied() -> None:
    model, data = Attentive(), words()
    report = error_diffusion(model, "mxfp4", data)
    assert report.outcomes[0].name == "table.weight"
    assert "solved first: it is looked up too" in report.outcomes[0].notes
    assert model.head.weight is model.table.weight
    assert isinstance(model.head.weight, BlockTensor)


class Branching(nn.Module):
    """One layer of several, picked by the sign of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(32, 8)
        self.negative = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.positive if float(x.sum()) > 0 else self.negative
        y: Tensor = chosen(x)
        return y


def test_a_layer_that_no_data_reaches_is_named() -> None:
    model = Branching()
    weight = model.negative.weight.detach().clone()
    report = error_diffusion(model, "mxfp4", [torch.rand(64, 32) for _ in range(2)])
    assert list(report.unreached) == ["negative.weight"]
    assert "no product of the calibration data uses it" in str(report)
    assert torch.equal(model.negative.weight, weight)
    x = -torch.rand(4, 32)
    expected = F.linear(cast(x, "mxfp4"), cast(weight, "mxfp4"), model.negative.bias)
    torch.testing.assert_close(model(x), expected)


def test_too_few_samples_are_counted() -> None:
    model = perceptron()
    report = error_diffusion(model, "mxfp4", [torch.randn(20, 64)])
    assert [outcome.samples for outcome in report.scarce] == [20, 20, 20]
    assert "20 samples for 64 inputs: too few, H is singular" in str(report)


def test_inputs_that_are_always_zero_are_counted() -> None:
    layer = nn.Linear(64, 8)
    model = nn.Sequential(layer)
    x = torch.randn(200, 64)
    x[:, 3], x[:, 40:] = 0, 0
    weight = layer.weight.detach().clone()
    report = error_diffusion(model, "mxfp4", [x], settle="original", scales="rule")
    assert report.outcomes[0].notes == ("25 inputs always zero",)
    solved: Tensor = layer.weight.dequantize()
    assert torch.equal(solved[:, 40:], cast(weight, "mxfp4")[:, 40:])


def test_training_mode_and_hooks_survive() -> None:
    model, data = Attentive(), words()
    model.train()
    model.layers[1].eval()
    error_diffusion(model, "mxfp4", data)
    assert model.training
    assert model.head.training
    assert not model.layers[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (torch.randn(4, 64), r"batches is one tensor \(4, 64\)"),
        (3, "batches is a int"),
        (
            [torch.randn(4, 64), torch.randn(4, 63)],
            r"batch 1 does not fit .* \(RuntimeError",
        ),
        ([torch.full((4, 64), float("nan"))], "batch 0: 256 of 256 values of tensor are NaN"),
        ([torch.randn(0, 64)], r"batch 0: tensor has shape \(0, 64\): no data"),
        ([{"wrong": torch.randn(4, 64)}], r"batch 0 does not fit the model \(TypeError"),
        (["text"], "batch 0 is a str"),
    ],
)
def test_bad_data_changes_nothing(batches: Any, message: str) -> None:
    model = perceptron()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(MicroscaleError, match=message):
        error_diffusion(model, "mxfp4", batches)
    assert not any(site_of(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).exp().exp())
        return y


def test_activations_that_are_not_finite_are_refused_by_name() -> None:
    model = Overflowing()
    before = model.first.weight.detach().clone()
    with pytest.raises(MicroscaleError, match=r"batch 1: 'second.weight' is multiplied with"):
        error_diffusion(model, "mxfp4", [torch.randn(8, 32), 100 * torch.randn(8, 32)])
    assert torch.equal(model.first.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptp"}, r"method 'gptp'.*gptq"),
        ({"scales": "best"}, "scales 'best'"),
        ({"settle": "never"}, "settle 'never'"),
    ],
)
def test_options_that_are_not_known_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MicroscaleError, match=message):
        error_diffusion(perceptron(), "mxfp4", [torch.randn(4, 64)], **options)


def test_a_function_may_run_the_model() -> None:
    plain, called = perceptron(), perceptron()
    called.load_state_dict(plain.state_dict())
    x = torch.randn(128, 64)
    error_diffusion(plain, "mxfp4", [x])
    error_diffusion(called, "mxfp4", [lambda model: model(x)])
    assert torch.equal(outputs(plain, [x]), outputs(called, [x]))


class Killed(BaseException):
    """Stands for the end of a process."""


def killed_after(batches: int) -> Callable[[str, int, int], None]:
    calls = iter(range(batches))

    def report(*_: object) -> None:
        if next(calls, None) is None:
            raise Killed

    return report


def stored(model: nn.Module, path: Any) -> bytes:
    save(model, path)
    return bytes(path.read_bytes())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batches", [0, 4, 7])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    name: str, batches: int, tmp_path: Any
) -> None:
    make, draw = MODELS[name]
    model, data = make(), draw()
    killed, again = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"method": "qronos", "scales": "mse"}
    whole = error_diffusion(model, "mxfp4", data, **options)
    folder = tmp_path / "progress"
    with pytest.raises(Killed):
        error_diffusion(
            killed, "mxfp4", data, progress=folder, report=killed_after(batches), **options
        )
    assert (folder / "run.json").is_file()
    seen: list[str] = []
    resumed = error_diffusion(
        again, "mxfp4", data, progress=folder, report=lambda w, *_: seen.append(w), **options
    )
    assert not folder.exists()
    assert len(seen) < len(data) * len(whole.outcomes) or batches < 3
    assert stored(again, tmp_path / "a.safetensors") == stored(model, tmp_path / "b.safetensors")
    assert resumed.to_dict() == whole.to_dict()


def test_progress_of_another_run_is_refused(tmp_path: Any) -> None:
    model, data = perceptron(), [torch.randn(64, 64)]
    killed = copy.deepcopy(model)
    with pytest.raises(Killed):
        error_diffusion(killed, "mxfp4", data, progress=tmp_path, report=killed_after(1))
    kept = sorted(tmp_path.iterdir())
    for changed in (
        {"policy": "mxfp6_e2m3"},
        {"batches": [data[0] + 1]},
        {"scales": "rule"},
        {"model": perceptron()},
    ):
        arguments: dict[str, Any] = {"model": model, "policy": "mxfp4", "batches": data} | changed
        with pytest.raises(MicroscaleError, match="the progress of another run"):
            error_diffusion(**arguments, progress=tmp_path)
    assert sorted(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("policy", ["mxfp4", "nvfp4", "int8-channel/int8-token"])
def test_models_of_other_types(dtype: torch.dtype, policy: str, tmp_path: Any) -> None:
    model, data = perceptron().to(dtype), [torch.randn(128, 64, dtype=dtype)]
    report = error_diffusion(model, policy, data)
    assert all(outcome.packed for outcome in report.outcomes)
    save(model, tmp_path / "model.safetensors")
    again = perceptron().to(dtype)
    load(tmp_path / "model.safetensors", again)
    assert torch.equal(outputs(again, data), outputs(model, data))


def test_a_weight_that_is_not_finite_is_left_by_name() -> None:
    model, data = perceptron(), [torch.randn(128, 64)]
    with torch.no_grad():
        last: Any = model.get_parameter("4.weight")
        last[3, 5] = float("nan")
    report = error_diffusion(model, "mxfp4", data)
    assert report.unreached == {"4.weight": "it holds values that are NaN or infinite"}


@pytest.mark.parametrize("convolution", ["channels", "window"])
def test_convolutions_by_window(convolution: str) -> None:
    model, data = convolutional(), pictures()
    wide = outputs(model, data)
    policy = Policy.of("mxfp4", None, convolution=convolution)
    direct = copy.deepcopy(model)
    convert(direct, policy, verbose=False)
    error_diffusion(model, policy, data)
    solved, nearest = (F.mse_loss(outputs(m, data), wide) for m in (model, direct))
    assert solved < nearest


@pytest.mark.parametrize("fmt", ["mxfp4-16x16", "int4-16-zero_point"])
def test_blocks_that_are_not_columns_are_refused(fmt: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(MicroscaleError, match=r"policy forward.weight is .*: tiles and zero"):
        error_diffusion(model, f"{fmt}/fp32", [torch.randn(4, 16)])
    assert type(model[0]) is nn.Linear
