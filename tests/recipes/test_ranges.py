"""The recipe `ranges` on whole models: weights, inputs, batch norms, what is left, what is kept."""

import copy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.ranges import Sample, quantize_ranged
from microscale.recipes.ranges import Ranging, ranges
from microscale.scope import site_of
from microscale.spelling import get_block_format
from microscale.tensor import BlockTensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    return model.eval()


def images(count: int = 3) -> list[Tensor]:
    return [draw(4, 3, 6, 6, seed=i) for i in range(count)]


def applied(model: nn.Module, policy: str, **further: object) -> Ranging:
    return ranges(model, policy, images(), **further)  # type: ignore[arg-type]


@pytest.mark.usefixtures("weights_decoded_first")
@pytest.mark.parametrize("inputs", ["minmax", "running", "percentile", "mse"])
@pytest.mark.parametrize("weights", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(
    "policy",
    [
        "int8-channel/int8-tensor",
        "int4-channel/int8-tensor-zero_point",
        "fp8_e4m3fnuz-tensor",
        "fp8_e2m5fnuz-channel/fp8_e2m5fnuz-tensor-pow2",
    ],
)
def test_as_by_hand(policy: str, weights: str, inputs: str) -> None:
    """Quantized weights, then ranges of the float activations, then casts with them."""
    model, ours, parsed = network(), network(), Policy.parse(policy)
    report = applied(ours, policy, weights=weights, inputs=inputs)
    assert parsed.forward.weight is not None
    assert parsed.forward.input is not None
    for place in (0, 4):
        layer = model.get_submodule(str(place))
        weight = quantize_ranged(
            layer.get_parameter("weight").detach(), parsed.forward.weight, 1, weights
        )
        layer.weight = nn.Parameter(weight.dequantize())
    seen = images()
    for place, layer in enumerate(model):
        if place in (0, 4):
            sample = Sample()
            for x in seen:
                sample.add(x)
            fmt = sample.settle(parsed.forward.input.format, inputs)
            found = site_of(ours.get_submodule(str(place)))
            assert found is not None
            assert found.policy.forward.input == Operand(fmt)
            layer.register_forward_pre_hook(lambda _, xs, fmt=fmt: cast(xs[0], fmt))
            hooked = layer.forward
            seen = [hooked(x) for x in seen]
        else:
            seen = [layer(x) for x in seen]
    x = draw(4, 3, 6, 6, seed=9)
    assert torch.equal(ours(x), model(x))
    assert [one.module for one in report.inputs] == ["0", "4"]
    assert {w.name for w in report.weights} == {"0.weight", "4.weight"}
    assert isinstance(ours[0].weight, BlockTensor)
    assert report.dynamic == {}


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, fresh = network(), network()
    report = applied(model, "int8-channel/int8-tensor-zero_point", batch_norm=True)
    save(model, tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors", fresh)
    x = draw(4, 3, 6, 6, seed=9)
    assert torch.equal(fresh(x), model(x))
    policy = report.conversion.policy
    assert Policy.from_toml(policy.to_toml()) == policy
    assert "at" in str(report)
    assert report.to_dict()["batch_norms"] == 1


def test_a_sample_does_not_depend_on_others() -> None:
    model = network()
    applied(model, "int8-channel/int8-tensor")
    x = draw(4, 3, 6, 6, seed=9)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-6)


def test_batch_norms_are_averages() -> None:
    model, plain = network(), network()
    applied(model, "int4-channel/fp32", batch_norm=True)
    given, bias = plain[0].get_parameter("weight"), plain[0].get_parameter("bias")
    weight = quantize_ranged(given, Operand(get_block_format("int4-channel")), 1, "mse")
    outputs = [nn.functional.conv2d(x, weight.dequantize(), bias) for x in images()]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    assert torch.allclose(model[1].get_buffer("running_mean"), means, atol=1e-6)
    assert torch.allclose(model[1].get_buffer("running_var"), variances, atol=1e-6)
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_what_follows_the_data_is_said() -> None:
    report = applied(network(), "int8-channel/int8-token")
    assert set(report.dynamic) == {"0", "4"}
    assert "more than one scale" in report.dynamic["0"]
    assert report.inputs == ()


class Spare(nn.Module):
    """A layer that no data reaches, attention, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.used(x)
        x = self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        out: Tensor = self.memory(x)[0]
        return out


def test_unreached_attention_recurrent_and_masked() -> None:
    torch.manual_seed(0)
    model = Spare().eval()
    x, mask = draw(2, 6, 8), torch.ones(2, 6, dtype=torch.long)
    x[1, 4:], mask[1, 4:] = 1e6, 0
    batch = {"x": x, "attention_mask": mask}
    report = ranges(model, "int8-channel/int8-tensor", [batch], inputs="minmax")
    found = {one.module: one for one in report.inputs}
    assert set(found) == {"used", "attention", "attention.out_proj", "memory"}
    assert found["used"].high == float(x[mask.bool()].max())
    assert report.dynamic == {"spare": "the calibration data never reaches it"}
    assert model(**batch).isfinite().all()
    assert {w.name for w in report.weights if not w.note} >= {
        "used.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "memory.weight_hh_l0",
    }


def test_nothing_is_changed_by_a_failure() -> None:
    model = network()
    before, x = copy.deepcopy(model.state_dict()), images()[0]
    expected = model(x)
    wrong: list[Tensor] = [images()[0], draw(4, 2, 6, 6)]
    with pytest.raises(RuntimeError):
        ranges(model, "int8-channel/int8-tensor", wrong, batch_norm=True)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(site_of(module) is None for module in model.modules())


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        ("nvfp4/fp32", "policy forward.weight: format nvfp4 has two scales"),
        ("int8-channel-unit/fp32", "has the fixed scale unit"),
    ],
)
def test_formats_without_ranges_are_refused(policy: str, what: str) -> None:
    with pytest.raises(MicroscaleError, match=what):
        applied(network(), policy)


def test_bad_data_and_weights() -> None:
    with pytest.raises(MicroscaleError, match="batches is empty"):
        ranges(network(), "int8-channel/int8-tensor", [])
    with pytest.raises(MicroscaleError, match="estimator='best' is not known"):
        applied(network(), "int8-channel/int8-tensor", inputs="best")
    model = network()
    with torch.no_grad():
        model[4].get_parameter("weight")[0, 0] = torch.nan
    with pytest.raises(MicroscaleError, match=r"weight '4\.weight': x holds 1 values"):
        applied(model, "int8-channel/int8-tensor")


@pytest.mark.usefixtures("weights_decoded_first")
def test_a_fixed_bias_needs_no_range() -> None:
    model, plain = network(), network()
    applied(model, "int8-channel/fp8_e4m3fnuz-tensor-unit", weights="minmax")
    convert(plain, "int8-channel/fp8_e4m3fnuz-tensor-unit", verbose=False)
    x = images()[0]
    assert torch.equal(model(x), plain(x))


FLOATS = "fp8_e4m3fnuz-channel/fp8_e4m3fnuz-tensor"


def test_exponent_bits_of_least_error() -> None:
    """Each weight and input against all four formats by hand."""
    model, plain = network(), network()
    with torch.no_grad():
        for one in (model, plain):
            one[4].get_parameter("weight")[0] *= 0.001
            one[4].get_parameter("weight")[:, 0] *= 1000
    report = applied(model, FLOATS, exponents=True)
    formats = [f"fp8_e{e}m{7 - e}fnuz" for e in (4, 2, 3, 5)]
    for found in report.weights:
        weight = plain.get_parameter(found.name).detach()
        errors = {
            str(fmt): float(
                (weight - quantize_ranged(weight, Operand(fmt), 1, "mse").dequantize())
                .double()
                .square()
                .sum()
            )
            for fmt in (get_block_format(f"{name}-channel") for name in formats)
        }
        assert found.format == min(errors, key=errors.__getitem__)
    assert len({found.format for found in report.weights}) == 2
    sample = Sample()
    for x in images():
        sample.add(x)
    tried = [sample.settle(get_block_format(f"{name}-tensor"), "mse") for name in formats]
    best = min(tried, key=lambda f: float((images_flat() - cast(images_flat(), f)).square().sum()))
    assert report.inputs[0].format == str(best)
    assert model(images()[0]).isfinite().all()


def images_flat() -> Tensor:
    return torch.stack(images()).double().flatten().float()


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        ("int8-channel/fp8_e4m3fnuz-tensor", "forward.weight: format int8-channel has no exponent"),
        ("fp8_e4m3b9fnuz-tensor", "has the bias 9"),
        ("fp3_e2m0-tensor", "fp3_e2m0-tensor has one number"),
    ],
)
def test_formats_without_a_choice_of_exponents_are_refused(policy: str, what: str) -> None:
    with pytest.raises(MicroscaleError, match=what):
        applied(network(), policy, exponents=True)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed, again = network(), network(), network()
    policy = "int8-channel/int8-tensor-zero_point"
    report = applied(whole, policy, batch_norm=True)
    folder, calls = tmp_path / "progress", []

    def dying(*args: object) -> BlockTensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quantize_ranged(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(import_module("microscale.recipes.ranges"), "quantize_ranged", dying)
    with pytest.raises(KeyboardInterrupt):
        applied(killed, policy, batch_norm=True, progress=folder)
    assert site_of(killed[0]) is None
    resumed = applied(again, policy, batch_norm=True, progress=folder)
    assert len(calls) == 3  # the first weight, the second killed, the second again
    assert resumed.to_dict() == report.to_dict()
    for name, model in (("whole", whole), ("again", again)):
        save(model, tmp_path / f"{name}.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    assert not folder.exists()


def test_progress_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: object) -> BlockTensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("microscale.recipes.ranges"), "quantize_ranged", dying)
    with pytest.raises(KeyboardInterrupt):
        applied(network(), "int8-channel/int8-tensor", progress=tmp_path)
    with pytest.raises(MicroscaleError, match="the progress of another run"):
        applied(network(), "int8-channel/int8-tensor", progress=tmp_path, inputs="minmax")


def test_an_error_leaves_nothing_written(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[4].get_parameter("weight")[0, 0] = torch.nan
    with pytest.raises(MicroscaleError, match=r"weight '4\.weight': x holds 1 values"):
        applied(model, "int8-channel/int8-tensor", progress=tmp_path / "progress")
    with pytest.raises(MicroscaleError, match="matches no module"):
        ranges(
            network(),
            Policy.of("int8-channel", "int8-tensor", ignore=("nothing",)),
            images(),
            progress=tmp_path / "progress",
        )
    assert list(tmp_path.iterdir()) == []


def test_too_few_values_for_a_percentile_are_said() -> None:
    report = applied(network(), "int8-channel/int8-tensor", inputs="percentile")
    assert "2 inputs have fewer than 10000 values (0 1296), so their percentile is minmax" in str(
        report
    )
    assert "fewer than" not in str(applied(network(), "int8-channel/int8-tensor"))
