"""`microscale quantize`: the folder it writes, and what it refuses before it writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from microscale.checkpoint.native import load
from microscale.cli import app
from microscale.policy import Policy
from microscale.suite.entry import EMBEDDED
from microscale.tensor import BlockTensor

transformers = pytest.importorskip("transformers")

SOURCE = "def area(width, height):\n    return width * height\n\n\n"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="microscale")
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(name="text")
def _text(tmp_path: Path) -> Path:
    path = tmp_path / "code.py"
    path.write_text(60 * SOURCE)
    return path


@pytest.mark.parametrize("method", ["error_diffusion", "rtn"])
def test_a_language_model_is_written_packed(method: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = run(
        *("quantize", "stdlib-gpt", "--format", "mxfp4/fp32", "--method", method),
        *("--data", text, "--out", out, "--limit", "2"),
    )
    assert "weights solved by" in output
    assert {path.name for path in out.iterdir()} >= {
        "model.safetensors",
        "calibration.json",
        "policy.toml",
        "config.json",
        "tokenizer.json",
    }
    assert not (out / ".progress").exists()
    record = json.loads((out / "calibration.json").read_text())
    assert record["method"] == method
    assert not record["unreached"]
    assert Policy.from_toml((out / "policy.toml").read_text()) == Policy.parse("mxfp4/fp32")
    config = transformers.AutoConfig.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    load(out / "model.safetensors", model)
    assert isinstance(model.lm_head.weight, BlockTensor)
    # What was solved errs less on the calibration data than what is cast.
    assert all(o["after"] <= o["before"] for o in record["outcomes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gptp"), "method 'gptp'"),
        (("--format", "mxfp3"), "mxfp3"),
        (("--policy", "nowhere.toml"), "give either --format or --policy"),
        (("--data", "nowhere.txt"), "--data 'nowhere.txt' does not exist"),
        (("--data", "x.npy"), "x.npy"),
        (("--scales", "best"), "scales 'best'"),
        (("--sweeps", "-2"), "sweeps -2"),
        (("--limit", "0"), "--limit 0"),
    ],
)
def test_bad_options_write_nothing(
    arguments: tuple[str, ...], message: str, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given: dict[str, Any] = {"--format": "mxfp4", "--data": text, "--out": out}
    given |= {arguments[0]: arguments[1]}
    flat = [str(x) for pair in given.items() for x in pair]
    assert message in " ".join(run("quantize", "stdlib-gpt", *flat, code=2).split())
    assert not out.exists()


def test_a_folder_that_holds_something_is_refused(text: Path, tmp_path: Path) -> None:
    arguments = ("quantize", "stdlib-gpt", "--format", "mxfp4", "--data", text, "--out")
    assert "holds 'code.py' already" in run(*arguments, tmp_path, code=2)
    assert "is a file" in run(*arguments, text, code=2)
    assert "there is no folder" in run(*arguments, tmp_path / "a" / "b", code=2)


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("\n")
    arguments = ("quantize", "stdlib-gpt", "--format", "mxfp4", "--data", path, "--out")
    assert "is empty" in run(*arguments, tmp_path / "out", code=2)


def test_a_model_that_reads_no_text_takes_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mnist-mlp").mkdir(parents=True)
    monkeypatch.setenv("MICROSCALE_DATA", str(tmp_path))
    name = "mnist-mlp"
    text = tmp_path / "x.txt"
    text.write_text("hello")
    arguments = ("quantize", name, "--format", "mxfp4", "--out", tmp_path / "out", "--data")
    assert "reads no text" in run(*arguments, text, code=2)


def test_arrays_are_cut_into_batches(tmp_path: Path) -> None:
    from microscale.suite.calibration import _array_batches, read_arrays
    from microscale.suite.setting import Setting

    setting = Setting.parse(limit=10, batch_size=4)
    np.savez(tmp_path / "x.npz", a=np.arange(40.0).reshape(20, 2), b=np.arange(20))
    found, about = _array_batches(read_arrays(tmp_path / "x.npz"), tmp_path / "x.npz", setting)
    assert about == "x.npz: 10 of 20 samples"
    named: list[Any] = list(found)
    assert [len(batch["a"]) for batch in named] == [4, 4, 2]
    for batch in named:
        assert torch.equal(batch["a"][:, 0], 2.0 * batch["b"])


def test_the_embedded_model_is_there() -> None:
    assert (EMBEDDED / "stdlib-gpt" / "config.json").is_file()


def test_ranges(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = run(
        *("quantize", "stdlib-gpt", "--format", "int8-channel/int8-tensor-zero_point"),
        *("--method", "ranges", "--weight-range", "minmax", "--input-range", "percentile"),
        *("--data", text, "--out", out, "--limit", "2"),
    )
    assert "inputs by percentile" in output
    record = json.loads((out / "calibration.json").read_text())
    assert record["estimators"] == {"weights": "minmax", "inputs": "percentile"}
    policy = Policy.from_toml((out / "policy.toml").read_text())
    settled = [s for _, settings in policy.overrides for path, s in settings if "input" in path]
    assert any("int8-tensor-at" in str(s) for s in settled)
    config = transformers.AutoConfig.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    load(out / "model.safetensors", model)
    with torch.no_grad():
        assert model(torch.arange(10).unsqueeze(0)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input-range", "mse"), "--input-range is for --method ranges, not 'error_diffusion'"),
        (("--method", "ranges", "--order"), "--order is for methods that solve"),
        (("--method", "ranges", "--input-range", "mae"), "--input-range 'mae' is not known"),
        (("--exponents",), "--exponents is for --method ranges, not 'error_diffusion'"),
    ],
)
def test_options_of_other_methods(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    output = run(
        *("quantize", "stdlib-gpt", "--format", "mxfp4", *options),
        *("--data", tmp_path / "none.txt", "--out", tmp_path / "out"),
        code=2,
    )
    assert message in " ".join(output.split())
