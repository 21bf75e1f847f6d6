"""The picture of quality against bits, and numbers as words."""

import math
from pathlib import Path

import pytest
from matplotlib.text import Annotation

from microscale.report.figures import write_figure
from microscale.report.quality import draw
from microscale.report.table import short, with_error, with_interval
from microscale.suite.comparison import Comparison
from microscale.suite.rows import Figures, Row
from microscale.suite.statistics import Estimate

POINTS = {
    "mxint8": (8.25, 0.0002),
    "mxfp8_e4m3": (8.25, 0.0030),
    "mxfp8_e5m2": (8.25, 0.0105),
    "mxfp6_e2m3": (6.25, 0.0029),
    "mxfp6_e3m2": (6.25, 0.0104),
    "mxfp4": (4.25, 0.1),
    "mxfp4/mxfp6_e2m3": (4.25, 0.1),
    "nvfp4": (4.5, 0.1),
}


def estimate(value: float, error: float = 0.1) -> Estimate:
    return Estimate(value, error, value - 2 * error, value + 2 * error, 9)


def comparison(points: dict[str, tuple[float, float]] = POINTS) -> Comparison:
    rows = [Row("float32", 32, 4, Figures(estimate(0.9)), 1)]
    for name, (bits, loss) in points.items():
        figures = Figures(estimate(0.9), estimate(0.1), divergence=estimate(loss, loss / 5))
        rows.append(Row(name, bits, 1, figures, 1))
    return Comparison("tiny", "accuracy", "clip", 9, 9, "clips", 0, tuple(rows), ())


def labels(one: Comparison) -> list[Annotation]:
    (axes,) = draw([one]).axes
    found = [child for child in axes.get_children() if isinstance(child, Annotation)]
    return [label for label in found if label.get_text()]


def test_every_format_is_named_and_no_label_covers_another() -> None:
    found = labels(comparison())
    assert sorted(label.get_text() for label in found) == sorted(POINTS)
    boxes = [label.get_window_extent() for label in found]
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart_x = box.x1 <= other.x0 or other.x1 <= box.x0
            assert apart_x or box.y1 <= other.y0 or other.y1 <= box.y0


def test_one_panel_for_each_model() -> None:
    assert len(draw([comparison(), comparison(), comparison()]).axes) == 3


def test_a_picture_is_written(tmp_path: Path) -> None:
    write_figure(draw([comparison()]), tmp_path / "c.svg")
    assert (tmp_path / "c.svg").stat().st_size > 10_000


def test_points_at_zero_and_without_an_interval_are_drawn() -> None:
    points = {"mxint8": (8.25, 0.0), "mxfp4": (4.25, 0.2), "nvfp4": (4.5, math.nan)}
    assert sorted(label.get_text() for label in labels(comparison(points))) == ["mxfp4", "mxint8"]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.91234, 0.0123, "0.912 ± 0.012"),
        (28.065, 1.846, "28.1 ± 1.8"),
        (1234.5, 67.8, "1234 ± 68"),
        (0.5, math.nan, "0.5"),
        (math.inf, math.nan, "inf"),
        (1.0, 0.0, "1.00 ± 0.00"),
    ],
)
def test_two_digits_of_the_error(value: float, error: float, text: str) -> None:
    assert with_error(estimate(value, error)) == text


def test_intervals() -> None:
    assert with_interval(estimate(-0.0123, 0.004), 100) == "-1.23 [-2.03, -0.43]"
    assert with_interval(None) == short(None) == ""
    assert with_interval(Estimate(0.5, math.nan, -math.inf, math.inf, 1)) == "+0.5"
    assert short(estimate(0.00012345)) == "0.000123"
