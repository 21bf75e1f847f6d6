"""Running evaluations: lockstep with the reference, pairing, and state left as it was."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite.coverage import Recorder
from microscale.suite.measure import (
    Measured,
    check_pairing,
    evaluating,
    measure,
    measure_reference,
)
from microscale.suite.predictions import Predictions
from microscale.suite.task import Evaluate, Task
from suite.tiny import Classifier, data, evaluation


def changed() -> Classifier:
    model = Classifier()
    with torch.no_grad():
        model.first.weight += 0.05
    return model


def run(model: nn.Module, other: nn.Module, task: Task, kept_bytes: int = 2**30) -> Measured:
    with torch.no_grad():
        _, reference = measure_reference(model, task, lambda _: None, kept_bytes)
        assert reference is not None
        assert reference.is_kept == (kept_bytes > 1000)
        return measure(other, task, reference, Recorder(), lambda _: None)


def test_kept_and_recomputed_references_agree() -> None:
    task = Task(evaluate=evaluation())
    kept = run(Classifier(), changed(), task)
    again = run(Classifier(), changed(), task, kept_bytes=500)
    assert kept.divergence is not None
    assert again.divergence is not None
    assert torch.equal(kept.divergence, again.divergence)
    assert float(kept.divergence.min()) > 0


def test_a_recomputed_reference_is_not_the_model_that_is_converted_next() -> None:
    model, task = Classifier(), Task(evaluate=evaluation())
    with torch.no_grad():
        _, reference = measure_reference(model, task, lambda _: None, kept_bytes=0)
        model.first.weight += 0.05
        found = measure(model, task, reference, Recorder(), lambda _: None)
    assert found.divergence is not None
    assert float(found.divergence.min()) > 0


def test_batches_do_not_change_the_figures() -> None:
    few = run(Classifier(), changed(), Task(evaluate=evaluation(batch=60)))
    many = run(Classifier(), changed(), Task(evaluate=evaluation(batch=7)))
    assert few.divergence is not None
    assert many.divergence is not None
    torch.testing.assert_close(few.divergence, many.divergence, rtol=1e-4, atol=1e-8)


def test_units_done_are_told() -> None:
    done: list[int] = []
    with torch.no_grad():
        measure_reference(Classifier(), Task(evaluate=evaluation(16, 60)), done.append)
    assert done == [16, 16, 16, 12]


def test_a_mapping_names_its_metric_and_loss() -> None:
    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        inputs, targets = data()
        error = (model(inputs).argmax(-1) != targets).float()
        return {"error rate": error, "loss": error * 2}

    with torch.no_grad():
        found, reference = measure_reference(Classifier(), Task(evaluate=evaluate), lambda _: None)
    assert reference is None
    assert found.metric == "error rate"
    assert found.loss is not None
    assert torch.equal(found.loss, 2 * found.values)
    assert found.positions == found.units == 60


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({}, "empty mapping"),
        ({"a": torch.zeros(3), "loss": torch.zeros(4)}, "different numbers of units"),
        ({"a": torch.zeros(3, 2)}, r"'a' with shape \(3, 2\)"),
        ({"a": torch.tensor(0.5)}, r"'a' with shape \(\)"),
        ([], "no batch at all"),
        ([torch.zeros(3)], "evaluate gave Tensor"),
        (0.75, "evaluate gave float 0.75"),
        (None, "evaluate gave NoneType"),
    ],
)
def test_refuses_what_is_no_evaluation(result: object, words: str) -> None:
    evaluate: Evaluate = lambda _: result  # type: ignore[assignment, return-value]  # noqa: E731
    with pytest.raises(MicroscaleError, match=words):
        measure_reference(Classifier(), Task(evaluate=evaluate), lambda _: None)


def test_an_evaluation_that_grows_is_refused() -> None:
    inputs, targets = data()
    calls = iter([2, 3, 1])

    def evaluate(model: nn.Module) -> Iterator[Predictions]:
        for _ in range(next(calls)):
            yield Predictions(model(inputs), targets)

    task = Task(evaluate=evaluate)
    _, reference = measure_reference(Classifier(), task, lambda _: None)
    with pytest.raises(MicroscaleError, match="more than the 2 batches"):
        measure(Classifier(), task, reference, Recorder(), lambda _: None)


def test_figures_of_other_units_are_not_paired() -> None:
    def measured(units: int) -> Measured:
        return run(Classifier(), Classifier(), Task(evaluate=evaluation(units=units)))

    with pytest.raises(MicroscaleError, match=r"gave 20 units .* but 30 with 30"):
        check_pairing(measured(20), measured(30))


def state(model: Classifier) -> tuple[bool, ...]:
    return model.training, model.first.training, model.second.training, torch.is_grad_enabled()


def test_evaluating_leaves_no_trace() -> None:
    model = Classifier().train()
    model.second.eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with evaluating(model, seed=1):
        assert state(model) == (False,) * 4
        torch.rand(7)
    assert state(model) == (True, True, False, True)
    assert torch.equal(torch.rand(3), expected)


def test_evaluating_leaves_no_trace_of_an_error() -> None:
    model = Classifier().train()
    with pytest.raises(RuntimeError), evaluating(model, seed=1):
        model(torch.zeros(1))
    assert state(model) == (True,) * 4


def test_evaluating_is_seeded() -> None:
    def drawn(seed: int) -> Tensor:
        with evaluating(Classifier(), seed):
            return torch.rand(4)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
