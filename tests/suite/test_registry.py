"""Names and paths become models; what is wrong is said before anything is loaded."""

import os
from pathlib import Path

import pytest
import torch

from microscale.errors import MicroscaleError
from microscale.suite import registry
from microscale.suite.compare import compare
from microscale.suite.entry import DATA_VARIABLE
from microscale.suite.measure import Measured, evaluating, measure_reference
from microscale.suite.models.checkpoint import fit, read_tensors
from microscale.suite.models.ds_cnn import DSCNN, Shape
from microscale.suite.models.kwt import KeywordTransformer
from microscale.suite.models.padding import pad_same
from microscale.suite.predictions import Predictions
from microscale.suite.setting import Setting
from microscale.suite.speech import load_ds_cnn
from microscale.suite.statistics import mean
from microscale.suite.task import Task

SETTING = Setting.parse()
DATA = os.environ.get(DATA_VARIABLE)
needs_data = pytest.mark.skipif(DATA is None, reason=f"{DATA_VARIABLE} is not set")
SMALL = Shape(40, 1, {"conv_1": (2, 1), "ds_1": (1, 1)}, 1e-3)


def test_no_model_means_the_embedded_ones() -> None:
    assert [plan.name for plan in registry.plan(None, None, SETTING)] == ["minilm", "stdlib-gpt"]


def test_a_directory_with_a_text_is_planned(language_folder: Path, text_file: Path) -> None:
    (plan,) = registry.plan(str(language_folder), text_file, SETTING)
    subject = plan.load()
    assert subject.task.metric == "perplexity"
    assert subject.task.about.startswith("text.txt: ")


def test_the_embedded_gpt_reads_another_text(text_file: Path) -> None:
    (plan,) = registry.plan("stdlib-gpt", text_file, SETTING)
    subject = plan.load()
    assert subject.task.about.startswith("text.txt: ")
    assert subject.name == "stdlib-gpt"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("minilm2", "neither a directory nor a known name. Did you mean minilm?"),
        ("stories260k-lama", "Did you mean stories260k-llama"),
        ("./nothing/here", "Known by name: minilm, stdlib-gpt, stories260k-llama"),
        ("/nothing", "neither a directory"),
        ("owner/name", "needs a text to read: add --text FILE"),
    ],
)
def test_a_model_that_is_not_there(model: str, words: str) -> None:
    with pytest.raises(MicroscaleError, match=words):
        registry.plan(model, None, SETTING)


def test_a_directory_without_a_text(language_folder: Path) -> None:
    with pytest.raises(MicroscaleError, match="needs a text to read"):
        registry.plan(str(language_folder), None, SETTING)


def test_an_empty_directory(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(
        MicroscaleError, match=r"lacks config\.json; and weights .*; and a tokenizer"
    ):
        registry.plan(str(folder), text_file, SETTING)


@pytest.mark.parametrize("model", [None, "minilm"])
def test_a_text_that_nobody_reads(model: str | None, text_file: Path) -> None:
    with pytest.raises(MicroscaleError, match=r"without a model|reads no text"):
        registry.plan(model, text_file, SETTING)


def test_a_text_is_checked_before_the_model_is_loaded(
    language_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MicroscaleError, match="does not exist"):
        registry.plan(str(language_folder), tmp_path / "none.txt", SETTING)


def test_models_of_the_data_folder_need_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(MicroscaleError, match=r"set MICROSCALE_DATA .* models/arm-kws"):
        registry.plan("arm-kws", None, SETTING)


def test_a_data_folder_without_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(MicroscaleError, match="arm-kws' does not exist"):
        registry.plan("arm-kws", None, SETTING)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"limit": -3}, "--limit -3"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"seed": -1}, "--seed -1"),
        ({"dtype": "float8"}, "--dtype 'float8' is not known. Did you mean"),
        ({"device": "cuda:99"}, "--device 'cuda:99' is not available here"),
        ({"device": "warp"}, "--device 'warp' is not available here"),
        ({"device": "meta"}, "--device 'meta' holds no values"),
    ],
)
def test_bad_settings(option: dict[str, int | str], words: str) -> None:
    with pytest.raises(MicroscaleError, match=words):
        Setting.parse(**option)  # type: ignore[arg-type]


def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    tensors = KeywordTransformer().state_dict()
    tensors["head.weight"] = torch.zeros(10, 64)
    tensors["extra"] = torch.zeros(1)
    del tensors["embed.bias"]
    save_file(tensors, path)
    with pytest.raises(MicroscaleError) as error:
        fit(KeywordTransformer(), read_tensors(path), path)
    for words in (
        "embed.bias is missing",
        "extra has no place in KeywordTransformer",
        "head.weight has shape (10, 64), not (12, 64)",
        str(path),
    ):
        assert words in str(error.value)


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match="does not exist"):
        read_tensors(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    with pytest.raises(MicroscaleError, match="no readable safetensors file"):
        read_tensors(tmp_path / "bad.safetensors")


def test_a_config_without_strides_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(DSCNN(SMALL).state_dict(), tmp_path / "ds_cnn_l.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MicroscaleError, match=r"ds_cnn_l: .*config\.json.*KeyError"):
        load_ds_cnn(tmp_path)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padded"),
    [
        ((49, 10), (10, 4), (2, 1), (58, 13)),
        ((25, 10), (3, 3), (2, 2), (27, 11)),
        ((13, 5), (3, 3), (1, 1), (15, 7)),
        ((4, 4), (1, 1), (2, 2), (4, 4)),
    ],
)
def test_same_padding(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padded: tuple[int, int]
) -> None:
    conv = torch.nn.Conv2d(1, 1, kernel, stride=stride)
    x = pad_same(torch.ones(1, 1, *size), conv)
    assert x.shape[2:] == padded
    assert tuple(conv(x).shape[2:]) == tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
    # The smaller half stands in front: TensorFlow's rule.
    rows = x[0, 0].amax(1).tolist()
    assert rows.index(1) == (padded[0] - size[0]) // 2


@pytest.mark.parametrize(
    ("model", "shape", "kinds", "products", "note"),
    [
        (KeywordTransformer(), (98, 40), {"linear", "scores", "values"}, 98, "last block of 8"),
        (DSCNN(SMALL), (49, 10), {"conv2d", "linear"}, 4, "blocks of 1"),
    ],
)
def test_keyword_models_are_quantized_whole(
    model: torch.nn.Module, shape: tuple[int, int], kinds: set[str], products: int, note: str
) -> None:
    clips = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    task = Task(evaluate=lambda model: Predictions(model(clips), torch.arange(4)))
    coverage = compare(model, task, ["mxfp4"]).rows[1].coverage
    assert coverage is not None
    assert {row.product for row in coverage.products} == kinds
    assert {row.how for row in coverage.products} == {"emulated"}
    assert len(coverage.products) == products
    assert not coverage.left
    assert note in coverage.summary


def measured(name: str) -> Measured:
    (plan,) = registry.plan(name, None, Setting.parse(limit=10**6))
    subject = plan.load()
    with evaluating(subject.model, 0):
        return measure_reference(subject.model, subject.task, lambda _: None)[0]


@pytest.mark.data
@needs_data
def test_kwt_reaches_the_accuracy_it_states() -> None:
    found = measured("kwt1-speech-commands")
    assert found.units == 1210
    assert f"{found.headline().value:.2%}" == "97.27%"


@pytest.mark.data
@needs_data
def test_ds_cnn_reaches_the_accuracy_it_states() -> None:
    found = measured("arm-kws")
    assert found.units == 4890
    assert f"{found.headline().value:.2%}" == "91.60%"
    labels = read_tensors(Path(str(DATA)) / "models/arm-kws/eval_features.safetensors")["labels"]
    assert f"{found.values[labels != 0].mean():.2%}" == "93.20%"


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "loss"), [("stories260k-llama", 1.3139), ("babyllama-tok105", 0.5649)]
)
def test_llamas_reach_the_loss_they_state(name: str, loss: float) -> None:
    found = measured(name)
    assert found.units == 400
    assert found.loss is not None
    assert mean(found.loss, found.weight).value == pytest.approx(loss, abs=2e-4)
