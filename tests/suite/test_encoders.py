"""Encoders of Hugging Face's format on small files, from the command line to the figures."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from microscale.cli import app
from microscale.errors import MicroscaleError
from microscale.suite import encoders, registry
from microscale.suite.entry import Subject
from microscale.suite.measure import evaluating
from microscale.suite.predictions import Predictions
from microscale.suite.setting import Setting
from suite.options import not_loaded
from suite.tiny import save_encoder

TOPICS = {"sea": "boat fish wave sail", "sky": "bird cloud wind star"}
SETTING = Setting.parse()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("tiny-bert"))


def saved(tmp_path: Path, labels: int) -> Path:
    return save_encoder(tmp_path / "head", labels=labels)


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "topics.tsv"
    rows = [
        f"{a} {b} {a}\t{topic}"
        for topic, words in TOPICS.items()
        for a in words.split()
        for b in words.split()
    ]
    path.write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    words = " ".join(TOPICS.values()).split()
    rows = [
        {"first": f"{a} wind", "second": f"{b} fish {a}", "score": (i * j) % 5 + (a == b)}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def load(model: Path, text: Path, setting: Setting = SETTING) -> Subject:
    (plan,) = registry.plan(str(model), text, setting)
    return plan.load()


def mapping(subject: Subject) -> Mapping[str, Tensor]:
    with evaluating(subject.model, 0):
        return cast("Mapping[str, Tensor]", subject.task.evaluate(subject.model))


def logits(subject: Subject) -> tuple[Tensor, Tensor]:
    with evaluating(subject.model, 0):
        batches = list(cast("Iterable[Predictions]", subject.task.evaluate(subject.model)))
    targets = [cast("Tensor", batch.targets) for batch in batches]
    return torch.cat([batch.logits for batch in batches]), torch.cat(targets)


def test_sentences_by_nearest_centroid(folder: Path, sentences: Path) -> None:
    subject = load(folder, sentences)
    assert subject.task.about == (
        "topics.tsv: 16 of 16 sentences, 2 classes, centroids from 16 others"
    )
    found, targets = logits(subject)
    assert found.shape == (16, 2)
    assert (found.argmax(-1) == targets).double().mean() > 0.8


def test_sentences_by_the_model_s_own_head(tmp_path: Path, sentences: Path) -> None:
    model = saved(tmp_path, 2)
    subject = load(model, sentences)
    assert subject.task.about == (
        "topics.tsv: 32 of 32 sentences, 2 classes of the model's own head"
    )
    found, targets = logits(subject)
    assert found.shape == (32, 2)
    assert sorted(targets.unique().tolist()) == [0, 1]


def test_a_head_is_tried_on_the_test_split_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.tsv"
    rows = ["boat\tsea\ttest", "bird\tsky\ttrain", "wave\t1\ttest"]
    path.write_text("\n".join(["text\tlabel\tsplit", *rows]), encoding="utf-8")
    found, targets = logits(load(saved(tmp_path, 2), path))
    assert len(found) == 2
    assert sorted(targets.tolist()) == [0, 1]  # by the name of a class, and by its number


def test_pairs_by_similarity(folder: Path, pairs: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    subject = load(folder, pairs)
    assert subject.task.about == "pairs.jsonl: 64 of 64 pairs, by cosine similarity"
    values = mapping(subject)["Spearman correlation"]
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    encoder = subject.task.evaluate.keywords["encoder"]  # type: ignore[attr-defined]
    with evaluating(subject.model, 0):
        one, two = (
            torch.cat([encoder.embed(subject.model, [row[side]]) for row in rows])
            for side in ("first", "second")
        )
    alike = (one * two).sum(-1).double()
    # Beside others in a batch, sums run in another order, and near values may change places.
    expected = stats.spearmanr(alike, [row["score"] for row in rows]).statistic
    assert float(values.mean()) == pytest.approx(expected, abs=0.02)


def test_pairs_by_a_head_of_one_output(tmp_path: Path, pairs: Path) -> None:
    subject = load(saved(tmp_path, 1), pairs)
    assert subject.task.about.endswith("64 of 64 pairs, scored by the model's own head")
    assert mapping(subject)["Spearman correlation"].shape == (64,)


def test_limits_and_batches(folder: Path, sentences: Path, pairs: Path) -> None:
    setting = Setting.parse(limit=5, batch_size=2)
    assert len(logits(load(folder, sentences, setting))[0]) == 5
    assert len(mapping(load(folder, pairs, setting))["Spearman correlation"]) == 5


@pytest.mark.parametrize(("mode", "position"), [("cls", 0), ("mean", None)])
def test_pooling_of_sentence_transformers(
    tmp_path: Path, sentences: Path, mode: str, position: int | None
) -> None:
    model = save_encoder(tmp_path / "model")
    _pool(model, f"pooling_mode_{mode}_token{'s' if mode == 'mean' else ''}")
    encoder = load(model, sentences).task.evaluate.keywords["encoder"]  # type: ignore[attr-defined]
    with evaluating(encoder.model, 0):
        hidden = encoder.model(**encoder.tokens(["boat fish"])).last_hidden_state[0]
        found = encoder.embed(encoder.model, ["boat fish"])[0]
    expected = hidden.mean(0) if position is None else hidden[position]
    torch.testing.assert_close(found, expected / expected.norm())


def _pool(model: Path, mode: str) -> None:
    (model / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": False, mode: True}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(config))


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="microscale")
    assert result.exit_code == code, result.output
    return result


def test_compare_and_inspect_take_both_files(folder: Path, sentences: Path, pairs: Path) -> None:
    formats = ("--formats", "mxint8,mxfp4")
    content = json.loads(run("compare", folder, "--text", pairs, *formats, "--json", "-").stdout)
    (comparison,) = content["comparisons"]
    assert comparison["metric"] == "Spearman correlation"
    assert comparison["unit"] == "pair"
    base, int8, fp4 = comparison["rows"]
    assert 0 < base["metric"]["error"] < 0.3
    assert 0 < int8["difference"]["error"] < fp4["difference"]["error"]
    assert "accuracy, %" in run("compare", folder, "--text", sentences, *formats).output
    output = run("inspect", folder, "--text", pairs, "--limit", "20").output
    assert "Spearman correlation" in output
    assert "encoder.layer.1.attention.self" in output


@pytest.mark.parametrize(
    ("labels", "rows", "words"),
    [
        (2, "text\tlabel\na\tland", "label 'land' is no class of the head .* Known: sea, sky"),
        (1, "text\tlabel\na\tsea", "a head of one output, which tells no classes apart"),
        (3, "first\tsecond\tscore\na\tb\t1\na\tb\t2\na\tc\t2", "a head of 3 classes, which gives"),
        (2, "text\tlabel\tsplit\na\tsea\ttrain", "the split 'test' is empty"),
        (0, "text\tlabel\na\tsea\nb\tsky", "class 'sea' has 1 train sentences"),
    ],
)
def test_files_that_do_not_go_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: int, rows: str, words: str
) -> None:
    model, path = save_encoder(tmp_path / "model", labels=labels), tmp_path / "s.tsv"
    path.write_text(rows, encoding="utf-8")

    monkeypatch.setattr(encoders, "load_pretrained", not_loaded)
    with pytest.raises(MicroscaleError, match=words):
        registry.plan(str(model), path, SETTING)


def test_pooling_that_is_not_known_is_refused(tmp_path: Path, sentences: Path) -> None:
    model = save_encoder(tmp_path / "model")
    _pool(model, "pooling_mode_lasttoken")
    with pytest.raises(MicroscaleError, match=r"asks for pooling_mode_lasttoken; only"):
        registry.plan(str(model), sentences, SETTING)


def test_a_language_model_without_padding_is_no_encoder(
    language_folder: Path, sentences: Path
) -> None:
    with pytest.raises(MicroscaleError, match="no padding token"):
        load(language_folder, sentences)
