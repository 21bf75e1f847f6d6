"""Which operands a study sees, in modules of every kind."""

import torch
from torch import Tensor, nn

from microscale.analysis import Observed, Study, told_apart
from microscale.convert import convert
from microscale.ledger import record_products
from microscale.policy import Policy


def studied(model: nn.Module, x: Tensor, policy: Policy | str) -> list[Observed]:
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    convert(model, told_apart(policy), verbose=False)
    study = Study(model)
    with torch.no_grad(), record_products() as ledger, study.watching():
        model(x)
        model(x)
    return list(study.observed(ledger))


def names(found: list[Observed]) -> list[str]:
    return [f"{observed.module}: {observed.operand}" for observed in found]


def test_operands_told_apart_are_the_same_policy() -> None:
    policy = Policy.of("mxfp4", "mxfp4", overrides={"a": "mxint8"}, ignore=("b",))
    apart = told_apart(policy)
    assert apart == policy
    assert apart.forward.input is not apart.forward.weight
    assert apart.matmul.left is not apart.matmul.right
    assert apart.overrides[0][1][0][1] is not policy.overrides[0][1][0][1]


def test_a_layer_has_input_and_weight() -> None:
    found = studied(nn.Sequential(nn.Linear(64, 8)).eval(), torch.randn(5, 64), "mxfp4/mxint8")
    assert sorted(names(found)) == ["0: input", "0: weight"]
    figures = {observed.operand: observed for observed in found}
    assert figures["input"].format == "mxint8"
    assert figures["input"].figures.values == 2 * 5 * 64  # at each of two calls
    assert figures["weight"].format == "mxfp4"
    assert figures["weight"].figures.values == 64 * 8  # once


def test_the_figures_are_those_of_the_layer_alone() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    model = nn.Sequential(first, second).eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        second.weight.mul_(100)
    found = {o.module: o for o in studied(model, x, "mxfp4/fp32")}
    assert [o.operand for o in found.values()] == ["weight", "weight"]
    low, high = (max(found[name].figures.scales)[0] for name in ("0", "1"))
    assert high in (low + 6, low + 7)


def test_attention_has_its_four_activations() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    found = names(studied(model, torch.randn(2, 9, 64), "mxfp4"))
    attention = ["in_proj_weight", "input", "query", "key", "probabilities", "value"]
    assert found[:6] == [f"self_attn: {name}" for name in attention]
    assert {"self_attn.out_proj: weight", "linear1: input", "linear2: weight"} <= set(found)
    assert len(found) == 6 + 3 * 2


def test_a_product_that_is_switched_off_has_no_operands() -> None:
    policy = Policy.of("mxfp4", "mxfp4", scores=False)

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x)[0]
            return out

    found = names(studied(Self().eval(), torch.randn(5, 2, 32), policy))
    assert [n for n in found if n.startswith("attention: ")][2:] == [
        "attention: probabilities",
        "attention: value",
    ]


class Written(nn.Module):
    """Products written as operators, one of them in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        for _ in range(6):
            y = y @ x.mT @ x
        return y


def test_products_written_as_operators() -> None:
    found = names(studied(nn.Sequential(Written()).eval(), torch.randn(2, 8, 32) / 9, "mxfp4"))
    sides = [f"0: {side} {number}" for number in (1, 2, 3, 4) for side in ("left", "right")]
    assert found == ["0: input", "0: weight", *sides]


def test_an_embedding_shows_the_rows_that_were_looked_up() -> None:
    model = nn.Sequential(nn.Embedding(50, 32)).eval()
    (found,) = studied(model, torch.tensor([[1, 2, 1]]), "mxfp4")
    assert (found.module, found.operand, found.figures.values) == ("0", "rows", 2 * 3 * 32)


def test_a_recurrent_layer_has_all_its_weights() -> None:
    model = nn.Sequential(nn.LSTM(32, 32)).eval()
    found = names(studied(model, torch.randn(4, 2, 32), "mxfp4"))
    assert sorted(found) == ["0: input", "0: weight_hh_l0", "0: weight_ih_l0"]


def test_a_tied_weight_is_named_in_both_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    found = names(studied(Tied().eval(), torch.randn(2, 32), "mxfp4/fp32"))
    assert found == ["first: weight", "second: weight"]


def test_an_override_shows_in_the_format() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    policy = Policy.of("mxfp4", "mxfp4", overrides={"1": "mxint8/mxfp6_e2m3"})
    found = {(o.module, o.operand): o.format for o in studied(model, torch.randn(2, 32), policy)}
    assert found == {
        ("0", "input"): "mxfp4",
        ("0", "weight"): "mxfp4",
        ("1", "input"): "mxfp6_e2m3",
        ("1", "weight"): "mxint8",
    }


def test_hooks_are_gone_afterwards_also_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    convert(model, "mxfp4", verbose=False)
    study = Study(model)
    try:
        with study.watching():
            model(torch.randn(2, 31))
    except RuntimeError:
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with study.watching():
        model(torch.randn(2, 32))
    assert names(list(study.observed([]))) == ["0: input", "0: weight"]
