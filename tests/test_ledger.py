"""Ledgers list every product that ran, and cost nothing when none is open."""

import threading

import pytest
import torch
from torch import nn

import microscale.ledger as ledger_module
from microscale.convert import convert
from microscale.ledger import Product, note, record_products


def test_products_outside_converted_modules_are_listed() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with record_products() as ledger:
        layer(x)
        layer(x)
        torch.einsum("ij,jk->ik", x, layer.weight)
    assert [(r.module, r.product, r.how, r.calls) for r in ledger] == [
        ("", "linear", "skipped", 2),
        ("", "einsum", "skipped", 1),
    ]
    assert "outside the modules that were converted" in ledger.rows[0].reason
    assert ledger.skipped == ledger.rows


def test_rows_count_calls_of_the_same_kind() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(2, 64)
    convert(model, "mxfp4/mxfp6_e2m3", verbose=False)
    with record_products() as ledger:
        for _ in range(3):
            model(x)
    assert len(ledger) == 2
    assert ledger.to_dict()[1] == {
        "module": "1",
        "product": "linear",
        "how": "emulated",
        "formats": ("mxfp6_e2m3", "mxfp4"),
        "reason": "",
        "calls": 3,
    }
    assert ledger.skipped == []
    table = str(ledger).splitlines()
    assert len(table) == 4
    assert table[3].split() == ["1", "linear", "emulated", "mxfp6_e2m3", "mxfp4", "3"]


def test_ledgers_nest_and_close() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    convert(model, "mxfp4", verbose=False)
    with record_products() as outer:
        model(x)
        with record_products() as inner:
            model(x)
    model(x)
    assert [row.calls for row in outer] == [2]
    assert [row.calls for row in inner] == [1]
    assert ledger_module._open == []
    assert torch.overrides._get_current_function_mode_stack() == []


def test_nothing_is_made_when_no_ledger_is_open() -> None:
    class Loud:
        def __str__(self) -> str:
            raise AssertionError

    note("m", "linear", "emulated", (Loud(), Loud()))


def test_unquantized_sides_are_written_fp32() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    convert(model, "mxfp4/fp32", verbose=False)
    with record_products() as ledger:
        model(x)
    assert [(row.how, row.formats) for row in ledger] == [("emulated", ("fp32", "mxfp4"))]


def test_threads_are_recorded() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    convert(model, "mxfp4", verbose=False)
    with record_products() as ledger:
        threads = [threading.Thread(target=model, args=(x,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [row.calls for row in ledger] == [4]


def test_a_failing_model_closes_the_ledger() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    convert(model, "mxfp4", verbose=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), record_products():
        model(torch.randn(2, 5))
    assert ledger_module._open == []


def test_products_are_records() -> None:
    first, second = (Product("m", "linear", "emulated", ("a", "b")) for _ in range(2))
    assert first == second
    assert len({first, second}) == 1
