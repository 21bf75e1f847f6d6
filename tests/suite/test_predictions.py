"""Measures of units against the formulas written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from microscale.errors import MicroscaleError
from microscale.suite import predictions
from microscale.suite.predictions import IGNORE, Marks, Predictions, join, score


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, 11, generator=generator)
    reference = torch.randn(5, 7, 11, generator=generator)
    targets = torch.randint(0, 11, (5, 7), generator=generator)
    targets[0, 3:] = IGNORE
    targets[4, 0] = IGNORE
    return logits, reference, targets


def test_measures_follow_their_formulas() -> None:
    logits, reference, targets = batch()
    scores = score(Predictions(logits, targets), reference)
    assert scores.loss is not None
    assert scores.accuracy is not None
    assert scores.divergence is not None
    assert scores.agreement is not None
    for unit in range(5):
        rows = [position for position in range(7) if targets[unit, position] != IGNORE]
        losses, hits, divergences, same = [], [], [], []
        for row in rows:
            q = [math.exp(v) for v in logits[unit, row].double().tolist()]
            p = [math.exp(v) for v in reference[unit, row].double().tolist()]
            q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
            losses.append(-math.log(q[int(targets[unit, row])]))
            hits.append(q.index(max(q)) == targets[unit, row])
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(q.index(max(q)) == p.index(max(p)))
        n = len(rows)
        assert float(scores.weight[unit]) == n
        assert float(scores.loss[unit]) == pytest.approx(sum(losses) / n, rel=1e-12)
        assert float(scores.accuracy[unit]) == pytest.approx(sum(hits) / n)
        assert float(scores.divergence[unit]) == pytest.approx(sum(divergences) / n, rel=1e-10)
        assert float(scores.agreement[unit]) == pytest.approx(sum(same) / n)


def test_loss_is_torchs_cross_entropy() -> None:
    logits, _, targets = batch(1)
    scores = score(Predictions(logits, targets))
    expected = F.cross_entropy(logits.double().reshape(-1, 11), targets.reshape(-1))
    assert scores.loss is not None
    total = (scores.loss * scores.weight).sum() / scores.weight.sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
    assert scores.divergence is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_does_not_diverge_from_itself(dtype: torch.dtype) -> None:
    logits, _, targets = batch(2)
    logits = logits.to(dtype)
    scores = score(Predictions(logits, targets), logits.clone())
    assert scores.divergence is not None
    assert scores.agreement is not None
    assert scores.divergence.abs().max() == 0
    assert scores.agreement.min() == 1


def test_excluded_classes_and_ignored_positions_may_be_infinite() -> None:
    logits = torch.tensor([[[0.0, 1.0, -math.inf], [math.nan, math.nan, math.nan]]])
    targets = torch.tensor([[1, IGNORE]])
    scores = score(Predictions(logits, targets), logits)
    assert scores.loss is not None
    assert scores.divergence is not None
    assert float(scores.divergence[0]) == 0
    assert float(scores.loss[0]) == pytest.approx(math.log(1 + math.exp(-1)))


def test_nan_logits_give_nan_measures() -> None:
    scores = score(
        Predictions(torch.full((2, 3), math.nan), torch.tensor([0, 1])), torch.zeros(2, 3)
    )
    assert scores.loss is not None
    assert scores.divergence is not None
    assert scores.loss.isnan().all()
    assert scores.divergence.isnan().all()


def test_chunks_do_not_change_the_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, reference, targets = batch(3)
    whole = score(Predictions(logits, targets), reference)
    monkeypatch.setattr(predictions, "_CHUNK", 100)
    parts = score(Predictions(logits, targets), reference)
    for name in ("weight", "loss", "accuracy", "divergence", "agreement"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=0)


def test_join_keeps_the_order_of_units() -> None:
    logits, _, targets = batch(4)
    parts = [score(Predictions(logits[i : i + 2], targets[i : i + 2])) for i in (0, 2, 4)]
    joined, whole = join(parts).loss, score(Predictions(logits, targets)).loss
    assert joined is not None
    assert whole is not None
    assert torch.equal(joined, whole)


def test_without_targets_all_positions_count() -> None:
    logits, reference, _ = batch(5)
    scores = score(Predictions(logits), reference)
    full = score(Predictions(logits, torch.zeros(5, 7, dtype=torch.long)), reference)
    assert scores.loss is None
    assert scores.accuracy is None
    assert scores.weight.tolist() == [7.0] * 5
    assert scores.divergence is not None
    assert full.divergence is not None
    assert torch.equal(scores.divergence, full.divergence)


def test_marks_stand_in_place_of_what_targets_give() -> None:
    logits, _, targets = batch(6)
    values, weight, loss = torch.rand(3, 5)
    scores = score(Predictions(logits, targets, Marks(values, weight, loss)))
    assert torch.equal(scores.weight, weight.double())
    for found, given in ((scores.values, values), (scores.loss, loss)):
        assert found is not None
        assert torch.equal(found, given.double())
    only_values = score(Predictions(logits, targets, Marks(values)))
    assert torch.equal(only_values.weight, (targets != IGNORE).sum(1).double())
    assert only_values.loss is not None


def test_refuses_marks_of_other_units() -> None:
    with pytest.raises(MicroscaleError, match=r"marks\.loss has shape \(3,\); give one number"):
        Predictions(torch.zeros(2, 3), None, Marks(torch.zeros(2), loss=torch.zeros(3)))
    with pytest.raises(MicroscaleError, match=r"floating-point logits"):
        Predictions(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("logits", "targets", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"\(2, 3\) do not go with"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), r"\(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "float-?ing|float32"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), "int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 3, but the logits have 3 classes"),
        (torch.zeros(2, 3), torch.tensor([-1, 2]), "from -1 to 2"),
    ],
)
def test_refuses_what_does_not_fit(logits: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(MicroscaleError, match=words):
        Predictions(logits, targets)


def test_refuses_a_reference_of_another_shape() -> None:
    predictions = Predictions(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(MicroscaleError, match="same data in the same order"):
        score(predictions, torch.zeros(2, 4))
