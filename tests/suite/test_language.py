"""Language models: the text is covered once, the figures are the model's, errors come first."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from microscale.errors import MicroscaleError
from microscale.suite import hub
from microscale.suite.hub import LanguageModel, check_directory, load_language_model
from microscale.suite.language import Reading, check_generation, cut, encode, language_task
from microscale.suite.measure import evaluating, measure_reference
from microscale.suite.setting import Setting
from suite.tiny import TEXT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def language(language_folder: Path) -> LanguageModel:
    return load_language_model(str(language_folder), dtype=torch.float32, device=CPU)


def test_loads_model_tokenizer_and_context(language: LanguageModel) -> None:
    assert language.context == 64
    assert encode(language.tokenizer, "the cat")[0] == 0


@pytest.mark.parametrize("length", [1, 16, 64])
def test_windows_predict_every_token_once(language: LanguageModel, length: int) -> None:
    windows = cut(language, TEXT, Reading(length=length))
    predicted = [token for window in windows for token in window.targets]
    assert predicted == encode(language.tokenizer, TEXT)[1:]


def test_openings_are_cut_with_their_first_token(language: LanguageModel) -> None:
    text = f"{TEXT}\n<|endoftext|>\nthe cat\n<|endoftext|>\n{TEXT}"
    windows = cut(language, text, Reading(length=16, openings=True))
    assert [len(window) for window in windows] == [15, 2, 15]
    assert all(window.inputs[0] == 0 for window in windows)
    first = cut(language, text, Reading(length=16, openings=True, documents=2))
    assert first == windows[:2]


def test_perplexity_is_the_models_own(language: LanguageModel) -> None:
    task = language_task(language, TEXT, Setting.parse(batch_size=3), Reading(length=32), "text")
    with evaluating(language.model, 0):
        measured, _ = measure_reference(language.model, task, lambda _: None)
        windows = cut(language, TEXT, Reading(length=32))
        losses = [
            F.cross_entropy(
                language.model(torch.tensor([window.inputs])).logits[0].double(),
                torch.tensor(window.targets),
                reduction="sum",
            )
            for window in windows
        ]
    tokens = sum(map(len, windows))
    assert measured.positions == tokens == len(TEXT.split())
    expected = torch.stack(losses).sum() / tokens
    assert measured.headline().value == pytest.approx(float(expected.exp()), rel=1e-5)


def test_limit_and_seed_choose_the_windows(language: LanguageModel) -> None:
    def about(limit: int, seed: int = 0) -> str:
        setting = Setting.parse(limit=limit, seed=seed)
        return language_task(language, TEXT, setting, Reading(length=8), "text").about

    assert about(3).startswith("text: 3 of 20 windows of up to 8 tokens, 24 predicted")
    assert about(99).startswith("text: 20 of 20")


def test_a_cache_changes_nothing_in_float(language: LanguageModel) -> None:
    windows = cut(language, TEXT, Reading(length=64))
    with evaluating(language.model, 0):
        found = check_generation(language.model, windows=windows, device=CPU)
    assert found is not None
    assert found.divergence < 1e-8
    assert found.agreement == 1
    assert found.tokens == 2 * 32


def test_a_text_of_one_token_is_refused(language: LanguageModel) -> None:
    bare = LanguageModel("x", language.model, _NoStart(language.tokenizer), 64, None)
    with pytest.raises(MicroscaleError, match="3 characters but no token"):
        cut(bare, "the", Reading(length=8))


def test_a_tokenizer_of_another_model_is_refused(language: LanguageModel) -> None:
    small = LanguageModel("x", language.model, language.tokenizer, 64, vocabulary=5)
    with pytest.raises(MicroscaleError, match=r"gives the token \d+, but the model knows 5"):
        language_task(small, TEXT, Setting.parse(), Reading(), "text")


class _NoStart:
    """A tokenizer without a beginning-of-sequence token."""

    bos_token_id = None

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *args: object, **kwargs: object) -> object:
        assert callable(self.tokenizer)
        return self.tokenizer(*args, **kwargs)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["config.json"], "lacks config.json"),
        (["model.safetensors"], "lacks weights .model.safetensors or pytorch_model.bin"),
        (["tokenizer.json"], "lacks a tokenizer"),
        (["config.json", "tokenizer.json"], "config.json; and a tokenizer"),
    ],
)
def test_a_directory_that_lacks_files(
    language_folder: Path, tmp_path: Path, missing: list[str], words: str
) -> None:
    folder = copy_of(language_folder, tmp_path)
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(MicroscaleError, match=words):
        check_directory(folder)


def test_a_directory_that_lacks_a_shard(language_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(language_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(MicroscaleError, match=r"lacks model-2\.safetensors \(named in"):
        check_directory(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(MicroscaleError, match="not valid JSON"):
        check_directory(folder)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match="none' does not exist"):
        check_directory(tmp_path / "none")


def load(folder: Path) -> LanguageModel:
    return load_language_model(str(folder), dtype=torch.float32, device=CPU)


def test_weights_that_do_not_fit_are_named(language_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(language_folder, tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MicroscaleError, match=r"missing: transformer\.h\.1\.mlp\.c_fc\.weight"):
        load(folder)


def test_a_broken_checkpoint_is_refused(language_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(language_folder, tmp_path)
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(MicroscaleError, match="cannot be loaded as a causal language model"):
        load(folder)


def test_an_unknown_architecture_is_refused(language_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(language_folder, tmp_path)
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(MicroscaleError, match="no-such-type"):
        load(folder)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda _: False)
    with pytest.raises(
        MicroscaleError, match=r"could not be had from the Hugging Face hub .*cache"
    ):
        load_language_model("no-such-owner/no-such-model", dtype=torch.float32, device=CPU)


def test_a_server_is_reachable_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert hub.is_reachable(address)
    assert not hub.is_reachable(address)
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy"})
    assert hub.is_reachable(address)
