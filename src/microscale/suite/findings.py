"""The findings of arXiv 2310.10537 (its section 5), each put to a paired test on one model.

The tests use a continuous measure, not accuracy: the loss for parity with the unquantized model,
and KL(unquantized || quantized) for one format over another; where an evaluation gives no logits,
the loss stands for both. All tests are paired over units, with 95 % t-intervals and no
correction for their number.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from microscale.suite import statistics
from microscale.suite.measure import Measured
from microscale.suite.statistics import Estimate, Verdict

MARGIN = 0.01
"""Parity: a loss counts as equal within this share of the unquantized loss, fixed beforehand."""

PARITY = "mxint8"
WORST = "mxfp4"
BETTER = (("mxfp8_e4m3", "mxfp8_e5m2"), ("mxfp6_e2m3", "mxfp6_e3m2"))

UNMEASURED = "the evaluation gives neither logits nor a loss"
UNLABELLED = "the evaluation has no labels, so there is no loss"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding, its verdict on this model, and the figures it rests on."""

    name: str
    verdict: Verdict
    measure: str
    estimate: Estimate | None
    detail: str

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "finding": self.name,
            "verdict": str(self.verdict),
            "measure": self.measure,
            "difference": self.estimate.to_dict() if self.estimate else None,
            "detail": self.detail,
        }


def judge(base: Measured, measured: Mapping[str, Measured]) -> tuple[Finding, ...]:
    """Put every finding to its test.

    `base` is the unquantized model, `measured` maps the name of each format of the comparison
    (a pair as "weight/activation") to its figures.
    """
    pairs = [_better(good, poor, measured) for good, poor in BETTER]
    return (_parity(base, measured), *pairs, _worst(measured))


def _parity(base: Measured, measured: Mapping[str, Measured]) -> Finding:
    name, measure = "MXINT8 at parity", "loss"
    if PARITY not in measured:
        return _untested(name, f"{PARITY} was not compared")
    loss = measured[PARITY].loss
    if base.loss is None or loss is None:
        return _untested(name, UNMEASURED if measured[PARITY].divergence is None else UNLABELLED)
    center = statistics.mean(base.loss, base.weight).value
    margin = MARGIN * abs(center)
    estimate = statistics.difference(loss, base.loss, base.weight)
    detail = (
        f"loss {_interval(estimate)}; margin {margin:.4g}, {MARGIN:.0%} of the unquantized loss "
        f"{center:.4g}, fixed beforehand"
    )
    return Finding(name, statistics.equivalence(estimate, margin), measure, estimate, detail)


def _better(good: str, poor: str, measured: Mapping[str, Measured]) -> Finding:
    name = f"{_element(good)} over {_element(poor)}"
    missing = [spelling for spelling in (good, poor) if spelling not in measured]
    if missing:
        return _untested(name, f"{' and '.join(missing)} not compared")
    estimate, measure = _excess(measured[poor], measured[good])
    if estimate is None:
        return _untested(name, UNMEASURED)
    detail = f"{measure} of {poor} minus {good}: {_interval(estimate)}"
    return Finding(name, statistics.sign(estimate), measure, estimate, detail)


def _worst(measured: Mapping[str, Measured]) -> Finding:
    name = "MXFP4 loses most"
    # A profile's MXFP4 is no other format.
    others = [spelling for spelling in measured if spelling.rpartition(":")[2] != WORST]
    if WORST not in measured or not others:
        return _untested(name, f"{WORST} and another format were not compared")
    found: dict[str, Estimate] = {}
    measure = ""
    for other in others:
        estimate, measure = _excess(measured[WORST], measured[other])
        if estimate is None:
            return _untested(name, UNMEASURED)
        found[other] = estimate
    nearest = min(found, key=lambda other: found[other].low)
    verdicts = {statistics.sign(estimate) for estimate in found.values()}
    verdict = next(v for v in (Verdict.FAILS, Verdict.OPEN, Verdict.HOLDS) if v in verdicts)
    detail = f"{measure} of {WORST} minus {nearest}, the nearest of {len(found)}: "
    return Finding(name, verdict, measure, found[nearest], detail + _interval(found[nearest]))


def _excess(worse: Measured, better: Measured) -> tuple[Estimate | None, str]:
    """How much more `worse` loses than `better`: by divergence, else by loss."""
    first, second, measure = worse.divergence, better.divergence, "KL divergence"
    if first is None or second is None:
        first, second, measure = worse.loss, better.loss, "loss"
    if first is None or second is None:
        return None, measure
    return statistics.difference(first, second, worse.weight), measure


def _element(spelling: str) -> str:
    return spelling.partition("_")[2].upper()


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"


def _untested(name: str, reason: str) -> Finding:
    return Finding(name, Verdict.UNTESTED, "none", None, reason)
