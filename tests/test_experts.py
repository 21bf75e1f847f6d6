"""Mixtures of experts: fused three-dimensional weights are weights, however they are multiplied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale.cast import cast
from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from product_spy import ProductSpy

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 100,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, 100, (2, 40))
WAYS = ["eager", "batched_mm", "grouped_mm"]
KINDS = ["mixtral", "gpt_oss"]


def model(kind: str, way: str = "eager") -> Any:
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, **TOKENS)
        made = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.GptOssConfig(**SIZES, **TOKENS, head_dim=16)
        made = transformers.GptOssForCausalLM(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    made.set_experts_implementation(way)
    return made.eval()


def run(made: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = made(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_weights(kind: str, way: str) -> None:
    made = model(kind, way)
    plain = run(made)
    conversion = convert(made, "mxint8", verbose=False)
    assert conversion.left == ()
    experts = [entry for entry in conversion.quantized if entry.kind.endswith("Experts")]
    assert len(experts) == 2
    assert experts[0].weights == 5 * 64 * 96 * 3
    assert experts[0].weight_bits == experts[0].weights * 8.25
    with record_products() as ledger:
        output = run(made)
    assert {row.how for row in ledger} == {"emulated"}
    rows = [row for row in ledger if row.module.endswith("experts")]
    assert rows
    # A token whose second and third expert are close may go to another.
    assert 0 < (output - plain).norm() < 0.2 * plain.norm()
    revert(made)
    assert torch.equal(run(made), plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_multiplies_the_same_cast_weights(kind: str, way: str) -> None:
    layer = model(kind, way).model.layers[0].mlp.experts
    x, index = torch.randn(7, 64), torch.randint(5, (7, 2))
    weights = torch.rand(7, 2)
    convert(layer, Policy.of("mxfp4", "mxfp6_e2m3", storage=None), verbose=False)
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        result = layer(x, index, weights)
    assert {tuple(sorted(row.formats)) for row in ledger} == {("mxfp4", "mxfp6_e2m3")}
    axis = 1 if kind == "gpt_oss" else 2
    up, down = (cast(w.detach(), "mxfp4", axis) for w in (layer.gate_up_proj, layer.down_proj))
    if axis == 2:
        up, down = up.mT, down.mT
    expected = torch.zeros(7, 64, dtype=torch.float64)
    for token in range(7):
        for k in range(2):
            e = int(index[token, k])
            h = cast(x[token], "mxfp6_e2m3").double() @ up[e].double()
            if axis == 1:
                h = h + layer.gate_up_proj_bias[e].detach()
            gated = layer._apply_gate(h.float()[None])[0]
            y = cast(gated, "mxfp6_e2m3").double() @ down[e].double()
            if axis == 1:
                y = y + layer.down_proj_bias[e].detach()
            expected[token] += weights[token, k] * y
    # A sum in another order may move an element across a tie of the second cast.
    assert (result - expected).norm() < 0.02 * expected.norm()
    for seen in spy.seen:
        if way == "eager":
            seen.check_operands("mxfp6_e2m3", "mxfp4")
        if kind == "mixtral":  # the other adds biases in place
            seen.check_result()


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_experts_give_the_same_bits(kind: str, way: str) -> None:
    torch._dynamo.reset()
    layer = model(kind, way).model.layers[0].mlp.experts
    convert(layer, "mxfp4/mxfp6_e2m3", verbose=False)
    given = torch.randn(7, 64), torch.randint(5, (7, 2)), torch.rand(7, 2)
    compiled: Any = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*given), layer(*given))
    torch._dynamo.reset()


def test_experts_that_compiled_code_hides_are_refused() -> None:
    torch._dynamo.reset()
    layer = model("mixtral", "grouped_mm").model.layers[0].mlp.experts
    convert(layer, "mxfp4", verbose=False)
    given = torch.randn(7, 64), torch.randint(5, (7, 2)), torch.rand(7, 2)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compile hides grouped_mm from the casts"):
        compiled(*given)
    torch._dynamo.reset()


@pytest.mark.usefixtures("weights_decoded_first")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spelling", ["mxfp4/mxfp6_e2m3", "int8-channel/int8-token", "nvfp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_come_back_from_files(kind: str, spelling: str, way: str, tmp_path: Path) -> None:
    made = model(kind, way)
    convert(made, spelling, verbose=False)
    expected = run(made)
    save(made, tmp_path / "m.safetensors")
    fresh = model(kind, way)
    stored = load(tmp_path / "m.safetensors", fresh)
    torch.testing.assert_close(run(fresh), expected, rtol=1e-4, atol=1e-4)
    packed = isinstance(stored["model.layers.0.mlp.experts.down_proj"], BlockTensor)
    assert packed == (spelling != "nvfp4")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_experts(kind: str, way: str) -> None:
    made = model(kind, way).train()
    convert(made, "mxfp4/mxfp6_e2m3", verbose=False)
    made(input_ids=IDS, labels=IDS).loss.backward()
    for layer in made.model.layers:
        assert layer.mlp.experts.gate_up_proj.grad.any()
        assert layer.mlp.experts.down_proj.grad.any()


def test_many_experts_are_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import microscale.weights as weights_module

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(40, 32, 32))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x @ w for w in self.w]

    layer, calls = Many(), []

    def counting(x: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(x.shape)
        result: Tensor = cast(x, *args, **options)
        return result

    monkeypatch.setattr(weights_module, "cast", counting)
    convert(layer, "mxfp4", verbose=False)
    for _ in range(3):
        layer(torch.randn(2, 32))
    assert calls.count(torch.Size([32, 32])) == 40
