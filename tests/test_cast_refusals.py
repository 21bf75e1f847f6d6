"""What `cast` and `quantize` refuse, with which words, before any work is done."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.tensor import quantize

Cast = Callable[[torch.Tensor], torch.Tensor]


X = torch.ones(2, 32)
REFUSED: list[tuple[str, Any, Any, dict[str, Any]]] = [
    # message, x, format, keywords
    (r"x has dtype torch\.int64.*x\.float\(\)", torch.ones(2, dtype=torch.int64), "mxfp4", {}),
    (r"x has dtype torch\.complex64", torch.ones(2, dtype=torch.complex64), "mxfp4", {}),
    (r"x has dtype torch\.bool", torch.ones(2, dtype=torch.bool), "mxfp4", {}),
    ("x has dtype int32", np.ones(3, np.int32), "mxfp4", {}),
    ("x has dtype complex128", np.ones(3, np.complex128), "mxfp4", {}),
    ("x is a list; give a torch tensor or a NumPy array", [1.0], "mxfp4", {}),
    ("x is a float", 1.0, "mxfp4", {}),
    (r"x has layout torch\.sparse_coo.*to_dense", X.to_sparse(), "mxfp4", {}),
    (r"axis 2 does not exist in a tensor of 2 dim.*use -2 to 1", X, "mxfp4", {"axis": 2}),
    ("axis -3 does not exist", X, "mxfp4", {"axis": -3}),
    ("axis 1 does not exist", torch.tensor(1.0), "mxfp4", {"axis": 1}),
    (r"axis 1\.0 is not an integer", X, "mxfp4", {"axis": 1.0}),
    ("axis True is not an integer", X, "mxfp4", {"axis": True}),
    (r"'mxfp5' is not known\. Did you mean .*mxfp4", X, "mxfp5", {}),
    ("block size 0 is not positive", X, "mxfp4-0", {}),
    ("e4m3 is an element format, without a scale", X, "e4m3", {}),
    ("None is neither a spelling nor a format", X, None, {}),
    (r"rounding='evne' is not known\. Did you mean even", X, "mxfp4", {"rounding": "evne"}),
    ("rounding='dither' is not known", X, "mxfp4", {"rounding": "dither"}),
    (r"overflow='sat' is not known\. Did you mean sat", X, "mxfp4", {"overflow": "sat"}),
    ("overflow='nonfinite' needs .* and e2m1 has neither", X, "mxfp4", {"overflow": "nonfinite"}),
    ("overflow='nonfinite' needs .* and int8 has neither", X, "mxint8", {"overflow": "nonfinite"}),
    ("nonfinite='skip' is not known", X, "mxfp4", {"nonfinite": "skip"}),
    ("flush_subnormals='on' is not known", X, "mxfp4", {"flush_subnormals": "on"}),
    ("flush_subnormals=True is not known", X, "mxfp4", {"flush_subnormals": True}),
    ("gradient='none' is not known", X, "mxfp4", {"gradient": "none"}),
    (r"dtype torch\.int8 is not one of", X, "mxfp4", {"dtype": torch.int8}),
    (
        r"out is torch\.float32 of shape \(2, 31\).*\(2, 32\)",
        X,
        "mxfp4",
        {"out": torch.ones(2, 31)},
    ),
    (r"out is torch\.int32", X, "mxfp4", {"out": torch.ones(2, 32, dtype=torch.int32)}),
    (
        "float64 and out of dtype .* disagree",
        X,
        "mxfp4",
        {"dtype": torch.float64, "out": X.clone()},
    ),
    ("out is a list", X, "mxfp4", {"out": [1.0]}),
    ("out", X, "mxfp4", {"out": torch.ones(1, 32).expand(2, 32)}),
    ("does not support a BlockTensor", quantize(X, "mxfp4"), "mxfp4", {}),
]


@pytest.mark.parametrize(
    ("message", "x", "fmt", "keywords"), REFUSED, ids=[message for message, *_ in REFUSED]
)
def test_bad_input_is_refused(message: str, x: Any, fmt: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(MicroscaleError, match=message):
        cast(x, fmt, **keywords)
    if not {"dtype", "out", "gradient"} & keywords.keys():
        with pytest.raises(MicroscaleError, match=message):
            quantize(x, fmt, **keywords)


def test_refusals_write_nothing() -> None:
    out = torch.full((2, 32), 5.0)
    with pytest.raises(MicroscaleError):
        cast(X, "mxfp4", 3, out=out)
    assert torch.equal(out, torch.full((2, 32), 5.0))
