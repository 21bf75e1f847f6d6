"""Every test draws the same random numbers, whatever ran before it."""

from importlib import import_module

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def weights_decoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of packed weights on the path of the emulated ones, whose sums run in one order.

    Quantized activations turn the rounding of sums into steps of their grid, so that models can
    only be compared on the same path.
    """
    for name in ("microscale.packed_ops", "microscale.functional.linear"):
        monkeypatch.setattr(import_module(name), "unserved", lambda _: "asked for by a test")
