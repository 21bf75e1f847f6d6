"""Layouts of other programs: values come back bit for bit, here and in their own libraries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from microscale.checkpoint.export import LAYOUTS, export, open_checkpoint
from microscale.checkpoint.layouts.base import same_values
from microscale.checkpoint.native import load, save
from microscale.cli import app
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor, quantize

CARRIED = {
    "compressed-tensors": (
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp8_e4m3",
        "int8-channel",
        "int8-token",
        "int4-channel",
        "int4-64-fp32",
        "mxfp4-even",
    ),
    "gpt-oss": ("mxfp4",),
    "quark": ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3"),
    "modelopt": ("nvfp4", "mxfp8_e4m3"),
    "mlx": ("mxfp4", "mxfp8_e4m3"),
    "gguf": ("mxfp4", "nvfp4"),
    "onnx": (
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "int8-channel",
    ),
    "microscale": ("mxfp4", "mxint8", "nvfp4", "int4-32-zero_point", "mxfp4-32x32"),
}
"""What each layout carries."""
SUFFIX = {"gguf": ".gguf", "onnx": ".onnx"}
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
PROJECTION = "model.layers.0.q_proj.weight"


def values(name: str = PROJECTION) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn((2, 64, 128) if name == EXPERTS else (48, 128))
    x[..., 0] *= torch.logspace(-30, 30, x.shape[-2])  # scales of every size
    x[..., 5, :] = 0
    x[..., 6, ::3] = -0.0
    return x.clamp(-1e30, 1e30)


def source(path: Path, fmt: str, layout: str = "") -> Path:
    """A folder of ours with one packed tensor and some that are not."""
    needs(layout)
    path.mkdir()
    name, axis = (EXPERTS, 1) if layout == "gpt-oss" else (PROJECTION, -1)
    content = {
        name: quantize(values(name), fmt, axis),
        "model.norm.weight": torch.randn(64).bfloat16(),
        "model.layers.0.q_proj.bias": torch.randn(48),
        "model.steps": torch.tensor([3]),
    }
    save(content, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return path


def needs(layout: str) -> None:
    if layout in SUFFIX:
        pytest.importorskip(layout)


CASES = [(layout, fmt) for layout, formats in CARRIED.items() for fmt in formats]


@pytest.mark.parametrize(("layout", "fmt"), CASES)
def test_there_and_back_bit_for_bit(layout: str, fmt: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "a", fmt, layout)
    there = tmp_path / f"b{SUFFIX.get(layout, '')}"
    done = export(folder, layout, there)
    assert len(done.packed) == 1
    assert (done.source, done.target, done.plain) == ("microscale", layout, 3)
    assert open_checkpoint(there).layout == layout
    export(there, "microscale", tmp_path / "c")
    before, after = load(folder), load(tmp_path / "c")
    assert before.keys() == after.keys()
    for name, x in before.items():
        y = after[name]
        assert isinstance(x, BlockTensor) == isinstance(y, BlockTensor)
        assert same_values(x, y), name
        if isinstance(x, BlockTensor) and isinstance(y, BlockTensor):
            assert torch.equal(x.codes, y.codes)
            assert torch.equal(x.scales, y.scales)
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_every_layout_is_tried() -> None:
    assert set(LAYOUTS) == CARRIED.keys()


def decoded(path: Path) -> Tensor:
    x = load(path)[PROJECTION]
    assert isinstance(x, BlockTensor)
    return x.dequantize(torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fmt", ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "int8-channel", "int4-64-fp32"]
)
def test_transformers_and_compressed_tensors_give_our_logits(fmt: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from microscale.checkpoint.direct import quantize_folder
    from microscale.policy import Policy

    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    policy = Policy.of(fmt, storage=None, ignore=("lm_head",))
    quantize_folder(tmp_path / "model", policy, tmp_path / "ours")
    export(tmp_path / "ours", "compressed-tensors", tmp_path / "theirs")
    loaded = auto.from_pretrained(
        tmp_path / "theirs",
        dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    ).eval()
    with torch.no_grad():
        for name, x in load(tmp_path / "ours").items():
            wanted = x.dequantize(torch.bfloat16) if isinstance(x, BlockTensor) else x
            model.get_parameter(name).copy_(wanted)
            assert same_values(loaded.get_parameter(name).detach(), wanted), name
        tokens = torch.arange(3, 40)[None]
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_gguf_decodes_our_values(fmt: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = source(tmp_path / "a", fmt)
    export(folder, "gguf", tmp_path / "b.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    tensor = tensors[PROJECTION]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if fmt == "nvfp4":
        found = found * tensors[f"{PROJECTION}.scale"].data
    assert np.array_equal(found, decoded(folder).numpy())  # -0 is +0 there
    assert np.array_equal(tensors["model.steps"].data, [3])


@pytest.mark.parametrize("fmt", CARRIED["onnx"])
def test_onnx_checks_and_evaluates_our_values(fmt: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    folder = source(tmp_path / "a", fmt)
    export(folder, "onnx", tmp_path / "b.onnx")
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    run = ReferenceEvaluator(str(tmp_path / "b.onnx"))
    found = dict(zip(run.output_names, run.run(None, {}), strict=True))
    assert np.array_equal(found[PROJECTION], decoded(folder).numpy())


def test_a_dequantizer_written_from_the_facts_agrees_with_gpt_oss(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", "mxfp4", "gpt-oss")
    export(folder, "gpt-oss", tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    blocks, scales = stored[f"{EXPERTS}_blocks"], stored[f"{EXPERTS}_scales"]
    assert (blocks.shape, scales.shape) == ((2, 128, 2, 16), (2, 128, 2))
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat((half, -half))
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    wide = torch.ldexp(pairs.double(), scales.int()[..., None] - 127).flatten(-2).transpose(1, 2)
    x = load(folder)[EXPERTS]
    assert isinstance(x, BlockTensor)
    assert same_values(wide, x.dequantize(torch.float64))


def test_the_integration_of_transformers_decodes_gpt_oss_alike(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    folder = source(tmp_path / "a", "mxfp4", "gpt-oss")
    export(folder, "gpt-oss", tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    blocks, scales = stored[f"{EXPERTS}_blocks"], stored[f"{EXPERTS}_scales"]
    found = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    x = load(folder)[EXPERTS]
    assert isinstance(x, BlockTensor)
    assert torch.equal(found, x.dequantize(torch.float32))


def test_the_stream_of_six_bits_is_quarks(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", "mxfp6_e3m2")
    export(folder, "quark", tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    weight = stored[PROJECTION].reshape(48, -1, 3).int()
    b0, b1, b2 = weight.unbind(-1)
    codes = (b0 & 63, b0 >> 6 | (b1 & 15) << 2, b1 >> 4 | (b2 & 3) << 4, b2 >> 2)
    from microscale.spelling import get_block_format

    table = torch.tensor(get_block_format("mxfp6_e3m2").element.values, dtype=torch.float64)
    elements = table[torch.stack(codes, -1).flatten(1).long()]
    scales = stored[f"{PROJECTION}_scale"].int().repeat_interleave(32, 1) - 127
    assert same_values(torch.ldexp(elements, scales), decoded(folder).double())


def one(path: Path, q: BlockTensor, name: str = PROJECTION) -> Path:
    path.mkdir()
    save({name: q}, path / "model.safetensors")
    return path


def zeros(fmt: str) -> BlockTensor:
    return quantize(torch.randn(8, 64), fmt)


REFUSED: list[tuple[str, Callable[[], BlockTensor], str, str]] = [
    ("compressed-tensors", lambda: zeros("mxint8"), PROJECTION, "not mxint8"),
    ("compressed-tensors", lambda: zeros("nvfp4"), PROJECTION, "power of two"),
    ("compressed-tensors", lambda: zeros("mxfp4"), "model.embed_tokens.weight", "not tables"),
    ("gpt-oss", lambda: zeros("mxfp4"), PROJECTION, "fused experts"),
    ("modelopt", lambda: zeros("mxfp4"), PROJECTION, "carries nvfp4"),
    ("quark", lambda: quantize(torch.randn(8, 70), "mxfp4"), PROJECTION, "no multiple of 32"),
    ("quark", lambda: quantize(torch.randn(64, 8), "mxfp4", 0), PROJECTION, "along axis 0"),
    ("mlx", lambda: quantize(torch.full((8, 64), torch.nan), "mxfp4"), PROJECTION, "NaN"),
    ("gguf", lambda: zeros("mxfp8_e4m3"), PROJECTION, "carries mxfp4, nvfp4"),
    ("onnx", lambda: zeros("nvfp4"), PROJECTION, "not nvfp4"),
]


@pytest.mark.parametrize(("layout", "make", "name", "message"), REFUSED)
def test_what_cannot_be_carried_is_refused(
    layout: str, make: Callable[[], BlockTensor], name: str, message: str, tmp_path: Path
) -> None:
    needs(layout)
    folder = one(tmp_path / "a", make(), name)
    with pytest.raises(MicroscaleError, match=message):
        export(folder, layout, tmp_path / f"b{SUFFIX.get(layout, '')}")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_nvfp4_with_a_power_of_two_goes_to_compressed_tensors(tmp_path: Path) -> None:
    q = zeros("nvfp4")
    q.tensor_scale.fill_(2.0**-9)
    export(one(tmp_path / "a", q), "compressed-tensors", tmp_path / "b")
    found = open_checkpoint(tmp_path / "b").items[PROJECTION].load()
    assert same_values(found, q)


def test_other_packed_tensors_become_values_or_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    x = torch.randn(8, 64).bfloat16()
    content = {PROJECTION: quantize(x, "mxfp4"), "model.embed_tokens.weight": quantize(x, "mxfp4")}
    save(content, folder / "model.safetensors")
    done = export(folder, "compressed-tensors", tmp_path / "b")
    assert list(done.values) == ["model.embed_tokens.weight"]
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    content["model.embed_tokens.weight"] = quantize(x, "nvfp4")
    save(content, folder / "model.safetensors")
    with pytest.raises(MicroscaleError, match="does not hold the values of nvfp4 exactly"):
        export(folder, "compressed-tensors", tmp_path / "c")


def test_a_file_written_wrongly_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microscale.checkpoint.layouts.quark import Quark

    encode: Any = Quark.encode

    def swapped(self: Quark, name: str, q: BlockTensor) -> dict[str, Tensor]:
        stored = encode(self, name, q)
        return {n: (x << 4 | x >> 4 if n == name else x) for n, x in stored.items()}

    monkeypatch.setattr(Quark, "encode", swapped)
    folder = source(tmp_path / "a", "mxfp4")
    with pytest.raises(MicroscaleError, match="came back with other values"):
        export(folder, "quark", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_command(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", "mxfp4")
    arguments = ["export", str(folder), "--to", "quark", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["packed"] == [PROJECTION]
    result = CliRunner().invoke(app, [*arguments[:3], "quarks", "--out", str(tmp_path / "c")])
    assert result.exit_code == 2
    assert "Did you mean quark?" in result.output
