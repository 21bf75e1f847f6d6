"""`fp8-vs-int8`: the split of the data, the choice of estimators, the conversions, the files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from microscale.cli import app
from microscale.errors import MicroscaleError
from microscale.report.contest import draw
from microscale.scope import site_of
from microscale.suite.accuracy import accuracies
from microscale.suite.contest import Contest
from microscale.suite.fp8_vs_int8 import fp8_vs_int8
from microscale.suite.predictions import Predictions

pytest.importorskip("scipy")


def network(outlier: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].get_parameter("weight")[3] *= outlier
        model[3].get_parameter("weight")[:, 3] /= outlier
    return model


def evaluate(model: nn.Module) -> Iterator[Predictions]:
    for seed in range(6):
        x = torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))
        yield Predictions(model(x), torch.arange(10) % 4)


@pytest.fixture(scope="module", name="plain")
def _plain() -> Contest:
    return fp8_vs_int8(network(1.0), evaluate)


def test_formats_and_conversions(plain: Contest) -> None:
    assert [result.row.format for result in plain.results] == [
        *("INT8", "E2", "E3", "E4", "E5"),
        *("E4 -> INT8", "E4 -> W8A16", "W8A16", "W4A8"),
    ]
    errors = {result.row.format: result.error for result in plain.results}
    assert errors["INT8"] < errors["E3"] < errors["E4"] < errors["E5"]
    assert errors["W8A16"] < errors["INT8"] < errors["E4 -> INT8"] < 2 * errors["E4"]
    assert errors["INT8"] < errors["W4A8"]
    # Two of six batches calibrate: the first and the fifth.
    assert plain.units == 40


def test_layers_say_why(plain: Contest) -> None:
    wide = fp8_vs_int8(network(300.0), evaluate)
    found = {(x.module, x.operand): x for contest in (plain, wide) for x in contest.layers}
    assert set(found) == {(m, o) for m in "03" for o in ("input", "weight")}
    (first,) = (x for x in plain.layers if (x.module, x.operand) == ("3", "input"))
    (other,) = (x for x in wide.layers if (x.module, x.operand) == ("0", "weight"))
    assert first.kurtosis < 10 < other.kurtosis
    assert other.crest > 3
    assert other.bits["INT8"] < other.bits["E2"]
    assert (first.best, other.best != "INT8") in {("INT8", True), ("E2", True)}


def test_outliers_by_channel_and_remedies() -> None:
    """One input channel is 200 times the others: INT8 gives up the others, FP8 does not."""

    class Sick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 32)
            self.down = nn.Linear(32, 4)
            with torch.no_grad():
                self.norm.weight[5] = 200.0
                self.up.weight[:, 5] /= 200.0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(self.norm(x)).relu())
            return out

    found = fp8_vs_int8(Sick().eval(), evaluate)
    assert found.outlying == ("up",)
    (sick,) = (x for x in found.layers if (x.module, x.operand) == ("up", "input"))
    assert sick.bits["INT8"] < min(x.bits["INT8"] for x in found.layers if x is not sick)
    x = torch.cat([norm_input(seed) for seed in (0, 4)])
    with torch.no_grad():
        y = Sick().norm(x).double()
    far = (y - y.mean()).abs() > 6 * y.std(correction=0)
    assert sick.channels == 16
    assert sick.outliers == pytest.approx(float(far.double().mean()))
    assert dict(sick.worst) == pytest.approx(
        {c: float(far[:, c].double().mean()) for c in range(16) if far[:, c].any()}
    )
    assert sum(sick.histogram) == pytest.approx(1)
    assert [r.result.row.format for r in found.remedies] == [
        *("INT8, A16 there", "INT8, groups", "INT8, smoothed"),
    ]
    assert "1 folded" in found.remedies[2].about
    errors = {r.row.format: r.error for r in (*found.results, *(r.result for r in found.remedies))}
    for remedy in found.remedies:
        assert errors[remedy.result.row.format] < errors["INT8"] / 2
        assert remedy.won_back(found.int8) > 0.5
    assert found.to_dict()["hardware"] is None
    assert "gate counts are not computed yet" in str(found)


def norm_input(seed: int) -> Tensor:
    return torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))


def test_the_model_stays_as_it_is() -> None:
    model = network(1.0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fp8_vs_int8(model, evaluate)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(site_of(module) is None for module in model.modules())


def test_refusals() -> None:
    x = torch.zeros(4, 16)
    with pytest.raises(MicroscaleError, match="batches one by one"):
        fp8_vs_int8(network(1.0), lambda model: Predictions(model(x)))
    with pytest.raises(MicroscaleError, match="1 batch"):
        fp8_vs_int8(network(1.0), lambda model: [Predictions(model(x))])
    with pytest.raises(MicroscaleError, match="never calls the model"):
        fp8_vs_int8(network(1.0), lambda _: [Predictions(x)] * 3)


def test_report_and_picture(plain: Contest) -> None:
    text = str(plain)
    assert "E4 -> W8A16" in text
    assert "inputs" in text
    json.dumps(plain.to_dict(), allow_nan=False)
    assert len(draw(accuracies(), plain).axes) == 7


def test_command_without_a_model(tmp_path: Path) -> None:
    path, picture = tmp_path / "bits.json", tmp_path / "bits.png"
    arguments = ["fp8-vs-int8", "--json", str(path), "--picture", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert record["contest"] is None
    assert len(record["distributions"]) == 3
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits-cmn",), "Did you mean digits-cnn?"),
        (("digits-cnn", "--limit", "0"), "--limit 0"),
        (("digits-cnn", "--picture", "x.txt"), "ends in '.txt'"),
        (("digits-cnn", "--text", "nowhere.txt"), "reads no text"),
        (("stdlib-gpt", "--limit", "2", "--batch-size", "2"), "1 batch(es)"),
    ],
)
def test_the_command_refuses_before_it_writes(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    out = tmp_path / "bits.json"
    result = CliRunner().invoke(app, ["fp8-vs-int8", *arguments, "--json", str(out)])
    assert result.exit_code == 2
    assert words in result.output
    assert list(tmp_path.iterdir()) == []
