"""Checkpoints: what is saved comes back bit for bit, and damaged files are refused by name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from microscale.cast import cast
from microscale.checkpoint.header import KEY
from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.formats import NAMED
from microscale.policy import Policy
from microscale.tensor import BlockTensor, quantize

FORMATS = [*NAMED, "mxfp4-rceil", "fp4_e2m1-32-pow2", "int8-64-bf16", "e2m2-16"]


class Tied(nn.Module):
    """A tiny language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 40)
        self.body = nn.Linear(40, 40)
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 24, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, time, 24] of tokens [batch, time]."""
        hidden: torch.Tensor = self.norm(self.body(self.embed(tokens)).relu())
        logits: torch.Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tensors_come_back_bit_for_bit(fmt: str, axis: int, tmp_path: Path) -> None:
    x = torch.randn(3, 50, 7)
    q = quantize(x, fmt, axis)
    plain = torch.arange(5, dtype=torch.bfloat16)
    save({"q": q, "plain": plain}, tmp_path / "t.safetensors")
    back = load(tmp_path / "t.safetensors")
    assert isinstance(back["q"], BlockTensor)
    assert (back["q"].format, back["q"].axis, back["q"].shape) == (q.format, axis, x.shape)
    assert torch.equal(back["q"].dequantize(), cast(x, fmt, axis))
    assert torch.equal(back["plain"], plain)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,)])
def test_empty_and_zero_dimensional_tensors(shape: tuple[int, ...], tmp_path: Path) -> None:
    q = quantize(torch.ones(shape), "nvfp4")
    save({"q": q}, tmp_path / "t.safetensors")
    assert torch.equal(load(tmp_path / "t.safetensors")["q"].dequantize(), q.dequantize())


@pytest.mark.parametrize("spec", ["mxfp4/mxfp6_e2m3", "nvfp4", "int8-channel/int8-token", "fp32"])
def test_model_computes_the_same_after_loading(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.randint(24, (2, 9))
    convert(model, Policy.parse(spec), verbose=False)
    with torch.no_grad():
        expected = model(tokens)
    save(model, tmp_path / "m.safetensors")
    fresh = Tied().eval()
    load(tmp_path / "m.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(tokens), expected)
    assert fresh.head.weight is fresh.embed.weight
    assert int(fresh.get_buffer("steps")) == 7
    assert isinstance(fresh.body.weight, BlockTensor) == (spec != "fp32")


def test_packed_model_is_small_and_saves_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    convert(model, "mxfp4", verbose=False)
    save(model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 2 * 256 * 256 * 4.25 / 8 + 4096
    fresh = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    load(tmp_path / "a.safetensors", fresh)
    save(fresh, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    clone = copy.deepcopy(fresh)
    x = torch.randn(2, 256)
    assert torch.equal(clone(x), fresh(x))


class Mixed(nn.Module):
    """One of each layer whose weight can be packed, and one whose weight cannot (depthwise)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(33, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.line = nn.Conv1d(64, 64, 3, groups=2)
        self.lstm = nn.LSTM(64, 32, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, kdim=40)
        self.outs = nn.ModuleList(nn.Linear(64, 7) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [N, 7] of images [N, 33, H, W]."""
        x = self.line(self.depthwise(self.conv(x)).flatten(2)).transpose(1, 2)
        hidden, _ = self.lstm(x)
        hidden, _ = self.attention(hidden, x[..., :40], hidden)
        y: torch.Tensor = sum(out(hidden) for out in self.outs)
        return y.mean(1)


POLICIES = {
    "pair": Policy.parse("mxfp4/mxfp6_e2m3"),
    "channel": Policy.parse("int8-channel/int8-token"),
    "laws": Policy.of("mxfp4", "mxint8", rounding="away", values=False),
    "overrides": Policy.of(
        "mxfp6_e3m2",
        "mxint8",
        ignore=("outs.1", "line"),
        overrides={"lstm": "mxfp8_e4m3/fp32", "outs": "mxfp4", "outs.2": "fp32/mxint8"},
    ),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_kind_of_layer_and_policy_comes_back(policy: Policy, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 33, 5, 6)
    convert(model, policy, verbose=False)
    with torch.no_grad():
        expected = model(x)
    save(model, tmp_path / "m.safetensors")
    fresh = Mixed().eval()
    tensors = load(tmp_path / "m.safetensors", fresh)
    with torch.no_grad():  # from packed weights sums run in another order
        torch.testing.assert_close(fresh(x), expected)
    assert isinstance(tensors["conv.weight"], BlockTensor)
    blocks_of_one = policy is not POLICIES["channel"]  # which padding would make larger
    assert isinstance(tensors["depthwise.weight"], BlockTensor) != blocks_of_one
    unpacked = policy is POLICIES["overrides"]
    assert isinstance(tensors["outs.1.weight"], BlockTensor) != unpacked
    assert isinstance(tensors["outs.2.weight"], BlockTensor) != unpacked
    revert(fresh)
    assert type(fresh.conv) is nn.Conv2d


def test_a_part_of_a_model_can_be_saved(tmp_path: Path) -> None:
    model, x = Mixed(), torch.randn(1, 9, 64)
    convert(model, POLICIES["overrides"], verbose=False)
    save(model.outs[0], tmp_path / "m.safetensors")
    fresh = nn.Linear(64, 7)
    load(tmp_path / "m.safetensors", fresh)
    assert torch.equal(fresh(x), model.outs[0](x))


@pytest.mark.usefixtures("weights_decoded_first")
def test_hugging_face_model_comes_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=32,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(50, (2, 11))
    convert(model, "mxfp4", verbose=False)
    with torch.no_grad():
        expected = model(tokens).logits
    save(model, tmp_path / "m.safetensors")
    fresh = transformers.GPT2LMHeadModel(config).eval()
    tensors = load(tmp_path / "m.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(tokens).logits, expected)
    assert tensors["transformer.h.0.attn.c_attn.weight"].axis == 0  # type: ignore[attr-defined]
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_unconverted_model_round_trip(tmp_path: Path) -> None:
    model, fresh = Tied(), Tied()
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", fresh)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )


def test_reverted_model_is_saved_unpacked(tmp_path: Path) -> None:
    model = nn.Linear(32, 32)
    convert(model, "mxfp4", verbose=False)
    revert(model)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")["weight"], model.weight)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    save(Tied(), tmp_path / "m.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert ("embed.weight" in stored) != ("head.weight" in stored)


# ---------------------------------------------------------------- hostile and unfit files


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> None:
    """Change the tensors and the header of a saved file."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(tensors, header)
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(header)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with one packed tensor, w."""
    path = tmp_path / "m.safetensors"
    save({"w": quantize(torch.randn(4, 64), "mxfp4")}, path)
    return path


EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, object]], object], str]] = {
    "part": (lambda t, h: t.pop("w.scales"), "'w' lacks its part 'scales'"),
    "shape": (
        lambda t, h: t.update({"w.codes": t["w.codes"][:, :3].contiguous()}),
        r"w\.codes is .*\(4, 3\)",
    ),
    "dtype": (
        lambda t, h: t.update({"w.scales": t["w.scales"].int()}),
        r"w\.scales is torch\.int32",
    ),
    "version": (lambda t, h: h.update(version=99), "header version 99 is not 1"),
    "format": (lambda t, h: h["packed"]["w"].update(format="mxfp5"), "'mxfp5' is not known"),  # type: ignore[index]
    "axis": (lambda t, h: h["packed"]["w"].update(axis=2), "axis 2 does not exist"),  # type: ignore[index]
    "sizes": (lambda t, h: h["packed"]["w"].update(shape=[4, -64]), "not a list of sizes"),  # type: ignore[index]
    "dtype name": (lambda t, h: h["packed"]["w"].update(dtype="int8"), "dtype 'int8'"),  # type: ignore[index]
    "key": (lambda t, h: h["packed"]["w"].pop("shape"), "lacks one of format"),  # type: ignore[index]
    "table": (lambda t, h: h.update(packed=[]), r"'packed' .* is \[\]"),
    "alias": (
        lambda t, h: h.update(aliases={"v": "u"}),
        "'v' shares 'u', which is not in the file",
    ),
    "policy": (lambda t, h: h.update(policy=3), "'policy' .* is 3"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_damaged_file_is_refused_by_name(edit: str, saved: Path) -> None:
    change, message = EDITS[edit]
    rewrite(saved, lambda tensors, header: (change(tensors, header), None)[1])
    with pytest.raises(MicroscaleError, match=message):
        load(saved)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(MicroscaleError, match="no such file"):
        load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(MicroscaleError, match="damaged"):
        load(path)
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(MicroscaleError, match="no microscale header"):
        load(path)
    safetensors.torch.save_file({"w": torch.ones(2)}, path, {KEY: "{"})
    with pytest.raises(MicroscaleError, match="is not JSON"):
        load(path)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-7])
    with pytest.raises(MicroscaleError, match="damaged"):
        load(saved)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(32, 8), r"tensor 'weight' has shape \(16, 32\), the model's has \(8, 32\)"),
        (nn.Linear(32, 16, bias=False), "besides what the model has, the tensor 'bias'"),
        (nn.Sequential(nn.Linear(32, 16)), "lacks the tensor '0.bias' and 1 more"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(
    other: nn.Module, message: str, tmp_path: Path
) -> None:
    model = nn.Linear(32, 16)
    convert(model, "mxfp4", verbose=False)
    save(model, tmp_path / "m.safetensors")
    before, kind = copy.deepcopy(other.state_dict()), type(other)
    with pytest.raises(MicroscaleError, match=message):
        load(tmp_path / "m.safetensors", other)
    assert type(other) is kind
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), other.state_dict().values(), strict=True)
    )


def test_bad_paths_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match="is a folder"):
        save({}, tmp_path)
    with pytest.raises(MicroscaleError, match="there is no folder"):
        save({}, tmp_path / "missing" / "m.safetensors")


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    clash = {"w": quantize(torch.ones(32), "mxfp4"), "w.codes": torch.ones(1)}
    with pytest.raises(MicroscaleError, match=r"'w\.codes'; rename one"):
        save(clash, tmp_path / "m.safetensors")


def test_an_interrupted_save_keeps_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupt(*args: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save({"w": torch.ones(3)}, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
