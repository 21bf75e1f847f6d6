"""Hugging Face models, tiny and random: every product is quantized or listed with the reason."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.convert import convert, revert
from microscale.ledger import record_products
from microscale.policy import Policy
from product_spy import ProductSpy

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 100,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, 100, (2, 40))
MASK = (torch.arange(40) < torch.tensor([40, 33])[:, None]).long()


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=100, **TOKENS
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def t5() -> Any:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=100, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _SIDE}
    config = transformers.BartConfig(
        d_model=64, vocab_size=100, max_position_embeddings=64, decoder_start_token_id=1, **sides
    )
    return transformers.BartForConditionalGeneration(config)


_SIDE = (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))


def vit() -> Any:
    sizes = {key: SIZES[key] for key in tuple(SIZES)[:4]}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


MODELS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (llama, gpt2, bert, t5, bart, vit)}


def inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    given = {"input_ids": IDS, "attention_mask": MASK}
    return given | {"decoder_input_ids": IDS[:, :7]} if name in ("t5", "bart") else given


def run(model: Any, name: str) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        result = model(**inputs(name))
    output: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return output


@pytest.fixture(params=MODELS)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, MODELS[request.param]().eval()


def test_every_product_is_quantized(named: tuple[str, Any]) -> None:
    name, model = named
    plain = run(model, name)
    conversion = convert(model, "mxint8", verbose=False)
    assert conversion.left == ()
    with record_products() as ledger, ProductSpy() as spy:
        output = run(model, name)
    assert {row.how for row in ledger} == {"emulated"}
    assert {"linear", "scores", "values"} <= {row.product for row in ledger}
    for seen in spy.seen:
        seen.check_operands("mxint8", None)
    # Scores and values of one attention are two products below; the rest is one each.
    assert len(spy.seen) == sum(row.calls for row in ledger if row.product != "embedding")
    assert 0 < (output - plain).norm() < 0.05 * plain.norm()
    revert(model)
    assert torch.equal(run(model, name), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_compile_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = MODELS[name]().eval()
    convert(model, "mxfp4/mxfp6_e2m3", verbose=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, name), run(model, name))
    torch._dynamo.reset()


def tokens(model: Any, *, use_cache: bool) -> Iterator[int]:
    result = model.generate(
        input_ids=IDS[:, :5],
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
    )
    yield from result.flatten().tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generation_with_a_cache(name: str) -> None:
    model = MODELS[name]().eval()
    # Blocks along keys see other keys with a cache than without; along features they do not.
    policy = Policy.of("mxfp4", "mxfp6_e2m3", values=False)
    convert(model, policy, verbose=False)
    cached = list(tokens(model, use_cache=True))
    assert cached == list(tokens(model, use_cache=False))
    convert(model, "mxfp4", verbose=False)
    assert len(list(tokens(model, use_cache=True))) == len(cached)


def test_eager_attention_is_two_matrix_products() -> None:
    model = llama().eval()
    model.set_attn_implementation("eager")
    convert(model, "mxfp6_e2m3", verbose=False)
    with record_products() as ledger:
        run(model, "llama")
    attention = [row for row in ledger if row.module.endswith("self_attn")]
    assert {(row.product, row.how, row.calls) for row in attention} == {("matmul", "emulated", 2)}


def test_patterns_name_modules() -> None:
    model = llama().eval()
    policy = Policy.of(
        "mxfp4",
        "mxfp4",
        ignore=("lm_head",),
        overrides={"model.layers.*.mlp.down_proj": "mxfp8", "*.self_attn": "mxint8"},
    )
    conversion = convert(model, policy, verbose=False)
    assert [entry.name for entry in conversion.left] == ["lm_head"]
    with record_products() as ledger:
        run(model, "llama")
    formats = {(row.module, row.product): row.formats[1] for row in ledger}
    assert formats["model.layers.1.mlp.down_proj", "linear"] == "mxfp8_e4m3"
    assert formats["model.layers.0.mlp.up_proj", "linear"] == "mxfp4"
    assert formats["model.layers.0.self_attn", "scores"] == "mxint8"
    assert formats["model.layers.0.self_attn.q_proj", "linear"] == "mxint8"
    assert formats["lm_head", "linear"] == "fp32"


def test_tied_weights_stay_tied() -> None:
    model = gpt2().eval()
    convert(model, "mxfp4", verbose=False)
    run(model, "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_step_of_training_lowers_the_loss() -> None:
    model = llama()
    convert(model, "mxfp4/mxfp6_e2m3", verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.gradient_checkpointing_enable()
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0]


def test_models_are_saved_as_they_were(tmp_path: Path) -> None:
    model = llama().eval()
    plain = run(model, "llama")
    convert(model, "mxfp4", verbose=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(run(loaded.eval(), "llama"), plain)
