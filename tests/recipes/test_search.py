"""Formats for each layer within a budget."""

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.recipes import search
from microscale.recipes.budget import Budget
from microscale.recipes.mixture import mixture
from microscale.recipes.parts import Marked, weight_parts
from microscale.recipes.searched import Searched
from microscale.recipes.sensitivity import MEASURES, Measure
from microscale.report.front import draw
from microscale.spelling import get_block_format
from microscale.suite.predictions import Predictions
from microscale.suite.task import Task

FORMATS = ("mxfp4", "mxfp6_e2m3", "mxint8")


class Net(nn.Module):
    """A tied table, attention written as operators, and layers of very unlike importance."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Embedding(20, 64)
        self.loud = nn.Linear(64, 64, bias=False)
        self.quiet = nn.Linear(64, 96, bias=False)
        self.back = nn.Linear(96, 64, bias=False)
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(64, 20, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        scores = (x @ x.mT / 8).softmax(-1)
        x = self.loud(scores @ x) + 1e-3 * self.back(self.quiet(x).relu())
        out: Tensor = self.head(x)
        return out


IDS = torch.randint(0, 20, (12, 10), generator=torch.Generator().manual_seed(5))


def evaluate(model: nn.Module) -> Iterator[Predictions]:
    for ids in IDS.split(4):
        yield Predictions(model(ids), ids)


def found_by(budget: str | float = "5bits", **further: Any) -> Searched:
    return search(Net(), evaluate, budget, **{"formats": FORMATS, **further})


@pytest.mark.parametrize("solver", ["exact", "greedy"])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_budget_is_kept_by_what_is_stored(measure: Measure, solver: Any) -> None:
    model = Net()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = search(model, evaluate, 5.3, formats=FORMATS, measure=measure, solver=solver)
    assert type(model.loud) is nn.Linear
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    conversion = convert(model, found.policy, verbose=False)
    assert conversion.bits_per_weight == found.chosen.weight_bits <= 5.3
    assert conversion.size_bits == round(8e6 * found.chosen.megabytes)
    assert found.chosen.activation_bits is not None
    assert found.chosen.activation_bits <= 5.3
    given = {part.modules: part for part in found.parts if part.side == "weights"}
    # What hardly matters to the output has the narrow format, whatever the measure of the model.
    if measure != "output":
        assert given["quiet",].format == given["back",].format == "mxfp4"
    # Tied weights are one part, counted once.
    assert given["table", "head"].values == 20 * 64
    assert sum(part.values for part in given.values()) == conversion.weights


def test_a_mixture_is_better_than_formats_of_its_size() -> None:
    found = found_by("6.4bits", activations="fp32")
    sizes = {point.label: point for point in found.formats}
    assert found.chosen.kind == "mixture"
    assert found.chosen.weight_bits <= 6.4
    assert found.chosen.divergence.value < 0.5 * sizes["mxfp6_e2m3/fp32"].divergence.value
    assert found.chosen.activation_bits is None
    assert found.policy.forward.input is None
    within = found.within(sizes["mxfp6_e2m3/fp32"].weight_bits, None)
    assert within.divergence.value <= sizes["mxfp6_e2m3/fp32"].divergence.value


@pytest.mark.parametrize("measure", MEASURES)
def test_activations_can_be_left_alone(measure: Measure) -> None:
    found = found_by("6bits", activations="fp32", measure=measure)
    assert {part.side for part in found.parts} == {"weights"}
    assert found.policy.forward.input is None
    assert found.policy.matmul.left is None


def test_predictions_are_the_best_of_all_assignments() -> None:
    found = found_by("5.5bits", activations="fp32")
    weights = [part for part in found.parts if part.side == "weights"]
    sizes = {label: Fraction(get_block_format(label).bits_per_value) for label in FORMATS}
    total = sum(part.values for part in weights)
    best = min(
        sum(part.losses[fmt] for part, fmt in zip(weights, choice, strict=True))
        for choice in product(FORMATS, repeat=len(weights))
        if sum(p.values * sizes[f] for p, f in zip(weights, choice, strict=True)) <= 5.5 * total
    )
    point = next(point for point in found.front if point.label == "5.5 bits")
    assert point.predicted == pytest.approx(best, rel=1e-9)


def test_losses_are_those_of_the_part_alone() -> None:
    found = found_by(activations="4.25")
    by_name = {(part.side, part.modules): part for part in found.parts}
    model = Net()
    convert(model, Policy.of("mxfp4", None, ignore=("table", "head", "quiet", "back")))
    with torch.no_grad():
        logits, wide = model(IDS), Net()(IDS)
    p, q = wide.double().log_softmax(-1), logits.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert by_name["weights", ("loud",)].losses["mxfp4"] == pytest.approx(expected, rel=1e-6)
    # Products of two activations belong to the module whose forward they are written in.
    assert by_name["activations", ("",)].losses["mxfp4"] > 0


def test_output_errors_are_of_each_layer_alone() -> None:
    found = found_by(measure="output", activations="8.25")
    by_name = {(part.side, part.modules): part for part in found.parts}
    model = Net()
    with torch.no_grad():
        x = model.table(IDS)
        wide = model.quiet(x)
        convert(model, "mxfp4/fp32", verbose=False)
        error = (model.quiet(x) - wide).square().sum() / wide.square().sum()
    losses = by_name["weights", ("quiet",)].losses
    assert losses["mxfp4"] == pytest.approx(float(error), rel=1e-4)
    assert losses["mxfp4"] > losses["mxfp6_e2m3"] > losses["mxint8"] > 0
    own = by_name["activations", ("",)].losses
    assert own["mxfp4"] > own["mxfp6_e2m3"] > own["mxint8"] > 0


def test_gradients_foresee_the_divergence() -> None:
    big = torch.randint(0, 20, (256, 10), generator=torch.Generator().manual_seed(6))

    def many(model: nn.Module) -> Iterator[Predictions]:
        for ids in big.split(8):
            yield Predictions(model(ids), ids)

    found = [
        search(Net(), many, 5.0, formats=("mxint8", "mxfp6_e2m3", "mxfp4"), measure=measure)
        for measure in MEASURES[::2]
    ]
    for one, other in zip(*(f.parts for f in found), strict=True):
        if one.reached and one.losses["mxfp6_e2m3"] > 1e-7:
            ratio = other.losses["mxfp6_e2m3"] / one.losses["mxfp6_e2m3"]
            assert 0.1 < ratio < 10, (one.name, one.side, ratio)


def test_a_policy_goes_to_a_file_and_back() -> None:
    found = found_by()
    assert Policy.from_toml(found.policy.to_toml()) == found.policy
    assert Policy.from_json(found.policy.to_json()) == found.policy
    json.dumps(found.to_dict(), allow_nan=False)
    for words in ("table = head", "chosen", "mxint8", "unused"):
        assert words in str(found)


def test_what_the_data_does_not_use_is_said_and_has_the_smallest_format() -> None:
    found = found_by("8bits")
    part = next(part for part in found.parts if part.modules == ("unused",))
    assert not part.reached
    assert part.format == "mxfp4"
    assert "No product of the data uses the weights of unused" in found.notes[0]


def test_a_size_is_that_of_the_model() -> None:
    whole = {p.label: p for p in found_by().formats}["mxfp6_e2m3"]
    found = found_by(f"{whole.megabytes}MB", activations=6.25)
    assert found.chosen.megabytes <= whole.megabytes
    assert found.chosen.divergence.value <= whole.divergence.value


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"budget": "4bits"}, r"budget '4bits' cannot be met: .* take at least 4.25bits"),
        ({"budget": "5B"}, r"budget '5B' cannot be met: .* take at least \d+B"),
        ({"activations": 4}, "activations 4bits cannot be met: .* at least 4.25bits"),
        ({"activations": "5KB"}, "activations '5KB' are not stored"),
        ({"budget": "4.6bit/s"}, "budget '4.6bit/s' is not an amount"),
        ({"budget": "-1"}, "budget '-1' is not an amount"),
        ({"budget": "0bits"}, "must be more than 0"),
        ({"formats": ("mxfp5",)}, "mxfp5"),
        ({"formats": ()}, "candidates are empty"),
        ({"formats": ("mxfp4", "mxfp4")}, "'mxfp4' twice"),
        ({"formats": ("mxfp4/fp32",)}, "leaves an operand in the wider type"),
        ({"formats": ("paper:mxfp4",)}, "is a profile"),
        ({"measure": "divergense"}, "Did you mean divergence"),
        ({"solver": "quick"}, "solver 'quick' is not known"),
    ],
    ids=str,
)
def test_bad_input(further: dict[str, Any], message: str) -> None:
    with pytest.raises(MicroscaleError, match=message):
        found_by(**further)


def test_the_smallest_budget_can_be_met() -> None:
    found = found_by("4.25bits")
    assert found.chosen.weight_bits == found.chosen.activation_bits == 4.25


def test_an_evaluation_without_logits_is_refused() -> None:
    def figures(model: nn.Module) -> dict[str, Tensor]:
        return {"loss": model(IDS).square().mean((1, 2))}

    with pytest.raises(MicroscaleError, match="a search compares logits"):
        search(Net(), figures, 5, formats=FORMATS)


def test_a_model_without_products_is_refused() -> None:
    def scale(model: nn.Module) -> Predictions:
        return Predictions(model(torch.ones(4, 8)))

    with pytest.raises(MicroscaleError, match="no weights of products"):
        search(nn.LayerNorm(8), Task(evaluate=scale, metric="agreement"), 5)


def test_modules_inside_others_keep_their_own_formats() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "b[0]": Net()})
    one, two = Operand(get_block_format("mxfp4")), Operand(get_block_format("mxint8"))
    policy = mixture(model, (one, one), {"a": (two, one), "a.1": (two, two), "b[0]": (one, two)})
    assert [p for p, _ in policy.overrides] == ["a", "a.0", "a.1", "b[[]0]", *_children(model)]
    for name, wanted in {"a": two, "a.0": one, "a.1": two, "b[0]": one, "b[0].loud": one}.items():
        assert policy.at(name).forward.weight == wanted


def _children(model: nn.ModuleDict) -> list[str]:
    return [f"b[[]0].{name}" for name, _ in model["b[0]"].named_children()]


def test_parts_share_parameters_across_chains() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    model[3].weight = model[0].weight
    operands = [Operand(get_block_format(name)) for name in FORMATS]
    parts = weight_parts(model, operands, {"0"})
    assert [part.modules for part in parts] == [("0", "3"), ("1",), ("2",)]
    assert [part.reached for part in parts] == [True, False, False]
    assert [list(map(int, part.bits)) for part in parts] == [[4352, 6400, 8448]] * 3


def test_casts_are_traced_to_their_modules() -> None:
    fmt = Operand(get_block_format("mxint8"))
    model = Net()
    marked = Marked(model, fmt, fmt)
    seen: set[tuple[str, str] | None] = set()
    with marked.watching(lambda _, operand, __, ___: seen.add(marked.home(operand))):
        model(IDS)
    names = ("table", "loud", "quiet", "back", "head")
    assert seen == {
        *((name, "weights") for name in names),
        *((name, "activations") for name in ("", *names[1:])),
    }


def test_the_picture_has_every_point() -> None:
    found = found_by()
    (axes,) = draw(found).axes
    assert axes.get_yscale() == "log"
    labels = {text.get_text() for text in axes.texts}
    assert labels == set(FORMATS)


@pytest.mark.parametrize(
    ("written", "amount", "unit"),
    [
        ("4.6bits", Fraction(46, 10), "bits"),
        (" 4.6 Bits ", Fraction(46, 10), "bits"),
        (4.6, Fraction(46, 10), "bits"),
        ("1bit", Fraction(1), "bits"),
        ("250kb", Fraction(250), "KB"),
        ("1.5 GiB", Fraction(3, 2), "GiB"),
    ],
    ids=str,
)
def test_budgets(written: str | float, amount: Fraction, unit: str) -> None:
    budget = Budget.parse(written)
    assert (budget.amount, budget.unit) == (amount, unit)
    assert Budget.parse(str(budget)) == budget


def test_a_size_leaves_what_the_rest_does_not_take() -> None:
    assert Budget.parse("4.6").bits(10, 999) == 46
    assert Budget.parse("1KB").bits(10, 999) == 8000 - 999
    assert Budget.parse("1KB").said(10, 1, 8000) == "1.0002KB"
    assert Budget.parse("1bits").said(3, 0, 13) == "4.3334bits"
