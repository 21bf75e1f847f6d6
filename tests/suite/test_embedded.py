"""The embedded data and model are whole, small, disjoint, and what PROVENANCE.json says."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale

EMBEDDED = Path(microscale.__file__).parent / "suite" / "embedded"
MODEL = EMBEDDED / "stdlib-gpt"
MODEL_BYTES = 4_000_000
WINDOW = 257


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def provenance() -> Any:
    return read_json(EMBEDDED / "PROVENANCE.json")


@pytest.fixture(scope="module")
def training() -> Any:
    return read_json(MODEL / "training.json")


@pytest.fixture(scope="module")
def docstrings() -> list[dict[str, str]]:
    lines = (EMBEDDED / "stdlib_docstrings.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """The excerpt's text by file: a section begins with the line that names it."""
    excerpt = (EMBEDDED / "stdlib_excerpt.txt").read_text(encoding="utf-8")
    parts = re.split(r"^(?=# file: \S+\.py$)", excerpt, flags=re.MULTILINE)
    assert parts[0] == ""
    return {part.partition("\n")[0].removeprefix("# file: "): part for part in parts[1:]}


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE.python",
        "PROVENANCE.json",
        "stdlib_docstrings.jsonl",
        "stdlib_excerpt.txt",
        "stdlib-gpt/README.md",
        "stdlib-gpt/config.json",
        "stdlib-gpt/generation_config.json",
        "stdlib-gpt/model.safetensors",
        "stdlib-gpt/tokenizer.json",
        "stdlib-gpt/tokenizer_config.json",
        "stdlib-gpt/training.json",
    ],
)
def test_file_is_there(name: str) -> None:
    assert (EMBEDDED / name).stat().st_size > 0


def test_nothing_else_is_there() -> None:
    assert sorted(path.name for path in EMBEDDED.iterdir()) == [
        "LICENSE.python", "PROVENANCE.json", "stdlib-gpt",
        "stdlib_docstrings.jsonl", "stdlib_excerpt.txt",
    ]  # fmt: skip
    assert len(list(MODEL.iterdir())) == 7


def test_sizes() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= MODEL_BYTES
    assert 150_000 <= (EMBEDDED / "stdlib_excerpt.txt").stat().st_size <= 250_000


def test_licence_is_pythons() -> None:
    text = (EMBEDDED / "LICENSE.python").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text


@pytest.mark.parametrize("name", ["stdlib_excerpt.txt", "stdlib_docstrings.jsonl"])
def test_file_is_the_one_of_the_provenance(provenance: Any, name: str) -> None:
    assert sha256((EMBEDDED / name).read_bytes()) == provenance["sha256"][name]


def test_excerpt_is_the_held_out_files(provenance: Any, sections: dict[str, str]) -> None:
    found = {path: sha256(text.encode()) for path, text in sections.items()}
    assert found == provenance["sections"]["held_out"]


def test_splits_share_no_file_and_no_text(provenance: Any) -> None:
    splits = provenance["sections"].values()
    paths = Counter(path for split in splits for path in split)
    texts = Counter(checksum for split in splits for checksum in split.values())
    assert max(paths.values()) == max(texts.values()) == 1


def test_model_was_trained_on_this_split(provenance: Any, training: Any) -> None:
    assert training["split_seed"] == provenance["split_seed"]
    assert provenance["python"].endswith(training["python"])
    assert training["files"] == {name: len(files) for name, files in provenance["sections"].items()}


def test_docstrings_are_well_formed(docstrings: list[dict[str, str]]) -> None:
    for docstring in docstrings:
        assert set(docstring) == {"text", "label", "name", "split"}
        assert docstring["split"] in {"train", "test"}
        assert 8 <= len(docstring["text"].split()) <= 60
        assert ">>>" not in docstring["text"]


def test_docstrings_do_not_name_their_module(docstrings: list[dict[str, str]]) -> None:
    for docstring in docstrings:
        label = re.escape(docstring["label"])
        assert not re.search(rf"\b{label}\b", docstring["text"], flags=re.IGNORECASE), docstring


def test_docstrings_are_distinct(docstrings: list[dict[str, str]]) -> None:
    letters = Counter(re.sub(r"[^a-z]", "", row["text"].lower()) for row in docstrings)
    assert max(letters.values()) == 1


def test_docstrings_are_balanced(docstrings: list[dict[str, str]]) -> None:
    splits = Counter(row["split"] for row in docstrings)
    assert 1_000 <= splits["train"] <= 1_500
    assert 600 <= splits["test"] <= 1_000
    by_label = Counter((row["label"], row["split"]) for row in docstrings)
    labels = {row["label"] for row in docstrings}
    assert 20 <= len(labels) <= 40
    assert all(24 <= by_label[label, "train"] <= 36 for label in labels)
    assert all(16 <= by_label[label, "test"] <= 24 for label in labels)


def test_card_gives_the_recorded_losses(training: Any) -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert f"{training['held_out_loss']:.4f} nats" in card
    assert f"{training['progress']['validation_loss']:.4f} nats" in card


def test_tokenizer_gives_the_text_back(sections: dict[str, str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    assert len(tokenizer) == 1024
    text = "# file: x.py\n\tdef f(ü: str) -> None:  # 漢字 \U0001f40d\r\n        return\n"
    for part in (text, *sections.values()):
        assert tokenizer.decode(tokenizer.encode(part)) == part


def test_model_loads_and_has_the_recorded_loss(training: Any) -> None:
    """Over the first windows only: seconds of all tests together are limited."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True).eval()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    excerpt = (EMBEDDED / "stdlib_excerpt.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(excerpt))
    assert len(tokens) == training["held_out_tokens"]
    windows = tokens[: training["checked_windows"] * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert loss.item() == pytest.approx(training["held_out_loss_of_first_windows"], abs=1e-4)
