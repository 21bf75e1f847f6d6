"""A comparison from Python, end to end on tiny models."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.formats import MXFP4
from microscale.policy import Policy
from microscale.suite.compare import DEFAULT_FORMATS, compare, read_formats
from microscale.suite.comparison import Comparison
from microscale.suite.hub import load_language_model
from microscale.suite.language import Reading, language_task
from microscale.suite.predictions import Predictions
from microscale.suite.rows import Row
from microscale.suite.setting import Setting
from microscale.suite.statistics import Verdict
from microscale.suite.task import Task
from suite.tiny import TEXT, Classifier, data, evaluation


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(Classifier(), evaluation(), name="tiny")


def row(comparison: Comparison, name: str) -> Row:
    return next(row for row in comparison.rows if row.format == name)


def test_rows_are_the_reference_and_every_format(comparison: Comparison) -> None:
    assert [row.format for row in comparison.rows] == ["float32", *DEFAULT_FORMATS]
    assert comparison.units == comparison.positions == 60
    assert comparison.metric == "accuracy"
    first = comparison.rows[0]
    assert first.figures.divergence is None
    assert first.figures.difference is None
    assert first.coverage is None
    assert (first.bits_per_weight, first.megabytes) == (32, (32 * 48 + 48 + 48 * 5 + 5) * 4 / 1e6)


def test_figures_are_those_of_the_converted_model(comparison: Comparison) -> None:
    model, (inputs, targets) = Classifier(), data()
    with torch.no_grad():
        plain = model(inputs).double().log_softmax(-1)
        convert(model, "mxfp4", verbose=False)
        logits = model(inputs).double().log_softmax(-1)
    revert(model)
    figures = row(comparison, "mxfp4").figures
    assert figures.divergence is not None
    assert figures.agreement is not None
    assert figures.loss_difference is not None
    divergence = (plain.exp() * (plain - logits)).sum(-1).mean()
    assert figures.divergence.value == pytest.approx(float(divergence), rel=1e-5)
    same = (plain.argmax(-1) == logits.argmax(-1)).double().mean()
    assert figures.agreement.value == pytest.approx(float(same))
    accuracy = (logits.argmax(-1) == targets).double().mean()
    assert figures.metric.value == pytest.approx(float(accuracy))
    loss = (plain - logits).gather(1, targets.unsqueeze(1)).mean()
    assert figures.loss_difference.value == pytest.approx(float(loss), rel=1e-4)


def test_bits_and_size_count_the_scales(comparison: Comparison) -> None:
    # 48 in-features are two blocks of 32, the second padded.
    found = row(comparison, "mxint8")
    bits = 48 * (32 * 8 + 8) + 5 * (64 * 8 + 16)
    assert found.bits_per_weight == pytest.approx(bits / (48 * 32 + 5 * 48))
    assert found.megabytes == pytest.approx((bits + 53 * 32) / 8e6)


def test_more_bits_lose_less(comparison: Comparison) -> None:
    divergences = [row.figures.divergence for row in comparison.rows[1:]]
    values = {
        name: found.value
        for name, found in zip(DEFAULT_FORMATS, divergences, strict=True)
        if found is not None
    }
    assert values["mxint8"] < values["mxfp8_e4m3"] < values["mxfp4"]
    assert values["mxfp4/mxfp6_e2m3"] < values["mxfp4"]


def test_every_product_is_named(comparison: Comparison) -> None:
    coverage = row(comparison, "mxfp4/mxfp6_e2m3").coverage
    assert coverage is not None
    assert [(p.module, p.product, p.how, p.formats) for p in coverage.products] == [
        ("first", "linear", "emulated", ("mxfp6_e2m3", "mxfp4")),
        ("second", "linear", "emulated", ("mxfp6_e2m3", "mxfp4")),
    ]
    assert coverage.products[0].calls == 4
    assert coverage.summary.startswith("2 emulated of 2 products (linear); skipped: none")


def test_what_is_left_alone_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Classifier()
            self.odd = nn.Embedding(5, 5, max_norm=1.0)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            shift: Tensor = self.odd(logits.argmax(-1))
            return logits + shift

    found = compare(Net(), evaluation(), ["mxfp4"]).rows[1].coverage
    assert found is not None
    assert [(name, kind) for name, kind, _ in found.left] == [("odd", "Embedding")]
    assert {p.how for p in found.products} == {"emulated", "skipped"}
    assert "skipped: 1 embedding" in found.summary


def test_the_model_is_left_as_it_was() -> None:
    model = Classifier().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, evaluation(), ["mxfp4"])
    assert model.training
    assert type(model.first) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_reverted_when_the_evaluation_fails() -> None:
    model, evaluate, calls = Classifier(), evaluation(), iter(range(9))

    def failing(module: nn.Module) -> object:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return evaluate(module)

    with pytest.raises(KeyboardInterrupt):
        compare(model, failing, ["mxfp4"])  # type: ignore[arg-type]
    assert type(model.first) is nn.Linear


def test_a_comparison_repeats_itself(comparison: Comparison) -> None:
    again = compare(Classifier(), evaluation(), name="tiny").to_dict()
    first = comparison.to_dict()
    for found in (again, first):
        for entry in found["rows"]:  # type: ignore[attr-defined]
            del entry["seconds"]
    assert again == first


def test_a_seed_reaches_the_evaluation() -> None:
    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        noise = torch.rand(8)
        return {"figure": model(data()[0][:8]).sum(-1) + noise}

    def value(seed: int) -> float:
        return compare(Classifier(), evaluate, ["mxint8"], seed=seed).rows[0].figures.metric.value

    assert value(1) == value(1) != value(2)


def test_one_batch_and_a_generator_give_the_same() -> None:
    inputs, targets = data()

    def whole(model: nn.Module) -> Predictions:
        return Predictions(model(inputs), targets)

    def lazy(model: nn.Module) -> Iterator[Predictions]:
        yield whole(model)

    first, second = (compare(Classifier(), f, ["nvfp4"]).rows[1] for f in (whole, lazy))
    assert first.figures == second.figures


def test_a_mapping_is_compared_by_its_loss() -> None:
    inputs, targets = data()

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        logits = model(inputs)
        hits = (logits.argmax(-1) == targets).float()
        return {
            "hits": hits,
            "loss": nn.functional.cross_entropy(logits, targets, reduction="none"),
        }

    found = compare(Classifier(), evaluate)
    assert found.metric == "hits"
    assert found.rows[1].figures.divergence is None
    assert found.rows[1].figures.loss_difference is not None
    assert {finding.measure for finding in found.findings} == {"loss"}
    assert "KL" not in str(found).partition("\n\n")[2].partition("\n")[0]


def test_a_mapping_without_loss_tests_no_finding() -> None:
    inputs, _ = data()
    found = compare(Classifier(), lambda model: {"sum": model(inputs).sum(-1)})
    assert {finding.verdict for finding in found.findings} == {Verdict.UNTESTED}


def test_formats_may_be_records_and_policies() -> None:
    policy = Policy.of("mxfp4", "fp32")
    found = compare(Classifier(), evaluation(), [MXFP4, policy, "MXINT8", "paper:mxfp4"])
    names = [row.format for row in found.rows[1:]]
    assert names == ["mxfp4", "mxfp4/fp32", "mxint8", "paper:mxfp4"]
    assert found.rows[1].figures != found.rows[4].figures


def test_activations_alone_leave_the_size_as_it_is() -> None:
    found = compare(Classifier(), evaluation(), ["fp32/mxfp4"])
    assert found.rows[1].megabytes == pytest.approx(found.rows[0].megabytes)
    assert found.rows[1].bits_per_weight == 32


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        (["mxfp5"], "mxfp5.*[Dd]id you mean"),
        (["mxfp4", "MXFP4"], "'mxfp4' twice"),
        ([], "formats is empty"),
        (["int8-channel"], "no output channels"),
    ],
)
def test_bad_formats_are_refused_before_anything_runs(formats: list[str], words: str) -> None:
    def evaluate(_: nn.Module) -> Predictions:
        raise AssertionError("must not run")

    with pytest.raises(MicroscaleError, match=words):
        compare(Classifier(), evaluate, formats)


def test_a_converted_model_is_refused() -> None:
    model = Classifier()
    convert(model, "mxfp4", verbose=False)
    with pytest.raises(MicroscaleError, match="converted already"):
        compare(model, evaluation(), ["mxint8"])


def test_default_formats_are_known() -> None:
    assert tuple(read_formats(DEFAULT_FORMATS)) == DEFAULT_FORMATS


def test_other_types_name_their_reference() -> None:
    inputs, targets = data()

    def evaluate(model: nn.Module) -> Predictions:
        return Predictions(model(inputs.bfloat16()), targets)

    found = compare(Classifier().bfloat16(), evaluate, ["mxint8"])
    assert found.rows[0].format == "bfloat16"
    assert found.rows[0].bits_per_weight == 16


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    task = Task(evaluate=evaluation(30), units=60)
    compare(Classifier(), task, ["mxfp4"], progress=lambda *words: told.append(words))
    assert told == [(name, n, 60) for name in ("float32", "mxfp4") for n in (0, 30, 60)]


@pytest.fixture(scope="module")
def language_comparison(language_folder: Path) -> Comparison:
    language = load_language_model(
        str(language_folder), dtype=torch.float32, device=torch.device("cpu")
    )
    task = language_task(language, TEXT, Setting.parse(), Reading(length=40), "text")
    return compare(language.model, task, ["mxint8", "mxfp4"], name="gpt")


def test_causal_models_are_also_measured_with_values_unquantized(
    language_comparison: Comparison,
) -> None:
    for found in language_comparison.rows[1:]:
        assert found.values_unquantized is not None
        assert found.values_unquantized.divergence is not None
        assert found.figures.divergence is not None
        assert found.values_unquantized.divergence.value != found.figures.divergence.value
    assert language_comparison.rows[0].values_unquantized is None
    assert "later tokens of the block" in language_comparison.notes[0]


def test_generation_with_a_cache_is_checked(language_comparison: Comparison) -> None:
    for found in language_comparison.rows[1:]:
        assert found.generation is not None
        assert found.generation.tokens == 80
        assert found.generation.divergence > 0
    assert "Generation with a cache" in str(language_comparison)


def test_both_products_of_attention_are_listed(language_comparison: Comparison) -> None:
    coverage = language_comparison.rows[1].coverage
    assert coverage is not None
    kinds = {product.product for product in coverage.products}
    assert {"scores", "values", "embedding", "linear"} <= kinds
    assert {product.how for product in coverage.products} == {"emulated"}


def test_the_record_is_json(comparison: Comparison, language_comparison: Comparison) -> None:
    for one in (comparison, language_comparison):
        record = json.loads(json.dumps(one.to_dict(), allow_nan=False))
        assert [*record] == [
            "model",
            "metric",
            "unit",
            "units",
            "positions",
            "about",
            "seed",
            "rows",
            "findings",
            "notes",
        ]
        estimate = {"value", "error", "low", "high", "units"}
        for entry in record["rows"]:
            assert {"format", "bits_per_weight", "megabytes", "seconds", "coverage"} <= {*entry}
            assert {*entry["metric"]} == estimate
        assert all(finding["verdict"] in list(Verdict) for finding in record["findings"])


def test_nan_does_not_reach_the_record() -> None:
    inputs, targets = data()
    calls = iter(range(9))

    def evaluate(model: nn.Module) -> Predictions:
        return Predictions(model(inputs) * (1 if next(calls) == 0 else float("nan")), targets)

    found = compare(Classifier(), evaluate, ["mxfp4", "mxint8"])
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["rows"][1]["divergence"]["value"] is None
    assert found.findings[0].verdict is Verdict.OPEN
    assert "nan" in str(found)


def test_text_has_the_table_and_the_findings(comparison: Comparison) -> None:
    lines = str(comparison).splitlines()
    assert lines[0] == "tiny  60 examples"
    assert lines[3].split()[:3] == ["format", "weight", "MB"]
    assert lines[4].startswith("float32")
    for name in (*DEFAULT_FORMATS, "MXINT8 at parity", "MXFP4 loses most"):
        assert any(line.startswith(name) for line in lines)
    assert "nvfp4: 2 emulated of 2 products (linear); skipped: none; " in str(comparison)
