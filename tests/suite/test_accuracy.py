"""Bits of accuracy against the published figure and against samples."""

import math

import pytest
import torch

from microscale.cast import cast
from microscale.suite.accuracy import DISTRIBUTIONS, ELEMENTS, Accuracy, accuracies

PUBLISHED = {
    "uniform": (8.00, 7.35, 6.42, 5.44, 4.47, 8.00),
    "normal": (6.73, 7.09, 6.24, 5.24, 4.25, 7.28),
    "Student's t, 3 degrees": (2.89, 3.22, 4.19, 5.16, 4.25, 5.82),
}
"""arXiv 2303.17951, Figure 5, read off the drawing: INT8, E2, E3, E4, E5, and the bound."""


@pytest.fixture(scope="module", name="found")
def _found() -> dict[str, Accuracy]:
    return {one.distribution: one for one in accuracies()}


@pytest.mark.parametrize("distribution", PUBLISHED)
def test_as_published(found: dict[str, Accuracy], distribution: str) -> None:
    *bits, bound = PUBLISHED[distribution]
    assert list(found[distribution].bits) == list(ELEMENTS)
    assert list(found[distribution].bits.values()) == pytest.approx(bits, abs=0.15)
    assert found[distribution].bound == pytest.approx(bound, abs=0.15)


def test_rule_of_thumb(found: dict[str, Accuracy]) -> None:
    assert [one.best for one in found.values()] == ["INT8", "E2", "E4"]


@pytest.mark.parametrize("name", ELEMENTS)
def test_normal_as_sampled(found: dict[str, Accuracy], name: str) -> None:
    one, element = found["normal"], ELEMENTS[name]
    scale = one.ranges[name] / element.largest
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    prefix = "" if element.is_integer else "fp8_"
    error = (x - cast(x, f"{prefix}{element}-tensor-at{scale:f}")).square().mean().sqrt()
    assert math.log2(1 / float(error)) == pytest.approx(one.bits[name], abs=0.02)


def test_uniform_integers_by_hand(found: dict[str, Accuracy]) -> None:
    # 254 steps over [-1, 1]: an error of step^2 / 12 in 1 / 3 of variance, ends a little clipped.
    assert found["uniform"].bits["INT8"] == pytest.approx(math.log2(254), abs=0.01)


def test_densities_sum_to_one() -> None:
    for distribution in DISTRIBUTIONS:
        x, _, widths = distribution.points()
        assert float((distribution.density(x) * widths).sum()) == pytest.approx(0.5, abs=1e-4)
