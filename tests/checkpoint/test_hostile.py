"""Files made to do harm: nothing outside is opened, no pickle runs, damage is one named error."""

import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint.folders import tensors, write_folder
from microscale.checkpoint.direct import quantize_folder
from microscale.checkpoint.export import FOLDERS, export, open_checkpoint
from microscale.checkpoint.folder import INDEX, open_folder
from microscale.checkpoint.header import KEY, read_header
from microscale.checkpoint.native import load, save
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.tensor import quantize

MXFP4 = Policy.parse("mxfp4/fp32")
SECRET = "secret.safetensors"

_opened: list[str] = []
_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_listen)


@pytest.fixture(name="outside")
def _outside(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file worth stealing; afterwards, that it was not opened."""
    global _listening  # noqa: PLW0603  (a hook cannot be taken out again)
    folder = tmp_path / "outside"
    folder.mkdir()
    save_file({"a.weight": torch.randn(4, 64)}, folder / SECRET)
    _opened.clear()
    _listening = True
    yield folder
    _listening = False
    assert [path for path in _opened if path.startswith(str(folder.resolve()))] == []


SPELLINGS = [
    "../outside/{s}",
    "./../outside/{s}",
    "x/../../outside/{s}",
    "model/../../outside/{s}",
    "../model/../outside/{s}",
    "..//outside//{s}",
    ".././outside/./{s}",
    "{o}/{s}",
    "/{o}/{s}",
    "//{o}/{s}",
    "file://{o}/{s}",
    "file:{o}/{s}",
    "..\\outside\\{s}",
    "..\\/outside/{s}",
    "\\\\host\\share\\{s}",
    "C:{s}",
    "C:\\{s}",
    "C:/{s}",
    "~/{s}",
    "~root/{s}",
    "$HOME/{s}",
    "${{PWD}}/../outside/{s}",
    "%2e%2e/outside/{s}",
    "%2e%2e%2foutside%2f{s}",
    "..%2foutside%2f{s}",
    "..%5coutside%5c{s}",
    "..%c0%afoutside%c0%af{s}",
    "．．/outside/{s}",
    "..／outside／{s}",
    "‥/outside/{s}",
    "..\u2215outside\u2215{s}",
    "\u202e../outside/{s}",
    " ../outside/{s}",
    "../outside/{s} ",
    "\t../outside/{s}",
    "../outside/{s}\n",
    "../outside/{s}\0",
    "model.safetensors\0/../../outside/{s}",
    "...//outside/{s}",
    "....//outside/{s}",
    "../" * 40 + "{o}/{s}",
    "/proc/self/cwd/{s}",
    "/proc/self/fd/0",
    "/dev/stdin",
    "/dev/zero",
    "..",
    ".",
    "",
    "/",
    "../outside",
    "x" * 5000,
    "\ud800",
    "sub/{s}",
    "http://example.org/{s}",
]


def test_there_are_forty_spellings() -> None:
    assert len(set(SPELLINGS)) >= 40


@pytest.mark.parametrize("spelling", SPELLINGS, ids=range(len(SPELLINGS)))
def test_a_weight_map_that_leads_outside(spelling: str, outside: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tensors())
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    (folder / "sub").symlink_to(outside)
    name = spelling.format(s=SECRET, o=outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    for opened in (open_folder, open_checkpoint, load):
        with pytest.raises(MicroscaleError):
            opened(folder)


def chain(at: Path, target: Path) -> None:
    """A link to a link."""
    at.with_name("link").symlink_to(target)
    at.symlink_to("link")


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "absolute": lambda at, out: at.symlink_to(out / SECRET),
    "relative": lambda at, out: at.symlink_to(Path("..") / out.name / SECRET),
    "chain": lambda at, out: chain(at, out / SECRET),
    "folder": lambda at, out: at.symlink_to(out),
    "loop": lambda at, out: at.symlink_to(at),
    "nowhere": lambda at, out: at.symlink_to("gone"),
    "device": lambda at, out: at.symlink_to("/dev/zero"),
    "pipe": lambda at, out: os.mkfifo(at),
    "directory": lambda at, out: at.mkdir(),
    "process": lambda at, out: at.symlink_to("/proc/self/environ"),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json", "tokenizer.json"])
def test_links_that_lead_outside(link: str, name: str, outside: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tensors())
    (folder / name).unlink(missing_ok=True)
    LINKS[link](folder / name, outside)
    with pytest.raises(MicroscaleError):
        quantize_folder(folder, MXFP4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cache_of_the_hub_is_read(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "snapshots").mkdir(parents=True)
    real = write_folder(home / "blobs", tensors())
    snapshot = home / "snapshots" / "rev"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    assert set(open_checkpoint(snapshot).items) == set(tensors())
    assert real.exists()


NAMES = ["../../x", "/etc/passwd", "..\\x", "a/b", "C:\\x", "x\n", "~", "file:///x", ".codes", " "]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tensors_are_no_paths(name: str, tmp_path: Path) -> None:
    content = {f"{name}.weight": torch.randn(4, 64), "b.weight": torch.randn(8, 64)}
    folder = write_folder(tmp_path / "model", content)
    quantize_folder(folder, MXFP4, tmp_path / "out")
    export(tmp_path / "out", "quark", tmp_path / "quark")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "quark"]
    assert set(load(tmp_path / "out")) == content.keys()


@pytest.mark.parametrize("name", NAMES[:8])
def test_strings_of_gguf_are_no_paths(name: str, outside: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    save({name: quantize(torch.randn(4, 64), "mxfp4")}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": f"../{outside.name}/{SECRET}"}))
    export(folder, "gguf", tmp_path / "x.gguf")
    assert list(open_checkpoint(tmp_path / "x.gguf").items) == [name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "outside", "x.gguf"]


@pytest.mark.parametrize("place", [f"../outside/{SECRET}", "{o}", "weights.bin", "", "/dev/zero"])
def test_outside_data_of_onnx_is_refused(place: str, outside: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="a", data_type=1, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place.format(o=outside / SECRET))
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (tmp_path / "x.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(MicroscaleError, match="in another file"):
        open_checkpoint(tmp_path / "x.onnx")


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"),
        *("x.gguf", "x.onnx", INDEX, "config.json"),
    ],
)
def test_pickles_do_not_run(how: str, name: str, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    if name == "config.json":
        save_file({"a.weight": torch.zeros(2, 32)}, folder / "model.safetensors")
    path = folder / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(_Bomb(marker)))
    else:
        torch.save(_Bomb(marker), path, _use_new_zipfile_serialization=how == "torch")
    target = path if path.suffix in {".gguf", ".onnx"} else folder
    with pytest.raises(MicroscaleError):
        open_checkpoint(target)
    if target == folder:
        with pytest.raises(MicroscaleError):
            quantize_folder(folder, MXFP4, tmp_path / "out")
    assert not marker.exists()


def test_an_index_that_names_a_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({}, folder / "pytorch_model.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(MicroscaleError, match="not a safetensors file"):
        open_folder(folder)


# ---------------------------------------------------------------- damage


FORMATS = {"modelopt": "nvfp4", "microscale": "int4-32-zero_point"}


@pytest.fixture(name="samples", scope="module")
def _samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each layout, by name; gguf and onnx where they are installed."""
    home = tmp_path_factory.mktemp("samples")
    found = {}
    files = [name for name in ("gguf", "onnx") if _installed(name)]
    for layout in (*FOLDERS, *files):
        fused = layout == "gpt-oss"
        name = "a.experts.down_proj" if fused else "a.weight"
        x = torch.randn((2, 64, 8) if fused else (8, 64))
        folder = home / f"from-{layout}"
        folder.mkdir()
        packed = quantize(x, FORMATS.get(layout, "mxfp4"), 1)
        save({name: packed, "b.bias": torch.ones(8)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
        found[layout] = home / (f"{layout}.{layout}" if layout in files else layout)
        export(folder, layout, found[layout])
    return found


def _installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def mutated(data: bytes, source: random.Random) -> bytes:
    """The same with some bytes changed, cut, doubled, or a number made extreme."""
    changed = bytearray(data)
    # Headers come first; half of the changes are to go there.
    reach = min(len(changed), 600) if source.random() < 0.7 else len(changed)
    for _ in range(source.choice((1, 1, 1, 2, 4, 16))):
        at = source.randrange(max(reach, 1))
        what = source.randrange(7)
        if what == 0:
            changed[at : at + 1] = bytes([source.randrange(256)])
        elif what == 1:
            del changed[at : at + source.choice((1, 4, 8, len(changed)))]
        elif what == 2:
            changed[at:at] = changed[at : at + source.choice((1, 8, 32))]
        elif what == 3:
            changed[at : at + 8] = source.choice((b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x40"))
        elif what == 4:
            changed[at : at + 1] = bytes(
                [changed[at] ^ 1 << source.randrange(8)] if changed[at:] else []
            )
        elif what == 5:
            changed[at : at + 1] = source.choice(
                (b"-", b"9", b'"', b"[", b"]", b"{", b"null", b"1e9")
            )
        else:
            changed[at : at + 4] = source.choice(
                (b"\x01\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
            )
        reach = min(reach, len(changed))
    return bytes(changed)


def survives(path: Path) -> bool:
    """Whether a checkpoint can be read; anything but MicroscaleError, or 5 s, is a failure."""
    start = time.monotonic()
    try:
        for item in open_checkpoint(path).items.values():
            item.load()
    except MicroscaleError as error:
        if str(path.parent) not in str(error):
            raise AssertionError(f"no file is named: {error}") from error
        return False
    finally:
        assert time.monotonic() - start < 5
    return True


def mutate(samples: dict[str, Path], count: int, seed: int) -> None:
    source, fates = random.Random(seed), {True: 0, False: 0}
    for n in range(count):
        target = path = samples[list(samples)[n % len(samples)]]
        if target.is_dir():
            path = target / source.choice(("model.safetensors",) * 4 + ("config.json",))
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, source))
        try:
            fates[survives(target)] += 1
        finally:
            path.write_bytes(whole)
    assert min(fates.values()) > count // 50, fates


@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints_are_read_or_refused(samples: dict[str, Path]) -> None:
    mutate(samples, 2000, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_hundred_thousand_mutated_checkpoints(seed: int, samples: dict[str, Path]) -> None:
    mutate(samples, 5000, seed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
PACKED = st.fixed_dictionaries(
    {
        "format": st.sampled_from(["mxfp4", "nvfp4", "x", ""]) | JSON,
        "axis": st.integers(-3, 3) | JSON,
        "compute": st.sampled_from(["float32", "int8"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**40), max_size=3) | JSON,
        "dtype": st.sampled_from(["bfloat16", "x"]) | JSON,
    }
)
HEADERS = st.fixed_dictionaries(
    {
        "version": st.just(1) | JSON,
        "packed": st.dictionaries(st.sampled_from(["a", "b"]), PACKED | JSON, max_size=2) | JSON,
        "aliases": st.dictionaries(st.text(max_size=2), st.just("a") | JSON, max_size=2) | JSON,
        "policy": JSON,
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=HEADERS)
def test_headers_of_any_content(header: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "headers"
    folder.mkdir(exist_ok=True)
    path = folder / "x.safetensors"
    text = json.dumps(header)
    parts = {"a.codes": torch.zeros(4, 32, dtype=torch.uint8), "plain": torch.ones(2)}
    save_file(parts, path, {KEY: text})
    survives(path)
    for where, read in (
        (str(path), lambda: load(path)),
        ("here", lambda: read_header(text, "here")),
    ):
        try:
            read()
        except MicroscaleError as error:
            if where not in str(error):
                raise AssertionError(f"{where} is not named: {error}") from error
