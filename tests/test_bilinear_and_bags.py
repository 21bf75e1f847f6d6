"""Bilinear layers and bags of embeddings: PyTorch's functions, on cast operands."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microscale.weights as weights_module
from layer_checks import assert_products, assert_same_function, converted, doubles
from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.functional import bilinear, embedding_bag
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from product_spy import ProductSpy

MIXED = Policy.parse("mxfp4/mxfp6_e2m3")


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts that change nothing."""

    def unchanged(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * 1

    monkeypatch.setattr(weights_module, "cast", unchanged)


# ---------------------------------------------------------------- bilinear


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_bilinear_is_torchs(shape: tuple[int, ...], bias: bool) -> None:
    x, y = doubles(*shape, 9), doubles(*shape, 12)
    assert_same_function(nn.Bilinear(9, 12, 5, bias=bias).double(), lambda m: m(x, y))


def test_bilinear_is_two_products_on_cast_operands() -> None:
    x, y, weight = torch.randn(3, 40), torch.randn(3, 50), nn.Parameter(torch.randn(5, 40, 50))
    policy = Policy.from_dict(
        {
            "forward": {"input": "mxfp6_e2m3", "weight": "mxfp4"},
            "matmul": {"left": "mxfp8_e4m3", "right": "mxint8"},
        }
    )
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        result = bilinear(x, y, weight, policy=policy, name="b")
    first, second = spy.seen
    first.check_result()
    first.check_operands("mxfp6_e2m3", "mxfp4")
    assert torch.equal(first.left, cast(y, "mxfp6_e2m3"))
    assert torch.equal(first.right.mT.reshape(5, 40, 50), cast(weight.detach(), "mxfp4"))
    second.check_result()
    second.check_operands("mxfp8_e4m3", "mxint8")
    assert torch.equal(second.right[..., 0], cast(x, "mxint8"))
    assert torch.equal(result, second.result[..., 0])
    assert [(row.module, row.product, row.formats) for row in ledger] == [
        ("b", "bilinear", ("mxfp6_e2m3", "mxfp4")),
        ("b", "bilinear", ("mxfp8_e4m3", "mxint8")),
    ]


def test_bilinear_layers_multiply_cast_operands() -> None:
    x, y = torch.randn(3, 40), torch.randn(3, 50)
    layer = nn.Bilinear(40, 50, 5)
    assert assert_products(layer, lambda m: m(x, y)) == 2
    assert "mxfp4/mxfp6_e2m3" in repr(converted(layer))


# ---------------------------------------------------------------- bags

TABLE = torch.randn(30, 48)
BAGS: dict[str, dict[str, Any]] = {
    "pairs": {"input": torch.randint(30, (4, 2))},
    "offsets": {"input": torch.randint(30, (9,)), "offsets": torch.tensor([0, 2, 2, 7])},
    "last": {
        "input": torch.randint(30, (9,)),
        "offsets": torch.tensor([0, 2, 9]),
        "include_last_offset": True,
    },
    "padding": {"input": torch.tensor([[3, 3, 1], [3, 2, 0]]), "padding_idx": 3},
}


@pytest.mark.parametrize("fmt", ["mxfp4", "int8-channel", "int8-tensor"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("bags", BAGS)
def test_bags_are_of_the_cast_table(bags: str, mode: str, fmt: str) -> None:
    table, policy = nn.Parameter(TABLE.clone()), Policy.of(fmt)
    options = BAGS[bags] | {"mode": mode}
    expected = F.embedding_bag(weight=cast(TABLE, fmt), **options)
    with record_products() as ledger:
        got = embedding_bag(weight=table, **options, policy=policy)
    assert torch.equal(got, expected)
    assert [(row.product, row.how, row.formats[0]) for row in ledger] == [
        ("embedding_bag", "emulated", fmt)
    ]


def test_samples_have_weights() -> None:
    ids, weights = torch.randint(30, (4, 2)), torch.randn(4, 2)
    got = embedding_bag(ids, TABLE, mode="sum", per_sample_weights=weights, policy=MIXED)
    exact = (cast(TABLE, "mxfp4").double()[ids] * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("bags", ["pairs", "padding"])
def test_bag_layers_are_torchs(bags: str, mode: Any) -> None:
    options: Any = {"padding_idx": BAGS[bags].get("padding_idx"), "mode": mode}
    layer = nn.EmbeddingBag(30, 48, **options).double()
    assert_same_function(layer, lambda m: m(BAGS[bags]["input"]))
    if mode == "sum":
        weights = doubles(*BAGS[bags]["input"].shape)
        assert_same_function(layer, lambda m: m(BAGS[bags]["input"], per_sample_weights=weights))


@pytest.mark.parametrize("sparse", [True, False])
def test_the_gradient_reaches_the_rows_that_were_read(sparse: bool) -> None:
    table = nn.Parameter(TABLE.clone())
    ids = torch.tensor([[3, 3], [7, 0]])
    embedding_bag(ids, table, mode="sum", sparse=sparse, policy=MIXED).sum().backward()
    assert table.grad is not None
    grad = table.grad.to_dense() if sparse else table.grad
    counts = torch.bincount(ids.flatten(), minlength=30)
    assert torch.equal(grad, counts[:, None].expand(30, 48).float())


def test_bags_that_rescale_are_refused_and_left() -> None:
    with pytest.raises(MicroscaleError, match=r"embedding_bag 'e' has max_norm=1\.0"):
        embedding_bag(torch.tensor([[0]]), TABLE, max_norm=1.0, policy=MIXED, name="e")
    model = nn.Sequential(nn.EmbeddingBag(5, 8, max_norm=1.0))
    (entry,) = convert(model, "mxfp4", verbose=False).left
    assert entry.reason == "max_norm rescales the table while it is read"


class Both(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 48)
        self.form = nn.Bilinear(48, 48, 7)

    def forward(self, ids: Tensor) -> Tensor:
        """Values [N, 7] of bags [N, bag]."""
        x = self.bag(ids)
        result: Tensor = self.form(x, x)
        return result


@pytest.mark.parametrize("spelling", ["mxfp4/mxfp6_e2m3", "int8-channel/int8-token", "nvfp4"])
def test_layers_come_back_from_files(spelling: str, tmp_path: Path) -> None:
    model, fresh, ids = Both(), Both(), torch.randint(30, (4, 3))
    assert convert(model, spelling, verbose=False).left == ()
    with torch.no_grad():
        expected = model(ids)
        save(model, tmp_path / "m.safetensors")
        stored = load(tmp_path / "m.safetensors", fresh)
        with record_products() as ledger:
            assert torch.equal(fresh(ids), expected)
    assert [row.how for row in ledger] == ["packed", "packed", "emulated"]
    assert all(isinstance(stored[f"{name}.weight"], BlockTensor) for name in ("bag", "form"))
