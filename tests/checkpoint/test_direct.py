"""A checkpoint cast tensor by tensor: the bits of `convert` and `save`, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from checkpoint.folders import tensors, write_folder
from microscale.cast import cast
from microscale.checkpoint import direct
from microscale.checkpoint.direct import quantize_folder
from microscale.checkpoint.native import load, save
from microscale.cli import app
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.tensor import BlockTensor

MXFP4 = Policy.parse("mxfp4/fp32")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert (type(x), x.dtype, x.shape) == (type(y), y.dtype, y.shape), name
        if isinstance(x, BlockTensor):
            assert isinstance(y, BlockTensor)
            assert x.packing == y.packing
            assert all(torch.equal(*pair) for pair in zip(x.stored, y.stored, strict=True)), name
        else:
            assert torch.equal(x, y), name


def models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gpt2 = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    experts = {"num_local_experts": 2, "head_dim": 32, "pad_token_id": 0}
    return {
        "tied": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        ),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "experts": transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **experts)),
        "bert": transformers.BertModel(
            transformers.BertConfig(**{**sizes, "max_position_embeddings": 32})
        ),
    }


@pytest.mark.parametrize("kind", ["tied", "gpt2", "experts", "bert"])
@pytest.mark.parametrize(
    "policy",
    [
        MXFP4,
        Policy.parse("nvfp4/fp32"),
        Policy.parse("int8-channel/int8-token"),
        Policy.parse("mxfp6_e2m3-32x32/fp32"),
        Policy.of("mxfp4", storage="mxfp8_e4m3", overrides={"*layer*.0": "mxint8/fp32"}),
        Policy.of("mxfp4-rceil", storage=None, rounding="away"),
    ],
    ids=lambda p: str(p)[:20],
)
def test_the_bits_are_those_of_convert_and_save(
    kind: str, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "SLICE", 4096)
    model = models()[kind].bfloat16()
    if kind == "gpt2" and policy.overrides:
        policy = Policy.of("mxfp4", overrides={"*h.1": "mxint8/fp32"})
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    manifest = quantize_folder(tmp_path / "source", policy, tmp_path / "out")
    assert {t["matched_by"] for t in manifest["tensors"].values()} == {"model"}
    convert(model, policy, verbose=False)
    save(model, tmp_path / "whole.safetensors")
    same(load(tmp_path / "whole.safetensors"), load(tmp_path / "out"))
    again = models()[kind].bfloat16()
    load(tmp_path / "out", again)


def test_without_a_known_model_names_and_shapes_decide(tmp_path: Path) -> None:
    content = tensors()
    source = write_folder(tmp_path / "source", content, shards=3)
    manifest = quantize_folder(source, MXFP4, tmp_path / "out")
    assert manifest["model"] is None
    kept = {name: t["reason"] for name, t in manifest["tensors"].items() if t["format"] is None}
    assert kept == {
        "model.layers.0.self_attn.q_proj.bias": "a bias",
        "model.layers.0.mlp.gate.weight": "a router",
        "model.norm.weight": "no weight of a product by its name and shape",
        "model.steps": "no weight of a product by its name and shape",
    }
    for name, x in load(tmp_path / "out").items():
        wanted = content[name] if name in kept else cast(content[name], "mxfp4")
        values = x.dequantize() if isinstance(x, BlockTensor) else x
        assert torch.equal(values, wanted), name


def test_tied_weights_of_two_formats_are_both_written(tmp_path: Path) -> None:
    model = models()["tied"]
    policy = Policy.of("mxfp4", ignore=("lm_head",))
    model.save_pretrained(tmp_path / "source")
    manifest = quantize_folder(tmp_path / "source", policy, tmp_path / "out")
    assert manifest["tensors"]["lm_head.weight"]["reason"] == "ignored by the policy"
    assert manifest["tensors"]["model.embed_tokens.weight"]["format"] == "mxfp4"


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", tensors(), shards=3)


def stops(*arguments: object) -> Any:
    path = Path(__file__).with_name("stops.py")
    result = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


def test_killed_at_writes_renames_and_fsyncs_it_goes_on(source: Path, tmp_path: Path) -> None:
    result, _ = stops("kill", source, tmp_path / "out", 0, 7)
    assert result["faults"] == []
    assert result["steps"] > 50
    assert result["kept"] > 1


@pytest.mark.slow
def test_killed_at_every_step_it_goes_on(source: Path, tmp_path: Path) -> None:
    result, _ = stops("kill", source, tmp_path / "out", 0, 1)
    assert result["faults"] == []


def test_a_full_disk_is_said_and_the_work_goes_on_later(source: Path, tmp_path: Path) -> None:
    result, said = stops("limit", source, tmp_path / "out", 6000)
    assert result == {"status": 3, "there": False, "again": 0}
    assert "MicroscaleError" in said
    assert "make room" in said


def test_no_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(MicroscaleError, match=r"needs .* MB, and its disk has"):
        quantize_folder(source, MXFP4, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


class _Usage:
    free = 100


def test_a_target_that_may_not_be_written_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MicroscaleError, match="may not be written to"):
        quantize_folder(source, MXFP4, tmp_path / "out")


def test_a_read_only_file_system(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with pytest.raises(MicroscaleError, match=r"may not be written to|Read-only"):
            quantize_folder(source, MXFP4, place / "out")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_work_begun_otherwise_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(direct, "_run", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(source, MXFP4, tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / ".out.partial").iterdir())
    with pytest.raises(MicroscaleError, match="begun with another policy"):
        quantize_folder(source, Policy.parse("mxfp8_e4m3"), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(direct, "__version__", "0.0.0")
        with pytest.raises(MicroscaleError, match="another version"):
            quantize_folder(source, MXFP4, tmp_path / "out")
    shard = next(source.glob("model-00001*"))
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    os.utime(shard, ns=(times[0], times[1] + 1))
    with pytest.raises(MicroscaleError, match="another source"):
        quantize_folder(source, MXFP4, tmp_path / "out")
    os.utime(shard, ns=times)
    assert sorted(p.name for p in (tmp_path / ".out.partial").iterdir()) == before
    quantize_folder(source, MXFP4, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy.of("mxfp4", rounding="stochastic"), "stochastically"),
        (Policy.of("mxfp4", ignore=("head",)), "matches no module"),
        (Policy.of("mxfp4", "mxfp4", "mxfp4"), "dgrad"),
        (Policy.of("mxfp4", rotation="hadamard"), "rotation"),
    ],
)
def test_policies_that_do_not_fit_are_refused_first(
    policy: Policy, message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(MicroscaleError, match=message):
        quantize_folder(source, policy, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_command_lists_tensors_and_refuses_what_needs_data(
    source: Path, tmp_path: Path
) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    common = (source, "--format", "mxfp4/fp32", "--out", tmp_path / "out")
    said = run(*common, "--method", "gptq", code=2)
    assert "--method needs calibration data" in said
    said = run(*common)
    assert "names and shapes alone" in said
    assert "a router" in said
    assert "exists already" in run(*common, code=2)
    assert "is no directory" in run("nowhere", "--format", "mxfp4", "--out", tmp_path / "x", code=2)
