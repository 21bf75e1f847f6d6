"""`microscale inspect` of checkpoints: what is there, what looks wrong, how two differ."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from microscale.checkpoint.export import export
from microscale.checkpoint.look import Difference, Look, difference, look
from microscale.checkpoint.native import save
from microscale.cli import app
from microscale.errors import MicroscaleError
from microscale.kernels.reference.codes import pack, unpack
from microscale.tensor import BlockTensor, quantize

NAME = "a.weight"


def quiet(*_: object) -> None:
    """No progress."""


def weight() -> torch.Tensor:
    torch.manual_seed(0)
    # Rows of very different sizes, so that blocks along the other axis are seen to be wrong.
    return torch.randn(64, 128) * torch.logspace(-4, 0, 64)[:, None]


def folder(path: Path, x: torch.Tensor) -> Path:
    path.mkdir()
    save({NAME: x, "b.bias": torch.ones(4)}, path / "model.safetensors")
    return path


def changed(q: BlockTensor, **parts: torch.Tensor) -> BlockTensor:
    names = ("codes", "scales", "tensor_scale", "zero_point")
    stored = [parts.get(name, x) for name, x in zip(names, q.stored, strict=True)]
    return BlockTensor((stored[0], stored[1], stored[2], stored[3]), q.packing, q.shape, q.dtype)


def one(path: Path) -> Look:
    return next(found for found in look(path, quiet)[1] if found.name == NAME)


@pytest.mark.parametrize(
    "fmt", ["mxfp4", "mxfp4-ceil", "mxfp4-even", "mxfp8_e4m3", "mxint8", "nvfp4", "int4-32-fp32"]
)
def test_good_checkpoints_have_no_signs(fmt: str, tmp_path: Path) -> None:
    q = quantize(weight(), fmt)
    found = one(folder(tmp_path / "a", q))
    values = q.dequantize()
    assert found.signs == ()
    assert found.zero == pytest.approx(float((values == 0).double().mean()), abs=1e-9)
    assert sum(found.scales.values()) == q.scales.numel()
    assert found.bits == 8 * q.storage_bytes / q.numel()


def test_signs_of_one_checkpoint(tmp_path: Path) -> None:
    q = quantize(weight(), "mxfp4")
    nan = q.scales.clone()
    nan[0, :2] = 255
    cases = {
        "2 of 256 scales are NaN": changed(q, scales=nan),
        "all scales are the same": changed(q, scales=torch.full_like(q.scales, 120)),
        "all values are zero": changed(q, codes=torch.zeros_like(q.codes)),
        # Every element is the smallest: no scale that is chosen for them leaves them there.
        "upper half of their range unused": changed(q, codes=torch.full_like(q.codes, 0x11)),
    }
    for number, (sign, bad) in enumerate(cases.items()):
        found = one(folder(tmp_path / str(number), bad))
        assert any(sign in said for said in found.signs), (sign, found.signs)


def test_blocks_along_the_other_axis_are_seen(tmp_path: Path) -> None:
    along = quantize(weight(), "mxfp4", axis=0)
    codes = pack(unpack(along.codes, 4, 64).T.contiguous(), 4, 32)
    q = quantize(weight(), "mxfp4")
    assert not one(folder(tmp_path / "right", q)).signs
    (sign,) = one(folder(tmp_path / "wrong", changed(q, codes=codes))).signs
    assert "upper half of their range unused" in sign


def only(a: Path, b: Path) -> Difference:
    return next(found for found in difference(a, b, quiet) if found.name == NAME)


def test_differences_and_what_explains_them(tmp_path: Path) -> None:
    q = quantize(weight(), "mxfp4")
    base = folder(tmp_path / "base", q)
    same = only(base, folder(tmp_path / "same", q))
    assert (same.equal, same.error, same.largest, same.signs) == (True, 0.0, 0.0, ())
    biased = only(base, folder(tmp_path / "bias", changed(q, scales=q.scales - 2)))
    assert biased.error == pytest.approx(0.75)
    assert "0.25 times as large" in biased.signs[0]
    swapped = only(base, folder(tmp_path / "swap", changed(q, codes=q.codes << 4 | q.codes >> 4)))
    assert swapped.signs == ("nibbles are swapped within their bytes",)
    wide = only(folder(tmp_path / "wide", weight()), base)
    exact = weight().double()
    expected = float((q.dequantize().double() - exact).norm() / exact.norm())
    assert wide.error == pytest.approx(expected)
    assert (wide.formats, wide.signs) == (("float32", "mxfp4"), ())


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", quantize(weight(), "mxfp4"))
    b = folder(tmp_path / "b", quantize(weight()[:32], "mxfp4"))
    with pytest.raises(MicroscaleError, match="has shape"):
        difference(a, b, quiet)
    save({"c": torch.ones(1)}, b / "model.safetensors")
    with pytest.raises(MicroscaleError, match="alone"):
        difference(a, b, quiet)


def test_the_command(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", quantize(weight(), "mxfp4"))
    export(a, "quark", tmp_path / "b")
    c = folder(tmp_path / "c", quantize(weight(), "mxfp8_e4m3"))

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "quark" in run(tmp_path / "b")
    assert "Nothing looks wrong." in run(a / "model.safetensors")
    assert "All 2 tensors hold the same values." in run(a, "--diff", tmp_path / "b")
    record = tmp_path / "x.json"
    run(a, "--diff", c, "--json", record)
    assert json.loads(record.read_text())["tensors"][0]["name"] == NAME
    pytest.importorskip("matplotlib")
    run(a, "--diff", c, "--picture", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 2000
