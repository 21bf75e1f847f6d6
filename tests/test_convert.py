"""`convert` and `revert`: what they change, what they report, and what survives."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microscale.weights as weights_module
from microscale import nn as quantized
from microscale.cast import cast
from microscale.convert import convert, revert
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.scope import site_of
from microscale.spelling import get_block_format
from zoo import IDS, Zoo, classes


@pytest.fixture
def zoo() -> Zoo:
    return Zoo().eval()


# ---------------------------------------------------------------- in place, and back


def test_convert_keeps_everything_but_the_classes(zoo: Zoo) -> None:
    modules, parameters = dict(zoo.named_modules()), dict(zoo.named_parameters())
    state, kinds = zoo.state_dict(), classes(zoo)
    convert(zoo, "mxfp4", verbose=False)
    assert dict(zoo.named_modules()) == modules
    assert all(p is parameters[name] for name, p in zoo.named_parameters())
    assert zoo.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in zoo.state_dict().items())
    for module, kind in zip(zoo.modules(), kinds, strict=True):
        assert isinstance(module, nn.Linear if issubclass(kind, nn.Linear) else kind)
        assert not module.training


def test_revert_restores_classes_and_bits(zoo: Zoo) -> None:
    kinds, attributes = classes(zoo), [set(vars(m)) for m in zoo.modules()]
    expected = zoo(IDS)
    convert(zoo, "mxfp4", verbose=False)
    assert not torch.equal(zoo(IDS), expected)
    revert(zoo)
    assert classes(zoo) == kinds
    assert [set(vars(m)) for m in zoo.modules()] == attributes
    assert torch.equal(zoo(IDS), expected)
    revert(zoo)  # nothing to do


def test_converting_again_starts_from_the_original(zoo: Zoo) -> None:
    twin = copy.deepcopy(zoo)
    convert(zoo, "mxfp4", verbose=False)
    zoo(IDS)
    convert(zoo, "mxfp8", verbose=False)
    convert(twin, "mxfp8", verbose=False)
    assert torch.equal(zoo(IDS), twin(IDS))
    held = weights_module._kept[zoo.embed.weight]
    assert {str(place[0]) for place in held} == {"mxfp8_e4m3"}


def test_hooks_and_references_stay(zoo: Zoo) -> None:
    seen: list[str] = []
    reference = zoo.attention.qkv
    for module in (zoo.attention.qkv, zoo.attention, zoo.encoder):
        module.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    convert(zoo, "mxfp4", verbose=False)
    zoo(IDS)
    assert seen == ["Linear", "Attention", "TransformerEncoder"]
    assert reference is zoo.attention.qkv
    assert isinstance(reference, quantized.Linear)


def test_scoped_classes_go_by_their_names(zoo: Zoo) -> None:
    import inspect

    before = inspect.signature(zoo.forward)
    convert(zoo, "mxfp4", verbose=False)
    kind = type(zoo)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Zoo", "Zoo", Zoo.__module__)
    assert inspect.signature(zoo.forward) == before


def test_one_policy_for_two_models_leaves_others_alone(zoo: Zoo) -> None:
    other = copy.deepcopy(zoo)
    expected = other(IDS)
    convert(zoo, "mxfp4", verbose=False)
    zoo(IDS)
    assert torch.equal(other(IDS), expected)


def test_nothing_of_pytorch_is_replaced() -> None:
    code = """
import torch, torch.nn.functional as F
from torch import nn
places = [torch, torch.nn, F, torch.Tensor, torch.linalg, torch._C._nn, torch._VF, *[
    kind for kind in vars(nn).values() if isinstance(kind, type)]]
def look():
    return [{k: id(v) for k, v in dict(vars(p)).items()} for p in places]
def loaded(before, after):
    return [k for b, a in zip(before, after) for k in b if a.get(k) != b[k]]
before = look()
from microscale.convert import convert
model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
convert(model, "mxfp4", verbose=False)
model(torch.randn(2, 3, 8))
after = look()
changed = loaded(before, after)
assert not changed, changed
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- copies and files


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("way", [copied, pickled, saved])
def test_copies_compute_the_same_and_live_alone(
    zoo: Zoo, way: Callable[[nn.Module], nn.Module]
) -> None:
    convert(zoo, "mxfp4/mxfp6_e2m3", verbose=False)
    expected = zoo(IDS)
    twin = way(zoo)
    assert torch.equal(twin(IDS), expected)
    assert classes(twin) == classes(zoo)
    assert twin.get_submodule("head").weight is twin.get_submodule("embed").weight
    with torch.no_grad():
        twin.get_parameter("embed.weight").mul_(2)
    assert torch.equal(zoo(IDS), expected)
    revert(twin)
    assert not any(site_of(module) for module in twin.modules())
    assert site_of(zoo) is not None


def test_state_dicts_go_both_ways(zoo: Zoo) -> None:
    plain = Zoo().eval()
    convert(zoo, "mxfp4", verbose=False)
    plain.load_state_dict(zoo.state_dict())
    revert(zoo)
    assert torch.equal(plain(IDS), zoo(IDS))
    convert(zoo, "mxfp4", verbose=False)
    other = Zoo().eval()
    zoo(IDS)
    zoo.load_state_dict(other.state_dict())
    convert(other, "mxfp4", verbose=False)
    assert torch.equal(zoo(IDS), other(IDS))


class Custom(nn.Module):
    """A module that pickles in its own way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.w = nn.Parameter(torch.ones(width, width))

    def __reduce__(self) -> tuple[Any, ...]:
        return Custom, (self.width,), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x @ self.w


def test_modules_that_pickle_in_their_own_way() -> None:
    model = Custom(32)
    convert(model, "mxfp4", verbose=False)
    x = torch.randn(3, 32)
    assert torch.equal(pickled(model)(x), model(x))
    assert site_of(copied(model)) == site_of(model)


# ---------------------------------------------------------------- training


def test_weights_are_cast_once_and_again_after_a_step(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"weights": 0}
    owned = {parameter.data_ptr() for parameter in zoo.parameters()}

    def counting(x: Tensor, *args: Any, **options: Any) -> Tensor:
        counts["weights"] += x.data_ptr() in owned
        result: Tensor = cast(x, *args, **options)
        return result

    monkeypatch.setattr(weights_module, "cast", counting)
    convert(zoo, "mxfp4", verbose=False)
    for _ in range(3):
        zoo(IDS)
    # qkv, mix, two encoder layers of four, three convolutions, two of LSTM and GRU, the head.
    weights = 1 + 1 + 2 * 4 + 3 + 2 + 2 + 1
    assert counts["weights"] == weights
    optimizer = torch.optim.SGD(zoo.parameters(), lr=1.0)
    zoo(IDS).square().sum().backward()
    optimizer.step()
    zoo(IDS)
    assert counts["weights"] == 2 * weights
    zoo.load_state_dict(Zoo().state_dict())
    zoo(IDS)
    assert counts["weights"] == 3 * weights


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_finetuning_lowers_the_loss(options: dict[str, Any]) -> None:
    model = Zoo()
    convert(model, "mxfp4/mxfp6_e2m3", verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **options)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_reach_every_parameter_under_autocast(zoo: Zoo) -> None:
    convert(zoo, "mxfp4", verbose=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = zoo(IDS).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in zoo.parameters())


def test_models_move_to_other_types(zoo: Zoo) -> None:
    convert(zoo, "mxfp4", verbose=False)
    zoo(IDS)
    assert zoo.double()(IDS).dtype == torch.float64
    assert zoo.bfloat16()(IDS).dtype == torch.bfloat16


# ---------------------------------------------------------------- the report


def test_report_names_what_was_left_and_why(zoo: Zoo) -> None:
    policy = Policy.of("mxfp4", "mxfp6_e2m3", ignore=("attention",), overrides={"conv.0": "fp32"})
    conversion = convert(zoo, policy, verbose=False)
    left = {entry.name: entry.reason for entry in conversion.left}
    assert left == {
        "attention.qkv": "ignored by the policy",
        "conv.0": "the policy leaves both operands in the wider type",
    }
    names = {entry.name for entry in conversion.quantized}
    assert {
        "embed",
        "depthwise",
        "lstm",
        "gru",
        "head",
        "encoder.layers.1.self_attn.out_proj",
    } <= names
    notes = {entry.name: entry.notes for entry in conversion.quantized}
    assert notes["depthwise"] == ("blocks of 1",)
    assert notes["conv.2"] == ("last block of 8",)
    assert notes["encoder"] == notes["encoder.layers.0"] == ("fused fast path off",)
    assert conversion.scopes == {"Zoo": 1}
    with record_products() as ledger:
        zoo(IDS)
    reasons = {row.module: row.reason for row in ledger.skipped}
    assert reasons == left | {"attention": "ignored by the policy"}


def test_report_counts_bits(zoo: Zoo) -> None:
    conversion = convert(zoo, "mxfp4/mxfp6_e2m3", verbose=False)
    entries = {entry.name: entry for entry in conversion.entries}
    assert entries["head"].weight_bits == get_block_format("mxfp4").storage_bits((50, 64))
    assert entries["head"].formats == {"weight": "mxfp4", "input": "mxfp6_e2m3"}
    # Blocks of one would be stored with 31 zeros each, so they are left unpacked.
    assert entries["depthwise"].weight_bits == 64 * 3 * 32
    # The head is tied to the embedding and counts once.
    assert conversion.weights == sum(e.weights for e in conversion.quantized) - 50 * 64
    plain = [p for p in zoo.parameters() if p.dim() == 1]
    plain.append(zoo.attention.mix)
    assert conversion.size_bits == conversion.weight_bits + sum(32 * p.numel() for p in plain)
    assert conversion.bits_per_weight == conversion.weight_bits / conversion.weights


def test_tied_weights_of_two_formats_are_stored_in_the_wider(zoo: Zoo) -> None:
    one = convert(zoo, "mxfp4", verbose=False)
    two = convert(zoo, Policy.of("mxfp4", "mxfp4", overrides={"head": "mxfp8"}), verbose=False)
    assert two.weight_bits - one.weight_bits == 50 * 64 * 4


def test_report_prints_one_line_for_modules_alike(
    zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    conversion = convert(zoo, "mxfp4")
    printed = capsys.readouterr().out
    assert printed.strip() == str(conversion)
    assert "encoder.layers.*.linear1" in printed
    assert printed.count("GRU") == 1
    assert "Zoo x1, Attention x1" in printed
    assert convert(zoo, "mxfp4", verbose=False).to_dict()["entries"][0]["name"] == "embed"
    assert capsys.readouterr().out == ""


def test_report_is_plain_data(zoo: Zoo) -> None:
    import json

    data = json.loads(json.dumps(convert(zoo, "nvfp4", verbose=False).to_dict()))
    assert Policy.from_dict(data["policy"]) == Policy.parse("nvfp4")
    assert data["bits_per_weight"] > 4.5


def test_convolutions_give_each_output_channel_one_scale_for_token_weights() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 4, 3)), torch.randn(1, 8, 5, 5)
    convert(model, "int8-token", verbose=False)
    token = model(x)
    assert (
        convert(model, "int8-token", verbose=False).entries[0].formats["weight"] == "int8-channel"
    )
    convert(model, "int8-channel/int8-token", verbose=False)
    assert torch.equal(model(x), token)
