"""Verdicts on made figures."""

import pytest
import torch

from microscale.suite.findings import judge
from microscale.suite.measure import Measured
from microscale.suite.statistics import Verdict

UNITS = 50
NOISE = torch.randn(UNITS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def figures(
    loss: float, divergence: float | None = None, noise: float = 0.0, *, with_loss: bool = True
) -> Measured:
    """Figures around these means; the noise is the same for all, so it cancels in pairs."""
    weight = torch.ones(UNITS, dtype=torch.float64)
    losses = loss + noise * NOISE
    diverged = None if divergence is None else divergence * (1 + 0.1 * NOISE)
    return Measured("accuracy", weight, weight, losses if with_loss else None, diverged)


BASE = figures(2.0)
USUAL = {
    "mxint8": figures(2.001, 0.001),
    "mxfp8_e4m3": figures(2.01, 0.01),
    "mxfp8_e5m2": figures(2.03, 0.03),
    "mxfp6_e2m3": figures(2.01, 0.011),
    "mxfp6_e3m2": figures(2.03, 0.031),
    "mxfp4": figures(2.3, 0.3),
    "mxfp4/mxfp6_e2m3": figures(2.1, 0.15),
}


def verdicts(base: Measured, measured: dict[str, Measured]) -> dict[str, Verdict]:
    return {finding.name: finding.verdict for finding in judge(base, measured)}


def test_the_papers_order_gives_the_papers_findings() -> None:
    assert verdicts(BASE, USUAL) == {
        "MXINT8 at parity": Verdict.HOLDS,
        "E4M3 over E5M2": Verdict.HOLDS,
        "E2M3 over E3M2": Verdict.HOLDS,
        "MXFP4 loses most": Verdict.HOLDS,
    }


def test_the_opposite_order_does_not_hold() -> None:
    swapped = {
        "mxint8": figures(2.5, 0.5),
        "mxfp8_e4m3": USUAL["mxfp8_e5m2"],
        "mxfp8_e5m2": USUAL["mxfp8_e4m3"],
        "mxfp6_e2m3": USUAL["mxfp6_e3m2"],
        "mxfp6_e3m2": USUAL["mxfp6_e2m3"],
        "mxfp4": figures(2.0, 0.0001),
    }
    assert set(verdicts(BASE, swapped).values()) == {Verdict.FAILS}


def test_ties_are_not_distinguishable() -> None:
    same = dict.fromkeys(USUAL, USUAL["mxfp4"])
    found = verdicts(BASE, same)
    assert found.pop("MXINT8 at parity") is Verdict.FAILS
    assert set(found.values()) == {Verdict.OPEN}


@pytest.mark.parametrize(
    ("loss", "noise", "verdict"),
    [
        (2.019, 0.0, Verdict.HOLDS),
        (2.021, 0.0, Verdict.FAILS),
        (2.0, 0.5, Verdict.OPEN),
    ],
)
def test_parity_is_within_one_percent_of_the_loss(
    loss: float, noise: float, verdict: Verdict
) -> None:
    found = judge(BASE, {"mxint8": figures(loss, 0.1, noise)})[0]
    assert found.verdict is verdict
    assert "margin 0.02, 1% of the unquantized loss 2, fixed beforehand" in found.detail


def test_one_format_that_loses_more_refutes_that_mxfp4_loses_most() -> None:
    found = judge(BASE, USUAL | {"int4-tensor": figures(4, 3.0)})[-1]
    assert found.verdict is Verdict.FAILS
    assert "int4-tensor" in found.detail


def test_a_profile_of_mxfp4_is_no_other_format() -> None:
    twin = {"paper:mxfp4": figures(4, 3.0)}
    assert judge(BASE, USUAL | twin)[-1].verdict is Verdict.HOLDS
    assert judge(BASE, {"mxfp4": USUAL["mxfp4"]} | twin)[-1].verdict is Verdict.UNTESTED


def test_one_tie_leaves_open_that_mxfp4_loses_most() -> None:
    assert judge(BASE, USUAL | {"nvfp4": USUAL["mxfp4"]})[-1].verdict is Verdict.OPEN


def test_what_was_not_compared_is_not_tested() -> None:
    found = judge(BASE, {"mxfp8_e4m3": USUAL["mxfp8_e4m3"]})
    assert {finding.verdict for finding in found} == {Verdict.UNTESTED}
    assert found[1].detail == "mxfp8_e5m2 not compared"
    assert found[0].to_dict()["difference"] is None


def test_a_pair_is_another_format_than_its_halves() -> None:
    found = judge(BASE, {"mxint8/mxfp8_e4m3": USUAL["mxint8"], "mxfp4": USUAL["mxfp4"]})
    assert found[0].verdict is Verdict.UNTESTED
    assert found[-1].verdict is Verdict.HOLDS


def test_without_logits_the_loss_decides() -> None:
    measured = {name: figures(2 + index) for index, name in enumerate(reversed(USUAL))}
    found = judge(BASE, measured)
    assert found[1].measure == "loss"
    assert found[1].verdict is Verdict.FAILS


def test_without_logits_and_loss_nothing_is_tested() -> None:
    measured = dict.fromkeys(USUAL, figures(0, with_loss=False))
    found = judge(figures(0, with_loss=False), measured)
    assert {finding.verdict for finding in found} == {Verdict.UNTESTED}
    assert "neither logits nor a loss" in found[2].detail


def test_a_broken_format_is_not_distinguishable() -> None:
    broken = figures(float("nan"), float("nan"))
    found = judge(BASE, USUAL | {"mxfp8_e5m2": broken, "mxint8": broken})
    assert found[0].verdict is Verdict.OPEN
    assert found[1].verdict is Verdict.OPEN
