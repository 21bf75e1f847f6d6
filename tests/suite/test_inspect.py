"""What an inspection says of every layer, from Python."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.report.figures import write_figure
from microscale.report.layers import MOST, draw
from microscale.scope import site_of
from microscale.suite.compare import compare
from microscale.suite.inspect import alone, inspect
from microscale.suite.inspection import Inspection
from microscale.suite.layer import SORTS
from microscale.suite.predictions import Predictions
from microscale.suite.task import Task
from suite.tiny import Classifier, data, evaluation

PAPER = "mxfp4 rounding=away flush_subnormals=block prerounding=bfloat16"


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspect(Classifier(), evaluation(), "mxfp4/mxfp6_e2m3", name="tiny", batches=None)


def test_every_layer_with_its_operands(found: Inspection) -> None:
    assert [(layer.module, layer.kind) for layer in found.layers] == [
        ("first", "Linear"),
        ("second", "Linear"),
    ]
    for layer in found.layers:
        formats = {operand.operand: operand.format for operand in layer.operands}
        assert formats == {"weight": "mxfp4", "input": "mxfp6_e2m3"}
        ratios = {operand.operand: operand.figures.sqnr for operand in layer.operands}
        assert 10 < ratios["weight"] < 22 < ratios["input"] < 40


def test_the_whole_is_what_a_comparison_finds(found: Inspection) -> None:
    row = compare(Classifier(), evaluation(), ["mxfp4/mxfp6_e2m3"]).rows[1]
    assert found.whole == row.figures
    assert found.base == compare(Classifier(), evaluation(), ["mxfp4"]).rows[0].figures.metric


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_layer_alone_is_what_ignoring_the_other_gives(found: Inspection, name: str) -> None:
    other = {"first": "second", "second": "first"}[name]
    policy = Policy.of("mxfp4", "mxfp6_e2m3", ignore=(other,))
    row = compare(Classifier(), evaluation(), [policy]).rows[1]
    (layer,) = (layer for layer in found.layers if layer.module == name)
    assert layer.alone == row.figures
    assert layer.error == row.figures.divergence


def test_the_model_is_as_it_was() -> None:
    model = Classifier()
    x, _ = data()
    before = model(x)
    inspect(model, evaluation(), "mxint8")
    assert torch.equal(model(x), before)
    assert not any(site_of(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_inside_a_layer_are_not_of_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y @ y.mT

    torch.manual_seed(0)
    outer = Outer()
    model = nn.Sequential(outer).eval()
    x = torch.randn(32, 32)
    convert(model, alone(model, Policy.parse("mxfp4"), "0"), verbose=False)
    with torch.no_grad():
        y = outer.inner(x)
        assert torch.equal(y, nn.functional.linear(x, *outer.inner.parameters()))
        assert not torch.equal(model(x), y @ y.mT)


@pytest.mark.parametrize("name", ["a*", "b[0]", "?"])
def test_names_are_no_patterns(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b0": nn.Linear(2, 2)})
    conversion = convert(model, alone(model, Policy.parse("mxfp4"), name), verbose=False)
    assert [entry.name for entry in conversion.quantized] == [name]


def test_a_model_that_is_one_layer() -> None:
    model = nn.Linear(32, 5)
    found = inspect(model, evaluation(), "mxfp4")
    assert [layer.module for layer in found.layers] == [""]
    assert "(model)" in str(found)
    assert found.layers[0].alone == found.whole


def test_a_profile_is_inspected() -> None:
    model = nn.Linear(32, 5)
    found = inspect(model, evaluation(), "paper:mxfp4")
    assert found.format == "paper:mxfp4"
    assert {operand.format for operand in found.layers[0].operands} == {PAPER}
    assert found.layers[0].alone == found.whole


def test_only_the_first_batches_run() -> None:
    inputs, targets = data()
    seen: list[int] = []

    def evaluate(model: nn.Module) -> Iterator[Predictions]:
        for start in range(0, 60, 10):
            seen.append(start)
            rows = slice(start, start + 10)
            yield Predictions(model(inputs[rows]), targets[rows])

    found = inspect(Classifier(), Task(evaluate=evaluate, about="ten at a time"), batches=2)
    assert found.units == 20
    assert seen == [0, 10] * 4
    assert found.about == "ten at a time; the first 2 batches"


def test_a_mapping_is_judged_by_its_metric() -> None:
    inputs, targets = data()

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        return {"hits": (model(inputs).argmax(-1) == targets).double()}

    found = inspect(Classifier(), evaluate, "mxfp4")
    assert found.measure == "change of hits"
    assert all(layer.error == layer.alone.difference for layer in found.layers)
    assert "change of hits" in str(found)
    draw(found)


def test_rows_are_sorted_the_worst_first(found: Inspection) -> None:
    errors = [abs(layer.error.value) for layer, _ in found.rows("error") if layer.error]
    assert errors == sorted(errors, reverse=True)
    ratios = [operand.figures.sqnr for _, operand in found.rows("sqnr")]
    assert ratios == sorted(ratios)
    for name in ("saturated", "flushed", "crest", "kurtosis"):
        figures = [getattr(operand.figures, name) for _, operand in found.rows(name)]
        assert figures == sorted(figures, reverse=True)
    order = [layer.module for layer, _ in found.rows("order")]
    assert order == ["first", "first", "second", "second"]
    assert all(len(found.rows(sort)) == 4 for sort in SORTS)


def test_it_says_what_the_figures_mean(found: Inspection) -> None:
    text = str(found)
    for words in ("tiny in mxfp4/mxfp6_e2m3", "All layers together", "Kurtosis: 3 if normal"):
        assert words in text
    assert "4 emulated" not in text
    assert "2 emulated of 2 products (linear)" in text


def test_plain_data(found: Inspection) -> None:
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["units"] == 60
    layer = content["layers"][0]
    assert layer["alone"]["divergence"]["value"] > 0
    assert {"sqnr", "scales", "outliers", "crest"} <= {*layer["operands"][0]}


def test_a_picture(found: Inspection, tmp_path: Path) -> None:
    figure = draw(found)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["first", "second"]
    assert right.get_xscale() == "log"
    assert "this layer alone" in right.get_title(loc="left")
    for name in ("a.png", "b.png"):
        write_figure(draw(found), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_of_very_many_layers_shows_the_worst() -> None:
    torch.manual_seed(0)
    depth = MOST + 4
    layers = [nn.Linear(8, 8, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(*layers)
    batch = Predictions(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))
    inputs = torch.randn(4, 8)
    found = inspect(model, lambda m: Predictions(m(inputs), batch.targets), "mxfp4")
    assert len(found.layers) == depth
    figure = draw(found)
    assert len(figure.axes[0].get_yticks()) == MOST
    assert f"{MOST} of {depth} layers" in figure.get_suptitle()


def test_progress_counts_the_passes() -> None:
    told: list[tuple[str, int, int | None]] = []
    inspect(Classifier(), evaluation(), "mxfp4", progress=lambda *args: told.append(args))
    assert told == [
        ("unquantized", 0, None),
        ("mxfp4", 1, None),
        ("first", 2, 4),
        ("second", 3, 4),
    ]


def test_bad_input() -> None:
    model = Classifier()
    with pytest.raises(MicroscaleError, match="mxfp5"):
        inspect(model, evaluation(), "mxfp5")
    with pytest.raises(MicroscaleError, match="batches=0 must be at least 1"):
        inspect(model, evaluation(), batches=0)
    with pytest.raises(MicroscaleError, match=r"no operand was cast to 'fp32'"):
        inspect(model, evaluation(), "fp32")
    with pytest.raises(MicroscaleError, match="no operand was cast"):
        inspect(model, evaluation(), Policy.of("mxfp4", ignore=("first", "second")))
    convert(model, "mxfp4", verbose=False)
    with pytest.raises(MicroscaleError, match="'mine' is converted already"):
        inspect(model, evaluation(), name="mine")


def test_an_evaluation_that_fails_leaves_the_model_as_it_was() -> None:
    model, inputs = Classifier(), data()[0]

    def evaluate(m: nn.Module) -> Predictions:
        if site_of(m.first):  # type: ignore[arg-type]
            raise KeyboardInterrupt
        return Predictions(m(inputs), data()[1])

    with pytest.raises(KeyboardInterrupt):
        inspect(model, evaluate)
    assert not any(site_of(module) for module in model.modules())
    assert math.isfinite(float(model(inputs).detach().sum()))
