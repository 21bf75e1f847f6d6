"""Constant scaling biases: the formats by hand, the range that holds, the command."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from microscale.cast import cast
from microscale.cli import app
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.report.scaling_bias import draw, table
from microscale.report.table import plain
from microscale.spelling import get_block_format
from microscale.suite.predictions import Predictions
from microscale.suite.scaling_bias import (
    ELEMENTS,
    Sweep,
    constant_format,
    head_of,
    scaling_bias,
    score,
)

pytest.importorskip("scipy")


def values(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    power = float(torch.randint(-20, 20, (1,), generator=generator))
    x: Tensor = torch.randn(64, generator=generator) * 2.0**power
    return x


@pytest.mark.parametrize(("element", "largest"), [("e4m3fnuz", 240), ("e4m3", 448)])
def test_amax_is_the_formula_of_the_paper(element: str, largest: int) -> None:
    """scaling_bias = floor(log2(largest / amax)); cast x 2^b, then 2^-b."""
    fmt = get_block_format(ELEMENTS[element])
    for seed in range(100):
        x = values(seed)
        bias = math.floor(math.log2(largest / float(x.abs().max())))
        by_hand = cast(x * 2.0**bias, f"fp8_{element}-tensor-unit") * 2.0**-bias
        assert torch.equal(cast(x, fmt), by_hand)
        assert torch.equal(cast(x, constant_format(fmt, bias)), by_hand)


def test_constants_saturate_and_flush() -> None:
    fmt = get_block_format(ELEMENTS["e4m3fnuz"])
    x = torch.tensor([1000.0, -7.0, 0.01])
    assert cast(x, constant_format(fmt, 2)).tolist() == [60.0, -7.0, 0.009765625]
    assert cast(x, constant_format(fmt, -4)).tolist() == [1024.0, -7.0, 0.015625]


@pytest.mark.parametrize(
    "spelling",
    [
        "fp8_amax",
        "fp8_cscale",
        "fp8_cscale:fp8_e4m3fnuz-tensor-at0.25",
        "fp8_amax:fp8_e4m3-tensor-pow2-rceil",
    ],
)
def test_policies_by_name(spelling: str) -> None:
    policy = Policy.parse(spelling)
    assert str(policy) == spelling
    assert Policy.from_toml(policy.to_toml()) == policy
    assert policy.matmul.left is policy.matmul.right is policy.storage is None
    assert policy.forward.input == policy.forward.weight
    fmt = policy.forward.weight
    assert policy == Policy.named(spelling.partition(":")[0], fmt, fmt)


def test_products_of_activations_stay_wide() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    convert(model, "fp8_amax", verbose=False)
    x = torch.randn(2, 5, 8)
    with record_products() as ledger:
        model(x, x, x, need_weights=False)
    ways = {row.product: row.how for row in ledger.rows}
    assert ways["scores"] == ways["values"] == "skipped"
    assert set(ways.values()) > {"skipped"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def evaluate(model: nn.Module) -> Iterator[Predictions]:
    for seed in range(4):
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            best = network()(x).topk(2)
        # No near ties, which any rounding decides.
        clear = best.values[:, 0] - best.values[:, 1] > 0.1
        yield Predictions(model(x[clear]), best.indices[clear, 0])


@pytest.fixture(scope="module", name="sweep")
def _sweep() -> Sweep:
    return scaling_bias(network(), evaluate, biases=range(-8, 13))


def test_the_range_that_holds(sweep: Sweep) -> None:
    assert sweep.range is not None
    low, high = sweep.range
    by_bias = {one.bias: one for one in sweep.constants}
    assert -8 < low <= 0 <= high < 12
    assert all(by_bias[bias].holds for bias in range(low, high + 1))
    assert not by_bias[low - 1].holds
    assert not by_bias[high + 1].holds
    assert sweep.amax.holds
    # The network agrees with itself: its accuracy is 1, so what is kept is the accuracy.
    assert all(one.kept == one.figures.metric.value for one in sweep.constants)


def test_a_constant_is_what_its_policy_does(sweep: Sweep) -> None:
    (one,) = (c for c in sweep.constants if c.bias == 9)
    model = network()
    convert(model, one.policy, verbose=False)
    batches = list(evaluate(model))
    best, targets = (torch.cat(parts) for parts in zip(*map(_answers, batches), strict=True))
    right = torch.eq(best, targets).double()
    assert one.figures.metric.value == float(right.mean())


def _answers(predictions: Predictions) -> tuple[Tensor, Tensor]:
    assert predictions.targets is not None
    return predictions.logits.argmax(-1), predictions.targets


def test_biases_of_amax(sweep: Sweep) -> None:
    weights = [p for name, p in network().named_parameters() if name.endswith("weight")]
    expected = [math.floor(math.log2(240 / float(p.detach().abs().max()))) for p in weights]
    assert sweep.found["weight"] == {b: expected.count(b) for b in sorted(set(expected))}
    assert sum(sweep.found["input"].values()) == 2 * 4


def test_too_few_units_are_said(sweep: Sweep) -> None:
    assert sweep.units < 200
    assert f"One of {sweep.units} units is" in plain(table(sweep), 150)


def test_scores() -> None:
    assert score("accuracy", 0.45, 0.5) == pytest.approx(0.9)
    assert score("perplexity", 10.0, 9.0) == pytest.approx(0.9)
    assert score("character error rate", 0.28, 0.2) == pytest.approx(0.9)
    assert math.isnan(score("perplexity", math.inf, 9.0))


def test_the_head_of_a_language_model_is_left() -> None:
    model = network()
    last = model.get_submodule("2")
    model.get_output_embeddings = lambda: last  # type: ignore[assignment]
    assert head_of(model) == ("2",)
    assert head_of(network()) == ()


def test_report_and_picture(sweep: Sweep) -> None:
    assert sweep.summary in plain(table(sweep), 150)
    json.dumps(sweep.to_dict(), allow_nan=False)
    assert len(draw(sweep).axes) == 2


def test_refusals() -> None:
    with pytest.raises(MicroscaleError, match="element 'e5m2' is not known"):
        scaling_bias(network(), evaluate, element="e5m2")
    with pytest.raises(MicroscaleError, match="rise one by one"):
        scaling_bias(network(), evaluate, biases=[0, 2])


def test_the_command_refuses_before_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    for arguments, words in (
        (["digits-cnn", "--element", "e9"], "element 'e9'"),
        (["digits-cmn"], "Did you mean digits-cnn?"),
        (["digits-cnn", "--picture", str(tmp_path / "x.txt")], "--picture"),
        (["digits-cnn", "--limit", "0"], "--limit"),
    ):
        result = CliRunner().invoke(app, ["scaling-bias", *arguments, "--json", str(out)])
        assert result.exit_code == 2
        assert words in result.output
        assert list(tmp_path.iterdir()) == []
